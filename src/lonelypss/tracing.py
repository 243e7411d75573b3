"""Traces: which steps a message took on its way through a broadcaster (docs/how-to/observe.md).

`Tracing` records nothing, and is what everybody is given by default. It still passes the context of
a publisher's trace on to subscribers, so that their spans are parts of it. `OpenTelemetry` records:

fan out (SERVER) -> deliver (CLIENT), one per url
                 -> deliver (PRODUCER), one for all websockets of this process
missed (CLIENT), one per attempt
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

from lonelypsp.tracecontext import NO_STEP, Step, passed_on
from lonelypss.config import BroadcasterConfig, ConfigError
from lonelypss.urlpolicy import UrlRefused, parse_target

if TYPE_CHECKING:
    from lonelypsp.otel import Recorded

LAST_SPANS = 2.0
"""Seconds to send what is left when a program of ours stops."""


class MessageStep(Step):
    """A message on its way through us, of which nothing is recorded."""

    __slots__ = ()

    def delivery(self, url: str, identifier: bytes) -> bytes:
        """A delivery to `url` begins; the tracing bytes that go with it."""
        return self.tracing

    def settled(self, url: str, outcome: str, reason: str) -> None:
        """The delivery to `url` is confirmed, failed or unsubscribed."""

    def copies(self, websockets: int) -> Step:
        """The message is queued for so many; the step ends when it has left all queues."""
        return self


NO_MESSAGE_STEP = MessageStep()


class Tracing:
    """Records nothing."""

    def notify(self, transport: str, topic: bytes, length: int, tracing: bytes) -> MessageStep:
        """A message came in.

        Args:
            transport: http, websocket, or broadcaster: from another one, for our websockets.
            tracing: what came with it. Its authorization has been checked.
        """
        return MessageStep(passed_on(tracing)) if tracing else NO_MESSAGE_STEP

    def notice(self, recovery: str, topic: bytes, attempt: int) -> Step:
        """A MISSED notice is sent."""
        return NO_STEP


NO_TRACING = Tracing()


class OpenTelemetry(Tracing):
    """Records spans.

    Args:
        provider: of OpenTelemetry; None: the global one.

    Raises:
        ConfigError: the package is missing.
    """

    def __init__(self, provider: Any = None) -> None:
        try:
            from lonelypsp import otel
        except ImportError as e:
            raise ConfigError(f"tracing: {e}: pip install 'lonelypsc[otel]'") from None
        self._otel = otel
        self._kinds = otel.SpanKind
        self._recorder = otel.Recorder("lonelypss", provider)

    def notify(self, transport: str, topic: bytes, length: int, tracing: bytes) -> MessageStep:
        about = self._otel.described("fan out", "send", topic, length)
        about["lonelyps.transport"] = transport
        span = self._recorder.start("fan out", self._kinds.SERVER, tracing, about)
        return _Message(self, span, topic, length)

    def deliver(
        self, parent: Recorded, topic: bytes, length: int, more: dict[str, Any], *, asks: bool
    ) -> Recorded:
        """A part of a message's step: deliveries that ask for an answer, or do not."""
        kind = self._kinds.CLIENT if asks else self._kinds.PRODUCER
        about = self._otel.described("deliver", "send", topic, length) | more
        return self._recorder.start("deliver", kind, parent, about)

    def notice(self, recovery: str, topic: bytes, attempt: int) -> Step:
        about = self._otel.described("missed", "send", topic, None) | _to(recovery)
        about["lonelyps.attempt"] = attempt
        return self._recorder.start("missed", self._kinds.CLIENT, None, about)


class _Message(MessageStep):
    __slots__ = ("_about", "_deliveries", "_failed", "_span", "_tracing")

    def __init__(self, tracing: OpenTelemetry, span: Recorded, topic: bytes, length: int) -> None:
        super().__init__(span.tracing)
        self._tracing = tracing
        self._span = span
        self._about = topic, length
        self._deliveries: dict[str, Recorded] = {}
        self._failed = 0

    def delivery(self, url: str, identifier: bytes) -> bytes:
        more = {**_to(url), "messaging.message.id": identifier.hex()}
        step = self._tracing.deliver(self._span, *self._about, more, asks=True)
        self._deliveries[url] = step
        return step.tracing

    def settled(self, url: str, outcome: str, reason: str) -> None:
        if url not in self._deliveries:
            self.delivery(url, b"")  # it failed before it began
        step = self._deliveries.pop(url)
        step.set("lonelyps.outcome", outcome)
        if outcome == "failed":
            self._failed += 1
            step.end(reason)
        else:
            step.end()

    def copies(self, websockets: int) -> Step:
        more = {"messaging.batch.message_count": websockets}
        return self._tracing.deliver(self._span, *self._about, more, asks=False)

    def __enter__(self) -> Self:
        self._span.make_current()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.end(error)

    def make_current(self) -> None:
        self._span.make_current()

    def answered(self, subscribers: int) -> None:
        self._span.answered(subscribers)

    def end(self, error: BaseException | str | None = None) -> None:
        if self._span.ended:
            return
        self._span.set("lonelyps.failed", self._failed)
        self._span.set("lonelyps.outcome", "answered" if error is None else "refused")
        self._span.end(error)


def _to(url: str) -> dict[str, Any]:
    try:
        target = parse_target(url)
    except UrlRefused:
        return {"url.full": url}
    return {"url.full": url, "server.address": target.host, "server.port": target.port}


def current_step(config: BroadcasterConfig) -> Callable[[], bytes]:
    """Tells the tracing bytes of the step that is current, for the log; does not raise."""
    if not config.tracing:
        return bytes
    try:
        from lonelypsp.otel import current
    except ImportError:  # whoever needs it says so
        return bytes
    return current


@contextmanager
def spans_sent(config: BroadcasterConfig) -> Iterator[None]:
    """For a program of our own: sends spans where the variables OTEL_* say, if `config.tracing`
    wants them and nobody else has seen to it, as `opentelemetry-instrument` does.

    Raises:
        ConfigError: a package is missing.
    """
    with ExitStack() as stack:
        if config.tracing:
            stack.callback(_send_spans())
        yield


def _send_spans() -> Callable[[], None]:
    """Begins; returns what ends it."""
    try:
        from opentelemetry import trace

        if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            return lambda: None
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as e:
        raise ConfigError(f"tracing: {e}: pip install 'lonelypsc[otlp]'") from None
    os.environ.setdefault("OTEL_SERVICE_NAME", "lonelypss")
    exporter = OTLPSpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)

    def end() -> None:
        hurry = threading.Timer(LAST_SPANS, exporter.shutdown)  # which ends its attempts
        hurry.start()
        provider.shutdown()
        hurry.cancel()

    return end
