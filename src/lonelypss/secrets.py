"""Authorization of a broadcaster: the secrets file, and the memory against replayed values."""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lonelypsp import secretsfile
from lonelypsp.authfile import AuthFile, NotPrivate, current, read_private
from lonelypsp.errors import LocalProtocolError
from lonelypsp.replay import FileReplayGuard, Remembers, ReplayGuard, SharedReplayGuard
from lonelypsp.signing import AuthConfig, Nothing, Token
from lonelypss.config import ConfigError, Database

SECRETS_FILE = "broadcaster-secrets.json"


def load_auth(
    secrets: str | os.PathLike[str],
    replay: str | os.PathLike[str] | None = None,
    *,
    db: str | None = None,
    allow_readable: bool = False,
) -> AuthConfig:
    """The authorization that a secrets file describes, now and whenever it changes.

    Args:
        secrets: the file that `lonelypss setup` wrote.
        replay: a directory in which accepted values are remembered, shared by all worker processes
            and kept over a restart.
        db: the database of the broadcaster, instead of that: accepted values are remembered in a
            directory beside it (SQLite), or in it, where all broadcasters see them (PostgreSQL).
            With neither, or a database in memory, they are in memory, for one process, and what
            is stamped before its start is refused.
        allow_readable: whether the file may be a link, and other users may read it.

    Raises:
        ConfigError: a file cannot be used. The message names it, and never holds a secret.
    """
    database = Database.at("sqlite://" if db is None else db)
    if database.is_remote and replay is None:
        shared = SharedReplayGuard()
        # what broadcasters send to each other is signed for the url of one process
        guards: tuple[Remembers, Remembers] = (shared, ReplayGuard(started=time.time()))
        return replace(_follow(secrets, guards, allow_readable), shared=shared)
    beside = None if database.path is None else f"{database.path}.replay"
    guard = _guard(replay or beside)
    return _follow(secrets, (guard, guard), allow_readable)


def _follow(
    secrets: str | os.PathLike[str], guards: tuple[Remembers, Remembers], allow_readable: bool
) -> AuthConfig:
    path = Path(secrets)
    return AuthFile(path, lambda: _parsed(path, read(path, allow_readable), guards)).config()


def _parsed(path: Path, text: str, guards: tuple[Remembers, Remembers]) -> AuthConfig:
    try:
        return secretsfile.load(text, *guards)
    except LocalProtocolError as e:
        raise ConfigError(f"{path}: {e}; `lonelypss setup` writes one") from None


def _guard(replay: str | os.PathLike[str] | None) -> Remembers:
    if replay is None:
        return ReplayGuard(started=time.time())
    try:
        return FileReplayGuard(os.fspath(replay))
    except OSError as e:
        why = f"cannot remember used signatures there: {e.strerror}"
        if isinstance(e, NotADirectoryError):
            why += "; it is a directory now, a file of before can be deleted"
        raise ConfigError(f"{os.fspath(replay)}: {why}") from None


_LEAST_TOKEN = 32


def check_exposure(
    auth: AuthConfig, addresses: Iterable[str], *, encrypted: bool, only_known: bool = False
) -> None:
    """Refuses to let strangers send, or see how.

    Args:
        addresses: on which requests are taken.
        encrypted: whether inside TLS.
        only_known: whether only with a certificate of the client's.

    Raises:
        ConfigError: says what to do.
    """
    exposed = [a for a in addresses if not ipaddress.ip_address(a.split("%")[0]).is_loopback]
    if not exposed or only_known:
        return
    wrong = None
    match current(auth.to_broadcaster):
        case Nothing():
            wrong = "anybody could send and subscribe: name secrets with --secrets"
        case Token() if not encrypted:
            wrong = "tokens could be read on the way: use hmac, or TLS"
        case Token(shortest=length) if length < _LEAST_TOKEN:
            wrong = f"a token of {length} characters could be guessed: use {_LEAST_TOKEN} or more"
    if wrong:
        raise ConfigError(
            f"on {exposed[0]}, {wrong}. Or listen on 127.0.0.1, or say --insecure, where the"
            " network is trusted or a proxy encrypts"
        )


def read(path: Path, allow_readable: bool = False) -> str:
    """The text of a secrets file.

    Raises:
        ConfigError: it cannot be read, or is not private.
    """
    try:
        return read_private(path, allow_readable=allow_readable)
    except NotPrivate as e:
        raise ConfigError(
            f"{path}: {e}; make it a file with `chmod 600 {path}`, or say --allow-readable-secrets"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: {reason}; `lonelypss setup` writes one") from None


def write_all(texts: Mapping[Path, str]) -> None:
    """Writes secrets files, private, each at once as a whole, over what is there; not through
    links. Whoever writes at the same time is refused.

    Raises:
        FileExistsError: somebody else is writing; names the file that says so.
        OSError: a directory cannot be written.
    """
    with ExitStack() as undo:
        ready = {}
        for path, text in texts.items():
            new = path.with_name(f".{path.name}.new")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
            file = os.open(new, flags, 0o600)
            undo.callback(new.unlink, missing_ok=True)
            ready[new] = path
            with os.fdopen(file, "w", encoding="utf-8") as out:
                if os.path.exists(path):
                    before = os.stat(path)  # root may write what belongs to a service
                    os.fchown(file, before.st_uid, before.st_gid)
                out.write(text)
                out.flush()
                os.fsync(file)
        for new, path in ready.items():
            os.replace(new, path)
