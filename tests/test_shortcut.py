"""Small requests past uvicorn's machinery: the same answers as through it, however they arrive."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from lonelypsp.onewrite import OneWrite
from lonelypsp.shortcut import MOST, with_shortcut

DEADLINE = 10.0


class Transport(asyncio.Transport):
    """Keeps what is written, write by write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def whole(status: int, body: bytes, *more: tuple[bytes, bytes]) -> Any:
    return status, ((b"content-length", b"%d" % len(body)), *more), body


async def send_whole(send: Any, answer: Any) -> None:
    status, headers, body = answer
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


class Echo:
    """Answers with what came, after `gate` is open; keeps how each request came."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.events: list[Any] = []
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        body, more = b"", True
        while more:
            event = await receive()
            self.events.append(event)
            if event["type"] == "http.disconnect":
                return
            body += event["body"]
            more = event["more_body"]
        await self.gate.wait()
        await send_whole(send, whole(200, scope["method"].encode() + b" " + body))


class Immediate(Echo):
    """The same at once, unless it must not be."""

    ready = True

    def at_once(self, scope: Any, body: bytes) -> Any:
        if not self.ready:
            return None
        self.scopes.append(scope)
        return whole(200, b"at once " + body)


class Ends(Exception):
    pass


class Wire:
    """One connection to a server in this process; `request` is what a peer sends."""

    def __init__(self, **apps: Any) -> None:
        table = {f"/{name}": app for name, app in apps.items()}

        async def everything(scope: Any, receive: Any, send: Any) -> None:
            app = table.get(scope["path"])
            if app is None:
                await send_whole(send, whole(404, b"nothing here"))
            else:
                await app(scope, receive, send)

        config = Config(everything, interface="asgi3", lifespan="off", ws="none", log_config=None)
        config.load()
        self.loop = asyncio.get_running_loop()
        self.state = ServerState()
        protocol_class = with_shortcut(HttpToolsProtocol, table)
        self.protocol = protocol_class(config=config, server_state=self.state, app_state={})
        self.transport = Transport()
        self.protocol.connection_made(OneWrite(self.transport, self.loop.call_soon))

    def send(self, data: bytes) -> None:
        if not self.transport.closed:
            self.protocol.data_received(data)

    async def answers(self, number: int) -> list[bytes]:
        """Waits for so many; the bodies."""
        async with asyncio.timeout(DEADLINE):
            while b"".join(self.transport.writes).count(b"HTTP/1.1 ") < number:
                await asyncio.sleep(0)
            while self.state.tasks:
                await asyncio.sleep(0)
        found = b"".join(self.transport.writes).split(b"HTTP/1.1 ")[1:]
        assert len(found) == number
        return [answer.partition(b"\r\n\r\n")[2] for answer in found]

    @property
    def short(self) -> bool:
        """Whether the last request took the short way."""
        return type(self.protocol.cycle).__module__ == "lonelypsp.shortcut"


def request(path: str = "/echo", body: bytes = b"body", *headers: str, line: str = "") -> bytes:
    lines = [line or f"POST {path} HTTP/1.1", "Host: x", *headers]
    if not any(h.lower().startswith("transfer") for h in headers):
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def immediate() -> Immediate:
    return Immediate()


async def test_the_scope_is_uvicorns(echo: Echo) -> None:
    wire = Wire(echo=echo)
    wire.send(request("/echo", b"body", "X-Y: Z"))
    assert await wire.answers(1) == [b"POST body"]
    assert wire.short
    wire.send(request("/echo", b"body", "X-Y: Z", "Expect: 100-continue"))
    await wire.answers(3)  # 100 is one
    assert not wire.short
    one, other = echo.scopes
    other["headers"].remove((b"expect", b"100-continue"))
    assert one == other


@pytest.mark.parametrize("kind", ["echo", "immediate"])
@pytest.mark.parametrize("body", [b"", b"body"])
async def test_split_anywhere(kind: str, body: bytes, echo: Echo, immediate: Immediate) -> None:
    data = request(f"/{kind}", body)
    answer = (b"POST " if kind == "echo" else b"at once ") + body
    wire = Wire(echo=echo, immediate=immediate)
    for number, at in enumerate(range(1, len(data)), 1):
        wire.send(data[:at])
        await asyncio.sleep(0)
        wire.send(data[at:])
        assert (await wire.answers(number))[-1] == answer
        assert wire.short
    for at in range(len(data)):
        wire.send(data[at : at + 1])
    assert (await wire.answers(number + 1))[-1] == answer
    assert len(wire.transport.writes) == number + 1  # head and body together
    assert wire.state.total_requests == number + 1


OTHER_WAYS = {
    "GET": (request(line="GET /echo HTTP/1.1", body=b""), b"GET "),
    "another method": (request(line="PUT /echo HTTP/1.1"), b"PUT body"),
    "HTTP/1.0": (request(line="POST /echo HTTP/1.0"), b"POST body"),
    "a query": (request("/echo?x=y"), b"POST body"),
    "escaped": (request("/%65cho"), b"POST body"),
    "unknown": (request("/other"), b"nothing here"),
    "chunked": (
        request("/echo", b"4\r\nbody\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
        b"POST body",
    ),
    "too long": (request("/echo", b"x" * (MOST + 1)), b"POST " + b"x" * (MOST + 1)),
}


@pytest.mark.parametrize("name", OTHER_WAYS)
async def test_everything_else_goes_uvicorns_way(name: str, echo: Echo) -> None:
    data, answer = OTHER_WAYS[name]
    wire = Wire(echo=echo)
    wire.send(data)
    assert await wire.answers(1) == [answer]
    assert not wire.short


async def test_as_long_as_may_be(echo: Echo) -> None:
    wire = Wire(echo=echo)
    data = request("/echo", b"x" * MOST)
    for at in range(0, len(data), 1000):
        wire.send(data[at : at + 1000])
        assert not wire.protocol.flow.read_paused
    assert await wire.answers(1) == [b"POST " + b"x" * MOST]
    assert wire.short
    assert echo.events == [{"type": "http.request", "body": b"x" * MOST, "more_body": False}]


@pytest.mark.parametrize(
    "paths",
    [
        ["echo"] * 3,
        ["immediate"] * 3,
        ["immediate", "echo", "immediate", "other", "echo"],
        ["other", "immediate", "echo"],
    ],
)
@pytest.mark.parametrize("together", [True, False])
async def test_answers_come_in_the_order_of_the_requests(
    paths: list[str], together: bool, echo: Echo, immediate: Immediate
) -> None:
    wire = Wire(echo=echo, immediate=immediate)
    immediate.gate = echo.gate
    echo.gate.clear()
    sent = [request(f"/{path}", b"%d" % n) for n, path in enumerate(paths)]
    for data in [b"".join(sent)] if together else sent:
        wire.send(data)
        await asyncio.sleep(0)
    echo.gate.set()
    bodies = await wire.answers(len(paths))
    expected = {
        "echo": {b"POST %d"},
        "immediate": {b"at once %d", b"POST %d"},  # it may have been queued
        "other": {b"nothing here"},
    }
    for n, (path, body) in enumerate(zip(paths, bodies, strict=True)):
        assert body in {text.replace(b"%d", b"%d" % n) for text in expected[path]}


@pytest.mark.parametrize("path", ["echo", "immediate"])
async def test_nothing_is_done_after_the_last_request(
    path: str, echo: Echo, immediate: Immediate
) -> None:
    wire = Wire(echo=echo, immediate=immediate)
    wire.send(request(f"/{path}", b"last", "Connection: close") + request(f"/{path}", b"more"))
    (body,) = await wire.answers(1)
    assert body.endswith(b"last")
    assert b"\r\nconnection: close\r\n" in wire.transport.writes[0]
    assert wire.transport.closed
    assert len(echo.scopes + immediate.scopes) == 1


async def test_an_answer_may_close_the_connection() -> None:
    class Closes(Immediate):
        def at_once(self, scope: Any, body: bytes) -> Any:
            return whole(413, b"too long", (b"connection", b"close"))

    wire = Wire(closes=Closes())
    wire.send(request("/closes") + request("/closes"))
    assert await wire.answers(1) == [b"too long"]
    assert wire.transport.writes[0].startswith(b"HTTP/1.1 413 Content Too Large\r\n")
    assert wire.transport.writes[0].count(b"close") == 1
    assert wire.transport.closed


async def raises(scope: Any, receive: Any, send: Any) -> None:
    raise Ends


async def answers_nothing(scope: Any, receive: Any, send: Any) -> None:
    await receive()


async def answers_half(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def answers_in_parts(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x", "more_body": True})


class RaisesAtOnce(Echo):
    def at_once(self, scope: Any, body: bytes) -> Any:
        raise Ends


@pytest.mark.parametrize(
    ("app", "logged"),
    [
        (raises, "Ends"),
        (answers_nothing, ""),
        (answers_half, ""),
        (answers_in_parts, "one start and one body"),
        (None, "Ends"),
    ],
)
async def test_apps_that_fail(
    app: Callable[..., Any] | None, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    wire = Wire(bad=app or RaisesAtOnce())
    wire.send(request("/bad"))
    assert await wire.answers(1) == [b"Internal Server Error"]
    assert wire.transport.writes[0].startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert wire.transport.closed
    assert logged in caplog.text


async def test_a_request_that_is_cancelled_is_answered(echo: Echo) -> None:
    """A listener that stops cancels what takes too long."""
    wire = Wire(echo=echo)
    echo.gate.clear()
    wire.send(request())
    await asyncio.sleep(0)
    (task,) = wire.state.tasks
    task.cancel()
    assert await wire.answers(1) == [b"Internal Server Error"]


async def test_a_stop_lets_the_request_finish(echo: Echo) -> None:
    wire = Wire(echo=echo)
    echo.gate.clear()
    wire.send(request())
    await asyncio.sleep(0)
    wire.protocol.shutdown()
    assert not wire.transport.closed
    echo.gate.set()
    assert await wire.answers(1) == [b"POST body"]
    assert b"\r\nconnection: close\r\n" in wire.transport.writes[0]
    assert wire.transport.closed


async def test_a_peer_that_leaves_before_its_request_is_whole(
    echo: Echo, immediate: Immediate
) -> None:
    for path in ("/echo", "/immediate"):
        wire = Wire(echo=echo, immediate=immediate)
        wire.send(request(path)[:-1])
        wire.protocol.connection_lost(None)
        await asyncio.sleep(0)
        assert not wire.state.tasks
    assert not echo.scopes + immediate.scopes


async def test_a_peer_that_leaves_before_the_answer() -> None:
    left = asyncio.Event()

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        assert (await receive())["type"] == "http.disconnect"
        left.set()
        await send_whole(send, whole(200, b"too late"))

    wire = Wire(waits=waits)
    wire.send(request("/waits"))
    await asyncio.sleep(0)
    wire.protocol.connection_lost(None)
    async with asyncio.timeout(DEADLINE):
        await left.wait()
        while wire.state.tasks:
            await asyncio.sleep(0)
    assert wire.transport.writes == []


async def test_a_peer_that_does_not_read_its_answers_is_waited_for(immediate: Immediate) -> None:
    wire = Wire(immediate=immediate)
    wire.protocol.pause_writing()
    wire.send(request("/immediate", b"1") + request("/immediate", b"2"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert wire.transport.writes == []
    wire.protocol.resume_writing()
    assert [body[-1:] for body in await wire.answers(2)] == [b"1", b"2"]


async def test_what_must_not_be_answered_at_once_is_not(immediate: Immediate) -> None:
    immediate.ready = False
    wire = Wire(immediate=immediate)
    wire.send(request("/immediate"))
    assert wire.transport.writes == []
    assert await wire.answers(1) == [b"POST body"]
    assert wire.short


async def test_headers_of_the_server_are_sent(echo: Echo) -> None:
    wire = Wire(echo=echo)
    wire.state.default_headers.append((b"date", b"today"))
    wire.send(request())
    await wire.answers(1)
    assert b"\r\ndate: today\r\n" in wire.transport.writes[0]


@pytest.mark.parametrize("path", ["echo", "immediate"])
async def test_requests_leave_no_garbage(path: str, echo: Echo, immediate: Immediate) -> None:
    """What is in a circle waits for the garbage collector, with its body, and costs time then."""
    wire = Wire(echo=echo, immediate=immediate)
    gc.disable()
    try:
        wire.send(request(f"/{path}"))
        await wire.answers(1)
        first = weakref.ref(wire.protocol.cycle)
        wire.send(request(f"/{path}"))
        await wire.answers(2)
        await asyncio.sleep(0)
        assert first() is None
    finally:
        gc.enable()
