"""The globs of a database in memory, and how they keep up with it.

The database counts the versions of its globs. Each question to it also tells the version, and
`GlobSet.catch_up` reads what has changed since ours before anything is matched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lonelypsp.globs import GlobIndex
from lonelypss import collector
from lonelypss.store.base import Kind, Subscription

Row: TypeAlias = tuple[int, bytes | None, str | None, str | None]
"""id, pattern, url, recovery; no pattern: the row is gone."""
Cursor: TypeAlias = tuple[int, int]
"""The version and the id of a glob: those with higher ones come after it."""
BEGIN: Cursor = (-1, 0)
_Present: TypeAlias = tuple[int, bytes, str, str | None]

SLICE = 500
"""Changed globs that are taken over in one go; more would hold up the event loop."""
PAGE = 5000
"""Globs that are read in one go where all are read."""
_URLS_SHARED = 20_000


@dataclass(frozen=True, slots=True)
class GlobChange:
    """What leads from one version to another.

    Attributes:
        is_complete: `rows` begin a list of all globs there are, instead of what has changed.
        more: where the next rows begin, if any follow.
    """

    version: int
    is_complete: bool
    rows: Sequence[Row]
    more: Cursor | None = None


class GlobSet:
    """All globs of one version of the database.

    Args:
        read: what has changed since a version, or, where that is too long ago, all globs, page by
            page in the order of their versions.
    """

    def __init__(self, read: Callable[[int, Cursor], Awaitable[GlobChange]]) -> None:
        self._read = read
        self._globs = _Globs()
        self._refresh: asyncio.Task[None] | None = None
        self._emptying: asyncio.Task[None] | None = None

    @property
    def version(self) -> int:
        """-1: nothing was read yet."""
        return self._globs.version

    def match(self, topic: bytes) -> list[Subscription]:
        return self._globs.match(topic)

    @property
    def is_refreshing(self) -> bool:
        return self._refresh is not None and not self._refresh.done()

    async def catch_up(self, version: int) -> None:
        """Brings the globs to `version` or later. All that wait share one refresh; raises what
        `read` raises."""
        while self.version < version:
            if not self.is_refreshing:
                self._refresh = asyncio.create_task(self.refresh())
                # its outcome counts as seen, even if all that wait are cancelled
                self._refresh.add_done_callback(lambda task: task.cancelled() or task.exception())
            assert self._refresh is not None
            await asyncio.shield(self._refresh)

    async def refresh(self) -> None:
        """Brings them to the newest version. Until it is done, all who need that wait.

        Later pages may be newer than the first. A glob that changes meanwhile moves to a later
        page, or beyond the last one, never to an earlier one; what of it was seen is met again at
        the next refresh, and changes nothing then.
        """
        change = first = await self._read(self.version, BEGIN)
        globs = _Globs() if first.is_complete else self._globs
        while True:
            for start in range(0, len(change.rows), SLICE):
                globs.update(change.rows[start : start + SLICE])
                await asyncio.sleep(0)
            if change.more is None:
                break
            collector.keep()
            change = await self._read(-1, change.more)
        globs.version = first.version
        before, self._globs = self._globs, globs
        if before is not globs:
            self._emptying = asyncio.create_task(before.empty())

    def apply(self, change: GlobChange) -> None:
        """Applies few changes at once."""
        self._globs.update(change.rows)
        self._globs.version = change.version

    async def close(self) -> None:
        """Waits for what is under way."""
        if self._refresh is not None:
            await asyncio.wait([self._refresh])
        if self._emptying is not None:
            self._emptying.cancel()
            await asyncio.wait([self._emptying])


class _Globs:
    """Rows are kept as they were read: a tuple of plain values costs the garbage collector nothing.
    Urls stand in many rows and are kept once."""

    def __init__(self) -> None:
        self.version = -1
        self._by_id: dict[int, _Present] = {}
        self._index: GlobIndex[int] = GlobIndex()
        self._urls: dict[str, str] = {}

    def match(self, topic: bytes) -> list[Subscription]:
        rows = map(self._by_id.__getitem__, self._index.match(topic))
        return [
            Subscription(id, Kind.GLOB, pattern, url, recovery)
            for id, pattern, url, recovery in rows
        ]

    async def empty(self) -> None:
        """Goes away piece by piece: to let go of a million objects at once takes long, too."""
        ids = list(self._by_id)
        for start in range(0, len(ids), SLICE):
            self.update((id, None, None, None) for id in ids[start : start + SLICE])
            await asyncio.sleep(0)

    def update(self, rows: Iterable[Row]) -> None:
        by_id, index, shared = self._by_id, self._index, self._urls.setdefault
        for id, pattern, url, recovery in rows:
            if before := by_id.pop(id, None):
                index.remove(before[1].decode(), id)
            if pattern is not None:
                assert url is not None
                recovery = recovery and shared(recovery, recovery)
                by_id[id] = (id, pattern, shared(url, url), recovery)
                index.add(pattern.decode(), id)
        if len(self._urls) > _URLS_SHARED:
            self._urls.clear()
