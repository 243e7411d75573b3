"""The older implementation with itself: shows that what the other modules stand on works."""

from pathlib import Path

import pytest

from .peers import (
    PeerCommandError,
    PeerError,
    Scheme,
    make_payload,
    reference_broadcaster,
    reference_client,
    write_secrets,
)

pytestmark = pytest.mark.interop

TOPIC = b"interop/\x00\xff"


@pytest.mark.parametrize("scheme", ["none", "token", "hmac"])
async def test_http_client_receives_its_own_messages(tmp_path: Path, scheme: Scheme) -> None:
    secrets = write_secrets(tmp_path, scheme)
    async with (
        reference_broadcaster(tmp_path, secrets=secrets) as broadcaster,
        reference_client(tmp_path, broadcaster.url, secrets=secrets) as client,
    ):
        await client.subscribe_exact(TOPIC)
        await client.next_event("on_receiving")
        assert await client.check() == client.expected_etag(exact=[TOPIC])

        assert await client.notify(TOPIC, b"hello") == 1
        message = await client.next_message()
        assert message.is_exactly(TOPIC, b"hello")
        assert message.data == b"hello"

        assert await client.notify_generated(TOPIC, 1_000_000, seed=7) == 1
        assert (await client.next_message()).is_exactly(TOPIC, make_payload(1_000_000, seed=7))

        assert await client.exit() == []
        assert client.returncode == 0
        assert client.untaken_messages() == 0


async def test_websocket_client_receives_its_own_messages(tmp_path: Path) -> None:
    secrets = write_secrets(tmp_path, "hmac")
    async with (
        reference_broadcaster(tmp_path, secrets=secrets) as broadcaster,
        reference_client(
            tmp_path, broadcaster.websocket_url, secrets=secrets, transport="websocket"
        ) as client,
    ):
        await client.subscribe_exact(TOPIC)
        await client.next_event("on_receiving")

        assert await client.notify(TOPIC, b"hello") == 1
        assert (await client.next_message()).is_exactly(TOPIC, b"hello")

        assert await client.notify_generated(TOPIC, 1_000_000, seed=7) == 1
        assert (await client.next_message()).is_exactly(TOPIC, make_payload(1_000_000, seed=7))


async def test_schemes_may_differ_by_direction(tmp_path: Path) -> None:
    secrets = write_secrets(tmp_path, "token", "hmac")
    async with (
        reference_broadcaster(tmp_path, secrets=secrets) as broadcaster,
        reference_client(tmp_path, broadcaster.url, secrets=secrets) as client,
    ):
        await client.subscribe_exact(TOPIC)
        assert await client.notify(TOPIC, b"hello") == 1


async def test_left_subscription_is_gone_and_the_other_stays(tmp_path: Path) -> None:
    async with (
        reference_broadcaster(tmp_path) as broadcaster,
        reference_client(tmp_path, broadcaster.url) as client,
    ):
        first = await client.subscribe_exact(b"first")
        second = await client.subscribe_exact(b"second")
        await client.unsubscribe(first)
        assert await client.notify(b"first", b"x") == 0
        assert await client.notify(b"second", b"y") == 1
        assert (await client.next_message(second)).data == b"y"
        assert client.untaken_messages() == 0


async def test_subscriptions_survive_a_killed_broadcaster(tmp_path: Path) -> None:
    async with reference_broadcaster(tmp_path) as broadcaster:
        async with reference_client(tmp_path, broadcaster.url) as client:
            await client.subscribe_exact(TOPIC)
            await broadcaster.kill()
            async with reference_broadcaster(tmp_path, port=broadcaster.port):
                assert await client.notify(TOPIC, b"hello") == 1
                assert await client.exit() == []


async def test_refused_secret_is_an_error_of_the_command(tmp_path: Path) -> None:
    async with (
        reference_broadcaster(tmp_path, secrets=write_secrets(tmp_path)) as broadcaster,
        reference_client(
            tmp_path, broadcaster.url, secrets=write_secrets(tmp_path), options=["--passes", "1"]
        ) as client,
    ):
        with pytest.raises(PeerCommandError) as caught:
            await client.notify(TOPIC, b"hello")
        assert caught.value.error == "PubSubRequestRefusedError"


async def test_taken_port_is_told_with_the_log(tmp_path: Path) -> None:
    async with reference_broadcaster(tmp_path) as broadcaster:
        with pytest.raises(PeerError, match="did not start") as caught:
            async with reference_broadcaster(tmp_path, port=broadcaster.port):
                pass
        assert "Address already in use" in str(caught.value)
        with pytest.raises(PeerError, match="exit status 3"):
            async with reference_client(tmp_path, broadcaster.url, port=broadcaster.port):
                pass
