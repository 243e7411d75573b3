"""A publisher or subscriber with the public Python API that our client and the older one share.

    lonelyps_client.py publisher|subscriber ours|reference BROADCASTER PORT [SECRETS FILE]

BROADCASTER is http://... or ws://..., which decides over the transport.

Commands of a publisher: `load`, `send_file`; of a subscriber: `subscribe`, `received`, `hold`,
`digest`, `subscriptions`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import roles

from lonelypsc.config.http_config import make_http_pub_sub_config
from lonelypsc.http_client import HttpPubSubClient

PIECE = 256 * 1024


def our_auth(secrets: Path | None) -> Any:
    from lonelypsc.config.auth_config import AuthConfigFromParts
    from lonelypsc.config.file_config import get_auth_config_from_file
    from lonelypsp.signing import Nothing

    incoming, outgoing = get_auth_config_from_file(secrets) if secrets else (Nothing(), Nothing())
    return AuthConfigFromParts(incoming, outgoing)


def reference_auth(secrets: Path | None) -> Any:
    from lonelypsc.config.file_config import get_auth_config_from_file
    from lonelypsp.auth.config import AuthConfigFromParts
    from lonelypsp.auth.helpers.none_auth_config import (  # type: ignore[import-not-found]
        ToBroadcasterNoneAuth,
        ToSubscriberNoneAuth,
    )

    incoming, outgoing = (
        get_auth_config_from_file(str(secrets))
        if secrets
        else (ToSubscriberNoneAuth(), ToBroadcasterNoneAuth())
    )
    return AuthConfigFromParts(to_broadcaster=outgoing, to_subscriber=incoming)


def reference(common: dict[str, Any], secrets: Path | None, tracing: Any) -> Any:
    return make_http_pub_sub_config(
        **common,
        outgoing_retries_per_broadcaster=2,
        message_body_spool_size=10 * 1024 * 1024,
        outgoing_http_timeout_total=30,
        outgoing_http_timeout_connect=None,
        outgoing_http_timeout_sock_read=None,
        outgoing_http_timeout_sock_connect=5,
        outgoing_retry_ambiguous=True,
        auth=reference_auth(secrets),
        tracing=tracing,
    )


def reference_websocket(broadcasters: list[Any], secrets: Path | None) -> Any:
    from lonelypsc.config.ws_config import make_websocket_pub_sub_config

    return make_websocket_pub_sub_config(
        broadcasters=broadcasters,
        outgoing_initial_connect_retries=2,
        outgoing_min_reconnect_interval=1,
        max_websocket_message_size=3_670_016,
        websocket_open_timeout=5,
        websocket_close_timeout=5,
        websocket_heartbeat_interval=10,
        websocket_minimal_headers=True,
        max_sent_notifications=None,
        max_unsent_notifications=None,
        max_expected_acks=None,
        max_received=None,
        max_unsent_acks=None,
        allow_compression=True,
        compression_dictionary_by_id={},
        initial_compression_dict_id=None,
        allow_training_compression=True,
        decompression_max_window_size=0,
        auth=reference_auth(secrets),
    )


async def no_listener(router: Any) -> None:
    """For a client that only notifies."""


@contextlib.asynccontextmanager
async def entered(
    role: str, implementation: str, broadcaster: str, port: int, secrets: Path | None
) -> AsyncIterator[Any]:
    bind: dict[str, Any] = {"type": "uvicorn", "host": "127.0.0.1", "port": port}
    if role == "publisher":  # the older one always has a router
        ours = implementation == "ours"
        bind = {"type": "none"} if ours else {"type": "manual", "callback": no_listener}
    common = {
        "bind": bind,
        "host": f"http://127.0.0.1:{port}",
        "broadcasters": [{"host": broadcaster}],
    }
    if broadcaster.startswith("ws"):
        from lonelypsc.config.ws_config import make_websocket_pub_sub_config
        from lonelypsc.ws_client import WebsocketPubSubClient

        broadcasters = [{"host": broadcaster}]
        if implementation == "ours":
            config = make_websocket_pub_sub_config(
                broadcasters=broadcasters, auth=our_auth(secrets)
            )
        else:
            config = reference_websocket(broadcasters, secrets)
        async with WebsocketPubSubClient(config) as client:
            yield client
        return
    if implementation == "ours":
        config = make_http_pub_sub_config(**common, auth=our_auth(secrets))
        async with HttpPubSubClient(config) as client:
            yield client
        return
    from lonelypsp.tracing.impl.simple.config import SimpleTracingConfig
    from lonelypsp.tracing.impl.simple.db import SimpleTracingDBSidecar
    from lonelypsp.tracing.impl.simple.root import SimpleTracingSubscriberRoot

    tracing = SimpleTracingConfig()
    async with SimpleTracingDBSidecar(tracing, ":memory:") as sidecar:
        root = SimpleTracingSubscriberRoot(db=sidecar, config=tracing)
        async with HttpPubSubClient(reference(common, secrets, root.stateless)) as client:
            if role == "subscriber":
                await until_listening(port)
            yield client


async def until_listening(port: int) -> None:
    """The older client starts its server without waiting for it."""
    async with asyncio.timeout(30):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.01)
            else:
                writer.close()
                return


class Publisher:
    def __init__(self, client: Any) -> None:
        self._client = client
        self.handlers: dict[str, roles.Handler] = {"load": self.load, "send_file": self.send_file}

    async def load(self, topic: str, mode: str, **bounds: Any) -> dict[str, Any]:
        name = topic.encode()

        async def send() -> int:
            result = await self._client.notify(topic=name, data=roles.BODY, trace_initializer=None)
            notified: int = result.notified
            return notified

        return await roles.load(send, **bounds)

    async def send_file(self, topic: str, path: str) -> dict[str, Any]:
        with open(path, "rb") as file:
            started = time.monotonic()
            result = await self._client.notify(
                topic=topic.encode(), sync_file=file, trace_initializer=None
            )
            ended = time.monotonic()
        return {"notified": result.notified, "started": started, "ended": ended}


class Subscriber:
    def __init__(self, client: Any) -> None:
        self._client = client
        self._received = roles.Received()
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = contextlib.AsyncExitStack()
        self._held: Any = None
        self.handlers: dict[str, roles.Handler] = {
            "subscribe": self.subscribe,
            "received": self._received.wait,
            "hold": self.hold,
            "digest": self.digest,
            "subscriptions": self.subscriptions,
        }

    async def subscribe(self, topic: str) -> dict[str, Any]:
        subscribed = asyncio.Event()
        self._tasks.append(asyncio.create_task(self._iterate(topic.encode(), subscribed)))
        await subscribed.wait()
        return {}

    async def _iterate(self, topic: bytes, subscribed: asyncio.Event) -> None:
        async def receiving() -> None:
            subscribed.set()  # on websockets the older client enters before it is confirmed

        async with self._client.subscribe_exact(topic, on_receiving=receiving) as subscription:
            messages = await subscription.messages()
            async for message in messages:
                message.data.read()
                self._received.add()

    async def subscriptions(
        self, topic: str, in_flight: int, count: int, seconds: float
    ) -> dict[str, Any]:
        """Subscribes to topics that begin with `topic`, half of `count` or for half of `seconds`,
        then unsubscribes from all of them: one request each, signed, its answer verified."""
        subscribe, unsubscribe = requests(self._client)
        numbers, done = itertools.count(), list[bytes]()

        async def add() -> int:
            name = f"{topic}/{next(numbers)}".encode()
            await subscribe(name)
            done.append(name)
            return 1

        async def remove() -> int:
            await unsubscribe(done.pop())
            return 1

        load = roles.Load(in_flight)
        await load.run(add, count // 2, seconds / 2)
        await load.run(remove, len(done))
        return load.result()

    async def hold(self, topic: str) -> dict[str, Any]:
        """Says that it has subscribed, then waits for one message and keeps it for `digest`."""
        subscription = self._client.subscribe_exact(topic.encode())
        await self._stack.enter_async_context(subscription)
        messages = await subscription.messages()
        print('{"subscribed": true}', flush=True)
        self._held = await anext(messages)
        return {"arrived": time.monotonic()}

    async def digest(self) -> dict[str, Any]:
        """Hashes what is held piece by piece, as a program would that has to read a message larger
        than its memory."""
        async with self._stack:
            digest = await asyncio.to_thread(hash_pieces, self._held.data)
            return {"sha512": digest, "announced": self._held.sha512.hex()}


OneTopic = Callable[[bytes], Awaitable[None]]


def requests(client: Any) -> tuple[OneTopic, OneTopic]:
    """How a client sends one request to subscribe, or unsubscribe. Both clients keep a set of what
    they want above that, and ours a lock: it would send the requests of 32 tasks one by one."""
    if connector := getattr(client, "connector", None):
        return (
            lambda topic: connector.subscribe_exact(topic=topic),
            lambda topic: connector.unsubscribe_exact(topic=topic),
        )
    from lonelypsp.interests import Topics

    transport = client._transport
    return (
        lambda topic: transport._subscribe(Topics.of((topic,))),
        lambda topic: transport._unsubscribe(Topics.of((topic,))),
    )


def hash_pieces(file: Any) -> str:
    digest = hashlib.sha512()
    while piece := file.read(PIECE):
        digest.update(piece)
    return digest.hexdigest()


async def main(
    role: str, implementation: str, broadcaster: str, port: str, secrets: str | None = None
) -> None:
    path = Path(secrets) if secrets else None
    async with entered(role, implementation, broadcaster, int(port), path) as client:
        peer = Publisher(client) if role == "publisher" else Subscriber(client)
        await roles.serve(int(port), peer.handlers)


if __name__ == "__main__":
    roles.run(main(*sys.argv[1:]))
