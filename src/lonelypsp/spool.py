"""A body in memory or on disk, hashed while it is written, readable by many at once.

`Spool` is written once, front to back: in memory up to a limit, from there on in one temporary
file. `finish` turns it into a `Body`, which any number of readers read at their own offsets, so
that memory grows neither with the body nor with the number of readers.

Writing to and reading from the disk blocks; callers on an event loop do it in a thread when
`on_disk` says so.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO

from lonelypsp.errors import RemoteProtocolError

_MOST_AT_ONCE = 64  # pieces in one system call
_PIECE = 512 * 1024  # bytes; less is not worth a thread for the hash, more leaves the cache
DEFAULT_MEMORY_LIMIT = 10 * 1024 * 1024
_hashers = ThreadPoolExecutor(os.cpu_count(), "hash")


class SocketError(Exception):
    """A connection broke while a body was read from it."""


def _nothing() -> None:
    pass


class Body:
    """A finished body. Whoever gets it closes it; `share` makes another one who has to.

    Attributes:
        length: bytes.
        sha512: 64 bytes.
        data: the bytes themselves when they are in memory, else None.
    """

    __slots__ = ("_file", "_freed", "_holders", "data", "length", "sha512")

    def __init__(
        self,
        data: bytes | None,
        file: BinaryIO | None,
        length: int,
        sha512: bytes,
        freed: Callable[[], None] = _nothing,
    ) -> None:
        self.data = data
        self._file = file
        self.length = length
        self.sha512 = sha512
        self._freed = freed
        self._holders = 1

    @classmethod
    def of(cls, data: bytes) -> Body:
        """A body in memory."""
        return cls(data, None, len(data), hashlib.sha512(data).digest())

    @classmethod
    def received(cls, data: bytes, length: int, sha512: bytes) -> Body:
        """A body in memory that arrived in one piece; the shorter way of `Spool`, and as strict.

        Args:
            length: bytes, as declared.
            sha512: as declared.

        Raises:
            RemoteProtocolError: its length or its hash differs.
        """
        if len(data) > length:
            raise _too_long(length)
        if len(data) < length:
            raise _too_short(len(data), length)
        if hashlib.sha512(data).digest() != sha512:
            raise _other_hash()
        return cls(data, None, length, sha512)

    @property
    def on_disk(self) -> bool:
        return self._file is not None

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer only at the end. Readers do not interfere.

        Raises:
            ValueError: the body was closed.
        """
        data, file = self.data, self._file  # another thread may close the body meanwhile
        if data is not None:
            return data[offset : offset + length]
        if file is None:
            raise ValueError("the body is closed: a message is valid until the next iteration")
        return os.pread(file.fileno(), length, offset)

    def send_at(self, socket: int, offset: int, length: int) -> int:
        """Sends up to `length` bytes of a body on disk from `offset` on to a socket, a file
        descriptor, without reading them; how many, 0 at the end. Not all systems can do that.

        Raises:
            OSError: of the socket or of the disk; BlockingIOError: the socket takes nothing now.
            ValueError: the body was closed.
        """
        file = self._file
        if file is None:
            raise ValueError("the body is closed, or in memory")
        return os.sendfile(socket, file.fileno(), offset, length)

    def view(self) -> memoryview:
        """All of it, without reading what is on disk before it is looked at."""
        if self.data is not None:
            return memoryview(self.data)
        if self._file is None:
            raise ValueError("the body is closed")
        return memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))

    def open(self) -> BinaryIO:
        """A readable, seekable binary file over the body, with a position of its own."""
        return io.BufferedReader(_BodyFile(self))

    def share(self) -> Body:
        """The same body for one more holder."""
        self._holders += 1
        return self

    def close(self) -> None:
        """When the last holder closes it, memory and disk are freed; reading fails from then on."""
        self._holders -= 1
        if self._holders != 0:
            return
        self.data = None
        if self._file is not None:
            self._file.close()
            self._file = None
        self._freed()


class _BodyFile(io.RawIOBase):
    def __init__(self, body: Body) -> None:
        self._body = body
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self._body.read_at(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._body.length}
        if whence not in start:
            raise ValueError(f"whence {whence} is not 0, 1 or 2")
        position = start[whence] + offset
        if position < 0:
            raise ValueError(f"negative seek position {position}")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position


def _write_out(file: BinaryIO, chunks: Sequence[bytes | memoryview]) -> None:
    written = 0
    if 1 < len(chunks) <= _MOST_AT_ONCE and hasattr(os, "writev"):
        written = os.writev(file.fileno(), chunks)
        if written == sum(map(len, chunks)):
            return
    rest = memoryview(chunks[0] if len(chunks) == 1 else b"".join(chunks))[written:]
    while rest:
        rest = rest[file.write(rest) :]


class Spool:
    """Takes a body whose length was declared; use as a context manager, or `close` it.

    Args:
        length: the declared length; more than that is an error as soon as it is seen.
        memory_limit: bytes; a body declared longer goes to a temporary file.
        directory: where that file is made; None: the system's temporary directory. It has no
            name, so it is gone with the process, however that ends.
        freed: called once, when all is freed again: the spool, or the body it became.
    """

    def __init__(
        self,
        length: int,
        *,
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
        directory: str | None = None,
        freed: Callable[[], None] = _nothing,
    ) -> None:
        self.length = length
        self.written = 0
        self._hash = hashlib.sha512()
        self._memory = io.BytesIO()
        self._file: BinaryIO | None = None
        self._closed = False
        self._writing = threading.Lock()
        self._pieces: tuple[memoryview, ...] = ()
        if length > memory_limit:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        self._freed = freed

    @property
    def on_disk(self) -> bool:
        return self._file is not None

    def write(self, *chunks: bytes | memoryview) -> None:
        """Appends `chunks`.

        Raises:
            RemoteProtocolError: the body is longer than declared.
            OSError: the disk is full or broken.
            ValueError: it is closed; whoever writes in a thread may not know.
        """
        with self._holding():
            self.written += sum(map(len, chunks))
            if self.written > self.length:
                raise _too_long(self.length)
            for chunk in chunks:
                self._hash.update(chunk)
            if self._file is None:
                self._memory.writelines(chunks)
            else:
                _write_out(self._file, chunks)

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Keeps the file open: its number could soon be that of another."""
        try:
            with self._writing:
                if self._closed:
                    raise ValueError("the spool is closed")
                yield
        finally:
            if self._closed:
                self.close()

    def read_from(self, socket: int, most: int) -> int:
        """Appends up to `most` of the missing bytes from a socket, a file descriptor, to a spool on
        disk; how many, 0 at the end of what the peer sends. Not all systems can do that.

        While one piece is written and the next one read, a thread of its own hashes; the same two
        buffers serve for all pieces.

        Raises:
            BlockingIOError: there is nothing in the socket now.
            SocketError: it is broken.
            OSError, ValueError: as `write`.
        """
        with self._holding():
            if self._file is None:
                raise ValueError("the spool is in memory")
            return self._take(self._file, socket, min(most, self.length - self.written))

    def _take(self, file: BinaryIO, socket: int, most: int) -> int:
        self._pieces = self._pieces or (
            memoryview(bytearray(_PIECE)),
            memoryview(bytearray(_PIECE)),
        )
        piece, other = self._pieces
        taken = 0
        hashing: Future[None] | None = None
        try:
            while taken < most and not self._closed:
                try:
                    number = os.readv(socket, [piece[: most - taken]])
                except BlockingIOError:
                    if not taken:
                        raise
                    break
                except OSError as e:
                    raise SocketError(*e.args) from e
                if not number:
                    break
                if hashing is not None:
                    hashing.result()
                hashing = _hashers.submit(self._hash.update, piece[:number])
                taken += number
                self.written += number
                _write_out(file, [piece[:number]])
                piece, other = other, piece
        finally:
            if hashing is not None:
                hashing.result()
        return taken

    def finish(self, sha512: bytes) -> Body:
        """The body, if it is as long as declared and its hash is `sha512`.

        Raises:
            RemoteProtocolError: it is too short, or its hash differs.
        """
        if self.written != self.length:
            raise _too_short(self.written, self.length)
        if self._hash.digest() != sha512:
            raise _other_hash()
        return self.seal()

    def seal(self) -> Body:
        """The body as it was written, where nobody could know its length or hash before."""
        data = None if self._file else self._memory.getvalue()
        body = Body(data, self._file, self.written, self._hash.digest(), self._freed)
        self._file, self._memory, self._freed = None, io.BytesIO(), _nothing
        self._pieces = ()
        return body

    def close(self) -> None:
        """Frees what `finish` has not handed on."""
        self._closed = True
        if self._writing.acquire(blocking=False):  # else whoever writes in a thread does it
            self._memory = io.BytesIO()
            if self._file is not None:
                self._file.close()
                self._file = None
            self._writing.release()
        freed, self._freed = self._freed, _nothing
        freed()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _too_long(length: int) -> RemoteProtocolError:
    return RemoteProtocolError(f"the message is longer than the {length:,} bytes its head declares")


def _too_short(present: int, length: int) -> RemoteProtocolError:
    return RemoteProtocolError(f"the message ends after {present:,} of {length:,} bytes")


def _other_hash() -> RemoteProtocolError:
    return RemoteProtocolError("the message does not have the SHA-512 that came with it")
