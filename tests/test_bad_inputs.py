"""Bad bodies and bad websockets, at `lonelypss serve` itself: each in one piece and in small ones,
one after the other on connections that stay in use. The ids are those of our list of bad inputs.

Bodies stand in the tables of broadcaster/test_routes.py, which see to what is stored and delivered.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from broadcaster.harness import Peer, request_bytes
from broadcaster.test_routes import BAD_BODIES, BAD_MESSAGES, SET_TAILS, set_body
from conversation import Conversation
from programs import Program, broadcaster, run


@dataclass
class Serving:
    port: int
    directory: Path


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    directory = tmp_path_factory.mktemp("serve")
    with broadcaster(directory) as (program, url):
        yield Serving(int(url.rpartition(":")[2]), directory)
        assert run("lonelypss", "subs", "ls", "--json", cwd=directory).stdout.strip() == NOTHING
        assert program.stop() == 0
        assert_no_bug(program)


NOTHING = json.dumps({"exact": 0, "glob": 0, "missed": 0}, indent=2)


def assert_no_bug(program: Program) -> None:
    lines = program.rest()
    assert not [line for line in lines if "Traceback" in line or " ERROR " in line]
    assert not [line for line in lines if "answered 5" in line]


# S, C, N: bodies

_PEER = Peer()
BODIES: list[tuple[str, str, bytes, int]] = [
    *((name, path, body, 400) for name, path, body in BAD_BODIES),
    *(
        (name, "set_subscriptions", set_body(b"http://h/", tail), 400)
        for name, tail in SET_TAILS.items()
    ),
    *((name, "notify", make(_PEER).body, status) for name, (make, status) in BAD_MESSAGES.items()),
]


def in_chunks(path: str, body: bytes) -> bytes:
    """As a request whose every byte is a chunk of its own."""
    head = f"POST {path} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("make", "step"), [(request_bytes, None), (request_bytes, 1), (in_chunks, None)]
)
async def test_bodies(
    make: Callable[[str, bytes], bytes], step: int | None, serving: Serving
) -> None:
    async with Conversation(serving.port) as conversation:
        for name, path, body, status in BODIES:
            await conversation.send(make(f"/v1/{path}", body), step)
            statuses, got, closed = await conversation.receive(1)
            assert (statuses, closed) == ([status], False), (name, path, got)


async def test_a_claim_is_judged_before_the_body_comes(serving: Serving) -> None:
    """N08: 2^64 - 1 bytes, in chunks without an end."""
    head = _PEER.notify(length=2**64 - 1).body
    start = b"POST /v1/notify HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with Conversation(serving.port) as conversation:
        await conversation.send(start + b"%x\r\n%b\r\n" % (len(head), head))
        assert (await conversation.receive(1))[0] == [413]
        chunk = b"10000\r\n" + bytes(65_536) + b"\r\n"
        for _ in range(100):
            await conversation.send(chunk)
        assert (await conversation.receive())[2]


async def test_as_many_at_once_as_there_can_be(serving: Serving) -> None:
    """N30: all are answered, with 200 or 503."""
    number = int(os.environ.get("LONELYPS_STORM", "1000"))
    found: list[int] = []

    async def one() -> None:
        async with Conversation(serving.port) as conversation:
            await conversation.send(_PEER.notify(b"nobody").bytes())
            found.extend((await conversation.receive(1))[0])

    for _ in range(0, number, 200):
        await asyncio.gather(*(one() for _ in range(200)))
    assert len(found) == number
    assert set(found) <= {200, 503}


# W: websockets

GOOD = {
    "Host": "h",
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}
HANDSHAKES: dict[str, tuple[dict[str, str | None], int]] = {
    "good": ({}, 101),
    "W01": ({"Sec-WebSocket-Key": None}, 400),
    "W01 too short": ({"Sec-WebSocket-Key": "dGhl"}, 400),
    "W01 not base64": ({"Sec-WebSocket-Key": "*" * 24}, 400),
    "W02": ({"Sec-WebSocket-Version": "12"}, 426),
    "W02 none": ({"Sec-WebSocket-Version": None}, 426),
    "W03": ({"Origin": "https://elsewhere.example"}, 403),
    "an extension that we do not have": ({"Sec-WebSocket-Extensions": "permessage-deflate"}, 101),
    "H24": ({"Host": None}, 400),
    "H21": ({"X": "x" * 65_536}, 431),
    "another protocol": ({"Upgrade": "h2c"}, 426),
    "no upgrade": ({"Upgrade": None, "Connection": None}, 426),
    "H15": ({"Content-Length": "5"}, 400),
}


def handshake(changes: dict[str, str | None]) -> bytes:
    lines = [f"{name}: {value}" for name, value in (GOOD | changes).items() if value is not None]
    return "\r\n".join(["GET /v1/websocket HTTP/1.1", *lines, "", ""]).encode()


@pytest.mark.parametrize("name", HANDSHAKES)
async def test_handshake(name: str, serving: Serving) -> None:
    changes, status = HANDSHAKES[name]
    for step in (None, 1 if name != "H21" else 997):
        async with Conversation(serving.port) as conversation:
            await conversation.send(handshake(changes), step)
            statuses, got, _ = await conversation.receive(1)
            assert statuses == [status], got
            if name.startswith("W02"):
                assert b"\r\nsec-websocket-version: 13\r\n" in got.lower()


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, mask: bool = True, rsv: int = 0,
    length: bytes | None = None,
) -> bytes:  # fmt: skip
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    size = len(payload)
    if length is None:
        length = bytes([size]) if size < 126 else b"\x7e" + struct.pack("!H", size)
    marked = bytes([length[0] | (0x80 if mask else 0)]) + length[1:]
    return bytes([first]) + marked + (bytes(4) if mask else b"") + payload


CONTINUATION, TEXT, BINARY, CLOSE, PING = 0, 1, 2, 8, 9
FRAMES: dict[str, tuple[bytes, int]] = {
    # 4400: any frame that is no message of ours; 1003 is for those who take no text at all, and
    # so do we, but the older implementation says 4400, too
    "W04": (frame(TEXT, b"hello"), 4400),
    "W05": (frame(BINARY, b"x", mask=False), 1002),
    "W06": (frame(BINARY, b"x", rsv=1), 1002),
    "W06 the others": (frame(BINARY, b"x", rsv=2), 1002),
    "an opcode that there is not": (frame(3, b"x"), 1002),
    "W07": (frame(PING, b"x", fin=False), 1002),
    "W08": (frame(PING, b"x" * 126), 1002),
    "W09": (frame(CONTINUATION, b"x"), 1002),
    "W09 a message inside another": (frame(BINARY, b"x", fin=False) + frame(BINARY, b"x"), 1002),
    "W10": (frame(BINARY, b"x", length=b"\x7f" + struct.pack("!Q", 2**63)), 1009),
    "W10 too long": (frame(BINARY, b"x", length=b"\x7f" + struct.pack("!Q", 2**40)), 1009),
    # read as it is meant: nobody in between could read it differently; its content is no message
    "W11": (frame(BINARY, b"x", length=b"\x7e\0\1"), 4400),
    "W12": (frame(CLOSE, struct.pack("!H", 999)), 1002),
    "W12 one byte": (frame(CLOSE, b"x"), 1002),
    "W12 not UTF-8": (frame(CLOSE, struct.pack("!H", 1000) + b"\xff"), 1007),
    # without an agreed extension a deflated frame is one with RSV1
    "W14": (frame(BINARY, b"\xecA\0\0", rsv=4), 1002),
    "W51": (frame(BINARY, b""), 4400),
    "W52": (frame(BINARY, b"x"), 4400),
    "W53": (frame(BINARY, b"xyz"), 4400),
}


@pytest.mark.parametrize("name", FRAMES)
async def test_frames(name: str, serving: Serving) -> None:
    data, code = FRAMES[name]
    for step in (None, 1):
        async with Conversation(serving.port) as conversation:
            await conversation.send(handshake({}))
            assert (await conversation.receive(1))[0] == [101]
            await conversation.send(data, step)
            assert await conversation.close_frame() == code


async def test_fragments_without_an_end(serving: Serving) -> None:
    """W13"""
    async with Conversation(serving.port) as conversation:
        await conversation.send(handshake({}))
        assert (await conversation.receive(1))[0] == [101]
        await conversation.send(frame(BINARY, b"x", fin=False))
        piece = frame(
            CONTINUATION, bytes(1 << 20), fin=False, length=b"\x7f" + struct.pack("!Q", 1 << 20)
        )
        for _ in range(20):
            await conversation.send(piece)
        assert await conversation.close_frame() == 1009
