"""What holds for SQLite only: faults, locks, several processes, damaged files."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lonelypss.store import Kind, StoreCorrupt, StoreUnavailable
from lonelypss.store import sqlite as module
from lonelypss.store.sqlite import SqliteStore

A, B = "http://a/receive", "http://b/receive"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store with space?.db"


@asynccontextmanager
async def opened(store: SqliteStore) -> AsyncIterator[SqliteStore]:
    await store.open()
    try:
        yield store
    finally:
        await store.close()


def python(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process holds the write lock."""
    holder = python(
        "import sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "db.execute('BEGIN EXCLUSIVE')\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n",
        path,
    )
    with holder:
        assert holder.stdout.readline()
        try:
            yield
        finally:
            holder.stdin.close()
            holder.wait(10)


@asynccontextmanager
async def no_stall(limit: float) -> AsyncIterator[None]:
    """Fail if the event loop stands still for longer than `limit`."""
    worst = 0.0

    async def tick() -> None:
        nonlocal worst
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            worst = max(worst, time.monotonic() - before)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0)
    try:
        yield
    finally:
        ticking.cancel()
    assert worst < limit


class Faulty(sqlite3.Connection):
    """Raises `Faulty.code` where `Faulty.when` says so about a statement."""

    when: Callable[[str], bool] | None = None
    code = sqlite3.SQLITE_FULL

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if Faulty.when and Faulty.when(sql):
            error = sqlite3.OperationalError("injected")
            error.sqlite_errorcode = Faulty.code
            raise error
        return super().execute(sql, *arguments)


class FaultyStore(SqliteStore):
    connection_class = Faulty


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    Faulty.when = None


# Locks


async def test_a_lock_of_another_process_is_waited_for_but_not_long(path: Path) -> None:
    async with opened(SqliteStore(str(path))) as store:
        await store.subscribe(Kind.EXACT, b"t", A, "http://a/recover")
        (subscription,) = await store.match(b"t")
        with locked(path):
            async with no_stall(0.2):
                started = time.monotonic()
                outcomes = await asyncio.gather(
                    store.subscribe(Kind.EXACT, b"u", A, None),
                    store.unsubscribe(Kind.EXACT, b"t", A),
                    store.set_subscriptions(A, [], []),
                    store.drop([subscription]),
                    store.record_missed([(subscription, b"t")], 1.0),
                    store.claim_missed(1.0, 9, 1.0),
                    return_exceptions=True,
                )
                took = time.monotonic() - started
            # reading goes on
            assert await store.match(b"t") == await store.subscriptions(A) == [subscription]
        for outcome in outcomes:
            assert isinstance(outcome, StoreUnavailable)
            assert outcome.retry_after == 1
            assert "busy_timeout" in str(outcome)
            assert str(path) in str(outcome)
        assert 0.5 < took <= 1.0
        assert await store.subscribe(Kind.EXACT, b"u", A, None)


async def test_each_call_has_its_own_time(path: Path) -> None:
    async with opened(SqliteStore(str(path), busy_timeout=0.3)) as store:

        async def call(delay: float) -> float:
            await asyncio.sleep(delay)
            started = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await store.subscribe(Kind.EXACT, b"t", A, None)
            return time.monotonic() - started

        with locked(path):
            took = await asyncio.gather(*(call(n * 0.06) for n in range(10)))
        assert max(took) < 0.6


async def test_a_lock_that_ends_in_time_is_not_noticed(path: Path) -> None:
    async with opened(SqliteStore(str(path), busy_timeout=10)) as store:
        with locked(path):
            waiting = asyncio.create_task(store.subscribe(Kind.EXACT, b"t", A, None))
            done, _ = await asyncio.wait([waiting], timeout=0.1)
            assert not done
        assert await waiting


async def test_set_from_generators_survives_a_busy_commit(path: Path) -> None:
    async with opened(FaultyStore(str(path))) as store:
        failures = iter([True, True])
        Faulty.code = sqlite3.SQLITE_BUSY
        Faulty.when = lambda sql: sql == "COMMIT" and next(failures, False)
        await store.set_subscriptions(A, ((b"%d" % n, None) for n in range(9)), iter([("g", None)]))
        assert len(await store.subscriptions(A)) == 10


@pytest.mark.parametrize("ends", [True, False])
async def test_match_waits_for_a_lock_off_the_loop(path: Path, ends: bool) -> None:
    async with opened(FaultyStore(str(path))) as store:
        await store.subscribe(Kind.EXACT, b"a/b", A, None)
        await store.subscribe(Kind.GLOB, b"a/*", A, None)
        failures = iter([True] * 5)
        Faulty.code = sqlite3.SQLITE_BUSY
        Faulty.when = lambda sql: "LEFT JOIN" in sql and (not ends or next(failures, False))
        async with no_stall(0.2):
            if ends:
                assert len(await store.match(b"a/b")) == 2
            else:
                with pytest.raises(StoreUnavailable):
                    await store.match(b"a/b")
        Faulty.when = None
        assert len(await store.match(b"a/b")) == 2


async def test_globs_are_caught_up_with_off_the_loop_when_locked(path: Path) -> None:
    async with opened(FaultyStore(str(path), busy_timeout=0.1)) as store:
        await store.subscribe(Kind.GLOB, b"a/*", A, None)
        Faulty.code = sqlite3.SQLITE_BUSY
        failures = iter([True] * 3)
        Faulty.when = lambda sql: "history" in sql and next(failures, False)
        assert len(await store.match(b"a/b")) == 1
        await store.subscribe(Kind.GLOB, b"a/**", A, None)
        Faulty.when = lambda sql: "history" in sql
        outcomes = await asyncio.gather(
            *(store.match(topic) for topic in (b"a/b", b"a/c")), return_exceptions=True
        )
        assert [type(o) for o in outcomes] == [StoreUnavailable] * 2
        Faulty.when = None
        assert len(await store.match(b"a/b")) == 2


# Faults


@pytest.mark.parametrize("code", sorted(module._REASONS))
@pytest.mark.parametrize("statement", ["BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT"])
async def test_the_call_after_a_fault_works(path: Path, statement: str, code: int) -> None:
    async with opened(FaultyStore(str(path), busy_timeout=0.02)) as store:
        assert await store.subscribe(Kind.EXACT, b"before", A, None)
        Faulty.code = code
        Faulty.when = lambda sql: sql.startswith(statement)
        with pytest.raises(StoreUnavailable, match="injected"):
            await store.subscribe(Kind.EXACT, b"during", A, None)
        Faulty.when = None
        assert await store.subscribe(Kind.EXACT, b"after", A, None)
        assert {s.pattern for s in await store.subscriptions(A)} == {b"before", b"after"}


async def test_a_rollback_that_fails_too(path: Path) -> None:
    async with opened(FaultyStore(str(path))) as store:
        Faulty.code = sqlite3.SQLITE_IOERR
        Faulty.when = lambda sql: sql.startswith(("COMMIT", "ROLLBACK"))
        with pytest.raises(StoreUnavailable):
            await store.subscribe(Kind.EXACT, b"during", A, None)
        Faulty.when = None
        assert await store.subscribe(Kind.EXACT, b"during", A, None)


async def test_memory_survives_a_fault() -> None:
    async with opened(FaultyStore(None)) as store:
        Faulty.code = sqlite3.SQLITE_NOMEM
        Faulty.when = lambda sql: sql == "COMMIT"
        with pytest.raises(StoreUnavailable, match="in memory"):
            await store.subscribe(Kind.EXACT, b"t", A, None)
        Faulty.when = None
        assert await store.subscribe(Kind.EXACT, b"t", A, None)


async def test_a_really_full_disk(path: Path) -> None:
    class Small(sqlite3.Connection):
        pages = 100

        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            if sql.startswith("BEGIN"):
                super().execute(f"PRAGMA max_page_count = {Small.pages}")
            return super().execute(sql, *arguments)

    class SmallStore(SqliteStore):
        connection_class = Small

    async with opened(SmallStore(str(path))) as store:
        assert await store.subscribe(Kind.EXACT, b"before", A, None)
        small, large = await asyncio.gather(
            store.subscribe(Kind.EXACT, b"small", A, None),
            store.subscribe(Kind.EXACT, b"large" * 200_000, A, None),
            return_exceptions=True,
        )
        assert isinstance(large, StoreUnavailable)
        assert "free space" in str(large)
        kept = {s.pattern for s in await store.subscriptions(A)}
        assert kept == ({b"before", b"small"} if small is True else {b"before"})
        await store.set_subscriptions(B, [(b"old", None)], [])  # C31
        with pytest.raises(StoreUnavailable, match="free space"):
            await store.set_subscriptions(B, [(b"%d" % n * 500, None) for n in range(2_000)], [])
        assert [s.pattern for s in await store.subscriptions(B)] == [b"old"]
        Small.pages = 100_000
        assert await store.subscribe(Kind.EXACT, b"large" * 200_000, A, None)


async def test_a_failing_call_does_not_hurt_those_beside_it(path: Path) -> None:
    async with opened(SqliteStore(str(path))) as store:
        with locked(path):  # so that all of them share a transaction
            calls = [
                asyncio.create_task(store.subscribe(Kind.EXACT, b"%d" % n, url, None))
                for n, url in enumerate([A, "lone surrogate \ud800", A])
            ]
            await asyncio.wait(calls, timeout=0.05)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(o) for o in outcomes] == [bool, UnicodeEncodeError, bool]
        assert [s.pattern for s in await store.subscriptions(A)] == [b"0", b"2"]


async def test_a_bug_is_not_hidden(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(SqliteStore(str(path))) as store:
        with monkeypatch.context() as patch:
            patch.setitem(module._SQL, "subscribe", "INSERT INTO nowhere VALUES (?, ?, ?, ?)")
            with pytest.raises(sqlite3.OperationalError, match="nowhere"):
                await store.subscribe(Kind.EXACT, b"t", A, None)
        assert await store.subscribe(Kind.EXACT, b"t", A, None)


async def test_too_many_calls_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUEUE_LIMIT", 5)
    async with opened(SqliteStore(str(path))) as store:
        outcomes = await asyncio.gather(
            *(store.subscribe(Kind.EXACT, b"%d" % n, A, None) for n in range(20)),
            return_exceptions=True,
        )
        assert outcomes[:5] == [True] * 5
        assert all(isinstance(o, StoreUnavailable) for o in outcomes[5:])
        assert await store.subscribe(Kind.EXACT, b"after", A, None)


async def test_a_closed_store_says_so(path: Path) -> None:
    store = SqliteStore(str(path))
    async with opened(store):
        pass
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.subscribe(Kind.EXACT, b"t", A, None)
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.match(b"t")


async def test_closing_finishes_what_is_queued(path: Path) -> None:
    store = SqliteStore(str(path))
    await store.open()
    calls = [asyncio.create_task(store.subscribe(Kind.EXACT, b"%d" % n, A, None)) for n in range(9)]
    await asyncio.sleep(0)
    await store.close()
    assert await asyncio.gather(*calls) == [True] * 9
    assert not path.with_name(path.name + "-wal").exists()
    async with opened(SqliteStore(str(path))) as store:
        assert len(await store.subscriptions(A)) == 9


# Writes


@pytest.mark.parametrize("count", [0, 16, 17, 20, 40])
async def test_setting_the_same_again_writes_nothing(path: Path, count: int) -> None:
    async with opened(SqliteStore(str(path))) as store:
        exact = [(b"%d" % n, None) for n in range(count)]
        globs = [(f"{n}", A) for n in range(count)]
        await store.set_subscriptions(A, exact, globs)
        wal = path.with_name(path.name + "-wal")
        before = wal.stat()
        changes = await store._write(lambda db: db.total_changes)
        await store.set_subscriptions(A, exact, globs)
        assert await store._write(lambda db: db.total_changes) == changes
        assert (wal.stat().st_size, wal.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


async def test_a_store_that_is_far_behind_reads_all_globs(path: Path) -> None:
    async with opened(SqliteStore(str(path))) as one, opened(SqliteStore(str(path))) as two:
        await one._write(
            lambda db: db.execute("UPDATE meta SET value = 10 WHERE key = 'glob_history'")
        )
        for count in (3, 30, 8, 9, 2, 31, 0):
            await one.set_subscriptions(A, [], [(f"{n}/*", None) for n in range(count)])
            found = [bool(await two.match(b"%d/x" % n)) for n in range(40)]
            assert found == [n < count for n in range(40)]
        rows = await one._read(
            lambda db: db.execute("SELECT count(*) FROM dropped_globs").fetchone()
        )
        assert rows[0] <= 10


async def test_deleted_globs_are_remembered_for_10_000_versions(path: Path) -> None:
    async with opened(SqliteStore(str(path))) as one, opened(SqliteStore(str(path))) as two:
        await one.set_subscriptions(A, [], [(f"{n}", None) for n in range(10_050)])
        assert await two.match(b"10049")
        await one.set_subscriptions(A, [], [])
        assert await two.match(b"10049") == []
        rows = await one._read(
            lambda db: db.execute("SELECT count(*) FROM dropped_globs").fetchone()
        )
        assert rows[0] == 10_000


async def test_an_operator_may_edit_the_tables(path: Path) -> None:
    async with opened(SqliteStore(str(path))) as store:
        await store.set_subscriptions(A, [(b"a/b", None)], [("a/*", None), ("a/**", None)])
        assert len(await store.match(b"a/b")) == 3
        shell = sqlite3.connect(path)
        shell.execute("DELETE FROM subscriptions WHERE pattern = CAST('a/*' AS BLOB)")
        shell.execute("UPDATE subscriptions SET url = 'http://b/' WHERE kind = 1")
        shell.commit()
        shell.close()
        assert sorted(s.url for s in await store.match(b"a/b")) == [A, "http://b/"]
        counted = sqlite3.connect(path).execute("SELECT url, subscriptions FROM subscribers")
        assert dict(counted.fetchall()) == {A: 1, "http://b/": 1}


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ("INSERT INTO subscriptions (kind, pattern, url) VALUES (0, x'74', 'http://c/')", 2),
        ("INSERT INTO subscriptions (kind, pattern, url) VALUES (1, x'2a', 'http://c/')", 2),
        ("UPDATE subscriptions SET recovery = 'http://c/'", 1),
        ("UPDATE subscriptions SET pattern = x'75'", 0),
        ("DELETE FROM subscriptions", 0),
    ],
)
async def test_what_was_found_is_known_until_subscriptions_change(
    path: Path, change: str, left: int
) -> None:
    async with opened(SqliteStore(str(path))) as store, opened(SqliteStore(str(path))) as other:
        await store.subscribe(Kind.EXACT, b"t", A, A)
        found = await store.match(b"t")
        for changing in (store, other):
            await changing.record_missed([(found[0], b"t")], 1.0)
            await changing.renew_leases([A], time.time())
        assert store.found(b"t", time.monotonic()) is found
        shell = sqlite3.connect(path)
        shell.execute(change)
        shell.commit()
        shell.close()
        assert store.found(b"t", time.monotonic()) is None
        assert len(await store.match(b"t")) == left


async def test_it_says_whether_its_threads_work(path: Path) -> None:
    async with opened(SqliteStore(str(path))) as store:
        for work in (store.counts(), store.subscribe(Kind.EXACT, b"t", A, None)):
            assert not store.in_threads
            task = asyncio.create_task(work)
            await asyncio.sleep(0)
            assert store.in_threads
            await task
        assert not store.in_threads
        await store.match(b"t")  # not in a thread
        assert not store.in_threads


async def test_failures_of_the_dead_are_written_down_once(path: Path) -> None:
    async with opened(FaultyStore(str(path))) as store, opened(SqliteStore(str(path))) as other:
        await store.subscribe(Kind.EXACT, b"t", A, A)
        items = [(row, b"t") for row in await store.match(b"t")]
        for due in (1.0, 2.0):  # the first may be a precaution, and be taken back
            await store.record_missed(items, due)
        Faulty.when = lambda sql: "IMMEDIATE" in sql
        Faulty.code = sqlite3.SQLITE_READONLY
        await store.record_missed(items, 3.0)
        (notice,) = await other.claim_missed(1.0, 9, 60.0)
        with pytest.raises(StoreUnavailable):
            await store.record_missed(items, 4.0)
        await other.retry_missed(notice, 5.0)
        await store.record_missed(items, 6.0)
        # whoever cannot look writes
        Faulty.when = lambda sql: "IMMEDIATE" in sql or sql == module._SQL["is_announced"]
        with pytest.raises(StoreUnavailable):
            await store.record_missed(items, 7.0)


async def test_what_was_found_is_forgotten_when_nobody_can_say(path: Path) -> None:
    async with opened(FaultyStore(str(path))) as store:
        await store.subscribe(Kind.EXACT, b"t", A, A)
        (row,) = await store.match(b"t")
        await store.record_missed([(row, b"t")], 1.0)
        Faulty.when = lambda sql: sql == module._VERSION
        Faulty.code = sqlite3.SQLITE_BUSY
        assert store.found(b"t", time.monotonic()) is None
        assert await store.match(b"t") == [row]


async def test_matching_holds_no_transaction_open(path: Path) -> None:
    async with opened(SqliteStore(str(path))) as store:
        await store.set_subscriptions(A, [(b"a/b", None)], [("a/*", None)])
        await store.match(b"a/b")
        await store.counts()
        other = sqlite3.connect(path)
        busy, _, _ = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        other.close()
        assert busy == 0


@pytest.mark.parametrize(
    ("query", "index"),
    [
        ("match", "sqlite_autoindex_subscriptions_1 (kind=? AND pattern=?)"),
        ("match_more", "sqlite_autoindex_subscriptions_1 (kind=? AND pattern=? AND url>?)"),
        ("changed_globs", "globs_by_version (version>?)"),
        ("all_globs", "globs_by_version (version>?)"),
        ("subscriptions", "subscriptions_of_url (url=?)"),
        ("next_due", "missed_by_time"),
        ("stale_subscribers", "subscribers_by_seen (seen<?)"),
    ],
)
async def test_nothing_frequent_looks_at_all_rows(path: Path, query: str, index: str) -> None:
    async with opened(SqliteStore(str(path))) as store:
        sql = module._SQL[query]
        plan = await store._read(
            lambda db: db.execute(f"EXPLAIN QUERY PLAN {sql}", (0,) * sql.count("?")).fetchall()
        )
    steps = [step for *_, step in plan]
    assert any(index in step for step in steps), steps
    assert not any("TEMP B-TREE" in step for step in steps), steps


# Several processes

SUBSCRIBE_FOREVER = """
import asyncio, sys
from lonelypss.store import Kind
from lonelypss.store.sqlite import SqliteStore

async def main():
    store = SqliteStore(sys.argv[1])
    await store.open()
    async def stream(name):
        for n in range(10**9):
            topic = f"{name}/{n}"
            await store.subscribe(Kind(n % 2), topic.encode(), "http://a/receive", None)
            print(topic, flush=True)
    await asyncio.gather(*map(stream, range(8)))

asyncio.run(main())
"""


@pytest.mark.parametrize("after", [1, 50, 400])
async def test_what_was_answered_survives_a_kill(path: Path, after: int) -> None:
    with python(SUBSCRIBE_FOREVER, path) as process:
        answered = [process.stdout.readline() for _ in range(after)]
        process.send_signal(signal.SIGKILL)
        answered += process.stdout.readlines()
    async with opened(SqliteStore(str(path))) as store:
        topics = [line.rstrip(b"\n") for line in answered if line.endswith(b"\n")]
        assert len(topics) >= after
        for topic in topics:
            assert len(await store.match(topic)) == 1
        assert await store.subscribe(Kind.EXACT, b"after", A, None)


SET_FOREVER = """
import asyncio, sys
from lonelypss.store.sqlite import SqliteStore

async def main():
    store = SqliteStore(sys.argv[1])
    await store.open()
    for turn in range(10**9):
        await store.set_subscriptions(
            "http://a/receive",
            [(b"%d/%d" % (turn % 2, n), None) for n in range(700)],
            [(f"{turn % 2}/{n}/*", None) for n in range(50)],
        )
        print(turn, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("sets", [1, 2, 3, 20])
async def test_a_kill_during_a_set_leaves_the_old_or_the_new_list(path: Path, sets: int) -> None:
    """C24."""
    with python(SET_FOREVER, path) as process:
        for _ in range(sets):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.stdout.readlines()
    lists = [
        {b"%d/%d" % (turn, n) for n in range(700)} | {b"%d/%d/*" % (turn, n) for n in range(50)}
        for turn in range(2)
    ]
    async with opened(SqliteStore(str(path))) as store:
        assert {s.pattern for s in await store.subscriptions(A)} in lists
        db = sqlite3.connect(path)
        assert db.execute("SELECT subscriptions FROM subscribers").fetchall() == [(750,)]
        db.close()


async def test_a_copy_taken_at_any_moment_is_whole(path: Path, tmp_path: Path) -> None:
    """What a power cut leaves: the file and its -wal as they are at one moment."""
    async with opened(SqliteStore(str(path))) as store:
        for n in range(30):
            await store.set_subscriptions(A, [(b"%d/%d" % (n, m), None) for m in range(n)], [])
            copy = tmp_path / f"{n}.db"
            copy.write_bytes(path.read_bytes())
            Path(f"{copy}-wal").write_bytes(Path(f"{path}-wal").read_bytes())
            async with opened(SqliteStore(str(copy))) as left:
                assert len(await left.subscriptions(A)) == n


async def test_a_copy_taken_in_the_middle_of_writing_is_whole(path: Path, tmp_path: Path) -> None:
    """F07: another process is stopped at random moments."""
    answered: set[bytes] = set()
    with python(SUBSCRIBE_FOREVER, path) as process:
        reader = threading.Thread(target=lambda: answered.update(process.stdout))
        reader.start()
        try:
            while not answered:
                await asyncio.sleep(0.01)
            for n in range(20):
                await asyncio.sleep(random.random() * 0.03)
                process.send_signal(signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)
                known = {line.rstrip(b"\n") for line in answered.copy()}
                copy = tmp_path / f"{n}.db"
                copy.write_bytes(path.read_bytes())
                Path(f"{copy}-wal").write_bytes(Path(f"{path}-wal").read_bytes())
                process.send_signal(signal.SIGCONT)
                async with opened(SqliteStore(str(copy))) as left:
                    assert known <= {s.pattern for s in await left.subscriptions(A)}
        finally:
            process.kill()
            reader.join()


OPEN = """
import asyncio, sys
from lonelypss.store import Kind
from lonelypss.store.sqlite import SqliteStore

async def main():
    store = SqliteStore(sys.argv[1])
    print(flush=True)
    sys.stdin.readline()
    await store.open()
    await store.subscribe(Kind.GLOB, sys.argv[2].encode(), "http://a/receive", None)
    await store.close()

asyncio.run(main())
"""


@pytest.mark.parametrize("run", range(3))
async def test_processes_that_start_at_once(path: Path, run: int) -> None:
    processes = [python(OPEN, path, n) for n in range(4)]
    for process in processes:
        assert process.stdout.readline()
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=30)
        assert process.returncode == 0
    async with opened(SqliteStore(str(path))) as store:
        assert [s.pattern for s in await store.subscriptions(A)] == [b"0", b"1", b"2", b"3"]


# Files that must not be touched


async def make(path: Path, count: int = 200) -> None:
    async with opened(SqliteStore(str(path))) as store:
        await store.set_subscriptions(A, [(b"topic/%d" % n, A) for n in range(count)], [])


async def refused(path: Path, match: str) -> None:
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(StoreCorrupt, match=match) as raised:
        await SqliteStore(str(path)).open()
    assert path.name in str(raised.value)
    assert (path.read_bytes() if path.exists() else None) == before


async def test_a_missing_or_empty_file_is_created(path: Path) -> None:
    await make(path)
    path.unlink()
    path.touch()
    await make(path)


async def test_a_damaged_file_is_refused(path: Path) -> None:
    await make(path)
    whole = path.read_bytes()
    path.write_bytes(b"\0" * 100 + whole[100:])
    await refused(path, "damaged")
    path.write_bytes(whole[: len(whole) // 2])
    await refused(path, "damaged")
    path.write_bytes(whole[:4096] + bytes(reversed(whole[4096:])))
    await refused(path, "damaged")
    path.write_bytes(b"no database at all " * 100)
    await refused(path, "damaged")


async def test_damage_that_shows_later(path: Path) -> None:
    async with opened(FaultyStore(str(path))) as store:
        Faulty.code = sqlite3.SQLITE_CORRUPT
        Faulty.when = lambda sql: sql.startswith("INSERT")
        with pytest.raises(StoreCorrupt, match="backup"):
            await store.subscribe(Kind.EXACT, b"t", A, None)


@pytest.mark.parametrize("empty", [True, False])
async def test_a_wal_without_its_file_is_refused(path: Path, empty: bool) -> None:
    Path(f"{path}-wal").write_bytes(b"x" * 32)
    if empty:
        path.touch()
    await refused(path, "missing or empty")


async def test_a_file_that_lost_its_wal_is_refused(path: Path) -> None:
    with python(SUBSCRIBE_FOREVER, path) as process:
        process.stdout.readline()
        process.kill()
        process.stdout.read()
    os.unlink(f"{path}-wal")
    await refused(path, "-wal is missing")
    os.unlink(f"{path}-shm")
    await make(path)


async def test_the_file_of_another_program_is_refused(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE theirs (x)")
    db.close()
    await refused(path, "another program")


async def test_an_older_schema_is_brought_up_to_date(path: Path) -> None:
    db = sqlite3.connect(path)
    db.executescript(module._MIGRATIONS[0] + "PRAGMA user_version = 1;")
    db.execute("INSERT INTO subscriptions (kind, pattern, url) VALUES (1, x'2a', ?)", (A,))
    db.execute("INSERT INTO subscriptions (kind, pattern, url) VALUES (0, x'2b', ?)", (B,))
    db.commit()
    db.close()
    async with opened(SqliteStore(str(path))) as store:
        assert [s.url for s in await store.match(b"t")] == [A]
        db = sqlite3.connect(path)
        counted = db.execute("SELECT url, subscriptions FROM subscribers ORDER BY url").fetchall()
        assert counted == [(A, 1), (B, 1)]
        assert db.execute("SELECT * FROM origins").fetchall() == [("http://a", 1), ("http://b", 1)]
        db.close()
        await store.renew_peer(A, until=2.0, now=1.0)
        assert await store.drop_dead_peers(2.0) == [A]
        assert await store.match(b"t") == []


async def test_a_newer_schema_is_refused(path: Path) -> None:
    await make(path)
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    await refused(path, "newer lonelypss")


async def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="--db"):
        await SqliteStore(str(tmp_path / "nowhere" / "store.db")).open()


async def test_opening_gives_up_on_a_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await make(path)
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 0")  # so that opening wants to migrate
    db.close()
    monkeypatch.setattr(module, "_OPEN_TIMEOUT", 0.1)
    with locked(path):
        with pytest.raises(StoreUnavailable, match="locked"):
            await SqliteStore(str(path)).open()


async def test_an_open_that_fails_leaves_nothing_behind(path: Path) -> None:
    Faulty.when = lambda sql: "history" in sql
    Faulty.code = sqlite3.SQLITE_IOERR
    store = FaultyStore(str(path))
    with pytest.raises(StoreUnavailable):
        await store.open()
    Faulty.when = None
    async with opened(store):
        assert await store.subscribe(Kind.EXACT, b"t", A, None)
