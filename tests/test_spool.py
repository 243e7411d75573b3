from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lonelypsp.errors import RemoteProtocolError
from lonelypsp.spool import Body, Spool

LIMIT = 1000
FDS = Path("/proc/self/fd")


def sha512(data: bytes) -> bytes:
    return hashlib.sha512(data).digest()


def spooled(data: bytes, *, memory_limit: int = LIMIT) -> Body:
    with Spool(len(data), memory_limit=memory_limit) as spool:
        spool.write(data)
        return spool.finish(sha512(data))


def pattern(length: int) -> bytes:
    """Bytes of which every stretch of 4 tells where it stands."""
    return b"".join(i.to_bytes(4, "big") for i in range(length // 4 + 1))[:length]


@pytest.fixture(params=["memory", "disk"])
def body(request: pytest.FixtureRequest) -> Iterator[Body]:
    body = spooled(pattern(10_000), memory_limit=10_000 if request.param == "memory" else 0)
    assert body.on_disk is (request.param == "disk")
    yield body
    body.close()


# where it lies


@pytest.mark.parametrize(
    ("length", "on_disk"),
    [(0, False), (1, False), (LIMIT - 1, False), (LIMIT, False), (LIMIT + 1, True)],
)
def test_memory_up_to_the_limit(length: int, on_disk: bool, tmp_path: Path) -> None:
    data = pattern(length)
    with Spool(length, memory_limit=LIMIT, directory=str(tmp_path)) as spool:
        assert spool.on_disk is on_disk
        spool.write(data)
        body = spool.finish(sha512(data))
    assert (body.length, body.sha512, body.on_disk) == (length, sha512(data), on_disk)
    assert body.data == (None if on_disk else data)
    assert body.read_at(0, length + 1) == data
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    body.close()


def test_body_of_bytes() -> None:
    body = Body.of(b"abc")
    assert (body.data, body.length, body.sha512) == (b"abc", 3, sha512(b"abc"))
    assert not body.on_disk


def test_directory_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Spool(LIMIT + 1, memory_limit=LIMIT, directory=str(tmp_path / "missing"))


@pytest.mark.parametrize("memory_limit", [-1, 10**6])
@pytest.mark.parametrize(
    "sizes", [[], [0], [5, 0, 7], [1] * 64, [1] * 65, [3] * 3000, [200_000] * 3]
)
def test_several_chunks_at_once(sizes: list[int], memory_limit: int) -> None:
    chunks = [bytes([n % 251]) * size for n, size in enumerate(sizes)]
    data = b"".join(chunks)
    with Spool(len(data), memory_limit=memory_limit) as spool:
        spool.write(*chunks)
        body = spool.finish(sha512(data))
    assert body.read_at(0, len(data) + 1) == data
    body.close()


def test_a_disk_that_takes_chunks_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [b"one", b"two", b"three"]
    monkeypatch.setattr(os, "writev", lambda fd, given: os.write(fd, b"".join(given)[:4]))
    with Spool(11, memory_limit=0) as spool:
        spool.write(*chunks)
        body = spool.finish(sha512(b"onetwothree"))
    assert body.read_at(0, 20) == b"onetwothree"
    body.close()


@given(
    data=st.binary(max_size=300),
    cuts=st.lists(st.integers(0, 300), max_size=12),
    memory_limit=st.sampled_from([0, 50, 300]),
)
@settings(deadline=None, max_examples=150)
def test_any_chunking_gives_the_same_body(data: bytes, cuts: list[int], memory_limit: int) -> None:
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    with Spool(len(data), memory_limit=memory_limit) as spool:
        for start, end in zip(edges, [*edges[1:], len(data)], strict=True):
            spool.write(data[start:end])
            assert spool.written == end
        body = spool.finish(sha512(data))
    assert body.read_at(0, len(data)) == data
    with body.open() as file:
        assert file.read() == data
    body.close()


# what is refused


@pytest.mark.parametrize("memory_limit", [LIMIT, 0], ids=["memory", "disk"])
class TestRefused:
    @pytest.mark.parametrize(
        "chunks",
        [[b"12345"], [b"1234", b"5"], [b"1", b"", b"2345" * 100]],
        ids=["at once", "one byte later", "much later"],
    )
    def test_longer_than_declared(self, memory_limit: int, chunks: list[bytes]) -> None:
        with Spool(4, memory_limit=memory_limit) as spool:
            for chunk in chunks[:-1]:
                spool.write(chunk)
            with pytest.raises(RemoteProtocolError, match="longer than the 4 bytes") as caught:
                spool.write(chunks[-1])
            assert caught.value.status == 400
            with pytest.raises(RemoteProtocolError):
                spool.finish(sha512(b"1234"))

    @pytest.mark.parametrize("sent", [b"", b"123"], ids=["nothing", "a byte less"])
    def test_shorter_than_declared(self, memory_limit: int, sent: bytes) -> None:
        with Spool(4, memory_limit=memory_limit) as spool:
            spool.write(sent)
            with pytest.raises(RemoteProtocolError, match=f"after {len(sent)} of 4 bytes"):
                spool.finish(sha512(sent))

    @pytest.mark.parametrize(
        "digest",
        [
            pytest.param(sha512(b"other"), id="of another body"),
            pytest.param(bytes(64), id="zeros"),
            pytest.param(hashlib.sha256(b"1234").digest() + bytes(32), id="padded sha-256"),
            pytest.param(sha512(b"1234")[:63], id="63 bytes"),
            pytest.param(b"", id="empty"),
        ],
    )
    def test_another_hash(self, memory_limit: int, digest: bytes) -> None:
        with Spool(4, memory_limit=memory_limit) as spool:
            spool.write(b"1234")
            with pytest.raises(RemoteProtocolError, match="SHA-512"):
                spool.finish(digest)


@given(
    data=st.binary(max_size=300),
    declared=st.integers(-3, 3),
    digest=st.sampled_from([None, sha512(b"other"), bytes(64), b""]),
)
@settings(deadline=None, max_examples=150)
def test_what_comes_in_one_piece_is_judged_alike(
    data: bytes, declared: int, digest: bytes | None
) -> None:
    length, digest = max(0, len(data) + declared), digest or sha512(data)

    def outcome(receive: Callable[[], Body]) -> object:
        try:
            body = receive()
        except RemoteProtocolError as e:
            return str(e), e.status
        return body.data, body.length, body.sha512, body.on_disk

    def in_chunks() -> Body:
        with Spool(length) as spool:
            spool.write(data)
            return spool.finish(digest)

    assert outcome(lambda: Body.received(data, length, digest)) == outcome(in_chunks)


# reading


def test_read_at(body: Body) -> None:
    data = pattern(10_000)
    for offset, length in [(0, 0), (0, 4), (17, 100), (9_999, 1), (9_990, 100), (0, 99_999)]:
        assert body.read_at(offset, length) == data[offset : offset + length]
    assert body.read_at(10_000, 1) == b""
    assert body.read_at(20_000, 1) == b""


def test_readers_do_not_move_each_other(body: Body) -> None:
    data = pattern(10_000)
    files = [body.open() for _ in range(10)]
    for i, file in enumerate(files):
        file.seek(i * 100)
    for step in range(20):
        for i, file in enumerate(files):
            start = i * 100 + step * 33
            assert file.read(33) == data[start : start + 33]


def test_readers_in_threads(body: Body) -> None:
    def read(size: int) -> bytes:
        file = body.open()
        return b"".join(iter(lambda: file.read(size), b""))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(read, range(7, 700, 7))) == {pattern(10_000)}


def test_file_reads(body: Body) -> None:
    data = pattern(10_000)
    file = body.open()
    assert file.readable()
    assert file.seekable()
    assert not file.writable()
    assert (file.read(0), file.tell()) == (b"", 0)
    assert (file.read(3), file.tell()) == (data[:3], 3)
    buffer = bytearray(5)
    assert file.readinto(buffer) == 5  # type: ignore[attr-defined]
    assert (bytes(buffer), file.tell()) == (data[3:8], 8)
    assert (file.read(), file.tell()) == (data[8:], 10_000)
    assert file.read() == file.read(10) == b""
    assert file.readinto(buffer) == 0  # type: ignore[attr-defined]
    with pytest.raises(io.UnsupportedOperation):
        file.write(b"x")


@pytest.mark.parametrize(
    ("offset", "whence", "position"),
    [
        (0, os.SEEK_SET, 0),
        (9_999, os.SEEK_SET, 9_999),
        (20_000, os.SEEK_SET, 20_000),
        (0, os.SEEK_CUR, 100),
        (-100, os.SEEK_CUR, 0),
        (9_000, os.SEEK_CUR, 9_100),
        (0, os.SEEK_END, 10_000),
        (-1, os.SEEK_END, 9_999),
        (-10_000, os.SEEK_END, 0),
        (5, os.SEEK_END, 10_005),
    ],
)
def test_file_seeks(body: Body, offset: int, whence: int, position: int) -> None:
    file = body.open()
    file.read(100)
    assert file.seek(offset, whence) == position
    assert file.tell() == position
    assert file.read(10) == pattern(10_000)[position : position + 10]


@pytest.mark.parametrize(
    ("offset", "whence"),
    [(-1, os.SEEK_SET), (-101, os.SEEK_CUR), (-10_001, os.SEEK_END), (0, 3)],
)
def test_file_does_not_seek_there(body: Body, offset: int, whence: int) -> None:
    file = body.open()
    file.read(100)
    with pytest.raises(ValueError):
        file.seek(offset, whence)
    assert file.read(4) == pattern(10_000)[100:104], "where it was"


def test_file_reads_lines() -> None:
    body = Body.of(b"one\ntwo\nthree")
    assert list(body.open()) == [b"one\n", b"two\n", b"three"]
    assert io.TextIOWrapper(body.open(), "utf-8").read() == "one\ntwo\nthree"


def test_closing_a_file_leaves_the_body_open(body: Body) -> None:
    with body.open() as file:
        file.read(1)
    with pytest.raises(ValueError):
        file.read(1)
    assert body.read_at(0, 4) == pattern(4)
    assert body.open().read(4) == pattern(4)


# closing


def beyond_its_buffer(file: BinaryIO) -> bytes:
    file.seek(9_000)  # a file holds up to 8 KiB that it has read already
    return file.read(1_000)


def test_a_closed_body_is_a_value_error(body: Body) -> None:
    file, untouched = body.open(), body.open()
    file.read(1)
    body.close()
    body.close()
    for read in (
        lambda: body.read_at(0, 1),
        lambda: beyond_its_buffer(file),
        lambda: untouched.read(1),
        untouched.read,
        lambda: untouched.readinto(bytearray(1)),  # type: ignore[attr-defined]
        lambda: body.open().read(1),
    ):
        with pytest.raises(ValueError, match="closed: a message is valid until"):
            read()


needs_proc = pytest.mark.skipif(not FDS.is_dir(), reason="counts the entries of /proc/self/fd")


def open_fds() -> int:
    return len(os.listdir(FDS))


@needs_proc
def test_one_file_whatever_the_number_of_readers() -> None:
    before = open_fds()
    body = spooled(pattern(10_000), memory_limit=0)
    files = [body.open() for _ in range(50)]
    for file in files:
        file.read(10)
    assert open_fds() == before + 1
    body.close()
    assert open_fds() == before


@needs_proc
@pytest.mark.parametrize("sent", [b"", b"123", b"1234", b"12345"])
def test_refused_bodies_leave_no_file(sent: bytes, tmp_path: Path) -> None:
    def receive() -> None:
        with Spool(4, memory_limit=0, directory=str(tmp_path)) as spool:
            assert open_fds() == before + 1
            spool.write(sent)
            spool.finish(sha512(b"other"))

    before = open_fds()
    with pytest.raises(RemoteProtocolError):
        receive()
    assert open_fds() == before
    assert list(tmp_path.iterdir()) == []


@needs_proc
def test_closing_the_spool_leaves_the_body_that_it_handed_on() -> None:
    before = open_fds()
    with Spool(4, memory_limit=0) as spool:
        spool.write(b"1234")
        body = spool.finish(sha512(b"1234"))
        assert not spool.on_disk
    spool.close()
    assert open_fds() == before + 1
    assert body.read_at(0, 4) == b"1234"
    body.close()
    assert open_fds() == before


# A limit on the size of files stands in for a full disk: the last write comes out short, the next
# one fails, and no mount is needed. In a process of its own, because it holds for all files.
FULL_DISK = """
import os, resource, sys
from lonelypsp.spool import Spool

def left():
    return len(os.listdir("/proc/self/fd")), os.listdir(sys.argv[1])

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
before = left()
try:
    with Spool(1_000_000, memory_limit=0, directory=sys.argv[1]) as spool:
        for _ in range(10):
            spool.write(b"x" * 30_000)
except OSError as e:
    print(type(e).__name__, spool.written)
print(left() == before)
"""


@pytest.mark.parametrize("memory_limit", [0, LIMIT])
def test_a_closed_spool_takes_nothing(memory_limit: int) -> None:
    """A thread that writes on does not fill the memory."""
    with Spool(LIMIT, memory_limit=memory_limit) as spool:
        spool.write(b"x")
    with pytest.raises(ValueError, match="closed"):
        spool.write(b"x")


@needs_proc
def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["OSError 120000", "True"]


class Dribble(io.RawIOBase):
    """A file that takes 3 bytes at a time."""

    def __init__(self) -> None:
        self.taken = b""

    def writable(self) -> bool:
        return True

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        self.taken += bytes(data[:3])
        return len(data[:3])


def test_short_writes_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Dribble()
    monkeypatch.setattr("lonelypsp.spool.tempfile.TemporaryFile", lambda **_: file)
    with Spool(10, memory_limit=0) as spool:
        spool.write(b"0123456")
        spool.write(b"789")
        assert file.taken == b"0123456789"
