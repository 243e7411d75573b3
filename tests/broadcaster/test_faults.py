"""Faults, end to end: the broadcaster is a process of its own on a database file."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import postgres
from lonelypss.config import BroadcasterConfig
from lonelypss.store.choose import make_store
from lonelypss.store.sqlite import SqliteStore
from waiting import until

from .harness import (
    FAST_NOTICES,
    Answer,
    Peer,
    Received,
    Response,
    Signed,
    Subscriber,
    confirm_receive,
    exchange,
    hmac_auth,
    reply,
    until_async,
    within,
)

TESTS = Path(__file__).parents[1]


@dataclass
class Process:
    process: asyncio.subprocess.Process
    port: int
    peer: Peer

    async def send(self, request: Signed) -> Response:
        return await exchange(self.port, request.bytes())

    async def ok(self, request: Signed) -> None:
        response = await self.send(request)
        assert response.status == 200, response

    async def notify(self, topic: bytes = b"t", message: bytes = b"hello") -> int:
        request = self.peer.notify(topic, message)
        return self.peer.count(await self.send(request), request)

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


@contextlib.asynccontextmanager
async def process(directory: Path, **options: Any) -> AsyncIterator[Process]:
    options = {"db": f"sqlite:///{directory}/one.db", **FAST_NOTICES, **options}
    with (directory / "log").open("ab") as log:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "broadcaster.child", json.dumps(options)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
        )
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        async with within(20):
            port = int(await child.stdout.readline())
        yield Process(child, port, Peer(hmac_auth()))
    finally:
        if child.returncode is None:
            child.stdin.close()  # asks it to stop
            try:
                async with within():
                    await child.wait()
            except TimeoutError:
                child.kill()
                await child.wait()
        await child.communicate()


def notices(subscriber: Subscriber) -> list[bytes]:
    return [r.missed for r in subscriber.requests if "/v1/recover" in r.path]


@pytest.mark.parametrize("journal_after", [0.0, 0.05])
async def test_kill_in_the_middle_of_a_fanout(tmp_path: Path, journal_after: float) -> None:
    """The subscriptions are there, and whoever was pending gets a notice after the restart."""
    options = {
        "journal_after": journal_after,
        # what is written down as a precaution is due after these
        "outgoing_http_timeout_total": 1.0,
        "outgoing_http_timeout_sock_read": None,
    }
    async with Subscriber(auth=hmac_auth()) as hanging, Subscriber(auth=hmac_auth()) as quick:
        hanging.handler = lambda r: None if "receive" in r.path else hanging.confirm(r)
        async with process(tmp_path, **options) as one:
            for subscriber in (hanging, quick):
                request = one.peer.subscribe(subscriber.url, b"t", subscriber.recovery)
                await one.ok(request)
            task = asyncio.create_task(one.notify())
            await hanging.got(1)
            await quick.got(1)
            if journal_after:
                store = SqliteStore(str(tmp_path / "one.db"))
                await store.open()

                async def journaled() -> bool:
                    return (await store.counts())["missed"] == 1

                await until_async(journaled)
                await store.close()
            await one.kill()
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                await task
        assert not notices(hanging)
        async with process(tmp_path, **options) as two:
            await until(lambda: notices(hanging) == [b"t"])
            for subscriber in (hanging, quick):
                again = two.peer.subscribe(subscriber.url, b"t", subscriber.recovery)
                assert (await two.send(again)).status == 409
            hanging.handler = None
            assert await two.notify() == 2


DATABASES: dict[str, Callable[[Path], str]] = {
    "sqlite": lambda directory: f"sqlite:///{directory}/one.db",
    "postgres": lambda directory: postgres.shared().database(),
}


@pytest.fixture(params=DATABASES)
def db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return DATABASES[request.param](tmp_path)


async def test_the_other_broadcaster_announces_what_a_killed_one_left(
    db: str, tmp_path: Path
) -> None:
    """F21: one of two is killed while a subscriber reads the message."""
    options = {
        "db": db,
        "journal_after": 0.0,
        "outgoing_http_timeout_total": 1.0,
        "outgoing_http_timeout_sock_read": None,
    }
    async with (
        Subscriber(auth=hmac_auth()) as hanging,
        process(tmp_path, **options) as one,
        process(tmp_path, **options) as two,
    ):
        hanging.handler = lambda r: None if "receive" in r.path else hanging.confirm(r)
        await one.ok(one.peer.subscribe(hanging.url, b"t", hanging.recovery))
        task = asyncio.create_task(one.notify())
        await hanging.got(1)
        await one.kill()
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await task
        await until(lambda: notices(hanging) == [b"t"], 20)
        hanging.handler = None
        assert await two.notify() == 1


@pytest.mark.parametrize("after", [0.01, 0.05])
async def test_kill_in_the_middle_of_a_set(db: str, after: float, tmp_path: Path) -> None:
    """C24: one of both lists is there."""
    lists = [tuple((b"%d/%d" % (n, i), None) for i in range(1000)) for n in range(2)]
    lists = [tuple(sorted(each)) for each in lists]
    async with process(tmp_path, db=db) as one:
        url = "http://127.0.0.1:9/v1/receive"
        await one.ok(one.peer.set(url, lists[0]))
        for turn in range(1, 4):  # so that the next takes a usual time
            await one.ok(one.peer.set(url, lists[turn % 2]))
        task = asyncio.create_task(one.send(one.peer.set(url, lists[0])))
        await asyncio.sleep(after)
        await one.kill()
        await asyncio.gather(task, return_exceptions=True)
        store = make_store(BroadcasterConfig(db=db))
        await store.open()
        try:
            found = tuple((s.pattern, s.recovery) for s in await store.subscriptions(url))
            assert found in lists
        finally:
            await store.close()


async def test_subscriber_that_was_away_hears_of_it(tmp_path: Path) -> None:
    # a port of its own for both lives
    async with Subscriber(auth=hmac_auth()) as reserved:
        port = reserved.port
    url, recovery = (f"http://localhost:{port}/v1/{x}" for x in ("receive", "recover"))
    options = {"missed_constant": 0.2, "missed_max_retries": 1000}
    async with process(tmp_path, **options) as one:
        await one.ok(one.peer.subscribe(url, b"t", recovery))
        assert await one.notify() == 0
        back = Subscriber(auth=hmac_auth())
        async with listening_on(back, port):
            await until(lambda: notices(back) == [b"t"])
            assert await one.notify() == 1


@contextlib.asynccontextmanager
async def listening_on(subscriber: Subscriber, port: int) -> AsyncIterator[None]:
    real = asyncio.start_server

    async def start(serve: Any, host: str, _: int, **options: Any) -> Any:
        return await real(serve, host, port, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "start_server", start)
        await subscriber.__aenter__()
    try:
        yield
    finally:
        await subscriber.__aexit__()


async def test_locked_database_is_503_and_then_fine(tmp_path: Path) -> None:
    """F04"""
    async with Subscriber(auth=hmac_auth()) as subscriber, process(tmp_path) as one:
        await one.ok(one.peer.subscribe(subscriber.url, b"t", subscriber.recovery))
        locker = sqlite3.connect(tmp_path / "one.db", isolation_level=None)
        try:
            locker.execute("BEGIN IMMEDIATE")
            start = time.monotonic()
            responses = await asyncio.gather(
                *(one.send(one.peer.subscribe(subscriber.url, b"%d" % n)) for n in range(10))
            )
            assert time.monotonic() - start < 3, "0.75 s for all of them, on a busy machine"
            for response in responses:
                assert response.status == 503
                assert int(response.headers["retry-after"]) >= 1
                assert b"locked" in response.body
            assert await one.notify() == 1, "who reads does not care"
            locker.execute("COMMIT")
            await one.ok(one.peer.subscribe(subscriber.url, b"later", None))
            assert await one.notify(b"later") == 1
        finally:
            locker.close()


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[bool]:
    """A disk of 1 MiB in `directory`, for whoever may mount one; whether there is."""
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory],
        check=False,
        capture_output=True,
    ).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.mark.parametrize("is_disk", [True, False], ids=["full", "file too large"])
async def test_a_disk_that_takes_no_more_is_503_and_then_fine(
    is_disk: bool, tmp_path: Path
) -> None:
    """F05, C31. Without the right to mount, both are a limit for the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    filler = disk / "filler"
    with small_disk(disk) if is_disk else contextlib.nullcontext(False) as mounted:
        async with (
            Subscriber(auth=hmac_auth()) as subscriber,
            process(tmp_path, db=f"sqlite:///{disk}/one.db") as one,
        ):
            before = tuple((b"before/%03d" % n, subscriber.recovery) for n in range(100))
            await one.ok(one.peer.set(subscriber.url, before))
            if mounted:
                with filler.open("wb", buffering=0) as out, contextlib.suppress(OSError):
                    while True:
                        out.write(b"x" * 4096)
            else:
                size = (disk / "one.db-wal").stat().st_size
                _limit(one, size)
            # until what was set aside in the -wal is used up
            async with within():
                for n in range(10_000):
                    response = await one.send(one.peer.subscribe(subscriber.url, b"x/%d" % n))
                    if response.status != 200:
                        break
            for request in (
                one.peer.subscribe(subscriber.url, b"during" * 1000),
                one.peer.set(subscriber.url, tuple((b"%03d" % n, None) for n in range(999))),
            ):
                response = await one.send(request)
                assert response.status == 503, response
                assert int(response.headers["retry-after"]) >= 1
                assert b"database" in response.body
            assert await one.notify(b"before/000") == 1, "who reads does not care"
            assert await one.notify(b"during" * 1000) == await one.notify(b"500") == 0
            filler.unlink(missing_ok=True)
            _limit(one, resource.RLIM_INFINITY)
            after = one.peer.subscribe(subscriber.url, b"after" * 1000)
            await until_async(lambda: answered(one, after))
            assert [await one.notify(t) for t in (b"after" * 1000, b"before/099")] == [1, 1]


def _limit(one: Process, size: int) -> None:
    _, hard = resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(one.process.pid, resource.RLIMIT_FSIZE, (size, hard))


async def answered(one: Process, request: Signed) -> bool:
    return (await one.send(request)).status == 200


async def test_one_of_100_hosts_hangs(tmp_path: Path) -> None:
    """The other 99 have theirs before the hanging one is given up."""
    finished: list[int] = []

    def answering(number: int) -> Any:
        def handle(received: Received) -> Answer:
            if number == 0:
                return None
            finished.append(number)
            subscriber = subscribers[number]
            return reply(confirm_receive(received, subscriber.url, hmac_auth()))

        return handle

    async with contextlib.AsyncExitStack() as stack:
        subscribers = [
            await stack.enter_async_context(Subscriber(answering(n), hmac_auth()))
            for n in range(100)
        ]
        options = {"outgoing_http_timeout_sock_read": 3.0}
        one = await stack.enter_async_context(process(tmp_path, **options))
        for subscriber in subscribers:
            await one.ok(one.peer.subscribe(subscriber.url))
        task = asyncio.create_task(one.notify())
        await until(lambda: len(finished) == 99)
        await subscribers[0].got(1)
        assert subscribers[0].open == 1, "still waited for"
        assert not task.done()
        assert await task == 99


async def test_several_processes_on_one_file(tmp_path: Path) -> None:
    """What one has answered, the next request at another sees."""
    async with (
        Subscriber(auth=hmac_auth()) as subscriber,
        process(tmp_path) as one,
        process(tmp_path) as two,
    ):
        for n in range(25):
            topic, (first, second) = b"a/%d" % n, ((one, two), (two, one))[n % 2]
            for make, pattern in [
                (first.peer.subscribe, topic),
                (first.peer.subscribe_glob, topic.decode() + "*"),
            ]:
                await first.ok(make(subscriber.url, pattern))
                assert await second.notify(topic) == 1
                await second.ok(make(subscriber.url, pattern, verb="unsubscribe"))
                assert await first.notify(topic) == 0
        await one.ok(one.peer.set(subscriber.url, ((b"x", None),), (("y*", None),)))
        assert [await two.notify(t) for t in (b"x", b"yy", b"z")] == [1, 1, 0]


async def test_logs_hold_no_tracebacks(tmp_path: Path) -> None:
    """I11, also when somebody hangs up in the middle."""
    async with process(tmp_path) as one:
        data = one.peer.notify(message=b"x" * 1000).bytes()
        async with within():
            for cut in (10, 60, len(data) - 1):
                _, writer = await asyncio.open_connection("127.0.0.1", one.port)
                writer.write(data[:cut])
                await writer.drain()
                writer.transport.abort()
        assert await one.notify() == 0
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert "u" * 64 not in log
