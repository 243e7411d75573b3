"""Authorization of a broadcaster: the secrets file, and the memory against replayed values."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from pathlib import Path

from lonelypsp import secretsfile
from lonelypsp.errors import LocalProtocolError
from lonelypsp.replay import Remembers, ReplayGuard, SqliteReplayGuard
from lonelypsp.signing import AuthConfig
from lonelypss.config import ConfigError, Database

SECRETS_FILE = "broadcaster-secrets.json"


def replay_path(db: str) -> str | None:
    """The file that remembers accepted values, beside the database or, with PostgreSQL, in the
    current directory; None: in memory."""
    database = Database.at(db)
    return f"{database.path or 'lonelypss'}.replay" if database.is_shared else None


def load_auth(
    secrets: str | os.PathLike[str], replay: str | os.PathLike[str] | None = None
) -> AuthConfig:
    """The authorization that a secrets file describes.

    Args:
        secrets: the file that `lonelypss setup` wrote.
        replay: a file in which accepted values are remembered, shared by all worker processes and
            kept over a restart. None: in memory, for one process; what is stamped before its
            start is refused.

    Raises:
        ConfigError: a file cannot be used. The message names it, and never holds a secret.
    """
    text = _read(Path(secrets))
    try:
        return secretsfile.load(text, _guard(replay))
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
