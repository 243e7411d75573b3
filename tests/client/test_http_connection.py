"""The client's connections against broadcasters that do whatever a socket can do."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import socket
import ssl
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from broadcaster.harness import Answer, Close, Received, free_port, reply, within
from broadcaster.harness import Subscriber as Server
from client.fakes import config
from lonelypsc import http_connection as module
from lonelypsc.http_connection import MAX_REPLY, ONE_WRITE, NoReply, NotSent, Pool, Reply
from waiting import until

OK = Reply(200, b"body")
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@contextlib.asynccontextmanager
async def pool(**settings: Any) -> AsyncIterator[Pool]:
    """An open pool; afterwards nothing of it is left."""
    before = asyncio.all_tasks()
    tls = settings.pop("tls", ssl.create_default_context)
    made = Pool(config("http://127.0.0.1:1", **settings), tls)
    try:
        yield made
    finally:
        async with within():
            await made.close()
            await until(lambda: not (asyncio.all_tasks() - before))
        assert numbers(made) == 0


def numbers(made: Pool) -> int:
    return sum(len(origin.places) for origin in made._origins.values())


def connections(made: Pool) -> list[Any]:
    return [connection for origin in made._origins.values() for connection in origin.connections]


def idle(made: Pool) -> int:
    return sum(len(origin.idle) for origin in made._origins.values())


async def ask(made: Pool, url: str, body: Any = b"", length: int | None = None) -> Reply:
    async with within():
        target = made.target(url)
        return await made.post(target, {}, len(body) if length is None else length, body)


async def pieces(*parts: bytes) -> Any:
    for part in parts:
        yield part


# What is sent


async def test_the_request() -> None:
    async with Server(lambda _: reply(b"body")) as server, pool() as made:
        target = made.target(f"http://127.0.0.1:{server.port}/a prefix/é%20/v1/notify")
        assert (
            await made.post(target, {"Authorization": "X-HMAC 1:a:b=", "X-Y": "é"}, 5, b"hello")
            == OK
        )
    (got,) = server.requests
    assert got.line == "POST /a%20prefix/%C3%A9%20/v1/notify HTTP/1.1"
    assert got.body == b"hello"
    assert got.headers == {
        "host": f"127.0.0.1:{server.port}",
        "user-agent": "lonelypsc",
        "accept-encoding": "identity",
        "content-type": "application/octet-stream",
        "content-length": "5",
        "authorization": "X-HMAC 1:a:b=",
        "x-y": "é".encode().decode("latin-1"),
    }


@pytest.mark.parametrize(
    ("url", "key", "host"),
    [
        ("http://H.example", ("http", "h.example", 80), b"h.example"),
        ("http://h:80/p", ("http", "h", 80), b"h"),
        ("https://h", ("https", "h", 443), b"h"),
        ("https://h:80", ("https", "h", 80), b"h:80"),
        ("http://[::1]:3003", ("http", "::1", 3003), b"[::1]:3003"),
        ("http://bücher.example", ("http", "xn--bcher-kva.example", 80), b"xn--bcher-kva.example"),
        ("http://h:0", ("http", "h", 0), b"h:0"),
    ],
)
async def test_targets(url: str, key: Any, host: bytes) -> None:
    async with pool() as made:
        target = made.target(url + "/v1/notify")
        assert list(made._origins) == [key]
        assert b"\r\nHost: " + host + b"\r\n" in target.head
        assert made.target(url + "/v1/other").origin is target.origin
        assert (target.origin.tls is not None) is url.startswith("https")


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\n", "\r"])
async def test_no_header_is_smuggled(value: str) -> None:
    async with Server(lambda _: reply()) as server, pool() as made:
        with pytest.raises(ValueError, match="line break"):
            await made.post(made.target(server.url), {"A": value, "B": "c"}, 0, b"")
    assert not server.requests


@pytest.mark.parametrize("size", [0, 1, ONE_WRITE, ONE_WRITE + 1, 3_000_000])
async def test_bodies_arrive_whole(size: int) -> None:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    async with Server(lambda _: reply(b"body")) as server, pool() as made:
        assert await ask(made, server.url, data) == OK
        assert await ask(made, server.url, pieces(b"he", b"", memoryview(data)), size + 2) == OK
        assert [r.body for r in server.requests] == [data, b"he" + data]
        assert server.connections == 1


async def test_a_peer_that_reads_slowly_holds_up_the_reading_of_the_body() -> None:
    read = 0
    go_on = asyncio.Event()

    async def endless() -> Any:
        nonlocal read
        for _ in range(400):
            read += 1
            yield b"x" * 100_000

    async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await go_on.wait()
        await reader.readexactly(40_000_000)
        writer.write(reply(b"body"))
        await reader.read()

    async with bare(waits) as url, pool() as made:
        asking = asyncio.create_task(ask(made, url, endless(), 40_000_000))
        await until(lambda: any(not c._writable.is_set() for c in connections(made)))
        assert 0 < read < 300
        go_on.set()
        assert await asking == OK


@pytest.mark.parametrize("error", [OSError("disk on fire"), KeyError("of the program")])
async def test_an_error_of_the_body_is_the_programs(error: Exception) -> None:
    async def breaks() -> Any:
        yield b"x"
        raise error

    async with Server(lambda _: reply()) as server, pool() as made:
        with pytest.raises(type(error)) as e:
            await ask(made, server.url, breaks(), 10)
        assert e.value is error
        await until(lambda: numbers(made) == 0)
    assert not server.requests


# Replies that arrive


GOOD = {
    "length": reply(b"body"),
    "chunked": CHUNKED + b"1\r\nb\r\n3;x=y\r\nody\r\n0\r\n\r\n",
    "chunked with trailers": CHUNKED
    + b"4\r\nbody\r\n0\r\nContent-Encoding: gzip\r\nRetry-After: 1\r\n\r\n",
    "100 first": b"HTTP/1.1 100 Continue\r\n\r\n" + reply(b"body"),
    "100 times 103": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nContent-Encoding: br\r\n\r\n" * 100
    + reply(b"body"),
    "identity": reply(b"body", 200, "Content-Encoding: identity"),
    "lower case": b"HTTP/1.1 200 ok\r\ncontent-length: 4\r\n\r\nbody",
    "no reason": b"HTTP/1.1 200 \r\nContent-Length: 4\r\n\r\nbody",
}


@pytest.mark.parametrize("name", GOOD)
async def test_good_replies_keep_the_connection(name: str) -> None:
    async with Server(lambda _: GOOD[name]) as server, pool() as made:
        for _ in range(3):
            assert await ask(made, server.url, b"x") == OK
        assert server.connections == 1


@pytest.mark.parametrize("name", GOOD)
async def test_good_replies_byte_by_byte(name: str) -> None:
    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await reader.readuntil(b"\r\n\r\n")
        for at in range(len(GOOD[name])):
            writer.write(GOOD[name][at : at + 1])
            await writer.drain()
            await asyncio.sleep(0)
        await reader.read()

    async with bare(dribble) as url, pool() as made:
        assert await ask(made, url) == OK


@pytest.mark.parametrize("name", ["length", "chunked with trailers", "100 first"])
async def test_good_replies_in_two_parts_split_anywhere(name: str) -> None:
    """Without sockets, where the kernel would join them."""
    data = GOOD[name]
    for at in range(1, len(data)):
        async with pool() as made:
            connection, transport = unconnected(made)
            asking = asyncio.create_task(connection.exchange(b"", b"", 0, float("inf")))
            await asyncio.sleep(0)
            connection.data_received(data[:at])
            connection.data_received(data[at:])
            assert await asking == OK
            assert not transport.aborted
            connection.connection_lost(None)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\n\r\nbody",
        b"HTTP/1.0 200 OK\r\n\r\nbody",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nbody",
        reply(b"body", 200, "Connection: close"),
        b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nbody",
        CHUNKED[:-2] + b"Connection: close\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    ],
)
async def test_replies_that_end_the_connection(data: bytes) -> None:
    def close(_: Received) -> Answer:
        raise Close(data)

    async with Server(close) as server, pool() as made:
        for _ in range(2):
            assert await ask(made, server.url) == OK
        assert server.connections == 2


@pytest.mark.parametrize("status", [204, 301, 302, 303, 304, 307, 308, 401, 404, 410, 500, 599])
async def test_statuses_are_passed_on_and_nothing_is_followed(status: int) -> None:
    async with Server() as other, pool() as made:
        data = reply(b"", status, f"Location: {other.url}", "Set-Cookie: a=b", "Retry-After: 7")
        async with Server(lambda _: data) as server:
            for _ in range(2):
                assert await ask(made, server.url) == Reply(status, b"", "7")
            assert "cookie" not in server.requests[1].headers
        assert not other.requests


async def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Server() as proxy, Server(lambda _: reply(b"body")) as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.base)
        monkeypatch.setenv("http_proxy", proxy.base)
        async with pool() as made:
            assert await ask(made, server.url) == OK
        assert not proxy.requests


# Replies that do not


BAD = {
    "reset before headers": (Close(reset=True), "connection failed"),
    "reset in the body": (Close(reply(b"body")[:-2], reset=True), "connection failed"),
    "end before headers": (Close(), "connection failed: the broadcaster closed it"),
    "end in the headers": (Close(b"HTTP/1.1 200 OK\r\nContent-"), "connection failed"),
    "end in the body": (Close(reply(b"body")[:-1]), "connection failed"),
    "end in a chunk": (Close(CHUNKED + b"4\r\nbo"), "connection failed"),
    "end before the last chunk": (Close(CHUNKED + b"4\r\nbody\r\n"), "connection failed"),
    "no HTTP": (Close(b"SSH-2.0-OpenSSH_9.2\r\n" * 10), "the reply is not HTTP"),
    "HTTP/0.9": (Close(b"body"), "the reply is not HTTP"),
    "only 103": (Close(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100), "connection failed"),
    "101": (
        Close(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nbody"),
        "another protocol",
    ),
    "gzip": (Close(reply(b"\x1f\x8b\x08", 200, "Content-Encoding: gzip")), "compressed"),
    "zstd, to the end": (
        Close(b"HTTP/1.1 200 OK\r\nContent-Encoding: zstd\r\n\r\nbody"),
        "compressed",
    ),
    "length 2^63": (
        Close(b"HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775808\r\n\r\nbody"),
        "connection failed",
    ),
    "length 2^64": (
        Close(b"HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551616\r\n\r\nbody"),
        "the reply is not HTTP",
    ),
    "length -1": (Close(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nbody"), "not HTTP"),
    "two lengths": (
        Close(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nbody"),
        "the reply is not HTTP",
    ),
    "length and chunked": (
        Close(
            b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"4\r\nbody\r\n0\r\n\r\n"
        ),
        "the reply is not HTTP",
    ),
    "bad chunk size": (Close(CHUNKED + b"zz\r\nbody\r\n0\r\n\r\n"), "the reply is not HTTP"),
    "header of 1 MiB": (Close(reply(b"body", 200, "X: " + "x" * 2**20)), "longer than 262,144"),
    "10,000 headers": (
        Close(reply(b"body", 200, *["Set-Cookie: a=bbbbbbbbbbbbbbb"] * 10_000)),
        "longer than 262,144",
    ),
    "too long": (Close(reply(b"x" * (MAX_REPLY + 1))), "bad reply: longer than 262,144 bytes"),
    "a second reply at once": (Close(reply(b"body") * 2), "more than one reply"),
    "garbage at once": (Close(reply(b"body") + b"\r\n\r\ngarbage"), "the reply is not HTTP"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_replies_fail(name: str) -> None:
    ending, says = BAD[name]

    def close(_: Received) -> Answer:
        raise ending

    async with Server(close) as server, pool() as made:
        with pytest.raises(NoReply, match=says) as e:
            await ask(made, server.url)
        assert not e.value.stale
        # and the next one is a new start
        server.handler = lambda _: reply(b"body")
        assert await ask(made, server.url) == OK


async def test_a_reply_cut_at_any_byte_is_none() -> None:
    whole = reply(b"body")
    at = 0

    def cut(_: Received) -> Answer:
        raise Close(whole[:at], reset=at % 2 == 1)

    async with Server(cut) as server, pool() as made:
        for at in range(len(whole)):  # noqa: B007 read by `cut`
            with pytest.raises(NoReply):
                await ask(made, server.url)


async def test_endless_reply_is_cut() -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async with bare(flood) as url, pool() as made:
        with pytest.raises(NoReply, match="longer than"):
            await ask(made, url)


async def test_reply_that_nobody_asked_for_ends_the_connection() -> None:
    second = asyncio.Event()

    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply(b"first"))
        await second.wait()
        writer.write(reply(b"unasked"))
        await reader.read()

    async with bare(twice) as url, pool() as made:
        assert (await ask(made, url)).body == b"first"
        second.set()
        await until(lambda: numbers(made) == 0)


@pytest.mark.parametrize("streamed", [True, False])
async def test_early_reply_of_a_peer_that_stops_reading(streamed: bool) -> None:
    """It counts, and the connection is not kept, nor kept waiting for the rest to be read."""
    leave = asyncio.Event()
    closed = asyncio.Event()

    async def endless() -> Any:
        try:
            while True:
                yield b"x" * 100_000
        finally:
            closed.set()

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply(b"body"))
        await leave.wait()

    size = 50_000_000
    async with bare(early) as url, pool() as made:
        assert await ask(made, url, endless() if streamed else b"x" * size, size) == OK
        await until(lambda: numbers(made) == 0)
        if streamed:
            await closed.wait()
        leave.set()


# Kept connections


async def test_a_kept_connection_that_the_broadcaster_closes_as_it_is_used() -> None:
    def once(received: Received) -> Answer:
        if sum(r.connection == received.connection for r in server.requests) == 1:
            return reply(b"body")
        raise Close

    async with Server(once) as server, pool() as made:
        assert await ask(made, server.url) == OK
        with pytest.raises(NoReply, match="connection failed") as e:
            await ask(made, server.url)
        assert e.value.stale
        assert len(server.requests) == 2  # sent again by nobody


async def test_others_that_idle_are_given_up_with_it() -> None:
    async with Server(held := Hold()) as server, pool() as made:
        asking = [asyncio.create_task(ask(made, server.url)) for _ in range(5)]
        await server.got(5)
        held.go_on.set()
        assert await asyncio.gather(*asking) == [OK] * 5
        assert idle(made) == 5
        server.handler = raising(Close())
        with pytest.raises(NoReply) as e:
            await ask(made, server.url)
        assert e.value.stale
        await until(lambda: numbers(made) == 0)


async def test_not_stale_once_a_reply_has_begun() -> None:
    def half(received: Received) -> Answer:
        if len(server.requests) == 1:
            return reply(b"body")
        raise Close(b"HTTP/1.1 200")

    async with Server(half) as server, pool() as made:
        await ask(made, server.url)
        with pytest.raises(NoReply) as e:
            await ask(made, server.url)
        assert not e.value.stale


async def test_a_connection_that_was_closed_meanwhile_is_not_used() -> None:
    async with Server(lambda _: reply(b"body")) as server, pool() as made:
        await ask(made, server.url)
        server.drop_all()
        await until(lambda: numbers(made) == 0)
        assert await ask(made, server.url) == OK
        assert server.connections == 2


async def test_unused_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEPALIVE", 0.05)
    async with Server(lambda _: reply(b"body")) as server, pool() as made:
        await ask(made, server.url)
        await until(lambda: server.open == 0)
        assert numbers(made) == 0
        assert await ask(made, server.url) == OK


async def test_one_that_is_too_old_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the event loop was busy, and has not closed it in time."""
    async with Server(lambda _: reply(b"body")) as server, pool() as made:
        await ask(made, server.url)
        monkeypatch.setattr(module, "KEEPALIVE", 0.0)
        await ask(made, server.url)
        assert server.connections == 2


# Timeouts


async def test_sock_connect() -> None:
    with full_listener() as url:
        async with pool(outgoing_http_timeout_sock_connect=0.2) as made:
            asking = [ask(made, url) for _ in range(150)]
            for error in await asyncio.gather(*asking, return_exceptions=True):
                assert isinstance(error, NotSent)
                assert "outgoing_http_timeout_sock_connect" in str(error)


@pytest.mark.parametrize("phase", ["connect", "total"])
async def test_the_other_limits_of_connecting(phase: str) -> None:
    with full_listener() as url:
        limit: Any = {"outgoing_http_timeout_" + phase: 0.2}
        async with pool(outgoing_http_timeout_sock_connect=None, **limit) as made:
            with pytest.raises(NotSent, match=f"outgoing_http_timeout_{phase}"):
                await ask(made, url)


@pytest.mark.parametrize("phase", ["connect", "total"])
async def test_waiting_for_a_connection(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 1)
    async with Server(held := Hold()) as server, pool() as made:
        first = asyncio.create_task(ask(made, server.url))
        await server.got(1)
        object.__setattr__(made.config, "outgoing_http_timeout_" + phase, 0.1)
        with pytest.raises(NotSent, match=f"no connection within outgoing_http_timeout_{phase}"):
            await ask(made, server.url)
        assert not first.done()
        held.go_on.set()
        assert await first == OK


async def test_sock_read_is_silence_not_duration() -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for byte in reply(b"body"):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.02)
        await reader.read()

    async with bare(slow) as url:
        async with pool(outgoing_http_timeout_sock_read=0.8) as made:
            assert await ask(made, url) == OK
        async with pool(outgoing_http_timeout_total=0.3) as made:
            with pytest.raises(NoReply, match=r"timed out \(.*outgoing_http_timeout_total"):
                await ask(made, url)


@pytest.mark.parametrize("phase", ["total", "sock_read"])
async def test_no_reply(phase: str) -> None:
    limit: Any = {"outgoing_http_timeout_" + phase: 0.1}
    async with Server(lambda _: None) as server, pool(**limit) as made:
        with pytest.raises(NoReply, match=rf"timed out \(.*outgoing_http_timeout_{phase}") as e:
            await ask(made, server.url)
        assert not e.value.stale
        await until(lambda: numbers(made) == 0)


async def test_a_timeout_on_a_kept_connection_is_not_stale() -> None:
    async with Server(lambda _: reply(b"body")) as server, pool() as made:
        await ask(made, server.url)
        server.handler = lambda _: None
        object.__setattr__(made.config, "outgoing_http_timeout_sock_read", 0.1)
        with pytest.raises(NoReply, match="timed out") as e:
            await ask(made, server.url)
        assert not e.value.stale


async def test_long_bodies_get_more_time() -> None:
    async with Server(held := Hold()) as server:
        async with pool(outgoing_http_timeout_total=0.2, outgoing_http_min_rate=1000) as made:
            long = asyncio.create_task(ask(made, server.url, b"x" * 100_000))
            with pytest.raises(NoReply, match="timed out"):
                await ask(made, server.url, b"x")
            assert not long.done()
            held.go_on.set()
            assert await long == OK


async def test_no_limit_at_all() -> None:
    limits: Any = {
        f"outgoing_http_timeout_{p}": None
        for p in ("total", "connect", "sock_read", "sock_connect")
    }
    async with Server(lambda _: reply(b"body")) as server, pool(**limits) as made:
        assert await ask(made, server.url) == OK


# Bounds


async def test_no_more_connections_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 4)
    async with Server(held := Hold()) as server, pool() as made:
        asking = [asyncio.create_task(ask(made, server.url)) for _ in range(50)]
        await server.got(4)
        assert numbers(made) == 4
        held.go_on.set()
        assert await asyncio.gather(*asking) == [OK] * 50
        assert server.most_open == server.connections == 4


async def test_first_come_first_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 1)
    async with Server(lambda _: reply(b"body")) as server, pool() as made:
        await asyncio.gather(*(ask(made, server.url, b"%d" % n) for n in range(20)))
        assert [r.body for r in server.requests] == [b"%d" % n for n in range(20)]


async def test_a_dead_broadcaster_fails_all_who_wait() -> None:
    url = f"http://127.0.0.1:{free_port()}/"
    async with pool() as made:
        errors = await asyncio.gather(*(ask(made, url) for _ in range(500)), return_exceptions=True)
    for error in errors:
        assert isinstance(error, NotSent)
        assert "cannot connect" in str(error)


async def test_a_broadcaster_that_closes_at_once_makes_no_busy_loop() -> None:
    accepted = 0

    async def slam(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        writer.transport.abort()

    async with bare(slam) as url, pool() as made:
        errors = await asyncio.gather(*(ask(made, url) for _ in range(20)), return_exceptions=True)
        assert all(isinstance(error, NoReply | NotSent) for error in errors)
        assert accepted <= 40


async def test_a_slow_broadcaster_delays_no_other() -> None:
    async with Server(lambda _: None) as hanging, Server(lambda _: reply(b"body")) as quick:
        async with pool() as made:
            slow = [asyncio.create_task(ask(made, hanging.url)) for _ in range(150)]
            for _ in range(150):
                assert await ask(made, quick.url) == OK
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)


@pytest.mark.parametrize("name", ["does-not-exist.invalid", "a" * 64 + ".example"])
async def test_names_that_lead_nowhere(name: str) -> None:
    async with pool() as made:
        with pytest.raises(NotSent, match="cannot connect"):
            await ask(made, f"http://{name}/")


async def resolve(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    async def getaddrinfo(*_: Any, **__: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


async def test_a_name_with_addresses_that_are_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    with full_listener() as full:
        hole = int(full.rpartition(":")[2].strip("/"))
        async with Server(lambda _: reply(b"body")) as server, pool() as made:
            dead = [("127.0.0.1", free_port()), ("127.0.0.1", hole)]
            await resolve(monkeypatch, *dead, ("127.0.0.1", server.port))
            assert await ask(made, "http://several.example/") == OK
            await resolve(monkeypatch, dead[0], dead[0])
            with pytest.raises(NotSent, match="cannot connect"):
                await ask(made, "http://none.example/")
            await resolve(monkeypatch)
            with pytest.raises(NotSent, match="no address"):
                await ask(made, "http://empty.example/")


async def test_only_one_of_several_addresses_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STAGGER", 0.0)
    async with Server(lambda _: reply(b"body")) as server, pool() as made:
        await resolve(monkeypatch, *[("127.0.0.1", server.port)] * 5)
        assert await ask(made, "http://several.example/") == OK
        await until(lambda: server.open == 1)


# Cancelling and closing


async def test_a_cancelled_request_ends_its_connection() -> None:
    async with Server(lambda _: None) as server, pool() as made:
        asking = asyncio.create_task(ask(made, server.url))
        await server.got(1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: numbers(made) == 0)
        await until(lambda: server.open == 0)


async def test_cancelling_at_any_moment_leaves_the_pool_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    async with Server(lambda _: reply(b"body")) as server, pool() as made:
        for turns in range(30):
            asking = [asyncio.create_task(ask(made, server.url)) for _ in range(4)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in asking[::2]:
                task.cancel()
            results = await asyncio.gather(*asking, return_exceptions=True)
            assert results[1::2] == [OK, OK]
            assert numbers(made) <= 2


async def test_cancelled_after_the_reply_came_the_connection_stays() -> None:
    """Its next request may be under way by then."""
    async with pool() as made:
        connection, transport = unconnected(made)
        asking = asyncio.create_task(connection.exchange(b"", b"", 0, float("inf")))
        await asyncio.sleep(0)
        connection.data_received(reply(b"body"))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert not transport.aborted
        assert idle(made) == 1
        connection.connection_lost(None)


async def test_a_body_that_is_being_read_is_closed_when_cancelled() -> None:
    begun, closed = asyncio.Event(), asyncio.Event()

    async def waits() -> Any:
        try:
            begun.set()
            yield b"x"
            await asyncio.Event().wait()
        finally:
            closed.set()

    async with Server(lambda _: None) as server, pool() as made:
        asking = asyncio.create_task(ask(made, server.url, waits(), 10))
        async with within():
            await begun.wait()
            asking.cancel()
            await closed.wait()


async def test_close_fails_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    async with Server(lambda _: None) as server, pool() as made:
        asking = [asyncio.create_task(ask(made, server.url)) for _ in range(5)]
        await server.got(2)
        async with within():
            await made.close()
        results = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(error) for error in results] == [NoReply] * 2 + [NotSent] * 3
        assert all("the client was left" in str(error) for error in results)
        with pytest.raises(NotSent, match="the client was left"):
            await ask(made, server.url)


async def test_close_at_any_moment() -> None:
    async with Server(lambda _: reply(b"body")) as server:
        for turns in range(12):
            async with pool() as made:
                asking = [asyncio.create_task(ask(made, server.url)) for _ in range(3)]
                for _ in range(turns):
                    await asyncio.sleep(0)
            for result in await asyncio.gather(*asking, return_exceptions=True):
                assert result == OK or isinstance(result, NoReply | NotSent)


async def test_nothing_leaks() -> None:
    """After a mix of good and bad endings, no connection, task or warning is left."""
    endings: list[Answer | Close] = [
        reply(b"x"), Close(b""), Close(reply(b"x")), Close(reset=True), Close(b"junk"),
    ]  # fmt: skip

    def mixed(_: Received) -> Answer:
        ending = endings[len(server.requests) % len(endings)]
        if isinstance(ending, Close):
            raise Close(ending.data, reset=ending.reset)
        return ending

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with Server(mixed) as server, pool() as made:
            asking = [ask(made, server.url) for _ in range(300)]
            results = await asyncio.gather(*asking, return_exceptions=True)
            assert {type(result) for result in results} <= {Reply, NoReply, NotSent}
            await until(lambda: numbers(made) == idle(made))
        gc.collect()


def test_on_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def mixed() -> None:
        await test_bodies_arrive_whole(3_000_000)
        await test_early_reply_of_a_peer_that_stops_reading(True)
        await test_a_kept_connection_that_the_broadcaster_closes_as_it_is_used()
        await test_no_reply("sock_read")
        await test_close_at_any_moment()
        await test_a_dead_broadcaster_fails_all_who_wait()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(mixed())


# TLS


@pytest.fixture
def authority() -> Any:
    return pytest.importorskip("trustme").CA()


def server_context(certificate: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    return context


def trusting(authority: Any) -> Callable[[], ssl.SSLContext]:
    def make() -> ssl.SSLContext:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        return context

    return make


async def test_tls(authority: Any) -> None:
    context = server_context(authority.issue_cert("localhost"))
    async with Server(lambda _: reply(b"body"), secure=context) as server:
        async with pool(tls=trusting(authority)) as made:
            for _ in range(3):
                assert await ask(made, server.url) == OK
            assert await ask(made, server.url, b"x" * 3_000_000) == OK
            assert server.connections == 1


@pytest.mark.parametrize("kind", ["unknown issuer", "wrong name", "expired", "plain"])
async def test_tls_that_is_not_to_be_trusted(authority: Any, kind: str) -> None:
    past = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)
    certificate = {
        "unknown issuer": lambda: type(authority)().issue_cert("localhost"),
        "wrong name": lambda: authority.issue_cert("example.org"),
        "expired": lambda: authority.issue_cert("localhost", not_after=past),
        "plain": lambda: None,
    }[kind]()
    context = server_context(certificate) if certificate else None
    async with Server(lambda _: reply(), secure=context) as server:
        async with pool(tls=trusting(authority), outgoing_http_timeout_sock_connect=0.5) as made:
            with pytest.raises(NotSent):
                await ask(made, server.url.replace("http://", "https://"))
            assert not server.requests


async def test_tls_handshake_that_stalls() -> None:
    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with bare(stall) as url, pool(outgoing_http_timeout_sock_connect=0.2) as made:
        with pytest.raises(NotSent, match="outgoing_http_timeout_sock_connect"):
            await ask(made, url.replace("http://", "https://"))


# Helpers


class Hold:
    """A handler that answers when it may."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def __call__(self, _: Received) -> bytes:
        await self.go_on.wait()
        return reply(b"body")


def raising(error: Exception) -> Any:
    def handler(_: Received) -> Answer:
        raise error

    return handler


class Transport(asyncio.Transport):
    """Takes everything."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = False

    def write(self, data: Any) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def get_write_buffer_size(self) -> int:
        return 0


def unconnected(made: Pool) -> tuple[Any, Transport]:
    """A connection without a socket."""
    origin = made.target("http://127.0.0.1/").origin
    connection = module._Connection(origin)
    origin.places.add(connection)
    transport = Transport()
    connection.connection_made(transport)
    return connection, transport


@contextlib.contextmanager
def full_listener() -> Any:
    """A url where nobody answers the attempt to connect."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        with contextlib.ExitStack() as fillers:
            for _ in range(3):
                filler = fillers.enter_context(socket.socket())
                filler.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    filler.connect(listener.getsockname())
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"


@contextlib.asynccontextmanager
async def bare(serve: Any) -> AsyncIterator[str]:
    """A server of one function over streams; yields its url."""
    tasks: set[asyncio.Task[Any]] = set()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await serve(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    server = await asyncio.start_server(run, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/notify"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
