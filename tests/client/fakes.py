"""A small broadcaster on real sockets, whose every answer a test can replace."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from lonelypsc.config.auth_config import AuthConfig
from lonelypsc.config.config import HttpPubSubConfig, make_http_pub_sub_config
from lonelypsc.listener import Listener, answer
from lonelypsp.bodies import (
    BROADCASTER_ENDPOINTS,
    CheckSubscriptions,
    Missed,
    NotifyHead,
    ReceiveHead,
    ResponseCheckSubscriptions,
    ResponseConfirmReceive,
    ResponseGeneric,
    ResponseNotify,
    SetSubscriptions,
)
from lonelypsp.errors import AuthResult, RemoteProtocolError
from lonelypsp.etag import strong_etag
from lonelypsp.globs import glob_matches
from lonelypsp.signing import Hmac, Nothing, Token
from lonelypsp.wire import HeadParser, decode, encode

KEY = b"k" * 64
KINDS = ("none", "token", "hmac")


def auth(kind: str, key: bytes = KEY) -> AuthConfig:
    """Both directions; each call makes objects with a replay memory of their own."""
    make: dict[str, Callable[[], Any]] = {
        "none": Nothing,
        "token": lambda: Token("secret-token"),
        "hmac": lambda: Hmac(key),
    }
    return AuthConfig(to_broadcaster=make[kind](), to_subscriber=make[kind]())


@dataclass
class Delivery:
    status: int
    body: bytes
    headers: dict[str, str]


@dataclass
class Broadcaster:
    """Keeps rows and fans out, one after the other.

    Attributes:
        rows: url -> (topic or glob) -> recovery url.
        requests: (path, authorization header, body) of every request that came in.
        script: answers to give instead, used up one by one: (status, body) or
            (status, body, headers), or a callable(path, body) returning such or None.
        fragments: whether deliveries carry X-Subscription-Fragment.
        step: bytes of a delivery that are sent at once; None: all.
    """

    auth: AuthConfig
    rows: dict[str, dict[bytes | str, str | None]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    requests: list[tuple[str, str | None, bytes]] = field(default_factory=list)
    script: list[Any] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)
    fragments: bool = True
    step: int | None = None
    forge: Callable[[Any], Any] | None = None
    forge_operations: tuple[str, ...] = ()
    url: str = ""

    @property
    def paths(self) -> list[str]:
        return [path for path, _, _ in self.requests]

    def topics(self, url: str | None = None) -> set[bytes | str]:
        return {t for u, rows in self.rows.items() for t in rows if url in (None, u)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        headers = dict(scope["headers"])
        value = headers[b"authorization"].decode() if b"authorization" in headers else None
        path = scope["path"]
        self.requests.append((path, value, body))
        if self.script:
            step = self.script.pop(0)
            if callable(step):
                step = step(path, body)
                if asyncio.iscoroutine(step):
                    step = await step
            if step is not None:
                await answer(send, *step)
                return
        try:
            status, reply = await self._act(path, value, body)
        except RemoteProtocolError as e:
            status, reply = e.status, str(e).encode()
        await answer(send, status, reply)

    def _check(self, operation: str, fields: dict[str, Any], value: str | None) -> None:
        result = self.auth.to_broadcaster.check(operation, fields, value, time.time())
        if result is not AuthResult.OK:
            raise RemoteProtocolError(f"auth {result.name}", status=result.status)

    def _sign(self, operation: str, **fields: Any) -> str | None:
        fields = self.forge(fields) if self.forge and operation in self.forge_operations else fields
        return self.auth.to_subscriber.authorize(operation, {"tracing": b"", **fields}, time.time())

    async def _act(self, path: str, value: str | None, body: bytes) -> tuple[int, bytes]:
        endpoint = BROADCASTER_ENDPOINTS[path]
        if path == "/v1/notify":
            return await self._notify(value, body)
        request: Any = decode(endpoint.request, body)
        fields = {n: getattr(request, n) for n in request.__dataclass_fields__ if n != "exact"}
        fields.setdefault("recovery", None)
        self._check(endpoint.request_operation, fields, value)
        rows = self.rows[request.url]
        answers = endpoint.response_operation
        if isinstance(request, SetSubscriptions):
            assert request.etag == strong_etag(request.url, request.exact, request.globs)
            rows.clear()
            rows.update(request.exact)
            rows.update(request.globs)
            signed = self._sign(answers, etag_format=0, etag=request.etag)
            return 200, encode(ResponseGeneric(signed))
        if isinstance(request, CheckSubscriptions):
            exact = sorted((t, r) for t, r in rows.items() if isinstance(t, bytes))
            globs = sorted((t, r) for t, r in rows.items() if isinstance(t, str))
            etag = strong_etag(request.url, exact, globs)
            signed = self._sign(answers, etag_format=0, etag=etag)
            return 200, encode(ResponseCheckSubscriptions(signed, b"", 0, etag))
        kind = path.rpartition("/")[2].replace("exact", "topic")
        item = getattr(request, kind)
        adding = path.startswith("/v1/subscribe")
        if adding == (item in rows):
            return 409, b""
        if adding:
            rows[item] = request.recovery
        else:
            del rows[item]
        signed = self._sign(answers, url=request.url, recovery=fields["recovery"], **{kind: item})
        return 200, encode(ResponseGeneric(signed))

    async def _notify(self, value: str | None, body: bytes) -> tuple[int, bytes]:
        parsed = HeadParser(NotifyHead).feed(body)
        assert parsed is not None
        head, message = parsed
        signed = {"topic": head.topic, "identifier": head.identifier, "sha512": head.sha512}
        self._check("NOTIFY", {**signed, "tracing": head.tracing}, value)
        if len(message) != head.length:
            raise RemoteProtocolError("wrong length")
        count = 0
        for url, rows in list(self.rows.items()):
            for row in list(rows):
                if row == head.topic or (isinstance(row, str) and glob_matches(row, head.topic)):
                    count += await self.deliver(url, head.topic, message, row=row)
        reply = ResponseNotify(
            self._sign("CONFIRM_NOTIFY", subscribers=count, **signed), b"", count, head.identifier
        )
        return 200, encode(reply)

    async def deliver(
        self,
        url: str,
        topic: bytes,
        message: bytes,
        *,
        row: bytes | str | None = None,
        headers: dict[str, str | None] | None = None,
        change: Callable[[bytes], bytes] = lambda raw: raw,
    ) -> int:
        """One RECEIVE; the number of subscribers reached. `headers` replace ours, None removes."""
        sha512 = hashlib.sha512(message).digest()
        identifier = os.urandom(8)
        signed = self._sign("RECEIVE", url=url, topic=topic, identifier=identifier, sha512=sha512)
        sent: dict[str, str | None] = {
            "Repr-Digest": f"sha-512=:{base64.b64encode(sha512).decode()}:",
            "Authorization": signed,
        }
        fragment = url.partition("#")[2]
        if fragment and self.fragments:
            sent["X-Subscription-Fragment"] = quote(fragment, safe="")
        sent |= headers or {}
        body = change(encode(ReceiveHead(b"", topic, identifier, len(message))) + message)
        try:
            got = await self.post(url, body, {k: v for k, v in sent.items() if v is not None})
        except ConnectionRefusedError:
            return 0  # not listening, or not yet
        self.deliveries.append(got)
        if got.body == b"\x00\x0a":
            self.rows[url].pop(row, None)
            return 0
        if got.status != 200:
            return 0
        reply = decode(ResponseConfirmReceive, got.body)
        assert reply.identifier == identifier
        fields = {
            "tracing": b"",
            "identifier": identifier,
            "num_subscribers": reply.num_subscribers,
            "url": url,
        }
        check = self.auth.to_broadcaster.check
        assert check("CONFIRM_RECEIVE", fields, reply.authorization, time.time()) is AuthResult.OK
        return reply.num_subscribers

    async def miss(self, recovery: str, topic: bytes, body: bytes | None = None) -> Delivery:
        signed = self._sign("MISSED", recovery=recovery, topic=topic)
        headers = {} if signed is None else {"Authorization": signed}
        raw = encode(Missed(b"", topic)) if body is None else body
        return await self.post(recovery, raw, headers)

    async def post(self, url: str, body: bytes, headers: dict[str, str]) -> Delivery:
        """The headers go out as they are, also where no client library would send them."""
        parts = urlsplit(url)
        head = [f"POST {quote(parts.path, safe='/%')} HTTP/1.1"]
        head += [f"{n}: {v}" for n, v in ({"Host": parts.netloc} | headers).items()]
        text = "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""])
        loop = asyncio.get_running_loop()
        transport, answered = await loop.create_connection(_Answered, parts.hostname, parts.port)
        try:
            request = text.encode("latin-1") + body
            step = self.step or len(request)
            for at in range(0, len(request), step):
                transport.write(request[at : at + step])
                await asyncio.sleep(0)
            return await answered.delivery
        finally:
            transport.abort()


class _Answered(asyncio.Protocol):
    """Reads one answer, also if it comes before everything was sent."""

    def __init__(self) -> None:
        self.data = b""
        self.delivery: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, empty, body = self.data.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        pairs = [text.split(": ", 1) for text in lines] if empty else []
        headers = {name.title(): value for name, value in pairs}
        if empty and len(body) == int(headers["Content-Length"]) and not self.delivery.done():
            self.delivery.set_result(Delivery(int(line.split()[1]), body, headers))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.delivery.done():
            self.delivery.set_exception(exc or ConnectionError("no answer"))


@asynccontextmanager
async def broadcaster(
    kind: str = "hmac", *, tls: Any = None, **fields: Any
) -> AsyncIterator[Broadcaster]:
    """A running fake broadcaster; `tls` is the context of a server, for https."""
    fake = Broadcaster(auth(kind), **fields)
    listener = Listener("127.0.0.1", 0, fake, tls=tls)
    await listener.start()
    fake.url = f"{'https' if tls else 'http'}://127.0.0.1:{listener.port}"
    try:
        yield fake
    finally:
        await listener.stop()


def config(fake: Broadcaster | str, kind: str = "hmac", **settings: Any) -> HttpPubSubConfig:
    """A client config on a free port for `fake`."""
    url = fake if isinstance(fake, str) else fake.url
    defaults: dict[str, Any] = {
        "bind": {"type": "uvicorn", "host": "127.0.0.1", "port": 0},
        "host": "http://127.0.0.1:{port}",
        "broadcasters": [{"host": url}],
        "auth": auth(kind),
    }
    if settings.get("bind", {}).get("type") == "manual":
        defaults["host"] = "http://127.0.0.1:1"
    return make_http_pub_sub_config(**(defaults | settings))


def urls(client: Any) -> tuple[str, str]:
    """Receive and recovery url of an entered client."""
    receiver = client._transport._receiver
    return receiver.url, receiver.recovery


async def noop(router: Any) -> None:
    """A manual bind that serves nothing."""
