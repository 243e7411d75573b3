"""A short way for small requests to known paths, past what uvicorn does for each request.

Nearly all requests between broadcasters and subscribers are a few hundred bytes to one of a few
paths, and their answers are shorter still. `with_shortcut` makes a class of uvicorn's protocol that
waits for such a request to be whole, then hands it to its ASGI app in one event and writes head and
body of the answer in one go. An app may even answer at once, without a task, see `AtOnce`.
Everything else takes uvicorn's way: other paths, methods, versions and encodings, bodies that are
longer than `MOST`, requests that were sent before the last one was answered.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

log = logging.getLogger(__name__)

MOST = 64 * 1024
"""Bytes of a body; not more than where uvicorn stops reading."""

Headers = tuple[tuple[bytes, bytes], ...]
Answer = tuple[int, Headers, bytes]
"""Status, headers and body. The headers include Content-Length."""

_PHRASES = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    403: b"Forbidden",
    404: b"Not Found",
    408: b"Request Timeout",
    409: b"Conflict",
    410: b"Gone",
    413: b"Content Too Large",
    415: b"Unsupported Media Type",
    429: b"Too Many Requests",
    500: b"Internal Server Error",
    503: b"Service Unavailable",
    507: b"Insufficient Storage",
}
_BROKEN: Answer = (
    500,
    (
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", b"21"),
        (b"connection", b"close"),
    ),
    b"Internal Server Error",
)


class AtOnce(Protocol):
    """An ASGI app that can answer some requests without waiting for anything."""

    def at_once(self, scope: Any, body: bytes) -> Answer | None:
        """The answer to a whole request; None: the app itself has to be called."""
        ...


def with_shortcut(base: Any, apps: Mapping[str, Any]) -> Any:
    """A protocol class.

    Args:
        base: uvicorn's HttpToolsProtocol.
        apps: ASGI apps by path. They send whole answers, with their Content-Length.
    """

    class WithShortcut(base):  # type: ignore[misc]
        is_over = False  # an answer has said so

        def on_headers_complete(self) -> None:
            if self.is_over:
                self.cycle = _Cycle(self, None, self.scope)
                self.cycle.disconnected = True
                return
            app = apps.get(self.url.decode("latin-1"))
            if app is None or not self._is_plain():
                super().on_headers_complete()
                return
            path = self.url.decode("latin-1")
            scope = self.scope
            scope["method"], scope["query_string"] = "POST", b""
            scope["path"], scope["raw_path"] = self.root_path + path, self.url
            self.cycle = _Cycle(self, app, scope)

        def _is_plain(self) -> bool:
            parser, cycle = self.parser, self.cycle
            length = None
            for name, value in self.headers:
                if name == b"content-length":
                    length = int(value)
            return (
                (cycle is None or cycle.response_complete)
                and length is not None
                and length <= MOST
                and parser.get_method() == b"POST"
                and parser.get_http_version() == "1.1"
                and not parser.should_upgrade()
                and not self.expect_100_continue
                and self.limit_concurrency is None
            )

    return WithShortcut


class _Cycle:
    """One request, in the place of uvicorn's RequestResponseCycle, which protocols look into.

    It is its own `message_event`: protocols set that whenever something has come, or never will.
    """

    def __init__(self, protocol: Any, app: Any, scope: Any) -> None:
        self.body = bytearray()
        self.more_body = True
        self.response_started = False
        self.response_complete = False
        self.disconnected = False
        self.keep_alive = protocol.parser.should_keep_alive()
        self._protocol = protocol
        self._app = app
        self._scope = scope
        self._begun = False
        self._start: Any = None
        self._gone: Any = None

    @property
    def message_event(self) -> _Cycle:
        return self

    def set(self) -> None:
        if self._begun:
            if self._gone is not None and not self._gone.done():
                self._gone.set_result(None)
        elif not self.more_body and not self.disconnected:
            self._begun = True
            self._begin()

    def _begin(self) -> None:
        protocol = self._protocol
        at_once = getattr(self._app, "at_once", None)
        if at_once is not None and not protocol.flow.write_paused:
            try:
                answer = at_once(self._scope, bytes(self.body))
            except Exception:
                log.exception("a request to %r failed", self._scope["path"])
                answer = _BROKEN
            if answer is not None:
                self._write(*answer)
                return
        task = protocol.loop.create_task(self._run())
        protocol.tasks.add(task)
        task.add_done_callback(protocol.tasks.discard)

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        except BaseException:
            log.exception("a request to %r failed", self._scope["path"])
        if not self.response_complete and not self.disconnected:
            self._write(*_BROKEN)

    # the ASGI interface

    async def _receive(self) -> dict[str, Any]:
        if self.body is not None:
            body, self.body = bytes(self.body), None  # type: ignore[assignment]
            return {"type": "http.request", "body": body, "more_body": False}
        if not self.response_complete and not self.disconnected:
            self._gone = self._protocol.loop.create_future()
            await self._gone
        return {"type": "http.disconnect"}

    async def _send(self, event: Any) -> None:
        if event["type"] == "http.response.start":
            self._start = event
            return
        flow = self._protocol.flow
        if flow.write_paused and not self.disconnected:
            await flow.drain()
        if event.get("more_body", False) or self._start is None or self.response_complete:
            raise RuntimeError("an app behind the shortcut sends one start and one body")
        if not self.disconnected:
            self._write(self._start["status"], self._start["headers"], event["body"])

    def _write(self, status: int, headers: Any, body: bytes) -> None:
        protocol = self._protocol
        self.response_started = self.response_complete = True
        parts = [_status_line(status)]
        closes = False
        for name, value in (*protocol.server_state.default_headers, *headers):
            parts += (name, b": ", value, b"\r\n")
            closes = closes or name == b"connection"
        if not self.keep_alive and not closes:
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", body)
        protocol.transport.write_now(b"".join(parts))
        if closes or not self.keep_alive:
            protocol.is_over = True
            protocol.transport.close()
        self.set()
        protocol.on_response_complete()


@cache
def _status_line(status: int) -> bytes:
    return b"HTTP/1.1 %d %s\r\n" % (status, _PHRASES.get(status, b""))
