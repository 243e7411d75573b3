"""W3C trace context in tracing bytes; whatever else is there is no trace."""

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lonelypsp import session as s
from lonelypsp.bodies import smallest_trace
from lonelypsp.session import COUNTS_PARTS
from lonelypsp.tracecontext import MAX_TRACESTATE, decode, encode, forwarded, hops, passed_on
from sessions import AUTHS, NOW, SMALL, OlderBroadcaster, OlderSubscriber, Pair, parts, plain

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"

CONTEXTS = {
    PARENT.encode(): {"traceparent": PARENT},
    f"{PARENT}\na=1,b@c=2".encode(): {"traceparent": PARENT, "tracestate": "a=1,b@c=2"},
    f"00-{TRACE}-{SPAN}-00".encode(): {"traceparent": f"00-{TRACE}-{SPAN}-00"},
    f"01-{TRACE}-{SPAN}-ab".encode(): {"traceparent": f"01-{TRACE}-{SPAN}-ab"},
}
NO_CONTEXTS = [
    b"",
    b"\n",
    b"\na=1",
    COUNTS_PARTS,
    b"window=1024",
    smallest_trace(1, 2),
    PARENT.upper().encode(),
    PARENT.encode()[:-1],
    PARENT.encode() + b"0",
    PARENT.encode() + b"-00",
    PARENT.encode() + b"\n",
    b" " + PARENT.encode(),
    PARENT.encode() + b"\na=1\n",
    PARENT.encode() + b"\r\na=1",
    PARENT.encode() + b"\na=\xff",
    PARENT.encode() + b"\n" + b"a" * (MAX_TRACESTATE + 1),
    PARENT.encode() * 1000,
    f"ff-{TRACE}-{SPAN}-01".encode(),
    f"00-{'0' * 32}-{SPAN}-01".encode(),
    f"00-{TRACE}-{'0' * 16}-01".encode(),
    PARENT.encode().replace(b"a", "\N{ARABIC-INDIC DIGIT ONE}".encode()),
    PARENT.encode("utf-16"),
]


@pytest.mark.parametrize("tracing", CONTEXTS)
def test_a_context(tracing: bytes) -> None:
    assert decode(tracing) == CONTEXTS[tracing]
    assert encode(CONTEXTS[tracing]) == tracing
    assert passed_on(tracing) == tracing


@pytest.mark.parametrize("tracing", NO_CONTEXTS)
def test_anything_else_is_none(tracing: bytes) -> None:
    assert decode(tracing) == {}
    assert passed_on(tracing) == b""


@pytest.mark.parametrize(
    "carrier",
    [
        {},
        {"tracestate": "a=1"},
        {"traceparent": ""},
        {"traceparent": PARENT + "\n"},
        {"traceparent": PARENT.replace("b", "\N{ARABIC-INDIC DIGIT ONE}")},
        {"Traceparent": PARENT},
    ],
)
def test_nothing_to_send(carrier: dict[str, str]) -> None:
    assert encode(carrier) == b""


@pytest.mark.parametrize(
    "state", ["", "a" * (MAX_TRACESTATE + 1), "a=1\nb=2", "é", "\x00", "\ud800"]
)
def test_a_tracestate_that_does_not_fit_is_left_out(state: str) -> None:
    assert encode({"traceparent": PARENT, "tracestate": state}) == PARENT.encode()


parents = st.builds(
    "{:02x}-{:032x}-{:016x}-{:02x}".format,
    st.integers(0, 254),
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.integers(0, 255),
)
states = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=MAX_TRACESTATE)


@given(parents, states)
def test_what_is_encoded_is_decoded(parent: str, state: str) -> None:
    tracing = encode({"traceparent": parent, "tracestate": state})
    assert len(tracing) <= 55 + 1 + MAX_TRACESTATE
    expected = {"traceparent": parent} | ({"tracestate": state} if state else {})
    assert decode(tracing) == expected


@given(st.binary() | st.text("0123456789abcdef-\n=,").map(str.encode))
def test_any_bytes(tracing: bytes) -> None:
    carrier = decode(tracing)
    assert encode(carrier) == passed_on(tracing) == (tracing if carrier else b"")


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["traceparent", "tracestate", "x"]), st.text() | parents))
def test_any_carrier(carrier: dict[str, str]) -> None:
    assert decode(encode(carrier)).items() <= carrier.items()


BODY = bytes(range(256)) * 20
TRACED = dataclasses.replace(plain(BODY), tracing=PARENT.encode())
PEERS: list[dict[str, Any]] = [
    {},
    {"broadcaster": OlderBroadcaster},
    {"subscriber": OlderSubscriber},
]


@pytest.mark.parametrize("auth", AUTHS)
@pytest.mark.parametrize("peers", PEERS)
def test_it_goes_with_a_message_over_a_websocket(auth: str, peers: dict[str, Any]) -> None:
    """In one frame and in parts, signed, also with peers that do not care."""
    both: dict[str, Any] = {"client": {"limits": SMALL}, "server": {"limits": SMALL}}
    ends = Pair(AUTHS[auth](), **both, **peers)
    small = dataclasses.replace(plain(b"x"), tracing=PARENT.encode())
    for _ in range(2):
        if peers.get("subscriber") is not OlderSubscriber:  # which never sends any
            for frame in (ends.client.notify(small, b"x", NOW), *parts(ends.client, TRACED, BODY)):
                event: Any = ends.up(frame)
                assert event.head.tracing == PARENT.encode()
                assert ends.answer_down(event)
            assert isinstance(event, s.BodyArrived)
        for frame in (ends.server.deliver(small, b"x", NOW), *parts(ends.server, TRACED, BODY)):
            event = ends.down(frame)
            assert event.head.tracing == PARENT.encode()
            assert ends.answer_up(event)
        assert isinstance(event, s.BodyArrived)


def test_it_needs_room_in_a_frame() -> None:
    session = Pair(client={"limits": s.Limits(frame_length=2000)}).client
    body = b"x" * (2000 - s.HEAD_ALLOWANCE - 1 - 4)
    assert session.one_frame(plain(body))
    assert not session.one_frame(dataclasses.replace(plain(body), tracing=b"x"))


# Hops


@pytest.mark.parametrize(
    ("tracestate", "expected"),
    [
        ("lonelyps=hops:0", 0),
        ("lonelyps=hops:7", 7),
        ("a=1, lonelyps=hops:12 ,b=2", 12),
        ("a=1,lonelyps=hops:999", 999),
        ("lonelyps=hops:1000", 0),
        ("lonelyps=hops:", 0),
        ("lonelyps=hops:-1", 0),
        ("xlonelyps=hops:3", 0),
        ("lonelyps=hops:3x", 0),
        ("a=1", 0),
    ],
)
def test_hops(tracestate: str, expected: int) -> None:
    assert hops(f"{PARENT}\n{tracestate}".encode()) == expected


@pytest.mark.parametrize("tracing", NO_CONTEXTS)
def test_no_hops_in_anything_else(tracing: bytes) -> None:
    assert hops(tracing) == 0


@pytest.mark.parametrize("received", [b"", smallest_trace(1, 2), *CONTEXTS])
def test_each_time_one_more(received: bytes) -> None:
    tracing = received
    for expected in range(1, 5):
        tracing = forwarded(tracing)
        assert hops(tracing) == expected
        assert passed_on(tracing) == tracing
    if before := decode(received):
        after = decode(tracing)
        assert after["traceparent"] == before["traceparent"]
        assert after["tracestate"].removeprefix("lonelyps=hops:4").lstrip(",") == before.get(
            "tracestate", ""
        )


def test_an_own_step_counts() -> None:
    own = f"00-{TRACE}-{'c' * 16}-01".encode()
    sent = forwarded(forwarded(PARENT.encode()), own)
    assert decode(sent)["traceparent"] == own.decode()
    assert hops(sent) == 2


def test_a_long_state_makes_room() -> None:
    full = f"{PARENT}\n{','.join(f'k{n}={n:08}' for n in range(40))}"[: 56 + MAX_TRACESTATE]
    sent = forwarded(full.encode())
    assert hops(sent) == 1
    assert passed_on(sent) == sent
