"""What the answers of subscribers come to: one table.

`Delivery` (fanout.py) and `MissedPost` (missed.py) judge by it, `sender.py` learns from it about
hosts, and the table in docs/topics/protocol.md, "Replies", is made from it.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from lonelypsp.bodies import UNSUBSCRIBE_IMMEDIATE

BUSY_STATUSES = (429, 503)
RETRY_AFTER_RANGE = (1.0, 3600.0)
"""Seconds between which a subscriber's Retry-After is believed."""


class Host(Enum):
    """What an outcome says about the host; see breaker.py."""

    ANSWERS = "it answers"
    BUSY = "it answers; half as many connections"
    FAILS = "a failure"
    SILENT = "a failure; half as many connections"
    UNKNOWN = ""


class Outcome(Enum):
    """What became of a message at one url.

    Attributes:
        answer: what came back, for the documentation.
        label: for metrics and explanations.
        count: what a publisher is told.
        then: what happens to the subscription.
        host: what it says about the host.
    """

    def __init__(self, answer: str, label: str, count: str, then: str, host: Host) -> None:
        self.answer = answer
        self.label = label
        self.count = count
        self.then = then
        self.host = host

    CONFIRMED = (
        "2xx, `ResponseConfirmReceive` with our identifier and a good authorization",
        *("confirmed", "its count", "", Host.ANSWERS),
    )
    UNSUBSCRIBED = (
        "exactly `00 0a`, with 2xx or 410 (`unsubscribe_immediate`)",
        *("unsubscribed", "0", "what matched is removed", Host.ANSWERS),
    )
    HINT = (
        "the same where `unsubscribe_immediate` ignores it, or waits for more",
        *("failed", "0", "MISSED", Host.ANSWERS),
    )
    BUSY = (
        "429, 503, whatever the body",
        *("failed", "0", "MISSED, after its `Retry-After` (1 s to 1 h)", Host.BUSY),
    )
    REJECTED = (
        "any other status, whatever the body; redirects are not followed",
        *("failed", "0", "MISSED", Host.ANSWERS),
    )
    UNCONFIRMED = (
        "2xx with another body, another identifier, a bad authorization",
        *("failed", "0", "MISSED", Host.ANSWERS),
    )
    BROKEN = (
        "no reply: reset, closed, not HTTP, compressed, more than 256 KiB",
        *("failed", "0", "MISSED", Host.FAILS),
    )
    SILENT = (
        "no reply in time (`outgoing_http_timeout_sock_read`, `outgoing_http_timeout_total`)",
        *("failed", "0", "MISSED", Host.SILENT),
    )
    UNREACHABLE = (
        "no connection: no such name, refused, not in time, no TLS, an address that is denied",
        *("failed", "0", "MISSED", Host.FAILS),
    )
    REFUSED = (
        "none: the url is refused (`url_policy`)",
        *("failed", "0", "MISSED", Host.UNKNOWN),
    )
    SKIPPED = (
        "none: its host has failed too often (`outgoing_breaker_failures`)",
        *("skipped", "0", "MISSED", Host.UNKNOWN),
    )
    NOT_SENT = (
        "none: the queue is full, no connection is free in time, the broadcaster stops",
        *("failed", "0", "MISSED", Host.UNKNOWN),
    )


class Reply(NamedTuple):
    """What came back. `status` 0: nothing did, `error` says why and `outcome` what that means."""

    status: int
    body: bytes
    error: str = ""
    retry_after: str = ""
    outcome: Outcome = Outcome.NOT_SENT


def judge(reply: Reply) -> Outcome | None:
    """What a reply comes to; None: it depends on whether its body is a good confirmation.

    `HINT` stands for what may be `UNSUBSCRIBED`.
    """
    status, is_stop = reply.status, reply.body == UNSUBSCRIBE_IMMEDIATE
    if 200 <= status < 300:
        return Outcome.HINT if is_stop else None
    if status == 0:
        return reply.outcome
    if status in BUSY_STATUSES:
        return Outcome.BUSY
    return Outcome.HINT if is_stop and status == 410 else Outcome.REJECTED


def wish(reply: Reply) -> float:
    """Seconds that a subscriber asks us to wait, within reason."""
    value = reply.retry_after
    if reply.status not in BUSY_STATUSES or not (value.isascii() and value.isdigit()):
        return 0.0
    low, high = RETRY_AFTER_RANGE
    return min(max(float(value[:10]), low), high)
