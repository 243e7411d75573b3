"""The header `Repr-Digest` (RFC 9530), which carries the SHA-512 of a message to subscribers."""

from __future__ import annotations

import base64
import binascii

from lonelypsp.errors import RemoteProtocolError
from lonelypsp.wire import SHA512_LENGTH


def repr_digest(header: bytes | None) -> bytes:
    """The SHA-512 of a `Repr-Digest` header, in its standard form with colons or without.

    Raises:
        RemoteProtocolError: there is none, or it is not one.
    """
    if header is None:
        raise RemoteProtocolError("no Repr-Digest header")
    found = set()
    for item in header.split(b","):
        algorithm, _, value = item.strip().partition(b"=")
        if algorithm.strip().lower() == b"sha-512":
            found.add(_decoded(value.partition(b";")[0].strip()))
    if len(found) != 1:
        raise RemoteProtocolError(f"{len(found)} different sha-512 digests in Repr-Digest, not 1")
    return found.pop()


def _decoded(value: bytes) -> bytes:
    if value.startswith(b":"):
        if len(value) < 2 or not value.endswith(b":"):
            raise RemoteProtocolError("the sha-512 digest lacks its closing colon")
        value = value[1:-1]
    try:
        digest = base64.b64decode(value, validate=True)
    except binascii.Error:
        raise RemoteProtocolError("the sha-512 digest is not base64") from None
    if len(digest) != SHA512_LENGTH:
        raise RemoteProtocolError(f"the sha-512 digest has {len(digest)} bytes, not 64")
    return digest
