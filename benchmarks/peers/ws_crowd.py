"""A thousand websockets that cost next to nothing, in one process.

    ws_crowd.py PORT COUNT [SECRETS FILE]

Each connects to the broadcaster on PORT and subscribes to the topic "fan"; the first 1, 10 and 100
also to "fan1", "fan10" and "fan100". What arrives is acknowledged, with correct signatures, but not
verified, so that a fan-out benchmark measures the broadcaster and not this. Runs in the environment
of ours, for either broadcaster.

Commands: `received`.
"""

from __future__ import annotations

import asyncio
import base64
import os
import sys
import time
from pathlib import Path
from typing import cast

import roles

from lonelypsp import secretsfile
from lonelypsp import session as s
from lonelypsp.connection_url import connection_url
from lonelypsp.replay import ReplayGuard
from lonelypsp.signing import AuthConfig, Nothing

PARTIAL = (1, 10, 100)
AT_ONCE = 50
_RECEIVE = b"\0\1\0\x08"
_CONFIRM = b"\0\1\0\x09"
_REST = b"\0\0\0\4\0\0\0\1"  # no tracing; one subscriber


class Peer(asyncio.Protocol):
    """One websocket; small unfragmented frames both ways, masked with zeros."""

    def __init__(self, auth: AuthConfig, topics: list[bytes], received: roles.Received) -> None:
        self.auth = auth
        self.session = s.SubscriberSession(auth)
        self.topics = topics
        self.received = received
        self.buffer = b""
        self.counter = -1 - len(topics)
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.signs = not isinstance(auth.to_broadcaster, Nothing)
        self.upgraded = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        key = base64.b64encode(os.urandom(16)).decode()
        self.transport.write(
            "GET /v1/websocket HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
            "".encode()
        )

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_exception(ConnectionError("the broadcaster closed the connection"))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.upgraded:
            head, separator, self.buffer = self.buffer.partition(b"\r\n\r\n")
            if not separator:
                self.buffer = head
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self.ready.set_exception(ConnectionError(head.decode("latin-1")))
                return
            self.upgraded = True
            self.send(self.session.configure(time.time()))
        answers = []
        while (frame := self.next_frame()) is not None:
            if self.ready.done() and frame.startswith(_RECEIVE):
                answers.append(masked(self.confirm(frame)))
                self.received.add()
            else:
                self.set_up(frame)
        if answers:
            self.transport.write(b"".join(answers))

    def next_frame(self) -> bytes | None:
        """The next protocol message; pings are answered."""
        buffer = self.buffer
        while len(buffer) >= 2:
            opcode, length, at = buffer[0] & 15, buffer[1], 2
            assert length < 127, "masked, or too long for this peer"
            if length == 126:
                length, at = int.from_bytes(buffer[2:4], "big"), 4
            if len(buffer) < at + length:
                return None
            frame, self.buffer = buffer[at : at + length], buffer[at + length :]
            if opcode == 2:
                return frame
            if opcode == 9:
                self.transport.write(masked(frame, 0x8A))
            buffer = self.buffer
        return None

    def set_up(self, frame: bytes) -> None:
        event = self.session.receive(frame, time.time())
        if isinstance(event, s.Opened):
            for topic in self.topics:
                self.send(self.session.subscribe_exact(topic, time.time()))
        elif (
            isinstance(event, s.Answered)
            and not self.ready.done()
            and self.session.room == self.session.limits.unanswered
        ):
            self.ready.set_result(None)

    def confirm(self, frame: bytes) -> bytes:
        at = 6 + int.from_bytes(frame[4:6], "big")
        at += 2 + int.from_bytes(frame[at : at + 2], "big")
        identifier = frame[at : at + 2 + int.from_bytes(frame[at : at + 2], "big")]
        value = b""
        if self.signs:
            signed = {
                "tracing": b"",
                "identifier": identifier[2:],
                "num_subscribers": 1,
                "url": connection_url(self.session._nonce, self.counter),
            }
            authorize = self.auth.to_broadcaster.authorize
            value = (authorize("CONFIRM_RECEIVE", signed, time.time()) or "").encode()
            self.counter -= 1
        return b"".join((_CONFIRM, identifier, len(value).to_bytes(2, "big"), value, _REST))

    def send(self, frame: bytes) -> None:
        self.transport.write(masked(frame))


def masked(frame: bytes, first: int = 0x82) -> bytes:
    if len(frame) < 126:
        return b"%c%c\0\0\0\0%b" % (first, 0x80 | len(frame), frame)
    return b"%c\xfe%b\0\0\0\0%b" % (first, len(frame).to_bytes(2, "big"), frame)


async def main(port: str, count: str, secrets: str | None = None) -> None:
    auth = AuthConfig(Nothing(), Nothing())
    if secrets:
        auth = secretsfile.load(Path(secrets).read_text(), ReplayGuard())
    received = roles.Received()
    loop = asyncio.get_running_loop()
    peers: list[Peer] = []
    for begin in range(0, int(count), AT_ONCE):
        batch = []
        for number in range(begin, min(begin + AT_ONCE, int(count))):
            topics = [b"fan", *(b"fan%d" % most for most in PARTIAL if number < most)]
            _, peer = await loop.create_connection(
                lambda topics=topics: Peer(auth, topics, received), "127.0.0.1", int(port)
            )
            batch.append(peer)
        await asyncio.gather(*(peer.ready for peer in batch))
        peers += batch
    await roles.serve(int(port), {"received": received.wait})


if __name__ == "__main__":
    roles.run(main(*sys.argv[1:]))
