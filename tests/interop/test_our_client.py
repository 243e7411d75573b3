"""Our client as subscriber and notifier, with the older broadcaster between."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lonelypsc.client import PubSubClient, PubSubRequestRefusedError
from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.http_client import HttpPubSubClient
from lonelypsp.signing import Nothing
from servers import our_broadcaster

from .peers import (
    Scheme,
    make_payload,
    reference_broadcaster,
    reference_client,
    write_secrets,
)

pytestmark = pytest.mark.interop

TOPIC = b"interop/\x00\xff"
SCHEMES = ["none", "token", "hmac"]
DEADLINE = 30


def auth(secrets: Path | None) -> Any:
    if secrets is None:
        return AuthConfigFromParts(Nothing(), Nothing())
    return AuthConfigFromParts(*get_auth_config_from_file(str(secrets)))


@asynccontextmanager
async def our_client(
    broadcaster: str,
    secrets: Path | None = None,
    host: str = "http://127.0.0.1:{port}",
    **settings: Any,
) -> AsyncIterator[PubSubClient]:
    config = make_http_pub_sub_config(
        bind={"type": "uvicorn", "host": "127.0.0.1", "port": 0},
        host=host,
        broadcasters=[{"host": broadcaster}],
        auth=auth(secrets),
        **settings,
    )
    async with HttpPubSubClient(config) as client:
        yield client


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_exact(tmp_path: Path, scheme: Scheme) -> None:
    secrets = write_secrets(tmp_path, scheme)
    async with (
        asyncio.timeout(DEADLINE),
        reference_broadcaster(tmp_path, secrets=secrets) as theirs,
        our_client(theirs.url, secrets) as subscriber,
        our_client(theirs.url, secrets) as notifier,
    ):
        async with subscriber.subscribe_exact(TOPIC) as subscription:
            messages = await subscription.messages()
            for data in (b"hello", b"", make_payload(100_000, seed=1)):
                assert (await notifier.notify(topic=TOPIC, data=data)).notified == 1
                message = await anext(messages)
                assert (message.topic, message.data.read()) == (TOPIC, data)
        assert (await notifier.notify(topic=TOPIC, data=b"gone")).notified == 0


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_30_mb_from_a_file(tmp_path: Path, scheme: Scheme) -> None:
    secrets = write_secrets(tmp_path, scheme)
    payload = make_payload(30_000_000, seed=5)
    file = tmp_path / "payload"
    file.write_bytes(b"skipped" + payload)
    async with (
        asyncio.timeout(DEADLINE),
        reference_broadcaster(tmp_path, secrets=secrets) as theirs,
        our_client(theirs.url, secrets) as client,
        client.subscribe_exact(b"large") as subscription,
    ):
        messages = await subscription.messages()
        with file.open("rb") as f:
            f.seek(len(b"skipped"))
            assert (await client.notify(topic=b"large", sync_file=f)).notified == 1
        message = await anext(messages)
        assert message.data.read() == payload


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_several_topics_and_globs_are_set_and_checked(tmp_path: Path, scheme: Scheme) -> None:
    """That broadcaster delivers no globs on this SQLite, but keeps and checks them."""
    secrets = write_secrets(tmp_path, scheme)
    async with (
        asyncio.timeout(DEADLINE),
        reference_broadcaster(tmp_path, secrets=secrets) as theirs,
        our_client(theirs.url, secrets) as client,
        client.subscribe(exact=[b"a", b"b"], glob=["c/*", "d/**"]) as subscription,
    ):
        await subscription.subscribe_exact(b"e")
        await subscription.unsubscribe_exact(b"a")
        await subscription.unsubscribe_glob("c/*")
        assert (await client.notify(topic=b"a", data=b"")).notified == 0
        assert (await client.notify(topic=b"e", data=b"1")).notified == 1
        messages = await subscription.messages()
        assert (await anext(messages)).topic == b"e"


async def test_a_fragment_works_with_hmac(tmp_path: Path) -> None:
    secrets = write_secrets(tmp_path, "hmac")
    async with (
        asyncio.timeout(DEADLINE),
        reference_broadcaster(tmp_path, secrets=secrets) as theirs,
        our_client(theirs.url, secrets, "http://127.0.0.1:{port}/pubsub#1") as client,
        client.subscribe_exact(TOPIC) as subscription,
    ):
        assert (await client.notify(topic=TOPIC, data=b"hello")).notified == 1
        assert (await anext(await subscription.messages())).data.read() == b"hello"


async def test_other_secrets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "ours").mkdir()
    async with (
        asyncio.timeout(DEADLINE),
        reference_broadcaster(
            tmp_path / "theirs", secrets=write_secrets(tmp_path / "theirs", "hmac")
        ) as theirs,
        our_client(theirs.url, write_secrets(tmp_path / "ours", "hmac")) as client,
    ):
        with pytest.raises(PubSubRequestRefusedError, match="403"):
            await client.notify(topic=TOPIC, data=b"x")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("broadcaster", ["ours", "theirs"])
async def test_both_clients_at_one_broadcaster(
    tmp_path: Path, scheme: Scheme, broadcaster: str
) -> None:
    secrets = write_secrets(tmp_path, scheme)
    server = (
        our_broadcaster(secrets=secrets)
        if broadcaster == "ours"
        else reference_broadcaster(tmp_path, secrets=secrets)
    )
    async with (
        asyncio.timeout(DEADLINE),
        server as running,
        our_client(running.url, secrets) as new,
        reference_client(tmp_path, running.url, secrets=secrets) as old,
        new.subscribe_exact(TOPIC) as subscription,
    ):
        await old.subscribe_exact(TOPIC)
        messages = await subscription.messages()
        assert await old.notify(TOPIC, b"from old") == 2
        assert (await anext(messages)).data.read() == b"from old"
        assert (await old.next_message()).is_exactly(TOPIC, b"from old")
        assert (await new.notify(topic=TOPIC, data=b"from new")).notified == 2
        assert (await anext(messages)).data.read() == b"from new"
        assert (await old.next_message()).is_exactly(TOPIC, b"from new")
        assert await old.exit() == []
