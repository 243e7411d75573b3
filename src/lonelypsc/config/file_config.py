"""Authorization from the file that `lonelypss setup` writes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lonelypsp import secretsfile
from lonelypsp.errors import LocalProtocolError
from lonelypsp.replay import Remembers, ReplayGuard, SqliteReplayGuard
from lonelypsp.signing import Authenticator


def get_auth_config_from_file(
    path: str | os.PathLike[str], *, replay_path: str | os.PathLike[str] | None = None
) -> tuple[Authenticator, Authenticator]:
    """Reads a secrets file.

    Args:
        path: e.g. "subscriber-secrets.json".
        replay_path: a file in which hmac remembers what it accepted. Without one it remembers in
            memory, and refuses whatever was signed before this call, because a program that ran
            before this one may have accepted it: the clocks of both sides should then agree.

    Returns:
        (incoming, outgoing), in the order `AuthConfigFromParts` takes them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a secrets file; the message names it, and never holds a secret.
    """
    replay: Remembers = (
        ReplayGuard(started=time.time())
        if replay_path is None
        else SqliteReplayGuard(os.fspath(replay_path))
    )
    try:
        config = secretsfile.load(Path(path).read_text(encoding="utf-8"), replay)
    except (LocalProtocolError, UnicodeDecodeError) as e:
        reason = e if isinstance(e, LocalProtocolError) else "not UTF-8 text"
        raise ValueError(
            f"{os.fspath(path)}: {reason}; `lonelypss setup` writes such a file"
        ) from None
    return config.to_subscriber, config.to_broadcaster
