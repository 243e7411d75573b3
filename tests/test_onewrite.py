import asyncio

import pytest

from lonelypsp.onewrite import OneWrite


class Transport:
    def __init__(self) -> None:
        self.log: list[object] = []

    def write(self, data: bytes) -> None:
        self.log.append(data)

    def close(self) -> None:
        self.log.append("closed")

    def is_closing(self) -> bool:
        return "closed" in self.log


LARGE = b"x" * 100_000
HALF = b"y" * 33_000


@pytest.mark.parametrize(
    ("writes", "expected"),
    [
        ([b"head"], [b"head"]),
        ([b"head", b"body"], [b"headbody"]),
        ([b"head", LARGE], [b"head", LARGE]),
        ([b"a", b"b", b"c", b"d"], [b"abcd"]),
        ([b"a", LARGE, b"b", b"c"], [b"a", LARGE, b"bc"]),
        ([HALF, HALF, b"a", b"b"], [HALF + HALF, b"ab"]),
        ([b"head", b""], [b"head"]),
    ],
)
async def test_writes_of_one_turn(writes: list[bytes], expected: list[bytes]) -> None:
    transport = Transport()
    joined = OneWrite(transport, asyncio.get_running_loop().call_soon)
    for data in writes:
        joined.write(data)
    await asyncio.sleep(0)
    assert transport.log == expected


async def test_turns_are_kept_apart() -> None:
    transport = Transport()
    joined = OneWrite(transport, asyncio.get_running_loop().call_soon)
    for data in (b"1", b"2", b"3"):
        joined.write(data)
        await asyncio.sleep(0)
    assert transport.log == [b"1", b"2", b"3"]


async def test_nothing_overtakes_what_is_held() -> None:
    transport = Transport()
    joined = OneWrite(transport, asyncio.get_running_loop().call_soon)
    joined.write(b"last words")
    joined.close()
    await asyncio.sleep(0)
    assert transport.log == [b"last words", "closed"]
    assert joined.is_closing()
