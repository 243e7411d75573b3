"""/metrics, of one process and of workers together; and that nothing is counted unasked."""

from __future__ import annotations

import asyncio
import builtins
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lonelypsp.spool import Body
from lonelypss.config import BroadcasterConfig, ConfigError
from lonelypss.metrics import GAUGES, Metrics, PrometheusMetrics
from lonelypss.store import StoreUnavailable
from programs import broadcaster, eventually, run
from servers import our_broadcaster

from .harness import Peer, Subscriber, exchange, free_port, subscribed
from .websocket_peer import websocket_peer


def scrape(url: str) -> dict[str, float]:
    """Name with labels -> value."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        assert response.headers["content-type"].startswith("text/plain")
        text = response.read().decode()
    found = re.findall(r"^(lonelypss_\S+) ([-+.\de]+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


async def test_what_happens_is_counted() -> None:
    config = BroadcasterConfig(db="sqlite://", metrics=True, missed_constant=1000.0)
    async with our_broadcaster(config) as ours, Subscriber() as subscriber:
        store = ours.broadcaster.store
        await subscribed(store, subscriber.url, b"t")
        dead = f"http://127.0.0.1:{free_port()}/receive"
        await subscribed(store, dead, b"t", recovery=dead)
        async with websocket_peer(ours.url) as peer:
            await peer.subscribe(b"t")
            assert await peer.notify(b"t", b"x") == 2
            await asyncio.to_thread(urllib.request.urlopen, f"{ours.url}/healthz", None, 5)
            numbers = await asyncio.to_thread(scrape, ours.url)
            assert numbers['lonelypss_delivery_seconds_count{outcome="confirmed"}'] == 1
            assert numbers['lonelypss_delivery_seconds_count{outcome="failed"}'] == 1
            assert numbers['lonelypss_missed_notices_total{outcome="recorded"}'] == 1
            assert numbers['lonelypss_notify_seconds_count{transport="websocket"}'] == 1
            assert numbers["lonelypss_websocket_deliveries_total"] == 1
            assert numbers["lonelypss_match_seconds_count"] >= 1
            async with asyncio.timeout(20):
                while (await asyncio.to_thread(scrape, ours.url))["lonelypss_websockets"] != 1:
                    await asyncio.sleep(0.05)
        assert {f"lonelypss_{name}" for name in GAUGES} <= numbers.keys()


async def test_breakers_and_refused_urls_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lonelypss.app._SAMPLE_INTERVAL", 0.02)
    config = BroadcasterConfig(
        db="sqlite://", metrics=True, outgoing_breaker_failures=1, outgoing_breaker_pause=60.0,
        outgoing_breaker_max_pause=60.0,
    )  # fmt: skip
    async with our_broadcaster(config) as ours, asyncio.timeout(20):
        dead = f"http://127.0.0.1:{free_port()}/receive"
        await subscribed(ours.broadcaster.store, dead, b"t")
        request = Peer().subscribe("http://169.254.169.254/")
        assert (await exchange(int(ours.url.rpartition(":")[2]), request.bytes())).status == 400
        for _ in range(3):
            assert await ours.broadcaster.fanout.notify(b"t", Body.of(b"")) == 0
        while True:
            numbers = await asyncio.to_thread(scrape, ours.url)
            if numbers.get('lonelypss_breakers{state="open"}') == 1:
                break
        assert numbers['lonelypss_breakers{state="half_open"}'] == 0
        assert numbers['lonelypss_breaker_transitions_total{to="open"}'] == 1
        assert numbers['lonelypss_breaker_transitions_total{to="closed"}'] == 0
        assert numbers['lonelypss_refused_urls_total{kind="url-policy"}'] == 1
        assert numbers['lonelypss_refused_urls_total{kind="url-syntax"}'] == 0
        assert numbers['lonelypss_delivery_seconds_count{outcome="skipped"}'] == 2


async def test_without_being_asked_there_is_no_endpoint() -> None:
    async with our_broadcaster() as ours:
        with pytest.raises(urllib.error.HTTPError, match="404") as caught:
            await asyncio.to_thread(urllib.request.urlopen, f"{ours.url}/metrics", None, 5)
        caught.value.close()
        assert type(ours.broadcaster.metrics) is Metrics


def test_workers_answer_for_each_other(tmp_path: Path) -> None:
    with broadcaster(tmp_path, "--metrics=true", "--workers=2") as (program, url):
        where = f"--broadcaster={url}"
        for _ in range(6):
            sent = run("lonelypsc", "notify", "a", "b", where, cwd=tmp_path)
            assert sent.stdout == "notified 0 subscribers\n"
        name = 'lonelypss_requests_total{path="/v1/notify",status="200"}'
        assert eventually(lambda: scrape(url).get(name)) == 6
        assert program.stop() == 0


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    really = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "prometheus_client":
            raise ImportError(f"No module named {name!r}")
        return really(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'lonelypsc\[metrics\]'"):
        PrometheusMetrics()


async def test_whether_it_is_ready_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lonelypss.app._SAMPLE_INTERVAL", 0.02)
    config = BroadcasterConfig(db="sqlite://", metrics=True, max_notifies=7)

    async def fail() -> None:
        raise StoreUnavailable("away")

    async with our_broadcaster(config) as ours, asyncio.timeout(20):

        async def until_ready_is(value: float) -> dict[str, float]:
            while (numbers := await asyncio.to_thread(scrape, ours.url))[
                "lonelypss_ready"
            ] != value:
                await asyncio.sleep(0.01)
            return numbers

        assert (await until_ready_is(1))["lonelypss_notifies_limit"] == 7
        with monkeypatch.context() as broken:
            broken.setattr(ours.broadcaster.store, "next_due", fail)
            await until_ready_is(0)
        await until_ready_is(1)
        ours.broadcaster.routes.leaving = True
        await until_ready_is(0)
