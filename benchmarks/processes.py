"""Children of a benchmark: started, waited for, commanded by JSON lines, ended by their own pid."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

START_SECONDS = 60.0
STOP_SECONDS = 10.0
# Outside of the range from which the system takes ports for outgoing connections.
PORTS = range(20_000, 32_000)
_PR_SET_PDEATHSIG = 1


class ChildError(Exception):
    """A child ended, or did not do in time what was waited for; the text ends with its log."""


def free_port() -> int:
    """A loopback port that nobody listens on now, for servers that cannot choose one themselves."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ChildError(f"no free port in {PORTS}")


def _die_with_parent() -> None:
    # also after SIGKILL of the benchmark nothing stays behind
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """One process, between `start` and `stop`.

    Attributes:
        port: the last word of its READY line, if that is a number.
    """

    port: int = 0

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log
        self._drain: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        name: str,
        directory: Path,
        command: Sequence[str | Path],
        *,
        ready: bytes = b"READY",
        commanded: bool = True,
    ) -> Self:
        """Returns when a line of its output contains `ready`.

        Args:
            directory: where its log and its temporary files go.
            commanded: it answers commands on its standard output; otherwise what it writes there
                after `ready` is thrown away, and what it writes to stderr counts as output.
        """
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        environment["TMPDIR"] = str(directory)
        log = directory / f"{name.replace(' ', '-')}.log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *map(str, command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr if commanded else asyncio.subprocess.STDOUT,
                cwd=directory,
                env=environment,
                preexec_fn=_die_with_parent,
            )
        child = cls(name, process, log)
        try:
            async with asyncio.timeout(START_SECONDS):
                await child._wait_for(ready)
        except BaseException as e:
            await child.stop()
            if isinstance(e, TimeoutError):
                raise child._failure("was not ready in time") from None
            raise
        if not commanded:
            child._drain = asyncio.create_task(child._throw_away())
        return child

    async def _wait_for(self, ready: bytes) -> None:
        while ready not in (line := await self._read_line()):
            pass
        last = line.split()[-1]
        self.port = int(last) if last.isdigit() else 0

    async def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            await self._process.wait()
            raise self._failure(f"ended with {self._process.returncode}")
        return line

    async def _throw_away(self) -> None:
        assert self._process.stdout is not None
        while await self._process.stdout.read(65_536):
            pass

    def _failure(self, what: str) -> ChildError:
        return ChildError(f"{self.name} {what}\n{self._log.read_text(errors='replace')[-4000:]}")

    async def command(self, op: str, *, timeout: float, **fields: Any) -> dict[str, Any]:
        """What it answers to `{"op": op, ...}`; a child does one command at a time."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"op": op, **fields}).encode() + b"\n")
        return await self.answer(op, timeout=timeout)

    async def answer(self, op: str, *, timeout: float) -> dict[str, Any]:
        """The next line of its output, for commands that have more than one."""
        try:
            async with asyncio.timeout(timeout):
                answer: dict[str, Any] = json.loads(await self._read_line())
        except TimeoutError:
            raise self._failure(f"did not answer {op} within {timeout:g} s") from None
        if "error" in answer:
            raise self._failure(f"answered {op} with {answer['error']}")
        return answer

    async def stop(self) -> None:
        """Asks it to end, by the end of its input and SIGTERM, and kills it if it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        if self._drain is not None:
            await self._drain

    def cpu_seconds(self) -> float | None:
        """Processor time it used so far, in user and system mode; None where /proc is missing."""
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_bytes()
        except OSError:
            return None
        fields = stat[stat.rindex(b")") + 2 :].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_rss(self) -> int | None:
        """The most memory it ever occupied (VmHWM), in bytes; None where /proc is missing."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return None
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
