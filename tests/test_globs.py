"""What patterns mean, that no pattern is slow, and that the index answers like the matcher."""

from __future__ import annotations

import fnmatch
import gc
import glob
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lonelypsp import globs
from lonelypsp.globs import Glob, GlobIndex, compile_glob, glob_matches

VECTORS = json.loads((Path(__file__).parent / "vectors" / "vectors_stateless.json").read_text())

LONGEST = 65535


# The oracle: the module's text put down as a recursion.


def in_set(body: str, character: str) -> bool:
    items = re.findall(r"(.)-(.)|(.)", body, re.DOTALL)
    return any(low <= character <= high if low else one == character for low, high, one in items)


def set_end(pattern: str) -> int:
    """Where the set at the front of `pattern` ends, -1 where none is closed."""
    first = 2 if pattern.startswith("[!") else 1
    return pattern.find("]", first + 1)


@cache
def segment_oracle(pattern: str, text: str) -> bool:
    if not pattern:
        return not text
    if pattern[0] == "*":
        return segment_oracle(pattern[1:], text) or (
            bool(text) and segment_oracle(pattern, text[1:])
        )
    if not text:
        return False
    end = set_end(pattern) if pattern[0] == "[" else -1
    if end < 0:
        return pattern[0] in ("?", text[0]) and segment_oracle(pattern[1:], text[1:])
    body = pattern[1:end]
    negated = body.startswith("!")
    found = in_set(body[negated:], text[0])
    return found != negated and segment_oracle(pattern[end + 1 :], text[1:])


@cache
def oracle(pattern: tuple[str, ...], topic: tuple[str, ...]) -> bool:
    if not pattern or not topic:
        return not pattern and not topic
    first, rest = pattern[0], pattern[1:]
    if first != "**":
        alone = first == "*" and not topic[0]
        return not alone and segment_oracle(first, topic[0]) and oracle(rest, topic[1:])
    if not rest or rest == ("**",) * len(rest):
        return True
    if rest[0] == "**":
        return oracle(rest, topic)
    spans = [count for count in range(len(topic)) if count != 1 or topic[0]]
    return any(oracle(rest, topic[count:]) for count in spans)


def by_oracle(pattern: str, topic: str) -> bool:
    return oracle(tuple(pattern.split("/")), tuple(topic.split("/")))


def by_index(pattern: str, topic: str) -> bool:
    index: GlobIndex[int] = GlobIndex()
    index.add(pattern, 7)
    return index.match(topic.encode()) == [7]


def by_simulation(pattern: str, topic: str) -> bool:
    return globs._simulate(Glob(pattern)._segments, topic)


def everyone(pattern: str, topic: str) -> set[bool]:
    """The answers of all ways to match: one element when they agree."""
    return {
        glob_matches(pattern, topic.encode()),
        Glob(pattern).matches(topic),
        by_simulation(pattern, topic),
        by_index(pattern, topic),
        by_oracle(pattern, topic),
    }


TOKENS = ["a", "b", "/", "/", "*", "*", "?", "**", "/**/", "***", "//", "-", "!", "^", "]", "\n"]
SETS = ["[ab]", "[!a]", "[a-c]", "[]a]", "[!]]", "[^a]", "[b-a]", "[!b-a]", "[a", "[-a]", "[+-9]"]
patterns = st.lists(st.sampled_from(TOKENS + SETS), max_size=10).map("".join)
topics = st.text("aaabc/-!^]\n[é", max_size=10)
segment_lists = st.lists(st.sampled_from(["", "a", "b", "ab"]), max_size=8)
deep_patterns = st.lists(st.sampled_from(["", "a", "b", "*", "a*", "**", "**", "***"]), max_size=9)


# Meaning


@pytest.mark.parametrize("vector", VECTORS["glob"], ids=lambda vector: vector["name"])
def test_vectors(vector: dict[str, Any]) -> None:
    pattern, topic = vector["inputs"]["pattern"], bytes.fromhex(vector["inputs"]["topic"]["hex"])
    expected = vector["expected"]["glob_translate_py_ge_3_13"]
    index: GlobIndex[str] = GlobIndex()
    index.add(pattern, "here")
    assert glob_matches(pattern, topic) is expected
    assert index.match(topic) == (["here"] if expected else [])


def test_all_vectors_are_there() -> None:
    assert len(VECTORS["glob"]) == 70


MATCHING = [
    # `**` spans any number of segments, also none
    ("**", ["", "a", "a/b", "/", "//", "a/"]),
    ("a/**", ["a/", "a/b", "a/b/c", "a//"]),
    ("**/a", ["a", "b/a", "b/c/a", "//a", "b//a"]),
    ("a/**/b", ["a/b", "a/x/b", "a/x/y/b", "a///b"]),
    ("**/a/**", ["a/", "a/b", "x/a/", "x/y/a/b/c", "a/a/"]),
    ("a/**/**/b", ["a/b", "a/x/b"]),
    ("a/**/", ["a/", "a/b/"]),
    ("**/***/**/b", ["x//b", "a/b", "/b"]),
    # stars inside a segment
    ("*", ["a", "ab", ".a", "*", "\n"]),
    ("***", ["", "a"]),
    ("a**b", ["ab", "axb"]),
    ("a*b*c", ["abc", "abbc", "abcbc"]),
    ("*?", ["a", "ab"]),
    ("*a?*", ["ab", "aab", "xxab", "aa"]),
    ("*[ab]?[ab]?[ab]*", ["a1b2a", "xxa.a.a", "ab.a.a.a"]),
    # sets
    ("[a-c]", ["a", "b", "c"]),
    ("[]-a]", ["]", "^", "a"]),
    ("[!]a]", ["b", "!"]),
    ("[a-]", ["a", "-"]),
    ("[--0]", ["-", ".", "0"]),
    ("[a-c-e]", ["a", "b", "c", "-", "e"]),
    ("[a-cb-d]", ["a", "d"]),
    ("[!z-a]", ["a", "z", "-"]),
    ("[z-ab]", ["b"]),
    ("[a-c]*[!0-9]", ["ax", "b7y"]),
    ("[é-ü]", ["é", "ê"]),
    ("[", ["["]),
    ("[!", ["[!"]),
    ("[!]", ["[!]"]),
    ("[[]x[a", ["[x[a"]),
    ("[\\]]", ["\\]"]),
    ("[&&~~||]", ["&", "~", "|"]),
    ("a.b+(c)$", ["a.b+(c)$"]),
]

DIFFERING = [
    ("**/a", ["ab", "a/", "/a", "b/a/c"]),
    ("a/**", ["a", "ab", "b/a/"]),
    ("a/**/b", ["a", "ab", "a//b", "a/b/c", "xa/b"]),
    ("**/a/**", ["a", "x/a", "ab/"]),
    ("a/**/", ["a", "a/b", "a//"]),
    ("a/**/a", ["a"]),
    ("*", ["", "/", "a/", "/a", "a/b"]),
    ("*/*", ["a", "/", "a/", "/a", "a/b/c"]),
    ("***", ["/", "a/b"]),
    ("a*b*c", ["ab", "acb", "a/b/c"]),
    ("ab*ba", ["aba"]),
    ("?", ["", "/", "ab"]),
    ("[!a]", ["", "a", "/"]),
    ("[+-9]", ["/"]),
    ("x[!a]y", ["x/y"]),
    ("[a/b]", ["a", "/", "b"]),
    ("[z-a]", ["a", "z", "-", ""]),
    ("[z-ab]", ["z", "a", "-"]),
    ("[^a]", ["b"]),
    ("foo", ["FOO", "foo\n", "foo/"]),
]


@pytest.mark.parametrize(("pattern", "topic"), [(p, t) for p, ts in MATCHING for t in ts])
def test_matches(pattern: str, topic: str) -> None:
    assert everyone(pattern, topic) == {True}


@pytest.mark.parametrize(("pattern", "topic"), [(p, t) for p, ts in DIFFERING for t in ts])
def test_does_not_match(pattern: str, topic: str) -> None:
    assert everyone(pattern, topic) == {False}


@pytest.mark.parametrize("topic", [b"\xff", b"a\xff", b"\xed\xa0\x80"])
def test_a_topic_that_is_not_utf_8_matches_nothing(topic: bytes) -> None:
    index: GlobIndex[int] = GlobIndex()
    index.add("**", 1)
    assert not glob_matches("**", topic)
    assert index.match(topic) == []


def test_a_lone_surrogate_in_a_pattern_is_harmless() -> None:
    assert not glob_matches("\ud800*", b"a")


def test_short_patterns_are_cached_and_long_ones_are_not() -> None:
    assert compile_glob("a/*") is compile_glob("a/*")
    assert compile_glob("a/*" * 1000) is not compile_glob("a/*" * 1000)


@given(patterns, topics)
def test_all_ways_to_match_agree(pattern: str, topic: str) -> None:
    assert len(everyone(pattern, topic)) == 1


@given(deep_patterns.map("/".join), segment_lists.map("/".join))
def test_all_ways_to_match_agree_on_many_segments(pattern: str, topic: str) -> None:
    assert len(everyone(pattern, topic)) == 1


def translate_without_slashes(
    translate: Callable[[str, str, str], list[str]],
) -> Callable[[str, str, str], list[str]]:
    """`fnmatch._translate` with its sets kept from matching a slash, as later CPython does."""

    def translated(pattern: str, star: str, any_one: str) -> list[str]:
        kept = {star, any_one}
        return [
            part if part in kept else any_one if part == "." else re.sub(r"^\[", "(?!/)[", part)
            for part in translate(pattern, star, any_one)
        ]

    return translated


@pytest.mark.skipif(sys.version_info < (3, 13), reason="glob.translate is new in Python 3.13")
@given(patterns, topics)
def test_agrees_with_cpython(pattern: str, topic: str) -> None:
    # the documented difference: an `!` behind an empty range at the front of a set
    assume(not re.search(r"\[(.-.)+!", pattern, re.DOTALL))
    with pytest.MonkeyPatch.context() as patch:
        if sys.version_info < (3, 14):
            patch.setattr(fnmatch, "_translate", translate_without_slashes(fnmatch._translate))
        regex = glob.translate(pattern, recursive=True, include_hidden=True, seps="/")
    assert Glob(pattern).matches(topic) == (re.match(regex, topic) is not None)


# Bombs


BOMBS = [
    ("*a" * 12 + "b", "a" * LONGEST, False),
    ("*a" * 30000 + "b", "a" * LONGEST, False),
    ("*a" * 30000 + "*b*", "a" * LONGEST, False),
    ("**/a/" * 10 + "b", "a/" * 32767, False),
    ("**/a/" * 10000 + "b", "a/" * 32767, False),
    ("**/a/" * 10000 + "b", "/a" * 32000 + "//c", False),
    ("**/" + "*a/" * 15000 + "b/**", "a/" * 32767, False),
    ("**/" + "a/" * 15000 + "**/b", "a/" * 32767 + "b", True),
    ("*" + "a" * 30000, "a" * (LONGEST - 1) + "b", False),
    ("*" + "a" * 30000 + "b*", "a" * LONGEST, False),
    ("*" * LONGEST, "a" * LONGEST, True),
    ("*/" * 32767, "a/" * 32767, True),
    ("**/" * 20000 + "b", "a/" * 32767, False),
    ("[" * LONGEST, "[" * LONGEST, True),
    ("*" + "a?" * 15000 + "b*", "a" * LONGEST, False),
    ("*?" * 30000 + "*", "a" * LONGEST, True),
    ("*[ab]c" * 10000 + "*", "a" * LONGEST, False),
    ("*" + "[ab]" * 10000 + "[c]*", "a" * LONGEST, False),
    ("[" + "".join(f"{chr(n)}-{chr(n + 1)}" for n in range(2000, 10000, 3)) + "]*", "a", False),
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("pattern", "topic", "expected"), BOMBS, ids=range(len(BOMBS)))
def test_bombs(pattern: str, topic: str, expected: bool) -> None:
    index: GlobIndex[int] = GlobIndex()
    index.add(pattern, 1)
    assert Glob(pattern).matches(topic) is expected
    assert index.match(topic.encode()) == [1] * expected
    index.remove(pattern, 1)
    assert len(index) == 0


@pytest.mark.parametrize(
    ("pattern", "topic"),
    [("*a" * 12 + "b*", "a" * 5000), ("*[ab]c" * 50 + "*", "a" * 5000), ("*?a" * 99, "a" * 5000)],
)
def test_a_segment_is_searched_once(
    pattern: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs never search text that an earlier run has passed."""
    spans: list[tuple[int, int]] = []
    find = globs._find

    def recorded(run: globs._Run, text: str, start: int, end: int) -> int:
        found = find(run, text, start, end)
        spans.append((start, found if found >= 0 else end))
        return found

    monkeypatch.setattr(globs, "_find", recorded)
    Glob(pattern).matches(topic)
    assert spans
    assert sum(end - start for start, end in spans) <= len(topic)


# The index


def test_one_pattern_holds_many_values() -> None:
    index: GlobIndex[str] = GlobIndex()
    for value in ("x", "y", "x"):
        index.add("a/*", value)
    assert sorted(index.match(b"a/b")) == ["x", "y"]
    assert len(index) == 2
    index.remove("a/*", "x")
    assert index.match(b"a/b") == ["y"]


def test_each_matching_pattern_of_a_value_counts() -> None:
    index: GlobIndex[str] = GlobIndex()
    for pattern in ("**/b", "**/**/b", "a/*"):
        index.add(pattern, "x")
    assert index.match(b"a/b") == ["x"] * 3
    index.remove("**/**/b", "x")
    assert index.match(b"a/b") == ["x"] * 2


def test_a_double_star_met_twice_yields_once() -> None:
    index: GlobIndex[int] = GlobIndex()
    index.add("**/a/**", 1)
    assert index.match(b"a/a/a/a") == [1]


@pytest.mark.parametrize("pattern", ["a/b", "a", "a/*", "a/x*", "b", "**", "/".join("a" * 40)])
def test_removing_what_is_absent(pattern: str) -> None:
    index: GlobIndex[int] = GlobIndex()
    index.add("a/b", 1)
    index.add("a/*/c", 1)
    index.add("a/x*/c", 1)
    with pytest.raises(KeyError):
        index.remove(pattern, 2)
    index.add(pattern, 3)
    with pytest.raises(KeyError):
        index.remove(pattern, 2)
    assert len(index) == 4


def test_clear() -> None:
    index: GlobIndex[int] = GlobIndex()
    index.add("**", 1)
    index.add("/".join("a" * 40), 1)
    index.clear()
    assert len(index) == 0
    assert index.match(b"a") == []


def test_patterns_with_other_literal_ends_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    index: GlobIndex[int] = GlobIndex()
    for number in range(1000):
        index.add(f"foo*-{number:04}", number)
        index.add(f"tenant/{number}/*", number)
    tried = []
    matches = globs._Segment.matches

    def recorded(segment: globs._Segment, text: str) -> bool:
        tried.append(segment)
        return matches(segment, text)

    monkeypatch.setattr(globs._Segment, "matches", recorded)
    assert index.match(b"foobar-0123") == [123]
    assert len(tried) == 1


def test_the_garbage_collector_has_little_to_do() -> None:
    """It would hold up the event loop again and again if each pattern were several objects."""
    gc.collect()
    before = len(gc.get_objects())
    index: GlobIndex[int] = GlobIndex()
    for number in range(1000):
        index.add(f"tenant/{number}/orders/*", number)
        index.add(f"logs/host-{number}/*/error", number)
        index.add(f"app-{number}-*/events", number)
    gc.collect()
    gc.collect()
    tracked = len(gc.get_objects()) - before
    assert tracked < 1.1 * len(index)
    assert sorted(index.match(b"app-7-x/events")) == [7]


few_patterns = st.lists(patterns | deep_patterns.map("/".join), min_size=1, max_size=8)


@given(few_patterns, st.data())
def test_the_index_answers_like_the_matcher(few: list[str], data: st.DataObject) -> None:
    index: GlobIndex[int] = GlobIndex()
    present: set[tuple[str, int]] = set()
    pairs = st.tuples(st.sampled_from(few), st.integers(0, 2))
    for pair in data.draw(st.lists(pairs, max_size=25)):
        if pair in present:
            present.remove(pair)
            index.remove(*pair)
        else:
            present.add(pair)
            index.add(*pair)
    assert len(index) == len(present)
    for topic in data.draw(st.lists(topics | segment_lists.map("/".join), max_size=4)):
        expected = [value for pattern, value in present if Glob(pattern).matches(topic)]
        assert sorted(index.match(topic.encode())) == sorted(expected)
    for pair in present:
        index.remove(*pair)
    assert len(index) == 0
    assert index._root.is_empty()
    assert not index._root.shapes
