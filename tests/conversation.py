"""A TCP connection on which a test says what it likes."""

from __future__ import annotations

import asyncio
import re
import socket
from contextlib import suppress

PATIENCE = 30.0


class Conversation:
    """One connection."""

    def __init__(self, port: int, *, receive_buffer: int | None = None) -> None:
        self._port = port
        self._buffer = receive_buffer

    async def __aenter__(self) -> Conversation:
        loop = asyncio.get_running_loop()
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer)
        await loop.sock_connect(self.socket, ("127.0.0.1", self._port))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.socket.close()

    async def send(self, data: bytes, step: int | None = None) -> None:
        """Whether the other end still listens is its own business."""
        step = step or len(data) or 1
        with suppress(ConnectionError):
            for at in range(0, len(data), step):
                await asyncio.get_running_loop().sock_sendall(self.socket, data[at : at + step])

    async def receive(self, number: int | None = None) -> tuple[list[int], bytearray, bool]:
        """Statuses, all that came, whether the other end closed; ends after `number` answers."""
        got, closed = bytearray(), False
        async with asyncio.timeout(PATIENCE):
            while number is None or len(_statuses(got)) < number:
                try:
                    data = await asyncio.get_running_loop().sock_recv(self.socket, 65_536)
                except ConnectionResetError:
                    data = b""
                if not data:
                    closed = True
                    break
                got += data
        return _statuses(got), got, closed

    async def close_frame(self) -> int:
        """The code in the first close frame of a websocket; all frames before it are short."""
        got = b""
        async with asyncio.timeout(PATIENCE):
            while True:
                data = await asyncio.get_running_loop().sock_recv(self.socket, 65_536)
                assert data, got
                got += data
                while len(got) > 1 and len(got) >= 2 + got[1]:
                    if got[0] == 0x88:
                        return int.from_bytes(got[2:4], "big")
                    got = got[2 + got[1] :]


def _statuses(data: bytes | bytearray) -> list[int]:
    """Of all answers that are whole."""
    found, at = [], 0
    while (end := data.find(b"\r\n\r\n", at)) >= 0:
        head = bytes(data[at : end + 4])
        length = re.search(rb"\r\ncontent-length: (\d+)\r\n", head)
        at = end + 4 + (int(length[1]) if length else 0)
        if len(data) < at:
            break
        found.append(int(head.split(b" ", 2)[1]))
    return found
