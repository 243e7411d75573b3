from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lonelypsp.errors import AuthResult
from lonelypsp.replay import (
    NOT_SHARED,
    Code,
    FileReplayGuard,
    ReplayGuard,
    SharedReplayGuard,
    Verdict,
)
from lonelypsp.signing import TOKEN_LIFETIME, Hmac

KEY = bytes(range(64))
T = int(TOKEN_LIFETIME)
START = 1_700_000_000
FIELDS = {"tracing": b"", "url": "http://h/v1/receive"}
OPERATION = "CHECK_SUBSCRIPTIONS"

NEW, USED, UNKNOWN = Verdict

Guard = ReplayGuard | FileReplayGuard
MakeGuard = Callable[..., Guard]


@pytest.fixture
def file_guard(tmp_path: Path) -> Iterator[Callable[..., FileReplayGuard]]:
    """Opens guards, all on one file."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> FileReplayGuard:
            guard = FileReplayGuard(str(tmp_path / "replay"), **options)
            stack.callback(guard.close)
            return guard

        yield make


@pytest.fixture(params=["memory", "file"])
def make_guard(
    request: pytest.FixtureRequest, file_guard: Callable[..., FileReplayGuard]
) -> MakeGuard:
    return ReplayGuard if request.param == "memory" else file_guard


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


def test_the_longest_lifetime_holds(make_guard: MakeGuard) -> None:
    """Two authenticators may share a guard."""
    guard = make_guard()
    assert guard.mark(code(1), START, START + T, START) is NEW
    assert guard.mark(code(2), START, START + 3 * T, START) is NEW
    for now in (START + T + 1, START + 2 * T, START + 3 * T):
        assert guard.mark(code(3), now, now + T, now) is NEW
        assert guard.mark(code(2), START, START + 3 * T, now) is USED


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


def test_files_follow_the_rate_not_the_run_time(
    file_guard: Callable[..., FileReplayGuard], tmp_path: Path
) -> None:
    guard = file_guard()
    for second in range(1000):
        now = START + second
        assert guard.mark(code(second), now, now + T, now) is NEW
    files = list((tmp_path / "replay").iterdir())
    assert len(files) <= T + 60 + 6, "kept a minute longer, and looked at every 5 s"
    assert {file.stat().st_size for file in files} == {33}
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_what_others_put_there_stays(
    file_guard: Callable[..., FileReplayGuard], tmp_path: Path
) -> None:
    guard = file_guard(max_codes=2)
    (tmp_path / "replay" / "notes").write_bytes(bytes(1000))
    assert guard.mark(code(1), START, START + T, START) is NEW
    assert guard.mark(code(2), START + 500, START + 500 + T, START + 500) is NEW
    assert {f.name for f in (tmp_path / "replay").iterdir()} == {"notes", str(START + 500)}


def test_few_files_are_open(file_guard: Callable[..., FileReplayGuard]) -> None:
    guard = file_guard()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for second in range(T):
            guard.mark(code(second), START + second, START + second + T, START)
    assert len(os.listdir("/proc/self/fd")) <= before + 32
    guard.close()
    assert len(os.listdir("/proc/self/fd")) == before


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
    """What `FileReplayGuard` is for: T12 holds for it without exception, see below."""
    before = Hmac(KEY, replay=ReplayGuard())
    value = before.authorize(OPERATION, FIELDS, START + stamp)
    assert before.check(OPERATION, FIELDS, value, START) is AuthResult.OK
    after = Hmac(KEY, replay=ReplayGuard(started=START + started))
    result = after.check(OPERATION, FIELDS, value, START + started)
    assert result is AuthResult.FORBIDDEN


@pytest.mark.parametrize("stamp", [0, 119], ids=["stamped now", "stamped ahead"])
def test_file_survives_restarts(file_guard: Callable[..., FileReplayGuard], stamp: int) -> None:
    """T12: a restart every 10 s, one acceptance."""
    value = Hmac(KEY).authorize(OPERATION, FIELDS, START + stamp)
    accepted = 0
    for second in range(-T, 3 * T):
        if second % 10 == 0:
            guard = file_guard()
            auth = Hmac(KEY, replay=guard)
        accepted += auth.check(OPERATION, FIELDS, value, START + second) is AuthResult.OK
        if second % 10 == 9:
            guard.close()
    assert accepted == 1


# several on one file


def test_two_guards_share_a_file(file_guard: Callable[..., FileReplayGuard]) -> None:
    guards = [file_guard(), file_guard()]
    for i in range(20):
        assert guards[i % 2].mark(code(i), START, START + T, START) is NEW
    for i in range(20):
        for guard in guards:
            assert guard.mark(code(i), START, START + T, START) is USED


def test_two_guards_share_the_bound(file_guard: Callable[..., FileReplayGuard]) -> None:
    one, other = file_guard(max_codes=5), file_guard(max_codes=5)
    assert other.mark(code(99), START, START + T, START) is NEW
    for i in range(4):
        assert one.mark(code(i), START, START + T, START) is NEW
    # each counts what it wrote and looks at the file from time to time
    now = START + 11
    assert other.mark(code(4), now, now + T, now) is UNKNOWN


WORKER = """
import hashlib, sys
from lonelypsp.replay import FileReplayGuard
print("up", flush=True)
sys.stdin.readline()
guard = FileReplayGuard(sys.argv[1])
for i in range(int(sys.argv[2])):
    code = hashlib.sha512(str(i).encode()).digest()
    print(i, guard.mark(code, 1000, 1120, 1000).value)
guard.close()
"""


def test_processes_accept_each_code_once_in_total(tmp_path: Path) -> None:
    """They open the same new file at the same moment, too."""
    codes, workers = 300, 3
    command = [sys.executable, "-c", WORKER, str(tmp_path / "replay"), str(codes)]
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


# lines that are appended at the same time


def lines_of(*numbers: int) -> bytes:
    return b"".join(code(n)[:16].hex().encode() + b"\n" for n in numbers)


class Late:
    """Another process, which writes after a guard has looked and before it writes itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.says = b""
        write = os.write

        def write_late(file: int, data: bytes) -> int:
            with path.open("ab") as other:
                other.write(self.says)
            self.says = b""
            return write(file, data)

        monkeypatch.setattr("lonelypsp.replay.os.write", write_late)


def test_the_first_line_counts(
    file_guard: Callable[..., FileReplayGuard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, late = file_guard(), Late(monkeypatch, tmp_path / "replay" / str(START))
    late.says = lines_of(1)
    assert marked(guard, 1) == [USED]
    late.says = lines_of(2, 3)
    assert marked(guard, 4, 2, 3, 4, 1) == [NEW, USED, USED, USED, USED]
    assert marked(file_guard(), 1, 2, 3, 4, 5) == [USED, USED, USED, USED, NEW]


@pytest.mark.parametrize("cut", [1, 16, 32])
def test_a_line_that_is_being_written(
    file_guard: Callable[..., FileReplayGuard], tmp_path: Path, cut: int
) -> None:
    """A guard that opens the file meanwhile sees a part of it."""
    file = tmp_path / "replay" / str(START)
    guard = file_guard()
    file.write_bytes(lines_of(0, 1)[: 33 + cut])
    assert marked(guard, 0) == [USED]
    file.write_bytes(lines_of(0, 1))
    assert marked(guard, 2, 1, 0) == [NEW, USED, USED]


@pytest.mark.parametrize("cut", [1, 16, 32])
def test_a_line_that_was_cut_off(
    file_guard: Callable[..., FileReplayGuard], tmp_path: Path, cut: int
) -> None:
    """By a full disk. Whoever wrote it has accepted nothing."""
    guard = file_guard()
    assert marked(guard, 0) == [NEW]
    with (tmp_path / "replay" / str(START)).open("ab") as other:
        other.write(lines_of(1)[:cut])
    assert marked(file_guard(), 0) == [USED]
    assert marked(guard, 1, 2, 1) == [NEW, NEW, USED]
    assert marked(file_guard(), 0, 1, 2, 3) == [USED, USED, USED, NEW]


def marked(guard: FileReplayGuard, *numbers: int) -> list[Verdict]:
    return [guard.mark(code(n), START, START + T, START) for n in numbers]


def test_threads_of_one_process(file_guard: Callable[..., FileReplayGuard]) -> None:
    guard, codes = file_guard(), range(300)
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda n: marked(guard, n % 300)[0], [*codes, *codes]))
    assert Counter(verdicts) == {NEW: 300, USED: 300}


# out of reach


def test_a_full_disk_is_unknown_and_fine_afterwards(
    file_guard: Callable[..., FileReplayGuard], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, write = file_guard(), os.write
    auth = Hmac(KEY, replay=guard)
    value = auth.authorize(OPERATION, FIELDS, START)
    assert marked(guard, 0) == [NEW]
    for most in (0, 7, 32):
        with monkeypatch.context() as full:
            full.setattr("lonelypsp.replay.os.write", lambda file, data: write(file, data[:most]))  # noqa: B023
            assert marked(guard, 0, 1) == [USED, UNKNOWN]
            assert auth.check(OPERATION, FIELDS, value, START) is AuthResult.UNAVAILABLE
    assert marked(guard, 0, 1) == [USED, NEW]
    assert auth.check(OPERATION, FIELDS, value, START) is AuthResult.OK
    assert auth.check(OPERATION, FIELDS, value, START) is AuthResult.FORBIDDEN
    assert marked(file_guard(), 0, 1, 2) == [USED, USED, NEW]


def test_a_removed_directory_is_unknown(
    file_guard: Callable[..., FileReplayGuard], tmp_path: Path
) -> None:
    guard = file_guard()
    (tmp_path / "replay").rmdir()
    assert marked(guard, 0) == [UNKNOWN]
    file_guard()
    assert marked(guard, 0) == [NEW]


def test_a_file_that_was_cut_is_unknown(
    file_guard: Callable[..., FileReplayGuard], tmp_path: Path
) -> None:
    guard = file_guard()
    assert marked(guard, 0, 1) == [NEW] * 2
    os.truncate(tmp_path / "replay" / str(START), 0)
    assert marked(guard, 2) == [NEW], "nothing that it has forgotten"
    assert marked(guard, 0, 1, 2) == [USED] * 3


def test_what_cannot_be_read_is_unknown(
    file_guard: Callable[..., FileReplayGuard], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, read = file_guard(), os.pread
    assert marked(file_guard(), 0, 1) == [NEW] * 2
    with monkeypatch.context() as broken:
        broken.setattr("lonelypsp.replay.os.pread", lambda *where: read(*where)[:-1])
        assert marked(guard, 2) == [UNKNOWN]
    assert marked(guard, 0, 1, 2) == [USED, USED, NEW]


def test_a_place_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        FileReplayGuard(str(tmp_path / "file"))
    with pytest.raises(OSError, match="Not a directory"):
        FileReplayGuard(str(tmp_path / "file" / "below"))


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
