"""Value codecs, a reader over bytes, and layouts: the one table a message is made of.

A message is a frozen dataclass whose annotations carry the codec of each field, in wire order::

    @dataclass(frozen=True, slots=True)
    class Missed:
        tracing: Annotated[bytes, BYTES16]
        topic: Annotated[bytes, BYTES16]

`encode`, `decode` and `HeadParser` read nothing but those annotations, and so do the documentation
tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import (
    Annotated,
    Any,
    ClassVar,
    Generic,
    NoReturn,
    Protocol,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from lonelypsp.errors import Incomplete, LocalProtocolError, RemoteProtocolError

T = TypeVar("T")
M = TypeVar("M")

SHA512_LENGTH = 64


class Reader:
    """Takes values from the front of `data`; raises `Incomplete` where the bytes end too early."""

    __slots__ = ("data", "offset")

    def __init__(self, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        self.data = data
        self.offset = offset

    def take(self, length: int, name: str) -> bytes:
        end = self.offset + length
        if end > len(self.data):
            self._too_short(end, name)
        value = self.data[self.offset : end]
        self.offset = end
        return value if type(value) is bytes else bytes(value)

    def uint(self, width: int, name: str) -> int:
        end = self.offset + width
        if end > len(self.data):
            self._too_short(end, name)
        value = int.from_bytes(self.data[self.offset : end], "big")
        self.offset = end
        return value

    def _too_short(self, end: int, name: str) -> NoReturn:
        expected, present = end - self.offset, len(self.data) - self.offset
        raise Incomplete(f"{name}: {expected} bytes expected, {present} present", needed=end)

    @property
    def remaining(self) -> int:
        return len(self.data) - self.offset


class Codec(Protocol[T]):
    """How one value lies on the wire. `wire` is its description in the documentation."""

    wire: str

    def encode(self, value: T, name: str) -> bytes: ...
    def decode(self, reader: Reader, name: str) -> T: ...


class Uint:
    """Unsigned big-endian integer of `width` bytes."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.maximum = (1 << (8 * width)) - 1
        self.wire = f"u{8 * width}"

    def encode(self, value: int, name: str) -> bytes:
        if not 0 <= value <= self.maximum:
            raise LocalProtocolError(f"{name}: {value} is not between 0 and {self.maximum}")
        return value.to_bytes(self.width, "big")

    def decode(self, reader: Reader, name: str) -> int:
        return reader.uint(self.width, name)


class Fixed:
    """Exactly `length` raw bytes."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.wire = f"{length} bytes"

    def encode(self, value: bytes, name: str) -> bytes:
        if len(value) != self.length:
            raise LocalProtocolError(f"{name}: {len(value)} bytes, must be {self.length}")
        return value

    def decode(self, reader: Reader, name: str) -> bytes:
        return reader.take(self.length, name)


class PrefixedBytes:
    """Raw bytes behind a length of `width` bytes."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.maximum = (1 << (8 * width)) - 1
        self.wire = f"u{8 * width} length, bytes"

    def encode(self, value: bytes, name: str) -> bytes:
        length = len(value)
        if length > self.maximum:
            raise LocalProtocolError(
                f"{name}: {length:,} bytes, the protocol carries at most {self.maximum:,}"
            )
        return length.to_bytes(self.width, "big") + value

    def decode(self, reader: Reader, name: str) -> bytes:
        return reader.take(reader.uint(self.width, name), name)


class PrefixedText:
    """UTF-8 text behind a length of 2 bytes."""

    wire = "u16 length, UTF-8"

    def encode(self, value: str, name: str) -> bytes:
        return BYTES16.encode(to_utf8(value, name), name)

    def decode(self, reader: Reader, name: str) -> str:
        return from_utf8(BYTES16.decode(reader, name), name)


class OptionalText:
    """As `PrefixedText`; nothing at all is length 0, and length 0 is nothing."""

    wire = "u16 length, UTF-8; 0 = none"

    def encode(self, value: str | None, name: str) -> bytes:
        return TEXT16.encode(value or "", name)

    def decode(self, reader: Reader, name: str) -> str | None:
        return TEXT16.decode(reader, name) or None


class Flag:
    """One byte, 0 or 1."""

    wire = "u8, 0 or 1"

    def encode(self, value: bool, name: str) -> bytes:
        return b"\x01" if value else b"\x00"

    def decode(self, reader: Reader, name: str) -> bool:
        return reader.uint(1, name) == 1


class Sorted(Generic[T]):
    """A u32 count, then that many (key, recovery url) pairs in strictly ascending byte order."""

    def __init__(self, key: Codec[T]) -> None:
        self.key = key
        self.wire = f"u32 count, then each: {key.wire}; recovery ({OPTIONAL_TEXT16.wire})"

    def encode(self, value: tuple[tuple[T, str | None], ...], name: str) -> bytes:
        parts = [U32.encode(len(value), f"number of {name}")]
        for key, recovery in value:
            parts += (self.key.encode(key, name), OPTIONAL_TEXT16.encode(recovery, "recovery"))
        return b"".join(parts)

    def decode(self, reader: Reader, name: str) -> tuple[tuple[T, str | None], ...]:
        count = reader.uint(4, f"number of {name}")
        items: list[tuple[T, str | None]] = []
        previous: bytes | None = None
        for _ in range(count):
            start = reader.offset
            key = self.key.decode(reader, name)
            raw = bytes(reader.data[start + 2 : reader.offset])
            if previous is not None and raw <= previous:
                raise RemoteProtocolError(f"{name}: not in strictly ascending byte order")
            previous = raw
            items.append((key, OPTIONAL_TEXT16.decode(reader, f"recovery of {name}")))
        return tuple(items)


def to_utf8(value: str, name: str) -> bytes:
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as e:
        raise LocalProtocolError(f"{name}: not encodable as UTF-8 ({e.reason})") from e


def from_utf8(value: bytes, name: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as e:
        raise RemoteProtocolError(f"{name}: not UTF-8 ({e.reason} at byte {e.start})") from e


U8 = Uint(1)
U16 = Uint(2)
U32 = Uint(4)
U64 = Uint(8)
SHA512 = Fixed(SHA512_LENGTH)
BYTES8 = PrefixedBytes(1)
BYTES16 = PrefixedBytes(2)
TEXT16 = PrefixedText()
OPTIONAL_TEXT16 = OptionalText()
FLAG = Flag()


class Message(Protocol):
    """What `encode` and `decode` work on: a dataclass with codecs in its annotations."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@cache
def layout(cls: type) -> Mapping[str, Codec[Any]]:
    """Field name -> codec of a message class, in wire order."""
    found: dict[str, Codec[Any]] = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if get_origin(hint) is Annotated:
            found[name] = get_args(hint)[1]
    return found


@cache
def _plan(cls: type) -> tuple[bytes, tuple[tuple[str, Any], ...]]:
    kind: int | None = getattr(cls, "TYPE", None)
    prefix = b"" if kind is None else U16.encode(kind, "type")
    return prefix, tuple((name, codec) for name, codec in layout(cls).items())


def encode(message: Message) -> bytes:
    """The bytes of `message`.

    Raises:
        LocalProtocolError: a field does not fit its place on the wire.
    """
    prefix, fields = _plan(type(message))
    parts = [prefix]
    for name, codec in fields:
        parts.append(codec.encode(getattr(message, name), name))
    return b"".join(parts)


def read(cls: type[M], reader: Reader) -> M:
    """Takes one `cls` from `reader`.

    Raises:
        Incomplete: the bytes end early.
        RemoteProtocolError: the bytes are not such a message.
    """
    prefix, fields = _plan(cast("type", cls))
    if prefix and (kind := reader.take(2, "type")) != prefix:
        raise RemoteProtocolError(
            f"type {int.from_bytes(kind, 'big')} where {int.from_bytes(prefix, 'big')}"
            f" ({cls.__name__}) was expected"
        )
    return cls(**{name: codec.decode(reader, name) for name, codec in fields})


def decode(cls: type[M], data: bytes) -> M:
    """Decodes a whole body. Trailing bytes are an error unless the class has `TRAILING_IGNORED`.

    Raises:
        RemoteProtocolError: the bytes are not exactly such a message.
    """
    reader = Reader(data)
    message = read(cls, reader)
    if reader.remaining and not getattr(cls, "TRAILING_IGNORED", False):
        raise RemoteProtocolError(f"{reader.remaining} bytes after the last field")
    return message


class HeadParser(Generic[M]):
    """Decodes a `cls` at the front of a body that arrives in chunks.

    The same chunks, split anywhere, give the same result. Memory is bounded by the largest
    possible head: every variable field of a streamed head has a length of at most 16 bits.
    """

    def __init__(self, cls: type[M]) -> None:
        self._cls = cls
        self._buffer = bytearray()
        self._needed = 0

    def feed(self, chunk: bytes) -> tuple[M, bytes] | None:
        """The head and the bytes behind it, or None while more is needed.

        Raises:
            RemoteProtocolError: the bytes can never become such a head.
        """
        data: bytes | bytearray = chunk
        if self._buffer:
            self._buffer += chunk
            data = self._buffer
        if len(data) >= self._needed:
            reader = Reader(data)
            try:
                head = read(self._cls, reader)
            except Incomplete as e:
                self._needed = e.needed
            else:
                return head, bytes(data[reader.offset :])
        if not self._buffer:
            self._buffer += chunk
        return None

    def end(self) -> RemoteProtocolError:
        """The error to raise when the body ends before the head does."""
        return RemoteProtocolError(
            f"the body ends after {len(self._buffer)} bytes, inside its head"
            f" (at least {self._needed} bytes)"
        )
