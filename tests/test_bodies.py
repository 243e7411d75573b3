from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vectors
from lonelypsp import bodies, wire
from lonelypsp.bodies import BROADCASTER_ENDPOINTS, SUBSCRIBER_ENDPOINTS, Endpoint
from lonelypsp.errors import AuthResult, RemoteProtocolError
from lonelypsp.etag import strong_etag, wanted
from lonelypsp.signing import OPERATIONS, Direction, Hmac
from strategies import messages

BODIES: list[type[Any]] = [
    cls
    for cls in vars(bodies).values()
    if isinstance(cls, type) and cls.__module__ == bodies.__name__ and wire.layout(cls)
]
HEADS = (bodies.NotifyHead, bodies.ReceiveHead)
TOLERANT = {
    "SubscribeExact",
    "SubscribeGlob",
    "UnsubscribeExact",
    "UnsubscribeGlob",
    "CheckSubscriptions",
    "SetSubscriptions",
    "Missed",
}
ENDPOINTS = {
    **BROADCASTER_ENDPOINTS,
    **SUBSCRIBER_ENDPOINTS,
    # a broadcaster in the subscriber's role
    "/v1/receive_for_websockets": SUBSCRIBER_ENDPOINTS["/v1/receive"],
    "/v1/missed_for_websockets": SUBSCRIBER_ENDPOINTS["/v1/recover"],
}
ABOUT = vectors.load("stateless")["about"]
NOW = ABOUT["now"]
KEYS = {
    Direction.TO_BROADCASTER: bytes.fromhex(ABOUT["to_broadcaster_secret_raw_hex"]),
    Direction.TO_SUBSCRIBER: bytes.fromhex(ABOUT["to_subscriber_secret_raw_hex"]),
}
RECEIVE_URL, RECOVERY_URL = bodies.subscriber_urls("http://127.0.0.1:3002")


def split_message(request: type[Any], body: bytes) -> tuple[Any, bytes]:
    """A request body as its head and the message behind it (none for whole bodies)."""
    if request not in HEADS:
        return wire.decode(request, body), b""
    found = wire.HeadParser(request).feed(body)
    assert found is not None
    return found


def judge(operation: str, authorization: str | None, *sources: Any, **more: Any) -> AuthResult:
    """Checks a value over the operation's fields, each from the first source that has it."""
    names = ["tracing", *(name for name, _ in OPERATIONS[operation].layout)]
    fields = {}
    for name in names:
        found = [getattr(source, name) for source in sources if hasattr(source, name)]
        fields[name] = found[0] if found else more.get(name)
    return Hmac(KEYS[OPERATIONS[operation].direction]).check(operation, fields, authorization, NOW)


# ours against the recorded bytes


def built(row: dict[str, Any]) -> Any:
    """The request that a client makes of a row's inputs: our own bytes, not re-encoded ones."""
    inputs, path = row["inputs"], row["expected"]["path"]
    url, recovery = bodies.subscriber_urls(inputs.get("host", ""))
    topic, glob = inputs.get("topic"), inputs.get("glob")
    if path == "/v1/subscribe/exact":
        return bodies.SubscribeExact(url, topic, recovery)
    if path == "/v1/subscribe/glob":
        return bodies.SubscribeGlob(url, glob, recovery)
    if path == "/v1/unsubscribe/exact":
        return bodies.UnsubscribeExact(url, topic)
    if path == "/v1/unsubscribe/glob":
        return bodies.UnsubscribeGlob(url, glob)
    if path == "/v1/check_subscriptions":
        return bodies.CheckSubscriptions(b"", url)
    if path == "/v1/set_subscriptions":
        exact, globs = wanted(inputs["exact"], inputs["globs"], recovery)
        etag = strong_etag(url, exact, globs)
        return bodies.SetSubscriptions(b"", url, bodies.ETAG_FORMAT, etag, exact, globs)
    assert path == "/v1/notify"
    sha512 = hashlib.sha512(inputs["data"]).digest()
    identifier, tracing = inputs["identifier"], inputs["tracing"]
    return bodies.NotifyHead(topic, sha512, tracing, identifier, len(inputs["data"]))


@pytest.mark.parametrize("row", vectors.rows("stateless", "client_requests"))
def test_client_requests(row: dict[str, Any]) -> None:
    expected = row["expected"]
    body = bytes.fromhex(expected["body_hex"])
    endpoint = BROADCASTER_ENDPOINTS[expected["path"]]
    request = built(row)
    assert type(request) is endpoint.request
    assert wire.encode(request) + row["inputs"].get("data", b"") == body
    assert split_message(endpoint.request, body) == (request, row["inputs"].get("data", b""))
    if row["inputs"]["auth"] == "hmac":
        value = expected["headers"]["Authorization"]
        assert judge(endpoint.request_operation, value, request) is AuthResult.OK


def test_every_broadcaster_endpoint_has_client_requests() -> None:
    paths = {r["expected"]["path"] for r in vectors.load("stateless")["client_requests"]}
    assert paths == set(BROADCASTER_ENDPOINTS)


def exchanges(section: str) -> list[Any]:
    """The recorded exchanges that ended well."""
    return [
        p for p in vectors.rows("stateless", section) if p.values[0]["expected"]["status"] == 200
    ]


@pytest.mark.parametrize(
    "row", [*exchanges("broadcaster_responses"), *exchanges("subscriber_responses")]
)
def test_responses(row: dict[str, Any]) -> None:
    inputs = row["inputs"]
    endpoint: Endpoint = ENDPOINTS[inputs["path"]]
    body = bytes.fromhex(row["expected"]["body_hex"])
    response = wire.decode(endpoint.response, body)
    assert wire.encode(response) == body

    request, message = split_message(endpoint.request, bytes.fromhex(inputs["body_hex"]))
    if inputs["auth"] == "none":
        assert response.authorization is None
        return
    base = "http://127.0.0.1:3003" if "websockets" in inputs["path"] else "http://127.0.0.1:3002"
    url = base + inputs["path"]
    around = {"sha512": hashlib.sha512(message).digest(), "url": url, "recovery": None}
    asked, answered = inputs["headers"]["Authorization"], response.authorization
    if "missed" in inputs["path"] or "recover" in inputs["path"]:
        asks = judge(endpoint.request_operation, asked, request, url=url, recovery=url)
    else:
        asks = judge(endpoint.request_operation, asked, request, **around)
    assert asks is AuthResult.OK
    if isinstance(request, bodies.UnsubscribeExact | bodies.UnsubscribeGlob):
        assert not hasattr(request, "recovery"), "both signatures are over an empty recovery"
    assert judge(endpoint.response_operation, answered, response, request, **around) is (
        AuthResult.OK
    )


@pytest.mark.parametrize(
    "row",
    [
        row
        for section in ("broadcaster_responses", "subscriber_responses")
        for row in vectors.rows("stateless", section)
        if re.search("truncated|not utf-8|unsorted|duplicate", row.id or "")
    ],
)
def test_requests_that_are_no_requests(row: dict[str, Any]) -> None:
    request = ENDPOINTS[row["inputs"]["path"]].request
    body = bytes.fromhex(row["inputs"]["body_hex"])
    if request in HEADS:
        parser = wire.HeadParser(request)
        assert parser.feed(body) is None
        assert parser.end().status == 400
        return
    with pytest.raises(RemoteProtocolError) as caught:
        wire.decode(request, body)
    assert caught.value.status == 400


@pytest.mark.parametrize("row", vectors.rows("stateless", "broadcaster_receive_requests"))
def test_broadcaster_receive_requests(row: dict[str, Any]) -> None:
    inputs, headers = row["inputs"], row["expected"]["headers"]
    message = inputs["message"]
    sha512 = hashlib.sha512(message).digest()
    head = bodies.ReceiveHead(
        inputs["tracing"], inputs["topic"], inputs["identifier"], len(message)
    )
    body = wire.encode(head) + message
    assert body.hex() == row["expected"]["body_hex"]
    assert headers["Content-Length"] == str(len(body))
    assert headers["Repr-Digest"] == "sha-512=" + base64.b64encode(sha512).decode()
    result = judge("RECEIVE", headers.get("Authorization"), head, url=inputs["url"], sha512=sha512)
    expected = AuthResult.OK if inputs["auth"] == "hmac" else AuthResult.UNAUTHORIZED
    assert result is expected


@pytest.mark.parametrize("row", vectors.rows("stateless", "broadcaster_missed_requests"))
def test_broadcaster_missed_requests(row: dict[str, Any]) -> None:
    inputs, expected = row["inputs"], row["expected"]
    missed = bodies.Missed(inputs["tracing"], inputs["topic"])
    assert wire.encode(missed).hex() == expected["body_hex"]
    value = expected["headers"].get("Authorization")
    result = judge("MISSED", value, missed, recovery=inputs["recovery"])
    assert result is (AuthResult.OK if inputs["auth"] == "hmac" else AuthResult.UNAUTHORIZED)


@pytest.mark.parametrize("row", vectors.rows("stateless", "subscriber_urls"))
def test_subscriber_urls(row: dict[str, Any]) -> None:
    expected = row["expected"]
    assert bodies.subscriber_urls(row["inputs"]["host"]) == (
        expected["receive_url"],
        expected["recovery_url"],
    )


def test_smallest_trace() -> None:
    row = vectors.load("stateless")["simple_tracing"][-1]
    assert row["name"].startswith("smallest")
    now_ns = row["inputs"]["now_ns"]
    assert bodies.smallest_trace(now_ns, now_ns).hex() == row["expected"]["tracing_hex"]


def test_unsubscribe_immediate_is_no_response_of_ours() -> None:
    assert bodies.UNSUBSCRIBE_IMMEDIATE == b"\x00\x0a"
    for endpoint in ENDPOINTS.values():
        with pytest.raises(RemoteProtocolError, match="type 10 where"):
            wire.decode(endpoint.response, bodies.UNSUBSCRIBE_IMMEDIATE)


# the tables themselves


def test_there_are_bodies() -> None:
    assert len(BODIES) == 15


@pytest.mark.parametrize("path", [*BROADCASTER_ENDPOINTS, *SUBSCRIBER_ENDPOINTS])
def test_endpoint_signs_what_it_carries(path: str) -> None:
    """Every signed field stands in a body; what does not is known to both sides otherwise."""
    endpoint = ENDPOINTS[path]
    assert endpoint.path == path
    elsewhere = {
        "/v1/unsubscribe/exact": {"recovery"},  # always none
        "/v1/unsubscribe/glob": {"recovery"},
        "/v1/receive": {"url", "sha512"},  # the subscription, the Repr-Digest header
        "/v1/recover": {"url", "recovery"},
    }.get(path, set())
    asked, answered = (
        OPERATIONS[endpoint.request_operation],
        OPERATIONS[endpoint.response_operation],
    )
    assert asked.direction is not answered.direction
    request, response = set(wire.layout(endpoint.request)), set(wire.layout(endpoint.response))
    assert {name for name, _ in asked.layout} <= request | elsewhere
    assert {name for name, _ in answered.layout} <= request | response | elsewhere
    assert "authorization" in response


def test_response_types() -> None:
    types = {cls.__name__: cls.TYPE for cls in BODIES if hasattr(cls, "TYPE")}
    recorded = {
        **ABOUT["stateless_subscriber_to_broadcaster_types"],
        **ABOUT["stateless_broadcaster_to_subscriber_types"],
    }
    responses = {name: kind for name, kind in recorded.items() if name.startswith("RESPONSE")}
    assert {re.sub("(?<!^)([A-Z])", r"_\1", n).upper(): t for n, t in types.items()} == {
        name: kind for name, kind in responses.items() if name != "RESPONSE_UNSUBSCRIBE_IMMEDIATE"
    }


# any values, any bytes


@pytest.mark.parametrize("cls", BODIES)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_round_trip(cls: type[Any], data: st.DataObject) -> None:
    message = data.draw(messages(cls))
    assert wire.decode(cls, wire.encode(message)) == message


@pytest.mark.parametrize("cls", BODIES)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_cut_is_refused(cls: type[Any], data: st.DataObject) -> None:
    body = wire.encode(data.draw(messages(cls)))
    cut = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(RemoteProtocolError):
        wire.decode(cls, body[:cut])


@pytest.mark.parametrize("cls", BODIES)
@given(data=st.data(), trailing=st.binary(min_size=1, max_size=8))
@settings(deadline=None, max_examples=30)
def test_trailing_bytes(cls: type[Any], data: st.DataObject, trailing: bytes) -> None:
    """Ignored on the requests where the older implementation ignores them, refused elsewhere."""
    message = data.draw(messages(cls))
    body = wire.encode(message) + trailing
    if cls.__name__ in TOLERANT:
        assert wire.decode(cls, body) == message
    else:
        with pytest.raises(RemoteProtocolError, match="after the last field"):
            wire.decode(cls, body)


def decode_or_refuse(cls: type[Any], data: bytes) -> None:
    """Either a refusal, or a message that is those very bytes."""
    try:
        message = wire.decode(cls, data)
    except RemoteProtocolError:
        return
    again = wire.encode(message)
    assert data.startswith(again) if cls.__name__ in TOLERANT else data == again


@pytest.mark.parametrize("cls", BODIES)
@given(data=st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_any_bytes(cls: type[Any], data: bytes) -> None:
    prefix = wire.U16.encode(cls.TYPE, "") if hasattr(cls, "TYPE") else b""
    decode_or_refuse(cls, data)
    decode_or_refuse(cls, prefix + data)


@pytest.mark.parametrize("cls", BODIES)
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_almost_a_message(cls: type[Any], data: st.DataObject) -> None:
    body = bytearray(wire.encode(data.draw(messages(cls))))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    decode_or_refuse(cls, bytes(body))


@pytest.mark.parametrize("cls", BODIES)
def test_messages_are_values(cls: type[Any]) -> None:
    fields = {field.name for field in dataclasses.fields(cls)}
    assert fields == set(wire.layout(cls)), "every field has a place on the wire"
    assert cls.__hash__ is not None
    assert hasattr(cls, "__slots__")
