"""Requests to broadcasters, and the one loop that retries them."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Generic, TypeVar

from lonelypsc.config.config import BroadcastersShuffler, HttpPubSubConfig
from lonelypsc.errors import (
    Attempt,
    PubSubRequestAmbiguousError,
    PubSubRequestConnectionAbandonedError,
    PubSubRequestRefusedError,
    PubSubRequestRetriesExhaustedError,
)
from lonelypsc.http_connection import Body, NoReply, NotSent, Pool, Reply, Target
from lonelypsp.errors import RemoteProtocolError

T = TypeVar("T")

_MAX_SHOWN = 200
_MAX_RETRY_AFTER = 10.0
_UNAVAILABLE = frozenset((502, 503, 504))


@dataclass(frozen=True, slots=True)
class Request(Generic[T]):
    """One try, complete with its signature; never sent twice.

    Attributes:
        authorization: value of the header, or None.
        length: of the body, in bytes.
        body: the body; what reading it raises ends all tries.
        judge: makes the result of a reply's body; raises RemoteProtocolError for a bad one.
        headers: more of them.
    """

    authorization: str | None
    length: int
    body: Body
    judge: Callable[[bytes], T]
    headers: Mapping[str, str] = field(default_factory=dict)


class _End(Enum):
    """How a try that gave no result ended."""

    UNAVAILABLE = auto()
    UNREACHED = auto()
    AMBIGUOUS = auto()
    REFUSED = auto()


class _TryFailed(Exception):
    def __init__(
        self,
        end: _End,
        outcome: str,
        *,
        arrived: bool = False,
        stale: bool = False,
        retry_after: float = 0.0,
    ) -> None:
        super().__init__(outcome)
        self.end = end
        self.arrived = arrived or end is _End.AMBIGUOUS
        self.stale = stale
        self.retry_after = retry_after


class Broadcasters:
    """The configured broadcasters behind one connection pool.

    Must be made and closed on the event loop that uses it.
    """

    def __init__(self, config: HttpPubSubConfig) -> None:
        self._config = config
        self._shuffler = BroadcastersShuffler(config.broadcasters)
        self._pool = Pool(config, config.tls)
        self._targets: dict[str, Target] = {}

    async def close(self) -> None:
        await self._pool.close()

    async def ask(
        self, path: str, make: Callable[[], Request[T]], *, conflict: T | None = None
    ) -> T:
        """Sends a request until a broadcaster gives a good reply.

        Args:
            path: of the endpoint.
            make: called for every try, so that each has its own signature and a whole body.
            conflict: the result when a broadcaster answers 409; None: that is a refusal.

        Raises:
            PubSubRequestRefusedError: a broadcaster said no.
            PubSubRequestAmbiguousError: no good reply, and one may have acted on the request.
            PubSubRequestRetriesExhaustedError: all were unavailable every time.
            PubSubRequestConnectionAbandonedError: `close` was called.
        """
        attempts: list[Attempt] = []
        ends: set[_End] = set()
        retry_after = 0.0
        resent = False
        for turn in range(self._config.outgoing_retries_per_broadcaster):
            if turn:
                await asyncio.sleep(max(2 ** (turn - 1) + random.random(), retry_after))
            retry_after = 0.0
            left = deque(self._shuffler)
            while left:
                url = left[0]["host"] + path
                if self._pool.closed:
                    raise PubSubRequestConnectionAbandonedError("the client was left", attempts)
                try:
                    return await self._try(url, make(), conflict)
                except _TryFailed as e:
                    attempts.append(Attempt(url, str(e), e.arrived))
                    ends.add(e.end)
                    retry_after = max(retry_after, e.retry_after)
                    if e.end is _End.REFUSED:
                        raise PubSubRequestRefusedError("refused:", attempts) from e
                    if e.end is _End.AMBIGUOUS and not self._config.outgoing_retry_ambiguous:
                        raise PubSubRequestAmbiguousError(
                            "the broadcaster may or may not have acted on the request; set"
                            " outgoing_retry_ambiguous=True to try again in such a case:",
                            attempts,
                        ) from e
                    if e.stale and not resent:
                        resent = True  # at once and to the same one: nothing is wrong with it
                    else:
                        left.popleft()
        if self._pool.closed:
            raise PubSubRequestConnectionAbandonedError("the client was left", attempts)
        passes = f"outgoing_retries_per_broadcaster={self._config.outgoing_retries_per_broadcaster}"
        if ends == {_End.UNAVAILABLE}:
            raise PubSubRequestRetriesExhaustedError(
                f"no broadcaster was available; tried as often as {passes} allows:", attempts
            )
        raise PubSubRequestAmbiguousError(
            f"no broadcaster gave a good reply; tried as often as {passes} allows;"
            " check broadcasters and the outgoing_http_timeout_* settings:",
            attempts,
        )

    async def _try(self, url: str, request: Request[T], conflict: T | None) -> T:
        target = self._targets.get(url)
        if target is None:
            target = self._targets[url] = self._pool.target(url)
        headers = request.headers
        if request.authorization is not None:
            headers = {"Authorization": request.authorization, **headers}
        try:
            reply = await self._pool.post(target, headers, request.length, request.body)
        except NotSent as e:
            raise _TryFailed(_End.UNREACHED, f"not reached: {e}") from e
        except NoReply as e:
            raise _TryFailed(_End.AMBIGUOUS, str(e), stale=e.stale) from e
        if reply.status == 200:
            try:
                return request.judge(reply.body)
            except RemoteProtocolError as e:
                raise _TryFailed(_End.AMBIGUOUS, f"bad reply: {e}") from e
        if reply.status == 409 and conflict is not None:
            return conflict
        raise _unwilling(reply)


def _unwilling(reply: Reply) -> _TryFailed:
    text = f"HTTP {reply.status}"
    if reply.body:
        text += f": {_shown(reply.body)}"
    if reply.status not in _UNAVAILABLE:
        return _TryFailed(_End.REFUSED, text)
    return _TryFailed(
        _End.UNAVAILABLE,
        text,
        arrived=reply.status != 503,  # a proxy says so when the answer is missing
        retry_after=_retry_after(reply.retry_after),
    )


def _retry_after(value: str) -> float:
    return min(float(value), _MAX_RETRY_AFTER) if value.isascii() and value.isdigit() else 0.0


def _shown(body: bytes) -> str:
    text = body[:_MAX_SHOWN].decode("utf-8", "replace")
    return repr(text) + ("…" if len(body) > _MAX_SHOWN else "")
