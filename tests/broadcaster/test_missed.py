"""Notices until they are confirmed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from pathlib import Path
from typing import Any

import pytest

import postgres
from lonelypsp.errors import AuthResult
from lonelypsp.signing import AuthConfig, Hmac, Nothing
from lonelypss import missed as module
from lonelypss.app import Broadcaster
from lonelypss.store.base import Kind, StoreUnavailable
from waiting import until

from .harness import (
    FAST_NOTICES,
    NO_AUTH,
    Answer,
    Close,
    Received,
    Subscriber,
    config,
    confirm_missed,
    free_port,
    hmac_auth,
    reply,
    rows,
    subscribed,
    until_async,
    within,
)
from .test_fanout import Broken, notify


def announcing(auth: AuthConfig = NO_AUTH, **options: Any) -> Broadcaster:
    return Broadcaster(config(auth=auth, **{**FAST_NOTICES, **options}))


def failing(subscriber: Subscriber) -> Any:
    """Refuses messages, confirms notices."""

    def handle(received: Received) -> bytes:
        if "/v1/receive" in received.path:
            return reply(b"", 500)
        return subscriber.confirm(received)

    return handle


def notices(subscriber: Subscriber) -> list[Received]:
    return [r for r in subscriber.requests if "/v1/recover" in r.path]


async def none_left(one: Broadcaster) -> bool:
    return (await one.store.counts())["missed"] == 0


@pytest.mark.parametrize("auth", ["none", "hmac"])
async def test_notice_once_and_the_subscription_stays(auth: str) -> None:
    make = hmac_auth if auth == "hmac" else lambda: NO_AUTH
    async with Subscriber(auth=make()) as subscriber, announcing(make()) as one:
        subscriber.handler = failing(subscriber)
        await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
        assert await notify(one) == 0
        got = (await subscriber.got(2))[1]
        assert got.missed == b"t"
        fields = {"tracing": b"", "recovery": subscriber.recovery, "topic": b"t"}
        value = got.headers.get("authorization")
        assert make().to_subscriber.check("MISSED", fields, value, time.time()) is AuthResult.OK
        await until_async(lambda: none_left(one))
        assert len(await rows(one.store, subscriber.url)) == 1
        # nothing more comes, the next thing is the next message
        assert await notify(one) == 0
        await subscriber.got(4)
        assert len(notices(subscriber)) == 2


async def test_what_is_not_due_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Subscriber() as subscriber, announcing(missed_constant=5.0) as one:
        subscriber.handler = failing(subscriber)
        await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
        await notify(one)
        await until(lambda: time.time() + 6 > one.missed._next_look)
        looks = 0
        claim = one.store.claim_missed

        async def counted(*arguments: Any) -> Any:
            nonlocal looks
            looks += 1
            return await claim(*arguments)

        monkeypatch.setattr(one.store, "claim_missed", counted)
        for _ in range(20):
            await notify(one)
        assert looks == 0
        (row,) = await rows(one.store, subscriber.url)
        await one.missed._record([(row, b"u")], 0.0)
        await until(lambda: looks > 0)


async def test_it_looks_only_when_something_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Subscriber(lambda r: reply(b"", 500)) as subscriber:
        async with announcing(missed_constant=0.1) as one:
            found = []
            claim = one.store.claim_missed

            async def noted(*arguments: Any) -> Any:
                found.append(claimed := await claim(*arguments))
                return claimed

            monkeypatch.setattr(one.store, "claim_missed", noted)
            await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
            await notify(one)
            await until(lambda: len(notices(subscriber)) == 6)
            assert found.count([]) < 5


NOT_CONFIRMED: dict[str, Any] = {
    "empty": lambda r, s: reply(),
    "another type": lambda r, s: reply(b"\0\x08\0\0\0\0"),
    "00 0a": lambda r, s: reply(b"\0\x0a"),
    "410 with 00 0a": lambda r, s: reply(b"\0\x0a", 410),
    "500 with a confirmation": lambda r, s: reply(confirm_missed(r, s.recovery, hmac_auth()), 500),
    "cut": lambda r, s: reply(confirm_missed(r, s.recovery, hmac_auth())[:-1]),
    "for another url": lambda r, s: reply(confirm_missed(r, s.url, hmac_auth())),
    "not signed": lambda r, s: reply(confirm_missed(r, s.recovery)),
    "another key": lambda r, s: reply(
        confirm_missed(r, s.recovery, AuthConfig(Hmac(b"o" * 64), Nothing()))
    ),
    "closed": lambda r, s: Close(),
    "redirect": lambda r, s: reply(b"", 307, f"Location: {s.url}"),
}


@pytest.mark.parametrize("name", NOT_CONFIRMED)
async def test_notice_is_repeated_until_it_is_confirmed(name: str) -> None:
    def handle(received: Received) -> Answer:
        if "/v1/receive" in received.path:
            return reply(b"", 500)
        if len(notices(subscriber)) <= 2:
            answer = NOT_CONFIRMED[name](received, subscriber)
            if isinstance(answer, Close):
                raise answer
            return bytes(answer)
        return subscriber.confirm(received)

    async with Subscriber(handle, hmac_auth()) as subscriber, announcing(hmac_auth()) as one:
        await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
        await notify(one)
        async with within():
            while len(notices(subscriber)) < 3:
                await subscriber.got(len(subscriber.requests) + 1)
        await until_async(lambda: none_left(one))
        assert len(await rows(one.store, subscriber.url)) == 1
        values = [r.headers["authorization"] for r in notices(subscriber)]
        assert len(set(values)) == len(values), "each attempt is signed afresh"


async def test_pauses_grow() -> None:
    times: list[float] = []

    def handle(received: Received) -> bytes:
        if "/v1/receive" not in received.path:
            times.append(time.monotonic())
            return reply(b"", 500)
        return reply(b"", 500)

    options = {"missed_expo_factor": 0.1, "missed_expo_base": 2.0, "missed_expo_max": 2}
    async with Subscriber(handle) as subscriber, announcing(**options) as one:
        await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
        start = time.monotonic()
        await notify(one)
        await subscriber.got(6)
    gaps = [b - a for a, b in zip([start, *times], times, strict=False)]
    for gap, plan in zip(gaps, [0.1, 0.2, 0.4, 0.4, 0.4], strict=True):
        assert 0.9 * plan <= gap < plan + 1


async def test_given_up_and_the_subscription_stays() -> None:
    async with Subscriber(lambda _: reply(b"", 500)) as subscriber:
        async with announcing(missed_max_retries=3) as one:
            await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
            await notify(one)
            await until_async(lambda: none_left(one))
            assert len(notices(subscriber)) == 3
            assert len(await rows(one.store, subscriber.url)) == 1


@pytest.mark.parametrize("value", ["2", "\xb2"])
async def test_retry_after_is_obeyed(value: str) -> None:
    def handle(received: Received) -> bytes:
        return reply(b"", 503, f"Retry-After: {value}")

    async with Subscriber(handle) as subscriber, announcing() as one:
        await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
        await notify(one)
        await subscriber.got(2)
        if value == "2":
            before = time.time()
            await until_async(lambda: due_after(one, before + 1.0))
        else:
            await subscriber.got(4)


async def due_after(one: Broadcaster, when: float) -> bool:
    due = await one.store.next_due()
    # the lease would be 60 s
    return due is not None and when < due < when + 30


async def test_every_topic_of_one_glob_is_announced() -> None:
    async with Subscriber() as subscriber, announcing() as one:
        subscriber.handler = failing(subscriber)
        await one.store.subscribe(Kind.GLOB, b"a/*", subscriber.url, subscriber.recovery)
        topics = {b"a/%d" % n for n in range(5)}
        await asyncio.gather(*(notify(one, topic) for topic in topics))
        await until_async(lambda: none_left(one))
        assert {r.missed for r in notices(subscriber)} == topics


async def test_without_a_recovery_url_nothing_follows() -> None:
    async with Subscriber(lambda _: reply(b"", 500)) as subscriber, announcing() as one:
        await subscribed(one.store, subscriber.url, b"t")
        await notify(one)
        assert await none_left(one)


async def test_recovery_url_that_is_refused_is_given_up_in_the_end() -> None:
    async with Subscriber(lambda _: reply(b"", 500)) as subscriber:
        async with announcing(missed_max_retries=2) as one:
            await subscribed(one.store, subscriber.url, b"t", "ftp://h/")
            await notify(one)
            await until_async(lambda: none_left(one))


async def test_failure_during_a_notice_is_not_lost() -> None:
    in_notice, go_on = asyncio.Event(), asyncio.Event()

    async def handle(received: Received) -> bytes:
        if "/v1/receive" in received.path:
            return reply(b"", 500)
        if len(notices(subscriber)) == 1:
            in_notice.set()
            await go_on.wait()
        return subscriber.confirm(received)

    async with Subscriber(handle) as subscriber, announcing() as one:
        await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
        await notify(one)
        async with within():
            await in_notice.wait()
        await notify(one)
        go_on.set()
        await subscriber.got(4)
        assert len(notices(subscriber)) == 2
        await until_async(lambda: none_left(one))


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
async def test_each_slot_is_sent_once_by_two_broadcasters(database: str, tmp_path: Path) -> None:
    """F21"""
    db = f"sqlite:///{tmp_path}/one.db"
    if database == "postgres":
        db = postgres.shared().database()
    async with Subscriber() as subscriber:
        async with announcing(db=db) as one, announcing(db=db) as two:
            subscriber.handler = failing(subscriber)
            for n in range(30):
                await subscribed(one.store, subscriber.url, b"%d" % n, subscriber.recovery)
            await asyncio.gather(*(notify((one, two)[n % 2], b"%d" % n) for n in range(30)))
            await until_async(lambda: none_left(one))
            topics = [r.missed for r in notices(subscriber)]
            assert len(topics) == len(set(topics)) == 30


async def test_overlapping_subscriptions_share_a_notice() -> None:
    async with Subscriber() as subscriber, announcing() as one:
        subscriber.handler = failing(subscriber)
        recovery = subscriber.recovery
        await one.store.set_subscriptions(
            subscriber.url, [(b"a", recovery)], [("*", recovery), ("a*", recovery), ("?", None)]
        )
        await notify(one, b"a")
        await until_async(lambda: none_left(one))
        assert [r.missed for r in notices(subscriber)] == [b"a"]


async def test_the_other_of_two_overlapping_subscriptions_is_told() -> None:
    """Whichever of them goes before the notice is due."""
    async with Subscriber() as subscriber, announcing(missed_constant=0.3) as one:
        subscriber.handler = failing(subscriber)
        recovery = subscriber.recovery
        for topic in (b"a", b"b"):
            await subscribed(one.store, subscriber.url, topic, recovery)
            assert await one.store.subscribe(Kind.GLOB, topic + b"*", subscriber.url, recovery)
            await notify(one, topic)
        assert await one.store.unsubscribe(Kind.EXACT, b"a", subscriber.url)
        assert await one.store.unsubscribe(Kind.GLOB, b"b*", subscriber.url)
        await subscriber.got(4)
        assert {r.missed for r in notices(subscriber)} == {b"a", b"b"}


async def test_notices_survive_a_restart(tmp_path: Path) -> None:
    db = f"sqlite:///{tmp_path}/one.db"
    async with Subscriber() as subscriber:
        subscriber.handler = failing(subscriber)
        async with announcing(db=db, missed_constant=1000.0) as one:
            await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
            await notify(one)
            (subscription,) = await rows(one.store, subscriber.url)
            await one.store.record_missed([(subscription, b"t")], time.time() + 0.5)
        assert not notices(subscriber)
        async with announcing(db=db) as two:
            await until_async(lambda: none_left(two))
        assert [r.missed for r in notices(subscriber)][-1] == b"t"


async def test_hanging_recovery_url_delays_no_other() -> None:
    async with Subscriber() as hanging, Subscriber() as quick, announcing() as one:
        hanging.handler = lambda r: reply(b"", 500) if "/v1/receive" in r.path else None
        quick.handler = failing(quick)
        for n in range(20):
            await subscribed(one.store, f"{hanging.url}?{n}", b"t", f"{hanging.recovery}?{n}")
        await notify(one)
        async with within():
            while not notices(hanging):
                await hanging.got(len(hanging.requests) + 1)
        await subscribed(one.store, quick.url, b"u", quick.recovery)
        await notify(one, b"u")
        await quick.got(2)
        assert [r.missed for r in notices(quick)] == [b"u"]


# Room for everybody


async def recorded(one: Broadcaster, url: str, topic: bytes, recovery: str) -> None:
    await subscribed(one.store, url, topic, recovery)
    (row,) = await rows(one.store, url)
    await one.store.record_missed([(row, topic)], time.time())
    one.missed._wake.set()


DEAD = 2000


async def test_thousands_of_dead_hosts_do_not_delay_live_ones() -> None:
    """2,000 hosts that failed and now hang for longer than this test may last."""
    options = {
        "missed_retry_budget": 64,
        "outgoing_breaker_failures": 1_000_000,  # of the budget alone
        "outgoing_http_timeout_sock_connect": 60.0,
        # due again and again, before the live ones
        "missed_constant": 0.05,
    }
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(announcing(**options))
        live = [await stack.enter_async_context(Subscriber()) for _ in range(10)]
        port = free_port()
        for n in range(DEAD):
            url = f"http://127.77.{n >> 8}.{n & 255}:{port}/"
            await subscribed(one.store, url, b"t", url)
        matches = await one.store.match(b"t")
        await one.store.record_missed([(row, b"t") for row in matches], time.time())
        one.missed._wake.set()
        await until(lambda: len(one.sender._breakers) == DEAD, 60)
        listener = stack.enter_context(socket.socket())
        listener.bind(("0.0.0.0", port))
        listener.listen(0)
        for _ in range(3):  # no room left: nobody else gets an answer
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(("127.77.0.1", port))
        await until(lambda: one.missed._at_failing == 64, 30)
        for n, subscriber in enumerate(live):
            await recorded(one, subscriber.url, b"live%d" % n, subscriber.recovery)
        for n, subscriber in enumerate(live):
            assert (await subscriber.got(1))[0].missed == b"live%d" % n
        assert (await one.store.counts())["missed"] >= DEAD


async def test_slow_host_leaves_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UNDER_WAY", 64)
    monkeypatch.setattr(module, "MAX_AT_HOST", 16)
    go_on = asyncio.Event()

    async def slow(received: Received) -> bytes:
        await go_on.wait()
        return hanging.confirm(received)

    async with Subscriber(slow) as hanging, Subscriber() as quick, announcing() as one:
        for n in range(200):
            await subscribed(one.store, f"{hanging.url}?{n}", b"t", hanging.recovery)
        matches = await one.store.match(b"t")
        await one.store.record_missed([(row, b"t") for row in matches], time.time())
        one.missed._wake.set()
        await hanging.got(16)
        await recorded(one, quick.url, b"u", quick.recovery)
        await quick.got(1)
        assert len(hanging.requests) == 16
        go_on.set()
        await until_async(lambda: none_left(one), 30)
        assert len(hanging.requests) == 200, "each was sent once, none was given up"


async def test_notice_shows_whether_a_silent_host_answers_again() -> None:
    silent = True

    def handle(received: Received) -> Answer:
        return None if silent else subscriber.confirm(received)

    options: dict[str, Any] = {
        "outgoing_http_timeout_sock_read": 0.2,
        "outgoing_breaker_failures": 2,
        "outgoing_breaker_pause": 0.1,
        "outgoing_breaker_max_pause": 0.2,
        "missed_constant": 0.1,
    }
    async with Subscriber(handle) as subscriber, announcing(**options) as one:
        await recorded(one, subscriber.url, b"t", subscriber.recovery)
        await until(lambda: one.sender.breakers()["open"] == 1)
        silent = False
        await until_async(lambda: none_left(one))
        await until(lambda: one.sender.breakers()["closed"] == 1)
        assert not one.sender._breakers


# A sweeper that goes on


@pytest.mark.parametrize("error", [StoreUnavailable("locked"), RuntimeError("bug")])
@pytest.mark.parametrize("method", ["claim_missed", "next_due", "finish_missed"])
async def test_sweeper_survives_its_store(
    error: Exception, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Subscriber() as subscriber, announcing(missed_lease=1.0) as one:
        subscriber.handler = failing(subscriber)
        await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
        real = getattr(one.store, method)
        failures = 0

        async def fail(*args: Any) -> Any:
            nonlocal failures
            failures += 1
            if failures <= 2:
                raise error
            return await real(*args)

        monkeypatch.setattr(one.store, method, fail)
        await notify(one)
        await until_async(lambda: none_left(one))
        assert failures > 2 or method == "next_due"


async def unavailable(*_: Any) -> Any:
    raise StoreUnavailable("locked")


async def test_failures_while_the_database_is_away_are_announced_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with Subscriber() as subscriber, announcing(sweep_missed_interval=1000) as one:
        subscriber.handler = failing(subscriber)
        for topic in (b"a", b"b"):
            await subscribed(one.store, subscriber.url, topic, subscriber.recovery)
        with monkeypatch.context() as patch:
            patch.setattr(one.store, "record_missed", unavailable)
            for topic in (b"a", b"b", b"a"):
                assert await notify(one, topic) == 0
            await until(lambda: "cannot look for MISSED notices" in caplog.text)
        await until(lambda: {r.missed for r in notices(subscriber)} == {b"a", b"b"})
        await until_async(lambda: none_left(one))
        assert not one.missed._unwritten


@pytest.mark.parametrize("is_back", [True, False])
async def test_failures_in_memory_when_it_stops(
    is_back: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    db = f"sqlite:///{tmp_path}/one.db"
    async with Subscriber() as subscriber:
        subscriber.handler = failing(subscriber)
        with monkeypatch.context() as patch:
            async with announcing(db=db, missed_lease=1.0) as one:
                await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
                patch.setattr(one.store, "record_missed", unavailable)
                await notify(one)
                await until(lambda: "cannot look for MISSED notices" in caplog.text)
                if is_back:
                    patch.undo()
        assert ("no MISSED notice for 1 failed deliveries" in caplog.text) is not is_back
        async with announcing(db=db) as two:
            await until_async(lambda: none_left(two))
        assert len(notices(subscriber)) == is_back


async def test_failures_in_memory_are_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lonelypss.missed.MAX_UNWRITTEN", 2)
    async with Subscriber() as subscriber, announcing() as one:
        subscriber.handler = failing(subscriber)
        for n in range(3):
            await subscribed(one.store, subscriber.url, b"%d" % n, subscriber.recovery)
        monkeypatch.setattr(one.store, "record_missed", unavailable)
        for n in range(3):
            assert await notify(one, b"%d" % n) == 0
        assert len(one.missed._unwritten) == 2
        assert "no MISSED notice will follow" in caplog.text


@pytest.mark.parametrize("operation", ["MISSED", "CONFIRM_MISSED"])
async def test_failing_authenticator_is_a_failed_notice(operation: str) -> None:
    broken = Broken(operation)
    async with Subscriber() as subscriber, announcing(AuthConfig(broken, broken)) as one:
        subscriber.handler = failing(subscriber)
        await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
        await notify(one)

        async def attempted() -> bool:
            return not await none_left(one)

        await until_async(attempted)
        broken.operations = ()
        await until_async(lambda: none_left(one))
        assert not one.missed._under_way


async def test_stop_while_a_notice_is_under_way() -> None:
    async with Subscriber() as subscriber:
        subscriber.handler = lambda r: reply(b"", 500) if "/v1/receive" in r.path else None
        before = asyncio.all_tasks()
        async with announcing() as one:
            await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
            await notify(one)
            await subscriber.got(2)
        left = [t for t in asyncio.all_tasks() - before if "MissedNotices" in repr(t)]
        assert not left
