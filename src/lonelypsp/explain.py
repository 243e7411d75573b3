"""What became of a message at each of its subscribers (docs/topics/protocol.md, "Explanations").

It travels as JSON in the tracing bytes of the answer to a notify, because these are signed. Who did
not ask for it, and every older program, takes them for what tracing bytes are: somebody else's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

REQUEST_HEADER = "X-Explain"
"""Of a notify; any value asks for an explanation."""
MAX_BYTES = 65_535
DELIVERED = "delivered"

_MAX_URL = 1024
_MAX_REASON = 512
_MAX_GLOB = 256
_MAX_GLOBS = 8


@dataclass(frozen=True, slots=True)
class ExplainedSubscriber:
    """What became of a message at one url.

    Attributes:
        url: where the message went; a long one is cut.
        outcome: `delivered`, `failed`, `skipped` (nothing was sent) or `unsubscribed` (the
            subscriber does not want it any more).
        reason: why it was not delivered; empty if it was.
        will_be_told: whether a MISSED notice follows.
        exact: whether the url is subscribed to this very topic.
        globs: the first of its globs that match the topic.
        seconds: from the moment when the subscribers were found to this outcome.
    """

    url: str
    outcome: str
    reason: str = ""
    will_be_told: bool = False
    exact: bool = False
    globs: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Explanation:
    """What became of a message at all its subscribers.

    Attributes:
        subscribers: those it was not delivered to come first.
        omitted: how many more there are; an answer has room for some hundred.
        websockets: for how many websockets of the answering broadcaster it was queued.
    """

    subscribers: tuple[ExplainedSubscriber, ...]
    omitted: int = 0
    websockets: int = 0


def pack(explanation: Explanation) -> bytes:
    """The tracing bytes for an explanation, with as many of its subscribers as fit."""
    subscribers = explanation.subscribers
    rows: list[str] = []
    room = MAX_BYTES - 100  # for what stands around the rows
    for one in sorted(subscribers, key=lambda one: (one.outcome == DELIVERED, one.url)):
        row = json.dumps(_row(one), separators=(",", ":"))
        room -= len(row) + 1
        if room < 0:
            break
        rows.append(row)
    omitted = explanation.omitted + len(subscribers) - len(rows)
    head = f'{{"explain":1,"websockets":{explanation.websockets},"omitted":{omitted}'
    return f'{head},"subscribers":[{",".join(rows)}]}}'.encode("ascii")


def unpack(tracing: bytes) -> Explanation | None:
    """The explanation in the tracing bytes of an answer; None: they are something else."""
    if not tracing.startswith(b'{"explain":1,'):
        return None
    try:
        found = json.loads(tracing)
        rows = [ExplainedSubscriber(**{**row, "globs": tuple(row["globs"])})
                for row in found["subscribers"]]  # fmt: skip
        return Explanation(tuple(rows), int(found["omitted"]), int(found["websockets"]))
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _row(one: ExplainedSubscriber) -> dict[str, Any]:
    return {
        "url": _cut(one.url, _MAX_URL),
        "outcome": one.outcome,
        "reason": _cut(one.reason, _MAX_REASON),
        "will_be_told": one.will_be_told,
        "exact": one.exact,
        "globs": [_cut(glob, _MAX_GLOB) for glob in one.globs[:_MAX_GLOBS]],
        "seconds": round(one.seconds, 6),
    }


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
