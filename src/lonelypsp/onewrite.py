"""Responses leave in one write (docs/topics/protocol.md, "Replies").

ASGI servers write the head of a response and its body separately. That costs a second system call,
wakes the peer twice, and older peers may see a body that is cut in pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_JOINED = 64 * 1024  # bytes; more is not worth copying


class OneWrite:
    """A transport that holds back the first write of a turn of the event loop for the second.

    Args:
        transport: the real one, an `asyncio.Transport`.
        call_soon: of the loop it belongs to.
    """

    def __init__(self, transport: Any, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._transport = transport
        self._call_soon = call_soon
        self._held: bytes | None = None

    def write(self, data: bytes) -> None:
        if self._held is None:
            self._held = data
            self._call_soon(self._flush)
        elif len(data) <= _JOINED:
            held, self._held = self._held, None
            self._transport.write(held + data)
        else:
            self._flush()
            self._transport.write(data)

    def _flush(self) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            self._transport.write(held)

    def unwrap(self) -> Any:
        """The real transport, for a protocol with longer conversations than one response."""
        self._flush()
        return self._transport

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        self._flush()
        return getattr(self._transport, name)
