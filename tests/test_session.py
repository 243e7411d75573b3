"""Two ends wired together: a recorded session byte for byte, and all that a connection does."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vectors
from lonelypsp import messages as m
from lonelypsp import session as s
from lonelypsp.errors import LocalProtocolError
from lonelypsp.signing import AuthConfig, Hmac, Nothing
from sessions import AUTHS, NOW, SMALL, Pair, Scripted, packed, parts, plain, sha512, unpacked

VECTORS = vectors.load("stateful")
BODY = bytes(range(256)) * 20
TEXT = b"the same words again and again, " * 200

WIRES = pytest.mark.parametrize(
    ("auth", "minimal"),
    [
        pytest.param(auth, minimal, id=f"{auth}-{'minimal' if minimal else 'expanded'}")
        for auth in AUTHS
        for minimal in (True, False)
    ],
)


def pair(auth: str = "none", minimal: bool = True, **more: Any) -> Pair:
    options = {"minimal": minimal, "limits": SMALL, **more}
    return Pair(AUTHS[auth](), client=options, server=options)


# against the older implementation

RECORDED = VECTORS["signed_session"]
STEPS = RECORDED["steps"]
RECORDED_KEYS = {
    direction: base64.urlsafe_b64decode(RECORDED[f"{direction}_secret_b64url"] + "==")
    for direction in ("to_broadcaster", "to_subscriber")
}


def recorded_auth(sender: str) -> AuthConfig:
    """Signs what `sender` sent with the recorded values; judges what it gets."""
    values = [step["authorization"] for step in STEPS if step["direction"] == sender]
    scripted = Scripted(values, Nothing())
    up, down = Hmac(RECORDED_KEYS["to_broadcaster"]), Hmac(RECORDED_KEYS["to_subscriber"])
    return AuthConfig(scripted, down) if sender == "S2B" else AuthConfig(up, scripted)


def test_a_recorded_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every frame that the older implementation would send, from the other end's point of view."""
    monkeypatch.setattr(s, "part_length", lambda remaining, *_: 4 if remaining == 10 else remaining)
    limits = s.Limits(frame_length=1)
    client = s.SubscriberSession(
        recorded_auth("S2B"),
        enable_zstd=True,
        enable_training=True,
        tracing=b"",
        nonce=bytes.fromhex(RECORDED["subscriber_nonce"]),
        limits=limits,
    )
    server = s.BroadcasterSession(
        recorded_auth("B2S"),
        allow_zstd=True,
        allow_training=True,
        counts_parts=True,  # as the older broadcaster does
        nonce=bytes.fromhex(RECORDED["broadcaster_nonce"]),
        limits=limits,
    )
    steps = iter(STEPS)

    def step(frame: bytes) -> Any:
        """Compares the frame with the recorded one, and gives it to the other end."""
        recorded = next(steps)
        assert frame.hex() == recorded["hex"], recorded["type"]
        return (server if recorded["direction"] == "S2B" else client).receive(frame, NOW)

    def up(event: Any, **more: Any) -> None:
        (frame,) = client.answer(event, NOW, **more)
        assert isinstance(step(frame), s.Answered)

    def down(event: Any, **more: Any) -> None:
        (frame,) = server.answer(event, NOW, **more)
        assert isinstance(step(frame), s.Answered)

    assert step(client.configure(NOW)).zstd
    assert step(server.confirm_configure(NOW)) == s.Opened()
    assert step(server.enable_preset(1, NOW, level=3, min_size=16_384)).compressor.id == 1
    down(step(client.subscribe_exact(b"alpha", NOW)))
    down(step(client.subscribe_glob("g/*", NOW)))
    hello = plain(b"hello", b"alpha", bytes.fromhex("deadbeef"))
    down(step(client.notify(hello, b"hello", NOW)), subscribers=1)
    hello.identifier = bytes.fromhex("0a0b0c0d")
    up(step(server.deliver(hello, b"hello", NOW)))
    digits = b"0123456789"
    for frame in parts(client, plain(digits, b"alpha", bytes.fromhex("01020304")), digits):
        event = step(frame)
        down(event, subscribers=1)
    assert unpacked(event) == digits
    for frame in parts(server, plain(digits, b"alpha", bytes.fromhex("0a0b0c0e")), digits):
        event = step(frame)
        up(event)
    assert unpacked(event) == digits
    assert step(server.missed(b"alpha", NOW)) == s.TopicMissed(b"alpha")
    dictionary = bytes(m.decode_from_broadcaster(bytes.fromhex(STEPS[20]["hex"])).dictionary)  # type: ignore[attr-defined]
    custom = {"level": 3, "min_size": 32, "max_size": 16_384}
    enabled = step(server.enable_custom(65_536, dictionary, NOW, **custom))
    assert enabled.compressor.dictionary == dictionary
    assert step(server.disable_custom(65_536, NOW)).compressor == enabled.compressor
    down(step(client.unsubscribe_exact(b"alpha", NOW)))
    down(step(client.unsubscribe_glob("g/*", NOW)))
    assert next(steps, None) is None
    assert not client.topics | client.globs | server.topics | server.globs


def splitting_id(row: dict[str, Any]) -> str:
    most = row.get("max_websocket_message_size", row.get("outgoing_max_ws_message_size"))
    form = "minimal" if row["minimal_headers"] else "expanded"
    return f"{row['side']}-{row['body_length']}-{most}-{row['compressor']}-{form}"


@pytest.mark.parametrize("row", VECTORS["splitting"], ids=splitting_id)
def test_splits_as_the_older_implementation(row: dict[str, Any]) -> None:
    """The frames, and what is due for each."""
    most = row.get("max_websocket_message_size", row.get("outgoing_max_ws_message_size"))
    ends = pair(minimal=row["minimal_headers"], limits=s.Limits(frame_length=most))
    ends.preset()
    body = bytes((7 * i + i // 256) % 256 for i in range(row["body_length"]))
    about = bytes.fromhex(row["identifier"])
    topic = row["topic"].encode()
    payload = plain(body, topic, about)
    if row["compressor"]:
        (frame,) = (bytes.fromhex(f["hex"]) for f in row["frames"])
        decode = m.decode_from_subscriber
        if row["side"] == "broadcaster":
            decode = m.decode_from_broadcaster
        head: Any = decode(frame)
        whole, body = body, bytes(head.body)
        payload = s.Payload(
            topic, about, len(body), sha512(body), 1, len(whole), hashlib.sha512(whole).digest()
        )
    sender: Any = ends.client if row["side"] == "client" else ends.server
    if row["frames"][0]["type"] == "NOTIFY":
        frames = [sender.notify(payload, body, NOW)]
    else:
        frames = list(parts(sender, payload, body))
    assert [hashlib.sha256(f).hexdigest() for f in frames] == [f["sha256"] for f in row["frames"]]
    assert [len(f) for f in frames] == [f["frame_length"] for f in row["frames"]]
    assert [due(exchange) for exchange in sender._unanswered] == row["expected_acks"]


@settings(max_examples=60)
@given(
    length=st.integers(0, 9_000),
    most=st.none() | st.integers(0, 3_000),
    topic=st.binary(max_size=200),
    auth=st.sampled_from(list(AUTHS)),
    minimal=st.booleans(),
)
def test_frames_are_as_long_as_they_may(
    length: int, most: int | None, topic: bytes, auth: str, minimal: bool
) -> None:
    ends = pair(auth, minimal, limits=s.Limits(frame_length=most))
    body = bytes(length)
    payload = plain(body, topic)
    for sender, arrive in ((ends.client, ends.up), (ends.server, ends.down)):
        estimate, one = sender._parts_of(payload), sender.one_frame(payload)
        frames = list(parts(sender, payload, body))
        events = [arrive(frame) for frame in frames]
        assert unpacked(events[-1]) == body
        assert 1 <= len(frames) <= estimate
        *full, last = frames
        if most is not None:
            # a part carries at least 512 bytes, even if its frame gets too long
            assert all(len(frame) == most or 512 < len(frame) < 1536 for frame in full)
            assert len(last) <= max(most, 1536)
        assert len(frames) == 1 or not one
        assert most is None or not one or len(last) <= most


NAMES = {
    m.ConfirmNotify: "CONFIRM_NOTIFY",
    m.ContinueNotify: "CONTINUE_NOTIFY",
    m.ConfirmReceive: "CONFIRM_RECEIVE",
    m.ContinueReceive: "CONTINUE_RECEIVE",
}


def due(exchange: s.Exchange) -> str:
    """An answer that is due, as the vectors write it."""
    name = NAMES[exchange.answer]
    return f"{name}[{exchange.repeats['part_id']}]" if "part_id" in exchange.repeats else name


# Sizes of a message of 40 MB as they were recorded from the older implementation: frame, of which
# body; the first frame, the ones between, the last. Its authorizations had 113 characters.
LARGE = {
    "zstd": (
        40_000_924,
        1,
        "",
        (3_670_016, 3_669_911),
        (3_670_016, 3_669_999),
        (3_301_039, 3_301_022),
    ),
    "hmac": (
        40_000_000,
        0,
        "a" * 113,
        (3_670_016, 3_669_798),
        (3_670_016, 3_669_886),
        (3_301_358, 3_301_228),
    ),
}


@pytest.mark.parametrize(
    ("length", "compressor", "authorization", "first", "between", "last"), LARGE.values(), ids=LARGE
)
@pytest.mark.parametrize("direction", ["up", "down"])
def test_sizes_of_a_recorded_transfer(
    direction: str,
    length: int,
    compressor: int,
    authorization: str,
    first: tuple[int, int],
    between: tuple[int, int],
    last: tuple[int, int],
) -> None:
    scripted = Scripted([authorization] * 50, Nothing())
    limits = s.Limits(frame_length=3_670_016)
    ends = Pair(
        AuthConfig(scripted, scripted), client={"limits": limits}, server={"limits": limits}
    )
    ends.preset()
    sender: Any = ends.client if direction == "up" else ends.server
    about = bytes.fromhex("f9ab60ed")
    sender.open_stream(
        s.Payload(b"alpha", about, length, bytes(64), compressor, 40_000_000, bytes(64))
    )
    found = []
    while sender.sending:
        part = sender.next_part(NOW)
        found.append((len(part.head) + part.length, part.length))
    assert found == [first, *[between] * 9, last]
    assert part.offset + part.length == length


# everything a connection does


@WIRES
def test_subscribing(auth: str, minimal: bool) -> None:
    ends = pair(auth, minimal)
    for key in (b"a/b", b"", b"\xff\x00", "a/*", "", "*"):
        kind = "exact" if isinstance(key, bytes) else "glob"
        for verb in ("subscribe", "unsubscribe", "subscribe"):
            asked = ends.up(getattr(ends.client, f"{verb}_{kind}")(key, NOW))
            assert asked.subscribes is (verb == "subscribe")
            (answered,) = ends.answer_down(asked)
            name = f"Confirm{verb.title()}{kind.title()}"
            assert type(answered.message).__name__ == name
    for end in (ends.client, ends.server):
        assert end.topics == {b"a/b", b"", b"\xff\x00"}
        assert end.globs == {"a/*", "", "*"}
        assert end.room == SMALL.unanswered
        assert end.owed == 0


@WIRES
@pytest.mark.parametrize("form", ["plain", "zstd", "preset", "custom"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "parts"])
def test_messages_both_ways(auth: str, minimal: bool, form: str, streamed: bool) -> None:
    presets = {7: b"a preset dictionary of words, again and again"}
    ends = pair(auth, minimal, presets=presets, limits=s.Limits(frame_length=1))
    body = b"".join(hashlib.sha512(bytes([i])).digest() for i in range(20)) + TEXT
    compressor = None
    if form == "custom":
        compressor = ends.custom(65_536, b"another dictionary " * 9)
    elif form != "plain":
        compressor = ends.preset(7 if form == "preset" else 1)
    ways: list[tuple[Any, ...]] = [
        (ends.client, ends.up, ends.answer_down, {"subscribers": 5, "decompressed_sha512": None}),
        (ends.server, ends.down, ends.answer_up, {}),
    ]
    for sender, arrive, answer, of_answer in ways:
        payload, data = plain(body), body
        if compressor is not None:
            payload, data = packed(body, compressor)
            of_answer = of_answer and of_answer | {"decompressed_sha512": sha512(body)}
        if streamed:
            frames: Any = parts(sender, payload, data)
        elif sender is ends.client:
            frames = [sender.notify(payload, data, NOW)]
        else:
            frames = [sender.deliver(payload, data, NOW)]
        for frame in frames:
            assert sender.room == 127
            event = arrive(frame)
            (answered,) = answer(event, **of_answer)
        assert isinstance(event, s.BodyArrived)
        assert (event.body is None) is streamed
        assert event.compressor == compressor
        assert unpacked(event) == body
        assert event.head.topic == b"t"
        assert getattr(answered.message, "subscribers", 5) == 5
        assert sender.room == 128


@WIRES
def test_an_empty_body(auth: str, minimal: bool) -> None:
    ends = pair(auth, minimal)
    for frame in (
        ends.client.notify(plain(b""), b"", NOW),
        *parts(ends.client, plain(b""), b""),
    ):
        event = ends.up(frame)
        assert unpacked(event) == b""
        assert ends.answer_down(event)
    for frame in (ends.server.deliver(plain(b""), b"", NOW), *parts(ends.server, plain(b""), b"")):
        event = ends.down(frame)
        assert unpacked(event) == b""
        assert ends.answer_up(event)


@WIRES
def test_missed_and_dictionaries(auth: str, minimal: bool) -> None:
    presets = {2: b"two", 65_535: b"last"}
    ends = pair(auth, minimal, presets=presets)
    assert ends.down(ends.server.missed(b"\xff", NOW)) == s.TopicMissed(b"\xff")
    assert ends.preset(1).dictionary is None
    assert ends.preset(2).dictionary == b"two"
    assert ends.preset(65_535).dictionary == b"last"
    for custom in (65_536, 65_537, (1 << 32) - 1):
        assert ends.custom(custom, b"%d" % custom).id == custom
    assert ends.client.compressors == ends.server.compressors
    disabled = ends.down(ends.server.disable_custom(65_536, NOW)).compressor
    assert disabled.id == 65_536
    assert ends.client.compressors == ends.server.compressors
    assert 65_536 not in ends.client.compressors
    assert ends.down(ends.server.missed(b"t", NOW)) == s.TopicMissed(b"t")


@WIRES
def test_what_may_stand_between_the_parts_of_a_body(auth: str, minimal: bool) -> None:
    """Both ends send bodies at once, and everything else that is allowed to."""
    ends = pair(auth, minimal)
    ups = parts(ends.client, plain(BODY), BODY)
    downs = parts(ends.server, plain(BODY), BODY)
    ends.subscribe(b"first")
    for n, (up, down) in enumerate(zip(ups, downs, strict=True)):
        to_server, to_client = ends.up(up), ends.down(down)
        assert ends.answer_down(to_server)
        ends.subscribe(b"%d" % n)
        assert ends.answer_up(to_client)
        assert ends.answer_down(ends.up(ends.client.unsubscribe_exact(b"%d" % n, NOW)))
    assert unpacked(to_server) == unpacked(to_client) == BODY
    assert n > 5
    assert ends.server.topics == {b"first"}


@WIRES
def test_everything_pipelined(auth: str, minimal: bool) -> None:
    """Nobody waits; answers are given in the wrong order, and come in the right one."""
    ends = pair(auth, minimal)
    frames = [ends.client.subscribe_glob("*", NOW)]
    frames += [ends.client.notify(plain(b"%d" % n), b"%d" % n, NOW) for n in range(20)]
    frames += parts(ends.client, plain(BODY), BODY)
    frames += [ends.client.unsubscribe_glob("*", NOW)]
    events = [ends.up(frame) for frame in frames]
    assert ends.server.owed == len(frames)
    assert ends.client.room == SMALL.unanswered - len(frames)
    for event in events[:0:-1]:
        assert ends.server.answer(event, NOW) == []
    answers = ends.server.answer(events[0], NOW)
    assert len(answers) == len(frames)
    assert all(isinstance(ends.down(answer), s.Answered) for answer in answers)
    assert ends.server.owed == 0
    assert ends.client.room == SMALL.unanswered


def test_the_compressor_for_a_length() -> None:
    ends = pair()
    assert ends.server.compressor_for(1) is None
    for compressor, least, most in ((1, 100, m.UNLIMITED), (65_536, 10, 100), (65_537, 20, 100)):
        options: dict[str, Any] = {"level": 3, "min_size": least, "max_size": most}
        frame = (
            ends.server.enable_preset(compressor, NOW, **options)
            if compressor == 1
            else ends.server.enable_custom(compressor, b"d", NOW, **options)
        )
        assert ends.down(frame).compressor.id == compressor
    for end in (ends.client, ends.server):
        chosen = {n: end.compressor_for(n) for n in (9, 10, 19, 20, 99, 100, 1 << 62)}
        ids = {n: c and c.id for n, c in chosen.items()}
        assert ids == {9: None, 10: 65_536, 19: 65_536} | {20: 65_537, 99: 65_537} | {
            100: 1,
            1 << 62: 1,
        }


def test_a_dictionary_is_taken_until_its_end_is_known() -> None:
    """Until the subscriber has answered a frame that was sent after the DISABLE."""
    ends = pair(auth="hmac")
    custom = ends.custom(65_536, b"dictionary")
    payload, data = packed(TEXT, custom)

    def notify_arrives() -> None:
        event = ends.up(ends.client.notify(payload, data, NOW))
        assert unpacked(event) == TEXT
        assert ends.answer_down(event, decompressed_sha512=sha512(TEXT))

    before = ends.down(ends.server.deliver(plain(b"x"), b"x", NOW))
    disable = ends.server.disable_custom(65_536, NOW)
    with pytest.raises(LocalProtocolError, match="enabled already"):
        ends.server.enable_custom(65_536, b"d", NOW, level=3, min_size=0)
    after = ends.server.deliver(plain(b"x"), b"x", NOW)
    notify_arrives()
    assert ends.answer_up(before)
    notify_arrives()
    late = ends.client.notify(payload, data, NOW)
    ends.client.open_stream(payload)
    assert isinstance(ends.down(disable), s.Disabled)
    with pytest.raises(LocalProtocolError, match="not enabled"):
        ends.client.next_part(NOW)
    assert not ends.client.sending
    event = ends.down(after)
    assert unpacked(ends.up(late)) == TEXT
    assert ends.answer_up(event)
    assert ends.custom(65_536, b"another dictionary").dictionary == b"another dictionary"


def test_a_dictionary_in_use_is_not_disabled() -> None:
    ends = pair(limits=s.Limits(frame_length=1))
    custom = ends.custom(65_536, b"dictionary")
    body = b"".join(hashlib.sha512(bytes([i])).digest() for i in range(20))
    payload, data = packed(body, custom)
    frames = list(parts(ends.client, payload, data))
    assert len(frames) > 1
    ends.up(frames[0])
    ends.server.open_stream(payload)
    with pytest.raises(LocalProtocolError, match="was begun"):
        ends.server.disable_custom(65_536, NOW)
    while ends.server.sending:
        part = ends.server.next_part(NOW)
        event = ends.down(part.head + data[part.offset : part.offset + part.length])
        ends.answer_up(event)
    assert unpacked(event) == body
    ends.down(ends.server.disable_custom(65_536, NOW))
    for frame in frames[1:]:  # what began with it ends with it
        event = ends.up(frame)
    assert unpacked(event) == body


def test_the_window_is_told_to_newer_subscribers_alone() -> None:
    limits = s.Limits(unanswered=40)
    assert Pair(server={"limits": limits}).client.peer_window == 40
    assert Pair(client={"tracing": b""}, server={"limits": limits}).client.peer_window == 3


def test_a_closed_session_ignores_what_comes_and_sends_nothing() -> None:
    ends = pair()
    event = ends.up(ends.client.notify(plain(b"x"), b"x", NOW))
    ends.server.close()
    assert ends.up(b"rubbish") == s.Ignored()
    assert ends.server.answer(event, NOW) == []
    with pytest.raises(LocalProtocolError, match="closed"):
        ends.server.missed(b"t", NOW)
