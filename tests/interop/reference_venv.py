"""The virtual environment that holds the older implementation.

Its packages have the same import names as ours, so it never shares an environment
with them: the peers run in processes of their own, started with `reference_python()`.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
ENVIRONMENTS = HERE.parents[1] / ".venv-reference"
FALLBACKS = ("python3.11", "python3.12", "python3.13", "python3.14")

_outcome: Path | str | None = None


class ReferenceUnavailableError(Exception):
    """The environment could not be made; the text says which commands failed and how."""


def reference_python() -> Path:
    """The interpreter of the environment, which is made on the first call.

    Environments are kept in .venv-reference/<hash of requirements.txt>/ under the root of
    the repository. A lock makes simultaneous calls from several processes wait for the one
    that builds; a build that was cut short leaves no marker and is started over.
    """
    global _outcome
    if _outcome is None:
        try:
            _outcome = _find_or_build()
        except ReferenceUnavailableError as exc:
            _outcome = str(exc)
    if isinstance(_outcome, str):
        raise ReferenceUnavailableError(_outcome)
    return _outcome


def _find_or_build() -> Path:
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]
    environment = ENVIRONMENTS / digest
    python = environment / "bin" / "python"
    marker = environment / "complete"

    ENVIRONMENTS.mkdir(exist_ok=True)
    with (ENVIRONMENTS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # running it also finds an environment whose base interpreter has gone
        if marker.is_file() and _problem(str(python), "-I", "-c", "import lonelypsc") is None:
            return python
        problems = []
        for candidate in _candidates():
            shutil.rmtree(environment, ignore_errors=True)
            problem = (
                _problem(candidate, "-m", "venv", str(environment))
                # everything is pinned, so nothing else may be drawn in; `check` proves it
                or _problem(
                    str(python), "-m", "pip", "install", "-q", "--no-deps", "-r", str(REQUIREMENTS)
                )
                or _problem(str(python), "-m", "pip", "check")
            )
            if problem is None:
                marker.touch()
                return python
            problems.append(problem)
        shutil.rmtree(environment, ignore_errors=True)
        raise ReferenceUnavailableError("\n".join(problems))


def _candidates() -> list[str]:
    others = [shutil.which(name) for name in FALLBACKS]
    return [sys.executable, *(path for path in others if path is not None)]


def _problem(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError as exc:
        return f"{command[0]}: {exc}"
    if done.returncode == 0:
        return None
    return f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
