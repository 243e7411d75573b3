"""The client over plain HTTP: requests out through `Broadcasters`, messages in at two endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from lonelypsc.broadcasters import Broadcasters, Request
from lonelypsc.client import Hub, PubSubClient
from lonelypsc.config.config import PORT_PLACEHOLDER, HttpPubSubConfig, listening_tls
from lonelypsc.content import Content
from lonelypsc.endpoints import ReceiveEndpoint, Receiver, RecoverEndpoint
from lonelypsc.errors import PubSubError, PubSubRequestError
from lonelypsc.listener import Listener, PathApp
from lonelypsc.tracing import make_tracing
from lonelypsp.bodies import (
    BROADCASTER_ENDPOINTS,
    ETAG_FORMAT,
    CheckSubscriptions,
    NotifyHead,
    ResponseCheckSubscriptions,
    ResponseGeneric,
    ResponseNotify,
    SetSubscriptions,
    SubscribeExact,
    SubscribeGlob,
    UnsubscribeExact,
    UnsubscribeGlob,
    subscriber_urls,
)
from lonelypsp.errors import AuthResult, RemoteProtocolError
from lonelypsp.etag import strong_etag, wanted
from lonelypsp.explain import REQUEST_HEADER, Explanation, unpack
from lonelypsp.interests import NO_TOPICS, Topics
from lonelypsp.wire import decode, encode

__all__ = ["HttpPubSubClient", "HttpTransport"]

logger = logging.getLogger(__name__)

R = TypeVar("R", ResponseGeneric, ResponseNotify, ResponseCheckSubscriptions)

# What one request costs a broadcaster, and what one item of a complete list does, in bytes.
_REQUEST_COST = 65_536
_ITEM_COST = 128
_IDENTIFIER_LENGTH = 8
_MIN_RECONCILE_PAUSE = 0.5
_MAX_RECONCILE_PAUSE = 60.0
_DROP_MEMORY = 10.0
_STOP_PATIENCE = 2.0  # seconds for a change that is under way when the client is left


def HttpPubSubClient(config: HttpPubSubConfig) -> PubSubClient:
    """A client that broadcasters reach at `config.host`; does no I/O before it is entered.

    Entering raises PubSubBindError when the `bind` address cannot be listened on. Leaving takes
    back all subscriptions, then stops listening; raises PubSubRequestError if no broadcaster can
    be told.
    """
    return PubSubClient(
        HttpTransport(config),
        receive_buffer_messages=config.receive_buffer_messages,
        receive_buffer_bytes=config.receive_buffer_bytes,
        tracing=make_tracing(config.tracing),
    )


class HttpTransport:
    """See `lonelypsc.client.Transport`."""

    def __init__(self, config: HttpPubSubConfig) -> None:
        self._config = config
        self._auth = config.auth

    async def start(self, hub: Hub) -> None:
        self._hub = hub
        self._lock = asyncio.Lock()
        self._known: Topics | None = None  # what the broadcasters have; None: who knows
        self._used = False  # whether they can have anything of ours
        self._version = 0  # of what they have; odd while it changes
        self._check_now = asyncio.Event()
        self._dropped_at = -_DROP_MEMORY
        self._receiver = Receiver(
            self._config, hub, "", "", missed=self._check_now.set, dropped=self._note_drop
        )
        self._stop_serving = await self._serve()
        self._broadcasters = Broadcasters(self._config)
        self._reconciler = asyncio.create_task(self._reconcile_forever())
        hub.established()

    async def stop(self) -> None:
        """Every step is taken, whatever the earlier ones ended with."""
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._broadcasters.close)
            stack.push_async_callback(self._stop_serving)
            self._receiver.closing = True
            self._reconciler.cancel()
            await asyncio.wait((self._reconciler,))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_PATIENCE):
                    await self._lock.acquire()  # for good: nothing may change any more
            changing = self._version % 2 == 1
            if changing or (self._used and self._known != NO_TOPICS):
                await self._set(NO_TOPICS)

    # serving
    async def _serve(self) -> Callable[[], Awaitable[None]]:
        bind = self._config.bind
        if bind["type"] == "none":
            return _nothing
        if bind["type"] == "manual":
            self._set_urls(self._config.host)
            return await _run_callback(bind["callback"](self._router()))
        routes: dict[str, Any] = {}
        listener = Listener(
            bind["host"],
            bind["port"],
            PathApp(routes),
            limits=bind.get("limits"),
            shortcuts=routes,
            tls=listening_tls(bind),
        )
        await listener.start()
        self._set_urls(self._config.host.replace(PORT_PLACEHOLDER, str(listener.port)))
        prefix = unquote(urlsplit(self._receiver.url).path).removesuffix("/v1/receive")
        for path, endpoint in self._endpoints().items():
            routes[path] = routes[prefix + path] = endpoint
        return listener.stop

    def _set_urls(self, host: str) -> None:
        self._receiver.url, self._receiver.recovery = subscriber_urls(host)

    def _endpoints(self) -> dict[str, ReceiveEndpoint | RecoverEndpoint]:
        return {
            "/v1/receive": ReceiveEndpoint(self._receiver),
            "/v1/recover": RecoverEndpoint(self._receiver),
        }

    def _router(self) -> Any:
        from fastapi import APIRouter
        from starlette.routing import Route

        router = APIRouter()
        for path, endpoint in self._endpoints().items():
            router.routes.append(Route(path, endpoint, methods=["POST"]))
        return router

    # subscriptions
    async def ensure(self, topics: Topics) -> None:
        if self._config.bind["type"] == "none":
            raise RuntimeError(
                "bind: with type 'none' nobody can reach this client: it cannot subscribe"
            )
        async with self._lock:
            if self._known is None:
                await self._set(self._hub.wanted)
            elif missing := topics - self._known:
                await self._change(missing, self._known | missing)
        if time.monotonic() - self._dropped_at < _DROP_MEMORY:
            # a late "unsubscribe" of ours may have hit what was just subscribed
            self._check_now.set()

    async def release(self, topics: Topics) -> None:
        async with self._lock:
            surplus = topics - self._hub.wanted
            if self._known is None:
                await self._set(self._hub.wanted)
            elif surplus := surplus & self._known:
                await self._change(surplus, self._known - surplus)

    async def _change(self, items: Topics, result: Topics) -> None:
        """Changes `items` one by one, or sends the complete list where that is cheaper."""
        if _REQUEST_COST * len(items) >= _ITEM_COST * len(result):
            await self._set(self._hub.wanted)
            return
        for item in items.each():
            before = self._known or NO_TOPICS
            if item & result:
                with self._changing(before | item):
                    await self._subscribe(item)
            else:
                with self._changing(before - item):
                    await self._unsubscribe(item)

    @contextlib.contextmanager
    def _changing(self, result: Topics) -> Iterator[None]:
        """The broadcasters have `result` if this ends well; else only a check can tell."""
        before, self._known = self._known, None
        self._version += 1
        try:
            yield
        except PubSubRequestError as e:
            if not e.may_have_arrived:
                self._known = before
            self._used = self._used or e.may_have_arrived
            raise
        except BaseException:
            self._used = True
            raise
        else:
            self._known, self._used = result, True
        finally:
            self._version += 1
            if self._known is None and self._used:
                self._check_now.set()

    async def _set(self, topics: Topics) -> None:
        """Makes `topics` all that the broadcasters have of ours."""
        receiver = self._receiver
        exact, globs = wanted(topics.exact, topics.globs, receiver.recovery)
        etag = strong_etag(receiver.url, exact, globs)
        body = encode(SetSubscriptions(b"", receiver.url, ETAG_FORMAT, etag, exact, globs))
        fields = {"url": receiver.url, "etag_format": ETAG_FORMAT, "etag": etag}
        with self._changing(topics):
            await self._ask("/v1/set_subscriptions", body, fields, ResponseGeneric)

    async def _subscribe(self, item: Topics) -> None:
        url, recovery = self._receiver.url, self._receiver.recovery
        for topic in item.exact:
            body = encode(SubscribeExact(url, topic, recovery))
            await self._ask_one("/v1/subscribe/exact", body, recovery, {"topic": topic})
        for glob in item.globs:
            body = encode(SubscribeGlob(url, glob, recovery))
            await self._ask_one("/v1/subscribe/glob", body, recovery, {"glob": glob})

    async def _unsubscribe(self, item: Topics) -> None:
        url = self._receiver.url
        for topic in item.exact:
            body = encode(UnsubscribeExact(url, topic))
            await self._ask_one("/v1/unsubscribe/exact", body, None, {"topic": topic})
        for glob in item.globs:
            body = encode(UnsubscribeGlob(url, glob))
            await self._ask_one("/v1/unsubscribe/glob", body, None, {"glob": glob})

    async def _ask_one(
        self, path: str, body: bytes, recovery: str | None, item: dict[str, Any]
    ) -> None:
        fields = {"url": self._receiver.url, "recovery": recovery, **item}
        done = ResponseGeneric(None)  # 409: it is as it should be already
        await self._ask(path, body, fields, ResponseGeneric, conflict=done)

    async def _ask(
        self,
        path: str,
        body: bytes,
        fields: dict[str, Any],
        response: type[R],
        *,
        conflict: R | None = None,
    ) -> R:
        endpoint = BROADCASTER_ENDPOINTS[path]

        def make() -> Request[R]:
            def judge(raw: bytes) -> R:
                reply = decode(response, raw)
                signed = dict(fields)
                if isinstance(reply, ResponseCheckSubscriptions):
                    signed |= {"etag_format": reply.etag_format, "etag": reply.etag}
                self._verify(endpoint.response_operation, signed, reply)
                return reply

            sent = {**fields, "tracing": b""}
            header = self._auth.to_broadcaster.authorize(
                endpoint.request_operation, sent, time.time()
            )
            return Request(header, len(body), body, judge)

        return await self._broadcasters.ask(path, make, conflict=conflict)

    def _verify(self, operation: str, fields: dict[str, Any], reply: R) -> None:
        signed = {**fields, "tracing": reply.tracing}
        check = self._auth.to_subscriber.check
        result = check(operation, signed, reply.authorization, time.time())
        if result is not AuthResult.OK:
            raise RemoteProtocolError(
                f"the reply's authorization is {result.name.lower()}: another secret, a clock that"
                " differs too much, or not from a broadcaster"
            )

    # notify
    async def notify(
        self, topic: bytes, content: Content, explain: bool, tracing: bytes
    ) -> tuple[int, Explanation | None]:
        headers = {REQUEST_HEADER: "1"} if explain else {}

        def make() -> Request[ResponseNotify]:
            identifier = os.urandom(_IDENTIFIER_LENGTH)
            head = encode(NotifyHead(topic, content.sha512, tracing, identifier, content.length))
            fields = {"topic": topic, "identifier": identifier, "sha512": content.sha512}
            header = self._auth.to_broadcaster.authorize(
                "NOTIFY", {**fields, "tracing": tracing}, time.time()
            )

            def judge(raw: bytes) -> ResponseNotify:
                reply = decode(ResponseNotify, raw)
                if reply.identifier != identifier:
                    raise RemoteProtocolError("the reply has the identifier of another notify")
                self._verify("CONFIRM_NOTIFY", {**fields, "subscribers": reply.subscribers}, reply)
                return reply

            small = content.whole()
            body = content.stream(head) if small is None else head + small
            return Request(header, len(head) + content.length, body, judge, headers)

        reply = await self._broadcasters.ask("/v1/notify", make)
        if content.whole() is not None:
            content.report(content.length)
        return reply.subscribers, unpack(reply.tracing) if explain else None

    # reconciling
    def _note_drop(self) -> None:
        self._dropped_at = time.monotonic()

    async def _reconcile_forever(self) -> None:
        failures = 0
        while True:
            pause = self._config.resubscribe_interval
            if failures:
                backoff = min(2.0**failures, _MAX_RECONCILE_PAUSE) + random.random()
                await asyncio.sleep(min(backoff, pause))
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._check_now.wait()
            self._check_now.clear()
            try:
                await self.reconcile()
                failures = 0
            except Exception as e:
                failures += 1
                known = isinstance(e, PubSubError)
                logger.warning(
                    "cannot check the subscriptions of %s: %s",
                    self._receiver.url,
                    e,
                    exc_info=None if known else e,
                )
            await asyncio.sleep(min(_MIN_RECONCILE_PAUSE, pause))

    async def reconcile(self) -> None:
        """Repairs what the broadcasters have, if it is not what they should have."""
        async with self._lock:
            if self._known is None and not self._used:
                return  # nothing was ever asked for
            known, version = self._known, self._version
        if known is not None and await self._has(known):
            return
        async with self._lock:
            if known is not None and self._version != version:
                self._check_now.set()  # it changed meanwhile: what was checked means nothing
                return
            logger.warning("repairing the subscriptions of %s", self._receiver.url)
            await self._set(self._hub.wanted)
        self._hub.gap()

    async def _has(self, topics: Topics) -> bool:
        """Whether `topics` is what the broadcasters have; does not hold up anything."""
        receiver = self._receiver
        exact, globs = wanted(topics.exact, topics.globs, receiver.recovery)
        reply = await self._ask(
            "/v1/check_subscriptions",
            encode(CheckSubscriptions(b"", receiver.url)),
            {"url": receiver.url},
            ResponseCheckSubscriptions,
        )
        return reply.etag == strong_etag(receiver.url, exact, globs)


async def _nothing() -> None:
    """There is nothing to end."""


async def _run_callback(serving: Awaitable[None]) -> Callable[[], Awaitable[None]]:
    """Starts a manual bind's callback; returns what ends it. What it raises is raised by the one
    or the other."""
    task = asyncio.ensure_future(serving)
    await asyncio.wait((task,), timeout=0)
    if task.done():
        task.result()

    def log(ended: asyncio.Future[None]) -> None:
        if not ended.cancelled() and (error := ended.exception()) is not None:
            logger.error("the callback of the manual bind failed", exc_info=error)

    task.add_done_callback(log)

    async def end() -> None:
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled():
            task.result()

    return end
