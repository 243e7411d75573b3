"""The two endpoints that broadcasters post to, as ASGI callables.

Several clients may share one listener when their urls differ only in the fragment, which does not
travel in a request. The web framework then picks the first client's endpoint for all; it finds its
siblings among the routes of the app, and the message goes to the client whose url was signed. The
header `X-Subscription-Fragment`, which our broadcaster sends, says which to try first; without
signatures it decides. Without it (older broadcasters) and without signatures, the first client
that wants the topic gets the message.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import errno
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote

from lonelypsc.client import Hub
from lonelypsc.config.config import HttpPubSubConfig
from lonelypsc.listener import Receive, Scope, Send, answer, send_whole, whole
from lonelypsp.bodies import (
    UNSUBSCRIBE_IMMEDIATE,
    Missed,
    ReceiveHead,
    ResponseConfirmMissed,
    ResponseConfirmReceive,
)
from lonelypsp.errors import AuthResult, RemoteProtocolError
from lonelypsp.guard import HttpLimits, identity, patient, read_into
from lonelypsp.shortcut import Answer
from lonelypsp.spool import Body, Spool
from lonelypsp.wire import SHA512_LENGTH, HeadParser, decode, encode

logger = logging.getLogger(__name__)

FRAGMENT_HEADER = b"x-subscription-fragment"
_OCTETS = b"application/octet-stream"
_RETRY_SOON = (b"retry-after", b"1")
_CLOSE = (b"connection", b"close")
_DISK_PIECE = 1024 * 1024  # bytes, and ...
_DISK_CHUNKS = 64  # ... chunks that are written together
_LIMITS = HttpLimits()
_TOO_SLOW = 408
_MAX_MISSED = 2 * (2 + 65_535)
_UNKNOWN_TOPIC = 410
_AUTH_TEXT = {
    AuthResult.UNAUTHORIZED: b"authorization is required",
    AuthResult.FORBIDDEN: b"the authorization value is wrong, stale or was used before",
    AuthResult.UNAVAILABLE: b"authorization cannot be checked now",
}


@dataclass(eq=False)
class Receiver:
    """What both endpoints of one client share.

    Attributes:
        url: the exact text under which we subscribe; what broadcasters sign.
        recovery: the exact text of the url for missed notices.
        missed: called after an accepted missed notice.
        dropped: called after a message was answered with "unsubscribe".
        closing: whether messages are turned away because the client is being left.
    """

    config: HttpPubSubConfig
    hub: Hub
    url: str
    recovery: str
    missed: Callable[[], None]
    dropped: Callable[[], None]
    closing: bool = False

    @property
    def base(self) -> str:
        return self.url.partition("#")[0]

    @property
    def fragment(self) -> str:
        return self.url.partition("#")[2]


class _Disconnected(Exception):
    """The sender went away; there is nobody to answer."""


class _Refused(Exception):
    """The request is answered with this."""

    def __init__(
        self,
        status: int,
        text: bytes,
        *headers: tuple[bytes, bytes],
        content_type: bytes = b"text/plain; charset=utf-8",
    ) -> None:
        super().__init__(text.decode("utf-8", "replace"))
        self.answer = whole(status, text, *headers, content_type=content_type)


class _Endpoint:
    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await answer(send, 405, b"Method Not Allowed", (b"allow", b"POST"))
            return
        try:
            receive = patient(scope, receive, _LIMITS, asyncio.timeout, time.monotonic)
            await self.handle(scope, receive, send)
        except _Disconnected:
            pass
        except (_Refused, RemoteProtocolError) as e:
            await send_whole(send, _refusal(e))

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    def candidates(self, scope: Scope, hint: str | None) -> list[Receiver]:
        """The receivers that the request may be for: those that the hint names, then the rest."""
        mine = self.receiver
        if hint is not None and hint == mine.fragment:
            return [mine]
        if "app" not in scope and "router" not in scope:
            return [mine]
        found = dict.fromkeys([mine])
        for endpoint in _endpoints(scope, type(self)):
            if endpoint.receiver.base == mine.base:
                found[endpoint.receiver] = None
        return sorted(found, key=lambda r: r.fragment != hint)


class ReceiveEndpoint(_Endpoint):
    """POST /v1/receive: a message. Answered when it is in the buffers of all who want it."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        sha512 = _digest(headers.get(b"repr-digest"))
        chunks = _chunks(receive)
        head, rest = await _head(ReceiveHead, chunks)
        receiver = self._addressee(scope, headers, head, sha512)
        past = partial(read_into, scope, receive)
        body = await _spool(receiver.config, head.length, sha512, rest, chunks, past)
        taken = await receiver.hub.deliver(head.topic, body, head.tracing)
        await send_whole(send, self._confirmation(receiver, head, taken))

    def at_once(self, scope: Scope, body: bytes) -> Answer | None:
        """As `handle`, for a request that is whole; see `lonelypsp.shortcut`."""
        mine = self.receiver
        if len(body) > mine.config.message_body_spool_size or mine.hub.waits_for_receivers:
            return None
        try:
            headers = _headers(scope)
            sha512 = _digest(headers.get(b"repr-digest"))
            parser = HeadParser(ReceiveHead)
            parsed = parser.feed(body)
            if parsed is None:
                raise parser.end()
            head, rest = parsed
            receiver = self._addressee(scope, headers, head, sha512)
            _check_length(receiver.config, head.length)
            received = Body.received(rest, head.length, sha512)
            taken = receiver.hub.offer(head.topic, received, head.tracing)
            return self._confirmation(receiver, head, taken)
        except (_Refused, RemoteProtocolError) as e:
            return _refusal(e)

    def _addressee(
        self, scope: Scope, headers: dict[bytes, bytes], head: ReceiveHead, sha512: bytes
    ) -> Receiver:
        receiver = self._authorized(scope, headers, head, sha512)
        if receiver is None or not receiver.hub.wants(head.topic):
            (receiver or self.receiver).dropped()
            raise _Refused(_UNKNOWN_TOPIC, UNSUBSCRIBE_IMMEDIATE, content_type=_OCTETS)
        return receiver

    def _confirmation(self, receiver: Receiver, head: ReceiveHead, taken: bool) -> Answer:
        if not taken:
            raise _Refused(503, b"the subscriber's buffer is full", _RETRY_SOON)
        fields = {
            "tracing": b"",
            "identifier": head.identifier,
            "num_subscribers": 1,
            "url": receiver.url,
        }
        authorization = receiver.config.auth.to_broadcaster.authorize(
            "CONFIRM_RECEIVE", fields, time.time()
        )
        reply = ResponseConfirmReceive(authorization, b"", head.identifier, 1)
        return whole(200, encode(reply), content_type=_OCTETS)

    def _authorized(
        self, scope: Scope, headers: dict[bytes, bytes], head: ReceiveHead, sha512: bytes
    ) -> Receiver | None:
        """Whom the message is for; None: its sender is known, but its fragment is not."""
        hint = _hint(headers)
        candidates = self.candidates(scope, hint)
        if hint is None and len(candidates) > 1:
            candidates.sort(key=lambda r: (not r.hub.wants(head.topic), r.fragment != ""))
        for receiver in candidates:
            fields = {
                "tracing": head.tracing,
                "url": receiver.url,
                "topic": head.topic,
                "identifier": head.identifier,
                "sha512": sha512,
                **identity(scope),
            }
            if _check(receiver, "RECEIVE", fields, headers):
                unknown = hint is not None and all(r.fragment != hint for r in candidates)
                return None if unknown else _open(receiver)
        raise _Refused(403, _AUTH_TEXT[AuthResult.FORBIDDEN])


class RecoverEndpoint(_Endpoint):
    """POST /v1/recover: notice that messages were missed."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        body = b""
        async for chunk in _chunks(receive):
            body += chunk
            if len(body) > _MAX_MISSED:
                raise _Refused(413, b"longer than any missed notice", _CLOSE)
        missed = decode(Missed, body)
        receivers = self._authorized(scope, headers, missed)
        for receiver in receivers:
            receiver.hub.missed(missed.topic, missed.tracing)
            receiver.missed()
        fields = {"tracing": b"", "topic": missed.topic, "url": receivers[0].recovery}
        authorization = receivers[0].config.auth.to_broadcaster.authorize(
            "CONFIRM_MISSED", fields, time.time()
        )
        await answer(send, 200, encode(ResponseConfirmMissed(authorization)), content_type=_OCTETS)

    def _authorized(
        self, scope: Scope, headers: dict[bytes, bytes], missed: Missed
    ) -> list[Receiver]:
        """All that it may be for: a needless notice is harmless."""
        hint = _hint(headers)
        candidates = self.candidates(scope, hint)
        named = [r for r in candidates if r.fragment == hint]
        found = []
        for receiver in named or candidates:
            fields = {
                "tracing": missed.tracing,
                "recovery": receiver.recovery,
                "topic": missed.topic,
                **identity(scope),
            }
            if _check(receiver, "MISSED", fields, headers):
                found.append(_open(receiver))
        if not found:
            raise _Refused(403, _AUTH_TEXT[AuthResult.FORBIDDEN])
        return found


def _refusal(error: _Refused | RemoteProtocolError) -> Answer:
    if isinstance(error, _Refused):
        return error.answer
    close = (_CLOSE,) if error.status == _TOO_SLOW else ()
    return whole(error.status, str(error).encode("utf-8", "replace"), *close)


def _check(
    receiver: Receiver, operation: str, fields: dict[str, Any], headers: dict[bytes, bytes]
) -> bool:
    """Whether this receiver's url was signed; raises _Refused when no other's can have been."""
    raw = headers.get(b"authorization")
    value = None if raw is None else raw.decode("latin-1")
    result = receiver.config.auth.to_subscriber.check(operation, fields, value, time.time())
    if result in (AuthResult.UNAUTHORIZED, AuthResult.UNAVAILABLE):
        retry = (_RETRY_SOON,) if result is AuthResult.UNAVAILABLE else ()
        raise _Refused(result.status, _AUTH_TEXT[result], *retry)
    return result is AuthResult.OK


def _open(receiver: Receiver) -> Receiver:
    if receiver.closing:
        raise _Refused(503, b"the subscriber is stopping", _RETRY_SOON)
    return receiver


def _endpoints(scope: Scope, kind: type[_Endpoint]) -> Iterator[_Endpoint]:
    """All endpoints of this kind among the routes of the app that serves the request."""
    roots = [scope.get("router"), getattr(scope.get("app"), "router", None)]
    seen: set[int] = set()
    waiting = [root for root in roots if root is not None]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        endpoint = getattr(node, "endpoint", None)
        if isinstance(endpoint, kind):
            yield endpoint
        # a router's or mount's routes; what FastAPI wraps around an included router
        waiting += reversed(getattr(node, "routes", None) or ())
        if (included := getattr(node, "original_router", None)) is not None:
            waiting.append(included)


def _headers(scope: Scope) -> dict[bytes, bytes]:
    """The request's headers; several of one name are one list."""
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        headers[name] = headers[name] + b"," + value if name in headers else value
    return headers


def _hint(headers: dict[bytes, bytes]) -> str | None:
    value = headers.get(FRAGMENT_HEADER)
    return None if value is None else unquote(value.decode("latin-1"))


def _digest(header: bytes | None) -> bytes:
    """The SHA-512 of a `Repr-Digest` header, in its standard form with colons or without."""
    if header is None:
        raise RemoteProtocolError("no Repr-Digest header")
    found = set()
    for item in header.split(b","):
        algorithm, _, value = item.strip().partition(b"=")
        if algorithm.strip().lower() == b"sha-512":
            found.add(_decode_digest(value.partition(b";")[0].strip()))
    if len(found) != 1:
        raise RemoteProtocolError(f"{len(found)} different sha-512 digests in Repr-Digest, not 1")
    return found.pop()


def _decode_digest(value: bytes) -> bytes:
    if value.startswith(b":"):
        if len(value) < 2 or not value.endswith(b":"):
            raise RemoteProtocolError("the sha-512 digest lacks its closing colon")
        value = value[1:-1]
    try:
        digest = base64.b64decode(value, validate=True)
    except binascii.Error:
        raise RemoteProtocolError("the sha-512 digest is not base64") from None
    if len(digest) != SHA512_LENGTH:
        raise RemoteProtocolError(f"the sha-512 digest has {len(digest)} bytes, not 64")
    return digest


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    event = await receive()
    while event["type"] != "http.disconnect":
        if chunk := event.get("body", b""):
            yield chunk
        if not event.get("more_body", False):
            return
        event = await receive()
    raise _Disconnected


async def _head(cls: type[ReceiveHead], chunks: AsyncIterator[bytes]) -> tuple[ReceiveHead, bytes]:
    parser = HeadParser(cls)
    async for chunk in chunks:
        if (parsed := parser.feed(chunk)) is not None:
            return parsed
    raise parser.end()


def _check_length(config: HttpPubSubConfig, length: int) -> None:
    if config.max_receive_body is not None and length > config.max_receive_body:
        raise _Refused(
            413, b"longer than max_receive_body, %d bytes" % config.max_receive_body, _CLOSE
        )


async def _spool(
    config: HttpPubSubConfig,
    length: int,
    sha512: bytes,
    first: bytes,
    chunks: AsyncIterator[bytes],
    past: Callable[[Spool, bytes], Awaitable[bool]],
) -> Body:
    _check_length(config, length)
    try:
        with Spool(
            length,
            memory_limit=config.message_body_spool_size,
            directory=config.spool_directory,
        ) as spool:
            if not await past(spool, first):
                write = _to_disk if spool.on_disk else _to_memory
                await write(spool, first, chunks)
            return spool.finish(sha512)
    except OSError as e:
        logger.exception("a message of %d bytes cannot be kept", length)
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        raise _Refused(507 if full else 500, b"the message cannot be kept on disk", _CLOSE) from e


async def _to_memory(spool: Spool, first: bytes, chunks: AsyncIterator[bytes]) -> None:
    spool.write(first)
    async for chunk in chunks:
        spool.write(chunk)


async def _to_disk(spool: Spool, first: bytes, chunks: AsyncIterator[bytes]) -> None:
    gathered, size = [first], len(first)
    async for chunk in chunks:
        gathered.append(chunk)
        size += len(chunk)
        if size >= _DISK_PIECE or len(gathered) == _DISK_CHUNKS:
            await asyncio.to_thread(spool.write, *gathered)
            gathered, size = [], 0
    if gathered:
        await asyncio.to_thread(spool.write, *gathered)
