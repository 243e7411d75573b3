"""THE HOT PATH: from a message to its count. Read top to bottom.

notify -> store.match (one query) -> our own websockets, in this process
       -> one Delivery per other url -> Sender -> Delivery.finish
       -> failures become rows of missed notices -> the number of subscribers reached
"""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import time
from collections.abc import Iterable, Sequence
from os import urandom
from typing import Protocol

from lonelypsp.bodies import ReceiveHead, ResponseConfirmReceive
from lonelypsp.errors import AuthResult, ProtocolError
from lonelypsp.explain import DELIVERED, ExplainedSubscriber, Explanation, pack
from lonelypsp.replay import Code
from lonelypsp.spool import Body
from lonelypsp.tracecontext import hops
from lonelypsp.wire import decode, encode
from lonelypss.config import BroadcasterConfig, UnsubscribeImmediate
from lonelypss.leases import NO_LEASES, Leases
from lonelypss.logs import Lines
from lonelypss.metrics import NO_METRICS, Metrics
from lonelypss.missed import MissedNotices
from lonelypss.outcomes import Outcome, Reply, judge, wish
from lonelypss.sender import (
    ONE_WRITE,
    Post,
    Sender,
    Unattended,
    authorization_header,
)
from lonelypss.store.base import Kind, Store, StoreUnavailable, Subscription
from lonelypss.tracing import NO_MESSAGE_STEP, MessageStep
from lonelypss.urlpolicy import Target, UrlRefused, host_of

log = logging.getLogger(__name__)

MAX_COUNT = 0xFFFF_FFFF
_CONFIRMED = Outcome.CONFIRMED  # members of enums are slow to find before Python 3.12
HINTS = 3
HINT_PAUSE = 60.0
"""Seconds between two of them that count."""
MAX_HINTS = 10_000
IDENTIFIER_LENGTH = 8
_MOST_EXPLAINED = 1000  # an answer has room for fewer


class Local(Protocol):
    """The websockets of this process.

    Attributes:
        receive_url: where other broadcasters send what concerns them; None: there are no others.
    """

    @property
    def receive_url(self) -> str | None: ...

    def deliver(self, topic: bytes, body: Body, step: MessageStep) -> int:
        """Queues a message for all that want it; how many. Shares `body` with the caller."""
        ...


class Report:
    """Is told what becomes of a message, and keeps nothing of it."""

    def queued(self, websockets: int) -> None:
        """So many websockets of this process get it."""

    def settled(
        self, url: str, matched: Sequence[Subscription], outcome: str, reason: str, seconds: float
    ) -> None:
        """A delivery has ended; `matched` are the subscriptions that led to it."""

    def pack(self) -> bytes:
        """The tracing bytes that tell of it; empty: there is nothing to tell."""
        return b""


NO_REPORT = Report()


class Explained(Report):
    """Keeps it for the publisher, as much as there is room for; see `lonelypsp.explain`."""

    def __init__(self) -> None:
        self._kept: dict[bool, list[ExplainedSubscriber]] = {False: [], True: []}
        self._omitted = 0
        self._websockets = 0

    def queued(self, websockets: int) -> None:
        self._websockets = websockets

    def settled(
        self, url: str, matched: Sequence[Subscription], outcome: str, reason: str, seconds: float
    ) -> None:
        kept = self._kept[outcome == "confirmed"]
        if len(kept) == _MOST_EXPLAINED:
            self._omitted += 1
            return
        kept.append(
            ExplainedSubscriber(
                url=url,
                outcome=DELIVERED if outcome == "confirmed" else outcome,
                reason=reason,
                will_be_told=outcome in ("failed", "skipped") and any(s.recovery for s in matched),
                exact=any(s.kind is Kind.EXACT for s in matched),
                globs=tuple(s.pattern.decode() for s in matched if s.kind is Kind.GLOB),
                seconds=seconds,
            )
        )

    def pack(self) -> bytes:
        subscribers = (*self._kept[False], *self._kept[True])
        return pack(Explanation(subscribers, self._omitted, self._websockets))


class Fanout:
    """Delivers messages to everybody who subscribed.

    Args:
        store: who subscribed.
        sender: how to reach them.
        missed: where failures go.
        local: who is reached without a request.
    """

    def __init__(
        self,
        config: BroadcasterConfig,
        store: Store,
        sender: Sender,
        missed: MissedNotices,
        local: Local,
        metrics: Metrics = NO_METRICS,
        leases: Leases = NO_LEASES,
    ) -> None:
        self.config = config
        self.store = store
        self.sender = sender
        self.missed = missed
        self.local = local
        self.metrics = metrics
        self.failures = Lines(log)
        self.leases = leases
        self.hints = Hints(config)

    async def notify(
        self,
        topic: bytes,
        body: Body,
        report: Report = NO_REPORT,
        step: MessageStep = NO_MESSAGE_STEP,
        codes: Sequence[Code] = (),
    ) -> int:
        """Delivers one message to all its subscribers at once and waits for all answers.

        Each url gets one POST, however many of its subscriptions match, and each websocket one
        copy.

        Args:
            report: is told what becomes of each.
            step: that of the message in its trace.
            codes: of its signature; see `Store.remember`.

        Returns:
            how many subscribers confirmed, at most 2^32 - 1.

        Raises:
            StoreUnavailable, UsedBefore: nobody was asked; nothing was delivered.
        """
        urls = await self.match(topic, codes=codes)
        count = self.local.deliver(topic, body, step)
        report.queued(count)
        if urls:
            count += await self.post(topic, body, urls, report, step)
        return min(count, MAX_COUNT)

    def is_loop(self, topic: bytes, tracing: bytes) -> bool:
        """Whether a message goes round in circles, to be delivered to nobody; counted if so."""
        if not tracing or hops(tracing) <= self.config.max_hops:
            return False
        text = "refused a message on %r: forwarded too often (max_hops)"
        self.failures.write(logging.WARNING, "loops", text, topic, topic=topic)
        self.metrics.looped()
        return True

    async def match(
        self, topic: bytes, since: float = math.inf, codes: Sequence[Code] = ()
    ) -> dict[str, list[Subscription]]:
        """The matching subscriptions of each url that is not our own; see `Store.match`."""
        started = time.monotonic()
        try:
            found = await self.store.match(topic, since, codes)
        except StoreUnavailable:
            self.config.auth.shared.forget(codes)
            raise
        self.metrics.matched(time.monotonic() - started)
        return self._by_url(found)

    async def remember(self, codes: Sequence[Code]) -> None:
        """Returns once signatures are known everywhere to be used; see `Store.remember`."""
        try:
            await self.store.remember(codes)
        except StoreUnavailable:
            self.config.auth.shared.forget(codes)
            raise

    def urls_known(self, topic: bytes, since: float) -> dict[str, list[Subscription]] | None:
        """As `match`, if that is known without waiting; else None."""
        found = self.store.found(topic, since)
        return None if found is None else self._by_url(found)

    def _by_url(self, matches: Sequence[Subscription]) -> dict[str, list[Subscription]]:
        urls: dict[str, list[Subscription]] = {}
        for subscription in matches:
            urls.setdefault(subscription.url, []).append(subscription)
        if (own := self.local.receive_url) is not None:
            urls.pop(own, None)
        return urls

    async def post(
        self,
        topic: bytes,
        body: Body,
        urls: dict[str, list[Subscription]],
        report: Report = NO_REPORT,
        step: MessageStep = NO_MESSAGE_STEP,
    ) -> int:
        """Delivers one message to `urls`; how many confirmed."""
        round_ = Round(self, topic, body, urls, report, step)
        try:
            if self.config.journal_after == 0:
                await round_.journal()
            round_.start()
            await round_.finished()
            if round_.failed or round_.unsubscribed or round_.journaled:
                await round_.settle()
        finally:
            self.missed.release(round_.journaled)
        return round_.count


class Round:
    """One message on its way to all its subscribers."""

    def __init__(
        self,
        fanout: Fanout,
        topic: bytes,
        body: Body,
        urls: dict[str, list[Subscription]],
        report: Report,
        step: MessageStep,
    ) -> None:
        self.fanout = fanout
        self.report = report
        self.config = fanout.config
        self.topic = topic
        self.body = body
        self.urls = urls
        self.step = step
        self.open = set(urls)
        self.count = 0
        self.started = time.monotonic()
        self.failed: dict[str, float] = {}
        """And how many seconds each wants to be left alone."""
        self.unsubscribed: list[str] = []
        self.journaled: list[tuple[Subscription, bytes]] = []
        self.loop = asyncio.get_running_loop()
        self.news: asyncio.Future[None] = self.loop.create_future()
        """Done when nothing is open any more, or when it is time to look."""
        digest = base64.b64encode(body.sha512).decode("ascii")
        self.digest_header = f"Repr-Digest: sha-512={digest}\r\n".encode()

    def start(self) -> None:
        """Hands one delivery per url to the sender."""
        identifiers = urandom(IDENTIFIER_LENGTH * len(self.urls))
        refused: list[tuple[str, UrlRefused]] = []
        sender = self.fanout.sender
        for n, url in enumerate(self.urls):
            at = n * IDENTIFIER_LENGTH
            try:
                target = sender.policy.target(url)
            except UrlRefused as e:
                refused.append((url, e))
                continue
            identifier = identifiers[at : at + IDENTIFIER_LENGTH]
            tracing = self.step.delivery(url, identifier)
            sender.post(Delivery(self, url, target, identifier, tracing))
        for url, error in refused:
            self.fail(url, Outcome.REFUSED, f"url refused: {error}")

    async def finished(self) -> None:
        """Waits for all answers; on the way writes down what is open after `journal_after`."""
        if self.config.journal_after > 0:
            timer = self.loop.call_later(self.config.journal_after, self._tell)
            try:
                await self.news
            finally:
                timer.cancel()
            if self.open:
                self.news = self.loop.create_future()
                await self.journal()
        await self.news

    def _tell(self) -> None:
        if not self.news.done():
            self.news.set_result(None)

    def confirm(self, url: str, count: int) -> None:
        self.count += count
        self.fanout.leases.seen(url)
        self._settled(url, _CONFIRMED)

    def unsubscribe(self, url: str) -> None:
        self.unsubscribed.append(url)
        reason = "it answered 00 0a: it does not want this (any more)"
        self._settled(url, Outcome.UNSUBSCRIBED, reason)

    def fail(self, url: str, outcome: Outcome, reason: str, pause: float = 0.0) -> None:
        """A MISSED notice follows, if it can, after `pause` seconds or later."""
        recoverable = any(s.recovery for s in self.urls[url])
        what_next = (
            "a MISSED notice follows" if recoverable else "it has no recovery url, nothing follows"
        )
        self.fanout.failures.write(
            # of a host that is left alone, one line was written when it was decided
            logging.DEBUG if outcome is Outcome.SKIPPED else logging.WARNING,
            host_of(url),
            "delivery of topic %r to %r failed: %s; %s",
            *(self.topic, url, reason, what_next),
            topic=self.topic,
            url=url,
            reason=reason,
            next=what_next,
            tracing=self.step.tracing,
        )
        self.failed[url] = pause
        self._settled(url, outcome, reason)

    def _settled(self, url: str, outcome: Outcome, reason: str = "") -> None:
        seconds, label = time.monotonic() - self.started, outcome.label
        self.fanout.metrics.delivered(label, seconds)
        self.report.settled(url, self.urls[url], label, reason, seconds)
        self.step.settled(url, label, reason)
        self.open.discard(url)
        if not self.open:
            self._tell()

    async def journal(self) -> None:
        """Writes down what is still open, so that it outlives this process."""
        length, rate = self.body.length, self.config.outgoing_http_min_rate
        grace = (self.config.outgoing_http_timeout_total or 300.0) + length / rate
        self.journaled = self._missed(self.open)
        try:
            await self.fanout.missed.journal(self.journaled, grace)
        except StoreUnavailable as e:
            log.warning("cannot journal the fan-out of topic %r: %s", self.topic, e)

    async def settle(self) -> None:
        """Writes down what the deliveries came to."""
        store, missed = self.fanout.store, self.fanout.missed
        # the message is out and counted: an error now would only make the publisher repeat it
        try:
            for pause in set(self.failed.values()):
                urls = [url for url, asked in self.failed.items() if asked == pause]
                await missed.record(self._missed(urls), pause)
        except StoreUnavailable as e:
            log.error(
                "topic %r: cannot record %d failed deliveries, no MISSED notice will follow: %s",
                self.topic,
                len(self.failed),
                e,
            )
        try:
            if self.unsubscribed:
                log.info("unsubscribed on the subscriber's word: %r", self.unsubscribed)
                await store.drop([s for url in self.unsubscribed for s in self.urls[url]])
            unneeded, self.journaled = missed.release(self.journaled), []
            await store.clear_missed(unneeded)
        except StoreUnavailable as e:
            log.warning("topic %r: needless messages or notices may follow: %s", self.topic, e)

    def _missed(self, urls: Iterable[str]) -> list[tuple[Subscription, bytes]]:
        """All that matched: the news must outlive each of them that is unsubscribed meanwhile.
        Those of one url share a notice."""
        return [(s, self.topic) for url in urls for s in self.urls[url] if s.recovery]


class Delivery(Post):
    """One message on its way to one url."""

    __slots__ = ("identifier", "round", "tracing", "url")

    def __init__(
        self, round_: Round, url: str, target: Target, identifier: bytes, tracing: bytes
    ) -> None:
        super().__init__(target, round_.body)
        self.round = round_
        self.url = url
        self.identifier = identifier
        self.tracing = tracing

    def head(self) -> bytes:
        round_ = self.round
        head = encode(ReceiveHead(self.tracing, round_.topic, self.identifier, round_.body.length))
        authorization = round_.config.auth.to_subscriber.authorize(
            "RECEIVE",
            {
                "tracing": self.tracing,
                "url": self.url,
                "topic": round_.topic,
                "identifier": self.identifier,
                "sha512": round_.body.sha512,
            },
            time.time(),
        )
        length = b"Content-Length: %d\r\n" % (len(head) + round_.body.length)
        return b"".join(
            (length, round_.digest_header, authorization_header(authorization), b"\r\n", head)
        )

    def finish(self, reply: Reply) -> None:
        """Judges the reply: the outcome table of docs/topics/protocol.md, "Replies"."""
        round_, url, hints = self.round, self.url, self.round.fanout.hints
        try:
            outcome = judge(reply)
            if outcome is None:
                round_.confirm(url, self._confirmed(reply.body))
                if hints.seen:
                    hints.seen.pop(url, None)
            elif outcome is Outcome.HINT and (hints.count(url) or self.target.is_peer):
                round_.unsubscribe(url)
            elif reply.error:
                round_.fail(url, outcome, reply.error)
            else:
                said = f"status {reply.status}{excerpt(reply.body)}"
                round_.fail(url, outcome, said, wish(reply))
        except ProtocolError as e:
            why = f"status {reply.status} with a bad reply: {e}"
            round_.fail(url, Outcome.UNCONFIRMED, why)
        except Exception as e:  # noqa: BLE001 of a pluggable authenticator, and logged
            text = "cannot judge a reply"
            failures = round_.fanout.failures
            failures.write(logging.ERROR, (host_of(url), text), text, exc_info=True)
            round_.fail(url, Outcome.UNCONFIRMED, f"cannot judge the reply: {e!r}")

    def unattended(self) -> Post | None:
        # a longer one is read while it is sent, and gone by then
        in_one_write = self.body is None or (
            self.body.data is not None and self.body.length <= ONE_WRITE
        )
        return Unattended(self) if in_one_write else None

    def _confirmed(self, body: bytes) -> int:
        answer = decode(ResponseConfirmReceive, body)
        if answer.identifier != self.identifier:
            raise ProtocolError("it confirms another message")
        result = self.round.config.auth.to_broadcaster.check(
            "CONFIRM_RECEIVE",
            {
                "tracing": answer.tracing,
                "identifier": answer.identifier,
                "num_subscribers": answer.num_subscribers,
                "url": self.url,
            },
            answer.authorization,
            time.time(),
        )
        if result is not AuthResult.OK:
            raise ProtocolError(f"its authorization is {result.name}; do both sides share secrets?")
        return answer.num_subscribers


class Hints:
    """What `00 0a` is worth, as `unsubscribe_immediate` says. It is not signed, and may come from
    whoever has taken over an address.

    Attributes:
        seen: how many count, and when the last one came, of each url that has not confirmed since.
    """

    def __init__(self, config: BroadcasterConfig) -> None:
        self._rule = config.unsubscribe_immediate
        self.seen: dict[str, tuple[int, float]] = {}

    def count(self, url: str) -> bool:
        """Whether one more is enough."""
        if self._rule is not UnsubscribeImmediate.QUARANTINE:
            return self._rule is UnsubscribeImmediate.OBEY
        number, last = self.seen.pop(url, (0, -math.inf))
        now = time.monotonic()
        if now - last >= HINT_PAUSE:
            number, last = number + 1, now
        if number == HINTS:
            return True
        self.seen[url] = number, last
        if len(self.seen) > MAX_HINTS:
            del self.seen[next(iter(self.seen))]
        return False


def excerpt(body: bytes) -> str:
    """The beginning of a text reply, for a log line."""
    text = body[:200].decode("utf-8", "replace").strip()
    return f": {text!r}" if text else ""
