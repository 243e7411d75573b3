"""Spans of OpenTelemetry. Nothing imports this module before tracing is switched on.

No message suffers from what providers, samplers, processors and exporters do: whatever they raise
is logged, and the step goes unrecorded. They run where they are called, so that one that waits for
a network makes everybody wait: use a `BatchSpanProcessor`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Self

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lonelypsp.tracecontext import Step, carried_on, decode, encode, passed_on

__all__ = ["Recorder", "SpanKind", "current", "described"]

log = logging.getLogger(__name__)

MAX_NAME = 256
"""Characters of a topic in an attribute."""
_propagator = TraceContextTextMapPropagator()


def described(operation: str, type_: str, topic: bytes, length: int | None) -> dict[str, Any]:
    """Attributes by the semantic conventions for messaging, and the length of the topic.

    Args:
        operation: what our code calls it.
        type_: what the conventions call it: send, receive or process.
        length: of the message in bytes; None: there is none.
    """
    attributes = {
        "messaging.system": "lonelyps",
        "messaging.operation.name": operation,
        "messaging.operation.type": type_,
        "messaging.destination.name": topic[:MAX_NAME].decode("utf-8", "backslashreplace"),
        "lonelyps.topic.size": len(topic),
    }
    if length is not None:
        attributes["messaging.message.body.size"] = length
    return attributes


def current() -> bytes:
    """The tracing bytes of the span that is current."""
    return _tracing_of(trace.get_current_span())


class Recorder:
    """Starts spans.

    Args:
        scope: name of the package that does.
        provider: a `TracerProvider`; None: the global one, also if it is set later.
    """

    def __init__(self, scope: str, provider: Any = None) -> None:
        self._tracer = trace.get_tracer(scope, tracer_provider=provider)
        self._faults = 0

    def start(
        self,
        name: str,
        kind: SpanKind,
        parent: Recorded | bytes | None,
        attributes: Mapping[str, Any],
    ) -> Recorded:
        """A step that has begun.

        Args:
            parent: another step, or tracing bytes. None, or bytes that say nothing about a trace:
                the span that is current.
        """
        if isinstance(parent, Recorded):
            tracing, context = parent.tracing, parent.context
        else:
            tracing, context = passed_on(parent or b""), Context()
        span: trace.Span = trace.INVALID_SPAN
        try:
            if not isinstance(parent, Recorded):
                context = _propagator.extract(decode(tracing), contexts.get_current())
            span = self._tracer.start_span(name, context, kind, attributes)
            context = trace.set_span_in_context(span, context)
            tracing = carried_on(tracing, _tracing_of(span) or tracing)
        except Exception as e:  # noqa: BLE001 see the module's text
            self.fault(e)
        return Recorded(self, span, context, tracing)

    def fault(self, error: Exception) -> None:
        """Logs it; the longer it goes on, the less often."""
        self._faults += 1
        if self._faults & (self._faults - 1) == 0:  # 1, 2, 4, 8...
            log.warning("spans are lost, %d so far: %r", self._faults, error)


class Recorded(Step):
    """A step with a span."""

    __slots__ = ("_before", "_recorder", "_span", "context", "ended")

    def __init__(
        self, recorder: Recorder, span: trace.Span, context: Context, tracing: bytes
    ) -> None:
        super().__init__(tracing)
        self.context = context
        self._recorder = recorder
        self._span = span
        self._before: Context | None = None
        self.ended = False

    def __enter__(self) -> Self:
        self.make_current()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.end(error)

    def make_current(self) -> None:
        self._before = contexts.get_current()
        contexts.attach(self.context)

    def set(self, name: str, value: str | int) -> None:
        try:
            self._span.set_attribute(name, value)
        except Exception as e:  # noqa: BLE001 see the module's text
            self._recorder.fault(e)

    def answered(self, subscribers: int) -> None:
        self.set("lonelyps.subscribers", subscribers)

    def failed(self, reason: str) -> None:
        try:
            self._span.set_attribute("error.type", "failed")
            self._span.set_status(trace.StatusCode.ERROR, reason)
        except Exception as e:  # noqa: BLE001 see the module's text
            self._recorder.fault(e)

    def end(self, error: BaseException | str | None = None) -> None:
        if self.ended:
            return
        self.ended = True
        # not by the token of attach(): it may be another task that ends it
        if self._before is not None and contexts.get_current() is self.context:
            contexts.attach(self._before)
        try:
            if isinstance(error, str):
                self.failed(error)
            elif error is not None:
                self._span.set_attribute("error.type", type(error).__qualname__)
                self._span.set_status(trace.StatusCode.ERROR, str(error))
            self._span.end()
        except Exception as e:  # noqa: BLE001 see the module's text
            self._recorder.fault(e)


def _tracing_of(span: trace.Span) -> bytes:
    found = span.get_span_context()
    if not found.is_valid:
        return b""
    parent = f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"
    return encode({"traceparent": parent, "tracestate": found.trace_state.to_header()})
