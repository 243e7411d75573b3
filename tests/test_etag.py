from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vectors
from lonelypsp.errors import LocalProtocolError, RemoteProtocolError
from lonelypsp.etag import strong_etag, wanted

URL = "http://127.0.0.1:3002/v1/receive"


def pairs(items: list[Any], key: str) -> list[tuple[Any, str | None]]:
    """Rows of a vector: {key, recovery}, or the bare key where only the order matters."""
    return [(i[key], i["recovery"]) if isinstance(i, dict) else (i, None) for i in items]


@pytest.mark.parametrize("row", vectors.rows("stateless", "strong_etag"))
def test_vectors(row: dict[str, Any]) -> None:
    inputs, expected = row["inputs"], row["expected"]
    arguments = (inputs["url"], pairs(inputs["exact"], "topic"), pairs(inputs["globs"], "glob"))
    if expected == "error":
        with pytest.raises(RemoteProtocolError, match="ascending"):
            strong_etag(*arguments)
        return
    assert strong_etag(*arguments).hex() == expected["etag_hex"]
    if document := expected["document_hex"]:
        assert hashlib.sha512(bytes.fromhex(document)).hexdigest() == expected["etag_hex"]


def test_there_are_error_vectors() -> None:
    expected = [row["expected"] for row in vectors.load("stateless")["strong_etag"]]
    assert expected.count("error") == 4


@pytest.mark.parametrize(
    ("exact", "globs"),
    [
        pytest.param([b"a", b""], [], id="empty topic last"),
        pytest.param([b"\xff", b"\x80"], [], id="topics by unsigned byte"),
        pytest.param([], ["\U00010000", "\uff5e"], id="globs in UTF-16 order"),
    ],
)
def test_other_orders_are_refused(exact: list[bytes], globs: list[str]) -> None:
    with pytest.raises(RemoteProtocolError):
        strong_etag(URL, [(t, None) for t in exact], [(g, None) for g in globs])


@pytest.mark.parametrize(
    ("url", "exact", "globs"),
    [
        pytest.param("u" * 65_536, [], [], id="url"),
        pytest.param(URL, [(b"t" * 65_536, None)], [], id="topic"),
        pytest.param(URL, [(b"t", "r" * 65_536)], [], id="recovery of a topic"),
        pytest.param(URL, [], [("g" * 65_536, None)], id="glob"),
        pytest.param(URL, [], [("\ud800", None)], id="glob surrogate"),
        pytest.param("\ud800", [], [], id="url surrogate"),
    ],
)
def test_what_the_wire_cannot_carry_has_no_etag(url: str, exact: Any, globs: Any) -> None:
    with pytest.raises(LocalProtocolError):
        strong_etag(url, exact, globs)


def test_iterators_will_do() -> None:
    lists = ([(b"a", None), (b"b", "r")], [("g", None)])
    assert strong_etag(URL, iter(lists[0]), iter(lists[1])) == strong_etag(URL, *lists)


TOPICS = st.lists(st.binary(max_size=4), max_size=6)
GLOBS = st.lists(st.text(max_size=4), max_size=6)


@given(topics=TOPICS, globs=GLOBS, random=st.randoms())
@settings(deadline=None)
def test_wanted_knows_no_order(topics: list[bytes], globs: list[str], random: Any) -> None:
    exact, sorted_globs = wanted(topics, globs, "r")
    shuffled = topics + topics[:2], globs + globs[:2]
    for items in shuffled:
        random.shuffle(items)
    assert wanted(*shuffled, "r") == (exact, sorted_globs)
    assert {t for t, _ in exact} == set(topics)
    assert {g for g, _ in sorted_globs} == set(globs)
    assert len(strong_etag(URL, exact, sorted_globs)) == 64, "the order that the etag asks for"


@given(one=st.tuples(TOPICS, GLOBS), other=st.tuples(TOPICS, GLOBS))
@settings(deadline=None)
def test_equal_exactly_when_the_sets_are(
    one: tuple[list[bytes], list[str]], other: tuple[list[bytes], list[str]]
) -> None:
    same = [set(items) for items in one] == [set(items) for items in other]
    etags = [strong_etag(URL, *wanted(*lists, "r")) for lists in (one, other)]
    assert (etags[0] == etags[1]) is same


def test_wanted_refuses_what_is_no_text() -> None:
    with pytest.raises(LocalProtocolError):
        wanted([], ["a", "\ud800"], None)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param((URL + "#1", [b"t"], ["g"], "r"), id="url"),
        pytest.param((URL, [b"u"], ["g"], "r"), id="topic"),
        pytest.param((URL, [b"t"], ["h"], "r"), id="glob"),
        pytest.param((URL, [b"t"], ["g"], "s"), id="recovery"),
        pytest.param((URL, [b"t"], ["g"], None), id="no recovery"),
        pytest.param((URL, [b"t", b"g"], [], "r"), id="glob as topic"),
    ],
)
def test_every_part_counts(change: tuple[str, list[bytes], list[str], str | None]) -> None:
    url, topics, globs, recovery = change
    assert strong_etag(url, *wanted(topics, globs, recovery)) != strong_etag(
        URL, *wanted([b"t"], ["g"], "r")
    )
