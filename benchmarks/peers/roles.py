"""What all publishers and subscribers of the benchmarks share; standard library only, because each
runs in the environment of its own peer.

A role prints `READY <port>`, then answers each JSON line on its standard input, `{"op": ..., ...}`,
with one JSON line, and ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

BODY = b"x" * 200

Handler = Callable[..., Awaitable[dict[str, Any]]]


def run(main: Coroutine[Any, Any, None]) -> None:
    """On uvloop where the environment has it."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


async def serve(port: int, handlers: Mapping[str, Handler]) -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print("READY", port, flush=True)
    while line := await reader.readline():
        fields = json.loads(line)
        try:
            answer = await handlers[fields.pop("op")](**fields)
        except Exception as e:
            answer = {"error": repr(e)}
        print(json.dumps(answer), flush=True)


async def load(
    send: Callable[[], Awaitable[int]], *, in_flight: int, count: int, seconds: float
) -> dict[str, Any]:
    """Awaits `send()`, which returns how many got the message, in `in_flight` tasks.

    No task starts another message after `count` of them, or after `seconds`. One that fails is
    counted, and the next one sent.
    """
    latencies: list[float] = []
    failures: list[str] = []
    confirmed = 0
    left = count

    async def worker() -> None:
        nonlocal left, confirmed
        while left > 0 and (begun := time.monotonic()) < deadline:
            left -= 1
            try:
                confirmed += await send()
            except Exception as e:
                failures.append(repr(e))
            latencies.append(time.monotonic() - begun)

    started = time.monotonic()
    deadline = started + seconds
    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(worker())
    ended = time.monotonic()
    latencies.sort()
    return {
        "messages": len(latencies),
        "confirmed": confirmed,
        "failures": len(failures),
        "first failure": failures[0] if failures else None,
        "started": started,  # CLOCK_MONOTONIC: the same clock in every process of the machine
        "ended": ended,
        "p50": latencies[len(latencies) // 2],
        "p99": latencies[len(latencies) * 99 // 100],
    }


class Received:
    """Counts what a subscriber got, and lets the benchmark wait for it."""

    def __init__(self) -> None:
        self.count = 0
        self.last = 0.0
        self._wanted = sys.maxsize
        self._reached = asyncio.Event()

    def add(self) -> None:
        self.count += 1
        self.last = time.monotonic()
        if self.count >= self._wanted:
            self._reached.set()

    async def wait(self, count: int, seconds: float) -> dict[str, Any]:
        """Answers when `count` messages have come since the start, or after `seconds`."""
        self._wanted = count
        self._reached.clear()
        if self.count < count:
            try:
                async with asyncio.timeout(seconds):
                    await self._reached.wait()
            except TimeoutError:
                pass
        self._wanted = sys.maxsize
        return {"received": self.count, "last": self.last}
