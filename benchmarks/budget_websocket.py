"""Where the processor time of a websocket message goes: µs per message, the least of many rounds.

    python benchmarks/budget_websocket.py [rounds]

A message of 200 bytes, without authorization and with hmac both ways; a broadcaster on SQLite. Each
role runs in this process with everything but its sockets, as in `budget.py`: what the other end
would do is done by the benchmark and not counted.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import hashlib
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
from budget import Transport, keys
from uvicorn.config import Config
from uvicorn.server import ServerState
from websockets.frames import Frame, Opcode
from websockets.server import ServerProtocol

import lonelypsc.ws_client
from lonelypsc.config.ws_config import make_websocket_pub_sub_config
from lonelypsc.ws_connection import Socket
from lonelypsp import session as s
from lonelypsp.frames import Cutter, framed
from lonelypsp.replay import FileReplayGuard
from lonelypsp.signing import AuthConfig, Nothing
from lonelypss.app import create_app
from lonelypss.config import BroadcasterConfig
from lonelypss.server import websocket_protocol

BODY = b"x" * 200
SHA512 = hashlib.sha512(BODY).digest()
TOPIC = b"one"
CROWD = 200
BURST = 8
HEAD_ENDS = b"\r\n\r\n"

Least = dict[str, float]


class Wire(Transport):
    """Keeps what is written, for the other end to take."""

    def __init__(self) -> None:
        super().__init__(self._keep)
        self._kept: list[bytes] = []

    def _keep(self, data: bytes) -> None:
        self._kept.append(data)

    def unwrap(self) -> Wire:
        return self

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def take(self) -> bytes:
        data = b"".join(self._kept)
        self._kept.clear()
        return data


def auth(kind: str, replay: Any = None) -> AuthConfig:
    if kind == "none":
        return AuthConfig(Nothing(), Nothing())
    return keys(replay)


class Frames:
    """Cuts what one end has written into messages."""

    def __init__(self, wire: Wire, mask: Any) -> None:
        self._wire = wire
        self._cutter = Cutter(mask, 1 << 20, lambda data: True)

    def __call__(self) -> list[bytes]:
        messages: list[bytes] = []
        self._cutter.cut(self._wire.take(), messages)
        return messages


class Spent:
    """The least time of each step."""

    def __init__(self) -> None:
        self.least: Least = defaultdict(lambda: float("inf"))

    @contextmanager
    def on(self, step: str, messages: int) -> Iterator[None]:
        begun = time.thread_time()
        yield
        spent = (time.thread_time() - begun) / messages * 1e6
        self.least[step] = min(self.least[step], spent)


def payload(number: int) -> s.Payload:
    return s.Payload(TOPIC, b"%08d" % number, len(BODY), SHA512)


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0)


# The broadcaster


class Peer:
    """A client of the broadcaster."""

    def __init__(self, kind: str, config: Config) -> None:
        self.wire = Wire()
        self.protocol = websocket_protocol()(config, ServerState(), {})
        self.protocol.connections.add(self.protocol)
        self.protocol.connection_made(self.wire)
        self.session = s.SubscriberSession(auth(kind))
        self.frames = Frames(self.wire, None)

    async def open(self, *topics: bytes) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        self.protocol.data_received(
            "GET /v1/websocket HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        await until(lambda: self.wire._kept)
        self.send(self.session.configure(time.time()))
        await self._until(lambda: self.session.phase is s.Phase.OPEN)
        for topic in topics:
            self.send(self.session.subscribe_exact(topic, time.time()))
        await self.answered()

    async def _until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            await asyncio.sleep(0)
            for frame in self.frames() if self.wire._kept else ():
                self.session.receive(frame, time.time())

    async def answered(self) -> None:
        """Returns when nothing more is due."""
        await self._until(lambda: self.session.room == self.session.limits.unanswered)

    def send(self, *frames: bytes) -> None:
        self.protocol.data_received(client_frames(*frames))

    def answers(self) -> bytes:
        """To what has arrived."""
        events = [self.session.receive(frame, time.time()) for frame in self.frames()]
        return client_frames(*(f for e in events for f in self.session.answer(e, time.time())))


def client_frames(*messages: bytes) -> bytes:
    return b"".join(Frame(Opcode.BINARY, m).serialize(mask=True) for m in messages)


async def broadcaster(kind: str, subscribers: int, burst: int, rounds: int) -> Least:
    spent = Spent()
    with tempfile.TemporaryDirectory() as directory:
        replay = FileReplayGuard(str(Path(directory) / "replay"))
        app = create_app(
            BroadcasterConfig(db=f"sqlite:///{directory}/database", auth=auth(kind, replay))
        )
        config = Config(app, lifespan="off", ws_per_message_deflate=False, log_config=None)
        config.load()
        async with app.broadcaster:
            publisher, *peers = (Peer(kind, config) for _ in range(1 + subscribers))
            await publisher.open()
            for peer in peers:
                await peer.open(TOPIC)
            gc.collect()
            gc.freeze()
            number = 0
            for _ in range(rounds):
                now, frames = time.time(), []
                for _ in range(burst):
                    number += 1
                    frames.append(publisher.session.notify(payload(number), BODY, now))
                data = client_frames(*frames)
                with spent.on("message", burst * subscribers):
                    publisher.protocol.data_received(data)
                    await until(lambda: publisher.wire._kept and peers[-1].wire._kept)
                await publisher.answered()
                acknowledged = [(peer.protocol, peer.answers()) for peer in peers]
                with spent.on("acknowledgement", burst * subscribers):
                    for protocol, data in acknowledged:
                        protocol.data_received(data)
            for peer in (publisher, *peers):
                peer.protocol.connection_lost(None)
            await until(lambda: not app.broadcaster.websockets.connections)
        replay.close()
    return spent.least


# The client


class Server:
    """The broadcaster of a client, by hand."""

    def __init__(self, kind: str) -> None:
        self.session = s.BroadcasterSession(auth(kind))

    async def connect(self, url: str, *, ssl_context: Any, **options: Any) -> Socket:
        """Instead of `lonelypsc.ws_connection.connect`."""
        self.socket, self.wire = Socket(url, **options), Wire()
        self.socket.connection_made(self.wire)
        request = self.wire.take()
        handshake = ServerProtocol()
        handshake.receive_data(request)
        (found,) = handshake.events_received()
        handshake.send_response(handshake.accept(found))  # type: ignore[arg-type]
        self.socket.data_received(b"".join(handshake.data_to_send()))
        self.frames = Frames(self.wire, vars(sys.modules["websockets.frames"])["apply_mask"])
        self.frames._cutter.cut(HEAD_ENDS, [])
        return self.socket

    async def serve(self) -> None:
        """Answers what is not counted."""
        while True:
            await asyncio.sleep(0.001)
            for frame in self.frames() if hasattr(self, "frames") and self.wire._kept else ():
                event, now = self.session.receive(frame, time.time()), time.time()
                if isinstance(event, s.Configured):
                    self.socket.data_received(framed([self.session.confirm_configure(now)]))
                elif isinstance(event, s.SubscriptionAsked):
                    self.socket.data_received(framed(self.session.answer(event, now)))


async def client(kind: str, burst: int, rounds: int) -> Least:
    spent, server = Spent(), Server(kind)
    lonelypsc.ws_client.connect = server.connect  # type: ignore[assignment]
    config = make_websocket_pub_sub_config(broadcasters=[{"host": "ws://a"}], auth=auth(kind))
    helper = asyncio.create_task(server.serve())
    async with lonelypsc.ws_client.WebsocketPubSubClient(config) as made:
        async with made.subscribe_exact(TOPIC) as subscription:
            messages = await subscription.messages()
            helper.cancel()
            gc.collect()
            gc.freeze()
            for number in range(rounds):
                await publish(made, server, spent, burst)
                await receive(messages, server, spent, burst, number)
            helper = asyncio.create_task(server.serve())
    helper.cancel()
    return spent.least


async def publish(made: Any, server: Server, spent: Spent, burst: int) -> None:
    with spent.on("notify", burst):
        calls = [asyncio.ensure_future(made.notify(topic=TOPIC, data=BODY)) for _ in range(burst)]
        await until(lambda: server.wire._kept)
    answers = []
    for frame in server.frames():
        event: Any = server.session.receive(frame, time.time())
        answers += server.session.answer(event, time.time(), subscribers=1)
    data = framed(answers)
    with spent.on("its confirmation", burst):
        server.socket.data_received(data)
        for call in calls:
            await call


async def receive(messages: Any, server: Server, spent: Spent, burst: int, number: int) -> None:
    now = time.time()
    data = framed(
        [server.session.deliver(payload(number * burst + n), BODY, now) for n in range(burst)]
    )
    with spent.on("message", burst):
        server.socket.data_received(data)
        for _ in range(burst):
            message = await anext(messages)
            message.data.read()
        server.socket._flush()  # acknowledgements wait for company
    for frame in server.frames():
        server.session.receive(frame, time.time())


# The rules, without anything around them


def rules(kind: str, rounds: int) -> Least:
    spent, here, there, now = Spent(), auth(kind), auth(kind), time.time()
    publisher, broadcaster = s.SubscriberSession(here), s.BroadcasterSession(there)
    broadcaster.receive(publisher.configure(now), now)
    publisher.receive(broadcaster.confirm_configure(now), now)
    many, step = 100, spent.on
    for number in range(rounds):
        loads = [payload(number * many + n) for n in range(many)]
        with step("notify: make", many):
            frames = [publisher.notify(load, BODY, now) for load in loads]
        with step("notify: take", many):
            events: list[Any] = [broadcaster.receive(frame, now) for frame in frames]
        with step("its confirmation: make", many):
            answers = [broadcaster.answer(event, now, subscribers=1)[0] for event in events]
        with step("its confirmation: take", many):
            for answer in answers:
                publisher.receive(answer, now)
        load = payload(number)
        with step("a copy, of many: make", many):
            frames = [broadcaster.deliver(load, BODY, now) for _ in range(many)]
        with step("a copy: take", many):
            events = [publisher.receive(frame, now) for frame in frames]
        with step("acknowledgement: make", many):
            answers = [publisher.answer(event, now)[0] for event in events]
        with step("acknowledgement: take", many):
            for answer in answers:
                broadcaster.receive(answer, now)
    return spent.least


def show(title: str, rows: dict[str, Least]) -> None:
    print(title)
    for step in rows["none"]:
        print(f"  {step:28} none {rows['none'][step]:6.1f}   hmac {rows['hmac'][step]:6.1f}")


async def main(rounds: int) -> None:
    kinds = ("none", "hmac")
    show("session.py alone", {kind: rules(kind, rounds) for kind in kinds})
    for burst in (1, BURST):
        found = {kind: await client(kind, burst, rounds * 2) for kind in kinds}
        show(f"client, {burst} at a time", found)
    for subscribers, burst in ((1, 1), (1, BURST), (CROWD, 1)):
        found = {
            kind: await broadcaster(kind, subscribers, burst, rounds * 2 if burst > 1 else rounds)
            for kind in kinds
        }
        title = f"broadcaster, {burst} at a time to {subscribers} websockets"
        show(f"{title}, per delivery", found)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
