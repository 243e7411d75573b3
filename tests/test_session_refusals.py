"""Peers that break the rules in the details, and requests that cannot be sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest

from lonelypsp import messages as m
from lonelypsp import session as s
from lonelypsp.errors import LocalProtocolError
from sessions import AUTHS, NOW, SMALL, Pair, parts, plain, sha512, unpacked

BODY = bytes(range(256)) * 20
BOTH: dict[str, Any] = {"client": {"limits": SMALL}, "server": {"limits": SMALL}}
HEAD: dict[str, Any] = {
    "identifier": b"abcd",
    "topic": b"t",
    "compressed_length": 1500,
    "decompressed_length": 1500,
    "sha512": sha512(BODY[:1500]),
    "body": BODY[:500],
}
ZSTD: dict[str, Any] = {"level": 3, "min_size": 0}


def raw(message: m.Message) -> bytes:
    return m.encode(message, minimal=True)


def start(**changes: Any) -> bytes:
    return raw(m.NotifyStreamStart(**HEAD | changes))


def part(part_id: int, body: bytes, identifier: bytes = b"abcd") -> bytes:
    return raw(m.NotifyStreamPart(identifier=identifier, part_id=part_id, body=body))


def down_start(**changes: Any) -> bytes:
    return raw(m.ReceiveStreamStart(**HEAD | changes))


def down_part(part_id: int, body: bytes, identifier: bytes = b"abcd") -> bytes:
    return raw(m.ReceiveStreamPart(identifier=identifier, part_id=part_id, body=body))


def notify(body: bytes, **changes: Any) -> bytes:
    length = {"compressed_length": len(body), "decompressed_length": len(body)}
    return raw(m.Notify(**HEAD | length | {"body": body, "sha512": sha512(body)} | changes))


def broken_by(end: s.Session, frames: list[bytes]) -> s.ConnectionBroken:
    """What the last of the frames causes."""
    *legal, last = frames
    for frame in legal:
        end.receive(frame, NOW)
    assert end.phase is not s.Phase.CLOSED
    with pytest.raises(s.ConnectionBroken) as caught:
        end.receive(last, NOW)
    assert end.phase is s.Phase.CLOSED
    return caught.value


A, B, C = BODY[:500], BODY[500:1000], BODY[1000:1500]
BODIES: dict[str, tuple[list[tuple[Any, ...]], str]] = {
    "part-skipped": ([(0, A), (2, B)], "part 2 where 1"),
    "part-twice": ([(0, A), (1, B), (1, B)], "part 1 where 2"),
    "parts-swapped": ([(0, A), (2, C), (1, B)], "part 2 where 1"),
    "identifier-changed": ([(0, A), (1, B, b"abce")], "another message"),
    "identifier-cut": ([(0, A), (1, B, b"abc")], "another message"),
    "too-long-by-one": ([(0, A), (1, B), (2, C + b"x")], "longer than the 1,500 bytes"),
    "too-long-at-once": ([(0, A), (1, bytes(1001))], "longer than the 1,500 bytes"),
    "another-digest": ([(0, A), (1, B), (2, C[:-1] + b"x")], "SHA-512"),
    "after-the-end": ([(0, A), (1, B), (2, C), (3, b"")], "without a start"),
}


@pytest.mark.parametrize(("script", "complaint"), BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("direction", ["up", "down"])
def test_bodies_in_parts(direction: str, script: list[tuple[Any, ...]], complaint: str) -> None:
    ends = Pair(**BOTH)
    up = direction == "up"
    frames = [start() if up else down_start()]
    frames += [(part if up else down_part)(*later) for later in script[1:]]
    if complaint.startswith("part 2") and len(frames) > 2:
        frames = frames[:2]
    error = broken_by(ends.server if up else ends.client, frames)
    assert complaint in str(error)
    assert error.close_code == 4400


SHA_OF_OTHER = sha512(b"other")
Scripts = dict[str, tuple[Callable[[Any], list[Any]], int, str]]
UP: Scripts = {
    "second-configure": (lambda e: [e.client_configure], 4400, "Configure while"),
    "subscribe-twice": (
        lambda e: [raw(m.SubscribeExact(topic=b"t"))] * 2,
        4400,
        "b't' is subscribed",
    ),
    "subscribe-glob-twice": (
        lambda e: [raw(m.SubscribeGlob(glob="*"))] * 2,
        4400,
        "'*' is subscribed",
    ),
    "unsubscribe-what-is-not": (
        lambda e: [raw(m.UnsubscribeExact(topic=b"t"))],
        4400,
        "not subscribed",
    ),
    "unsubscribe-a-glob-as-topic": (
        lambda e: [raw(m.SubscribeGlob(glob="t")), raw(m.UnsubscribeExact(topic=b"t"))],
        4400,
        "not subscribed",
    ),
    "digest-of-one-frame": (lambda e: [notify(b"x", sha512=SHA_OF_OTHER)], 4400, "SHA-512"),
    "digest-of-one-part": (
        lambda e: [start(compressed_length=500, decompressed_length=500, sha512=SHA_OF_OTHER)],
        4400,
        "SHA-512",
    ),
    "length-of-one-frame": (
        lambda e: [b"".join((notify(b"xy"), b"z"))],
        4400,
        "x-compressed-length",
    ),
    "two-lengths": (lambda e: [patched(start(), 1500, 1501)], 4400, "two differing ones"),
    "start-too-long": (
        lambda e: [start(compressed_length=499, decompressed_length=499)],
        4400,
        "longer than the 499",
    ),
    "compressor-not-enabled": (lambda e: [start(compressor=2)], 4400, "compressor 2"),
    "compressor-disabled": (
        lambda e: [e.custom_gone(), notify(b"x", compressor=65_536)][1:],
        4400,
        "compressor 65536",
    ),
    "compressed-nothing": (
        lambda e: [e.preset() and notify(b"", compressor=1, decompressed_length=9)],
        4400,
        "no data",
    ),
    "too-large": (
        lambda e: [start(compressed_length=10_001, decompressed_length=10_001)],
        4413,
        "10,000 bytes",
    ),
    "becomes-too-large": (
        lambda e: [e.preset() and notify(b"bomb", compressor=1, decompressed_length=10_001)],
        4413,
        "10,000 bytes",
    ),
    "becomes-2^64": (
        lambda e: [e.preset() and start(compressor=1, decompressed_length=(1 << 64) - 1)],
        4413,
        "10,000 bytes",
    ),
    "too-many-subscriptions": (
        lambda e: [raw(m.SubscribeExact(topic=b"%d" % n)) for n in range(4)],
        4429,
        "too many subscriptions",
    ),
    "too-many-owed": (lambda e: [notify(b"x")] * 6, 4429, "5 frames wait"),
    "confirm-of-another": (
        lambda e: [e.delivered(b"abcd") and raw(m.ConfirmReceive(identifier=b"abce"))],
        4400,
        "another identifier",
    ),
    "confirm-out-of-order": (
        lambda e: [
            e.delivered(b"abcd")
            and e.delivered(b"abce")
            and raw(m.ConfirmReceive(identifier=b"abce"))
        ],
        4400,
        "another identifier",
    ),
    "confirm-twice": (
        lambda e: (
            [e.delivered(b"abcd") and raw(m.ConfirmReceive(identifier=b"abcd"))] * 1
            + [raw(m.ConfirmReceive(identifier=b"abcd"))]
        ),
        4400,
        "no answer is due",
    ),
    "continue-for-the-whole": (
        lambda e: [e.delivered(b"abcd") and raw(m.ContinueReceive(identifier=b"abcd", part_id=0))],
        4400,
        "where ConfirmReceive is due",
    ),
    "confirm-for-a-part": (
        lambda e: [e.began() and raw(m.ConfirmReceive(identifier=b"abcd"))],
        4400,
        "where ContinueReceive is due",
    ),
    "continue-of-another-part": (
        lambda e: [e.began() and raw(m.ContinueReceive(identifier=b"abcd", part_id=1))],
        4400,
        "another part_id",
    ),
}


def patched(frame: bytes, old: int, new: int) -> bytes:
    """With another decompressed length."""
    head, _, tail = frame.rpartition(old.to_bytes(2, "big"))
    return head + new.to_bytes(2, "big") + tail


def nowhere(_: Any) -> Any:
    raise AssertionError("a body that is refused needs no place")


class Ends(Pair):
    """With small limits, a frame that was sent, and things that happened."""

    def __init__(self, **more: Any) -> None:
        few = s.Limits(
            frame_length=600,
            body_length=10_000,
            owed=5,
            subscriptions=3,
            compressors=2,
            dictionary_length=10,
        )
        options: dict[str, Any] = {"limits": few, "sink": nowhere}
        super().__init__(
            client=options | {"presets": {3: b"x"}}, server=options, open=False, **more
        )
        self.client_configure = self.client.configure(NOW)
        self.up(self.client_configure)
        self.server_confirm = self.server.confirm_configure(NOW)
        self.down(self.server_confirm)

    def delivered(self, identifier: bytes) -> bytes:
        return self.server.deliver(plain(b"x", identifier=identifier), b"x", NOW)

    def published(self, identifier: bytes) -> bytes:
        return self.client.notify(plain(b"x", identifier=identifier), b"x", NOW)

    def began(self) -> bytes:
        return next(parts(self.server, plain(BODY), BODY))

    def streams(self) -> bytes:
        return next(parts(self.client, plain(BODY), BODY))

    def custom_gone(self) -> bytes:
        """A dictionary disabled, which the subscriber has acknowledged to know."""
        self.custom(65_536, b"d")
        frame = self.server.disable_custom(65_536, NOW)
        self.down(frame)
        self.answer_up(self.down(self.delivered(b"abcd")))
        return frame


@pytest.mark.parametrize(("script", "code", "complaint"), UP.values(), ids=UP)
def test_to_a_broadcaster(script: Callable[[Any], list[bytes]], code: int, complaint: str) -> None:
    ends = Ends()
    error = broken_by(ends.server, script(ends))
    assert complaint in str(error)
    assert error.close_code == code


def enable(compressor: int, **changes: Any) -> bytes:
    return raw(m.EnableZstdPreset(compressor=compressor, **ZSTD | changes))


def custom(compressor: int, dictionary: bytes, **changes: Any) -> bytes:
    fields = {"sha512": sha512(dictionary), "dictionary": dictionary} | ZSTD | changes
    return raw(m.EnableZstdCustom(compressor=compressor, **fields))


def confirm(identifier: bytes) -> bytes:
    return raw(m.ConfirmNotify(identifier=identifier, subscribers=1))


DOWN: Scripts = {
    "second-confirm-configure": (lambda e: [e.server_confirm], 4400, "ConfirmConfigure while"),
    "too-large": (
        lambda e: [down_start(compressed_length=10_001, decompressed_length=10_001)],
        4413,
        "10,000 bytes",
    ),
    "compressor-not-enabled": (lambda e: [down_start(compressor=1)], 4400, "compressor 1"),
    "preset-unknown": (lambda e: [enable(2)], 4400, "no preset dictionary has the id 2"),
    "preset-twice": (lambda e: [enable(1), enable(1)], 4400, "or again"),
    "preset-with-the-id-of-a-custom": (lambda e: [enable(65_536)], 4400, "cannot be enabled so"),
    "custom-with-the-id-of-a-preset": (lambda e: [custom(3, b"d")], 4400, "cannot be enabled so"),
    "custom-twice": (lambda e: [custom(65_536, b"d")] * 2, 4400, "or again"),
    "custom-too-large": (lambda e: [custom(65_536, bytes(11))], 4413, "too large"),
    "custom-of-another-digest": (
        lambda e: [custom(65_536, b"d", sha512=SHA_OF_OTHER)],
        4400,
        "SHA-512",
    ),
    "too-many-compressors": (
        lambda e: [enable(1), enable(3), custom(65_536, b"d")],
        4429,
        "too many compressors",
    ),
    "disabled-what-is-not": (
        lambda e: [raw(m.DisableZstdCustom(compressor=65_536))],
        4400,
        "65536 is not enabled",
    ),
    "too-many-owed": (
        lambda e: [raw(m.ReceiveStreamStart(**HEAD | WHOLE))] * 6,
        4429,
        "5 frames wait",
    ),
    "confirm-nothing": (lambda e: [confirm(b"abcd")], 4400, "no answer is due"),
    "confirm-twice": (
        lambda e: [e.published(b"abcd") and confirm(b"abcd"), confirm(b"abcd")],
        4400,
        "no answer is due",
    ),
    "confirm-out-of-order": (
        lambda e: [e.published(b"abcd") and e.published(b"abce") and confirm(b"abce")],
        4400,
        "another identifier",
    ),
    "confirm-for-a-part": (
        lambda e: [e.streams() and confirm(b"abcd")],
        4400,
        "where ContinueNotify is due",
    ),
    "continue-of-another-part": (
        lambda e: [e.streams() and raw(m.ContinueNotify(identifier=b"abcd", part_id=1))],
        4400,
        "another part_id",
    ),
    "confirm-another-topic": (
        lambda e: [
            e.client.subscribe_exact(b"t", NOW) and raw(m.ConfirmSubscribeExact(topic=b"u"))
        ],
        4400,
        "another topic",
    ),
    "confirm-a-glob-for-a-topic": (
        lambda e: [e.client.subscribe_exact(b"t", NOW) and raw(m.ConfirmSubscribeGlob(glob="t"))],
        4400,
        "where ConfirmSubscribeExact is due",
    ),
    "confirm-unsubscribing-for-subscribing": (
        lambda e: [
            e.client.subscribe_exact(b"t", NOW) and raw(m.ConfirmUnsubscribeExact(topic=b"t"))
        ],
        4400,
        "where ConfirmSubscribeExact is due",
    ),
}
WHOLE = {"compressed_length": 500, "decompressed_length": 500, "sha512": sha512(A)}


@pytest.mark.parametrize(("script", "code", "complaint"), DOWN.values(), ids=DOWN)
def test_to_a_subscriber(script: Callable[[Any], list[bytes]], code: int, complaint: str) -> None:
    ends = Ends()
    error = broken_by(ends.client, script(ends))
    assert complaint in str(error)
    assert error.close_code == code


@pytest.mark.parametrize(
    ("options", "frame"),
    [
        ({"enable_zstd": False}, enable(1)),
        ({"enable_zstd": False}, custom(65_536, b"d")),
        ({"enable_training": False}, custom(65_536, b"d")),
    ],
)
def test_compressors_that_were_not_asked_for(options: dict[str, bool], frame: bytes) -> None:
    ends = Pair(client=options)
    assert "not asked for" in str(broken_by(ends.client, [frame]))
    with pytest.raises(LocalProtocolError, match="did not ask"):
        ends.server.enable_custom(65_536, b"d", NOW, **ZSTD)


def test_more_compressors_than_there_may_be() -> None:
    ends = Ends()
    for compressor in (65_536, 65_537):
        ends.custom(compressor, b"d")
    local(ends, lambda: ends.server.enable_preset(1, NOW, **ZSTD), "2 compressors are enabled")


def test_compressor_0_is_ignored() -> None:
    ends = Pair()
    assert ends.down(enable(0)) == s.Ignored()
    assert not ends.client.compressors


@pytest.mark.parametrize(("wish", "zstd", "refused"), [(2, True, True), (2, False, False)])
def test_the_dictionary_wished_for(wish: int, zstd: bool, refused: bool) -> None:
    ends = Pair(client={"initial_dict": wish, "enable_zstd": zstd}, open=False)
    frame = ends.client.configure(NOW)
    if refused:
        assert "no preset dictionary has the id 2" in str(broken_by(ends.server, [frame]))
    else:
        assert ends.up(frame).message.initial_dict == 2


def test_no_wish_in_expanded_headers() -> None:
    """D5: older peers take, and sign, the missing header for a wish of dictionary 48."""
    frame = m.encode(
        m.Configure(subscriber_nonce=bytes(32), enable_zstd=True, enable_training=False),
        minimal=False,
    )
    name = b"x-initial-dict"
    at = frame.index(name) - 2
    shorter = frame[:at] + frame[at + 2 + len(name) + 4 :]
    count = int.from_bytes(frame[4:6], "big") - 1
    shorter = shorter[:4] + count.to_bytes(2, "big") + shorter[6:]
    without: Any = s.BroadcasterSession(AUTHS["none"]()).receive(shorter, NOW)
    assert without.message.initial_dict == 48
    compressing = s.BroadcasterSession(AUTHS["none"](), allow_zstd=True)
    assert "no preset dictionary has the id 48" in str(broken_by(compressing, [shorter]))


class Failing(BytesIO):
    def write(self, _: Any) -> int:
        raise OSError("no space left")


def test_a_sink_that_fails_closes_the_session_and_is_known() -> None:
    sink = Failing()
    ends = Pair(server={"sink": lambda start: sink})
    with pytest.raises(OSError, match="no space"):
        ends.up(start())
    assert ends.server.phase is s.Phase.CLOSED
    assert ends.server.unfinished is sink


def test_no_sink_can_be_had() -> None:
    ends = Pair(server={"sink": nowhere})
    with pytest.raises(AssertionError):
        ends.up(start())
    assert ends.server.phase is s.Phase.CLOSED
    assert ends.server.unfinished is None


# what cannot be sent, and changes nothing


def local(ends: Pair, call: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(LocalProtocolError, match=complaint):
        call()
    works(ends)


def works(ends: Pair) -> None:
    """Everything still arrives in order."""
    topic = b"after the refusal"
    ends.subscribe(topic)
    assert ends.answer_down(ends.up(ends.client.unsubscribe_exact(topic, NOW)))
    assert ends.answer_up(ends.down(ends.server.deliver(plain(b"x"), b"x", NOW)))
    assert ends.answer_down(ends.up(ends.client.notify(plain(b"x"), b"x", NOW)))
    assert ends.down(ends.server.missed(topic, NOW)) == s.TopicMissed(topic)


LONG = b"x" * 65_536
PACKED = s.Payload(b"t", b"abcd", 1, sha512(b"x"), 1, 9)
LOCAL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "configure-again": (lambda e: e.client.configure(NOW), "Configure while"),
    "confirm-again": (lambda e: e.server.confirm_configure(NOW), "ConfirmConfigure while"),
    "topic": (lambda e: e.client.subscribe_exact(LONG, NOW), "topic"),
    "glob": (lambda e: e.client.subscribe_glob("\ud800", NOW), "glob"),
    "not-subscribed": (lambda e: e.client.unsubscribe_exact(b"u", NOW), "not subscribed"),
    "not-subscribed-glob": (lambda e: e.client.unsubscribe_glob("u", NOW), "not subscribed"),
    "identifier": (lambda e: e.client.notify(plain(b"x", b"t", bytes(65)), b"x", NOW), "x-ident"),
    "length": (lambda e: e.client.notify(plain(b"xy"), b"x", NOW), "1 bytes of a body of 2"),
    "length-down": (lambda e: e.server.deliver(plain(b"xy"), b"x", NOW), "1 bytes of a body of 2"),
    "compressor": (lambda e: e.client.notify(PACKED, b"x", NOW), "1 is not enabled"),
    "compressor-of-parts": (lambda e: e.client.open_stream(PACKED), "1 is not enabled"),
    "no-length-before": (
        lambda e: (
            e.preset()
            and e.client.open_stream(dataclasses.replace(PACKED, decompressed_length=None))
        ),
        "had one before",
    ),
    "no-part": (lambda e: e.server.next_part(NOW), "no body was begun"),
    "missed-topic": (lambda e: e.server.missed(LONG, NOW), "topic"),
    "preset": (lambda e: e.server.enable_preset(2, NOW, **ZSTD), "no preset"),
    "preset-again": (
        lambda e: e.preset() and e.server.enable_preset(1, NOW, **ZSTD),
        "enabled already",
    ),
    "custom-id": (lambda e: e.server.enable_custom(65_535, b"d", NOW, **ZSTD), "from 65536"),
    "level": (lambda e: e.server.enable_preset(1, NOW, level=1 << 15, min_size=0), "x-compression"),
    "disable-preset": (lambda e: e.preset() and e.server.disable_custom(1, NOW), "be disabled"),
    "disable-unknown": (lambda e: e.server.disable_custom(65_536, NOW), "be disabled"),
}


@pytest.mark.parametrize("auth", AUTHS)
@pytest.mark.parametrize(("call", "complaint"), LOCAL.values(), ids=LOCAL)
def test_what_cannot_be_sent(auth: str, call: Callable[[Any], Any], complaint: str) -> None:
    ends = Pair(AUTHS[auth](), **BOTH)
    local(ends, lambda: call(ends), complaint)


@pytest.mark.parametrize("level", [-1, -32_768])
def test_negative_levels_cannot_be_signed(level: int) -> None:
    """D26: nor can ids from 2^32."""
    ends = Pair(AUTHS["hmac"]())
    local(ends, lambda: ends.server.enable_preset(1, NOW, level=level, min_size=0), "level")
    local(ends, lambda: ends.server.enable_custom(1 << 32, b"d", NOW, **ZSTD), "compressor")
    unsigned = Pair()
    frame = unsigned.server.enable_preset(1, NOW, level=level, min_size=0)
    assert unsigned.down(frame).compressor.level == level


@pytest.mark.parametrize("subscribers", [-1, 1 << 32])
def test_answers_that_cannot_be_given(subscribers: int) -> None:
    ends = Pair(AUTHS["hmac"]())
    event = ends.up(ends.client.notify(plain(b"x"), b"x", NOW))
    with pytest.raises(LocalProtocolError, match="cannot be signed"):
        ends.server.answer(event, NOW, subscribers=subscribers)
    (answered,) = ends.answer_down(event, subscribers=(1 << 32) - 1)
    assert answered.message.subscribers == (1 << 32) - 1
    local(ends, lambda: ends.server.answer(event, NOW), "given already")


def test_the_window() -> None:
    few = s.Limits(unanswered=2, frame_length=600)
    ends = Pair(client={"limits": few}, server={"limits": few})
    stream = parts(ends.server, plain(BODY), BODY)
    events = [ends.down(next(stream)) for _ in range(2)]
    with pytest.raises(LocalProtocolError, match="look at `room`"):
        ends.server.next_part(NOW)
    asked = [ends.client.subscribe_exact(topic, NOW) for topic in (b"1", b"2")]
    with pytest.raises(LocalProtocolError, match="look at `room`"):
        ends.client.subscribe_exact(b"3", NOW)
    assert ends.client.topics == {b"1", b"2"}
    assert all(ends.answer_down(ends.up(frame)) for frame in asked)
    assert ends.server.room == 0
    ends.answer_up(events[0])
    assert ends.server.room == 1
    assert isinstance(ends.down(next(stream)), s.PartArrived)


def test_between_the_parts_of_a_body() -> None:
    ends = Pair(**BOTH)
    server, client = ends.server, ends.client
    ends.custom(65_536, b"d")
    server.open_stream(plain(BODY))
    assert ends.down(server.missed(b"before", NOW)) == s.TopicMissed(b"before")
    with pytest.raises(LocalProtocolError, match="not sent yet"):
        server.open_stream(plain(BODY))
    down = server.next_part(NOW)
    assert isinstance(ends.down(down.head + BODY[: down.length]), s.PartArrived)
    client.open_stream(plain(BODY))
    up = client.next_part(NOW)
    assert isinstance(ends.up(up.head + BODY[: up.length]), s.PartArrived)
    for call in (
        lambda: server.missed(b"t", NOW),
        lambda: server.enable_preset(1, NOW, **ZSTD),
        lambda: server.enable_custom(65_537, b"d", NOW, **ZSTD),
        lambda: server.disable_custom(65_536, NOW),
        lambda: server.deliver(plain(b"x"), b"x", NOW),
        lambda: server.open_stream(plain(b"x")),
        lambda: client.notify(plain(b"x"), b"x", NOW),
        lambda: client.open_stream(plain(b"x")),
    ):
        with pytest.raises(LocalProtocolError, match="between the parts of a body"):
            call()
    for sender, arrive in ((server, ends.down), (client, ends.up)):
        while sender.sending:
            frame = sender.next_part(NOW)
            event = arrive(frame.head + BODY[frame.offset : frame.offset + frame.length])
        assert unpacked(event) == BODY
