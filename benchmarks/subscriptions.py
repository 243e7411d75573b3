"""A million subscriptions: what each costs, from 100 to 1,000,000, on SQLite and PostgreSQL.

    .venv/bin/python benchmarks/subscriptions.py [--quick] [--only sqlite] [--write]

Each row of a table is a process of its own on a database that was filled before. Microseconds are
processor time of the thread with the event loop, and the median of many calls, so that other work
on the machine changes them little; what waits for a disk or a server is also given as time that
passed. PostgreSQL comes from tests/postgres.py, with fsync on.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import report

from lonelypsp.globs import GlobIndex
from lonelypss import collector
from lonelypss.store import Kind, Store
from lonelypss.store.postgres import PostgresStore
from lonelypss.store.sqlite import SqliteStore

sys.path.insert(0, str(report.HERE.parent / "tests"))

EXACT = (100, 1_000, 10_000, 100_000, 1_000_000)
GLOBS = (100, 1_000, 10_000, 100_000, 1_000_000)
CROWDS = (1, 10, 100, 1_000, 9_999, 100_000)
WORST = (10, 100, 1_000, 10_000)
URLS = 5_000
SET = 10_000
REPEATS = 200
DATABASES = ("sqlite", "postgres")
CROWD = b"crowd"


def url(number: int) -> str:
    return f"http://10.0.{number % URLS // 250}.{number % 250}:3002/v1/receive"


def recovery(number: int) -> str:
    return url(number).replace("receive", "missed")


def topic(number: int) -> bytes:
    return b"orders/%d/status" % number


def glob(number: int) -> str:
    """As programs use them: most differ in one segment, the rest is much the same."""
    n = number // 5
    return (
        f"tenant/{n}/orders/*",
        f"tenant/{n}/**",
        f"logs/host-{n}/*/error",
        f"metrics/*/cpu-{n}",
        f"app-{n}-*/events",
    )[number % 5]


def topic_of_glob(number: int) -> bytes:
    n = number // 5
    return (
        f"tenant/{n}/orders/7",
        f"tenant/{n}/invoices/7/paid",
        f"logs/host-{n}/nginx/error",
        f"metrics/host/cpu-{n}",
        f"app-{n}-blue/events",
    )[number % 5].encode()


# Filling


Rows = Iterator[tuple[int, bytes, str, str]]


def rows(exact: int, globs: int, crowd: int) -> Rows:
    for n in range(exact):
        yield Kind.EXACT, topic(n), url(n), recovery(n)
    for n in range(globs):
        yield Kind.GLOB, glob(n).encode(), url(n), recovery(n)
    for n in range(crowd):
        yield Kind.EXACT, CROWD, f"http://h{n}/receive", f"http://h{n}/missed"


async def fill(db: str, found: Rows) -> None:
    store = make(db)
    await store.open()  # makes the tables
    await store.close()
    if not db.startswith("postgres"):
        with sqlite3.connect(db) as connection:
            connection.execute("PRAGMA cache_size = -500000")
            connection.executemany(
                "INSERT INTO subscriptions (kind, pattern, url, recovery) VALUES (?, ?, ?, ?)",
                found,
            )
        connection.close()
        return
    import asyncpg

    connection = await asyncpg.connect(db)
    try:
        await connection.copy_records_to_table(
            "lonelyps_subscriptions",
            records=((k, p, u.encode(), r.encode()) for k, p, u, r in found),
            columns=("kind", "pattern", "url", "recovery"),
        )
        await connection.execute("VACUUM ANALYZE")
    finally:
        await connection.close()


def make(db: str) -> Store:
    return PostgresStore(db, timeout=60.0) if db.startswith("postgres") else SqliteStore(db)


# Measuring


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Steps:
    """The longest step of the event loop, in processor time: for so long nobody else is served."""

    def __init__(self) -> None:
        self.longest = 0.0
        run = asyncio.events.Handle._run

        def timed(handle: asyncio.events.Handle) -> None:
            before = time.thread_time()
            run(handle)
            self.longest = max(self.longest, time.thread_time() - before)

        asyncio.events.Handle._run = timed  # type: ignore[method-assign]

    async def begin(self) -> None:
        """Leaves out what was before, this step included."""
        await asyncio.sleep(0)
        self.longest = 0.0

    def take(self) -> float:
        longest, self.longest = self.longest, 0.0
        return longest


async def timed(call: Callable[[int], Awaitable[Any]], times: int = REPEATS) -> tuple[float, float]:
    """Medians of the time that passed and of the processor time of the event loop's thread."""
    passed, used = [], []
    for n in range(times):
        clock, cpu = time.perf_counter(), time.thread_time()
        await call(n)
        used.append(time.thread_time() - cpu)
        passed.append(time.perf_counter() - clock)
    return median(passed), median(used)


def each(call: Callable[[Any], Any], items: Sequence[Any], rounds: int = 7) -> float:
    """Processor time for one item, the best of some rounds."""
    best = math.inf
    for _ in range(rounds):
        before = time.thread_time()
        for item in items:
            call(item)
        best = min(best, time.thread_time() - before)
    return best / len(items)


async def opened(db: str, steps: Steps) -> tuple[Store, dict[str, float]]:
    """A store, opened as `lonelypss serve` does, which keeps what exists then from the garbage
    collector."""
    store = make(db)
    gc.collect()
    before, clock, cpu = rss(), time.perf_counter(), time.process_time()
    with collector.taken_over():
        await store.open()
        found = {"open": time.perf_counter() - clock, "open cpu": time.process_time() - cpu}
    await steps.begin()
    return store, {**found, "memory": rss() - before}


async def measure_exact(db: str, count: int) -> dict[str, float]:
    steps = Steps()
    store, found = await opened(db, steps)
    chosen = random.Random(1)
    try:

        async def match(_: int) -> None:
            assert await store.match(topic(chosen.randrange(count)))

        await timed(match, 20)
        found["match"], found["match cpu"] = await timed(match, 2_000)
        new, mine = topic(-1), "http://mine/receive"

        async def both(n: int) -> None:
            await store.subscribe(Kind.EXACT, new + b"%d" % n, mine, None)
            await store.unsubscribe(Kind.EXACT, new + b"%d" % n, mine)

        passed, cpu = await timed(both)
        found["subscribe"], found["subscribe cpu"] = passed / 2, cpu / 2
        lists = [[(b"set/%d/%d" % (n, m), mine) for m in range(SET)] for n in range(3)]
        await steps.begin()
        news, replacements = [], []
        cpu = time.process_time()
        for n in range(6):
            clock = time.perf_counter()
            await store.set_subscriptions(mine, lists[n % 3], [])
            (news if n % 2 == 0 else replacements).append(time.perf_counter() - clock)
            if n % 2:
                await store.set_subscriptions(mine, [], [])
        found["set cpu"] = (time.process_time() - cpu) / 6
        found["set"], found["replace"] = median(news), median(replacements)
        await store.set_subscriptions(mine, lists[2], [])
        found["set again"], _ = await timed(
            lambda _: store.set_subscriptions(mine, lists[2], []), 3
        )
        found["read"], _ = await timed(lambda _: store.subscriptions(mine), 3)
        await store.set_subscriptions(mine, [], [])
        found["step"] = steps.take()
        if not db.startswith("postgres"):
            found["file"] = Path(db).stat().st_size
    finally:
        await store.close()
    return found


async def measure_glob(db: str, count: int) -> dict[str, float]:
    steps = Steps()
    store, found = await opened(db, steps)
    chosen = random.Random(1)
    globs = store._globs  # type: ignore[attr-defined]
    try:
        topics = [topic_of_glob(chosen.randrange(count)) for _ in range(1_000)]
        found["match"] = each(globs.match, topics)
        found["miss"] = each(globs.match, [b"none/of/%d/them" % n for n in range(1_000)])
        refreshes = []
        mine = "http://mine/receive"
        await steps.begin()
        for n in range(50):
            await store.subscribe(Kind.GLOB, b"new/%d/*" % n, mine, None)
            cpu = time.thread_time()
            assert await store.match(b"new/%d/x" % n)
            refreshes.append(time.thread_time() - cpu)
        found["refresh"] = median(refreshes)
        await store.set_subscriptions(mine, [], [])
        found["step"] = steps.take()
        # as after more than 10,000 changes at once by another broadcaster
        globs._globs.version = -1
        clock = time.perf_counter()
        await store.match(b"none")
        found["reread"] = time.perf_counter() - clock
        await globs._emptying
        found["reread step"] = steps.take()
    finally:
        await store.close()
    index: GlobIndex[int] = GlobIndex()
    patterns = [glob(n) for n in range(count)]
    cpu = time.thread_time()
    for n, pattern in enumerate(patterns):
        index.add(pattern, n)
    found["build"] = time.thread_time() - cpu
    added = [f"tenant/{n}/added/*" for n in range(1_000)]
    cpu = time.thread_time()
    for pattern in added:
        index.add(pattern, -1)
    found["add"] = (time.thread_time() - cpu) / len(added)
    cpu = time.thread_time()
    for pattern in added:
        index.remove(pattern, -1)
    found["remove"] = (time.thread_time() - cpu) / len(added)
    return found


async def measure_crowd(db: str, count: int) -> dict[str, float]:
    steps = Steps()
    store, _ = await opened(db, steps)
    try:

        async def match(_: int) -> None:
            store._found = {}  # type: ignore[attr-defined]  # what SQLite would remember
            assert len(await store.match(CROWD)) == count

        passed, cpu = await timed(match, 20)
        return {"match": passed, "match cpu": cpu, "step": steps.take()}
    finally:
        await store.close()


async def measure_worst(_: str, count: int) -> dict[str, float]:
    """Patterns that must be tried one after the other, and none of which matches."""
    index: GlobIndex[int] = GlobIndex()
    for n in range(count):
        index.add(f"*{n}x*", n)
    match = each(index.match, [b"a-topic-of-%d" % n for n in range(20)])
    return {"match": match, "each": match / count}


MEASURES: dict[str, Callable[[str, int], Awaitable[dict[str, float]]]] = {
    "exact": measure_exact,
    "glob": measure_glob,
    "crowd": measure_crowd,
    "worst": measure_worst,
}


def measured(what: str, db: str, count: int) -> dict[str, float]:
    """In a process of its own."""
    command = [sys.executable, __file__, "--measure", what, str(count)]
    environment = {**os.environ, "LONELYPSS_DB": db}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{what} {count}: {done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    print(what, db.partition(":")[0][-10:], f"{count:,}", found, file=sys.stderr, flush=True)
    return found


@contextmanager
def databases(wanted: Sequence[str]) -> Iterator[dict[str, Callable[[], str]]]:
    """How to make a new, empty one of each kind; all are gone afterwards."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        numbers = iter(range(10**6))
        kinds: dict[str, Callable[[], str]] = {}
        if "sqlite" in wanted:
            kinds["sqlite"] = lambda: str(directory / f"{next(numbers)}.db")
        if "postgres" in wanted:
            import postgres

            postgres._SETTINGS["fsync"] = "on"
            server = stack.enter_context(postgres.server())
            kinds["postgres"] = server.database
        yield kinds


def run(wanted: Sequence[str], most: int) -> dict[str, Any]:
    result: dict[str, Any] = {"worst": {n: measured("worst", "", n) for n in WORST}}
    with databases(wanted) as kinds:
        for name, new in kinds.items():
            own: dict[str, Any] = {"exact": {}, "glob": {}, "crowd": {}}
            for what, counts in (("exact", EXACT), ("glob", GLOBS), ("crowd", CROWDS)):
                for count in counts:
                    if count > most:
                        continue
                    db = new()
                    asyncio.run(
                        fill(
                            db,
                            rows(
                                **{"exact": 0, "globs": 0, "crowd": 0}
                                | {what.replace("glob", "globs"): count}
                            ),
                        )
                    )
                    own[what][count] = measured(what, db, count)
            if most >= 1_000_000:
                db = new()
                asyncio.run(fill(db, rows(1_000_000, 100_000, 0)))
                own["both"] = {
                    "exact": measured("exact", db, 1_000_000),
                    "glob": measured("glob", db, 100_000),
                }
                if name == "postgres":
                    result["explain"] = asyncio.run(explain(db))
            result[name] = own
    return result


async def explain(db: str) -> str:
    import asyncpg

    from lonelypss.store.postgres import _SQL

    connection = await asyncpg.connect(db)
    try:
        await connection.execute("SET plan_cache_mode = force_generic_plan")
        await connection.execute(f"PREPARE match (bytea[]) AS {_SQL['match']}")
        lines = await connection.fetch(
            "EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF, SUMMARY OFF)"
            " EXECUTE match (ARRAY['orders/123456/status'::bytea])"
        )
        return "\n".join(line[0] for line in lines)
    finally:
        await connection.close()


# Telling


def us(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-4 else f"{seconds * 1e6:,.0f}"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    text = [f"**{title}**", "", f"| {' | '.join(head)} |", "|--:" * len(head) + "|"]
    return "\n".join([*text, *(f"| {' | '.join(line)} |" for line in lines), ""])


NAMES = {"sqlite": "SQLite", "postgres": "PostgreSQL"}


def tables(result: Mapping[str, Any]) -> str:
    parts = []
    for db in (d for d in DATABASES if d in result):
        own, name = result[db], NAMES[db]
        both = own.get("both", {})
        with_globs = [("1,000,000 + 100,000 globs", both["exact"])] if both else []
        parts.append(
            table(
                f"Exact subscriptions, {name}",
                (
                    "subscriptions",
                    "match CPU µs",
                    "match µs",
                    "subscribe µs",
                    f"set {SET:,} ms",
                    "replace them ms",
                    "the same again ms",
                    "longest step ms",
                    "start ms",
                    "file MB",
                ),
                [
                    (
                        label,
                        us(row["match cpu"]),
                        us(row["match"]),
                        us(row["subscribe"]),
                        ms(row["set"]),
                        ms(row["replace"]),
                        ms(row["set again"]),
                        ms(row["step"]),
                        ms(row["open"]),
                        f"{row['file'] / 1e6:,.1f}" if "file" in row else "",
                    )
                    for label, row in [
                        *((f"{count:,}", row) for count, row in own["exact"].items()),
                        *with_globs,
                    ]
                ],
            )
        )
        with_exact = [("100,000 + 1,000,000 exact", both["glob"], 100_000)] if both else []
        parts.append(
            table(
                f"Globs, {name}",
                (
                    "globs",
                    "match µs",
                    "no match µs",
                    "after one change µs",
                    "add one µs",
                    "remove one µs",
                    "build all ms",
                    "start ms",
                    "start CPU ms",
                    "read all again ms",
                    "longest step then ms",
                    "longest step else ms",
                    "memory per glob, bytes",
                ),
                [
                    (
                        label,
                        us(row["match"]),
                        us(row["miss"]),
                        us(row["refresh"]),
                        us(row["add"]),
                        us(row["remove"]),
                        ms(row["build"]),
                        ms(row["open"]),
                        ms(row["open cpu"]),
                        ms(row["reread"]),
                        ms(row["reread step"]),
                        ms(row["step"]),
                        f"{row['memory'] / count:,.0f}",
                    )
                    for label, row, count in [
                        *((f"{count:,}", row, count) for count, row in own["glob"].items()),
                        *with_exact,
                    ]
                ],
            )
        )
        parts.append(
            table(
                f"One topic with many subscribers, {name}, nothing remembered",
                ("subscribers", "match CPU µs", "match µs", "longest step ms"),
                [
                    (f"{count:,}", us(row["match cpu"]), us(row["match"]), ms(row["step"]))
                    for count, row in own["crowd"].items()
                ],
            )
        )
    parts.append(
        table(
            "The worst case: n patterns that must all be tried (`*1x*`, `*2x*`, ...)",
            ("patterns", "match µs", "µs each"),
            [(f"{c:,}", us(row["match"]), us(row["each"])) for c, row in result["worst"].items()],
        )
    )
    if "explain" in result:
        parts.append(
            f"PostgreSQL, how a topic is looked up among 1,000,000:\n\n```\n{result['explain']}\n"
            "```\n"
        )
    return "\n".join(parts)


def plot(title: str, lines: Mapping[str, Mapping[int, float]], limit: float) -> str:
    """An SVG: microseconds against the number of subscriptions, both logarithmic."""
    left, top, width, height = 64, 34, 480, 260
    low, high = 1e-6, 1e-2

    def x(count: float) -> float:
        return left + width * (math.log10(count) - 2) / 4

    def y(seconds: float) -> float:
        share = math.log10(min(max(seconds, low), high) / low) / math.log10(high / low)
        return top + height * (1 - share)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {top + height + 44}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">{title}</text>',
    ]
    for power in range(2, 7):
        at = x(10**power)
        parts.append(f'<path d="M{at:.0f} {top}V{top + height}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{at:.0f}" y="{top + height + 18}" text-anchor="middle">{10**power:,}</text>'
        )
    for power in range(-6, -1):
        at = y(10.0**power)
        parts.append(f'<path d="M{left} {at:.0f}H{left + width}" stroke="#ddd"/>')
        label = f"{10.0**power * 1e6:,.0f} µs"
        parts.append(f'<text x="{left - 6}" y="{at + 4:.0f}" text-anchor="end">{label}</text>')
    parts.append(
        f'<path d="M{left} {y(limit):.1f}H{left + width}" stroke="#c00" stroke-dasharray="5 4"/>'
        f'<text x="{left + width + 6}" y="{y(limit) + 4:.0f}" fill="#c00">target</text>'
    )
    colors = ("#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e")
    for color, (name, points) in zip(colors, lines.items(), strict=False):
        path = " ".join(f"{x(int(c)):.1f},{y(s):.1f}" for c, s in points.items())
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        count, seconds = list(points.items())[-1]
        end = f'x="{x(int(count)) + 6:.0f}" y="{y(seconds) + 4:.0f}"'
        parts.append(f'<text {end} fill="{color}">{name}</text>')
    parts.append(
        f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">'
        "subscriptions</text></svg>"
    )
    return "\n".join(parts) + "\n"


def plots(result: Mapping[str, Any]) -> dict[str, str]:
    def line(db: str, what: str, key: str) -> dict[int, float]:
        return {count: row[key] for count, row in result[db][what].items()}

    present = [db for db in DATABASES if db in result]
    exact = {f"{NAMES[db]}": line(db, "exact", "match cpu") for db in present}
    globs = {"match": line(present[0], "glob", "match")}
    globs |= {f"after a change, {NAMES[db]}": line(db, "glob", "refresh") for db in present}
    return {
        "subscriptions-exact": plot("Matching a topic, processor time", exact, 100e-6),
        "subscriptions-glob": plot("Matching globs, processor time", globs, 50e-6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 10,000 only")
    parser.add_argument("--only", choices=DATABASES, action="append")
    parser.add_argument("--write", action="store_true", help="results/ and README.md")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        what, count = arguments.measure
        found = asyncio.run(MEASURES[what](os.environ["LONELYPSS_DB"], int(count)))
        print(json.dumps(found))
        return
    about = report.machine()
    result = run(arguments.only or DATABASES, 10_000 if arguments.quick else 1_000_000)
    versions = report.own_packages()
    text = report.heading(about, versions) + "\n" + tables(result)
    print(text)
    if arguments.write:
        data = {"machine": about, "packages": versions, **result}
        directory = report.HERE / "results"
        report.write("subscriptions", text, data, directory=directory)
        report.into_readme("subscriptions", text)
        for name, svg in plots(result).items():
            (directory / f"{name}.svg").write_text(svg)


if __name__ == "__main__":
    main()
