"""A store in a PostgreSQL database, shared by any number of broadcasters.

match:  topics that are asked for together -> one query -> exact rows and the glob version
        -> the globs in memory, brought up to that version -> subscriptions

Nothing is remembered from one question to the next, except the globs, whose version every answer
tells (`GlobSet`); so what was answered at one broadcaster counts at every other. Questions that
arrive while one is on its way share the next one, and so do signatures to be remembered, which
travel with them.

Every statement has a bound in time, here and in the server, so that a transaction of ours never
stays behind. Nothing depends on which connection is used: no locks, settings or listeners outlive
a transaction. Behind pgbouncer, which may mix up prepared statements in transaction mode, add
`?statement_cache_size=0` to the url.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from lonelypsp.replay import Code
from lonelypsp.signing import TOKEN_LIFETIME
from lonelypss.config import without_password
from lonelypss.store.base import (
    PRUNED_AT_ONCE,
    Condition,
    Difference,
    Kind,
    MissedNotice,
    OverQuota,
    Quotas,
    StoreCorrupt,
    StoreUnavailable,
    Subscription,
    UsedBefore,
    load_queries,
)
from lonelypss.store.globset import PAGE, SLICE, Cursor, GlobChange, GlobSet, Row

if TYPE_CHECKING:
    import asyncpg

    Connection: TypeAlias = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]

log = logging.getLogger(__name__)

K = TypeVar("K")
T = TypeVar("T")

_SQL = load_queries("postgres.sql")
_MIGRATIONS = [_SQL[f"migration_{n}"] for n in range(1, 1 + sum("migration_" in k for k in _SQL))]

_ASKING = 2  # questions of `match` on their way at a time
_AT_ONCE = 500  # topics in one of them, and codes
_ROWS_AT_ONCE = 2000  # that are dealt with without a pause
_TRIES = 3
_FORGET_PEER = 86_400.0
_MIGRATION_LOCK = 0x6C6F6E656C79  # "lonely"
_LONG = 60.0  # seconds for what may change a million rows
_AHEAD = 4  # seconds of stamps to prepare for; so long nothing is accepted after a crash
_SHORTEN_INTERVAL = 20.0
_SHORTEN_ROWS = 10_000


class PostgresStore:
    """See the module's text and `lonelypss.store.base.Store`.

    Args:
        url: postgresql://user:password@host:port/database?..., as libpq understands it.
        pool_size: most connections of this process.
        timeout: seconds for a call, waiting for a connection included; longer for what changes
            many rows.
        quotas: how many subscriptions there may be.
    """

    in_threads = False

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 10,
        timeout: float = 1.0,
        quotas: Quotas | None = None,
    ) -> None:
        self._url, self._options = _split(url)
        self.name = without_password(url)
        self._pool_size = pool_size
        self._timeout = timeout
        self._quotas = quotas or Quotas()
        self._limits = (self._quotas.per_url, self._quotas.per_origin)
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def open(self) -> None:
        asyncpg = _asyncpg()
        self._errors = _Errors(asyncpg, self.name, self._quotas)
        self._globs = GlobSet(self._read_globs)
        self._asked: dict[bytes, asyncio.Future[Sequence[Subscription]]] = {}
        self._marks: dict[Code, asyncio.Future[None]] = {}
        self._askers: set[asyncio.Task[None]] = set()
        self._extending: asyncio.Task[None] | None = None
        self._shortening: asyncio.Task[None] | None = None
        milliseconds = str(int(_LONG * 1000))
        with self._errors.at_start():
            self._pool = await asyncpg.create_pool(
                self._url,
                min_size=0,
                max_size=self._pool_size,
                timeout=5.0,
                reset=_nothing_to_reset,
                server_settings={
                    "application_name": "lonelypss",
                    "statement_timeout": milliseconds,
                    "lock_timeout": milliseconds,
                    "idle_in_transaction_session_timeout": milliseconds,
                },
                **self._options,
            )
            try:
                async with self._pool.acquire() as db:
                    await self._migrate(db)
                await self._globs.refresh()
            except BaseException:
                await self.close()
                raise

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        while self._askers:
            await asyncio.wait(self._askers)
        for task in filter(None, (self._extending, self._shortening)):
            task.cancel()
            await asyncio.wait([task])
        await self._globs.close()
        try:
            async with asyncio.timeout(self._timeout):
                await pool.close()
        except TimeoutError:
            pool.terminate()

    # Subscriptions

    async def match(
        self, topic: bytes, since: float = math.inf, codes: Sequence[Code] = ()
    ) -> Sequence[Subscription]:
        remembered = self._mark(codes)
        future = self._asked.get(topic)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            self._asked[topic] = future
            self._start_asking()
        found = await asyncio.shield(future)
        for mark in remembered:
            await asyncio.shield(mark)
        return found

    async def remember(self, codes: Sequence[Code]) -> None:
        if not codes:
            return
        remembered = self._mark(codes)
        self._start_asking()
        for mark in remembered:
            await asyncio.shield(mark)

    def found(self, topic: bytes, since: float) -> Sequence[Subscription] | None:
        return None

    def _mark(self, codes: Sequence[Code]) -> list[asyncio.Future[None]]:
        """Has codes remembered with the next question; what that raises, the futures do."""
        if not codes:
            return []
        if not self._marks.keys().isdisjoint(codes):
            raise UsedBefore
        if self._shortening is None:
            self._shortening = asyncio.create_task(self._shorten_memory(), name="forget codes")
        loop = asyncio.get_running_loop()
        marks = {code: loop.create_future() for code in codes}
        self._marks |= marks
        return list(marks.values())

    def _start_asking(self) -> None:
        if len(self._askers) < _ASKING:
            self._askers.add(asyncio.create_task(self._ask()))

    async def _ask(self) -> None:
        """Answers until nobody asks, and is gone in the same moment: whoever comes then starts
        another one."""
        while self._asked or self._marks:
            asked, marks = _taken(self._asked), _taken(self._marks)
            try:
                found, refused = await self._match(list(asked), list(marks))
            except Exception as e:  # noqa: BLE001 everyone who waits gets it
                waiting: list[asyncio.Future[Any]] = [*asked.values(), *marks.values()]
                for future in waiting:
                    future.set_exception(e)
                    future.exception()  # seen, even if nobody waits any more
                continue
            for future, subscriptions in zip(asked.values(), found, strict=True):
                future.set_result(subscriptions)
            for code, mark in marks.items():
                if code in refused:
                    mark.set_exception(refused[code])
                    mark.exception()
                else:
                    mark.set_result(None)
        task = asyncio.current_task()
        assert task is not None
        self._askers.discard(task)

    async def _match(
        self, topics: list[bytes], codes: Sequence[Code]
    ) -> tuple[list[list[Subscription]], dict[Code, Exception]]:
        """What is subscribed to each topic, and why codes are not accepted."""
        refused: dict[Code, Exception] = {}
        if codes:
            rows, refused = await self._remember(topics, codes)
        else:
            rows = await self._read("match", topics)
        found: list[list[Subscription]] = [[] for _ in topics]
        for number, some in enumerate(_pieces(rows)):
            if number:
                await asyncio.sleep(0)
            for n, _, id, url, recovery in some:
                if id is not None:
                    found[n - 1].append(
                        Subscription(id, Kind.EXACT, topics[n - 1], url.decode(), _text(recovery))
                    )
        if topics:
            await self._globs.catch_up(max(row[1] for row in rows))
        for topic, of_topic in zip(topics, found, strict=True):
            of_topic += self._globs.match(topic)
        return found, refused

    # Signatures that were accepted

    async def _remember(
        self, topics: list[bytes], codes: Sequence[Code]
    ) -> tuple[list[asyncpg.Record], dict[Code, Exception]]:
        """The rows of `match`, and why codes are not accepted."""
        rows, added, begins, horizon = await self._match_once(topics, codes)
        newest = max(code.stamp for code in codes)
        if begins is None or newest > horizon:
            await self._extend_memory(newest)
            left = [code for code in codes if code not in added]
            _, more, begins, horizon = await self._match_once([], left)
            added |= more
        elif newest > horizon - _AHEAD / 2 and self._extending is None:
            self._extending = asyncio.create_task(self._extend_soon(newest), name="extend memory")
        refused: dict[Code, Exception] = {
            code: UsedBefore()
            if begins is not None and begins < code.stamp <= horizon
            else StoreUnavailable(
                f"{self.name} cannot tell any more, or not yet, whether this signature was used"
                " before; sign it again"
            )
            for code in codes
            if code not in added
        }
        return rows, refused

    async def _match_once(
        self, topics: list[bytes], codes: Sequence[Code]
    ) -> tuple[list[asyncpg.Record], set[Code], int | None, int]:
        # not repeated when the connection is lost: nobody could tell our own codes from used ones
        arguments = (topics, *_columns(codes, 2))
        rows = await self._write(lambda db: db.fetch(_SQL["match_once"], *arguments))
        matched, added = [], set()
        begins, horizon = None, 0
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            if start:
                await asyncio.sleep(0)
            for row in rows[start : start + _ROWS_AT_ONCE]:
                if row[0] > 0:
                    matched.append(row)
                elif row[0] == 0:
                    begins, horizon = row[1], row[2]
                else:
                    added.add(Code(row[1], row[3]))
        return matched, added, begins, horizon

    async def _extend_memory(self, newest: int) -> None:
        await self._write(lambda db: db.execute(_SQL["extend_memory"], newest + _AHEAD))

    async def _extend_soon(self, newest: int) -> None:
        try:
            await self._extend_memory(newest)
        except StoreUnavailable as e:
            log.warning("cannot extend the memory of used signatures, trying again: %s", e)
        finally:
            self._extending = None

    async def _shorten_memory(self) -> None:
        kept = int(2 * TOKEN_LIFETIME)  # clocks may differ by half of that
        while True:
            await asyncio.sleep(_SHORTEN_INTERVAL)
            gone = _SHORTEN_ROWS
            try:
                while gone == _SHORTEN_ROWS:
                    until = int(time.time()) - kept
                    arguments = (until, _SHORTEN_ROWS, kept)
                    gone = await self._write(
                        lambda db, a=arguments: db.fetchval(_SQL["shorten_memory"], *a),  # type: ignore[misc]
                        timeout=_LONG,
                    )
            except StoreUnavailable as e:
                log.warning("cannot forget old signatures, trying again: %s", e)

    async def _read_globs(self, known: int, after: Cursor) -> GlobChange:
        first, *found = await self._read("glob_changes", known, *after, PAGE, timeout=_LONG)
        rows: list[Row] = []
        for start in range(0, len(found), SLICE):
            rows += [
                (id, pattern, _text(url), _text(recovery))
                for _, _, id, pattern, url, recovery in found[start : start + SLICE]
            ]
            await asyncio.sleep(0)
        version, is_complete = first["version"], first["is_complete"]
        more = None
        if is_complete and len(found) == PAGE:
            more = (found[-1]["version"], found[-1]["id"])
        return GlobChange(version, is_complete, rows, more)

    async def subscribe(self, kind: Kind, pattern: bytes, url: str, recovery: str | None) -> bool:
        if kind == Kind.GLOB:
            pattern.decode()
        row = (int(kind), pattern, url.encode(), _bytes(recovery), *self._limits)
        return bool(await self._write(lambda db: db.fetchval(_SQL["subscribe"], *row)))

    async def unsubscribe(self, kind: Kind, pattern: bytes, url: str) -> bool:
        row = (int(kind), pattern, url.encode())
        return bool(await self._write(lambda db: db.fetch(_SQL["unsubscribe"], *row)))

    async def subscriptions(self, url: str) -> list[Subscription]:
        rows = await self._read("subscriptions", url.encode(), timeout=_LONG)
        found: list[Subscription] = []
        for number, some in enumerate(_pieces(rows)):
            if number:
                await asyncio.sleep(0)
            found += [_subscription(*row) for row in some]
        return found

    async def set_subscriptions(
        self,
        url: str,
        exact: Iterable[tuple[bytes, str | None]],
        globs: Iterable[tuple[str, str | None]],
    ) -> None:
        # lists, because a generator could not be read again when the work is repeated
        exact, globs = list(exact), list(globs)

        async def work(db: Connection) -> None:
            async with db.transaction():
                await db.execute(_SQL["lock_url"], url.encode())
                rows = await db.fetch(_SQL["subscriptions"], url.encode())
                compare = partial(Difference, _present(rows), exact, globs, _bytes)
                if len(rows) + len(exact) + len(globs) <= _ROWS_AT_ONCE:
                    found = compare()
                else:
                    found = await asyncio.to_thread(compare)
                if found.any_glob:
                    await db.execute(_SQL["lock_globs"])
                for ids in _pieces(found.dropped):
                    await db.execute(_SQL["drop"], ids)
                for changed in _pieces(found.changed):
                    await db.execute(_SQL["change_recovery"], *_columns(changed, 2))
                for added in _pieces(found.added):
                    await db.execute(_SQL["add_many"], url.encode(), *_columns(added, 3))
                if found.added:
                    await db.execute(_SQL["check_quotas"], url.encode(), *self._limits)

        await self._write(work, timeout=_LONG)

    async def drop(self, subscriptions: Sequence[Subscription]) -> None:
        if not subscriptions:
            return
        ids = sorted(s.id for s in subscriptions)
        any_glob = any(s.kind == Kind.GLOB for s in subscriptions)

        async def work(db: Connection) -> None:
            async with db.transaction():
                if any_glob:
                    await db.execute(_SQL["lock_globs"])
                await db.execute(_SQL["drop"], ids)

        await self._write(work, timeout=_LONG)

    # Missed notices

    async def record_missed(self, items: Sequence[tuple[Subscription, bytes]], due: float) -> None:
        await self._write_missed("record_missed", items, due)

    async def clear_missed(self, items: Sequence[tuple[Subscription, bytes]]) -> None:
        await self._write_missed("clear_missed", items)

    async def _write_missed(
        self, query: str, items: Sequence[tuple[Subscription, bytes]], *more: float
    ) -> None:
        rows = sorted({(subscription.id, topic) for subscription, topic in items})
        if rows:
            columns = _columns(rows, 2)
            await self._write(lambda db: db.execute(_SQL[query], *columns, *more), timeout=_LONG)

    async def claim_missed(self, now: float, limit: int, lease: float) -> list[MissedNotice]:
        times = (now + lease, now, limit)
        rows = await self._write(lambda db: db.fetch(_SQL["claim_missed"], *times))
        return [
            MissedNotice(id, generation, of, recovery.decode(), topic, attempts, url.decode())
            for _, id, generation, of, recovery, topic, attempts, url in sorted(rows)
        ]

    async def finish_missed(self, notice: MissedNotice, now: float) -> None:
        row = (notice.id, notice.generation, now)
        await self._write(lambda db: db.execute(_SQL["finish_missed"], *row))

    async def retry_missed(self, notice: MissedNotice, due: float) -> None:
        row = (notice.id, notice.generation, due)
        await self._write(lambda db: db.execute(_SQL["retry_missed"], *row))

    async def postpone_missed(self, notices: Sequence[tuple[MissedNotice, float]]) -> None:
        rows = [notice.id for notice, _ in notices], [due for _, due in notices]
        await self._write(lambda db: db.execute(_SQL["postpone_missed"], *rows))

    async def next_due(self) -> float | None:
        rows = await self._read("next_due")
        return rows[0][0] if rows else None

    # Other broadcasters

    async def renew_peer(self, url: str, until: float, now: float) -> bool:
        row = (url.encode(), until, now)
        return bool(await self._write(lambda db: db.fetchval(_SQL["renew_peer"], *row)))

    async def remove_peer(self, url: str) -> None:
        async def work(db: Connection) -> None:
            async with db.transaction():
                await db.execute(_SQL["lock_globs"])
                await db.execute(_SQL["drop_of_url"], url.encode())
                await db.execute(_SQL["remove_peer"], url.encode())

        await self._write(work, timeout=_LONG)

    async def drop_dead_peers(self, now: float) -> list[str]:
        if not await self._read("dead_peers", now):
            return []

        async def work(db: Connection) -> list[str]:
            async with db.transaction():
                await db.execute(_SQL["lock_globs"])
                rows = await db.fetch(_SQL["drop_of_dead_peers"], now)
                await db.execute(_SQL["forget_dead_peers"], now - _FORGET_PEER)
            return sorted({url.decode() for (url,) in rows})

        return await self._write(work, timeout=_LONG)

    # Subscribers that give no sign of life

    async def renew_leases(self, urls: Collection[str], now: float) -> None:
        encoded = [url.encode() for url in urls]
        await self._write(lambda db: db.execute(_SQL["renew_leases"], encoded, now), timeout=_LONG)

    async def prune(self, now: float, ttl: float, until: float) -> dict[str, int]:
        async def work(db: Connection) -> dict[str, int]:
            async with db.transaction():
                # who else calls this waits here until the end
                times = (int(now * 1000), int(until * 1000))
                if await db.fetchval(_SQL["keep_leases"], *times) > int((now - ttl) * 1000):
                    return {}
                await db.execute(_SQL["lock_globs"])
                stale = await db.fetch(_SQL["stale_subscribers"], now - ttl, PRUNED_AT_ONCE)
                for url, _ in stale:
                    await db.execute(_SQL["drop_of_url"], url)
                return {url.decode(): number for url, number in stale}

        return await self._write(work, timeout=_LONG)

    async def counts(self) -> dict[str, int]:
        (row,) = await self._read("counts", timeout=_LONG)
        return dict(row)

    # Work on the database

    async def _read(
        self, query: str, *arguments: Any, timeout: float | None = None
    ) -> list[asyncpg.Record]:
        """Asks again on another connection if the first is lost: reading changes nothing."""

        async def work(db: Connection) -> list[asyncpg.Record]:
            rows: list[asyncpg.Record] = await db.fetch(_SQL[query], *arguments)
            return rows

        for left in reversed(range(_TRIES)):
            try:
                return await self._call(work, timeout)
            except StoreUnavailable as e:
                if not left or not self._errors.is_lost(e.__cause__):
                    raise
        raise AssertionError("unreachable")

    async def _write(
        self, work: Callable[[Connection], Awaitable[T]], *, timeout: float | None = None
    ) -> T:
        """Does it again if others were in its way. Not if the connection was lost: nobody knows
        whether it was done."""
        for left in reversed(range(_TRIES)):
            try:
                return await self._call(work, timeout)
            except StoreUnavailable as e:
                if not left or not self._errors.is_conflict(e.__cause__):
                    raise
        raise AssertionError("unreachable")

    async def _call(self, work: Callable[[Connection], Awaitable[T]], timeout: float | None) -> T:
        pool = self._pool
        if pool is None:
            raise StoreUnavailable("the store is closed")
        try:
            async with asyncio.timeout(timeout or self._timeout):
                async with pool.acquire(timeout=self._timeout) as db:
                    try:
                        return await work(db)
                    except BaseException as e:
                        if not _code(e):  # not the server's word: who knows what it is doing
                            db.terminate()
                        raise
        except Exception as e:
            raise self._errors.explained(e) from e

    async def _migrate(self, db: Connection) -> None:
        async with db.transaction():
            # whoever starts at the same time waits here; the lock ends with the transaction
            await db.execute("SELECT pg_advisory_xact_lock($1)", _MIGRATION_LOCK)
            version = 0
            if await db.fetchval(_SQL["schema"]):
                version = await db.fetchval(_SQL["schema_version"])
            if version > len(_MIGRATIONS):
                raise StoreCorrupt(
                    f"{self.name} has schema version {version}, this lonelypss knows"
                    f" {len(_MIGRATIONS)}: run a newer lonelypss"
                )
            for migration in _MIGRATIONS[version:]:
                await db.execute(migration)
            if version < len(_MIGRATIONS):
                await db.execute(_SQL["set_schema_version"], len(_MIGRATIONS))


def _taken(waiting: dict[K, T]) -> dict[K, T]:
    """The first of those that wait, which then wait no longer."""
    batch = dict(islice(waiting.items(), _AT_ONCE))
    for key in batch:
        del waiting[key]
    return batch


async def examine(url: str) -> Condition:
    """Looks at a database and changes nothing.

    Raises:
        StoreUnavailable, StoreCorrupt
    """
    asyncpg = _asyncpg()
    address, options = _split(url)
    with _Errors(asyncpg, without_password(url), Quotas()).at_start():
        db = await asyncpg.connect(address, timeout=5.0, command_timeout=5.0, **options)
        try:
            asked = time.time()
            row = await db.fetchrow(_SQL["condition"])
            ours = time.time()
            schema, peers = None, []
            if await db.fetchval(_SQL["schema"]):
                schema = await db.fetchval(_SQL["schema_version"])
                rows = await db.fetch(_SQL["living_peers"], ours)
                peers = [url.decode() for (url,) in rows]
        finally:
            await db.close()
    return Condition(
        schema,
        len(_MIGRATIONS),
        peers,
        clock=row["clock"] + (ours - asked) / 2,
        can_create=row["can_create"],
        is_standby=row["is_standby"],
        connections=row["connections"],
    )


def _subscription(
    id: int, kind: int, pattern: bytes, url: bytes, recovery: bytes | None
) -> Subscription:
    return Subscription(id, Kind(kind), pattern, url.decode(), _text(recovery))


def _present(
    rows: Sequence[asyncpg.Record],
) -> Iterator[tuple[int, int, bytes, bytes | None]]:
    return ((id, kind, pattern, recovery) for id, kind, pattern, _, recovery in rows)


def _pieces(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """So many at a time that others can be served in between."""
    return (rows[n : n + _ROWS_AT_ONCE] for n in range(0, len(rows), _ROWS_AT_ONCE))


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


def _bytes(value: str | None) -> bytes | None:
    return None if value is None else value.encode()


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    return [[row[n] for row in rows] for n in range(width)]


async def _nothing_to_reset(db: Any) -> None:
    """asyncpg would ask the server to reset the connection after each use, which is one more round
    trip; nothing of ours outlives a transaction."""


# Urls


def _split(url: str) -> tuple[str, dict[str, Any]]:
    """The url for asyncpg, and what it takes as an argument instead."""
    parts = urlsplit(url)
    query, options = [], {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name == "statement_cache_size" and value.isdigit():
            options[name] = int(value)
        else:
            query.append((name, value))
    return urlunsplit(parts._replace(query=urlencode(query))), options


# Errors


def _asyncpg() -> Any:
    try:
        import asyncpg
    except ImportError as e:
        raise StoreUnavailable(f"{e}: PostgreSQL needs pip install 'lonelypsc[postgres]'") from None
    return asyncpg


_LOST = {"08000", "08001", "08003", "08004", "08006", "57P01", "57P02", "57P03"}
_CONFLICTS = {"40001", "40P01"}
_OVER_QUOTA = "LP429"
_REASONS = {
    **dict.fromkeys(_LOST, "cannot be reached: is the server up, and is --db right?"),
    **dict.fromkeys(_CONFLICTS, "was changed by others at the same time"),
    "25006": "is read-only: is --db the primary server?",
    "28000": "does not let this user in: check user and password in --db, and pg_hba.conf",
    "28P01": "does not take this password: check --db",
    "3D000": "does not exist: create it, or check the name in --db",
    "42501": "does not let this user make or change tables: GRANT it CREATE on the schema",
    "53100": "cannot grow: free space on its disk",
    "53200": "found no memory left",
    "53300": "takes no more connections: raise max_connections there, or lower db_pool_size",
    "55P03": "is locked by another transaction",
    "57014": "took too long",
}
_DAMAGED = {
    "42P01": "has lost tables",
    "XX001": "is damaged",
    "XX002": "is damaged",
}


class _Errors:
    """What errors of asyncpg mean."""

    def __init__(self, asyncpg: Any, name: str, quotas: Quotas) -> None:
        self._broken = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)
        self._others = (TimeoutError, asyncpg.DataError)  # which are among those
        self._name = name
        self._quotas = quotas

    def explained(self, error: Exception) -> Exception:
        """What to raise for `error`: itself where it is a bug of ours."""
        code = _code(error)
        if code == _OVER_QUOTA:
            try:
                self._quotas.check(*map(int, str(error).split()))
            except OverQuota as e:
                return e
        if reason := _DAMAGED.get(code):
            return StoreCorrupt(f"{self._name} {reason} ({error}). Restore it from a backup.")
        if reason := _REASONS.get(code):
            return StoreUnavailable(f"{self._name} {reason} ({error})")
        if isinstance(error, TimeoutError):
            return StoreUnavailable(f"{self._name} did not answer in time")
        if self.is_lost(error):
            return StoreUnavailable(f"{self._name} {_REASONS['08000']} ({error})")
        return error

    def is_lost(self, error: BaseException | None) -> bool:
        """Whether the connection is gone, and another one may work."""
        if isinstance(error, self._others):
            return False
        return isinstance(error, self._broken) or _code(error) in _LOST

    def is_conflict(self, error: BaseException | None) -> bool:
        """Whether the server took back what was done, because of what others did."""
        return _code(error) in _CONFLICTS

    @contextmanager
    def at_start(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            explained = self.explained(e)
            if explained is e:
                raise
            raise explained from e


def _code(error: object) -> str:
    """The SQLSTATE, or nothing."""
    return getattr(error, "sqlstate", None) or ""
