"""Notify rates of lonelyps, its older implementation, Redis and NATS, measured in one run.

    .venv/bin/python benchmarks/run.py [--suite http|websocket] [--quick] [--only NAME ...]
        [--rounds N]

README.md in this folder says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import bars
import report
from contestants import CROWD, DEAD, Contestant, Trial, Workload, contestants
from environments import UnavailableError
from processes import ChildError

_ONE = Workload("one", "Notify one at a time", "one", 1, 1, 20_000, 3.0)
_MANY = Workload("many", "Notify with 32 in flight", "one", 32, 1, 60_000, 3.0)
_FAN16 = Workload(
    "fan16", "16 messages in flight to 1,000 websockets", "fan", 16, CROWD, 2_000, 3.0
)
_FAN = Workload("fan", "One message at a time to 1,000 subscribers", "fan", 1, CROWD, 500, 3.0)
_SUBSCRIBE = Workload(
    "subscribe", "Subscribe, then unsubscribe, with 32 in flight", "subscribe", 32, 1, 60_000, 2.0
)
_DEAD = Workload(
    "dead", "The same with 10 dead hosts among them", "dead", 1, CROWD - sum(DEAD), 500, 3.0
)
SUITES = {
    "http": (_ONE, _MANY, _SUBSCRIBE, _FAN, _DEAD),
    "websocket": (
        _ONE,
        _MANY,
        Workload("pipe", "Notify with 128 in flight", "one", 128, 1, 100_000, 3.0),
        Workload("fan1", "One message at a time to 1 websocket", "fan1", 1, 1, 20_000, 2.0),
        Workload("fan10", "One message at a time to 10 websockets", "fan10", 1, 10, 20_000, 2.0),
        Workload("fan100", "One message at a time to 100 websockets", "fan100", 1, 100, 5_000, 2.0),
        _FAN,
        _FAN16,
    ),
}
TARGETS: dict[str, dict[str, float]] = {
    "http": {"one": 2_500, "many": 6_000, "subscribe": 5_000, "fan": 25_000},
    "websocket": {"pipe": 20_000, "fan": 60_000, "fan16": 60_000},
}
"""Per second, of "lonelyps, hmac"."""
QUICK_SECONDS = 0.7
WARM_UP_SECONDS = 0.5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", choices=SUITES, default="http", help="default http")
    parser.add_argument("--quick", action="store_true", help="two short rounds; writes nothing")
    parser.add_argument("--rounds", type=int, help="default 7, with --quick 2")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="a workload, e.g. fan, or a part of a row's name, e.g. redis; may be repeated."
        " Writes nothing unless --output is given",
    )
    parser.add_argument("--output", type=Path, help="folder for the result, .md and .json")
    return parser.parse_args()


def choose(suite: str, only: list[str]) -> tuple[list[Workload], list[Contestant]]:
    workloads, every = SUITES[suite], contestants(suite)
    keys = [work.key for work in workloads]
    names = [name.lower() for name in only if name not in keys]
    chosen = [work for work in workloads if work.key in only] or list(workloads)
    rows = [row for row in every if not names or any(n in row.name.lower() for n in names)]
    if not rows:
        everything = "; ".join(row.name for row in every)
        sys.exit(f"--only: nothing is called that; there are {', '.join(keys)}; {everything}")
    return chosen, rows


async def start_all(
    rows: list[Contestant], directory: Path, stack: AsyncExitStack
) -> tuple[list[Contestant], list[str]]:
    """Those that run, and why the others do not."""
    running, missing = [], []
    for row in rows:
        say(f"starting {row.name}")
        try:
            await row.start(directory, stack)
        except (UnavailableError, ChildError, OSError) as e:
            say(f"{row.name} does not take part: {e}")
            missing.append(f"{row.name}: {str(e).splitlines()[0]}")
        else:
            running.append(row)
    return running, missing


async def measure(
    workloads: list[Workload], rows: list[Contestant], rounds: int, quick: bool
) -> dict[str, dict[str, list[Trial]]]:
    trials: dict[str, dict[str, list[Trial]]] = {
        work.key: {row.name: [] for row in rows if work.key in row.workloads} for work in workloads
    }
    for number in range(rounds + 1):  # round 0 warms up and is not counted
        # back and forth, so that nobody always runs in the wake of the same other
        order = rows if number % 2 else rows[::-1]
        for work in workloads:
            for row in order:
                if work.key not in row.workloads:
                    continue
                seconds = QUICK_SECONDS if quick else work.seconds
                seconds = WARM_UP_SECONDS if number == 0 else seconds
                trial = await row.trial(work, count=work.count, seconds=seconds)
                say(f"round {number}/{rounds} {work.key:9} {row.name:28} {trial.rate:10,.0f}/s")
                if number:
                    trials[work.key][row.name].append(trial)
    return trials


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def main() -> None:
    arguments = parse_arguments()
    suite = arguments.suite
    workloads, rows = choose(suite, arguments.only)
    rounds = arguments.rounds or (2 if arguments.quick else 7)
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)

    about = report.machine()
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        rows, missing = await start_all(rows, directory, stack)
        trials = await measure(workloads, rows, rounds, arguments.quick)

    versions = report.all_packages()
    results = report.summary(workloads, rows, trials)
    about["rounds"] = rounds
    text = report.heading(about, versions) + "\n" + report.tables(workloads, results)
    if missing:
        text += "\nNot measured:\n" + "".join(f"- {line}\n" for line in missing)
    print(text)

    whole = not (arguments.quick or arguments.only)
    if whole or arguments.output:
        data = {"machine": about, "packages": versions, "results": results, "missing": missing}
        directory = arguments.output or report.HERE / "results"
        report.write(suite, text, data, directory=directory)
        panels = [(w.title, TARGETS[suite].get(w.key), results[w.key]) for w in workloads]
        (directory / f"{suite}.svg").write_text(bars.chart(panels))
    if whole and not arguments.output:
        report.into_readme(suite, text)


if __name__ == "__main__":
    asyncio.run(main())
