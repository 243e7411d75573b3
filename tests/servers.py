"""Our own broadcaster inside the test process, on a real socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn

from lonelypsp import secretsfile
from lonelypsp.replay import ReplayGuard
from lonelypsp.signing import AuthConfig, Nothing
from lonelypss.app import App, Broadcaster
from lonelypss.config import BroadcasterConfig
from lonelypss.server import bind
from lonelypss.tracing import Tracing


def read_auth(secrets: Path | None) -> AuthConfig:
    if secrets is None:
        return AuthConfig(Nothing(), Nothing())
    return secretsfile.load(secrets.read_text(), ReplayGuard(started=time.time()))


@dataclass
class Running:
    broadcaster: Broadcaster
    url: str


@asynccontextmanager
async def serve(app: Any, **options: Any) -> AsyncIterator[str]:
    """`app` under uvicorn, with `options`, on a free port of the loopback; yields its url."""
    (listener,) = bind("127.0.0.1", 0)  # unlike create_server, sends what is small at once
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="on",
            log_level="warning",
            timeout_graceful_shutdown=5,
            **{"ws": "websockets-sansio", **options},
        )
    )
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with asyncio.timeout(20):
            while not server.started and not task.done():
                await asyncio.sleep(0.005)
        if task.done():
            await task
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


@asynccontextmanager
async def our_broadcaster(
    config: BroadcasterConfig | None = None,
    *,
    secrets: Path | None = None,
    tracing: Tracing | None = None,
) -> AsyncIterator[Running]:
    config = replace(config or BroadcasterConfig(db="sqlite://"), auth=read_auth(secrets))
    broadcaster = Broadcaster(config, tracing=tracing)
    async with serve(App(broadcaster)) as url:
        yield Running(broadcaster, url)
