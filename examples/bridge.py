"""Passes messages on from one broadcaster to another: python bridge.py FROM TO GLOB."""

import asyncio
import sys

from lonelypsc.client import PubSubClient, PubSubRequestRefusedError
from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.config.ws_config import make_websocket_pub_sub_config
from lonelypsc.http_client import HttpPubSubClient
from lonelypsc.ws_client import WebsocketPubSubClient


def auth() -> AuthConfigFromParts:
    return AuthConfigFromParts(*get_auth_config_from_file("subscriber-secrets.json"))


def source(url: str) -> PubSubClient:
    url = url.replace("http", "ws", 1)
    return WebsocketPubSubClient(
        make_websocket_pub_sub_config(broadcasters=[{"host": url}], auth=auth())
    )


def target(url: str) -> PubSubClient:
    config = make_http_pub_sub_config(
        bind={"type": "none"},
        host="http://bridge.invalid",  # nobody connects here, as this one only sends
        broadcasters=[{"host": url}],
        auth=auth(),
    )
    return HttpPubSubClient(config)


async def main(here: str, there: str, glob: str) -> None:
    async with (
        source(here) as near,
        target(there) as far,
        near.subscribe_glob(glob) as subscription,
    ):
        print(f"Passing on {glob} from {here} to {there}")
        async for message in await subscription.messages():
            try:
                # `forwarding` counts the hops, so that two bridges back to back end in an error
                await far.notify(topic=message.topic, data=message.data.read(), forwarding=message)
            except PubSubRequestRefusedError as e:
                print(f"Not passed on: {e}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
