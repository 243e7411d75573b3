"""Looks for work a little longer before the process goes to sleep.

To wake a core that sleeps takes longer than to pass on a message, most of all on a virtual machine
that has given its core back to the host, and one message wakes the broadcaster twice. So where the
last thing that came was followed by another one soon, the event loop keeps turning for a moment;
other programs get the core whenever they want it. Traffic that is less dense than that, and a
subscriber that is further away, costs no processor time.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from functools import partial

from lonelypss.store.base import Store

REQUEST, REPLY, WEBSOCKET = range(3)
"""Where something comes from. How soon something follows is told apart by it."""

_yield: Callable[[], object] = getattr(os, "sched_yield", partial(time.sleep, 0))
_WITH_WORK = 1.5  # what follows is counted from what came, so the work for that is in it


class Poll:
    """Sleeps as soon as there is nothing to do."""

    def happened(self, source: int) -> None:
        """Something came from `source`, one of the above."""


NO_POLL = Poll()


class Polling(Poll):
    """See the module's text; belongs to one event loop.

    Args:
        seconds: how long to look for work that does not come.
        rests: whether to sleep at once, since threads of this process want the interpreter.
        clock: seconds.
        pause: lets other programs have the core.
    """

    def __init__(
        self,
        seconds: float,
        *,
        rests: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[], object] = _yield,
    ) -> None:
        self._seconds = seconds
        self._soon = _WITH_WORK * seconds
        self._rests = rests
        self._clock = clock
        self._pause = pause
        self._followed = [False, False, False]
        """By source: whether something came soon after it the last time."""
        self._source = REQUEST
        self._since = 0.0
        self._turning = False
        self._begins = False
        self._until = 0.0

    def happened(self, source: int) -> None:
        now, followed = self._clock(), self._followed
        followed[self._source] = now - self._since < self._soon
        self._source, self._since = source, now
        if followed[source]:
            self._begins = True
            if not self._turning:
                self._turning = True
                asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        now = self._clock()
        if self._begins:  # what came is dealt with
            self._begins = False
            self._until = now + self._seconds
        elif now < self._until and not self._rests():
            self._pause()
        else:
            self._turning = False
            return
        asyncio.get_running_loop().call_soon(self._turn)


def polling(microseconds: int, store: Store) -> Poll:
    """What the option `idle_poll` asks for."""
    if not microseconds:
        return NO_POLL
    return Polling(microseconds / 1e6, rests=lambda: store.in_threads)
