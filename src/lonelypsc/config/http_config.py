"""Names that older programs import; new ones import from `lonelypsc.config.config`."""

from __future__ import annotations

from dataclasses import dataclass

from lonelypsc.config.config import (
    DEFAULT_RESUBSCRIBE_INTERVAL,
    HttpPubSubBind,
    HttpPubSubBindManualCallback,
    HttpPubSubBindManualConfig,
    HttpPubSubBindUvicornConfig,
    HttpPubSubConfig,
    PubSubBroadcasterConfig,
    make_http_pub_sub_config,
)
from lonelypsp.signing import AuthConfig

__all__ = [
    "DEFAULT_RESUBSCRIBE_INTERVAL",
    "HttpPubSubBindConfigFromParts",
    "HttpPubSubBindManualCallback",
    "HttpPubSubBindManualConfig",
    "HttpPubSubBindUvicornConfig",
    "HttpPubSubConfig",
    "HttpPubSubConfigFromParts",
    "HttpPubSubConnectConfigFromParts",
    "HttpPubSubGenericConfigFromParts",
    "make_http_pub_sub_config",
]


@dataclass(frozen=True, kw_only=True)
class HttpPubSubBindConfigFromParts:
    bind: HttpPubSubBind
    host: str


@dataclass(frozen=True, kw_only=True)
class HttpPubSubConnectConfigFromParts:
    broadcasters: list[PubSubBroadcasterConfig]
    outgoing_retries_per_broadcaster: int


@dataclass(frozen=True)
class HttpPubSubGenericConfigFromParts:
    message_body_spool_size: int
    outgoing_http_timeout_total: float | None
    outgoing_http_timeout_connect: float | None
    outgoing_http_timeout_sock_read: float | None
    outgoing_http_timeout_sock_connect: float | None
    outgoing_retry_ambiguous: bool
    resubscribe_interval: float = DEFAULT_RESUBSCRIBE_INTERVAL


def HttpPubSubConfigFromParts(
    *,
    bind_config: HttpPubSubBindConfigFromParts,
    connect_config: HttpPubSubConnectConfigFromParts,
    generic_config: HttpPubSubGenericConfigFromParts,
    auth_config: AuthConfig,
    tracing: object = None,
) -> HttpPubSubConfig:
    """A config from the older groups of settings."""
    return make_http_pub_sub_config(
        **vars(bind_config),
        **vars(connect_config),
        **vars(generic_config),
        auth=auth_config,
        tracing=tracing,
    )
