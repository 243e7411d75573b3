"""Our own HTTP server: uvicorn's protocol on a socket that we bind, so that failures are ours.

uvicorn's own server exits the process when the port is taken, reports itself started later than it
should, and polls every 0.1 s while it stops.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from ssl import SSLContext
from typing import Any

from lonelypsc.errors import PubSubBindError
from lonelypsp.guard import HttpLimits, guarded
from lonelypsp.shortcut import Answer, with_shortcut

Scope = Any  # what starlette and uvicorn say, too
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_NONE: Mapping[str, AsgiApp] = {}
_BACKLOG = 2048
_GRACE = 5.0
"""Seconds that running requests get to finish when the listener stops."""
_TLS_GOODBYE = 5.0


class PathApp:
    """An ASGI app that is a dict from path to ASGI callable; everything else is 404."""

    def __init__(self, routes: Mapping[str, AsgiApp]) -> None:
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._routes.get(scope["path"])
        if app is None:
            await answer(send, 404, b"Not Found")
        else:
            await app(scope, receive, send)


def whole(
    status: int,
    body: bytes,
    *headers: tuple[bytes, bytes],
    content_type: bytes = b"text/plain; charset=utf-8",
) -> Answer:
    """A whole answer: status, headers, body."""
    length = b"%d" % len(body)
    return status, ((b"content-type", content_type), (b"content-length", length), *headers), body


async def answer(
    send: Send,
    status: int,
    body: bytes,
    *headers: tuple[bytes, bytes],
    content_type: bytes = b"text/plain; charset=utf-8",
) -> None:
    """Sends a whole answer."""
    await send_whole(send, whole(status, body, *headers, content_type=content_type))


async def send_whole(send: Send, made: Answer) -> None:
    status, headers, body = made
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Listener:
    """Serves `app` on `host`:`port` between `start` and `stop`.

    Args:
        limits: what clients may ask for.
        tls: of a server, for https.
        shortcuts: of the app's paths; see `lonelypsp.shortcut`.

    Attributes:
        port: the port that is listened on, also when 0 was asked for.
    """

    def __init__(
        self,
        host: str,
        port: int,
        app: AsgiApp,
        *,
        limits: HttpLimits | None = None,
        shortcuts: Mapping[str, AsgiApp] = _NONE,
        tls: SSLContext | None = None,
    ) -> None:
        self._host = host
        self.port = port
        self._app = app
        self._limits = limits or HttpLimits()
        self._tls = tls
        self._shortcuts = shortcuts
        self._servers: list[asyncio.AbstractServer] = []

    async def start(self) -> None:
        """Returns when the socket listens.

        Raises:
            PubSubBindError: the address is taken or not ours, or uvicorn is not installed.
        """
        try:
            import httptools
            from uvicorn.config import Config
            from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
            from uvicorn.server import ServerState
        except ImportError as e:
            raise PubSubBindError(
                "bind: type 'uvicorn' needs uvicorn: pip install 'lonelypsc[standard]'"
            ) from e
        sockets = await self._bind()
        config = Config(
            self._app,
            interface="asgi3",
            lifespan="off",
            ws="none",
            log_config=None,
            proxy_headers=False,
            server_header=False,
        )
        config.load()
        self._state = ServerState()

        loop = asyncio.get_running_loop()
        base = with_shortcut(HttpToolsProtocol, self._shortcuts)
        guarded_protocol = guarded(base, httptools, self._limits)

        def protocol() -> Any:
            made = guarded_protocol(config=config, server_state=self._state, app_state={})
            made.access_log = False
            return made

        for sock in sockets:
            server = await loop.create_server(
                protocol,
                sock=sock,
                backlog=_BACKLOG,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None else self._limits.head_timeout,
                ssl_shutdown_timeout=None if self._tls is None else _TLS_GOODBYE,
            )
            self._servers.append(server)

    async def _bind(self) -> list[socket.socket]:
        sockets: list[socket.socket] = []
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                self._host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            for family, address in dict.fromkeys((info[0], info[4]) for info in found):
                sockets.append(self._bind_one(family, (address[0], self.port, *address[2:])))
                self.port = sockets[-1].getsockname()[1]
        except OSError as e:
            for sock in sockets:
                sock.close()
            raise PubSubBindError(
                f"bind: cannot listen on host {self._host!r}, port {self.port}: {e.strerror or e}"
            ) from e
        return sockets

    def _bind_one(self, family: int, address: tuple[Any, ...]) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            if hasattr(socket, "SO_REUSEPORT"):  # not on Windows, where it would share the port
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            # here, not only in create_server: a second listener is told so by listen()
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
        return sock

    async def stop(self) -> None:
        """Stops listening, lets running requests finish for a while, closes all connections."""
        if not self._servers:
            return
        for server in self._servers:
            server.close()
        state = self._state
        for connection in list(state.connections):
            connection.shutdown()
        if state.tasks:
            await asyncio.wait(list(state.tasks), timeout=_GRACE)
        await _turns()
        for task in list(state.tasks):
            task.cancel()
        for connection in list(state.connections):
            connection.transport.abort()
        await _turns()
        self._servers.clear()


async def _turns() -> None:
    """The event loop needs a few turns to close what it was told to close."""
    for _ in range(4):
        await asyncio.sleep(0)
