"""Trace contexts in the tracing bytes of messages: older peers take them and do not care."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from lonelypss.config import BroadcasterConfig
from lonelypss.tracing import OpenTelemetry
from servers import our_broadcaster

from .peers import Scheme, reference_broadcaster, write_secrets
from .test_our_broadcaster_websocket import subscribe, their_client
from .test_our_client import our_client
from .test_our_client_websocket import websocket_client

pytestmark = pytest.mark.interop

DEADLINE = 60
LARGE = b"x" * 300_000
SCHEMES: list[Scheme] = ["none", "hmac"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("transport", ["http", "websocket"])
async def test_older_clients_at_a_broadcaster_that_records(
    tmp_path: Path, scheme: Scheme, transport: str
) -> None:
    """Whole messages, messages in parts, and the answers that their tracer reads."""
    secrets = write_secrets(tmp_path, scheme)
    config = BroadcasterConfig(db="sqlite://", outgoing_max_ws_message_size=65536)
    async with (
        asyncio.timeout(DEADLINE),
        our_broadcaster(config, secrets=secrets, tracing=OpenTelemetry(TracerProvider())) as ours,
        their_client(tmp_path, ours.url, transport, secrets=secrets) as theirs,
        websocket_client(ours.url, secrets, tracing=TracerProvider()) as client,
    ):
        await subscribe(theirs, b"t")
        for data in (b"hello", LARGE, b"again"):
            assert await theirs.notify(b"t", data) == 1
            assert (await theirs.next_message()).is_exactly(b"t", data)
            assert (await client.notify(topic=b"t", data=data)).notified == 1
            assert (await theirs.next_message()).is_exactly(b"t", data)
        assert await theirs.exit() == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("transport", ["http", "websocket"])
async def test_our_client_records_at_an_older_broadcaster(
    tmp_path: Path, scheme: Scheme, transport: str
) -> None:
    """It does not pass the trace on: what arrives has none, and is delivered all the same."""
    secrets = write_secrets(tmp_path, scheme)
    make: Any = our_client if transport == "http" else websocket_client
    async with (
        asyncio.timeout(DEADLINE),
        reference_broadcaster(tmp_path, secrets=secrets) as theirs,
        make(theirs.url, secrets, tracing=TracerProvider()) as client,
        client.subscribe_exact(b"t") as subscription,
    ):
        messages = await subscription.messages()
        for data in (b"hello", LARGE, b"again"):
            assert (await client.notify(topic=b"t", data=data)).notified == 1
            message = await anext(messages)
            assert (message.topic, message.data.read()) == (b"t", data)
            assert "traceparent" in message.trace_context  # of our own step
