"""Sends a large file with progress, and writes what arrives to disk piece by piece."""

import asyncio
import shutil

from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.http_client import HttpPubSubClient

config = make_http_pub_sub_config(
    bind={"type": "uvicorn", "host": "127.0.0.1", "port": 3002},
    host="http://127.0.0.1:3002",
    broadcasters=[{"host": "http://127.0.0.1:3003"}],
    auth=AuthConfigFromParts(*get_auth_config_from_file("subscriber-secrets.json")),
    # above this, a message that arrives is kept on disk
    message_body_spool_size=1024 * 1024,
)


def show(sent: int, total: int) -> None:
    print(f"\r{sent / total:4.0%}", end="", flush=True)


async def main() -> None:
    with open("large.bin", "wb") as made:
        made.truncate(32 * 1024 * 1024)

    async with (
        HttpPubSubClient(config) as client,
        client.subscribe_exact(b"files/large") as subscription,
    ):
        with open("large.bin", "rb") as source:
            result = await client.notify(topic=b"files/large", sync_file=source, progress=show)
        print(f"\nNotified {result.notified} subscribers to files/large")

        async for message in await subscription.messages():
            with open("received.bin", "wb") as target:
                await asyncio.to_thread(shutil.copyfileobj, message.data, target)
                print(f"Received {target.tell():,} bytes")
            break


if __name__ == "__main__":
    asyncio.run(main())
