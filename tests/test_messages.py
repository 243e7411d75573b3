from __future__ import annotations

import dataclasses
import hashlib
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vectors
from lonelypsp import headers, messages
from lonelypsp.connection_url import (
    BROADCASTER_START,
    SUBSCRIBER_START,
    connection_nonce,
    connection_url,
    next_counter,
)
from lonelypsp.errors import LocalProtocolError, RemoteProtocolError
from lonelypsp.messages import FROM_BROADCASTER, FROM_SUBSCRIBER, Message, StreamPart, StreamStart
from lonelypsp.signing import OPERATIONS
from outcomes import outcome

DECODERS = {"S2B": messages.decode_from_subscriber, "B2S": messages.decode_from_broadcaster}
CLASSES = [
    pytest.param(direction, cls, id=cls.__name__)
    for direction, known in (("S2B", FROM_SUBSCRIBER), ("B2S", FROM_BROADCASTER))
    for classes in known.values()
    for cls in classes
]
FORMS = pytest.mark.parametrize("minimal", [True, False], ids=["minimal", "expanded"])

# what the vectors call our fields
OUR_NAMES = {
    "compressor_id": "compressor",
    "compression_level": "level",
    "payload": "body",
    "uncompressed_message": "body",
    "compressed_message": "body",
    "verified_uncompressed_sha512": "sha512",
    "verified_compressed_sha512": "sha512",
    "unverified_uncompressed_sha512": "sha512",
    "unverified_compressed_sha512": "sha512",
}


def class_of(direction: str, kind: int, fields: dict[str, Any]) -> type[Any]:
    classes = (FROM_SUBSCRIBER if direction == "S2B" else FROM_BROADCASTER)[kind]
    return classes[0] if not fields.get("part_id") else classes[-1]


def message_of(direction: str, kind: int, row: dict[str, Any]) -> Any:
    """The message that a vector means."""
    cls = class_of(direction, kind, row)
    fields = {OUR_NAMES.get(name, name): value for name, value in row.items()}
    if "compressor" in cls.HEADERS and cls.HEADERS["compressor"] is headers.COMPRESSOR_ID:
        fields["compressor"] = fields.pop("identifier")
    for name in ("compressor", "part_id"):
        if name in fields:
            fields[name] = fields[name] or 0
    if "compressed_length" in cls.HEADERS:
        length = fields.pop("uncompressed_length", len(fields["body"]))
        fields.setdefault("compressed_length", length)
        fields.setdefault("decompressed_length", length)
    return cls(**fields)


def frame(kind: int, *values: bytes, body: bytes = b"") -> bytes:
    """A frame in minimal form."""
    head = b"\0\1" + kind.to_bytes(2, "big")
    return head + b"".join(len(v).to_bytes(2, "big") + v for v in values) + body


def typical(direction: str, name: str, **changes: Any) -> Any:
    """The message of a vector, with some fields changed."""
    row = next(r for r in vectors.load("stateful")["messages"] if r["name"] == f"{name}/minimal")
    return dataclasses.replace(message_of(direction, row["type_int"], row["fields"]), **changes)


# against the older implementation


def vector_bytes(row: dict[str, Any]) -> bytes:
    return bytes.fromhex(row["hex"])


@pytest.mark.parametrize("row", vectors.rows("stateful", "messages"))
def test_encodes_as_the_older_implementation(row: dict[str, Any]) -> None:
    message = message_of(row["direction"], row["type_int"], row["fields"])
    assert messages.encode(message, minimal=row["minimal_headers"]) == vector_bytes(row)
    assert len(vector_bytes(row)) == row["length"]


@pytest.mark.parametrize("row", vectors.rows("stateful", "messages"))
def test_decodes_what_the_older_implementation_sends(row: dict[str, Any]) -> None:
    expected = message_of(row["direction"], row["type_int"], row["fields"])
    # an empty authorization and none are the same on the wire
    expected = dataclasses.replace(expected, authorization=expected.authorization or None)
    assert DECODERS[row["direction"]](vector_bytes(row)) == expected


LONG: dict[str, Any] = {
    "subscribe_exact/topic-65535": messages.SubscribeExact(topic=b"T" * 65_535),
    "subscribe_exact/tracing-65535": messages.SubscribeExact(topic=b"x", tracing=b"t" * 65_535),
    "configure/authorization-65535": typical(
        "S2B", "configure/typical", authorization="a" * 65_535
    ),
    "notify/70000-bytes": typical(
        "S2B",
        "notify/small",
        body=b"z" * 70_000,
        compressed_length=70_000,
        decompressed_length=70_000,
        sha512=hashlib.sha512(b"z" * 70_000).digest(),
    ),
}


@pytest.mark.parametrize("row", vectors.rows("stateful", "long_messages"))
def test_long_messages(row: dict[str, Any]) -> None:
    name, _, form = row["name"].rpartition("/")
    data = messages.encode(LONG[name], minimal=form == "minimal")
    assert data.startswith(bytes.fromhex(row["prefix_hex"]))
    assert len(data) == row["length"]
    assert hashlib.sha256(data).hexdigest() == row["sha256"]
    assert messages.decode_from_subscriber(data) == LONG[name]


@pytest.mark.parametrize("row", vectors.rows("stateful", "lenient_decode"))
def test_decodes_unusual_forms(row: dict[str, Any]) -> None:
    kind = int.from_bytes(vector_bytes(row)[2:4], "big")
    expected = message_of(row["direction"], kind, row["decodes_to"])
    assert DECODERS[row["direction"]](vector_bytes(row)) == expected


@pytest.mark.parametrize("row", vectors.rows("stateful", "reject_decode"))
def test_refuses_to_decode(row: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        DECODERS[row["direction"]](vector_bytes(row))


TOO_LARGE: dict[str, Any] = {
    "topic-65536": messages.SubscribeExact(topic=b"T" * 65_536),
    "initial-dict-65536": typical("S2B", "configure/typical", initial_dict=65_536),
    "num-subscribers-2^32": messages.ConfirmReceive(identifier=b"i", num_subscribers=1 << 32),
    # deliberately different: the older implementation sends it and then refuses to read it
    "identifier-65": messages.ContinueReceive(identifier=b"i" * 65, part_id=0),
    "level-40000": messages.EnableZstdPreset(compressor=1, level=40_000, min_size=0),
}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row['name']}-{'minimal' if row['minimal_headers'] else 'expanded'}")
        for row in vectors.load("stateful")["reject_encode"]
    ],
)
def test_refuses_to_encode(row: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError):
        messages.encode(TOO_LARGE[row["name"]], minimal=row["minimal_headers"])


@pytest.mark.parametrize("row", vectors.load("stateful")["urls"], ids=lambda r: r["nonce_b64"])
def test_connection_urls(row: dict[str, Any]) -> None:
    nonce = connection_nonce(
        bytes.fromhex(row["subscriber_nonce"]), bytes.fromhex(row["broadcaster_nonce"])
    )
    assert nonce == row["nonce_b64"]
    for step in row["broadcaster_urls"] + row["subscriber_urls"]:
        assert connection_url(nonce, step["counter"]) == step["url"]
        assert next_counter(step["counter"]) == step["next_counter"]
    assert row["broadcaster_urls"][0]["counter"] == BROADCASTER_START
    assert row["subscriber_urls"][0]["counter"] == SUBSCRIBER_START


@pytest.mark.parametrize("lengths", [(31, 32), (32, 33), (0, 0)])
def test_connection_nonces_of_another_length(lengths: tuple[int, int]) -> None:
    with pytest.raises(LocalProtocolError):
        connection_nonce(b"s" * lengths[0], b"b" * lengths[1])


# the table


def test_every_type_has_a_class() -> None:
    assert sorted(FROM_SUBSCRIBER) == list(range(1, 10))
    assert sorted(FROM_BROADCASTER) == list(range(1, 13))


@pytest.mark.parametrize(("direction", "cls"), CLASSES)
def test_fields_are_those_to_sign(direction: str, cls: type[Message]) -> None:
    signed = {name for name, _ in OPERATIONS[cls.OPERATION].layout}
    known_elsewhere = {"url", "recovery"}
    if cls is messages.ConfirmNotify or issubclass(cls, StreamPart):
        known_elsewhere |= {"topic", "sha512"}
    assert signed - cls.HEADERS.keys() <= known_elsewhere
    assert OPERATIONS[cls.OPERATION].direction.value == (
        "to-broadcaster" if direction == "S2B" else "to-subscriber"
    )


@pytest.mark.parametrize("known", [FROM_SUBSCRIBER, FROM_BROADCASTER], ids=["S2B", "B2S"])
def test_a_stream_part_has_the_first_headers_of_its_start(known: messages.Classes) -> None:
    """The decoder reads them before it knows which of the two it reads."""
    [(start, part)] = [classes for classes in known.values() if len(classes) > 1]
    assert issubclass(start, StreamStart)
    assert issubclass(part, StreamPart)
    assert [h.name for h in start.HEADERS.values()][:4] == [h.name for h in part.HEADERS.values()]


# round trips and rubbish


def values(header: headers.Header[Any]) -> st.SearchStrategy[Any]:
    if isinstance(header, headers.Octets):
        return st.binary(min_size=header.least, max_size=min(header.most, header.least + 70))
    if isinstance(header, headers.Integer):
        edges = st.sampled_from([header.least, min(header.least + 1, header.most), header.most])
        return edges | st.integers(header.least, header.most)
    if isinstance(header, headers.OptionalText):
        return st.none() | st.text(min_size=1, max_size=20)
    if isinstance(header, headers.Text):
        return st.text(max_size=20)
    if isinstance(header, headers.Flag):
        return st.booleans()
    raise NotImplementedError(header)


@st.composite
def any_message(draw: st.DrawFn, cls: type[Any]) -> Any:
    """Any message of a class that can be sent."""
    fields = {name: draw(values(header)) for name, header in cls.HEADERS.items()}
    if cls.BODY is not None:
        fields[cls.BODY] = draw(st.binary(max_size=50))
    if cls is messages.Notify:
        fields["compressed_length"] = len(fields["body"])
        fields["sha512"] = hashlib.sha512(fields["body"]).digest()
    if fields.get("compressor") == 0 and "compressed_length" in fields:
        fields["decompressed_length"] = fields["compressed_length"]
    return cls(**fields)


@pytest.mark.parametrize(("direction", "cls"), CLASSES)
@FORMS
@given(data=st.data())
def test_round_trip(direction: str, cls: type[Any], minimal: bool, data: st.DataObject) -> None:
    message = data.draw(any_message(cls))
    encoded = messages.encode(message, minimal=minimal)
    decoded = DECODERS[direction](encoded)
    assert decoded == message
    assert type(decoded) is cls
    assert messages.encode(decoded, minimal=minimal) == encoded
    if cls.BODY is None:
        assert DECODERS[direction](encoded + b"more") == message
    for end in range(len(encoded) - (len(getattr(message, cls.BODY)) if cls.BODY else 0)):
        with pytest.raises(RemoteProtocolError):
            DECODERS[direction](encoded[:end])


def decode_anything(decode: Any, data: bytes) -> None:
    """It is a message, or it is refused as the peer's fault."""
    try:
        message = decode(data)
    except RemoteProtocolError:
        return
    for minimal in (True, False):
        assert decode(messages.encode(message, minimal=minimal)) == message


PREFIX = st.builds(
    lambda flags, kind: flags.to_bytes(2, "big") + kind.to_bytes(2, "big"),
    st.integers(0, 3),
    st.integers(0, 14),
)


@pytest.mark.parametrize("direction", DECODERS)
@given(data=st.binary(max_size=200) | st.builds(bytes.__add__, PREFIX, st.binary(max_size=300)))
def test_any_bytes(direction: str, data: bytes) -> None:
    decode_anything(DECODERS[direction], data)


VALID = [bytes.fromhex(row["hex"]) for row in vectors.load("stateful")["messages"]]


@pytest.mark.parametrize("direction", DECODERS)
@given(
    data=st.sampled_from(VALID),
    at=st.integers(0, 400),
    length=st.integers(0, 4),
    other=st.binary(max_size=4),
)
def test_damaged_messages(direction: str, data: bytes, at: int, length: int, other: bytes) -> None:
    at %= len(data)
    decode_anything(DECODERS[direction], data[:at] + other + data[at + length :])


# the generated functions against the walk through the layout, which they must not differ from

WALKS = {
    "S2B": (FROM_SUBSCRIBER, messages._UNPACK_FROM_SUBSCRIBER),
    "B2S": (FROM_BROADCASTER, messages._UNPACK_FROM_BROADCASTER),
}
BUFFERS: list[Any] = [bytes, bytearray, memoryview]


def same_decoded(direction: str, data: Any) -> None:
    by_walk = outcome(lambda: messages._walk(data, WALKS[direction][0]))
    assert outcome(lambda: DECODERS[direction](data)) == by_walk


def same_encoded(message: Message) -> None:
    by_walk = outcome(lambda: messages._encode_head(message, minimal=True))
    assert outcome(lambda: messages.encode_head(message, minimal=True)) == by_walk


@pytest.mark.parametrize(("direction", "cls"), CLASSES)
@pytest.mark.parametrize("wrap", BUFFERS)
@given(data=st.data())
def test_the_quick_way_decodes_as_the_walk(
    direction: str, cls: type[Any], wrap: Any, data: st.DataObject
) -> None:
    encoded = messages.encode(data.draw(any_message(cls)), minimal=True)
    same_decoded(direction, wrap(encoded))
    same_decoded(direction, wrap(encoded[: data.draw(st.integers(0, len(encoded)))]))
    flipped = bytearray(encoded)
    flipped[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    same_decoded(direction, wrap(flipped))


@pytest.mark.parametrize(("direction", "cls"), CLASSES)
@given(data=st.data())
def test_the_quick_way_decodes_any_headers_as_the_walk(
    direction: str, cls: type[Any], data: st.DataObject
) -> None:
    lengths = st.sampled_from([0, 0, 1, 1, 2, 4, 5, 8, 9, 32, 64, 65, 1_100])
    value = lengths.flatmap(lambda n: st.just(b"\0" * n) | st.binary(min_size=n, max_size=n))
    drawn = data.draw(st.lists(value, max_size=len(cls.HEADERS) + 1))
    same_decoded(direction, frame(cls.TYPE, *drawn, body=data.draw(st.binary(max_size=20))))


@pytest.mark.parametrize("direction", DECODERS)
@given(data=st.binary(max_size=200) | st.builds(bytes.__add__, PREFIX, st.binary(max_size=300)))
def test_the_quick_way_decodes_any_bytes_as_the_walk(direction: str, data: bytes) -> None:
    same_decoded(direction, data)


ODD_VALUES: list[Any] = [
    *(None, True, 1.5, "", "text", "\ud800", "é" * 40_000, [], [1], object()),
    *(-1, 0, 1, 255, 256, 32_767, 32_768, 65_535, 65_536, 2**31, 2**32, 2**63, 2**64, 10**400),
    *(b"", b"x", b"x" * 31, b"x" * 32, b"x" * 64, b"x" * 65, b"x" * 1_023, b"x" * 1_024),
    *(b"x" * 65_535, b"x" * 65_536, bytearray(b"x"), memoryview(b"x" * 64)),
]


@pytest.mark.parametrize(("direction", "cls"), CLASSES)
@given(data=st.data())
def test_the_quick_way_encodes_as_the_walk(
    direction: str, cls: type[Any], data: st.DataObject
) -> None:
    message = data.draw(any_message(cls))
    same_encoded(message)
    name = data.draw(st.sampled_from([*cls.HEADERS, *([cls.BODY] if cls.BODY else [])]))
    for value in ODD_VALUES:
        same_encoded(dataclasses.replace(message, **{name: value}))


@pytest.mark.parametrize("wrap", BUFFERS)
@pytest.mark.parametrize("tracing", [b"", b"t" * 900, b"t" * 5_000], ids=len)
def test_long_frames_in_any_buffer(wrap: Any, tracing: bytes) -> None:
    """Of a view, only the first bytes are searched for headers the quick way."""
    start = typical("B2S", "receive_stream/whole", tracing=tracing, body=b"z" * 70_000)
    part = messages.ReceiveStreamPart(identifier=b"i", part_id=1, tracing=tracing, body=start.body)
    for message in (start, part):
        data = wrap(messages.encode(message, minimal=True))
        decoded: Any = messages.decode_from_broadcaster(data)
        assert decoded == message
        assert decoded.body.obj is memoryview(data).obj


@pytest.mark.parametrize(("direction", "cls"), CLASSES)
@given(data=st.data())
def test_ordinary_messages_go_the_quick_way(
    direction: str, cls: type[Any], data: st.DataObject
) -> None:
    """All the other tests would pass if they never did."""
    message = data.draw(any_message(cls))
    head = cls._pack(message)
    assert head == messages.encode_head(message, minimal=True)
    encoded = messages.encode(message, minimal=True)
    decoded = WALKS[direction][1][encoded[:4]](encoded, encoded)
    assert decoded == message
    assert hash(decoded) == hash(message)


# what the vectors leave out


def test_the_body_is_a_view_of_the_frame() -> None:
    data = messages.encode(LONG["notify/70000-bytes"], minimal=True)
    tracemalloc.start()
    try:
        message = messages.decode_from_subscriber(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(message, messages.Notify)
    assert isinstance(message.body, memoryview)
    assert message.body.obj is data
    assert peak < 10_000


@pytest.mark.parametrize("wrap", [bytes, memoryview])
def test_frames_and_bodies_may_be_views(wrap: Any) -> None:
    message = typical("S2B", "notify/small", body=wrap(b"hello"))
    data = messages.encode(message, minimal=True)
    assert messages.decode_from_subscriber(wrap(data)) == message


@FORMS
def test_head_and_body_are_the_frame(minimal: bool) -> None:
    message = typical("B2S", "receive_stream/whole")
    head = messages.encode_head(message, minimal=minimal)
    assert head + message.body == messages.encode(message, minimal=minimal)


@pytest.mark.parametrize(
    "message",
    [
        typical("S2B", "notify/small", compressed_length=6, decompressed_length=6),
        typical("S2B", "notify/small", decompressed_length=6),
        typical("S2B", "notify/small", sha512=b"h" * 63),
        typical("S2B", "notify_stream/start", decompressed_length=11),
        typical("S2B", "notify_stream/start", part_id=1),
        typical("S2B", "notify_stream/continuation-1", part_id=0),
        typical("S2B", "notify_stream/continuation-1", part_id=1 << 64),
        typical("S2B", "configure/typical", subscriber_nonce=b"n" * 31),
        typical("S2B", "configure/typical", initial_dict=-1),
        typical("S2B", "configure/typical", authorization="\ud800"),
        typical("S2B", "configure/typical", authorization="é" * 32_768),
        typical("S2B", "subscribe_glob/plain", glob="g" * 65_536),
        typical("B2S", "missed/plain", tracing=b"t" * 65_536),
        typical("B2S", "enable_zstd_preset/standard", level=-32_769),
        typical("B2S", "enable_zstd_preset/standard", max_size=1 << 64),
    ],
    ids=lambda message: type(message).__name__,
)
@FORMS
def test_refuses_to_send(message: Message, minimal: bool) -> None:
    with pytest.raises(LocalProtocolError):
        messages.encode(message, minimal=minimal)


def test_errors_name_the_header() -> None:
    with pytest.raises(RemoteProtocolError, match="x-part-id: 9 bytes, at most 8"):
        messages.decode_from_subscriber(frame(8, b"id", bytes(9), b"", b""))
    with pytest.raises(RemoteProtocolError, match="x-topic"):
        messages.decode_from_subscriber(frame(2, b"", b""))
    with pytest.raises(LocalProtocolError, match="x-identifier: 65 bytes"):
        messages.encode(TOO_LARGE["identifier-65"], minimal=True)


def test_the_greatest_number_of_headers() -> None:
    data = b"\0\0\0\2\xff\xff" + b"\0\1a\0\0" * 65_535
    with pytest.raises(RemoteProtocolError, match="authorization is missing"):
        messages.decode_from_subscriber(data)


def test_every_header_tells_its_encoding() -> None:
    documented = {
        header.name: header.wire
        for known in (FROM_SUBSCRIBER, FROM_BROADCASTER)
        for classes in known.values()
        for cls in classes
        for header in cls.HEADERS.values()
    }
    assert documented["x-subscriber-nonce"] == "32 bytes"
    assert documented["x-compression-level"] == "signed, at most 2 bytes, written with all 2"
    assert all(documented.values())


@pytest.mark.parametrize(
    "value",
    [None, "a", "ü" * 100, "a" * 0xFFFF, "a" * 0x10000, "\udc80"],
    ids=lambda v: f"{ascii(v)[:9]} {len(v or '')}",
)
def test_a_head_for_many(value: str | None) -> None:
    fields: dict[str, Any] = {
        "identifier": b"i",
        "topic": b"t",
        "compressed_length": 1,
        "decompressed_length": 1,
        "sha512": bytes(64),
        "body": b"x",
    }
    unsigned = messages.Unsigned(messages.ReceiveStreamStart(**fields))
    signed = messages.ReceiveStreamStart(authorization=value, **fields)
    assert outcome(lambda: unsigned.frame(value, b"x")) == outcome(
        lambda: messages.encode(signed, minimal=True)
    )
