"""Everything the client raises on purpose. All of it is also importable from `lonelypsc.client`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to reach one broadcaster, and how it ended.

    Attributes:
        url: where the request went.
        outcome: what happened, in words; holds the server's own text, shortened.
        may_have_arrived: whether the broadcaster may have acted on the request.
    """

    url: str
    outcome: str
    may_have_arrived: bool


class PubSubError(Exception):
    """Base of all errors a program can handle."""


class PubSubBindError(PubSubError, OSError):
    """The address of the `bind` setting cannot be listened on."""


class PubSubRequestError(PubSubError):
    """A request to the broadcasters failed.

    Attributes:
        attempts: every try, in order.
    """

    def __init__(self, message: str = "", attempts: Sequence[Attempt] = ()) -> None:
        self.attempts = tuple(attempts)
        tries = "".join(f"\n  {n}. {a.url}: {a.outcome}" for n, a in enumerate(self.attempts, 1))
        super().__init__(message + tries)

    @property
    def may_have_arrived(self) -> bool:
        """Whether a broadcaster may have acted on the request."""
        return any(attempt.may_have_arrived for attempt in self.attempts)


class PubSubRequestAmbiguousError(PubSubRequestError):
    """It is not known whether a broadcaster acted on the request."""


class PubSubRequestRetriesExhaustedError(PubSubRequestError):
    """Every broadcaster answered every time that it is unavailable (502, 503, 504)."""


class PubSubRequestRefusedError(PubSubRequestError):
    """A broadcaster understood the request and will not do it; trying again will not help."""


class PubSubRequestConnectionAbandonedError(PubSubRequestError):
    """The client or the subscription was left; nothing more will arrive."""


class PubSubRequestQueueFullError(PubSubRequestError, asyncio.QueueFull):
    """More messages wait to be sent than `max_unsent_notifications` allows."""


class PubSubIrrecoverableError(BaseException):
    """Base of what no `except Exception` should swallow."""


class PubSubCancelRequested(PubSubIrrecoverableError):
    """The program asked to stop."""
