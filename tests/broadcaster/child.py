"""A broadcaster in a process of its own: options as JSON in, its port as a line out."""

from __future__ import annotations

import asyncio
import json
import sys

from .harness import broadcaster, hmac_auth


async def main() -> None:
    async with broadcaster(hmac_auth, **json.loads(sys.argv[1])) as running:
        print(running.port, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
