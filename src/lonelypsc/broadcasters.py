"""Requests to broadcasters, and the one loop that retries them."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import AsyncIterable, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Generic, TypeVar

import aiohttp

from lonelypsc.config.config import BroadcastersShuffler, HttpPubSubConfig
from lonelypsc.errors import (
    Attempt,
    PubSubRequestAmbiguousError,
    PubSubRequestConnectionAbandonedError,
    PubSubRequestRefusedError,
    PubSubRequestRetriesExhaustedError,
)
from lonelypsp.errors import RemoteProtocolError

T = TypeVar("T")

MAX_REPLY = 256 * 1024
_MAX_SHOWN = 200
_MAX_BYTES = 1024 * 1024  # what aiohttp takes as bytes without a warning
_MAX_RETRY_AFTER = 10.0
_MAX_CONNECTIONS = 100
# Broadcasters (uvicorn) close idle connections after 5 s; one that is closed while a request is
# written to it costs an ambiguous failure.
_KEEPALIVE = 3.0
_UNAVAILABLE = frozenset((502, 503, 504))


@dataclass(frozen=True, slots=True)
class Request(Generic[T]):
    """One try, complete with its signature; never sent twice.

    Attributes:
        authorization: value of the header, or None.
        length: of the body, in bytes.
        body: the body.
        judge: makes the result of a reply's body; raises RemoteProtocolError for a bad one.
        headers: more of them.
    """

    authorization: str | None
    length: int
    body: bytes | AsyncIterable[bytes | memoryview]
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
        self, end: _End, outcome: str, *, arrived: bool = False, retry_after: float = 0.0
    ) -> None:
        super().__init__(outcome)
        self.end = end
        self.arrived = arrived or end is _End.AMBIGUOUS
        self.retry_after = retry_after


class Broadcasters:
    """The configured broadcasters behind one connection pool.

    Must be made and closed on the event loop that uses it.
    """

    def __init__(self, config: HttpPubSubConfig) -> None:
        self._config = config
        self._shuffler = BroadcastersShuffler(config.broadcasters)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, limit_per_host=_MAX_CONNECTIONS, keepalive_timeout=_KEEPALIVE
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            headers={"Accept-Encoding": "identity"},
        )

    async def close(self) -> None:
        await self._session.close()

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
        for turn in range(self._config.outgoing_retries_per_broadcaster):
            if turn:
                await asyncio.sleep(max(2 ** (turn - 1) + random.random(), retry_after))
            retry_after = 0.0
            for broadcaster in self._shuffler:
                url = broadcaster["host"] + path
                if self._session.closed:
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
        passes = (
            f"outgoing_retries_per_broadcaster={len(attempts) // len(self._config.broadcasters)}"
        )
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
        status, body = await self._post(url, request)
        if status == 409 and conflict is not None:
            return conflict
        if status != 200:
            text = f"HTTP {status}: {_shown(body)}" if body else f"HTTP {status}"
            raise _TryFailed(_End.REFUSED, text)
        try:
            return request.judge(body)
        except RemoteProtocolError as e:
            raise _TryFailed(_End.AMBIGUOUS, f"bad reply: {e}") from e

    async def _post(self, url: str, request: Request[T]) -> tuple[int, bytes]:
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(request.length),
            **request.headers,
        }
        if request.authorization is not None:
            headers["Authorization"] = request.authorization
        try:
            async with self._session.post(
                url,
                data=_payload(request.body),
                headers=headers,
                allow_redirects=False,
                timeout=self._timeout(request.length),
            ) as response:
                body = await _read(response)
        except (
            aiohttp.ClientConnectorError,
            aiohttp.ConnectionTimeoutError,
            aiohttp.InvalidURL,
        ) as e:
            raise _TryFailed(_End.UNREACHED, f"not reached: {_reason(e)}") from e
        except TimeoutError as e:
            raise _TryFailed(_End.AMBIGUOUS, f"timed out ({_reason(e)})") from e
        except (aiohttp.ClientError, OSError) as e:
            raise _TryFailed(_End.AMBIGUOUS, f"connection failed: {_reason(e)}") from e
        if response.status in _UNAVAILABLE:
            text = f"HTTP {response.status}: {_shown(body)}" if body else f"HTTP {response.status}"
            raise _TryFailed(
                _End.UNAVAILABLE,
                text,
                arrived=response.status != 503,  # a proxy says so when the answer is missing
                retry_after=_retry_after(response),
            )
        return response.status, body

    def _timeout(self, length: int) -> aiohttp.ClientTimeout:
        config = self._config
        total = config.outgoing_http_timeout_total
        return aiohttp.ClientTimeout(
            total=None if total is None else total + length / config.outgoing_http_min_rate,
            connect=config.outgoing_http_timeout_connect,
            sock_read=config.outgoing_http_timeout_sock_read,
            sock_connect=config.outgoing_http_timeout_sock_connect,
        )


def _payload(body: bytes | AsyncIterable[bytes | memoryview]) -> Any:
    return io.BytesIO(body) if isinstance(body, bytes) and len(body) > _MAX_BYTES else body


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_REPLY:
            response.close()
            raise _TryFailed(_End.AMBIGUOUS, f"bad reply: longer than {MAX_REPLY:,} bytes")
    return bytes(body)


def _retry_after(response: aiohttp.ClientResponse) -> float:
    value = response.headers.get("Retry-After", "")
    return min(float(value), _MAX_RETRY_AFTER) if value.isascii() and value.isdigit() else 0.0


def _shown(body: bytes) -> str:
    text = body[:_MAX_SHOWN].decode("utf-8", "replace")
    return repr(text) + ("…" if len(body) > _MAX_SHOWN else "")


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
