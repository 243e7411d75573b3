"""What becomes of one message: outcomes, counts, the journal."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import time
from typing import Any

import pytest

from lonelypsp.bodies import UNSUBSCRIBE_IMMEDIATE
from lonelypsp.errors import AuthResult
from lonelypsp.explain import unpack
from lonelypsp.signing import AuthConfig, Hmac, Nothing
from lonelypsp.spool import Body
from lonelypss.app import Broadcaster
from lonelypss.config import UnsubscribeImmediate
from lonelypss.fanout import Explained
from lonelypss.sender import ONE_WRITE
from lonelypss.store.base import Kind, StoreUnavailable
from waiting import until

from .harness import (
    DOWN,
    NO_AUTH,
    UP,
    Answer,
    Close,
    Received,
    Subscriber,
    config,
    confirm_receive,
    free_port,
    hmac_auth,
    reply,
    rows,
    subscribed,
    until_async,
    within,
)


def fanning(auth: AuthConfig = NO_AUTH, **options: Any) -> Broadcaster:
    """A broadcaster without a listener, whose notices stay in the store."""
    options = {"missed_constant": 1000.0, **options}
    return Broadcaster(config(auth=auth, **options))


async def notify(one: Broadcaster, topic: bytes = b"t", message: bytes = b"hello") -> int:
    async with within():
        return await one.fanout.notify(topic, Body.of(message))


async def missed(one: Broadcaster) -> int:
    return (await one.store.counts())["missed"]


# The outcome table

CONFIRM = b"confirm"  # stands for the right answer

CONFIRMED = {
    "200": reply(CONFIRM),
    "202": reply(CONFIRM, 202),
}
UNSUBSCRIBED = {
    "X30 200 with 00 0a": reply(UNSUBSCRIBE_IMMEDIATE),
    "X26 410 with 00 0a": reply(UNSUBSCRIBE_IMMEDIATE, 410),
}
FAILED: dict[str, bytes | Close] = {
    "X01": reply(),
    "X02": reply(b"\0"),
    "X03": reply(b"\0\0"),
    "X04": reply(b"\xff\xff"),
    "type of another response": reply(b"\0\3\0\0\0\0"),
    "X06": reply(b"\0\x08\xff\xff"),
    "X07": reply(b"\0\x08\0\1\xff\0\0\0\0\0\0\1"),
    "X11": Close(reply(CONFIRM) + b"x" * 2**20),
    "one byte behind": reply(CONFIRM + b"x"),
    "00 0a and more": reply(UNSUBSCRIBE_IMMEDIATE + b"x"),
    "00 0a cut": reply(UNSUBSCRIBE_IMMEDIATE[:1]),
    "X15": Close(reset=True),
    "X17": Close(),
    "X18": Close(b"junk\r\n\r\n"),
    "X22": reply(b"", 204),
    "301": reply(CONFIRM, 301),
    "X25": reply(CONFIRM, 404),
    "300": reply(CONFIRM, 300),
    "400": reply(CONFIRM, 400),
    "410 with a confirmation": reply(CONFIRM, 410),
    "500 with a confirmation": reply(CONFIRM, 500),
    "502": reply(b"", 502),
    "X29": reply(b"", 503, "Retry-After: 1"),
    "compressed": reply(CONFIRM, 200, "Content-Encoding: gzip"),
    **{
        f"{status} with 00 0a": reply(UNSUBSCRIBE_IMMEDIATE, status)
        for status in (300, 302, 400, 401, 403, 404, 409, 429, 500, 502, 503)
    },
}


def scripted(answer: bytes | Close, auth: AuthConfig) -> Any:
    """The handler that answers with `answer`, CONFIRM in it replaced by a real confirmation."""

    def handle(received: Received) -> Answer:
        url = f"http://localhost:{received.headers['host'].split(':')[1]}{received.path}"
        real = confirm_receive(received, url, auth)
        data = answer.data if isinstance(answer, Close) else answer
        head, separator, body = data.partition(b"\r\n\r\n")
        if CONFIRM in body:
            body = body.replace(CONFIRM, real)
            length = len(real) if isinstance(answer, Close) else len(body)
            lines = [x for x in head.split(b"\r\n") if not x.startswith(b"Content-Length")]
            head = b"\r\n".join([*lines, b"Content-Length: %d" % length])
        data = head + separator + body
        if isinstance(answer, Close):
            raise Close(data, reset=answer.reset)
        return data

    return handle


@pytest.mark.parametrize("auth", ["none", "hmac"])
async def test_outcomes(auth: str) -> None:
    make = hmac_auth if auth == "hmac" else lambda: NO_AUTH
    table = [
        *((name, answer, (1, 1, 0)) for name, answer in CONFIRMED.items()),
        *((name, answer, (0, 0, 0)) for name, answer in UNSUBSCRIBED.items()),
        *((name, answer, (0, 1, 1)) for name, answer in FAILED.items()),
    ]
    async with Subscriber() as subscriber, fanning(make()) as one:
        for number, (name, answer, expected) in enumerate(table):
            topic = b"%d" % number
            await subscribed(one.store, subscriber.url, topic, subscriber.recovery)
            subscriber.handler = scripted(answer, make())
            before = await missed(one)
            count = await notify(one, topic)
            kept = len([s for s in await rows(one.store, subscriber.url) if s.pattern == topic])
            assert (count, kept, await missed(one) - before) == expected, name


@pytest.mark.parametrize("cut", range(19))
async def test_confirmation_cut_anywhere(cut: int) -> None:
    """X05"""

    def handle(received: Received) -> bytes:
        return reply(confirm_receive(received, subscriber.url)[:cut])

    async with Subscriber(handle) as subscriber, fanning() as one:
        await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
        assert await notify(one) == 0
        assert await missed(one) == 1


@pytest.mark.parametrize("how", ["identifier", "url", "key", "none", "other message", "direction"])
async def test_confirmations_that_are_not_signed_for_this_message(how: str) -> None:
    """X08, X39"""
    earlier: list[bytes] = []

    def handle(received: Received) -> bytes:
        right = confirm_receive(received, subscriber.url, hmac_auth())
        earlier.append(right)
        return reply(
            {
                "identifier": lambda: confirm_receive(
                    received, subscriber.url, hmac_auth(), identifier=b"x" * 8
                ),
                "url": lambda: confirm_receive(received, subscriber.url + "x", hmac_auth()),
                "key": lambda: confirm_receive(
                    received, subscriber.url, AuthConfig(Hmac(b"o" * 64), Nothing())
                ),
                "none": lambda: confirm_receive(received, subscriber.url),
                "other message": lambda: earlier[0] if len(earlier) > 1 else right,
                "direction": lambda: confirm_receive(
                    received, subscriber.url, AuthConfig(Hmac(DOWN), Hmac(UP))
                ),
            }[how]()
        )

    async with Subscriber(handle) as subscriber, fanning(hmac_auth()) as one:
        await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
        if how == "other message":
            assert await notify(one) == 1
        assert await notify(one) == 0
        assert await missed(one) == 1
        assert len(await rows(one.store, subscriber.url)) == 1


async def test_request_that_a_subscriber_gets() -> None:
    async with Subscriber(auth=hmac_auth()) as subscriber, fanning(hmac_auth()) as one:
        url = subscriber.url + "?q=1#frag/ment"
        subscriber.handler = lambda r: reply(confirm_receive(r, url, hmac_auth()))
        await subscribed(one.store, url, b"t")
        assert await notify(one) == 1
        (got,) = subscriber.requests
        sha512 = hashlib.sha512(b"hello").digest()
        assert got.line == "POST /v1/receive?q=1 HTTP/1.1"
        assert got.headers["host"] == f"localhost:{subscriber.port}"
        assert got.headers["content-type"] == "application/octet-stream"
        assert got.headers["repr-digest"] == f"sha-512={base64.b64encode(sha512).decode()}"
        assert got.headers["x-subscription-fragment"] == "frag%2Fment"
        assert (got.head.tracing, got.head.topic, got.message) == (b"", b"t", b"hello")
        fields = {
            "tracing": b"",
            "url": url,
            "topic": b"t",
            "identifier": got.head.identifier,
            "sha512": sha512,
        }
        check = hmac_auth().to_subscriber.check
        value = got.headers["authorization"]
        assert check("RECEIVE", fields, value, time.time()) is AuthResult.OK


# Counting


async def test_one_post_per_url() -> None:
    async with Subscriber() as subscriber, fanning() as one:
        await one.store.set_subscriptions(
            subscriber.url,
            [(b"a/b", None)],
            [("a/*", None), ("**", None), ("?/b", subscriber.recovery)],
        )
        await subscribed(one.store, subscriber.url + "#2", b"a/b")
        assert await notify(one, b"a/b") == 2
        assert len(subscriber.requests) == 2


async def test_identifiers_differ() -> None:
    async with Subscriber() as subscriber, fanning() as one:
        for n in range(20):
            await subscribed(one.store, f"{subscriber.url}?{n}", b"t")
        assert await notify(one) == 20
        assert len({r.head.identifier for r in subscriber.requests}) == 20


@pytest.mark.parametrize(
    ("counts", "total"),
    [
        ([0], 0),  # X10
        ([1, 2, 3], 6),
        ([2**32 - 1, 2**32 - 1], 2**32 - 1),  # X09
    ],
)
async def test_counts_add_up(counts: list[int], total: int) -> None:
    def handle(received: Received) -> bytes:
        number = counts[int(received.path.partition("?")[2])]
        return reply(confirm_receive(received, "", number=number))

    async with Subscriber(handle) as subscriber, fanning() as one:
        for n in range(len(counts)):
            await subscribed(one.store, f"{subscriber.url}?{n}", b"t", subscriber.recovery)
        assert await notify(one) == total
        assert await missed(one) == 0


async def test_urls_that_cannot_be_posted_to_fail_alone() -> None:
    """Rows that somebody else wrote into the database."""
    async with Subscriber() as subscriber, fanning() as one:
        for url in ("", "ftp://h/", "http://h/\r\nX: y", subscriber.url):
            await subscribed(one.store, url, b"t", subscriber.recovery)
        assert await notify(one) == 1
        assert await missed(one) == 3
        await one.store.set_subscriptions(subscriber.url, [], [])
        assert await notify(one) == 0


async def test_one_log_line_per_event(caplog: pytest.LogCaptureFixture) -> None:
    """N20, T28"""
    async with fanning() as one:
        topic = b"a\r\nb\xff"
        await subscribed(one.store, "ftp://h/\r\nforged", topic)
        await subscribed(one.store, f"http://127.0.0.1:{free_port()}/", topic)
        with caplog.at_level(logging.INFO):
            assert await notify(one, topic) == 0
        assert len(caplog.records) == 2
        assert not any("\n" in r.getMessage() or "\r" in r.getMessage() for r in caplog.records)


# Unsubscribing on the subscriber's word


async def test_unsubscribe_removes_exactly_the_matching_rows() -> None:
    async with Subscriber(lambda _: reply(UNSUBSCRIBE_IMMEDIATE, 410)) as subscriber:
        async with fanning() as one, Subscriber() as other:
            recovery = subscriber.recovery
            await one.store.set_subscriptions(
                subscriber.url, [(b"a", recovery), (b"b", recovery)], [("*", None), ("x*", None)]
            )
            await subscribed(one.store, other.url, b"a")
            assert await notify(one, b"a") == 1
            left = [(s.kind, s.pattern) for s in await rows(one.store, subscriber.url)]
            assert left == [(Kind.EXACT, b"b"), (Kind.GLOB, b"x*")]
            assert len(await rows(one.store, other.url)) == 1
            assert await missed(one) == 0


@pytest.mark.parametrize("status", [200, 410])
async def test_unsubscribe_can_be_ignored(status: int) -> None:
    async with Subscriber(lambda _: reply(UNSUBSCRIBE_IMMEDIATE, status)) as subscriber:
        async with fanning(unsubscribe_immediate=UnsubscribeImmediate.IGNORE) as one:
            await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
            assert await notify(one) == 0
            assert len(await rows(one.store, subscriber.url)) == 1
            assert await missed(one) == 1


async def test_quarantine(monkeypatch: pytest.MonkeyPatch) -> None:
    """T30: three times, with pauses, and no confirmation in between."""
    clock = [1000.0]
    monkeypatch.setattr("lonelypss.fanout.time.monotonic", lambda: clock[0])
    stop, confirmed = reply(UNSUBSCRIBE_IMMEDIATE), None
    script: list[tuple[float, bytes | None, int]] = [
        *((0.0, stop, 1) for _ in range(10)),  # a moment counts as one
        (61.0, stop, 1),
        (0.0, confirmed, 1),
        (61.0, stop, 1),
        (30.0, stop, 1),
        (31.0, stop, 1),
        (0.0, reply(UNSUBSCRIBE_IMMEDIATE, 403), 1),
        (61.0, stop, 0),
    ]
    async with Subscriber() as subscriber:
        async with fanning(unsubscribe_immediate=UnsubscribeImmediate.QUARANTINE) as one:
            await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
            for seconds, answer, left in script:
                clock[0] += seconds
                subscriber.handler = lambda r, a=answer: a or subscriber.confirm(r)
                assert await notify(one) == (answer is None)
                assert len(await rows(one.store, subscriber.url)) == left
            assert not one.fanout.hints.seen


async def test_other_broadcasters_are_believed() -> None:
    """They say it when nobody there wants the topic any more."""
    async with Subscriber(lambda _: reply(UNSUBSCRIBE_IMMEDIATE, 410)) as peer:
        async with fanning(unsubscribe_immediate=UnsubscribeImmediate.IGNORE) as one:
            url = f"{peer.base}/v1/receive_for_websockets"
            await subscribed(one.store, url, b"t")
            assert await notify(one) == 0
            assert not await rows(one.store, url)


async def test_wish_of_a_busy_subscriber() -> None:
    """X27: the notice waits for as long as it asks, within reason."""
    table = [("50", 50), ("1000000000", 3600), ("-1", 0), ("soon", 0)]
    async with Subscriber() as subscriber, fanning(missed_constant=0.0, **LATER) as one:
        for value, seconds in table:
            subscriber.handler = lambda _, v=value: reply(b"", 503, f"Retry-After: {v}")
            url = f"{subscriber.url}?{value}"
            await subscribed(one.store, url, value.encode(), subscriber.recovery)
            before = time.time()
            assert await notify(one, value.encode()) == 0
            due = await one.store.next_due()
            assert due is not None
            assert before + max(seconds, 20) <= due <= time.time() + max(seconds, 20)
            await one.store.unsubscribe(Kind.EXACT, value.encode(), url)


LATER = {"missed_expo_factor": 20.0, "missed_expo_base": 1.0, "missed_jitter": 0.0}


async def test_dead_host_costs_no_publisher_its_timeout() -> None:
    """And an explanation says so."""
    options: dict[str, Any] = {
        "outgoing_http_timeout_sock_read": 0.3,
        "outgoing_breaker_failures": 3,
        "outgoing_breaker_pause": 60.0,
        "outgoing_breaker_max_pause": 60.0,
    }
    async with Subscriber(lambda _: None) as silent, Subscriber() as quick:
        async with fanning(**options) as one:
            await subscribed(one.store, silent.url, b"t", silent.recovery)
            await subscribed(one.store, quick.url, b"t")
            await asyncio.gather(*(notify(one) for _ in range(3)))
            assert one.sender.breakers() == {"closed": 1, "open": 1, "half_open": 0}
            before = len(silent.requests)
            assert await asyncio.gather(*(notify(one) for _ in range(20))) == [1] * 20
            assert len(silent.requests) == before
            assert await missed(one) == 1
            report = Explained()
            assert await one.fanout.notify(b"t", Body.of(b""), report) == 1
            explanation = unpack(report.pack())
            assert explanation is not None
            outcomes = {s.url: (s.outcome, s.will_be_told) for s in explanation.subscribers}
            assert outcomes == {silent.url: ("skipped", True), quick.url: ("delivered", False)}


@pytest.mark.parametrize("size", [5, 10_000_000])
async def test_trial_of_a_silent_host_makes_no_publisher_wait(size: int) -> None:
    options: dict[str, Any] = {
        "outgoing_http_timeout_sock_read": 0.3,
        "outgoing_breaker_failures": 1,
        "outgoing_breaker_pause": 0.1,
    }
    go_on = asyncio.Event()

    async def handle(received: Received) -> bytes:
        await go_on.wait()
        return subscriber.confirm(received)

    async with Subscriber(handle) as subscriber, fanning(**options) as one:
        await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
        assert await notify(one) == 0
        await until(lambda: one.sender.breakers()["half_open"] and one.sender.idle)
        assert await notify(one, message=b"x" * size) == 0
        if size > ONE_WRITE:
            assert len(subscriber.requests) == 1, "it would be gone before it was sent"
            return
        # the publisher has its answer, the subscriber the message, and nobody has answered yet
        await subscriber.got(2)
        assert one.sender.breakers()["half_open"] == 1
        go_on.set()
        await until(lambda: one.sender.breakers()["closed"] == 1)
        assert await notify(one) == 1


# The journal


class Gate:
    """A handler that answers with a confirmation, or what it is told, when opened."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.answer: bytes | None = None
        self.subscriber: Subscriber

    async def __call__(self, received: Received) -> bytes:
        await self.open.wait()
        return self.answer or self.subscriber.confirm(received)


def gated() -> tuple[Gate, Subscriber]:
    gate = Gate()
    gate.subscriber = Subscriber(gate)
    return gate, gate.subscriber


@pytest.mark.parametrize("journal_after", [0.0, 0.5])
@pytest.mark.parametrize("ending", ["success", "failure", "unsubscribed"])
async def test_journal(journal_after: float, ending: str) -> None:
    """Rows exist while a subscriber hangs; they stay only where it failed."""
    gate, hanging = gated()
    async with hanging, Subscriber() as quick, fanning(journal_after=journal_after) as one:
        await subscribed(one.store, hanging.url, b"t", hanging.recovery)
        await subscribed(one.store, quick.url, b"t", quick.recovery)
        task = asyncio.create_task(notify(one))
        await hanging.got(1)
        await quick.got(1)

        async def journaled() -> bool:
            # with 0 nobody had answered yet
            return await missed(one) == (2 if journal_after == 0 else 1)

        await until_async(journaled)
        gate.answer = {
            "success": None,
            "failure": reply(b"", 500),
            "unsubscribed": reply(UNSUBSCRIBE_IMMEDIATE),
        }[ending]
        gate.open.set()
        assert await task == (2 if ending == "success" else 1)
        assert await missed(one) == (1 if ending == "failure" else 0)
        assert not one.missed._journal


async def test_journal_survives_overlapping_messages_on_one_topic() -> None:
    """A subscriber that is merely slow gets no notices, however messages overlap."""
    gate, hanging = gated()
    async with hanging, fanning(journal_after=0.05) as one:
        await subscribed(one.store, hanging.url, b"t", hanging.recovery)
        tasks = [asyncio.create_task(notify(one)) for _ in range(5)]
        await hanging.got(5)
        await until_async(lambda: at_least(one, 1))
        while any(note.holders < 5 for note in one.missed._journal.values()):
            await asyncio.sleep(0.01)
        gate.open.set()
        async with within():
            assert await asyncio.gather(*tasks) == [1] * 5
        assert await missed(one) == 0


async def at_least(one: Broadcaster, number: int) -> bool:
    return await missed(one) >= number


async def test_failure_is_kept_when_an_overlapping_message_succeeds() -> None:
    first_in = asyncio.Event()
    release = [asyncio.Event(), asyncio.Event()]

    async def handle(received: Received) -> bytes:
        n = 0 if received.message == b"bad" else 1
        first_in.set()
        await release[n].wait()
        return reply(b"", 500) if n == 0 else subscriber.confirm(received)

    async with Subscriber(handle) as subscriber, fanning(journal_after=0.05) as one:
        await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
        bad = asyncio.create_task(notify(one, message=b"bad"))
        good = asyncio.create_task(notify(one, message=b"good"))
        await subscriber.got(2)
        async with within():
            while not (notes := one.missed._journal) or any(n.holders < 2 for n in notes.values()):
                await asyncio.sleep(0.01)
        release[0].set()
        assert await bad == 0
        release[1].set()
        assert await good == 1
        assert await missed(one) == 1


async def test_cancelled_notify_leaves_its_journal_and_nothing_else() -> None:
    _, hanging = gated()
    async with hanging, fanning(journal_after=0.05) as one:
        await subscribed(one.store, hanging.url, b"t", hanging.recovery)
        task = asyncio.create_task(notify(one))
        await until_async(lambda: at_least(one, 1))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not one.missed._journal
        assert await missed(one) == 1


# A store that fails


async def test_store_unavailable_before_anybody_was_asked(monkeypatch: Any) -> None:
    async with Subscriber() as subscriber, fanning() as one:
        await subscribed(one.store, subscriber.url, b"t")
        monkeypatch.setattr(one.store, "match", unavailable)
        with pytest.raises(StoreUnavailable):
            await notify(one)
        assert not subscriber.requests


async def unavailable(*_: Any) -> Any:
    raise StoreUnavailable("locked")


@pytest.mark.parametrize("method", ["record_missed", "drop", "clear_missed"])
async def test_store_unavailable_afterwards_is_only_logged(
    method: str, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    answers = {"record_missed": reply(b"", 500), "drop": reply(UNSUBSCRIBE_IMMEDIATE)}
    async with Subscriber() as good, Subscriber() as other, fanning(journal_after=0.0) as one:
        other.handler = lambda r: answers.get(method) or other.confirm(r)
        await subscribed(one.store, good.url, b"t", good.recovery)
        await subscribed(one.store, other.url, b"t", other.recovery)
        monkeypatch.setattr(one.store, method, unavailable)
        assert await notify(one) == (2 if method == "clear_missed" else 1)
        assert any("locked" in r.getMessage() for r in caplog.records)
        assert not one.missed._journal


# Pluggable authenticators


class Broken(Nothing):
    def __init__(self, *operations: str) -> None:
        self.operations = operations

    def authorize(self, operation: str, fields: Any, now: float) -> str | None:
        if operation in self.operations:
            raise RuntimeError("no key")
        return None

    def check(self, operation: str, fields: Any, authorization: Any, now: float) -> AuthResult:
        if operation in self.operations:
            raise RuntimeError("no key")
        return AuthResult.OK


@pytest.mark.parametrize("operation", ["RECEIVE", "CONFIRM_RECEIVE"])
async def test_failing_authenticator_is_a_failed_delivery(operation: str) -> None:
    broken = AuthConfig(Broken(operation), Broken(operation))
    async with Subscriber() as subscriber, fanning(broken) as one:
        await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
        assert await notify(one) == 0
        assert await missed(one) == 1
