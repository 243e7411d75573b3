"""What load balancers and supervisors ask: are you alive, and should you get work?"""

from __future__ import annotations

import asyncio
import json
import logging

from lonelypss.asgi import Receive, Scope, Send, respond
from lonelypss.routes import Routes
from lonelypss.store.base import StoreUnavailable

log = logging.getLogger(__name__)

_PATIENCE = 2.0  # seconds for the database


class Health:
    """Two endpoints: /healthz answers 200 as long as anything is answered at all; /readyz answers
    503 while requests would be refused, and why.

    Neither tells anything about subscriptions, and neither needs authorization.
    """

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self.table = {"/healthz": self.alive, "/readyz": self.ready}

    async def alive(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _answer(scope, send, 200, {"status": "ok"})

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = await self.reason(logging.WARNING)
        if reason is None:
            await _answer(scope, send, 200, {"status": "ready"})
        else:
            await _answer(scope, send, 503, {"status": "not ready", "reason": reason})

    async def reason(self, level: int = logging.DEBUG) -> str | None:
        """Why requests would be refused; None: they would not.

        Args:
            level: of the line in the log that tells what the database said.
        """
        if self._routes.leaving:
            return "draining: this broadcaster is stopping"
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._routes.store.next_due()
        except TimeoutError:
            return "the database does not answer"
        except StoreUnavailable as e:
            log.log(level, "not ready: %s", e)
            return "the database is not available, see the log"
        return None


async def _answer(scope: Scope, send: Send, status: int, body: dict[str, str]) -> None:
    if scope["type"] != "http":
        await send({"type": "websocket.close", "code": 1000})
        return
    if scope["method"] not in ("GET", "HEAD"):
        await respond(send, 405, b'{"detail":"Method Not Allowed"}', b"application/json")
        return
    await respond(send, status, json.dumps(body).encode(), b"application/json")
