"""What a fresh clone on another machine needs."""

import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from programs import ROOT, environment


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in found if path.is_file() and path.suffix != ".json"]


def texts() -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(ROOT)), path.read_text(encoding="utf-8", errors="replace"))
        for path in tracked()
        if path != Path(__file__)
    ]


def test_no_package_registries_are_named() -> None:
    hosts = re.compile(r"\b(pypi|pythonhosted|npmjs)[.]org|--(extra-)?index-url")
    assert not [name for name, text in texts() if hosts.search(text)]


def test_no_paths_of_one_machine() -> None:
    paths = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/\w|\.\./shared\b")
    assert not [(name, m[0]) for name, text in texts() if (m := paths.search(text))]


def test_no_secrets_are_tracked() -> None:
    names = [name for name, _ in texts()]
    assert not [name for name in names if re.search(r"secrets\.json|\.db(-\w+|\.replay)?$", name)]


def test_constraints_are_names_and_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert not [line for line in pinned if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.]*", line)]
    names = {line.partition("==")[0].lower().replace("_", "-") for line in pinned}
    assert len(names) == len(pinned)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["standard"], *extras["dev"]]
    wanted = {re.split(r"[\[>=; ]", need)[0].lower() for need in needed} - {"lonelypsc"}
    assert wanted <= names


def test_the_scripts_can_be_run() -> None:
    ci = ROOT / ".ci" / "run"
    assert ci.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", str(ci)], check=True)
    assert "set -euo pipefail" in ci.read_text()


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\ncase "$*" in *--version*) echo Python 3.9.2;; *) exit 1;; esac\n')
    old.chmod(0o755)
    result = subprocess.run(
        ["make", "--no-print-directory", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}", "test"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(MAKEFLAGS=""),
        check=False,
    )
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stderr
    assert "Python 3.9.2" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_imports_point_one_way() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.exists():
        pytest.skip("import-linter is not installed")
    result = subprocess.run(
        [str(lint), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_commands_explain_a_missing_extra(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise ImportError('No module named click')")
    for module in ("lonelypsc", "lonelypss"):
        result = subprocess.run(
            [sys.executable, "-m", module, "--help"],
            capture_output=True,
            text=True,
            env=environment(PYTHONPATH=str(tmp_path)),
            check=False,
        )
        assert result.returncode == 1
        assert "pip install 'lonelypsc[standard]'" in result.stderr
        assert "Traceback" not in result.stderr
