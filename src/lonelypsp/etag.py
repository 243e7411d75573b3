"""The strong etag: one hash that tells whether two sets of subscriptions are the same.

docs/topics/protocol.md, "Strong etag".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from lonelypsp.errors import RemoteProtocolError
from lonelypsp.wire import BYTES16, OPTIONAL_TEXT16, TEXT16, to_utf8


def strong_etag(
    url: str,
    exact: Iterable[tuple[bytes, str | None]],
    globs: Iterable[tuple[str, str | None]],
) -> bytes:
    """SHA-512 over the subscriptions of `url`.

    Args:
        url: the subscriber's url.
        exact: (topic, recovery url or None), ascending by the topic's bytes.
        globs: (glob, recovery url or None), ascending by the glob's UTF-8 bytes.

    Returns:
        64 bytes.

    Raises:
        RemoteProtocolError: a list is not strictly ascending.
        LocalProtocolError: a value is longer than 65,535 bytes.
    """
    hasher = hashlib.sha512(b"URL" + TEXT16.encode(url, "url"))
    hasher.update(b"\nEXACT")
    _update(hasher, exact, "exact topics")
    hasher.update(b"\nGLOB")
    _update(hasher, ((TEXT16.encode(glob, "glob")[2:], r) for glob, r in globs), "globs")
    hasher.update(b"\n")
    return hasher.digest()


def wanted(
    exact: Iterable[bytes], globs: Iterable[str], recovery: str | None
) -> tuple[tuple[tuple[bytes, str | None], ...], tuple[tuple[str, str | None], ...]]:
    """The two sorted lists of a set in which all subscriptions share one recovery url.

    Raises:
        LocalProtocolError: a glob is not encodable as UTF-8.
    """
    by_bytes = sorted(set(globs), key=lambda glob: to_utf8(glob, "glob"))
    return (
        tuple((topic, recovery) for topic in sorted(set(exact))),
        tuple((glob, recovery) for glob in by_bytes),
    )


def _update(hasher: hashlib._Hash, items: Iterable[tuple[bytes, str | None]], name: str) -> None:
    previous: bytes | None = None
    for key, recovery in items:
        if previous is not None and key <= previous:
            raise RemoteProtocolError(f"{name}: not in strictly ascending byte order")
        previous = key
        hasher.update(BYTES16.encode(key, name) + OPTIONAL_TEXT16.encode(recovery, "recovery"))
