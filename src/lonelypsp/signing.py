"""What is signed for each operation (one table), and the three ways to sign.

An authenticator is anything with two methods: `authorize` makes the authorization value that
travels with a message, `check` judges one that arrived. `Nothing`, `Token` and `Hmac` are such
objects; users may plug in their own (docs/topics/protocol.md, "Authorization").
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from lonelypsp.errors import AuthResult, LocalProtocolError
from lonelypsp.replay import (
    NOT_SHARED,
    Remembers,
    ReplayGuard,
    Shared,
    Verdict,
)
from lonelypsp.rights import Rights
from lonelypsp.wire import (
    BYTES8,
    BYTES16,
    FLAG,
    LOW_BYTE,
    ODD,
    OPTIONAL_TEXT16,
    SHA512,
    TEXT16,
    U8,
    U16,
    U32,
    U64,
    Codec,
    Source,
    to_utf8,
)

TOKEN_LIFETIME = 120.0
SECRET_LENGTH = 64
_SHA512_BLOCK = 128

Fields = Mapping[str, Any]
DEFAULT_KEY = "default"


class Direction(Enum):
    """Which of the two secrets signs an operation."""

    TO_BROADCASTER = "to-broadcaster"
    TO_SUBSCRIBER = "to-subscriber"


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the table.

    Attributes:
        code: the number at the front of what is signed; it keeps operations apart.
        layout: field name and codec, in the order in which they are signed.
        single_use: whether a valid value must be remembered, so that it is accepted once. Not
            needed where the signed fields hold a random identifier that the verifier chose for
            this very exchange.
        pack: as `to_sign`, from fields, timestamp and nonce, for the ordinary case
            (`lonelypsp.wire`).
    """

    name: str
    code: int
    direction: Direction
    layout: tuple[tuple[str, Codec[Any]], ...]
    single_use: bool
    pack: Callable[[Fields, int, str], bytes] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pack", _packer(self.code, self.layout))


def _packer(
    code: int, layout: tuple[tuple[str, Codec[Any]], ...]
) -> Callable[[Fields, int, str], bytes]:
    source = Source()
    source.line("_nonce = _nonce.encode()")
    parts = [repr(bytes([code])), "_timestamp.to_bytes(8)", *BYTES8.packed("_nonce", source)]
    for name, codec in (("tracing", BYTES16), *layout):
        source.line(f"{name} = _fields[{name!r}]")
        parts += codec.packed(name, source)
    source.line(f"return b''.join(({', '.join(parts)}))")
    return source.function("_fields, _timestamp, _nonce")


def _operation(
    code: int,
    name: str,
    direction: Direction,
    *layout: tuple[str, Codec[Any]],
    single_use: bool = True,
) -> tuple[str, Operation]:
    return name, Operation(name, code, direction, layout, single_use)


_UP, _DOWN = Direction.TO_BROADCASTER, Direction.TO_SUBSCRIBER
_URL = ("url", TEXT16)
_RECOVERY = ("recovery", OPTIONAL_TEXT16)
_TOPIC = ("topic", BYTES16)
_GLOB = ("glob", TEXT16)
_IDENTIFIER = ("identifier", BYTES8)
_SHA512 = ("sha512", SHA512)
_ETAG = (("etag_format", U8), ("etag", SHA512))
_ZSTD = (("compressor", U32), ("level", U32), ("min_size", U64), ("max_size", U64))

OPERATIONS: Mapping[str, Operation] = dict(
    [
        _operation(1, "SUBSCRIBE_EXACT", _UP, _URL, _RECOVERY, _TOPIC),
        _operation(2, "SUBSCRIBE_GLOB", _UP, _URL, _RECOVERY, _GLOB),
        _operation(3, "NOTIFY", _UP, _TOPIC, _IDENTIFIER, _SHA512),
        _operation(
            4,
            "STATEFUL_CONFIGURE",
            _UP,
            ("subscriber_nonce", BYTES8),
            ("enable_zstd", FLAG),
            ("enable_training", FLAG),
            ("initial_dict", U16),
        ),
        _operation(5, "CHECK_SUBSCRIPTIONS", _UP, _URL),
        _operation(6, "SET_SUBSCRIPTIONS", _UP, _URL, *_ETAG),
        # The low 8 bits of the part: older peers refuse to sign part 256 and later ones, and lose
        # the connection there; this way all others are signed as by them. That part 0 and part 256
        # are signed alike does no harm: the url has a counter in it, another one in each message.
        _operation(7, "STATEFUL_CONTINUE_RECEIVE", _UP, _IDENTIFIER, ("part_id", LOW_BYTE), _URL),
        _operation(
            8,
            "CONFIRM_RECEIVE",
            _UP,
            _IDENTIFIER,
            ("num_subscribers", U32),
            _URL,
            single_use=False,
        ),
        _operation(9, "CONFIRM_MISSED", _UP, _TOPIC, _URL),
        _operation(10, "RECEIVE", _DOWN, _URL, _TOPIC, _IDENTIFIER, _SHA512),
        _operation(11, "MISSED", _DOWN, ("recovery", TEXT16), _TOPIC),
        _operation(12, "CONFIRM_SUBSCRIBE_EXACT", _DOWN, _URL, _RECOVERY, _TOPIC),
        _operation(13, "CONFIRM_SUBSCRIBE_GLOB", _DOWN, _URL, _RECOVERY, _GLOB),
        _operation(
            14,
            "CONFIRM_NOTIFY",
            _DOWN,
            _IDENTIFIER,
            ("subscribers", U32),
            _TOPIC,
            _SHA512,
            single_use=False,
        ),
        _operation(15, "CHECK_SUBSCRIPTIONS_RESPONSE", _DOWN, *_ETAG),
        _operation(16, "SET_SUBSCRIPTIONS_RESPONSE", _DOWN, *_ETAG),
        _operation(17, "STATEFUL_CONFIRM_CONFIGURE", _DOWN, ("broadcaster_nonce", BYTES8)),
        _operation(18, "STATEFUL_ENABLE_ZSTD_PRESET", _DOWN, _URL, *_ZSTD),
        _operation(19, "STATEFUL_ENABLE_ZSTD_CUSTOM", _DOWN, _URL, *_ZSTD, _SHA512),
        _operation(20, "STATEFUL_DISABLE_ZSTD_CUSTOM", _DOWN, ("compressor", U32), _URL),
        _operation(21, "STATEFUL_CONTINUE_NOTIFY", _DOWN, _IDENTIFIER, ("part_id", U32)),
    ]
)


def to_sign(operation: str, fields: Fields, timestamp: int, nonce: str) -> bytes:
    """The exact bytes over which an hmac is taken.

    Args:
        operation: a name of `OPERATIONS`.
        fields: a value for `tracing` and for each field of the operation's layout, and any others.
        timestamp: whole seconds since the epoch.
        nonce: the text of the value's nonce.

    Raises:
        LocalProtocolError: a value does not fit its place.
    """
    row = OPERATIONS[operation]
    try:
        return row.pack(fields, timestamp, nonce)
    except ODD:
        return _to_sign(row, fields, timestamp, nonce)


def _to_sign(row: Operation, fields: Fields, timestamp: int, nonce: str) -> bytes:
    parts = [
        row.code.to_bytes(1, "big"),
        U64.encode(timestamp, "timestamp"),
        BYTES8.encode(to_utf8(nonce, "nonce"), "nonce"),
        BYTES16.encode(fields["tracing"], "tracing"),
    ]
    for name, codec in row.layout:
        parts.append(codec.encode(fields[name], name))
    return b"".join(parts)


class Authenticator(Protocol):
    """Signs the messages of one direction, or judges them.

    `fields` holds a value for `tracing` and for each field of the operation's layout. It may hold
    more, as what a connection knows about a message is given whole; an authenticator reads those
    that it needs, must leave the mapping as it is and must not keep it.
    """

    def authorize(self, operation: str, fields: Fields, now: float) -> str | None:
        """The authorization value for a message; None: it travels without one.

        Args:
            operation: a name of `OPERATIONS`.
            fields: `tracing` and the operation's fields, as they are sent, and any others.
            now: seconds since the epoch.
        """
        ...

    def check(
        self, operation: str, fields: Fields, authorization: str | None, now: float
    ) -> AuthResult:
        """Judges `authorization`, the value that came with a message of these fields.

        A request to set subscriptions has a field more, `listed`: a function that gives its exact
        topics and globs, each with its recovery url. Call it only once all else is right.

        Raises:
            RemoteProtocolError: with status 403, instead of FORBIDDEN, to say why.
        """
        ...


class Nothing:
    """No authorization: sends none, accepts anything. For networks that are trusted as a whole."""

    def authorize(self, operation: str, fields: Fields, now: float) -> str | None:
        return None

    def check(
        self, operation: str, fields: Fields, authorization: str | None, now: float
    ) -> AuthResult:
        return AuthResult.OK

    def __repr__(self) -> str:
        return "Nothing()"


@dataclass(frozen=True, slots=True)
class Key:
    """One of several secrets of a direction.

    Attributes:
        secret: 64 bytes for `Hmac`, visible ASCII for `Token`.
        id: for messages and people; never sent.
        rights: what requests signed with it may do; None: everything.
    """

    secret: bytes = field(repr=False)
    id: str = DEFAULT_KEY
    rights: Rights | None = None


def _keys(given: bytes | Sequence[bytes | Key]) -> list[Key]:
    several = [given] if isinstance(given, bytes) else given
    return [key if isinstance(key, Key) else Key(key) for key in several]


class Token:
    """A shared text in every message. Only over TLS: whoever sees one message can send any.

    Args:
        tokens: one or several. The first is sent; all are accepted.

    Raises:
        LocalProtocolError: there is none, or one is empty or not made of visible ASCII characters.

    Attributes:
        shortest: length of the shortest.
    """

    def __init__(self, tokens: str | Sequence[Key]) -> None:
        keys = _keys(tokens.encode("utf-8", "surrogatepass") if isinstance(tokens, str) else tokens)
        if not keys or not all(re.fullmatch(rb"[\x21-\x7e]+", key.secret) for key in keys):
            raise LocalProtocolError(
                "a token must be one or more visible ASCII characters;"
                " write a new secret with `lonelypss setup`"
            )
        self._expected = [(key, b"Bearer " + key.secret) for key in keys]
        self._value = self._expected[0][1].decode("ascii")
        self.shortest = min(len(key.secret) for key in keys)

    def authorize(self, operation: str, fields: Fields, now: float) -> str | None:
        return self._value

    def check(
        self, operation: str, fields: Fields, authorization: str | None, now: float
    ) -> AuthResult:
        if authorization is None:
            return AuthResult.UNAUTHORIZED
        for key, expected in self._expected:
            if _same(authorization, expected):
                if key.rights is not None:
                    key.rights.judge(key.id, operation, fields)
                return AuthResult.OK
        return AuthResult.FORBIDDEN

    def __repr__(self) -> str:
        return f"Token({', '.join(key.id for key, _ in self._expected)})"


# one spelling per value: the time without leading zeros; the code behind it is compared as text
_HMAC_VALUE = re.compile(r"X-HMAC (0|[1-9][0-9]{0,11}):([A-Za-z0-9_-]{1,255}):")


class _Secret:
    """HMAC-SHA-512 under one key (RFC 2104), of which the part that is the same each time is done.

    `hmac.digest` takes twice as long: it begins anew, and sets up OpenSSL's own HMAC.
    """

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        padded = key.ljust(_SHA512_BLOCK, b"\0")
        self._inner = hashlib.sha512(bytes(byte ^ 0x36 for byte in padded))
        self._outer = hashlib.sha512(bytes(byte ^ 0x5C for byte in padded))

    def digest(self, message: bytes) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(message)
        outer.update(inner.digest())
        return outer.digest()


class Hmac:
    """HMAC-SHA-512 over the operation, its fields, the time and a nonce.

    Args:
        secrets: keys of 64 bytes. The first signs; all of them verify, so that keys rotate without
            downtime.
        replay: remembers values that were accepted, so that each is accepted once.
        token_lifetime: seconds by which the signer's clock may differ from ours, either way.

    Raises:
        LocalProtocolError: there is no key, or one is not 64 bytes long.
    """

    def __init__(
        self,
        secrets: bytes | Sequence[bytes | Key],
        *,
        replay: Remembers | None = None,
        token_lifetime: float = TOKEN_LIFETIME,
    ) -> None:
        keys = _keys(secrets)
        if not keys or any(len(key.secret) != SECRET_LENGTH for key in keys):
            raise LocalProtocolError(f"hmac needs at least one key, each of {SECRET_LENGTH} bytes")
        self._keys = [(key, _Secret(key.secret)) for key in keys]
        self._first = self._keys[0][1]
        self._lifetime = token_lifetime
        self._replay = ReplayGuard() if replay is None else replay

    def authorize(self, operation: str, fields: Fields, now: float) -> str | None:
        timestamp = int(now)
        nonce = _nonces()
        message = to_sign(operation, fields, timestamp, nonce)
        return f"X-HMAC {timestamp}:{nonce}:{_code(self._first, message)}"

    def check(
        self, operation: str, fields: Fields, authorization: str | None, now: float
    ) -> AuthResult:
        if authorization is None:
            return AuthResult.UNAUTHORIZED
        value = _HMAC_VALUE.match(authorization)
        if value is None:
            return AuthResult.FORBIDDEN
        timestamp, nonce, received = int(value[1]), value[2], authorization[value.end() :]
        if abs(now - timestamp) > self._lifetime:
            return AuthResult.FORBIDDEN
        try:
            message = to_sign(operation, fields, timestamp, nonce)
        except LocalProtocolError:
            return AuthResult.FORBIDDEN  # values that no signer can have signed
        for key, secret in self._keys:
            digest = secret.digest(message)
            if _same(received, _base64(digest)):
                if key.rights is not None:
                    key.rights.judge(key.id, operation, fields)
                break
        else:
            return AuthResult.FORBIDDEN
        if not OPERATIONS[operation].single_use:
            return AuthResult.OK
        # the last moment at which the clock check above would let this value pass again
        expires = timestamp + self._lifetime
        verdict = self._replay.mark(digest, timestamp, expires, now)
        if verdict is Verdict.NEW:
            return AuthResult.OK
        return AuthResult.FORBIDDEN if verdict is Verdict.USED else AuthResult.UNAVAILABLE

    def __repr__(self) -> str:
        return f"Hmac({', '.join(key.id for key, _ in self._keys)})"


class _Nonces:
    """Texts that never repeat: random per process, then counted. They need not be secret."""

    def __init__(self) -> None:
        self.reset()
        os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        self._prefix = base64.urlsafe_b64encode(os.urandom(9)).decode("ascii")
        self._numbers = itertools.count()

    def __call__(self) -> str:
        return f"{self._prefix}{next(self._numbers):x}"


_nonces = _Nonces()


def _code(secret: _Secret, message: bytes) -> str:
    return _base64(secret.digest(message)).decode("ascii")


def _base64(digest: bytes) -> bytes:
    return binascii.b2a_base64(digest, newline=False)


def _same(received: str, expected: bytes) -> bool:
    # bytes because compare_digest refuses text that is not ASCII; surrogates come from raw headers
    return hmac.compare_digest(received.encode("utf-8", "surrogatepass"), expected)


@dataclass(frozen=True, slots=True)
class AuthConfig:
    """One authenticator per direction; both peers must be given the same.

    Attributes:
        to_broadcaster: for what subscribers send: requests, and the answers of their endpoints.
        to_subscriber: for what broadcasters send: messages, notices, and their answers.
        shared: what a broadcaster must ask its database about whatever `to_broadcaster` accepts.
    """

    to_broadcaster: Authenticator
    to_subscriber: Authenticator
    shared: Shared = NOT_SHARED
