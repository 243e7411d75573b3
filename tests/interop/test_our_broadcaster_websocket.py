"""Older clients on websockets, with our broadcaster between."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from lonelypss.config import BroadcasterConfig
from servers import our_broadcaster

from .peers import ReferenceClient, Scheme, make_payload, reference_client, write_secrets
from .test_our_client_websocket import websocket_client

pytestmark = pytest.mark.interop

TOPIC = b"interop/\x00\xff"
LARGE = 40_000_000


def websocket_url(url: str) -> str:
    return "ws" + url.removeprefix("http")


def their_client(directory: Path, url: str, transport: str = "websocket", **options: Any) -> Any:
    address = websocket_url(url) if transport == "websocket" else url
    return reference_client(directory, address, transport=transport, **options)  # type: ignore[arg-type]


async def subscribe(client: ReferenceClient, *exact: bytes, globs: Iterable[str] = ()) -> None:
    """Returns when it is confirmed; the older client itself does so when it is queued."""
    number = await client.subscribe(exact=exact, globs=globs)
    await client.next_event("on_receiving", subscription=number)


def losses(client: ReferenceClient) -> int:
    return sum(event.get("status") == "lost" for event in client.events)


@pytest.mark.parametrize("compression", [True, False])
@pytest.mark.parametrize("scheme", ["none", "token", "hmac"])
async def test_exact_and_glob(tmp_path: Path, scheme: Scheme, compression: bool) -> None:
    secrets = write_secrets(tmp_path, scheme)
    options = [] if compression else ["--no-compression"]
    async with (
        our_broadcaster(secrets=secrets) as ours,
        their_client(tmp_path, ours.url, secrets=secrets, options=options) as client,
    ):
        await subscribe(client, TOPIC, globs=["foo/*"])
        for topic, data in [(TOPIC, b"hello"), (TOPIC, b""), (b"foo/bar", b"x" * 100_000)]:
            assert await client.notify(topic, data) == 1
            assert (await client.next_message()).is_exactly(topic, data)
        assert await client.notify(b"nobody", b"hello") == 0
        assert await client.exit() == []


@pytest.mark.parametrize("compression", [True, False])
@pytest.mark.parametrize("scheme", ["none", "hmac"])
async def test_large_messages_in_parts(tmp_path: Path, scheme: Scheme, compression: bool) -> None:
    """The older client counts only the first part; a small message shows that we know it."""
    secrets = write_secrets(tmp_path, scheme)
    options = [] if compression else ["--no-compression"]
    async with (
        our_broadcaster(secrets=secrets) as ours,
        their_client(tmp_path, ours.url, secrets=secrets, options=options) as subscriber,
        their_client(tmp_path, ours.url, secrets=secrets, options=options) as notifier,
    ):
        await subscribe(subscriber, TOPIC)
        before = losses(subscriber)
        for seed in (1, 2):
            assert await notifier.notify_generated(TOPIC, LARGE, seed=seed) == 1
            message = await subscriber.next_message()
            assert message.is_exactly(TOPIC, make_payload(LARGE, seed=seed))
            assert await notifier.notify(TOPIC, b"small") == 1
            assert (await subscriber.next_message()).is_exactly(TOPIC, b"small")
        assert losses(subscriber) == before


@pytest.mark.parametrize("scheme", ["none", "hmac"])
@pytest.mark.parametrize(
    ("sender", "receiver"), [("http", "websocket"), ("websocket", "http"), ("websocket",) * 2]
)
async def test_from_one_transport_to_the_other(
    tmp_path: Path, scheme: Scheme, sender: str, receiver: str
) -> None:
    secrets = write_secrets(tmp_path, scheme)
    async with (
        our_broadcaster(secrets=secrets) as ours,
        their_client(tmp_path, ours.url, sender, secrets=secrets) as one,
        their_client(tmp_path, ours.url, receiver, secrets=secrets) as two,
    ):
        await subscribe(two, b"t", globs=["mixed/*"])
        for topic, data in [(b"t", b"hello"), (b"mixed/x", b"y" * 20_000)]:
            assert await one.notify(topic, data) == 1
            assert (await two.next_message()).is_exactly(topic, data)


async def test_one_copy_each_and_all_are_counted(tmp_path: Path) -> None:
    secrets = write_secrets(tmp_path, "hmac")
    async with AsyncExitStack() as stack:
        ours = await stack.enter_async_context(our_broadcaster(secrets=secrets))
        clients = [
            await stack.enter_async_context(
                their_client(tmp_path, ours.url, transport, secrets=secrets)
            )
            for transport in ("websocket", "websocket", "http")
        ]
        for client in clients:
            await subscribe(client, b"foo/bar", globs=["foo/*", "**"])
        assert await clients[0].notify(b"foo/bar", b"once") == 3
        assert await clients[2].notify(b"foo/bar", b"again") == 3
        for client in clients:
            assert (await client.next_message()).is_exactly(b"foo/bar", b"once")
            assert (await client.next_message()).is_exactly(b"foo/bar", b"again")
            assert client.untaken_messages() == 0


@pytest.mark.timeout(400)  # 16,384 messages
async def test_through_trained_dictionaries(tmp_path: Path) -> None:
    """16,384 messages from ours to theirs; on the way two dictionaries are trained, sent and taken
    into use."""
    secrets = write_secrets(tmp_path, "none")
    config = BroadcasterConfig(
        db="sqlite://",
        compression_training=True,
        compression_training_low_watermark=100_000,
        compression_training_high_watermark=500_000,
    )
    number, at_once = 16_384, 512
    async with (
        our_broadcaster(config, secrets=secrets) as ours,
        their_client(tmp_path, ours.url, secrets=secrets) as subscriber,
        websocket_client(ours.url, secrets) as notifier,
    ):
        await subscribe(subscriber, b"t")
        before = losses(subscriber)
        expected: Counter[bytes] = Counter()
        received: Counter[bytes] = Counter()
        for start in range(0, number, at_once):
            bodies = [
                b'{"cache": "users", "key": %d, "reason": "updated", "by": "job"}' % n
                for n in range(start, start + at_once)
            ]
            expected.update(bodies)
            results = await asyncio.gather(*(notifier.notify(topic=b"t", data=b) for b in bodies))
            assert {r.notified for r in results} == {1}
            for _ in bodies:  # the older client is slow, and may not fall behind too much
                message = await subscriber.next_message()
                assert message.data is not None
                received[message.data] += 1
        assert received == expected
        trained = ours.broadcaster.websockets.dictionaries.trained
        assert [d.id for d in trained] == [65_536, 65_537]
        assert losses(subscriber) == before


async def test_missed_reaches_the_older_client(tmp_path: Path) -> None:
    secrets = write_secrets(tmp_path, "hmac")
    async with (
        our_broadcaster(secrets=secrets) as ours,
        their_client(tmp_path, ours.url, secrets=secrets) as client,
    ):
        await subscribe(client, b"t")
        ours.broadcaster.websockets.missed(b"t")
        # it looks at the notice only when something else comes
        assert await client.notify(b"t", b"x") == 1
        await client.next_event("on_receiving")
        assert (await client.next_message()).is_exactly(b"t", b"x")
