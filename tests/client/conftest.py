"""Fixtures of the client's tests."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lonelypsc import broadcasters as module


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of the retry loop, which take no time here."""
    slept: list[float] = []

    class Quick:
        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

        async def sleep(self, seconds: float) -> None:
            slept.append(seconds)

    monkeypatch.setattr(module, "asyncio", Quick())
    return slept
