"""A message larger than memory limits: one file to two subscribers, with hmac.

    .venv/bin/python benchmarks/large_body.py [--size 2GB] [--write]

Prints the peak memory (VmHWM) of publisher, broadcaster and subscribers, the throughput, and
whether the same bytes arrived. Needs three times the size in free space on the temporary disk.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import re
import sys
import tempfile
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import report
from contestants import start_broadcaster, start_client, write_secrets
from processes import Child

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
SUBSCRIBERS = 2
SPECKS = 64
PATIENCE = 1800.0


@dataclass(frozen=True)
class Result:
    """Sizes in bytes, times in seconds since the publisher began to send."""

    size: int
    notified: int
    equal: bool
    answered: float
    arrived: list[float]
    read: list[float]
    idle_rss: dict[str, int | None]
    peak_rss: dict[str, int | None]


def parse_size(text: str) -> int:
    found = re.fullmatch(r"([0-9]+) *(|[KMG]I?)B?", text.upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64MB or 2GiB")
    return int(found[1]) * UNITS[found[2]]


def make_file(path: Path, size: int) -> str:
    """A sparse file with random specks, so that no piece can stand for another; its sha512."""
    with path.open("wb") as file:
        file.truncate(size)
        for number in range(SPECKS):
            file.seek(size * number // SPECKS)
            file.write(os.urandom(min(4096, size // SPECKS)))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha512").hexdigest()


async def measure(size: int, directory: Path, scheme: str = "http") -> Result:
    """
    Args:
        scheme: "http", or "ws" for a websocket at every client.
    """
    path = directory / "body"
    sha512 = await asyncio.to_thread(make_file, path, size)
    secrets = write_secrets(directory, "hmac")
    python = Path(sys.executable)
    async with AsyncExitStack() as stack:
        server = await start_broadcaster("ours", python, directory, secrets, stack)

        async def client(role: str, name: str) -> Child:
            return await start_client(
                role, "ours", python, directory, server, secrets, stack, scheme, name
            )

        publisher = await client("publisher", "publisher")
        subscribers = [
            await client("subscriber", f"subscriber {n}") for n in range(1, SUBSCRIBERS + 1)
        ]
        for subscriber in subscribers:  # each answers twice: subscribed, then what it got
            await subscriber.command("digest", topic="large", timeout=PATIENCE)
        children = [publisher, server, *subscribers]
        idle = {child.name: child.peak_rss() for child in children}

        sent = await publisher.command("send_file", topic="large", path=str(path), timeout=PATIENCE)
        got = [await subscriber.answer("digest", timeout=PATIENCE) for subscriber in subscribers]
        peak = {child.name: child.peak_rss() for child in children}
    return Result(
        size=size,
        notified=sent["notified"],
        equal=all(answer["sha512"] == answer["announced"] == sha512 for answer in got),
        answered=sent["ended"] - sent["started"],
        arrived=[answer["arrived"] - sent["started"] for answer in got],
        read=[answer["read"] - sent["started"] for answer in got],
        idle_rss=idle,
        peak_rss=peak,
    )


def table(result: Result) -> str:
    def mb(value: int | None) -> str:
        return "?" if value is None else f"{value / 10**6:,.0f}"

    rate = result.size / result.answered / 10**6
    same = "the same bytes at all ends (sha512)" if result.equal else "DIFFERENT BYTES ARRIVED"
    lines = [
        f"{result.size:,} bytes to {result.notified} of {SUBSCRIBERS} subscribers: {same}.",
        "",
        "| | peak RSS, MB | before the message, MB |",
        "|---|--:|--:|",
        *(
            f"| {n} | {mb(peak)} | {mb(result.idle_rss[n])} |"
            for n, peak in result.peak_rss.items()
        ),
        "",
        f"The publisher had its answer after {result.answered:.1f} s: {rate:,.0f} MB/s from its"
        f" file to all subscribers, {rate * SUBSCRIBERS:,.0f} MB/s delivered. The subscribers held"
        f" the message after {', '.join(f'{s:.1f}' for s in result.arrived)} s and had read and"
        f" hashed it after {', '.join(f'{s:.1f}' for s in result.read)} s.",
    ]
    return "\n".join([*lines, ""])


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=parse_size, default="2GB", help="default 2GB")
    parser.add_argument("--directory", type=Path, help="for the file and the spools")
    parser.add_argument("--write", action="store_true", help="results/ and the table in README.md")
    arguments = parser.parse_args()

    about: dict[str, Any] = report.machine()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.directory) as directory:
        result = await measure(arguments.size, Path(directory))
    versions = report.own_packages()
    text = report.heading(about, versions) + "\n" + table(result)
    print(text)
    if arguments.write:
        data = {"machine": about, "packages": versions, "result": asdict(result)}
        report.write("large_body", text, data, directory=report.HERE / "results")
        report.into_readme("large body", text)
    if not result.equal or result.notified != SUBSCRIBERS:
        sys.exit("the message did not arrive as it was sent")


if __name__ == "__main__":
    asyncio.run(main())
