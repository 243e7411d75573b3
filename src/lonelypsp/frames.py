"""Websocket frames of the ordinary case: whole binary messages (RFC 6455, section 5).

The rules of websockets belong to a library, which takes several microseconds for each frame. Nearly
all frames are binary, complete and short; those are made and taken here. Every other one (control
frames, fragments, large ones, whatever breaks a rule) goes through the library, and always from its
first byte to its last, so that both agree on where a frame begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Buffer: TypeAlias = bytes | memoryview
Mask: TypeAlias = Callable[[Buffer, bytes], bytes]
"""Applies a key of 4 bytes to data: `apply_mask` of the library."""

_BINARY = 0x82  # the last, and so the only, frame of a binary message
_FIN, _OPCODE, _LAST_OF_DATA = 0x80, 0x0F, 2
_MASKED = 0x80
_SHORT = 126  # lengths below stand in the second byte
_KEY = 4
_HEAD_ENDS = b"\r\n\r\n"
_HELD = 16 * 1024
"""Bytes up to which an incomplete frame is kept here until the rest comes."""


def header(length: int, masked: int = 0) -> bytes:
    """What stands before the `length` bytes of a binary message, or before the key of them."""
    if length < _SHORT:
        return bytes((_BINARY, masked | length))
    if length < 1 << 16:
        return bytes((_BINARY, masked | _SHORT)) + length.to_bytes(2, "big")
    return bytes((_BINARY, masked | 127)) + length.to_bytes(8, "big")


_COMMON = 1024
_HEADERS = tuple(header(length) for length in range(_COMMON))
_MASKED_HEADERS = tuple(header(length, _MASKED) for length in range(_COMMON))


def framed(messages: list[bytes]) -> bytes:
    """The frames of a server for binary messages."""
    pieces = []
    for message in messages:
        length = len(message)
        pieces.append(_HEADERS[length] if length < _COMMON else header(length))
        pieces.append(message)
    return b"".join(pieces)


def masked_frame(message: Buffer, key: bytes, mask: Mask) -> bytes:
    """The frame of a client for a binary message; `key` must be unpredictable, and used once."""
    length = len(message)
    start = _MASKED_HEADERS[length] if length < _COMMON else header(length, _MASKED)
    return b"".join((start, key, mask(message, key)))


class Cutter:
    """Cuts what a peer sends into frames, from the first byte of its handshake on.

    Args:
        mask: None: the peer is a server, whose frames are not masked.
        most: bytes that the message of a frame may have.
        others: is given the handshake, then the bytes of all frames that are not ordinary, in their
            turn; returns whether the websocket is open.
    """

    __slots__ = ("_fragments", "_held", "_mask", "_most", "_open", "_others", "_shaking", "_theirs")

    def __init__(self, mask: Mask | None, most: int, others: Callable[[bytes], bool]) -> None:
        self._mask = mask
        self._most = most
        self._others = others
        self._open = False
        self._fragments = False  # a message was begun that has more frames than one
        self._shaking = True
        self._held = b""
        self._theirs = 0  # bytes of the present frame that `others` still has to get

    def cut(self, data: bytes, messages: list[bytes]) -> None:
        """Adds the messages of ordinary frames in `data` to `messages`."""
        if self._held:
            data, self._held = self._held + data, b""
        at = self._after_handshake(data) if self._shaking else 0
        end = len(data)
        while at < end:
            if not self._theirs:
                if self._open and not self._fragments:
                    at = self._ordinary(data, at, messages)
                size = self._size(data, at)
                if not size:
                    self._held = data[at:]
                    return
                self._theirs = size
                self._note(data[at])
            piece = data[at : at + self._theirs]
            at += len(piece)
            self._theirs -= len(piece)
            self._open = self._others(piece)

    def _after_handshake(self, data: bytes) -> int:
        """Passes on the head of the request, or of the answer to it, to the end of that."""
        found = data.find(_HEAD_ENDS)
        if found < 0:  # what may be a part of the end is kept
            at = max(0, len(data) - len(_HEAD_ENDS) + 1)
            self._held = data[at:]
        else:
            at = found + len(_HEAD_ENDS)
            self._shaking = False
        if at:
            self._open = self._others(data[:at])
        return len(data) if self._shaking else at

    def _ordinary(self, data: bytes, at: int, messages: list[bytes]) -> int:
        """Takes as many ordinary frames as there are from `at` on; where the next one begins."""
        mask, most, end = self._mask, self._most, len(data)
        bit = 0 if mask is None else _MASKED
        while at + 2 <= end and data[at] == _BINARY:
            length, begin = data[at + 1] ^ bit, at + 2
            if length >= _SHORT:
                if length != _SHORT or at + 4 > end:
                    break
                length = data[at + 2] << 8 | data[at + 3]
                begin = at + 4
            if mask is not None:
                begin += _KEY
            if length > most or begin + length > end:
                break
            at = begin + length
            message = data[begin:at]
            messages.append(message if mask is None else mask(message, data[begin - _KEY : begin]))
        return at

    def _size(self, data: bytes, at: int) -> int:
        """Bytes of the frame at `at`; 0: it is to be kept until more of it has come."""
        there = len(data) - at
        if there < 2:
            return 0
        length = data[at + 1] & 127
        head = 2 if length < _SHORT else 4 if length == _SHORT else 10
        if there < head:
            return 0
        if head > 2:
            length = int.from_bytes(data[at + 2 : at + head], "big")
        is_masked = bool(data[at + 1] & _MASKED)
        size = head + (_KEY if is_masked else 0) + length
        may_be_ordinary = (
            self._open
            and not self._fragments
            and data[at] == _BINARY
            and is_masked == (self._mask is not None)
            and length <= self._most
        )
        return 0 if may_be_ordinary and there < size <= _HELD else size

    def _note(self, first: int) -> None:
        if first & _OPCODE <= _LAST_OF_DATA:
            self._fragments = not first & _FIN
