"""The older client as subscriber and notifier, with our broadcaster between."""

from pathlib import Path

import pytest

from lonelypss.config import BroadcasterConfig
from lonelypss.keys import DIRECTIONS, Files
from servers import our_broadcaster

from .peers import Scheme, make_payload, reference_client, write_secrets

pytestmark = pytest.mark.interop

TOPIC = b"interop/\x00\xff"
SCHEMES = ["none", "token", "hmac"]


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_exact(tmp_path: Path, scheme: Scheme) -> None:
    secrets = write_secrets(tmp_path, scheme)
    async with (
        our_broadcaster(secrets=secrets) as ours,
        reference_client(tmp_path, ours.url, secrets=secrets) as client,
    ):
        await client.subscribe_exact(TOPIC)
        assert await client.check() == client.expected_etag(exact=[TOPIC])
        assert await client.notify(TOPIC, b"hello") == 1
        assert (await client.next_message()).is_exactly(TOPIC, b"hello")
        assert await client.notify(TOPIC, b"") == 1
        assert (await client.next_message()).is_exactly(TOPIC, b"")
        assert await client.notify(b"nobody listens", b"hello") == 0
        assert await client.exit() == []
    async with our_broadcaster(secrets=secrets):
        pass


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_glob(tmp_path: Path, scheme: Scheme) -> None:
    secrets = write_secrets(tmp_path, scheme)
    async with (
        our_broadcaster(secrets=secrets) as ours,
        reference_client(tmp_path, ours.url, secrets=secrets) as client,
    ):
        await client.subscribe_glob("foo/*")
        assert await client.notify(b"foo/bar", b"hello") == 1
        assert (await client.next_message()).is_exactly(b"foo/bar", b"hello")
        assert await client.notify(b"foo/bar/baz", b"* stays in its segment") == 0
        assert await client.exit() == []


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_30_mb(tmp_path: Path, scheme: Scheme) -> None:
    secrets = write_secrets(tmp_path, scheme)
    async with (
        our_broadcaster(secrets=secrets) as ours,
        reference_client(tmp_path, ours.url, secrets=secrets) as subscriber,
        reference_client(tmp_path, ours.url, secrets=secrets) as notifier,
    ):
        await subscriber.subscribe_exact(b"large")
        assert await notifier.notify_generated(b"large", 30_000_000, seed=3) == 1
        message = await subscriber.next_message()
        assert message.is_exactly(b"large", make_payload(30_000_000, seed=3))


async def test_an_overlap_is_one_post_per_url(tmp_path: Path) -> None:
    async with (
        our_broadcaster() as ours,
        reference_client(tmp_path, ours.url) as client,
    ):
        first = await client.subscribe(exact=[b"foo/bar"], globs=["foo/*", "**"])
        assert await client.notify(b"foo/bar", b"once") == 1
        assert (await client.next_message(first)).is_exactly(b"foo/bar", b"once")
        assert await client.exit() == []
        assert client.untaken_messages() == 0


async def test_counts_add_up_over_many_clients(tmp_path: Path) -> None:
    secrets = write_secrets(tmp_path, "hmac")
    async with (
        our_broadcaster(secrets=secrets) as ours,
        reference_client(tmp_path, ours.url, secrets=secrets) as a,
        reference_client(tmp_path, ours.url, secrets=secrets) as b,
    ):
        await a.subscribe_exact(TOPIC)
        await b.subscribe_exact(TOPIC)
        await b.subscribe_exact(b"other")
        assert await a.notify(TOPIC, b"to both") == 2
        assert await a.notify(b"other", b"to one") == 1
        assert (await a.next_message()).is_exactly(TOPIC, b"to both")
        number = await b.subscribe_exact(b"third")
        await b.unsubscribe(number)
        assert await a.notify(b"third", b"gone") == 0
        assert await b.check() == b.expected_etag(exact=[TOPIC, b"other"])


async def test_the_older_client_is_told_what_it_missed(tmp_path: Path) -> None:
    secrets = write_secrets(tmp_path, "hmac")
    config = BroadcasterConfig(
        db="sqlite://",
        outgoing_http_timeout_sock_read=0.5,
        missed_expo_factor=0.1,
        missed_constant=0,
        missed_jitter=0,
    )
    async with (
        our_broadcaster(config, secrets=secrets) as ours,
        reference_client(tmp_path, ours.url, secrets=secrets) as slow,
        reference_client(tmp_path, ours.url, secrets=secrets) as notifier,
    ):
        await slow.subscribe_exact(TOPIC, delay=3)  # answers after our patience is over
        await slow.next_event("on_receiving")
        assert await notifier.notify(TOPIC, b"too slow") == 0
        await slow.next_event("on_receiving")
        # the notice did not end the subscription, as it does with the older broadcaster
        assert await slow.check() == slow.expected_etag(exact=[TOPIC])


@pytest.mark.parametrize("scheme", ["token", "hmac"])
async def test_older_clients_know_the_key_that_signs(tmp_path: Path, scheme: Scheme) -> None:
    """Also while another one is being introduced."""
    secrets = write_secrets(tmp_path, scheme)
    secrets.chmod(0o600)
    Files(secrets).add("new", DIRECTIONS, {}, None)
    async with (
        our_broadcaster(secrets=secrets) as ours,
        reference_client(tmp_path, ours.url, secrets=secrets) as before,
    ):
        await before.subscribe_exact(TOPIC)
        assert await before.notify(TOPIC, b"hello") == 1
        assert (await before.next_message()).is_exactly(TOPIC, b"hello")
        assert await before.exit() == []
    Files(secrets).sign_with("new", DIRECTIONS)
    async with (
        our_broadcaster(secrets=secrets) as ours,
        reference_client(tmp_path, ours.url, secrets=secrets) as after,
    ):
        await after.subscribe_exact(TOPIC)
        assert await after.notify(TOPIC, b"hello") == 1
        assert (await after.next_message()).is_exactly(TOPIC, b"hello")
        assert await after.exit() == []
