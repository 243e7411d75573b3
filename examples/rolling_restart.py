"""Sends and receives without a pause, and counts. Restart the broadcasters meanwhile."""

import asyncio
import signal
from collections.abc import AsyncIterable

from lonelypsc.client import PubSubError
from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.http_client import HttpPubSubClient

config = make_http_pub_sub_config(
    bind={"type": "uvicorn", "host": "127.0.0.1", "port": 3002},
    host="http://127.0.0.1:3002",
    # either of them will do for each request
    broadcasters=[{"host": "http://127.0.0.1:3003"}, {"host": "http://127.0.0.1:3004"}],
    auth=AuthConfigFromParts(*get_auth_config_from_file("subscriber-secrets.json")),
)
received = 0


async def count(messages: AsyncIterable[object]) -> None:
    global received
    async for _ in messages:
        received += 1


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    sent = failed = 0
    async with (
        HttpPubSubClient(config) as client,
        client.subscribe_exact(b"foo/bar") as subscription,
    ):
        counting = asyncio.create_task(count(await subscription.messages()))
        print("Sending, until Ctrl-C")
        while not stop.is_set():
            try:
                await client.notify(topic=b"foo/bar", data=b"%d" % sent)
                sent += 1
            except PubSubError as e:
                failed += 1
                print(e)
        await asyncio.wait([counting], timeout=1)
        counting.cancel()
    print(f"Sent {sent}, failed {failed}, received {received}")


if __name__ == "__main__":
    asyncio.run(main())
