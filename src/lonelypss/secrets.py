"""Authorization of a broadcaster: the secrets file, and the memory against replayed values."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from dataclasses import replace
from pathlib import Path

from lonelypsp import secretsfile
from lonelypsp.errors import LocalProtocolError
from lonelypsp.replay import Remembers, ReplayGuard, SharedReplayGuard, SqliteReplayGuard
from lonelypsp.signing import AuthConfig
from lonelypss.config import ConfigError, Database

SECRETS_FILE = "broadcaster-secrets.json"


def load_auth(
    secrets: str | os.PathLike[str],
    replay: str | os.PathLike[str] | None = None,
    *,
    db: str | None = None,
) -> AuthConfig:
    """The authorization that a secrets file describes.

    Args:
        secrets: the file that `lonelypss setup` wrote.
        replay: a file in which accepted values are remembered, shared by all worker processes and
            kept over a restart.
        db: the database of the broadcaster, instead of that: accepted values are remembered in a
            file beside it (SQLite), or in it, where all broadcasters see them (PostgreSQL). With
            neither, or a database in memory, they are in memory, for one process, and what is
            stamped before its start is refused.

    Raises:
        ConfigError: a file cannot be used. The message names it, and never holds a secret.
    """
    text = _read(Path(secrets))
    database = Database.at("sqlite://" if db is None else db)
    try:
        if database.is_remote and replay is None:
            shared = SharedReplayGuard()
            # what broadcasters send to each other is signed for the url of one process
            auth = secretsfile.load(text, shared, ReplayGuard(started=time.time()))
            return replace(auth, shared=shared)
        beside = None if database.path is None else f"{database.path}.replay"
        return secretsfile.load(text, _guard(replay or beside))
    except LocalProtocolError as e:
        raise ConfigError(f"{os.fspath(secrets)}: {e}; `lonelypss setup` writes one") from None


def _guard(replay: str | os.PathLike[str] | None) -> Remembers:
    if replay is None:
        return ReplayGuard(started=time.time())
    try:
        return SqliteReplayGuard(os.fspath(replay))
    except sqlite3.Error as e:
        raise ConfigError(f"{os.fspath(replay)}: cannot remember used signatures: {e}") from None


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if os.name == "posix" and mode & 0o077:
                raise ConfigError(
                    f"{path}: other users may use this file (mode {mode:04o}); chmod 600 {path}"
                )
            return file.read()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: {reason}; `lonelypss setup` writes one") from None
