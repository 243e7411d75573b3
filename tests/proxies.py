"""A TCP proxy whose connections a test can cut, or freeze."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Proxy:
    """Forwards to a port of the loopback.

    Attributes:
        connections: how many were ever made.
        cut_up, cut_down: bytes of one connection, to the server and to the client, after which it
            is cut; used up by the first that reaches them.
        frozen_up, frozen_down: forward nothing to the server, to the client, and say nothing about
            it; `freeze` sets both.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.connections = 0
        self.cut_up: float = math.inf
        self.cut_down: float = math.inf
        self.frozen_up = False
        self.frozen_down = False
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def url(self, scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.port}"

    def freeze(self, up: bool = True, down: bool = True) -> None:
        self.frozen_up, self.frozen_down = up, down

    def cut(self) -> None:
        """Resets all connections."""
        for writer in self._open:
            writer.transport.abort()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, back}
        pumps = [
            asyncio.create_task(self._pump(reader, back, "up")),
            asyncio.create_task(self._pump(there, writer, "down")),
        ]
        self._tasks.update(pumps)
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, back):
            end.transport.abort()
        await asyncio.wait(pumps)
        self._tasks.difference_update(pumps)
        self._open -= {writer, back}

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str
    ) -> None:
        passed = 0
        try:
            while data := await source.read(65_536):
                while getattr(self, f"frozen_{way}"):
                    await asyncio.sleep(0.01)
                if passed + len(data) > (most := getattr(self, f"cut_{way}")):
                    sink.write(data[: int(most - passed)])
                    setattr(self, f"cut_{way}", math.inf)
                    return
                passed += len(data)
                sink.write(data)
                await sink.drain()
        except OSError:
            return

    async def close(self) -> None:
        self.freeze(up=False, down=False)
        self.cut()
        if self._tasks:
            await asyncio.wait(self._tasks)


@asynccontextmanager
async def proxy(url: str) -> AsyncIterator[Proxy]:
    """One in front of the server at `url`."""
    made = Proxy(int(url.rpartition(":")[2]))
    server = await asyncio.start_server(made.accept, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        await made.close()
        await server.wait_closed()
