"""Subscribers that give no sign of life any more, and when to forget them.

A sign of life is a call that changes or checks subscriptions, and a confirmed message or notice.
`Leases` keeps subscribers for ever, and does nothing. `KeptLeases` collects signs of life and
writes them down in batches, each url at most once in a third of `subscription_ttl`. Who was not
seen for that time, and has no MISSED notice to come, is removed. Any number of broadcasters on one
database do this side by side. If for a while none of them did, because all were stopped or the
option was off, everybody gets the whole time anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from itertools import islice

from lonelypss.metrics import NO_METRICS, Metrics
from lonelypss.store.base import PRUNED_AT_ONCE, Store, StoreUnavailable

log = logging.getLogger(__name__)

_BATCH = 1000
_LONGEST_PAUSE = 60.0


class Leases:
    """Nobody is forgotten."""

    def seen(self, url: str) -> None:
        """The subscriber behind `url`, which has subscriptions, is alive."""

    async def seen_at_last(self, url: str) -> None:
        """The same, written down on return: nothing else keeps its subscriptions any more.

        Raises:
            StoreUnavailable: it could not be written down.
        """

    async def run(self) -> None:
        """Writes down who was seen and removes who was not, until cancelled."""


NO_LEASES = Leases()


class KeptLeases(Leases):
    """See the module's text.

    Args:
        ttl: seconds without a sign of life.
        clock: unix seconds.
    """

    def __init__(
        self,
        ttl: float,
        store: Store,
        metrics: Metrics = NO_METRICS,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.ttl = ttl
        self.store = store
        self.metrics = metrics
        self.clock = clock
        self.pause = min(ttl / 6, _LONGEST_PAUSE)
        self._period = 0
        self._seen: set[str] = set()
        """In this period, whether written down or not; only urls that have subscriptions."""
        self._unwritten: dict[str, None] = {}

    def seen(self, url: str) -> None:
        if url not in self._seen:
            self._seen.add(url)
            self._unwritten[url] = None

    async def seen_at_last(self, url: str) -> None:
        await self.store.renew_leases([url], self.clock())

    async def run(self) -> None:
        while True:
            try:
                await self.look()
            except StoreUnavailable as e:
                log.warning("cannot look for stale subscriptions, trying again soon: %s", e)
            except Exception:
                log.exception("looking for stale subscriptions failed in an unforeseen way")
            await asyncio.sleep(self.pause)

    async def look(self) -> None:
        """Writes down who was seen, then removes who was not.

        Raises:
            StoreUnavailable: what was not written is kept for the next time.
        """
        if (period := int(self.clock() / (self.ttl / 3))) != self._period:
            self._period = period
            self._seen = set(self._unwritten)
        while urls := list(islice(self._unwritten, _BATCH)):
            await self.store.renew_leases(urls, self.clock())
            for url in urls:
                del self._unwritten[url]
        pruned = PRUNED_AT_ONCE
        while pruned == PRUNED_AT_ONCE:
            now = self.clock()
            gone = await self.store.prune(now, self.ttl, now + 3 * self.pause)
            for url, number in gone.items():
                log.warning(
                    "%r gave no sign of life for subscription_ttl (%g s): its %d subscriptions"
                    " were removed",
                    url,
                    self.ttl,
                    number,
                    extra={"fields": {"url": url, "subscriptions": number}},
                )
                self.metrics.pruned(number)
            pruned = len(gone)
