"""Where the processor time of a notify over HTTP goes: µs per step, the least of many rounds.

    python benchmarks/budget.py [rounds]

One message of 200 bytes, hmac both ways, one subscriber, one broadcaster on SQLite. Each role runs
in this process with everything but its sockets: what the other end would do is done by the
benchmark and not counted. `bare exchange` is what the sockets cost: the same bytes between two
processes that do nothing else, on 32 connections. Meant for an idle machine; the least of all
rounds comes near to that on a busy one.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import hashlib
import itertools
import os
import resource
import sqlite3
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httptools
import uvloop
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from lonelypsc.config.config import HttpPubSubConfig
from lonelypsc.endpoints import ReceiveEndpoint
from lonelypsc.http_client import HttpPubSubClient
from lonelypsc.http_connection import _Connection
from lonelypsp.bodies import (
    NotifyHead,
    ReceiveHead,
    ResponseConfirmReceive,
    ResponseNotify,
    smallest_trace,
)
from lonelypsp.guard import HttpLimits, guarded
from lonelypsp.replay import FileReplayGuard, ReplayGuard
from lonelypsp.shortcut import with_shortcut
from lonelypsp.signing import AuthConfig, Hmac
from lonelypsp.wire import HeadParser, decode, encode
from lonelypss.app import create_app
from lonelypss.config import BroadcasterConfig
from lonelypss.sender import Reply
from lonelypss.server import http_protocol
from lonelypss.store.base import Kind

BODY = b"x" * 200
SHA512 = hashlib.sha512(BODY).digest()
TOPIC = b"one"
URL = "http://127.0.0.1:9/v1/receive"
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: %d\r\n\r\n%b"
IN_FLIGHT = 32


def keys(replay: Any = None) -> AuthConfig:
    """Both directions, in a peer of its own."""
    return AuthConfig(
        Hmac(b"u" * 64, replay=replay or ReplayGuard()),
        Hmac(b"d" * 64, replay=replay or ReplayGuard()),
    )


PEER = keys()


class Elsewhere:
    """The time that the benchmark itself needs, which is not counted."""

    def __init__(self) -> None:
        self.spent = 0.0

    def __enter__(self) -> None:
        self._begun = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.spent += time.thread_time() - self._begun


ELSEWHERE = Elsewhere()


class Transport(asyncio.Transport):
    """Hands on what is written."""

    def __init__(self, on_write: Callable[[bytes], None]) -> None:
        super().__init__()
        self._on_write = on_write

    def write(self, data: Any) -> None:
        self._on_write(data)

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


async def least(rounds: int, act: Callable[[Any], Awaitable[None]], prepare: Any) -> float:
    """µs per message."""
    best, number = float("inf"), 200
    for _ in range(rounds):
        prepared = [prepare() for _ in range(number)]
        gc.collect()
        gc.freeze()
        ELSEWHERE.spent = 0.0
        begun = time.thread_time()
        for one in prepared:
            await act(one)
        spent = time.thread_time() - begun - ELSEWHERE.spent
        best = min(best, spent / number * 1e6)
    return best


def request(path: str, body: bytes, authorization: str | None, *more: str) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1:3003",
        "User-Agent: lonelyps",
        "Accept-Encoding: identity",
        "Content-Type: application/octet-stream",
        f"Content-Length: {len(body)}",
        *more,
        f"Authorization: {authorization}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + body


# The roles


async def publisher(rounds: int) -> float:
    loop = asyncio.get_running_loop()
    config = HttpPubSubConfig(
        bind={"type": "none"},
        host="http://127.0.0.1:9",
        broadcasters=[{"host": "http://127.0.0.1:1"}],
        auth=keys(),
    )
    async with HttpPubSubClient(config) as client:
        pool = client._transport._broadcasters._pool  # type: ignore[attr-defined]
        origin = pool.target("http://127.0.0.1:1/v1/notify").origin
        connection = _Connection(origin)
        origin.places.add(connection)

        def reply(data: bytes) -> None:
            with ELSEWHERE:
                found = HeadParser(NotifyHead).feed(data.partition(b"\r\n\r\n")[2])
                assert found is not None
                identifier, tracing = found[0].identifier, smallest_trace(1, 2)
                fields = {"topic": TOPIC, "identifier": identifier, "sha512": SHA512}
                fields |= {"tracing": tracing, "subscribers": 1}
                value = PEER.to_subscriber.authorize("CONFIRM_NOTIFY", fields, time.time())
                body = encode(ResponseNotify(value, tracing, 1, identifier))
                loop.call_soon(connection.data_received, OK % (len(body), body))

        connection.connection_made(Transport(reply))
        origin.free(connection)

        async def act(_: None) -> None:
            await client.notify(topic=TOPIC, data=BODY)

        best = await least(rounds, act, lambda: None)
        connection.connection_lost(None)
        return best


async def fed(protocol_class: Any, app: Any, rounds: int, prepare: Any) -> float:
    """What a server spends on requests that `prepare` makes."""
    config = Config(app, interface="asgi3", lifespan="off", ws="none", log_config=None)
    config.load()
    written: list[bytes] = []
    protocol = protocol_class(config=config, server_state=ServerState(), app_state={})
    protocol.connection_made(Transport(written.append))

    async def act(data: bytes) -> None:
        written.clear()
        protocol.data_received(data)
        while not written:
            await asyncio.sleep(0)
        assert written[0].startswith(b"HTTP/1.1 200"), written[0]

    try:
        return await least(rounds, act, prepare)
    finally:
        protocol.connection_lost(None)


def notify_request() -> bytes:
    identifier = os.urandom(8)
    head = encode(NotifyHead(TOPIC, SHA512, b"", identifier, len(BODY)))
    fields = {"topic": TOPIC, "identifier": identifier, "sha512": SHA512, "tracing": b""}
    value = PEER.to_broadcaster.authorize("NOTIFY", fields, time.time())
    return request("/v1/notify", head + BODY, value)


async def broadcaster(rounds: int, directory: Path) -> float:
    loop = asyncio.get_running_loop()
    config = BroadcasterConfig(
        db=f"sqlite:///{directory / 'subscriptions.db'}",
        auth=keys(FileReplayGuard(str(directory / "replay"))),
    )
    app = create_app(config)
    async with app.broadcaster as running:
        await running.store.subscribe(Kind.EXACT, TOPIC, URL, None)

        class Sender:
            policy = running.sender.policy

            def post(self, post: Any) -> None:
                post.head()
                with ELSEWHERE:
                    fields = {"tracing": b"", "identifier": post.identifier}
                    fields |= {"num_subscribers": 1, "url": URL}
                    sign = PEER.to_broadcaster.authorize
                    value = sign("CONFIRM_RECEIVE", fields, time.time())
                    body = encode(ResponseConfirmReceive(value, b"", post.identifier, 1))
                    loop.call_soon(post.finish, Reply(200, body))

        real, running.fanout.sender = running.fanout.sender, Sender()  # type: ignore[assignment]
        try:
            protocol_class = http_protocol(config, running.routes.table)
            return await fed(protocol_class, app, rounds, notify_request)
        finally:
            running.fanout.sender = real


def receive_request() -> bytes:
    identifier = os.urandom(8)
    head = encode(ReceiveHead(b"", TOPIC, identifier, len(BODY)))
    fields = {
        "topic": TOPIC,
        "identifier": identifier,
        "sha512": SHA512,
        "url": URL,
        "tracing": b"",
    }
    value = PEER.to_subscriber.authorize("RECEIVE", fields, time.time())
    digest = base64.b64encode(SHA512).decode()
    return request("/v1/receive", head + BODY, value, f"Repr-Digest: sha-512={digest}")


async def subscriber(rounds: int) -> float:
    config = HttpPubSubConfig(
        bind={"type": "uvicorn", "host": "127.0.0.1", "port": 0},
        host="http://127.0.0.1:9",
        broadcasters=[{"host": "http://127.0.0.1:1"}],
        auth=keys(),
    )
    async with HttpPubSubClient(config) as client:
        transport: Any = client._transport
        transport.ensure = transport.release = lambda topics: asyncio.sleep(0)
        async with client.subscribe_exact(TOPIC) as subscription:
            endpoint: Any = ReceiveEndpoint(transport._receiver)
            base = with_shortcut(HttpToolsProtocol, {"/v1/receive": endpoint})
            protocol_class = guarded(base, httptools, HttpLimits())
            messages = await subscription.messages()

            def drained() -> bytes:
                for buffer in client._buffers:
                    while (body := buffer.take()) is not None:
                        body.release()
                return receive_request()

            best = await fed(protocol_class, endpoint, rounds, drained)
            await messages.aclose() if hasattr(messages, "aclose") else None
            return best


# The steps that all of them are made of


def step(rounds: int, act: Callable[[], object]) -> float:
    best, number = float("inf"), 200
    for _ in range(rounds):
        begun = time.thread_time()
        for _ in range(number):
            act()
        best = min(best, (time.thread_time() - begun) / number * 1e6)
    return best


def steps(rounds: int, directory: Path) -> dict[str, float]:
    now = time.time()
    fields = {"topic": TOPIC, "identifier": b"12345678", "sha512": SHA512, "tracing": b""}
    fields |= {"url": URL, "num_subscribers": 1, "subscribers": 1}
    value = PEER.to_subscriber.authorize("CONFIRM_NOTIFY", fields, now)
    codes = (number.to_bytes(16) + bytes(48) for number in itertools.count())
    memory, guard = ReplayGuard(), FileReplayGuard(str(directory / "steps"))
    database = sqlite3.connect(directory / "versions", isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    reply = encode(ResponseNotify(value, b"", 1, b"12345678"))
    head = NotifyHead(TOPIC, SHA512, b"", b"12345678", len(BODY))
    sign, check = PEER.to_subscriber.authorize, PEER.to_subscriber.check
    return {
        "SHA-512 of the message": step(rounds, lambda: hashlib.sha512(BODY).digest()),
        "sign": step(rounds, lambda: sign("CONFIRM_NOTIFY", fields, now)),
        "verify": step(rounds, lambda: check("CONFIRM_NOTIFY", fields, value, now)),
        "remember a signature, in memory": step(
            rounds, lambda: memory.mark(next(codes), now, now + 120, now)
        ),
        "remember a signature, in a file": step(
            rounds, lambda: guard.mark(next(codes), now, now + 120, now)
        ),
        "ask SQLite whether anything has changed": step(
            rounds, lambda: database.execute("PRAGMA data_version").fetchone()
        ),
        "encode a head": step(rounds, lambda: encode(head)),
        "decode a reply": step(rounds, lambda: decode(ResponseNotify, reply)),
    }


# The sockets


class Bounce(asyncio.Protocol):
    """Answers `size` bytes with as many."""

    def __init__(self, size: int, done: Callable[[], bool]) -> None:
        self._size, self._done, self._got = size, done, 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._got += len(data)
        if self._got >= self._size:
            self._got = 0
            if self._done():
                self.transport.write(b"x" * self._size)


async def bare_exchange(rounds: int, size: int = 500) -> float:
    """Processor time of one end, in µs per request and reply."""
    loop = asyncio.get_running_loop()
    child = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "bounce", str(size), stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    port = int(await child.stdout.readline())
    best = float("inf")
    for _ in range(rounds):
        left, over = 3000, loop.create_future()

        def more() -> bool:
            nonlocal left
            left -= 1
            if left == 0:
                over.set_result(None)  # noqa: B023
            return left > 0

        connections = [
            (await loop.create_connection(lambda: Bounce(size, more), "127.0.0.1", port))[0]
            for _ in range(IN_FLIGHT)
        ]
        begun = resource.getrusage(resource.RUSAGE_SELF)
        for connection in connections:
            connection.write(b"x" * size)
        await over
        ended = resource.getrusage(resource.RUSAGE_SELF)
        spent = ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime
        best = min(best, spent / 3000 * 1e6)
        for connection in connections:
            connection.abort()
    child.terminate()
    await child.wait()
    return best


async def bounce(size: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Bounce(size, lambda: True), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def main(rounds: int) -> None:
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = {
            "publisher": await publisher(rounds),
            "broadcaster": await broadcaster(rounds, directory),
            "subscriber": await subscriber(rounds),
            **steps(rounds, directory),
        }
        rows["bare exchange, one end"] = await bare_exchange(max(3, rounds // 5))
    print("| | µs |\n|---|--:|")
    for name, microseconds in rows.items():
        print(f"| {name} | {microseconds:.1f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["bounce"]:
        uvloop.run(bounce(int(sys.argv[2])))
    uvloop.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 40))
