"""Remembers the signatures that were accepted, so that each is accepted once.

A signature stamped `t` passes the clock check until `t + token_lifetime`, and is remembered at
least that long. What was accepted before a restart is a hole that each guard closes in its own
way: `ReplayGuard` refuses whatever is stamped earlier than its own start, `SqliteReplayGuard`
keeps its memory in a file, which several processes may share, and `SharedReplayGuard` leaves the
verdict to a database that several machines share.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from enum import Enum
from typing import NamedTuple, Protocol

log = logging.getLogger(__name__)

DEFAULT_MAX_CODES = 1_000_000
_OPEN_TIMEOUT = 10.0  # seconds: the workers of a machine start, and create the file, all at once
_SWEEP_INTERVAL = 0.2  # seconds
_SWEEP_ROWS = 2000  # with the interval: more than a core can verify
_COUNT_INTERVAL = 5.0  # seconds, for which the bound is one per process
_REMEMBER = "INSERT OR IGNORE INTO used VALUES (?, ?)"
_KEPT_BYTES = 16  # of the 64: two of 10^6 codes share a prefix with probability 10^-27


class Verdict(Enum):
    NEW = "new"
    USED = "used"
    UNKNOWN = "unknown"
    """The memory is full or out of reach: nothing can be accepted safely."""


class Remembers(Protocol):
    """What `Hmac` asks of a guard."""

    def mark(self, code: bytes, timestamp: float, expires: float, now: float) -> Verdict:
        """Remembers `code` until `expires`; NEW exactly once.

        Args:
            code: the raw signature.
            timestamp: when the signer says it was made, seconds since the epoch.
            expires: from when on the clock check refuses it anyway.
            now: seconds since the epoch.
        """
        ...


class Code(NamedTuple):
    """What a shared memory keeps of a signature.

    Attributes:
        stamp: when its signer says it was made, whole seconds since the epoch.
        code: its first bytes.
    """

    stamp: int
    code: bytes


class Shared(Protocol):
    """Which signatures the last check accepted as far as this process knows, to be asked about
    where everybody asks before anything is done about them."""

    def take(self) -> Sequence[Code]:
        """The code that was marked since the last call, if any: call it right after the check."""
        ...

    def forget(self, codes: Iterable[Code]) -> None:
        """Nobody could be asked, so nothing was done about them: the same value may come again."""
        ...


class _NotShared:
    """Whoever accepts a signature has asked everybody; see `Shared`."""

    def take(self) -> Sequence[Code]:
        return ()

    def forget(self, codes: Iterable[Code]) -> None:
        pass

    def __reduce__(self) -> str:
        return "NOT_SHARED"  # there is one, also in a process that it was sent to


NOT_SHARED = _NotShared()


class Together(Protocol):
    """Remembers what several checks accept in one go, since to write once takes little more time
    than to write one. Nothing may be done about what was accepted before `settle` says so."""

    def begin(self) -> None:
        """From now on, whatever `mark` calls new is only kept for `settle`."""
        ...

    def settle(self) -> Verdict:
        """What holds for all of it: NEW; USED, one at least; UNKNOWN. Unless it is NEW, none of it
        is remembered."""
        ...


class _NotTogether:
    """Each is remembered when it is checked."""

    def begin(self) -> None:
        pass

    def settle(self) -> Verdict:
        return Verdict.NEW

    def __reduce__(self) -> str:
        return "NOT_TOGETHER"


NOT_TOGETHER = _NotTogether()


class ReplayGuard:
    """In memory, for one process.

    Args:
        started: refuse what is stamped before this time (seconds since the epoch). Give the
            time at which the process starts: an earlier one may have accepted such a value. None
            leaves that hole open.
        max_codes: bound of the memory, about 100 bytes each. When it is full, nothing more is
            accepted until codes expire: the check is UNAVAILABLE, not skipped.
    """

    def __init__(self, *, started: float | None = None, max_codes: int = DEFAULT_MAX_CODES) -> None:
        # stamps are whole seconds, cut off
        self._started = -math.inf if started is None else math.floor(started)
        self._max = max_codes
        self._codes: set[bytes] = set()
        # in order of arrival; one second of one signer's codes expire together, so that a code is
        # kept at most twice the token lifetime
        self._expiring: deque[tuple[float, bytes]] = deque()

    def mark(self, code: bytes, timestamp: float, expires: float, now: float) -> Verdict:
        self._forget(now)
        code = code[:_KEPT_BYTES]
        if timestamp < self._started or code in self._codes:
            return Verdict.USED
        if len(self._codes) >= self._max:
            return Verdict.UNKNOWN
        self._codes.add(code)
        self._expiring.append((expires, code))
        return Verdict.NEW

    def _forget(self, now: float) -> None:
        while self._expiring and self._expiring[0][0] < now:
            self._codes.discard(self._expiring.popleft()[1])

    def __len__(self) -> int:
        return len(self._codes)


class SharedReplayGuard(ReplayGuard):
    """What this process knows, for a `Shared` memory: NEW only means that it is worth asking.

    It is not safe by itself: whoever checks must `take` the code, and do nothing before the shared
    memory has confirmed it as new.

    Args:
        max_codes: as for `ReplayGuard`, and so what one process adds to the shared memory at most.
    """

    def __init__(self, *, max_codes: int = DEFAULT_MAX_CODES) -> None:
        super().__init__(max_codes=max_codes)
        self._last: Sequence[Code] = ()

    def mark(self, code: bytes, timestamp: float, expires: float, now: float) -> Verdict:
        verdict = super().mark(code, timestamp, expires, now)
        if verdict is Verdict.NEW:
            self._last = (Code(int(timestamp), code[:_KEPT_BYTES]),)
        return verdict

    def take(self) -> Sequence[Code]:
        codes, self._last = self._last, ()
        return codes

    def forget(self, codes: Iterable[Code]) -> None:
        self._codes.difference_update(code for _, code in codes)


class SqliteReplayGuard:
    """In a file of its own, shared by the worker processes of one machine, surviving a restart.

    A code is committed before `mark` returns, or `settle`: it is `Together`, too. The file is not
    synced to disk on each: what a killed process committed is there, what a power failure takes was
    stamped before the machine came up again and is too old by then, or was never answered.

    Args:
        path: the file, created when missing.
        busy_timeout: seconds to wait for another process's write before answering UNKNOWN.
        max_codes: as for `ReplayGuard`.
    """

    def __init__(
        self, path: str, *, busy_timeout: float = 0.05, max_codes: int = DEFAULT_MAX_CODES
    ) -> None:
        self._max = max_codes
        self._swept = -math.inf
        self._counted = -math.inf
        self._lifetime = 0.0
        self._db = sqlite3.connect(
            path, timeout=_OPEN_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        # nobody owns a guard that sits in a configuration, so nobody may close it
        weakref.finalize(self, self._db.close)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            pass  # another process is switching it right now, for which SQLite does not wait
        self._db.execute("PRAGMA synchronous=OFF")
        # in order of time, so that what is written together lies together and goes together
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS used (stamp REAL, code BLOB, PRIMARY KEY (stamp, code))"
            " WITHOUT ROWID"
        )
        self._count = 0
        self._together: dict[tuple[float, bytes], None] | None = None
        self._db.execute(f"PRAGMA busy_timeout={int(busy_timeout * 1000)}")

    def mark(self, code: bytes, timestamp: float, expires: float, now: float) -> Verdict:
        try:
            self._lifetime = max(self._lifetime, expires - timestamp)
            self._sweep(now)
            row = timestamp, code[:_KEPT_BYTES]
            if (together := self._together) is not None:
                return self._keep(row, together)
            if self._count >= self._max:
                return Verdict.UNKNOWN
            added = self._db.execute(_REMEMBER, row)
        except sqlite3.OperationalError as e:
            log.warning("cannot remember a signature, so it is not accepted: %s", e)
            return Verdict.UNKNOWN
        self._count += added.rowcount
        return Verdict.NEW if added.rowcount else Verdict.USED

    def _keep(self, row: tuple[float, bytes], together: dict[tuple[float, bytes], None]) -> Verdict:
        if row in together:
            return Verdict.USED
        if self._count + len(together) >= self._max:
            return Verdict.UNKNOWN
        together[row] = None
        return Verdict.NEW

    def begin(self) -> None:
        self._together = {}

    def settle(self) -> Verdict:
        rows, self._together = self._together, None
        if not rows:
            return Verdict.NEW
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
            added = db.executemany(_REMEMBER, rows).rowcount
            db.execute("COMMIT" if added == len(rows) else "ROLLBACK")
        except sqlite3.OperationalError as e:
            log.warning("cannot remember %d signatures, so none is accepted: %s", len(rows), e)
            with suppress(sqlite3.OperationalError):  # there may be nothing to take back
                db.execute("ROLLBACK")
            return Verdict.UNKNOWN
        if added < len(rows):
            return Verdict.USED
        self._count += added
        return Verdict.NEW

    def _sweep(self, now: float) -> None:
        """Forgets a bounded part of what has expired; this may run on an event loop."""
        if abs(now - self._swept) >= _SWEEP_INTERVAL:
            self._swept = now
            gone = self._db.execute(
                "DELETE FROM used WHERE (stamp, code) IN"
                " (SELECT stamp, code FROM used WHERE stamp < ? ORDER BY stamp LIMIT ?)",
                (now - self._lifetime, _SWEEP_ROWS),
            )
            self._count -= gone.rowcount
        if abs(now - self._counted) >= _COUNT_INTERVAL:
            # other processes remember and forget too
            self._counted = now
            (self._count,) = self._db.execute("SELECT count(*) FROM used").fetchone()

    def close(self) -> None:
        self._db.close()
