"""Authorization from the file that `lonelypss setup` writes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lonelypsp import secretsfile
from lonelypsp.errors import LocalProtocolError
from lonelypsp.replay import ReplayGuard
from lonelypsp.signing import Authenticator

# A broadcaster's clock may be this many seconds behind ours at our start. What it signed earlier
# may have been accepted by the program that ran before this one, and is refused.
_START_SLACK = 2.0


def get_auth_config_from_file(path: str | os.PathLike[str]) -> tuple[Authenticator, Authenticator]:
    """Reads a secrets file.

    Args:
        path: e.g. "subscriber-secrets.json".

    Returns:
        (incoming, outgoing), in the order `AuthConfigFromParts` takes them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a secrets file; the message names it, and never holds a secret.
    """
    replay = ReplayGuard(started=time.time() - _START_SLACK)
    try:
        config = secretsfile.load(Path(path).read_text(encoding="utf-8"), replay)
    except (LocalProtocolError, UnicodeDecodeError) as e:
        reason = e if isinstance(e, LocalProtocolError) else "not UTF-8 text"
        raise ValueError(
            f"{os.fspath(path)}: {reason}; `lonelypss setup` writes such a file"
        ) from None
    return config.to_subscriber, config.to_broadcaster
