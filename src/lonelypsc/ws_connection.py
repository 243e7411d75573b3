"""One websocket of a client: binary frames in and out, nothing about what they mean.

The rules of websockets come from the package `websockets`, which does no I/O; this adds the socket,
and a shortcut for the frames of the ordinary case (`lonelypsp.frames`).
Frames that are sent during one turn of the event loop leave in one write, because a write costs
more than making several frames.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from os import urandom
from ssl import SSLContext, create_default_context
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from lonelypsc.errors import PubSubError
from lonelypsp.frames import Cutter, masked_frame

if TYPE_CHECKING:
    from websockets.client import ClientProtocol

_RESUME_PART = 2
_MOMENT = 0.002  # seconds
_KEYS = 1024
_BYTES_AHEAD = 1024 * 1024
_PORTS = {"ws": 80, "wss": 443}
ABNORMAL = 1006


class ConnectionLost(PubSubError):
    """The websocket is gone, or never came about."""


class Socket(asyncio.Protocol):
    """Use `connect`.

    Attributes:
        writable: set while the peer takes what is sent; wait for it before sending much.
        on_writable: called when that is so again.
        on_frames: called when frames have arrived while somebody is in `arrived`; whether that
            shall return now.
        end: why nothing more can be sent; None: it can.
    """

    def __init__(self, url: str, *, max_size: int, max_frames: int, heartbeat: float) -> None:
        websockets = websockets_package()
        self._loop = asyncio.get_running_loop()
        self._ws: ClientProtocol = websockets.client.ClientProtocol(
            websockets.uri.parse_uri(url), max_size=max_size
        )
        self._mask = vars(websockets.frames)["apply_mask"]  # in C where that was built
        self._keys = _random_keys()
        self._output: list[bytes] = []  # goes before that of the library
        self._cutter = Cutter(None, max_size, self._by_library)
        self._arriving: list[bytes] = []
        self._data_frames = (websockets.Opcode.BINARY, websockets.Opcode.CONT)
        self._frame_class = websockets.Frame
        self._opcodes = websockets.Opcode
        self._open = websockets.State.OPEN
        self._transport: asyncio.Transport | None = None
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._flushing = False
        self._late = 0
        self._late_timer: asyncio.TimerHandle | None = None
        self.on_writable: Callable[[], None] = _nothing
        self.on_frames: Callable[[], bool] = _leave_all
        self.writable = asyncio.Event()
        self.writable.set()
        self._frames: deque[bytes] = deque()
        self._begun = bytearray()  # a frame in fragments
        self._bytes = 0
        self._max_frames = max_frames
        self._paused = False
        self._reader: asyncio.Future[None] | None = None
        self.end: str | None = None
        self._heartbeat = heartbeat
        self._heard = self._loop.time()
        self._asked = False
        self._timer: asyncio.TimerHandle | None = None

    # the user's side

    async def arrived(self) -> None:
        """Waits for frames, or for what `on_frames` has to say.

        Raises:
            ConnectionLost: there are none, and there will be none; says why.
        """
        if self._frames:
            return
        if self.end is not None:
            raise ConnectionLost(self.end)
        self._reader = self._loop.create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def take(self) -> bytes | None:
        """The next frame, if one is there."""
        if not self._frames:
            return None
        frame = self._frames.popleft()
        self._bytes -= len(frame)
        if self._paused and self._transport is not None and not self._is_full(_RESUME_PART):
            self._paused = False
            self._transport.resume_reading()
        return frame

    def send(self, frame: bytes) -> None:
        """Sends a frame at the end of this turn of the loop; after the end, it does nothing."""
        if self.end is None:
            self._output.append(masked_frame(frame, next(self._keys), self._mask))
            self._flush_soon()

    def send_late(self, frame: bytes, most: int) -> None:
        """Sends a frame for which nobody waits: with the next other one, or when there are `most`
        of them, or after a moment. It saves the peer a wake-up for each."""
        if self.end is None:
            self._output.append(masked_frame(frame, next(self._keys), self._mask))
            self._late += 1
            if self._late >= most:
                self._flush_soon()
            elif self._late_timer is None:
                self._late_timer = self._loop.call_later(_MOMENT, self._flush)

    async def close(self, code: int, reason: str, patience: float | None) -> None:
        """Says goodbye and waits `patience` seconds for an answer; frames that come meanwhile are
        dropped."""
        self.fail(code, reason)
        while self.take() is not None:  # else the answer may never be read
            pass
        try:
            await asyncio.wait((self._gone,), timeout=patience)
        finally:
            self.abort("")

    def fail(self, code: int, reason: str) -> None:
        """Tells the peer what it did wrong, without waiting for anything."""
        if self.end is None:
            self._ws.send_close(code, reason.encode()[:120].decode("utf-8", "ignore"))
            self._ended(f"closed by us: {code} {reason}")
            self._flush()

    def abort(self, why: str) -> None:
        """Ends it at once."""
        self._ended(why)
        if self._transport is not None:
            self._transport.abort()

    async def opened(self) -> None:
        """Returns after the handshake. Raises ConnectionLost."""
        await self._opened

    # the socket's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is not one by class
        self._ws.send_request(self._ws.connect())
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        self._asked = False
        wanted, arriving = self.end is None, self._arriving
        self._cutter.cut(data, arriving)
        if arriving and wanted:
            self._frames.extend(arriving)
            self._bytes += sum(map(len, arriving))
        arriving.clear()
        if self._frames and self._reader is not None and self.on_frames():
            self._wake()
        if self._flushing or not self._late or self.end is not None:
            self._flush()
        if not self._paused and self._is_full(1) and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _by_library(self, data: bytes) -> bool:
        """What is no ordinary frame; whether the websocket is open after it."""
        self._ws.receive_data(data)
        for event in self._ws.events_received():
            if isinstance(event, self._frame_class):
                self._take(event)
            elif self._ws.handshake_exc is None:
                self._timer = self._loop.call_later(self._heartbeat, self._beat)
                self._opened.set_result(None)
        if self._ws.handshake_exc is not None:
            self._ended(f"the broadcaster does not take websockets here: {self._ws.handshake_exc}")
        if self._ws.parser_exc is not None:
            self._ended(f"the broadcaster breaks the rules of websockets: {self._ws.parser_exc}")
        return self._ws.state is self._open

    def eof_received(self) -> None:
        self._ws.receive_eof()
        self._flush()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()
        self.on_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._ended(f"connection lost: {exc or 'the other end closed it'}")
        self.writable.set()
        if not self._gone.done():
            self._gone.set_result(None)

    def _is_full(self, part: int) -> bool:
        return len(self._frames) * part > self._max_frames or self._bytes * part > _BYTES_AHEAD

    def _take(self, frame: Any) -> None:
        opcodes = self._opcodes
        if frame.opcode in self._data_frames:
            if self.end is None:
                self._take_data(frame)
        elif frame.opcode is opcodes.CLOSE:
            close = self._ws.close_rcvd
            code, reason = (close.code, close.reason) if close else (ABNORMAL, "")
            self._ended(f"closed by the broadcaster: {code} {reason}".rstrip())
        elif frame.opcode is opcodes.TEXT:
            self._ws.fail(1003, "a text frame")
            self._ended("the broadcaster sent a text frame")

    def _take_data(self, frame: Any) -> None:
        whole = frame.data
        if self._begun or not frame.fin:
            self._begun += whole
            if not frame.fin:
                return
            whole = bytes(self._begun)
            self._begun.clear()
        self._arriving.append(whole)

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        self._late = 0
        if self._late_timer is not None:
            self._late_timer.cancel()
            self._late_timer = None
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._output += self._ws.data_to_send()
        if self._output:
            output, self._output = self._output, []
            transport.write(b"".join(output))
            if output[-1] == b"":  # its way to say: nothing follows
                transport.close()

    def _beat(self) -> None:
        silence = self._loop.time() - self._heard
        if self._paused or silence < self._heartbeat:
            wait = self._heartbeat if self._paused else self._heartbeat - silence
        elif not self._asked:
            self._asked = True
            self._ws.send_ping(b"")
            self._flush()
            wait = self._heartbeat / 2
        else:
            self._ended(f"the broadcaster was silent for {silence:.1f} s (heartbeat)")
            self.abort("")
            return
        self._timer = self._loop.call_later(wait, self._beat)

    def _ended(self, why: str) -> None:
        """The first reason counts."""
        if self.end is not None:
            return
        self.end = why
        if not self._opened.done():
            self._opened.set_exception(ConnectionLost(why))
            self._opened.exception()  # seen, even if nobody waits
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _random_keys() -> Iterator[bytes]:
    """Keys that nobody can foresee, drawn many at a time."""
    while True:
        drawn = urandom(4 * _KEYS)
        for at in range(0, len(drawn), 4):
            yield drawn[at : at + 4]


def _nothing() -> None:
    pass


def _leave_all() -> bool:
    return True


async def connect(
    url: str, *, ssl_context: SSLContext | None, max_size: int, max_frames: int, heartbeat: float
) -> Socket:
    """An open websocket.

    Args:
        url: ws:// or wss://.
        ssl_context: for wss://; None: the system's certificates.
        max_size: bytes of a frame; a larger one ends the connection.
        max_frames: received and not yet taken; above it nothing is read.
        heartbeat: seconds of silence after which the peer is asked for a sign of life.

    Raises:
        ConnectionLost: it cannot be opened; says why.
    """
    parts = urlsplit(url)
    tls = None
    if parts.scheme == "wss":
        tls = ssl_context or create_default_context()
    socket = Socket(url, max_size=max_size, max_frames=max_frames, heartbeat=heartbeat)
    try:
        await asyncio.get_running_loop().create_connection(
            lambda: socket, parts.hostname or "", parts.port or _PORTS[parts.scheme], ssl=tls
        )
        await socket.opened()
    except (OSError, UnicodeError) as e:  # UnicodeError: of a name that no host can have
        raise ConnectionLost(f"cannot connect: {e}") from e
    except BaseException:
        socket.abort("given up")
        raise
    return socket


def websockets_package() -> ModuleType:
    """Raises PubSubError: it is not installed."""
    try:
        import websockets
        import websockets.client
        import websockets.uri
    except ImportError as e:
        raise PubSubError(
            f"{e}: websockets need pip install 'lonelypsc[standard]'; the HTTP client does not"
        ) from e
    return websockets
