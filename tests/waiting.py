"""Waits for states that nothing announces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

PATIENCE = 30.0


async def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Returns when `condition` holds; raises TimeoutError if it does not in time."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
