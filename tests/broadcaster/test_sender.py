"""The sender against subscribers that do whatever a socket can do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import math
import socket
import ssl
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lonelypsp.spool import Body, Spool
from lonelypss.config import ConfigError
from lonelypss.metrics import Metrics
from lonelypss.outcomes import Outcome
from lonelypss.sender import (
    MAX_REPLY,
    Post,
    Reply,
    Resolve,
    Sender,
    Unattended,
)
from lonelypss.urlpolicy import Address, UrlDenied, UrlPreset, parse_target
from waiting import until

from .harness import (
    Answer,
    Close,
    Received,
    Subscriber,
    config,
    free_port,
    reply,
    within,
)


class Probe(Post):
    """A post that keeps its reply."""

    def __init__(self, url: str, body: Body | None = None, log: list[Any] | None = None) -> None:
        super().__init__(parse_target(url), body)
        self.heads = 0
        self.replies: list[Reply] = []
        self.done = asyncio.Event()
        self.log = log

    def head(self) -> bytes:
        self.heads += 1
        length = 0 if self.body is None else self.body.length
        return b"Content-Length: %d\r\nX-Attempt: %d\r\n\r\n" % (length, self.heads)

    def finish(self, reply: Reply) -> None:
        self.replies.append(reply)
        if self.log is not None:
            self.log.append(self)
        self.done.set()

    async def reply(self) -> Reply:
        async with within():
            await self.done.wait()
        assert len(self.replies) == 1
        return self.replies[0]


@contextlib.asynccontextmanager
async def sending(resolve: Resolve | None = None, **options: Any) -> AsyncIterator[Sender]:
    """An open sender; afterwards nothing of it is left."""
    sender = Sender(config(**options), resolve=resolve)
    sender.open()
    before = asyncio.all_tasks()
    try:
        yield sender
    finally:
        async with within():
            await sender.close()
        assert sender.connections == 0
        assert not sender.idle
        mine = [t for t in asyncio.all_tasks() - before if "sender" in repr(t.get_coro())]
        assert not mine


async def ask(sender: Sender, url: str, body: Body | None = None) -> Reply:
    probe = Probe(url, body)
    sender.post(probe)
    assert not probe.replies, "never before post returns"
    return await probe.reply()


# Replies that arrive


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
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
    async with Subscriber(lambda _: GOOD[name]) as subscriber, sending() as sender:
        for _ in range(3):
            assert await ask(sender, subscriber.url) == Reply(200, b"body")
        assert subscriber.connections == 1


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
        writer.close()

    async with bare(dribble) as url, sending() as sender:
        assert await ask(sender, url) == Reply(200, b"body")


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

    async with Subscriber(close) as subscriber, sending() as sender:
        for _ in range(2):
            assert await ask(sender, subscriber.url) == Reply(200, b"body")
        assert subscriber.connections == 2


@pytest.mark.parametrize("status", [204, 301, 302, 303, 304, 307, 308, 401, 404, 410, 500, 599])
async def test_statuses_are_passed_on_and_nothing_is_followed(status: int) -> None:
    async with Subscriber() as other, sending() as sender:
        data = reply(b"", status, f"Location: {other.url}", "Set-Cookie: a=b", "Retry-After: 7")
        async with Subscriber(lambda _: data) as subscriber:
            assert await ask(sender, subscriber.url) == Reply(status, b"", "", "7")
            await ask(sender, subscriber.url)
            assert "cookie" not in subscriber.requests[1].headers
        assert not other.requests


async def test_proxies_and_passwords_of_the_environment_are_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """T08"""
    (tmp_path / ".netrc").write_text("default login eve password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    async with Subscriber() as proxy, Subscriber(lambda _: reply()) as subscriber:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.base)
        async with sending() as sender:
            assert (await ask(sender, subscriber.url)).status == 200
        assert not proxy.connections
        assert "authorization" not in subscriber.requests[0].headers


# Replies that do not


BAD = {
    "X15 reset before headers": Close(reset=True),
    "X16 reset in the body": Close(reply(b"body")[:-2], reset=True),
    "X17 end before headers": Close(),
    "end in the headers": Close(b"HTTP/1.1 200 OK\r\nContent-"),
    "end in the body": Close(reply(b"body")[:-1]),
    "end in a chunk": Close(CHUNKED + b"4\r\nbo"),
    "end before the last chunk": Close(CHUNKED + b"4\r\nbody\r\n"),
    "X18 no HTTP": Close(b"SSH-2.0-OpenSSH_9.2\r\n" * 10),
    "X19 HTTP/0.9": Close(b"body"),
    "X20 only 103": Close(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100),
    "X21 101": Close(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nbody"
    ),
    "X31 gzip": Close(reply(b"\x1f\x8b\x08", 200, "Content-Encoding: gzip")),
    "X32 br": Close(reply(b"body", 200, "Content-Encoding: br")),
    "X32 zstd, to the end": Close(b"HTTP/1.1 200 OK\r\nContent-Encoding: zstd\r\n\r\nbody"),
    "X33 length 2^63": Close(b"HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775808\r\n\r\nbody"),
    "length 2^64": Close(b"HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551616\r\n\r\nbody"),
    "length -1": Close(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nbody"),
    "X34 two lengths": Close(
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nbody"
    ),
    "length and chunked": Close(
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"4\r\nbody\r\n0\r\n\r\n"
    ),
    "bad chunk size": Close(CHUNKED + b"zz\r\nbody\r\n0\r\n\r\n"),
    "X35 header of 1 MiB": Close(reply(b"body", 200, "X: " + "x" * 2**20)),
    "X36 10,000 headers": Close(reply(b"body", 200, *["Set-Cookie: a=bbbbbbbbbbbbbbb"] * 10_000)),
    "X11 1 MiB behind the reply": Close(reply(b"body") + b"x" * 2**20),
    "X12 too long": Close(reply(b"x" * (MAX_REPLY + 1))),
    "a second reply at once": Close(reply(b"body") * 2),
    "garbage at once": Close(reply(b"body") + b"\r\n\r\ngarbage"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_replies_fail(name: str) -> None:
    def close(_: Received) -> Answer:
        raise BAD[name]

    async with Subscriber(close) as subscriber, sending() as sender:
        got = await ask(sender, subscriber.url)
        assert (got.status, got.body, got.outcome) == (0, b"", Outcome.BROKEN)
        assert got.error
        # and the next one is a new start
        subscriber.handler = lambda _: reply(b"body")
        assert await ask(sender, subscriber.url) == Reply(200, b"body")


async def test_endless_reply_is_cut() -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        writer.close()

    async with bare(flood) as url, sending() as sender:
        assert "larger than" in (await ask(sender, url)).error


async def test_reply_that_nobody_asked_for_ends_the_connection() -> None:
    second = asyncio.Event()

    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply(b"first"))
            await second.wait()
            writer.write(reply(b"unasked"))
            await reader.read()
        writer.close()

    async with bare(twice) as url, sending() as sender:
        assert (await ask(sender, url)).body == b"first"
        second.set()
        await until(lambda: sender.connections == 0)


async def test_early_reply_of_a_peer_that_stops_reading() -> None:
    """It counts, and the connection is not kept, nor kept waiting for the rest to be read."""
    answered = asyncio.Event()
    leave = asyncio.Event()

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply(b"enough"))
        answered.set()
        await leave.wait()
        writer.close()

    body = Body.of(b"x" * 50_000_000)
    async with bare(early) as url, sending() as sender:
        assert await ask(sender, url, body) == Reply(200, b"enough")
        await until(lambda: sender.connections == 0)
        leave.set()


# Reused connections


async def test_stale_connection_one_resend_signed_afresh() -> None:
    """The subscriber closes exactly when the connection is used again."""

    def once(received: Received) -> Answer:
        if sum(r.connection == received.connection for r in subscriber.requests) == 1:
            return reply(b"body")
        raise Close

    async with Subscriber(once) as subscriber, sending() as sender:
        await ask(sender, subscriber.url)
        probe = Probe(subscriber.url)
        sender.post(probe)
        assert (await probe.reply()).body == b"body"
        assert probe.heads == 2
        assert [r.headers["x-attempt"] for r in subscriber.requests] == ["1", "1", "2"]
        assert subscriber.connections == 2


async def test_resend_happens_once() -> None:
    def first_only(received: Received) -> Answer:
        if len(subscriber.requests) == 1:
            return reply(b"body")
        raise Close

    async with Subscriber(first_only) as subscriber, sending() as sender:
        await ask(sender, subscriber.url)
        probe = Probe(subscriber.url)
        sender.post(probe)
        assert (await probe.reply()).error
        assert probe.heads == 2
        assert len(subscriber.requests) == 3


async def test_no_resend_once_a_reply_has_begun() -> None:
    def half(received: Received) -> Answer:
        if len(subscriber.requests) == 1:
            return reply(b"body")
        raise Close(b"HTTP/1.1 200")

    async with Subscriber(half) as subscriber, sending() as sender:
        await ask(sender, subscriber.url)
        assert (await ask(sender, subscriber.url)).error
        assert len(subscriber.requests) == 2


async def test_large_body_is_resent_from_its_beginning(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000

    def once(received: Received) -> Answer:
        if len(subscriber.requests) == 2:
            raise Close
        return reply(str(len(received.body)).encode())

    async with Subscriber(once) as subscriber, sending() as sender:
        with Spool(len(data), memory_limit=0, directory=str(tmp_path)) as spool:
            spool.write(data)
            import hashlib

            body = spool.finish(hashlib.sha512(data).digest())
        try:
            await ask(sender, subscriber.url)
            assert (await ask(sender, subscriber.url, body)).body == b"%d" % len(data)
            assert subscriber.requests[2].body == data
        finally:
            body.close()


@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 256 * 1024 + 1, 3_000_000])
async def test_bodies_arrive_whole(size: int) -> None:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    async with Subscriber(lambda _: reply()) as subscriber, sending() as sender:
        assert (await ask(sender, subscriber.url, Body.of(data))).status == 200
        assert subscriber.requests[0].body == data


@pytest.mark.parametrize("closed_before", [True, False])
async def test_body_that_is_closed_meanwhile_fails(tmp_path: Path, closed_before: bool) -> None:
    """A notify that is cancelled takes its body along."""
    reading = asyncio.Event()

    async def reads_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        reading.set()
        await go_on.wait()
        await reader.read()
        writer.close()

    go_on = asyncio.Event()
    body = Body.of(b"x" * 50_000_000)
    async with bare(reads_slowly) as url, sending() as sender:
        probe = Probe(url, body)
        if closed_before:
            body.close()
        sender.post(probe)
        await reading.wait()
        body.close()
        go_on.set()
        assert "cannot read the spooled message" in (await probe.reply()).error


async def test_spool_that_shrank_fails(tmp_path: Path) -> None:
    file = (tmp_path / "spool").open("w+b")
    file.write(b"short")
    file.flush()
    body = Body(None, file, 1_000_000, b"")
    async with Subscriber(lambda _: reply()) as subscriber, sending() as sender:
        assert "ends after 5 bytes" in (await ask(sender, subscriber.url, body)).error
    body.close()


# Timeouts


async def test_sock_connect() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        with contextlib.ExitStack() as fillers:
            for _ in range(3):  # no room left: the next one gets no answer to its SYN
                filler = fillers.enter_context(socket.socket())
                filler.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    filler.connect(listener.getsockname())
            async with sending(outgoing_http_timeout_sock_connect=0.2) as sender:
                probes = [Probe(url) for _ in range(50)]
                for probe in probes:
                    sender.post(probe)
                for probe in probes:  # all fail with the first attempt
                    assert "outgoing_http_timeout_sock_connect" in (await probe.reply()).error


async def test_sock_read_is_silence_not_duration() -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for byte in reply(b"body"):
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.02)
        await reader.read()
        writer.close()

    async with bare(slow) as url:
        async with sending(outgoing_http_timeout_sock_read=0.5) as sender:
            assert (await ask(sender, url)).body == b"body"
        # X13, X14: a drip hits the total timeout
        async with sending(outgoing_http_timeout_total=0.3) as sender:
            assert "outgoing_http_timeout_total" in (await ask(sender, url)).error


async def test_sock_read() -> None:
    async with Subscriber(lambda _: None) as subscriber:
        async with sending(outgoing_http_timeout_sock_read=0.2) as sender:
            got = await ask(sender, subscriber.url)
            assert "outgoing_http_timeout_sock_read" in got.error
            assert got.outcome is Outcome.SILENT
            assert len(subscriber.requests) == 1  # not sent again


@pytest.mark.parametrize("which", ["connect", "total"])
async def test_waiting_for_a_connection(which: str) -> None:
    option: dict[str, Any] = {f"outgoing_http_timeout_{which}": 0.3}
    async with Subscriber(lambda _: None) as subscriber:
        async with sending(
            outgoing_connections_per_host=1, outgoing_http_timeout_sock_read=None, **option
        ) as sender:
            first, second = Probe(subscriber.url), Probe(subscriber.url)
            sender.post(first)
            await subscriber.got(1)
            first.deadline = math.inf  # it holds the connection for as long as the other waits
            sender.post(second)
            got = (await second.reply()).error
            assert "no free connection" in got
            assert f"outgoing_http_timeout_{which}" in got


async def test_large_message_in_the_queue_hides_no_expired_small_one() -> None:
    async with Subscriber(lambda _: None) as subscriber:
        async with sending(
            outgoing_connections_per_host=1,
            outgoing_http_timeout_sock_read=None,
            outgoing_http_timeout_total=0.3,
            outgoing_http_min_rate=1000,
        ) as sender:
            holder = Probe(subscriber.url, Body.of(b"x" * 100_000))
            sender.post(holder)
            await subscriber.got(1)
            large, small = Probe(subscriber.url, Body.of(b"x" * 100_000)), Probe(subscriber.url)
            sender.post(large)
            sender.post(small)
            assert "outgoing_http_timeout_total" in (await small.reply()).error
            assert not large.replies


# Bounds


async def test_per_host_limit() -> None:
    go_on = asyncio.Event()

    async def wait(_: Received) -> bytes:
        await go_on.wait()
        return reply()

    async with Subscriber(wait) as subscriber:
        async with sending(outgoing_connections_per_host=4) as sender:
            probes = [Probe(subscriber.url) for _ in range(50)]
            for probe in probes:
                sender.post(probe)
            await subscriber.got(4)
            assert sender.connections == 4
            go_on.set()
            for probe in probes:
                assert (await probe.reply()).status == 200
            assert subscriber.most_open == 4
            assert subscriber.connections == 4


async def test_queue_overflow_fails_at_once() -> None:
    async with Subscriber(lambda _: None) as subscriber:
        async with sending(outgoing_connections_per_host=1, outgoing_queue_per_host=2) as sender:
            probes = [Probe(subscriber.url) for _ in range(3)]
            sender.post(probes[0])
            await subscriber.got(1)
            for probe in probes[1:]:
                sender.post(probe)
            late = Probe(subscriber.url)
            sender.post(late)
            assert not late.replies
            got = await late.reply()
            assert "outgoing_queue_per_host" in got.error
            assert got.outcome is Outcome.NOT_SENT
            assert not any(p.replies for p in probes)
        for probe in probes:
            assert "stopping" in (await probe.reply()).error


async def test_dead_host_fails_its_queue_at_once() -> None:
    url = f"http://127.0.0.1:{free_port()}/"
    async with sending() as sender:
        probes = [Probe(url) for _ in range(1000)]
        for probe in probes:
            sender.post(probe)
        assert sender.connections == 1
        for probe in probes:
            assert "cannot connect" in (await probe.reply()).error
            assert (await probe.reply()).outcome is Outcome.UNREACHABLE


async def test_host_that_closes_at_once_does_not_make_a_busy_loop() -> None:
    accepted = 0

    async def slam(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        writer.transport.abort()

    async with bare(slam) as url, sending() as sender:
        probes = [Probe(url) for _ in range(20)]
        for probe in probes:
            sender.post(probe)
        for probe in probes:
            assert (await probe.reply()).error
        assert accepted <= 40


async def test_slow_host_delays_no_other() -> None:
    log: list[Any] = []
    async with Subscriber(lambda _: None) as hanging, Subscriber(lambda _: reply()) as quick:
        async with sending(outgoing_http_timeout_sock_read=0.5) as sender:
            slow = [Probe(hanging.url, log=log) for _ in range(50)]
            fast = [Probe(quick.url, log=log) for _ in range(50)]
            for one, other in zip(slow, fast, strict=True):
                sender.post(one)
                sender.post(other)
            for probe in slow:
                await probe.reply()
            assert set(log[:50]) == set(fast)


async def test_global_limit_serves_everybody_in_the_end() -> None:
    async with contextlib.AsyncExitStack() as stack:
        subscribers = [
            await stack.enter_async_context(Subscriber(lambda _: reply())) for _ in range(10)
        ]
        sender = await stack.enter_async_context(sending(outgoing_connections=3))
        probes = [Probe(s.url) for _ in range(20) for s in subscribers]
        for probe in probes:
            sender.post(probe)
        for probe in probes:
            assert (await probe.reply()).status == 200
        assert sender.connections <= 3


async def test_deep_backlog_of_one_host_starves_no_other() -> None:
    log: list[Any] = []
    async with Subscriber(lambda _: reply()) as greedy, Subscriber(lambda _: reply()) as modest:
        async with sending(outgoing_connections=2) as sender:
            many = [Probe(greedy.url, log=log) for _ in range(2000)]
            for probe in many:
                sender.post(probe)
            await greedy.got(10)
            one = Probe(modest.url, log=log)
            sender.post(one)
            for probe in [one, *many]:
                assert (await probe.reply()).status == 200
            assert log.index(one) < 1000


async def test_place_passes_hosts_that_have_lost_interest() -> None:
    """The first in line has given up; the one behind it must be served."""
    go_on = asyncio.Event()

    async def wait(_: Received) -> bytes:
        await go_on.wait()
        return reply()

    async with (
        Subscriber(wait) as holder,
        Subscriber(lambda _: reply()) as first,
        Subscriber(lambda _: reply()) as second,
    ):
        async with sending(outgoing_connections=1, outgoing_http_min_rate=1000) as sender:
            held = Probe(holder.url)
            sender.post(held)
            await holder.got(1)
            gives_up, patient = Probe(first.url), Probe(second.url)
            sender.post(gives_up)
            gives_up.deadline = 0.0
            next(iter(sender.starved)).expires = 0.0
            next(iter(sender.starved)).waiting[0].expires = 0.0
            sender.post(patient)
            assert (await gives_up.reply()).error
            go_on.set()
            assert (await held.reply()).status == 200
            assert (await patient.reply()).status == 200


async def test_longest_idle_connection_makes_room() -> None:
    async with contextlib.AsyncExitStack() as stack:
        subscribers = [
            await stack.enter_async_context(Subscriber(lambda _: reply())) for _ in range(3)
        ]
        a, b, c = (s.url for s in subscribers)
        sender = await stack.enter_async_context(sending(outgoing_connections=2))
        for url in (a, b, a, c):  # b idles longest
            await ask(sender, url)
        await until(lambda: subscribers[1].open == 0)
        assert [s.open for s in subscribers] == [1, 0, 1]


# Hosts that fail, or have too much to do

QUICK_BREAKER: dict[str, Any] = {
    "outgoing_breaker_failures": 3,
    "outgoing_breaker_pause": 0.1,
    "outgoing_breaker_max_pause": 0.4,
}


class Counting(Metrics):
    def __init__(self) -> None:
        self.states: list[str] = []

    def breaker(self, state: str) -> None:
        self.states.append(str(state))


class Attended(Probe):
    """Somebody waits for it."""

    def unattended(self) -> Post | None:
        return Unattended(self)


async def test_host_that_cannot_be_reached_is_left_alone_until_it_can() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    async with sending(**QUICK_BREAKER) as sender:
        counting = sender.metrics = Counting()
        got = [(await ask(sender, url)).outcome for _ in range(4)]
        assert got == [Outcome.UNREACHABLE] * 3 + [Outcome.SKIPPED]
        assert counting.states[0] == "open"
        # tried in the background, in vain
        await until(lambda: counting.states.count("half_open") >= 3)
        assert sender.breakers()["closed"] == 0
        server = await asyncio.start_server(answer_body, "127.0.0.1", port)
        try:
            await until(lambda: counting.states[-1] == "closed")
            assert await ask(sender, url) == Reply(200, b"body"), "with the very first post"
            assert not sender._breakers
            assert sender.breakers() == {"closed": 1, "open": 0, "half_open": 0}
        finally:
            server.close()
            await sender.close()
            await server.wait_closed()
            sender.open()


async def answer_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply(b"body"))
    writer.close()


async def test_host_that_is_silent_has_to_answer_one_that_nobody_waits_for() -> None:
    silent = True
    async with Subscriber(lambda _: None if silent else reply(b"body")) as subscriber:
        async with sending(outgoing_http_timeout_sock_read=0.2, **QUICK_BREAKER) as sender:
            counting = sender.metrics = Counting()
            probes = [Attended(subscriber.url) for _ in range(5)]
            for probe in probes:
                sender.post(probe)
            for probe in probes:
                assert (await probe.reply()).outcome in (Outcome.SILENT, Outcome.SKIPPED)
            assert counting.states[0] == "open"
            await until(lambda: sender.breakers()["half_open"] and sender.idle)
            seen = len(subscriber.requests)
            probes = [Attended(subscriber.url) for _ in range(5)]
            for probe in probes:
                sender.post(probe)
            for probe in probes:
                assert (await probe.reply()).outcome is Outcome.SKIPPED
            await until(lambda: counting.states.count("open") >= 2)  # silent as before
            assert len(subscriber.requests) == seen + 1, "one of them was sent"
            silent = False
            await until(lambda: sender.breakers()["half_open"] and sender.idle)
            assert (await ask(sender, subscriber.url)).body == b"body", "nobody waits for this"
            assert counting.states[-1] == "closed"


async def test_half_open_host_that_closes_its_connection_is_tried_again() -> None:
    silent = True
    async with Subscriber(lambda _: None if silent else reply(b"body")) as subscriber:
        async with sending(outgoing_http_timeout_sock_read=0.2, **QUICK_BREAKER) as sender:
            while sender.breakers()["open"] == 0:
                await ask(sender, subscriber.url)
            silent = False
            await until(lambda: sender.breakers()["half_open"] and sender.idle)
            subscriber.drop_all()
            await until(lambda: not sender.idle)
            attended = Attended(subscriber.url)
            sender.post(attended)
            assert (await attended.reply()).outcome is Outcome.SKIPPED
            await until(lambda: sender.idle)
            assert (await ask(sender, subscriber.url)).body == b"body"


async def test_errors_are_answers() -> None:
    async with Subscriber(lambda _: reply(b"", 500)) as subscriber:
        async with sending(**QUICK_BREAKER) as sender:
            for _ in range(20):
                assert (await ask(sender, subscriber.url)).status == 500
            assert sender.breakers()["closed"] == 1
            assert len(subscriber.requests) == 20


async def test_restart_of_a_host_is_one_failure() -> None:
    """All that is under way breaks at once; what comes next is tried."""
    async with Subscriber(lambda _: None) as subscriber, sending(**QUICK_BREAKER) as sender:
        probes = [Probe(subscriber.url) for _ in range(20)]
        for probe in probes:
            sender.post(probe)
        await subscriber.got(20)
        subscriber.drop_all()
        for probe in probes:
            assert (await probe.reply()).outcome is Outcome.BROKEN
        subscriber.handler = lambda _: reply(b"body")
        assert (await ask(sender, subscriber.url)).body == b"body"
        assert not sender._breakers


async def test_opening_fails_what_waits() -> None:
    async with Subscriber(lambda _: None) as subscriber:
        async with sending(
            outgoing_http_timeout_sock_read=0.2, outgoing_connections_per_host=4, **QUICK_BREAKER
        ) as sender:
            probes = [Probe(subscriber.url) for _ in range(50)]
            for probe in probes:
                sender.post(probe)
            got = [(await probe.reply()).outcome for probe in probes]
            assert got.count(Outcome.SKIPPED) >= 46
            assert len(subscriber.requests) <= 4


async def test_without_a_breaker() -> None:
    url = f"http://127.0.0.1:{free_port()}/"
    async with sending(outgoing_breaker_failures=0) as sender:
        for _ in range(30):
            assert (await ask(sender, url)).outcome is Outcome.UNREACHABLE


async def test_host_that_nobody_wants_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lonelypss.sender.UNWANTED", 0.3)
    url = f"http://127.0.0.1:{free_port()}/"
    async with sending(**QUICK_BREAKER) as sender:
        counting = sender.metrics = Counting()
        while not sender.breakers()["open"]:
            await ask(sender, url)
        await until(lambda: not sender._breakers)
        assert counting.states.count("half_open") < 10
        await until(lambda: sender._timer is None)
        assert (await ask(sender, url)).outcome is Outcome.UNREACHABLE


async def test_breakers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lonelypss.sender.MAX_BREAKERS", 3)
    port = free_port()
    async with sending(**QUICK_BREAKER) as sender:
        for n in range(10):
            await ask(sender, f"http://127.0.1.{n}:{port}/")
        assert len(sender._breakers) == 3


class Crowd:
    """Counts how many requests a subscriber has in its hands at one time."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.now = self.most = 0
        self.gate = asyncio.Event()

    async def __call__(self, _: Received) -> bytes:
        self.now += 1
        self.most = max(self.most, self.now)
        await self.gate.wait()
        self.now -= 1
        return self.answer

    async def round(self, sender: Sender, url: str, number: int) -> int:
        """Sends so many at once; how many were in its hands at one time, at most."""
        self.most = 0
        self.gate.clear()
        probes = [Probe(url) for _ in range(number)]
        for probe in probes:
            sender.post(probe)
        host = sender._hosts[probes[0].target.origin]
        await until(lambda: self.now == min(number, int(host.limit)))
        self.gate.set()
        for probe in probes:
            await probe.reply()
        return self.most


@pytest.mark.parametrize("status", [429, 503])
async def test_busy_host_gets_fewer_connections_and_slowly_more(status: int) -> None:
    crowd = Crowd(reply(b"", status))
    async with Subscriber(crowd) as subscriber:
        async with sending(outgoing_connections_per_host=16) as sender:
            assert await crowd.round(sender, subscriber.url, 16) == 16
            assert await crowd.round(sender, subscriber.url, 8) == 8
            assert await crowd.round(sender, subscriber.url, 4) == 4
            assert await crowd.round(sender, subscriber.url, 2) == 2
            await until(lambda: subscriber.open <= 2)
            crowd.answer = reply(b"")
            got = [await crowd.round(sender, subscriber.url, 64) for _ in range(12)]
            assert got[0] < 16
            assert got == sorted(got)
            assert got[-1] == 16


async def test_silence_is_a_sign_of_too_much() -> None:
    crowd = Crowd(reply(b""))
    async with Subscriber(crowd) as subscriber:
        async with sending(
            outgoing_connections_per_host=8,
            outgoing_breaker_failures=0,
            outgoing_http_timeout_sock_read=0.3,
        ) as sender:
            probes = [Probe(subscriber.url) for _ in range(8)]
            for probe in probes:
                sender.post(probe)
            for probe in probes:
                assert (await probe.reply()).outcome is Outcome.SILENT
            assert sender._hosts[probes[0].target.origin].limit == 4


async def test_limit_of_connections_is_at_least_one() -> None:
    async with Subscriber(lambda _: reply(b"", 503)) as subscriber, sending() as sender:
        for _ in range(10):
            assert (await ask(sender, subscriber.url)).status == 503


# Where connections go


class Names:
    """Gives the next of its answers whenever a name is looked up, the last one for ever."""

    def __init__(self, *answers: list[str] | OSError) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def __call__(self, name: str) -> list[Address]:
        answer = self.answers[min(len(self.asked), len(self.answers) - 1)]
        self.asked.append(name)
        if isinstance(answer, OSError):
            raise answer
        return [ipaddress.ip_address(text) for text in answer]


def named(subscriber: Subscriber, name: str = "subscriber.example") -> str:
    return f"http://{name}:{subscriber.port}/v1/receive"


class Canary:
    """Listens at another address, on the port of a subscriber, and must see no connection."""

    def __init__(self, port: int, address: str = "127.9.9.9") -> None:
        self.where = address, port
        self.connections = 0

    async def __aenter__(self) -> Canary:
        def sing() -> asyncio.Protocol:
            self.connections += 1
            return asyncio.Protocol()

        self._server = await asyncio.get_running_loop().create_server(sing, *self.where)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()
        assert self.connections == 0


NO_CANARY = {"url_deny": "127.9.0.0/16"}


async def test_rebinding() -> None:
    """T04: 1,000 deliveries while the name server changes its mind each time."""
    names = Names(*[["127.0.0.1"], ["127.9.9.9"], ["127.9.9.9", "127.0.0.1"]] * 334)

    def close(_: Received) -> Answer:
        raise Close(reply(b"body", 200, "Connection: close"))

    async with Subscriber(close) as subscriber, Canary(subscriber.port):
        async with sending(names, **NO_CANARY) as sender:
            got = [await ask(sender, named(subscriber)) for _ in range(1000)]
        assert len(names.asked) == 1000, "one answer is both judged and connected to"
        for n, one in enumerate(got):
            if n % 3 == 1:
                assert one.error == (
                    "url refused: url-policy: 127.9.9.9 is in url_deny (127.9.0.0/16)"
                )
            else:
                assert one == Reply(200, b"body")
        assert {r.headers["host"] for r in subscriber.requests} == {
            f"subscriber.example:{subscriber.port}"
        }


@pytest.mark.parametrize("host", ["[::ffff:127.9.9.9]", "[::ffff:7f09:909]", "127.9.9.9"])
async def test_no_connection_to_what_is_denied(host: str) -> None:
    async with Subscriber() as subscriber, Canary(subscriber.port):
        async with sending(**NO_CANARY) as sender:
            with pytest.raises(UrlDenied):
                sender.policy.target(f"http://{host}:{subscriber.port}/")


async def test_unreachable_address_is_followed_by_the_next() -> None:
    async with Subscriber(lambda _: reply(b"body")) as subscriber:
        names = Names(["127.8.8.8", "127.0.0.1"])
        async with sending(names) as sender:
            assert (await ask(sender, named(subscriber))).body == b"body"


async def test_address_that_does_not_answer_leaves_time_for_the_next() -> None:
    async with Subscriber(lambda _: reply(b"body")) as subscriber:
        with socket.socket() as listener, contextlib.ExitStack() as fillers:
            listener.bind(("127.8.8.8", subscriber.port))
            listener.listen(0)
            for _ in range(3):
                filler = fillers.enter_context(socket.socket())
                filler.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    filler.connect(listener.getsockname())
            async with sending(
                Names(["127.8.8.8", "127.0.0.1"]), outgoing_http_timeout_sock_connect=2.0
            ) as sender:
                assert (await ask(sender, named(subscriber))).body == b"body"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (OSError("Name or service not known"), "cannot connect: Name or service not known"),
        ([], "subscriber.example has no address"),
        (["127.8.8.8"] * 1000, "cannot connect: "),
    ],
)
async def test_name_that_leads_nowhere(answer: Any, error: str) -> None:
    """X38"""
    async with Subscriber() as subscriber, sending(Names(answer)) as sender:
        async with within(5):
            assert error in (await ask(sender, named(subscriber))).error
        assert not subscriber.connections


async def test_name_server_that_is_silent_delays_no_other() -> None:
    """F16"""

    async def silent(name: str) -> list[Address]:
        if name == "silent.example":
            await asyncio.Event().wait()
        return [ipaddress.ip_address("127.0.0.1")]

    async with Subscriber(lambda _: reply(b"body")) as subscriber:
        async with sending(silent, outgoing_http_timeout_sock_connect=1.0) as sender:
            waiting = Probe(named(subscriber, "silent.example"))
            sender.post(waiting)
            assert (await ask(sender, named(subscriber))).body == b"body"
            assert not waiting.replies
            assert "outgoing_http_timeout_sock_connect" in (await waiting.reply()).error


async def test_peers_and_others_share_no_connection() -> None:
    """A connection that the policy allows to another broadcaster is of no use to others."""
    async with Subscriber(lambda _: reply(b"body")) as subscriber:
        async with sending(Names(["127.0.0.1"]), url_policy=UrlPreset.PUBLIC) as sender:
            base = f"http://peer.example:{subscriber.port}"
            got = await ask(sender, base + "/v1/receive_for_websockets")
            assert got.body == b"body"
            assert "url_policy=public" in (await ask(sender, base + "/v1/receive")).error
        assert len(subscriber.requests) == 1


# Failing authenticators


async def test_post_that_cannot_be_signed_fails_alone() -> None:
    class Unsigned(Probe):
        def head(self) -> bytes:
            raise RuntimeError("no key")

    async with Subscriber(lambda _: reply()) as subscriber:
        async with sending(outgoing_connections_per_host=1) as sender:
            probes = [Probe(subscriber.url), Unsigned(subscriber.url), Probe(subscriber.url)]
            for probe in probes:
                sender.post(probe)
            replies = [await probe.reply() for probe in probes]
            assert [r.status for r in replies] == [200, 0, 200]
            assert "no key" in replies[1].error


# Life and death


async def test_close_fails_what_is_under_way_and_open_begins_again() -> None:
    async with Subscriber(lambda _: None) as hanging:
        sender = Sender(config(outgoing_connections_per_host=2))
        for _ in range(2):
            sender.open()
            probes = [Probe(hanging.url) for _ in range(5)]
            for probe in probes:
                sender.post(probe)
            await until(lambda: hanging.open == 2)
            async with within():
                await sender.close()
            for probe in probes:
                assert "stopping" in (await probe.reply()).error
            assert sender.connections == 0
            await until(lambda: hanging.open == 0)
        late = Probe(hanging.url)
        sender.post(late)
        assert "stopping" in (await late.reply()).error


async def test_timeouts_work_after_open_again() -> None:
    async with Subscriber(lambda _: None) as hanging:
        sender = Sender(config(outgoing_http_timeout_sock_read=0.2))
        for _ in range(2):
            sender.open()
            assert "sock_read" in (await ask(sender, hanging.url)).error
            await sender.close()


async def test_close_during_connect_and_before_it_began() -> None:
    async with Subscriber(lambda _: reply()) as subscriber:
        for turns in range(6):
            async with sending() as sender:
                probe = Probe(subscriber.url)
                sender.post(probe)
                for _ in range(turns):
                    await asyncio.sleep(0)
            assert len(probe.replies) == 1


async def test_nothing_leaks() -> None:
    """After a mix of good and bad endings, no connection, task or warning is left."""
    endings: list[Answer | Close] = [
        reply(b"x"), Close(b""), Close(reply(b"x")), Close(reset=True), Close(b"junk"),
    ]  # fmt: skip

    def mixed(_: Received) -> Answer:
        ending = endings[len(subscriber.requests) % len(endings)]
        if isinstance(ending, Close):
            raise Close(ending.data, reset=ending.reset)
        return ending

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with Subscriber(mixed) as subscriber:
            async with sending(outgoing_connections=5, outgoing_connections_per_host=3) as sender:
                probes = [Probe(subscriber.url) for _ in range(300)]
                for probe in probes:
                    sender.post(probe)
                for probe in probes:
                    await probe.reply()
                await until(lambda: sender.connections == len(sender.idle))
                assert sender.connections <= 3
        gc.collect()


# TLS


@pytest.fixture
def authority() -> Any:
    return pytest.importorskip("trustme").CA()


def server_context(certificate: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    return context


async def test_tls(authority: Any) -> None:
    context = server_context(authority.issue_cert("localhost"))
    async with Subscriber(lambda _: reply(b"body"), secure=context) as subscriber:
        async with sending() as sender:
            authority.configure_trust(sender.ssl)
            for _ in range(3):
                assert await ask(sender, subscriber.url) == Reply(200, b"body")
            assert (await ask(sender, subscriber.url, Body.of(b"x" * 3_000_000))).status == 200
            assert subscriber.connections == 1


UNTRUSTED = {
    "unknown issuer": "outgoing_ca_file can name its authority",
    "self-signed": "outgoing_ca_file can name its authority",
    "wrong name": "Hostname mismatch",
    "wrong address": "IP address mismatch",
    "expired": "certificate has expired",
    "TLS 1.1": "older than TLS 1.2",
}


@pytest.mark.parametrize("kind", UNTRUSTED)
async def test_tls_that_is_not_to_be_trusted(authority: Any, kind: str, tmp_path: Path) -> None:
    """F17, X37: nothing is sent, and the reason names what can be done."""
    import datetime

    past = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)
    make: dict[str, Any] = {
        "unknown issuer": lambda: type(authority)().issue_cert("localhost"),
        "wrong name": lambda: authority.issue_cert("example.org"),
        "expired": lambda: authority.issue_cert("localhost", not_after=past),
    }
    context = server_context(make.get(kind, lambda: authority.issue_cert("localhost"))())
    if kind == "self-signed":
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        lonely = type(authority)()
        lonely.cert_pem.write_to_path(tmp_path / "lonely.pem")
        lonely.private_key_pem.write_to_path(tmp_path / "lonely.pem", append=True)
        context.load_cert_chain(tmp_path / "lonely.pem")
    if kind == "TLS 1.1":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with Subscriber(lambda _: reply(), secure=context) as subscriber:
        async with sending(outgoing_ca_file=str(tmp_path / "ca.pem")) as sender:
            url = subscriber.url
            if kind == "wrong address":
                url = url.replace("localhost", "127.0.0.1")
            error = (await ask(sender, url)).error
            assert error.startswith("cannot connect: ")
            assert UNTRUSTED[kind] in error
            assert not subscriber.requests


@pytest.mark.parametrize("minimum", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_with_a_client_certificate(
    authority: Any, tmp_path: Path, minimum: ssl.TLSVersion
) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    mine = authority.issue_cert("broadcaster.example")
    mine.private_key_pem.write_to_path(tmp_path / "key.pem")
    for part in mine.cert_chain_pems:
        part.write_to_path(tmp_path / "cert.pem", append=True)
    context = server_context(authority.issue_cert("localhost"))
    context.minimum_version = context.maximum_version = minimum
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    options = {"outgoing_ca_file": str(tmp_path / "ca.pem")}
    async with Subscriber(lambda _: reply(b"body"), secure=context) as subscriber:
        async with sending(**options) as sender:
            assert "outgoing_client_cert" in (await ask(sender, subscriber.url)).error
            assert not subscriber.requests
        options["outgoing_client_cert"] = str(tmp_path / "cert.pem")
        options["outgoing_client_key"] = str(tmp_path / "key.pem")
        async with sending(**options) as sender:
            assert await ask(sender, subscriber.url) == Reply(200, b"body")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"outgoing_ca_file": "none.pem"}, "outgoing_ca_file: none.pem"),
        ({"outgoing_client_cert": "none.pem"}, "outgoing_client_cert: none.pem"),
        ({"outgoing_client_key": "none.pem"}, "outgoing_client_key needs outgoing_client_cert"),
        ({"outgoing_ca_file": __file__}, "outgoing_ca_file: .*test_sender"),
    ],
)
def test_certificates_that_cannot_be_used(options: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Sender(config(**options))


async def test_https_on_a_port_of_http() -> None:
    async def no_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read(1))
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()

    got: list[bytes] = []
    async with bare(no_tls) as url, sending() as sender:
        error = (await ask(sender, url.replace("http://", "https://"))).error
        assert "does the subscriber speak https on this port?" in error
    assert got == [b"\x16"], "nothing but a handshake"


async def test_tls_handshake_that_stalls() -> None:
    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with bare(stall) as url, sending(outgoing_http_timeout_sock_connect=0.2) as sender:
        got = await ask(sender, url.replace("http://", "https://"))
        assert "outgoing_http_timeout_sock_connect" in got.error


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
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/receive"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
