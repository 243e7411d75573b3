"""A store in one SQLite file, or in memory.

Any number of processes on one machine can share a file. Each has three connections to it:

- one for `match`, used in the event loop, since a look-up takes less than the way to a thread and
  back. It never waits: when something is in the way, the question moves to
- the reader thread, which also answers what is asked rarely;
- the writer thread. What arrives while it commits shares the next transaction, and with it the cost
  of bringing that to the disk. Nobody is answered before the commit.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeAlias, TypeVar

from lonelypsp.replay import Code
from lonelypss.store.base import (
    PRUNED_AT_ONCE,
    Condition,
    Difference,
    Kind,
    MissedNotice,
    Quotas,
    StoreCorrupt,
    StoreUnavailable,
    Subscription,
    load_queries,
)
from lonelypss.store.globset import BEGIN, PAGE, SLICE, Cursor, GlobChange, GlobSet

T = TypeVar("T")
_Work: TypeAlias = Callable[[sqlite3.Connection], T]

_SQL = load_queries("sqlite.sql")
_MIGRATIONS = [_SQL[f"migration_{n}"] for n in range(1, 1 + sum("migration_" in k for k in _SQL))]
_MATCH = _SQL["match"]
_VERSION = _SQL["subscriptions_version"]
_KINDS = tuple(Kind)

_QUEUE_LIMIT = 10_000
_ROWS_KEPT = 200_000
_AT_ONCE = 1000  # rows read in the event loop without a pause, about 2 ms
_PER_INSERT = 500
_FEW = 100  # questions asked in the event loop
_CACHE = "PRAGMA cache_size = -32768"  # KiB; the usual 2 MiB thrash in large files
_OPEN_TIMEOUT = 10.0  # others may be migrating
_LOCK_PAUSE = 0.01
_FORGET_PEER = 86_400.0


class SqliteStore:
    """See the module's text and `lonelypss.store.base.Store`.

    Attributes:
        path: the file, or None to keep everything in memory, for this process only.
        busy_timeout: how many seconds a call waits while other processes lock the file.
        quotas: how many subscriptions there may be.
        connection_class: what connections are made of; for tests that inject faults.
    """

    connection_class: type[sqlite3.Connection] = sqlite3.Connection

    def __init__(
        self, path: str | None, *, busy_timeout: float = 0.75, quotas: Quotas | None = None
    ) -> None:
        self.path = None if path is None else os.path.realpath(path)
        self.busy_timeout = busy_timeout
        self.quotas = quotas or Quotas()
        self._is_open = False

    async def open(self) -> None:
        self._globs = GlobSet(lambda *since: self._read(partial(_read_globs, *since)))
        # What was found for a topic, as long as the database confirms that no subscription has
        # changed. Its own version, the cheaper question, shows that others changed something, ours
        # what was changed over the same connection; only then we ask whether it was subscriptions.
        self._found: dict[bytes, Sequence[Subscription]] = {}
        self._found_rows = 0
        self._found_in = (-1, 0)
        self._found_of = -1
        self._confirmed_at = -math.inf
        self._changes = 0
        self._reader: _Inline | _Worker
        self._writer: _Inline | _Worker
        if self.path is None:
            self._matcher = _connect(None, self.connection_class)
            _migrate(self._matcher, ":memory:")
            self._reader = _Inline(self._matcher, "BEGIN")
            self._writer = _Inline(self._matcher, "BEGIN IMMEDIATE")
        else:
            connect = partial(_connect, self.path, self.connection_class)
            try:
                self._matcher = await asyncio.to_thread(_prepare, self.path, connect)
            except sqlite3.Error as error:
                raise self._explain(error) from error
            self._reader = _Worker("sqlite reader", connect, "BEGIN", self.busy_timeout)
            self._writer = _Worker("sqlite writer", connect, "BEGIN IMMEDIATE", self.busy_timeout)
        self._is_open = True
        try:
            await self._globs.refresh()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        await self._globs.close()
        await self._reader.stop()
        await self._writer.stop()
        self._matcher.close()

    @property
    def in_threads(self) -> bool:
        return bool(self._reader.unanswered or self._writer.unanswered)

    # Subscriptions

    async def match(
        self, topic: bytes, since: float = math.inf, codes: Sequence[Code] = ()
    ) -> Sequence[Subscription]:
        await self.remember(codes)
        found = self.found(topic, since)
        return await self._match(topic) if found is None else found

    async def remember(self, codes: Sequence[Code]) -> None:
        assert not codes, "this machine has a file for them"

    def found(self, topic: bytes, since: float) -> Sequence[Subscription] | None:
        if since > self._confirmed_at:
            self._confirm()
        return self._found.get(topic)

    def _confirm(self) -> None:
        """Forgets what was found if anybody has changed subscriptions since."""
        now = time.monotonic()
        version = of = -1
        try:
            (version,) = self._matcher.execute("PRAGMA data_version").fetchone()
            if (version, self._changes) == self._found_in:
                self._confirmed_at = now
                return
            (of,) = self._matcher.execute(_VERSION).fetchone()
        except sqlite3.Error:
            pass  # something is in the way, and the next question goes another way, too
        if of < 0 or of != self._found_of:
            self._found.clear()
            self._found_rows = 0
        self._found_in = version, self._changes
        self._found_of = of
        self._confirmed_at = now

    async def _match(self, topic: bytes) -> Sequence[Subscription]:
        found_in = self._found_in
        try:
            rows = self._matcher.execute(_MATCH, (topic, _AT_ONCE)).fetchall()
        except sqlite3.Error:
            rows = await self._read(lambda db: db.execute(_MATCH, (topic, _AT_ONCE)).fetchall())
        version = rows[0][0]
        if version > self._globs.version:
            await self._catch_up(version)
        found = [
            Subscription(id, Kind.EXACT, topic, url, recovery)
            for _, id, url, recovery in rows
            if id is not None
        ]
        if len(rows) == _AT_ONCE:
            found += await self._match_more(topic, found[-1].url)
        found += self._globs.match(topic)
        if found_in == self._found_in and version == self._globs.version:
            self._found_rows += 1 + len(found)
            if self._found_rows > _ROWS_KEPT:
                self._found.clear()
                self._found_rows = 1 + len(found)
            self._found[topic] = found
        return found

    async def _match_more(self, topic: bytes, after: str) -> list[Subscription]:
        """The rows of `topic` behind that of the url `after`, a page at a time. Each page is at
        least as new as the question, and no row can move from one to another."""
        found: list[Subscription] = []
        query = _SQL["match_more"]
        while True:
            await asyncio.sleep(0)
            page = (topic, found[-1].url if found else after, _AT_ONCE)
            try:
                rows = self._matcher.execute(query, page).fetchall()
            except sqlite3.Error:
                rows = await self._read(lambda db, page=page: db.execute(query, page).fetchall())  # type: ignore[misc]
            found += [Subscription(id, Kind.EXACT, topic, *rest) for id, *rest in rows]
            if len(rows) < _AT_ONCE:
                return found

    async def subscribe(self, kind: Kind, pattern: bytes, url: str, recovery: str | None) -> bool:
        if kind == Kind.GLOB:
            pattern.decode()
        row = (kind, pattern, url, recovery)

        def work(db: sqlite3.Connection) -> bool:
            is_new = db.execute(_SQL["subscribe"], row).rowcount > 0
            if is_new:
                self._check_quotas(db, url)
            return is_new

        return await self._write(work)

    def _check_quotas(self, db: sqlite3.Connection, url: str) -> None:
        """Raises OverQuota, and so takes back what this piece of work has added."""
        if counted := db.execute(_SQL["counted"], (url,)).fetchone():
            self.quotas.check(*counted)

    async def unsubscribe(self, kind: Kind, pattern: bytes, url: str) -> bool:
        row = (kind, pattern, url)
        return await self._write(lambda db: db.execute(_SQL["unsubscribe"], row).rowcount > 0)

    async def subscriptions(self, url: str) -> list[Subscription]:
        def work(db: sqlite3.Connection) -> list[Subscription]:
            rows = db.execute(_SQL["subscriptions"], (url,))
            return [Subscription(id, _KINDS[kind], *rest) for id, kind, *rest in rows]

        return await self._read(work)

    async def set_subscriptions(
        self,
        url: str,
        exact: Iterable[tuple[bytes, str | None]],
        globs: Iterable[tuple[str, str | None]],
    ) -> None:
        # lists, because a generator could not be read again when the work is repeated
        exact, globs = list(exact), list(globs)

        def work(db: sqlite3.Connection) -> None:
            rows = db.execute(_SQL["subscriptions"], (url,))
            present = ((id, kind, pattern, recovery) for id, kind, pattern, _, recovery in rows)
            found = Difference(present, exact, globs, lambda recovery: recovery)
            _drop(db, found.dropped)
            db.executemany(_SQL["change_recovery"], [(r, id) for id, r in found.changed])
            _add_many(db, [(kind, pattern, url, r) for kind, pattern, r in found.added])
            if found.added:
                self._check_quotas(db, url)

        await self._write(work)

    async def drop(self, subscriptions: Sequence[Subscription]) -> None:
        if subscriptions:
            await self._write(lambda db: _drop(db, [s.id for s in subscriptions]))

    # Missed notices

    async def record_missed(self, items: Sequence[tuple[Subscription, bytes]], due: float) -> None:
        rows = [(topic, due, subscription.id) for subscription, topic in items]
        if len(rows) <= _FEW:  # of dead hosts, each message would write the same to the disk
            rows = [row for row in rows if not self._is_announced(row)]
        await self._write_many("record_missed", rows)

    def _is_announced(self, row: tuple[bytes, float, int]) -> bool:
        """Whether it certainly will be, from now on, without another note."""
        try:
            return self._matcher.execute(_SQL["is_announced"], row).fetchone() is not None
        except sqlite3.Error:
            return False  # something is in the way, and the writer has time to wait

    async def clear_missed(self, items: Sequence[tuple[Subscription, bytes]]) -> None:
        rows = [(subscription.id, topic) for subscription, topic in items]
        await self._write_many("clear_missed", rows)

    async def claim_missed(self, now: float, limit: int, lease: float) -> list[MissedNotice]:
        times = (now + lease, now, limit)
        rows = await self._write(lambda db: db.execute(_SQL["claim_missed"], times).fetchall())
        return [MissedNotice(*row) for _, *row in sorted(rows)]

    async def finish_missed(self, notice: MissedNotice, now: float) -> None:
        def work(db: sqlite3.Connection) -> None:
            row = (notice.id, notice.generation)
            if db.execute(_SQL["finish_missed"], row).rowcount == 0:
                db.execute(_SQL["renew_missed"], (now, notice.id))

        await self._write(work)

    async def retry_missed(self, notice: MissedNotice, due: float) -> None:
        await self._write_many("retry_missed", [(notice.generation, due, notice.id)])

    async def postpone_missed(self, notices: Sequence[tuple[MissedNotice, float]]) -> None:
        await self._write_many("postpone_missed", [(due, notice.id) for notice, due in notices])

    async def next_due(self) -> float | None:
        row = await self._read(lambda db: db.execute(_SQL["next_due"]).fetchone())
        return float(row[0]) if row else None

    # Other broadcasters

    async def renew_peer(self, url: str, until: float, now: float) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            was_alive = db.execute(_SQL["peer_alive"], (url, now)).fetchone() is not None
            db.execute(_SQL["renew_peer"], (url, until))
            return was_alive

        return await self._write(work)

    async def remove_peer(self, url: str) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute(_SQL["drop_of_url"], (url,))
            db.execute(_SQL["remove_peer"], (url,))

        await self._write(work)

    async def drop_dead_peers(self, now: float) -> list[str]:
        def work(db: sqlite3.Connection) -> list[str]:
            dropped = db.execute(_SQL["drop_of_dead_peers"], (now,)).fetchall()
            db.execute(_SQL["forget_dead_peers"], (now - _FORGET_PEER,))
            return sorted({url for (url,) in dropped})

        return await self._write(work)

    # Subscribers that give no sign of life

    async def renew_leases(self, urls: Collection[str], now: float) -> None:
        await self._write_many("renew_lease", [(now, url) for url in urls])

    async def prune(self, now: float, ttl: float, until: float) -> dict[str, int]:
        def work(db: sqlite3.Connection) -> dict[str, int]:
            since, kept = db.execute(_SQL["leases"]).fetchone()
            db.execute(_SQL["keep_leases"], (int(until * 1000),))
            if kept < int(now * 1000):
                since = int(now * 1000)
                db.execute(_SQL["begin_leases"], (since,))
            if since > int((now - ttl) * 1000):
                return {}
            stale = db.execute(_SQL["stale_subscribers"], (now - ttl, PRUNED_AT_ONCE)).fetchall()
            for url, _ in stale:
                db.execute(_SQL["drop_of_url"], (url,))
            return dict(stale)

        return await self._write(work)

    async def counts(self) -> dict[str, int]:
        row = await self._read(lambda db: db.execute(_SQL["counts"]).fetchone())
        return dict(zip(("exact", "glob", "missed"), row, strict=True))

    # The globs in memory

    async def _catch_up(self, version: int) -> None:
        """Few changes are read at once, in the event loop: that takes less than the way to a thread
        and back."""
        globs = self._globs
        if not globs.is_refreshing and version - globs.version <= SLICE:
            work = partial(_read_globs, globs.version, BEGIN)
            with suppress(sqlite3.Error):  # the reader thread gets the same and has time to wait
                change = _one(_transact(self._matcher, "BEGIN", [work]))
                if not change.is_complete:
                    globs.apply(change)
        await globs.catch_up(version)

    # Work on the database

    async def _read(self, work: _Work[T]) -> T:
        try:
            return await self._reader.call(work)
        except sqlite3.Error as error:
            raise self._explain(error) from error

    async def _write(self, work: _Work[T]) -> T:
        try:
            result = await self._writer.call(work)
            self._changes += 1
            self._confirmed_at = -math.inf
            return result
        except sqlite3.Error as error:
            raise self._explain(error) from error

    async def _write_many(self, query: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            await self._write(lambda db: db.executemany(_SQL[query], rows))

    def _explain(self, error: sqlite3.Error) -> Exception:
        """What to raise for `error`: itself where it is a bug of ours."""
        code = _code(error)
        if code in _DAMAGED:
            return StoreCorrupt(f"{self.path} is damaged: {error}. {_RESTORE}")
        if reason := _REASONS.get(code):
            where = self.path or "the database in memory"
            return StoreUnavailable(f"{where} {reason} ({error})")
        return error


def _drop(db: sqlite3.Connection, ids: list[int]) -> None:
    if ids:
        db.execute(_SQL["drop"], (json.dumps(ids),))


def _add_many(db: sqlite3.Connection, rows: Sequence[tuple[int, bytes, str, str | None]]) -> None:
    """Many rows in a statement, so that the thread need not ask for Python's lock after each."""
    for start in range(0, len(rows), _PER_INSERT):
        some = rows[start : start + _PER_INSERT]
        values = ", ".join(["(?, ?, ?, ?)"] * len(some))
        db.execute(_SQL["add_many"].format(values), [value for row in some for value in row])


def _read_globs(known: int, after: Cursor, db: sqlite3.Connection) -> GlobChange:
    """See `GlobSet`."""
    version, history = db.execute(_SQL["glob_version"]).fetchone()
    if not 0 <= known <= version <= known + history:
        rows = db.execute(_SQL["all_globs"], (after[0], PAGE)).fetchall()
        more = (rows[-1][4], rows[-1][0]) if len(rows) == PAGE else None
        return GlobChange(version, True, [row[:4] for row in rows], more)
    dropped = db.execute(_SQL["dropped_globs"], (known,)).fetchall()
    changed = db.execute(_SQL["changed_globs"], (known,)).fetchall()
    return GlobChange(version, False, dropped + changed)


# Opening


def examine(path: str) -> Condition:
    """Looks at a database file that is there, and changes nothing.

    Raises:
        StoreUnavailable, StoreCorrupt
    """
    explained, path = SqliteStore(path)._explain, os.path.abspath(path)
    # of a file that nobody uses, a -wal would be made, and stay
    mode = "ro" if os.path.exists(f"{path}-wal") else "ro&immutable=1"
    try:
        _refuse_what_is_torn(path)
        with closing(_connect(path, sqlite3.Connection, mode=mode)) as db:
            if (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise StoreCorrupt(f"{path} is damaged: {found}. {_RESTORE}")
            version, now, peers = _schema_version(db), time.time(), []
            if version > 1:
                rows = db.execute("SELECT url FROM peers WHERE alive_until > ?", (now,))
                peers = [url for (url,) in rows]
            elif not version and db.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise StoreCorrupt(f"{path} belongs to another program: name another file (--db)")
    except sqlite3.Error as error:
        raise explained(error) from error
    return Condition(version or None, len(_MIGRATIONS), peers, now)


def _connect(
    path: str | None, factory: type[sqlite3.Connection], *, mode: str = "rw"
) -> sqlite3.Connection:
    db = sqlite3.connect(
        f"{Path(path).as_uri()}?mode={mode}" if path else ":memory:",
        uri=path is not None,
        timeout=0,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=64,
        factory=factory,
    )
    try:
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        db.close()
        raise
    return db


def _prepare(path: str, connect: Callable[..., sqlite3.Connection]) -> sqlite3.Connection:
    """Connect to the file, created, checked or migrated. Several processes may do so at once."""
    deadline = time.monotonic() + _OPEN_TIMEOUT
    while True:
        _refuse_what_is_torn(path)
        try:
            with ExitStack() as on_failure:
                db = on_failure.enter_context(closing(connect(mode="rwc")))
                if (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                    raise StoreCorrupt(f"{path} is damaged: {found}. {_RESTORE}")
                _migrate(db, path)
                # Only now, with the schema in the file itself: a file without tables is always
                # new, never one that lost its -wal.
                if (found := db.execute("PRAGMA journal_mode = WAL").fetchone()[0]) != "wal":
                    raise StoreUnavailable(f"{path} cannot use WAL ({found}): use a local disk")
                on_failure.pop_all()
                return db
        except sqlite3.Error as error:
            if not _is_locked(error) or time.monotonic() > deadline:
                raise
        time.sleep(_LOCK_PAUSE)


def _refuse_what_is_torn(path: str) -> None:
    """SQLite would start from an older state, or an empty one, and say nothing."""
    file, wal, shm = Path(path), Path(f"{path}-wal"), Path(f"{path}-shm")
    # The order of the questions matters while another process opens or closes the file: it creates
    # the -wal after the file and before the -shm, and removes the -wal last.
    if wal.exists() and not (file.exists() and file.stat().st_size):
        raise StoreCorrupt(f"{wal} is there, but {path} is missing or empty. {_RESTORE}")
    if not wal.exists() and shm.exists() and not wal.exists() and file.exists():
        raise StoreCorrupt(
            f"{shm} is there, but {wal} is missing, and with it the newest changes. {_RESTORE} To "
            f"go on without them, remove {shm}."
        )


def _migrate(db: sqlite3.Connection, path: str) -> None:
    if _schema_version(db) == len(_MIGRATIONS):
        return

    def work(db: sqlite3.Connection) -> None:
        version = _schema_version(db)
        if version > len(_MIGRATIONS):
            raise StoreCorrupt(
                f"{path} has schema version {version}, this lonelypss knows {len(_MIGRATIONS)}: "
                "run a newer lonelypss"
            )
        if version == 0 and db.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise StoreCorrupt(f"{path} belongs to another program: name another file (--db)")
        statement = ""
        for line in "\n".join(_MIGRATIONS[version:]).splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                db.execute(statement)
                statement = ""
        db.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")

    _one(_transact(db, "BEGIN IMMEDIATE", [work]))


def _schema_version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


# Transactions


def _transact(
    db: sqlite3.Connection, begin: str, works: Sequence[_Work[Any]]
) -> list[Any | Exception]:
    """Do all `works` in one transaction, which is over afterwards, whatever happens.

    Returns:
        For each what it returned or raised. Work that raised has changed nothing.
    """
    try:
        db.execute(begin)
        outcomes = [_in_savepoint(db, work) for work in works]
        db.execute("COMMIT")
        return outcomes
    except Exception as error:  # noqa: BLE001 everyone who waits gets it
        return [error] * len(works)
    finally:
        if db.in_transaction:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")


def _in_savepoint(db: sqlite3.Connection, work: _Work[T]) -> T | Exception:
    outcome: T | Exception
    db.execute("SAVEPOINT work")
    try:
        outcome = work(db)
    except Exception as error:
        if not db.in_transaction:  # SQLite gave up all of it, not only this work
            raise
        db.execute("ROLLBACK TO work")
        outcome = error
    db.execute("RELEASE work")
    return outcome


def _one(outcomes: list[Any | Exception]) -> Any:
    (outcome,) = outcomes
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class _Inline:
    """Does work at once: for the database in memory, which is never locked."""

    unanswered = 0

    def __init__(self, db: sqlite3.Connection, begin: str) -> None:
        self._db = db
        self._begin = begin

    async def call(self, work: _Work[T]) -> T:
        result: T = _one(_transact(self._db, self._begin, [work]))
        return result

    async def stop(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Job:
    work: _Work[Any]
    future: asyncio.Future[Any]
    deadline: float


class _Worker:
    """A thread with a connection of its own. Work that piles up shares a transaction.

    Attributes:
        unanswered: how many calls wait.
    """

    def __init__(
        self, name: str, connect: Callable[[], sqlite3.Connection], begin: str, patience: float
    ) -> None:
        self._connect = connect
        self._begin = begin
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self.unanswered = 0
        self._stopped = False
        self._db: sqlite3.Connection | None = None
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # in the event loop

    async def call(self, work: _Work[T]) -> T:
        if self._stopped:
            raise StoreUnavailable("the store is closed")
        if self.unanswered >= _QUEUE_LIMIT:
            raise StoreUnavailable(f"the database is {_QUEUE_LIMIT:,} calls behind")
        future: asyncio.Future[T] = self._loop.create_future()
        self.unanswered += 1
        self._queue.put(_Job(work, future, time.monotonic() + self._patience))
        return await future

    async def stop(self) -> None:
        """Finish what is queued."""
        self._stopped = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _answer(self, answers: list[tuple[_Job, Any | Exception]]) -> None:
        self.unanswered -= len(answers)
        for job, outcome in answers:
            if job.future.done():  # whoever waited was cancelled
                continue
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)

    # in the thread

    def _run(self) -> None:
        jobs: list[_Job] = []
        stopping = False
        while jobs or not stopping:
            arrived = self._arrived(wait=not jobs)
            stopping = stopping or None in arrived
            jobs += [job for job in arrived if job]
            outcomes = self._attempt([job.work for job in jobs])
            now = time.monotonic()
            answers, locked = [], []
            for job, outcome in zip(jobs, outcomes, strict=True):
                if _is_locked(outcome) and now < job.deadline:
                    locked.append(job)
                else:
                    answers.append((job, outcome))
            with suppress(RuntimeError):  # the loop is closed, nobody waits any more
                self._loop.call_soon_threadsafe(self._answer, answers)
            jobs = locked
            if locked:
                time.sleep(_LOCK_PAUSE)
        self._disconnect()

    def _arrived(self, *, wait: bool) -> list[_Job | None]:
        arrived = [self._queue.get()] if wait else []
        with suppress(Empty):
            while True:
                arrived.append(self._queue.get_nowait())
        return arrived

    def _attempt(self, works: list[_Work[Any]]) -> list[Any | Exception]:
        try:
            if self._db is None:
                self._db = self._connect()
                self._db.execute(_CACHE)
        except sqlite3.Error as error:
            return [error] * len(works)
        outcomes = _transact(self._db, self._begin, works)
        if any(isinstance(o, sqlite3.Error) and not _is_locked(o) for o in outcomes):
            self._disconnect()  # whatever broke, the next transaction starts with a new connection
        return outcomes

    def _disconnect(self) -> None:
        if self._db:
            with suppress(sqlite3.Error):
                self._db.close()
        self._db = None


# Errors

_RESTORE = "Restore it from a backup, or move it away to start with an empty one."
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_REASONS = {
    **dict.fromkeys(_LOCKED, "is locked by another process for longer than busy_timeout"),
    sqlite3.SQLITE_FULL: "cannot grow: free space on its disk",
    sqlite3.SQLITE_IOERR: "cannot be read or written: check its disk",
    sqlite3.SQLITE_READONLY: "is read-only: check its permissions, and how its disk is mounted",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: check --db, and the permissions of the directory",
    sqlite3.SQLITE_NOMEM: "found no memory left",
}


def _code(error: object) -> int:
    """The primary result code of SQLite, 0 for what is no error of SQLite."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _is_locked(outcome: object) -> bool:
    return _code(outcome) in _LOCKED
