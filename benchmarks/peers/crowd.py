"""Many subscribers of Redis or NATS in one process, each with a connection of its own.

    crowd.py redis|nats PORT TOPIC CONNECTIONS

They speak just enough of the protocol to count messages of 200 bytes, so that a fan-out measures
the server and not them. When all of them got a message, one more connection tells the publisher.
"""

from __future__ import annotations

import asyncio
import sys
from abc import abstractmethod
from typing import cast

import roles


class Crowd:
    def __init__(self, size: int) -> None:
        self.size = size
        self.ready = 0
        self.all_ready = asyncio.Event()
        self.received = roles.Received()
        self.speaker: Connection | None = None
        self._got: dict[bytes, int] = {}
        """Of each message that not all have got, how many have."""

    def one_ready(self) -> None:
        self.ready += 1
        if self.ready == self.size:
            self.all_ready.set()

    def message(self, frame: bytes) -> None:
        self.received.add()
        assert self.speaker is not None
        key = self.speaker.key(frame)
        got = self._got.pop(key, 0) + 1
        if got == self.size:
            self.speaker.confirm(key, self.size)
        else:
            self._got[key] = got


class Connection(asyncio.Protocol):
    MESSAGE: bytes
    """How a message begins; all else that arrives is one line."""

    def __init__(self, crowd: Crowd, topic: bytes) -> None:
        self._crowd = crowd
        self._topic = topic
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        while data:
            if data.startswith(self.MESSAGE):
                end = self.message_end(data)
                if not 0 < end <= len(data):
                    break
                self._crowd.message(data[:end])
            else:
                end = data.find(b"\n") + 1
                if end == 0:
                    break
                self.line(data[:end])
            data = data[end:]
        self._buffer = data

    @abstractmethod
    def subscribe(self) -> None: ...

    @abstractmethod
    def message_end(self, data: bytes) -> int:
        """Where the message at the front of `data` ends; 0: not known yet."""

    @abstractmethod
    def line(self, line: bytes) -> None: ...

    @abstractmethod
    def key(self, frame: bytes) -> bytes:
        """What the publisher knows a message by."""

    @abstractmethod
    def confirm(self, key: bytes, count: int) -> None: ...


class Redis(Connection):
    MESSAGE = b"*3\r\n$7\r\nmessage\r\n"

    def subscribe(self) -> None:
        self.transport.write(b"SUBSCRIBE " + self._topic + b"\r\n")

    def message_end(self, data: bytes) -> int:
        topic = b"$%d\r\n%b\r\n" % (len(self._topic), self._topic)
        body = b"$%d\r\n" % len(roles.BODY)
        return len(self.MESSAGE) + len(topic) + len(body) + len(roles.BODY) + 2

    def line(self, line: bytes) -> None:
        if line == b":1\r\n" and self is not self._crowd.speaker:  # the end of "subscribed"
            self._crowd.one_ready()

    def key(self, frame: bytes) -> bytes:
        return frame[-len(roles.BODY) - 2 :][:16]

    def confirm(self, key: bytes, count: int) -> None:
        self.transport.write(b"PUBLISH replies " + key + b"\r\n")


class Nats(Connection):
    MESSAGE = b"MSG "

    def subscribe(self) -> None:
        self.transport.write(b'CONNECT {"verbose":false}\r\nSUB %b 1\r\nPING\r\n' % self._topic)

    def message_end(self, data: bytes) -> int:
        head = data.find(b"\r\n") + 2
        return head + len(roles.BODY) + 2 if head > 1 else 0

    def line(self, line: bytes) -> None:
        if line == b"PONG\r\n":
            self._crowd.one_ready()
        elif line == b"PING\r\n":
            self.transport.write(b"PONG\r\n")

    def key(self, frame: bytes) -> bytes:
        # MSG <subject> <sid> <reply to> <length>
        return frame[: frame.index(b"\r\n")].split(b" ")[3]

    def confirm(self, key: bytes, count: int) -> None:
        text = b"%d" % count
        self.transport.write(b"PUB %b %d\r\n%b\r\n" % (key, len(text), text))


async def main(kind: str, port: str, topic: str, connections: str) -> None:
    crowd = Crowd(int(connections))
    make = {"redis": Redis, "nats": Nats}[kind]
    loop = asyncio.get_running_loop()

    async def connect() -> Connection:
        _, made = await loop.create_connection(
            lambda: make(crowd, topic.encode()), "127.0.0.1", int(port)
        )
        return made

    for _ in range(crowd.size):
        (await connect()).subscribe()
    await crowd.all_ready.wait()
    crowd.speaker = await connect()
    if kind == "nats":
        crowd.speaker.transport.write(b'CONNECT {"verbose":false}\r\n')
    await roles.serve(int(port), {"received": crowd.received.wait})


if __name__ == "__main__":
    roles.run(main(*sys.argv[1:]))
