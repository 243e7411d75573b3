"""MISSED notices: tell a subscriber, until it confirms, that a message may not have reached it.

Rows of the store, by (subscription, topic), with absolute times. Any broadcaster on the same
database may take a due row; a lease keeps others off it meanwhile. A notice never ends a
subscription.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

from lonelypsp.bodies import Missed, ResponseConfirmMissed
from lonelypsp.errors import AuthResult, ProtocolError
from lonelypsp.replay import Code
from lonelypsp.wire import decode, encode
from lonelypss.config import BroadcasterConfig
from lonelypss.leases import NO_LEASES, Leases
from lonelypss.logs import Lines
from lonelypss.metrics import NO_METRICS, Metrics
from lonelypss.outcomes import Outcome, Reply, judge, wish
from lonelypss.sender import Post, Sender, authorization_header
from lonelypss.store.base import (
    MissedNotice,
    Store,
    StoreUnavailable,
    Subscription,
    UsedBefore,
)
from lonelypss.tracing import NO_TRACING, Tracing
from lonelypss.urlpolicy import Origin, Target, UrlRefused, host_of

log = logging.getLogger(__name__)

BATCH = 256
MAX_UNDER_WAY = 1024
"""Notices being sent at one time: a full batch of dead hosts holds up nobody else's notices."""
MAX_UNWRITTEN = 100_000
"""Failed deliveries in memory while the database is away."""
MAX_AT_HOST = 256
"""Of these to one host: a slow one with many notices holds up nobody else's."""
POSTPONED = 0.1
"""Seconds, at least, after which what had no room is looked at again."""
POSTPONED_RATE = 1000.0
"""Of one host that are looked at again in one second."""
OVER_BUDGET = "skipped: too many go to hosts that do not answer (missed_retry_budget)"


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
        self._next_look = math.inf
        """When it will look without being woken."""
        self._timer: asyncio.Timeout | None = None
        self._under_way: set[asyncio.Task[None]] = set()
        self._at_host: Counter[Origin] = Counter()
        self._at_failing = 0
        self._again: dict[Origin, float] = {}
        """When the last notice of a host that was postponed will be looked at again."""
        self._journal: dict[tuple[int, bytes], _Note] = {}
        self._unwritten: dict[tuple[int, bytes], tuple[Subscription, bytes]] = {}

    async def record(self, items: Sequence[tuple[Subscription, bytes]], pause: float = 0.0) -> None:
        """Remembers that these (subscription, topic) pairs were not reached; in memory until the
        database is back, if it is away.

        Args:
            pause: seconds that must pass before their notices.

        Raises:
            StoreUnavailable: nothing was recorded, there is too much in memory.
        """
        for subscription, topic in items:
            if note := self._journal.get((subscription.id, topic)):
                note.failed = True
        delay = self.config.missed_delay(0) or 0.0
        try:
            await self._record(items, max(delay, pause))
        except StoreUnavailable as e:
            if len(self._unwritten) + len(items) > MAX_UNWRITTEN:
                raise
            log.warning("%d failed deliveries stay in memory for now: %s", len(items), e)
            if not self._unwritten:
                self._wake.set()
            self._unwritten |= {(s.id, topic): (s, topic) for s, topic in items}

    async def _write_down(self) -> None:
        """Writes what stayed in memory."""
        if not self._unwritten:
            return
        items, self._unwritten = self._unwritten, {}
        try:
            await self._record(list(items.values()), self.config.missed_delay(0) or 0.0)
        except BaseException:
            self._unwritten = items | self._unwritten
            raise

    async def _record(self, items: Sequence[tuple[Subscription, bytes]], delay: float) -> None:
        if not items:
            return
        due = time.time() + delay
        await self.store.record_missed(items, due)
        self.metrics.notice("recorded", len(items))
        self._look_by(due)

    def _look_by(self, due: float) -> None:
        """Something will be due then."""
        if due < self._next_look:
            self._next_look = due
            if self._timer is not None and not self._timer.expired():
                self._timer.reschedule(asyncio.get_running_loop().time() + _until(due))

    async def journal(self, items: Sequence[tuple[Subscription, bytes]], grace: float) -> None:
        """Notes as a precaution what may turn out not to be reached, due after `grace` seconds.

        Fan-outs of one topic share their notes, since what was noted twice cannot be taken back.
        Each needs its own `release` at the end, also when this raises.

        Raises:
            StoreUnavailable: nothing was noted.
        """
        fresh = [(s, topic) for s, topic in items if (s.id, topic) not in self._journal]
        if fresh:
            delay = grace + (self.config.missed_delay(0) or 0.0)
            write = asyncio.ensure_future(self._record(fresh, delay))
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
                self._next_look = math.inf
                self._look_by(time.time() + await self._sweep())
                try:
                    async with asyncio.timeout(_until(self._next_look)) as self._timer:
                        await self._wake.wait()
                except TimeoutError:
                    pass
                finally:
                    self._timer = None
        finally:
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)
            try:
                await self._write_down()
            except StoreUnavailable as e:
                log.error("no MISSED notice for %d failed deliveries: %s", len(self._unwritten), e)

    async def _sweep(self) -> float:
        """Starts on what is due; seconds until the next look."""
        pause = self.config.sweep_missed_interval
        room = min(BATCH, MAX_UNDER_WAY - len(self._under_way))
        if room <= 0:
            return pause  # whichever ends first wakes us
        try:
            await self._write_down()
            lease = self.config.missed_lease
            claimed = await self.store.claim_missed(time.time(), room, lease)
            postponed: list[tuple[MissedNotice, float]] = []
            for notices in _shared(claimed):
                if (later := self._start(notices)) is not None:
                    postponed += [(notice, later) for notice in notices]
            if postponed:
                await self.store.postpone_missed(postponed)
            due = await self.store.next_due()
        except StoreUnavailable as e:
            log.warning("cannot look for MISSED notices, trying again soon: %s", e)
            return min(pause, float(e.retry_after))
        except Exception:
            log.exception("looking for MISSED notices failed in an unforeseen way")
            return pause
        return pause if due is None else min(pause, _until(due))

    def _start(self, notices: list[MissedNotice]) -> float | None:
        """Begins to send what they share, if it is its turn; else when to look at it again."""
        target, answer, failing = None, None, False
        try:
            target = self.sender.policy.target(notices[0].recovery)
        except UrlRefused as e:
            answer = Reply(0, b"", f"url refused: {e}", "", Outcome.REFUSED)
        origin = () if target is None else target.origin
        if target is not None:
            if self._at_host[origin] >= MAX_AT_HOST:
                return self._postponed(origin)
            failing = self.sender.is_failing(target)
            if failing and self._at_failing >= self.config.missed_retry_budget:
                answer, failing = Reply(0, b"", OVER_BUDGET, "", Outcome.SKIPPED), False
        self._at_host[origin] += 1
        self._at_failing += failing
        task = asyncio.create_task(self._announce(notices, target, answer))
        self._under_way.add(task)
        task.add_done_callback(partial(self._ended, origin, failing))
        return None

    def _postponed(self, origin: Origin) -> float:
        now = time.time()
        due = max(now + POSTPONED, self._again.get(origin, 0.0)) + 1.0 / POSTPONED_RATE
        self._again[origin] = due
        return due

    def _ended(self, origin: Origin, failing: bool, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._at_failing -= failing
        self._at_host[origin] -= 1
        if not self._at_host[origin]:
            del self._at_host[origin]
            self._again.pop(origin, None)
        if len(self._under_way) == MAX_UNDER_WAY - 1:
            self._wake.set()  # it may have stopped for want of room
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a MISSED notice failed in an unforeseen way", exc_info=error)

    async def _announce(
        self, notices: list[MissedNotice], target: Target | None, answer: Reply | None
    ) -> None:
        """Sends it to `target`, unless there is an answer already."""
        notice = max(notices, key=lambda notice: notice.attempts)
        outcome: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
        step = self.tracing.notice(notice.recovery, notice.topic, notice.attempts + 1)
        if answer is not None or target is None:
            outcome.set_result(answer)
        else:
            post = MissedPost(self.config, notice, target, outcome, step.tracing)
            self.sender.post(post)
        failure = await outcome
        step.end(None if failure is None else reason(failure))
        try:
            if failure is None:
                failure = await self._remember(post.codes)
            await self._settle(notice, notices, failure)
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

    async def _settle(
        self, notice: MissedNotice, notices: list[MissedNotice], failure: Reply | None
    ) -> None:
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
            await self._finish(notices)
            return
        delay = self.config.missed_delay(notice.attempts + 1)
        what_next = "given up" if delay is None else f"again in {delay:.0f} s"
        attempt, why = notice.attempts + 1, reason(failure)
        self.attempts.write(
            logging.DEBUG if failure.outcome is Outcome.SKIPPED else logging.WARNING,
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
        due = time.time() + max(delay or 0.0, wish(failure))
        if delay is None:
            await self._finish(notices)
            return
        for each in notices:
            await self.store.retry_missed(each, due)
        self._look_by(due)

    async def _finish(self, notices: Sequence[MissedNotice]) -> None:
        for each in notices:
            await self.store.finish_missed(each, time.time())
        self._wake.set()  # those that failed again meanwhile are due at once


def _until(due: float) -> float:
    """Seconds to wait for it; timers of uvloop may be early by half a millisecond."""
    return max(0.02, due - time.time() + 0.001)


def _shared(notices: Sequence[MissedNotice]) -> Iterable[list[MissedNotice]]:
    """Those that tell the same to the same: subscriptions of one url may overlap."""
    groups: dict[tuple[str, str, bytes], list[MissedNotice]] = {}
    for notice in notices:
        groups.setdefault((notice.url, notice.recovery, notice.topic), []).append(notice)
    return groups.values()


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
        if judge(reply) is not None:
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
