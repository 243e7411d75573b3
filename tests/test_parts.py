from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vectors
from lonelypsp import messages
from lonelypsp.compression import compress
from lonelypsp.errors import RemoteProtocolError
from lonelypsp.messages import (
    Message,
    Notify,
    NotifyStreamPart,
    NotifyStreamStart,
    ReceiveStreamPart,
    ReceiveStreamStart,
    StreamPart,
    StreamStart,
)
from lonelypsp.parts import SMALLEST_PART, Part, Reassembly, fits_one_frame, split
from lonelypsp.spool import Spool

BODY = bytes((7 * i + i // 256) % 256 for i in range(3000))


def stream(
    body: bytes,
    limit: int | None,
    *,
    minimal: bool = True,
    start: type[StreamStart] = NotifyStreamStart,
    later: type[StreamPart] = NotifyStreamPart,
    **about: Any,
) -> list[Any]:
    """The messages that carry `body` in parts."""
    fields: dict[str, Any] = {
        "identifier": b"\xde\xad\xbe\xef",
        "topic": b"alpha",
        "compressed_length": len(body),
        "decompressed_length": len(body),
        "sha512": hashlib.sha512(body).digest(),
    } | about

    def part(part_id: int, data: bytes) -> Any:
        if part_id == 0:
            return start(**fields, body=data)
        return later(identifier=fields["identifier"], part_id=part_id, body=data)

    def head_length(part_id: int) -> int:
        return len(messages.encode_head(part(part_id, b""), minimal=minimal))

    cuts = split(len(body), limit, head_length)
    return [part(cut.id, body[cut.offset : cut.offset + cut.length]) for cut in cuts]


# against the older implementation


def splitting_id(row: dict[str, Any]) -> str:
    limit = row.get("max_websocket_message_size", row.get("outgoing_max_ws_message_size"))
    form = "minimal" if row["minimal_headers"] else "expanded"
    large = "-large" if row.get("held_as", "").startswith("stream") else ""
    return f"{row['side']}-{row['body_length']}-in-{limit}-{form}-zstd{row['compressor']}{large}"


@pytest.mark.parametrize("row", vectors.load("stateful")["splitting"], ids=splitting_id)
def test_splits_as_the_older_implementation(row: dict[str, Any]) -> None:
    plain = BODY[: row["body_length"]]
    expected = row["frames"]
    sent = plain
    if row["compressor"]:
        sent = compress(plain, dictionary=None, level=3)
        if len(sent) != sum(f["payload_length"] for f in expected):
            pytest.skip("another version of zstd compresses differently")
    about = {
        "identifier": bytes.fromhex(row["identifier"]),
        "topic": row["topic"].encode(),
        "compressor": row["compressor"],
        "decompressed_length": len(plain),
    }
    frames: list[Message]
    if row["side"] == "client":
        limit = row["max_websocket_message_size"]
        whole = Notify(
            **about,
            body=sent,
            compressed_length=len(sent),
            sha512=hashlib.sha512(sent).digest(),
        )
        frame_length = len(messages.encode(whole, minimal=row["minimal_headers"]))
        one = fits_one_frame(len(plain), frame_length, limit)
        if row["held_as"].startswith("stream") and not row["compressor"]:
            one = False  # a body that is not in memory is not worth a special case to it
        frames = [whole] if one else stream(sent, limit, minimal=row["minimal_headers"], **about)
    else:
        frames = stream(
            sent,
            row["outgoing_max_ws_message_size"],
            minimal=row["minimal_headers"],
            start=ReceiveStreamStart,
            later=ReceiveStreamPart,
            **about,
        )
    encoded = [messages.encode(f, minimal=row["minimal_headers"]) for f in frames]
    assert [len(f) for f in encoded] == [f["frame_length"] for f in expected]
    assert [hashlib.sha256(f).hexdigest() for f in encoded] == [f["sha256"] for f in expected]
    for ours, theirs in zip(encoded, expected, strict=True):
        assert ours == bytes.fromhex(theirs.get("hex", ours.hex()))


# splitting


@given(
    length=st.integers(0, 20_000),
    limit=st.none() | st.integers(0, 3_000),
    heads=st.lists(st.integers(4, 700), min_size=1, max_size=50),
)
def test_parts_are_the_whole_in_order(length: int, limit: int | None, heads: list[int]) -> None:
    def head_length(part_id: int) -> int:
        return heads[part_id % len(heads)]

    parts = list(split(length, limit, head_length))
    assert [p.id for p in parts] == list(range(len(parts)))
    offset = 0
    for part in parts:
        assert part.offset == offset
        offset += part.length
        assert part.length > 0 or length == 0
        if limit is not None:
            fits = part.length + head_length(part.id) <= limit
            assert fits or part.length <= SMALLEST_PART
    assert offset == length
    if limit is not None:
        assert len(parts) <= max(1, math.ceil(length / SMALLEST_PART))


def test_without_a_limit_heads_do_not_matter() -> None:
    assert list(split(1 << 40, None, lambda _: pytest.fail("asked"))) == [Part(0, 0, 1 << 40)]


def test_nothing_is_computed_ahead() -> None:
    asked: list[int] = []

    def head_length(part_id: int) -> int:
        asked.append(part_id)
        return 100

    parts = split(1 << 62, 1000, head_length)
    assert next(parts) == Part(0, 0, 900)
    assert next(parts) == Part(1, 900, 900)
    assert asked == [0, 1]


@pytest.mark.parametrize(
    ("length", "frame_length", "limit", "fits"),
    [
        (871, 969, 1000, True),
        (872, 970, 1000, False),  # 128 bytes are allowed for the head
        (0, 1000, 1000, False),
        (0, 999, 1000, True),
        (1 << 40, 1 << 40, None, True),
    ],
)
def test_fits_one_frame(length: int, frame_length: int, limit: int | None, fits: bool) -> None:
    assert fits_one_frame(length, frame_length, limit) is fits


# reassembly


def begun(start: StreamStart, sink: Any, **options: Any) -> Reassembly:
    whole = Reassembly(start, sink, **options)
    whole.add(start)
    return whole


@given(body=st.binary(max_size=2_000), limit=st.integers(0, 900))
def test_reassembles_what_was_split(body: bytes, limit: int) -> None:
    start, *later = stream(body, limit)
    sink = io.BytesIO()
    whole = begun(start, sink)
    for part in later:
        assert not whole.complete
        assert whole.add(part) == whole.complete
    assert whole.complete
    assert whole.written == len(body)
    assert sink.getvalue() == body


@pytest.mark.parametrize("memory_limit", [0, 10_000], ids=["disk", "memory"])
def test_reassembles_decoded_frames_into_a_spool(memory_limit: int) -> None:
    frames = [messages.encode(m, minimal=True) for m in stream(BODY, 600)]
    start, *later = (messages.decode_from_subscriber(frame) for frame in frames)
    assert isinstance(start, StreamStart)
    with Spool(start.compressed_length, memory_limit=memory_limit) as spool:
        whole = begun(start, spool, check_hash=False)
        for part in later:
            assert isinstance(part, StreamPart)
            whole.add(part)
        assert whole.complete
        body = spool.finish(start.sha512)
    assert body.read_at(0, 5000) == BODY
    body.close()


def test_empty_parts_in_between() -> None:
    start = dataclasses.replace(stream(b"ab", None)[0], body=b"")
    sink = io.BytesIO()
    whole = begun(start, sink)
    assert not whole.add(NotifyStreamPart(identifier=start.identifier, part_id=1, body=b"a"))
    assert not whole.add(NotifyStreamPart(identifier=start.identifier, part_id=2, body=b""))
    assert whole.add(NotifyStreamPart(identifier=start.identifier, part_id=3, body=b"b"))
    assert sink.getvalue() == b"ab"


START, *LATER = stream(BODY[:2000], 600)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (dataclasses.replace(LATER[0], part_id=2), "part 2 where 1 was expected"),
        (LATER[1], "part 2 where 1 was expected"),
        (START, "part 0 where 1 was expected"),
        (dataclasses.replace(LATER[0], identifier=b"other"), "another message"),
        (dataclasses.replace(LATER[0], body=bytes(1501)), "longer than the 2,000 bytes"),
        (dataclasses.replace(LATER[0], body=bytes(2000 - len(START.body))), "SHA-512"),
    ],
    ids=["gap", "skipped", "start-again", "identifier", "too-long", "hash"],
)
def test_refuses_the_wrong_part(wrong: Any, complaint: str) -> None:
    sink = io.BytesIO()
    whole = begun(START, sink)
    with pytest.raises(RemoteProtocolError, match=complaint):
        whole.add(wrong)
    assert len(sink.getvalue()) <= START.compressed_length


def test_refuses_a_part_twice_and_a_part_too_many() -> None:
    whole = begun(START, io.BytesIO())
    whole.add(LATER[0])
    with pytest.raises(RemoteProtocolError, match="part 1 where 2"):
        whole.add(LATER[0])
    for part in LATER[1:]:
        whole.add(part)
    with pytest.raises(RemoteProtocolError, match="after the last one"):
        whole.add(NotifyStreamPart(identifier=START.identifier, part_id=len(LATER) + 1, body=b""))


def test_refuses_a_start_that_is_wrong_by_itself() -> None:
    with pytest.raises(RemoteProtocolError, match="longer"):
        begun(dataclasses.replace(START, compressed_length=1), io.BytesIO())
    only = stream(b"hello", None)[0]
    with pytest.raises(RemoteProtocolError, match="SHA-512"):
        begun(dataclasses.replace(only, body=b"hullo"), io.BytesIO())
    empty = stream(b"", None)[0]
    assert begun(empty, io.BytesIO()).complete
    with pytest.raises(RemoteProtocolError, match="SHA-512"):
        begun(dataclasses.replace(empty, sha512=bytes(64)), io.BytesIO())
