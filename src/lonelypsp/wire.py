"""Value codecs, a reader over bytes, and layouts: the one table a message is made of.

A message is a frozen dataclass whose annotations carry the codec of each field, in wire order::

    @dataclass(frozen=True, slots=True)
    class Missed:
        tracing: Annotated[bytes, BYTES16]
        topic: Annotated[bytes, BYTES16]

`encode`, `decode` and `HeadParser` read nothing but those annotations, and so do the documentation
tables.

Each layout is followed in two ways. The walk, field by field through the codecs, is what counts: it
knows every case and says what is wrong. Before it runs a function that was generated from the same
layout (`Source`), for speed: it knows the ordinary case alone, and on whatever else it meets it
leaves the matter to the walk, by raising one of `ODD`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

from lonelypsp.errors import Incomplete, LocalProtocolError, ProtocolError, RemoteProtocolError

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


ODD = (ProtocolError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a generated function may raise: no verdict, only the advice to ask the walk."""

_QUICK_LENGTHS = 1024


def prefixes(width: int, least: int = 0, most: int | None = None) -> tuple[bytes | None, ...]:
    """Length -> how it is written, for lengths of the ordinary case.

    None, which cannot be joined, stands for lengths below `least`.
    """
    lengths = range(min((_largest(width) if most is None else most) + 1, _QUICK_LENGTHS))
    return tuple(n.to_bytes(width, "big") if n >= least else None for n in lengths)


def _largest(width: int) -> int:
    return (1 << (8 * width)) - 1


class Source:
    """The text of a function that encodes or decodes, as it is written by the codecs in it.

    In the text a field's value has the field's name; all other names begin with `_`. An encoder
    ends by joining the expressions that `packed` of its codecs gave. A decoder reads bytes `_data`
    from `_at` on; it compares `_at` with the length once, in the end: to slice beyond the end gives
    less, and to index beyond it is an `IndexError`.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._names: dict[str, Any] = {}
        self.indent = 1

    def line(self, text: str) -> None:
        self._lines.append("    " * self.indent + text)

    def use(self, value: object) -> str:
        """The name of `value` in the text."""
        name = f"_{len(self._names)}"
        self._names[name] = value
        return name

    def take_prefixed(
        self, field: str, width: int, least: int = 0, most: int | None = None
    ) -> None:
        """Reads a length of 1 or 2 bytes, `least` to `most`, and so many bytes into `field`."""
        self.line(f"_n = _data[_at]{' << 8 | _data[_at + 1]' if width == 2 else ''}")
        if least:
            self.line(f"if _n < {least}: raise ValueError")
        if most is not None and most < _largest(width):
            self.line(f"if _n > {most}: raise ValueError")
        self.line(f"_at += {width}")
        self.line(f"{field} = _data[_at : (_at := _at + _n)]")

    def expect_end(self) -> None:
        self.line("if _at > len(_data): raise IndexError")

    def function(self, parameters: str) -> Callable[..., Any]:
        text = "\n".join((f"def made({parameters}):", *self._lines))
        exec(compile(text, "<made from a layout>", "exec"), self._names)  # noqa: S102 - our text
        made: Callable[..., Any] = self._names["made"]
        return made


class Codec(Protocol[T]):
    """How one value lies on the wire. `wire` is its description in the documentation.

    `packed` and `unpacked` are `encode` and `decode` as text, for the ordinary case: the
    expressions to join for the value in `field`, and the lines that read it.
    """

    wire: str

    def encode(self, value: T, name: str) -> bytes: ...
    def decode(self, reader: Reader, name: str) -> T: ...
    def packed(self, field: str, source: Source) -> list[str]: ...
    def unpacked(self, field: str, source: Source) -> None: ...


class Uint:
    """Unsigned big-endian integer of `width` bytes."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.maximum = _largest(width)
        self.wire = f"u{8 * width}"

    def encode(self, value: int, name: str) -> bytes:
        if not 0 <= value <= self.maximum:
            raise LocalProtocolError(f"{name}: {value} is not between 0 and {self.maximum}")
        return value.to_bytes(self.width, "big")

    def decode(self, reader: Reader, name: str) -> int:
        return reader.uint(self.width, name)

    def packed(self, field: str, source: Source) -> list[str]:
        return [f"{field}.to_bytes({self.width})"]

    def unpacked(self, field: str, source: Source) -> None:
        number = source.use(int.from_bytes)
        source.line(f"{field} = {number}(_data[_at : (_at := _at + {self.width})])")


class LowByte(Uint):
    """The low 8 bits of an unsigned integer of any size: it cannot be read back."""

    def __init__(self) -> None:
        super().__init__(1)

    def encode(self, value: int, name: str) -> bytes:
        if value < 0:
            raise LocalProtocolError(f"{name}: {value} is negative")
        return super().encode(value & self.maximum, name)

    def packed(self, field: str, source: Source) -> list[str]:
        source.line(f"if {field} < 0: raise ValueError")
        return [f"({field} & {self.maximum}).to_bytes(1)"]


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

    def packed(self, field: str, source: Source) -> list[str]:
        source.line(f"if len({field}) != {self.length}: raise ValueError")
        return [field]

    def unpacked(self, field: str, source: Source) -> None:
        source.line(f"{field} = _data[_at : (_at := _at + {self.length})]")


class PrefixedBytes:
    """Raw bytes behind a length of `width` bytes."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.maximum = _largest(width)
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

    def packed(self, field: str, source: Source) -> list[str]:
        return [f"{source.use(prefixes(self.width))}[len({field})]", field]

    def unpacked(self, field: str, source: Source) -> None:
        source.take_prefixed(field, self.width)


class PrefixedText:
    """UTF-8 text behind a length of 2 bytes."""

    wire = "u16 length, UTF-8"

    def encode(self, value: str, name: str) -> bytes:
        return BYTES16.encode(to_utf8(value, name), name)

    def decode(self, reader: Reader, name: str) -> str:
        return from_utf8(BYTES16.decode(reader, name), name)

    def packed(self, field: str, source: Source) -> list[str]:
        source.line(f"{field} = {field}.encode()")
        return BYTES16.packed(field, source)

    def unpacked(self, field: str, source: Source) -> None:
        BYTES16.unpacked(field, source)
        source.line(f"{field} = {field}.decode()")


class OptionalText:
    """As `PrefixedText`; nothing at all is length 0, and length 0 is nothing."""

    wire = "u16 length, UTF-8; 0 = none"

    def encode(self, value: str | None, name: str) -> bytes:
        return TEXT16.encode(value or "", name)

    def decode(self, reader: Reader, name: str) -> str | None:
        return TEXT16.decode(reader, name) or None

    def packed(self, field: str, source: Source) -> list[str]:
        source.line(f"{field} = {field}.encode() if {field} else b''")
        return BYTES16.packed(field, source)

    def unpacked(self, field: str, source: Source) -> None:
        BYTES16.unpacked(field, source)
        source.line(f"{field} = {field}.decode() or None")


class Flag:
    """One byte, 0 or 1."""

    wire = "u8, 0 or 1"

    def encode(self, value: bool, name: str) -> bytes:
        return b"\x01" if value else b"\x00"

    def decode(self, reader: Reader, name: str) -> bool:
        return reader.uint(1, name) == 1

    def packed(self, field: str, source: Source) -> list[str]:
        return [f"(b'\\1' if {field} else b'\\0')"]

    def unpacked(self, field: str, source: Source) -> None:
        source.line(f"{field} = _data[_at] == 1")
        source.line("_at += 1")


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

    def packed(self, field: str, source: Source) -> list[str]:
        return [f"{source.use(self.encode)}({field}, {field!r})"]

    def unpacked(self, field: str, source: Source) -> None:
        source.expect_end()
        source.line(f"_reader = {source.use(Reader)}(_data, _at)")
        source.line(f"{field} = {source.use(self.decode)}(_reader, {field!r})")
        source.line("_at = _reader.offset")


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
LOW_BYTE = LowByte()
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


@dataclass(frozen=True, slots=True)
class _Plan:
    """A layout, ready for use.

    Attributes:
        pack: as `encode`, for the ordinary case.
        unpack: as `read`, for the ordinary case: from bytes and an offset to a message and the
            offset behind it.
    """

    prefix: bytes
    fields: tuple[tuple[str, Codec[Any]], ...]
    pack: Callable[[Any], bytes]
    unpack: Callable[[bytes, int], tuple[Any, int]]


@cache
def _plan(cls: type) -> _Plan:
    kind: int | None = getattr(cls, "TYPE", None)
    prefix = b"" if kind is None else U16.encode(kind, "type")
    fields = tuple(layout(cls).items())
    return _Plan(prefix, fields, _packer(prefix, fields), _unpacker(cls, prefix, fields))


def _packer(prefix: bytes, fields: tuple[tuple[str, Codec[Any]], ...]) -> Callable[[Any], bytes]:
    source = Source()
    parts = [repr(prefix)]
    for name, codec in fields:
        source.line(f"{name} = _message.{name}")
        parts += codec.packed(name, source)
    source.line(f"return b''.join(({', '.join(parts)},))")
    return source.function("_message")


def _unpacker(
    cls: type, prefix: bytes, fields: tuple[tuple[str, Codec[Any]], ...]
) -> Callable[[bytes, int], tuple[Any, int]]:
    source = Source()
    if prefix:
        source.line(f"if _data[_at : (_at := _at + 2)] != {prefix!r}: raise ValueError")
    for name, codec in fields:
        codec.unpacked(name, source)
    source.expect_end()
    arguments = ", ".join(f"{name}={name}" for name, _ in fields)
    source.line(f"return {source.use(cls)}({arguments}), _at")
    return source.function("_data, _at")


def encode(message: Message) -> bytes:
    """The bytes of `message`.

    Raises:
        LocalProtocolError: a field does not fit its place on the wire.
    """
    plan = _plan(type(message))
    try:
        return plan.pack(message)
    except ODD:
        return _encode(message, plan)


def _encode(message: Message, plan: _Plan) -> bytes:
    parts = [plan.prefix]
    for name, codec in plan.fields:
        parts.append(codec.encode(getattr(message, name), name))
    return b"".join(parts)


def read(cls: type[M], reader: Reader) -> M:
    """Takes one `cls` from `reader`.

    Raises:
        Incomplete: the bytes end early.
        RemoteProtocolError: the bytes are not such a message.
    """
    plan = _plan(cast("type", cls))
    if type(reader.data) is bytes:
        try:
            message, reader.offset = plan.unpack(reader.data, reader.offset)
        except ODD:
            return _read(cls, plan, reader)
        return cast("M", message)
    return _read(cls, plan, reader)


def _read(cls: type[M], plan: _Plan, reader: Reader) -> M:
    prefix = plan.prefix
    if prefix and (kind := reader.take(2, "type")) != prefix:
        raise RemoteProtocolError(
            f"type {int.from_bytes(kind, 'big')} where {int.from_bytes(prefix, 'big')}"
            f" ({cls.__name__}) was expected"
        )
    return cls(**{name: codec.decode(reader, name) for name, codec in plan.fields})


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
