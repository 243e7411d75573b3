"""How much an HTTP client may ask of a listener, and how slow it may be.

uvicorn's protocol takes heads of any size, waits for ever for what does not come and for clients
that do not read, and answers what it cannot parse before the requests that came earlier. `guarded`
makes a class of it that does not. There are no timers per request: a `Guard` looks at all
connections of its listener once per tick, so that a limit is exact to a tick or two.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any

from lonelypsp.errors import RemoteProtocolError
from lonelypsp.onewrite import OneWrite
from lonelypsp.spool import SocketError, Spool

log = logging.getLogger(__name__)

GUARDED = "lonelyps.guarded"
"""Name of the ASGI extension which says that a `Guard` watches over the connection."""

READS_INTO = "lonelyps.reads_into"
"""Name of the ASGI extension with which `read_into` works."""

_NONE: Mapping[str, Any] = {}
_LONGEST_TICK = 1.0
_LINGER = 5.0  # seconds in which what follows a refused request is read and thrown away
_LINGER_BYTES = 1024 * 1024
_MOST_HEADERS = 100
_MOST_FRAMING = 16 * 1024  # bytes around chunks, ...
_FRAMING_PER_BYTE = 8  # ... and for each byte in them; a chunk of one byte needs 5
_HIGH_WATER = 64 * 1024
_AT_ONCE = 4 * 1024 * 1024  # bytes that a thread reads from a socket before others have its place
_PHRASES = {
    400: b"Bad Request",
    408: b"Request Timeout",
    413: b"Content Too Large",
    414: b"URI Too Long",
    415: b"Unsupported Media Type",
    431: b"Request Header Fields Too Large",
    501: b"Not Implemented",
    503: b"Service Unavailable",
    505: b"HTTP Version Not Supported",
}
_ENCODED = "encoded bodies are not taken"
_SLOW_BODY = "the body comes too slowly"
_JUDGED = frozenset((b"expect", b"host", b"transfer-encoding", b"content-encoding"))


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What one listener bears.

    Attributes:
        head_timeout: seconds for a whole head, the first counted from the connection on.
        idle_timeout: seconds between two requests.
        min_rate: bytes per second of a body.
        rate_window: seconds over which that is averaged, and in which a client must take something
            of the answers that wait for it.
        max_head: bytes of a head; half of it for the target alone.
        max_connections: one more closes the one that waits longest for a request; if all are busy,
            it is answered 503.

    Raises:
        ValueError: a limit is not above 0; the message names it.
    """

    head_timeout: float = 8.0
    idle_timeout: float = 25.0
    min_rate: int = 1024
    rate_window: float = 20.0
    max_head: int = 16 * 1024
    max_connections: int = 1000

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ValueError(f"limits: {name} must be a finite number above 0, not {value!r}")

    @property
    def tick(self) -> float:
        """Seconds between two looks."""
        shortest = min(self.head_timeout, self.idle_timeout, self.rate_window)
        return min(_LONGEST_TICK, shortest / 4)


class _Phase(Enum):
    HEAD = auto()
    BODY = auto()
    ANSWER = auto()
    SURPLUS = auto()  # answered, but there is more body
    IDLE = auto()
    LINGER = auto()


_WAITING = (_Phase.HEAD, _Phase.IDLE)


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


_TOO_MUCH_FRAMING = _Refused(400, "chunks with too much around them")


class Guard:
    """The connections of one listener; looks at them for as long as there are any."""

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        self.connections: dict[Any, None] = {}
        self.ended: Counter[str] = Counter()
        self._timer: Any = None
        self._longest_waiting: deque[Any] = deque()
        self._has_searched = False

    def admit(self, connection: Any) -> bool:
        """Takes a new connection, if there is or can be made room for it."""
        if len(self.connections) >= self.limits.max_connections and not self._make_room():
            return False
        self.connections[connection] = None
        if self._timer is None:
            self._timer = connection.loop.call_later(self.limits.tick, self._look, connection.loop)
        return True

    def remove(self, connection: Any) -> None:
        self.connections.pop(connection, None)

    def _make_room(self) -> bool:
        if not self._longest_waiting and not self._has_searched:
            self._has_searched = True  # once per tick: it takes time
            waiting = [c for c in self.connections if c.phase() in _WAITING]
            self._longest_waiting.extend(sorted(waiting, key=lambda c: c.since))
        while self._longest_waiting:
            connection = self._longest_waiting.popleft()
            if connection in self.connections and connection.phase() in _WAITING:
                connection.end("made room for others")
                return True
        self.ended["refused, because there were too many"] += 1
        return False

    def _look(self, loop: Any) -> None:
        now = loop.time()
        for connection in list(self.connections):
            connection.look(now)
        self._longest_waiting.clear()
        self._has_searched = False
        if self.ended:
            told = ", ".join(f"{number} {why}" for why, number in self.ended.items())
            log.info("connections closed: %s", told)
            self.ended.clear()
        self._timer = None
        if self.connections:
            self._timer = loop.call_later(self.limits.tick, self._look, loop)


class _Transport(OneWrite):
    """Closing while the peer still sends would reset the connection, and with it the answer."""

    def __init__(self, protocol: Any, transport: Any) -> None:
        super().__init__(transport, protocol.loop.call_soon)
        self._protocol = protocol
        self.is_lingering = False

    def close(self) -> None:
        self._flush()
        transport = self._transport
        if self.is_lingering or transport.is_closing() or not self._protocol.may_get_more():
            transport.close()
            return
        self.is_lingering = True
        self._protocol.flow.resume_reading()
        if transport.can_write_eof():
            transport.write_eof()

    def is_closing(self) -> bool:
        self._flush()
        return self.is_lingering or bool(self._transport.is_closing())

    def abort(self) -> None:
        self._transport.abort()


def guarded(base: Any, httptools: Any, limits: HttpLimits) -> Any:
    """A protocol class for one listener.

    Args:
        base: uvicorn's HttpToolsProtocol.
        httptools: the module.
    """
    guard = Guard(limits)

    class Guarded(base):  # type: ignore[misc]
        def connection_made(self, transport: Any) -> None:
            self.received = 0  # bytes
            self.chunk = 0  # bytes of the last read
            self.head_from = 0  # what was received before the head; at most one read too much
            self.answered_at = 0  # what was received when the answer was complete
            self.heads = 0
            self.hosts = 0
            self.in_head = True
            self.is_chunked = False
            self.body_from = self.body_bytes = 0
            self.refusal = b""
            self.since = self.loop.time()
            self.seen: Any = (_Phase.HEAD, 0)
            self.mark = 0
            self.stalled: tuple[float, int] | None = None
            self.readable: Any = None  # a future: what the spool that we read into waits for
            super().connection_made(_Transport(self, transport))
            self.extensions: dict[str, Any] = {GUARDED: {}, **tls_extension(transport)}
            if self.scheme == "http" and hasattr(os, "readv"):
                self.extensions[READS_INTO] = self.read_into
            if not guard.admit(self):
                self.transport.write(_answer(503, "too many connections", b"retry-after: 1\r\n"))
                self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            guard.remove(self)
            super().connection_lost(exc)
            _wake(self.readable)

        def data_received(self, data: bytes) -> None:
            self.chunk = len(data)
            self.received += self.chunk
            if self.refusal or self.transport.is_lingering:
                if self.received - self.mark > _LINGER_BYTES and self.transport.is_lingering:
                    self.transport.abort()
                return
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade:
                self._upgrade()
            except httptools.HttpParserError as e:
                self._refuse(_as_refused(e))
            else:
                if self.in_head:
                    if self.received - self.head_from > limits.max_head:
                        self._refuse(self._too_long())
                elif self.is_chunked and self._is_mostly_framing():
                    self._refuse(_TOO_MUCH_FRAMING)

        # called by the parser

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["extensions"] = self.extensions
            self.in_head, self.is_chunked, self.hosts = True, False, 0
            if self.heads:
                self.head_from = self.received

        def on_header(self, name: bytes, value: bytes) -> None:
            if not self.in_head:
                return  # a trailer, which no signature and no proxy has looked at
            name = name.lower()
            if name in _JUDGED:
                self._judge(name, value.lower())
            self.headers.append((name, value))

        def _judge(self, name: bytes, value: bytes) -> None:
            if name == b"host":
                self.hosts += 1
            elif name == b"expect":
                self.expect_100_continue = value == b"100-continue"
            elif name == b"content-encoding":
                if value != b"identity":
                    raise _Refused(415, _ENCODED)
            elif value != b"chunked" or self.is_chunked:
                raise _Refused(501, "the only Transfer-Encoding is chunked")
            else:
                self.is_chunked = True

        def on_headers_complete(self) -> None:
            # a bound that holds for most; what it does not hold for is measured
            if self.received - self.head_from + self.chunk > limits.max_head:
                size = len(self.url) + sum(len(n) + len(v) + 4 for n, v in self.headers)
                if size > limits.max_head or len(self.url) > limits.max_head // 2:
                    raise self._too_long()
            if len(self.headers) > _MOST_HEADERS:
                raise _Refused(431, f"more than {_MOST_HEADERS} headers")
            version = self.parser.get_http_version()
            if version != "1.1":
                if version != "1.0":
                    raise _Refused(505, "HTTP/1.1 is spoken here")
                if self.is_chunked:
                    raise _Refused(400, "Transfer-Encoding in HTTP/1.0")
            if self.hosts != 1 and (version == "1.1" or self.hosts):
                raise _Refused(400, f"{self.hosts} Host headers, not 1")
            if self.parser.should_upgrade():
                self._judge_upgrade()
            self.in_head = False
            self.heads += 1
            self.body_from, self.body_bytes = self.received - self.chunk, 0
            super().on_headers_complete()

        def _judge_upgrade(self) -> None:
            lengths = (v for n, v in self.headers if n == b"content-length")
            if self.is_chunked or any(v != b"0" for v in lengths):
                raise _Refused(400, "an Upgrade with a body")  # the parser would leave it out
            if self._is_busy():
                raise _Refused(400, "an Upgrade before earlier requests were answered")

        def on_body(self, body: bytes) -> None:
            self.body_bytes += len(body)
            cycle = self.cycle
            if cycle.response_complete:
                if self.received - self.answered_at > _LINGER_BYTES:
                    self.transport.abort()
                return
            if not cycle.body:
                cycle.body = body  # as it is: large bodies are copied often enough
            else:
                if type(cycle.body) is bytes:
                    cycle.body = bytearray(cycle.body)
                cycle.body += body
            if len(cycle.body) > _HIGH_WATER:
                self.flow.pause_reading()
            cycle.message_event.set()

        def on_message_complete(self) -> None:
            if self.is_chunked:
                if self._is_mostly_framing():
                    raise _TOO_MUCH_FRAMING
                self.is_chunked = False
            if self.cycle is not None:
                self.cycle.more_body = False
                self.cycle.message_event.set()

        async def read_into(self, receive: Any, spool: Spool, first: bytes) -> bool:
            """See the function of that name."""
            cycle = self.cycle
            is_ours = getattr(receive, "__self__", None) is cycle  # else others look at the body
            if not is_ours or not cycle.more_body or self.is_chunked:
                return False
            left = self._declared() - self.body_bytes
            here = len(first) + len(cycle.body)
            if left < _HIGH_WATER or spool.written + here + left != spool.length:
                return False
            sock = self.transport.get_extra_info("socket")
            self.flow.pause_reading()
            first, cycle.body = first + bytes(cycle.body), bytearray()
            cycle.keep_alive, keep_alive = False, cycle.keep_alive  # the parser waits for all of it
            fd = os.dup(sock.fileno())
            work = self.loop.run_in_executor(None, spool.write, first)
            try:
                await self._finished(work)
                while left and not cycle.disconnected:
                    work = self.loop.run_in_executor(None, spool.read_from, fd, _AT_ONCE)
                    try:
                        number = await self._finished(work)
                    except BlockingIOError:
                        if not cycle.disconnected:
                            await self._wait_for(fd)
                        continue
                    except SocketError:
                        number = 0
                    if not number:
                        self.transport.abort()
                        await self._lost(cycle)
                    left -= number
                    self.received += number
                    self.body_bytes += number
            finally:
                # not before the thread is through, or it would read from who gets that number next
                work.add_done_callback(partial(_close, fd))
                if not cycle.disconnected:
                    self.flow.resume_reading()
            if left:
                return False
            cycle.keep_alive = keep_alive
            self.parser = httptools.HttpRequestParser(self)  # the old one has not seen the body
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn
            self.on_message_complete()
            return True

        async def _finished(self, work: Any) -> Any:
            """The result of what a thread does, which goes on if we are cancelled."""
            finished = self.loop.create_future()
            work.add_done_callback(lambda _: _wake(finished))
            await finished
            return work.result()

        def _declared(self) -> int:
            """Content-Length, which the parser has checked."""
            return next((int(v) for n, v in self.headers if n == b"content-length"), 0)

        async def _lost(self, cycle: Any) -> None:
            while not cycle.disconnected:
                await cycle.message_event.wait()
                cycle.message_event.clear()

        async def _wait_for(self, fd: int) -> None:
            self.readable = self.loop.create_future()
            self.loop.add_reader(fd, _wake, self.readable)
            try:
                await self.readable
            finally:
                self.loop.remove_reader(fd)
                self.readable = None

        def _is_mostly_framing(self) -> bool:
            """Also if much of what follows a chunked body came together with its end."""
            most = limits.max_head + _MOST_FRAMING + _FRAMING_PER_BYTE * self.body_bytes
            return bool(self.received - self.body_from - self.body_bytes > most)

        # called by the request cycle

        def on_response_complete(self) -> None:
            self.server_state.total_requests += 1
            if self.transport.is_closing():
                return
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            elif self.refusal:
                self._send_refusal()
            elif self.cycle.more_body:
                self.answered_at = self.received
                if self.expect_100_continue:  # who knows whether it will send the body
                    self.transport.close()

        # refusing

        def _is_busy(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _too_long(self) -> _Refused:
            if len(self.url) > limits.max_head // 2:
                return _Refused(414, f"a target of more than {limits.max_head // 2:,} bytes")
            return _Refused(431, f"a head of more than {limits.max_head:,} bytes")

        def _refuse(self, refused: _Refused) -> None:
            """Answers with an error, after those requests that came before, and closes."""
            if self.refusal:
                return
            self.refusal = _answer(refused.status, str(refused))
            guard.ended[f"answered {refused.status}: {refused}"] += 1
            cycle = self.cycle
            if self._is_busy() and cycle.more_body and not self.in_head:
                cycle.disconnected = True
                cycle.message_event.set()
                _wake(self.readable)
                if self.pipeline:
                    self.pipeline.popleft()  # this one has not begun
                elif cycle.response_started:
                    self.transport.abort()
                else:
                    self._send_refusal()
            elif not self._is_busy():
                self._send_refusal()

        def _send_refusal(self) -> None:
            self.mark = self.received
            self.transport.write(self.refusal)
            self.transport.close()

        def _upgrade(self) -> None:
            if self._should_upgrade():
                guard.remove(self)
                self.handle_websocket_upgrade()
            else:  # what follows is in a protocol that we do not speak
                self.cycle.keep_alive = False

        # called by the guard

        def may_get_more(self) -> bool:
            """Whether the peer may be about to send more of what nobody will look at."""
            return bool(self.refusal) or (self.cycle is not None and self.cycle.more_body)

        def phase(self) -> _Phase:
            if self.transport.is_closing():
                return _Phase.LINGER
            if self._is_busy():
                return _Phase.BODY if self.cycle.more_body else _Phase.ANSWER
            if self.in_head:
                return _Phase.HEAD
            if self.cycle is not None and self.cycle.more_body:
                return _Phase.SURPLUS
            return _Phase.IDLE

        def look(self, now: float) -> None:
            phase = self.phase()
            if (phase, self.heads) != self.seen:
                self.seen = (phase, self.heads)
                self.since, self.mark = now, self.received
            passed = now - self.since
            if phase is _Phase.BODY:
                if self.flow.read_paused and self.readable is None:  # it is us who are slow
                    self.since, self.mark = now, self.received
                elif passed > limits.rate_window:
                    if self.received - self.mark < limits.min_rate * limits.rate_window:
                        self._refuse(_Refused(408, _SLOW_BODY))
                    self.since, self.mark = now, self.received
            elif phase is _Phase.HEAD and passed > limits.head_timeout:
                if self.received:
                    self._refuse(_Refused(408, "the head comes too slowly"))
                else:
                    self.end("sent no request")
            elif phase is _Phase.IDLE and passed > limits.idle_timeout:
                self.end("idle")
            elif phase is _Phase.SURPLUS and passed > _LINGER:
                self.end("sent a body after its answer")
            pending = self.transport.get_write_buffer_size()
            if pending:
                self._look_at_answers(now, pending)
            else:
                self.stalled = None
                if phase is _Phase.LINGER and passed > _LINGER:
                    self.transport.abort()

        def _look_at_answers(self, now: float, pending: int) -> None:
            taken = self.transport.written - pending
            if self.stalled is None or self.stalled[1] != taken:
                self.stalled = (now, taken)
            elif now - self.stalled[0] > limits.rate_window:
                guard.ended["did not read their answers"] += 1
                self.transport.abort()

        def end(self, why: str) -> None:
            """Closes a connection that waits for a request."""
            guard.ended[why] += 1
            self.transport.close()

    return Guarded


def _close(fd: int, work: Any) -> None:
    os.close(fd)
    work.exception()  # seen, even if nobody waits


def _wake(future: Any) -> None:
    if future is not None and not future.done():
        future.set_result(None)


async def read_into(scope: Any, receive: Any, spool: Spool, first: bytes) -> bool:
    """Fills a spool on disk with a large body, past the event loop and the parser, if this is one
    of our listeners, without TLS, and nobody else looks at the body.

    Args:
        first: what was received of it already.

    Returns:
        whether all of it is in the spool. If not, `receive` has the rest, or the news that the
        client is gone; then nothing is to be written to the spool, which it has to ask first.

    Raises:
        OSError, ValueError: of the spool.
    """
    reads_into = (scope.get("extensions") or _NONE).get(READS_INTO)
    return bool(
        reads_into is not None and spool.on_disk and await reads_into(receive, spool, first)
    )


def tls_extension(transport: Any) -> dict[str, Any]:
    """The ASGI extension `tls` of a connection on which the client has shown a certificate.

    Besides what ASGI says it has `peer_certificate`, as `ssl.SSLSocket.getpeercert` gives it.
    """
    certificate = transport.get_extra_info("peercert")
    return {"tls": {"peer_certificate": certificate}} if certificate else {}


def identity(scope: Any) -> Mapping[str, Any]:
    """`peer_certificate`, as `ssl.SSLSocket.getpeercert` gives it, if the client has shown one."""
    tls = (scope.get("extensions") or _NONE).get("tls", _NONE)
    certificate = tls.get("peer_certificate")
    return {"peer_certificate": certificate} if certificate else _NONE


def patient(scope: Any, receive: Any, limits: HttpLimits, timeout: Any, now: Any) -> Any:
    """What a guard does for the body of a request, where the server has none.

    Args:
        scope, receive: of an ASGI app.
        timeout: `asyncio.timeout`.
        now: a clock in seconds that is never set.

    Returns:
        `receive`, but it raises RemoteProtocolError (408) when the body comes too slowly. The same
        object if there is a guard.

    Raises:
        RemoteProtocolError: the body is encoded (415).
    """
    if GUARDED in (scope.get("extensions") or ()):
        return receive
    if any(n == b"content-encoding" and v.lower() != b"identity" for n, v in scope["headers"]):
        raise RemoteProtocolError(_ENCODED, status=415)
    size = 0
    left = limits.rate_window  # of the time in which it is the client whom we wait for

    async def receive_in_time() -> Any:
        nonlocal left, size
        begun = now()
        try:
            async with timeout(left):
                event = await receive()
        except TimeoutError:
            raise RemoteProtocolError(_SLOW_BODY, status=408) from None
        left -= now() - begun
        size += len(event.get("body", b""))
        if size >= limits.min_rate * limits.rate_window:
            left, size = limits.rate_window, 0
        return event

    return receive_in_time


def _as_refused(e: Exception) -> _Refused:
    """What is wrong with a request that the parser gave up."""
    if isinstance(e.__context__, _Refused):
        return e.__context__
    text = "bad target" if e.__context__ else str(e)
    if "HTTP version" in text:
        return _Refused(505, "HTTP/1.1 is spoken here")
    if "Content-Length overflow" in text:
        return _Refused(413, "a body of more than 2^64 - 1 bytes")
    return _Refused(400, f"this is not HTTP: {text}")


def _answer(status: int, text: str, more: bytes = b"") -> bytes:
    body = f"{text}\n".encode("ascii", "replace")
    return (
        b"HTTP/1.1 %d %s\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n"
        b"connection: close\r\n%s\r\n%s" % (status, _PHRASES[status], len(body), more, body)
    )
