from __future__ import annotations

import base64
import hmac
from itertools import product
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import vectors
from lonelypsp import signing
from lonelypsp.errors import AuthResult, LocalProtocolError
from lonelypsp.replay import ReplayGuard
from lonelypsp.signing import OPERATIONS, Direction, Hmac, Nothing, Operation, Token, to_sign
from lonelypsp.wire import BYTES8, BYTES16, U8, U64, OptionalText, Reader
from outcomes import outcome
from strategies import values

ABOUT = vectors.load("stateless")["about"]
NOW = ABOUT["now"]
KEYS = {
    Direction.TO_BROADCASTER: bytes.fromhex(ABOUT["to_broadcaster_secret_raw_hex"]),
    Direction.TO_SUBSCRIBER: bytes.fromhex(ABOUT["to_subscriber_secret_raw_hex"]),
}
KEY = bytes(range(64))
OTHER_KEY = bytes(range(64, 128))

OK, UNAUTHORIZED, FORBIDDEN, UNAVAILABLE = AuthResult

# a value for every field of every operation, so that nothing but the operation itself differs
FIELDS: dict[str, Any] = {
    "tracing": b"",
    "url": "http://h/v1/receive",
    "recovery": "http://h/v1/recover",
    "topic": b"topic",
    "glob": "topic",
    "identifier": b"\x01\x02\x03\x04",
    "sha512": b"h" * 64,
    "etag_format": 0,
    "etag": b"h" * 64,
    "subscriber_nonce": b"n" * 32,
    "broadcaster_nonce": b"n" * 32,
    "enable_zstd": True,
    "enable_training": False,
    "initial_dict": 0,
    "part_id": 1,
    "num_subscribers": 1,
    "subscribers": 1,
    "compressor": 1,
    "level": 3,
    "min_size": 32,
    "max_size": 16_384,
}
CHECK = "CHECK_SUBSCRIPTIONS"


def signed(
    operation: str = CHECK,
    fields: dict[str, Any] = FIELDS,
    *,
    key: bytes = KEY,
    now: float = NOW,
    nonce: str = "AbC-_1",
) -> str:
    """The value as any implementation makes it, by the letter of the protocol."""
    timestamp = int(now)
    digest = hmac.digest(key, to_sign(operation, fields, timestamp, nonce), "sha512")
    return f"X-HMAC {timestamp}:{nonce}:{base64.b64encode(digest).decode()}"


def check(
    value: str | None, operation: str = CHECK, fields: dict[str, Any] = FIELDS, now: float = NOW
) -> AuthResult:
    return Hmac(KEY).check(operation, fields, value, now)


# against the older implementation


def fields_of(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a vector under our names."""
    ours = {
        "exact": "topic",
        "message_sha512": "sha512",
        "compressor_identifier": "compressor",
        "compression_level": "level",
    }
    fields = {ours.get(name, name): value for name, value in inputs.items()}
    if etag := fields.pop("strong_etag", None):
        fields |= {"etag_format": etag["format"], "etag": bytes.fromhex(etag["etag_hex"])}
    return fields


@pytest.mark.parametrize("row", vectors.rows("stateless", "hmac"))
def test_hmac_vectors(row: dict[str, Any]) -> None:
    operation = row["name"].rpartition(" ")[0]
    known = OPERATIONS[operation]
    assert (known.code, known.direction.value) == (row["message_type"], row["direction"])
    fields = fields_of(row["inputs"])
    assert set(fields) == {"tracing", *(name for name, _ in known.layout)}
    message = to_sign(operation, fields, int(row["now"]), row["nonce"])
    assert message.hex() == row["expected"]["to_sign_hex"]
    key, value = KEYS[known.direction], row["expected"]["authorization"]
    assert signed(operation, fields, key=key, now=row["now"], nonce=row["nonce"]) == value
    assert Hmac(key).check(operation, fields, value, row["now"]) is OK


def test_there_are_vectors_of_every_operation() -> None:
    names = {row["name"].rpartition(" ")[0] for row in vectors.load("stateless")["hmac"]}
    assert names == set(OPERATIONS)
    assert {name: row.code for name, row in OPERATIONS.items()} == ABOUT["auth_message_types"]


# Where ours differs on purpose, and why. One value, one spelling: what is signed, compared and
# remembered is then the same thing, and no intermediary can make a second valid text of one value.
DIFFERENT = {
    "padding stripped is accepted": "base64 has its padding, as every producer writes it",
    "characters outside the base64 alphabet are skipped": "nothing is skipped",
    "nonce longer than 255 bytes raises": "a bad value is an answer, not an exception",
}


@pytest.mark.parametrize("row", vectors.rows("stateless", "hmac_acceptance"))
def test_hmac_acceptance(row: dict[str, Any]) -> None:
    inputs = row["inputs"]
    auth = Hmac(KEYS[Direction.TO_BROADCASTER])
    arguments = (inputs["check"], inputs, inputs["authorization"], inputs["receiver_now"])
    if row["name"] == "replayed":
        assert auth.check(*arguments) is OK
    expected = "FORBIDDEN" if row["name"] in DIFFERENT else row["expected"]
    assert auth.check(*arguments).name == expected


def test_every_documented_difference_is_one() -> None:
    expected = {r["name"]: r["expected"] for r in vectors.load("stateless")["hmac_acceptance"]}
    assert all(expected[name] != "FORBIDDEN" for name in DIFFERENT)


@pytest.mark.parametrize("row", vectors.rows("stateless", "token_and_none"))
def test_token_and_none(row: dict[str, Any]) -> None:
    inputs = row["inputs"]
    auth = Token(inputs["token"]) if "token" in inputs else Nothing()
    if "authorization" in inputs:
        assert auth.check(CHECK, FIELDS, inputs["authorization"], NOW).name == row["expected"]
    else:
        assert auth.authorize(CHECK, FIELDS, NOW) == row["expected"]


# hmac


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_authorized_is_accepted(operation: str) -> None:
    auth = Hmac(KEY)
    value = auth.authorize(operation, FIELDS, NOW)
    assert value != auth.authorize(operation, FIELDS, NOW), "the nonce is new each time"
    assert auth.check(operation, FIELDS, value, NOW) is OK
    again = FORBIDDEN if OPERATIONS[operation].single_use else OK
    assert auth.check(operation, FIELDS, value, NOW) is again


def test_only_answers_to_our_own_identifier_are_not_remembered() -> None:
    reusable = {name for name, row in OPERATIONS.items() if not row.single_use}
    assert reusable == {"CONFIRM_RECEIVE", "CONFIRM_NOTIFY"}
    assert all("identifier" in dict(OPERATIONS[name].layout) for name in reusable)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_value_is_good_for_one_operation_only(operation: str) -> None:
    """T14, even if both directions had the same key and the fields were the same."""
    value = signed(operation)
    for other in OPERATIONS:
        assert check(value, other) is (OK if other == operation else FORBIDDEN), other


def other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value[:-1] + (b"?" if isinstance(value, bytes) else "?")


@pytest.mark.parametrize(
    ("operation", "field"),
    [(op, name) for op, row in OPERATIONS.items() for name in ["tracing", *dict(row.layout)]],
)
def test_every_field_is_covered(operation: str, field: str) -> None:
    value = signed(operation)
    changed = FIELDS | {field: other_value(FIELDS[field])}
    assert check(value, operation, FIELDS) is OK
    assert check(value, operation, changed) is FORBIDDEN


@pytest.mark.parametrize(
    ("signed_fields", "seen"),
    [
        pytest.param({"url": "ab", "topic": b"c"}, {"url": "a", "topic": b"bc"}, id="shift"),
        pytest.param(
            {"url": "a", "recovery": "b", "topic": b""},
            {"url": "a", "recovery": None, "topic": b"b"},
            id="recovery as topic",
        ),
        pytest.param({"recovery": "\0"}, {"recovery": None}, id="NUL as nothing"),
        pytest.param({"tracing": b"a", "url": ""}, {"tracing": b"", "url": "a"}, id="tracing"),
    ],
)
def test_bytes_do_not_move_between_fields(
    signed_fields: dict[str, Any], seen: dict[str, Any]
) -> None:
    value = signed("SUBSCRIBE_EXACT", FIELDS | signed_fields)
    assert check(value, "SUBSCRIBE_EXACT", FIELDS | signed_fields) is OK
    assert check(value, "SUBSCRIBE_EXACT", FIELDS | seen) is FORBIDDEN


def test_no_recovery_and_an_empty_one_are_the_same() -> None:
    """As on the wire, where nothing tells them apart."""
    value = signed("SUBSCRIBE_EXACT", FIELDS | {"recovery": None})
    assert check(value, "SUBSCRIBE_EXACT", FIELDS | {"recovery": ""}) is OK


def signable(text: str | None) -> st.SearchStrategy[tuple[Any, ...]]:
    """(operation, fields in order, timestamp, nonce)"""

    def of(operation: Operation) -> st.SearchStrategy[tuple[Any, ...]]:
        codecs = [BYTES16, *(codec for _, codec in operation.layout)]
        fields = st.tuples(*(values(codec, text=text) for codec in codecs))
        nonce = st.text("AB", max_size=2) if text else st.text(max_size=20)
        stamp = st.integers(0, 2) if text else st.integers(0, 2**64 - 1)
        return st.tuples(st.just(operation.name), fields, stamp, nonce)

    return st.sampled_from(list(OPERATIONS.values())).flatmap(of)


def bytes_of(drawn: tuple[Any, ...]) -> bytes:
    operation, fields, stamp, nonce = drawn
    names = ["tracing", *(name for name, _ in OPERATIONS[operation].layout)]
    return to_sign(operation, dict(zip(names, fields, strict=True)), stamp, nonce)


@given(one=signable("AB"), other=signable("AB"))
@settings(deadline=None, max_examples=500)
def test_different_messages_never_sign_alike(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assume(one != other)
    assert bytes_of(one) != bytes_of(other)


@given(drawn=signable(None))
@settings(deadline=None, max_examples=300)
def test_signed_bytes_can_be_read_back(drawn: tuple[Any, ...]) -> None:
    """The proof of the test above: from the bytes follows what was signed, all of it."""
    operation, fields, stamp, nonce = drawn
    reader = Reader(bytes_of(drawn))
    assert U8.decode(reader, "code") == OPERATIONS[operation].code
    assert U64.decode(reader, "time") == stamp
    assert BYTES8.decode(reader, "nonce").decode() == nonce
    codecs = [BYTES16, *(codec for _, codec in OPERATIONS[operation].layout)]
    assert tuple(codec.decode(reader, "field") for codec in codecs) == fields
    assert reader.remaining == 0


ODD_VALUES: list[Any] = [
    *(None, True, 1.5, "", "text", "\ud800", "é" * 40_000, [], -1, 255, 256, 2**32, 2**64),
    *(b"", b"x" * 64, b"x" * 255, b"x" * 256, b"x" * 1_024, b"x" * 65_536, memoryview(b"x" * 64)),
]


def same_signed(operation: str, fields: dict[str, Any], stamp: Any, nonce: Any) -> None:
    row = OPERATIONS[operation]
    by_walk = outcome(lambda: signing._to_sign(row, fields, stamp, nonce))
    assert outcome(lambda: to_sign(operation, fields, stamp, nonce)) == by_walk


@given(drawn=signable(None))
@settings(deadline=None, max_examples=300)
def test_the_quick_way_signs_as_the_walk(drawn: tuple[Any, ...]) -> None:
    operation, signable_values, stamp, nonce = drawn
    names = ["tracing", *(name for name, _ in OPERATIONS[operation].layout)]
    fields = dict(zip(names, signable_values, strict=True))
    assert OPERATIONS[operation].pack(fields, stamp, nonce) == bytes_of(drawn)
    same_signed(operation, fields, stamp, nonce)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_quick_way_refuses_as_the_walk(operation: str) -> None:
    for name in ["tracing", *dict(OPERATIONS[operation].layout)]:
        same_signed(operation, {k: v for k, v in FIELDS.items() if k != name}, 0, "n")
        for value in ODD_VALUES:
            same_signed(operation, FIELDS | {name: value}, 0, "n")
    for value in ODD_VALUES:
        same_signed(operation, FIELDS, value, "n")
        same_signed(operation, FIELDS, 0, value)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fields_that_are_not_signed_do_not_matter(operation: str) -> None:
    """A connection gives all that it knows about a message."""
    needed = {"tracing", *dict(OPERATIONS[operation].layout)}
    only = {name: value for name, value in FIELDS.items() if name in needed}
    more = FIELDS | {"body": object(), "authorization": None}
    assert signed(operation, only) == signed(operation, more)
    assert Hmac(KEY).check(operation, more, signed(operation, only), NOW) is OK
    assert check(Hmac(KEY).authorize(operation, more, NOW), operation, only) is OK


@pytest.mark.parametrize("part_id", [0, 255, 256, 257, 40_000, 2**64 - 1])
def test_any_part_can_be_acknowledged(part_id: int) -> None:
    """Deliberately different: older peers sign parts 0 to 255, as ours, and fail on later ones."""
    operation, fields = "STATEFUL_CONTINUE_RECEIVE", FIELDS | {"part_id": part_id}
    assert signed(operation, fields) == signed(operation, FIELDS | {"part_id": part_id % 256})
    value = Hmac(KEY).authorize(operation, fields, NOW)
    assert check(value, operation, fields) is OK
    assert check(value, operation, fields | {"part_id": part_id + 1}) is FORBIDDEN
    assert check(value, operation, fields | {"url": "websocket:n:-2"}) is FORBIDDEN


@given(key=st.binary(min_size=64, max_size=64), message=st.binary(max_size=400))
@settings(deadline=None)
def test_the_code_is_hmac(key: bytes, message: bytes) -> None:
    secret = signing._Secret(key)
    for _ in range(2):
        assert secret.digest(message) == hmac.digest(key, message, "sha512")


def test_codes_keep_operations_apart() -> None:
    codes = [row.code for row in OPERATIONS.values()]
    assert sorted(codes) == list(range(1, 22))
    optional = [n for r in OPERATIONS.values() for n, c in r.layout if isinstance(c, OptionalText)]
    assert set(optional) == {"recovery"}


@pytest.mark.parametrize("key", [KEY, KEYS[Direction.TO_SUBSCRIBER]], ids=["one", "another"])
def test_a_valid_value_has_one_spelling(key: bytes) -> None:
    """T15: whatever one changes, adds or takes away at any place, it is refused."""
    value = signed(key=key)
    characters = [chr(i) for i in range(256)] + ["\u0663", "\uff11", "\ud800", "\udce9"]
    changed = {value[:i] + value[i + 1 :] for i in range(len(value))}
    for i, c in product(range(len(value) + 1), characters):
        changed |= {value[:i] + c + value[i:], value[:i] + c + value[i + 1 :]}
    changed.discard(value)
    auth = Hmac(key)
    accepted = [c for c in changed if auth.check(CHECK, FIELDS, c, NOW) is not FORBIDDEN]
    assert accepted == []
    assert auth.check(CHECK, FIELDS, value, NOW) is OK


GOOD_TIME, GOOD_NONCE, GOOD_CODE = signed().removeprefix("X-HMAC ").split(":")


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("", id="empty"),
        pytest.param("X-HMAC", id="scheme only"),
        pytest.param("X-HMAC ::", id="nothing but colons"),
        pytest.param(f"X-HMAC {GOOD_TIME}:{GOOD_CODE}", id="no nonce"),
        pytest.param(f"X-HMAC {GOOD_TIME}::{GOOD_CODE}", id="empty nonce"),
        pytest.param(f"X-HMAC {GOOD_TIME}:a:b:{GOOD_CODE}", id="colon in nonce"),
        pytest.param(f"X-HMAC {GOOD_TIME}:{'n' * 256}:{GOOD_CODE}", id="nonce of 256 bytes"),
        pytest.param(f"X-HMAC {GOOD_TIME}:é:{GOOD_CODE}", id="nonce not ASCII"),
        pytest.param(f"X-HMAC {2**63}:{GOOD_NONCE}:{GOOD_CODE}", id="time of 2^63"),
        pytest.param(f"X-HMAC {'9' * 5000}:{GOOD_NONCE}:{GOOD_CODE}", id="time of 5,000 digits"),
        pytest.param(f"X-HMAC -1:{GOOD_NONCE}:{GOOD_CODE}", id="time negative"),
        pytest.param(f"X-HMAC +{GOOD_TIME}:{GOOD_NONCE}:{GOOD_CODE}", id="time with sign"),
        pytest.param(f"X-HMAC 0{GOOD_TIME}:{GOOD_NONCE}:{GOOD_CODE}", id="time with a zero"),
        pytest.param(f"X-HMAC 1_700000000:{GOOD_NONCE}:{GOOD_CODE}", id="time with underscore"),
        pytest.param(f"X-HMAC  {GOOD_TIME}:{GOOD_NONCE}:{GOOD_CODE}", id="two spaces"),
        pytest.param(f"X-HMAC {GOOD_TIME}:{GOOD_NONCE}:{GOOD_CODE}\n", id="newline at the end"),
        pytest.param(f"X-HMAC {GOOD_TIME}:{GOOD_NONCE}:{GOOD_CODE[:-2]}", id="no padding"),
        pytest.param(f"X-HMAC {GOOD_TIME}:{GOOD_NONCE}:{'A' * 84}", id="code of 63 bytes"),
        pytest.param(f"X-HMAC {GOOD_TIME}:{GOOD_NONCE}:{'A' * 87}=", id="code of 65 bytes"),
        pytest.param("Bearer " + GOOD_CODE, id="token"),
        pytest.param("Basic eA==", id="basic"),
        pytest.param("X-HMAC \udcff\ud800", id="surrogates"),
    ],
)
def test_bad_values_are_forbidden(value: str) -> None:
    assert check(value) is FORBIDDEN


def test_changed_trailing_bits_are_another_value() -> None:
    """The last character before the padding holds 2 bits; lenient decoders ignore its other 4."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = alphabet.index(GOOD_CODE[-3])
    assert last % 16 == 0
    twin = GOOD_CODE[:-3] + alphabet[last + 1] + "=="
    assert base64.b64decode(twin) == base64.b64decode(GOOD_CODE)
    assert check(f"X-HMAC {GOOD_TIME}:{GOOD_NONCE}:{twin}") is FORBIDDEN


@pytest.mark.parametrize(
    ("skew", "result"),
    [
        (-120.001, FORBIDDEN),
        (-120.0, OK),
        (-1.0, OK),
        (0.0, OK),
        (119.999, OK),
        (120.0, OK),
        (120.001, FORBIDDEN),
        (86_400.0, FORBIDDEN),
    ],
)
def test_clock_limits(skew: float, result: AuthResult) -> None:
    stamp = 1_700_000_000
    assert check(signed(now=stamp), now=stamp + skew) is result


def test_token_lifetime_is_a_setting() -> None:
    value = signed(now=1000)
    assert Hmac(KEY, token_lifetime=5).check(CHECK, FIELDS, value, 1005) is OK
    assert Hmac(KEY, token_lifetime=5).check(CHECK, FIELDS, value, 1005.5) is FORBIDDEN


def test_a_refused_value_is_not_remembered() -> None:
    """Otherwise a stranger could burn values that he saw elsewhere."""
    auth = Hmac(KEY)
    value = signed("SUBSCRIBE_EXACT")
    assert auth.check("SUBSCRIBE_GLOB", FIELDS, value, NOW) is FORBIDDEN
    assert auth.check("SUBSCRIBE_EXACT", FIELDS, value, NOW + 500) is FORBIDDEN
    assert auth.check("SUBSCRIBE_EXACT", FIELDS, value, NOW) is OK


def test_fields_that_nobody_can_sign_are_forbidden() -> None:
    value = signed()
    for url in ("u" * 65_536, "\ud800"):
        assert check(value, CHECK, FIELDS | {"url": url}) is FORBIDDEN
        with pytest.raises(LocalProtocolError, match=r"^url: "):
            Hmac(KEY).authorize(CHECK, FIELDS | {"url": url}, NOW)


@pytest.mark.parametrize("nonce", ["n" * 256, "é" * 128, "\ud800"], ids=["256", "é", "surrogate"])
def test_nonces_that_do_not_fit(nonce: str) -> None:
    with pytest.raises(LocalProtocolError, match=r"^nonce: "):
        to_sign(CHECK, FIELDS, 0, nonce)


def test_keys_rotate() -> None:
    before, during, after = Hmac(KEY), Hmac([OTHER_KEY, KEY]), Hmac([OTHER_KEY])

    def accepts(verifier: Hmac, signer: Hmac) -> AuthResult:
        return verifier.check(CHECK, FIELDS, signer.authorize(CHECK, FIELDS, NOW), NOW)

    assert accepts(during, before) is OK, "who has not rotated yet"
    assert accepts(during, during) is OK
    assert accepts(before, during) is FORBIDDEN, "the newest signs"
    assert accepts(after, during) is OK
    assert accepts(during, after) is OK
    assert accepts(after, before) is FORBIDDEN, "a retired key"


def test_the_guard_is_shared_by_both_directions() -> None:
    guard = ReplayGuard()
    up, down = Hmac(KEY, replay=guard), Hmac(OTHER_KEY, replay=guard)
    assert up.check(CHECK, FIELDS, signed(), NOW) is OK
    assert down.check(CHECK, FIELDS, signed(key=OTHER_KEY), NOW) is OK
    assert len(guard) == 2


def test_a_full_guard_makes_the_check_unavailable() -> None:
    auth = Hmac(KEY, replay=ReplayGuard(max_codes=1))
    assert auth.check(CHECK, FIELDS, signed(nonce="a"), NOW) is OK
    assert auth.check(CHECK, FIELDS, signed(nonce="b"), NOW) is UNAVAILABLE
    assert auth.check(CHECK, FIELDS, signed(nonce="a"), NOW) is FORBIDDEN


@pytest.mark.parametrize(
    "secrets",
    [b"", b"x" * 63, b"x" * 65, [], [KEY, b"short"]],
    ids=["empty", "63", "65", "no key", "second one short"],
)
def test_bad_keys_are_refused(secrets: Any) -> None:
    with pytest.raises(LocalProtocolError, match="64 bytes"):
        Hmac(secrets)


# token


@pytest.mark.parametrize(
    "token", ["", " ", "a b", "a\n", "é", "\x7f", "\ud800"], ids=lambda token: ascii(token)
)
def test_bad_tokens_are_refused(token: str) -> None:
    with pytest.raises(LocalProtocolError):
        Token(token)


STRANGE = ["é", "Bearer é", "Bearer \xe9", "\ud800", "Bearer \udce9", "\0", "\U0001f600", "٣" * 200]


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: ascii(value)[:30])
@pytest.mark.parametrize("auth", [Token("secret"), Hmac(KEY)], ids=["token", "hmac"])
def test_strange_characters_are_forbidden(auth: Any, value: str) -> None:
    """B11: they must not raise."""
    assert auth.check(CHECK, FIELDS, value, NOW) is FORBIDDEN


@given(value=st.text(st.characters(exclude_categories=[])))
@settings(deadline=None, max_examples=300)
def test_any_text_is_forbidden(value: str) -> None:
    for auth in (Token("secret"), Hmac(KEY)):
        for text in (value, "Bearer " + value, "X-HMAC " + value, f"X-HMAC {GOOD_TIME}:{value}"):
            assert auth.check(CHECK, FIELDS, text, NOW) is FORBIDDEN


@pytest.mark.parametrize("auth", [Token("secret"), Hmac(KEY)], ids=["token", "hmac"])
def test_nothing_is_unauthorized(auth: Any) -> None:
    assert auth.check(CHECK, FIELDS, None, NOW) is UNAUTHORIZED


def test_secrets_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """T16: on bytes, both sides whole, whatever the value is."""
    compared: list[tuple[bytes, bytes]] = []

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(signing.hmac, "compare_digest", spy)
    wrong = f"X-HMAC {GOOD_TIME}:{GOOD_NONCE}:{'A' * 86}=="
    assert check(wrong) is FORBIDDEN
    assert Token("secret").check(CHECK, FIELDS, "Bearer é", NOW) is FORBIDDEN
    assert compared == [
        (b"A" * 86 + b"==", GOOD_CODE.encode()),
        ("Bearer é".encode(), b"Bearer secret"),
    ]


@pytest.mark.parametrize("auth", [Token("s3cret"), Hmac(b"s3cret" + KEY[6:]), Nothing()])
def test_repr_holds_no_secret(auth: Any) -> None:
    assert "s3cret" not in repr(auth)
    assert type(auth).__name__ in repr(auth)
