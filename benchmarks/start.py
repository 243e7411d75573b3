"""What it costs to have a client: the import, and a process that only notifies and waits.

    .venv/bin/python benchmarks/start.py [--rounds 15] [--write]

Ours and the older implementation in turn, each time in a new process. Times are processor seconds
of the import and all that it imports, compiled before; RSS is the most that the process ever had
(VmHWM), after a notify with hmac to nobody, with its connection to a broadcaster kept.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any

import environments
import report
from contestants import PATIENCE, start_broadcaster, start_client, write_secrets

IMPORT = """
import time
begun = time.process_time()
import lonelypsc.http_client
print(time.process_time() - begun)
"""
ROWS = {"lonelyps": "ours", "older": "reference"}


def imported(python: Path) -> float:
    """Seconds."""
    done = subprocess.run([python, "-c", IMPORT], capture_output=True, check=True, text=True)
    return float(done.stdout)


async def idle_rss(implementation: str, python: Path, directory: Path) -> int:
    """Bytes."""
    secrets = write_secrets(directory, "hmac")
    async with AsyncExitStack() as stack:
        server = await start_broadcaster(implementation, python, directory, secrets, stack)
        client = await start_client(
            "publisher", implementation, python, directory, server, secrets, stack
        )
        await client.command(
            "load",
            topic="nobody",
            mode="confirmed",
            in_flight=1,
            count=1,
            seconds=60.0,
            timeout=PATIENCE,
        )
        found = client.peak_rss()
    assert found is not None
    return found


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="results/ and README.md")
    arguments = parser.parse_args()
    about: dict[str, Any] = report.machine()
    pythons = {"lonelyps": Path(sys.executable), "older": environments.reference()}
    found: dict[str, dict[str, Any]] = {name: {"import": [], "rss": []} for name in ROWS}
    for number in range(arguments.rounds + 1):
        for name, python in pythons.items():
            seconds = imported(python)
            if number:  # the first one may have to compile
                found[name]["import"].append(seconds)
    for _ in range(3):
        for name, python in pythons.items():
            with tempfile.TemporaryDirectory(prefix="bench-") as directory:
                rss = await idle_rss(ROWS[name], python, Path(directory))
                found[name]["rss"].append(rss)
    versions = report.all_packages()
    text = report.heading(about, {n: versions[n] for n in ROWS}) + "\n" + table(found)
    print(text)
    if arguments.write:
        data = {"machine": about, "packages": versions, "result": found}
        report.write("start", text, data, directory=report.HERE / "results")
        report.into_readme("start", text)


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | import, processor s | min to max | idle RSS, MB | min to max |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, row in found.items():
        seconds, sizes = row["import"], [size / 1e6 for size in row["rss"]]
        lines.append(
            f"| {name} | {median(seconds):.3f} | {min(seconds):.3f} to {max(seconds):.3f}"
            f" | {median(sizes):.1f} | {min(sizes):.1f} to {max(sizes):.1f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    asyncio.run(main())
