"""The secrets file that broadcasters and subscribers share (docs/topics/protocol.md, "Secrets").

Both directions in one JSON document; the older implementation reads what we write. Text in, values
out: opening the file is the caller's business.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from typing import Any

from lonelypsp.errors import LocalProtocolError
from lonelypsp.replay import Remembers
from lonelypsp.signing import AuthConfig, Authenticator, Direction, Hmac, Nothing, Token

VERSION = "2"
KINDS = ("hmac", "token", "none")


def generate(kind: str) -> dict[str, str] | None:
    """A new secret of `kind`, as it stands in the file; None for "none"."""
    if kind == "none":
        return None
    return {"type": kind, "secret": secrets.token_urlsafe(64)}


def dump(to_broadcaster: dict[str, str] | None, to_subscriber: dict[str, str] | None) -> str:
    """The text of the file. A direction without authorization is left out."""
    document: dict[str, Any] = {"version": VERSION}
    if to_broadcaster is not None:
        document[Direction.TO_BROADCASTER.value] = to_broadcaster
    if to_subscriber is not None:
        document[Direction.TO_SUBSCRIBER.value] = to_subscriber
    return json.dumps(document, indent=2) + "\n"


def load(text: str, replay: Remembers, to_subscriber: Remembers | None = None) -> AuthConfig:
    """The authenticators that a secrets file describes.

    Args:
        text: the content of the file.
        replay: shared by both directions; their keys and operations keep codes apart.
        to_subscriber: for that direction, if it shall have another one.

    Raises:
        LocalProtocolError: the file is not such a document. The message never holds a secret.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as e:
        raise LocalProtocolError(f"not JSON: line {e.lineno}, column {e.colno}") from None
    except (ValueError, RecursionError):  # a number too long, brackets too deep
        raise LocalProtocolError("not JSON that can be read") from None
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise LocalProtocolError(f'"version" must be "{VERSION}"')
    return AuthConfig(
        to_broadcaster=_authenticator(document, Direction.TO_BROADCASTER.value, replay),
        to_subscriber=_authenticator(
            document, Direction.TO_SUBSCRIBER.value, to_subscriber or replay
        ),
    )


def _authenticator(document: dict[str, Any], key: str, replay: Remembers) -> Authenticator:
    entry = document.get(key, {"type": "none"})
    if not isinstance(entry, dict) or entry.get("type") not in KINDS:
        raise LocalProtocolError(f'"{key}": "type" must be one of {", ".join(KINDS)}')
    if entry["type"] == "none":
        return Nothing()
    secret = entry.get("secret")
    if not isinstance(secret, str) or not secret:
        raise LocalProtocolError(f'"{key}": "secret" must be a text')
    return Token(secret) if entry["type"] == "token" else Hmac(decode_key(secret), replay=replay)


def decode_key(text: str) -> bytes:
    """The hmac key that `text`, URL-safe base64 with or without padding, stands for.

    Raises:
        LocalProtocolError: it is not base64. The message does not repeat it.
    """
    try:
        return base64.b64decode(text.rstrip("=") + "==", altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise LocalProtocolError("an hmac secret must be URL-safe base64 of 64 bytes") from None
