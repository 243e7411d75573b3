"""Websocket headers: how a header's value lies on the wire, and every header there is, once.

The length in front of a value is not part of it: that is read by whoever reads the message, in
either of its two forms (`lonelypsp.messages`).
"""

from __future__ import annotations

from typing import Generic, TypeVar

from lonelypsp.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from lonelypsp.wire import SHA512_LENGTH, Source, from_utf8, prefixes, to_utf8

T = TypeVar("T")

NONCE_LENGTH = 32
MAX_IDENTIFIER_LENGTH = 64
MAX_HEADER_LENGTH = 0xFFFF


class Header(Generic[T]):
    """A header: its name, and how its value lies on the wire.

    Attributes:
        missing: what an expanded message without this header is taken to say; None: an error.
    """

    missing: bytes | None = None

    def __init__(self, name: str, wire: str) -> None:
        self.name = name
        self.wire = wire

    def encode(self, value: T) -> bytes:
        raise NotImplementedError

    def decode(self, raw: bytes) -> T:
        raise NotImplementedError

    def packed(self, field: str, source: Source) -> list[str]:
        """`encode` as text (`lonelypsp.wire.Source`): expressions for the length and the value."""
        source.line(f"{field} = {source.use(self.encode)}({field})")
        return [f"{source.use(prefixes(2))}[len({field})]", field]

    def unpacked(self, field: str, source: Source) -> None:
        """`decode` as text: lines that read the length and the value."""
        source.take_prefixed(field, 2)
        source.line(f"{field} = {source.use(self.decode)}({field})")


class Octets(Header[bytes]):
    """Raw bytes, `least` to `most` of them."""

    def __init__(self, name: str, *, least: int = 0, most: int = MAX_HEADER_LENGTH) -> None:
        super().__init__(name, f"{most} bytes" if least == most else f"bytes, at most {most}")
        self.least, self.most = least, most

    def encode(self, value: bytes) -> bytes:
        return self._checked(value, LocalProtocolError)

    def decode(self, raw: bytes) -> bytes:
        return self._checked(raw, RemoteProtocolError)

    def _checked(self, value: bytes, error: type[ProtocolError]) -> bytes:
        if not self.least <= len(value) <= self.most:
            raise error(f"{self.name}: {len(value):,} bytes, must be {self.wire}")
        return value

    def packed(self, field: str, source: Source) -> list[str]:
        return [f"{source.use(prefixes(2, self.least, self.most))}[len({field})]", field]

    def unpacked(self, field: str, source: Source) -> None:
        source.take_prefixed(field, 2, self.least, self.most)


class Text(Header[str]):
    def __init__(self, name: str) -> None:
        super().__init__(name, f"UTF-8, at most {MAX_HEADER_LENGTH} bytes")

    def encode(self, value: str) -> bytes:
        raw = to_utf8(value, self.name)
        if len(raw) > MAX_HEADER_LENGTH:
            raise LocalProtocolError(f"{self.name}: {len(raw):,} bytes, must be {self.wire}")
        return raw

    def decode(self, raw: bytes) -> str:
        return from_utf8(raw, self.name)


class OptionalText(Header[str | None]):
    """As `Text`; nothing at all is length 0, and length 0 is nothing."""

    def __init__(self, name: str) -> None:
        self._text = Text(name)
        super().__init__(name, f"{self._text.wire}; 0 = none")

    def encode(self, value: str | None) -> bytes:
        return self._text.encode(value or "")

    def decode(self, raw: bytes) -> str | None:
        return self._text.decode(raw) or None

    def packed(self, field: str, source: Source) -> list[str]:
        source.line(f"{field} = {field}.encode() if {field} else b''")
        return [f"{source.use(prefixes(2))}[len({field})]", field]

    def unpacked(self, field: str, source: Source) -> None:
        source.take_prefixed(field, 2)
        source.line(f"{field} = {field}.decode() or None")


class Flag(Header[bool]):
    def __init__(self, name: str) -> None:
        super().__init__(name, "1 byte; 01 = true, anything else = false")

    def encode(self, value: bool) -> bytes:
        return b"\x01" if value else b"\x00"

    def decode(self, raw: bytes) -> bool:
        return raw == b"\x01"


class Integer(Header[int]):
    """Big-endian integer, read from any number of bytes up to `width`.

    Args:
        zero: how 0 is written; everything else is written without leading zero bytes.
        fixed: written as exactly `width` bytes instead.
        least, most: what may be written, where that is less than the width allows.
    """

    def __init__(
        self,
        name: str,
        width: int,
        *,
        zero: bytes = b"",
        fixed: bool = False,
        signed: bool = False,
        least: int | None = None,
        most: int | None = None,
        missing: bytes | None = None,
    ) -> None:
        way = f"written with all {width}" if fixed else "0 is one byte" if zero else ""
        sign = "signed" if signed else "unsigned"
        super().__init__(name, f"{sign}, at most {width} bytes{way and ', '}{way}")
        self.width, self.zero, self.fixed, self.signed = width, zero, fixed, signed
        self.missing = missing
        bits = 8 * width - signed
        self.least = least if least is not None else -(1 << bits) if signed else 0
        self.most = most if most is not None else (1 << bits) - 1

    def encode(self, value: int) -> bytes:
        if not self.least <= value <= self.most:
            raise LocalProtocolError(
                f"{self.name}: {value} is not between {self.least} and {self.most}"
            )
        if value == 0 and not self.fixed:
            return self.zero
        length = self.width if self.fixed else (value.bit_length() + 7) // 8
        return value.to_bytes(length, "big", signed=self.signed)

    def decode(self, raw: bytes) -> int:
        if len(raw) > self.width:
            raise RemoteProtocolError(f"{self.name}: {len(raw)} bytes, at most {self.width}")
        return int.from_bytes(raw, "big", signed=self.signed)

    def packed(self, field: str, source: Source) -> list[str]:
        if self.signed and not self.fixed:
            return super().packed(field, source)
        source.line(f"if not {self.least} <= {field} <= {self.most}: raise ValueError")
        if self.fixed:
            length = self.width.to_bytes(2, "big")
            return [repr(length), f"{field}.to_bytes({self.width}, {self._how})"]
        least = len(self.zero)
        source.line(f"_{field} = {field}.bit_length() + 7 >> 3{' or 1' if least else ''}")
        lengths = source.use(prefixes(2, least, self.width))
        return [f"{lengths}[_{field}]", f"{field}.to_bytes(_{field}, {self._how})"]

    def unpacked(self, field: str, source: Source) -> None:
        source.take_prefixed(field, 2, 0, self.width)
        source.line(f"{field} = {source.use(int.from_bytes)}({field}, {self._how})")

    @property
    def _how(self) -> str:
        return "'big', signed=True" if self.signed else "'big'"


BODY = object()
"""Marks the field that holds what follows the headers."""

AUTHORIZATION = OptionalText("authorization")
TRACING = Octets("x-tracing")
TOPIC = Octets("x-topic")
GLOB = Text("x-glob")
IDENTIFIER = Octets("x-identifier", most=MAX_IDENTIFIER_LENGTH)
PART_ID = Integer("x-part-id", 8)
FIRST_PART_ID = Integer("x-part-id", 8, zero=b"\0", most=0)
LATER_PART_ID = Integer("x-part-id", 8, least=1)
COMPRESSOR = Integer("x-compressor", 8, zero=b"\0")
COMPRESSED_LENGTH = Integer("x-compressed-length", 8)
DECOMPRESSED_LENGTH = Integer("x-decompressed-length", 8)
COMPRESSED_SHA512 = Octets("x-compressed-sha512", least=SHA512_LENGTH, most=SHA512_LENGTH)
SUBSCRIBER_NONCE = Octets("x-subscriber-nonce", least=NONCE_LENGTH, most=NONCE_LENGTH)
BROADCASTER_NONCE = Octets("x-broadcaster-nonce", least=NONCE_LENGTH, most=NONCE_LENGTH)
ENABLE_ZSTD = Flag("x-enable-zstd")
ENABLE_TRAINING = Flag("x-enable-training")
# older broadcasters take a missing one for the digit 0, that is 48, and check the signature so
INITIAL_DICT = Integer("x-initial-dict", 2, fixed=True, missing=b"0")
NUM_SUBSCRIBERS = Integer("x-num-subscribers", 4, fixed=True)
SUBSCRIBERS = Integer("x-subscribers", 8)
COMPRESSOR_ID = Integer("x-identifier", 8)
COMPRESSION_LEVEL = Integer("x-compression-level", 2, fixed=True, signed=True)
MIN_SIZE = Integer("x-min-size", 4)
MAX_SIZE = Integer("x-max-size", 8)
DICTIONARY_SHA512 = Octets("x-sha512", least=SHA512_LENGTH, most=SHA512_LENGTH)
