"""Python's garbage collector, in a process that is ours alone.

Looking through all there is takes long when there is much, and finds nothing: a broadcaster keeps
what it has. Applications that embed one decide for themselves; then nothing happens here.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_ours = False


@contextmanager
def taken_over() -> Iterator[None]:
    """For the start of a process: what exists at the end of this is not looked through again."""
    global _ours
    gc.disable()
    try:
        yield
        gc.collect()
        gc.freeze()
        _ours = True
    finally:
        gc.enable()


def keep() -> None:
    """Much was made that stays. Quick, whatever there is; `gc.get_freeze_count` would not be."""
    if _ours:
        gc.freeze()
