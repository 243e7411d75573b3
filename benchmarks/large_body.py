"""A message larger than memory limits: one file to several subscribers, with hmac.

    .venv/bin/python benchmarks/large_body.py [--size 4GB] [--subscribers 4] [--directory D]
        [--warm D] [--write]

Prints the peak memory (VmHWM) and the processor time of publisher, broadcaster and subscribers, the
throughput, and whether the same bytes arrived. Needs free space for the size once for the
broadcaster and once for each subscriber, on the disk of D; if that is the limit, D in memory
(/dev/shm) tells what the programs can do.

A virtual machine gets its memory from its host page by page, when it is first touched and again
after it was free for a while; that may cost more than all else. --warm fills the memory with a file
on the disk of D first, as large as the memory, as on a machine that has been in use: what is
needed then is taken from the cache of that file.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import re
import sys
import tempfile
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import report
from contestants import start_broadcaster, start_client, write_secrets
from processes import Child

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
SPECKS = 64
PATIENCE = 1800.0
PIECE = 1024 * 1024


@dataclass(frozen=True)
class Result:
    """Sizes in bytes, times in seconds since the publisher began to send."""

    size: int
    subscribers: int
    notified: int
    equal: bool
    answered: float
    arrived: list[float]
    idle_rss: dict[str, int | None]
    peak_rss: dict[str, int | None]
    cpu: dict[str, float | None]


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


async def measure(size: int, directory: Path, scheme: str = "http", number: int = 2) -> Result:
    """
    Args:
        number: of subscribers.
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
        subscribers = [await client("subscriber", f"subscriber {n}") for n in range(1, number + 1)]
        for subscriber in subscribers:  # each answers twice: subscribed, then when it has come
            await subscriber.command("hold", topic="large", timeout=PATIENCE)
        children = [publisher, server, *subscribers]
        idle = {child.name: child.peak_rss() for child in children}
        before = [child.cpu_seconds() or 0.0 for child in children]

        sent = await publisher.command("send_file", topic="large", path=str(path), timeout=PATIENCE)
        arrived = [
            (await subscriber.answer("hold", timeout=PATIENCE))["arrived"]
            for subscriber in subscribers
        ]
        peak = {child.name: child.peak_rss() for child in children}
        cpu = {
            child.name: None if (now := child.cpu_seconds()) is None else round(now - then, 2)
            for child, then in zip(children, before, strict=True)
        }
        got = [await s.command("digest", timeout=PATIENCE) for s in subscribers]
    return Result(
        size=size,
        subscribers=number,
        notified=sent["notified"],
        equal=all(answer["sha512"] == answer["announced"] == sha512 for answer in got),
        answered=sent["ended"] - sent["started"],
        arrived=[moment - sent["started"] for moment in arrived],
        idle_rss=idle,
        peak_rss=peak,
        cpu=cpu,
    )


def warm_up(directory: Path) -> Path:
    """Fills the memory with the cache of a file; that file, which stays until all is measured."""
    path, piece = directory / "warm", os.urandom(PIECE)
    with path.open("wb", buffering=0) as file:
        for _ in range(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // PIECE):
            file.write(piece)
        os.fsync(file.fileno())  # only what the disk has can make room at once
    return path


def table(result: Result) -> str:
    def mb(value: int | None) -> str:
        return "?" if value is None else f"{value / 10**6:,.0f}"

    def per_gb(value: float | None) -> str:
        return "?" if value is None else f"{value / result.size * 10**9:.2f}"

    rate = result.size / result.answered / 10**6
    same = "the same bytes at all ends (sha512)" if result.equal else "DIFFERENT BYTES ARRIVED"
    lines = [
        f"{result.size:,} bytes to {result.notified} of {result.subscribers} subscribers: {same}.",
        "",
        "| | peak RSS, MB | before the message, MB | CPU s per GB |",
        "|---|--:|--:|--:|",
        *(
            f"| {n} | {mb(peak)} | {mb(result.idle_rss[n])} | {per_gb(result.cpu[n])} |"
            for n, peak in result.peak_rss.items()
        ),
        "",
        f"The publisher had its answer after {result.answered:.1f} s: {rate:,.0f} MB/s from its"
        f" file to all subscribers, {rate * result.subscribers:,.0f} MB/s delivered. The"
        f" subscribers held the message after {', '.join(f'{s:.1f}' for s in result.arrived)} s.",
    ]
    return "\n".join([*lines, ""])


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=parse_size, default="4GB", help="default 4GB")
    parser.add_argument("--subscribers", type=int, default=4, help="default 4")
    parser.add_argument("--directory", type=Path, help="for the file and the spools")
    parser.add_argument("--warm", type=Path, metavar="D", help="fill the memory by a file in D")
    parser.add_argument("--write", action="store_true", help="results/ and the table in README.md")
    arguments = parser.parse_args()

    about: dict[str, Any] = report.machine()
    with ExitStack() as stack:

        def temporary(where: Path | None) -> Path:
            return Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=where))
            )

        if arguments.warm:
            await asyncio.to_thread(warm_up, temporary(arguments.warm))
        directory = temporary(arguments.directory)
        result = await measure(arguments.size, directory, number=arguments.subscribers)
    versions = report.own_packages()
    how = "Memory was warm (--warm)." if arguments.warm else "Memory was as it was found."
    text = f"{report.heading(about, versions)}\n{how} {table(result)}"
    print(text)
    if arguments.write:
        data = {"machine": about, "packages": versions, "result": asdict(result)}
        report.write("large_body", text, data, directory=report.HERE / "results")
        report.into_readme("large body", text)
    if not result.equal or result.notified != arguments.subscribers:
        sys.exit("the message did not arrive as it was sent")


if __name__ == "__main__":
    asyncio.run(main())
