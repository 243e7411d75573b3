"""Kept for older imports; nothing is traced."""

from __future__ import annotations

from lonelypsp.tracing.impl.simple.config import SimpleTracingConfig
from lonelypsp.tracing.impl.simple.db import SimpleTracingDBSidecar


class SimpleTracingSubscriberRoot:
    """`stateless` is what older programs pass as `tracing=`."""

    def __init__(self, db: SimpleTracingDBSidecar, config: SimpleTracingConfig) -> None:
        self.db = db
        self.config = config
        self.stateless = self
