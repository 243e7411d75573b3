"""PostgreSQL goes away, hangs, refuses: two broadcasters under load go through it and come back.

F08 to F10. The same two broadcasters and subscribers live through all faults of this module. While
a fault lasts, each request is answered soon, with 200 or 503 and Retry-After; what was answered 200
counts; soon after it, without any restart, a message to either broadcaster reaches everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

import postgres
from broadcaster.harness import Response, Signed, exchange
from fleets import Fleet, Receiver, running
from lonelypss.store.postgres import PostgresStore
from postgres import Postgres, Standby
from proxies import Proxy, proxy

DOWN = float(os.environ.get("LONELYPS_DATABASE_DOWN", "1"))  # seconds
ANSWERED = 8.0  # seconds; db_timeout is 0.5 s, and a busy machine takes its time
RECOVERED = 15.0
NOWHERE = "http://127.0.0.1:9/v1/receive"
COMMON = "http://127.0.0.1:9/v1/receive?common"
POOL = 3


@dataclass
class Load:
    """Notifies, and subscriptions that come and go, at each broadcaster all the time."""

    fleet: Fleet
    notified: list[bytes] = field(default_factory=list)
    there: dict[str, set[bytes]] = field(default_factory=dict)
    gone: dict[str, set[bytes]] = field(default_factory=dict)
    refusals: int = 0
    slowest: float = 0.0

    @property
    def done(self) -> int:
        return len(self.notified) + sum(map(len, self.there.values()))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        stopping = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for port in self.fleet.ports:
                for work in (self._notify, self._notify, self._subscribe, self._set):
                    group.create_task(work(port, stopping))
            try:
                yield self
            finally:
                stopping.set()

    async def passed(self, number: int = 60) -> None:
        wanted = self.done + number
        async with asyncio.timeout(30):
            while self.done < wanted:
                await asyncio.sleep(0.01)

    async def _ask(self, port: int, request: Signed) -> Response:
        started = time.monotonic()
        response = await exchange(port, request.bytes())
        self.slowest = max(self.slowest, time.monotonic() - started)
        if response.status != 200:
            assert response.status == 503, response
            assert int(response.headers["retry-after"]) >= 1
            self.refusals += 1
        await asyncio.sleep(0.01)
        return response

    async def _notify(self, port: int, stopping: asyncio.Event) -> None:
        peer = self.fleet.peer()
        name = os.urandom(8)
        turn = 0
        while not stopping.is_set():
            turn += 1
            message = b"%s %d" % (name.hex().encode(), turn)
            if (await self._ask(port, peer.notify(b"t", message))).status == 200:
                self.notified.append(message)

    async def _subscribe(self, port: int, stopping: asyncio.Event) -> None:
        """Each topic once, so that whatever is unknown stays so."""
        peer = self.fleet.peer()
        url = f"{NOWHERE}?{port}"
        there, gone = self.there.setdefault(url, set()), self.gone.setdefault(url, set())
        name = os.urandom(8)
        turn = 0
        while not stopping.is_set():
            turn += 1
            topic = b"%s/%d" % (name.hex().encode(), turn)
            if (await self._ask(port, peer.subscribe(url, topic))).status != 200:
                continue
            there.add(topic)
            if turn % 3 == 0:
                there.remove(topic)
                request = peer.subscribe(url, topic, verb="unsubscribe")
                if (await self._ask(port, request)).status == 200:
                    gone.add(topic)

    async def _set(self, port: int, stopping: asyncio.Event) -> None:
        """Both broadcasters set the same url, always to one of two lists."""
        peer = self.fleet.peer()
        turn = 0
        while not stopping.is_set():
            turn += 1
            await self._ask(port, peer.set(COMMON, *LISTS[turn % 2]))


LISTS: list[tuple[Any, Any]] = [
    (
        tuple((f"{name}/{n}".encode(), None) for n in range(5)),
        tuple((f"{name}/{n}/*", None) for n in range(5)),
    )
    for name in ("odd", "even")
]


@dataclass
class Site:
    """Two broadcasters, what is between them and their database, and who listens to them."""

    server: Postgres
    between: Proxy
    database: str
    fleet: Fleet
    receivers: dict[str, Receiver]

    async def sql(self, statement: str) -> str:
        """As the superuser, past the proxy."""
        return await asyncio.to_thread(self.server.sql, statement, self.database)

    async def backends(self) -> list[int]:
        found = await self.sql(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'lonelypss'"
        )
        return [int(line) for line in found.split()]

    async def end_backends(self) -> None:
        await self.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'lonelypss'"
        )

    async def probe(self) -> None:
        """Returns when a message to each broadcaster has reached everybody."""
        for port in self.fleet.ports:
            peer = self.fleet.peer()
            turn, reached = 0, 0
            while reached < len(self.receivers):
                turn += 1
                message = b"probe %d %d %d" % (port, turn, time.monotonic_ns())
                request = peer.notify(b"t", message)
                response = await exchange(port, request.bytes())
                if response.status == 200:
                    reached = peer.count(response, request)
                await asyncio.sleep(0.02)
            for receiver in self.receivers.values():
                await receiver.until(lambda r=receiver, m=message: r.got[m])

    async def check(self, load: Load) -> None:
        assert load.slowest < ANSWERED
        for program in self.fleet.programs.values():
            assert program.process.poll() is None
        for kind, receiver in self.receivers.items():
            missing = set(load.notified) - receiver.got.keys()
            # over websockets, a lease that ran out is a gap that the program is told
            assert not missing or ("websocket" in kind and receiver.gaps > 1), (kind, len(missing))
        store = PostgresStore(self.server.url(self.database))
        await store.open()
        try:
            for url, there in load.there.items():
                found = {s.pattern for s in await store.subscriptions(url)}
                assert there <= found
                assert not load.gone[url] & found
            common = {s.pattern for s in await store.subscriptions(COMMON)}
            lists = [{t for t, _ in e} | {g.encode() for g, _ in gs} for e, gs in LISTS]
            assert common in lists
        finally:
            await store.close()
        # a transaction of ours that is still there must be one of this moment
        async with asyncio.timeout(RECOVERED):
            while await self.sql(
                "SELECT pid, state, query FROM pg_stat_activity"
                " WHERE application_name = 'lonelypss' AND state <> 'idle'"
                " AND xact_start < now() - interval '2 s'"
            ):
                await asyncio.sleep(0.1)
        assert len(await self.backends()) <= POOL * len(self.fleet.ports)


@asynccontextmanager
async def site(directory: Path, server: Postgres, url: str, between: Proxy) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        options = (f"--db-pool-size={POOL}", "--db-timeout=0.5")
        fleet = await stack.enter_async_context(running(directory, url, 1, 2, *options))
        receivers = {
            f"{kind} {number}": await stack.enter_async_context(
                Receiver(fleet.client(kind, at), exact=[b"t"]).listening()
            )
            for kind in ("http", "websocket")
            for number, at in enumerate(fleet.urls)
        }
        database = url.rpartition("/")[2].partition("?")[0]
        yield Site(server, between, database, fleet, receivers)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    with postgres.server() as server:
        # not a superuser, so that limits and rights hold for it
        server.sql("CREATE ROLE app LOGIN")
        name = server.database().rpartition("/")[2]
        server.sql("GRANT CREATE ON SCHEMA public TO app", name)
        async with proxy(server.url().rpartition("/")[0]) as between:
            url = f"postgresql://app@127.0.0.1:{between.port}/{name}"
            async with site(tmp_path_factory.mktemp("site"), server, url, between) as made:
                yield made


async def restarted_at_once(two: Site) -> None:
    await asyncio.to_thread(two.server.stop, signal.SIGQUIT)
    await asyncio.to_thread(two.server.start)


async def down_for_a_while(two: Site) -> None:
    await asyncio.to_thread(two.server.stop, signal.SIGINT)
    await asyncio.sleep(DOWN)
    await asyncio.to_thread(two.server.start)


async def backend_killed(two: Site) -> None:
    """All others end with it, and the server recovers as after a crash."""
    os.kill((await two.backends())[0], signal.SIGKILL)
    async with asyncio.timeout(30):
        while "was terminated by signal 9" not in two.server.log:
            await asyncio.sleep(0.05)
        while True:
            with contextlib.suppress(Exception):
                await two.sql("SELECT 1")
                return
            await asyncio.sleep(0.05)


async def connections_lost(two: Site) -> None:
    for _ in range(5):
        await two.end_backends()
        await asyncio.sleep(0.1)


async def connections_reset(two: Site) -> None:
    for _ in range(5):
        two.between.cut()
        await asyncio.sleep(0.1)


async def partition(two: Site, **ways: bool) -> None:
    two.between.freeze(**ways)
    await asyncio.sleep(DOWN)
    two.between.freeze(up=False, down=False)


async def locked(two: Site) -> None:
    """Another program forgets a transaction: all connections of the pools wait for it."""
    db = await asyncpg.connect(two.server.url(two.database))
    try:
        await db.execute("BEGIN; LOCK TABLE lonelyps_subscriptions")
        await asyncio.sleep(DOWN)
        state = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'"
        assert await two.sql(state) == "1\n"
    finally:
        await db.close()


async def statements_cancelled(two: Site) -> None:
    """What a server does whose statement_timeout is short."""
    ends = time.monotonic() + DOWN
    async with asyncio.timeout(RECOVERED):
        # until one was under way at that moment
        while time.monotonic() < ends or "due to user request" not in two.server.log:
            await two.sql(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'lonelypss'"
            )


@asynccontextmanager
async def setting(two: Site, name: str, value: str) -> AsyncIterator[None]:
    """For all new connections of the broadcasters; there are new ones."""
    await two.sql(f"ALTER ROLE app SET {name} = {value}")
    await two.end_backends()
    try:
        yield
    finally:
        await two.sql(f"ALTER ROLE app RESET {name}")
        await two.end_backends()


async def not_serializable(two: Site) -> None:
    async with setting(two, "default_transaction_isolation", "serializable"):
        async with asyncio.timeout(30):
            while "could not serialize access" not in two.server.log:
                await asyncio.sleep(0.1)


async def read_only(two: Site) -> None:
    async with setting(two, "default_transaction_read_only", "on"):
        await asyncio.sleep(DOWN)


async def no_connection_left(two: Site) -> None:
    await two.sql("ALTER ROLE app CONNECTION LIMIT 0")
    await two.end_backends()
    await asyncio.sleep(DOWN)
    assert "too many connections for role" in two.server.log
    await two.sql("ALTER ROLE app CONNECTION LIMIT -1")


FAULTS: dict[str, tuple[Callable[[Site], Awaitable[None]], bool]] = {
    # and whether it must be noticed at all
    "restart -m immediate": (restarted_at_once, True),
    "down for a while": (down_for_a_while, True),
    "kill -9 of a backend": (backend_killed, False),
    "connections terminated": (connections_lost, False),
    "connections reset": (connections_reset, False),
    "partition": (partial(partition, up=True, down=True), True),
    "partition, to the database": (partial(partition, up=True, down=False), True),
    "partition, from the database": (partial(partition, up=False, down=True), True),
    "idle in transaction, pool exhausted": (locked, True),
    "statements cancelled": (statements_cancelled, True),
    "serialization failures": (not_serializable, False),
    "read-only": (read_only, True),
    "no connection left": (no_connection_left, True),
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_under_load(two: Site, name: str) -> None:
    fault, is_noticed = FAULTS[name]
    async with Load(two.fleet).running() as load:
        await load.passed()
        await fault(two)
        async with asyncio.timeout(RECOVERED):
            await two.probe()
        await load.passed()
    assert load.refusals or not is_noticed
    await two.check(load)


async def test_failover(tmp_path: Path) -> None:
    """Clients of the database know both servers and look for the one that takes writes."""
    with postgres.server() as first:
        name = first.database().rpartition("/")[2]
        with postgres.server(lambda directory: Standby(directory, first)) as standby:
            assert isinstance(standby, Standby)
            hosts = f"127.0.0.1:{first.port},127.0.0.1:{standby.port}"
            url = f"postgresql://postgres@{hosts}/{name}?target_session_attrs=primary"
            async with site(tmp_path, first, url, Proxy(0)) as two:
                async with Load(two.fleet).running() as load:
                    await load.passed()
                    await asyncio.to_thread(first.stop, signal.SIGKILL)
                    before = load.refusals
                    while load.refusals < before + 10:
                        await asyncio.sleep(0.05)
                    await asyncio.to_thread(standby.promote)
                    two.server = standby
                    async with asyncio.timeout(RECOVERED):
                        await two.probe()
                    await load.passed()
                await two.check(load)
