"""Websockets of several processes on one database file: everybody gets everything, once."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from broadcaster.websocket_peer import Peer, websocket_peer
from programs import command, started
from waiting import until

LEASE = 3.0


@asynccontextmanager
async def serving(directory: Path, *arguments: str) -> AsyncIterator[Any]:
    """`lonelypss serve` on the database file in `directory`; the program and its url."""
    argv = command(
        "lonelypss", "serve", "--port=0", "--db=sqlite:///one.db", f"--peer-lease={LEASE}",
        *arguments,
    )  # fmt: skip
    with started(argv, directory) as program:
        line = await asyncio.to_thread(program.line, "lonelypss listens on")
        url = next(word for word in line.split() if word.startswith("http://127.0.0.1:"))
        yield program, url.rstrip(".,")
        if program.process.poll() is None:
            assert await asyncio.to_thread(program.stop) == 0


def urls(directory: Path) -> set[str]:
    with sqlite3.connect(directory / "one.db") as db:
        return {url for (url,) in db.execute("SELECT DISTINCT url FROM subscriptions")}


async def everybody_gets_everything(peers: list[Peer], rounds: int) -> None:
    """Each of `peers` notifies, and each receives that exactly once."""
    expected = []
    for n in range(rounds):
        for sender in peers:
            expected.append((b"t", b"%d %d" % (n, id(sender))))
            assert await sender.notify(*expected[-1]) == len(peers)
    for peer in peers:
        # a last one shows that no copies are left
        assert sorted([await peer.message() for _ in expected]) == sorted(expected)
    assert await peers[0].notify(b"t", b"last") == len(peers)
    for peer in peers:
        assert await peer.message() == (b"t", b"last")


async def test_two_broadcasters_on_one_file(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        peers = []
        for _ in range(2):
            _, url = await stack.enter_async_context(serving(tmp_path))
            for _ in range(2):
                peer = await stack.enter_async_context(websocket_peer(url))
                await peer.subscribe(b"t", globs=("*", "**"))
                peers.append(peer)
        assert len(urls(tmp_path)) == 2
        await everybody_gets_everything(peers, 20)


async def test_two_workers_of_one_broadcaster(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        _, url = await stack.enter_async_context(serving(tmp_path, "--workers=2"))
        peers: list[Peer] = []
        while len(peers) < 2 or len(urls(tmp_path)) < 2:
            assert len(peers) < 200, "all connections land in one worker"
            peer = await stack.enter_async_context(websocket_peer(url))
            await peer.subscribe(b"t", globs=("*",))
            peers.append(peer)
        await everybody_gets_everything(peers, 5)


async def test_a_killed_broadcaster_leaves_nothing_for_long(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        _, url = await stack.enter_async_context(serving(tmp_path))
        doomed, doomed_url = await stack.enter_async_context(serving(tmp_path))
        survivor = await stack.enter_async_context(websocket_peer(url))
        victim = await stack.enter_async_context(websocket_peer(doomed_url))
        for peer in (survivor, victim):
            await peer.subscribe(b"t")
        assert await survivor.notify(b"t", b"to both") == 2
        os.kill(doomed.process.pid, signal.SIGKILL)
        assert await survivor.notify(b"t", b"to one") == 1
        await until(lambda: len(urls(tmp_path)) == 1)
        assert [await survivor.message() for _ in range(2)] == [
            (b"t", b"to both"),
            (b"t", b"to one"),
        ]
        assert (await victim.closed()).code == 1006


async def test_a_stopped_broadcaster_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as (program, url), websocket_peer(url) as peer:
        await peer.subscribe(b"t")
        assert len(urls(tmp_path)) == 1
        assert await asyncio.to_thread(program.stop) == 0
        assert urls(tmp_path) == set()
        assert (await peer.closed()).code == 1012
