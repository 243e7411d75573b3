"""/healthz and /readyz, and what a stop on request does between them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lonelypss.store import StoreUnavailable
from programs import broadcaster as started_broadcaster
from programs import eventually, run
from servers import our_broadcaster


def get(url: str, method: str = "GET") -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.loads(response.read() or b"{}")
    except urllib.error.HTTPError as e:
        with e:
            return e.code, json.loads(e.read() or b"{}")


async def test_alive_and_ready() -> None:
    async with our_broadcaster() as ours:
        assert await asyncio.to_thread(get, f"{ours.url}/healthz") == (200, {"status": "ok"})
        assert await asyncio.to_thread(get, f"{ours.url}/readyz") == (200, {"status": "ready"})
        for path in ("/healthz", "/readyz"):
            status, _ = await asyncio.to_thread(get, ours.url + path, "POST")
            assert status == 405


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (StoreUnavailable("postgresql://u:***@h/d cannot be reached"), "the database is not"),
        (None, "the database does not answer"),
    ],
)
async def test_without_its_database_it_is_alive_and_not_ready(
    fault: Exception | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lonelypss.health._PATIENCE", 0.05)

    async def fail() -> None:
        if fault is not None:
            raise fault
        await asyncio.Event().wait()

    async with our_broadcaster() as ours:
        monkeypatch.setattr(ours.broadcaster.store, "next_due", fail)
        status, body = await asyncio.to_thread(get, f"{ours.url}/readyz")
        assert status == 503
        assert body["status"] == "not ready"
        assert body["reason"].startswith(reason)
        assert (await asyncio.to_thread(get, f"{ours.url}/healthz"))[0] == 200


@pytest.mark.parametrize("workers", [1, 2])
def test_it_goes_on_while_it_drains(tmp_path: Path, workers: int) -> None:
    with started_broadcaster(tmp_path, "--drain=3000", f"--workers={workers}") as (program, url):
        assert eventually(lambda: get(f"{url}/readyz")) == (200, {"status": "ready"})
        os.kill(program.process.pid, signal.SIGTERM)
        eventually(lambda: get(f"{url}/readyz")[0] == 503)
        assert get(f"{url}/readyz")[1]["reason"].startswith("draining")
        notified = run("lonelypsc", "notify", "a", "b", f"--broadcaster={url}", cwd=tmp_path)
        assert notified.stdout == "notified 0 subscribers\n"
        os.kill(program.process.pid, signal.SIGTERM)  # somebody is in a hurry
        assert program.process.wait(40) == 0


def test_a_drain_ends_by_itself(tmp_path: Path) -> None:
    with started_broadcaster(tmp_path, "--drain=1") as (program, _):
        os.kill(program.process.pid, signal.SIGTERM)
        assert program.process.wait(40) == 0
