"""The digest header, in the forms that peers write."""

from __future__ import annotations

import base64

import pytest

from lonelypsp.digest import repr_digest
from lonelypsp.errors import RemoteProtocolError

DIGEST = bytes(range(64))
TEXT = base64.b64encode(DIGEST)


@pytest.mark.parametrize(
    "header",
    [
        b"sha-512=" + TEXT,
        b"sha-512=:" + TEXT + b":",
        b"SHA-512=:" + TEXT + b":;x=1",
        b"sha-256=:eA==:, sha-512=:" + TEXT + b":",
        b" sha-512 = " + TEXT + b" ",
        b"sha-512=" + TEXT + b", sha-512=:" + TEXT + b":",
    ],
)
def test_forms(header: bytes) -> None:
    assert repr_digest(header) == DIGEST


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (None, "no Repr-Digest"),
        (b"", "0 different"),
        (b"sha-256=:eA==:", "0 different"),
        (b"sha-512", "has 0 bytes"),
        (b"sha-512=:" + TEXT, "closing colon"),
        (b"sha-512=:", "closing colon"),
        (b"sha-512=!" + TEXT, "not base64"),
        (b"sha-512=" + TEXT[:-4], "has 63 bytes"),
        (b"sha-512=" + TEXT + b", sha-512=" + base64.b64encode(bytes(64)), "2 different"),
    ],
)
def test_what_is_none(header: bytes | None, match: str) -> None:
    with pytest.raises(RemoteProtocolError, match=match):
        repr_digest(header)
