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


class Load:
    """Awaits something again and again in `in_flight` tasks, and keeps how it went.

    What is awaited returns how many got the message. If it fails, that is counted, and the next one
    sent.
    """

    def __init__(self, in_flight: int) -> None:
        self._in_flight = in_flight
        self._latencies: list[float] = []
        self._failures: list[str] = []
        self._confirmed = 0
        self._started = time.monotonic()

    async def run(
        self, send: Callable[[], Awaitable[int]], count: int, seconds: float = float("inf")
    ) -> None:
        """No task starts another message after `count` of them, or after `seconds`."""
        left = count
        deadline = time.monotonic() + seconds

        async def worker() -> None:
            nonlocal left
            while left > 0 and (begun := time.monotonic()) < deadline:
                left -= 1
                try:
                    confirmed = await send()
                except Exception as e:
                    self._failures.append(repr(e))
                else:
                    self._confirmed += confirmed
                self._latencies.append(time.monotonic() - begun)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._in_flight):
                group.create_task(worker())

    def result(self) -> dict[str, Any]:
        ended = time.monotonic()
        latencies, failures = sorted(self._latencies), self._failures
        return {
            "messages": len(latencies),
            "confirmed": self._confirmed,
            "failures": len(failures),
            "first failure": failures[0] if failures else None,
            "started": self._started,  # CLOCK_MONOTONIC: the same clock in all processes
            "ended": ended,
            "p50": latencies[len(latencies) // 2],
            "p99": latencies[len(latencies) * 99 // 100],
        }


async def load(
    send: Callable[[], Awaitable[int]], *, in_flight: int, count: int, seconds: float
) -> dict[str, Any]:
    """See `Load`."""
    run = Load(in_flight)
    await run.run(send, count, seconds)
    return run.result()


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
