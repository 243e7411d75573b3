"""The same suite on every database, with one process, two workers, and two broadcasters."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import postgres
from fleets import DATABASES, DEADLINE, Fleet, Receiver, running
from lonelypsc.client import PubSubClient
from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.http_client import HttpPubSubClient
from programs import command, free_port, started, workers


@pytest.fixture(params=[(1, 1), (2, 1), (1, 2)], ids=["1-process", "2-workers", "2-broadcasters"])
async def fleet(
    request: pytest.FixtureRequest, database: str, tmp_path: Path
) -> AsyncIterator[Fleet]:
    workers, number = request.param
    async with running(tmp_path, database, workers, number) as fleet:
        yield fleet


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest) -> str:
    return request.param


async def test_everybody_gets_everything_once(fleet: Fleet) -> None:
    """Whichever broadcaster a message is sent to, and however it is subscribed to."""
    async with AsyncExitStack() as stack:
        receivers = []
        for kind in ("http", "websocket"):
            for url in fleet.urls * 2:
                receiver = Receiver(fleet.client(kind, url), exact=[b"a/b"], glob=["a/*", "**"])
                receivers.append(await stack.enter_async_context(receiver.listening()))
        sent = []
        for n in range(10):
            for number, sender in enumerate(receivers):
                sent.append(b"%d from %d" % (n, number))
                result = await sender.client.notify(topic=b"a/b", data=sent[-1])
                assert result.notified == len(receivers)
        for receiver in receivers:
            await receiver.until(lambda receiver=receiver: len(receiver.got) == len(sent))
            assert receiver.got == Counter(sent)


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_what_was_answered_counts_at_every_broadcaster(fleet: Fleet, kind: str) -> None:
    async with AsyncExitStack() as stack:
        subscriber = await stack.enter_async_context(fleet.client(kind, fleet.urls[0]))
        publishers = [
            await stack.enter_async_context(fleet.client("http", url)) for url in fleet.urls[::-1]
        ]
        for turn in range(12):
            topic, publisher = b"t/%d" % turn, publishers[turn % len(publishers)]
            wanted: Any = {"exact": [topic]} if turn % 2 else {"glob": [f"t/{turn}"]}
            async with subscriber.subscribe(**wanted):
                assert (await publisher.notify(topic=topic, data=b"x")).notified == 1
            assert (await publisher.notify(topic=topic, data=b"x")).notified == 0


async def test_a_subscriber_that_was_away_hears_of_it(fleet: Fleet) -> None:
    port = free_port()

    def client() -> PubSubClient:
        return HttpPubSubClient(
            make_http_pub_sub_config(
                bind={"type": "uvicorn", "host": "127.0.0.1", "port": port},
                host=f"http://127.0.0.1:{port}",
                broadcasters=[{"host": url} for url in fleet.urls],
                auth=AuthConfigFromParts(
                    *get_auth_config_from_file(fleet.directory / "subscriber-secrets.json")
                ),
            )
        )

    async with fleet.client("websocket") as publisher:
        listen = command(
            "lonelypsc", "listen", "--exact=t", f"--bind=127.0.0.1:{port}",
            *(f"--broadcaster={url}" for url in fleet.urls),
        )  # fmt: skip
        with started(listen, fleet.directory) as program:
            await asyncio.to_thread(program.line, "listening")
            program.process.kill()  # without a word, so that its subscription stays
        assert (await publisher.notify(topic=b"t", data=b"missed")).notified == 0
        async with Receiver(client(), exact=[b"t"]).listening() as receiver, fleet.store() as store:
            # by a notice, or by its start when the notice came before that
            await receiver.until(lambda: receiver.gaps >= 1)
            async with asyncio.timeout(DEADLINE):
                while (await store.counts())["missed"]:
                    await asyncio.sleep(0.05)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
async def test_two_broadcasters_restarted_under_load(
    database: str, signum: signal.Signals, tmp_path: Path
) -> None:
    """No notify fails, no subscription is lost, and nobody misses anything without being told."""
    async with running(tmp_path, database, 1, 2) as fleet, AsyncExitStack() as stack:
        receivers = {
            kind: await stack.enter_async_context(
                Receiver(fleet.client(kind), exact=[b"t"], glob=["t*"]).listening()
            )
            for kind in ("http", "websocket")
        }
        publishers = [
            await stack.enter_async_context(fleet.client(kind)) for kind in ("http", "websocket")
        ]
        sent: list[bytes] = []
        stopping = False

        async def publish(number: int, client: PubSubClient) -> None:
            turn = 0
            while not stopping:
                turn += 1
                data = b"%d/%d" % (number, turn)
                await client.notify(topic=b"t", data=data)
                sent.append(data)

        async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as group:
            for number, client in enumerate(publishers * 2):
                group.create_task(publish(number, client))
            for port in fleet.ports:
                await passed(sent)
                program = fleet.programs.pop(port)
                os.kill(program.process.pid, signum)
                status = await asyncio.to_thread(program.process.wait, DEADLINE)
                assert status == (0 if signum == signal.SIGTERM else -signal.SIGKILL)
                await passed(sent)
                await fleet.start(port)
            await passed(sent)
            stopping = True
        # whatever was in somebody's hands has arrived before this one
        for client in publishers:
            last = b"last %d" % id(client)
            while (await client.notify(topic=b"t", data=last)).notified < 2:
                await asyncio.sleep(0.05)
            for receiver in receivers.values():
                await receiver.until(lambda r=receiver, last=last: r.got[last] > 0)
        for kind, receiver in receivers.items():
            missing = set(sent) - receiver.got.keys()
            assert not missing or receiver.gaps > 1, (kind, len(missing))
        if signum == signal.SIGTERM:
            assert not set(sent) - receivers["http"].got.keys()
        counts = {kind: (len(r.got), r.gaps - 1) for kind, r in receivers.items()}
        print(f"sent {len(sent)}, failed 0, received and gaps: {counts}")


async def test_a_worker_is_killed_under_load(database: str, tmp_path: Path) -> None:
    """The others go on, it is replaced, and who was connected to it is told."""
    async with running(tmp_path, database, 2, 1) as fleet, AsyncExitStack() as stack:
        (program,) = fleet.programs.values()
        receivers = {
            f"{kind} {n}": await stack.enter_async_context(
                Receiver(fleet.client(kind), exact=[b"t"]).listening()
            )
            for kind in ("http", "websocket")
            for n in range(3)
        }
        publisher = await stack.enter_async_context(fleet.client("http"))
        sent: list[bytes] = []
        stopping = False

        async def publish(number: int) -> None:
            while not stopping:
                sent.append(b"%d/%d" % (number, len(sent)))
                await publisher.notify(topic=b"t", data=sent[-1])

        async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(publish(number))
            await passed(sent, 30)
            victim = workers(program.process.pid)[0]
            os.kill(victim, signal.SIGKILL)
            await asyncio.to_thread(program.line, f"worker {victim} ended with status -9")
            while len(now := workers(program.process.pid)) < 2 or victim in now:
                await asyncio.sleep(0.05)
            await passed(sent, 30)
            stopping = True
        async with asyncio.timeout(DEADLINE):
            while (await publisher.notify(topic=b"t", data=b"last")).notified < len(receivers):
                await asyncio.sleep(0.05)
        for kind, receiver in receivers.items():
            await receiver.until(lambda r=receiver: r.got[b"last"] > 0)
            missing = set(sent) - receiver.got.keys()
            assert not missing or ("websocket" in kind and receiver.gaps > 1), (kind, len(missing))


async def test_a_worker_that_cannot_start_yet_is_tried_again(tmp_path: Path) -> None:
    """Others are up and will not end with it: the database may be away for a while."""
    with postgres.server() as server:
        async with running(tmp_path, server.database(), 2, 1) as fleet:
            (program,) = fleet.programs.values()
            for _ in range(2):
                await asyncio.to_thread(program.line, "other broadcasters reach the websockets")
            victim = workers(program.process.pid)[0]
            await asyncio.to_thread(server.stop)
            os.kill(victim, signal.SIGKILL)
            await asyncio.to_thread(program.line, "ended with status 75; starting another")
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(program.line, "other broadcasters reach the websockets")
            async with fleet.client("http") as client:
                assert (await client.notify(topic=b"t", data=b"x")).notified == 0


async def passed(sent: list[bytes], number: int = 100) -> None:
    """Returns when so many more were sent."""
    wanted = len(sent) + number
    while len(sent) < wanted:
        await asyncio.sleep(0.01)
