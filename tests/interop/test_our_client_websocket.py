"""Our client on websockets, with the older broadcaster, and with older clients beside it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lonelypsc.client import PubSubClient
from lonelypsc.config.ws_config import make_websocket_pub_sub_config
from lonelypsc.ws_client import WebsocketPubSubClient
from servers import our_broadcaster

from .peers import Scheme, make_payload, reference_broadcaster, reference_client, write_secrets
from .test_our_client import auth, our_client

pytestmark = pytest.mark.interop

TOPIC = b"interop/\x00\xff"
SCHEMES = ["none", "token", "hmac"]
LARGE = 40_000_000
DEADLINE = 60


@asynccontextmanager
async def websocket_client(
    url: str, secrets: Path | None = None, **settings: Any
) -> AsyncIterator[PubSubClient]:
    config = make_websocket_pub_sub_config(
        broadcasters=[{"host": url.replace("http", "ws", 1)}], auth=auth(secrets), **settings
    )
    async with WebsocketPubSubClient(config) as client:
        yield client


@pytest.mark.parametrize("compression", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
async def test_exact(tmp_path: Path, scheme: Scheme, compression: bool) -> None:
    secrets = write_secrets(tmp_path, scheme)
    async with (
        asyncio.timeout(DEADLINE),
        reference_broadcaster(tmp_path, secrets=secrets) as theirs,
        websocket_client(theirs.url, secrets, allow_compression=compression) as client,
        client.subscribe_exact(TOPIC) as subscription,
    ):
        messages = await subscription.messages()
        for data in (b"hello", b"", b"x" * 100_000, make_payload(100_000, seed=1)):
            assert (await client.notify(topic=TOPIC, data=data)).notified == 1
            message = await anext(messages)
            assert (message.topic, message.data.read()) == (TOPIC, data)
        assert (await client.notify(topic=b"nobody", data=b"x")).notified == 0


@pytest.mark.parametrize("compression", [True, False])
@pytest.mark.parametrize("scheme", ["none", "hmac"])
async def test_large_messages_in_parts(tmp_path: Path, scheme: Scheme, compression: bool) -> None:
    """Of bytes and of a file. That broadcaster counts every part of what it sends; a small message
    after each large one shows that we know it."""
    secrets = write_secrets(tmp_path, scheme)
    file = tmp_path / "payload"
    file.write_bytes(make_payload(LARGE, seed=2))
    async with (
        asyncio.timeout(DEADLINE),
        reference_broadcaster(tmp_path, secrets=secrets) as theirs,
        websocket_client(theirs.url, secrets, allow_compression=compression) as subscriber,
        websocket_client(theirs.url, secrets, allow_compression=compression) as notifier,
        subscriber.subscribe_exact(TOPIC) as subscription,
    ):
        messages = await subscription.messages()
        with file.open("rb") as opened:
            for large in ({"data": make_payload(LARGE, seed=1)}, {"sync_file": opened}):
                sent: dict[str, Any] = dict(large)
                assert (await notifier.notify(topic=TOPIC, **sent)).notified == 1
                message = await anext(messages)
                assert message.data.read() == sent.get("data", file.read_bytes())
                assert (await notifier.notify(topic=TOPIC, data=b"small")).notified == 1
                assert (await anext(messages)).data.read() == b"small"


async def test_globs_are_confirmed(tmp_path: Path) -> None:
    """That broadcaster delivers no globs on this SQLite (D11), but takes and gives them up."""
    secrets = write_secrets(tmp_path, "hmac")
    async with (
        asyncio.timeout(DEADLINE),
        reference_broadcaster(tmp_path, secrets=secrets) as theirs,
        websocket_client(theirs.url, secrets) as client,
        client.subscribe(exact=[b"a"], glob=["b/*", "c/**"]) as subscription,
    ):
        await subscription.unsubscribe_glob("b/*")
        await subscription.subscribe_glob("d/*")
        assert (await client.notify(topic=b"a", data=b"1")).notified == 1
        assert (await anext(await subscription.messages())).topic == b"a"


@pytest.mark.parametrize("scheme", ["none", "hmac"])
@pytest.mark.parametrize("make", ["older", "ours"])
async def test_old_and_new_on_both_transports(tmp_path: Path, scheme: Scheme, make: str) -> None:
    """Everybody notifies, and everybody receives it once."""
    secrets = write_secrets(tmp_path, scheme)
    async with asyncio.timeout(DEADLINE), AsyncExitStack() as stack:
        if make == "ours":
            broadcaster: Any = await stack.enter_async_context(our_broadcaster(secrets=secrets))
        else:
            broadcaster = await stack.enter_async_context(
                reference_broadcaster(tmp_path, secrets=secrets)
            )
        url = broadcaster.url
        ours = [
            await stack.enter_async_context(websocket_client(url, secrets)),
            await stack.enter_async_context(our_client(url, secrets)),
        ]
        iterators = []
        for client in ours:
            subscription = await stack.enter_async_context(client.subscribe_exact(b"t"))
            iterators.append(await subscription.messages())
        older = []
        for transport in ("websocket", "http"):
            address = url.replace("http", "ws", 1) if transport == "websocket" else url
            peer = await stack.enter_async_context(
                reference_client(tmp_path, address, secrets=secrets, transport=transport)  # type: ignore[arg-type]
            )
            number = await peer.subscribe(exact=[b"t"])
            await peer.next_event("on_receiving", subscription=number)
            older.append(peer)
        expected = []
        for n, client in enumerate(ours):
            expected.append(b"ours %d" % n)
            assert (await client.notify(topic=b"t", data=expected[-1])).notified == 4
        for n, peer in enumerate(older):
            expected.append(b"older %d" % n)
            assert await peer.notify(b"t", expected[-1]) == 4
        for iterator in iterators:
            assert sorted([(await anext(iterator)).data.read() for _ in expected]) == sorted(
                expected
            )
        for peer in older:
            got = [(await peer.next_message()).data for _ in expected]
            assert Counter(got) == Counter(expected)
            assert peer.untaken_messages() == 0


def sample(n: int) -> bytes:
    return b'{"cache": "users", "key": %d, "reason": "updated", "by": "job"}' % n


async def test_preset_dictionary(tmp_path: Path) -> None:
    import zstandard

    data = zstandard.train_dictionary(4096, [sample(n) for n in range(5000)]).as_bytes()
    (tmp_path / "dictionary").write_bytes(data)
    async with (
        asyncio.timeout(DEADLINE),
        reference_broadcaster(
            tmp_path, options=["--dictionary", str(tmp_path / "dictionary")]
        ) as theirs,
        websocket_client(
            theirs.url,
            compression_dictionary_by_id={7: (data, 3)},
            initial_compression_dict_id=7,
        ) as client,
        client.subscribe_exact(b"t") as subscription,
    ):
        messages = await subscription.messages()
        for n in range(50):
            assert (await client.notify(topic=b"t", data=sample(n))).notified == 1
            assert (await anext(messages)).data.read() == sample(n)
        assert 7 in compressors(client)


def compressors(client: PubSubClient) -> set[int]:
    transport: Any = client._transport
    return set(transport.link.session.compressors)


async def test_the_older_broadcaster_trains_no_dictionary(tmp_path: Path) -> None:
    """Although it says so (D6); ours do, see test_our_broadcaster_websocket.py."""
    number, at_once = 2048, 64  # above its low watermark of 100 KiB
    async with (
        asyncio.timeout(DEADLINE),
        reference_broadcaster(tmp_path) as theirs,
        websocket_client(theirs.url) as notifier,
        websocket_client(theirs.url, receive_buffer_messages=number) as subscriber,
        subscriber.subscribe_exact(b"t") as subscription,
    ):
        messages = await subscription.messages()
        for start in range(0, number, at_once):
            bodies = [sample(n) for n in range(start, start + at_once)]
            results = await asyncio.gather(*(notifier.notify(topic=b"t", data=b) for b in bodies))
            assert {r.notified for r in results} == {1}
        got = Counter([(await anext(messages)).data.read() for _ in range(number)])
        assert got == Counter(sample(n) for n in range(number))
        assert compressors(subscriber) == {1}


async def test_pipelined_notifies_do_not_overrun_the_older_broadcaster(tmp_path: Path) -> None:
    """It disconnects above 255 unanswered frames (D12)."""
    async with (
        asyncio.timeout(DEADLINE),
        reference_broadcaster(tmp_path) as theirs,
        websocket_client(theirs.url) as client,
    ):
        results = await asyncio.gather(
            *(client.notify(topic=b"t", data=b"%d" % n) for n in range(1500))
        )
        assert {r.notified for r in results} == {0}


@pytest.mark.parametrize("scheme", ["none", "hmac"])
async def test_the_older_broadcaster_is_killed_and_comes_back(
    tmp_path: Path, scheme: Scheme
) -> None:
    secrets = write_secrets(tmp_path, scheme)
    gaps = asyncio.Semaphore(0)

    async def on_receiving() -> None:
        gaps.release()

    async with asyncio.timeout(DEADLINE), AsyncExitStack() as stack:
        first = await stack.enter_async_context(reference_broadcaster(tmp_path, secrets=secrets))
        client = await stack.enter_async_context(websocket_client(first.url, secrets))
        subscription = await stack.enter_async_context(
            client.subscribe_exact(b"t", on_receiving=on_receiving)
        )
        messages = await subscription.messages()
        assert (await client.notify(topic=b"t", data=b"before")).notified == 1
        assert (await anext(messages)).data.read() == b"before"
        await first.kill()
        # waits for a connection, and is sent then
        pending = asyncio.create_task(client.notify(topic=b"t", data=b"after"))
        await stack.enter_async_context(
            reference_broadcaster(tmp_path, secrets=secrets, port=first.port)
        )
        await pending
        while (await client.notify(topic=b"t", data=b"last")).notified != 1:
            pass
        while (await anext(messages)).data.read() != b"last":
            pass
        await gaps.acquire()
        await gaps.acquire()
