"""Runs a broadcaster on a port: one process, or several on one listening socket."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from ssl import SSLContext
from types import FrameType
from typing import Any

import httptools
import uvicorn
import websockets.frames
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State

from lonelypsp.frames import Cutter, Mask, framed
from lonelypsp.guard import guarded, tls_extension
from lonelypsp.shortcut import with_shortcut
from lonelypss import collector, logs, tls
from lonelypss.app import App, create_app
from lonelypss.asgi import ASGIApp
from lonelypss.config import BroadcasterConfig, ConfigError
from lonelypss.metrics import forget_worker
from lonelypss.poll import NO_POLL, REQUEST, WEBSOCKET, Poll, polling
from lonelypss.secrets import load_auth
from lonelypss.store.base import StoreCorrupt, StoreUnavailable
from lonelypss.tracing import current_step, spans_sent
from lonelypss.websocket import BURST, as_closing

log = logging.getLogger(__name__)

_BACKLOG = 2048
_GRACE = 10
_STARTUP_FAILURE = 3
_TRY_AGAIN = 75  # the database is away or locked, which passes
_RESTART_PAUSE = 1.0
_LINGER = 10.0
_TLS_GOODBYE = 5.0
_VERSION = "13"
_BURST_BYTES = 256 * 1024  # received and not yet looked at; above it nothing is read
_apply_mask: Mask = vars(websockets.frames)["apply_mask"]  # in C where that was built
_BURST_CAME: Any = {"type": "websocket.receive"}


@dataclass(frozen=True, slots=True)
class Settings:
    """All a worker process needs to know; can be sent to it.

    Attributes:
        config: how it runs.
        secrets: path of the secrets file, which replaces the authorization in `config`.
        grace: seconds that running requests get when the broadcaster stops.
        log_level: name of a level of `logging`.
        drain: seconds before that stop, in which only /readyz knows of it.
        log_format: one of `logs.FORMATS`.
        allow_readable_secrets: see `load_auth`.
    """

    config: BroadcasterConfig
    secrets: str | None
    grace: int
    log_level: str
    drain: int = 0
    log_format: str = "text"
    allow_readable_secrets: bool = False

    def app(self) -> App:
        if self.secrets is None:
            return create_app(self.config)
        auth = load_auth(
            self.secrets, db=self.config.db, allow_readable=self.allow_readable_secrets
        )
        return create_app(replace(self.config, auth=auth))

    def set_up_logging(self) -> None:
        logs.set_up(self.log_level, self.log_format, current_step(self.config))


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of `host`; with port 0 all on one free port.

    Raises:
        OSError: the name is unknown, or the address is not ours or in use.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((info[0], info[4]) for info in found):
            sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port, *address[2:]))
            port = sock.getsockname()[1]
            sock.listen(_BACKLOG)
            sock.setblocking(False)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def serve(
    settings: Settings,
    sockets: Sequence[socket.socket],
    workers: int,
    announce: Callable[[], None],
) -> int:
    """Runs until SIGINT or SIGTERM.

    Args:
        workers: 1 serves in this process.
        announce: called once requests are going to be answered.

    Returns:
        the exit status of the command.
    """
    try:
        if workers == 1:
            _run(settings, sockets, announce)
            return 0
        with ExitStack() as stack:
            if settings.config.metrics and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
                shared = stack.enter_context(tempfile.TemporaryDirectory(prefix="lonelypss-"))
                os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared  # before a worker imports it
            return _Workers(settings, sockets, workers).run(announce)
    finally:
        for sock in sockets:
            sock.close()


def run(config: BroadcasterConfig, host: str = "127.0.0.1", port: int = 3003) -> None:
    """What `lonelypss serve` does, for programs with an authenticator of their own in
    `config.auth`. Runs until SIGINT or SIGTERM.

    Raises:
        ConfigError: an option cannot work, or a file cannot be used.
        OSError: the address is not ours, or in use.
    """
    tls.listening(config)
    settings = Settings(config, None, _GRACE, "info")
    settings.set_up_logging()
    serve(settings, bind(host, port), 1, lambda: log.info("listening on %s, port %d", host, port))


def http_protocol(
    config: BroadcasterConfig, shortcuts: Mapping[str, ASGIApp], poll: Poll = NO_POLL
) -> Any:
    """The protocol class for one listener of this process; see `lonelypsp.shortcut`."""
    limits = config.http_limits
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY:
        most = max(1, min(limits.max_connections, files // 2))
        limits = replace(limits, max_connections=most)
    base: Any = guarded(with_shortcut(HttpToolsProtocol, shortcuts), httptools, limits)

    class Http(base):  # type: ignore[misc]
        def data_received(self, data: bytes) -> None:
            poll.happened(REQUEST)
            base.data_received(self, data)

    return Http


def websocket_protocol(poll: Poll = NO_POLL) -> Any:
    """The protocol class for what was an HTTP connection before."""
    return type("WebSocket", (_WebSocket,), {"poll": poll})


class _WebSocket(WebSocketsSansIOProtocol):
    """uvicorn's, with a shortcut for frames: those of the ordinary case are made and taken without
    its library, and handed over as `lonelypss.websocket.Burst`. What was closed is gone soon, even
    if the peer takes nothing any more."""

    poll: Poll

    def connection_made(self, transport: Any) -> None:
        self._cutter = Cutter(_apply_mask, self.config.ws_max_size, self._by_library)
        self._burst: list[bytes] = []
        self._burst_bytes = 0  # of those that wait for `receive_burst`
        self._reading = False  # somebody is in receive_burst, and needs to be woken
        self._after: Any = None  # the event behind the burst
        self.on_burst: Callable[[list[bytes]], list[bytes] | None] = _leave_all
        super().connection_made(transport.unwrap())

    def handle_connect(self, event: Any) -> None:
        if event.headers.get_all("Sec-WebSocket-Version") != [_VERSION]:
            self._refuse_version()
            return
        super().handle_connect(event)
        if self.response.status_code == 101:
            extensions: dict[str, Any] = self.scope["extensions"]
            extensions[BURST] = self
            extensions.update(tls_extension(self.transport))

    def _refuse_version(self) -> None:
        response = self.conn.reject(426, f"The version of websockets spoken here is {_VERSION}.\n")
        response.headers["Sec-WebSocket-Version"] = _VERSION
        self.conn.send_response(response)
        self.handshake_complete = self.close_sent = True
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.transport.close()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.close_sent:  # an answer that is no websocket is one, too: uvicorn forgets it
            self.handshake_complete = True

    def data_received(self, data: bytes) -> None:
        self.poll.happened(WEBSOCKET)
        burst = self._burst
        self._cutter.cut(data, burst)
        if not burst:
            return
        if self.close_sent:
            burst.clear()
            return
        if self._reading:
            self._burst = []
            left = self.on_burst(burst)
            if left is None:
                return
            self._burst = burst = left
            self._reading = False
            self.queue.put_nowait(_BURST_CAME)
        self._burst_bytes = sum(map(len, burst))
        if self._burst_bytes > _BURST_BYTES and not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    def _by_library(self, data: bytes) -> bool:
        super().data_received(data)
        return self.conn.state is State.OPEN

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type != "bytes":
            super().send_receive_event_to_app()
            return
        frames, self.frames = self.frames, []
        self._burst.append(frames[0] if len(frames) == 1 else b"".join(frames))

    async def receive_burst(self) -> list[bytes]:
        if not self._burst:
            self._reading = True
            event = self._after or await self.queue.get()
            self._reading = False
            if event is not _BURST_CAME:
                if not self._burst:
                    raise as_closing(event)
                self._after = event
        burst, self._burst, self._burst_bytes = self._burst, [], 0
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        return burst

    def send_now(self, messages: list[bytes]) -> bool:
        if not self.writable.is_set() or self._closing:
            return False
        self.transport.write(framed(messages))
        return True

    async def send_burst(self, messages: list[bytes]) -> None:
        await self.writable.wait()
        if self._closing:
            raise ClientDisconnected
        self.transport.write(framed(messages))

    @property
    def _closing(self) -> bool:
        return self.close_sent or self.disconnected or self.transport.is_closing()

    async def run_asgi(self) -> None:
        try:
            await super().run_asgi()
        finally:
            self.loop.call_later(_LINGER, self.transport.abort)


def _leave_all(burst: list[bytes]) -> list[bytes]:
    return burst


class Listening(uvicorn.Server):
    """uvicorn on sockets that are open already, with TLS whose files can be read again.

    Args:
        context: None: it speaks plain HTTP.
    """

    def __init__(
        self, config: uvicorn.Config, context: SSLContext | None, options: BroadcasterConfig
    ) -> None:
        super().__init__(config)
        self._context = context
        self._options = options

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(self._startup_status())
        loop = asyncio.get_running_loop()
        secure: dict[str, Any] = {}
        if self._context is not None:
            secure = {
                "ssl": self._context,
                "ssl_handshake_timeout": self._options.incoming_http_timeout_head,
                "ssl_shutdown_timeout": _TLS_GOODBYE,
            }
        self.servers = [
            await loop.create_server(self._protocol, sock=sock, backlog=_BACKLOG, **secure)
            for sock in sockets or ()
        ]
        self.started = True

    def _startup_status(self) -> int:
        return _STARTUP_FAILURE

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


class _Server(Listening):
    """A stop on request ends with status 0, and nothing new is started meanwhile."""

    def __init__(
        self,
        config: uvicorn.Config,
        settings: Settings,
        app: App,
        announce: Callable[[], None],
    ) -> None:
        super().__init__(config, tls.listening(settings.config), settings.config)
        self._app = app
        self._announce = announce
        self._drain = settings.drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        with collector.taken_over():
            await super().startup(sockets)
        self._announce()

    def _startup_status(self) -> int:
        failure = self._app.failure
        passes = isinstance(failure, StoreUnavailable) and not isinstance(failure, StoreCorrupt)
        return _TRY_AGAIN if passes else _STARTUP_FAILURE

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        parent = multiprocessing.parent_process()
        if parent is None:
            loop.add_signal_handler(signal.SIGINT, self.handle_exit, signal.SIGINT, None)
        else:
            # Ctrl-C reaches us, too; when to stop is the supervisor's decision, or its death
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            loop.add_reader(parent.sentinel, self._orphaned, parent.sentinel)
        loop.add_signal_handler(signal.SIGTERM, self.handle_exit, signal.SIGTERM, None)
        if self._context is not None:
            loop.add_signal_handler(signal.SIGHUP, self._read_certificates)
        yield

    def _read_certificates(self) -> None:
        try:
            for context in (self._context, self._app.broadcaster.peers.tls):
                if context is not None:
                    tls.reload(context, self._options)
        except ConfigError as e:
            log.error("the certificate that is in use stays: %s", e)
        else:
            log.info("new connections get what is now in %s", self._options.tls_cert)

    def _orphaned(self, sentinel: int) -> None:
        asyncio.get_running_loop().remove_reader(sentinel)
        self.handle_exit(signal.SIGTERM, None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        routes = self._app.broadcaster.routes
        if self._drain and not routes.leaving:  # a second signal does not wait
            routes.leaving = True
            asyncio.get_running_loop().call_later(self._drain, self.handle_exit, sig, frame)
            return
        routes.leaving = routes.draining = True
        super().handle_exit(sig, frame)


def _run(
    settings: Settings, sockets: Sequence[socket.socket], announce: Callable[[], None]
) -> None:
    with spans_sent(settings.config):
        make(settings, announce).run(sockets=list(sockets))


def make(settings: Settings, announce: Callable[[], None]) -> uvicorn.Server:
    """The server of this process; `announce` is called once requests are going to be answered."""
    app = settings.app()
    poll = polling(settings.config.idle_poll, app.broadcaster.store)
    app.broadcaster.sender.poll = poll
    shortcuts = {**app.broadcaster.routes.table, **app.broadcaster.peers.table}
    config = uvicorn.Config(
        app,
        http=http_protocol(settings.config, shortcuts, poll),
        interface="asgi3",
        lifespan="on",
        ws=websocket_protocol(poll),
        ws_max_size=settings.config.websocket_max_message_size,
        ws_per_message_deflate=False,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=settings.grace,
    )
    return _Server(config, settings, app, announce)


def _work(settings: Settings, sockets: Sequence[socket.socket]) -> None:
    """A worker process."""
    settings.set_up_logging()
    try:
        _run(settings, sockets, lambda: None)
    except ConfigError as e:
        log.error("%s", e)
        sys.exit(_STARTUP_FAILURE)
    except Exception:
        log.exception("a worker ends by an error")
        sys.exit(1)


class _Workers:
    """Keeps a number of worker processes alive until told to stop."""

    def __init__(self, settings: Settings, sockets: Sequence[socket.socket], number: int) -> None:
        self._arguments = (settings, sockets)
        self._number = number
        self._processes: list[BaseProcess] = []
        self._stopping = False
        self._wake_read, self._wake_write = os.pipe()
        self._context = multiprocessing.get_context("spawn")

    def run(self, announce: Callable[[], None]) -> int:
        signal.signal(signal.SIGTERM, self._stop)
        self._heed_hang_up(self._pass_on)
        processes = self._processes = [self._start() for _ in range(self._number)]
        announce()
        status = 0
        while not self._stopping:
            wait([self._wake_read, *(p.sentinel for p in processes)])
            for dead in [p for p in processes if not p.is_alive()]:
                if self._stopping:
                    break
                if dead.exitcode == _STARTUP_FAILURE:
                    status, self._stopping = 1, True
                    break
                log.error(
                    "worker %d ended with status %s; starting another", dead.pid, dead.exitcode
                )
                forget_worker(dead.pid or 0)
                wait([self._wake_read], _RESTART_PAUSE)
                processes[processes.index(dead)] = self._start()
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        return status

    def _start(self) -> BaseProcess:
        # ignored signals stay ignored in the new program, so that Ctrl-C only ever means us, and
        # SIGHUP means nothing before it is dealt with
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._heed_hang_up(signal.SIG_IGN)
        process = self._context.Process(target=_work, args=self._arguments)
        process.start()
        signal.signal(signal.SIGINT, self._stop)
        self._heed_hang_up(self._pass_on)
        return process

    def _heed_hang_up(self, handler: Any) -> None:
        if self._arguments[0].config.tls_cert is not None:  # else it ends us, as any program
            signal.signal(signal.SIGHUP, handler)

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signum)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        if self._stopping:  # a second signal does not wait for the drain of the workers
            for process in self._processes:
                process.terminate()
        self._stopping = True
        os.write(self._wake_write, b"\0")
