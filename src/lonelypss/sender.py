"""POSTs to subscribers over HTTP/1.1: connection reuse, timeouts, bounds, the raw reply.

The broadcaster's throughput is decided here, which is why this is a connection class of our own
over httptools (three to four times what a client library does on one core) and why a delivery is
an object with two methods instead of a task: `Post.head` is asked for the bytes when a connection
is free, `Post.finish` is told the reply, once, whatever happens.

A host is one scheme, name and port. Each has its own connections and its own bounded queue, so
that a slow or dead one delays nobody else. A host that was never reached is tried with one
connection, and when that fails everything waiting for it fails with it; each connection that works
allows two more, up to the limit. The limit is halved when a host says that it is busy, or is silent
for too long, and grows by one with each round of replies. A host that fails again and again is left
alone for a while (`breaker.py`).

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
from functools import partial
from heapq import heappop, heappush
from typing import TypeAlias

import httptools

from lonelypsp.spool import Body
from lonelypss.breaker import Breaker, State
from lonelypss.config import BroadcasterConfig, ConfigError
from lonelypss.filesend import send_file
from lonelypss.logs import Lines
from lonelypss.metrics import NO_METRICS, Metrics
from lonelypss.outcomes import BUSY_STATUSES, Host, Outcome, Reply
from lonelypss.poll import NO_POLL, REPLY
from lonelypss.resolver import Resolver
from lonelypss.urlpolicy import Address, Origin, Target, UrlPolicy, UrlRefused

log = logging.getLogger(__name__)

MAX_REPLY = 256 * 1024
"""Bytes of one reply, status line and headers included."""
ONE_WRITE = 256 * 1024
"""Up to this many bytes, a body in memory goes out together with its head."""
CHUNK = 256 * 1024
MOST_ADDRESSES = 4
"""Of one host that are tried."""
STOPPING = "the broadcaster is stopping"
SKIPPED = (
    "skipped: its host has failed too often (outgoing_breaker_failures), and is tried again soon"
)
TICK = 0.1
"""Seconds between two looks at the clock: how exact timeouts are."""
PROBES = 20
"""In one tick: hosts that failed are tried again at this rate, however many they are."""
REMEMBERED = 60.0
"""Seconds for which the limit of a host without connections is kept."""
UNWANTED = 600.0
"""Seconds without a post after which a host that failed is not tried again."""
MAX_BREAKERS = 65_536


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

    def unattended(self) -> Post | None:
        """The same, to be sent at once, so that nobody waits for it; None: that cannot be."""
        return self


class Unattended(Post):
    """A post of which somebody else was told that it failed."""

    __slots__ = ("_post",)

    def __init__(self, post: Post) -> None:
        super().__init__(post.target, post.body)
        self._post = post

    def head(self) -> bytes:
        return self._post.head()

    def finish(self, reply: Reply) -> None:
        """Nobody wants to know, and the host was noticed already."""


class _Trial(Post):
    """The post that shows whether a host answers again."""

    __slots__ = ("_breaker", "_post")

    def __init__(self, post: Post, breaker: Breaker) -> None:
        super().__init__(post.target, post.body)
        self.deadline = post.deadline
        self._post = post
        self._breaker = breaker

    def head(self) -> bytes:
        return self._post.head()

    def finish(self, reply: Reply) -> None:
        self._breaker.probing = False
        self._post.finish(reply)


Resolve: TypeAlias = Callable[[str], Awaitable[Sequence[Address]]]
"""All addresses of a name, best first; raises OSError: there are none."""


class Sender:
    """All connections of one broadcaster to its subscribers. Open it on a running loop.

    Args:
        policy: where they may lead; by default what `config` says.
        resolve: by default what the system says.
        metrics: where breakers are counted.

    Raises:
        ConfigError: a file that an option names cannot be used.

    Attributes:
        poll: is told of replies.
    """

    def __init__(
        self,
        config: BroadcasterConfig,
        policy: UrlPolicy | None = None,
        resolve: Resolve | None = None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self.config = config
        self.metrics = metrics
        self.policy = policy or UrlPolicy(config)
        self.poll = NO_POLL
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
        self._hosts: dict[Origin, _Host] = {}
        self._breakers: dict[Origin, _Failing] = {}
        self._pauses: list[tuple[float, int, _Failing]] = []
        """A heap: which open breakers are to be probed, and when."""
        self._opened = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """How many posts wait for a connection."""
        return sum(len(host.waiting) for host in self._hosts.values())

    def open(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self._none_left = asyncio.Event()

    def is_failing(self, target: Target) -> bool:
        """Whether the host has failed and not answered since."""
        return target.origin in self._breakers

    def breakers(self) -> dict[str, int]:
        """How many hosts there are in each state."""
        found = dict.fromkeys(State, 0)
        for breaker in self._breakers.values():
            found[breaker.state] += 1
        found[State.CLOSED] = sum(
            host.breaker is None or host.breaker.state is State.CLOSED
            for host in self._hosts.values()
        )
        return {state.value: number for state, number in found.items()}

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
        if self._timer is None:
            self._look_again()

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
        self._probe(now)
        if busy or self._pauses:
            self._look_again()

    def _look_again(self) -> None:
        if self._timer is None and not self.closed:
            self._timer = self.loop.call_later(TICK, self._tick)

    def failed(self, host: _Host, began: float, outcome: Outcome) -> bool:
        """Notes that something failed at a host; whether it is left alone from now on."""
        config = self.config
        if not config.outgoing_breaker_failures:
            return False
        breaker = host.breaker
        if breaker is None:
            breaker = host.breaker = self._breakers[host.target.origin] = _Failing(
                host.target,
                config.outgoing_breaker_failures,
                config.outgoing_breaker_pause,
                config.outgoing_breaker_max_pause,
            )
            if len(self._breakers) > MAX_BREAKERS:
                del self._breakers[next(iter(self._breakers))]
        now, before = self.loop.time(), breaker.state
        if not breaker.failed(
            now,
            began,
            connected=outcome is not Outcome.UNREACHABLE,
            timeout=outcome is Outcome.SILENT,
        ):
            return False
        if before is State.CLOSED:
            breaker.wanted = now
            log.warning("%s has failed too often, it is left alone for a while", breaker)
        self._opened += 1
        heappush(self._pauses, (breaker.until, self._opened, breaker))
        self._look_again()
        self.metrics.breaker(State.OPEN)
        return True

    def answers(self, host: _Host) -> None:
        """Notes that a host has sent a reply."""
        breaker, host.breaker = host.breaker, None
        if breaker is not None:
            self._breakers.pop(host.target.origin, None)
            if breaker.state is not State.CLOSED:
                self._closed(breaker)

    def _closed(self, breaker: _Failing) -> None:
        log.info("%s works again", breaker)
        self.metrics.breaker(State.CLOSED)

    def _probe(self, now: float) -> None:
        """Tries again, in the background, hosts whose pause is over."""
        left = PROBES
        while left and self._pauses and self._pauses[0][0] <= now:
            breaker = heappop(self._pauses)[2]
            origin = breaker.target.origin
            if self._breakers.get(origin) is not breaker or breaker.state is not State.OPEN:
                continue
            if now - breaker.wanted > UNWANTED:
                del self._breakers[origin]
                if origin in self._hosts:
                    self._hosts[origin].breaker = None
                continue
            if self.connections >= self.config.outgoing_connections and not self.idle:
                self._opened += 1
                heappush(self._pauses, (now + TICK, self._opened, breaker))
                return
            left -= 1
            host = self._hosts.get(origin)
            if host is None:
                host = self._hosts[origin] = _Host(self, breaker.target)
            self.probe(host, breaker, now)

    def probe(self, host: _Host, breaker: _Failing, now: float) -> None:
        """Makes a connection in the background, if there is a place for it."""
        if self.connections < self.config.outgoing_connections or self.idle:
            breaker.probe(now)
            self.metrics.breaker(State.HALF_OPEN)
            self.may_connect(host)
            host.connect(breaker)

    def connected(self, breaker: _Failing) -> None:
        """Notes that a probe has made its connection."""
        breaker.connected()
        if breaker.state is State.CLOSED:
            self._closed(breaker)

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
        self._breakers.clear()
        self._pauses.clear()


class _Failing(Breaker):
    """The breaker of one host."""

    __slots__ = ("target",)

    def __init__(self, target: Target, threshold: int, least: float, most: float) -> None:
        super().__init__(threshold, least, most)
        self.target = target

    def __str__(self) -> str:
        return f"{self.target.scheme}://{self.target.host}:{self.target.port}"


class _Host:
    """The connections to one origin and what waits for them.

    Attributes:
        limit: of its connections; floats, so that it can grow slowly.
        breaker: None: it works, as far as is known.
        strained: whether its limit is not the full one, or there is a breaker.
    """

    def __init__(self, sender: Sender, target: Target) -> None:
        self.sender = sender
        self.target = target
        self.idle: deque[_Connection] = deque()
        self.busy: set[_Connection] = set()
        self.waiting: deque[Post] = deque()
        self.expires = math.inf
        """No post in `waiting` expires earlier."""
        self.connecting: set[asyncio.Task[None]] = set()
        self.most = float(sender.config.outgoing_connections_per_host)
        self.limit = self.most
        self._cut = -math.inf
        self.breaker = sender._breakers.get(target.origin)
        self.strained = self.breaker is not None

    def submit(self, post: Post) -> None:
        if self.breaker is not None and self.breaker.state is not State.CLOSED:
            self._try(post, self.breaker)
        elif self.idle:
            self._start(post)
        elif self.sender.closed:
            self.fail_soon(post, STOPPING)
        elif len(self.waiting) < self.sender.config.outgoing_queue_per_host:
            self.enqueue(post)
        else:
            self.fail_soon(post, "the queue of this host is full (outgoing_queue_per_host)")

    def _start(self, post: Post) -> None:
        connection = self.idle.pop()
        del self.sender.idle[connection]
        connection.start(post)

    def _try(self, post: Post, breaker: _Failing) -> None:
        """Turns `post` away, or makes it the one that shows how the host is."""
        breaker.wanted = now = self.sender.loop.time()
        trial = post.unattended() if breaker.state is State.HALF_OPEN else None
        if trial is not post:
            self.fail_soon(post, SKIPPED, Outcome.SKIPPED)
        if trial is not None and (trial is post or self.idle) and breaker.trial():
            trial = _Trial(trial, breaker)
            if self.idle:
                self._start(trial)
            else:
                self.enqueue(trial)
        elif trial is post:
            self.fail_soon(post, SKIPPED, Outcome.SKIPPED)
        elif trial is not None and not breaker.probing:
            self.sender.probe(self, breaker, now)  # it has closed the connection meanwhile

    def enqueue(self, post: Post) -> None:
        """Makes `post` wait for a connection."""
        connect = self.sender.config.outgoing_http_timeout_connect
        post.expires = post.deadline
        if connect is not None:
            post.expires = min(post.deadline, self.sender.loop.time() + connect)
        self.expires = min(self.expires, post.expires)
        self.waiting.append(post)
        self.advance()

    def fail_soon(self, post: Post, reason: str, outcome: Outcome = Outcome.NOT_SENT) -> None:
        self.sender.loop.call_soon(post.finish, Reply(0, b"", reason, "", outcome))

    def advance(self) -> None:
        """Opens as many connections as there is waiting work for, slowly at first."""
        while len(self.waiting) > len(self.connecting) and not self.sender.closed:
            established = len(self.busy) + len(self.idle)
            if (
                len(self.connecting) > 2 * established
                or established + len(self.connecting) >= int(self.limit)
                or not self.sender.may_connect(self)
            ):
                return
            self.connect()

    def connect(self, breaker: _Failing | None = None) -> None:
        """Opens a connection, whose place was taken; it may be one that `breaker` waits for."""
        connection = _Connection(self)
        # it outlives the message for which it is opened, and is no part of its trace
        connecting = self._connect(connection, breaker)
        task = self.sender.loop.create_task(connecting, context=Context())
        self.connecting.add(task)
        task.add_done_callback(partial(self._attempted, connection))

    # what its replies say about it

    def answered(self, status: int, began: float) -> None:
        """A reply came to what was sent at `began`."""
        if self.breaker is not None:
            self.sender.answers(self)
        if status in BUSY_STATUSES:
            self._halve(began)
        else:
            self.limit = min(self.most, self.limit + 1.0 / self.limit)
        self.strained = self.limit < self.most

    def failed(self, began: float, outcome: Outcome) -> None:
        """No reply came to what was sent, or no connection was made, at `began`."""
        if outcome.host is Host.UNKNOWN:
            return
        if outcome.host is Host.SILENT:
            self._halve(began)
        if self.sender.failed(self, began, outcome):
            waiting, self.waiting = self.waiting, deque()
            self.forget_idle()
            for post in waiting:
                post.finish(Reply(0, b"", SKIPPED, "", Outcome.SKIPPED))
        self.strained = self.limit < self.most or self.breaker is not None

    def _halve(self, began: float) -> None:
        """Once for all that is under way."""
        if began < self._cut:
            return
        self._cut = self.sender.loop.time()
        established = len(self.busy) + len(self.idle) + 1  # the one that was just taken out
        self.limit = max(1.0, min(self.limit, established) / 2)
        while self.idle and len(self.busy) + len(self.idle) > self.limit:
            self.idle[0].discard()

    async def _connect(self, connection: _Connection, breaker: _Failing | None) -> None:
        failure = ""
        began = self.sender.loop.time()
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
            self._unreachable(began, failure)
        else:
            if breaker is not None and breaker is self.breaker:
                self.sender.connected(breaker)
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

    def _unreachable(self, began: float, reason: str) -> None:
        waiting = self.waiting
        if not self.busy and not self.idle:
            self.waiting = deque()
        else:
            waiting = deque([waiting.popleft()] if waiting else [])
        self.failed(began, Outcome.UNREACHABLE)
        for post in waiting:
            post.finish(Reply(0, b"", reason, "", Outcome.UNREACHABLE))

    def free(self, connection: _Connection) -> None:
        """Gives the connection, which is in neither set, its next work."""
        if self.sender.closed or connection.is_closing:
            connection.discard()
        elif self.sender.starved and not (self.waiting and self.sender.may_keep(connection)):
            connection.discard()  # its place is worth more elsewhere
        elif self.strained and len(self.busy) + len(self.idle) >= int(self.limit):
            connection.discard()
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
        return bool(self.busy or self.waiting or self.connecting) or now < self._cut + REMEMBERED

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
        self.began = 0.0

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
        self.touched = self.began = self.host.sender.loop.time()
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
        sender = self.host.sender
        sender.poll.happened(REPLY)
        self.touched = sender.loop.time()
        self.received += len(data)
        if self.received > MAX_REPLY:
            self.discard(f"the reply is larger than {MAX_REPLY:,} bytes", Outcome.BROKEN)
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.discard("the subscriber wants another protocol (status 101)", Outcome.BROKEN)
        except (httptools.HttpParserError, httptools.HttpParserCallbackError) as e:
            self.discard(f"the reply is not HTTP: {e}", Outcome.BROKEN)
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
        host = self.host
        host.remove(self)
        if self.error:
            reply = Reply(0, b"", self.error, "", Outcome.BROKEN)
            host.failed(self.began, Outcome.BROKEN)
        else:
            reply = Reply(self.status, b"".join(self.parts), "", self.retry_after)
            if host.strained or self.status != 200:
                host.answered(self.status, self.began)
        if self.reusable:
            host.free(self)  # may start the next post, which forgets this reply
        else:
            self.discard()  # closing it politely would wait for a peer that has stopped reading
        if host.strained:
            host.advance()
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
            if self.host.sender.closed:
                self.host.fail_soon(post, STOPPING)
            else:
                self.host.enqueue(post)
        elif self.error:
            self._broken(post, self.error)
        elif self.status and not self.delimited and exc is None:
            self.host.answered(self.status, self.began)
            post.finish(Reply(self.status, b"".join(self.parts), "", self.retry_after))
        else:
            why: object = exc
            if isinstance(exc, ssl.SSLError):
                why = tls_failure(exc)
            elif not self.used and self.host.target.scheme == "https":
                why = _BROKEN_OFF  # in TLS 1.3 our side is done before the other has said yes
            self._broken(post, f"the connection broke before the reply was there: {why}")

    def _broken(self, post: Post, reason: str) -> None:
        self.host.failed(self.began, Outcome.BROKEN)
        post.finish(Reply(0, b"", reason, "", Outcome.BROKEN))

    def discard(self, reason: str = "", outcome: Outcome = Outcome.NOT_SENT) -> None:
        """Closes the connection at once and fails what is under way on it."""
        post, self.post = self.post, None
        if self.pump is not None:
            self.pump.cancel()
        self.host.remove(self)
        if self.transport is not None:
            self.transport.abort()
        if post is not None:
            self.host.failed(self.began, outcome)
            post.finish(Reply(0, b"", reason, "", outcome))

    def expire(self, now: float) -> None:
        post = self.post
        if post is None:
            return
        read = self.host.sender.config.outgoing_http_timeout_sock_read
        if now > post.deadline:
            self.discard("no reply within outgoing_http_timeout_total", Outcome.SILENT)
        elif read is not None and now > self.touched + read:
            self.discard(f"silent for {read:g} s (outgoing_http_timeout_sock_read)", Outcome.SILENT)
