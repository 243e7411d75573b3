"""Every setting of the websocket client, once, with its default and its check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ssl import SSLContext
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lonelypsc import tls
from lonelypsc.config.config import (
    PubSubBroadcasterConfig,
    at_least,
    check_auth,
    normal_broadcaster,
    positive,
)
from lonelypsp.compression import FIRST_CUSTOM, WITHOUT_DICTIONARY
from lonelypsp.signing import AuthConfig
from lonelypsp.spool import DEFAULT_MEMORY_LIMIT

if TYPE_CHECKING:
    from zstandard import ZstdCompressionDict

__all__ = [
    "WebsocketCompressionConfigFromParts",
    "WebsocketGenericConfigFromParts",
    "WebsocketPubSubConfig",
    "WebsocketPubSubConfigFromParts",
    "WebsocketPubSubConnectConfigFromParts",
    "make_websocket_pub_sub_config",
]

MIB = 1024 * 1024
_SMALLEST_FRAME = 4096


@dataclass(frozen=True)
class WebsocketPubSubConfig:
    """All settings of one websocket client, checked.

    Args:
        broadcasters: e.g. `[{"host": "ws://127.0.0.1:3003"}]`, optionally with `priority`.
        outgoing_initial_connect_retries: further rounds over all broadcasters, after the first,
            with growing pauses of up to a minute; then the client is ABANDONED; default 10.
        outgoing_min_reconnect_interval: seconds; a connection that was open for less counts as a
            failed try; default 1.
        max_websocket_message_size: bytes of a frame sent; larger messages go in parts; None: no
            limit; default 3,670,016. Broadcasters take 16 MiB by default.
        websocket_open_timeout: seconds to connect, the broadcaster's confirmation included; None:
            no limit; default 5.
        websocket_close_timeout: seconds that the broadcaster has to answer a close; None: no
            limit; default 5.
        websocket_heartbeat_interval: seconds of silence after which the broadcaster is asked for a
            sign of life, for which it has half of that; default 10.
        websocket_minimal_headers: leave out the names of headers; default True.
        max_sent_notifications: messages sent and not confirmed; more wait; None: only bounded by
            `max_expected_acks`, the default.
        max_unsent_notifications: messages that wait to be sent; one more fails in `notify` with
            PubSubRequestQueueFullError; None: no limit, the default.
        max_expected_acks: frames sent and not answered; more wait; at most 200, since older
            broadcasters disconnect at 255; None: 128, the default.
        max_received: frames received and not yet looked at; above it nothing is read; None:
            1,000, the default.
        max_unsent_acks: accepted for older callers and ignored: while answers cannot be written,
            nothing is read.
        allow_compression: let bodies be compressed, if zstandard is installed; default True.
        compression_dictionary_by_id: id (2 to 65535) -> (dictionary, level); the broadcaster
            must have the same. Dictionaries may be bytes, too.
        initial_compression_dict_id: which of them to use; None: none, the default.
        allow_training_compression: accept dictionaries that the broadcaster makes of the messages;
            default True.
        decompression_max_window_size: bytes of zstd windows accepted; 0: zstd's own limit;
            default 8 MiB.
        auth: both authenticators, usually `AuthConfigFromParts(incoming, outgoing)`.
        max_websocket_receive_size: bytes of a frame received; a larger one breaks the connection;
            default 17 MiB.
        message_body_spool_size: bytes; a larger message is received to disk; default 10 MiB.
        max_receive_body: bytes; a longer message breaks the connection; default 64 GiB.
        spool_directory: where large messages are received; default: the system's temporary one.
        receive_buffer_messages: messages one subscription holds for the program; what comes on
            top is dropped, and `on_receiving` runs before the next one; default 1000.
        receive_buffer_bytes: bytes it holds; a message always fits an empty buffer; default 64 MiB.
        ssl_context: for wss://, instead of the three settings that follow; default None.
        tls_ca_file: PEM file with the certificates to trust for wss://, instead of the system's;
            default None.
        tls_client_cert: PEM file with the certificate to show the broadcaster; default None.
        tls_client_key: PEM file with its key; default None: it is in the same file.
        tracing: True, or a `TracerProvider` of OpenTelemetry: spans of messages go to the global
            provider or to this one (docs/how-to/observe.md); default None.

    Raises:
        ValueError: a setting cannot work; the message names it.
        TypeError: there is no such setting.
    """

    broadcasters: Sequence[PubSubBroadcasterConfig]
    outgoing_initial_connect_retries: int = 10
    outgoing_min_reconnect_interval: float = 1.0
    max_websocket_message_size: int | None = 3_670_016
    websocket_open_timeout: float | None = 5.0
    websocket_close_timeout: float | None = 5.0
    websocket_heartbeat_interval: float = 10.0
    websocket_minimal_headers: bool = True
    max_sent_notifications: int | None = None
    max_unsent_notifications: int | None = None
    max_expected_acks: int | None = None
    max_received: int | None = None
    max_unsent_acks: int | None = None
    allow_compression: bool = True
    compression_dictionary_by_id: Mapping[int, tuple[ZstdCompressionDict | bytes, int]] = field(
        default_factory=dict
    )
    initial_compression_dict_id: int | None = None
    allow_training_compression: bool = True
    decompression_max_window_size: int = 8 * MIB
    auth: AuthConfig = field(default=None, repr=False)  # type: ignore[assignment]
    max_websocket_receive_size: int = 17 * MIB
    message_body_spool_size: int = DEFAULT_MEMORY_LIMIT
    max_receive_body: int = 64 * 1024 * MIB
    spool_directory: str | None = None
    receive_buffer_messages: int = 1000
    receive_buffer_bytes: int = 64 * MIB
    ssl_context: SSLContext | None = None
    tls_ca_file: str | None = None
    tls_client_cert: str | None = None
    tls_client_key: str | None = None
    tracing: object = None

    def __post_init__(self) -> None:
        schemes = ("ws", "wss")
        hosts = tuple(normal_broadcaster(b, schemes) for b in self.broadcasters)
        object.__setattr__(self, "broadcasters", hosts)
        if not hosts:
            raise ValueError("broadcasters: at least one is needed")
        for host in hosts:
            parts = urlsplit(host["host"])
            if parts.username is not None and parts.password is None:
                raise ValueError("broadcasters: a user in a host needs a password, too")
        check_auth(self.auth)
        at_least("outgoing_initial_connect_retries", self.outgoing_initial_connect_retries, 0)
        for name, least in _COUNTS.items():
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), least)
        if self.max_expected_acks is not None and self.max_expected_acks > MOST_UNANSWERED:
            raise ValueError(
                f"max_expected_acks must not exceed {MOST_UNANSWERED}, not"
                f" {self.max_expected_acks}: older broadcasters disconnect who sends more"
            )
        positive("websocket_heartbeat_interval", self.websocket_heartbeat_interval, "seconds")
        if self.outgoing_min_reconnect_interval != 0:
            positive(
                "outgoing_min_reconnect_interval",
                self.outgoing_min_reconnect_interval,
                "seconds, or 0",
            )
        for name in ("websocket_open_timeout", "websocket_close_timeout"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name), "seconds, or None for no limit")
        if (self.tls_ca_file, self.tls_client_cert, self.tls_client_key) != (None, None, None):
            if self.ssl_context is not None:
                raise ValueError("ssl_context: give it, or tls_ca_file and tls_client_*, not both")
            self.tls()
        wish = self.initial_compression_dict_id
        if wish is not None and wish not in self.compression_dictionary_by_id:
            raise ValueError(
                f"initial_compression_dict_id: {wish} is not in compression_dictionary_by_id"
            )
        for id, entry in self.compression_dictionary_by_id.items():
            if not (isinstance(id, int) and WITHOUT_DICTIONARY < id < FIRST_CUSTOM):
                raise ValueError(f"compression_dictionary_by_id: id {id!r} is not 2 to 65535")
            if not (isinstance(entry, Sequence) and len(entry) == 2):
                raise ValueError(
                    f"compression_dictionary_by_id: give (dictionary, level) for id {id}"
                )

    def tls(self) -> SSLContext:
        """For connections to broadcasters; reads the files afresh."""
        if self.ssl_context is not None:
            return self.ssl_context
        return tls.connecting(self.tls_ca_file, self.tls_client_cert, self.tls_client_key)

    @property
    def presets(self) -> dict[int, bytes]:
        """The preset dictionaries' bytes, by id."""
        return {
            id: data if isinstance(data, bytes) else data.as_bytes()
            for id, (data, _) in self.compression_dictionary_by_id.items()
        }


MOST_UNANSWERED = 200
_COUNTS = {
    "max_websocket_message_size": _SMALLEST_FRAME,
    "max_sent_notifications": 1,
    "max_unsent_notifications": 1,
    "max_expected_acks": 1,
    "max_received": 1,
    "max_unsent_acks": 1,
    "decompression_max_window_size": 0,
    "max_websocket_receive_size": _SMALLEST_FRAME,
    "message_body_spool_size": 0,
    "max_receive_body": 0,
    "receive_buffer_messages": 1,
    "receive_buffer_bytes": 1,
}

make_websocket_pub_sub_config = WebsocketPubSubConfig
"""The documented way to make a config."""


@dataclass(frozen=True)
class WebsocketPubSubConnectConfigFromParts:
    broadcasters: Sequence[PubSubBroadcasterConfig]
    outgoing_initial_connect_retries: int
    outgoing_min_reconnect_interval: float


@dataclass(frozen=True)
class WebsocketGenericConfigFromParts:
    max_websocket_message_size: int | None
    websocket_open_timeout: float | None
    websocket_close_timeout: float | None
    websocket_heartbeat_interval: float
    websocket_minimal_headers: bool
    max_sent_notifications: int | None
    max_unsent_notifications: int | None
    max_expected_acks: int | None
    max_received: int | None
    max_unsent_acks: int | None


@dataclass(frozen=True)
class WebsocketCompressionConfigFromParts:
    """`compression_dictionary_by_id`: id -> list of (level, dictionary), sorted."""

    allow_compression: bool
    compression_dictionary_by_id: Mapping[int, Sequence[tuple[int, Any]]]
    initial_compression_dict_id: int | None
    allow_training_compression: bool
    decompression_max_window_size: int


def WebsocketPubSubConfigFromParts(
    *,
    connect: WebsocketPubSubConnectConfigFromParts,
    generic: WebsocketGenericConfigFromParts,
    compression: WebsocketCompressionConfigFromParts,
    auth: AuthConfig,
) -> WebsocketPubSubConfig:
    """A config from the older groups of settings."""
    dictionaries = {
        id: (levels[-1][1], levels[-1][0])
        for id, levels in compression.compression_dictionary_by_id.items()
        if levels
    }
    return make_websocket_pub_sub_config(
        **vars(connect),
        **vars(generic),
        **{**vars(compression), "compression_dictionary_by_id": dictionaries},
        auth=auth,
    )
