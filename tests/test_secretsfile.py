from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lonelypsp import secretsfile
from lonelypsp.errors import AuthResult, LocalProtocolError
from lonelypsp.replay import ReplayGuard
from lonelypsp.rights import NotAllowed
from lonelypsp.signing import AuthConfig, Hmac, Nothing, Token

KEY = bytes(range(192, 256))
SECRET = base64.urlsafe_b64encode(KEY).decode().rstrip("=")
FIELDS = {"tracing": b"", "url": "http://h"}
OPERATION = "CHECK_SUBSCRIPTIONS"
NOW = 1_700_000_000.25
TYPES = {"hmac": Hmac, "token": Token, "none": Nothing}
BOTH = {
    "version": "2",
    "to-broadcaster": {"type": "hmac", "secret": SECRET},
    "to-subscriber": {"type": "token", "secret": "canary-token"},
}


def load(document: Any) -> AuthConfig:
    text = document if isinstance(document, str) else json.dumps(document)
    return secretsfile.load(text, ReplayGuard())


def test_both_directions() -> None:
    config = load(BOTH)
    value = Hmac(KEY).authorize(OPERATION, FIELDS, NOW)
    assert config.to_broadcaster.check(OPERATION, FIELDS, value, NOW) is AuthResult.OK
    assert config.to_subscriber.authorize(OPERATION, FIELDS, NOW) == "Bearer canary-token"


@pytest.mark.parametrize("missing", ["to-broadcaster", "to-subscriber"])
def test_a_direction_left_out_needs_no_authorization(missing: str) -> None:
    config = load({key: value for key, value in BOTH.items() if key != missing})
    directions = {"to-broadcaster": config.to_broadcaster, "to-subscriber": config.to_subscriber}
    assert {key: isinstance(auth, Nothing) for key, auth in directions.items()} == {
        key: key == missing for key in directions
    }


def test_none_may_be_written_out_and_other_keys_are_ignored() -> None:
    config = load({"version": "2", "to-subscriber": {"type": "none"}, "comment": ["hello"]})
    assert isinstance(config.to_broadcaster, Nothing)
    assert isinstance(config.to_subscriber, Nothing)


@pytest.mark.parametrize("up", secretsfile.KINDS)
@pytest.mark.parametrize("down", secretsfile.KINDS)
def test_generated_files_load(up: str, down: str) -> None:
    entries = secretsfile.generate(up), secretsfile.generate(down)
    text = secretsfile.dump(*entries)
    config = load(text)
    assert type(config.to_broadcaster) is TYPES[up]
    assert type(config.to_subscriber) is TYPES[down]
    peer = load(text)
    for ours, theirs in [
        (config.to_broadcaster, peer.to_broadcaster),
        (config.to_subscriber, peer.to_subscriber),
    ]:
        value = ours.authorize(OPERATION, FIELDS, NOW)
        assert theirs.check(OPERATION, FIELDS, value, NOW) is AuthResult.OK


def test_file_is_what_the_older_implementation_writes() -> None:
    entry = secretsfile.generate("hmac")
    assert entry is not None
    assert entry["type"] == "hmac"
    assert len(entry["secret"]) == 86, "unpadded"
    document = json.loads(secretsfile.dump(entry, None))
    assert document == {"version": "2", "to-broadcaster": entry}
    assert secretsfile.dump(None, entry).endswith("}\n")


@pytest.mark.parametrize("kind", ["hmac", "token"])
def test_secrets_are_new_each_time(kind: str) -> None:
    assert secretsfile.generate(kind) != secretsfile.generate(kind)


@pytest.mark.parametrize("padding", ["", "=", "==", "===="])
def test_padding_is_optional(padding: str) -> None:
    assert secretsfile.decode_key(SECRET + padding) == KEY


@given(key=st.binary(min_size=64, max_size=64))
@settings(deadline=None)
def test_any_key(key: bytes) -> None:
    text = base64.urlsafe_b64encode(key).decode()
    assert secretsfile.decode_key(text) == secretsfile.decode_key(text.rstrip("=")) == key


def test_directions_share_the_guard_they_are_given() -> None:
    guard = ReplayGuard()
    entry = {"type": "hmac", "secret": SECRET}
    config = secretsfile.load(secretsfile.dump(entry, entry), guard)
    value = config.to_broadcaster.authorize(OPERATION, FIELDS, NOW)
    assert config.to_broadcaster.check(OPERATION, FIELDS, value, NOW) is AuthResult.OK
    assert len(guard) == 1
    assert config.to_subscriber.check(OPERATION, FIELDS, value, NOW) is AuthResult.FORBIDDEN


def entry(**of: Any) -> dict[str, Any]:
    return {"version": "2", "to-broadcaster": of}


CANARY = "canary"
FIRST = {"id": "default", "secret": SECRET}


def several(*more: dict[str, Any], **of: Any) -> dict[str, Any]:
    return entry(**{"type": "hmac", "secret": SECRET, "keys": [FIRST, *more], **of})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        pytest.param("", "line 1, column 1", id="empty"),
        pytest.param('{"secret": "canary"\n oops', "line 2, column 2", id="not JSON"),
        pytest.param("[" * 100_000, "not JSON", id="too deep"),
        pytest.param("1" * 5000, "not JSON", id="number too long"),
        pytest.param([CANARY], '"version" must be "2"', id="list"),
        pytest.param(CANARY.join('""'), '"version" must be "2"', id="text"),
        pytest.param({}, '"version" must be "2"', id="version missing"),
        pytest.param(BOTH | {"version": "1"}, '"version" must be "2"', id="version 1"),
        pytest.param(BOTH | {"version": 2}, '"version" must be "2"', id="version as number"),
        pytest.param(BOTH | {"version": None}, '"version" must be "2"', id="version null"),
        pytest.param(BOTH | {"to-subscriber": CANARY}, '"to-subscriber"', id="direction as text"),
        pytest.param(BOTH | {"to-subscriber": None}, '"to-subscriber"', id="direction null"),
        pytest.param(entry(secret=CANARY), '"type" must be one of', id="type missing"),
        pytest.param(entry(type=CANARY), '"type" must be one of', id="type unknown"),
        pytest.param(entry(type=["hmac"]), '"type" must be one of', id="type as list"),
        pytest.param(entry(type="HMAC"), '"type" must be one of', id="type upper case"),
        pytest.param(entry(type="hmac"), '"secret" must be a text', id="secret missing"),
        pytest.param(entry(type="token", secret=""), '"secret" must be', id="secret empty"),
        pytest.param(entry(type="token", secret=7), '"secret" must be', id="secret as number"),
        pytest.param(entry(type="token", secret="canary é"), "visible ASCII", id="token not ASCII"),
        pytest.param(entry(type="hmac", secret=CANARY), "64 bytes", id="key of 4 bytes"),
        pytest.param(entry(type="hmac", secret=CANARY + "!" * 80), "64 bytes", id="key not base64"),
        pytest.param(entry(type="hmac", secret=CANARY + "é" * 80), "64 bytes", id="key not ASCII"),
        pytest.param(entry(type="hmac", secret=CANARY + SECRET), "64 bytes", id="key too long"),
        pytest.param(
            entry(type="hmac", secret=f"{CANARY}\n{SECRET[7:]}"), "64 bytes", id="key with newline"
        ),
        pytest.param(several(keys={}), '"keys" must be a list', id="keys as object"),
        pytest.param(several(keys=[CANARY]), '"keys" must be a list', id="keys of text"),
        pytest.param(several(keys=[]), "must stand among", id="no keys"),
        pytest.param(several({"id": "a"}), '"keys": "secret" must be', id="a key without secret"),
        pytest.param(several({"secret": CANARY}), "the id of a key", id="a key without id"),
        pytest.param(several({"id": "a b", "secret": CANARY}), "the id of a key", id="bad id"),
        pytest.param(several({"id": 7, "secret": CANARY}), "the id of a key", id="id a number"),
        pytest.param(several(FIRST | {"secret": CANARY}), 'the same "id"', id="an id twice"),
        pytest.param(several(FIRST | {"id": "a"}), 'the same "secret"', id="a secret twice"),
        pytest.param(several(secret=CANARY), "must stand among", id="another one signs"),
        pytest.param(several({"id": "a", "secret": CANARY}), "64 bytes", id="a short key"),
        pytest.param(
            several({"id": "a", "secret": SECRET[::-1], "rights": CANARY}),
            '"rights" may',
            id="rights",
        ),
    ],
)
def test_bad_files(document: Any, message: str) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        load(document)
    assert message in str(caught.value)
    assert CANARY not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def message_of_refusal(text: str) -> str:
    try:
        load(text)
    except LocalProtocolError as e:
        return str(e)
    return ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["to-broadcaster", "type", "secret"]), inner)
    ),
    max_leaves=8,
)


@given(text=st.text() | JSON.map(json.dumps) | JSON.map(lambda v: json.dumps(BOTH | {"x": v})))
@settings(deadline=None)
def test_any_text_loads_or_is_refused(text: str) -> None:
    message_of_refusal(text)


@given(direction=JSON)
@settings(deadline=None)
def test_any_direction_loads_or_is_refused(direction: Any) -> None:
    message_of_refusal(json.dumps({"version": "2", "to-broadcaster": direction}))


@given(kind=st.sampled_from(secretsfile.KINDS), secret=st.text(min_size=8, max_size=200))
@settings(deadline=None)
def test_any_secret_loads_or_is_refused_without_telling_it(kind: str, secret: str) -> None:
    message = message_of_refusal(secretsfile.dump({"type": kind, "secret": secret}, None))
    assert secret not in message


# several keys


@pytest.mark.parametrize("kind", ["hmac", "token"])
def test_all_verify_and_the_secret_signs(kind: str) -> None:
    secrets = [secretsfile.generate(kind) for _ in range(3)]
    keys = [{"id": f"k{n}", **(s or {})} for n, s in enumerate(secrets)]
    document = {"version": "2", "to-broadcaster": {**(secrets[1] or {}), "keys": keys}}
    auth = load(document).to_broadcaster
    assert repr(auth).endswith("(k1, k0, k2)")
    for n, secret in enumerate(secrets):
        alone = load({"version": "2", "to-broadcaster": secret}).to_broadcaster
        value = alone.authorize(OPERATION, FIELDS, NOW)
        assert auth.check(OPERATION, FIELDS, value, NOW) is AuthResult.OK
        ours = auth.authorize(OPERATION, FIELDS, NOW)
        expected = AuthResult.OK if n == 1 else AuthResult.FORBIDDEN
        assert alone.check(OPERATION, FIELDS, ours, NOW) is expected


def test_rights_are_read() -> None:
    rights = {"notify": ["a/**"], "subscribe": [], "urls": ["http://h"]}
    tenant = {"id": "tenant", "secret": SECRET[::-1], "created": "2026-01-01", "rights": rights}
    auth = load(several(tenant)).to_broadcaster
    signer = load(entry(type="hmac", secret=SECRET[::-1])).to_broadcaster
    value = signer.authorize(OPERATION, {**FIELDS, "url": "http://i/"}, NOW)
    with pytest.raises(NotAllowed, match="'tenant'"):
        auth.check(OPERATION, {**FIELDS, "url": "http://i/"}, value, NOW)
