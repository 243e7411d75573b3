"""The same over one websocket: no address of its own, nothing to bind, many messages."""

import asyncio

from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.config.ws_config import make_websocket_pub_sub_config
from lonelypsc.ws_client import WebsocketPubSubClient

config = make_websocket_pub_sub_config(
    broadcasters=[{"host": "ws://127.0.0.1:3003"}],
    auth=AuthConfigFromParts(*get_auth_config_from_file("subscriber-secrets.json")),
)


async def read_current_state() -> None:
    print("Reading the current state from where it is kept")


async def main() -> None:
    async with (
        WebsocketPubSubClient(config) as client,
        client.subscribe_glob("prices/*", on_receiving=read_current_state) as subscription,
    ):
        # no answer is waited for before the next one is sent
        results = await asyncio.gather(
            *(client.notify(topic=b"prices/%d" % n, data=b"%d.99" % n) for n in range(100))
        )
        print(f"Sent {len(results)} messages, received {sum(r.notified for r in results)}")
        left = 100
        async for message in await subscription.messages():
            left -= 1
            if not left:
                print(f"The last one: {message.topic.decode()} is {message.data.read().decode()}")
                break


if __name__ == "__main__":
    asyncio.run(main())
