"""The secrets file that broadcasters and subscribers share (docs/topics/protocol.md, "Secrets").

Both directions in one JSON document; the older implementation reads what we write. A direction may
have several keys: all verify, the one that also stands as "secret" signs, and is the only one that
older peers know of. Text in, values out: opening the file is the caller's business.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from lonelypsp.errors import LocalProtocolError
from lonelypsp.replay import Remembers
from lonelypsp.rights import Rights
from lonelypsp.signing import (
    DEFAULT_KEY,
    AuthConfig,
    Authenticator,
    Direction,
    Hmac,
    Key,
    Nothing,
    Token,
)

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
    document = parse(text)
    return AuthConfig(
        to_broadcaster=_authenticator(document, Direction.TO_BROADCASTER.value, replay),
        to_subscriber=_authenticator(
            document, Direction.TO_SUBSCRIBER.value, to_subscriber or replay
        ),
    )


def parse(text: str) -> dict[str, Any]:
    """The document that `text` is; what stands in it is not looked at.

    Raises:
        LocalProtocolError: it is none.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as e:
        raise LocalProtocolError(f"not JSON: line {e.lineno}, column {e.colno}") from None
    except (ValueError, RecursionError):  # a number too long, brackets too deep
        raise LocalProtocolError("not JSON that can be read") from None
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise LocalProtocolError(f'"version" must be "{VERSION}"')
    return document


def _authenticator(document: dict[str, Any], direction: str, replay: Remembers) -> Authenticator:
    entry = document.get(direction, {"type": "none"})
    if not isinstance(entry, dict) or entry.get("type") not in KINDS:
        raise LocalProtocolError(f'"{direction}": "type" must be one of {", ".join(KINDS)}')
    if entry["type"] == "none":
        return Nothing()
    try:
        keys = [_key(row, entry["type"]) for row in rows(entry)]
    except LocalProtocolError as e:
        raise LocalProtocolError(f'"{direction}": {e}') from None
    return Token(keys) if entry["type"] == "token" else Hmac(keys, replay=replay)


def _key(row: Mapping[str, Any], kind: str) -> Key:
    secret = row["secret"]
    rights = Rights.of(row["rights"]) if "rights" in row else None
    encoded = secret.encode("utf-8", "surrogatepass")
    return Key(encoded if kind == "token" else decode_key(secret), row["id"], rights)


def rows(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The keys of a direction: `id`, `secret` and, where they are known, `created` and `rights`.
    The one that signs comes first.

    Raises:
        LocalProtocolError: they are no such keys.
    """
    secret = entry.get("secret")
    if not isinstance(secret, str) or not secret:
        raise LocalProtocolError('"secret" must be a text')
    found = entry.get("keys", [{"id": DEFAULT_KEY, "secret": secret}])
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise LocalProtocolError('"keys" must be a list of keys')
    for row in found:
        if not isinstance(row.get("secret"), str) or not row["secret"]:
            raise LocalProtocolError('"keys": "secret" must be a text')
        check_id(row.get("id"))
    if len({row["id"] for row in found}) < len(found):
        raise LocalProtocolError('"keys": two have the same "id"')
    if len({row["secret"] for row in found}) < len(found):
        raise LocalProtocolError('"keys": two have the same "secret"')
    signing = [row for row in found if row["secret"] == secret]
    if not signing:
        raise LocalProtocolError('"secret", which signs, must stand among "keys" as well')
    return signing + [row for row in found if row is not signing[0]]


def check_id(id: object) -> None:
    """Raises LocalProtocolError: no key can have this id."""
    if not isinstance(id, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", id):
        raise LocalProtocolError("the id of a key is made of up to 64 letters, digits and . _ -")


def with_rows(entry: Mapping[str, Any], keys: list[dict[str, Any]]) -> dict[str, Any]:
    """`entry` with other keys; the first signs."""
    return {**entry, "secret": keys[0]["secret"], "keys": keys}


def decode_key(text: str) -> bytes:
    """The hmac key that `text`, URL-safe base64 with or without padding, stands for.

    Raises:
        LocalProtocolError: it is not base64. The message does not repeat it.
    """
    try:
        return base64.b64decode(text.rstrip("=") + "==", altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise LocalProtocolError("an hmac secret must be URL-safe base64 of 64 bytes") from None
