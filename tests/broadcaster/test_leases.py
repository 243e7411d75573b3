"""Who is forgotten, who is not, and that it costs nothing when it is off."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from lonelypss.leases import NO_LEASES, KeptLeases
from lonelypss.metrics import Metrics
from lonelypss.store import Kind, Store, StoreUnavailable
from lonelypss.store.sqlite import SqliteStore

from .harness import (
    FAST_NOTICES,
    Received,
    Running,
    Subscriber,
    broadcaster,
    exchange,
    free_port,
    reply,
    request_bytes,
    rows,
    subscribed,
    until_async,
)

TTL = 100.0


class Clock:
    def __init__(self) -> None:
        self.now = time.time() + 1

    def __call__(self) -> float:
        return self.now


class Counted(Metrics):
    subscriptions = 0

    def pruned(self, subscriptions: int) -> None:
        self.subscriptions += subscriptions


class Watched(SqliteStore):
    """Remembers what leases were renewed; with `broken` refuses to."""

    def __init__(self, path: str | None) -> None:
        super().__init__(path)
        self.renewed: list[list[str]] = []
        self.broken = False

    async def renew_leases(self, urls: Any, now: float) -> None:
        if self.broken:
            raise StoreUnavailable("broken")
        self.renewed.append(list(urls))
        await super().renew_leases(urls, now)


class World:
    """A broadcaster and its clock."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.clock = Clock()
        leases = running.broadcaster.leases
        assert isinstance(leases, KeptLeases)
        leases.clock = self.clock
        self.leases = leases

    async def wait(self, seconds: float) -> None:
        """Lets time pass, in steps as the broadcaster makes them."""
        while seconds > 0:
            self.clock.now += min(20.0, seconds)
            seconds -= 20.0
            await self.leases.look()


@contextlib.asynccontextmanager
async def world(store: Store | None = None) -> AsyncIterator[World]:
    options: dict[str, Any] = {**FAST_NOTICES, "subscription_ttl": TTL}
    async with broadcaster(store=store, **options) as running:
        one = World(running)
        await one.leases.look()
        yield one


def refuse_messages(subscriber: Subscriber) -> Callable[[Received], bytes]:
    def handle(received: Received) -> bytes:
        if "/v1/receive" in received.path:
            return reply(b"", 500)
        return subscriber.confirm(received)

    return handle


async def notify(running: Running, subscriber: Subscriber) -> None:
    assert await running.notify() == 1


async def missed(running: Running, subscriber: Subscriber) -> None:
    subscriber.handler = refuse_messages(subscriber)
    assert await running.notify() == 0
    await subscriber.got(2)

    async def none_left() -> bool:
        return (await running.store.counts())["missed"] == 0

    await until_async(none_left)


async def failed(running: Running, subscriber: Subscriber) -> None:
    subscriber.handler = refuse_messages(subscriber)
    for subscription in await rows(running.store, subscriber.url):
        assert await running.store.unsubscribe(Kind.EXACT, subscription.pattern, subscriber.url)
    await subscribed(running.store, subscriber.url, b"t", None)
    assert await running.notify() == 0


def sent(make: Callable[[Running, str], Any], status: int = 200) -> Any:
    async def send(running: Running, subscriber: Subscriber) -> None:
        assert (await running.send(make(running, subscriber.url))).status == status

    return send


async def nothing(running: Running, subscriber: Subscriber) -> None:
    pass


SIGNS_OF_LIFE: dict[str, Any] = {
    "subscribe": sent(lambda r, url: r.peer.subscribe(url, b"more")),
    "subscribe again": sent(lambda r, url: r.peer.subscribe(url, b"t"), 409),
    "subscribe glob": sent(lambda r, url: r.peer.subscribe_glob(url, "m*")),
    "set": sent(lambda r, url: r.peer.set(url, ((b"t", None),))),
    "check": sent(lambda r, url: r.peer.check(url)),
    "confirmed message": notify,
    "confirmed notice": missed,
}
NONE: dict[str, Any] = {
    "nothing": nothing,
    "check of another": sent(lambda r, url: r.peer.check(url + "/other")),
    "failed message": failed,
}


@pytest.mark.parametrize("sign", SIGNS_OF_LIFE)
async def test_a_sign_of_life_gives_the_whole_time(sign: str) -> None:
    async with Subscriber() as subscriber, world() as one:
        await subscribed(one.running.store, subscriber.url, b"t", subscriber.recovery)
        await one.wait(70)
        await SIGNS_OF_LIFE[sign](one.running, subscriber)
        await one.wait(90)
        assert await rows(one.running.store, subscriber.url)
        await one.wait(40)
        assert await rows(one.running.store, subscriber.url) == []


@pytest.mark.parametrize("sign", NONE)
async def test_what_is_no_sign_of_life(sign: str) -> None:
    async with Subscriber() as subscriber, world() as one:
        await subscribed(one.running.store, subscriber.url, b"t", subscriber.recovery)
        await one.wait(70)
        await NONE[sign](one.running, subscriber)
        await one.wait(50)
        assert await rows(one.running.store, subscriber.url) == []


async def test_never_while_a_notice_is_to_come() -> None:
    """The subscriber is away; its notice is tried, and only when that was given up it goes."""
    url = f"http://127.0.0.1:{free_port()}/v1/receive"
    async with broadcaster(
        subscription_ttl=TTL, **{**FAST_NOTICES, "missed_constant": 3600.0}
    ) as running:
        one = World(running)
        await one.leases.look()
        await subscribed(running.store, url, b"t", recovery=url)
        assert await running.notify() == 0
        await one.wait(1_000)
        assert await rows(running.store, url)
        (notice,) = await running.store.claim_missed(time.time() + 7_200, 9, 60.0)
        await running.store.finish_missed(notice, time.time())  # as when it is given up
        await one.wait(20)
        assert await rows(running.store, url) == []


async def test_each_url_is_written_down_once_in_a_third_of_the_time() -> None:
    store = Watched(None)
    async with world(store) as one:
        urls = [f"http://h{n}/receive" for n in range(1_500)]
        for _ in range(3):
            for url in urls:
                one.leases.seen(url)
            await one.leases.look()
        assert [len(batch) for batch in store.renewed] == [1_000, 500]
        assert sorted(url for batch in store.renewed for url in batch) == sorted(urls)
        await one.wait(TTL / 3)
        one.leases.seen(urls[0])
        await one.leases.look()
        assert store.renewed[2:] == [[urls[0]]]


async def test_what_could_not_be_written_is_not_forgotten() -> None:
    store = Watched(None)
    async with world(store) as one:
        await subscribed(store, "http://h/", b"t")
        await one.wait(90)
        one.leases.seen("http://h/")
        store.broken = True
        with pytest.raises(StoreUnavailable):
            await one.leases.look()
        store.broken = False
        await one.wait(50)
        assert await rows(store, "http://h/")
        await one.wait(90)
        assert await rows(store, "http://h/") == []


async def test_a_database_that_is_away_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: list[Exception | None] = [StoreUnavailable("away"), ValueError("a bug"), None]
    done = asyncio.Event()

    async def look() -> None:
        if not outcomes:
            done.set()
        elif (outcome := outcomes.pop(0)) is not None:
            raise outcome

    leases = KeptLeases(6.0, SqliteStore(None))
    monkeypatch.setattr(leases, "pause", 0.001)
    monkeypatch.setattr(leases, "look", look)
    task = asyncio.create_task(leases.run())
    async with asyncio.timeout(10):
        await done.wait()
    task.cancel()
    assert [r.levelname for r in caplog.records] == ["WARNING", "ERROR"]


async def test_several_broadcasters_prune_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, metrics = Clock(), Counted()
    stores = [SqliteStore(str(tmp_path / "store.db")) for _ in range(3)]
    for store in stores:
        await store.open()
    try:
        leases = [KeptLeases(TTL, store, metrics, clock=clock) for store in stores]
        for n in range(120):
            url = f"http://h{n}/a\nb"
            await stores[n % 3].subscribe(Kind.EXACT, b"t", url, None)
            await stores[n % 3].subscribe(Kind.GLOB, b"t*", url, None)
        for _ in range(6):
            await asyncio.gather(*(one.look() for one in leases))
            clock.now += 20.0
        with caplog.at_level(logging.WARNING):
            await asyncio.gather(*(one.look() for one in leases))
        assert await stores[0].match(b"t") == []
    finally:
        for store in stores:
            await store.close()
    assert metrics.subscriptions == 240
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 120
    assert all("/a\\nb' gave no sign of life for subscription_ttl (100 s)" in x for x in lines)


async def test_a_dead_subscriber_is_forgotten_and_counted() -> None:
    async with broadcaster(subscription_ttl=1.0, metrics=True) as running:
        url = f"http://127.0.0.1:{free_port()}/v1/receive"
        await running.ok(running.peer.set(url, ((b"a", None), (b"b", None)), (("*", None),)))

        async def gone() -> bool:
            return not await rows(running.store, url)

        await until_async(gone, 30)

        async def counted() -> bool:
            found = await exchange(running.port, request_bytes("/metrics", method="GET"))
            return b"lonelypss_subscriptions_pruned_total 3.0" in found.body

        await until_async(counted)


async def test_off_it_does_nothing() -> None:
    store = Watched(None)
    async with Subscriber() as subscriber, broadcaster(store=store) as running:
        assert running.broadcaster.leases is NO_LEASES
        await subscribed(store, subscriber.url, b"t", subscriber.recovery)
        assert await running.notify() == 1
        await missed(running, subscriber)
        await running.ok(running.peer.check(subscriber.url))
        assert store.renewed == []
