"""Explanations in tracing bytes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lonelypsp.bodies import ResponseNotify, smallest_trace
from lonelypsp.explain import MAX_BYTES, ExplainedSubscriber, Explanation, pack, unpack
from lonelypsp.wire import decode, encode

URL = "http://10.0.0.7:3002/v1/receive"
FAILED = ExplainedSubscriber(URL, "failed", "status 500", True, False, ("foo/*", "**"), 0.25)
DELIVERED = ExplainedSubscriber("http://a/v1/receive", "delivered", exact=True, seconds=0.001)


def test_those_that_need_attention_come_first() -> None:
    packed = pack(Explanation((DELIVERED, FAILED), 0, 3))
    assert unpack(packed) == Explanation((FAILED, DELIVERED), 0, 3)


def test_nobody() -> None:
    assert unpack(pack(Explanation(()))) == Explanation(())


text = st.text(max_size=40)
subscribers = st.builds(
    ExplainedSubscriber,
    url=text,
    outcome=st.sampled_from(["delivered", "failed", "skipped", "unsubscribed"]),
    reason=text,
    will_be_told=st.booleans(),
    exact=st.booleans(),
    globs=st.lists(text, max_size=4).map(tuple),
    seconds=st.integers(0, 10**9).map(lambda micros: micros / 10**6),
)


@given(st.lists(subscribers, max_size=8), st.integers(0, 2**40), st.integers(0, 2**32))
def test_comes_back_whole(found: list[ExplainedSubscriber], omitted: int, websockets: int) -> None:
    explanation = Explanation(tuple(found), omitted, websockets)
    back = unpack(pack(explanation))
    assert back is not None
    assert sorted(back.subscribers, key=repr) == sorted(found, key=repr)
    assert (back.omitted, back.websockets) == (omitted, websockets)


@pytest.mark.parametrize("size", [1, 100, 5000])
def test_always_fits_into_an_answer(size: int) -> None:
    odd = ExplainedSubscriber(
        "http://a/" + "ü" * 70_000, "failed", "x" * 9000, globs=("y" * 999,) * 50
    )
    many = (odd, *[FAILED] * size)
    packed = pack(Explanation(many))
    assert len(packed) <= MAX_BYTES
    back = unpack(packed)
    assert back is not None
    assert len(back.subscribers) + back.omitted == len(many)
    assert len(back.subscribers) == len(many) or len(packed) > 0.9 * MAX_BYTES
    answer = ResponseNotify("X-HMAC 1:a:b", packed, 1, b"i")
    assert decode(ResponseNotify, encode(answer)) == answer


@pytest.mark.parametrize(
    "tracing",
    [
        b"",
        smallest_trace(1, 2),
        b"00-" + b"a" * 32,
        b"{}",
        b'{"explain":1,',
        b'{"explain":1,}',
        b'{"explain":1,"websockets":0,"omitted":0,"subscribers":[{}]}',
        b'{"explain":1,"websockets":0,"omitted":0,"subscribers":[{"globs":1}]}',
        b'{"explain":1,"websockets":"x","omitted":0,"subscribers":[]}',
        b'{"explain":1,"omitted":0,"subscribers":[]}',
        b'{"explain":1,"websockets":0,"omitted":0,"subscribers":' + b"[" * 60_000,
        json.dumps({"explain": 2}).encode(),
        b"\xff",
    ],
)
def test_what_others_send_is_no_explanation(tracing: bytes) -> None:
    assert unpack(tracing) is None


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    unpack(data)
    unpack(b'{"explain":1,' + data)
