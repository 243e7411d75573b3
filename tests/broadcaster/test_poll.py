"""How long the event loop looks for work before the process sleeps."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lonelypss.app import App, Broadcaster
from lonelypss.config import BroadcasterConfig
from lonelypss.poll import REPLY, REQUEST, WEBSOCKET, Poll, Polling
from lonelypss.server import Settings, http_protocol, make, websocket_protocol
from lonelypss.store.base import Kind
from servers import serve

from .harness import Peer, Subscriber, exchange
from .websocket_peer import websocket_peer

POLL = 200e-6
STEP = 10e-6


class Traffic:
    """What comes when, on a clock that stands still while the event loop sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.turns = 0
        self.in_threads = False
        self.poll = Polling(
            POLL, rests=lambda: self.in_threads, clock=lambda: self.now, pause=self._turn
        )

    def _turn(self) -> None:
        self.now += STEP
        self.turns += 1

    async def comes(self, source: int, after: float) -> float:
        """Something, so many seconds after the last; how long the loop turns from then on."""
        self.now += after
        self.poll.happened(source)
        begun = self.now
        turns = -1
        while turns != self.turns:
            turns = self.turns
            await asyncio.sleep(0)  # the first turn is that of the work itself
            await asyncio.sleep(0)
        return self.now - begun


@pytest.mark.parametrize("source", [REQUEST, REPLY, WEBSOCKET])
async def test_it_looks_where_something_followed_soon(source: int) -> None:
    traffic = Traffic()
    assert await traffic.comes(source, 1.0) == 0
    # it did not look, so all of this time has passed asleep
    assert await traffic.comes(source, POLL) == pytest.approx(POLL, abs=2 * STEP)
    # and it goes on as long as something comes
    assert await traffic.comes(source, 0.0) == pytest.approx(POLL, abs=2 * STEP)
    assert await traffic.comes(source, 1.0) == 0
    assert await traffic.comes(source, 1.0) == 0


async def test_each_source_is_judged_by_what_followed_it() -> None:
    """Replies come soon after requests, and requests long after replies."""
    traffic = Traffic()
    for turn in range(5):
        looked = await traffic.comes(REQUEST, 1.0)
        assert (looked > 0) == (turn > 0)
        assert await traffic.comes(REPLY, POLL / 4) == 0


async def test_who_is_too_far_away_costs_nothing() -> None:
    traffic = Traffic()
    for _ in range(3):
        await traffic.comes(REQUEST, 2 * POLL)
        await traffic.comes(REPLY, 2 * POLL)
    assert traffic.turns == 0


async def test_it_sleeps_while_threads_work() -> None:
    traffic = Traffic()
    await traffic.comes(REQUEST, 1.0)
    assert await traffic.comes(REQUEST, 0.0) > 0
    traffic.in_threads = True
    assert await traffic.comes(REQUEST, 0.0) == 0
    traffic.in_threads = False
    assert await traffic.comes(REQUEST, 0.0) > 0


async def test_what_comes_while_it_looks_is_one_look() -> None:
    traffic = Traffic()
    for _ in range(100):
        traffic.poll.happened(REQUEST)
    assert await traffic.comes(REQUEST, 0.0) == pytest.approx(POLL, abs=2 * STEP)
    assert traffic.turns <= POLL / STEP + 1


def test_the_option(tmp_path: Path) -> None:
    for microseconds, kind in ((0, Poll), (200, Polling)):
        config = BroadcasterConfig(db=f"sqlite:///{tmp_path}/b.db", idle_poll=microseconds)
        app = make(Settings(config, None, 1, "info"), lambda: None).config.app
        assert isinstance(app, App)
        assert type(app.broadcaster.sender.poll) is kind


class Told(Poll):
    def __init__(self) -> None:
        self.sources: list[int] = []

    def happened(self, source: int) -> None:
        self.sources.append(source)


async def test_who_tells_it() -> None:
    told, config = Told(), BroadcasterConfig(db="sqlite://")
    broadcaster = Broadcaster(config)
    broadcaster.sender.poll = told
    protocols = {
        "http": http_protocol(config, broadcaster.routes.table, told),
        "ws": websocket_protocol(told),
    }
    async with serve(App(broadcaster), **protocols) as url, Subscriber() as subscriber:
        await broadcaster.store.subscribe(Kind.EXACT, b"t", subscriber.url, None)
        request = Peer().notify(b"t", b"x")
        answer = await exchange(int(url.rpartition(":")[2]), request.bytes())
        assert Peer().count(answer, request) == 1
        assert told.sources == [REQUEST, REPLY]
        async with websocket_peer(url) as peer:
            told.sources.clear()
            assert await peer.notify(b"nobody wants it", b"x") == 0
            assert told.sources == [WEBSOCKET]
