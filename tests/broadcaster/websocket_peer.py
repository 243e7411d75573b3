"""The other end of a websocket, by hand: `lonelypsp.session` over the websockets package."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from lonelypsp import messages as m
from lonelypsp import session as s
from lonelypsp.compression import decompress
from lonelypsp.signing import AuthConfig, Nothing
from lonelypsp.spool import Body

E = TypeVar("E")
NOBODY = AuthConfig(Nothing(), Nothing())
DEADLINE = 10.0


class Closed(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code, self.reason = code, reason


def _closed(e: ConnectionClosed) -> Closed:
    return Closed(e.rcvd.code, e.rcvd.reason) if e.rcvd else Closed(1006, "")


class Peer:
    """Acknowledges what it receives, unless `acknowledges` is False."""

    def __init__(self, socket: ClientConnection, session: s.SubscriberSession) -> None:
        self.socket, self.session = socket, session
        self.acknowledges = True
        self.events: deque[Any] = deque()
        self.bodies: list[bytes] = []

    async def send(self, frame: bytes) -> None:
        await self.socket.send(frame)

    async def event(self) -> Any:
        """What the next frame means."""
        try:
            async with asyncio.timeout(DEADLINE):
                frame = await self.socket.recv()
        except ConnectionClosed as e:
            raise _closed(e) from None
        assert isinstance(frame, bytes)
        event = self.session.receive(frame, time.time())
        if isinstance(event, s.BodyArrived | s.PartArrived) and self.acknowledges:
            for answer in self.session.answer(event, time.time()):
                await self.send(answer)
        return event

    async def next(self, kind: type[E]) -> E:
        """The next event of this kind; others are kept in `events`."""
        for event in self.events:
            if isinstance(event, kind):
                self.events.remove(event)
                return event
        while True:
            event = await self.event()
            if isinstance(event, kind):
                return event
            self.events.append(event)

    async def message(self) -> tuple[bytes, bytes]:
        """Topic and body of the next message."""
        event = await self.next(s.BodyArrived)
        raw: Any = event.body if event.body is not None else event.sink.getvalue()  # type: ignore[union-attr]
        if event.compressor is None:
            return event.head.topic, bytes(raw)
        return event.head.topic, decompress(
            raw,
            dictionary=event.compressor.dictionary,
            expected_length=event.head.decompressed_length,
        )

    async def answer(self) -> Any:
        return (await self.next(s.Answered)).message

    async def subscribe(self, *topics: bytes, globs: tuple[str, ...] = ()) -> None:
        now = time.time()
        frames = [self.session.subscribe_exact(t, now) for t in topics]
        frames += [self.session.subscribe_glob(g, now) for g in globs]
        for frame in frames:
            await self.send(frame)
        for _ in frames:
            await self.answer()

    def payload(self, topic: bytes, data: bytes) -> s.Payload:
        return s.Payload(topic, b"abcd", len(data), Body.of(data).sha512)

    async def notify(self, topic: bytes, data: bytes) -> int:
        """Sends a message, in parts where it must be; the number of subscribers."""
        payload = self.payload(topic, data)
        if self.session.one_frame(payload):
            await self.send(self.session.notify(payload, data, time.time()))
        else:
            self.session.open_stream(payload)
            while self.session.sending:
                part = self.session.next_part(time.time())
                await self.send(part.head + data[part.offset : part.offset + part.length])
        while True:
            answer = await self.answer()
            if isinstance(answer, m.ConfirmNotify):
                return int(answer.subscribers)

    async def closed(self) -> Closed:
        """How the broadcaster closes the connection; what it sends before is ignored."""
        async with asyncio.timeout(DEADLINE):
            try:
                while True:
                    await self.socket.recv()
            except ConnectionClosed as e:
                return _closed(e)


@asynccontextmanager
async def raw_socket(url: str, **options: Any) -> AsyncIterator[ClientConnection]:
    address = "ws" + url.removeprefix("http") + "/v1/websocket"
    async with connect(address, compression=None, max_size=None, proxy=None, **options) as socket:
        yield socket


@asynccontextmanager
async def websocket_peer(
    url: str, auth: AuthConfig = NOBODY, **options: Any
) -> AsyncIterator[Peer]:
    """A configured connection; `options` are those of the session."""
    async with raw_socket(url) as socket:
        peer = Peer(socket, s.SubscriberSession(auth, **options))
        await peer.send(peer.session.configure(time.time()))
        assert await peer.event() == s.Opened()
        yield peer
