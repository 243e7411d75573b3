"""What `lonelypss setup` writes: one set of secrets, twice, and a program to run."""

from __future__ import annotations

import os
from pathlib import Path

from lonelypsp import secretsfile
from lonelypsp.errors import LocalProtocolError
from lonelypsp.replay import ReplayGuard
from lonelypss.config import ConfigError, Database
from lonelypss.secrets import SECRETS_FILE

SUBSCRIBER_SECRETS_FILE = "subscriber-secrets.json"
MAIN_FILE = "main.py"

_MAIN = '''\
"""A lonelyps broadcaster. Start it here with: uvicorn main:app --port 3003 --no-access-log"""

from lonelypss.app import create_app
from lonelypss.config import BroadcasterConfig
from lonelypss.secrets import load_auth

DB = {db}
config = BroadcasterConfig(
    db=DB,
    auth=load_auth({secrets}, db=DB),
    # for all other options see `lonelypss check-config`
)
app = create_app(config)
'''


def direction(kind: str, secret: str | None) -> dict[str, str] | None:
    """The entry of one direction in the secrets file, with a new secret if none is given."""
    if secret is None:
        return secretsfile.generate(kind)
    if kind == "none":
        raise ConfigError("authorization 'none' takes no secret")
    return {"type": kind, "secret": secret}


def write(
    directory: Path,
    db: str,
    to_broadcaster: dict[str, str] | None,
    to_subscriber: dict[str, str] | None,
) -> list[Path]:
    """Writes all files or none; never over or through one that is there.

    Raises:
        ConfigError: a secret or `db` cannot be used.
        FileExistsError: names the file that is in the way.
        OSError: the directory cannot be written.
    """
    Database.at(db)
    document = secretsfile.dump(to_broadcaster, to_subscriber)
    try:
        secretsfile.load(document, ReplayGuard())
    except LocalProtocolError as e:
        raise ConfigError(str(e)) from None
    main = _MAIN.format(db=_quoted(db), secrets=_quoted(SECRETS_FILE))
    contents = {SECRETS_FILE: document, SUBSCRIBER_SECRETS_FILE: document, MAIN_FILE: main}
    for name in contents:
        if os.path.lexists(directory / name):
            raise FileExistsError(f"{directory / name} exists")
    written: list[Path] = []
    try:
        for name, text in contents.items():
            _create(directory / name, text, 0o644 if name == MAIN_FILE else 0o600, written)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written


def _create(path: Path, text: str, mode: int, written: list[Path]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    file = os.open(path, flags, mode)
    written.append(path)
    with os.fdopen(file, "w", encoding="utf-8") as out:
        out.write(text)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
