"""Our broadcaster as `lonelypss serve` runs it, one worker: our_broadcaster.py DIRECTORY SECRETS"""

from __future__ import annotations

import sys
from pathlib import Path

from lonelypss.config import BroadcasterConfig
from lonelypss.server import Settings, bind, serve


def main(directory: Path, secrets: Path) -> int:
    config = BroadcasterConfig(
        db=f"sqlite:///{directory / 'subscriptions.db'}", spool_directory=str(directory)
    )
    sockets = bind("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    settings = Settings(config, str(secrets), grace=1, log_level="warning")
    return serve(settings, sockets, 1, lambda: print("READY", port, flush=True))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
