"""Bad framing, slow clients and too many of them, over real sockets, at both kinds of listener."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from conversation import PATIENCE, Conversation
from heads import HEADS, Head, Target
from lonelypsc.listener import Listener, answer
from lonelypsp.guard import HttpLimits
from programs import broadcaster

CHECK = Target(b"/v1/check_subscriptions", b"\0\0\0\x09http://h/")
RECOVER = Target(b"/v1/recover", b"\0\0\0\1t")


# Framing


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """`lonelypss serve`; its log must show no bug in the end."""
    with broadcaster(tmp_path_factory.mktemp("serve"), "--db=sqlite://") as (program, url):
        yield int(url.rpartition(":")[2])
        assert program.stop() == 0
        assert not [line for line in program.rest() if "Traceback" in line or "ERROR" in line]


async def ok(scope: Any, receive: Any, send: Any) -> None:
    while (event := await receive()).get("more_body"):
        pass
    if event["type"] == "http.request":
        await answer(send, 404 if scope["path"] == "/x" else 200, b"ok")


@asynccontextmanager
async def listening(app: Any = ok, **limits: Any) -> AsyncIterator[int]:
    listener = Listener("127.0.0.1", 0, app, limits=HttpLimits(**limits))
    await listener.start()
    try:
        yield listener.port
    finally:
        await listener.stop()


async def check(port: int, target: Target, head: Head, step: int | None) -> None:
    async with Conversation(port) as conversation:
        await conversation.send(head.make(target), step)
        number = None if head.closes else len(head.statuses)
        statuses, got, closed = await conversation.receive(number)
        assert (tuple(statuses), closed) == (head.statuses, head.closes), got[:300]
        if not head.closes:  # and it is still of use
            await conversation.send(target.request(b"Connection: close"))
            assert (await conversation.receive())[0] == [200]


def steps(data: bytes) -> list[int | None]:
    """In one piece, and byte by byte or, what is long, in small pieces."""
    return [None, 1 if len(data) < 1000 else 997]


@pytest.mark.parametrize("name", HEADS)
async def test_framing(name: str, serving: int) -> None:
    head = HEADS[name]
    for step in steps(head.make(CHECK)):
        await check(serving, CHECK, head, step)
    async with listening() as port:
        for step in steps(head.make(RECOVER)):
            await check(port, RECOVER, head, step)


async def test_a_trailer_is_no_header() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await ok(scope, receive, send)
        seen.extend(scope["headers"])

    async with listening(app) as port, Conversation(port) as conversation:
        await conversation.send(RECOVER.chunked(trailer=b"Authorization: Bearer x\r\n"))
        assert (await conversation.receive(1))[0] == [200]
    assert b"transfer-encoding" in dict(seen)
    assert b"authorization" not in dict(seen)


async def test_the_end_of_a_body_that_is_not_there() -> None:
    """H28"""
    done = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await ok(scope, receive, send)
        done.set()

    async with listening(app) as port, Conversation(port) as conversation:
        await conversation.send(RECOVER.request()[:-1])
        conversation.socket.shutdown(socket.SHUT_WR)
        assert (await conversation.receive())[0] == []
        await asyncio.wait_for(done.wait(), PATIENCE)


async def test_an_answer_before_the_body_is_read_to_the_end() -> None:
    """The connection can be used again, if the rest is short; else it is closed, not reset."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, 413, b"too long")

    async with listening(app) as port:
        async with Conversation(port) as conversation:
            for _ in range(3):
                await conversation.send(RECOVER.request(body=bytes(300_000)))
                assert (await conversation.receive(1))[0] == [413]
        async with Conversation(port) as conversation:
            await conversation.send(RECOVER.request(length=b"Content-Length: 9" + b"0" * 10))
            assert (await conversation.receive(1))[0] == [413]
            await conversation.send(bytes(3_000_000))
            assert (await conversation.receive())[1:] == (b"", True)
        async with Conversation(port) as conversation:  # who asks first may not send it at all
            await conversation.send(RECOVER.request(b"Expect: 100-continue")[:-5])
            statuses, _, closed = await conversation.receive()
            assert (statuses, closed) == ([413], True)


async def test_an_upgrade_does_not_overtake(serving: int) -> None:
    upgrade = (
        b"GET /v1/websocket HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    async with Conversation(serving) as conversation:
        await conversation.send(CHECK.request() + upgrade)
        assert (await conversation.receive())[0] == [200, 400]


# Slowness


def is_short(seconds: float) -> bool:
    """Of what takes a tick or two, on a machine that is busy."""
    return seconds < PATIENCE / 2


@pytest.mark.parametrize(
    ("sent", "then", "statuses"),
    [
        (b"", b"", []),
        (b"POST /", b"x", [408]),
        (RECOVER.request() + b"POST /", b"x", [200, 408]),
        (RECOVER.request() + b"\r\n", b"\r\n", [200]),
        (RECOVER.request(length=b"Content-Length: 9999"), b"x", [408]),
        (RECOVER.request(length=b"Content-Length: 9999")[:-1], b"", [408]),
        (RECOVER.request(CHUNKED := b"Transfer-Encoding: chunked", length=None, body=b"1;"), b"x",
         [408]),
        (RECOVER.request(), b"", [200]),
    ],
    ids=["nothing", "head", "second head", "empty lines", "body", "no body", "chunk", "idle"],
)  # fmt: skip
async def test_slow_requests_are_ended(sent: bytes, then: bytes, statuses: list[int]) -> None:
    """H29, H30"""
    limits = {"head_timeout": 0.3, "idle_timeout": 0.3, "rate_window": 0.3}
    async with listening(**limits) as port, Conversation(port) as conversation:
        started = time.monotonic()
        await conversation.send(sent)

        async def drip() -> None:
            while then:
                await conversation.send(then)
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        found, _, closed = await conversation.receive()
        dripping.cancel()
        await asyncio.wait((dripping,))
        assert (found, closed) == (statuses, True)
        assert is_short(time.monotonic() - started)


async def test_steady_bodies_may_take_long_and_so_may_the_program() -> None:
    release = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await ok(scope, receive, send) if scope["path"] == "/now" else await late(send)

    async def late(send: Any) -> None:
        await release.wait()
        await answer(send, 200, b"")

    limits = {"rate_window": 0.2, "min_rate": 50, "idle_timeout": 0.2, "head_timeout": 0.2}
    async with listening(app, **limits) as port:
        body = bytes(200)
        async with Conversation(port) as steady, Conversation(port) as patient:
            await patient.send(Target(b"/late", b"x").request())
            request = Target(b"/now", body).request()
            await steady.send(request[: -len(body)])
            for _ in range(20):  # a second; ten times the rate
                await steady.send(bytes(10))
                await asyncio.sleep(0.02)
            assert (await steady.receive(1))[0] == [200]
            release.set()
            assert (await patient.receive(1))[0] == [200]


async def much(scope: Any, receive: Any, send: Any) -> None:
    await answer(send, 200, bytes(1_000_000))


GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


async def test_who_does_not_read_is_disconnected(caplog: pytest.LogCaptureFixture) -> None:
    """Its window is closed, with answers that wait for it."""
    caplog.set_level("INFO", "lonelypsp.guard")
    async with listening(much, rate_window=0.3) as port:
        async with Conversation(port, receive_buffer=4096) as deaf:
            await deaf.send(GET * 20)
            async with asyncio.timeout(PATIENCE):
                while "1 did not read their answers" not in caplog.text:
                    await asyncio.sleep(0.02)
            _, got, closed = await deaf.receive()
            assert closed
            assert len(got) < 20_000_000


async def test_who_reads_slowly_is_not() -> None:
    async with listening(much, rate_window=3.0) as port:
        async with Conversation(port) as slow:
            await slow.send(GET * 19 + GET[:-2] + b"Connection: close\r\n\r\n")
            loop, taken, started = asyncio.get_running_loop(), 0, time.monotonic()
            while data := await loop.sock_recv(slow.socket, 131_072):
                taken += len(data)
                late = time.monotonic() - started < taken / 5_000_000  # 4 s for all
                await asyncio.sleep(0.02 if late else 0)
            assert taken > 20_000_000


# Numbers


async def test_the_longest_waiting_makes_room() -> None:
    async with listening(max_connections=3) as port:
        async with AsyncExitStack() as stack:
            waiting = [await stack.enter_async_context(Conversation(port)) for _ in range(3)]
            for conversation in waiting:
                await conversation.send(RECOVER.request())
                assert (await conversation.receive(1))[0] == [200]
            async with Conversation(port) as four:
                await four.send(RECOVER.request())
                assert (await four.receive(1))[0] == [200]
                closed = [asyncio.create_task(c.receive()) for c in waiting]
                await asyncio.wait(closed, return_when=asyncio.FIRST_COMPLETED)
                assert sum(task.done() for task in closed) == 1
                for task in closed:
                    task.cancel()
                await asyncio.wait(closed)


async def test_busy_ones_do_not_make_room() -> None:
    release = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await release.wait()
        await answer(send, 200, b"")

    async with listening(app, max_connections=2) as port:
        async with Conversation(port) as one, Conversation(port) as two:
            for conversation in (one, two):
                await conversation.send(RECOVER.request())
            for _ in range(5):
                async with Conversation(port) as three:
                    statuses, got, closed = await three.receive()
                    assert (statuses, closed) == ([503], True)
                    assert b"retry-after: 1\r\n" in got
            release.set()
            for conversation in (one, two):
                assert (await conversation.receive(1))[0] == [200]
        async with Conversation(port) as three:
            await three.send(RECOVER.request())
            assert (await three.receive(1))[0] == [200]


@pytest.mark.parametrize("field", HttpLimits.__slots__)
def test_limits_that_cannot_be(field: str) -> None:
    for value in (0, -1, float("inf"), float("nan"), None, "1"):
        with pytest.raises(ValueError, match=field):
            HttpLimits(**{field: value})


# All of it at once


async def test_drips_do_not_touch_others(tmp_path: Path) -> None:
    """Hundreds drip heads and bodies or say nothing; who behaves does not notice.
    LONELYPS_DRIP=1000 makes it a thousand, with the default limits."""
    number = int(os.environ.get("LONELYPS_DRIP", "300"))
    short = ("timeout-head", "timeout-idle", "rate-window")
    options = [] if "LONELYPS_DRIP" in os.environ else [f"--incoming-http-{x}=2" for x in short]
    with broadcaster(tmp_path, "--db=sqlite://", *options) as (_, url):
        port = int(url.rpartition(":")[2])
        before = await latencies(port, lambda taken: len(taken) >= 100)
        starts = {
            "head": (b"POST /v1/notify HTTP/1.1\r\nHost: h\r\nX: ", b"x"),
            "body": (CHECK.request(length=b"Content-Length: 99999"), b"x"),
            "idle": (CHECK.request(), b""),
        }
        kinds = list(starts) * (number // len(starts))
        lasted: list[tuple[str, float]] = []

        async def drip(kind: str) -> None:
            start, more = starts[kind]
            async with Conversation(port) as conversation:
                began = time.monotonic()
                await conversation.send(start)
                receiving = asyncio.create_task(conversation.receive())
                while not receiving.done():
                    await asyncio.wait((receiving,), timeout=0.5)
                    await conversation.send(more)
                await receiving
                lasted.append((kind, time.monotonic() - began))

        dripping = asyncio.gather(*map(drip, kinds))
        during = await latencies(port, lambda _: dripping.done())
        await dripping
    longest = {k: round(max(t for kind, t in lasted if kind == k), 2) for k in starts}
    median, worst = sorted(during)[len(during) // 2], sorted(during)[int(len(during) * 0.99)]
    print(f"{len(kinds)} drips, closed after {longest} s at most; {len(during)} good requests:")
    print(f"median {median * 1e3:.2f} ms, p99 {worst * 1e3:.2f} ms; before them:")
    print(f"median {sorted(before)[50] * 1e3:.2f} ms, p99 {sorted(before)[99] * 1e3:.2f} ms")
    assert len(lasted) == len(kinds)
    assert max(longest.values()) < 31
    assert median < 0.2


async def latencies(port: int, enough: Any) -> list[float]:
    """Seconds that good requests take, one after the other on one connection."""
    taken: list[float] = []
    async with Conversation(port) as conversation:
        while not enough(taken):
            started = time.monotonic()
            await conversation.send(CHECK.request())
            assert (await conversation.receive(1))[0] == [200]
            taken.append(time.monotonic() - started)
            await asyncio.sleep(0.005)
    return taken
