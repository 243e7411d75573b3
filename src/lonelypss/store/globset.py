"""The globs of a database in memory, and how they keep up with it.

The database counts the versions of its globs. Each question to it also tells the version, and
`GlobSet.catch_up` reads what has changed since ours before anything is matched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lonelypsp.globs import GlobIndex
from lonelypss.store.base import Kind, Subscription

Row: TypeAlias = tuple[int, bytes | None, str | None, str | None]
"""id, pattern, url, recovery; no pattern: the row is gone."""

SLICE = 500
"""Changed globs that are taken over in one go; more would hold up the event loop."""


@dataclass(frozen=True, slots=True)
class GlobChange:
    """What leads from one version to another.

    Attributes:
        is_complete: `rows` are all globs there are, not only what has changed.
    """

    version: int
    is_complete: bool
    rows: Sequence[Row]


class GlobSet:
    """All globs of one version of the database.

    Args:
        read: what has changed since a version.
    """

    def __init__(self, read: Callable[[int], Awaitable[GlobChange]]) -> None:
        self._read = read
        self._globs = _Globs()
        self._refresh: asyncio.Task[None] | None = None

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
        """Brings them to the newest version."""
        for _ in self.take_over(await self._read(self.version)):
            await asyncio.sleep(0)

    def take_over(self, change: GlobChange) -> Iterator[None]:
        """Applies `change` in steps. Until the last, all who need the new version wait."""
        globs = _Globs() if change.is_complete else self._globs
        for start in range(0, len(change.rows), SLICE):
            globs.update(change.rows[start : start + SLICE])
            yield
        globs.version = change.version
        self._globs = globs

    async def close(self) -> None:
        """Waits for what is under way."""
        if self._refresh is not None:
            await asyncio.wait([self._refresh])


class _Globs:
    def __init__(self) -> None:
        self.version = -1
        self._by_id: dict[int, Subscription] = {}
        self._index: GlobIndex[int] = GlobIndex()

    def match(self, topic: bytes) -> list[Subscription]:
        return [self._by_id[id] for id in self._index.match(topic)]

    def update(self, rows: Iterable[Row]) -> None:
        for id, pattern, url, recovery in rows:
            if before := self._by_id.pop(id, None):
                self._index.remove(before.pattern.decode(), id)
            if pattern is not None:
                assert url is not None
                self._by_id[id] = Subscription(id, Kind.GLOB, pattern, url, recovery)
                self._index.add(pattern.decode(), id)
