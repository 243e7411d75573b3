"""Every setting of the HTTP client, once, with its default and its check."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ssl import SSLContext
from typing import TYPE_CHECKING, Literal, NotRequired, Required, TypeAlias, TypedDict
from urllib.parse import SplitResult, urlsplit

from lonelypsc import tls
from lonelypsp.guard import HttpLimits
from lonelypsp.signing import AuthConfig
from lonelypsp.spool import DEFAULT_MEMORY_LIMIT

if TYPE_CHECKING:
    from fastapi import APIRouter

DEFAULT_RESUBSCRIBE_INTERVAL = 300.0
PORT_PLACEHOLDER = "{port}"
_MAX_URL = 65_535 - len("/v1/recover")


class HttpPubSubBindUvicornConfig(TypedDict):
    """Listen with uvicorn.

    `host`: the address to listen on. `port`: TCP port; 0 takes a free one, which replaces
    `{port}` in the config's `host`.

    `tls_cert`, `tls_key`: PEM files, for https; the key may be in the file of the certificate.
    `tls_client_ca`: PEM file; who connects needs a certificate that one of those in it has signed.
    `limits`: how large and how slow requests may be.
    """

    type: Literal["uvicorn"]
    host: str
    port: int
    tls_cert: NotRequired[str | None]
    tls_key: NotRequired[str | None]
    tls_client_ca: NotRequired[str | None]
    limits: NotRequired[HttpLimits]


HttpPubSubBindManualCallback: TypeAlias = "Callable[[APIRouter], Awaitable[None]]"


class HttpPubSubBindManualConfig(TypedDict):
    """The program serves the router itself.

    `callback` runs as a task from entering to leaving the client, and is then cancelled. It may
    return at once when the router is served elsewhere or not at all (a client that only notifies).
    """

    type: Literal["manual"]
    callback: HttpPubSubBindManualCallback


class HttpPubSubBindNoneConfig(TypedDict):
    """Nothing is served: the client can only notify. It needs no web framework then."""

    type: Literal["none"]


HttpPubSubBind: TypeAlias = (
    HttpPubSubBindUvicornConfig | HttpPubSubBindManualConfig | HttpPubSubBindNoneConfig
)


class PubSubBroadcasterConfig(TypedDict, total=False):
    """One broadcaster. `host`: `http(s)://address`, paths are appended to it. `priority`: lower
    ones are tried first, those without one last, equal ones in random order."""

    host: Required[str]
    priority: int


SimplePubSubBroadcasterConfig = PubSubBroadcasterConfig
PrioritizedPubSubBroadcasterConfig = PubSubBroadcasterConfig


class BroadcastersShuffler:
    """Each iteration yields all broadcasters once: by priority, at random among equals."""

    def __init__(self, broadcasters: Sequence[PubSubBroadcasterConfig]) -> None:
        self._broadcasters = tuple(broadcasters)

    def __iter__(self) -> Iterator[PubSubBroadcasterConfig]:
        if len(self._broadcasters) == 1:
            return iter(self._broadcasters)
        mixed = random.sample(self._broadcasters, len(self._broadcasters))
        return iter(sorted(mixed, key=lambda b: b.get("priority", math.inf)))


@dataclass(frozen=True, kw_only=True)
class HttpPubSubConfig:
    """All settings of one HTTP client, checked.

    Args:
        bind: how the receiving endpoints are served: `{"type": "uvicorn", "host": "0.0.0.0",
            "port": 3002}`, `{"type": "manual", "callback": async callable(router)}`, or
            `{"type": "none"}` for a client that only notifies.
        host: how broadcasters reach us: `http(s)://address[:port][/prefix][#fragment]`. With a
            fragment several clients can share one listener. `{port}` stands for the real port
            when `bind` says port 0.
        broadcasters: e.g. `[{"host": "http://127.0.0.1:3003"}]`, optionally with `priority`.
        auth: both authenticators, usually `AuthConfigFromParts(incoming, outgoing)`.
        outgoing_retries_per_broadcaster: rounds over all broadcasters, at least 1; default 2.
        message_body_spool_size: bytes; a larger message is received to disk; default 10 MiB.
        outgoing_http_timeout_total: seconds for a whole request, plus the time that its length
            takes at `outgoing_http_min_rate`; None: no limit; default 30.
        outgoing_http_timeout_connect: seconds to get a connection, waiting for a free one
            included; default None.
        outgoing_http_timeout_sock_read: seconds for one read; default None.
        outgoing_http_timeout_sock_connect: seconds for one connection attempt; default 5.
        outgoing_retry_ambiguous: whether to try again when it is not known if a broadcaster acted
            on the request; default True. A retried notify may be delivered twice.
        resubscribe_interval: seconds between checks that the broadcasters know our
            subscriptions; default 300.
        tracing: True, or a `TracerProvider` of OpenTelemetry: spans of messages go to the global
            provider or to this one (docs/how-to/observe.md). Tracers of older programs are accepted
            and ignored. Default None.
        receive_buffer_messages: messages one subscription holds for the program; default 1000.
        receive_buffer_bytes: bytes it holds; a message always fits an empty buffer; default 64 MiB.
        max_receive_body: bytes; a longer message is answered 413; default None, no limit.
        outgoing_http_min_rate: bytes per second, see `outgoing_http_timeout_total`; default 1 MiB.
        spool_directory: where large messages are received; default: the system's temporary one.
        tls_ca_file: PEM file with the certificates to trust for https:// broadcasters, instead of
            the system's; default None.
        tls_client_cert: PEM file with the certificate to show them; default None.
        tls_client_key: PEM file with its key; default None: it is in the same file.

    Raises:
        ValueError: a setting cannot work; the message names it.
        TypeError: there is no such setting.
    """

    bind: HttpPubSubBind
    host: str
    broadcasters: Sequence[PubSubBroadcasterConfig]
    auth: AuthConfig
    outgoing_retries_per_broadcaster: int = 2
    message_body_spool_size: int = DEFAULT_MEMORY_LIMIT
    outgoing_http_timeout_total: float | None = 30.0
    outgoing_http_timeout_connect: float | None = None
    outgoing_http_timeout_sock_read: float | None = None
    outgoing_http_timeout_sock_connect: float | None = 5.0
    outgoing_retry_ambiguous: bool = True
    resubscribe_interval: float = DEFAULT_RESUBSCRIBE_INTERVAL
    tracing: object = None
    receive_buffer_messages: int = 1000
    receive_buffer_bytes: int = 64 * 1024 * 1024
    max_receive_body: int | None = None
    outgoing_http_min_rate: float = 1024 * 1024
    spool_directory: str | None = None
    tls_ca_file: str | None = None
    tls_client_cert: str | None = None
    tls_client_key: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "host", _normal_host(self.host))
        object.__setattr__(
            self,
            "broadcasters",
            tuple(normal_broadcaster(b, ("http", "https")) for b in self.broadcasters),
        )
        for broadcaster in self.broadcasters:
            _check_reachable(broadcaster["host"])
        _check_bind(self.bind)
        _check_host(self.host, self.bind)
        check_auth(self.auth)
        if not self.broadcasters:
            raise ValueError("broadcasters: at least one is needed")
        at_least("outgoing_retries_per_broadcaster", self.outgoing_retries_per_broadcaster, 1)
        at_least("message_body_spool_size", self.message_body_spool_size, 0)
        at_least("receive_buffer_messages", self.receive_buffer_messages, 1)
        at_least("receive_buffer_bytes", self.receive_buffer_bytes, 1)
        if self.max_receive_body is not None:
            at_least("max_receive_body", self.max_receive_body, 0)
        for name in ("total", "connect", "sock_read", "sock_connect"):
            key = f"outgoing_http_timeout_{name}"
            if getattr(self, key) is not None:
                positive(key, getattr(self, key), "seconds, or None for no limit")
        positive("resubscribe_interval", self.resubscribe_interval, "seconds")
        positive("outgoing_http_min_rate", self.outgoing_http_min_rate, "bytes per second")
        if (self.tls_ca_file, self.tls_client_cert, self.tls_client_key) != (None, None, None):
            self.tls()

    def tls(self) -> SSLContext:
        """For connections to broadcasters; reads the files afresh."""
        return tls.connecting(self.tls_ca_file, self.tls_client_cert, self.tls_client_key)


make_http_pub_sub_config = HttpPubSubConfig
"""The documented way to make a config."""


def _normal_host(host: str) -> str:
    base, hash_sign, fragment = host.partition("#")
    return base.rstrip("/") + hash_sign + fragment


def normal_broadcaster(
    config: PubSubBroadcasterConfig, schemes: tuple[str, str]
) -> PubSubBroadcasterConfig:
    """`config`, checked, without a slash at the end of its host."""
    if not isinstance(config, Mapping) or not isinstance(config.get("host"), str):
        raise ValueError(  # noqa: TRY004
            f'broadcasters: {config!r} is not like {{"host": "{schemes[0]}://..."}}'
        )
    host = config["host"].rstrip("/")
    scheme = host.partition("://")[0]
    if scheme in ("ws", "wss", "http", "https") and scheme not in schemes:
        other = "websocket" if scheme.startswith("ws") else "HTTP"
        raise ValueError(f"broadcasters: {host!r} is for a {other} client; use {schemes[0]}(s)://")
    if _split("broadcasters: host", host, schemes).fragment:
        raise ValueError(f"broadcasters: host {host!r} must not have a #fragment")
    if not isinstance(config.get("priority", 0), int):
        raise ValueError(f"broadcasters: priority of {host!r} must be an int")  # noqa: TRY004
    return {**config, "host": host}


def _check_reachable(host: str) -> None:
    parts = urlsplit(host)
    if parts.username is not None:
        raise ValueError(
            "broadcasters: host must not have a user name: the header that it would travel in"
            " carries our authorization"
        )
    try:
        (parts.hostname or "").encode("idna" if not host.isascii() else "ascii")
    except UnicodeError as e:
        raise ValueError(f"broadcasters: host {host!r} has no name that can be looked up") from e


def _check_host(host: str, bind: HttpPubSubBind) -> None:
    if PORT_PLACEHOLDER in host and not (bind["type"] == "uvicorn" and bind["port"] == 0):
        raise ValueError('host: "{port}" needs bind={"type": "uvicorn", ..., "port": 0}')
    _split("host", host.replace(PORT_PLACEHOLDER, "0"))
    if host.partition("#")[0].endswith("/"):
        raise ValueError(f"host: {host!r} must not end with a slash")
    if host.endswith("#"):
        raise ValueError(f"host: {host!r} has an empty fragment; leave the # away")
    if len(host.encode("utf-8", "replace")) > _MAX_URL:
        raise ValueError(f"host: longer than {_MAX_URL:,} bytes, which the protocol cannot carry")


def _split(name: str, url: str, schemes: tuple[str, str] = ("http", "https")) -> SplitResult:
    if re.search(r"[\s\x00-\x1f\x7f\ud800-\udfff]", url):
        raise ValueError(f"{name}: {url!r} contains spaces or control characters")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in schemes and bool(parts.hostname) and parts.port != -1
    except ValueError as e:
        raise ValueError(f"{name}: {url!r} is not a url ({e})") from None
    if not usable:
        raise ValueError(f"{name}: {url!r} must be {schemes[0]}(s)://address[:port][/prefix]")
    if parts.query or "?" in url.partition("#")[0]:
        raise ValueError(f"{name}: {url!r} must not have a ?query: paths are appended to it")
    return parts


def _check_bind(bind: HttpPubSubBind) -> None:
    if bind.get("type") not in ("uvicorn", "manual", "none"):
        raise ValueError(
            f"bind: type must be 'uvicorn', 'manual' or 'none', not {bind.get('type')!r}"
        )
    if bind["type"] == "none":
        return
    if bind["type"] == "manual":
        if not callable(bind.get("callback")):
            raise ValueError("bind: callback must be an async callable that takes an APIRouter")
        return
    if not isinstance(bind.get("host"), str):
        raise ValueError("bind: host must be the address to listen on, e.g. '0.0.0.0'")  # noqa: TRY004
    if not (isinstance(bind.get("port"), int) and 0 <= bind["port"] <= 65_535):
        raise ValueError(f"bind: port {bind.get('port')!r} is not between 0 and 65535")
    listening_tls(bind)
    if not isinstance(bind.get("limits", HttpLimits()), HttpLimits):
        raise ValueError("bind: limits must be an HttpLimits")  # noqa: TRY004


def listening_tls(bind: HttpPubSubBindUvicornConfig) -> SSLContext | None:
    """For the listener of `bind`; reads the files afresh."""
    return tls.listening(bind.get("tls_cert"), bind.get("tls_key"), bind.get("tls_client_ca"))


def check_auth(auth: AuthConfig) -> None:
    for direction in ("to_broadcaster", "to_subscriber"):
        authenticator = getattr(auth, direction, None)
        if not (hasattr(authenticator, "authorize") and hasattr(authenticator, "check")):
            raise ValueError(f"auth: {direction} has no authorize() and check()")


def at_least(name: str, value: int, minimum: int) -> None:
    if not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an int of at least {minimum}, not {value!r}")


def positive(name: str, value: float, unit: str) -> None:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0 ({unit}), not {value!r}")
