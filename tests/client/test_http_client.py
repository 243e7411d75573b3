"""Subscribe, receive and notify through a fake broadcaster on real sockets."""

from __future__ import annotations

import asyncio

import pytest

from lonelypsc.http_client import HttpPubSubClient
from client.fakes import KINDS, broadcaster, config


@pytest.mark.parametrize("kind", KINDS)
async def test_round_trip(kind: str) -> None:
    async with broadcaster(kind) as fake:
        async with HttpPubSubClient(config(fake, kind)) as client:
            async with client.subscribe(exact=[b"foo/bar"], glob=["baz/*"]) as subscription:
                messages = await subscription.messages()
                for topic in (b"foo/bar", b"baz/1"):
                    result = await client.notify(topic=topic, data=b"hello " + topic)
                    assert result.notified == 1
                    async with asyncio.timeout(5):
                        message = await messages.__anext__()
                    assert message.topic == topic
                    assert message.data.read() == b"hello " + topic
            assert fake.topics() == set()
        assert fake.paths == [
            "/v1/set_subscriptions",
            "/v1/notify",
            "/v1/notify",
            "/v1/set_subscriptions",
        ]
