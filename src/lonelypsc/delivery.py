"""From the receiving endpoint to the program: shared bodies and one bounded buffer each.

**What happens when a buffer is full**: the newest message is refused. The subscription has a gap
from then on (its `on_receiving` runs before its next message), and the broadcaster is answered 503
with `Retry-After: 1`, so that it knows that the message was not taken.
"""

from __future__ import annotations

import asyncio
import io
from collections import deque
from dataclasses import dataclass
from typing import BinaryIO

from lonelypsc.errors import PubSubRequestConnectionAbandonedError
from lonelypsp import tracecontext
from lonelypsp.spool import Body


class SharedBody:
    """One received body with its topic, freed when the last of its holders lets go."""

    __slots__ = ("_body", "_holders", "topic", "tracing")

    def __init__(self, topic: bytes, body: Body, tracing: bytes = b"") -> None:
        self.topic = topic
        self.tracing = tracing
        self._body = body
        self._holders = 1

    @property
    def length(self) -> int:
        return self._body.length

    def hold(self) -> SharedBody:
        self._holders += 1
        return self

    def release(self) -> None:
        self._holders -= 1
        if not self._holders:
            self._body.close()

    def message(self, tracing: bytes | None = None) -> PubSubClientMessage:
        """For the program; `tracing`: of a step of its own."""
        data = self._body.data
        return PubSubClientMessage(
            topic=self.topic,
            sha512=self._body.sha512,
            data=self._body.open() if data is None else io.BytesIO(data),
            tracing=self.tracing if tracing is None else tracing,
        )


@dataclass(frozen=True, slots=True)
class PubSubClientMessage:
    """A message that arrived.

    Attributes:
        topic: what it was sent to.
        sha512: 64 bytes, checked.
        data: a readable, seekable binary file at its start, on disk when the message is larger
            than `message_body_spool_size` (reading it blocks); closed at the next iteration.
        tracing: of the step that deals with it, or as they came: see `trace_context`.
    """

    topic: bytes
    sha512: bytes
    data: BinaryIO
    tracing: bytes = b""

    @property
    def trace_context(self) -> dict[str, str]:
        """What carries on the trace of the message: `traceparent` and perhaps `tracestate`, as
        `opentelemetry.propagate.extract` takes them; empty: it has none."""
        return tracecontext.decode(self.tracing)


class Buffer:
    """What one subscription has yet to hand to the program. It starts with a gap: nothing is
    known of what was sent before."""

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._waiting: deque[SharedBody] = deque()
        self._bytes = 0
        self._news = asyncio.Event()
        self._end: str | None = None
        self.gap = True
        self.gap_tracing = b""

    def offer(self, body: SharedBody) -> bool:
        """Takes the message, or refuses it because the buffer is full."""
        if self._end is not None:
            return True  # on its way out: whoever left does not want it
        full = len(self._waiting) >= self._max_messages
        if full or (self._waiting and self._bytes + body.length > self._max_bytes):
            self.mark_gap()
            return False
        self._waiting.append(body.hold())
        self._bytes += body.length
        self._news.set()
        return True

    @property
    def closed(self) -> bool:
        return self._end is not None

    def mark_gap(self, tracing: bytes = b"") -> None:
        """Messages may have been missed, as a notice said whose step had `tracing`."""
        self.gap = True
        self.gap_tracing = tracing
        self._news.set()

    def take(self) -> SharedBody | None:
        """The oldest message, now the caller's to release.

        Raises:
            PubSubRequestConnectionAbandonedError: the buffer is closed.
        """
        if self._end is not None:
            raise PubSubRequestConnectionAbandonedError(self._end)
        if not self._waiting:
            return None
        body = self._waiting.popleft()
        self._bytes -= body.length
        return body

    async def news(self) -> None:
        """Waits until there may be something to take. Nothing is lost when it is cancelled."""
        self._news.clear()
        await self._news.wait()

    def close(self, reason: str) -> None:
        """Frees everything; whoever waits or takes is told the reason."""
        if self._end is None:
            self._end = reason
        while self._waiting:
            self._waiting.popleft().release()
        self._bytes = 0
        self._news.set()
