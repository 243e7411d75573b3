"""A recorded websocket session: what is signed in it, and the bytes of its messages."""

from __future__ import annotations

import base64
import dataclasses
import hmac
from functools import cache
from typing import Any

import pytest

import vectors
from lonelypsp import messages
from lonelypsp.connection_url import connection_nonce, connection_url
from lonelypsp.errors import AuthResult
from lonelypsp.messages import Configure, ConfirmConfigure
from lonelypsp.signing import OPERATIONS, Direction, Hmac, to_sign

SESSION = vectors.load("stateful")["signed_session"]
CLOCK = SESSION["clock"]
KEYS = {
    direction: base64.urlsafe_b64decode(
        SESSION[f"{direction.value.replace('-', '_')}_secret_b64url"] + "=="
    )
    for direction in Direction
}
DECODERS = {"S2B": messages.decode_from_subscriber, "B2S": messages.decode_from_broadcaster}
STEPS = SESSION["steps"]


@cache
def session() -> list[tuple[Any, dict[str, Any]]]:
    """Each message, with all that is signed for it.

    What a message does not carry comes from the connection: its url, or the message it belongs to.
    """
    found: list[tuple[Any, dict[str, Any]]] = []
    about: dict[bytes, dict[str, Any]] = {}
    for step in STEPS:
        message = DECODERS[step["direction"]](bytes.fromhex(step["hex"]))
        own = {name: getattr(message, name) for name in message.HEADERS}
        identifier = own.get("identifier", b"")
        url = step["url"]
        connection = {"recovery": url} if step["type"] == "MISSED" else {"url": url}
        fields = {"recovery": None, **connection, **about.get(identifier, {}), **own}
        if "sha512" in own and "topic" in own:
            about[identifier] = {"topic": own["topic"], "sha512": own["sha512"]}
        found.append((message, fields))
    return found


def step_id(step: dict[str, Any]) -> str:
    return f"{step['n']:02}-{step['type']}"


EACH_STEP = pytest.mark.parametrize("n", range(len(STEPS)), ids=[step_id(s) for s in STEPS])


@EACH_STEP
def test_what_is_signed(n: int) -> None:
    step, (message, fields) = STEPS[n], session()[n]
    signed = to_sign(message.OPERATION, fields, int(CLOCK), step["hmac_nonce"])
    assert signed.hex() == step["hmac_input_hex"]
    key = KEYS[OPERATIONS[message.OPERATION].direction]
    code = base64.b64encode(hmac.digest(key, signed, "sha512")).decode()
    value = f"X-HMAC {int(CLOCK)}:{step['hmac_nonce']}:{code}"
    assert value == step["authorization"] == fields["authorization"]


@EACH_STEP
def test_the_bytes_of_the_message(n: int) -> None:
    message, fields = session()[n]
    unsigned = dataclasses.replace(message, authorization=None)
    signed = dataclasses.replace(unsigned, authorization=fields["authorization"])
    assert messages.encode(signed, minimal=True).hex() == STEPS[n]["hex"]
    assert type(message).__name__.upper().startswith(STEPS[n]["type"].replace("_", ""))


@EACH_STEP
def test_the_signature_verifies_for_these_fields_alone(n: int) -> None:
    message, fields = session()[n]
    operation = OPERATIONS[message.OPERATION]
    authorization = fields["authorization"]

    def check(signed: dict[str, Any]) -> AuthResult:
        guard = Hmac(KEYS[operation.direction])
        return guard.check(message.OPERATION, signed, authorization, CLOCK)

    assert check(fields) is AuthResult.OK
    if fields.get("url"):
        assert check(fields | {"url": fields["url"] + "0"}) is AuthResult.FORBIDDEN
    assert check(fields | {"tracing": b"x"}) is AuthResult.FORBIDDEN


def test_the_urls_of_the_session() -> None:
    """Each side counts what it signs over a url; a confirmation repeats the url of its request."""
    (configure, _), (confirm, _) = session()[:2]
    assert isinstance(configure, Configure)
    assert isinstance(confirm, ConfirmConfigure)
    nonce = connection_nonce(configure.subscriber_nonce, confirm.broadcaster_nonce)
    assert nonce == SESSION["nonce_b64"]
    ours = theirs = 0
    for step in STEPS:
        if step["url"] is None:
            continue
        if step["direction"] == "S2B":
            ours -= 1
            counter = ours
        elif step["type"].startswith("CONFIRM_"):
            counter = ours
        else:
            theirs += 1
            counter = theirs
        assert step["url"] == connection_url(nonce, counter)
