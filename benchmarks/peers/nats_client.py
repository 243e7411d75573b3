"""A publisher or subscriber with nats-py: nats_client.py publisher|subscriber PORT

Commands of a publisher: `load` with mode `publish` (publish and flush: the server answered) or
`confirmed` (a request: a subscriber answered); of a subscriber: `subscribe`, `received`.
"""

from __future__ import annotations

import sys
from typing import Any

import nats  # type: ignore[import-not-found]
import roles

REPLY_SECONDS = 30.0


class Publisher:
    def __init__(self, client: Any) -> None:
        self._client = client
        self.handlers: dict[str, roles.Handler] = {"load": self.load}

    async def load(self, topic: str, mode: str, **bounds: Any) -> dict[str, Any]:
        async def publish() -> int:
            await self._client.publish(topic, roles.BODY)
            await self._client.flush()
            return 1

        async def confirmed() -> int:
            reply = await self._client.request(topic, roles.BODY, timeout=REPLY_SECONDS)
            return int(reply.data or b"1")

        return await roles.load(confirmed if mode == "confirmed" else publish, **bounds)


class Subscriber:
    def __init__(self, client: Any) -> None:
        self._client = client
        self._received = roles.Received()
        self.handlers: dict[str, roles.Handler] = {
            "subscribe": self.subscribe,
            "received": self._received.wait,
        }

    async def subscribe(self, topic: str) -> dict[str, Any]:
        await self._client.subscribe(topic, cb=self._on_message)
        await self._client.flush()
        return {}

    async def _on_message(self, message: Any) -> None:
        if message.reply:
            await message.respond(b"")
        self._received.add()


async def main(role: str, port: str) -> None:
    client = await nats.connect(f"nats://127.0.0.1:{port}")
    peer = Publisher(client) if role == "publisher" else Subscriber(client)
    try:
        await roles.serve(int(port), peer.handlers)
    finally:
        await client.close()


if __name__ == "__main__":
    roles.run(main(*sys.argv[1:]))
