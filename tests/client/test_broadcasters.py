"""The retry loop: what is tried again, what is not, and what the errors say."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from broadcaster.harness import Close, Received, reply
from broadcaster.harness import Subscriber as Server
from client.fakes import KEY, broadcaster, config, noop
from lonelypsc.client import (
    PubSubRequestAmbiguousError,
    PubSubRequestConnectionAbandonedError,
    PubSubRequestRefusedError,
    PubSubRequestRetriesExhaustedError,
)
from lonelypsc.config.auth_config import AuthConfig
from lonelypsc.http_client import HttpPubSubClient
from lonelypsp.bodies import NotifyHead, ResponseNotify
from lonelypsp.signing import Hmac, Nothing
from lonelypsp.wire import HeadParser, encode

NOTIFY_ONLY: Any = {"type": "manual", "callback": noop}


pytestmark = pytest.mark.usefixtures("sleeps")


@asynccontextmanager
async def notifier(*urls: str, kind: str = "hmac", **settings: Any) -> AsyncIterator[Any]:
    hosts = [{"host": url, "priority": n} for n, url in enumerate(urls)]
    async with HttpPubSubClient(
        config(urls[0], kind, bind=NOTIFY_ONLY, broadcasters=hosts, **settings)
    ) as client:
        yield client


def closed_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


@asynccontextmanager
async def raw_server(*replies: bytes | None) -> AsyncIterator[str]:
    """Reads a request's beginning, then says `replies` in turn; None hangs up."""
    waiting = list(replies)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        reply = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        if reply is not None:
            writer.write(reply)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_unavailable_is_tried_again_with_a_fresh_signature_and_body(
    status: int, sleeps: list[float]
) -> None:
    async with broadcaster(script=[(status, b"not now")]) as fake:
        async with notifier(fake.url) as client:
            data = b"x" * 300_000
            assert (await client.notify(topic=b"t", data=data)).notified == 0
    (_, first, one), (_, second, two) = fake.requests
    assert first != second
    assert one.endswith(data)
    assert two.endswith(data)
    assert len(sleeps) == 1
    assert 1 <= sleeps[0] <= 2


async def test_next_broadcaster_without_a_pause(sleeps: list[float]) -> None:
    async with broadcaster(script=[(503, b"")]) as one, broadcaster() as two:
        async with notifier(one.url, two.url) as client:
            await client.notify(topic=b"t", data=b"x")
    assert one.paths == two.paths == ["/v1/notify"]
    assert sleeps == []


async def test_exhausted(sleeps: list[float]) -> None:
    async with broadcaster(script=[(503, b"database locked", (b"retry-after", b"7"))] * 3) as fake:
        async with notifier(fake.url, outgoing_retries_per_broadcaster=3) as client:
            with pytest.raises(PubSubRequestRetriesExhaustedError) as e:
                await client.notify(topic=b"t", data=b"x")
    assert [a.outcome for a in e.value.attempts] == ["HTTP 503: 'database locked'"] * 3
    assert fake.url + "/v1/notify" in str(e.value)
    assert "outgoing_retries_per_broadcaster=3" in str(e.value)
    assert sleeps == [7, 7]


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404, 409, 413, 418, 500, 507])
async def test_refused_at_once(status: int) -> None:
    reply = (status, b"because " + b"x" * 1000, (b"location", b"/elsewhere"))
    async with broadcaster(script=[reply]) as fake:
        async with notifier(fake.url) as client:
            with pytest.raises(PubSubRequestRefusedError, match=f"HTTP {status}: 'because") as e:
                await client.notify(topic=b"t", data=b"x")
    assert len(fake.requests) == 1
    assert len(str(e.value)) < 500


async def test_unreached_is_always_tried_again_and_ends_ambiguous() -> None:
    async with notifier(closed_port(), outgoing_retry_ambiguous=False) as client:
        with pytest.raises(PubSubRequestAmbiguousError, match="not reached") as e:
            await client.notify(topic=b"t", data=b"x")
    assert len(e.value.attempts) == 2
    assert not e.value.may_have_arrived


async def test_second_broadcaster_when_the_first_is_down() -> None:
    async with broadcaster() as fake:
        async with notifier(closed_port(), fake.url) as client:
            assert (await client.notify(topic=b"t", data=b"x")).notified == 0


@pytest.mark.parametrize("again", [True, False])
async def test_ambiguous(again: bool) -> None:
    async with raw_server(None) as url:
        async with notifier(url, outgoing_retry_ambiguous=again) as client:
            with pytest.raises(PubSubRequestAmbiguousError, match="connection failed") as e:
                await client.notify(topic=b"t", data=b"x")
    assert len(e.value.attempts) == (2 if again else 1)
    assert e.value.may_have_arrived
    assert ("outgoing_retry_ambiguous=True" in str(e.value)) is not again


@pytest.mark.parametrize("setting", ["total", "sock_read"])
async def test_timeout_is_ambiguous(setting: str) -> None:
    never = asyncio.Event()
    limit = {"outgoing_http_timeout_" + setting: 0.05}
    async with broadcaster(script=[lambda *_: never.wait()]) as fake:
        async with notifier(fake.url, outgoing_retries_per_broadcaster=1, **limit) as client:
            with pytest.raises(PubSubRequestAmbiguousError, match="timed out"):
                await client.notify(topic=b"t", data=b"x")
        never.set()


HTTP = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (HTTP % (0, b""), "type: 2 bytes expected, 0 present"),
        (HTTP % (1, b"\0"), "type: 2 bytes expected, 1 present"),
        (HTTP % (2, b"\0\3"), "type 3 where 4"),
        (HTTP % (4, b"\0\4\xff\xff"), "authorization"),
        (HTTP % (15, b"\0\4\0\0\0\0\0\0\0\1\4abcd"), "identifier of another notify"),
        (HTTP % (300_000, b"x" * 300_000), "longer than 262,144 bytes"),
        (HTTP % (100, b"\0\4"), "connection failed"),
        (b"junk\r\n\r\n", "connection failed"),
    ],
)
async def test_bad_reply_is_an_error_that_says_why(reply: bytes, says: str) -> None:
    async with raw_server(reply) as url:
        async with notifier(url, kind="none", outgoing_retries_per_broadcaster=1) as client:
            with pytest.raises(PubSubRequestAmbiguousError, match=says):
                await client.notify(topic=b"t", data=b"x")


# A kept connection that the broadcaster closes just as it is used


@asynccontextmanager
async def forgetful() -> AsyncIterator[Server]:
    """Answers the first request of a connection, and closes it when it gets a second one."""

    def once(received: Received) -> bytes:
        if sum(r.connection == received.connection for r in server.requests) > 1:
            raise Close
        head = found[0] if (found := HeadParser(NotifyHead).feed(received.body)) else None
        assert head is not None
        return reply(encode(ResponseNotify(None, b"", 1, head.identifier)))

    async with Server(once) as server:
        yield server


async def test_it_is_sent_again_at_once_with_a_fresh_signature(sleeps: list[float]) -> None:
    async with forgetful() as server:
        settings: Any = {"outgoing_retries_per_broadcaster": 1, "auth": half_signed()}
        async with notifier(server.base, **settings) as client:
            for n in range(1, 5):
                await client.notify(topic=b"t", data=b"x" * 100_000)
                assert server.connections == n
    values = [r.headers["authorization"] for r in server.requests]
    assert len(values) == len(set(values)) == 7
    assert len({r.body[:100] for r in server.requests}) == 7  # its identifier is another, too
    assert sleeps == []


async def test_it_is_not_sent_again_if_that_is_not_wanted() -> None:
    async with forgetful() as server:
        settings: Any = {"outgoing_retry_ambiguous": False, "auth": half_signed()}
        async with notifier(server.base, **settings) as client:
            await client.notify(topic=b"t", data=b"x")
            with pytest.raises(PubSubRequestAmbiguousError, match="outgoing_retry_ambiguous") as e:
                await client.notify(topic=b"t", data=b"x")
    assert len(e.value.attempts) == 1
    assert e.value.may_have_arrived


async def test_it_is_sent_again_once_and_what_it_may_have_done_is_told() -> None:
    async with forgetful() as server:
        settings: Any = {"outgoing_retries_per_broadcaster": 1, "auth": half_signed()}
        async with notifier(server.base, **settings) as client:
            await client.notify(topic=b"t", data=b"x")
            server.handler = close_all
            with pytest.raises(PubSubRequestAmbiguousError) as e:
                await client.notify(topic=b"t", data=b"x")
    assert [a.may_have_arrived for a in e.value.attempts] == [True, True]
    assert len(server.requests) == 3


def close_all(_: Received) -> bytes:
    raise Close


def half_signed() -> AuthConfig:
    """Requests are signed; replies are not, so that a server of a few lines can make them."""
    return AuthConfig(to_broadcaster=Hmac(KEY), to_subscriber=Nothing())


async def test_who_waits_when_the_client_is_left_is_told_so() -> None:
    async with Server(lambda _: None) as server:
        client = HttpPubSubClient(
            config(server.base, bind=NOTIFY_ONLY, outgoing_retries_per_broadcaster=1)
        )
        await client.__aenter__()
        notifying = asyncio.create_task(client.notify(topic=b"t", data=b"x"))
        await server.got(1)
        await client.__aexit__(None, None, None)
        with pytest.raises(PubSubRequestConnectionAbandonedError) as e:
            await notifying
        assert e.value.may_have_arrived
