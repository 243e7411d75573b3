"""Traces: which steps a message took on its way through a broadcaster (docs/how-to/observe.md).

`Tracing` records nothing, and is what everybody is given by default. It still passes the context of
a publisher's trace on to subscribers, so that their spans are parts of it.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from lonelypsp.tracecontext import passed_on


class Step:
    """A message on its way, of which nothing is recorded.

    Attributes:
        tracing: bytes that go with it to whoever gets it next.
    """

    __slots__ = ("tracing",)

    def __init__(self, tracing: bytes = b"") -> None:
        self.tracing = tracing

    def __enter__(self) -> Self:
        """Ends it at exit; a step is current meanwhile."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(error)

    def delivery(self, url: str, identifier: bytes) -> bytes:
        """A delivery to `url` begins; what goes with it."""
        return self.tracing

    def settled(self, url: str, outcome: str, reason: str) -> None:
        """The delivery to `url` is confirmed, failed or unsubscribed."""

    def copies(self, number: int) -> Step:
        """The message is queued for so many websockets; ends when it has left all queues."""
        return self

    def answered(self, subscribers: int) -> None:
        """So many have confirmed."""

    def end(self, error: BaseException | str | None = None) -> None:
        """It is over, because of `error` if there is one."""


NO_STEP = Step()


class Tracing:
    """Records nothing."""

    def notify(self, transport: str, topic: bytes, length: int, tracing: bytes) -> Step:
        """A message came in.

        Args:
            transport: http, websocket, or broadcaster: from another one, for our websockets.
            tracing: what came with it. Its authorization has been checked.
        """
        return Step(passed_on(tracing)) if tracing else NO_STEP

    def notice(self, recovery: str, topic: bytes, attempt: int) -> Step:
        """A MISSED notice is sent."""
        return NO_STEP


NO_TRACING = Tracing()
