"""A publisher that asks what became of its message."""

from __future__ import annotations

from lonelypsp.bodies import UNSUBSCRIBE_IMMEDIATE, ResponseNotify
from lonelypsp.explain import Explanation, unpack
from lonelypsp.wire import decode
from lonelypss.store.base import Kind

from .harness import (
    Running,
    Subscriber,
    broadcaster,
    exchange,
    free_port,
    hmac_auth,
    reply,
)

ASK = (b"X-Explain: 1",)


async def explained(running: Running, headers: tuple[bytes, ...] = ASK) -> Explanation | None:
    request = running.peer.notify(b"foo/bar")
    response = await exchange(running.port, request.bytes(headers=headers))
    running.peer.count(response, request)  # which verifies the signature over the explanation
    return unpack(decode(ResponseNotify, response.body).tracing)


async def test_every_subscriber() -> None:
    auth = hmac_auth()
    async with (
        broadcaster(hmac_auth, explain=True, missed_constant=1000.0) as running,
        Subscriber(auth=auth) as good,
        Subscriber(lambda _: reply(b"no", 500)) as bad,
        Subscriber(lambda _: reply(UNSUBSCRIBE_IMMEDIATE)) as gone,
    ):
        nobody = f"http://127.0.0.1:{free_port()}/"
        for url, recovery, patterns in (
            (good.url, None, ["foo/bar", "foo/*", "**"]),
            (bad.url, "http://127.0.0.1:1/r", ["foo/*"]),
            (gone.url, None, ["foo/bar"]),
            (nobody, None, ["foo/bar"]),
        ):
            for pattern in patterns:
                kind = Kind.GLOB if "*" in pattern else Kind.EXACT
                await running.store.subscribe(kind, pattern.encode(), url, recovery)
        found = await explained(running)
    assert found is not None
    assert (found.omitted, found.websockets) == (0, 0)
    assert found.subscribers[-1].url == good.url  # what needs attention comes first
    by_url = {one.url: one for one in found.subscribers}
    one = by_url[good.url]
    assert (one.outcome, one.reason, one.exact) == ("delivered", "", True)
    assert sorted(one.globs) == ["**", "foo/*"]
    assert 0 < one.seconds < 10
    one = by_url[bad.url]
    assert (one.outcome, one.will_be_told, one.exact) == ("failed", True, False)
    assert "500" in one.reason
    one = by_url[gone.url]
    assert one.outcome == "unsubscribed"
    assert "00 0a" in one.reason
    one = by_url[nobody]
    assert (one.outcome, one.will_be_told) == ("failed", False)
    assert "cannot connect" in one.reason


async def test_nobody_is_told_who_may_not_or_did_not_ask() -> None:
    async with broadcaster() as running:
        assert await explained(running) is None
    async with broadcaster(explain=True) as running:
        assert await explained(running, ()) is None
        assert await explained(running) == Explanation(())
