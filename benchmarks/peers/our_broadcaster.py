"""Our broadcaster, with one worker: our_broadcaster.py DIRECTORY SECRETS"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import asgi

from lonelypsp import secretsfile
from lonelypsp.replay import ReplayGuard
from lonelypss.app import create_app
from lonelypss.config import BroadcasterConfig


def main(directory: Path, secrets: Path) -> None:
    config = BroadcasterConfig(
        db=f"sqlite:///{directory / 'subscriptions.db'}",
        spool_directory=str(directory),
        auth=secretsfile.load(secrets.read_text(), ReplayGuard(started=time.time())),
    )
    listener, _ = asgi.listen()
    asgi.serve(create_app(config), listener)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
