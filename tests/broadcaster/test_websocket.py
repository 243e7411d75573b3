"""The broadcaster's end of websockets, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard
from websockets.exceptions import InvalidStatus

from lonelypsp import messages as m
from lonelypsp import session as s
from lonelypsp.errors import AuthResult
from lonelypsp.replay import FileReplayGuard
from lonelypsp.signing import AuthConfig, Hmac, Nothing, Token
from lonelypss.app import App, Broadcaster
from lonelypss.config import BroadcasterConfig
from lonelypss.server import http_protocol, websocket_protocol
from lonelypss.store.base import StoreUnavailable
from servers import Running, serve
from waiting import until

from .websocket_peer import Closed, Peer, raw_socket, websocket_peer

AUTHS: dict[str, Callable[[], AuthConfig]] = {
    "none": lambda: AuthConfig(Nothing(), Nothing()),
    "token": lambda: AuthConfig(Token("up"), Token("down")),
    "hmac": lambda: AuthConfig(Hmac(b"u" * 64), Hmac(b"d" * 64)),
}
EVERY_AUTH = pytest.mark.parametrize("auth", AUTHS.values(), ids=AUTHS)
DEFAULT = BroadcasterConfig(db="sqlite://")
SMALL_FRAMES = s.Limits(frame_length=5000)
PROTOCOLS: dict[str, dict[str, Any]] = {
    "events": {},
    "bursts": {"http": http_protocol(DEFAULT, {}), "ws": websocket_protocol()},
}


@pytest.fixture(params=PROTOCOLS, autouse=True)
def protocols(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How frames come and go: under any ASGI server, or under `lonelypss serve`."""
    monkeypatch.setitem(PROTOCOLS, "present", PROTOCOLS[request.param])


@asynccontextmanager
async def running(
    auth: AuthConfig | None = None, db: str = "sqlite://", **options: Any
) -> AsyncIterator[Running]:
    config = BroadcasterConfig(db=db, **options)
    broadcaster = Broadcaster(replace(config, auth=auth) if auth else config)
    async with serve(App(broadcaster), **PROTOCOLS["present"]) as url:
        yield Running(broadcaster, url)


# handshake


@EVERY_AUTH
async def test_subscribe_notify_receive(auth: Any) -> None:
    async with running(auth()) as server, websocket_peer(server.url, auth()) as peer:
        await peer.subscribe(b"t", globs=("a/*",))
        assert await peer.notify(b"t", b"hello") == 1
        assert await peer.notify(b"a/b", b"") == 1
        assert await peer.notify(b"a/b/c", b"nobody") == 0
        assert [await peer.message(), await peer.message()] == [(b"t", b"hello"), (b"a/b", b"")]


@EVERY_AUTH
async def test_one_copy_whatever_the_overlap(auth: Any) -> None:
    async with running(auth()) as server:
        async with (
            websocket_peer(server.url, auth()) as one,
            websocket_peer(server.url, auth()) as two,
        ):
            await one.subscribe(b"foo/bar", globs=("foo/*", "**", "foo/ba?"))
            await two.subscribe(globs=("*/bar",))
            assert await two.notify(b"foo/bar", b"1") == 2
            assert await two.notify(b"foo/bar", b"2") == 2
            for peer in (one, two):
                assert [await peer.message(), await peer.message()] == [
                    (b"foo/bar", b"1"),
                    (b"foo/bar", b"2"),
                ]


def send_at_once(peer: Peer, *frames: bytes) -> None:
    """In one write."""
    for frame in frames:
        peer.socket.protocol.send_binary(frame)
    peer.socket.send_data()


async def test_a_used_message_among_others(tmp_path: Path) -> None:
    theirs, ours = AUTHS["hmac"](), with_files(tmp_path / "replay")
    async with (
        running(ours) as server,
        websocket_peer(server.url, theirs) as subscriber,
        websocket_peer(server.url, theirs) as publisher,
    ):

        def signed(peer: Peer, data: bytes) -> bytes:
            return peer.session.notify(peer.payload(b"t", data), data, time.time())

        await subscriber.subscribe(b"t")
        frames = [signed(publisher, b"%d" % n) for n in range(5)]
        send_at_once(publisher, *frames)
        assert [(await publisher.answer()).subscribers for _ in frames] == [1] * 5
        for used in frames:
            async with websocket_peer(server.url, theirs) as thief:
                send_at_once(thief, signed(thief, b"new"), used, signed(thief, b"newer"))
                assert (await thief.closed()).code == 4403
        assert await publisher.notify(b"t", b"last") == 1
        got = [(await subscriber.message())[1]]
        while got[-1] != b"last":
            got.append((await subscriber.message())[1])
        assert got == [b"0", b"1", b"2", b"3", b"4", *[b"new"] * 5, b"last"]


async def test_what_cannot_be_remembered_is_not_done(tmp_path: Path) -> None:
    theirs, ours = AUTHS["hmac"](), with_files(tmp_path / "replay")
    async with running(ours) as server, websocket_peer(server.url, theirs) as peer:
        await peer.subscribe(b"t")
        async with websocket_peer(server.url, theirs) as publisher:
            session, payload = publisher.session, publisher.payload(b"t", b"x")
            then = time.time() - 60  # a second of which no file is open
            frames = [session.notify(payload, b"x", then) for _ in range(3)]
            (tmp_path / "replay").rename(tmp_path / "away")
            send_at_once(publisher, *frames)
            assert (await publisher.closed()).code == 4503
            (tmp_path / "away").rename(tmp_path / "replay")
        assert await peer.notify(b"t", b"y") == 1
        assert await peer.message() == (b"t", b"y")


def with_files(directory: Path) -> AuthConfig:
    """AUTHS["hmac"], as `lonelypss serve` remembers."""
    guard = FileReplayGuard(str(directory))
    return replace(AUTHS["hmac"](), to_broadcaster=Hmac(b"u" * 64, replay=guard))


async def test_subscriptions_end_with_unsubscribing_and_with_the_connection() -> None:
    async with running() as server, websocket_peer(server.url) as publisher:
        registry = server.broadcaster.websockets.registry
        async with websocket_peer(server.url) as peer:
            await peer.subscribe(b"t", b"u")
            await peer.send(peer.session.unsubscribe_exact(b"t", time.time()))
            assert isinstance(await peer.answer(), m.ConfirmUnsubscribeExact)
            assert await publisher.notify(b"t", b"x") == 0
            await peer.subscribe(b"t")
            assert await publisher.notify(b"t", b"x") == 1
        await until(lambda: not registry.match(b"t"))
        assert await publisher.notify(b"t", b"x") == 0
        assert await publisher.notify(b"u", b"x") == 0


@EVERY_AUTH
@pytest.mark.parametrize("length", [4096, 5000, 100_000, 3_000_000])
async def test_parts_both_ways(auth: Any, length: int) -> None:
    data = bytes(i % 251 for i in range(1000)) * (length // 1000) + b"x" * (length % 1000)
    options: Any = {"outgoing_max_ws_message_size": 4096, "message_body_spool_size": 50_000}
    async with running(auth(), compression_allowed=False, **options) as server:
        async with websocket_peer(server.url, auth(), limits=SMALL_FRAMES) as peer:
            await peer.subscribe(b"t")
            for _ in range(2):
                sending = asyncio.create_task(peer_sends(peer, b"t", data))
                assert await peer.message() == (b"t", data)
                await sending
                assert isinstance(await last_answer(peer), m.ConfirmNotify)
    assert server.broadcaster.intake.used == 0


async def peer_sends(peer: Peer, topic: bytes, data: bytes) -> None:
    payload = peer.payload(topic, data)
    peer.session.open_stream(payload)
    while peer.session.sending:
        while peer.session.room <= 0:
            await asyncio.sleep(0)
        part = peer.session.next_part(time.time())
        await peer.send(part.head + data[part.offset : part.offset + part.length])


async def last_answer(peer: Peer) -> Any:
    while True:
        answer = await peer.answer()
        if not isinstance(answer, m.ContinueNotify):
            return answer


BROKEN_STARTS: dict[str, tuple[Any, int]] = {
    "text": ("hello", 4400),
    "empty": (b"", 4400),
    "one byte": (b"\x00", 4400),
    "unknown type": (b"\x00\x01\x00\x63", 4400),
    "not CONFIGURE": (m.encode(m.SubscribeExact(topic=b"t"), minimal=True), 4400),
    "cut off": (b"\x00\x01\x00\x01\x00\x20abc", 4400),
    "garbage": (bytes(range(200)), 4400),
}


@pytest.mark.parametrize(("frame", "code"), BROKEN_STARTS.values(), ids=BROKEN_STARTS)
async def test_broken_starts(frame: Any, code: int) -> None:
    async with running() as server, websocket_peer(server.url) as bystander:
        async with raw_socket(server.url) as socket:
            await socket.send(frame)
            await socket.wait_closed()
            assert socket.close_code == code
            assert socket.close_reason
        await bystander.subscribe(b"t")
        assert await bystander.notify(b"t", b"still here") == 1


@pytest.mark.parametrize("auth", ["token", "hmac"])
async def test_wrong_secret(auth: str) -> None:
    wrong: dict[str, AuthConfig] = {
        "token": AuthConfig(Token("other"), Token("down")),
        "hmac": AuthConfig(Hmac(b"x" * 64), Hmac(b"d" * 64)),
    }
    async with running(AUTHS[auth]()) as server:
        for client in (wrong[auth], AuthConfig(Nothing(), Nothing())):
            with pytest.raises(Closed) as closed:
                async with websocket_peer(server.url, client):
                    pass
            assert closed.value.code == 4403


async def test_silence_is_not_waited_for() -> None:
    async with running(websocket_open_timeout=0.1) as server:
        async with raw_socket(server.url) as socket:
            await socket.wait_closed()
            assert socket.close_code == 4408


def _broken(case: str, peer: Peer) -> tuple[Any, int]:
    """What a configured peer may not send, and the close code."""
    body, topic = b"data", b"t"
    right = peer.payload(topic, body)
    fields: Any = {"identifier": b"i", "topic": topic, "body": body, "sha512": right.sha512}
    fields |= {"compressed_length": 4, "decompressed_length": 4}
    long = fields | {"compressed_length": 9, "decompressed_length": 9}
    huge = fields | {"compressed_length": 1 << 60, "decompressed_length": 1 << 60}
    messages: dict[str, m.Message] = {
        "second CONFIGURE": m.Configure(
            subscriber_nonce=bytes(32), enable_zstd=False, enable_training=False
        ),
        "ack of nothing": m.ConfirmReceive(identifier=b"i"),
        "continue nothing": m.ContinueReceive(identifier=b"i", part_id=0),
        "unsubscribe nothing": m.UnsubscribeExact(topic=b"t"),
        "wrong hash": m.Notify(**fields | {"sha512": bytes(64)}),
        "unknown compressor": m.Notify(**fields, compressor=77),
        "part without start": m.NotifyStreamPart(identifier=b"i", part_id=1, body=b"x"),
        "too large": m.NotifyStreamStart(**huge),
    }
    start = m.encode(m.NotifyStreamStart(**long), minimal=True)
    raw: dict[str, Any] = {
        "text": "text",
        "unknown type": b"\x00\x01\x00\x63",
        "too short": b"\x00\x01\x00",
        "two starts": [start, start],
    }
    frames = raw | {name: m.encode(message, minimal=True) for name, message in messages.items()}
    return frames[case], 4413 if case == "too large" else 4400


@pytest.mark.parametrize(
    "case",
    [
        "text", "unknown type", "too short", "second CONFIGURE", "ack of nothing",
        "continue nothing", "unsubscribe nothing", "wrong hash", "unknown compressor",
        "part without start", "two starts", "too large",
    ],
)  # fmt: skip
async def test_broken_frames_hurt_nobody_else(case: str) -> None:
    async with running() as server:
        async with websocket_peer(server.url) as other, websocket_peer(server.url) as peer:
            await other.subscribe(b"t")
            frames, code = _broken(case, peer)
            for frame in frames if isinstance(frames, list) else [frames]:
                await peer.send(frame)
            closed = await peer.closed()
            assert (closed.code, bool(closed.reason)) == (code, True)
            assert await other.notify(b"t", b"fine") == 1
            assert await other.message() == (b"t", b"fine")
        assert server.broadcaster.intake.used == 0


async def test_duplicate_subscription() -> None:
    async with running() as server, websocket_peer(server.url) as peer:
        frame = m.encode(m.SubscribeExact(topic=b"t"), minimal=True)
        await peer.subscribe(b"t")
        await peer.send(frame)
        assert (await peer.closed()).code == 4400


async def test_cut_in_the_middle_of_a_part_frees_everything() -> None:
    options: Any = {"message_body_spool_size": 1000}
    async with running(**options) as server:
        async with websocket_peer(server.url, limits=SMALL_FRAMES) as peer:
            payload = peer.payload(b"t", b"x" * 20_000)
            peer.session.open_stream(payload)
            part = peer.session.next_part(time.time())
            await peer.send(part.head + b"x" * part.length)
            await peer.answer()
            assert server.broadcaster.intake.used == 20_000
            peer.socket.transport.abort()
        await until(lambda: server.broadcaster.intake.used == 0)
        await until(lambda: not server.broadcaster.websockets.connections)


# who may connect


@pytest.mark.parametrize(
    ("origin", "status"),
    [("https://evil.example", 403), ("null", 403), ("https://good.example", None)],
)
async def test_web_pages_must_be_listed(origin: str, status: int | None) -> None:
    async with running(websocket_origins="https://good.example") as server:
        if status is None:
            async with raw_socket(server.url, origin=origin):
                return
        with pytest.raises(InvalidStatus) as refused:
            async with raw_socket(server.url, origin=origin):
                pass
        assert refused.value.response.status_code == status
        assert b"websocket_origins" in refused.value.response.body


async def test_max_websockets() -> None:
    async with running(max_websockets=1) as server:
        async with websocket_peer(server.url):
            with pytest.raises(InvalidStatus) as refused:
                async with raw_socket(server.url):
                    pass
            assert refused.value.response.status_code == 503
            assert refused.value.response.headers["retry-after"] == "5"


async def test_plain_request() -> None:
    async with running() as server, httpx.AsyncClient() as client:
        assert (await client.get(f"{server.url}/v1/websocket")).status_code == 426


# slow consumers


async def test_who_acknowledges_nothing_is_disconnected_alone() -> None:
    options: Any = {"websocket_send_max_unacknowledged": 3, "websocket_max_pending_sends": 10}
    async with running(**options) as server:
        async with websocket_peer(server.url) as slow, websocket_peer(server.url) as quick:
            await slow.subscribe(b"t")
            await quick.subscribe(b"t")
            slow.acknowledges = False
            counts = []
            for n in range(20):
                counts.append(await quick.notify(b"t", b"%d" % n))
                assert await quick.message() == (b"t", b"%d" % n)
            closed = await slow.closed()
            assert closed.code == 4408
            assert "websocket_max_pending_sends" in closed.reason
            assert counts[:13] == [2] * 13
            assert counts[-1] == 1


async def test_who_fell_behind_can_catch_up() -> None:
    """In a turn of its own it may acknowledge more than others may send it meanwhile."""
    async with (
        running() as server,
        websocket_peer(server.url) as subscriber,
        websocket_peer(server.url) as publisher,
    ):
        await subscriber.subscribe(b"t")
        assert await publisher.notify(b"t", b"so that the topic is known") == 1
        await subscriber.message()
        subscriber.acknowledges = False
        hub, now = server.broadcaster.websockets, time.time()
        (behind,) = (c for c in hub.connections if c.session.topics)
        (busy,) = hub.connections - {behind}

        payload = publisher.payload(b"t", b"x")
        messages = [publisher.session.notify(payload, b"x", now) for _ in range(128)]
        turns = 0
        while messages:
            messages = busy.arrived(messages) or []
            turns += 1
        acknowledgements = []
        while len(acknowledgements) < 128:
            acknowledgements += subscriber.session.answer(await subscriber.event(), now)
        while acknowledgements:
            acknowledgements = behind.arrived(acknowledgements) or []
            turns -= 4
        assert turns >= 0
        assert [(await publisher.answer()).subscribers for _ in range(128)] == [1] * 128
        assert behind.session.room == behind.session.limits.unanswered


async def test_bytes_that_wait_are_bounded() -> None:
    options: Any = {"websocket_send_max_unacknowledged": 1, "websocket_max_pending_bytes": 10_000}
    async with running(**options) as server:
        async with websocket_peer(server.url) as slow, websocket_peer(server.url) as quick:
            await slow.subscribe(b"t")
            slow.acknowledges = False
            for _ in range(8):
                await quick.notify(b"t", b"x" * 4000)
            closed = await slow.closed()
            assert closed.code == 4408
            assert "websocket_max_pending_bytes" in closed.reason


async def test_no_progress() -> None:
    async with running(websocket_ack_timeout=0.2) as server:
        async with websocket_peer(server.url) as slow, websocket_peer(server.url) as quick:
            await slow.subscribe(b"t")
            await quick.subscribe(b"t")
            slow.acknowledges = False
            assert await quick.notify(b"t", b"x") == 2
            closed = await slow.closed()
            assert (closed.code, "websocket_ack_timeout" in closed.reason) == (4408, True)
            assert await quick.notify(b"t", b"y") == 1


async def test_a_window_of_any_size_passes_everything_on() -> None:
    async with running(websocket_send_max_unacknowledged=1) as server:
        async with websocket_peer(server.url) as one, websocket_peer(server.url) as two:
            await one.subscribe(b"t")
            for n in range(50):
                assert await two.notify(b"t", b"%d" % n) == 1
            assert [await one.message() for _ in range(50)] == [
                (b"t", b"%d" % n) for n in range(50)
            ]


async def test_pipelined_requests_are_answered_in_order() -> None:
    limits = s.Limits(unanswered=2000)
    async with running(websocket_max_unprocessed_receives=7) as server:
        async with websocket_peer(server.url, limits=limits) as peer:
            now, data = time.time(), b"x"
            frames = []
            for n in range(1000):
                payload = s.Payload(b"t%d" % n, b"%d" % n, 1, peer.payload(b"", data).sha512)
                frames.append(peer.session.notify(payload, data, now))
                if n % 10 == 0:
                    frames.append(peer.session.subscribe_exact(b"t%d" % n, now))
            sending = asyncio.gather(*map(peer.send, frames))
            answers = [await peer.answer() for _ in frames]
            await sending
            assert sum(isinstance(a, m.ConfirmNotify) for a in answers) == 1000


# compression


def samples() -> list[bytes]:
    return [
        json.dumps({"user": n * 7919 % 10_000, "event": "login", "from": "web"}).encode()
        for n in range(5000)
    ]


async def test_without_a_dictionary() -> None:
    data = b"".join(samples())[:100_000]
    async with running() as server:
        async with websocket_peer(server.url, enable_zstd=True) as peer:
            enabled = await peer.next(s.Enabled)
            assert (enabled.compressor.id, enabled.compressor.min_size) == (1, 16_384)
            await peer.subscribe(b"t")
            assert await peer.notify(b"t", data) == 1
            event = await peer.next(s.BodyArrived)
            assert (event.head.compressor, event.head.decompressed_length) == (1, len(data))
            assert event.head.compressed_length < 30_000


@pytest.mark.parametrize("spool", [1000, 10_000_000])
async def test_compressed_once_for_all(spool: int) -> None:
    data = b"".join(samples()) * 2
    options: Any = {"message_body_spool_size": spool, "outgoing_max_ws_message_size": 4096}
    async with running(**options) as server, contextlib.AsyncExitStack() as stack:
        peers = [
            await stack.enter_async_context(websocket_peer(server.url, enable_zstd=zstd))
            for zstd in (True, True, True, False)
        ]
        for peer in peers:
            await peer.subscribe(b"t")
        receiving = [asyncio.create_task(peer.message()) for peer in peers[1:]]
        sender = peers[0]
        assert await sender.notify(b"t", data) == 4
        for got in [await sender.message(), *await asyncio.gather(*receiving)]:
            assert got == (b"t", data)
    assert server.broadcaster.intake.used == 0


async def test_preset_dictionary(tmp_path: Path) -> None:
    dictionary = zstandard.train_dictionary(4096, samples()).as_bytes()
    (tmp_path / "seven").write_bytes(dictionary)
    presets = {7: dictionary}
    options: Any = {"compression_dictionaries": f"7={tmp_path / 'seven'}:5"}
    async with running(**options) as server:
        async with websocket_peer(
            server.url, enable_zstd=True, initial_dict=7, presets=presets
        ) as peer:
            enabled = [(await peer.next(s.Enabled)).compressor for _ in range(2)]
            assert [(c.id, c.level, c.min_size) for c in enabled] == [(1, 3, 16_384), (7, 5, 32)]
            await peer.subscribe(b"t")
            data = samples()[17]
            assert await peer.notify(b"t", data) == 1
            assert await peer.message() == (b"t", data)
        with pytest.raises(Closed) as closed:
            async with websocket_peer(
                server.url, enable_zstd=True, initial_dict=8, presets={8: dictionary}
            ):
                pass
        assert closed.value.code == 4400


async def test_trained_dictionaries_come_and_go() -> None:
    options: Any = {
        "compression_training": True,
        "compression_training_low_watermark": 20_000,
        "compression_training_high_watermark": 40_000,
        "compression_retrain_interval": 1.0,
    }
    async with running(**options) as server:
        async with (
            websocket_peer(server.url, enable_zstd=True, enable_training=True) as peer,
            websocket_peer(server.url, enable_zstd=True) as plain,
        ):
            await peer.subscribe(b"t")
            await plain.subscribe(b"t")
            sender = peer
            used: list[int] = []
            async with asyncio.timeout(60):
                while 65_538 not in used:
                    for data in samples()[:50]:
                        assert await sender.notify(b"t", data) == 2
                        event = await peer.next(s.BodyArrived)
                        used.append(event.head.compressor)
                        assert await plain.message() == (b"t", data)
            await peer.next(s.Disabled)
            assert sorted(set(used)) == [0, 65_536, 65_537, 65_538]
            assert used == sorted(used)
            async with websocket_peer(
                server.url, enable_zstd=True, enable_training=True
            ) as newcomer:
                ids = [(await newcomer.next(s.Enabled)).compressor.id for _ in range(3)]
                assert ids == [1, 65_537, 65_538]


# the rest of the world


async def test_missed_is_passed_on() -> None:
    async with running() as server, websocket_peer(server.url) as peer:
        await peer.subscribe(b"t", globs=("a/*",))
        server.broadcaster.websockets.missed(b"other")
        for topic in (b"t", b"a/b"):
            server.broadcaster.websockets.missed(topic)
            assert (await peer.next(s.TopicMissed)).topic == topic


class Unavailable:
    def authorize(self, *args: Any) -> str | None:
        return None

    def check(self, *args: Any) -> AuthResult:
        return AuthResult.UNAVAILABLE


async def test_authorization_that_cannot_be_checked() -> None:
    async with running(AuthConfig(Unavailable(), Nothing())) as server:
        with pytest.raises(Closed) as closed:
            async with websocket_peer(server.url):
                pass
        assert closed.value.code == 4503


async def test_no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as server, websocket_peer(server.url) as peer:

        async def fails(*_: Any) -> Any:
            raise StoreUnavailable("locked")

        monkeypatch.setattr(server.broadcaster.store, "match", fails)
        await peer.send(peer.session.notify(peer.payload(b"t", b"x"), b"x", time.time()))
        assert (await peer.closed()).code == 4503


async def test_stopping_says_so() -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with running() as server:
            peer = await stack.enter_async_context(websocket_peer(server.url))
        assert (await peer.closed()).code == 1012


async def test_quotas_of_urls_are_not_for_websockets(tmp_path: Path) -> None:
    """All of a process share one url in the database; each has websocket_max_subscriptions."""
    db = f"sqlite:///{tmp_path}/store.db"
    async with running(db=db, max_subscriptions_per_url=1, max_subscriptions_per_origin=1) as ours:
        async with websocket_peer(ours.url) as one, websocket_peer(ours.url) as other:
            for topic in (b"a", b"b", b"c"):
                await one.subscribe(topic)
                await other.subscribe(topic + topic)
            assert (await ours.broadcaster.store.counts())["exact"] == 6
            assert await one.notify(b"cc", b"x") == 1
