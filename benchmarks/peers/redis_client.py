"""A publisher or subscriber with redis-py: redis_client.py publisher|subscriber PORT

Commands of a publisher: `load` with mode `publish` (Redis answered) or `confirmed` (a subscriber
answered, on a channel of replies); of a subscriber: `subscribe`, `received`.
"""

from __future__ import annotations

import asyncio
import sys
from itertools import count
from typing import Any

import redis.asyncio  # type: ignore[import-not-found]
import roles

REPLIES = "replies"


class Publisher:
    def __init__(self, client: Any) -> None:
        self._client = client
        self._ids = count(1)
        self._waiting: dict[bytes, asyncio.Future[None]] = {}
        self.handlers: dict[str, roles.Handler] = {"load": self.load}

    async def start(self) -> None:
        replies = self._client.pubsub(ignore_subscribe_messages=True)
        await replies.subscribe(REPLIES)
        self._listening = asyncio.create_task(self._listen(replies))

    async def _listen(self, replies: Any) -> None:
        async for message in replies.listen():
            waiting = self._waiting.pop(message["data"], None)
            if waiting is not None:
                waiting.set_result(None)

    async def load(self, topic: str, mode: str, **bounds: Any) -> dict[str, Any]:
        async def publish() -> int:
            reached: int = await self._client.publish(topic, roles.BODY)
            return reached

        async def confirmed() -> int:
            number = b"%016x" % next(self._ids)
            reply = self._waiting[number] = asyncio.get_running_loop().create_future()
            reached: int = await self._client.publish(topic, number + roles.BODY[16:])
            await reply
            return reached

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
        messages = self._client.pubsub()
        await messages.subscribe(topic)
        subscribed = asyncio.Event()
        self._listening = asyncio.create_task(self._listen(messages, subscribed))
        await subscribed.wait()
        return {}

    async def _listen(self, messages: Any, subscribed: asyncio.Event) -> None:
        async for message in messages.listen():
            if message["type"] == "subscribe":
                subscribed.set()
                continue
            if not (body := message["data"]).startswith(b"x"):
                await self._client.publish(REPLIES, body[:16])
            self._received.add()


async def main(role: str, port: str) -> None:
    async with redis.asyncio.Redis(host="127.0.0.1", port=int(port), max_connections=500) as client:
        if role == "publisher":
            peer: Publisher | Subscriber = Publisher(client)
            await peer.start()  # type: ignore[union-attr]
        else:
            peer = Subscriber(client)
        await roles.serve(int(port), peer.handlers)


if __name__ == "__main__":
    roles.run(main(*sys.argv[1:]))
