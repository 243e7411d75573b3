"""Every HTTP body, as a layout (docs/topics/protocol.md, "HTTP bodies").

`NotifyHead` and `ReceiveHead` are followed by exactly `length` bytes of message; all others are
whole bodies. `TYPE` is the two-byte number at the front of a response body; requests have none.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from lonelypsp.wire import (
    BYTES8,
    BYTES16,
    OPTIONAL_TEXT16,
    SHA512,
    TEXT16,
    U8,
    U32,
    U64,
    Message,
    Sorted,
)

ETAG_FORMAT = 0
UNSUBSCRIBE_IMMEDIATE = b"\x00\x0a"
"""The whole body by which a subscriber says that it does not know this subscription (any more)."""


def smallest_trace(received_ns: int, answered_ns: int) -> bytes:
    """Tracing of a notify response, without which the older HTTP client fails.

    One empty entry in its "simple" format: complete, 1 trace named `a`, the two times in
    nanoseconds since the epoch.
    """
    return struct.pack(
        ">BHH1sH2sdQQ", 0, 1, 1, b"a", 2, b"{}", received_ns / 10**9, received_ns, answered_ns
    )


# requests to a broadcaster
@dataclass(frozen=True, slots=True)
class SubscribeExact:
    TRAILING_IGNORED: ClassVar[bool] = True
    url: Annotated[str, TEXT16]
    topic: Annotated[bytes, BYTES16]
    recovery: Annotated[str | None, OPTIONAL_TEXT16]
    tracing: Annotated[bytes, BYTES16] = b""


@dataclass(frozen=True, slots=True)
class SubscribeGlob:
    TRAILING_IGNORED: ClassVar[bool] = True
    url: Annotated[str, TEXT16]
    glob: Annotated[str, TEXT16]
    recovery: Annotated[str | None, OPTIONAL_TEXT16]
    tracing: Annotated[bytes, BYTES16] = b""


@dataclass(frozen=True, slots=True)
class UnsubscribeExact:
    TRAILING_IGNORED: ClassVar[bool] = True
    url: Annotated[str, TEXT16]
    topic: Annotated[bytes, BYTES16]
    tracing: Annotated[bytes, BYTES16] = b""


@dataclass(frozen=True, slots=True)
class UnsubscribeGlob:
    TRAILING_IGNORED: ClassVar[bool] = True
    url: Annotated[str, TEXT16]
    glob: Annotated[str, TEXT16]
    tracing: Annotated[bytes, BYTES16] = b""


@dataclass(frozen=True, slots=True)
class CheckSubscriptions:
    TRAILING_IGNORED: ClassVar[bool] = True
    tracing: Annotated[bytes, BYTES16]
    url: Annotated[str, TEXT16]


@dataclass(frozen=True, slots=True)
class SetSubscriptionsHead:
    """What of `SetSubscriptions` is needed to check its authorization."""

    tracing: Annotated[bytes, BYTES16]
    url: Annotated[str, TEXT16]
    etag_format: Annotated[int, U8]
    etag: Annotated[bytes, SHA512]


@dataclass(frozen=True, slots=True)
class SetSubscriptions:
    TRAILING_IGNORED: ClassVar[bool] = True
    tracing: Annotated[bytes, BYTES16]
    url: Annotated[str, TEXT16]
    etag_format: Annotated[int, U8]
    etag: Annotated[bytes, SHA512]
    exact: Annotated[tuple[tuple[bytes, str | None], ...], Sorted(BYTES16)]
    globs: Annotated[tuple[tuple[str, str | None], ...], Sorted(TEXT16)]


@dataclass(frozen=True, slots=True)
class NotifyHead:
    topic: Annotated[bytes, BYTES16]
    sha512: Annotated[bytes, SHA512]
    tracing: Annotated[bytes, BYTES16]
    identifier: Annotated[bytes, BYTES8]
    length: Annotated[int, U64]


# requests to a subscriber
@dataclass(frozen=True, slots=True)
class ReceiveHead:
    tracing: Annotated[bytes, BYTES16]
    topic: Annotated[bytes, BYTES16]
    identifier: Annotated[bytes, BYTES8]
    length: Annotated[int, U64]


@dataclass(frozen=True, slots=True)
class Missed:
    TRAILING_IGNORED: ClassVar[bool] = True
    tracing: Annotated[bytes, BYTES16]
    topic: Annotated[bytes, BYTES16]


# responses of a broadcaster
@dataclass(frozen=True, slots=True)
class ResponseGeneric:
    TYPE: ClassVar[int] = 3
    authorization: Annotated[str | None, OPTIONAL_TEXT16]
    tracing: Annotated[bytes, BYTES16] = b""


@dataclass(frozen=True, slots=True)
class ResponseNotify:
    TYPE: ClassVar[int] = 4
    authorization: Annotated[str | None, OPTIONAL_TEXT16]
    tracing: Annotated[bytes, BYTES16]
    subscribers: Annotated[int, U32]
    identifier: Annotated[bytes, BYTES8]


@dataclass(frozen=True, slots=True)
class ResponseCheckSubscriptions:
    TYPE: ClassVar[int] = 5
    authorization: Annotated[str | None, OPTIONAL_TEXT16]
    tracing: Annotated[bytes, BYTES16]
    etag_format: Annotated[int, U8]
    etag: Annotated[bytes, SHA512]


# responses of a subscriber
@dataclass(frozen=True, slots=True)
class ResponseConfirmReceive:
    TYPE: ClassVar[int] = 8
    authorization: Annotated[str | None, OPTIONAL_TEXT16]
    tracing: Annotated[bytes, BYTES16]
    identifier: Annotated[bytes, BYTES8]
    num_subscribers: Annotated[int, U32]


@dataclass(frozen=True, slots=True)
class ResponseConfirmMissed:
    TYPE: ClassVar[int] = 9
    authorization: Annotated[str | None, OPTIONAL_TEXT16]
    tracing: Annotated[bytes, BYTES16] = b""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One HTTP route: what is posted, what the 200 answer carries, and the two signatures.

    `request_operation` and `response_operation` are names of `lonelypsp.signing.OPERATIONS`.
    """

    path: str
    request: type[Message]
    response: type[Message]
    request_operation: str
    response_operation: str


def _endpoint(
    path: str, request: type[Message], response: type[Message], asks: str, answers: str
) -> tuple[str, Endpoint]:
    return path, Endpoint(path, request, response, asks, answers)


BROADCASTER_ENDPOINTS: Mapping[str, Endpoint] = dict(
    [
        _endpoint(
            "/v1/subscribe/exact",
            SubscribeExact,
            ResponseGeneric,
            "SUBSCRIBE_EXACT",
            "CONFIRM_SUBSCRIBE_EXACT",
        ),
        _endpoint(
            "/v1/subscribe/glob",
            SubscribeGlob,
            ResponseGeneric,
            "SUBSCRIBE_GLOB",
            "CONFIRM_SUBSCRIBE_GLOB",
        ),
        _endpoint(
            "/v1/unsubscribe/exact",
            UnsubscribeExact,
            ResponseGeneric,
            "SUBSCRIBE_EXACT",
            "CONFIRM_SUBSCRIBE_EXACT",
        ),
        _endpoint(
            "/v1/unsubscribe/glob",
            UnsubscribeGlob,
            ResponseGeneric,
            "SUBSCRIBE_GLOB",
            "CONFIRM_SUBSCRIBE_GLOB",
        ),
        _endpoint(
            "/v1/check_subscriptions",
            CheckSubscriptions,
            ResponseCheckSubscriptions,
            "CHECK_SUBSCRIPTIONS",
            "CHECK_SUBSCRIPTIONS_RESPONSE",
        ),
        _endpoint(
            "/v1/set_subscriptions",
            SetSubscriptions,
            ResponseGeneric,
            "SET_SUBSCRIPTIONS",
            "SET_SUBSCRIPTIONS_RESPONSE",
        ),
        _endpoint("/v1/notify", NotifyHead, ResponseNotify, "NOTIFY", "CONFIRM_NOTIFY"),
    ]
)

SUBSCRIBER_ENDPOINTS: Mapping[str, Endpoint] = dict(
    [
        _endpoint("/v1/receive", ReceiveHead, ResponseConfirmReceive, "RECEIVE", "CONFIRM_RECEIVE"),
        _endpoint("/v1/recover", Missed, ResponseConfirmMissed, "MISSED", "CONFIRM_MISSED"),
    ]
)


def subscriber_urls(host: str) -> tuple[str, str]:
    """The receive and the recovery url of a subscriber reachable at `host`.

    `host` is a scheme and an address, optionally with a path prefix and a `#fragment`; the
    fragment is part of both urls (docs/topics/protocol.md, "Urls").
    """
    base, hash_sign, fragment = host.partition("#")
    suffix = hash_sign + fragment
    return f"{base}/v1/receive{suffix}", f"{base}/v1/recover{suffix}"
