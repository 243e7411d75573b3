"""Authorization from a file that is read again when it changes, so that keys rotate without a
restart."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable

from lonelypsp.errors import AuthResult
from lonelypsp.signing import AuthConfig, Authenticator, Direction, Fields, Hmac, Nothing, Token

log = logging.getLogger(__name__)

_LOOK_INTERVAL = 1.0  # seconds


class NotPrivate(Exception):
    """Others may read or change a file with secrets; the message says why."""


def read_private(path: str | os.PathLike[str], *, allow_readable: bool = False) -> str:
    """The text of a file with secrets.

    Args:
        allow_readable: whether it may be a link, and others may read it.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is no UTF-8 text.
        NotPrivate: it is not private.
    """
    no_links = 0 if allow_readable else getattr(os, "O_NOFOLLOW", 0)
    try:
        # a pipe would keep us waiting for somebody to write
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | no_links)
    except OSError as e:
        if e.errno == errno.ELOOP and no_links:
            raise NotPrivate("it is a link, which may lead to anybody's file") from None
        raise
    try:
        text = os.fdopen(file, encoding="utf-8")
    except OSError:  # a directory
        os.close(file)
        raise
    with text:
        reason = exposure(os.fstat(text.fileno()))
        if reason and not allow_readable:
            raise NotPrivate(reason)
        return text.read()


def exposure(found: os.stat_result) -> str | None:
    """How a file is exposed to others, if it is."""
    mode = stat.S_IMODE(found.st_mode)
    if os.name == "posix" and mode & 0o077:
        return f"other users may use this file (mode {mode:04o})"
    return None


class AuthFile:
    """What stands in a file now, or stood when it could last be used.

    Args:
        path: looked at once a second at most, when something is signed or checked.
        load: reads it. May raise anything: at first that is passed on, later logged.
    """

    def __init__(self, path: str | os.PathLike[str], load: Callable[[], AuthConfig]) -> None:
        self._path = os.fspath(path)
        self._load = load
        self._looked = 0.0
        self._state = self._seen()
        self.auth = load()

    def config(self) -> AuthConfig:
        """Authenticators that follow the file."""
        up, down = type(self.auth.to_broadcaster), type(self.auth.to_subscriber)
        return AuthConfig(
            _KINDS.get(up, _Following)(self, Direction.TO_BROADCASTER),
            _KINDS.get(down, _Following)(self, Direction.TO_SUBSCRIBER),
        )

    def look(self, now: float) -> None:
        """Reads the file if it has changed.

        Args:
            now: seconds, by a clock of any kind.
        """
        if abs(now - self._looked) < _LOOK_INTERVAL:
            return
        self._looked = now
        state = self._seen()
        if state == self._state:
            return
        self._state = state
        try:
            self.auth = self._load()
        except Exception as e:  # noqa: BLE001 whatever it is, the keys before are better than none
            log.error("the keys before stay in force, the file cannot be used: %s", e)
            return
        log.info(
            "%s has changed: now to-broadcaster %r, to-subscriber %r",
            *(self._path, self.auth.to_broadcaster, self.auth.to_subscriber),
        )

    def _seen(self) -> tuple[int, ...]:
        try:
            found = os.stat(self._path)
        except OSError:
            return ()
        return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def current(authenticator: Authenticator) -> Authenticator:
    """What is in force behind an authenticator that follows a file; else itself."""
    return authenticator.current if isinstance(authenticator, _Following) else authenticator


class _Following:
    """An authenticator of `AuthFile`."""

    def __init__(self, file: AuthFile, direction: Direction) -> None:
        self._file = file
        self._up = direction is Direction.TO_BROADCASTER

    @property
    def current(self) -> Authenticator:
        auth = self._file.auth
        return auth.to_broadcaster if self._up else auth.to_subscriber

    def authorize(self, operation: str, fields: Fields, now: float) -> str | None:
        self._file.look(now)
        return self.current.authorize(operation, fields, now)

    def check(
        self, operation: str, fields: Fields, authorization: str | None, now: float
    ) -> AuthResult:
        self._file.look(now)
        return self.current.check(operation, fields, authorization, now)

    def __repr__(self) -> str:
        return repr(self.current)


# so that whoever asks what stands in the file is told


class _FollowingHmac(_Following, Hmac):
    pass


class _FollowingToken(_Following, Token):
    pass


class _FollowingNothing(_Following, Nothing):
    pass


_KINDS: dict[type[object], type[_Following]] = {
    Hmac: _FollowingHmac,
    Token: _FollowingToken,
    Nothing: _FollowingNothing,
}
