"""One websocket against servers that do what no good one does."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trustme

from lonelypsc.ws_connection import ConnectionLost, Socket, connect

DEADLINE = 10.0
BINARY, CONTINUATION, TEXT, CLOSE, PING, PONG = 2, 0, 1, 8, 9, 10
_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def raw(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    """A frame as a server sends it."""
    length = len(payload)
    if length < 126:
        size = bytes((length,))
    elif length < 65_536:
        size = b"\x7e" + struct.pack("!H", length)
    else:
        size = b"\x7f" + struct.pack("!Q", length)
    return bytes((opcode | (0x80 if fin else 0),)) + size + payload


class Peer:
    """The other end, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def accept(self) -> None:
        request = await self.reader.readuntil(b"\r\n\r\n")
        (key,) = re.findall(rb"Sec-WebSocket-Key: (\S+)", request)
        accept = base64.b64encode(hashlib.sha1(key + _MAGIC).digest())
        self.writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )

    async def frame(self) -> tuple[int, bytes]:
        """Opcode and content of the next frame."""
        first, second = await self.reader.readexactly(2)
        length = second & 0x7F
        if length == 126:
            (length,) = struct.unpack("!H", await self.reader.readexactly(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", await self.reader.readexactly(8))
        mask = await self.reader.readexactly(4)
        data = await self.reader.readexactly(length)
        return first & 0x0F, bytes(b ^ mask[i % 4] for i, b in enumerate(data))


Talk = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def peer(talk: Talk, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server that accepts and does `talk` once for each connection; yields its url."""
    failures: list[BaseException] = []
    handlers: set[asyncio.Task[Any]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        try:
            await talk(Peer(reader, writer))
        except (OSError, asyncio.CancelledError):
            pass  # the client is gone
        except Exception as e:
            failures.append(e)
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    try:
        async with asyncio.timeout(DEADLINE):
            yield f"{'wss' if tls else 'ws'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in handlers:
            task.cancel()
        if handlers:
            await asyncio.wait(handlers)
        await server.wait_closed()
    if failures:
        raise failures[0]


@asynccontextmanager
async def socket_to(url: str, **settings: Any) -> AsyncIterator[Socket]:
    options: dict[str, Any] = {
        "ssl_context": None,
        "max_size": 1_000_000,
        "max_frames": 100,
        "heartbeat": 60.0,
    }
    socket = await connect(url, **(options | settings))
    try:
        yield socket
    finally:
        socket.abort("the test is over")
        await asyncio.wait((socket._gone,))


async def next_frame(socket: Socket) -> bytes:
    while (frame := socket.take()) is None:
        await socket.arrived()
    return frame


async def wait_for_end(peer: Peer) -> None:
    await peer.reader.read()


def saying(*frames: bytes) -> Talk:
    async def talk(peer: Peer) -> None:
        await peer.accept()
        peer.writer.writelines(frames)
        await wait_for_end(peer)

    return talk


# Opening


def answering(answer: bytes) -> Talk:
    async def talk(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.writer.write(answer)
        if peer.writer.can_write_eof():
            peer.writer.write_eof()
        await wait_for_end(peer)

    return talk


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "HTTP 404"),
        (b"HTTP/1.1 301 Moved\r\nLocation: ws://x\r\nContent-Length: 0\r\n\r\n", "HTTP 301"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "HTTP 200"),
        (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: wrong\r\n\r\n",
            "Sec-WebSocket-Accept",
        ),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "."),
        (b"", "."),
    ],
)
async def test_what_is_no_websocket(answer: bytes, why: str) -> None:
    async with peer(answering(answer)) as url:
        with pytest.raises(ConnectionLost, match=why):
            async with socket_to(url):
                pass


@pytest.mark.parametrize(
    "url", ["ws://127.0.0.1:1", "ws://a..b:80", f"ws://{'a' * 70}.example", "ws://[::1]:1"]
)
async def test_where_nobody_is(url: str) -> None:
    with pytest.raises(ConnectionLost, match="cannot connect"):
        async with socket_to(url):
            pass


async def test_frames_right_behind_the_handshake() -> None:
    async with peer(saying(raw(BINARY, b"1"), raw(BINARY, b"2"))) as url:
        async with socket_to(url) as socket:
            assert [await next_frame(socket) for _ in range(2)] == [b"1", b"2"]


async def test_tls() -> None:
    authority = trustme.CA()
    there = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(there)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with peer(saying(raw(BINARY, bytes(300_000))), tls=there) as url:
        async with socket_to(url, ssl_context=trusting) as socket:
            assert await next_frame(socket) == bytes(300_000)
        with pytest.raises(ConnectionLost, match="CERTIFICATE_VERIFY_FAILED"):
            async with socket_to(url):
                pass


@pytest.mark.parametrize("turns", range(8))
async def test_opening_is_cancelled_at_any_moment(turns: int) -> None:
    """Nothing is left over: warnings are errors."""
    async with peer(saying()) as url:
        opening = asyncio.create_task(
            connect(url, ssl_context=None, max_size=100, max_frames=1, heartbeat=1)
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        await asyncio.wait((opening,))
        if not opening.cancelled():
            opening.result().abort("")


# Receiving


@pytest.mark.parametrize(
    "frames",
    [
        [raw(BINARY, b"abcdef")],
        [raw(BINARY, b"abc", fin=False), raw(CONTINUATION, b"def")],
        [raw(BINARY, b"", fin=False), raw(CONTINUATION, b"abcdef")],
        [raw(BINARY, b"abcdef", fin=False), raw(PING, b"x"), raw(CONTINUATION, b"")],
        [
            raw(BINARY, b"abc", fin=False),
            *[raw(CONTINUATION, b"", fin=False)] * 1000,
            raw(CONTINUATION, b"def"),
        ],
    ],
)
async def test_fragments(frames: list[bytes]) -> None:
    async with peer(saying(*frames, raw(BINARY, b"next"))) as url, socket_to(url) as socket:
        assert await next_frame(socket) == b"abcdef"
        assert await next_frame(socket) == b"next"


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([raw(TEXT, b"hello")], "text frame"),
        ([raw(BINARY, bytes(1_000_001))], "exceeds limit"),
        (
            [raw(BINARY, bytes(600_000), fin=False), raw(CONTINUATION, bytes(600_000))],
            "exceeds limit",
        ),
        ([raw(3, b"")], "invalid opcode"),
        ([b"\xf2\x00"], "reserved bits"),
        ([raw(CONTINUATION, b"x")], "unexpected continuation"),
        ([raw(PING, bytes(126))], "control frame too long"),
        ([raw(CLOSE, struct.pack("!H", 4403) + b"forbidden")], "by the broadcaster: 4403 forbid"),
        ([raw(CLOSE, struct.pack("!H", 1012))], "by the broadcaster: 1012"),
        ([raw(CLOSE)], "by the broadcaster: 1005"),
    ],
)
async def test_why_it_ends(frames: list[bytes], why: str) -> None:
    """What came whole before is still there."""
    async with peer(saying(raw(BINARY, b"first"), *frames, raw(BINARY, b"late"))) as url:
        async with socket_to(url) as socket:
            assert await next_frame(socket) == b"first"
            with pytest.raises(ConnectionLost, match=why):
                await next_frame(socket)
            with pytest.raises(ConnectionLost, match=why):
                await socket.arrived()
            socket.send(b"does nothing")
            socket.send_late(b"does nothing", 1)


async def test_the_other_end_vanishes() -> None:
    async def vanish(peer: Peer) -> None:
        await peer.accept()
        peer.writer.write(raw(BINARY, b"half")[:-2])
        await peer.writer.drain()

    async with peer(vanish) as url, socket_to(url) as socket:
        with pytest.raises(ConnectionLost, match="connection lost"):
            await next_frame(socket)


async def test_not_more_is_read_than_agreed() -> None:
    """The rest waits at the peer, and comes when there is room."""
    count, size = 3000, 1000
    async with peer(saying(*[raw(BINARY, bytes(size))] * count)) as url:
        async with socket_to(url, max_frames=10) as socket:
            await socket.arrived()
            for taken in range(count):
                await next_frame(socket)
                held = len(socket._frames)
                # one read of the loop, 256 KiB, may come on top
                assert held <= 10 + 262_144 // size, taken


# Sending


async def test_frames_of_one_turn_arrive_in_order() -> None:
    got: list[bytes] = []

    async def collect(peer: Peer) -> None:
        await peer.accept()
        while len(got) < 100:
            got.append((await peer.frame())[1])
        peer.writer.write(raw(BINARY, b"all"))
        await wait_for_end(peer)

    async with peer(collect) as url, socket_to(url) as socket:
        for n in range(100):
            if n % 3:
                socket.send(b"%d" % n)
            else:
                socket.send_late(b"%d" % n, 50)
        assert await next_frame(socket) == b"all"
        assert got == [b"%d" % n for n in range(100)]


@pytest.mark.parametrize("most", [1, 2, 1000])
async def test_what_is_late_leaves_all_the_same(most: int) -> None:
    async def echo(peer: Peer) -> None:
        await peer.accept()
        for _ in range(2):
            peer.writer.write(raw(BINARY, (await peer.frame())[1]))
        await wait_for_end(peer)

    async with peer(echo) as url, socket_to(url) as socket:
        socket.send_late(b"1", most)
        socket.send_late(b"2", most)
        assert [await next_frame(socket) for _ in range(2)] == [b"1", b"2"]


async def test_a_peer_that_does_not_read_is_noticed() -> None:
    read = asyncio.Event()

    async def slow(peer: Peer) -> None:
        await peer.accept()
        await read.wait()
        await wait_for_end(peer)

    async with peer(slow) as url, socket_to(url) as socket:
        again = asyncio.Event()
        socket.on_writable = again.set
        sent = 0
        while socket.writable.is_set():
            socket.send(bytes(100_000))
            sent += 1
            await asyncio.sleep(0)
        assert sent < 1000
        read.set()
        await again.wait()
        assert socket.writable.is_set()


# Signs of life


async def test_a_silent_peer_is_given_up() -> None:
    loop = asyncio.get_running_loop()
    async with peer(saying()) as url, socket_to(url, heartbeat=0.1) as socket:
        started = loop.time()
        with pytest.raises(ConnectionLost, match="silent for"):
            await next_frame(socket)
        assert 0.1 < loop.time() - started < 2


async def test_any_sign_of_life_will_do() -> None:
    """Pongs, frames, and pings of the peer, which are answered."""

    async def alive(peer: Peer) -> None:
        await peer.accept()
        asked = 0
        while asked < 4:
            opcode, _ = await peer.frame()
            if opcode == PING:
                asked += 1
                peer.writer.write((raw(PONG), raw(BINARY, b"x"), raw(PING, b"y"))[asked % 3])
            else:
                assert opcode == PONG
        peer.writer.write(raw(BINARY, b"enough"))
        await wait_for_end(peer)

    async with peer(alive) as url, socket_to(url, heartbeat=0.05) as socket:
        while await next_frame(socket) != b"enough":
            pass


# Leaving


async def test_goodbye_waits_for_the_answer() -> None:
    """What comes meanwhile is dropped, be it more than is ever read ahead."""
    end: list[Any] = []

    async def slow(peer: Peer) -> None:
        await peer.accept()
        for _ in range(200):
            peer.writer.write(raw(BINARY, bytes(50_000)))
        end.append(await peer.frame())
        await peer.writer.drain()
        peer.writer.write(raw(BINARY, b"late") + raw(CLOSE, struct.pack("!H", 1000)))
        peer.writer.write_eof()
        end.append(await peer.reader.read())  # a reset would raise

    async with peer(slow) as url, socket_to(url, max_frames=1) as socket:
        await socket.arrived()
        await socket.close(1000, "", DEADLINE)
        assert socket._gone.done()
        while len(end) < 2:
            await asyncio.sleep(0.001)
        assert end == [(CLOSE, struct.pack("!H", 1000)), b""]


async def test_goodbye_has_a_bound() -> None:
    async with peer(saying()) as url, socket_to(url) as socket:
        await socket.close(1000, "", 0.05)
        with pytest.raises(ConnectionLost, match="closed by us: 1000"):
            await socket.arrived()


async def test_a_cancelled_goodbye_leaves_nothing_open() -> None:
    async with peer(saying()) as url, socket_to(url) as socket:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await socket.close(1000, "", None)
        await socket._gone


async def test_a_long_reason_is_cut_between_characters() -> None:
    seen: list[bytes] = []

    async def listen(peer: Peer) -> None:
        await peer.accept()
        seen.append((await peer.frame())[1])

    async with peer(listen) as url, socket_to(url) as socket:
        socket.fail(4400, "ü" * 500)
        socket.fail(4413, "the first reason counts")
        await socket._gone
        assert seen == [struct.pack("!H", 4400) + "ü".encode() * 60]
