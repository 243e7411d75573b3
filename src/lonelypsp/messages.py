"""Every websocket message, as a layout (docs/topics/protocol.md, "Websocket messages").

A message is one binary websocket frame: two bytes of flags, two bytes of type, the headers, and
for some types a body, which is whatever follows. Headers travel in one of two forms, and bit 0 of
the flags says in which: minimal, values only, in the order of the fields below; or expanded, each
with its name, in any order. One table serves both: a field's annotation holds the header's name
and the codec of its value.

A field has the name of what is signed for it, so that a message's own fields are those to sign as
`OPERATION` of `lonelypsp.signing.OPERATIONS` (with the connection url where that asks for one).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    ClassVar,
    TypeAlias,
    TypeVar,
    cast,
    dataclass_transform,
)

from lonelypsp import headers as h
from lonelypsp.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from lonelypsp.signing import OPERATIONS
from lonelypsp.wire import ODD, Reader, Source, layout

Buffer: TypeAlias = bytes | memoryview

MINIMAL = 1
_START = 1024
"""Bytes of a view that are copied to look for the headers of the ordinary case."""
UNLIMITED = (1 << 64) - 1
"""The `max_size` of a compressor that takes bodies of any size."""


class Message:
    """What `encode` takes and `decode_from_...` gives.

    Attributes:
        TYPE: the number of the type; each direction has its own.
        OPERATION: what the message is signed as.
        HEADERS: field name -> header, in the order of the minimal form.
        BODY: name of the field that holds what follows the headers.
    """

    __slots__ = ()
    TYPE: ClassVar[int]
    OPERATION: ClassVar[str]
    HEADERS: ClassVar[Mapping[str, h.Header[Any]]]
    BODY: ClassVar[str | None]
    _pack: ClassVar[Callable[[Any], bytes]]
    """As `encode_head` in minimal form, for the ordinary case (`lonelypsp.wire`)."""
    _signed: ClassVar[Callable[[Any], dict[str, Any]]]

    def signed(self) -> dict[str, Any]:
        """A new mapping of the fields that are signed, as far as the message carries them. It never
        carries a recovery url; over websockets there is none."""
        return self._signed()

    def check(self, error: type[ProtocolError]) -> None:
        """Raises `error` for what no field can tell alone."""


M = TypeVar("M", bound=Message)
Classes: TypeAlias = dict[int, list[type[Message]]]
"""Type -> class. A type of two classes is a stream: its start, then its later parts."""
Unpackers: TypeAlias = dict[bytes, Callable[[bytes, Buffer], Message]]
"""The first four bytes of a frame in minimal form -> what decodes the ordinary case of it.

It takes the first bytes of the frame, of which the headers must be part, and the whole frame.
"""

FROM_SUBSCRIBER: Classes = {}
FROM_BROADCASTER: Classes = {}
_UNPACK_FROM_SUBSCRIBER: Unpackers = {}
_UNPACK_FROM_BROADCASTER: Unpackers = {}


def _prefix(kind: int) -> bytes:
    return _u16(MINIMAL) + _u16(kind)


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


def _packer(cls: type[Message]) -> Callable[[Any], bytes]:
    source = Source()
    if "compressed_length" in cls.HEADERS:
        source.line(f"_message.check({source.use(LocalProtocolError)})")
    parts = [repr(_prefix(cls.TYPE))]
    for name, header in cls.HEADERS.items():
        source.line(f"{name} = _message.{name}")
        parts += header.packed(name, source)
    source.line(f"return b''.join(({', '.join(parts)}))")
    return source.function("_message")


def _signer(cls: type[Message]) -> Callable[[Any], dict[str, Any]]:
    source = Source()
    layout = dict.fromkeys(("tracing", *(name for name, _ in OPERATIONS[cls.OPERATION].layout)))
    fields = [f"{name!r}: _message.{name}" for name in layout if name in cls.HEADERS]
    fields += ["'recovery': None"] if "recovery" in layout else []
    source.line(f"return {{{', '.join(fields)}}}")
    return source.function("_message")


def _unpacker(classes: list[type[Message]]) -> Callable[[bytes, Buffer], Message]:
    *starts, cls = classes
    source = Source()
    source.line("_at = 4")
    for name, header in cls.HEADERS.items():
        header.unpacked(name, source)
    for start in starts:  # the headers read so far are the first of the start
        source.line("if part_id == 0:")
        source.indent += 1
        for name, header in start.HEADERS.items():
            if name not in cls.HEADERS:
                header.unpacked(name, source)
        _unpacked(start, source)
        source.indent -= 1
    _unpacked(cls, source)
    return source.function("_data, _frame")


def _unpacked(cls: type[Message], source: Source) -> None:
    """Makes the message; field by field, since `__init__` takes longer."""
    source.expect_end()
    source.line(f"_message = {source.use(object.__new__)}({source.use(cls)})")
    for name in cls.HEADERS:
        source.line(f"_message.{name} = {name}")
    if cls.BODY is not None:
        source.line(f"_message.{cls.BODY} = memoryview(_frame)[_at:]")
    if "compressed_length" in cls.HEADERS:
        source.line(f"_message.check({source.use(RemoteProtocolError)})")
    source.line("return _message")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _message(plain: type[M]) -> type[M]:
    # Frozen to the type checker alone: at run time a frozen dataclass sets each field through
    # object.__setattr__, which would make a message twice as dear.
    return dataclass(slots=True, kw_only=True, unsafe_hash=True)(plain)


def _registered(
    classes: Classes, unpackers: Unpackers, kind: int, operation: str
) -> Callable[[type[M]], type[M]]:
    def register(plain: type[M]) -> type[M]:
        cls = _message(plain)
        fields: Mapping[str, Any] = layout(cast("type", cls))
        cls.TYPE, cls.OPERATION = kind, operation
        cls.HEADERS = {name: header for name, header in fields.items() if header is not h.BODY}
        cls.BODY = next((name for name, header in fields.items() if header is h.BODY), None)
        cls._pack = _packer(cls)
        cls._signed = _signer(cls)
        classes.setdefault(kind, []).append(cls)
        unpackers[_prefix(kind)] = _unpacker(classes[kind])
        return cls

    return register


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _from_subscriber(kind: int, operation: str) -> Callable[[type[M]], type[M]]:
    return _registered(FROM_SUBSCRIBER, _UNPACK_FROM_SUBSCRIBER, kind, operation)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _from_broadcaster(kind: int, operation: str) -> Callable[[type[M]], type[M]]:
    return _registered(FROM_BROADCASTER, _UNPACK_FROM_BROADCASTER, kind, operation)


def _check_lengths(message: StreamStart | Notify, error: type[ProtocolError]) -> None:
    if message.compressor == 0 and message.compressed_length != message.decompressed_length:
        raise error("an uncompressed body has one length, two differing ones are given")


# both directions: a body that travels in parts
@_message
class StreamStart(Message):
    """Part 0: the first slice of a body, and what is to be known about the whole of it."""

    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""
    identifier: Annotated[bytes, h.IDENTIFIER]
    part_id: Annotated[int, h.FIRST_PART_ID] = 0
    topic: Annotated[bytes, h.TOPIC]
    compressor: Annotated[int, h.COMPRESSOR] = 0
    compressed_length: Annotated[int, h.COMPRESSED_LENGTH]
    decompressed_length: Annotated[int, h.DECOMPRESSED_LENGTH]
    sha512: Annotated[bytes, h.COMPRESSED_SHA512]
    body: Annotated[Buffer, h.BODY]

    def check(self, error: type[ProtocolError]) -> None:
        _check_lengths(self, error)


@_message
class StreamPart(Message):
    """Part 1 and later: the next slice."""

    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""
    identifier: Annotated[bytes, h.IDENTIFIER]
    part_id: Annotated[int, h.LATER_PART_ID]
    body: Annotated[Buffer, h.BODY]


# from a subscriber
@_from_subscriber(1, "STATEFUL_CONFIGURE")
class Configure(Message):
    subscriber_nonce: Annotated[bytes, h.SUBSCRIBER_NONCE]
    enable_zstd: Annotated[bool, h.ENABLE_ZSTD]
    enable_training: Annotated[bool, h.ENABLE_TRAINING]
    initial_dict: Annotated[int, h.INITIAL_DICT] = 0
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""


@_from_subscriber(2, "SUBSCRIBE_EXACT")
class SubscribeExact(Message):
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""
    topic: Annotated[bytes, h.TOPIC]


@_from_subscriber(3, "SUBSCRIBE_GLOB")
class SubscribeGlob(Message):
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""
    glob: Annotated[str, h.GLOB]


@_from_subscriber(4, "SUBSCRIBE_EXACT")
class UnsubscribeExact(Message):
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""
    topic: Annotated[bytes, h.TOPIC]


@_from_subscriber(5, "SUBSCRIBE_GLOB")
class UnsubscribeGlob(Message):
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""
    glob: Annotated[str, h.GLOB]


@_from_subscriber(6, "NOTIFY")
class Notify(Message):
    """A whole message in one frame. `sha512` is of `body`, as it is sent."""

    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""
    identifier: Annotated[bytes, h.IDENTIFIER]
    topic: Annotated[bytes, h.TOPIC]
    compressor: Annotated[int, h.COMPRESSOR] = 0
    compressed_length: Annotated[int, h.COMPRESSED_LENGTH]
    decompressed_length: Annotated[int, h.DECOMPRESSED_LENGTH]
    sha512: Annotated[bytes, h.COMPRESSED_SHA512]
    body: Annotated[Buffer, h.BODY]

    def check(self, error: type[ProtocolError]) -> None:
        _check_lengths(self, error)
        if self.compressed_length != len(self.body):
            raise error(
                f"x-compressed-length is {self.compressed_length:,},"
                f" the body has {len(self.body):,} bytes"
            )
        # the sender's own hash is taken on trust
        if error is RemoteProtocolError and hashlib.sha512(self.body).digest() != self.sha512:
            raise error("the body does not have the SHA-512 that came with it")


@_from_subscriber(7, "NOTIFY")
class NotifyStreamStart(StreamStart): ...


@_from_subscriber(7, "NOTIFY")
class NotifyStreamPart(StreamPart):
    """Signed with topic, tracing and hash of the start, and with an authorization of its own."""


@_from_subscriber(8, "STATEFUL_CONTINUE_RECEIVE")
class ContinueReceive(Message):
    identifier: Annotated[bytes, h.IDENTIFIER]
    part_id: Annotated[int, h.PART_ID]
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""


@_from_subscriber(9, "CONFIRM_RECEIVE")
class ConfirmReceive(Message):
    identifier: Annotated[bytes, h.IDENTIFIER]
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""
    num_subscribers: Annotated[int, h.NUM_SUBSCRIBERS] = 1


# from a broadcaster
@_from_broadcaster(1, "STATEFUL_CONFIRM_CONFIGURE")
class ConfirmConfigure(Message):
    broadcaster_nonce: Annotated[bytes, h.BROADCASTER_NONCE]
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""


@_from_broadcaster(2, "CONFIRM_SUBSCRIBE_EXACT")
class ConfirmSubscribeExact(Message):
    topic: Annotated[bytes, h.TOPIC]
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""


@_from_broadcaster(3, "CONFIRM_SUBSCRIBE_GLOB")
class ConfirmSubscribeGlob(Message):
    glob: Annotated[str, h.GLOB]
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""


@_from_broadcaster(4, "CONFIRM_SUBSCRIBE_EXACT")
class ConfirmUnsubscribeExact(Message):
    topic: Annotated[bytes, h.TOPIC]
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""


@_from_broadcaster(5, "CONFIRM_SUBSCRIBE_GLOB")
class ConfirmUnsubscribeGlob(Message):
    glob: Annotated[str, h.GLOB]
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""


@_from_broadcaster(6, "CONFIRM_NOTIFY")
class ConfirmNotify(Message):
    identifier: Annotated[bytes, h.IDENTIFIER]
    subscribers: Annotated[int, h.SUBSCRIBERS]
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""


@_from_broadcaster(7, "STATEFUL_CONTINUE_NOTIFY")
class ContinueNotify(Message):
    identifier: Annotated[bytes, h.IDENTIFIER]
    part_id: Annotated[int, h.PART_ID]
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""


@_from_broadcaster(8, "RECEIVE")
class ReceiveStreamStart(StreamStart): ...


@_from_broadcaster(8, "RECEIVE")
class ReceiveStreamPart(StreamPart): ...


@_from_broadcaster(9, "STATEFUL_ENABLE_ZSTD_PRESET")
class EnableZstdPreset(Message):
    """From now on bodies of `min_size <= length < max_size` are best compressed this way."""

    compressor: Annotated[int, h.COMPRESSOR_ID]
    level: Annotated[int, h.COMPRESSION_LEVEL]
    min_size: Annotated[int, h.MIN_SIZE]
    max_size: Annotated[int, h.MAX_SIZE] = UNLIMITED
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""


@_from_broadcaster(10, "STATEFUL_ENABLE_ZSTD_CUSTOM")
class EnableZstdCustom(Message):
    """`sha512` is signed instead of the dictionary: a receiver must compare the two."""

    compressor: Annotated[int, h.COMPRESSOR_ID]
    level: Annotated[int, h.COMPRESSION_LEVEL]
    min_size: Annotated[int, h.MIN_SIZE]
    max_size: Annotated[int, h.MAX_SIZE] = UNLIMITED
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""
    sha512: Annotated[bytes, h.DICTIONARY_SHA512]
    dictionary: Annotated[Buffer, h.BODY]


@_from_broadcaster(11, "STATEFUL_DISABLE_ZSTD_CUSTOM")
class DisableZstdCustom(Message):
    compressor: Annotated[int, h.COMPRESSOR_ID]
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""


@_from_broadcaster(12, "MISSED")
class Missed(Message):
    authorization: Annotated[str | None, h.AUTHORIZATION] = None
    tracing: Annotated[bytes, h.TRACING] = b""
    topic: Annotated[bytes, h.TOPIC]


def encode(message: Message, *, minimal: bool) -> bytes:
    """The frame of `message`.

    Raises:
        LocalProtocolError: a field does not fit its place on the wire, or contradicts another.
    """
    head = encode_head(message, minimal=minimal)
    return head if message.BODY is None else b"".join((head, getattr(message, message.BODY)))


def encode_head(message: Message, *, minimal: bool) -> bytes:
    """As `encode`, without the body."""
    if minimal:
        try:
            return message._pack()
        except ODD:
            return _encode_head(message, minimal)
    return _encode_head(message, minimal)


class Unsigned:
    """The head in minimal form of a message that goes to many, each with its own authorization.

    Args:
        message: one whose first header is the authorization, which it lacks.

    Raises:
        LocalProtocolError: as of `encode`.
    """

    __slots__ = ("_behind", "_start", "_unsigned")

    def __init__(self, message: Message) -> None:
        head = encode_head(message, minimal=True)
        self._unsigned = head
        self._start, self._behind = head[:4], head[6:]

    def frame(self, authorization: str | None, body: Buffer) -> bytes:
        if not authorization:
            return b"".join((self._unsigned, body))
        try:
            value = authorization.encode()
            length = _u16(len(value))
        except (UnicodeError, OverflowError):
            h.AUTHORIZATION.encode(authorization)  # says what is wrong
            raise
        return b"".join((self._start, length, value, self._behind, body))


def _encode_head(message: Message, minimal: bool) -> bytes:
    message.check(LocalProtocolError)
    parts = [_u16(MINIMAL if minimal else 0), _u16(message.TYPE)]
    if not minimal:
        parts.append(_u16(len(message.HEADERS)))
    for field, header in message.HEADERS.items():
        value = header.encode(getattr(message, field))
        if not minimal:
            parts += (_u16(len(header.name)), header.name.encode("ascii"))
        parts += (_u16(len(value)), value)
    return b"".join(parts)


def _decoder(known: Classes, unpackers: Unpackers) -> Callable[[Buffer], Message]:
    def decode(data: Buffer) -> Message:
        start = data if type(data) is bytes else bytes(data[:_START])
        unpack = unpackers.get(start[:4])
        if unpack is not None:
            try:
                return unpack(start, data)
            except ODD:
                return _walk(data, known)
        return _walk(data, known)

    return decode


decode_from_subscriber = _decoder(FROM_SUBSCRIBER, _UNPACK_FROM_SUBSCRIBER)
"""The message in a frame that a subscriber sent. Its body is a view of the frame, not a copy.

Raises:
    RemoteProtocolError: the bytes are not such a message.
"""

decode_from_broadcaster = _decoder(FROM_BROADCASTER, _UNPACK_FROM_BROADCASTER)
"""As `decode_from_subscriber`, for a frame that a broadcaster sent."""


def _walk(data: Buffer, known: Classes) -> Message:
    reader = Reader(data)
    flags, kind = reader.uint(2, "flags"), reader.uint(2, "type")
    classes = known.get(kind)
    if classes is None:
        raise RemoteProtocolError(f"no message has the type {kind}")
    value_of = _minimal(reader) if flags & MINIMAL else _expanded(reader)
    *starts, cls = classes
    fields = {name: header.decode(value_of(header)) for name, header in cls.HEADERS.items()}
    if starts and fields["part_id"] == 0:  # the headers read so far are the first of the start
        cls = starts[0]
        for name, header in cls.HEADERS.items():
            if name not in fields:
                fields[name] = header.decode(value_of(header))
    if cls.BODY is not None:
        fields[cls.BODY] = memoryview(data)[reader.offset :]
    message = cls(**fields)
    message.check(RemoteProtocolError)
    return message


def _minimal(reader: Reader) -> Callable[[h.Header[Any]], bytes]:
    """Reads the values as they are asked for, which must be in their order."""

    def value_of(header: h.Header[Any]) -> bytes:
        return reader.take(reader.uint(2, f"length of {header.name}"), header.name)

    return value_of


def _expanded(reader: Reader) -> Callable[[h.Header[Any]], bytes]:
    """Reads all headers; of those with the same name the last one counts."""
    values: dict[bytes, bytes] = {}
    for _ in range(reader.uint(2, "number of headers")):
        name = reader.take(reader.uint(2, "length of a header name"), "header name").lower()
        if not name.isascii():
            raise RemoteProtocolError("a header name is not ASCII")
        values[name] = reader.take(reader.uint(2, "length of a header value"), "header value")

    def value_of(header: h.Header[Any]) -> bytes:
        value = values.get(header.name.encode("ascii"), header.missing)
        if value is None:
            raise RemoteProtocolError(f"{header.name} is missing")
        return value

    return value_of
