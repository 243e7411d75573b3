"""The uvicorn bind as a manual one, for programs that compose it themselves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lonelypsc.config.config import (
    HttpPubSubBindManualConfig,
    HttpPubSubBindUvicornConfig,
    listening_tls,
)
from lonelypsc.listener import Listener

if TYPE_CHECKING:
    from fastapi import APIRouter


class BindWithUvicornCallback:
    """A manual bind's callback: serves the router at the root until it is cancelled."""

    def __init__(self, settings: HttpPubSubBindUvicornConfig) -> None:
        self._settings = settings

    async def __call__(self, router: APIRouter) -> None:
        router.redirect_slashes = False
        settings = self._settings
        listener = Listener(
            settings["host"],
            settings["port"],
            router,
            limits=settings.get("limits"),
            tls=listening_tls(settings),
        )
        await listener.start()
        try:
            await asyncio.Event().wait()
        finally:
            await listener.stop()


async def handle_bind_with_uvicorn(
    settings: HttpPubSubBindUvicornConfig,
) -> HttpPubSubBindManualConfig:
    """Turns a uvicorn bind into the manual bind that does the same.

    Unlike the uvicorn bind itself it does not hold up entering the client until it listens.
    """
    return {"type": "manual", "callback": BindWithUvicornCallback(settings)}
