"""Rows that follow what websockets want, leases, and the endpoints for other broadcasters."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lonelypsp.bodies import Missed, ReceiveHead, ResponseConfirmMissed, ResponseConfirmReceive
from lonelypsp.errors import AuthResult
from lonelypsp.interests import Topics
from lonelypsp.signing import AuthConfig, Hmac
from lonelypsp.spool import Body
from lonelypsp.wire import decode, encode
from lonelypss import peers as module
from lonelypss.config import ConfigError
from lonelypss.fanout import Fanout
from lonelypss.intake import Intake
from lonelypss.missed import MissedNotices
from lonelypss.peers import MISSED, RECEIVE, Peers, Registry, peer_url
from lonelypss.sender import Sender
from lonelypss.store import Kind, StoreUnavailable, Subscription
from lonelypss.store.sqlite import SqliteStore
from lonelypss.tracing import MessageStep
from waiting import until

from .harness import (
    DOWN,
    NO_AUTH,
    UP,
    Response,
    config,
    exchange,
    hmac_auth,
    request_bytes,
    until_async,
    within,
)

URL, RECOVERY = "http://me/v1/receive_for_websockets", "http://me/v1/missed_for_websockets"
OTHER = "http://other/v1/receive_for_websockets"
Rows = set[tuple[Kind, bytes]]


def exact(*topics: bytes) -> Topics:
    return Topics.of(topics)


def globs(*patterns: str) -> Topics:
    return Topics.of((), patterns)


# The registry


@dataclass
class Database:
    """Rows, as much of a store as a registry needs. Each call takes as long as `pause` does.

    Attributes:
        fault: called before and after each write with the name of the method; may raise.
    """

    pause: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0)
    fault: Callable[[str], None] = lambda _: None
    rows: dict[tuple[Kind, bytes, str], Subscription] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    running: int = 0
    most: int = 0

    def __post_init__(self) -> None:
        self.ids = itertools.count(1)

    def of(self, url: str = URL) -> Rows:
        return {key[:2] for key in self.rows if key[2] == url}

    def put(self, kind: Kind, pattern: bytes, url: str, recovery: str | None) -> None:
        row = Subscription(next(self.ids), kind, pattern, url, recovery)
        self.rows[kind, pattern, url] = row

    async def _do(self, name: str, change: Callable[[], Any]) -> Any:
        self.calls.append(name)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.pause()
            self.fault(name)
            outcome = change()
            await self.pause()
            self.fault(name)
            return outcome
        finally:
            self.running -= 1

    async def subscribe(self, kind: Kind, pattern: bytes, url: str, recovery: str | None) -> bool:
        def change() -> bool:
            if (kind, pattern, url) in self.rows:
                return False
            self.put(kind, pattern, url, recovery)
            return True

        return bool(await self._do("subscribe", change))

    async def unsubscribe(self, kind: Kind, pattern: bytes, url: str) -> bool:
        return bool(
            await self._do("unsubscribe", lambda: self.rows.pop((kind, pattern, url), None))
        )

    async def subscriptions(self, url: str) -> list[Subscription]:
        def look() -> list[Subscription]:
            return [row for row in self.rows.values() if row.url == url]

        found: list[Subscription] = await self._do("subscriptions", look)
        return found

    async def set_subscriptions(
        self,
        url: str,
        exact: Iterable[tuple[bytes, str | None]],
        globs: Iterable[tuple[str, str | None]],
    ) -> None:
        wanted = {(Kind.EXACT, topic): recovery for topic, recovery in exact}
        wanted |= {(Kind.GLOB, glob.encode()): recovery for glob, recovery in globs}

        def change() -> None:
            for key in self.of(url) - wanted.keys():
                del self.rows[(*key, url)]
            for key, recovery in wanted.items():
                if (*key, url) not in self.rows or self.rows[(*key, url)].recovery != recovery:
                    self.put(*key, url, recovery)

        await self._do("set_subscriptions", change)


def registered(database: Database) -> Registry[str]:
    registry: Registry[str] = Registry()
    registry.start(database, URL, RECOVERY)  # type: ignore[arg-type]
    return registry


async def settled(registry: Registry[str]) -> None:
    await until(lambda: registry._writing is None)


async def test_rows_follow_the_first_and_the_last_owner() -> None:
    database = Database()
    registry = registered(database)
    await registry.add("a", exact(b"t", b"u"))
    await registry.add("b", exact(b"t") | globs("t*"))
    assert database.of() == {(Kind.EXACT, b"t"), (Kind.EXACT, b"u"), (Kind.GLOB, b"t*")}
    assert {row.recovery for row in database.rows.values()} == {RECOVERY}
    assert database.calls == ["subscribe"] * 3
    assert sorted(registry.match(b"t")) == ["a", "b"]
    await registry.remove("a", exact(b"t"))
    assert registry.match(b"t") == ["b"]
    await registry.remove("b", exact(b"t"))
    assert registry.match(b"t") == ["b"]  # the glob
    assert database.of() == {(Kind.EXACT, b"u"), (Kind.GLOB, b"t*")}
    registry.forget("b")
    assert registry.match(b"t") == []
    await settled(registry)
    assert database.of() == {(Kind.EXACT, b"u")}
    assert not await registry.repair()


async def test_what_an_owner_has_counts_once() -> None:
    database = Database()
    registry = registered(database)
    await registry.add("a", exact(b"t"))
    await registry.add("a", exact(b"t", b"u"))
    await registry.remove("a", exact(b"t", b"never"))
    assert database.of() == {(Kind.EXACT, b"u")}
    await registry.remove("nobody", exact(b"u"))
    registry.forget("nobody")
    assert database.of() == {(Kind.EXACT, b"u")}


async def test_without_a_url_there_are_no_rows() -> None:
    registry: Registry[str] = Registry()
    await registry.add("a", exact(b"t"))
    assert registry.match(b"t") == ["a"]
    await registry.remove("a", exact(b"t"))
    registry.forget("a")
    assert registry.match(b"t") == []
    assert not await registry.repair()


async def test_what_was_wanted_before_the_start_is_written() -> None:
    database = Database()
    registry: Registry[str] = Registry()
    await registry.add("a", exact(b"t") | globs("*"))
    registry.start(database, URL, RECOVERY)  # type: ignore[arg-type]
    await settled(registry)
    assert database.of() == {(Kind.EXACT, b"t"), (Kind.GLOB, b"*")}


async def test_a_second_owner_waits_for_the_row_of_the_first() -> None:
    held = asyncio.Event()
    database = Database(pause=held.wait)  # type: ignore[arg-type]
    registry = registered(database)
    adding = [asyncio.create_task(registry.add(name, exact(b"t"))) for name in "ab"]
    await until(lambda: database.running)
    adding.append(asyncio.create_task(registry.add("c", exact(b"t"))))
    await asyncio.sleep(0)
    assert not any(task.done() for task in adding)
    assert registry.match(b"t") == ["a", "b", "c"]
    held.set()
    await asyncio.gather(*adding)
    assert database.calls == ["subscribe"]


async def test_one_that_is_cancelled_does_not_hurt_the_others() -> None:
    held = asyncio.Event()
    database = Database(pause=held.wait)  # type: ignore[arg-type]
    registry = registered(database)
    first, second = (asyncio.create_task(registry.add(name, exact(b"t"))) for name in "ab")
    await until(lambda: database.running)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    held.set()
    await second
    assert registry.match(b"t") == ["b"]
    assert database.of() == {(Kind.EXACT, b"t")}
    registry.forget("b")
    await settled(registry)
    assert database.of() == set()


def failing(*names: str, after: bool = False) -> Callable[[str], None]:
    """A fault in all calls of these methods, before or after they had an effect."""
    turn = itertools.count()

    def fault(name: str) -> None:
        if name in names and (not after or next(turn) % 2 == 1):
            raise StoreUnavailable("locked")

    return fault


@pytest.mark.parametrize("after", [False, True])
async def test_a_registration_that_fails_is_taken_back(
    after: bool, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database()
    registry = registered(database)
    await registry.add("b", exact(b"u"))
    database.fault = failing("subscribe", after=after)
    with pytest.raises(StoreUnavailable, match="locked"):
        await registry.add("a", exact(b"t", b"u") | globs("*"))
    assert registry.match(b"t") == []
    assert registry.match(b"u") == ["b"]
    await settled(registry)
    assert database.of() == {(Kind.EXACT, b"u")}
    database.fault = failing()
    await registry.add("a", exact(b"t", b"u") | globs("*"))
    assert len(database.of()) == 3
    assert "could not be changed" in caplog.text


@pytest.mark.parametrize("how", ["remove", "forget"])
async def test_a_removal_that_fails_is_repaired_later(how: str) -> None:
    database = Database()
    registry = registered(database)
    await registry.add("a", exact(b"t"))
    database.fault = failing("unsubscribe")
    if how == "remove":
        await registry.remove("a", exact(b"t"))
    else:
        registry.forget("a")
        await settled(registry)
    assert database.of() == {(Kind.EXACT, b"t")}
    database.fault = failing()
    assert not await registry.repair()  # one too many: nobody missed anything
    assert database.of() == set()


async def test_a_bug_of_the_store_is_not_hidden(caplog: pytest.LogCaptureFixture) -> None:
    def fault(_: str) -> None:
        raise ZeroDivisionError

    registry = registered(Database(fault=fault))
    with pytest.raises(ZeroDivisionError):
        await registry.add("a", exact(b"t"))
    assert "unforeseen" in caplog.text
    await settled(registry)


async def test_a_row_that_was_thought_gone_is_made_anew() -> None:
    """A broadcaster may be about to drop it, by its id, after "unsubscribe"."""
    database = Database()
    registry = registered(database)
    database.put(Kind.EXACT, b"t", URL, RECOVERY)
    (stale,) = database.rows.values()
    assert registry.is_stale(b"t")
    await registry.add("a", exact(b"t"))
    (row,) = database.rows.values()
    assert row.id != stale.id


async def test_nothing_is_stale_while_rows_change() -> None:
    held = asyncio.Event()
    held.set()
    database = Database(pause=held.wait)  # type: ignore[arg-type]
    registry = registered(database)
    assert registry.is_stale(b"t")
    await registry.add("a", exact(b"t"))
    assert not registry.is_stale(b"t")
    assert registry.is_stale(b"u")
    held.clear()
    registry.forget("a")
    assert not registry.is_stale(b"t")
    await until(lambda: database.running)
    assert not registry.is_stale(b"t")
    held.set()
    await settled(registry)
    assert registry.is_stale(b"t")


async def test_rows_in_the_hands_of_the_store_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 10)
    database = Database()
    registry = registered(database)
    await registry.add("a", exact(*(b"%d" % n for n in range(95))))
    assert (len(database.of()), database.most) == (95, 10)
    registry.forget("a")
    await settled(registry)
    assert (len(database.of()), database.most) == (0, 10)


async def test_what_others_removed_is_put_back() -> None:
    database = Database()
    registry = registered(database)
    await registry.add("a", exact(b"t", b"u") | globs("*"))
    database.put(Kind.EXACT, b"t", OTHER, None)
    for key in [(Kind.EXACT, b"t", URL), (Kind.GLOB, b"*", URL)]:
        del database.rows[key]
    database.put(Kind.EXACT, b"surplus", URL, RECOVERY)
    assert await registry.repair()
    assert database.of() == {(Kind.EXACT, b"t"), (Kind.EXACT, b"u"), (Kind.GLOB, b"*")}
    assert database.of(OTHER) == {(Kind.EXACT, b"t")}
    assert not await registry.repair()
    assert database.calls.count("set_subscriptions") == 1
    database.rows[Kind.EXACT, b"u", URL] = Subscription(99, Kind.EXACT, b"u", URL, "http://old")
    assert not await registry.repair()
    assert {row.recovery for row in database.rows.values() if row.url == URL} == {RECOVERY}


async def test_after_the_stop_rows_are_left_alone() -> None:
    held = asyncio.Event()
    database = Database(pause=held.wait)  # type: ignore[arg-type]
    registry = registered(database)
    first = asyncio.create_task(registry.add("a", exact(b"t")))
    await until(lambda: database.running)
    second = asyncio.create_task(registry.add("b", exact(b"u")))
    await asyncio.sleep(0)
    stopping = asyncio.create_task(registry.stop())
    await asyncio.sleep(0)
    held.set()
    await stopping
    await first
    with pytest.raises(StoreUnavailable, match="stopping"):
        await second
    assert database.calls == ["subscribe"]
    registry.forget("a")
    await registry.add("c", exact(b"t"))
    assert registry.match(b"t") == ["c"]
    assert database.calls == ["subscribe"]


class Chaos:
    """Owners that come and go, and a store that fails, in an order that a seed decides."""

    KEYS = (*(b"%d" % n for n in range(4)), "*", "[0-2]", "**")

    def __init__(self, seed: int, faults: float) -> None:
        self.random = random.Random(seed)
        self.faults = faults
        self.database = Database(pause=self.pause, fault=self.fault)
        self.registry = registered(self.database)
        self.confirmed: dict[str, set[bytes | str]] = {}

    async def pause(self) -> None:
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)

    def fault(self, _: str) -> None:
        self.check()
        if self.random.random() < self.faults:
            raise StoreUnavailable("chaos")

    def check(self) -> None:
        """What was confirmed is in the database, at any moment."""
        for key in set().union(*self.confirmed.values()):
            row = (Kind.GLOB, key.encode()) if isinstance(key, str) else (Kind.EXACT, key)
            assert row in self.database.of(), key

    def some(self) -> list[bytes | str]:
        return self.random.sample(self.KEYS, self.random.randrange(1, 4))

    async def owner(self, name: str) -> None:
        mine = self.confirmed.setdefault(name, set())
        for _ in range(self.random.randrange(1, 8)):
            keys = self.some()
            topics = module._topics(keys)
            if self.random.random() < 0.6:
                task = asyncio.create_task(self.registry.add(name, topics))
                if self.random.random() < 0.2:
                    await self.pause()
                    task.cancel()
                try:
                    await task
                    mine.update(keys)
                except (StoreUnavailable, asyncio.CancelledError):
                    pass
            else:
                mine.difference_update(keys)
                await self.registry.remove(name, topics)
            await self.pause()
        if self.random.random() < 0.5:
            mine.clear()
            self.registry.forget(name)

    async def repairs(self) -> None:
        for _ in range(self.random.randrange(5)):
            await self.pause()
            try:
                assert not await self.registry.repair()
            except StoreUnavailable:
                pass

    async def run(self) -> None:
        owners = [self.owner(str(n)) for n in range(6)]
        await asyncio.gather(*owners, *([self.repairs()] if self.faults else []))
        await settled(self.registry)
        if self.faults:
            self.faults = 0.0
            assert not await self.registry.repair()
        wanted = set().union(*self.confirmed.values())
        assert self.database.of() == {module._row(key) for key in wanted}
        for topic in (b"0", b"3", b"x"):
            owners_of = {
                name
                for name, keys in self.confirmed.items()
                if any(
                    key == topic or (isinstance(key, str) and (topic in b"012" or key[0] == "*"))
                    for key in keys
                )
            }
            assert set(self.registry.match(topic)) == owners_of


@pytest.mark.parametrize("faults", [0.0, 0.2])
@pytest.mark.filterwarnings("error")
async def test_any_order_of_events_ends_with_the_right_rows(
    faults: float, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(300):
        caplog.clear()
        try:
            async with within():
                await Chaos(seed, faults).run()
        except BaseException:
            print("seed", seed)
            raise


# Leases


@dataclass
class Sockets:
    """What the websockets of a process got."""

    registry: Registry[str] = field(default_factory=Registry)
    messages: list[tuple[bytes, bytes]] = field(default_factory=list)
    notices: list[bytes] = field(default_factory=list)
    gaps: int = 0

    receive_url: str | None = None

    def deliver(self, topic: bytes, body: Body, step: MessageStep) -> int:
        owners = self.registry.match(topic)
        self.messages += [(topic, body.read_at(0, body.length))] * len(owners)
        return len(owners)

    def missed(self, topic: bytes) -> None:
        self.notices.append(topic)

    def gap(self) -> None:
        self.gaps += 1


@dataclass
class One:
    """A broadcaster as far as it matters here."""

    store: SqliteStore
    sockets: Sockets
    peers: Peers
    fanout: Fanout
    now: float = 1000.0

    @property
    def url(self) -> str:
        assert self.peers.url is not None
        return self.peers.url

    @property
    def port(self) -> int:
        match = re.search(r":(\d+)/", self.url)
        assert match is not None
        return int(match[1])

    async def rows(self) -> Rows:
        return {(row.kind, row.pattern) for row in await self.store.subscriptions(self.url)}


@asynccontextmanager
async def one(
    path: Path, auth: AuthConfig = NO_AUTH, *, real_time: bool = False, **options: Any
) -> AsyncIterator[One]:
    conf = config(db=f"sqlite:///{path}", auth=auth, **options)
    async with AsyncExitStack() as stack:
        store = SqliteStore(str(path))
        await store.open()
        stack.push_async_callback(store.close)
        sender = Sender(conf)
        sender.open()
        stack.push_async_callback(sender.close)
        sockets = Sockets()
        found: One

        def clock() -> float:
            return time.time() if real_time else found.now

        peers = Peers(conf, store, sockets.registry, Intake(conf), sockets, clock=clock)
        fanout = Fanout(conf, store, sender, MissedNotices(conf, store, sender), sockets)
        found = One(store, sockets, peers, fanout)
        await stack.enter_async_context(peers)
        sockets.receive_url = peers.url
        yield found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


async def test_what_was_added_is_seen_by_others_at_once(path: Path) -> None:
    async with one(path) as a, one(path) as b:
        assert a.url != b.url
        for n in range(20):
            topic = b"t/%d" % n
            await a.sockets.registry.add("x", exact(topic) if n % 2 else globs(topic.decode()))
            (row,) = await b.store.match(topic)
            assert (row.url, row.recovery) == (a.url, a.url.replace(RECEIVE, MISSED))
        await b.sockets.registry.add("y", globs("t/*"))
        assert len(await a.store.match(b"t/1")) == 2
        await a.sockets.registry.remove("x", exact(b"t/1"))
        assert [row.url for row in await b.store.match(b"t/1")] == [b.url]


async def test_who_leaves_takes_all_along(path: Path) -> None:
    async with one(path) as b:
        async with one(path) as a:
            await a.sockets.registry.add("x", exact(b"t"))
            url, port = a.url, a.port
        assert await b.store.subscriptions(url) == []
        assert not await b.store.renew_peer(url, 2000.0, 1000.0)
        with pytest.raises(OSError, match="Connect"):
            socket.create_connection(("127.0.0.1", port))


async def test_who_cannot_leave_properly_says_so(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fault(url: str) -> None:
        raise StoreUnavailable("locked")

    async with one(path) as a:
        monkeypatch.setattr(a.store, "remove_peer", fault)
    assert "within 40 seconds: locked" in caplog.text


async def test_the_rows_of_a_killed_one_go_with_its_lease(path: Path) -> None:
    async with one(path) as a, one(path) as b:
        await a.sockets.registry.add("x", exact(b"t"))
        for now, judges, left in [
            (1010.0, True, 1),
            (1029.0, True, 1),
            (1031.0, False, 1),  # perhaps all were stuck
            (1032.0, True, 0),
        ]:
            b.now = now
            assert await b.peers.renew(judges)
            assert len(await a.rows()) == left


async def test_who_lost_his_lease_puts_his_rows_back_and_says_so(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with one(path) as a, one(path) as b:
        await a.sockets.registry.add("x", exact(b"t"))
        a.now = b.now = 1020.0
        assert await b.peers.renew(True)
        a.now = b.now = 1040.0
        assert await b.peers.renew(True)
        assert await a.rows() == set()
        assert not await a.peers.renew(True)  # and judges nobody
        assert await a.rows() == {(Kind.EXACT, b"t")}
        assert (a.sockets.gaps, b.sockets.gaps) == (1, 0)
        assert "it was stuck" in caplog.text
        assert "gave no sign of life" in caplog.text
        assert await a.peers.renew(True)
        assert a.sockets.gaps == 1


async def test_a_lease_that_ran_out_unnoticed_is_no_gap(path: Path) -> None:
    async with one(path) as a:
        await a.sockets.registry.add("x", exact(b"t"))
        a.now = 1040.0
        assert not await a.peers.renew(True)
        assert a.sockets.gaps == 0


async def test_the_heart_beats_and_outlives_faults(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_RETRY_PAUSE", 0.01)
    outcomes: list[Exception | None] = [StoreUnavailable("locked"), None, ZeroDivisionError(), None]
    judged: list[bool] = []
    async with one(path, peer_lease=3, real_time=True) as a:
        real = a.peers.renew

        async def renew(judges: bool) -> bool:
            judged.append(judges)
            if outcomes and (error := outcomes.pop(0)) is not None:
                raise error
            return await real(judges)

        monkeypatch.setattr(a.peers, "renew", renew)
        await until(lambda: len(judged) >= 5)
        assert judged[:5] == [False, False, True, False, True]
        assert "trying again: locked" in caplog.text
        assert "unforeseen" in caplog.text


KILLED = """
import asyncio, sys
from pathlib import Path
from broadcaster.test_peers import exact, one

async def main():
    async with one(Path(sys.argv[1]), peer_lease=1, real_time=True) as a:
        await a.sockets.registry.add("x", exact(b"t"))
        print(a.url, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_process_leaves_nothing_for_long(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = 0
    real = Peers.renew

    async def renew(self: Peers, judges: bool) -> bool:
        nonlocal beats
        beats += 1
        return await real(self, judges)

    monkeypatch.setattr(Peers, "renew", renew)
    async with one(path, peer_lease=1, real_time=True) as b:
        killed = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", KILLED, str(path)),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        try:
            assert killed.stdout is not None
            async with within(30):
                url = (await killed.stdout.readline()).decode().strip()
            assert len(await b.store.subscriptions(url)) == 1
            await until(lambda: beats >= 6)
            assert len(await b.store.subscriptions(url)) == 1, "it is alive"
        finally:
            killed.send_signal(signal.SIGKILL)
            await killed.wait()
        start = time.monotonic()

        async def gone() -> bool:
            return not await b.store.subscriptions(url)

        await until_async(gone)
        assert time.monotonic() - start < 3


async def test_who_takes_the_url_of_a_killed_one_starts_empty(path: Path) -> None:
    options: dict[str, Any] = {"peer_url": "http://10.0.0.5:3003"}
    store = SqliteStore(str(path))
    await store.open()
    url = options["peer_url"] + RECEIVE
    await store.subscribe(Kind.EXACT, b"t", url, None)
    async with one(path, **options) as a:
        assert a.url == url
        assert await store.subscriptions(url) == []
    await store.close()


# The listener


async def test_a_database_in_memory_has_no_peers() -> None:
    conf = config()
    sockets = Sockets()
    registry = sockets.registry
    async with Peers(conf, SqliteStore(None), registry, Intake(conf), sockets) as peers:
        assert peers.url is None
        await registry.add("x", exact(b"t"))
        assert sockets.registry.match(b"t") == ["x"]
        for path in (RECEIVE, MISSED):
            assert (await call(peers, path, b"")).status == 404


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ({}, "http://127.0.0.1:7"),
        ({"peer_host": "::1"}, "http://[::1]:7"),
        ({"peer_host": "0.0.0.0"}, "http://127.0.0.1:7"),
        ({"peer_host": "::"}, "http://[::1]:7"),
        ({"peer_host": "localhost"}, "http://localhost:7"),
        ({"peer_url": "http://10.0.0.5:{port}"}, "http://10.0.0.5:7"),
        ({"peer_url": "https://proxy/{port}/x"}, "https://proxy/7/x"),
        ({"peer_url": "https://proxy"}, "https://proxy"),
    ],
)
def test_peer_url(options: dict[str, Any], url: str) -> None:
    assert peer_url(config(**options), 7) == url


@pytest.mark.parametrize(
    "options", [{"peer_host": "not a host"}, {"peer_url": "http://a:0"}, {"peer_url": "http://u@h"}]
)
def test_urls_that_others_could_not_use(options: dict[str, Any]) -> None:
    conf, sockets = config(**options), Sockets()
    with pytest.raises(ConfigError, match=r"peer_url, peer_host: .* is no url"):
        Peers(conf, SqliteStore(None), sockets.registry, Intake(conf), sockets)


async def test_a_host_that_is_not_here(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"peer_host: cannot listen on '192\.0\.2\.1'"):
        async with one(path, peer_host="192.0.2.1"):
            pass


async def test_without_uvicorn(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"pip install 'lonelypsc\[standard\]'"):
        async with one(path):
            pass
    async with one(path, peer_url="http://10.0.0.5:3003"):  # the main port does it
        pass


@pytest.mark.parametrize("options", [{}, {"peer_url": "http://localhost:{port}"}])
@pytest.mark.parametrize("auth", [lambda: NO_AUTH, hmac_auth], ids=["none", "hmac"])
@pytest.mark.parametrize("size", [0, 10, 30_000, 3_000_000])
async def test_messages_reach_the_websockets_of_another(
    path: Path, options: dict[str, Any], auth: Callable[[], AuthConfig], size: int
) -> None:
    options["message_body_spool_size"] = 1_000_000
    message = random.Random(size).randbytes(size)
    async with one(path, auth(), real_time=True, **options) as a:
        async with one(path, auth(), real_time=True, **options) as b:
            await a.sockets.registry.add("x", exact(b"t") | globs("*"))
            await a.sockets.registry.add("y", globs("?"))
            await b.sockets.registry.add("z", exact(b"t"))
            with closing(Body.of(message)) as body:
                assert await b.fanout.notify(b"t", body) == 3
            assert a.sockets.messages == [(b"t", message)] * 2
            assert b.sockets.messages == [(b"t", message)]
            assert (await b.store.counts())["missed"] == 0
            assert a.peers.intake.used == 0


async def test_a_stale_row_goes_with_the_first_message(path: Path) -> None:
    async with one(path) as a, one(path) as b:
        await a.store.subscribe(Kind.EXACT, b"t", a.url, a.url.replace(RECEIVE, MISSED))
        with closing(Body.of(b"x")) as body:
            assert await b.fanout.notify(b"t", body) == 0
        assert await a.rows() == set()
        assert (await b.store.counts())["missed"] == 0


async def test_the_listener_serves_nothing_else(path: Path) -> None:
    async with one(path) as a:
        for target in ("/", "/v1/notify", "/docs"):
            assert (await exchange(a.port, request_bytes(target))).status == 404
        assert (await exchange(a.port, request_bytes(RECEIVE, method="GET"))).status == 405


# The endpoints


async def call(
    peers: Peers, path: str, body: bytes, headers: Iterable[tuple[bytes, bytes]] = (), cut: int = 0
) -> Response:
    """Calls an endpoint as a server would, the body in two pieces."""
    pieces = [(body[:cut], True), (body[cut:], False)]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not pieces:
            return {"type": "http.disconnect"}
        piece, more = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": more}

    async def send(event: Any) -> None:
        sent.append(event)

    scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
    await peers.table[path](scope, receive, send)
    start, answer = sent
    names = {name.decode(): value.decode() for name, value in start["headers"]}
    return Response(start["status"], names, answer["body"])


@dataclass
class Posted:
    """A message or notice as another broadcaster sends it; each attribute can be wrong."""

    topic: bytes = b"t"
    message: bytes = b"hello"
    identifier: bytes = b"id"
    url: str = URL
    length: int | None = None
    digest: bytes | None = b"right"
    signed: bytes | None = None
    authorization: str | None = "right"
    tail: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    secret: bytes = DOWN
    at: float = 1000.0
    body: bytes | None = None

    def sign(self, operation: str, **fields: Any) -> list[tuple[bytes, bytes]]:
        value = self.authorization
        if value == "right":
            auth = Hmac(self.secret)
            value = auth.authorize(operation, {"tracing": b"", **fields}, self.at)
        return [] if value is None else [(b"authorization", value.encode())]

    async def receive(self, peers: Peers) -> Response:
        sha512 = hashlib.sha512(self.message).digest()
        head = ReceiveHead(
            b"",
            self.topic,
            self.identifier,
            len(self.message) if self.length is None else self.length,
        )
        headers = self.sign(
            "RECEIVE",
            url=self.url,
            topic=self.topic,
            identifier=self.identifier,
            sha512=self.signed or sha512,
        )
        if self.digest is not None:
            right = b"sha-512=" + base64.b64encode(self.signed or sha512)
            headers.append((b"repr-digest", right if self.digest == b"right" else self.digest))
        body = encode(head) + self.message + self.tail if self.body is None else self.body
        return await call(peers, RECEIVE, body, [*headers, *self.headers], cut=3)

    async def missed(self, peers: Peers) -> Response:
        recovery = self.url.replace(RECEIVE, MISSED)
        headers = self.sign("MISSED", recovery=recovery, topic=self.topic)
        body = encode(Missed(b"", self.topic)) if self.body is None else self.body
        return await call(peers, MISSED, body, [*headers, *self.headers], cut=3)


@pytest.fixture(params=["none", "hmac"])
async def peers(request: pytest.FixtureRequest) -> AsyncIterator[Peers]:
    auth = hmac_auth() if request.param == "hmac" else NO_AUTH
    conf = config(auth=auth, spool_quota=1_000_000, message_body_spool_size=100_000)
    sockets = Sockets()
    made = Peers(conf, SqliteStore(None), sockets.registry, Intake(conf), sockets)
    made.clock = lambda: 1000.0
    sockets.registry.start(Database(), URL, RECOVERY)  # type: ignore[arg-type]
    await sockets.registry.add("x", exact(b"t", b""))
    await sockets.registry.add("y", globs("t*"))
    yield made
    assert made.intake.used == 0


def sockets_of(peers: Peers) -> Sockets:
    assert isinstance(peers.local, Sockets)
    return peers.local


def signs(peers: Peers) -> bool:
    return isinstance(peers.config.auth.to_subscriber, Hmac)


@pytest.mark.parametrize(
    ("posted", "count"),
    [
        (Posted(), 2),
        (Posted(message=b""), 2),
        (Posted(topic=b"", identifier=b""), 1),
        (Posted(topic=b"text", identifier=b"i" * 255), 1),
        (Posted(message=b"x" * 500_000), 2),
        (Posted(digest=b"md5=:x:, sha-512=:" + base64.b64encode(hashlib.sha512(b"hello").digest())
                + b":"), 2),
    ],
)  # fmt: skip
async def test_a_message_is_confirmed_with_its_count(
    peers: Peers, posted: Posted, count: int
) -> None:
    response = await posted.receive(peers)
    assert response.status == 200, response
    answer = decode(ResponseConfirmReceive, response.body)
    assert (answer.identifier, answer.num_subscribers) == (posted.identifier, count)
    assert sockets_of(peers).messages == [(posted.topic, posted.message)] * count
    fields = {
        "tracing": b"",
        "identifier": posted.identifier,
        "num_subscribers": count,
        "url": URL,
    }
    if signs(peers):
        verdict = Hmac(UP).check("CONFIRM_RECEIVE", fields, answer.authorization, 1000.0)
        assert verdict is AuthResult.OK
    else:
        assert answer.authorization is None


@pytest.mark.parametrize("topic", [b"t", b"nobody", b"\xff"])
async def test_a_notice_is_confirmed_whoever_wants_it(peers: Peers, topic: bytes) -> None:
    response = await Posted(topic=topic).missed(peers)
    assert response.status == 200, response
    answer = decode(ResponseConfirmMissed, response.body)
    assert sockets_of(peers).notices == [topic]
    if signs(peers):
        fields = {"tracing": b"", "topic": topic, "url": RECOVERY}
        verdict = Hmac(UP).check("CONFIRM_MISSED", fields, answer.authorization, 1000.0)
        assert verdict is AuthResult.OK


async def test_the_authorization_counts_before_anything_is_told(peers: Peers) -> None:
    response = await Posted(topic=b"nobody").receive(peers)
    assert (response.status, response.body) == (410, b"\0\n")
    response = await Posted(topic=b"nobody", authorization=None).receive(peers)
    assert response.status == (401 if signs(peers) else 410)


WRONG_HASH = hashlib.sha512(b"other").digest()
LONG = base64.b64encode(b"x" * 63)
REFUSED_MESSAGES: dict[str, tuple[Posted, int]] = {
    "no digest": (Posted(digest=None), 400),
    "no sha-512": (Posted(digest=b"sha-256=:eA==:"), 400),
    "digest not base64": (Posted(digest=b"sha-512=!"), 400),
    "digest too short": (Posted(digest=b"sha-512=" + LONG), 400),
    "digest half open": (Posted(digest=b"sha-512=:" + LONG), 400),
    "two digest headers": (Posted(headers=((b"repr-digest", b"sha-512=x"),)), 400),
    "two authorizations": (Posted(headers=((b"authorization", b"x"),) * 2), 400),
    "other hash": (Posted(signed=WRONG_HASH), 400),
    "shorter than declared": (Posted(length=6), 400),
    "longer than declared": (Posted(length=4), 400),
    "bytes behind": (Posted(tail=b"x"), 400),
    "no head": (Posted(body=b""), 400),
    "half a head": (Posted(body=b"\0\0\0\x01t\x02i"), 400),
    "larger than the quota": (Posted(length=1_000_001), 413),
    "larger than anything": (Posted(length=2**64 - 1), 413),
}
REFUSED_NOTICES: dict[str, tuple[Posted, int]] = {
    "two authorizations": (Posted(headers=((b"authorization", b"x"),) * 2), 400),
    "no body": (Posted(body=b""), 400),
    "half a topic": (Posted(body=b"\0\0\0\x02t"), 400),
    "too long": (Posted(body=b"\0" * 200_000), 413),
}
UNAUTHORIZED: dict[str, tuple[Posted, int]] = {
    "no authorization": (Posted(authorization=None), 401),
    "nonsense": (Posted(authorization="nonsense"), 403),
    "another scheme": (Posted(authorization="Bearer x"), 403),
    "another secret": (Posted(secret=UP), 403),
    "another url": (Posted(url=OTHER), 403),
    "too old": (Posted(at=0.0), 403),
}


@pytest.mark.parametrize("name", REFUSED_MESSAGES)
async def test_bad_messages(peers: Peers, name: str) -> None:
    posted, status = REFUSED_MESSAGES[name]
    refused(peers, await posted.receive(peers), status)


@pytest.mark.parametrize("name", REFUSED_NOTICES)
async def test_bad_notices(peers: Peers, name: str) -> None:
    posted, status = REFUSED_NOTICES[name]
    refused(peers, await posted.missed(peers), status)


@pytest.mark.parametrize("name", UNAUTHORIZED)
@pytest.mark.parametrize("peers", ["hmac"], indirect=True)
async def test_bad_authorizations(peers: Peers, name: str) -> None:
    posted, status = UNAUTHORIZED[name]
    refused(peers, await posted.receive(peers), status)
    refused(peers, await posted.missed(peers), status)


@pytest.mark.parametrize("peers", ["hmac"], indirect=True)
async def test_a_message_is_taken_once(peers: Peers) -> None:
    posted = Posted(authorization=None)
    ((_, value),) = Posted().sign(
        "RECEIVE",
        url=URL,
        topic=b"t",
        identifier=b"id",
        sha512=hashlib.sha512(b"hello").digest(),
    )
    posted.authorization = value.decode()
    assert (await posted.receive(peers)).status == 200
    assert (await posted.receive(peers)).status == 403


async def test_an_authorization_that_cannot_be_checked(peers: Peers) -> None:
    class Broken:
        def authorize(self, operation: str, fields: Any, now: float) -> str | None:
            return None

        def check(self, *_: Any) -> AuthResult:
            return AuthResult.UNAVAILABLE

    peers.config = config(auth=AuthConfig(Broken(), Broken()))
    refused(peers, await Posted().receive(peers), 503)
    refused(peers, await Posted().missed(peers), 503)


def refused(peers: Peers, response: Response, status: int) -> None:
    assert response.status == status, response
    assert b"\0\n" not in response.body
    assert response.body.endswith(b"\n")
    assert ("retry-after" in response.headers) == (status == 503)
    assert sockets_of(peers).messages == []
    assert sockets_of(peers).notices == []


async def test_the_url_is_ours_whatever_the_host_header_says(path: Path) -> None:
    """Behind a proxy, the request does not show the url under which we are known."""
    async with one(path, hmac_auth(), peer_url="https://proxy.example/a") as a:
        await a.sockets.registry.add("x", exact(b"t"))
        assert a.url == f"https://proxy.example/a{RECEIVE}"
        host = ((b"host", b"127.0.0.1:1"),)
        response = await Posted(url=a.url, headers=host).receive(a.peers)
        assert response.status == 200


# The command


def test_serve_refuses_workers_that_share_a_peer_url(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from lonelypss.cli import main

    arguments = ["serve", "--port=0", f"--db=sqlite:///{tmp_path}/x.db"]
    shared = "--peer-url=http://10.0.0.5:3003"
    result = CliRunner().invoke(main, [*arguments, "--workers=2", shared])
    assert result.exit_code == 2
    assert "peer_url" in result.output
    assert "{port}" in result.output
