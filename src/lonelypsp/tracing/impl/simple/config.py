"""Kept for older imports; nothing is traced."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SimpleTracingConfig:
    """How long traces were kept, in seconds; None was forever."""

    trace_max_age_seconds: float | None = 7_776_000
