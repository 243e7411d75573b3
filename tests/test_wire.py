from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lonelypsp import bodies, wire
from lonelypsp.errors import AuthResult, Incomplete, LocalProtocolError, RemoteProtocolError
from lonelypsp.wire import HeadParser, Reader
from outcomes import outcome
from strategies import messages

HEADS = [bodies.NotifyHead, bodies.ReceiveHead, bodies.SetSubscriptionsHead]


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (AuthResult.OK, 200),
        (AuthResult.UNAUTHORIZED, 401),
        (AuthResult.FORBIDDEN, 403),
        (AuthResult.UNAVAILABLE, 503),
    ],
)
def test_every_auth_result_has_its_status(result: AuthResult, status: int) -> None:
    assert result.status == status


# codec, value, its bytes: the boundaries of what each codec carries
CARRIED = [
    pytest.param(wire.U8, 0, b"\x00", id="u8 min"),
    pytest.param(wire.U8, 255, b"\xff", id="u8 max"),
    pytest.param(wire.U16, 0, b"\x00\x00", id="u16 min"),
    pytest.param(wire.U16, 258, b"\x01\x02", id="u16 is big-endian"),
    pytest.param(wire.U16, 65_535, b"\xff\xff", id="u16 max"),
    pytest.param(wire.U32, 2**32 - 1, b"\xff" * 4, id="u32 max"),
    pytest.param(wire.U64, 1, b"\x00" * 7 + b"\x01", id="u64 one"),
    pytest.param(wire.U64, 2**64 - 1, b"\xff" * 8, id="u64 max"),
    pytest.param(wire.SHA512, b"\xab" * 64, b"\xab" * 64, id="64 bytes"),
    pytest.param(wire.BYTES8, b"", b"\x00", id="bytes8 empty"),
    pytest.param(wire.BYTES8, b"x" * 255, b"\xff" + b"x" * 255, id="bytes8 max"),
    pytest.param(wire.BYTES16, b"", b"\x00\x00", id="bytes16 empty"),
    pytest.param(wire.BYTES16, b"a\x00\xffb", b"\x00\x04a\x00\xffb", id="bytes16 NUL and ff"),
    pytest.param(wire.BYTES16, b"x" * 65_535, b"\xff\xff" + b"x" * 65_535, id="bytes16 max"),
    pytest.param(wire.TEXT16, "", b"\x00\x00", id="text empty"),
    pytest.param(wire.TEXT16, "a\x00b", b"\x00\x03a\x00b", id="text NUL"),
    pytest.param(wire.TEXT16, "é", b"\x00\x02\xc3\xa9", id="text counts bytes"),
    pytest.param(wire.TEXT16, "😀", b"\x00\x04\xf0\x9f\x98\x80", id="text astral"),
    pytest.param(wire.TEXT16, "x" * 65_535, b"\xff\xff" + b"x" * 65_535, id="text max"),
    pytest.param(
        wire.TEXT16, "é" * 32_767, b"\xff\xfe" + "é".encode() * 32_767, id="text max in é"
    ),
    pytest.param(wire.OPTIONAL_TEXT16, None, b"\x00\x00", id="no text"),
    pytest.param(wire.OPTIONAL_TEXT16, "r", b"\x00\x01r", id="optional text"),
    pytest.param(wire.FLAG, False, b"\x00", id="flag off"),
    pytest.param(wire.FLAG, True, b"\x01", id="flag on"),
    pytest.param(wire.Sorted(wire.BYTES16), (), b"\x00\x00\x00\x00", id="sorted empty"),
    pytest.param(
        wire.Sorted(wire.BYTES16),
        ((b"", None), (b"\x00", "r"), (b"\xff", None)),
        b"\x00\x00\x00\x03" + b"\x00\x00\x00\x00" + b"\x00\x01\x00\x00\x01r" + b"\x00\x01\xff\0\0",
        id="sorted bytes",
    ),
    pytest.param(
        wire.Sorted(wire.TEXT16),
        # UTF-16 would order these two the other way round
        (("\uff5e", None), ("\U00010000", None)),
        b"\x00\x00\x00\x02" + b"\x00\x03\xef\xbd\x9e\0\0" + b"\x00\x04\xf0\x90\x80\x80\0\0",
        id="sorted by UTF-8 bytes",
    ),
]


@pytest.mark.parametrize(("codec", "value", "data"), CARRIED)
def test_codec_carries(codec: Any, value: object, data: bytes) -> None:
    assert codec.encode(value, "field") == data
    reader = Reader(b"<" + data + b">", 1)
    assert codec.decode(reader, "field") == value
    assert reader.remaining == 1, "the codec takes its own bytes only"


@pytest.mark.parametrize(("codec", "value", "data"), CARRIED)
@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_codec_reads_any_buffer(codec: Any, value: object, data: bytes, kind: Any) -> None:
    assert codec.decode(Reader(kind(data)), "field") == value


@pytest.mark.parametrize(("codec", "value", "data"), CARRIED)
def test_codec_says_how_much_it_needs(codec: Any, value: object, data: bytes) -> None:
    """At every cut, `needed` is more than there is and never more than there would be."""
    cuts = range(len(data)) if len(data) < 400 else [0, 1, 2, 3, len(data) - 1]
    for cut in cuts:
        with pytest.raises(Incomplete) as caught:
            codec.decode(Reader(data[:cut]), "field")
        assert cut < caught.value.needed <= len(data)


@pytest.mark.parametrize(
    ("codec", "value"),
    [
        pytest.param(wire.U8, -1, id="u8 negative"),
        pytest.param(wire.U8, 256, id="u8 over"),
        pytest.param(wire.U16, 65_536, id="u16 over"),
        pytest.param(wire.U32, 2**32, id="u32 over"),
        pytest.param(wire.U64, 2**64, id="u64 over"),
        pytest.param(wire.SHA512, b"x" * 63, id="63 bytes"),
        pytest.param(wire.SHA512, b"x" * 65, id="65 bytes"),
        pytest.param(wire.BYTES8, b"x" * 256, id="bytes8 over"),
        pytest.param(wire.BYTES16, b"x" * 65_536, id="bytes16 over"),
        pytest.param(wire.TEXT16, "x" * 65_536, id="text over"),
        pytest.param(wire.TEXT16, "é" * 32_768, id="text over in é"),
        pytest.param(wire.TEXT16, "a\ud800", id="text high surrogate"),
        pytest.param(wire.TEXT16, "\udce9", id="text low surrogate"),
        pytest.param(wire.OPTIONAL_TEXT16, "\udfff", id="optional text surrogate"),
        pytest.param(wire.OPTIONAL_TEXT16, "x" * 65_536, id="optional text over"),
        pytest.param(wire.Sorted(wire.TEXT16), (("\ud800", None),), id="sorted key surrogate"),
        pytest.param(wire.Sorted(wire.BYTES16), ((b"", "\ud800"),), id="sorted recovery surrogate"),
    ],
)
def test_codec_refuses_to_send(codec: Any, value: object) -> None:
    with pytest.raises(LocalProtocolError):
        codec.encode(value, "field")


def test_local_error_names_the_field() -> None:
    with pytest.raises(LocalProtocolError, match=r"^topic: 65,536 bytes"):
        wire.BYTES16.encode(b"x" * 65_536, "topic")


BAD_UTF8 = [
    pytest.param(b"\xff", id="never valid"),
    pytest.param(b"\xc0\xaf", id="overlong"),
    pytest.param(b"\xed\xa0\x80", id="surrogate"),
    pytest.param(b"\xc3", id="cut"),
    pytest.param(b"\xf5\x80\x80\x80", id="beyond U+10FFFF"),
    pytest.param(b"ok\x80", id="lone continuation"),
]


@pytest.mark.parametrize("raw", BAD_UTF8)
@pytest.mark.parametrize("codec", [wire.TEXT16, wire.OPTIONAL_TEXT16], ids=["text", "optional"])
def test_bad_utf8_is_the_peers_fault(codec: Any, raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=r"^url: not UTF-8") as caught:
        codec.decode(Reader(wire.BYTES16.encode(raw, "")), "url")
    assert not isinstance(caught.value, Incomplete), "more bytes will not repair it"
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("codec", "keys"),
    [
        pytest.param(wire.BYTES16, (b"b", b"a"), id="topics descend"),
        pytest.param(wire.BYTES16, (b"a", b"a"), id="topic twice"),
        pytest.param(wire.BYTES16, (b"aa", b"a"), id="prefix last"),
        pytest.param(wire.TEXT16, ("\U00010000", "\uff5e"), id="globs in UTF-16 order"),
        pytest.param(wire.TEXT16, ("a", "a"), id="glob twice"),
    ],
)
def test_sorted_refuses(codec: Any, keys: tuple[Any, ...]) -> None:
    data = wire.U32.encode(len(keys), "") + b"".join(codec.encode(k, "") + b"\0\0" for k in keys)
    with pytest.raises(RemoteProtocolError, match="ascending"):
        wire.Sorted(codec).decode(Reader(data), "topics")


def test_a_huge_count_without_entries_costs_nothing() -> None:
    with pytest.raises(Incomplete) as caught:
        wire.Sorted(wire.BYTES16).decode(Reader(b"\xff\xff\xff\xff"), "topics")
    assert caught.value.needed == 6


@dataclass(frozen=True, slots=True)
class Typed:
    TYPE: ClassVar[int] = 513
    note: ClassVar[str] = "not on the wire"
    number: Annotated[int, wire.U16]
    name: Annotated[str, wire.TEXT16] = "x"


@dataclass(frozen=True, slots=True)
class Tolerant:
    TRAILING_IGNORED: ClassVar[bool] = True
    number: Annotated[int, wire.U8]


def test_layout_is_the_annotated_fields_in_order() -> None:
    assert list(wire.layout(Typed).items()) == [("number", wire.U16), ("name", wire.TEXT16)]


def test_every_codec_describes_itself() -> None:
    described = [wire.U8, wire.U64, wire.SHA512, wire.BYTES8, wire.TEXT16, wire.FLAG]
    assert [codec.wire for codec in described] == [
        "u8",
        "u64",
        "64 bytes",
        "u8 length, bytes",
        "u16 length, UTF-8",
        "u8, 0 or 1",
    ]


def test_type_number_leads() -> None:
    data = b"\x02\x01" + b"\x00\x07" + b"\x00\x02hi"
    assert wire.encode(Typed(7, "hi")) == data
    assert wire.decode(Typed, data) == Typed(7, "hi")


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        pytest.param(Typed, b"", "type: 2 bytes expected, 0 present", id="empty"),
        pytest.param(Typed, b"\x00\x0a", r"type 10 where 513 \(Typed\)", id="other type"),
        pytest.param(Typed, b"\x02\x01\x00", "number: 2 bytes expected, 1", id="cut"),
        pytest.param(Typed, b"\x02\x01\0\0\0\0!", "1 bytes after the last field", id="trailing"),
        pytest.param(Tolerant, b"", "number: 1 bytes expected", id="tolerant but empty"),
    ],
)
def test_decode_refuses(cls: type[Any], data: bytes, message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=message):
        wire.decode(cls, data)


def test_trailing_bytes_are_ignored_where_the_class_says_so() -> None:
    assert wire.decode(Tolerant, b"\x05 whatever") == Tolerant(5)


def feed(parser: HeadParser[Any], chunks: list[bytes]) -> tuple[Any, bytes] | None:
    """The head and everything behind it, however it was split."""
    for i, chunk in enumerate(chunks):
        if found := parser.feed(chunk):
            head, rest = found
            return head, rest + b"".join(chunks[i + 1 :])
    return None


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@pytest.mark.parametrize("cls", HEADS)
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_head_is_the_same_however_it_is_split(cls: type[Any], data: st.DataObject) -> None:
    head = data.draw(messages(cls))
    body = wire.encode(head) + data.draw(st.binary(max_size=20))
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=8))
    assert feed(HeadParser(cls), split(body, cuts)) == (head, body[len(wire.encode(head)) :])


SMALL_HEADS: list[Any] = [
    bodies.NotifyHead(b"topic", b"h" * 64, b"tr", b"id", 4),
    bodies.ReceiveHead(b"", b"topic", b"id", 4),
    bodies.SetSubscriptionsHead(b"", "http://h/é", 0, b"e" * 64),
]


@pytest.mark.parametrize("head", SMALL_HEADS, ids=lambda head: type(head).__name__)
def test_head_at_every_split_in_two(head: Any) -> None:
    body = wire.encode(head) + b"tail"
    for cut in range(len(body) + 1):
        assert feed(HeadParser(type(head)), [body[:cut], body[cut:]]) == (head, b"tail")


@pytest.mark.parametrize("cls", HEADS)
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_any_bytes_give_the_same_outcome_however_they_are_split(
    cls: type[Any], data: st.DataObject
) -> None:
    body = data.draw(st.binary(max_size=150))
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=8))
    outcomes = []
    for chunks in ([body], split(body, cuts), [bytes([b]) for b in body]):
        parser: HeadParser[Any] = HeadParser(cls)
        try:
            outcomes.append(repr(feed(parser, chunks)))
        except RemoteProtocolError as e:
            outcomes.append(str(e))
    assert len(set(outcomes)) == 1


@pytest.mark.parametrize("size", [0, 10, 65_535])
def test_single_bytes_are_not_parsed_again_and_again(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = 0
    read = wire.read

    def counted(cls: Any, reader: Reader) -> Any:
        nonlocal attempts
        attempts += 1
        return read(cls, reader)

    monkeypatch.setattr(wire, "read", counted)
    head = bodies.NotifyHead(b"t" * size, b"h" * 64, b"r" * size, b"i" * min(size, 255), 4)
    body = wire.encode(head)
    parser = HeadParser(bodies.NotifyHead)
    for i in range(len(body) - 1):
        assert parser.feed(body[i : i + 1]) is None
    assert parser.feed(body[-1:]) == (head, b"")
    # once per length, once per value, and the first
    assert attempts <= 2 * len(wire.layout(bodies.NotifyHead)) + 1


def test_empty_chunks_change_nothing() -> None:
    head = SMALL_HEADS[0]
    body = wire.encode(head)
    chunks = [b"", b"", body[:1], b"", body[1:-1], b"", body[-1:]]
    assert feed(HeadParser(bodies.NotifyHead), chunks) == (head, b"")


def test_end_inside_the_head_says_how_far_it_came() -> None:
    parser = HeadParser(bodies.ReceiveHead)
    assert parser.feed(b"\x00\x00\x00") is None
    error = parser.end()
    assert type(error) is RemoteProtocolError
    assert error.status == 400
    assert "after 3 bytes" in str(error)
    assert "at least 4 bytes" in str(error)


def test_end_of_an_empty_body() -> None:
    assert "after 0 bytes" in str(HeadParser(bodies.NotifyHead).end())


def test_a_bad_head_is_refused_as_soon_as_it_is_bad() -> None:
    parser = HeadParser(bodies.SetSubscriptionsHead)
    assert parser.feed(b"\x00\x00" + b"\x00\x01") is None
    with pytest.raises(RemoteProtocolError, match="url: not UTF-8"):
        parser.feed(b"\xff")


# the generated functions against the walk through the layout, which they must not differ from


@dataclass(frozen=True, slots=True)
class Everything:
    """Every codec, in places where others precede and follow."""

    u8: Annotated[int, wire.U8]
    u16: Annotated[int, wire.U16]
    u32: Annotated[int, wire.U32]
    u64: Annotated[int, wire.U64]
    flag: Annotated[bool, wire.FLAG]
    sha512: Annotated[bytes, wire.SHA512]
    bytes8: Annotated[bytes, wire.BYTES8]
    bytes16: Annotated[bytes, wire.BYTES16]
    text: Annotated[str, wire.TEXT16]
    optional: Annotated[str | None, wire.OPTIONAL_TEXT16]
    pairs: Annotated[tuple[tuple[bytes, str | None], ...], wire.Sorted(wire.BYTES16)]
    last: Annotated[bool, wire.FLAG]


LAYOUTS: list[type[Any]] = [
    Everything,
    Typed,
    Tolerant,
    *(c for c in vars(bodies).values() if isinstance(c, type) and c.__module__ == bodies.__name__),
]
LAYOUTS.remove(bodies.Endpoint)
ODD_VALUES: list[Any] = [
    *(None, True, 1.5, "", "text", "\ud800", "é" * 40_000, [], [1], ((b"t", "\ud800"),)),
    *(-1, 0, 255, 256, 65_536, 2**32, 2**64, b"", b"x" * 63, b"x" * 64, b"x" * 255, b"x" * 256),
    *(b"x" * 1_023, b"x" * 1_024, b"x" * 65_536, bytearray(b"x"), memoryview(b"x" * 64)),
]


def same_read(cls: type[Any], data: bytes, offset: int) -> None:
    quick, walked = Reader(data, offset), Reader(data, offset)
    by_walk = outcome(lambda: wire._read(cls, wire._plan(cls), walked))
    assert outcome(lambda: wire.read(cls, quick)) == by_walk
    if by_walk[0] is cls:
        assert quick.offset == walked.offset


@pytest.mark.parametrize("cls", LAYOUTS)
@given(data=st.data())
@settings(deadline=None)
def test_the_quick_way_reads_as_the_walk(cls: type[Any], data: st.DataObject) -> None:
    before = data.draw(st.binary(max_size=3))
    body = before + wire.encode(data.draw(messages(cls)))
    same_read(cls, body + b"tail", len(before))
    same_read(cls, body[: data.draw(st.integers(len(before), len(body)))], len(before))
    flipped = bytearray(body)
    flipped[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    same_read(cls, bytes(flipped), len(before))
    same_read(cls, data.draw(st.binary(max_size=150)), 0)


@pytest.mark.parametrize("cls", LAYOUTS)
@given(data=st.data())
@settings(deadline=None)
def test_the_quick_way_encodes_as_the_walk(cls: type[Any], data: st.DataObject) -> None:
    message = data.draw(messages(cls))
    plan = wire._plan(cls)
    assert plan.pack(message) == wire._encode(message, plan), "an ordinary one goes the quick way"
    assert plan.unpack(plan.pack(message), 0) == (message, len(plan.pack(message)))
    name = data.draw(st.sampled_from(list(wire.layout(cls))))
    for value in ODD_VALUES:
        odd = replace(message, **{name: value})
        by_walk = outcome(lambda odd=odd: wire._encode(odd, plan))
        assert outcome(lambda odd=odd: wire.encode(odd)) == by_walk


@pytest.mark.parametrize("byte", range(256))
def test_only_1_is_true_either_way(byte: int) -> None:
    same_read(Everything, bytes(15) + bytes([byte]) + bytes(64 + 1 + 2 + 2 + 2 + 4 + 1), 0)


@pytest.mark.parametrize("value", [0, 1, 255, 256, 257, 511, 2**64 - 1])
def test_the_low_byte_of_any_number(value: int) -> None:
    assert wire.LOW_BYTE.encode(value, "part") == bytes([value % 256])


def test_a_negative_number_has_no_low_byte() -> None:
    with pytest.raises(LocalProtocolError, match="part: -1 is negative"):
        wire.LOW_BYTE.encode(-1, "part")
