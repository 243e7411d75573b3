"""Traces: the W3C trace context in the tracing bytes of a message (docs/how-to/observe.md).

The bytes are the value of `traceparent`, in ASCII, and where there is one a newline and the value
of `tracestate`. Tracing bytes belong to whoever sends them: all that is not exactly this, such as
what the older broadcaster answers, says nothing about a trace.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Self

MAX_TRACESTATE = 512
"""Bytes; a longer one is left out."""

_TRACEPARENT = r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_TRACESTATE = rf"[\x20-\x7e]{{1,{MAX_TRACESTATE}}}"
_parent = re.compile(_TRACEPARENT)
_state = re.compile(_TRACESTATE)
_HOPS = "lonelyps=hops:"  # a member of tracestate
_MOST_HOPS = 999
_hops = re.compile(rf"(?:^|,) *{_HOPS}([0-9]{{1,3}}) *(?:,|$)")
_context = re.compile(rf"({_TRACEPARENT})(?:\n({_TRACESTATE}))?".encode())


def encode(carrier: Mapping[str, str]) -> bytes:
    """The bytes for `carrier`, as a W3C propagator fills it; empty if it has no `traceparent`."""
    parent = carrier.get("traceparent", "")
    if not _parent.fullmatch(parent):
        return b""
    state = carrier.get("tracestate", "")
    text = f"{parent}\n{state}" if _state.fullmatch(state) else parent
    return text.encode("ascii")


def decode(tracing: bytes) -> dict[str, str]:
    """The carrier that such bytes stand for; empty if they are something else."""
    found = _context.fullmatch(tracing)
    if found is None:
        return {}
    parent, state = found.groups()
    carrier = {"traceparent": parent.decode("ascii")}
    if state is not None:
        carrier["tracestate"] = state.decode("ascii")
    return carrier


def passed_on(tracing: bytes) -> bytes:
    """What goes on to others who do not make a span of their own: `tracing`, if it is of a trace.

    Anything else was meant for us alone.
    """
    return tracing if _context.fullmatch(tracing) else b""


def hops(tracing: bytes) -> int:
    """How often the message was forwarded to a broadcaster, as its forwarders say; else 0."""
    found = _hops.search(decode(tracing).get("tracestate", ""))
    return int(found[1]) if found else 0


def forwarded(received: bytes, sent: bytes = b"") -> bytes:
    """What goes with a message that is forwarded: its trace, and one hop more.

    Args:
        received: what came with it.
        sent: what would go with it as a message of one's own; it counts if it is of a trace.
    """
    carrier = decode(sent) or decode(received)
    if not carrier:  # of no trace: one that nobody records
        carrier = {"traceparent": f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-00"}
    return _with_hops(carrier, min(hops(received) + 1, _MOST_HOPS))


def carried_on(received: bytes, sent: bytes) -> bytes:
    """`sent`, of a step of its own, with the hops of what came: not all that records keeps them."""
    found = hops(received)
    return sent if found == 0 or hops(sent) == found else _with_hops(decode(sent), found)


def _with_hops(carrier: Mapping[str, str], number: int) -> bytes:
    others = [m for m in carrier.get("tracestate", "").split(",") if m and not _hops.search(m)]
    state = f"{_HOPS}{number}"
    for member in others:
        if len(state) + 1 + len(member) > MAX_TRACESTATE:
            break
        state += f",{member}"
    return encode({**carrier, "tracestate": state})


class Step:
    """A step of a message on its way, of which nothing is recorded; see `lonelypsp.otel`.

    Attributes:
        tracing: bytes that go with the message to whoever gets it next.
    """

    __slots__ = ("tracing",)

    def __init__(self, tracing: bytes = b"") -> None:
        self.tracing = tracing

    def __enter__(self) -> Self:
        """As `make_current`; ends at exit."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        pass

    def make_current(self) -> None:
        """What the same task does until the end belongs to this step."""

    def answered(self, subscribers: int) -> None:
        """So many have confirmed."""

    def failed(self, reason: str) -> None:
        """It goes on, but did not do what it was for."""

    def end(self, error: BaseException | str | None = None) -> None:
        """It is over, because of `error` if there is one. Only the first call counts."""


NO_STEP = Step()
