"""What `notify` sends: bytes or a part of a file, hashed and read in pieces, also repeatedly."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import BinaryIO

from lonelypsp.wire import SHA512_LENGTH

BytesLike = bytes | bytearray | memoryview
Progress = Callable[[int, int], None]

SMALL = 64 * 1024
"""Bytes up to which a message is sent in one piece with its head."""
_PIECE = 1024 * 1024
_BUFFER = 256 * 1024
_BUFFERED = (io.BufferedReader, io.BufferedRandom)
_STRETCH = 32 * 1024 * 1024  # bytes hashed by one call of a thread, which cancelling does not stop


class Content:
    """A message on its way out.

    Attributes:
        length: bytes.
        sha512: 64 bytes; known after `prepare`.
    """

    def __init__(
        self,
        *,
        data: BytesLike | None,
        sync_file: BinaryIO | None,
        length: int | None,
        sha512: bytes | None,
        progress: Progress | None,
    ) -> None:
        if (data is None) == (sync_file is None):
            raise ValueError("notify: give exactly one of data and sync_file")
        if sha512 is not None and len(sha512) != SHA512_LENGTH:
            raise ValueError(f"notify: sha512 must be {SHA512_LENGTH} bytes, not {len(sha512)}")
        if length is not None and length < 0:
            raise ValueError("notify: length must not be negative")
        self._view = None if data is None else memoryview(data).cast("B")
        self._file = sync_file
        self._length = length
        self._offset = 0
        # a try that was given up may still be reading in its thread when the next one begins
        self._seeking = threading.Lock()
        self._progress = progress
        self.sha512 = sha512 or b""
        self.length = 0

    async def prepare(self) -> None:
        """Finds out length and hash.

        Raises:
            ValueError: the length is not that of the data, or the file cannot be rewound.
            OSError: the file cannot be read.
        """
        available = await self._measure()
        if self._length is not None and self._length > available:
            raise ValueError(f"notify: length is {self._length:,}, there are {available:,} bytes")
        if self._view is not None and self._length not in (None, available):
            raise ValueError(f"notify: length is {self._length:,}, data has {available:,} bytes")
        self.length = available if self._length is None else self._length
        if not self.sha512:
            hasher = hashlib.sha512()
            if self.length <= SMALL and self._view is not None:
                hasher.update(self._view)
            else:
                for at in range(0, self.length, _STRETCH):
                    await asyncio.to_thread(self._hash, hasher, at, min(at + _STRETCH, self.length))
            self.sha512 = hasher.digest()

    def _hash(self, hasher: hashlib._Hash, at: int, end: int) -> None:
        if self._view is not None:
            hasher.update(self._view[at:end])
            return
        assert self._file is not None
        file = _plain(self._file)
        buffer = memoryview(bytearray(_BUFFER))  # one for all, since fresh memory takes time
        while at < end:
            if file is None:
                piece = self.read(at, min(_PIECE, end - at))
            else:
                size = os.preadv(file.fileno(), [buffer[: end - at]], self._offset + at)
                piece = buffer[:size]
            if not piece:
                raise self._shorter(at)
            hasher.update(piece)
            at += len(piece)

    async def _measure(self) -> int:
        if self._view is not None:
            return len(self._view)
        file = self._file
        assert file is not None

        def ends() -> tuple[int, int]:
            offset = file.tell()
            return offset, file.seek(0, io.SEEK_END)

        try:
            self._offset, end = await asyncio.to_thread(ends)
        except io.UnsupportedOperation as e:
            raise ValueError("notify: sync_file must be seekable: retries read it again") from e
        return max(0, end - self._offset)

    def whole(self) -> bytes | None:
        """The message itself when it is small and in memory."""
        if self._view is None or self.length > SMALL:
            return None
        return self._view.tobytes()

    @property
    def view(self) -> memoryview | None:
        """The message itself if it is in memory."""
        return self._view

    def read(self, offset: int, size: int) -> bytes | memoryview:
        """`size` bytes from `offset`; of a file, this blocks.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file has become shorter.
        """
        if self._view is not None:
            return self._view[offset : offset + size]
        pieces, at = [], offset
        while at < offset + size:
            piece = self._read_at(self._offset + at, offset + size - at)
            if not piece:
                raise self._shorter(at)
            pieces.append(piece)
            at += len(piece)
        return b"".join(pieces)

    async def stream(self, head: bytes) -> AsyncGenerator[bytes | memoryview, None]:
        """`head` and the message, from its beginning. Raises OSError, ValueError, see `read`."""
        yield head
        sent = 0
        async for piece in self._pieces():
            yield piece
            sent += len(piece)
            self.report(sent)

    def report(self, sent: int) -> None:
        """Tells the program how much of this try was handed to the network."""
        if self._progress is not None:
            self._progress(sent, self.length)

    async def _pieces(self) -> AsyncIterator[bytes | memoryview]:
        at = 0
        while at < self.length:
            size = min(_PIECE, self.length - at)
            if self._view is not None:
                yield self._view[at : at + size]
            else:
                piece = await asyncio.to_thread(self._read_at, self._offset + at, size)
                if not piece:
                    raise self._shorter(at)
                size = len(piece)
                yield piece
            at += size

    def _read_at(self, offset: int, size: int) -> bytes:
        assert self._file is not None
        with self._seeking:
            self._file.seek(offset)
            return self._file.read(size)

    def _shorter(self, at: int) -> ValueError:
        return ValueError(f"notify: the file ends at {at:,} of {self.length:,} bytes")


def _plain(file: BinaryIO) -> io.FileIO | None:
    """The file of the system that `file` has the bytes of, if it does nothing else to them."""
    raw: object = getattr(file, "raw", None) if type(file) in _BUFFERED else file
    return raw if type(raw) is io.FileIO and hasattr(os, "preadv") else None
