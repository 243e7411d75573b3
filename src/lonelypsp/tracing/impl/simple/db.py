"""Kept for older imports; nothing is traced."""

from __future__ import annotations

from lonelypsp.tracing.impl.simple.config import SimpleTracingConfig


class SimpleTracingDBSidecar:
    """Stored traces in `database`; now an async context manager that does nothing."""

    def __init__(self, config: SimpleTracingConfig, database: str) -> None:
        self.config = config
        self.database = database

    async def __aenter__(self) -> SimpleTracingDBSidecar:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass
