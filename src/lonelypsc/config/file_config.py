"""Authorization from the file that `lonelypss setup` writes."""

from __future__ import annotations

import logging
import os
import time

from lonelypsp import secretsfile
from lonelypsp.authfile import AuthFile, exposure, read_private
from lonelypsp.errors import LocalProtocolError
from lonelypsp.replay import FileReplayGuard, Remembers, ReplayGuard
from lonelypsp.signing import AuthConfig, Authenticator

log = logging.getLogger(__name__)


def get_auth_config_from_file(
    path: str | os.PathLike[str], *, replay_path: str | os.PathLike[str] | None = None
) -> tuple[Authenticator, Authenticator]:
    """Reads a secrets file, and reads it again when it changes, so that keys rotate.

    Args:
        path: e.g. "subscriber-secrets.json".
        replay_path: a directory in which hmac remembers what it accepted. Without one it remembers
            in memory, and refuses whatever was signed before this call, because a program that
            ran before this one may have accepted it: the clocks of both sides should then agree.

    Returns:
        (incoming, outgoing), in the order `AuthConfigFromParts` takes them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a secrets file; the message names it, and never holds a secret.
    """
    replay: Remembers = (
        ReplayGuard(started=time.time())
        if replay_path is None
        else FileReplayGuard(os.fspath(replay_path))
    )

    def load() -> AuthConfig:
        try:
            return secretsfile.load(read_private(path, allow_readable=True), replay)
        except (LocalProtocolError, UnicodeDecodeError) as e:
            reason = e if isinstance(e, LocalProtocolError) else "not UTF-8 text"
            raise ValueError(
                f"{os.fspath(path)}: {reason}; `lonelypss setup` writes such a file"
            ) from None

    config = AuthFile(path, load).config()
    if reason := exposure(os.stat(path)):
        log.warning("%s: %s; chmod 600 it", os.fspath(path), reason)
    return config.to_subscriber, config.to_broadcaster
