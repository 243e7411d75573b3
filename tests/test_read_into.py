"""Large bodies that go from the socket to the disk, past the event loop and the parser."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from conversation import Conversation
from lonelypsc.listener import Listener, answer
from lonelypsp.guard import HttpLimits, read_into
from lonelypsp.spool import SocketError, Spool
from waiting import until

SIZE = 3_000_000
DATA = os.urandom(SIZE)
SHA512 = hashlib.sha512(DATA).digest()
HEAD = b"POST /%b HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n"
FDS = Path("/proc/self/fd")


class App:
    """Spools what comes; tells how in `told`."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.direct: list[bool] = []
        self.spool: Spool | None = None
        self.task: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.task = asyncio.current_task()
        path = scope["path"]

        async def looked_at() -> Any:
            return await receive()

        first = await receive()
        length = SIZE - 1 if path == "/short" else SIZE
        with Spool(length, memory_limit=-1) as self.spool:
            try:
                if path == "/full":
                    assert self.spool._file is not None
                    full = os.open("/dev/full", os.O_WRONLY)
                    os.dup2(full, self.spool._file.fileno())
                    os.close(full)
                use = looked_at if path == "/wrapped" else receive
                self.direct.append(await read_into(scope, use, self.spool, first["body"]))
                if not self.direct[-1]:
                    await self.the_other_way(receive, first)
                self.spool.finish(SHA512).close()
                self.told.append("whole")
            except BaseException as e:
                self.told.append(str(e) or type(e).__name__)
                if isinstance(e, asyncio.CancelledError):
                    raise
        await answer(send, 200 if self.told[-1] == "whole" else 507, b"ok")

    async def the_other_way(self, receive: Any, event: Any) -> None:
        assert self.spool is not None
        chunks = [event["body"]]
        while event["more_body"]:
            event = await receive()
            if event["type"] != "http.request":
                raise EOFError("gone")
            chunks.append(event["body"])
        self.spool.write(*chunks)


@asynccontextmanager
async def serving(**limits: Any) -> AsyncIterator[tuple[App, int]]:
    app = App()
    listener = Listener("127.0.0.1", 0, app, limits=HttpLimits(**limits))
    await listener.start()
    before = len(list(FDS.iterdir()))
    try:
        yield app, listener.port
        # the connection is closed a little later
        await until(lambda: len(list(FDS.iterdir())) <= before)
    finally:
        await listener.stop()


def request(path: bytes = b"") -> bytes:
    return HEAD % (path, SIZE) + DATA


async def test_requests_follow_on_the_same_connection() -> None:
    async with serving() as (app, port):
        async with Conversation(port) as conversation:
            await conversation.send(request() + request())
            assert (await conversation.receive(2))[0] == [200, 200]
            await conversation.send(request())
            assert (await conversation.receive(1))[0] == [200]
        assert (app.told, app.direct) == (["whole"] * 3, [True] * 3)


async def test_in_pieces() -> None:
    async with serving() as (app, port):
        async with Conversation(port) as conversation:
            whole = request()
            head = len(whole) - SIZE
            for at in range(0, len(whole), 100_000):
                await conversation.send(whole[at : at + 100_000])
                sent = min(at + 100_000, len(whole)) - head
                await until(lambda: app.spool is not None and app.spool.written == sent)  # noqa: B023
            assert (await conversation.receive(1))[0] == [200]
        assert (app.told, app.direct) == (["whole"], [True])


@pytest.mark.parametrize(("path", "told"), [(b"wrapped", "whole"), (b"short", "longer than")])
async def test_what_goes_the_other_way(path: bytes, told: str) -> None:
    async with serving() as (app, port):
        async with Conversation(port) as conversation:
            await conversation.send(request(path))
            assert len((await conversation.receive(1))[0]) == 1
        assert told in app.told[0]
        assert app.direct == [False]


async def test_the_client_goes_away() -> None:
    async with serving() as (app, port):
        async with Conversation(port) as conversation:
            await conversation.send(request()[: SIZE // 2])
            await until(lambda: app.spool is not None and app.spool.written > SIZE // 3)
        await until(lambda: app.told)
        assert (app.told, app.direct) == (["gone"], [False])


async def test_too_slow_is_408() -> None:
    async with serving(min_rate=SIZE, rate_window=0.2) as (app, port):
        async with Conversation(port) as conversation:
            await conversation.send(request()[: SIZE // 2])
            statuses, _, closed = await conversation.receive()
            assert (statuses, closed) == ([408], True)
        await until(lambda: app.told)
        assert app.told == ["gone"]


async def test_full_disk_ends_the_connection() -> None:
    """The parser does not know what was read beside it."""
    async with serving() as (app, port):
        async with Conversation(port) as conversation:
            await conversation.send(request(b"full")[:-1])
            statuses, got, closed = await conversation.receive()
            assert (statuses, closed) == ([507], True)
            assert b"connection: close" in got.lower()
        assert "No space left" in app.told[0]


async def test_cancelled_while_it_waits() -> None:
    async with serving() as (app, port):
        async with Conversation(port) as conversation:
            await conversation.send(request()[: SIZE // 2])
            await until(lambda: app.spool is not None and app.spool.written > SIZE // 3)
            assert app.task is not None
            app.task.cancel()
            await conversation.receive()
        assert app.told == ["CancelledError"]


# the spool's half


def test_read_from() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Spool(10, memory_limit=0) as spool:
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            spool.read_from(ours.fileno(), 100)
        theirs.send(b"0123456789surplus")
        assert spool.read_from(ours.fileno(), 4) == 4
        assert spool.read_from(ours.fileno(), 100) == 6
        assert ours.recv(100) == b"surplus"
        body = spool.finish(hashlib.sha512(b"0123456789").digest())
        assert body.read_at(0, 100) == b"0123456789"
        body.close()


def test_read_from_what_ends() -> None:
    ours, theirs = socket.socketpair()
    with ours, Spool(10, memory_limit=0) as spool:
        ours.setblocking(False)
        theirs.send(b"0123")
        theirs.close()
        assert spool.read_from(ours.fileno(), 100) == 4
        assert spool.read_from(ours.fileno(), 100) == 0
        with pytest.raises(SocketError):
            spool.read_from(-1, 100)


def test_closed_while_a_thread_writes() -> None:
    """Its file stays open until the thread is through: the number could be someone else's."""
    spool = Spool(10, memory_limit=0)
    file = spool._file
    assert file is not None
    with spool._writing:
        spool.close()
        assert not file.closed
    with pytest.raises(ValueError, match="closed"):
        spool.write(b"late")
    assert file.closed
