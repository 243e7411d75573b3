"""https in both directions, with certificates on both sides."""

import asyncio

from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.http_client import HttpPubSubClient
from lonelypsp.signing import Nothing

config = make_http_pub_sub_config(
    bind={
        "type": "uvicorn",
        "host": "0.0.0.0",
        "port": 3002,
        "tls_cert": "subscriber.crt",
        "tls_key": "subscriber.key",
        "tls_client_ca": "ca.pem",  # only who has a certificate of ours may connect
    },
    host="https://127.0.0.1:3002",
    broadcasters=[{"host": "https://127.0.0.1:3003"}],
    tls_ca_file="ca.pem",  # instead of what the system trusts
    tls_client_cert="subscriber.crt",
    tls_client_key="subscriber.key",
    auth=AuthConfigFromParts(incoming=Nothing(), outgoing=Nothing()),
)


async def main() -> None:
    async with HttpPubSubClient(config) as client:
        async with client.subscribe_exact(b"orders/42") as messages:
            await client.notify(topic=b"orders/42", data=b"paid")
            async for message in await messages.messages():
                print(f"{message.topic.decode()}: {message.data.read().decode()}")
                break


if __name__ == "__main__":
    asyncio.run(main())
