"""Where message bodies go while they are passed on: memory, or disk within `spool_quota`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from lonelypsp import guard
from lonelypsp.spool import Spool
from lonelypss.asgi import Receive, Scope
from lonelypss.config import BroadcasterConfig

WRITE_SIZE = 1024 * 1024
"""Bytes gathered before one write to a spool on disk."""
WRITE_CHUNKS = 64
"""Chunks gathered before that, since small ones cost more than their bytes."""


class NoRoom(Exception):
    """A message that cannot be stored.

    Attributes:
        status: 413: it is too large for ever; 507: there is no room now.
        retry_after: seconds, or None.
    """

    def __init__(self, status: int, text: str, retry_after: int | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.retry_after = retry_after


class Intake:
    """The spools of one process.

    Attributes:
        used: bytes of `spool_quota` that are taken.
    """

    def __init__(self, config: BroadcasterConfig) -> None:
        self.config = config
        self.used = 0

    def spool(self, length: int) -> Spool:
        """A spool for a body of `length` bytes.

        Raises:
            NoRoom: the quota does not allow it, or the disk does not take it.
        """
        config = self.config
        if length <= config.message_body_spool_size:
            return Spool(length, memory_limit=length)
        if length > config.spool_quota:
            raise NoRoom(
                413, f"a message of {length:,} bytes exceeds spool_quota ({config.spool_quota:,})"
            )
        if self.used + length > config.spool_quota:
            text = f"spool_quota ({config.spool_quota:,} bytes) is used up, try again later"
            raise NoRoom(507, text, 5)
        try:
            spool = Spool(
                length,
                memory_limit=config.message_body_spool_size,
                directory=config.spool_directory,
                freed=partial(self._release, length),
            )
        except OSError as e:
            raise _no_disk(e) from e
        self.used += length
        return spool

    def _release(self, length: int) -> None:
        self.used -= length


async def fill(
    spool: Spool, first: bytes, more: bool, next_chunk: Callable[[], Awaitable[tuple[bytes, bool]]]
) -> None:
    """Writes a body to `spool`, in threads if it is on disk.

    Args:
        first: its first bytes.
        more: whether `next_chunk` has others.
        next_chunk: gives the next bytes, and whether there are more.

    Raises:
        RemoteProtocolError: the body is longer than declared.
        NoRoom: the disk does not take it.
    """
    if not spool.on_disk:
        spool.write(first)
        while more:
            chunk, more = await next_chunk()
            spool.write(chunk)
        return
    gathered, size = [first], len(first)
    while more:
        chunk, more = await next_chunk()
        gathered.append(chunk)
        size += len(chunk)
        if size >= WRITE_SIZE or len(gathered) == WRITE_CHUNKS:
            await write(spool, *gathered)
            gathered, size = [], 0
    if gathered:
        await write(spool, *gathered)


async def read_into(scope: Scope, receive: Receive, spool: Spool, first: bytes) -> bool:
    """As `lonelypsp.guard.read_into`, and raises as `fill`."""
    try:
        return await guard.read_into(scope, receive, spool, first)
    except OSError as e:
        raise _no_disk(e) from e


async def write(spool: Spool, *chunks: bytes | memoryview) -> None:
    """A few chunks, in a thread; raises as `fill`."""
    try:
        await asyncio.to_thread(spool.write, *chunks)
    except OSError as e:
        raise _no_disk(e) from e


def _no_disk(e: OSError) -> NoRoom:
    return NoRoom(507, f"cannot spool the message (spool_directory): {e.strerror}")
