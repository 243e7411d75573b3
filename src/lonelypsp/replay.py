"""Remembers the signatures that were accepted, so that each is accepted once.

A signature stamped `t` passes the clock check until `t + token_lifetime`, and is remembered at
least that long. What was accepted before a restart is a hole that each guard closes in its own
way: `ReplayGuard` refuses whatever is stamped earlier than its own start, `FileReplayGuard` keeps
its memory in files, which several processes may share, and `SharedReplayGuard` leaves the verdict
to a database that several machines share.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import threading
import weakref
from binascii import b2a_hex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from enum import Enum
from typing import NamedTuple, Protocol

log = logging.getLogger(__name__)

DEFAULT_MAX_CODES = 1_000_000
_COUNT_INTERVAL = 5.0  # seconds, for which the bound is one per process
_GRACE = 60.0  # seconds for which a file is kept, in case that the clock is set back
_OPEN_SECONDS = 32
_KEPT_BYTES = 16  # of the 64: two of 10^6 codes share a prefix with probability 10^-27
_LINE = 2 * _KEPT_BYTES + 1


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
        self._codes: dict[int, set[bytes]] = {}
        """By their stamps, so that what expires goes at once."""
        self._count = 0
        self._lifetime = 0.0
        self._next = math.inf
        """When some expire."""

    def mark(self, code: bytes, timestamp: float, expires: float, now: float) -> Verdict:
        if now > self._next:
            self._forget(now)
        stamp = int(timestamp)
        if expires - stamp > self._lifetime:
            self._lifetime = expires - stamp
        codes = self._codes.get(stamp)
        if codes is None:
            codes = self._codes[stamp] = set()
            self._next = min(self._next, stamp + self._lifetime)
        code = code[:_KEPT_BYTES]
        if code in codes or stamp < self._started:
            return Verdict.USED
        if self._count >= self._max:
            return Verdict.UNKNOWN
        self._count += 1
        codes.add(code)
        return Verdict.NEW

    def _forget(self, now: float) -> None:
        for stamp in [s for s in self._codes if s + self._lifetime < now]:
            self._count -= len(self._codes.pop(stamp))
        self._next = min(self._codes, default=math.inf) + self._lifetime

    def __len__(self) -> int:
        return self._count


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
        for stamp, code in codes:
            known = self._codes.get(stamp, set())
            self._count -= code in known
            known.discard(code)


class FileReplayGuard:
    """In a directory, shared by the worker processes of one machine, surviving a restart.

    There is a file for each second that stamps name, and a line in it for each code. A process
    appends its line and looks what stands before it: the system puts lines that are appended at
    the same time in some order, and of several with the same code the first one counts. So nobody
    waits for anybody.

    What a killed process wrote is there. The files are not synced to disk: what a power failure
    takes may come again, if the machine is back before it is too old.

    Args:
        path: the directory, created when missing. Not on a network file system.
        max_codes: of all files together, 33 bytes each on disk; else as for `ReplayGuard`. Those of
            the last seconds are in memory as well.

    Raises:
        OSError: the directory cannot be made, read or written.
    """

    def __init__(self, path: str, *, max_codes: int = DEFAULT_MAX_CODES) -> None:
        self._path = path
        self._max = max_codes
        self._counted = -math.inf
        self._count = 0
        self._lifetime = 0.0
        self._open: dict[int, _Second] = {}
        """By their stamps, the one that was opened first first."""
        self._lock = threading.Lock()
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    def mark(self, code: bytes, timestamp: float, expires: float, now: float) -> Verdict:
        line = b2a_hex(code[:_KEPT_BYTES])
        stamp = int(timestamp)
        self._lifetime = max(self._lifetime, expires - timestamp)
        try:
            with self._lock:
                if abs(now - self._counted) >= _COUNT_INTERVAL:
                    self._look(now)
                second = self._open.get(stamp) or self._opened(stamp)
                if line in second.lines:
                    return Verdict.USED
                if self._count >= self._max:
                    return Verdict.UNKNOWN
                self._count += 1
                return second.add(line)
        except OSError as e:
            log.warning("cannot remember a signature, so it is not accepted: %s", e)
            return Verdict.UNKNOWN

    def _opened(self, stamp: int) -> _Second:
        while len(self._open) >= _OPEN_SECONDS:
            self._open.pop(next(iter(self._open))).close()
        second = self._open[stamp] = _Second(os.path.join(self._path, str(stamp)))
        return second

    def _look(self, now: float) -> None:
        """Counts what others have remembered, too, and deletes what has expired."""
        size = 0
        with os.scandir(self._path) as entries:
            for entry in entries:
                if not entry.name.isdecimal():
                    continue  # not ours
                stamp = int(entry.name)
                with suppress(FileNotFoundError):  # others look, too
                    if stamp + self._lifetime >= now:
                        size += entry.stat().st_size
                    elif stamp + self._lifetime + _GRACE < now:
                        os.unlink(entry.path)
        self._count = size // _LINE
        self._counted = now

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


class _Second:
    """What is known of one file.

    Attributes:
        lines: those before `_end`, which is behind the end of a line.
    """

    def __init__(self, path: str) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o600)
        # nobody owns a guard that sits in a configuration, so nobody may close it
        self.close = weakref.finalize(self, os.close, self._file)
        self.lines: set[bytes] = set()
        self._end = 0
        data = self._read(os.fstat(self._file).st_size)
        self._end = data.rfind(b"\n") + 1  # the last line may be on its way

    def add(self, line: bytes) -> Verdict:
        """Whether it was the first."""
        if os.write(self._file, line + b"\n") < _LINE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        end = os.lseek(self._file, 0, os.SEEK_CUR)  # of our line, whoever has written since
        if end - _LINE > self._end:
            self._read(end - _LINE)
        self._end = end
        if line in self.lines:
            return Verdict.USED
        self.lines.add(line)
        return Verdict.NEW

    def _read(self, end: int) -> bytes:
        data = os.pread(self._file, end - self._end, self._end)
        if len(data) < end - self._end:
            raise OSError(errno.EIO, "a file of used signatures was cut")
        # what was cut off when a disk was full stands before the next line, or is the last
        self.lines.update(line[1 - _LINE :] for line in data.split(b"\n")[:-1])
        return data
