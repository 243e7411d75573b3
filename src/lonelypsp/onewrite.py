"""What is written in one turn of the event loop leaves in one write (docs/topics/protocol.md,
"Replies").

ASGI servers write the head of a response and its body separately, and each websocket frame. A write
costs a system call and wakes the peer, which is more than making a frame; and older peers may see a
body that is cut in pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_JOINED = 64 * 1024  # bytes; more is not worth copying


class OneWrite:
    """A transport that holds back what is written until the turn of the event loop ends.

    Args:
        transport: the real one, an `asyncio.Transport`.
        call_soon: of the loop it belongs to.

    Attributes:
        written: bytes so far.
    """

    def __init__(self, transport: Any, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._transport = transport
        self._call_soon = call_soon
        self._held: list[bytes] = []
        self._size = 0
        self._scheduled = False
        self.written = 0

    def write(self, data: bytes) -> None:
        self.written += len(data)
        if len(data) > _JOINED:
            self._flush()
            self._transport.write(data)
            return
        self._held.append(data)
        self._size += len(data)
        if self._size > _JOINED:
            self._flush()
        elif not self._scheduled:
            self._scheduled = True
            self._call_soon(self._end_of_turn)

    def write_now(self, data: bytes) -> None:
        """Writes a whole answer, to which nothing will be added."""
        self.written += len(data)
        self._flush()
        self._transport.write(data)

    def _end_of_turn(self) -> None:
        self._scheduled = False
        self._flush()

    def _flush(self) -> None:
        if self._held:
            held, self._held, self._size = self._held, [], 0
            self._transport.write(held[0] if len(held) == 1 else b"".join(held))

    def unwrap(self) -> Any:
        """The real transport, for who gathers his writes himself."""
        self._flush()
        return self._transport

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        self._flush()
        return getattr(self._transport, name)
