"""Runs our commands and examples as programs, and waits for what they print."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PATIENCE = 40.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    """Ours, without settings of the commands; warnings are errors there, too."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LONELYPS")}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", module, *arguments]


def run(
    module: str, *arguments: str, cwd: Path, **options: Any
) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    env = environment(**options.pop("env", {}))
    return subprocess.run(
        command(module, *arguments),
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        **options,
    )


class Program:
    """A running program whose output can be waited for, and is shown when the test fails."""

    def __init__(self, argv: list[str], cwd: Path, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.seen: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as out:
            for line in out:
                print(f"[{self.process.pid}] {line}", end="")
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def line(self, pattern: str) -> str:
        """The next line in which `pattern` is found."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {pattern!r} in time: {self.seen}") from None
            if line is None:
                self._lines.put(None)
                raise AssertionError(f"ended before it printed {pattern!r}: {self.seen}")
            self.seen.append(line)
            if re.search(pattern, line):
                return line

    def event(self, name: str) -> Any:
        """The next event of that name which it prints with --json."""
        return json.loads(self.line(rf'^\{{"event": "{name}"'))

    def rest(self) -> list[str]:
        """Everything it printed until its end."""
        while (line := self._lines.get(timeout=PATIENCE)) is not None:
            self.seen.append(line)
        return self.seen

    def stop(self, signum: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(PATIENCE)


@contextmanager
def started(argv: list[str], cwd: Path, **env: str) -> Iterator[Program]:
    program = Program(argv, cwd, environment(**env))
    try:
        yield program
    finally:
        if program.process.poll() is None:
            program.process.kill()
        program.process.wait(PATIENCE)


def workers(pid: int) -> list[int]:
    """The worker processes of a broadcaster."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def broadcaster(cwd: Path, *options: str) -> Iterator[tuple[Program, str]]:
    """`lonelypss serve` in a directory, and its url."""
    with started(command("lonelypss", "serve", "--json", "--port=0", *options), cwd) as program:
        yield program, program.event("listening")["url"]


def eventually(check: Callable[[], Any]) -> Any:
    """What `check` returns as soon as it is true."""
    deadline = time.monotonic() + PATIENCE
    while not (result := check()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return result
