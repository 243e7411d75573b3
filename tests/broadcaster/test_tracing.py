"""Traces through a broadcaster: passed on by default, recorded with `tracing`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lonelypsp import messages as m
from lonelypsp import session as s
from lonelypsp.bodies import smallest_trace
from lonelypss.app import App, Broadcaster
from lonelypss.store.base import Kind
from servers import Running, serve

from .harness import NO_AUTH, Subscriber, broadcaster, config, hmac_auth
from .websocket_peer import Peer, websocket_peer

TRACE = "0af7651916cd43dd8448eb211c80319c"
CONTEXT = f"00-{TRACE}-b7ad6b7169203331-01\na=1".encode()
AUTHS: dict[str, Any] = {"none": lambda: NO_AUTH, "hmac": hmac_auth}
EVERY_AUTH = pytest.mark.parametrize("auth", AUTHS.values(), ids=AUTHS)


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Running]:
    one = Broadcaster(config(**options))
    async with serve(App(one)) as url:
        yield Running(one, url)


async def notify(peer: Peer, topic: bytes, data: bytes, tracing: bytes) -> None:
    payload = replace(peer.payload(topic, data), tracing=tracing)
    if peer.session.one_frame(payload):
        await peer.send(peer.session.notify(payload, data, time.time()))
    else:
        peer.session.open_stream(payload)
        while peer.session.sending:
            part = peer.session.next_part(time.time())
            await peer.send(part.head + data[part.offset : part.offset + part.length])
    while not isinstance(await peer.answer(), m.ConfirmNotify):
        pass


async def arrived(peer: Peer) -> bytes:
    """The tracing bytes of the next message."""
    return (await peer.next(s.BodyArrived)).head.tracing


# Nobody records here: what a publisher sent goes on


@EVERY_AUTH
@pytest.mark.parametrize(
    ("tracing", "expected"),
    [
        (b"", b""),
        (CONTEXT, CONTEXT),
        (CONTEXT + b"\n", b""),
        (smallest_trace(1, 2), b""),
        (b"x" * 65_535, b""),
    ],
    ids=["nothing", "a context", "nearly one", "an older trace", "much"],
)
async def test_passed_on_over_http(auth: Any, tracing: bytes, expected: bytes) -> None:
    async with broadcaster(auth) as one, Subscriber(auth=auth()) as subscriber:
        await one.store.subscribe(Kind.EXACT, b"t", subscriber.url, None)
        assert await one.notify(tracing=tracing) == 1
        assert [r.head.tracing for r in subscriber.requests] == [expected]


@EVERY_AUTH
@pytest.mark.parametrize("size", [5, 1000, 20_000])
async def test_passed_on_over_websockets_and_from_there(
    auth: Any, size: int, tmp_path: Path
) -> None:
    """To websockets of the same process and of another one, and over HTTP; whole, compressed and
    in parts."""
    data, db = b"a" * size, f"sqlite:///{tmp_path}/db"
    limits = s.Limits(frame_length=5000)
    options: Any = {"auth": auth(), "db": db, "outgoing_max_ws_message_size": 4096}
    async with AsyncExitStack() as stack:
        a, b = [await stack.enter_async_context(running(**options)) for _ in "ab"]
        publisher = await stack.enter_async_context(websocket_peer(a.url, auth(), limits=limits))
        peers = [
            await stack.enter_async_context(websocket_peer(to.url, auth(), enable_zstd=zstd))
            for to, zstd in ((a, False), (a, True), (b, False))
        ]
        subscriber = await stack.enter_async_context(Subscriber(auth=auth()))
        for peer in peers[:2]:
            await peer.subscribe(b"here", b"t")
        await notify(publisher, b"here", data, CONTEXT)
        assert [await arrived(peer) for peer in peers[:2]] == [CONTEXT] * 2
        await peers[2].subscribe(b"t")
        await a.broadcaster.store.subscribe(Kind.EXACT, b"t", subscriber.url, None)
        for tracing in (CONTEXT, b"", b"window=7"):
            reading = asyncio.gather(*map(arrived, peers))
            await notify(publisher, b"t", data, tracing)
            expected = tracing if tracing is CONTEXT else b""
            assert await reading == [expected] * 3
        got = await subscriber.got(3)
        assert [r.head.tracing for r in got] == [CONTEXT, b"", b""]
