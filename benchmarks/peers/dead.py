"""Hosts that are of no use to who connects: dead.py REFUSING SILENT UNREACHABLE

So many of each kind, each on a port of its own: those that refuse connections, those that accept
them and never answer, and those of which a handshake is never completed. Command: `ports`.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import roles


def bound() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def unreachable() -> list[socket.socket]:
    """Where the queue of connections is full, and stays so: Linux drops what comes on top."""
    sockets = [bound()]
    sockets[0].listen(0)
    for _ in range(4):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(sockets[0].getsockname())
        sockets.append(client)
    return sockets


async def main(refusing: int, silent: int, number_unreachable: int) -> None:
    loop = asyncio.get_running_loop()
    held = [[bound()] for _ in range(refusing)]
    for _ in range(silent):
        held.append([bound()])
        await loop.create_server(asyncio.Protocol, sock=held[-1][0])
    held += [unreachable() for _ in range(number_unreachable)]

    async def ports() -> dict[str, Any]:
        return {"ports": [sockets[0].getsockname()[1] for sockets in held]}

    await roles.serve(0, {"ports": ports})


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
