"""Chunks of a body on their way to a spool."""

from __future__ import annotations

import hashlib

import pytest

from lonelypsp.spool import Spool
from lonelypss.intake import WRITE_CHUNKS, WRITE_SIZE, fill

# some end where what was gathered has just been written
SIZES = {
    "nothing": [0],
    "one": [5],
    "small": [5] * 10,
    "as many as are gathered": [5] * WRITE_CHUNKS,
    "one more": [5] * (WRITE_CHUNKS + 1),
    "tiny": [1] * (10 * WRITE_CHUNKS),
    "as much as is gathered": [5, WRITE_SIZE],
    "in halves": [WRITE_SIZE // 2] * 4,
    "odd": [3, WRITE_SIZE, 7, WRITE_SIZE - 1, 1],
}


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
async def test_arrives_whole(sizes: list[int], on_disk: bool) -> None:
    chunks = [bytes([n % 251]) * size for n, size in enumerate(sizes)]
    data, left = b"".join(chunks), chunks[1:]

    async def next_chunk() -> tuple[bytes, bool]:
        chunk = left.pop(0)
        return chunk, bool(left)

    with Spool(len(data), memory_limit=-1 if on_disk else len(data)) as spool:
        await fill(spool, chunks[0], bool(left), next_chunk)
        body = spool.finish(hashlib.sha512(data).digest())
    assert body.on_disk is on_disk
    assert body.read_at(0, len(data) + 1) == data
    body.close()
