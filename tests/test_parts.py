from __future__ import annotations

import dataclasses
import hashlib
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lonelypsp import messages
from lonelypsp.errors import RemoteProtocolError
from lonelypsp.messages import (
    NotifyStreamPart,
    NotifyStreamStart,
    StreamPart,
    StreamStart,
)
from lonelypsp.parts import Reassembly, part_length
from lonelypsp.spool import Spool

BODY = bytes((7 * i + i // 256) % 256 for i in range(3000))


def stream(
    body: bytes,
    limit: int | None,
) -> list[Any]:
    """The messages that carry `body` in parts."""
    fields: dict[str, Any] = {
        "identifier": b"\xde\xad\xbe\xef",
        "topic": b"alpha",
        "compressed_length": len(body),
        "decompressed_length": len(body),
        "sha512": hashlib.sha512(body).digest(),
    }

    def part(part_id: int, data: bytes) -> Any:
        if part_id == 0:
            return NotifyStreamStart(**fields, body=data)
        return NotifyStreamPart(identifier=fields["identifier"], part_id=part_id, body=data)

    found, offset = [], 0
    while not found or offset < len(body):
        head = len(messages.encode_head(part(len(found), b""), minimal=True))
        length = part_length(len(body) - offset, limit, head)
        found.append(part(len(found), body[offset : offset + length]))
        offset += length
    return found


@pytest.mark.parametrize(
    ("remaining", "limit", "head", "length"),
    [
        (0, 1000, 100, 0),
        (899, 1000, 100, 899),
        (900, 1000, 100, 900),
        (901, 1000, 100, 900),
        (1 << 62, 1000, 100, 900),
        (1 << 62, 1000, 488, 512),
        (1 << 62, 1000, 489, 512),  # no part carries less, but for the last one
        (1 << 62, 0, 1 << 20, 512),
        (511, 0, 100, 511),
        (1 << 62, None, 100, 1 << 62),
    ],
)
def test_the_length_of_a_part(remaining: int, limit: int | None, head: int, length: int) -> None:
    assert part_length(remaining, limit, head) == length


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
