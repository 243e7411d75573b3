"""A broadcaster, standalone or inside another application.

`create_app` is what `uvicorn main:app` runs. `Broadcaster` is the same thing in pieces: a context
manager with a `router` to include and a `lifespan` to hand to FastAPI.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from lonelypsp.replay import NOT_SHARED
from lonelypss.asgi import ASGIApp, Receive, Scope, Send, respond
from lonelypss.config import BroadcasterConfig, ConfigError, Database
from lonelypss.fanout import Fanout
from lonelypss.health import Health
from lonelypss.intake import Intake
from lonelypss.leases import NO_LEASES, KeptLeases
from lonelypss.metrics import NO_METRICS, PrometheusMetrics
from lonelypss.missed import MissedNotices
from lonelypss.peers import Peers, Registry
from lonelypss.routes import Routes
from lonelypss.sender import Sender
from lonelypss.store.base import Store, StoreUnavailable
from lonelypss.store.choose import make_store
from lonelypss.tracing import NO_TRACING, OpenTelemetry, Tracing
from lonelypss.websocket import Connection, Websockets

if TYPE_CHECKING:
    from fastapi import APIRouter

WEBSOCKET = "/v1/websocket"

_SAMPLE_INTERVAL = 2.0
_COUNT_INTERVAL = 30.0


class Broadcaster:
    """One broadcaster: its store, its connections, its endpoints.

    Use it as an async context manager; `router` may be included before that, requests only work
    inside. A broadcaster that was left can be entered again.

    Args:
        config: how it runs.
        store: where subscriptions are kept; by default the database that `config.db` names.
        tracing: where spans go; by default the global provider of OpenTelemetry, if
            `config.tracing` says so.
    """

    def __init__(
        self,
        config: BroadcasterConfig,
        store: Store | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.config = config
        if config.auth.shared is not NOT_SHARED and not Database.at(config.db).is_remote:
            raise ConfigError(
                f"db: the authorization was loaded for PostgreSQL, but the database is {config.db}:"
                " give load_auth the same db"
            )
        self.store = make_store(config) if store is None else store
        self.metrics = PrometheusMetrics() if config.metrics else NO_METRICS
        self.sender = Sender(config, metrics=self.metrics)
        if tracing is None:
            tracing = OpenTelemetry() if config.tracing else NO_TRACING
        self.tracing = tracing
        ttl = config.subscription_ttl
        self.leases = NO_LEASES if ttl is None else KeptLeases(ttl, self.store, self.metrics)
        self.missed = MissedNotices(
            config, self.store, self.sender, self.metrics, self.tracing, self.leases
        )
        self.intake = Intake(config)
        registry: Registry[Connection] = Registry()
        self.websockets = Websockets(config, registry, self.intake, self.metrics, self.tracing)
        self.fanout = Fanout(
            config,
            self.store,
            self.sender,
            self.missed,
            self.websockets,
            self.metrics,
            self.leases,
        )
        self.websockets.fanout = self.fanout
        self.peers = Peers(
            config, self.store, registry, self.intake, self.websockets, tracing=self.tracing
        )
        self.routes = Routes(
            config,
            self.store,
            self.fanout,
            self.intake,
            self.metrics,
            self.tracing,
            self.leases,
        )
        self.health = Health(self.routes)
        self.table: dict[str, ASGIApp] = {
            **self.routes.table,
            **self.peers.table,
            **self.health.table,
            **self.metrics.table,
            WEBSOCKET: self.websockets,
        }
        self._running = AsyncExitStack()

    @property
    def router(self) -> APIRouter:
        """The endpoints, for `app.include_router(broadcaster.router, prefix=...)`."""
        from fastapi import APIRouter
        from starlette.routing import Route, WebSocketRoute

        router = APIRouter()
        router.routes += [Route(path, endpoint) for path, endpoint in self.table.items()]
        router.routes.append(WebSocketRoute(WEBSOCKET, self.websockets))
        return router

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """For `FastAPI(lifespan=broadcaster.lifespan)`, or to enter in a lifespan of your own."""
        async with self:
            yield

    async def __aenter__(self) -> Broadcaster:
        async with AsyncExitStack() as starting:
            await self.store.open()
            starting.push_async_callback(self.store.close)
            self.sender.open()
            starting.push_async_callback(self.sender.close)
            sweeper = asyncio.create_task(self.missed.run(), name="missed notices")
            starting.push_async_callback(_end, sweeper)
            leases = asyncio.create_task(self.leases.run(), name="stale subscriptions")
            starting.push_async_callback(_end, leases)
            watch = asyncio.create_task(self.websockets.watch(), name="slow websockets")
            starting.push_async_callback(_end, watch)
            if self.metrics.enabled:
                sampler = asyncio.create_task(self._sample(), name="gauges")
                starting.push_async_callback(_end, sampler)
            await starting.enter_async_context(self.peers)
            starting.push_async_callback(self.websockets.close)
            self._running = starting.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._running.aclose()

    async def _sample(self) -> None:
        """Keeps the gauges fresh. Counting rows takes time, so that is done seldom."""
        counted = -math.inf
        while True:
            values: dict[str, float] = {
                "ready": await self.health.reason() is None,
                "websockets_limit": self.config.max_websockets,
                "notifies_limit": self.config.max_notifies,
                "spool_quota_bytes": self.config.spool_quota,
                "websockets": len(self.websockets.connections),
                "websocket_queue": sum(c.waiting for c in self.websockets.connections),
                "outgoing_connections": self.sender.connections,
                "outgoing_queue": self.sender.waiting,
                "notifies_in_flight": self.routes.notifies,
                "spool_bytes": self.intake.used,
            }
            if time.monotonic() - counted >= _COUNT_INTERVAL:
                with suppress(StoreUnavailable):  # /readyz tells of that
                    rows = await self.store.counts()
                    values["missed_backlog"] = rows["missed"]
                    values["subscriptions"] = rows["exact"] + rows["glob"]
                    counted = time.monotonic()
            self.metrics.sample(values, self.sender.breakers())
            await asyncio.sleep(_SAMPLE_INTERVAL)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


class App:
    """ASGI front of a standalone broadcaster: a dict from path to callable.

    Attributes:
        failure: why it could not start.
    """

    def __init__(self, broadcaster: Broadcaster) -> None:
        self.broadcaster = broadcaster
        self.failure: Exception | None = None
        self._table = broadcaster.table

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        endpoint: ASGIApp | None = self._table.get(scope["path"])
        if endpoint is not None:
            await endpoint(scope, receive, send)
        elif scope["type"] == "http":
            await respond(send, 404, b'{"detail":"Not Found"}', b"application/json")
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.broadcaster.__aenter__()
        except Exception as e:
            self.failure = e
            await send({"type": "lifespan.startup.failed", "message": str(e)})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.broadcaster.__aexit__(None, None, None)
        await send({"type": "lifespan.shutdown.complete"})


def create_app(config: BroadcasterConfig | None = None) -> App:
    """The ASGI application of a standalone broadcaster.

    Args:
        config: by default an in-memory database and no authorization, for a first try.
    """
    return App(Broadcaster(config or BroadcasterConfig(db="sqlite://")))
