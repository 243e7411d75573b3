"""What is signed for each operation (one table), and the three ways to sign.

An authenticator is anything with two methods: `authorize` makes the authorization value that
travels with a message, `check` judges one that arrived. `Nothing`, `Token` and `Hmac` are such
objects; users may plug in their own (docs/topics/protocol.md, "Authorization").
"""

from __future__ import annotations

import base64
import binascii
import hmac
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from lonelypsp.errors import AuthResult, LocalProtocolError
from lonelypsp.replay import Remembers, ReplayGuard, Verdict
from lonelypsp.wire import (
    BYTES8,
    BYTES16,
    FLAG,
    OPTIONAL_TEXT16,
    SHA512,
    TEXT16,
    U8,
    U16,
    U32,
    U64,
    Codec,
    to_utf8,
)

TOKEN_LIFETIME = 120.0
SECRET_LENGTH = 64

Fields = Mapping[str, Any]


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
    """

    name: str
    code: int
    direction: Direction
    layout: tuple[tuple[str, Codec[Any]], ...]
    single_use: bool


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
        _operation(7, "STATEFUL_CONTINUE_RECEIVE", _UP, _IDENTIFIER, ("part_id", U8), _URL),
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
        fields: a value for `tracing` and for each field of the operation's layout.
        timestamp: whole seconds since the epoch.
        nonce: the text of the value's nonce.

    Raises:
        LocalProtocolError: a value does not fit its place.
    """
    row = OPERATIONS[operation]
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
    """Signs the messages of one direction, or judges them."""

    def authorize(self, operation: str, fields: Fields, now: float) -> str | None:
        """The authorization value for a message; None: it travels without one.

        Args:
            operation: a name of `OPERATIONS`.
            fields: `tracing` and the operation's fields, as they are sent.
            now: seconds since the epoch.
        """
        ...

    def check(
        self, operation: str, fields: Fields, authorization: str | None, now: float
    ) -> AuthResult:
        """Judges `authorization`, the value that came with a message of these fields."""
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


class Token:
    """A shared text in every message. Only over TLS: whoever sees one message can send any.

    Raises:
        LocalProtocolError: the token is empty or not made of visible ASCII characters.
    """

    def __init__(self, token: str) -> None:
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise LocalProtocolError(
                "a token must be one or more visible ASCII characters;"
                " write a new secret with `lonelypss setup`"
            )
        self._value = f"Bearer {token}"

    def authorize(self, operation: str, fields: Fields, now: float) -> str | None:
        return self._value

    def check(
        self, operation: str, fields: Fields, authorization: str | None, now: float
    ) -> AuthResult:
        if authorization is None:
            return AuthResult.UNAUTHORIZED
        return AuthResult.OK if _same(authorization, self._value) else AuthResult.FORBIDDEN

    def __repr__(self) -> str:
        return "Token(***)"


# one spelling per value: the time without leading zeros; the code is compared as text below
_HMAC_VALUE = re.compile(
    r"X-HMAC (0|[1-9][0-9]{0,11}):([A-Za-z0-9_-]{1,255}):([A-Za-z0-9+/]{86}==)"
)


class Hmac:
    """HMAC-SHA-512 over the operation, its fields, the time and a nonce.

    Args:
        secrets: keys of 64 bytes. The first, the newest, signs; all of them verify, so that keys
            rotate without downtime.
        replay: remembers values that were accepted, so that each is accepted once.
        token_lifetime: seconds by which the signer's clock may differ from ours, either way.

    Raises:
        LocalProtocolError: there is no key, or one is not 64 bytes long.
    """

    def __init__(
        self,
        secrets: bytes | Sequence[bytes],
        *,
        replay: Remembers | None = None,
        token_lifetime: float = TOKEN_LIFETIME,
    ) -> None:
        self._secrets = [secrets] if isinstance(secrets, bytes) else list(secrets)
        if not self._secrets or any(len(s) != SECRET_LENGTH for s in self._secrets):
            raise LocalProtocolError(f"hmac needs at least one key, each of {SECRET_LENGTH} bytes")
        self._lifetime = token_lifetime
        self._replay = ReplayGuard() if replay is None else replay

    def authorize(self, operation: str, fields: Fields, now: float) -> str | None:
        timestamp = int(now)
        nonce = _nonces()
        message = to_sign(operation, fields, timestamp, nonce)
        return f"X-HMAC {timestamp}:{nonce}:{_code(self._secrets[0], message)}"

    def check(
        self, operation: str, fields: Fields, authorization: str | None, now: float
    ) -> AuthResult:
        if authorization is None:
            return AuthResult.UNAUTHORIZED
        value = _HMAC_VALUE.fullmatch(authorization)
        if value is None:
            return AuthResult.FORBIDDEN
        timestamp, nonce, code = int(value[1]), value[2], value[3]
        if abs(now - timestamp) > self._lifetime:
            return AuthResult.FORBIDDEN
        try:
            message = to_sign(operation, fields, timestamp, nonce)
        except LocalProtocolError:
            return AuthResult.FORBIDDEN  # values that no signer can have signed
        if not any(_same(code, _code(secret, message)) for secret in self._secrets):
            return AuthResult.FORBIDDEN
        if not OPERATIONS[operation].single_use:
            return AuthResult.OK
        # the last moment at which the clock check above would let this value pass again
        expires = timestamp + self._lifetime
        verdict = self._replay.mark(base64.b64decode(code), timestamp, expires, now)
        return _VERDICTS[verdict]

    def __repr__(self) -> str:
        return f"Hmac(<{len(self._secrets)} keys>)"


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

_VERDICTS = {
    Verdict.NEW: AuthResult.OK,
    Verdict.USED: AuthResult.FORBIDDEN,
    Verdict.UNKNOWN: AuthResult.UNAVAILABLE,
}


def _code(secret: bytes, message: bytes) -> str:
    digest = hmac.digest(secret, message, "sha512")
    return binascii.b2a_base64(digest, newline=False).decode("ascii")


def _same(received: str, expected: str) -> bool:
    # bytes because compare_digest refuses text that is not ASCII; surrogates come from raw headers
    return hmac.compare_digest(received.encode("utf-8", "surrogatepass"), expected.encode())


@dataclass(frozen=True, slots=True)
class AuthConfig:
    """One authenticator per direction; both peers must be given the same.

    Attributes:
        to_broadcaster: for what subscribers send: requests, and the answers of their endpoints.
        to_subscriber: for what broadcasters send: messages, notices, and their answers.
    """

    to_broadcaster: Authenticator
    to_subscriber: Authenticator
