"""A body in parts: where to cut it, and how to put it together again.

Sending works on offsets and lengths and never holds the body; `Reassembly` writes what arrives
into anything with `write`, e.g. a `lonelypsp.spool.Spool`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from lonelypsp.errors import RemoteProtocolError
from lonelypsp.messages import StreamPart, StreamStart

SMALLEST_PART = 512
"""A part carries at least so much of the body, even if its frame gets larger than it should."""
HEAD_ALLOWANCE = 128


@dataclass(frozen=True, slots=True)
class Part:
    """`length` bytes of a body from `offset`, sent as part `id`."""

    id: int
    offset: int
    length: int


def fits_one_frame(length: int, frame_length: int, max_frame_length: int | None) -> bool:
    """Whether a body goes as one NOTIFY; else it goes as a stream, though maybe in one part.

    Args:
        length: of the body before compression.
        frame_length: of the NOTIFY that it would make.
        max_frame_length: None: there is no limit.
    """
    if max_frame_length is None:
        return True
    return length + HEAD_ALLOWANCE < max_frame_length and frame_length < max_frame_length


def split(
    length: int, max_frame_length: int | None, head_length: Callable[[int], int]
) -> Iterator[Part]:
    """Where to cut a body of `length` bytes; without a byte, it is one empty part.

    Args:
        length: of the body as it is sent, i.e. after compression.
        max_frame_length: None: there is no limit, so there is one part.
        head_length: bytes in front of the body in the frame of this part id, asked for each part
            just before it is made, so that the part can be signed then.
    """
    offset = part_id = 0
    while part_id == 0 or offset < length:
        head = 0 if max_frame_length is None else head_length(part_id)
        size = part_length(length - offset, max_frame_length, head)
        yield Part(part_id, offset, size)
        offset += size
        part_id += 1


def part_length(remaining: int, max_frame_length: int | None, head_length: int) -> int:
    """How many of the `remaining` bytes go into the next part."""
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
