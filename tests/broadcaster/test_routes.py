"""Every endpoint over real sockets: recorded exchanges, bad input, limits."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vectors
from lonelypsp.bodies import (
    NotifyHead,
    ResponseCheckSubscriptions,
    ResponseGeneric,
    ResponseNotify,
    subscriber_urls,
)
from lonelypsp.etag import strong_etag
from lonelypsp.signing import AuthConfig, Hmac, Token, to_sign
from lonelypsp.signing import _code as hmac_code
from lonelypsp.wire import HeadParser, decode, encode
from lonelypss.store.base import Kind, StoreUnavailable
from waiting import until

from .harness import (
    NO_AUTH,
    Answer,
    Peer,
    Received,
    Running,
    Signed,
    Subscriber,
    broadcaster,
    exchange,
    hmac_auth,
    read_response,
    reply,
    request_bytes,
    rows,
    subscribed,
    within,
)
from .test_urlpolicy import ALWAYS_DENIED, REFUSED_URLS, url_of

# What the older implementation was observed to do

ABOUT = vectors.load("stateless")["about"]
NOW = ABOUT["now"]
URL, RECOVERY = subscriber_urls("http://127.0.0.1:3002")

NOT_HERE = {"/v1/receive_for_websockets", "/v1/missed_for_websockets"}
"""Endpoints of a port of their own, see test_peers.py."""

DELIBERATE: dict[str, dict[str, Any]] = {
    # 00 0a only unsubscribes with 2xx or 410, so this row's subscription stays, ...
    "check after unsubscribe immediate": {
        "etag": strong_etag(URL, [(b"foo/bar", RECOVERY)], []),
    },
}
"""Rows that we answer differently, and with what. Besides, for all rows: errors carry a text, and
the notify response carries the smallest trace, not the empty one of the recorder's tracer."""


class Recorded(Hmac):
    """Signs with the recorded nonce."""

    def authorize(self, operation: str, fields: Any, now: float) -> str:
        message = to_sign(operation, fields, int(now), ABOUT["nonce"])
        return f"X-HMAC {int(now)}:{ABOUT['nonce']}:{hmac_code(self._first, message)}"


def recorded_auth() -> AuthConfig:
    return AuthConfig(
        Recorded(bytes.fromhex(ABOUT["to_broadcaster_secret_raw_hex"])),
        Recorded(bytes.fromhex(ABOUT["to_subscriber_secret_raw_hex"])),
    )


def recorded_rows(auth: str) -> list[dict[str, Any]]:
    return [
        row
        for row in vectors.load("stateless")["broadcaster_responses"]
        if row["inputs"]["auth"] == auth
    ]


def test_the_table_of_differences_names_existing_rows() -> None:
    every = vectors.load("stateless")["broadcaster_responses"]
    names = {row["name"].split(" auth=")[0] for row in every}
    assert set(DELIBERATE) <= names
    paths = {row["inputs"]["path"].partition("?")[0] for row in every}
    assert paths >= NOT_HERE
    assert {row["inputs"]["auth"] for row in every} == {"none", "hmac"}


@pytest.mark.parametrize("auth", ["none", "hmac"])
async def test_recorded_exchanges(auth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(
        time=lambda: NOW, time_ns=lambda: ABOUT["now_ns"], monotonic=time.monotonic
    )
    monkeypatch.setattr("lonelypss.routes.time", clock)
    monkeypatch.setattr("lonelypss.fanout.time", clock)
    make_auth = recorded_auth if auth == "hmac" else lambda: NO_AUTH
    state: dict[str, Any] = {}

    def answer(received: Received) -> Answer:
        if "unsubscribes" in state["name"]:
            return reply(b"\x00\x0a", 400)
        if "bad response" in state["name"]:
            return reply(b"", 503)
        peer = make_auth().to_broadcaster
        fields = {
            "tracing": b"",
            "identifier": received.head.identifier,
            "num_subscribers": 1,
            "url": URL,
        }
        from lonelypsp.bodies import ResponseConfirmReceive

        value = peer.authorize("CONFIRM_RECEIVE", fields, NOW)
        return reply(encode(ResponseConfirmReceive(value, b"", received.head.identifier, 1)))

    async with Subscriber(answer) as subscriber, broadcaster(make_auth) as running:
        here = f"127.0.0.1:{subscriber.port}"
        policy = running.broadcaster.sender.policy
        target = policy.target
        monkeypatch.setattr(
            policy, "target", lambda url: target(url.replace("127.0.0.1:3002", here))
        )
        for row in recorded_rows(auth):
            inputs, expected = row["inputs"], row["expected"]
            path = inputs["path"].partition("?")[0]
            state["name"] = name = row["name"].split(" auth=")[0]
            body = bytes.fromhex(inputs["body_hex"])
            if "one subscriber" in name:
                await running.store.subscribe(Kind.EXACT, b"foo/bar", URL, RECOVERY)
            response = await exchange(
                running.port,
                request_bytes(
                    inputs["path"],
                    body,
                    method=inputs["method"],
                    authorization=inputs["headers"].get("Authorization"),
                ),
            )
            if path in NOT_HERE:
                assert response.status == 404, name
                continue
            assert response.status == expected["status"], (name, response)
            if response.status == 200:
                ours = comparable(response.body, path, body, make_auth())
                recorded = bytes.fromhex(expected["body_hex"])
                if name in DELIBERATE:
                    wanted = decode(ResponseCheckSubscriptions, recorded)
                    assert decode(ResponseCheckSubscriptions, ours).etag != wanted.etag
                    assert decode(ResponseCheckSubscriptions, ours).etag == DELIBERATE[name]["etag"]
                else:
                    assert ours == recorded, name
                assert response.headers["content-type"] == expected["content_type"]
            elif expected["body_hex"]:
                assert response.body.hex() == expected["body_hex"]
                assert response.headers["content-type"] == expected["content_type"]
            else:
                assert_short_text(response)


def comparable(body: bytes, path: str, request: bytes, auth: AuthConfig) -> bytes:
    """A response as it would be without a trace, after checking what is signed over it."""
    if path != "/v1/notify":
        return body
    found = HeadParser(NotifyHead).feed(request)
    assert found is not None
    head, answer = found[0], decode(ResponseNotify, body)
    assert len(answer.tracing) == 34
    signed = {
        "identifier": head.identifier,
        "subscribers": answer.subscribers,
        "topic": head.topic,
        "sha512": head.sha512,
    }
    sign = auth.to_subscriber.authorize
    assert answer.authorization == sign(
        "CONFIRM_NOTIFY", {"tracing": answer.tracing, **signed}, NOW
    )
    value = sign("CONFIRM_NOTIFY", {"tracing": b"", **signed}, NOW)
    return encode(ResponseNotify(value, b"", answer.subscribers, answer.identifier))


def assert_short_text(response: Any) -> None:
    assert response.headers["content-type"] == "text/plain; charset=utf-8", response
    assert 5 < len(response.body) < 300
    assert response.body.endswith(b"\n")
    response.body.decode("utf-8")


async def assert_nothing_stored(running: Running) -> None:
    assert await running.store.counts() == {"exact": 0, "glob": 0, "missed": 0}


# H: what is decided here, not by the HTTP server

H = [
    ("GET", "/v1/notify", 405),
    ("PUT", "/v1/notify", 405),
    ("TRACE", "/v1/subscribe/exact", 405),
    ("DELETE", "/v1/set_subscriptions", 405),
    ("post", "/v1/notify", 405),
    ("POST", "/v1/notify/", 404),
    ("POST", "//v1/notify", 404),
    ("POST", "/V1/NOTIFY", 404),
    ("POST", "/v1/%2e%2e/v1/notify", 404),
    ("POST", "/v1/subscribe/../notify", 404),
    ("POST", "/", 404),
    ("POST", "/v1", 404),
    ("POST", "/v1/subscribe", 404),
    ("GET", "/docs", 404),
    ("GET", "/openapi.json", 404),
]


@pytest.mark.parametrize(("method", "path", "status"), H)
async def test_methods_and_paths(method: str, path: str, status: int) -> None:
    async with broadcaster() as running:
        response = await exchange(running.port, request_bytes(path, method=method))
        assert response.status in {status, 400} if method == "post" else response.status == status
        assert "location" not in response.headers
        if response.status != 400:
            assert response.headers["content-type"] == "application/json"


async def test_head_is_405_without_a_body() -> None:
    async with broadcaster() as running, within():
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(request_bytes("/v1/notify", method="HEAD"))
        assert (await read_response(reader, head=True)).status == 405
        writer.write(request_bytes("/x"))
        assert (await read_response(reader)).status == 404
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("tail", [b"", b"?x=1", b"?"])
async def test_query_is_ignored(tail: bytes) -> None:
    async with broadcaster() as running:
        data = running.peer.subscribe("http://h/").bytes().replace(b"/exact ", b"/exact%b " % tail)
        assert (await exchange(running.port, data)).status == 200


# A: authorization


def altered(value: str, old: int, new: str) -> str:
    parts = value.removeprefix("X-HMAC ").split(":")
    parts[old] = new
    return "X-HMAC " + ":".join(parts)


A: dict[str, tuple[Callable[[str], Any], int]] = {
    "A01 none": (lambda v: None, 401),
    "A02 empty": (lambda v: "", 403),
    "A03 scheme alone": (lambda v: "X-HMAC", 403),
    "A03 Bearer alone": (lambda v: "Bearer", 403),
    "A04": (lambda v: "Basic eA==", 403),
    "A05 lower case": (lambda v: v.replace("X-HMAC", "x-hmac"), 403),
    "A07": (lambda v: b"Bearer \xe9", 403),
    "A07 utf-8": (lambda v: "Bearer é".encode(), 403),
    "A08": (lambda v: "Bearer " + "x" * 8192, 403),
    "A09": (lambda v: "X-HMAC abc", 403),
    "A10": (lambda v: altered(v, 0, "abc"), 403),
    "A11": (lambda v: altered(v, 0, "1_0"), 403),
    "A12": (lambda v: altered(v, 0, "٣").encode(), 403),
    "A15": (lambda v: altered(v, 0, str(2**63)), 403),
    "negative": (lambda v: altered(v, 0, "-1"), 403),
    "A16": (lambda v: altered(v, 1, ""), 403),
    "A17": (lambda v: altered(v, 1, "n" * 256), 403),
    "A18": (lambda v: altered(v, 1, "a:b"), 403),
    "A19": (lambda v: altered(v, 2, "A" * 84), 403),
    "A20": (lambda v: altered(v, 2, "A" * 87 + "="), 403),
    "A21": (lambda v: v[:-4] + "!" + v[-4:], 403),
    "A22": (lambda v: v[:-3] + chr(ord(v[-3]) + 1) + "==", 403),
    "one character more": (lambda v: v + "=", 403),
    "A28": (lambda v: "Bearer token", 403),
}
REQUESTS: dict[str, Callable[[Peer], Signed]] = {
    "subscribe exact": lambda p: p.subscribe("http://h/", b"t", "http://h/r"),
    "subscribe glob": lambda p: p.subscribe_glob("http://h/", "*"),
    "unsubscribe exact": lambda p: p.subscribe("http://h/", b"t", verb="unsubscribe"),
    "unsubscribe glob": lambda p: p.subscribe_glob("http://h/", "*", verb="unsubscribe"),
    "check": lambda p: p.check("http://h/"),
    "set": lambda p: p.set("http://h/", ((b"t", None),)),
    "notify": lambda p: p.notify(),
}


@pytest.mark.parametrize("request_name", REQUESTS)
async def test_authorization(request_name: str) -> None:
    async with broadcaster(hmac_auth) as running:
        make = REQUESTS[request_name]
        for name, (alter, status) in A.items():
            request = make(running.peer)
            assert request.authorization is not None
            request.authorization = alter(request.authorization)
            response = await running.send(request)
            assert response.status == status, (name, response)
            assert_short_text(response)

        for shift in (-121.5, 121.5):  # A13, A14
            skewed = Peer(hmac_auth(), clock=lambda s=shift: time.time() + s)
            assert (await running.send(make(skewed))).status == 403, shift
        for other in REQUESTS:  # A23
            request = make(running.peer)
            request.authorization = REQUESTS[other](running.peer).authorization
            if request_name != other and {request_name, other} != {
                # the older implementation signs both alike
                *{f"{v} {request_name.split()[-1]}" for v in ("subscribe", "unsubscribe")}
            }:
                assert (await running.send(request)).status == 403, other
        retired = Peer(AuthConfig(Hmac(b"o" * 64), Hmac(b"o" * 64)))  # A27
        assert (await running.send(make(retired))).status == 403
        data = make(running.peer).bytes()  # A06
        line = b"Authorization: Bearer x\r\n"
        twice = data.replace(b"Authorization:", line + b"Authorization:", 1)
        assert (await exchange(running.port, twice)).status == 400
        await assert_nothing_stored(running)

        used = make(running.peer)  # A25, N28
        first, second = await running.send(used), await running.send(used)
        assert first.status in (200, 409)
        assert second.status == 403
        assert_short_text(second)


async def test_value_for_another_url_or_topic() -> None:
    """A24"""
    async with broadcaster(hmac_auth) as running:
        peer = running.peer
        for right, wrong in [
            (peer.subscribe("http://h/"), peer.subscribe("http://i/")),
            (peer.subscribe("http://h/"), peer.subscribe("http://h/", b"u")),
            (peer.subscribe("http://h/"), peer.subscribe("http://h/", b"t", "http://h/")),
            (peer.subscribe("http://h/"), peer.subscribe("http://h/", tracing=b"x")),
            (peer.notify(b"t"), peer.notify(b"u")),
            (peer.notify(b"t", b"x"), peer.notify(b"t", b"y")),
            (peer.notify(b"t"), peer.notify(b"t", tracing=b"x")),
        ]:
            wrong.authorization = right.authorization
            assert (await running.send(wrong)).status == 403
        await assert_nothing_stored(running)


async def test_token() -> None:
    def auth() -> AuthConfig:
        return AuthConfig(Token("up"), Token("down"))

    async with broadcaster(auth) as running:
        response = await running.ok(running.peer.subscribe("http://h/"))
        assert decode(ResponseGeneric, response.body).authorization == "Bearer down"
        for wrong in ("Bearer down", "Bearer up ", "bearer up", "Bearer  up", "up", "Bearer upp"):
            request = running.peer.subscribe("http://h/", b"u")
            request.authorization = wrong
            assert (await running.send(request)).status == 403, wrong


async def test_replay_memory_that_is_full_is_503() -> None:
    from lonelypsp.replay import ReplayGuard

    full = AuthConfig(Hmac(b"u" * 64, replay=ReplayGuard(max_codes=0)), Hmac(b"d" * 64))
    async with broadcaster(lambda: full) as running:
        response = await running.send(Peer(hmac_auth()).subscribe("http://h/"))
        assert (response.status, response.headers["retry-after"]) == (503, "1")
        await assert_nothing_stored(running)


# S, C, N: bodies


def u16(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


HASH = hashlib.sha512(b"x").digest()
BAD_BODIES: list[tuple[str, str, bytes]] = [
    *[
        (name, path, body)
        for path in ("subscribe/exact", "subscribe/glob", "unsubscribe/exact", "unsubscribe/glob")
        for name, body in [
            ("S01", b""),
            ("S02", b"\0"),
            ("S04", b"\xff\xffhttp://h/"),
            ("S06", u16(b"http://h/\xff") + u16(b"t") + u16(b"") + u16(b"")),
            ("S07", u16(b"http://h/\xc0\xaf") + u16(b"t") + u16(b"") + u16(b"")),
            ("S08", u16(b"http://h/\xed\xa0\x80") + u16(b"t") + u16(b"") + u16(b"")),
            ("topic longer than the body", u16(b"http://h/") + b"\xff\xfft"),
            ("S32", u16(b"http://h/") + u16(b"t") + b"\0\0" * (path[0] == "s") + b"\xff\xff"),
        ]
    ],
    ("S23", "subscribe/glob", u16(b"http://h/") + u16(b"\xff") + u16(b"") + u16(b"")),
    ("S23", "unsubscribe/glob", u16(b"http://h/") + u16(b"\xff") + u16(b"")),
    ("S29", "subscribe/exact", u16(b"http://h/") + u16(b"t") + b"\xff\xff"),
    ("recovery not UTF-8", "subscribe/exact", u16(b"http://h/") + u16(b"t") + u16(b"\xff")),
    ("C01", "check_subscriptions", b""),
    ("C02", "check_subscriptions", b"\xff\xff"),
    ("C03", "check_subscriptions", u16(b"") + u16(b"\xff")),
    ("C01", "set_subscriptions", b""),
    ("C03", "set_subscriptions", u16(b"") + u16(b"\xff") + b"\0" + bytes(64 + 8)),
    ("C05", "set_subscriptions", u16(b"") + u16(b"http://h/") + b"\0" + bytes(63)),
    ("N01", "notify", b""),
    ("N02", "notify", b"\0"),
    ("N03", "notify", b"\xff\xff" + bytes(8)),
    ("N04", "notify", u16(b"t") + bytes(30)),
    ("N05", "notify", u16(b"t") + HASH + b"\xff\xff"),
    ("N06", "notify", u16(b"t") + HASH + u16(b"") + b"\xffi"),
    ("inside the length", "notify", u16(b"t") + HASH + u16(b"") + b"\0" + bytes(7)),
]


async def test_bad_bodies_without_any_authorization() -> None:
    """What cannot be read is 400, before anybody asks who sent it."""
    async with broadcaster(hmac_auth) as running:
        for name, path, body in BAD_BODIES:
            response = await exchange(running.port, request_bytes(f"/v1/{path}", body))
            assert response.status == 400, (name, path)
            assert_short_text(response)
        await assert_nothing_stored(running)


@pytest.mark.parametrize("rule", ["url-syntax", "url-policy"])
async def test_refused_urls(rule: str) -> None:
    """S03, S09-S19, S30, S31"""
    async with broadcaster() as running:
        peer, here = running.peer, f"http://127.0.0.1:{running.port}"
        urls = REFUSED_URLS
        if rule == "url-policy":
            urls = [url_of(address) for address in ALWAYS_DENIED]
            urls += ["http://metadata.google.internal/", "http://h:6379/", f"{here}/v1/notify"]
            urls += [f"{here}/v1/receive_for_websockets"]
        for url in urls:
            requests = [peer.subscribe(url), peer.subscribe_glob(url, "*")]
            if url:  # an empty recovery url is none
                requests += [
                    peer.subscribe("http://h/", b"t", url),
                    peer.subscribe_glob("http://h/", "*", url),
                    peer.set("http://h/", ((b"t", url),)),
                    peer.set("http://h/", (), (("*", url),)),
                ]
            requests.append(peer.set(url, ((b"t", None),)))
            for request in requests:
                response = await running.send(request)
                assert response.status == 400, (url, request)
                assert_short_text(response)
                assert response.body.startswith(f"{rule}: ".encode())
        await assert_nothing_stored(running)


async def test_unsubscribe_works_for_urls_that_would_be_refused() -> None:
    """Rows from before a rule must remain removable."""
    async with broadcaster() as running:
        await subscribed(running.store, "ftp://h/", b"t")
        await running.ok(running.peer.subscribe("ftp://h/", b"t", verb="unsubscribe"))
        await subscribed(running.store, "ftp://h/", b"t")
        await running.ok(running.peer.set("ftp://h/"))
        await assert_nothing_stored(running)


async def test_unusual_subscriptions_are_accepted() -> None:
    async with broadcaster() as running:
        peer = running.peer
        longest = "http://h/" + "x" * (65535 - 9)
        for request in [
            peer.subscribe(longest, b"S05", longest),
            peer.subscribe("http://h/", b""),  # S20
            peer.subscribe("http://h/", b"x" * 65535),  # S21
            peer.subscribe("http://h/", b"a\0b\xff"),  # S22
            peer.subscribe("http://h/", b"S33", tracing=b"t" * 65535),
            peer.subscribe("http://h/#fragment"),
            peer.subscribe_glob("http://h/", ""),
            peer.subscribe_glob("http://h/", "**/a/" * 10 + "b"),  # S28
            # S24-S27: every glob means something, limits come with the url policy
            peer.subscribe_glob("http://h/", "a["),
            peer.subscribe_glob("http://h/", "[z-a]"),
            peer.subscribe_glob("http://h/", "*" * 65535),
            peer.subscribe_glob("http://h/", "*" + "a" * 30_000),
        ]:
            await running.ok(request)
            response = await running.send(request)  # S35
            assert response.status == 409
            assert_short_text(response)
        # S34: as recorded, trailing bytes are ignored here
        request = peer.subscribe("http://h/", b"S34")
        request.body += b"x"
        await running.ok(request)
        start = time.perf_counter()
        assert await running.notify(b"a/" * 100 + b"b" + b"x" * 60_000) == 0
        assert time.perf_counter() - start < 2


@pytest.mark.parametrize("kind", ["exact", "glob"])
async def test_unsubscribe_what_is_not_there(kind: str) -> None:
    """S36"""
    async with broadcaster() as running:
        make = running.peer.subscribe_glob if kind == "glob" else running.peer.subscribe
        pattern: Any = "t" if kind == "glob" else b"t"
        gone = make("http://h/", pattern, verb="unsubscribe")
        assert (await running.send(gone)).status == 409
        await running.ok(make("http://h/", pattern))
        await running.ok(gone)
        assert (await running.send(gone)).status == 409


async def test_subscribe_again_keeps_the_recovery_url() -> None:
    async with broadcaster() as running:
        await running.ok(running.peer.subscribe("http://h/", b"t", "http://h/r"))
        again = running.peer.subscribe("http://h/", b"t", "http://h/other")
        assert (await running.send(again)).status == 409
        assert [s.recovery for s in await rows(running.store, "http://h/")] == ["http://h/r"]


def set_body(url: bytes, tail: bytes, etag: bytes = bytes(64), form: int = 0) -> bytes:
    return u16(b"") + u16(url) + bytes([form]) + etag + tail


def u32(n: int) -> bytes:
    return n.to_bytes(4, "big")


def item(key: bytes, recovery: bytes = b"") -> bytes:
    return u16(key) + u16(recovery)


SET_TAILS = {
    "C06 etag of another list": u32(1) + item(b"t") + u32(0),
    "C07": u32(2**32 - 1),
    "C08": u32(1),
    "cut in the globs": u32(0) + u32(1) + b"\0\5a",
    "no globs": u32(0),
    "C09": u32(2) + item(b"b") + item(b"a") + u32(0),
    "C10": u32(2) + item(b"a") + item(b"a") + u32(0),
    "C11": u32(0) + u32(2) + item("\U00010000".encode()) + item("\uff5e".encode()),
    "C12": u32(0) + u32(2**32 - 1),
    "C13": u32(0) + u32(1) + item(b"\xff"),
    "C14": u32(0) + u32(2) + item(b"b") + item(b"a"),
    "C15": u32(0) + u32(2) + item(b"a") + item(b"a"),
    "recovery not UTF-8": u32(1) + item(b"t", b"\xff") + u32(0),
}


async def test_bad_lists() -> None:
    async with broadcaster() as running:
        await running.ok(running.peer.set("http://h/", ((b"before", None),)))
        for name, tail in SET_TAILS.items():
            for url in (b"http://h/", b"http://i/"):
                data = request_bytes("/v1/set_subscriptions", set_body(url, tail))
                response = await exchange(running.port, data)
                assert response.status == 400, name
                assert_short_text(response)
        form_1 = running.peer.set("http://h/", ((b"t", None),))  # C04
        form_1.body = form_1.body.replace(b"http://h/\0", b"http://h/\1")
        assert (await running.send(form_1)).status == 400
        other = running.peer.set("http://i/", ((b"t", None),))  # C26
        other.body = other.body.replace(b"http://i/", b"http://h/")
        assert (await running.send(other)).status == 400
        assert [s.pattern for s in await rows(running.store, "http://h/")] == [b"before"]
        assert (await running.store.counts())["exact"] == 1


async def test_set_and_check() -> None:
    async with broadcaster() as running:
        peer, url = running.peer, "http://h/"

        async def etag() -> bytes:
            response = await running.ok(peer.check(url))
            return decode(ResponseCheckSubscriptions, response.body).etag

        assert await etag() == strong_etag(url, [], [])  # C29
        for exact, globs in [
            (((b"a", None), (b"b", "http://h/r")), (("x/*", "http://h/r"),)),
            (((b"a", None), (b"b", "http://h/r")), (("x/*", "http://h/r"),)),  # C20
            (((b"a", "http://h/r"), (b"b", "http://h/s")), (("x/*", None),)),  # C22
            (tuple((b"%03d" % n, None) for n in range(40)), ()),  # C21
            (tuple((b"%03d" % n, None) for n in range(40)), ()),
            (tuple((b"%03d" % n + b"x" * 65532, None) for n in range(100)), ()),  # C28
            (tuple((b"%06d" % n, None) for n in range(20_000)), ()),
            ((), ()),  # C27
        ]:
            await running.ok(peer.set(url, exact, globs))
            assert await etag() == strong_etag(url, exact, globs)
        trailing = peer.check(url)  # C30, as recorded
        trailing.body += b"x"
        await running.ok(trailing)
        # C16, as recorded
        trailing = peer.set(url, ((b"t", None),))
        trailing.body += b"x"
        await running.ok(trailing)
        # C19
        cut = peer.set(url, ((b"other", None),))
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await send_part(running.port, cut.bytes(), -3)
        assert [s.pattern for s in await rows(running.store, url)] == [b"t"]


async def send_part(port: int, data: bytes, until: int) -> None:
    """Sends the first bytes of a request and hangs up."""
    async with within():
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data[:until])
        await writer.drain()
        writer.close()
        await writer.wait_closed()


# Notify


BAD_MESSAGES: dict[str, tuple[Callable[[Peer], Signed], int]] = {
    "N07 2^64-1": (lambda p: p.notify(length=2**64 - 1), 413),
    "N09 2^63": (lambda p: p.notify(length=2**63), 413),
    "N10": (lambda p: p.notify(message=b"hello", length=6), 400),
    "N11": (lambda p: p.notify(message=b"hello", length=4), 400),
    "no message": (lambda p: p.notify(message=b"hello", length=0), 400),
    "N13": (lambda p: p.notify(sha512=hashlib.sha512(b"other").digest()), 400),
    "N14": (lambda p: p.notify(sha512=bytes(64)), 400),
    "N15": (lambda p: p.notify(sha512=hashlib.sha256(b"hello").digest() + bytes(32)), 400),
}


@pytest.mark.parametrize("auth", ["none", "hmac"])
async def test_bad_messages_reach_nobody(auth: str) -> None:
    make = hmac_auth if auth == "hmac" else lambda: NO_AUTH
    async with Subscriber(auth=make()) as subscriber, broadcaster(make) as running:
        await subscribed(running.store, subscriber.url, b"t", subscriber.recovery)
        for name, (bad, status) in BAD_MESSAGES.items():
            response = await running.send(bad(running.peer))
            assert response.status == status, name
            assert_short_text(response)
        assert await running.notify() == 1
        assert len(subscriber.requests) == 1
        assert (await running.store.counts())["missed"] == 0


MESSAGES: dict[str, dict[str, Any]] = {
    "N12 empty": {"message": b""},
    "N16 not UTF-8": {"topic": b"\xff\xfe"},
    "N17 NUL": {"topic": b"foo\0x"},
    "N18": {"topic": b"<script>"},
    "N19": {"topic": b"'; DROP TABLE subscriptions;--"},
    "N20": {"topic": b"a\r\nb"},
    "N23 empty identifier": {"identifier": b""},
    "N24 identifier of 255 bytes": {"identifier": b"i" * 255},
    "N32 tracing": {"tracing": os.urandom(1000)},
    "tracing of 65,535 bytes": {"tracing": b"t" * 65535},
    "topic of 65,535 bytes": {"topic": b"x" * 65535},
    "empty topic": {"topic": b""},
}


async def test_unusual_messages_arrive() -> None:
    async with Subscriber(auth=hmac_auth()) as subscriber, broadcaster(hmac_auth) as running:
        for name, options in MESSAGES.items():
            topic, message = options.get("topic", b"t"), options.get("message", b"hello")
            await running.store.subscribe(Kind.EXACT, topic, subscriber.url, None)
            assert await running.notify(**options) == 1, name
            got = subscriber.requests[-1]
            assert (got.head.topic, got.message) == (topic, message)
            assert len(got.head.identifier) == 8
        assert await running.notify(b"nobody") == 0  # N31


async def test_topics_that_are_no_text_match_no_glob() -> None:
    async with Subscriber() as subscriber, broadcaster() as running:
        for glob in ("**", "*", "foo", "foo*", "?"):
            await running.ok(running.peer.subscribe_glob(subscriber.url, glob))
        assert await running.notify(b"\xff") == 0
        assert await running.notify(b"foo\xff") == 0
        await running.ok(running.peer.set(subscriber.url, (), (("foo", None),)))
        assert await running.notify(b"foo\0x") == 0
        assert await running.notify(b"foo") == 1


@pytest.mark.parametrize("extra", [-1, 0, 1])
async def test_spool_boundary(extra: int, tmp_path: Path) -> None:
    """N21"""
    size = 100_000
    message = os.urandom(size + extra)
    async with Subscriber() as subscriber:
        async with broadcaster(
            message_body_spool_size=size, spool_directory=str(tmp_path)
        ) as running:
            await subscribed(running.store, subscriber.url, b"t")
            assert await running.notify(message=message) == 1
            assert subscriber.requests[0].message == message
            # the thread that sent it may hold it for a moment longer
            await until(lambda: not spool_files(tmp_path))
            assert running.broadcaster.intake.used == 0


def spool_files(directory: Path) -> list[str]:
    """Files in `directory` that this process has open; they have no name."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.startswith(str(directory)):
                found.append(path)
    return found


@pytest.mark.parametrize("on_disk", [True, False])
async def test_message_that_ends_at_99_percent(on_disk: bool, tmp_path: Path) -> None:
    """N25, N26, H28: nobody gets it, nothing is left of it."""
    options = {"message_body_spool_size": 1000 if on_disk else 10_000_000}
    async with Subscriber() as subscriber:
        async with broadcaster(spool_directory=str(tmp_path), **options) as running:
            await subscribed(running.store, subscriber.url, b"t")
            data = running.peer.notify(message=b"x" * 3_000_000).bytes()
            async with within():
                _, writer = await asyncio.open_connection("127.0.0.1", running.port)
                writer.write(data[: len(data) * 99 // 100])
                await until(lambda: running.broadcaster.routes.notifies == 1)
                if on_disk:
                    await until(lambda: spool_files(tmp_path))
                writer.transport.abort()
            await until(lambda: running.broadcaster.routes.notifies == 0)
            await until(lambda: not spool_files(tmp_path))
            assert running.broadcaster.intake.used == 0
            assert not subscriber.requests


async def test_message_in_one_byte_chunks() -> None:
    """N27"""
    async with Subscriber() as subscriber, broadcaster() as running:
        await subscribed(running.store, subscriber.url, b"t")
        request = running.peer.notify(message=b"x" * 20_000)
        head = b"POST /v1/notify HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in request.body) + b"0\r\n\r\n"
        response = await exchange(running.port, head + chunks)
        assert running.peer.count(response, request) == 1
        assert subscriber.requests[0].message == b"x" * 20_000


# Limits


@pytest.mark.parametrize("option", ["max_subscriptions_per_url", "max_subscriptions_per_origin"])
@pytest.mark.parametrize(
    "ask",
    [
        lambda p, url: p.subscribe(url, b"c"),
        lambda p, url: p.subscribe_glob(url, "c"),
        lambda p, url: p.set(url, ((b"a", None), (b"b", None)), (("c", None),)),
    ],
    ids=["exact", "glob", "set"],
)
async def test_over_quota(option: str, ask: Callable[[Peer, str], Signed]) -> None:
    """S38: 429 that names the option, and nothing changed."""
    url = "http://h/"
    async with broadcaster(**{option: 2}) as running:
        await running.ok(running.peer.set(url, ((b"a", None),), (("b", None),)))
        before = await rows(running.store, url)
        response = await running.send(ask(running.peer, url))
        assert response.status == 429
        assert f"more than 2 subscriptions ({option})".encode() in response.body
        assert_short_text(response)
        assert await rows(running.store, url) == before
        assert (await running.send(running.peer.subscribe(url, b"a"))).status == 409
        await running.ok(running.peer.set(url, ((b"x", None), (b"y", None))))


async def test_request_body_limit() -> None:
    async with broadcaster(max_request_body=131072) as running:
        fits = running.peer.set("http://h/", ((b"x" * 65000, None), (b"y" * 65000, None)))
        await running.ok(fits)
        exact = tuple((bytes([n]) * 65000, None) for n in range(60, 63))
        response = await running.send(running.peer.set("http://h/", exact))
        assert response.status == 413
        assert b"max_request_body" in response.body
        assert_short_text(response)
        assert len(await rows(running.store, "http://h/")) == 2


async def test_request_body_limit_when_it_comes_in_one_piece() -> None:
    """Another ASGI server may hand over all of a body at once."""
    async with broadcaster(max_request_body=131072) as running:
        endpoint = running.broadcaster.routes.table["/v1/check_subscriptions"]
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": bytes(131073), "more_body": False}

        async def send(event: Any) -> None:
            sent.append(event)

        scope = {"type": "http", "method": "POST", "path": "/v1/check_subscriptions", "headers": []}
        await endpoint(scope, receive, send)
        assert sent[0]["status"] == 413


async def test_spool_quota(tmp_path: Path) -> None:
    """N29: 413 for what never fits, 507 for what does not fit now."""
    options = {"message_body_spool_size": 1000, "spool_quota": 50_000}
    async with broadcaster(spool_directory=str(tmp_path), **options) as running:
        routes = running.broadcaster.routes
        response = await running.send(running.peer.notify(message=b"x" * 50_001))
        assert (response.status, b"spool_quota" in response.body) == (413, True)
        async with within():
            data = running.peer.notify(message=b"x" * 30_000).bytes()
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(data[:-1])
            await until(lambda: routes.intake.used == 30_000)
            second = running.peer.notify(message=b"x" * 20_001)
            response = await running.send(second)
            assert (response.status, response.headers["retry-after"]) == (507, "5")
            assert_short_text(response)
            assert await running.notify(message=b"x" * 20_000) == 0
            writer.write(data[-1:])
            assert (await read_response(reader)).status == 200
            writer.close()
            await writer.wait_closed()
        assert await running.notify(message=b"x" * 20_001) == 0
        assert routes.intake.used == 0


async def test_spool_directory_that_cannot_be_used_is_507(tmp_path: Path) -> None:
    options = {"message_body_spool_size": 10, "spool_directory": str(tmp_path / "missing")}
    async with broadcaster(**options) as running:
        response = await running.send(running.peer.notify(message=b"x" * 100))
        assert response.status == 507
        assert b"spool_directory" in response.body
        assert running.broadcaster.intake.used == 0
        assert await running.notify(message=b"x" * 10) == 0


async def test_disk_that_is_full_is_507(monkeypatch: pytest.MonkeyPatch) -> None:
    from lonelypsp.spool import Spool

    def full(self: Spool, chunk: bytes) -> None:
        raise OSError(28, "No space left on device")

    async with broadcaster(message_body_spool_size=10) as running:
        monkeypatch.setattr(Spool, "write", full)
        response = await running.send(running.peer.notify(message=b"x" * 100))
        assert response.status == 507
        assert b"No space left" in response.body
        assert running.broadcaster.intake.used == 0


@pytest.mark.parametrize("path", ["/v1/notify", "/v1/check_subscriptions"])
async def test_slow_bodies_under_a_server_that_bears_them(path: str) -> None:
    """H27, H29, C32. Under `lonelypss serve` the listener refuses them, see test_guard.py."""
    async with broadcaster(incoming_http_rate_window=0.3, incoming_http_min_rate=100) as running:
        async with within():
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(request_bytes(path, b"\0", length=100))
            response = await read_response(reader)
            assert (response.status, response.headers["connection"]) == (408, "close")
            assert_short_text(response)
            assert await reader.read() == b""
            writer.close()
        data = running.peer.notify().bytes()
        encoded = data.replace(b"Host:", b"Content-Encoding: gzip\r\nHost:")
        assert (await exchange(running.port, encoded)).status == 415
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        data = running.peer.notify(message=bytes(400)).bytes()
        async with within():
            for at in range(0, len(data), 20):  # longer than the window, but fast enough
                writer.write(data[at : at + 20])
                await asyncio.sleep(0.03)
            assert (await read_response(reader)).status == 200
        writer.close()
        await writer.wait_closed()


async def test_too_many_messages_at_once() -> None:
    release = asyncio.Event()

    async def wait(received: Received) -> bytes:
        await release.wait()
        return subscriber.confirm(received)

    async with Subscriber(wait) as subscriber, broadcaster(max_notifies=2) as running:
        await subscribed(running.store, subscriber.url, b"t")
        first = [asyncio.create_task(running.notify()) for _ in range(2)]
        await subscriber.got(2)
        response = await running.send(running.peer.notify())
        assert (response.status, response.headers["retry-after"]) == (503, "1")
        assert b"max_notifies" in response.body
        await running.ok(running.peer.check("http://h/"))  # only messages are limited
        release.set()
        assert await asyncio.gather(*first) == [1, 1]
        assert await running.notify() == 1


async def test_draining() -> None:
    async with broadcaster() as running:
        running.broadcaster.routes.draining = True
        response = await running.send(running.peer.notify())
        assert (response.status, response.headers["retry-after"]) == (503, "1")


# A store that does not answer


@pytest.fixture
def unavailable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Running, str], None]:
    def break_(running: Running, method: str) -> None:
        async def fail(*_: Any) -> None:
            raise StoreUnavailable("it is locked", retry_after=3)

        monkeypatch.setattr(running.store, method, fail)

    return break_


@pytest.mark.parametrize(
    ("request_name", "method"),
    [
        ("subscribe exact", "subscribe"),
        ("subscribe glob", "subscribe"),
        ("unsubscribe exact", "unsubscribe"),
        ("unsubscribe glob", "unsubscribe"),
        ("check", "subscriptions"),
        ("set", "set_subscriptions"),
        ("notify", "match"),
    ],
)
async def test_store_unavailable_is_503(
    request_name: str, method: str, unavailable: Callable[[Running, str], None]
) -> None:
    async with broadcaster() as running:
        unavailable(running, method)
        response = await running.send(REQUESTS[request_name](running.peer))
        assert (response.status, response.headers["retry-after"]) == (503, "3")
        assert b"it is locked" in response.body
        assert_short_text(response)
