"""Frames of the ordinary case, checked against the library that knows all cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri
from websockets.utils import apply_mask

from lonelypsp.frames import Cutter, framed, header, masked_frame

MOST = 40_000
REQUEST = (
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
KEY = b"\x01\x80\xfe\x33"
LENGTHS = (0, 1, 125, 126, 127, 1023, 1024, 16_383, 65_535, 65_536, 70_000)


class Server:
    """The library, which is given what a `Cutter` leaves to it."""

    mask: Callable[..., bytes] | None = staticmethod(apply_mask)

    def __init__(self) -> None:
        self.conn = ServerProtocol(max_size=MOST)
        self.messages: list[bytes] = []
        self.fragments: list[bytes] = []
        self.controls: list[tuple[Opcode, bytes]] = []

    def others(self, data: bytes) -> bool:
        self.conn.receive_data(data)
        for event in self.conn.events_received():
            if not isinstance(event, Frame):
                self.conn.send_response(self.conn.accept(event))
            elif event.opcode in (Opcode.BINARY, Opcode.CONT):
                self.fragments.append(bytes(event.data))
                if event.fin:
                    self.messages.append(b"".join(self.fragments))
                    self.fragments = []
            else:
                self.controls.append((event.opcode, bytes(event.data)))
        return self.conn.state is State.OPEN

    @property
    def outcome(self) -> tuple[object, ...]:
        error = self.conn.parser_exc
        return self.messages, self.controls, self.conn.state, type(error), str(error)


def frame(message: bytes, opcode: int = Opcode.BINARY, fin: bool = True) -> bytes:
    """A frame of a client, by the library."""
    return Frame(Opcode(opcode), message, fin).serialize(mask=True)


def by_library(data: bytes) -> Server:
    """`data` begins with `REQUEST`, which has to be answered before anything else."""
    server = Server()
    server.others(data[: len(REQUEST)])
    server.others(data[len(REQUEST) :])
    return server


def by_cutter(pieces: Iterable[bytes]) -> Server:
    server = Server()
    cutter = Cutter(server.mask, MOST, server.others)
    for piece in pieces:
        cutter.cut(piece, server.messages)
    return server


def pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    at = [0, *sorted(cuts), len(data)]
    return [data[a:b] for a, b in pairwise(at)]


# making


@pytest.mark.parametrize("length", LENGTHS)
def test_frames_of_a_server(length: int) -> None:
    message = bytes(length)
    expected = Frame(Opcode.BINARY, message).serialize(mask=False)
    assert framed([message]) == header(length) + message == expected
    assert framed([message, b"x", b""]) == expected + b"\x82\x01x\x82\x00"


@pytest.mark.parametrize("length", LENGTHS)
def test_frames_of_a_client(length: int) -> None:
    client = ServerProtocol(max_size=None)
    client.receive_data(REQUEST)
    (request,) = client.events_received()
    client.send_response(client.accept(request))  # type: ignore[arg-type]
    message = bytes(n % 251 for n in range(length))
    client.receive_data(masked_frame(message, KEY, apply_mask))
    (event,) = client.events_received()
    assert isinstance(event, Frame)
    assert (event.opcode, event.data, event.fin) == (Opcode.BINARY, message, True)


# taking

WHOLE = st.builds(frame, st.binary(max_size=300))
LARGE = st.sampled_from([frame(bytes(n)) for n in (125, 126, 16_380, 16_390, MOST)])
FRAGMENTS = st.lists(st.binary(max_size=20), min_size=2, max_size=4).map(
    lambda parts: b"".join(
        frame(part, Opcode.BINARY if n == 0 else Opcode.CONT, n == len(parts) - 1)
        for n, part in enumerate(parts)
    )
)
CONTROL = st.sampled_from(
    [frame(b"p", Opcode.PING), frame(b"", Opcode.PONG), frame(b"text", Opcode.TEXT)]
)
BROKEN = st.sampled_from(
    [
        frame(b"\x03\xe8bye", Opcode.CLOSE),
        frame(b"one", fin=False) + frame(b"another"),  # one message inside another
        frame(b"rest", Opcode.CONT),
        b"\x82\x01x",  # not masked
        b"\xc2\x80abcd",  # a reserved bit
        b"\x83\x80abcd",  # a reserved opcode
        frame(bytes(MOST + 1)),
        b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xffabcd",
        frame(b"begun", fin=False),
    ]
)


@given(
    st.lists(WHOLE | LARGE | FRAGMENTS | CONTROL, max_size=6),
    st.lists(BROKEN, max_size=1),
    st.lists(WHOLE, max_size=2),
    st.lists(st.integers(0, 2**20), max_size=12),
    st.integers(0, 3),
)
def test_the_same_as_the_library_alone(
    frames: list[bytes], broken: list[bytes], more: list[bytes], cuts: list[int], short: int
) -> None:
    data = b"".join((REQUEST, *frames, *broken, *more))
    data = data[: len(data) - short]
    found = by_cutter(pieces(data, (cut % (len(data) + 1) for cut in cuts)))
    assert found.outcome == by_library(data).outcome


@pytest.mark.parametrize("head", [b"\x82\x01", b"\x82\x00", b"\x82\x7e\x01\x00"])
def test_what_is_not_masked_is_refused_before_it_is_whole(head: bytes) -> None:
    found = by_cutter([REQUEST + head])
    assert found.outcome == by_library(REQUEST + head).outcome
    assert "incorrect masking" in found.outcome


def test_byte_by_byte() -> None:
    data = REQUEST + frame(b"one") + frame(b"", Opcode.PING) + frame(bytes(200)) + frame(b"two")
    found = by_cutter(data[n : n + 1] for n in range(len(data)))
    assert found.outcome == by_library(data).outcome
    assert found.messages == [b"one", bytes(200), b"two"]


def test_ordinary_frames_pass_the_library_by() -> None:
    server = Server()
    given: list[bytes] = []

    def others(data: bytes) -> bool:
        given.append(data)
        return True

    cutter = Cutter(server.mask, MOST, others)
    ping = frame(b"p", Opcode.PING)
    cutter.cut(REQUEST + frame(b"one") + ping + frame(b"two"), server.messages)
    assert server.messages == [b"one", b"two"]
    assert given == [REQUEST, ping]


@pytest.mark.parametrize("cut", [0, 1, 3, 10])
def test_frames_of_a_server_are_not_masked(cut: int) -> None:
    client = ClientProtocol(parse_uri("ws://a/"))
    server = ServerProtocol()
    client.send_request(client.connect())
    server.receive_data(b"".join(client.data_to_send()))
    (request,) = server.events_received()
    server.send_response(server.accept(request))  # type: ignore[arg-type]
    answer = b"".join(server.data_to_send())

    def others(data: bytes) -> bool:
        client.receive_data(data)
        return client.state is State.OPEN

    messages: list[bytes] = []
    cutter = Cutter(None, MOST, others)
    data = answer + framed([b"one", b"two"])
    at = len(answer) - 2 + cut  # inside the end of the head, or of a frame
    cutter.cut(data[:at], messages)
    cutter.cut(data[at:], messages)
    assert messages == [b"one", b"two"]
    assert client.handshake_exc is None
    cutter.cut(frame(b"masked"), messages)
    assert "incorrect masking" in str(client.parser_exc)
    assert messages == [b"one", b"two"]


def test_a_large_frame_is_not_kept() -> None:
    server = Server()
    cutter = Cutter(server.mask, MOST, server.others)
    data = REQUEST + frame(bytes(MOST))
    for piece in pieces(data, range(0, len(data), 1000)):
        cutter.cut(piece, server.messages)
        assert len(cutter._held) < 20
    assert server.messages == [bytes(MOST)]
