"""Traces: the steps of messages in a client (docs/how-to/observe.md).

`Tracing` records nothing, and is what everybody has by default. `OpenTelemetry` records:

notify (PRODUCER)
receive (CONSUMER), until it is in the buffers, and receivers have had it
process (CONSUMER), one per subscription that takes it: as long as the program deals with it
missed (CONSUMER), recover (INTERNAL): `on_receiving` runs
"""

from __future__ import annotations

from typing import Any

from lonelypsp.tracecontext import NO_STEP, Step


class Tracing:
    """Records nothing."""

    def notify(self, topic: bytes, length: int) -> Step:
        """A message is sent."""
        return NO_STEP

    def receive(self, topic: bytes, length: int, tracing: bytes) -> Step:
        """A message came in, with `tracing`."""
        return Step(tracing) if tracing else NO_STEP

    def process(self, topic: bytes, length: int, tracing: bytes) -> Step:
        """The program deals with a message, whose receiving was a step with `tracing`."""
        return Step(tracing) if tracing else NO_STEP

    def missed(self, topic: bytes, tracing: bytes) -> Step:
        """A MISSED notice came in, with `tracing`."""
        return NO_STEP

    def recover(self, tracing: bytes) -> Step:
        """The program catches up, after a notice whose step had `tracing`, if there was one."""
        return NO_STEP


NO_TRACING = Tracing()


class OpenTelemetry(Tracing):
    """Records spans.

    Args:
        provider: of OpenTelemetry; None: the global one.

    Raises:
        ValueError: the package is missing.
    """

    def __init__(self, provider: Any = None) -> None:
        try:
            from lonelypsp import otel
        except ImportError as e:
            raise ValueError(f"tracing: {e}: pip install 'lonelypsc[otel]'") from None
        self._otel = otel
        self._kinds = otel.SpanKind
        self._recorder = otel.Recorder("lonelypsc", provider)

    def notify(self, topic: bytes, length: int) -> Step:
        about = self._otel.described("notify", "send", topic, length)
        return self._recorder.start("notify", self._kinds.PRODUCER, None, about)

    def receive(self, topic: bytes, length: int, tracing: bytes) -> Step:
        about = self._otel.described("receive", "receive", topic, length)
        return self._recorder.start("receive", self._kinds.CONSUMER, tracing, about)

    def process(self, topic: bytes, length: int, tracing: bytes) -> Step:
        about = self._otel.described("process", "process", topic, length)
        return self._recorder.start("process", self._kinds.CONSUMER, tracing, about)

    def missed(self, topic: bytes, tracing: bytes) -> Step:
        about = self._otel.described("missed", "receive", topic, None)
        return self._recorder.start("missed", self._kinds.CONSUMER, tracing, about)

    def recover(self, tracing: bytes) -> Step:
        about = {"messaging.system": "lonelyps"}
        return self._recorder.start("recover", self._kinds.INTERNAL, tracing, about)


def make_tracing(setting: object) -> Tracing:
    """What the setting `tracing` of a client asks for: True or a provider; anything else, such as
    the tracers of older programs, for nothing. Raises ValueError."""
    if setting is True:
        return OpenTelemetry()
    if hasattr(setting, "get_tracer"):
        return OpenTelemetry(setting)
    return NO_TRACING
