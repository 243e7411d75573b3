"""Whether a host is worth trying: closed, open, half-open. No I/O; the time is an argument.

A breaker is about time: who answers quickly, even with an error, costs publishers nothing, so any
complete reply closes it. After `threshold` failures without a reply in between it opens, and what
is sent to the host fails at once. When its pause is over, a connection is made in the background.
Where connecting was the trouble, success closes it; one more failure opens it again. A host that
let us connect and was silent then has to answer something first: half-open, it gets one post at a
time that nobody waits for.

Failures of one moment count as one: when a host restarts, everything under way on it fails at once.
Timeouts count each.
"""

from __future__ import annotations

import math
import random
from enum import StrEnum


class State(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """One host that has failed and not answered since.

    Args:
        threshold: failures after which it opens.
        least: seconds of its first pause; each further one is twice as long.
        most: seconds of its longest pause.

    Attributes:
        until: when its pause is over, while it is open.
        probing: whether something is under way that will show how the host is.
        wanted: when a post was turned away last.
    """

    __slots__ = (
        "_counted", "_failures", "_half_open_since", "_least", "_most", "_pause", "_silent",
        "_threshold", "probing", "state", "until", "wanted",
    )  # fmt: skip

    def __init__(self, threshold: int, least: float, most: float) -> None:
        self.state = State.CLOSED
        self.until = math.inf
        self.probing = False
        self.wanted = 0.0
        self._threshold = threshold
        self._least = least
        self._most = most
        self._failures = 0
        self._counted = -math.inf
        self._pause = 0.0
        self._silent = False
        self._half_open_since = math.inf

    def failed(self, now: float, began: float, *, connected: bool, timeout: bool) -> bool:
        """Something failed.

        Args:
            began: when that something was started.
            connected: whether there was a connection.

        Returns:
            Whether the breaker has opened by that.
        """
        if self.state is State.OPEN:
            return False  # under way since before
        if self.state is State.HALF_OPEN:
            if began < self._half_open_since:
                return False
        else:
            if began >= self._counted or timeout:
                self._failures += 1
                self._counted = now
            if self._failures < self._threshold:
                return False
        self.state, self.probing, self._silent = State.OPEN, False, connected
        self._pause = min(max(self._least, 2 * self._pause), self._most)
        self.until = now + self._pause * random.uniform(0.75, 1.0)
        return True

    def probe(self, now: float) -> None:
        """Its pause is over: a connection is being made."""
        self.state, self.probing, self._half_open_since = State.HALF_OPEN, True, now

    def connected(self) -> None:
        """That connection was made."""
        self.probing = False
        if not self._silent:
            self.state = State.CLOSED
            self._failures = self._threshold - 1
            self._counted = -math.inf

    def trial(self) -> bool:
        """Whether the next post shall show how the host is; `probing` until that is known."""
        if self.state is not State.HALF_OPEN or self.probing:
            return False
        self.probing = True
        return True
