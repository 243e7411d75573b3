"""The url over which the messages of one websocket connection are signed.

Such messages are signed over `websocket:<nonce>:<counter>` where http has a real url. It is never
sent: both sides compute it. The nonce ties a signature to its connection, the counter to its place
in it, so that a message can neither be repeated nor moved.

Each side counts the messages that it signs this way: the broadcaster 1, 2, 3 ..., the subscriber
-1, -2, -3 ...
"""

from __future__ import annotations

import base64
import hashlib

from lonelypsp.errors import LocalProtocolError
from lonelypsp.headers import NONCE_LENGTH

CONNECTION_SCHEME = "websocket:"
BROADCASTER_START = 1
SUBSCRIBER_START = -1


def connection_nonce(subscriber_nonce: bytes, broadcaster_nonce: bytes) -> str:
    """The text by which both sides know their connection, from the nonces that each has sent.

    Raises:
        LocalProtocolError: a nonce does not have 32 bytes.
    """
    if len(subscriber_nonce) != NONCE_LENGTH or len(broadcaster_nonce) != NONCE_LENGTH:
        raise LocalProtocolError(f"the nonces of a connection have {NONCE_LENGTH} bytes each")
    digest = hashlib.sha256(subscriber_nonce + broadcaster_nonce).digest()
    return base64.b64encode(digest).decode("ascii")


def connection_url(nonce: str, counter: int) -> str:
    """The url of one message."""
    return f"{CONNECTION_SCHEME}{nonce}:{counter:x}"


def next_counter(counter: int) -> int:
    """The counter of the next message from the same side."""
    return counter + 1 if counter > 0 else counter - 1
