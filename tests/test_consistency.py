"""Everything at once, while processes and databases are killed at random; see `checker`.

The seed is printed with the verdict. LONELYPS_CHECK_SECONDS=600 LONELYPS_CHECK_SEED=7 makes the
runs longer, and the faults of the same kinds in the same order.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from pathlib import Path

import postgres
from checker import Expectation, check
from fleets import Fleet, running
from lonelypss.config import BroadcasterConfig
from lonelypss.store import Store
from lonelypss.store.choose import make_store
from postgres import Postgres
from programs import eventually, is_alive, workers
from workload import Workload

SECONDS = float(os.environ.get("LONELYPS_CHECK_SECONDS", "4"))
SEED = int(os.environ.get("LONELYPS_CHECK_SEED", random.SystemRandom().randrange(10_000)))
OPTIONS = ("--outgoing-http-timeout-sock-read=1", "--missed-max-retries=100000", "--grace=3")

STARTED = "SELECT pg_postmaster_start_time()"

DATABASE_FAULTS = {"locked", "restart -m immediate", "restart -m fast"}

Fault = Callable[[], Awaitable[object]]
"""Does its work until it is over; what proves that it happened."""


class Nemesis:
    """One fault after another, each kind at least once."""

    def __init__(self, workload: Workload, faults: dict[str, Fault], seed: int) -> None:
        self.workload = workload
        self.faults = faults
        self.random = random.Random(seed)

    async def run(self, seconds: float) -> None:
        history = self.workload.history
        ends = time.monotonic() + seconds
        deck: list[str] = []
        while time.monotonic() < ends or deck:
            deck = deck or self.random.sample(sorted(self.faults), len(self.faults))
            name = deck.pop()
            history.add("nemesis", "invoke", name)
            seen = await self.faults[name]()
            history.add("nemesis", "ok", name, seen)
            history.add("nemesis", "ok", "healed", name)
            await self.workload.probe()
            # what failed without a database is written down within a second, and must not be lost
            # with the process before that
            await asyncio.sleep(self.random.random() * 0.3 + 1.5 * (name in DATABASE_FAULTS))

    async def subscribers(self, mood: str) -> object:
        """All subscribers behave like that for a while."""
        self.workload.mood = mood
        await asyncio.sleep(0.5)
        self.workload.mood = "mixed"
        return mood


async def ended(fleet: Fleet, port: int, signum: signal.Signals) -> object:
    """One broadcaster ends, with all its processes, and is started again; its exit status."""
    program = fleet.programs.pop(port)
    family = [program.process.pid, *(workers(program.process.pid) if fleet.workers > 1 else [])]
    for pid in family if signum == signal.SIGKILL else family[:1]:
        os.kill(pid, signum)
    status = await asyncio.to_thread(program.process.wait, 40)
    assert status == (-signum if signum == signal.SIGKILL else 0)
    await asyncio.to_thread(eventually, lambda: not any(map(is_alive, family)))
    await fleet.start(port)
    return program.process.pid, status


async def worker_killed(fleet: Fleet) -> object:
    """One of the workers; its place is taken by another."""
    (program,) = fleet.programs.values()
    victim = workers(program.process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    await asyncio.to_thread(program.line, f"worker {victim} ended with status -9")
    return victim


async def file_locked(path: Path, seconds: float) -> object:
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as db:
        while not db.in_transaction:
            with suppress(sqlite3.OperationalError):
                db.execute("BEGIN IMMEDIATE")
            await asyncio.sleep(0.001)
        await asyncio.sleep(seconds)
        db.execute("ROLLBACK")
    return f"locked for {seconds:.1f} s"


async def server_restarted(server: Postgres, signum: signal.Signals) -> object:
    before = server.sql(STARTED)
    await asyncio.to_thread(server.stop, signum)
    await asyncio.to_thread(server.start)
    return server.sql(STARTED) != before


async def judge(
    fleet: Fleet, store: Store, faults: Callable[[Nemesis], dict[str, Fault]], directory: Path
) -> None:
    workload = Workload(fleet.ports, fleet.peer, SEED)
    nemesis = Nemesis(workload, {}, SEED)
    nemesis.faults = {
        **faults(nemesis),
        "subscribers away": lambda: nemesis.subscribers("away"),
        "subscribers cut off": lambda: nemesis.subscribers("cut off"),
    }
    async with workload.listening(), asyncio.timeout(SECONDS * 3 + 90):
        async with workload.running():
            await nemesis.run(SECONDS)
        workload.mood = "good"
        await store.open()
        try:
            await workload.finish(store)
        finally:
            await store.close()
    verdict = check(
        workload.history,
        Expectation(faults=frozenset(nemesis.faults), missed=1, recovery=15.0),
    )
    workload.history.write(directory / "history.jsonl")
    print(f"seed {SEED}: {verdict}")
    assert verdict.passed, f"seed {SEED}: {verdict}\n{directory / 'history.jsonl'}"


async def test_two_workers_on_sqlite(tmp_path: Path) -> None:
    async with running(tmp_path, "sqlite", 2, 1, *OPTIONS) as fleet:
        (port,) = fleet.ports
        file = tmp_path / "one.db"
        await judge(
            fleet,
            make_store(BroadcasterConfig(db=f"sqlite:///{file}")),
            lambda nemesis: {
                "kill -9 of a worker": lambda: worker_killed(fleet),
                "kill -9 of all": lambda: ended(fleet, port, signal.SIGKILL),
                "SIGTERM": lambda: ended(fleet, port, signal.SIGTERM),
                "locked": lambda: file_locked(file, nemesis.random.random() * 2),
            },
            tmp_path,
        )


async def test_two_broadcasters_on_postgres(tmp_path: Path) -> None:
    with postgres.server() as server:
        url = server.database()
        async with running(tmp_path, url, 1, 2, *OPTIONS) as fleet:

            def either(nemesis: Nemesis, signum: signal.Signals) -> Awaitable[object]:
                return ended(fleet, nemesis.random.choice(fleet.ports), signum)

            await judge(
                fleet,
                make_store(BroadcasterConfig(db=url)),
                lambda nemesis: {
                    "kill -9": lambda: either(nemesis, signal.SIGKILL),
                    "SIGTERM": lambda: either(nemesis, signal.SIGTERM),
                    "restart -m immediate": lambda: server_restarted(server, signal.SIGQUIT),
                    "restart -m fast": lambda: server_restarted(server, signal.SIGINT),
                },
                tmp_path,
            )
