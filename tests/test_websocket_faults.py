"""Connections that break at the worst moment: nothing is lost without a word, nothing is left over.

What a broadcaster that is killed does to its clients is in test_fleet.py, frames that break the
rules in broadcaster/test_websocket.py.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lonelypsc import ws_client
from lonelypsc.client import PubSubClient, PubSubClientConnectionStatus
from lonelypsc.config.ws_config import make_websocket_pub_sub_config
from lonelypsc.ws_client import WebsocketPubSubClient
from lonelypss.config import BroadcasterConfig
from proxies import Proxy, proxy
from servers import Running, our_broadcaster, read_auth
from waiting import until

DEADLINE = 30.0
LARGE = bytes(range(256)) * 40_000  # 10 MB: three parts
MIDDLE = 5_000_000


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ws_client, "_RECONNECT_SPREAD", 0.0)


@asynccontextmanager
async def client_of(url: str, **settings: Any) -> AsyncIterator[PubSubClient]:
    defaults = {"outgoing_min_reconnect_interval": 0.0, "allow_compression": False}
    config = make_websocket_pub_sub_config(
        broadcasters=[{"host": url.replace("http", "ws", 1)}],
        auth=read_auth(None),
        **(defaults | settings),
    )
    async with WebsocketPubSubClient(config) as client:
        yield client


@asynccontextmanager
async def behind_a_proxy() -> AsyncIterator[tuple[Running, Proxy]]:
    config = BroadcasterConfig(db="sqlite://", message_body_spool_size=1_000_000)
    async with asyncio.timeout(DEADLINE), our_broadcaster(config) as ours:
        async with proxy(ours.url) as between:
            yield ours, between


class Gaps:
    def __init__(self) -> None:
        self.count = 0

    async def __call__(self) -> None:
        self.count += 1


async def test_cut_in_the_middle_of_a_message_that_is_sent(tmp_path: Path) -> None:
    """It is sent again from its beginning, a file too, and arrives once."""
    path = tmp_path / "large"
    path.write_bytes(LARGE)
    async with behind_a_proxy() as (ours, between):
        async with (
            client_of(ours.url) as receiver,
            client_of(between.url()) as sender,
            receiver.subscribe_exact(b"t") as subscription,
        ):
            messages = await subscription.messages()
            with path.open("rb") as file:
                for source in ({"data": LARGE}, {"sync_file": file}):
                    sent: dict[str, Any] = dict(source)
                    between.cut_up = MIDDLE
                    connections = between.connections
                    assert (await sender.notify(topic=b"t", **sent)).notified == 1
                    assert (await anext(messages)).data.read() == LARGE
                    assert between.connections > connections
            assert (await sender.notify(topic=b"t", data=b"last")).notified == 1
            assert (await anext(messages)).data.read() == b"last"
        await until(lambda: ours.broadcaster.intake.used == 0)


async def test_cut_in_the_middle_of_a_message_that_is_received() -> None:
    """The program learns of the gap, and never sees a part of it."""
    gaps = Gaps()
    async with behind_a_proxy() as (ours, between):
        async with (
            client_of(ours.url) as sender,
            client_of(between.url()) as receiver,
            receiver.subscribe_exact(b"t", on_receiving=gaps) as subscription,
        ):
            messages = await subscription.messages()
            between.cut_down = MIDDLE
            assert (await sender.notify(topic=b"t", data=LARGE)).notified == 1
            reading = asyncio.create_task(anext(messages))
            await until(lambda: gaps.count == 2)
            assert (await sender.notify(topic=b"t", data=b"next")).notified == 1
            assert (await reading).data.read() == b"next"
        await until(lambda: ours.broadcaster.intake.used == 0)


async def test_a_connection_that_says_nothing_is_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither end hears of it: the heartbeat does."""
    gaps = Gaps()
    async with behind_a_proxy() as (ours, between):
        async with (
            client_of(ours.url) as sender,
            client_of(between.url(), websocket_heartbeat_interval=0.2) as receiver,
            receiver.subscribe_exact(b"t", on_receiving=gaps) as subscription,
        ):
            waiting = asyncio.create_task(anext(await subscription.messages()))
            await until(lambda: gaps.count == 1)
            between.freeze()
            started = asyncio.get_running_loop().time()
            await until(lambda: receiver.connection_status is PubSubClientConnectionStatus.LOST)
            assert asyncio.get_running_loop().time() - started < 5
            between.freeze(up=False, down=False)
            await until(lambda: gaps.count == 2)
            assert (await sender.notify(topic=b"t", data=b"back")).notified >= 1
            assert (await waiting).data.read() == b"back"
    assert "silent" in caplog.text


async def test_cuts_at_random_lose_nothing_without_a_word() -> None:
    """What was confirmed has arrived at whoever had no gap, and twice only if it was sent twice."""
    chance = random.Random(7)
    gaps = Gaps()
    async with behind_a_proxy() as (ours, between):
        async with (
            client_of(ours.url) as steady,
            client_of(between.url()) as shaken,
            steady.subscribe_exact(b"t") as first,
            shaken.subscribe_exact(b"t", on_receiving=gaps) as second,
        ):
            got: list[Counter[bytes]] = [Counter(), Counter()]

            async def read(number: int, messages: Any) -> None:
                async for message in messages:
                    got[number][message.data.read()] += 1

            readers = [
                asyncio.create_task(read(n, await s.messages()))
                for n, s in enumerate((first, second))
            ]
            sent: list[bytes] = []
            cuts = 0

            async def publish(number: int) -> None:
                for turn in range(60):
                    data = b"%d/%d" % (number, turn)
                    await shaken.notify(topic=b"t", data=data)
                    sent.append(data)

            async def cut() -> None:
                nonlocal cuts
                while len(sent) < 240:
                    before = len(sent)
                    between.cut_up = chance.randrange(500, 20_000)
                    between.cut_down = chance.randrange(500, 20_000)
                    await until(lambda: len(sent) > before + 5 or len(sent) >= 240)  # noqa: B023
                    between.cut()
                    cuts += 1

            await asyncio.gather(cut(), *(publish(number) for number in range(4)))
            between.cut_up = between.cut_down = float("inf")
            while not all(g[b"last"] for g in got):
                await steady.notify(topic=b"t", data=b"last")
                await asyncio.sleep(0.01)
            for reader in readers:
                reader.cancel()
            assert cuts > 5
            assert set(sent) <= got[0].keys()
            assert gaps.count > 1
            assert sum(got[0][data] > 1 for data in sent) <= 4 * (between.connections + 1)


async def test_two_hundred_reconnects_leave_nothing_behind() -> None:
    async with behind_a_proxy() as (ours, between):
        async with client_of(between.url()) as client:
            async with client.subscribe(exact=[b"t"], glob=["g/*"]) as subscription:
                messages = await subscription.messages()

                async def reconnect(times: int) -> None:
                    for _ in range(times):
                        before = between.connections
                        between.cut()
                        await until(lambda: between.connections > before)  # noqa: B023
                        while not (await client.notify(topic=b"t", data=b"x")).notified:
                            await asyncio.sleep(0)
                        (await anext(messages)).data.read()

                await reconnect(20)
                before = left_over()
                await reconnect(180)
                assert between.connections >= 200
                await until(lambda: len(ours.broadcaster.websockets.connections) == 1)
                tasks, files, objects = left_over()
                assert (tasks, files) <= (before[0] + 3, before[1] + 3)
                assert objects < before[2] * 1.1 + 2000


def left_over() -> tuple[int, int, int]:
    gc.collect()
    return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd")), len(gc.get_objects())
