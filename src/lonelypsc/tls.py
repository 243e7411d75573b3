"""TLS of a client, both ways, from its settings."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

Path = str | os.PathLike[str]


def connecting(
    ca_file: Path | None, client_cert: Path | None, client_key: Path | None
) -> ssl.SSLContext:
    """For connections to broadcasters; names of hosts are verified, TLS is 1.2 or newer.

    Args:
        ca_file: PEM certificates to trust instead of the system's.
        client_cert: PEM, ours, with those of intermediate authorities behind it.
        client_key: PEM, its key; None: it is in the same file.

    Raises:
        ValueError: a file cannot be used; names the setting.
    """
    with _named("tls_ca_file", ca_file):
        context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if client_cert is not None:
        with _named("tls_client_cert, tls_client_key", client_cert, client_key):
            context.load_cert_chain(client_cert, client_key, _no_password)
    elif client_key is not None:
        raise ValueError("tls_client_key: needs tls_client_cert")
    return context


def listening(cert: Path | None, key: Path | None, client_ca: Path | None) -> ssl.SSLContext | None:
    """For a listener; None: it does without TLS.

    Args:
        cert, key: as `client_cert` and `client_key` of `connecting`.
        client_ca: PEM certificates; who connects needs a certificate that one of them has signed.

    Raises:
        ValueError: a file cannot be used; names the setting.
    """
    if cert is None:
        if key is not None or client_ca is not None:
            raise ValueError("bind: tls_key and tls_client_ca need tls_cert")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with _named("bind: tls_cert, tls_key", cert, key):
        context.load_cert_chain(cert, key, _no_password)
    if client_ca is not None:
        with _named("bind: tls_client_ca", client_ca):
            context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _no_password() -> str:
    raise ValueError("a key with a password, which cannot be given")


@contextmanager
def _named(setting: str, *paths: Path | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as e:  # an ssl.SSLError is an OSError
        files = ", ".join(os.fspath(path) for path in paths if path is not None)
        raise ValueError(f"{setting}: cannot use {files}: {e}") from None
