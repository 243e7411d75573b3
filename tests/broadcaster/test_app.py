"""A broadcaster alone, and inside another application."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from lonelypss.app import App, Broadcaster, create_app
from lonelypss.store.base import StoreCorrupt

from .harness import (
    FAST_NOTICES,
    Peer,
    Subscriber,
    config,
    exchange,
    hmac_auth,
    reply,
    request_bytes,
    served,
    subscribed,
    until_async,
    within,
)
from .test_fanout import notify


async def round_trip(port: int, prefix: str = "", auth: Any = hmac_auth) -> None:
    """A subscription and a message through whatever answers at `port`."""
    peer = Peer(auth())
    async with Subscriber(auth=auth()) as subscriber:
        for request, status in [
            (peer.subscribe(subscriber.url, b"t", subscriber.recovery), 200),
            (peer.subscribe_glob(subscriber.url, "*"), 200),
            (peer.check(subscriber.url), 200),
        ]:
            request.path = prefix + request.path
            assert (await exchange(port, request.bytes())).status == status
        message = peer.notify()
        message.path = prefix + message.path
        assert peer.count(await exchange(port, message.bytes()), message) == 1
        assert subscriber.requests[0].message == b"hello"
        gone = peer.set(subscriber.url)
        gone.path = prefix + gone.path
        assert (await exchange(port, gone.bytes())).status == 200


async def test_create_app() -> None:
    async with served(create_app(config(auth=hmac_auth()))) as port:
        await round_trip(port)


async def test_create_app_without_a_config() -> None:
    from .harness import NO_AUTH

    async with served(create_app()) as port:
        await round_trip(port, auth=lambda: NO_AUTH)


@pytest.mark.parametrize("prefix", ["", "/pubsub", "/a/v1/b"])
async def test_router_in_a_fastapi_app(prefix: str) -> None:
    broadcaster = Broadcaster(config(auth=hmac_auth()))
    app = FastAPI(lifespan=broadcaster.lifespan)
    app.include_router(broadcaster.router, prefix=prefix)

    @app.get("/mine")
    async def mine() -> str:
        return "mine"

    async with served(app) as port:
        await round_trip(port, prefix)
        assert (await exchange(port, request_bytes("/mine", method="GET"))).body == b'"mine"'
        get = await exchange(port, request_bytes(f"{prefix}/v1/notify", method="GET"))
        assert (get.status, get.body) == (405, b'{"detail":"Method Not Allowed"}')
        assert (await exchange(port, request_bytes(f"{prefix}/v1/nothing"))).status == 404


async def test_mounted_app_with_a_lifespan_of_its_own() -> None:
    broadcaster = Broadcaster(config(auth=hmac_auth()))

    @asynccontextmanager
    async def lifespan(app: Any) -> Any:
        async with broadcaster:
            yield

    app = FastAPI(lifespan=lifespan)
    inner = FastAPI()
    inner.include_router(broadcaster.router)
    app.mount("/sub", inner)
    async with served(app) as port:
        await round_trip(port, "/sub")


async def test_start_and_stop_twice(tmp_path: Path) -> None:
    """Subscriptions last, timeouts and notices work in the second life as well."""
    one = Broadcaster(
        config(
            db=f"sqlite:///{tmp_path}/one.db",
            outgoing_http_timeout_sock_read=0.2,
            **FAST_NOTICES,
        )
    )
    before = asyncio.all_tasks()
    async with Subscriber() as subscriber:
        subscriber.handler = lambda r: None if "receive" in r.path else subscriber.confirm(r)
        for life in range(2):
            async with served(App(one)):
                if life == 0:
                    await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
                assert await notify(one) == 0
                await until_async(lambda: announced(one))
        assert len([r for r in subscriber.requests if "recover" in r.path]) == 2
    assert not [t for t in asyncio.all_tasks() - before if "lonelypss" in repr(t.get_coro())]


async def announced(one: Broadcaster) -> bool:
    return (await one.store.counts())["missed"] == 0


def test_two_lives_on_two_loops(tmp_path: Path) -> None:
    one = Broadcaster(config(db=f"sqlite:///{tmp_path}/one.db", **FAST_NOTICES))

    async def live() -> None:
        async with Subscriber() as subscriber, one:
            subscriber.handler = lambda r: (
                reply(b"", 500) if "receive" in r.path else subscriber.confirm(r)
            )
            await subscribed(one.store, subscriber.url, b"t", subscriber.recovery)
            assert await notify(one) == 0
            await until_async(lambda: announced(one))
            await one.store.set_subscriptions(subscriber.url, [], [])

    for _ in range(2):
        asyncio.run(live())


async def test_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "one.db").write_bytes(b"not a database" * 1000)
    app = create_app(config(db=f"sqlite:///{tmp_path}/one.db"))
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(event: Any) -> None:
        sent.append(event)

    before = asyncio.all_tasks()
    with pytest.raises(StoreCorrupt):
        await app({"type": "lifespan"}, receive, send)
    assert sent[0]["type"] == "lifespan.startup.failed"
    assert "one.db" in sent[0]["message"]
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("path", ["/v1/notify", "/"])
async def test_websockets_are_refused(path: str) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(event: Any) -> None:
        sent.append(event)

    app = create_app()
    async with within():
        await app({"type": "websocket", "path": path, "headers": []}, receive, send)
    assert [e["type"] for e in sent] == ["websocket.close"]
