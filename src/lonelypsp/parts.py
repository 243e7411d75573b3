"""A body in parts: where to cut it, and how to put it together again.

Sending works on lengths and never holds the body; `Reassembly` writes what arrives
into anything with `write`, e.g. a `lonelypsp.spool.Spool`.
"""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

from lonelypsp.errors import RemoteProtocolError
from lonelypsp.messages import StreamPart, StreamStart

SMALLEST_PART = 512
"""A part carries at least so much of the body, even if its frame gets larger than it should."""


def part_length(remaining: int, max_frame_length: int | None, head_length: int) -> int:
    """How many of the `remaining` bytes go into the next part.

    Args:
        max_frame_length: None: there is no limit.
        head_length: bytes in front of the body in the frame.
    """
    if max_frame_length is None:
        return remaining
    return min(remaining, max(SMALLEST_PART, max_frame_length - head_length))


class Sink(Protocol):
    """Takes views of frames: it must copy, or keep, what it is given."""

    def write(self, chunk: Any, /) -> object: ...


class Reassembly:
    """One body that arrives in parts, from its start on.

    Args:
        start: part 0, which is to be added like all others.
        sink: where the body goes.
        check_hash: False where the sink compares the hash itself, as `Spool.finish` does; hashing
            is the larger part of the work.

    Attributes:
        start: what part 0 said about the whole.
        written: bytes of the body so far.
    """

    def __init__(self, start: StreamStart, sink: Sink, *, check_hash: bool = True) -> None:
        self.start = start
        self.written = 0
        self._next = 0
        self._sink = sink
        self._hash = hashlib.sha512() if check_hash else None

    @property
    def complete(self) -> bool:
        """Whether the whole body was written."""
        return self.written == self.start.compressed_length

    def add(self, part: StreamStart | StreamPart) -> bool:
        """Writes the body of `part`; whether that completes the whole.

        Raises:
            RemoteProtocolError: it is not the next part of this body, or the body gets longer than
                declared, or it is complete and its hash differs. Nothing can be added after that.
        """
        if self._next and self.complete:
            raise RemoteProtocolError("a part arrived after the last one")
        if part.identifier != self.start.identifier:
            raise RemoteProtocolError("a part of another message arrived before the last one")
        if part.part_id != self._next:
            raise RemoteProtocolError(f"part {part.part_id} where {self._next} was expected")
        if self.written + len(part.body) > self.start.compressed_length:
            raise RemoteProtocolError(
                f"the message is longer than the {self.start.compressed_length:,} bytes declared"
            )
        self._next += 1
        self._sink.write(part.body)
        self.written += len(part.body)
        if self._hash is not None:
            self._hash.update(part.body)
            if self.complete and self._hash.digest() != self.start.sha512:
                raise RemoteProtocolError("the message does not have the SHA-512 that came with it")
        return self.complete
