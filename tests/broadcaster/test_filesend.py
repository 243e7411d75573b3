"""A file to a socket: real sockets, on both event loops."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trustme
import uvloop

from lonelypsp.spool import Body, Spool
from lonelypss.filesend import send_file

LENGTH = 6_000_000  # more than a socket takes at once


def make_body(length: int = LENGTH) -> Body:
    with Spool(length, memory_limit=-1) as spool:
        spool.write(os.urandom(1000) * (length // 1000))
        return spool.seal()


def whole(body: Body) -> bytes:
    return body.read_at(0, body.length)


class Talk:
    """One connection; `peer` is its other end."""

    def __init__(self, transport: asyncio.Transport, peer: socket.socket) -> None:
        self.transport, self.peer = transport, peer

    async def read(self, length: int) -> bytes:
        loop, data = asyncio.get_running_loop(), b""
        while len(data) < length:
            data += await loop.sock_recv(self.peer, length - len(data))
        return data


@asynccontextmanager
async def talk() -> AsyncIterator[Talk]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(asyncio.Protocol, *listener.getsockname())
        peer, _ = listener.accept()
    peer.setblocking(False)
    with peer:
        yield Talk(transport, peer)
        transport.abort()
        await asyncio.sleep(0)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.01)


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    def run(work: Coroutine[Any, Any, None]) -> None:
        factory = uvloop.new_event_loop if request.param == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(work)

    return run


def test_a_slow_reader_gets_everything(run: Callable[..., None]) -> None:
    async def work() -> None:
        body, told = make_body(), []
        async with talk() as both:
            before = descriptors()
            sending = asyncio.create_task(send_file(both.transport, body, lambda: told.append(1)))
            await eventually(lambda: bool(told))
            assert not sending.done()  # the socket is full, and nobody waits in a thread
            assert await both.read(LENGTH) == whole(body)
            assert await sending == LENGTH
            assert descriptors() == before
        body.close()

    run(work())


def test_many_at_once(run: Callable[..., None]) -> None:
    """More slow readers than there are threads."""

    async def work() -> None:
        body, many = make_body(), 40
        async with asyncio.TaskGroup() as group:

            async def one() -> None:
                async with talk() as both:
                    sending = asyncio.create_task(send_file(both.transport, body, str))
                    started.append(sending)
                    await eventually(lambda: len(started) == many)
                    assert await both.read(LENGTH) == data
                    assert await sending == LENGTH

            started: list[asyncio.Task[int]] = []
            data = whole(body)
            for _ in range(many):
                group.create_task(one())
        body.close()

    run(work())


def test_a_peer_that_leaves(run: Callable[..., None]) -> None:
    async def work() -> None:
        body = make_body()
        async with talk() as both:
            sending = asyncio.create_task(send_file(both.transport, body, str))
            assert len(await both.read(100_000)) == 100_000
            both.peer.close()
            with pytest.raises(ConnectionError):
                await sending
        body.close()

    run(work())


def test_giving_up(run: Callable[..., None]) -> None:
    """What was held is let go when the thread is through, never before."""

    async def work() -> None:
        body = make_body()
        async with talk() as both:
            before = descriptors()
            sending = asyncio.create_task(send_file(both.transport, body, str))
            await asyncio.sleep(0)
            assert descriptors() == before + 1
            body.close()
            assert body.on_disk  # the sender still has it
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            await eventually(lambda: descriptors() == before - 1)
            assert not body.on_disk

    run(work())


def test_a_file_that_is_too_short(run: Callable[..., None]) -> None:
    async def work() -> None:
        body = make_body(1000)
        body.length = 5000
        async with talk() as both:
            assert await send_file(both.transport, body, str) == 1000
        body.close()

    run(work())


def test_what_it_cannot_do(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is sent, and another way is left."""

    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    async def work() -> None:
        body, small = make_body(1000), Body.of(b"in memory")
        async with talk() as both:
            assert await send_file(both.transport, small, str) == 0
            monkeypatch.setattr(os, "sendfile", refuse)
            assert await send_file(both.transport, body, str) == 0
            monkeypatch.delattr(os, "sendfile")
            assert await send_file(both.transport, body, str) == 0
        body.close()

    run(work())


def test_an_encrypted_connection_is_left_alone(run: Callable[..., None]) -> None:
    ca = trustme.CA()
    server_tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("localhost").configure_cert(server_tls)
    client_tls = ssl.create_default_context()
    ca.configure_trust(client_tls)

    async def work() -> None:
        body, loop = make_body(1000), asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0, ssl=server_tls)
        address = server.sockets[0].getsockname()
        transport, _ = await loop.create_connection(
            asyncio.Protocol, *address, ssl=client_tls, server_hostname="localhost"
        )
        assert await send_file(transport, body, str) == 0
        transport.abort()
        server.close()
        await asyncio.sleep(0)
        body.close()

    run(work())
