"""A program that only sends: it binds nothing."""

import asyncio

from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.http_client import HttpPubSubClient

config = make_http_pub_sub_config(
    bind={"type": "none"},
    # nobody connects here, as this program never subscribes
    host="http://127.0.0.1:3002",
    broadcasters=[{"host": "http://127.0.0.1:3003"}],
    auth=AuthConfigFromParts(*get_auth_config_from_file("subscriber-secrets.json")),
)


async def main() -> None:
    async with HttpPubSubClient(config) as client:
        result = await client.notify(topic=b"foo/bar", data=b"Hello, world!")
        print(f"Notified {result.notified} subscribers to foo/bar")


if __name__ == "__main__":
    asyncio.run(main())
