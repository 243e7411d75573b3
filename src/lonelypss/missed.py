"""MISSED notices: tell a subscriber, until it confirms, that a message may not have reached it.

Rows of the store, by (subscription, topic), with absolute times. Any broadcaster on the same
database may take a due row; a lease keeps others off it meanwhile. A notice never ends a
subscription.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from lonelypsp.bodies import Missed, ResponseConfirmMissed
from lonelypsp.errors import AuthResult, ProtocolError
from lonelypsp.replay import Code
from lonelypsp.wire import decode, encode
from lonelypss.config import BroadcasterConfig
from lonelypss.leases import NO_LEASES, Leases
from lonelypss.logs import Lines
from lonelypss.metrics import NO_METRICS, Metrics
from lonelypss.sender import Post, Reply, Sender, authorization_header
from lonelypss.store.base import (
    MissedNotice,
    Store,
    StoreUnavailable,
    Subscription,
    UsedBefore,
)
from lonelypss.tracing import NO_TRACING, Tracing
from lonelypss.urlpolicy import Target, UrlRefused, host_of

log = logging.getLogger(__name__)

BATCH = 256
MAX_UNDER_WAY = 1024
"""Notices being sent at one time: a full batch of dead hosts holds up nobody else's notices."""
RETRY_AFTER_RANGE = (1.0, 3600.0)
"""Seconds between which a subscriber's Retry-After is believed."""


class MissedNotices:
    """Records failures and sends the notices that are due. `run` is the sweeper."""

    def __init__(
        self,
        config: BroadcasterConfig,
        store: Store,
        sender: Sender,
        metrics: Metrics = NO_METRICS,
        tracing: Tracing = NO_TRACING,
        leases: Leases = NO_LEASES,
    ) -> None:
        self.config = config
        self.store = store
        self.sender = sender
        self.metrics = metrics
        self.tracing = tracing
        self.attempts = Lines(log)
        self.leases = leases
        self._wake = asyncio.Event()
        self._under_way: set[asyncio.Task[None]] = set()
        self._journal: dict[tuple[int, bytes], _Note] = {}

    async def record(self, items: Sequence[tuple[Subscription, bytes]]) -> None:
        """Remembers that these (subscription, topic) pairs were not reached.

        Raises:
            StoreUnavailable: nothing was recorded.
        """
        for subscription, topic in items:
            if note := self._journal.get((subscription.id, topic)):
                note.failed = True
        await self._record(items, 0.0)

    async def _record(self, items: Sequence[tuple[Subscription, bytes]], extra: float) -> None:
        delay = self.config.missed_delay(0)
        if not items or delay is None:
            return
        await self.store.record_missed(items, time.time() + delay + extra)
        self.metrics.notice("recorded", len(items))
        self._wake.set()

    async def journal(self, items: Sequence[tuple[Subscription, bytes]], grace: float) -> None:
        """Notes as a precaution what may turn out not to be reached, due after `grace` seconds.

        Fan-outs of one topic share their notes, since what was noted twice cannot be taken back.
        Each needs its own `release` at the end, also when this raises.

        Raises:
            StoreUnavailable: nothing was noted.
        """
        fresh = [(s, topic) for s, topic in items if (s.id, topic) not in self._journal]
        if fresh:
            write = asyncio.ensure_future(self._record(fresh, grace))
            self._journal |= {(s.id, topic): _Note(write) for s, topic in fresh}
        notes = [self._journal[s.id, topic] for s, topic in items]
        for note in notes:
            note.holders += 1
        # shielded: others rely on them too
        await asyncio.shield(asyncio.gather(*{note.write for note in notes}))

    def release(
        self, items: Sequence[tuple[Subscription, bytes]]
    ) -> list[tuple[Subscription, bytes]]:
        """Ends what `journal` began.

        Returns:
            What nobody needs any more, to be removed from the store without waiting for anything
            in between: the next fan-out will write it down again.
        """
        unneeded = []
        for subscription, topic in items:
            note = self._journal[subscription.id, topic]
            note.holders -= 1
            if not note.holders:
                del self._journal[subscription.id, topic]
                if not note.failed:
                    unneeded.append((subscription, topic))
        return unneeded

    async def run(self) -> None:
        """Sends due notices until cancelled."""
        self._wake = asyncio.Event()  # belongs to the loop on which it is waited for
        try:
            while True:
                self._wake.clear()
                pause = await self._sweep()
                try:
                    async with asyncio.timeout(pause):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _sweep(self) -> float:
        """Starts on what is due; seconds until the next look."""
        pause = self.config.sweep_missed_interval
        room = min(BATCH, MAX_UNDER_WAY - len(self._under_way))
        if room <= 0:
            return pause  # whichever ends first wakes us
        try:
            for notice in await self.store.claim_missed(
                time.time(), room, self.config.missed_lease
            ):
                task = asyncio.create_task(self._announce(notice))
                self._under_way.add(task)
                task.add_done_callback(self._ended)
            due = await self.store.next_due()
        except StoreUnavailable as e:
            log.warning("cannot look for MISSED notices, trying again soon: %s", e)
            return min(pause, float(e.retry_after))
        except Exception:
            log.exception("looking for MISSED notices failed in an unforeseen way")
            return pause
        return pause if due is None else min(pause, max(0.02, due - time.time()))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a MISSED notice failed in an unforeseen way", exc_info=error)

    async def _announce(self, notice: MissedNotice) -> None:
        outcome: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
        step = self.tracing.notice(notice.recovery, notice.topic, notice.attempts + 1)
        try:
            target = self.sender.policy.target(notice.recovery)
        except UrlRefused as e:
            outcome.set_result(Reply(0, b"", f"url refused: {e}"))
        else:
            post = MissedPost(self.config, notice, target, outcome, step.tracing)
            self.sender.post(post)
        failure = await outcome
        step.end(None if failure is None else reason(failure))
        try:
            if failure is None:
                failure = await self._remember(post.codes)
            await self._settle(notice, failure)
        except StoreUnavailable as e:
            log.warning(
                "cannot write down how the MISSED notice to %r ended, it will be repeated: %s",
                notice.recovery,
                e,
            )

    async def _remember(self, codes: Sequence[Code]) -> Reply | None:
        """Why a confirmation does not count, if it was used before."""
        try:
            await self.store.remember(codes)
        except UsedBefore:
            return Reply(200, b"", "the authorization of the reply was used before")
        return None

    async def _settle(self, notice: MissedNotice, failure: Reply | None) -> None:
        if failure is None:
            self.attempts.write(
                logging.INFO,
                (host_of(notice.recovery), "confirmed"),
                "%r knows that it missed %r",
                *(notice.recovery, notice.topic),
                topic=notice.topic,
                url=notice.recovery,
            )
            self.metrics.notice("confirmed")
            await self.leases.seen_at_last(notice.url)
            await self.store.finish_missed(notice, time.time())
            return
        delay = self.config.missed_delay(notice.attempts + 1)
        what_next = "given up" if delay is None else f"again in {delay:.0f} s"
        attempt, why = notice.attempts + 1, reason(failure)
        self.attempts.write(
            logging.WARNING,
            (host_of(notice.recovery), "failed"),
            "MISSED notice about %r to %r failed (attempt %d): %s; %s",
            *(notice.topic, notice.recovery, attempt, why, what_next),
            topic=notice.topic,
            url=notice.recovery,
            attempt=attempt,
            reason=why,
            next=what_next,
        )
        self.metrics.notice("given_up" if delay is None else "retried")
        if delay is None:
            await self.store.finish_missed(notice, time.time())
        else:
            await self.store.retry_missed(notice, time.time() + max(delay, wish(failure)))


class _Note:
    """A row that is written as a precaution, and how many fan-outs rely on it."""

    __slots__ = ("failed", "holders", "write")

    def __init__(self, write: asyncio.Future[None]) -> None:
        self.write = write
        self.holders = 0
        self.failed = False


def reason(failure: Reply) -> str:
    """Why it is none, for people."""
    return failure.error or f"status {failure.status}"


def wish(reply: Reply) -> float:
    """Seconds that the subscriber asks us to wait, within reason."""
    asked = reply.retry_after
    if reply.status not in (429, 503) or not (asked.isascii() and asked.isdigit()):
        return 0.0
    low, high = RETRY_AFTER_RANGE
    return min(max(float(asked[:10]), low), high)


class MissedPost(Post):
    """One attempt at one notice. `outcome` becomes None once confirmed, else the other reply."""

    __slots__ = ("codes", "config", "notice", "outcome", "tracing")

    def __init__(
        self,
        config: BroadcasterConfig,
        notice: MissedNotice,
        target: Target,
        outcome: asyncio.Future[Reply | None],
        tracing: bytes,
    ) -> None:
        super().__init__(target, None)
        self.config = config
        self.notice = notice
        self.outcome = outcome
        self.tracing = tracing
        self.codes: Sequence[Code] = ()

    def head(self) -> bytes:
        body = encode(Missed(self.tracing, self.notice.topic))
        authorization = self.config.auth.to_subscriber.authorize(
            "MISSED",
            {
                "tracing": self.tracing,
                "recovery": self.notice.recovery,
                "topic": self.notice.topic,
            },
            time.time(),
        )
        length = b"Content-Length: %d\r\n" % len(body)
        return b"".join((length, authorization_header(authorization), b"\r\n", body))

    def finish(self, reply: Reply) -> None:
        if not self.outcome.done():  # done: the sweeper was cancelled
            try:
                self.outcome.set_result(self._failure(reply))
            except Exception as e:
                log.exception("cannot judge a reply")  # a pluggable authenticator
                self.outcome.set_result(Reply(0, b"", f"cannot judge the reply: {e!r}"))

    def _failure(self, reply: Reply) -> Reply | None:
        if reply.error or not 200 <= reply.status < 300:
            return reply
        try:
            answer = decode(ResponseConfirmMissed, reply.body)
        except ProtocolError as e:
            return Reply(reply.status, b"", f"bad reply: {e}")
        result = self.config.auth.to_broadcaster.check(
            "CONFIRM_MISSED",
            {"tracing": answer.tracing, "topic": self.notice.topic, "url": self.notice.recovery},
            answer.authorization,
            time.time(),
        )
        self.codes = self.config.auth.shared.take()
        if result is AuthResult.OK:
            return None
        return Reply(reply.status, b"", f"the authorization of the reply is {result.name}")
