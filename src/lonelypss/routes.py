"""The HTTP endpoints: parse, check the authorization, act, reply.

Each is a raw ASGI callable, so that neither the standalone app nor an application that embeds the
router pays for a framework on the hot path. `Routes.table` maps paths to them.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from functools import cache, partial
from typing import Any

from lonelypsp.bodies import (
    BROADCASTER_ENDPOINTS,
    ETAG_FORMAT,
    CheckSubscriptions,
    Endpoint,
    NotifyHead,
    ResponseCheckSubscriptions,
    ResponseGeneric,
    ResponseNotify,
    SetSubscriptions,
    SetSubscriptionsHead,
    SubscribeExact,
    SubscribeGlob,
    UnsubscribeExact,
    UnsubscribeGlob,
    smallest_trace,
)
from lonelypsp.errors import AuthResult, RemoteProtocolError
from lonelypsp.etag import strong_etag
from lonelypsp.explain import REQUEST_HEADER
from lonelypsp.guard import HttpLimits, identity, patient
from lonelypsp.replay import Code
from lonelypsp.spool import Body
from lonelypsp.wire import HeadParser, Reader, decode, encode, read
from lonelypss.asgi import ASGIApp, Receive, Scope, Send, respond
from lonelypss.config import BroadcasterConfig
from lonelypss.fanout import NO_REPORT, Explained, Fanout, Report
from lonelypss.intake import Intake, NoRoom, fill, read_into
from lonelypss.leases import NO_LEASES, Leases
from lonelypss.logs import Lines
from lonelypss.metrics import NO_METRICS, Metrics
from lonelypss.store.base import (
    Kind,
    OverQuota,
    Store,
    StoreUnavailable,
    Subscription,
    UsedBefore,
)
from lonelypss.tracing import NO_TRACING, Tracing
from lonelypss.urlpolicy import UrlRefused

log = logging.getLogger(__name__)

_EXPLAIN = REQUEST_HEADER.lower().encode()

LONG_LIST = 100_000
"""Bytes from which a list of subscriptions is taken apart in a thread."""


class Refused(Exception):
    """A request that is answered with an error on purpose."""

    def __init__(self, status: int, text: str, retry_after: int | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.retry_after = retry_after


class Disconnected(Exception):
    """The peer went away before its request was complete; nobody is left to answer."""


class Route:
    """One endpoint as an ASGI callable."""

    def __init__(
        self,
        handler: Callable[[Scope, Receive], Awaitable[bytes]],
        limits: HttpLimits,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._handler = handler
        self._limits = limits
        self._metrics = metrics
        self._lines = Lines(log)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["method"] != "POST":
            await respond(send, 405, b'{"detail":"Method Not Allowed"}', b"application/json")
            return
        status, started = 200, time.monotonic()
        try:
            receive = patient(scope, receive, self._limits, asyncio.timeout, time.monotonic)
            body = await self._handler(scope, receive)
        except Disconnected:
            status = 499
            why = "the peer left before its request was complete"
            self._tell(logging.INFO, scope, status, "%s: %s", scope["path"], why, reason=why)
        except _FORESEEN as e:
            refused = as_refused(e)
            status = refused.status
            level = logging.WARNING if refused.status >= 500 else logging.INFO
            about = scope["path"], refused.status, refused
            self._tell(level, scope, status, "%r answered %d: %s", *about, reason=str(refused))
            text = f"{refused}\n".encode()
            await respond(
                send, refused.status, text, b"text/plain; charset=utf-8", refused.retry_after
            )
        else:
            await respond(send, 200, body, b"application/octet-stream")
        self._metrics.request(scope["path"], status, time.monotonic() - started)

    def _tell(
        self, level: int, scope: Scope, status: int, text: str, *args: object, reason: str
    ) -> None:
        client = (scope.get("client") or ("unknown",))[0]
        self._lines.write(
            level,
            (client, status),
            text,
            *args,
            path=scope["path"],
            status=status,
            client=client,
            reason=reason,
        )


_FORESEEN = (
    Refused,
    RemoteProtocolError,
    UrlRefused,
    StoreUnavailable,
    UsedBefore,
    NoRoom,
    OverQuota,
)


def as_refused(e: Exception) -> Refused:
    """The one place where errors become statuses. Anything else is a bug, and a 500."""
    match e:
        case Refused():
            return e
        case RemoteProtocolError():
            return Refused(e.status, str(e))
        case NoRoom():
            return Refused(e.status, str(e), e.retry_after)
        case UrlRefused():
            return Refused(400, str(e))
        case UsedBefore():
            return Refused(403, _AUTH_TEXTS[AuthResult.FORBIDDEN])
        case OverQuota():
            return Refused(429, str(e))
        case StoreUnavailable():
            return Refused(503, f"the database is not available: {e}", e.retry_after)
    raise e


class Routes:
    """The endpoints of one broadcaster.

    Attributes:
        leaving: it is going to stop, and should get no more work.
        draining: it refuses new messages.
    """

    def __init__(
        self,
        config: BroadcasterConfig,
        store: Store,
        fanout: Fanout,
        intake: Intake,
        metrics: Metrics = NO_METRICS,
        tracing: Tracing = NO_TRACING,
        leases: Leases = NO_LEASES,
    ) -> None:
        self.config = config
        self.store = store
        self.leases = leases
        self.fanout = fanout
        self.intake = intake
        self.leaving = False
        self.draining = False
        self.notifies = 0
        handlers: dict[str, Callable[[Scope, Receive], Awaitable[bytes]]] = {
            "/v1/subscribe/exact": self.subscribe_exact,
            "/v1/subscribe/glob": self.subscribe_glob,
            "/v1/unsubscribe/exact": self.unsubscribe_exact,
            "/v1/unsubscribe/glob": self.unsubscribe_glob,
            "/v1/check_subscriptions": self.check_subscriptions,
            "/v1/set_subscriptions": self.set_subscriptions,
            "/v1/notify": self.notify,
        }
        self.metrics = metrics
        self.tracing = tracing
        self.table: Mapping[str, ASGIApp] = {
            path: Route(handler, config.http_limits, metrics) for path, handler in handlers.items()
        }

    async def subscribe_exact(self, scope: Scope, receive: Receive) -> bytes:
        request = decode(SubscribeExact, await self._whole_body(receive))
        signed = {"url": request.url, "recovery": request.recovery, "topic": request.topic}
        await self._allow(scope, request.tracing, signed)
        self._check_urls(scope, request.url, request.recovery)
        is_new = await self.store.subscribe(
            Kind.EXACT, request.topic, request.url, request.recovery
        )
        self.leases.seen(request.url)
        if not is_new:
            raise Refused(409, "this url is subscribed to this topic already")
        return self._generic(scope, signed)

    async def subscribe_glob(self, scope: Scope, receive: Receive) -> bytes:
        request = decode(SubscribeGlob, await self._whole_body(receive))
        signed = {"url": request.url, "recovery": request.recovery, "glob": request.glob}
        await self._allow(scope, request.tracing, signed)
        self._check_urls(scope, request.url, request.recovery)
        is_new = await self.store.subscribe(
            Kind.GLOB, request.glob.encode("utf-8"), request.url, request.recovery
        )
        self.leases.seen(request.url)
        if not is_new:
            raise Refused(409, "this url is subscribed to this glob already")
        return self._generic(scope, signed)

    async def unsubscribe_exact(self, scope: Scope, receive: Receive) -> bytes:
        request = decode(UnsubscribeExact, await self._whole_body(receive))
        signed = {"url": request.url, "recovery": None, "topic": request.topic}
        await self._allow(scope, request.tracing, signed)
        if not await self.store.unsubscribe(Kind.EXACT, request.topic, request.url):
            raise Refused(409, "this url is not subscribed to this topic")
        return self._generic(scope, signed)

    async def unsubscribe_glob(self, scope: Scope, receive: Receive) -> bytes:
        request = decode(UnsubscribeGlob, await self._whole_body(receive))
        signed = {"url": request.url, "recovery": None, "glob": request.glob}
        await self._allow(scope, request.tracing, signed)
        if not await self.store.unsubscribe(Kind.GLOB, request.glob.encode("utf-8"), request.url):
            raise Refused(409, "this url is not subscribed to this glob")
        return self._generic(scope, signed)

    async def check_subscriptions(self, scope: Scope, receive: Receive) -> bytes:
        request = decode(CheckSubscriptions, await self._whole_body(receive))
        await self._allow(scope, request.tracing, {"url": request.url})
        rows = await self.store.subscriptions(request.url)
        if rows:
            self.leases.seen(request.url)
        if len(rows) < LONG_LIST // 100:
            etag = _etag(request.url, rows)
        else:
            etag = await asyncio.to_thread(_etag, request.url, rows)
        signed = {"etag_format": ETAG_FORMAT, "etag": etag}
        return encode(
            ResponseCheckSubscriptions(self._authorize(scope, b"", signed), b"", ETAG_FORMAT, etag)
        )

    async def set_subscriptions(self, scope: Scope, receive: Receive) -> bytes:
        body = await self._whole_body(receive)
        head = read(SetSubscriptionsHead, Reader(body))
        if head.etag_format != ETAG_FORMAT:
            raise RemoteProtocolError(f"etag format {head.etag_format} is not {ETAG_FORMAT}")
        signed = {"etag_format": head.etag_format, "etag": head.etag}
        decoded = cache(partial(decode, SetSubscriptions, body))

        def listed() -> tuple[Sequence[Any], Sequence[Any]]:
            return decoded().exact, decoded().globs

        await self._allow(scope, head.tracing, {"url": head.url, "listed": listed, **signed})
        if len(body) < LONG_LIST:
            request = self._checked_list(scope, decoded)
        else:
            request = await asyncio.to_thread(self._checked_list, scope, decoded)
        await self.store.set_subscriptions(request.url, request.exact, request.globs)
        if request.exact or request.globs:
            self.leases.seen(request.url)
        return self._generic(scope, signed)

    def _checked_list(
        self, scope: Scope, decoded: Callable[[], SetSubscriptions]
    ) -> SetSubscriptions:
        request = decoded()
        if strong_etag(request.url, request.exact, request.globs) != request.etag:
            raise RemoteProtocolError("the etag is not that of the list that came with it")
        recoveries = {r for _, r in request.exact} | {r for _, r in request.globs}
        if recoveries:  # an empty list removes what should never have been there
            self._check_urls(scope, request.url, *recoveries)
        return request

    def _check_urls(self, scope: Scope, *urls: str | None) -> None:
        own = _own_listener(scope)
        for url in urls:
            if url is not None:
                try:
                    self.fanout.sender.policy.check_subscriber(url, own)
                except UrlRefused as e:
                    self.metrics.url_refused(e.kind)
                    raise

    async def notify(self, scope: Scope, receive: Receive) -> bytes:
        if self.draining or self.notifies >= self.config.max_notifies:
            why = "stopping" if self.draining else "busy (max_notifies)"
            raise Refused(503, f"this broadcaster is {why}", 1)
        self.notifies += 1
        received_ns, started = time.time_ns(), time.monotonic()
        report = self._report(scope)
        try:
            head, rest, more = await _notify_head(receive)
            signed = {"topic": head.topic, "identifier": head.identifier, "sha512": head.sha512}
            codes = self._check(scope, head.tracing, signed)
            if self.fanout.is_loop(head.topic, head.tracing):
                raise Refused(508, "this message was forwarded too often (max_hops): a loop")
            with (
                self.tracing.notify("http", head.topic, head.length, head.tracing) as step,
                closing(await self._message(scope, receive, head, rest, more)) as body,
            ):
                count = await self.fanout.notify(head.topic, body, report, step, codes)
                step.answered(count)
        finally:
            self.notifies -= 1
        self.metrics.notified("http", time.monotonic() - started)
        tracing = report.pack() or smallest_trace(received_ns, time.time_ns())
        authorization = self._authorize(scope, tracing, {**signed, "subscribers": count})
        return encode(ResponseNotify(authorization, tracing, count, head.identifier))

    async def _message(
        self, scope: Scope, receive: Receive, head: NotifyHead, rest: bytes, more: bool
    ) -> Body:
        if not more and head.length <= self.config.message_body_spool_size:
            return Body.received(rest, head.length, head.sha512)
        with self.intake.spool(head.length) as spool:
            if not (more and await read_into(scope, receive, spool, rest)):
                await fill(spool, rest, more, partial(_chunk, receive))
            return spool.finish(head.sha512)

    def _report(self, scope: Scope) -> Report:
        if self.config.explain and any(name == _EXPLAIN for name, _ in scope["headers"]):
            return Explained()
        return NO_REPORT

    async def _whole_body(self, receive: Receive) -> bytes:
        parts, size, more = [], 0, True
        while more:
            body, more = await _chunk(receive)
            parts.append(body)
            size += len(body)
            if size > self.config.max_request_body:
                limit = self.config.max_request_body
                raise Refused(413, f"the body exceeds max_request_body ({limit:,} bytes)")
        return b"".join(parts)

    async def _allow(self, scope: Scope, tracing: bytes, signed: dict[str, Any]) -> None:
        """Returns if the request may be acted upon."""
        if codes := self._check(scope, tracing, signed):
            await self.fanout.remember(codes)

    def _check(self, scope: Scope, tracing: bytes, signed: dict[str, Any]) -> Sequence[Code]:
        """What must be remembered before the request is acted upon."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) > 1:
            raise Refused(400, "more than one Authorization header")
        authorization = values[0].decode("latin-1") if values else None
        operation = _endpoint(scope).request_operation
        result = self.config.auth.to_broadcaster.check(
            operation, {"tracing": tracing, **signed, **identity(scope)}, authorization, time.time()
        )
        if result is not AuthResult.OK:
            retry = 1 if result is AuthResult.UNAVAILABLE else None
            raise Refused(result.status, _AUTH_TEXTS[result], retry)
        return self.config.auth.shared.take()

    def _authorize(self, scope: Scope, tracing: bytes, signed: dict[str, Any]) -> str | None:
        operation = _endpoint(scope).response_operation
        fields = {"tracing": tracing, **signed}
        return self.config.auth.to_subscriber.authorize(operation, fields, time.time())

    def _generic(self, scope: Scope, signed: dict[str, Any]) -> bytes:
        return encode(ResponseGeneric(self._authorize(scope, b"", signed)))


_AUTH_TEXTS = {
    AuthResult.UNAUTHORIZED: "authorization is required: both sides need the same secrets file",
    AuthResult.FORBIDDEN: (
        "the authorization is wrong, stale or was used before:"
        " compare the secrets files and the clocks of both sides"
    ),
    AuthResult.UNAVAILABLE: "authorization cannot be checked now",
}


def _endpoint(scope: Scope) -> Endpoint:
    """The row of the protocol's table, also when the router is mounted under a prefix."""
    path: str = scope["path"]
    return BROADCASTER_ENDPOINTS[path[path.rindex("/v1/") :]]


def _etag(url: str, rows: Sequence[Subscription]) -> bytes:
    return strong_etag(
        url,
        [(row.pattern, row.recovery) for row in rows if row.kind is Kind.EXACT],
        [(row.pattern.decode(), row.recovery) for row in rows if row.kind is Kind.GLOB],
    )


_HOST = re.compile(r"(?P<host>\[[^\]]*\]|[^:]*)(?::(?P<port>[0-9]{1,5}))?")


def _own_listener(scope: Scope) -> list[tuple[str, int]]:
    """Host and port at which a request came, as we see it and as its sender does."""
    found = [(server[0], server[1])] if (server := scope.get("server")) and server[1] else []
    default = 443 if scope["scheme"] == "https" else 80
    for name, value in scope["headers"]:
        if name == b"host" and (match := _HOST.fullmatch(value.decode("latin-1"))):
            found.append((match["host"], int(match["port"] or default)))
    return found


async def _chunk(receive: Receive) -> tuple[bytes, bool]:
    event = await receive()
    if event["type"] != "http.request":
        raise Disconnected
    return event.get("body", b""), event.get("more_body", False)


async def _notify_head(receive: Receive) -> tuple[NotifyHead, bytes, bool]:
    parser = HeadParser(NotifyHead)
    while True:
        chunk, more = await _chunk(receive)
        if (parsed := parser.feed(chunk)) is not None:
            return *parsed, more
        if not more:
            raise parser.end()
