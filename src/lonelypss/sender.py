"""POSTs to subscribers over HTTP/1.1: connection reuse, timeouts, bounds, the raw reply.

The broadcaster's throughput is decided here, which is why this is a connection class of our own
over httptools (three to four times what a client library does on one core) and why a delivery is
an object with two methods instead of a task: `Post.head` is asked for the bytes when a connection
is free, `Post.finish` is told the reply, once, whatever happens.

A host is one scheme, name and port. Each has its own connections and its own bounded queue, so
that a slow or dead one delays nobody else. A host that was never reached is tried with one
connection, and when that fails everything waiting for it fails with it; each connection that works
allows two more, up to the limit.

Redirects are replies like any other, proxies and cookies do not exist, replies are neither decoded
nor read beyond `MAX_REPLY`. A connection goes to an address that `UrlPolicy` has judged.
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import httptools

from lonelypsp.spool import Body
from lonelypss.config import BroadcasterConfig, ConfigError
from lonelypss.filesend import send_file
from lonelypss.logs import Lines
from lonelypss.resolver import Resolver
from lonelypss.urlpolicy import Address, Target, UrlPolicy, UrlRefused

log = logging.getLogger(__name__)

MAX_REPLY = 256 * 1024
"""Bytes of one reply, status line and headers included."""
ONE_WRITE = 256 * 1024
"""Up to this many bytes, a body in memory goes out together with its head."""
CHUNK = 256 * 1024
MOST_ADDRESSES = 4
"""Of one host that are tried."""
STOPPING = "the broadcaster is stopping"
TICK = 0.1
"""Seconds between two looks at the clock: how exact timeouts are."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `status` 0: nothing did, and `error` says why."""

    status: int
    body: bytes
    error: str = ""
    retry_after: str = ""


def authorization_header(authorization: str | None) -> bytes:
    """The line of a head that carries an authorization, if there is one."""
    return b"" if authorization is None else f"Authorization: {authorization}\r\n".encode("latin-1")


def tls_context(config: BroadcasterConfig) -> ssl.SSLContext:
    """How to talk to https subscribers: verified, with TLS 1.2 or newer.

    Raises:
        ConfigError: a file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=config.outgoing_ca_file)
    except OSError as e:
        raise ConfigError(f"outgoing_ca_file: {config.outgoing_ca_file}: {e}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if config.outgoing_client_cert is None:
        if config.outgoing_client_key is not None:
            raise ConfigError("outgoing_client_key needs outgoing_client_cert")
    else:
        try:
            context.load_cert_chain(config.outgoing_client_cert, config.outgoing_client_key)
        except OSError as e:
            raise ConfigError(
                f"outgoing_client_cert: {config.outgoing_client_cert}, outgoing_client_key:"
                f" {config.outgoing_client_key}: {e}"
            ) from None
    return context


def tls_failure(error: ssl.SSLError) -> str:
    """What went wrong, and the setting that may help."""
    if isinstance(error, ssl.SSLCertVerificationError):
        text = f"the certificate is not to be trusted: {error.verify_message}"
        if error.verify_code in _UNKNOWN_ISSUER:
            text += "; outgoing_ca_file can name its authority"
        return text
    reason = error.reason or str(error)
    hint = _TLS_HINTS.get(reason, "")
    return f"TLS failed: {reason}{hint}"


_BROKEN_OFF = (
    "the subscriber broke off the TLS handshake; does it ask for outgoing_client_cert, or is it"
    " older than TLS 1.2?"
)
_UNKNOWN_ISSUER = (18, 19, 20, 21)  # self-signed, alone or in the chain; issuer not found
_TLS_HINTS = {
    "UNSUPPORTED_PROTOCOL": "; at least TLS 1.2 is needed",
    "TLSV1_ALERT_PROTOCOL_VERSION": "; at least TLS 1.2 is needed",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "; outgoing_client_cert can name a certificate",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "; does it ask for outgoing_client_cert?",
    "WRONG_VERSION_NUMBER": "; does the subscriber speak https on this port?",
}


class Post:
    """One POST on its way; subclasses know what is posted and what the reply means."""

    __slots__ = ("body", "deadline", "expires", "resent", "target")

    def __init__(self, target: Target, body: Body | None) -> None:
        self.target = target
        self.body = body
        self.deadline = math.inf
        self.expires = math.inf
        self.resent = False

    def head(self) -> bytes:
        """Changing headers, the empty line, and what stands before the message. Signed afresh."""
        raise NotImplementedError

    def finish(self, reply: Reply) -> None:
        """Told once. Must not raise."""
        raise NotImplementedError


Resolve: TypeAlias = Callable[[str], Awaitable[Sequence[Address]]]
"""All addresses of a name, best first; raises OSError: there are none."""


class Sender:
    """All connections of one broadcaster to its subscribers. Open it on a running loop.

    Args:
        policy: where they may lead; by default what `config` says.
        resolve: by default what the system says.

    Raises:
        ConfigError: a file that an option names cannot be used.
    """

    def __init__(
        self,
        config: BroadcasterConfig,
        policy: UrlPolicy | None = None,
        resolve: Resolve | None = None,
    ) -> None:
        self.config = config
        self.policy = policy or UrlPolicy(config)
        self.connections = 0
        self.faults = Lines(log)
        self.ssl = tls_context(config)
        self._resolver = Resolver(config.outgoing_dns_threads)
        self.resolve: Resolve = resolve or self._resolver
        self.idle: dict[_Connection, None] = {}
        """All idle connections, the longest idle one first."""
        self.starved: dict[_Host, None] = {}
        """Hosts that got no connection because there were too many, in order."""
        self.closed = True
        self._hosts: dict[tuple[str | int, ...], _Host] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many posts wait for a connection."""
        return sum(len(host.waiting) for host in self._hosts.values())

    def open(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self._none_left = asyncio.Event()

    def post(self, post: Post) -> None:
        """Starts or queues `post`; its `finish` is called later, never before this returns."""
        total = self.config.outgoing_http_timeout_total
        if total is not None:
            length = 0 if post.body is None else post.body.length
            post.deadline = self.loop.time() + total + length / self.config.outgoing_http_min_rate
        origin = post.target.origin
        host = self._hosts.get(origin)
        if host is None:
            host = self._hosts[origin] = _Host(self, post.target)
        host.submit(post)
        if self._timer is None and not self.closed:
            self._timer = self.loop.call_later(TICK, self._tick)

    def may_connect(self, host: _Host) -> bool:
        """Takes a place among all connections, if need be that of the longest idle one."""
        if self.connections >= self.config.outgoing_connections:
            if not self.idle:
                self.starved[host] = None
                return False
            next(iter(self.idle)).discard()
        self.connections += 1
        return True

    def connection_gone(self) -> None:
        """Gives the place of a connection to whoever waits for one."""
        self.connections -= 1
        if self.closed and not self.connections:
            self._none_left.set()
        while self.starved and self.connections < self.config.outgoing_connections:
            host = next(iter(self.starved))
            del self.starved[host]
            host.advance()  # it may have lost interest

    def may_keep(self, connection: _Connection) -> bool:
        """Whether a free connection is within its host's share, or was not made use of yet."""
        host = connection.host
        share = self.config.outgoing_connections // max(1, len(self._hosts))
        return not connection.used or len(host.busy) + len(host.idle) < share

    def _tick(self) -> None:
        self._timer = None
        now = self.loop.time()
        busy = False
        for origin, host in list(self._hosts.items()):
            if host.expire(now):
                busy = True
            elif not host.idle:
                del self._hosts[origin]
        if busy and not self.closed:
            self._timer = self.loop.call_later(TICK, self._tick)

    async def close(self) -> None:
        """Fails what is under way and closes every connection. It can be opened again."""
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.starved.clear()
        connecting = [task for host in self._hosts.values() for task in host.connecting]
        for host in list(self._hosts.values()):
            host.close()
        await asyncio.gather(*connecting, return_exceptions=True)
        await self._resolver.close()
        if self.connections:
            await self._none_left.wait()  # the loop is about to tell each that it is gone
        self._hosts.clear()


class _Host:
    """The connections to one origin and what waits for them."""

    def __init__(self, sender: Sender, target: Target) -> None:
        self.sender = sender
        self.target = target
        self.idle: deque[_Connection] = deque()
        self.busy: set[_Connection] = set()
        self.waiting: deque[Post] = deque()
        self.expires = math.inf
        """No post in `waiting` expires earlier."""
        self.connecting: set[asyncio.Task[None]] = set()

    def submit(self, post: Post) -> None:
        if self.sender.closed:
            self.fail_soon(post, STOPPING)
        elif self.idle:
            connection = self.idle.pop()
            del self.sender.idle[connection]
            connection.start(post)
        elif len(self.waiting) < self.sender.config.outgoing_queue_per_host:
            self.enqueue(post)
        else:
            self.fail_soon(post, "the queue of this host is full (outgoing_queue_per_host)")

    def enqueue(self, post: Post) -> None:
        """Makes `post` wait for a connection."""
        connect = self.sender.config.outgoing_http_timeout_connect
        post.expires = post.deadline
        if connect is not None:
            post.expires = min(post.deadline, self.sender.loop.time() + connect)
        self.expires = min(self.expires, post.expires)
        self.waiting.append(post)
        self.advance()

    def fail_soon(self, post: Post, reason: str) -> None:
        self.sender.loop.call_soon(post.finish, Reply(0, b"", reason))

    def advance(self) -> None:
        """Opens as many connections as there is waiting work for, slowly at first."""
        while len(self.waiting) > len(self.connecting) and not self.sender.closed:
            established = len(self.busy) + len(self.idle)
            limit = self.sender.config.outgoing_connections_per_host
            if (
                len(self.connecting) > 2 * established
                or established + len(self.connecting) >= limit
                or not self.sender.may_connect(self)
            ):
                return
            connection = _Connection(self)
            # it outlives the message for which it is opened, and is no part of its trace
            task = self.sender.loop.create_task(self._connect(connection), context=Context())
            self.connecting.add(task)
            task.add_done_callback(partial(self._attempted, connection))

    async def _connect(self, connection: _Connection) -> None:
        failure = ""
        try:
            async with asyncio.timeout(self.sender.config.outgoing_http_timeout_sock_connect):
                await self._open(connection)
        except TimeoutError:
            failure = "no connection within outgoing_http_timeout_sock_connect"
        except UrlRefused as e:
            failure = f"url refused: {e}"
        except ssl.SSLError as e:
            failure = f"cannot connect: {tls_failure(e)}"
        except Exception as e:  # noqa: BLE001 whatever it is, the deliveries must hear of it
            failure = f"cannot connect: {str(e) or _BROKEN_OFF}"
        self._attempted(connection, asyncio.current_task())
        if not failure and connection.is_closing:
            failure = "the connection broke at once"
        if failure:
            self._unreachable(failure)
        else:
            self.free(connection)
        self.advance()

    async def _open(self, connection: _Connection) -> None:
        """Connects to one of the addresses that the host has, if they may be connected to.

        Raises:
            UrlRefused: none of them may.
            OSError: none of them answers; ssl.SSLError: one does, and is not to be trusted.
        """
        sender, target = self.sender, self.target
        if target.address is None:
            found = await sender.resolve(target.host)
            addresses = sender.policy.allowed(target, found, MOST_ADDRESSES)
        else:
            addresses = [target.address]  # was judged with its url
        context = sender.ssl if target.scheme == "https" else None
        name = target.host.strip("[]") if context else None
        patience = sender.config.outgoing_http_timeout_sock_connect
        error: OSError = OSError(f"{target.host} has no address")
        for n, address in enumerate(addresses):
            last = n == len(addresses) - 1
            try:
                # the last one gets all that is left
                async with asyncio.timeout(
                    None if last or patience is None else patience / len(addresses)
                ):
                    await sender.loop.create_connection(
                        lambda: connection,
                        str(address),
                        target.port,
                        ssl=context,
                        server_hostname=name,
                    )
            except ssl.SSLError:
                raise
            except (OSError, TimeoutError) as e:
                error = e
            else:
                return
        raise error

    def _attempted(self, connection: _Connection, task: asyncio.Task[None] | None) -> None:
        if task in self.connecting:  # for a cancelled task that never ran, this is the only call
            self.connecting.remove(task)
            if connection.transport is None:  # otherwise connection_lost tells, or has told
                self.sender.connection_gone()

    def _unreachable(self, reason: str) -> None:
        waiting = self.waiting
        if not self.busy and not self.idle:
            self.waiting = deque()
        else:
            waiting = deque([waiting.popleft()] if waiting else [])
        for post in waiting:
            post.finish(Reply(0, b"", reason))

    def free(self, connection: _Connection) -> None:
        """Gives the connection, which is in neither set, its next work."""
        if self.sender.closed or connection.is_closing:
            connection.discard()
        elif self.sender.starved and not (self.waiting and self.sender.may_keep(connection)):
            connection.discard()  # its place is worth more elsewhere
        elif self.waiting:
            connection.start(self.waiting.popleft())
        else:
            self.idle.append(connection)
            self.sender.idle[connection] = None

    def remove(self, connection: _Connection) -> None:
        """Takes the connection out of the sets that it may be in."""
        self.busy.discard(connection)
        if connection in self.sender.idle:
            del self.sender.idle[connection]
            self.idle.remove(connection)

    def forget_idle(self) -> None:
        while self.idle:
            self.idle[-1].discard()

    def gone(self, connection: _Connection) -> None:
        self.remove(connection)
        self.sender.connection_gone()
        self.advance()

    def expire(self, now: float) -> bool:
        """Fails what has run out of time; tells whether anything is still under way."""
        if now > self.expires:
            late = [post for post in self.waiting if now > post.expires]
            self.waiting = deque(post for post in self.waiting if now <= post.expires)
            self.expires = min((post.expires for post in self.waiting), default=math.inf)
            for post in late:
                which = "total" if now > post.deadline else "connect"
                reason = f"no free connection within outgoing_http_timeout_{which}"
                post.finish(Reply(0, b"", reason))
        for connection in list(self.busy):
            connection.expire(now)
        return bool(self.busy or self.waiting or self.connecting)

    def close(self) -> None:
        for task in list(self.connecting):
            task.cancel()
        while self.waiting:
            self.waiting.popleft().finish(Reply(0, b"", STOPPING))
        for connection in list(self.busy):
            connection.discard(STOPPING)
        self.forget_idle()


class _Connection(asyncio.Protocol):
    """One connection; at most one post at a time, no pipelining."""

    def __init__(self, host: _Host) -> None:
        self.host = host
        self.post: Post | None = None
        self.transport: asyncio.Transport | None = None
        self.parser = httptools.HttpResponseParser(self)
        self.used = False
        self.pump: asyncio.Task[None] | None = None
        self.writable = asyncio.Event()
        self.writable.set()
        self.touched = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    @property
    def is_closing(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    def start(self, post: Post) -> None:
        if self.is_closing:
            self.host.enqueue(post)
            return
        assert self.transport is not None
        try:
            head = post.target.head + post.head()
        except Exception as e:  # noqa: BLE001 of a pluggable authenticator, and logged
            faults, name = self.host.sender.faults, self.host.target.host
            faults.write(logging.ERROR, name, "cannot sign a request", exc_info=True)
            self.host.fail_soon(post, f"cannot sign the request: {e!r}")
            self.discard()
            return
        self.host.busy.add(self)
        self.post = post
        self.touched = self.host.sender.loop.time()
        self.received = 0
        self.status = 0
        self.delimited = False
        self.complete = False
        self.reusable = False
        self.error = ""
        self.retry_after = ""
        self.parts: list[bytes] = []
        body = post.body
        if body is None:
            self.transport.write(head)
        elif body.data is not None and body.length <= ONE_WRITE:
            self.transport.write(head + body.data)
        else:
            self.pump = self.host.sender.loop.create_task(self._send(head, body))

    async def _send(self, head: bytes, body: Body) -> None:
        assert self.transport is not None
        transport, offset = self.transport, 0
        try:
            if body.on_disk:
                offset = await self._send_file(transport, head, body)
            else:
                transport.write(head)
            while offset < body.length and not transport.is_closing():
                chunk = (
                    await asyncio.to_thread(body.read_at, offset, CHUNK)
                    if body.on_disk
                    else body.read_at(offset, CHUNK)
                )
                if not chunk:
                    self.discard(f"the spooled message ends after {offset:,} bytes")
                    return
                await self.writable.wait()
                if transport.is_closing():
                    return
                transport.write(chunk)
                self._progress()
                offset += len(chunk)
        except (ConnectionError, TimeoutError):
            return  # the transport is about to notice
        except (OSError, ValueError) as e:  # ValueError: closed, the request was cancelled
            self.discard(f"cannot read the spooled message: {e}")

    async def _send_file(self, transport: asyncio.Transport, head: bytes, body: Body) -> int:
        """See `send_file`; the head has to be gone before."""
        transport.set_write_buffer_limits(high=0)
        transport.write(head)
        await self.writable.wait()
        transport.set_write_buffer_limits()
        return 0 if transport.is_closing() else await send_file(transport, body, self._progress)

    def _progress(self) -> None:
        self.touched = self.host.sender.loop.time()

    def data_received(self, data: bytes) -> None:
        if self.post is None:
            self.discard()  # a reply that nobody asked for
            return
        self.touched = self.host.sender.loop.time()
        self.received += len(data)
        if self.received > MAX_REPLY:
            self.discard(f"the reply is larger than {MAX_REPLY:,} bytes")
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.discard("the subscriber wants another protocol (status 101)")
        except (httptools.HttpParserError, httptools.HttpParserCallbackError) as e:
            self.discard(f"the reply is not HTTP: {e}")
        else:
            if self.complete:
                self._reply()

    # called by the parser
    def on_message_begin(self) -> None:
        if self.complete:
            self.reusable = False
            self.error = "more than one reply to one request"

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.status:
            return  # a trailer
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self.delimited = True
        elif name == b"retry-after":
            self.retry_after = value.decode("latin-1")
        elif name == b"content-encoding" and value.lower() != b"identity":
            self.error = "the reply is compressed, which was not asked for"

    def on_headers_complete(self) -> None:
        if not self.complete:
            self.status = self.parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if not self.complete:
            self.parts.append(data)

    def on_message_complete(self) -> None:
        if self.complete:
            return
        if 100 <= self.status < 200:
            self.status = 0
            self.delimited = False
            self.error = self.retry_after = ""
            return
        self.complete = True
        self.reusable = self.parser.should_keep_alive() and not self.error

    def _reply(self) -> None:
        post = self.post
        assert post is not None
        assert self.transport is not None
        self.post = None
        self.used = True
        if self.pump is not None and not self.pump.done():
            self.pump.cancel()
            self.reusable = False
        if self.transport.get_write_buffer_size():
            self.reusable = False  # answered before it had the whole message
        self.pump = None
        if self.error:
            reply = Reply(0, b"", self.error)
        else:
            reply = Reply(self.status, b"".join(self.parts), "", self.retry_after)
        self.host.remove(self)
        if self.reusable:
            self.host.free(self)  # may start the next post, which forgets this reply
        else:
            self.discard()  # closing it politely would wait for a peer that has stopped reading
        post.finish(reply)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        post, self.post = self.post, None
        if self.pump is not None:
            self.pump.cancel()
        self.writable.set()
        self.host.gone(self)
        if post is None:
            return
        if self.used and self.received == 0 and not post.resent:
            # the subscriber closed the idle connection just as we used it; the others that idle
            # here are no younger
            post.resent = True
            self.host.forget_idle()
            self.host.submit(post)
        elif self.error:
            post.finish(Reply(0, b"", self.error))
        elif self.status and not self.delimited and exc is None:
            post.finish(Reply(self.status, b"".join(self.parts), "", self.retry_after))
        else:
            why: object = exc
            if isinstance(exc, ssl.SSLError):
                why = tls_failure(exc)
            elif not self.used and self.host.target.scheme == "https":
                why = _BROKEN_OFF  # in TLS 1.3 our side is done before the other has said yes
            post.finish(Reply(0, b"", f"the connection broke before the reply was there: {why}"))

    def discard(self, reason: str = "") -> None:
        """Closes the connection at once and fails what is under way on it."""
        post, self.post = self.post, None
        if self.pump is not None:
            self.pump.cancel()
        self.host.remove(self)
        if self.transport is not None:
            self.transport.abort()
        if post is not None:
            post.finish(Reply(0, b"", reason))

    def expire(self, now: float) -> None:
        post = self.post
        if post is None:
            return
        read = self.host.sender.config.outgoing_http_timeout_sock_read
        if now > post.deadline:
            self.discard("no reply within outgoing_http_timeout_total")
        elif read is not None and now > self.touched + read:
            self.discard(f"silent for {read:g} s (outgoing_http_timeout_sock_read)")
