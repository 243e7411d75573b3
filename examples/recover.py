"""Keeps a local copy of a state right, also after messages were missed."""

import asyncio

from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.http_client import HttpPubSubClient

config = make_http_pub_sub_config(
    bind={"type": "uvicorn", "host": "127.0.0.1", "port": 3002},
    host="http://127.0.0.1:3002",
    broadcasters=[{"host": "http://127.0.0.1:3003"}],
    auth=AuthConfigFromParts(*get_auth_config_from_file("subscriber-secrets.json")),
)


async def read_current_state() -> None:
    print("Reading the current state from where it is kept")


async def main() -> None:
    async with (
        HttpPubSubClient(config) as client,
        # awaited before the first message, and again whenever messages may have been missed
        client.subscribe_exact(b"foo/bar", on_receiving=read_current_state) as subscription,
    ):
        async for message in await subscription.messages():
            print(f"Applying {message.data.read()!r}")


if __name__ == "__main__":
    asyncio.run(main())
