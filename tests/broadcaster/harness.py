"""A broadcaster under uvicorn in this process, subscribers of bare sockets, signed requests."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import uvicorn

from lonelypsp import bodies
from lonelypsp.bodies import (
    BROADCASTER_ENDPOINTS,
    NotifyHead,
    ReceiveHead,
    ResponseConfirmMissed,
    ResponseConfirmReceive,
    ResponseNotify,
)
from lonelypsp.errors import AuthResult
from lonelypsp.etag import strong_etag
from lonelypsp.signing import AuthConfig, Hmac, Nothing
from lonelypsp.wire import HeadParser, decode, encode
from lonelypss.app import App, Broadcaster
from lonelypss.config import BroadcasterConfig
from lonelypss.store.base import Kind, Store, Subscription

DEADLINE = 10.0
UP, DOWN = b"u" * 64, b"d" * 64
FAST_NOTICES: dict[str, Any] = {
    "missed_expo_factor": 0.0,
    "missed_constant": 0.0,
    "missed_jitter": 0.0,
}


def hmac_auth() -> AuthConfig:
    """One peer's authenticators; each has replay guards of its own."""
    return AuthConfig(Hmac(UP), Hmac(DOWN))


NO_AUTH = AuthConfig(Nothing(), Nothing())


def config(**options: Any) -> BroadcasterConfig:
    return BroadcasterConfig(**{"db": "sqlite://", "sweep_missed_interval": 0.1, **options})


def within(seconds: float = DEADLINE) -> asyncio.Timeout:
    """Whatever a test waits for, it waits in here."""
    return asyncio.timeout(seconds)


async def until_async(condition: Callable[[], Awaitable[Any]], seconds: float = DEADLINE) -> None:
    async with within(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


# HTTP, by hand


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes


async def exchange(port: int, data: bytes) -> Response:
    """Sends `data` on a connection of its own and reads one response."""
    async with within():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            with contextlib.suppress(ConnectionError):  # refused early: the answer is still there
                writer.write(data)
                await writer.drain()
            return await read_response(reader)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def read_response(reader: asyncio.StreamReader, *, head: bool = False) -> Response:
    text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status, *lines = text.removesuffix("\r\n\r\n").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    length = 0 if head else int(headers["content-length"])
    return Response(int(status.split()[1]), headers, await reader.readexactly(length))


def request_bytes(
    path: str,
    body: bytes = b"",
    *,
    method: str = "POST",
    authorization: str | bytes | None = None,
    length: int | None = None,
    headers: Iterable[bytes] = (),
) -> bytes:
    head = [
        f"{method} {path} HTTP/1.1".encode(),
        b"Host: broadcaster",
        b"Content-Length: %d" % (len(body) if length is None else length),
    ]
    if authorization is not None:
        value = authorization.encode() if isinstance(authorization, str) else authorization
        head.append(b"Authorization: " + value)
    head += headers
    return b"\r\n".join(head) + b"\r\n\r\n" + body


# Signed requests


@dataclass
class Signed:
    """A request with the value that authorizes it."""

    path: str
    body: bytes
    authorization: str | None

    def bytes(self, **options: Any) -> bytes:
        return request_bytes(self.path, self.body, authorization=self.authorization, **options)


_identifiers = count(1)


class Peer:
    """Makes the requests of a client and checks the answers."""

    def __init__(self, auth: AuthConfig = NO_AUTH, *, clock: Callable[[], float] = time.time):
        self.auth = auth
        self.clock = clock

    def sign(self, path: str, body: bytes, **fields: Any) -> Signed:
        operation = BROADCASTER_ENDPOINTS[path].request_operation
        value = self.auth.to_broadcaster.authorize(
            operation, {"tracing": b"", **fields}, self.clock()
        )
        return Signed(path, body, value)

    def subscribe(
        self,
        url: str,
        topic: bytes = b"t",
        recovery: str | None = None,
        *,
        verb: str = "subscribe",
        tracing: bytes = b"",
    ) -> Signed:
        cls: Any = bodies.SubscribeExact if verb == "subscribe" else bodies.UnsubscribeExact
        more = (recovery,) if verb == "subscribe" else ()
        return self.sign(
            f"/v1/{verb}/exact",
            encode(cls(url, topic, *more, tracing)),
            url=url,
            recovery=recovery,
            topic=topic,
            tracing=tracing,
        )

    def subscribe_glob(
        self, url: str, glob: str, recovery: str | None = None, *, verb: str = "subscribe"
    ) -> Signed:
        cls: Any = bodies.SubscribeGlob if verb == "subscribe" else bodies.UnsubscribeGlob
        more = (recovery,) if verb == "subscribe" else ()
        body = encode(cls(url, glob, *more))
        return self.sign(f"/v1/{verb}/glob", body, url=url, recovery=recovery, glob=glob)

    def check(self, url: str) -> Signed:
        body = encode(bodies.CheckSubscriptions(b"", url))
        return self.sign("/v1/check_subscriptions", body, url=url)

    def set(
        self,
        url: str,
        exact: tuple[tuple[bytes, str | None], ...] = (),
        globs: tuple[tuple[str, str | None], ...] = (),
    ) -> Signed:
        etag = strong_etag(url, exact, globs)
        body = encode(bodies.SetSubscriptions(b"", url, 0, etag, exact, globs))
        return self.sign("/v1/set_subscriptions", body, url=url, etag_format=0, etag=etag)

    def notify(
        self,
        topic: bytes = b"t",
        message: bytes = b"hello",
        *,
        identifier: bytes | None = None,
        tracing: bytes = b"",
        sha512: bytes | None = None,
        length: int | None = None,
    ) -> Signed:
        sha512 = hashlib.sha512(message).digest() if sha512 is None else sha512
        identifier = next(_identifiers).to_bytes(4, "big") if identifier is None else identifier
        head = NotifyHead(
            topic, sha512, tracing, identifier, len(message) if length is None else length
        )
        return self.sign(
            "/v1/notify",
            encode(head) + message,
            topic=topic,
            identifier=identifier,
            sha512=sha512,
            tracing=tracing,
        )

    def count(self, response: Response, request: Signed) -> int:
        """How many subscribers a notify response reports, its authorization verified."""
        assert response.status == 200, response
        found = HeadParser(NotifyHead).feed(request.body)
        assert found is not None
        head, answer = found[0], decode(ResponseNotify, response.body)
        assert answer.identifier == head.identifier
        fields = {
            "tracing": answer.tracing,
            "identifier": head.identifier,
            "subscribers": answer.subscribers,
            "topic": head.topic,
            "sha512": head.sha512,
        }
        result = self.auth.to_subscriber.check(
            "CONFIRM_NOTIFY", fields, answer.authorization, self.clock()
        )
        assert result is AuthResult.OK
        return answer.subscribers


# A broadcaster in this process


class Server(uvicorn.Server):
    """uvicorn that announces when it is up, and neither polls nor takes over signals."""

    def __init__(self, app: Any) -> None:
        super().__init__(
            uvicorn.Config(app, port=0, lifespan="on", log_config=None, ws="none", loop="asyncio")
        )
        self.up = asyncio.Event()
        self.stop = asyncio.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.up.set()

    async def main_loop(self) -> None:
        await self.stop.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    @property
    def port(self) -> int:
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def served(app: Any) -> AsyncIterator[int]:
    """The port on which `app` answers."""
    server = Server(app)
    task = asyncio.create_task(server.serve())
    up = asyncio.create_task(server.up.wait())
    async with within():
        await asyncio.wait([task, up], return_when=asyncio.FIRST_COMPLETED)
    if not up.done():
        up.cancel()
        await task
        raise AssertionError("the server did not start")
    try:
        yield server.port
    finally:
        server.stop.set()
        async with within():
            await task


@dataclass
class Running:
    """A broadcaster behind a socket."""

    broadcaster: Broadcaster
    port: int
    peer: Peer

    @property
    def store(self) -> Store:
        return self.broadcaster.store

    async def send(self, request: Signed) -> Response:
        return await exchange(self.port, request.bytes())

    async def ok(self, request: Signed) -> Response:
        response = await self.send(request)
        assert response.status == 200, response
        return response

    async def notify(self, topic: bytes = b"t", message: bytes = b"hello", **options: Any) -> int:
        request = self.peer.notify(topic, message, **options)
        return self.peer.count(await self.send(request), request)


@contextlib.asynccontextmanager
async def broadcaster(
    auth: Callable[[], AuthConfig] = lambda: NO_AUTH, store: Store | None = None, **options: Any
) -> AsyncIterator[Running]:
    one = Broadcaster(config(auth=auth(), **options), store)
    async with served(App(one)) as port:
        yield Running(one, port, Peer(auth()))


# Subscribers


@dataclass
class Received:
    """What a subscriber got in one request."""

    line: str
    headers: dict[str, str]
    body: bytes
    connection: int

    @property
    def path(self) -> str:
        return self.line.split()[1]

    @property
    def head(self) -> ReceiveHead:
        return self._parsed()[0]

    @property
    def message(self) -> bytes:
        return self._parsed()[1]

    @property
    def missed(self) -> bytes:
        return decode(bodies.Missed, self.body).topic

    def _parsed(self) -> tuple[ReceiveHead, bytes]:
        found = HeadParser(ReceiveHead).feed(self.body)
        assert found is not None
        return found


Answer = bytes | None
Handler = Callable[[Received], Awaitable[Answer] | Answer]


class Close(Exception):
    """Raised by a handler: close the connection after these bytes."""

    def __init__(self, data: bytes = b"", *, reset: bool = False) -> None:
        self.data = data
        self.reset = reset


@dataclass
class Subscriber:
    """A server of bare sockets. `handler` gives the exact bytes to answer with; None: nothing."""

    handler: Handler | None = None
    auth: AuthConfig = field(default_factory=lambda: NO_AUTH)
    secure: Any = None
    requests: list[Received] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    most_open: int = 0

    async def __aenter__(self) -> Subscriber:
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", 0, ssl=self.secure, limit=1 << 20
        )
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def base(self) -> str:
        return f"{'https' if self.secure else 'http'}://localhost:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.base}/v1/receive"

    @property
    def recovery(self) -> str:
        return f"{self.base}/v1/recover"

    async def got(self, number: int) -> list[Received]:
        """Waits until so many requests have come."""
        async with within(), self._changed:
            await self._changed.wait_for(lambda: len(self.requests) >= number)
        return self.requests

    def drop_all(self) -> None:
        """Closes every connection."""
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        number = self.connections
        try:
            while await self._one(number, reader, writer):
                pass
        except Close as e:
            with contextlib.suppress(ConnectionError):
                writer.write(e.data)
                if e.reset:
                    writer.transport.abort()
                else:
                    await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _one(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        pairs = [text.split(": ", 1) for text in lines]
        headers = {name.lower(): value for name, value in pairs}
        body = await self._body(int(headers["content-length"]), reader, writer)
        received = Received(line, headers, body, number)
        async with self._changed:
            self.requests.append(received)
            self._changed.notify_all()
        answer = (self.handler or self.confirm)(received)
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer is None:
            await reader.read()  # until the broadcaster gives up
            return False
        writer.write(answer)
        await writer.drain()
        return True

    async def _body(
        self, length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes:
        return await reader.readexactly(length)

    def confirm(self, received: Received) -> bytes:
        """The right answer to a message or a notice."""
        if "/v1/recover" in received.path:
            return reply(confirm_missed(received, self.recovery, self.auth))
        return reply(confirm_receive(received, self.url, self.auth))


def confirm_receive(
    received: Received,
    url: str,
    auth: AuthConfig = NO_AUTH,
    number: int = 1,
    identifier: bytes | None = None,
) -> bytes:
    identifier = received.head.identifier if identifier is None else identifier
    fields = {"tracing": b"", "identifier": identifier, "num_subscribers": number, "url": url}
    value = auth.to_broadcaster.authorize("CONFIRM_RECEIVE", fields, time.time())
    return encode(ResponseConfirmReceive(value, b"", identifier, number))


def confirm_missed(received: Received, recovery: str, auth: AuthConfig = NO_AUTH) -> bytes:
    fields = {"tracing": b"", "topic": received.missed, "url": recovery}
    value = auth.to_broadcaster.authorize("CONFIRM_MISSED", fields, time.time())
    return encode(ResponseConfirmMissed(value))


def reply(body: bytes = b"", status: int = 200, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def free_port() -> int:
    """A port on which nobody listens."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


async def subscribed(store: Store, url: str, topic: bytes, recovery: str | None = None) -> None:
    assert await store.subscribe(Kind.EXACT, topic, url, recovery)


async def rows(store: Store, url: str) -> list[Subscription]:
    return await store.subscriptions(url)
