from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lonelypsp.errors import AuthResult
from lonelypsp.replay import (
    NOT_SHARED,
    Code,
    ReplayGuard,
    SharedReplayGuard,
    SqliteReplayGuard,
    Verdict,
)
from lonelypsp.signing import TOKEN_LIFETIME, Hmac

KEY = bytes(range(64))
T = int(TOKEN_LIFETIME)
START = 1_700_000_000
FIELDS = {"tracing": b"", "url": "http://h/v1/receive"}
OPERATION = "CHECK_SUBSCRIPTIONS"

NEW, USED, UNKNOWN = Verdict

Guard = ReplayGuard | SqliteReplayGuard
MakeGuard = Callable[..., Guard]


@pytest.fixture
def sqlite_guard(tmp_path: Path) -> Iterator[Callable[..., SqliteReplayGuard]]:
    """Opens guards, all on one file."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> SqliteReplayGuard:
            guard = SqliteReplayGuard(str(tmp_path / "replay.db"), **options)
            stack.callback(guard.close)
            return guard

        yield make


@pytest.fixture(params=["memory", "sqlite"])
def make_guard(
    request: pytest.FixtureRequest, sqlite_guard: Callable[..., SqliteReplayGuard]
) -> MakeGuard:
    return ReplayGuard if request.param == "memory" else sqlite_guard


def code(i: int) -> bytes:
    return hashlib.sha512(str(i).encode()).digest()


# the table: once, and only once


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "among others"])
@pytest.mark.parametrize("first", [-T, 0, 1, 60, 119, 120, 180, 239])
@pytest.mark.parametrize("stamp", [0, 119, 120])
def test_accepted_once(make_guard: MakeGuard, stamp: int, first: int, busy: bool) -> None:
    """B10: offered every second from `first` to 3 lifetimes on, taken where the clock allows."""
    auth = Hmac(KEY, replay=make_guard())
    value = auth.authorize(OPERATION, FIELDS, START + stamp)
    accepted = []
    for second in range(first, 3 * T + 1):
        now = START + second
        if busy:  # codes that come and go around it, with clocks before and behind ours
            for skew in (-119, 0, 119):
                other = auth.authorize(OPERATION, FIELDS, now + skew)
                assert auth.check(OPERATION, FIELDS, other, now) is AuthResult.OK
        result = auth.check(OPERATION, FIELDS, value, now)
        assert result in (AuthResult.OK, AuthResult.FORBIDDEN)
        if result is AuthResult.OK:
            accepted.append(second)
    earliest = max(first, stamp - T)
    assert accepted == ([earliest] if earliest <= stamp + T else [])


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.999])
def test_remembered_up_to_the_last_moment(make_guard: MakeGuard, fraction: float) -> None:
    guard = make_guard()
    expires = START + T + fraction
    assert guard.mark(code(1), START, expires, START) is NEW
    assert guard.mark(code(1), START, expires, expires) is USED


def test_codes_are_told_apart(make_guard: MakeGuard) -> None:
    guard = make_guard()
    codes = [code(i) for i in range(200)]
    assert [guard.mark(c, START, START + T, START) for c in codes] == [NEW] * 200
    assert [guard.mark(c, START, START + T, START) for c in codes] == [USED] * 200


# bounded


def test_full_is_unknown_and_frees_again(make_guard: MakeGuard) -> None:
    guard = make_guard(max_codes=3)
    for i in range(3):
        assert guard.mark(code(i), START + i, START + T + i, START) is NEW
    assert guard.mark(code(3), START, START + T, START) is UNKNOWN
    assert guard.mark(code(0), START, START + T, START) is not NEW, "full, but not forgetful"
    later = START + T + 1  # the first of the three has expired
    assert guard.mark(code(3), later, later + T, later) is NEW
    assert guard.mark(code(4), later, later + T, later) is UNKNOWN
    assert guard.mark(code(1), START + 1, START + T + 1, later) is not NEW


def test_full_is_unavailable(make_guard: MakeGuard) -> None:
    auth = Hmac(KEY, replay=make_guard(max_codes=1))

    def check(now: float) -> AuthResult:
        return auth.check(OPERATION, FIELDS, auth.authorize(OPERATION, FIELDS, now), now)

    assert check(START) is AuthResult.OK
    assert check(START + 1) is AuthResult.UNAVAILABLE
    assert check(START + T + 1) is AuthResult.OK


def test_what_was_unknown_can_come_again(make_guard: MakeGuard) -> None:
    guard = make_guard(max_codes=1)
    assert guard.mark(code(0), START, START + T, START) is NEW
    assert guard.mark(code(1), START + 100, START + 100 + T, START + 100) is UNKNOWN
    later = START + T + 1
    assert guard.mark(code(1), START + 100, START + 100 + T, later) is NEW


def test_memory_follows_the_rate_not_the_run_time() -> None:
    guard = ReplayGuard()
    sizes = []
    for second in range(1000):
        now = START + second
        for i in range(3):
            assert guard.mark(code(3 * second + i), now, now + T, now) is NEW
        sizes.append(len(guard))
    assert max(sizes) == sizes[-1] == 3 * (T + 1)


def test_a_clock_ahead_does_not_keep_others_long() -> None:
    """One code stamped in the future delays the rest, by two lifetimes at most."""
    guard = ReplayGuard()
    guard.mark(code(0), START + T, START + 2 * T, START)
    for i in range(1, 1000):
        guard.mark(code(i), START + i, START + i + T, START + i)
        assert len(guard) <= 2 * T + 2


def test_file_follows_the_rate_not_the_run_time(
    sqlite_guard: Callable[..., SqliteReplayGuard], tmp_path: Path
) -> None:
    guard = sqlite_guard()
    for second in range(1000):
        now = START + second
        assert guard.mark(code(second), now, now + T, now) is NEW
    with contextlib.closing(sqlite3.connect(tmp_path / "replay.db")) as db:
        (rows,) = db.execute("SELECT count(*) FROM used").fetchone()
    assert rows <= T + 1 + 11  # swept every 10 s


# restart


@pytest.mark.parametrize(
    ("started", "stamp", "verdict"),
    [
        pytest.param(None, START - 119, NEW, id="unset leaves the hole open"),
        pytest.param(START, START - 1, USED, id="before"),
        pytest.param(START, START, NEW, id="at"),
        pytest.param(START, START + 119, NEW, id="after"),
        # stamps are cut off to whole seconds: what is signed right after the start is stamped so
        pytest.param(START + 0.9, START, NEW, id="within the second of the start"),
        pytest.param(START + 0.9, START - 1, USED, id="in the second before"),
    ],
)
def test_memory_refuses_what_is_older_than_itself(
    started: float | None, stamp: int, verdict: Verdict
) -> None:
    guard = ReplayGuard(started=started)
    assert guard.mark(code(1), stamp, stamp + T, START + 1) is verdict


@pytest.mark.parametrize("age", [1, 60, 119])
def test_memory_restarted_accepts_no_used_value(age: int) -> None:
    before = Hmac(KEY, replay=ReplayGuard(started=START - 1000))
    value = before.authorize(OPERATION, FIELDS, START)
    assert before.check(OPERATION, FIELDS, value, START) is AuthResult.OK
    after = Hmac(KEY, replay=ReplayGuard(started=START + age))
    for second in range(age, 3 * T):
        result = after.check(OPERATION, FIELDS, value, START + second)
        assert result is AuthResult.FORBIDDEN


@pytest.mark.xfail(strict=True, reason="only a file remembers; memory knows no more than its start")
@pytest.mark.parametrize(
    ("stamp", "started"),
    [
        pytest.param(119, 60, id="signed by a clock ahead of ours"),
        pytest.param(0, 0.9, id="restarted within one second"),
    ],
)
def test_memory_restarted_is_not_enough(stamp: int, started: float) -> None:
    """What `SqliteReplayGuard` is for: T12 holds for it without exception, see below."""
    before = Hmac(KEY, replay=ReplayGuard())
    value = before.authorize(OPERATION, FIELDS, START + stamp)
    assert before.check(OPERATION, FIELDS, value, START) is AuthResult.OK
    after = Hmac(KEY, replay=ReplayGuard(started=START + started))
    result = after.check(OPERATION, FIELDS, value, START + started)
    assert result is AuthResult.FORBIDDEN


@pytest.mark.parametrize("stamp", [0, 119], ids=["stamped now", "stamped ahead"])
def test_file_survives_restarts(sqlite_guard: Callable[..., SqliteReplayGuard], stamp: int) -> None:
    """T12: a restart every 10 s, one acceptance."""
    value = Hmac(KEY).authorize(OPERATION, FIELDS, START + stamp)
    accepted = 0
    for second in range(-T, 3 * T):
        if second % 10 == 0:
            guard = sqlite_guard()
            auth = Hmac(KEY, replay=guard)
        accepted += auth.check(OPERATION, FIELDS, value, START + second) is AuthResult.OK
        if second % 10 == 9:
            guard.close()
    assert accepted == 1


# several on one file


def test_two_guards_share_a_file(sqlite_guard: Callable[..., SqliteReplayGuard]) -> None:
    guards = [sqlite_guard(), sqlite_guard()]
    for i in range(20):
        assert guards[i % 2].mark(code(i), START, START + T, START) is NEW
    for i in range(20):
        for guard in guards:
            assert guard.mark(code(i), START, START + T, START) is USED


def test_two_guards_share_the_bound(sqlite_guard: Callable[..., SqliteReplayGuard]) -> None:
    one, other = sqlite_guard(max_codes=5), sqlite_guard(max_codes=5)
    assert other.mark(code(99), START, START + T, START) is NEW
    for i in range(4):
        assert one.mark(code(i), START, START + T, START) is NEW
    # each counts what it wrote and looks at the file from time to time
    now = START + 11
    assert other.mark(code(4), now, now + T, now) is UNKNOWN


WORKER = """
import hashlib, sys
from lonelypsp.replay import SqliteReplayGuard
print("up", flush=True)
sys.stdin.readline()
guard = SqliteReplayGuard(sys.argv[1], busy_timeout=30)
for i in range(int(sys.argv[2])):
    code = hashlib.sha512(str(i).encode()).digest()
    print(i, guard.mark(code, 1000, 1120, 1000).value)
guard.close()
"""


def test_processes_accept_each_code_once_in_total(tmp_path: Path) -> None:
    """They open the same new file at the same moment, too."""
    codes, workers = 300, 3
    command = [sys.executable, "-c", WORKER, str(tmp_path / "replay.db"), str(codes)]
    verdicts: Counter[tuple[str, str]] = Counter()
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(workers)
        ]
        for process in running:
            assert process.stdout
            assert process.stdout.readline() == "up\n"
        for process in running:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        for process in running:
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            verdicts.update((i, verdict) for i, verdict in map(str.split, out.splitlines()))
    expected = {(str(i), "new"): 1 for i in range(codes)}
    expected |= {(str(i), "used"): workers - 1 for i in range(codes)}
    assert verdicts == expected


# out of reach


def test_a_locked_file_is_unknown_and_fine_afterwards(
    sqlite_guard: Callable[..., SqliteReplayGuard], tmp_path: Path
) -> None:
    guard = sqlite_guard(busy_timeout=0.01)
    auth = Hmac(KEY, replay=guard)
    value = auth.authorize(OPERATION, FIELDS, START)
    assert guard.mark(code(0), START, START + T, START) is NEW
    with contextlib.closing(sqlite3.connect(tmp_path / "replay.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert guard.mark(code(1), START, START + T, START) is UNKNOWN
        assert auth.check(OPERATION, FIELDS, value, START) is AuthResult.UNAVAILABLE
        # also when a sweep is due
        assert guard.mark(code(1), START + 50, START + 50 + T, START + 50) is UNKNOWN
        other.execute("ROLLBACK")
    assert guard.mark(code(0), START, START + T, START) is USED
    assert guard.mark(code(1), START, START + T, START) is NEW
    assert auth.check(OPERATION, FIELDS, value, START) is AuthResult.OK
    assert auth.check(OPERATION, FIELDS, value, START) is AuthResult.FORBIDDEN


def test_a_damaged_table_is_unknown(
    sqlite_guard: Callable[..., SqliteReplayGuard], tmp_path: Path
) -> None:
    guard = sqlite_guard()
    assert guard.mark(code(0), START, START + T, START) is NEW
    with contextlib.closing(sqlite3.connect(tmp_path / "replay.db")) as other:
        other.execute("DROP TABLE used")
    assert guard.mark(code(0), START, START + T, START) is UNKNOWN


# several in one go


def marked(guard: SqliteReplayGuard, *numbers: int) -> list[Verdict]:
    return [guard.mark(code(n), START, START + T, START) for n in numbers]


def test_several_in_one_go(sqlite_guard: Callable[..., SqliteReplayGuard]) -> None:
    guard, other = sqlite_guard(), sqlite_guard()
    guard.begin()
    assert marked(guard, 0, 1, 2, 1) == [NEW, NEW, NEW, USED]
    assert guard.settle() is NEW
    assert marked(guard, 0, 1, 2) == marked(other, 0, 1, 2) == [USED] * 3
    guard.begin()
    assert guard.settle() is NEW, "nothing was marked"
    assert marked(guard, 3) == [NEW]


@pytest.mark.parametrize("before", [True, False], ids=["before", "meanwhile"])
def test_one_that_was_used_spoils_all(
    sqlite_guard: Callable[..., SqliteReplayGuard], before: bool
) -> None:
    guard, other = sqlite_guard(), sqlite_guard()
    if before:
        assert marked(guard, 1) == [NEW]
    guard.begin()
    assert marked(guard, 0, 1, 2) == [NEW] * 3
    if not before:
        assert marked(other, 1) == [NEW]
    assert guard.settle() is USED
    assert marked(other, 0, 1, 2) == [NEW, USED, NEW]


def test_the_bound_in_one_go(sqlite_guard: Callable[..., SqliteReplayGuard]) -> None:
    guard = sqlite_guard(max_codes=4)
    assert marked(guard, 0) == [NEW]
    guard.begin()
    assert marked(guard, 1, 2, 3, 4) == [NEW, NEW, NEW, UNKNOWN]
    assert guard.settle() is NEW
    assert marked(guard, 5) == [UNKNOWN]


def test_a_locked_file_in_one_go(
    sqlite_guard: Callable[..., SqliteReplayGuard], tmp_path: Path
) -> None:
    guard = sqlite_guard(busy_timeout=0.01)
    assert marked(guard, 0) == [NEW]
    with contextlib.closing(sqlite3.connect(tmp_path / "replay.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        guard.begin()
        assert marked(guard, 1, 2) == [NEW, NEW]
        assert guard.settle() is UNKNOWN
        other.execute("ROLLBACK")
    assert marked(guard, 0, 1, 2) == [USED, NEW, NEW]


# a memory that others share


def test_what_is_new_here_is_handed_over_once() -> None:
    guard = SharedReplayGuard()
    assert guard.take() == ()
    assert guard.mark(code(1), START, START + T, START) is NEW
    assert guard.take() == (Code(START, code(1)[:16]),)
    assert guard.take() == ()
    assert guard.mark(code(1), START, START + T, START) is USED
    assert guard.take() == ()


def test_what_nobody_could_be_asked_about_may_come_again() -> None:
    guard = SharedReplayGuard()
    guard.mark(code(1), START, START + T, START)
    guard.mark(code(2), START, START + T, START)
    guard.forget([Code(START, code(1)[:16])])
    assert guard.mark(code(2), START, START + T, START) is USED
    assert guard.mark(code(1), START, START + T, START) is NEW
    assert guard.mark(code(1), START, START + T, START + T) is USED


def test_where_nothing_is_shared_there_is_nothing_to_ask() -> None:
    assert NOT_SHARED.take() == ()
    NOT_SHARED.forget([])
