"""TLS of the ports that a broadcaster listens on, and who is at the other end."""

from __future__ import annotations

import ssl
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from lonelypsp.errors import AuthResult
from lonelypsp.signing import Authenticator, Fields
from lonelypss.config import BroadcasterConfig, ConfigError


def listening(config: BroadcasterConfig) -> ssl.SSLContext | None:
    """For `lonelypss serve`; None: it speaks plain HTTP.

    Raises:
        ConfigError: a file cannot be used, or an option is missing.
    """
    if config.tls_cert is None:
        if config.tls_key is not None or config.tls_client_ca is not None:
            raise ConfigError("tls_key and tls_client_ca need tls_cert")
        if config.has_secure_peer_port:
            raise ConfigError(
                f"peer_url: {config.peer_url} leads to a port that is opened for it; https there"
                " needs tls_cert"
            )
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, config)
    if config.tls_client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def reload(context: ssl.SSLContext, config: BroadcasterConfig) -> None:
    """Reads the files again, for connections that are made from now on. Authorities are only added:
    to distrust one takes a restart.

    Raises:
        ConfigError: a file cannot be used; nothing has changed.
    """
    listening(config)
    _load(context, config)


def _load(context: ssl.SSLContext, config: BroadcasterConfig) -> None:
    try:
        context.load_cert_chain(config.tls_cert or "", config.tls_key, _no_password)
    except (OSError, ValueError) as e:  # an ssl.SSLError is an OSError
        key = "" if config.tls_key is None else f", tls_key: {config.tls_key}"
        raise ConfigError(f"tls_cert: {config.tls_cert}{key}: {e}") from None
    if config.tls_client_ca is not None:
        try:
            context.load_verify_locations(config.tls_client_ca)
        except OSError as e:
            raise ConfigError(f"tls_client_ca: {config.tls_client_ca}: {e}") from None


def _no_password() -> str:
    raise ValueError("a key with a password, which cannot be given")


class Identified:
    """An authenticator that is told who is at the other end.

    Args:
        inner: judges and signs.
        fields: what it gets besides the fields of a message, see `lonelypsp.guard.identity`.
    """

    def __init__(self, inner: Authenticator, fields: Mapping[str, Any]) -> None:
        self.authorize = inner.authorize
        self._check = inner.check
        self._fields = dict(fields)

    def check(
        self, operation: str, fields: Fields, authorization: str | None, now: float
    ) -> AuthResult:
        return self._check(operation, ChainMap(self._fields, fields), authorization, now)  # type: ignore[arg-type]
