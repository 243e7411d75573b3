"""POSTs to broadcasters over HTTP/1.1: kept connections, timeouts, bounds, the raw reply.

A connection class of our own over httptools, because a client library takes several times as long
for a request as all the rest of a notify. `Pool.post` is the way in; a request is one write, its
reply one future.

Redirects are replies like any other; proxies, cookies and compressed replies do not exist. Nothing
is sent twice here: what the ways to fail mean is decided in `lonelypsc.broadcasters`.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from ssl import SSLContext
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import httptools

if TYPE_CHECKING:
    from lonelypsc.config.config import HttpPubSubConfig

MAX_REPLY = 256 * 1024
"""Bytes of one reply, status line and headers included."""
ONE_WRITE = 256 * 1024
"""Up to this many bytes, a body goes out together with its head."""
MAX_CONNECTIONS = 100
"""To one broadcaster."""
KEEPALIVE = 3.0
"""Seconds for which an unused connection is kept. Broadcasters (uvicorn) close idle ones after 5;
one that is closed while a request is written to it costs an ambiguous failure."""
STAGGER = 0.25
"""Seconds after which the next address of a name is tried beside the last."""

_PORTS = {"http": 80, "https": 443}
_PATH = "/%!$&'()*+,;=:@-._~"
_ACCURACY = 0.001  # seconds: timers of uvloop may be early by half of it
_PHASE = "outgoing_http_timeout_"
_LEFT = "the client was left"

Pieces = AsyncGenerator[bytes | memoryview, None]
Body = bytes | Pieces


class NotSent(Exception):
    """Not a byte of the request was sent."""


class NoReply(Exception):
    """The request was sent, at least in part, and there is no whole reply to it.

    Attributes:
        stale: whether a kept connection broke before anything came back: most likely the
            broadcaster closed it just as it was used.
    """

    def __init__(self, text: str, *, stale: bool = False) -> None:
        super().__init__(text)
        self.stale = stale


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `retry_after`: the header of that name, or an empty text."""

    status: int
    body: bytes
    retry_after: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes, and the part of its head that never changes."""

    origin: _Origin
    head: bytes


class Pool:
    """All connections of one client. To be used on one event loop.

    Args:
        config: its `outgoing_http_*` settings.
        tls: makes the context for https://; called when the first such url is seen.
    """

    def __init__(self, config: HttpPubSubConfig, tls: Callable[[], SSLContext]) -> None:
        self.config = config
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self._tls = tls
        self._context: SSLContext | None = None
        self._origins: dict[tuple[str, str, int], _Origin] = {}
        self._none_left = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = math.inf

    def target(self, url: str) -> Target:
        """Takes a url apart that the settings have checked."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
        port = _PORTS[parts.scheme] if parts.port is None else parts.port
        key = (parts.scheme, host, port)
        origin = self._origins.get(key)
        if origin is None:
            if parts.scheme == "https" and self._context is None:
                self._context = self._tls()
            context = self._context if parts.scheme == "https" else None
            origin = self._origins[key] = _Origin(self, host, port, context)
        shown = f"[{host}]" if ":" in host else host
        authority = shown if port == _PORTS[parts.scheme] else f"{shown}:{port}"
        head = (
            f"POST {quote(parts.path, safe=_PATH)} HTTP/1.1\r\nHost: {authority}\r\n"
            "User-Agent: lonelypsc\r\nAccept-Encoding: identity\r\n"
            "Content-Type: application/octet-stream\r\nContent-Length: "
        )
        return Target(origin, head.encode("ascii"))

    async def post(
        self, target: Target, headers: Mapping[str, str], length: int, body: Body
    ) -> Reply:
        """Sends one request and waits for its reply, whatever its status.

        Args:
            headers: besides those that every request has.
            length: of the body, in bytes.
            body: the body; what iterating over it raises is raised here.

        Raises:
            NotSent, NoReply: there is no reply.
            ValueError: a header has more than one line.
        """
        head = b"%b%d\r\n%b\r\n" % (target.head, length, _lines(headers))
        config, deadline = self.config, math.inf
        if config.outgoing_http_timeout_total is not None:
            extra = length / config.outgoing_http_min_rate
            deadline = self.loop.time() + config.outgoing_http_timeout_total + extra
        while True:
            if self.closed:
                raise NotSent(_LEFT)
            connection = target.origin.kept() or await target.origin.turn(deadline)
            if not connection.is_closing:
                return await connection.exchange(head, body, length, deadline)

    def wake_at(self, when: float) -> None:
        """Looks at all connections at `when`, or earlier."""
        if when < self._alarm_at and not self.closed:
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm_at = when
            self._alarm = self.loop.call_at(when, self._look)

    def _look(self) -> None:
        self._alarm, self._alarm_at = None, math.inf
        now = self.loop.time() + _ACCURACY
        for origin in self._origins.values():
            for connection in list(origin.connections):
                connection.expire(now)

    def gone(self) -> None:
        """Told of every connection that is no more."""
        if self.closed and not any(origin.places for origin in self._origins.values()):
            self._none_left.set()

    async def close(self) -> None:
        """Fails what is under way and closes every connection."""
        self.closed = True
        if self._alarm is not None:
            self._alarm.cancel()
        for origin in self._origins.values():
            origin.close()
        if any(origin.places for origin in self._origins.values()):
            await self._none_left.wait()  # the loop is about to tell each that it is gone


class _Origin:
    """The connections to one broadcaster, and who waits for one.

    Attributes:
        places: all connections, those that are being opened included.
        connections: those that are open.
    """

    def __init__(self, pool: Pool, name: str, port: int, tls: SSLContext | None) -> None:
        self.pool = pool
        self.name = name
        self.port = port
        self.tls = tls
        self.places: set[_Connection] = set()
        self.connections: set[_Connection] = set()
        self.idle: list[_Connection] = []
        self._waiting: deque[asyncio.Future[_Connection]] = deque()
        self._opening: set[asyncio.Task[None]] = set()

    def kept(self) -> _Connection | None:
        """The connection that was used last, if it is still good."""
        while self.idle:
            connection = self.idle.pop()
            if not connection.is_closing and self.pool.loop.time() < connection.expires:
                return connection
            connection.discard()
        return None

    async def turn(self, deadline: float) -> _Connection:
        """Waits for a connection that is opened or becomes free.

        Raises:
            NotSent: there is none in time, or none can be opened.
        """
        loop, connect = self.pool.loop, self.pool.config.outgoing_http_timeout_connect
        when, phase = deadline, "total"
        if connect is not None and loop.time() + connect < deadline:
            when, phase = loop.time() + connect, "connect"
        turn: asyncio.Future[_Connection] = loop.create_future()
        self._waiting.append(turn)
        self._advance()
        try:
            async with asyncio.timeout_at(when if when < math.inf else None) as timer:
                return await turn
        except BaseException as e:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self.free(turn.result())
            if isinstance(e, TimeoutError) and timer.expired():
                raise NotSent(f"no connection within {_PHASE}{phase}") from None
            raise

    def free(self, connection: _Connection) -> None:
        """Gives a connection to who has waited longest, or keeps it."""
        if connection.is_closing:
            return
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(connection)
                return
        connection.fresh = False
        self.idle.append(connection)
        self.pool.wake_at(connection.touched + KEEPALIVE)

    def forget_idle(self) -> None:
        while self.idle:
            self.idle.pop().discard()

    def _advance(self) -> None:
        """Opens a connection for each who waits, up to the limit."""
        while (
            len(self._waiting) > len(self._opening)
            and len(self.places) < MAX_CONNECTIONS
            and not self.pool.closed
        ):
            connection = _Connection(self)
            self.places.add(connection)
            task = self.pool.loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(partial(self._opened, connection))

    async def _open(self, connection: _Connection) -> None:
        limit = self.pool.config.outgoing_http_timeout_sock_connect
        try:
            async with asyncio.timeout(limit) as timer:
                await self.pool.loop.create_connection(
                    lambda: connection,
                    sock=await _reach(self.name, self.port),
                    ssl=self.tls,
                    server_hostname=self.name if self.tls else None,
                )
        except TimeoutError as e:
            if timer.expired():
                raise NotSent(f"no connection within {_PHASE}sock_connect") from None
            raise NotSent(f"cannot connect: {e}") from e
        except Exception as e:
            raise NotSent(f"cannot connect: {e or type(e).__name__}") from e

    def _opened(self, connection: _Connection, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        failure: BaseException | None = NotSent(_LEFT)
        if not task.cancelled():
            failure = task.exception()
            if failure is None and connection.is_closing:
                failure = NotSent("the connection was closed at once")
        if failure is None:
            self.free(connection)
        else:
            self._unreachable(failure)
            connection.discard()
            self.gone(connection)  # of what was not opened, uvloop tells nothing

    def _unreachable(self, failure: BaseException) -> None:
        """One attempt speaks for all who wait, unless another connection works."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(NotSent(str(failure)))
                if self.connections:
                    return

    def gone(self, connection: _Connection) -> None:
        """Told of every connection that is no more, maybe twice."""
        self.places.discard(connection)
        self.connections.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)
        self.pool.gone()
        self._advance()

    def close(self) -> None:
        for task in self._opening:
            task.cancel()
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(NotSent(_LEFT))
        self.idle.clear()
        for connection in self.connections:
            connection.fail(NoReply(f"connection failed: {_LEFT}"))


class _Connection(asyncio.Protocol):
    """One connection; at most one request at a time, no pipelining.

    Attributes:
        fresh: whether it was opened for the request that is the first on it.
        touched: when something last went over it.
    """

    def __init__(self, origin: _Origin) -> None:
        self.origin = origin
        self.loop = origin.pool.loop
        self.transport: asyncio.Transport | None = None
        self.fresh = True
        self.touched = self.loop.time()
        self._parser = httptools.HttpResponseParser(self)
        self._result: asyncio.Future[Reply] | None = None
        self._pump: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def is_closing(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    async def exchange(self, head: bytes, body: Body, length: int, deadline: float) -> Reply:
        """Sends a request and waits for the reply; as `Pool.post`."""
        assert self.transport is not None
        result: asyncio.Future[Reply] = self.loop.create_future()
        self._result = result
        self._deadline = deadline
        self.touched = self.loop.time()
        self._received = 0
        self._status = 0
        self._delimited = False
        self._complete = False
        self._error = ""
        self._retry_after = ""
        self._parts: list[bytes] = []
        if isinstance(body, bytes) and length <= ONE_WRITE:
            self.transport.write(head + body)
        else:
            pieces = _pieces(body) if isinstance(body, bytes) else body
            self._pump = self.loop.create_task(self._send(head, pieces))
        self.origin.pool.wake_at(self.expires)
        try:
            return await result
        except BaseException:
            if self._result is result:  # we are cancelled
                self._result = None
                self.discard()
            raise

    async def _send(self, head: bytes, pieces: Pieces) -> None:
        assert self.transport is not None
        try:
            self.transport.write(head)
            async with aclosing(pieces):
                async for piece in pieces:
                    await self._writable.wait()
                    if self.transport.is_closing():
                        return
                    self.transport.write(piece)
                    self.touched = self.loop.time()
        except Exception as e:  # noqa: BLE001 reading the body is the program's business
            self.fail(e)

    def data_received(self, data: bytes) -> None:
        if self._result is None:
            self.discard()  # a reply that nobody asked for
            return
        self.touched = self.loop.time()
        self._received += len(data)
        if self._received > MAX_REPLY:
            self.fail(NoReply(f"bad reply: longer than {MAX_REPLY:,} bytes"))
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.fail(NoReply("bad reply: another protocol (status 101)"))
        except (httptools.HttpParserError, httptools.HttpParserCallbackError) as e:
            self.fail(NoReply(f"connection failed: the reply is not HTTP: {e}"))
        else:
            if self._complete:
                self._reply()

    # called by the parser
    def on_message_begin(self) -> None:
        if self._complete:
            self._error = "bad reply: more than one reply to one request"

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._status:
            return  # a trailer
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._delimited = True
        elif name == b"retry-after":
            self._retry_after = value.decode("latin-1")
        elif name == b"content-encoding" and value.lower() != b"identity":
            self._error = "bad reply: it is compressed, which was not asked for"

    def on_headers_complete(self) -> None:
        if not self._complete:
            self._status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if not self._complete:
            self._parts.append(data)

    def on_message_complete(self) -> None:
        if self._complete:
            return
        if 100 <= self._status < 200:
            self._status = 0
            self._delimited = False
            self._error = self._retry_after = ""
            return
        self._complete = True
        self._reusable = self._parser.should_keep_alive()

    def _reply(self) -> None:
        assert self.transport is not None
        if self._error:
            self.fail(NoReply(self._error))
            return
        self.fresh = False
        self._succeed()
        early = self._pump is not None and not self._pump.done()
        if early or not self._reusable or self.transport.get_write_buffer_size():
            # closing politely would wait for a peer that may have stopped reading
            self.discard()
        else:
            self._pump = None
            self.origin.free(self)

    def _succeed(self) -> None:
        result, self._result = self._result, None
        if result is not None and not result.done():
            result.set_result(Reply(self._status, b"".join(self._parts), self._retry_after))

    # called by the event loop
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        if self in self.origin.places:
            self.origin.connections.add(self)
        else:  # it was given up while it was opened
            self.discard()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._result is not None and self._status and not self._delimited and exc is None:
            if self._error:
                self.fail(NoReply(self._error))
            else:
                self._succeed()
        stale = self._result is not None and not self.fresh and not self._received
        if stale:
            self.origin.forget_idle()  # they are no younger
        why = exc or "the broadcaster closed it"
        self.fail(NoReply(f"connection failed: {why}", stale=stale))
        self._writable.set()
        self.origin.gone(self)

    @property
    def expires(self) -> float:
        """When what is under way, or the idle connection, is to be given up."""
        if self._result is None:
            return self.touched + KEEPALIVE
        read = self.origin.pool.config.outgoing_http_timeout_sock_read
        return self._deadline if read is None else min(self._deadline, self.touched + read)

    def expire(self, now: float) -> None:
        """Gives up what has run out of time."""
        if now < self.expires:
            self.origin.pool.wake_at(self.expires)
        elif self._result is None:
            self.discard()
        else:
            phase = "total" if now >= self._deadline else "sock_read"
            self.fail(NoReply(f"timed out (no reply within {_PHASE}{phase})"))

    def fail(self, error: Exception) -> None:
        """Closes the connection at once and fails what is under way on it."""
        result, self._result = self._result, None
        self.discard()
        if result is not None and not result.done():
            result.set_exception(error)

    def discard(self) -> None:
        if self._pump is not None:
            self._pump.cancel()
        if self.transport is not None:
            self.transport.abort()


def _lines(headers: Mapping[str, str]) -> bytes:
    text = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if text.count("\n") != len(headers) or text.count("\r") != len(headers):
        # the value of an authenticator that the program has brought
        raise ValueError(f"there are line breaks in one of the headers {', '.join(headers)}")
    return text.encode("utf-8")


async def _pieces(body: bytes) -> Pieces:
    view = memoryview(body)
    for at in range(0, len(view), ONE_WRITE):
        yield view[at : at + ONE_WRITE]


async def _reach(name: str, port: int) -> socket.socket:
    """A socket that is connected with one of the addresses of `name`; a dead one costs no more
    than `STAGGER`. Raises OSError."""
    loop = asyncio.get_running_loop()
    left = deque(await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM))
    running: set[asyncio.Task[socket.socket]] = set()
    error: BaseException = OSError(f"{name} has no address")
    try:
        while left or running:
            if left:
                family, kind, protocol, _, address = left.popleft()
                running.add(loop.create_task(_connected(family, kind, protocol, address)))
            done, running = await asyncio.wait(
                running,
                timeout=STAGGER if left else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                if (failure := task.exception()) is None:
                    running |= done - {task}
                    return task.result()
                error = failure
    finally:
        for task in running:
            task.cancel()
            task.add_done_callback(_drop)
    raise error


async def _connected(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _drop(task: asyncio.Task[socket.socket]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()
