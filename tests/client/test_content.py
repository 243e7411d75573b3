"""What is sent: bytes-like objects and parts of files, hashed, streamed, repeatable."""

from __future__ import annotations

import array
import gzip
import hashlib
import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from client.fakes import broadcaster, config, noop
from lonelypsc.content import Content
from lonelypsc.http_client import HttpPubSubClient
from lonelypsp.bodies import NotifyHead
from lonelypsp.wire import HeadParser

BIG = os.urandom(3 * 1024 * 1024 + 17)

pytestmark = pytest.mark.usefixtures("sleeps")


def sent(fake: Any) -> list[bytes]:
    parsed = [HeadParser(NotifyHead).feed(body) for _, _, body in fake.requests]
    return [p[1] for p in parsed if p is not None]


def made(fake: Any) -> Any:
    return HttpPubSubClient(config(fake, bind={"type": "manual", "callback": noop}))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", b""),
        (b"abc", b"abc"),
        (bytearray(b"abc"), b"abc"),
        (memoryview(b"abcdef")[1:3], b"bc"),
        (memoryview(array.array("I", [1, 2])), array.array("I", [1, 2]).tobytes()),
        (BIG, BIG),
        (memoryview(BIG), BIG),
    ],
)
async def test_bytes_like(data: Any, expected: bytes) -> None:
    async with broadcaster() as fake, made(fake) as client:
        await client.notify(topic=b"t", data=data, sha512=hashlib.sha512(expected).digest())
        await client.notify(topic=b"t", data=data, length=len(expected))
    assert sent(fake) == [expected] * 2


@pytest.mark.parametrize(
    ("offset", "length"), [(0, None), (5, None), (5, 100), (5, 0), (None, None)]
)
@pytest.mark.parametrize("kind", ["file", "memory"])
async def test_files_from_where_they_stand(
    tmp_path: Path, offset: int | None, length: int | None, kind: str
) -> None:
    (tmp_path / "f").write_bytes(BIG)
    offset = len(BIG) if offset is None else offset
    async with broadcaster(script=[(503, b"")]) as fake, made(fake) as client:
        with open(tmp_path / "f", "rb") if kind == "file" else io.BytesIO(BIG) as file:
            file.seek(offset)
            await client.notify(topic=b"t", sync_file=file, length=length)
    end = None if length is None else offset + length
    assert sent(fake) == [BIG[offset:end]] * 2


async def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    async with broadcaster(script=[(503, b"")]) as fake, made(fake) as client:
        await client.notify(
            topic=b"t", sync_file=io.BytesIO(BIG), progress=lambda *step: seen.append(step)
        )
        first = seen.index((len(BIG), len(BIG)))
        assert seen[first + 1 :] == seen[: first + 1]
        assert seen == seen[: first + 1] * 2
        seen.clear()
        await client.notify(topic=b"t", data=b"abc", progress=lambda *step: seen.append(step))
        assert seen == [(3, 3)]


async def test_files_are_read_in_threads_in_pieces() -> None:
    class Watched(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
            assert threading.current_thread() is not threading.main_thread()
            assert size is not None
            assert 0 < size <= 1024 * 1024
            return super().read(size)

    async with broadcaster() as fake, made(fake) as client:
        await client.notify(topic=b"t", sync_file=Watched(BIG))
    assert sent(fake) == [BIG]


class Unseekable(io.RawIOBase):
    def readable(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "exactly one"),
        ({"data": b"", "sync_file": io.BytesIO()}, "exactly one"),
        ({"data": b"abc", "length": 2}, "data has 3"),
        ({"data": b"abc", "length": 4}, "there are 3"),
        ({"data": b"abc", "sha512": b"x"}, "64 bytes"),
        ({"sync_file": io.BytesIO(b"abc"), "length": 4}, "there are 3"),
        ({"sync_file": io.BytesIO(b"abc"), "length": -1}, "negative"),
        ({"sync_file": Unseekable()}, "seekable"),
    ],
)
async def test_what_cannot_be_sent(arguments: dict[str, Any], says: str) -> None:
    async with broadcaster() as fake, made(fake) as client:
        with pytest.raises(ValueError, match=says):
            await client.notify(topic=b"t", **arguments)
    assert fake.requests == []


async def test_a_file_that_shrinks_is_the_programs_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(BIG)
    async with broadcaster() as fake, made(fake) as client:
        with open(tmp_path / "f", "rb") as file:
            os.truncate(tmp_path / "f", 1_500_000)
            size = len(BIG)

            class Lying:
                def tell(self) -> int:
                    return file.tell()

                def seek(self, offset: int, whence: int = 0) -> int:
                    return size if whence == io.SEEK_END else file.seek(offset, whence)

                def read(self, length: int) -> bytes:
                    return file.read(length)

            with pytest.raises(ValueError, match="the file ends at 1,500,000"):
                await client.notify(topic=b"t", sync_file=Lying(), sha512=b"x" * 64)


async def test_hash_of_large_data_is_made_in_pieces() -> None:
    content = Content(data=BIG, sync_file=None, length=None, sha512=None, progress=None)
    await content.prepare()
    assert content.sha512 == hashlib.sha512(BIG).digest()
    assert content.length == len(BIG)


async def test_two_tries_do_not_move_each_others_file() -> None:
    """The thread of a try that was given up reads on while the next one begins."""

    class Slow(io.BytesIO):
        def seek(self, offset: int, whence: int = 0) -> int:
            at = super().seek(offset, whence)
            if threading.current_thread() is first:
                reading.set()
                other.wait(0.05)
            return at

    reading, other = threading.Event(), threading.Event()
    first = threading.Thread(target=lambda: got.append(content.read(0, 3)))
    got: list[Any] = []
    content = Content(
        data=None, sync_file=Slow(b"abcdef"), length=None, sha512=bytes(64), progress=None
    )
    await content.prepare()
    first.start()
    reading.wait()
    got.append(content.read(3, 3))
    other.set()
    first.join()
    assert sorted(got) == [b"abc", b"def"]


async def test_what_only_looks_like_a_file(tmp_path: Path) -> None:
    """`fileno` of a compressed file is that of what it is compressed to."""
    with gzip.open(tmp_path / "f.gz", "wb") as packed:
        packed.write(BIG)
    with gzip.open(tmp_path / "f.gz", "rb") as file:
        content = made_of(file)
        await content.prepare()
        assert content.sha512 == hashlib.sha512(BIG).digest()


async def test_what_was_written_is_hashed_before_it_is_on_disk(tmp_path: Path) -> None:
    with open(tmp_path / "f", "w+b", buffering=2**20) as file:
        file.write(b"abc" * 50_000)
        file.seek(0)
        file.write(b"x")
        file.seek(0)
        content = made_of(file)
        await content.prepare()
        assert content.sha512 == hashlib.sha512(b"xbc" + b"abc" * 49_999).digest()


def made_of(file: Any) -> Content:
    return Content(data=None, sync_file=file, length=None, sha512=None, progress=None)
