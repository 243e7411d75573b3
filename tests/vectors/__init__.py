"""What the older implementation was observed to send and accept: bytes that ours must match.

Each section of a file is a list of rows `{"name", "inputs", "expected"}`; bytes stand there as
`{"hex": ...}` or `{"repeat_hex": ..., "times": n}`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest


@cache
def load(kind: str) -> dict[str, Any]:
    """The vectors of `kind`, "stateless" or "stateful", with bytes as bytes."""
    file = Path(__file__).with_name(f"vectors_{kind}.json")
    return _plain(json.loads(file.read_text(encoding="utf-8")))


def rows(kind: str, section: str) -> list[Any]:
    """One parameter, readable as a test id, per row of a section."""
    return [pytest.param(row, id=row["name"]) for row in load(kind)[section]]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"hex"}:
        return bytes.fromhex(value["hex"])
    if value.keys() == {"repeat_hex", "times"}:
        return bytes.fromhex(value["repeat_hex"]) * value["times"]
    return {key: _plain(v) for key, v in value.items()}
