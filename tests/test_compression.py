from __future__ import annotations

import base64
import subprocess
import sys
import time
import tracemalloc
from typing import Any

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

import vectors
from lonelypsp.compression import (
    MAX_LEVEL,
    MAX_RATIO,
    RATIO_FREE,
    compress,
    compress_pieces,
    decompress,
    decompress_pieces,
)
from lonelypsp.errors import LocalProtocolError, RemoteProtocolError

ZSTD = vectors.load("stateful")["zstd"]
MADE_WITH = vectors.load("stateful")["meta"]
SAME_ZSTD = (
    zstandard.__version__ == MADE_WITH["python_zstandard"]
    and ".".join(map(str, zstandard.ZSTD_VERSION)) == MADE_WITH["zstd"]
)
DICTIONARIES = {
    row["name"]: row["base64"] and base64.b64decode(row["base64"]) for row in ZSTD["dictionaries"]
}
PAYLOADS = {
    name: bytes.fromhex(text) for name, text in ZSTD["payloads"].items() if text is not None
}
PAYLOADS["repeat-20000"] = b"abcdefghij" * 2000

MIB = 1024 * 1024
MAGIC = b"\x28\xb5\x2f\xfd"


def block(kind: int, size: int, content: bytes, *, last: bool = False) -> bytes:
    return (size << 3 | kind << 1 | last).to_bytes(3, "little") + content


def raw(content: bytes, *, last: bool = False) -> bytes:
    return block(0, len(content), content, last=last)


def rle(byte: bytes, times: int, *, last: bool = False) -> bytes:
    return block(1, times, byte, last=last)


def frame(*blocks: bytes, window_log: int = 17) -> bytes:
    """A zstd frame without content size, checksum or dictionary id."""
    return MAGIC + bytes([0, window_log - 10 << 3]) + b"".join(blocks)


def bomb(size: int) -> bytes:
    """`size` bytes in a frame that is 32,768 times smaller."""
    blocks = [rle(b"x", 128 * 1024) for _ in range(size // (128 * 1024))]
    return frame(*blocks, raw(b"", last=True))


def open_up(data: bytes, length: int, **options: Any) -> bytes:
    return decompress(data, dictionary=None, expected_length=length, **options)


# against the older implementation


def round_trip_id(row: dict[str, Any]) -> str:
    return f"{row['dictionary']}-level-{row['level']}-{row['payload']}"


@pytest.mark.parametrize("streamed", [False, True], ids=["one-shot", "streamed"])
@pytest.mark.parametrize("row", ZSTD["round_trips"], ids=round_trip_id)
def test_compresses_as_the_older_implementation(row: dict[str, Any], streamed: bool) -> None:
    plain = PAYLOADS[row["payload"]]
    options: Any = {"dictionary": DICTIONARIES[row["dictionary"]], "level": row["level"]}
    if streamed:
        chunks = [plain[i : i + 1000] for i in range(0, len(plain), 1000)]
        ours = b"".join(compress_pieces(chunks, length=len(plain), **options))
    else:
        ours = compress(plain, **options)
    theirs = bytes.fromhex(row["streaming_hex" if streamed else "one_shot_hex"])
    if SAME_ZSTD:
        assert ours == theirs
    for data in (ours, theirs):
        header = zstandard.get_frame_parameters(data)
        assert (header.dict_id, header.has_checksum) == (0, False)
        assert header.content_size == zstandard.CONTENTSIZE_UNKNOWN
        back = decompress(data, dictionary=options["dictionary"], expected_length=len(plain))
        assert back == plain


@pytest.mark.parametrize("row", ZSTD["acceptance"], ids=lambda row: row["name"])
def test_accepts_what_the_older_implementation_accepts(row: dict[str, Any]) -> None:
    def decoded() -> bytes:
        return decompress(
            bytes.fromhex(row["hex"]),
            dictionary=DICTIONARIES[row["dictionary"]],
            expected_length=row["expected_length"],
            max_window_size=row["max_window_size"],
        )

    if row["result"] == "decodes to the expected payload":
        expected = PAYLOADS["json" if row["expected_length"] == 156 else "pattern-1000"]
        assert decoded() == expected[: row["expected_length"]]
        return
    with pytest.raises(RemoteProtocolError):
        decoded()


# bombs: bounded before anything is allocated


def peak_of(data: bytes, length: int, **options: Any) -> int:
    """Bytes of Python memory at most in use while `data` is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            open_up(data, length, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("claimed", [0, 1, 100_000, 200_000])
def test_a_bomb_stops_where_it_exceeds_its_claim(claimed: int) -> None:
    assert peak_of(bomb(256 * MIB), claimed) < 4 * MIB


@pytest.mark.parametrize("claimed", [256 * MIB, 1 << 40, 1 << 63])
def test_a_claim_beyond_the_ratio_is_refused_unread(claimed: int) -> None:
    data = bomb(256 * MIB)
    assert len(data) * MAX_RATIO < claimed
    assert peak_of(data, claimed) < MIB
    with pytest.raises(RemoteProtocolError) as e:
        open_up(data, claimed)
    assert e.value.status == 413


BOMB_IN_A_PROCESS = """
import resource
from lonelypsp.compression import compress, decompress
from lonelypsp.errors import RemoteProtocolError

def peak():  # KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

compress(b"warm up", dictionary=None, level=3)
block = (128 * 1024 << 3 | 2).to_bytes(3, "little") + b"x"
bomb = bytes.fromhex("28b52ffd0068") + block * 2048 + b"\\1\\0\\0"  # a window of 8 MiB
before = peak()
try:
    decompress(bomb, dictionary=None, expected_length=1_000_000)
except RemoteProtocolError:
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the unit differs")
def test_a_bomb_takes_no_memory_outside_of_python_either() -> None:
    run = subprocess.run(
        [sys.executable, "-c", BOMB_IN_A_PROCESS], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 16 * 1024


def test_a_generator_of_pieces_never_holds_the_whole() -> None:
    tracemalloc.start()
    try:
        pieces = decompress_pieces(
            bomb(64 * MIB), dictionary=None, expected_length=64 * MIB, max_ratio=40_000
        )
        assert sum(map(len, pieces)) == 64 * MIB
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


def test_small_bodies_may_shrink_as_much_as_they_can() -> None:
    data = bomb(RATIO_FREE)
    assert MAX_RATIO * len(data) < RATIO_FREE
    assert open_up(data, RATIO_FREE) == b"x" * RATIO_FREE


@pytest.mark.parametrize("blocks", [raw(b""), raw(b"a"), rle(b"a", 1)], ids=["0", "raw", "rle"])
def test_many_tiny_blocks_take_no_long(blocks: bytes) -> None:
    count = 4 * MIB // len(blocks)
    data = frame(blocks * count, raw(b"", last=True))
    started = time.process_time()
    with pytest.raises(RemoteProtocolError):
        open_up(data, count + 1)
    assert time.process_time() - started < 8


def test_large_claimed_blocks_are_not_believed() -> None:
    with pytest.raises(RemoteProtocolError):
        open_up(frame(rle(b"a", (1 << 21) - 1, last=True)), (1 << 21) - 1, max_ratio=1 << 30)


# windows


@pytest.mark.parametrize(
    ("window_log", "limit", "accepted"),
    [
        (23, 8 * MIB, True),
        (24, 8 * MIB, False),
        (27, 8 * MIB, False),
        (27, 0, True),
        (28, 0, False),
        (41, 0, False),
        (10, 1024, True),
        (11, 1024, False),
    ],
)
def test_windows(window_log: int, limit: int, accepted: bool) -> None:
    data = frame(raw(b"hello", last=True), window_log=window_log)
    if accepted:
        assert open_up(data, 5, max_window_size=limit) == b"hello"
        return
    with pytest.raises(RemoteProtocolError, match="too much memory"):
        open_up(data, 5, max_window_size=limit)


@pytest.mark.parametrize("limit", [-1, 1, 1023, (1 << 31) + 1])
def test_a_window_limit_that_makes_no_sense_is_ours(limit: int) -> None:
    with pytest.raises(LocalProtocolError, match="max_window_size"):
        open_up(frame(raw(b"hello", last=True)), 5, max_window_size=limit)


def test_what_we_send_never_needs_a_larger_window() -> None:
    plain = bytes(9 * MIB)
    data = b"".join(compress_pieces([plain], length=len(plain), dictionary=None, level=22))
    assert zstandard.get_frame_parameters(data).window_size <= 8 * MIB
    assert MAX_LEVEL < 20
    assert open_up(data, len(plain), max_ratio=1 << 20) == plain


# truncated, longer, several


HELLO = frame(raw(b"hel"), raw(b"lo", last=True))
SKIPPABLE = b"\x53\x2a\x4d\x18\x03\0\0\0abc"


@pytest.mark.parametrize("data", [HELLO, compress(b"hello" * 99, dictionary=None, level=3)])
def test_every_truncation_is_refused(data: bytes) -> None:
    for end in range(len(data)):
        for length in (0, 3, 5, 495):
            with pytest.raises(RemoteProtocolError):
                open_up(data[:end], length)


def test_a_missing_last_block_is_refused_though_every_byte_came_out() -> None:
    with pytest.raises(RemoteProtocolError, match="ends inside"):
        open_up(frame(raw(b"hello")), 5)


@pytest.mark.parametrize(
    "junk",
    [b"\0", b"junk", MAGIC, MAGIC + b"\0", b"\x53\x2a\x4d\x18\xff\xff\xff\xff", b"\0" * 1000],
)
def test_trailing_bytes_are_refused(junk: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        open_up(HELLO + junk, 5)


@pytest.mark.parametrize(
    ("data", "plain"),
    [
        (HELLO, b"hello"),
        (HELLO + HELLO, b"hellohello"),
        (SKIPPABLE + HELLO, b"hello"),
        (HELLO + SKIPPABLE, b"hello"),
        (frame(raw(b"", last=True)) + HELLO, b"hello"),
        (frame(raw(b"", last=True)), b""),
    ],
    ids=["one", "two", "skippable-first", "skippable-last", "empty-first", "empty"],
)
def test_frames(data: bytes, plain: bytes) -> None:
    assert open_up(data, len(plain)) == plain
    for length in (len(plain) + 1, len(plain) - 1):
        with pytest.raises(RemoteProtocolError, match="declared"):
            open_up(data, length)


@pytest.mark.parametrize("data", [b"", SKIPPABLE], ids=["nothing", "skippable"])
def test_something_must_be_there(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        open_up(data, 0)


@pytest.mark.parametrize("data", [b"\x27\xb5\x2f\xfd" + HELLO[4:], b"\x1e\xb5\x2f\xfd" + HELLO])
def test_formats_before_the_standard_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="something else"):
        open_up(data, 5)


def test_a_reserved_block_type_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        open_up(frame(block(3, 5, b"hello", last=True)), 5)


# dictionaries


@pytest.mark.parametrize("dictionary", [b"", b"a", b"\x37\xa4\x30\xec" + b"a" * 100])
def test_strange_dictionaries(dictionary: bytes) -> None:
    """Each side may be given one by the other; it works or it is refused."""
    try:
        data = compress(b"hello", dictionary=dictionary, level=3)
    except LocalProtocolError:
        with pytest.raises(RemoteProtocolError):
            decompress(HELLO, dictionary=dictionary, expected_length=5)
    else:
        assert decompress(data, dictionary=dictionary, expected_length=5) == b"hello"


# the whole


@given(
    plain=st.binary(max_size=5_000) | st.binary(max_size=50).map(lambda b: b * 10_000),
    level=st.integers(-32_768, 32_767),
    dictionary=st.sampled_from(list(DICTIONARIES.values())),
)
@example(plain=bytes(3 * MIB), level=3, dictionary=None)
@example(plain=b"", level=0, dictionary=next(d for d in DICTIONARIES.values() if d is not None))
def test_round_trip(plain: bytes, level: int, dictionary: bytes | None) -> None:
    data = compress(plain, dictionary=dictionary, level=level)
    back = decompress(
        memoryview(data), dictionary=dictionary, expected_length=len(plain), max_ratio=100_000
    )
    assert back == plain


@pytest.mark.parametrize("chunk", [1, 100, 70_000])
def test_chunks_do_not_matter(chunk: int) -> None:
    plain = PAYLOADS["repeat-20000"]
    chunks = [plain[i : i + chunk] for i in range(0, len(plain), chunk)]
    data = b"".join(compress_pieces(chunks, length=len(plain), dictionary=None, level=3))
    assert open_up(data, len(plain)) == plain


@pytest.mark.parametrize("length", [4, 6])
def test_chunks_must_add_up(length: int) -> None:
    with pytest.raises(LocalProtocolError):
        list(compress_pieces([b"hello"], length=length, dictionary=None, level=3))


def test_a_body_of_its_own_ratio_passes_by_default() -> None:
    plain = b"".join(i.to_bytes(8, "big") for i in range(MIB))
    assert open_up(compress(plain, dictionary=None, level=3), len(plain)) == plain


def opens_or_is_refused(data: bytes, length: int, dictionary: bytes | None) -> None:
    try:
        plain = decompress(data, dictionary=dictionary, expected_length=length)
    except RemoteProtocolError:
        return
    assert len(plain) == length


FRAMES = [bytes.fromhex(row["hex"]) for row in ZSTD["acceptance"]] + [HELLO, SKIPPABLE]
LENGTHS = st.sampled_from([0, 1, 5, 156, 256]) | st.integers(0, 1 << 64)


@given(
    data=st.binary(max_size=300) | st.binary(max_size=300).map(MAGIC.__add__),
    length=LENGTHS,
    dictionary=st.none() | st.binary(max_size=50) | st.sampled_from(list(DICTIONARIES.values())),
)
def test_any_bytes(data: bytes, length: int, dictionary: bytes | None) -> None:
    opens_or_is_refused(data, length, dictionary)


@given(
    data=st.lists(st.sampled_from(FRAMES), min_size=1, max_size=2).map(b"".join),
    at=st.integers(0, 300),
    removed=st.integers(0, 4),
    other=st.binary(max_size=4),
    length=LENGTHS,
    dictionary=st.sampled_from(list(DICTIONARIES.values())),
)
def test_damaged_frames(
    data: bytes, at: int, removed: int, other: bytes, length: int, dictionary: bytes | None
) -> None:
    opens_or_is_refused(data[:at] + other + data[at + removed :], length, dictionary)


@given(blocks=st.lists(st.binary(max_size=40), max_size=20), length=st.integers(0, 800))
def test_any_blocks(blocks: list[bytes], length: int) -> None:
    data = frame(*map(raw, blocks), raw(b"", last=True))
    plain = b"".join(blocks)
    if length == len(plain):
        assert open_up(data, length) == plain
    else:
        with pytest.raises(RemoteProtocolError):
            open_up(data, length)


def test_without_zstandard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(LocalProtocolError, match=r"lonelypsc\[standard\]"):
        compress(b"hello", dictionary=None, level=3)
    with pytest.raises(LocalProtocolError, match=r"lonelypsc\[standard\]"):
        open_up(HELLO, 5)
