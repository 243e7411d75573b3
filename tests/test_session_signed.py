"""Counters, older peers that count otherwise (D1), and frames changed on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lonelypsp import messages as m
from lonelypsp import session as s
from lonelypsp.connection_url import connection_nonce
from lonelypsp.errors import AuthResult, LocalProtocolError, RemoteProtocolError
from lonelypsp.signing import OPERATIONS, AuthConfig, Hmac, Nothing
from sessions import (
    AUTHS,
    NOW,
    SMALL,
    OlderBroadcaster,
    OlderSubscriber,
    Pair,
    packed,
    parts,
    plain,
    sha512,
    unpacked,
)

BODY = bytes(range(256)) * 20
TEXT = b"the same words again and again, " * 200
BOTH: dict[str, Any] = {"client": {"limits": SMALL}, "server": {"limits": SMALL}}
ZSTD: dict[str, Any] = {"level": 3, "min_size": 0}


def hmac_pair(**more: Any) -> Pair:
    return Pair(AUTHS["hmac"](), **BOTH | more)


def refused(end: s.Session, frame: bytes) -> None:
    with pytest.raises(s.ConnectionBroken) as caught:
        end.receive(frame, NOW)
    assert caught.value.close_code == 4403


# counters and nonces


class Noting(Nothing):
    """Remembers what was signed."""

    def __init__(self) -> None:
        self.signed: list[tuple[str, Any, Any]] = []

    def authorize(self, operation: str, fields: Any, now: float) -> str | None:
        assert set(fields) == {"tracing", *(name for name, _ in OPERATIONS[operation].layout)}
        assert len(dict(fields)) == len(fields)
        self.signed.append((operation, fields.get("url"), fields.get("recovery")))
        return None


def test_the_urls_that_are_signed() -> None:
    up, down = Noting(), Noting()
    ends = Pair(AuthConfig(up, down), **BOTH)
    nonce = connection_nonce(ends.client._own_nonce, ends.server._own_nonce)
    ends.subscribe()
    for frame in parts(ends.client, plain(BODY[:900]), BODY[:900]):
        assert ends.answer_down(ends.up(frame))
    ends.deliver_parts(BODY[:900])
    ends.answer_down(ends.up(ends.client.notify(plain(b"x"), b"x", NOW)))
    ends.down(ends.server.missed(b"t", NOW))
    ends.custom(65_536, b"d")
    ends.down(ends.server.disable_custom(65_536, NOW))
    ends.answer_down(ends.up(ends.client.unsubscribe_exact(b"t", NOW)))

    def url(counter: str) -> str:
        return f"websocket:{nonce}:{counter}"

    assert up.signed == [
        ("STATEFUL_CONFIGURE", None, None),
        ("SUBSCRIBE_EXACT", url("-1"), None),
        ("NOTIFY", None, None),
        ("NOTIFY", None, None),
        ("STATEFUL_CONTINUE_RECEIVE", url("-2"), None),
        ("CONFIRM_RECEIVE", url("-3"), None),
        ("NOTIFY", None, None),
        ("SUBSCRIBE_EXACT", url("-4"), None),
    ]
    assert down.signed == [
        ("STATEFUL_CONFIRM_CONFIGURE", None, None),
        ("CONFIRM_SUBSCRIBE_EXACT", url("-1"), None),
        ("STATEFUL_CONTINUE_NOTIFY", None, None),
        ("CONFIRM_NOTIFY", None, None),
        ("RECEIVE", url("1"), None),
        ("RECEIVE", url("2"), None),
        ("CONFIRM_NOTIFY", None, None),
        ("MISSED", None, url("3")),
        ("STATEFUL_ENABLE_ZSTD_CUSTOM", url("4"), None),
        ("STATEFUL_DISABLE_ZSTD_CUSTOM", url("5"), None),
        ("CONFIRM_SUBSCRIBE_EXACT", url("-4"), None),
    ]


COUNTED_UP: list[Callable[[Pair], bytes]] = [
    lambda e: e.client.subscribe_exact(b"t", NOW),
    lambda e: e.client.subscribe_glob("*", NOW),
    lambda e: e.client.answer(e.down(e.server.deliver(plain(b"x"), b"x", NOW)), NOW)[0],
]
COUNTED_DOWN: list[Callable[[Pair], bytes]] = [
    lambda e: e.server.missed(b"t", NOW),
    lambda e: e.server.deliver(plain(b"x"), b"x", NOW),
    lambda e: e.server.enable_preset(1, NOW, **ZSTD),
    lambda e: e.server.enable_custom(65_536, b"d", NOW, **ZSTD),
]


@pytest.mark.parametrize("lost", COUNTED_UP)
def test_a_lost_frame_shows_at_the_broadcaster(lost: Callable[[Pair], bytes]) -> None:
    ends = hmac_pair()
    lost(ends)
    refused(ends.server, ends.client.subscribe_exact(b"next", NOW))


@pytest.mark.parametrize("lost", COUNTED_DOWN)
def test_a_lost_frame_shows_at_the_subscriber(lost: Callable[[Pair], bytes]) -> None:
    ends = hmac_pair()
    lost(ends)
    refused(ends.client, ends.server.missed(b"next", NOW))


def test_repeated_and_swapped_frames() -> None:
    ends = hmac_pair()
    frame = ends.server.missed(b"t", NOW)
    ends.down(frame)
    refused(ends.client, frame)
    ends = hmac_pair()
    again = ends.client.notify(plain(b"x"), b"x", NOW)  # no counter: the value is used up
    ends.up(again)
    refused(ends.server, again)
    ends = hmac_pair()
    first, second = (ends.client.subscribe_exact(topic, NOW) for topic in (b"1", b"2"))
    refused(ends.server, second)
    assert ends.up(first) == s.Ignored()


def test_frames_of_another_connection() -> None:
    auth = AUTHS["hmac"]()
    one, other = Pair(auth), Pair(auth)
    refused(other.server, one.client.subscribe_exact(b"t", NOW))
    refused(other.client, one.server.missed(b"t", NOW))


def test_the_wrong_keys_and_a_late_frame() -> None:
    wrong = AuthConfig(Hmac(b"w" * 64), Hmac(b"w" * 64))
    ends = Pair(AUTHS["hmac"](), open=False)
    refused(ends.server, s.SubscriberSession(wrong).configure(NOW))
    refused(
        ends.server.__class__(AUTHS["hmac"]()), s.SubscriberSession(AUTHS["none"]()).configure(NOW)
    )
    late = s.BroadcasterSession(AUTHS["hmac"]())
    refused(late, s.SubscriberSession(AUTHS["hmac"]()).configure(NOW - 121))
    ends.client.configure(NOW)
    stranger = Pair(wrong, open=False)
    stranger.up(stranger.client.configure(NOW))
    refused(ends.client, stranger.server.confirm_configure(NOW))


class Unavailable(Nothing):
    def check(self, *_: Any) -> AuthResult:
        return AuthResult.UNAVAILABLE


def test_authorization_that_cannot_be_checked() -> None:
    server = s.BroadcasterSession(AuthConfig(Unavailable(), Nothing()))
    with pytest.raises(s.ConnectionBroken, match="cannot be checked now") as caught:
        server.receive(s.SubscriberSession(AUTHS["none"]()).configure(NOW), NOW)
    assert caught.value.close_code == 4503


# D1: who counts the parts of a body

PEERS: dict[str, tuple[dict[str, Any], bool]] = {
    "newer-newer": ({}, True),
    "newer-older": ({"broadcaster": OlderBroadcaster}, True),
    "older-newer": ({"subscriber": OlderSubscriber}, True),
    "older-older": ({"subscriber": OlderSubscriber, "broadcaster": OlderBroadcaster}, False),
}


def after_parts(ends: Pair) -> None:
    """Everything that is signed over a url, behind bodies in parts."""
    for length in (5000, 600, 5000):
        ends.deliver_parts(BODY[:length])
    for _ in range(2):
        event = ends.down(ends.server.deliver(plain(b"x"), b"x", NOW))
        assert ends.answer_up(event)
    ends.deliver_parts(BODY)
    assert ends.down(ends.server.missed(b"t", NOW)) == s.TopicMissed(b"t")
    ends.deliver_parts(BODY)
    ends.preset()
    ends.deliver_parts(BODY)
    ends.custom(65_536, b"d")
    ends.deliver_parts(BODY)
    assert isinstance(ends.down(ends.server.disable_custom(65_536, NOW)), s.Disabled)
    ends.subscribe()


@pytest.mark.parametrize(("peers", "works"), PEERS.values(), ids=PEERS)
@pytest.mark.parametrize("auth", AUTHS)
def test_counting_parts(auth: str, peers: dict[str, Any], works: bool) -> None:
    ends = Pair(AUTHS[auth](), **BOTH, **peers)
    if works or auth != "hmac":
        after_parts(ends)
        return
    # neither is ours, and this is why they lose messages; shows that the other three were tested
    ends.deliver_parts(BODY)
    refused(ends.client, ends.server.missed(b"t", NOW))


def test_a_broadcaster_that_signs_later_parts_with_anything() -> None:
    """As one may that counts the start alone: the hash of the whole is signed with it."""
    ends = hmac_pair(server={"limits": SMALL, "counts_parts": False})
    for _ in range(2):
        start, *later = parts(ends.server, plain(BODY), BODY)
        events = [ends.down(start)]
        for frame in later:
            part: Any = m.decode_from_broadcaster(frame)
            unsigned = dataclasses.replace(part, authorization="anything")
            events.append(ends.down(m.encode(unsigned, minimal=True)))
        assert unpacked(events[-1]) == BODY
        assert all(ends.answer_up(event) for event in events)
    assert ends.down(ends.server.missed(b"t", NOW)) == s.TopicMissed(b"t")


def confirmed_for(ends: Pair, subscribers: int) -> bytes:
    """A message confirmed on behalf of several."""
    event = ends.down(ends.server.deliver(plain(b"x"), b"x", NOW))
    event.exchange.repeats["num_subscribers"] = subscribers
    (frame,) = ends.client.answer(event, NOW)
    return frame


STRANGERS: dict[str, Callable[[Pair], Any]] = {
    "identifier": lambda e: e.up(e.client.notify(plain(b"x", identifier=b"long one"), b"x", NOW)),
    "configure": lambda e: None,
    "confirm": lambda e: e.up(confirmed_for(e, 2)),
}


@pytest.mark.parametrize("sign", STRANGERS)
def test_newer_subscribers_that_are_not_ours(sign: str) -> None:
    """They count parts, and show in something that they are not the older one."""
    tracing = b"a trace" if sign == "configure" else b""
    ends = hmac_pair(client={"limits": SMALL, "tracing": tracing})
    STRANGERS[sign](ends)
    # a subscriber that accepts only what counts each part
    ends.deliver_parts(BODY)
    ends.client._peer_counters = ends.client._peer_counters[-1:]
    assert ends.down(ends.server.missed(b"t", NOW)) == s.TopicMissed(b"t")


def test_missed_between_the_parts_of_a_body() -> None:
    """D36: older subscribers give up, ours takes it, counted either way."""
    for counts in (True, False):
        ends = hmac_pair(server={"limits": SMALL, "counts_parts": counts})
        frames = parts(ends.server, plain(BODY), BODY)
        for n, frame in enumerate(frames):
            event = ends.down(frame)
            assert ends.answer_up(event)
            if n == 3:
                sending, ends.server._sending = ends.server._sending, None
                between = ends.server.missed(b"t", NOW)
                ends.server._sending = sending
                assert ends.down(between) == s.TopicMissed(b"t")
        assert unpacked(event) == BODY


# D4: how many parts a signed body may have

PART = 512
MANY = bytes(300 * PART)
TINY = s.Limits(frame_length=1)


@pytest.mark.parametrize("auth", AUTHS)
@pytest.mark.parametrize("subscriber", [s.SubscriberSession, OlderSubscriber])
def test_more_parts_than_older_subscribers_can_sign_for(auth: str, subscriber: Any) -> None:
    limits: dict[str, Any] = {"limits": TINY}
    ends = Pair(AUTHS[auth](), client=limits, server=limits, subscriber=subscriber)
    assert unpacked(ends.deliver_parts(MANY[: 257 * PART])) == MANY[: 257 * PART]
    if auth == "hmac" and subscriber is OlderSubscriber:
        with pytest.raises(LocalProtocolError, match="257 signed parts"):
            ends.server.open_stream(plain(MANY[: 257 * PART + 1]))
        assert not ends.server.sending
        assert ends.down(ends.server.missed(b"t", NOW)) == s.TopicMissed(b"t")
    else:
        assert unpacked(ends.deliver_parts(MANY)) == MANY
    for frame in parts(ends.client, plain(MANY), MANY):  # an upload is acknowledged otherwise
        event = ends.up(frame)
        assert ends.answer_down(event)
    assert unpacked(event) == MANY


@pytest.mark.parametrize("frame_length", [None, 100_000])
def test_large_frames_for_older_subscribers(frame_length: int | None) -> None:
    limits = s.Limits(frame_length=frame_length)
    ends = Pair(AUTHS["hmac"](), server={"limits": limits}, subscriber=OlderSubscriber)
    assert unpacked(ends.deliver_parts(MANY)) == MANY
    length = 257 * 100_000
    if frame_length:
        with pytest.raises(LocalProtocolError, match="raise frame_length"):
            ends.server.open_stream(s.Payload(b"t", b"abcd", length, bytes(64)))
    ends.server.open_stream(s.Payload(b"t", b"abcd", length - 257 * 1100, bytes(64)))
    ends.server.next_part(NOW)


# D10, D25: what answers are signed over


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    "signed", [None, sha512(TEXT), sha512(b"another")], ids=["sent", "whole", "other"]
)
def test_which_hash_confirms_a_compressed_message(streamed: bool, signed: bytes | None) -> None:
    ends = hmac_pair()
    payload, data = packed(TEXT, ends.preset())
    if streamed:
        (frame,) = parts(ends.client, payload, data)
    else:
        frame = ends.client.notify(payload, data, NOW)
    (answer,) = ends.server.answer(ends.up(frame), NOW, decompressed_sha512=signed)
    if signed == sha512(b"another") and not streamed:
        refused(ends.client, answer)
    else:
        assert isinstance(ends.down(answer), s.Answered)


ANSWERS: dict[str, Callable[[Pair], bytes]] = {
    "exact": lambda e: e.client.subscribe_exact(b"t", NOW),
    "glob": lambda e: e.client.subscribe_glob("*", NOW),
    "notify": lambda e: e.client.notify(plain(b"x"), b"x", NOW),
    "part": lambda e: next(parts(e.client, plain(BODY), BODY)),
}


@pytest.mark.parametrize("forged", [None, "anything", "X-HMAC 1700000000:a:b"])
@pytest.mark.parametrize("ask", ANSWERS.values(), ids=ANSWERS)
def test_answers_are_verified(ask: Callable[[Pair], bytes], forged: str | None) -> None:
    ends = hmac_pair()
    (answer,) = ends.server.answer(ends.up(ask(ends)), NOW)
    message: Any = m.decode_from_broadcaster(answer)
    refused(ends.client, m.encode(dataclasses.replace(message, authorization=forged), minimal=True))


# a conversation in which one frame is changed


class Wire(Pair):
    """Changes the frame of number `n`, and notes what the frames mean."""

    def __init__(self, n: int = -1, change: Callable[[bytes], bytes] = bytes) -> None:
        self.frames: list[bytes] = []
        self.kinds: set[str] = set()
        self.meant: list[Any] = []
        self._n, self._change = n, change
        super().__init__(AUTHS["hmac"](), **BOTH)

    def up(self, frame: bytes) -> Any:
        return self._arrive(self.server, m.decode_from_subscriber, frame)

    def down(self, frame: bytes) -> Any:
        return self._arrive(self.client, m.decode_from_broadcaster, frame)

    def _arrive(self, end: s.Session, decode: Callable[[bytes], m.Message], frame: bytes) -> Any:
        self.kinds.add(type(decode(frame)).__name__)
        if len(self.frames) == self._n:
            frame = self._change(frame)
        self.frames.append(frame)
        event = end.receive(frame, NOW)
        # the length of a body is not signed: another one breaks the connection a few frames later,
        # and until then the body is not complete
        if not isinstance(event, s.PartArrived):
            self.meant.append(meaning(event))
        return event


def meaning(event: Any) -> Any:
    """What is to be done for a frame."""
    if isinstance(event, s.BodyArrived):
        return event.head.topic, event.head.identifier, unpacked(event)
    if isinstance(event, s.Configured | s.Answered | s.SubscriptionAsked):
        message: Any = event.message
        known = {name: getattr(message, name) for name in message.HEADERS}
        return type(message), {k: v for k, v in known.items() if not k.endswith(CHANGES)}
    return event


CHANGES = ("authorization", "nonce")


def conversation(ends: Wire) -> None:
    """Every message there is."""
    ends.subscribe(b"topic")
    ends.answer_down(ends.up(ends.client.subscribe_glob("glob/*", NOW)))
    ends.answer_down(ends.up(ends.client.notify(plain(b"hello"), b"hello", NOW)), subscribers=3)
    ends.answer_up(ends.down(ends.server.deliver(plain(b"hello"), b"hello", NOW)))
    for sender, arrive, answer in (
        (ends.client, ends.up, ends.answer_down),
        (ends.server, ends.down, ends.answer_up),
    ):
        for frame in parts(sender, plain(BODY[:1500]), BODY[:1500]):
            answer(arrive(frame))
    ends.down(ends.server.missed(b"topic", NOW))
    ends.preset()
    custom = ends.custom(65_536, b"the same words, again and again")
    for compressor in (ends.client.compressors[1], custom):
        payload, data = packed(TEXT, compressor)
        ends.answer_up(ends.down(ends.server.deliver(payload, data, NOW)))
        event = ends.up(ends.client.notify(payload, data, NOW))
        ends.answer_down(event, decompressed_sha512=sha512(TEXT))
    ends.down(ends.server.disable_custom(65_536, NOW))
    ends.answer_down(ends.up(ends.client.unsubscribe_exact(b"topic", NOW)))
    ends.answer_down(ends.up(ends.client.unsubscribe_glob("glob/*", NOW)))


def recorded() -> Wire:
    ends = Wire()
    conversation(ends)
    return ends


RECORDED = recorded()


@st.composite
def changes(draw: st.DrawFn) -> tuple[int, Callable[[bytes], bytes]]:
    n = draw(st.integers(0, len(RECORDED.frames) - 1))
    length = len(RECORDED.frames[n])
    # most of what can go wrong is at the front
    at = draw(st.integers(0, length - 1) | st.integers(0, min(length - 1, 8)))
    kind = draw(st.sampled_from(["flip", "cut", "insert", "remove", "append"]))
    some = draw(st.binary(min_size=1, max_size=9))
    bit = 1 << draw(st.integers(0, 7))

    def change(frame: bytes) -> bytes:
        # lengths differ by what random nonces and counters take
        here = min(at, len(frame) - 1)
        if kind == "flip":
            return frame[:here] + bytes([frame[here] ^ bit]) + frame[here + 1 :]
        if kind == "cut":
            return frame[:here]
        if kind == "insert":
            return frame[:here] + some + frame[here:]
        if kind == "remove":
            return frame[:here] + frame[here + len(some) :]
        return frame + some

    return n, change


@settings(max_examples=300)
@given(changes())
def test_a_changed_frame_breaks_the_connection_or_changes_nothing(
    change: tuple[int, Callable[[bytes], bytes]],
) -> None:
    ends = None
    try:
        ends = Wire(*change)
        conversation(ends)
    except RemoteProtocolError:
        pass  # of the session, or of decompressing
    if ends is not None:
        assert ends.meant == RECORDED.meant[: len(ends.meant)]


def test_the_conversation_has_every_message() -> None:
    every = {
        cls.__name__
        for known in (m.FROM_SUBSCRIBER, m.FROM_BROADCASTER)
        for classes in known.values()
        for cls in classes
    }
    assert RECORDED.kinds == every
