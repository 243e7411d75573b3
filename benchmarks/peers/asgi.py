"""uvicorn on a free port, the same for both broadcasters."""

from __future__ import annotations

import socket
from typing import Any

import uvicorn


class AnnouncingServer(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        print("READY", sockets[0].getsockname()[1], flush=True)


def listen() -> tuple[socket.socket, int]:
    # With the protocol named: asyncio takes Nagle's algorithm off only where it sees "TCP", and
    # with it on, each small answer on a connection that is kept open waits 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    return listener, listener.getsockname()[1]


def serve(app: Any, listener: socket.socket) -> None:
    """Until SIGTERM; on uvloop and httptools where the environment has them; without a log."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    AnnouncingServer(config).run(sockets=[listener])
