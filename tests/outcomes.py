"""How a call ends, as a value: to compare two ways to do the same thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def outcome(call: Callable[[], Any]) -> tuple[type[Any], Any, dict[str, Any]]:
    """The type of what came of `call`; the result or the error's text; the error's attributes."""
    try:
        result = call()
    except Exception as e:
        return type(e), str(e), vars(e)
    return type(result), result, {}
