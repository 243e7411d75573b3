from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lonelypsp.errors import LocalProtocolError
from lonelypsp.interests import NO_TOPICS, Interests, Topics

AB = Topics.of([b"a", b"b"], ["a*"])
BC = Topics.of([b"b", b"c"], ["a*", "*"])


def test_sets_of_topics() -> None:
    assert len(AB) == 3
    assert Topics.of([b"a", b"b", b"c"], ["a*", "*"]) == AB | BC
    assert Topics.of([b"a"]) == AB - BC
    assert Topics.of([b"b"], ["a*"]) == AB & BC
    assert AB - AB == NO_TOPICS
    assert not len(NO_TOPICS)
    assert sorted(AB.keys, key=str) == ["a*", b"a", b"b"]
    assert {str(one) for one in AB.each()} == {"b'a'", "b'b'", "'a*'"}
    assert str(AB) == "b'a', b'b', 'a*'"
    assert str(Topics.of(bytes([n]) for n in range(9))).endswith(" and 4 more")


@pytest.mark.parametrize(
    ("exact", "globs", "error"),
    [
        (b"topic", [], TypeError),
        ([], "glob", TypeError),
        (["topic"], [], TypeError),
        ([], [b"glob"], TypeError),
        ([bytes(65_536)], [], LocalProtocolError),
        ([], ["x" * 65_536], LocalProtocolError),
        ([], ["\ud800"], LocalProtocolError),
    ],
)
def test_what_is_no_topic(exact: Any, globs: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Topics.of(exact, globs)


def test_wanting_and_receiving_are_two_things() -> None:
    interests: Interests[str] = Interests()
    interests.add("one", AB)
    interests.add("two", BC)
    assert interests.wanted == AB | BC
    interests.give_up(AB)
    assert interests.wanted == BC
    assert interests.is_wanted(b"b")
    assert not interests.is_wanted(b"a")
    assert interests.is_wanted("a*")
    assert interests.match(b"a") == ["one", "two"]  # until it is removed
    interests.remove("one", AB)
    assert interests.match(b"a") == ["two"]
    interests.give_up(BC)
    interests.remove("two", BC)
    assert interests.wanted == NO_TOPICS
    assert interests.match(b"a") == []
    assert not interests.wants(b"a")


TOPICS = st.builds(
    Topics.of,
    st.sets(st.sampled_from([b"", b"a", b"ab", b"a/b", b"\xff"])),
    st.sets(st.sampled_from(["", "a", "a*", "*", "a/?"])),
)
MATCHES = {  # topic -> globs
    b"": {""},
    b"a": {"a", "a*", "*"},
    b"ab": {"a*", "*"},
    b"a/b": {"a/?"},
    b"\xff": set(),
}


@given(owners=st.dictionaries(st.integers(0, 9), TOPICS), gone=st.sets(st.integers(0, 9)))
def test_each_owner_once(owners: dict[int, Topics], gone: set[int]) -> None:
    interests: Interests[int] = Interests()
    for owner, topics in owners.items():
        interests.add(owner, topics)
    for owner in gone & owners.keys():
        interests.give_up(owners[owner])
        interests.remove(owner, owners.pop(owner))
    for topic, globs in MATCHES.items():
        expected = [o for o, t in owners.items() if topic in t.exact or t.globs & globs]
        assert sorted(interests.match(topic)) == sorted(expected)
        assert interests.wants(topic) is bool(expected)
    everything = NO_TOPICS
    for topics in owners.values():
        everything |= topics
    assert interests.wanted == everything
