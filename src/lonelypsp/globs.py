"""Glob patterns over topics: what they mean, one matcher, and an index of many patterns.

Patterns and topics are split at ``/`` into segments. Inside a segment ``*`` is any run of
characters, ``?`` one character, ``[a-z]`` and ``[!a-z]`` one character of a set. A segment that is
exactly ``*`` needs at least one character. A segment that is exactly ``**`` spans any number of
segments, also none: ``foo/**/baz`` matches ``foo/baz``, ``**/baz`` matches ``baz``. At the end of a
pattern it needs the slash before it: ``foo/**`` matches ``foo/`` but not ``foo``. Case matters, a
leading dot and a newline do not, and there is no escape character.

This is ``glob.translate(pattern, recursive=True, include_hidden=True, seps="/")`` of CPython 3.13,
which other clients filter with, down to its corners: ``**`` in the middle does not span exactly one
empty segment (``a/**/b`` matches ``a/b`` and ``a/x/b``, not ``a//b``); an unclosed ``[`` is a
literal; a reversed range such as ``[z-a]`` is empty, so that ``[z-a]`` matches nothing and
``[!z-a]`` any character. Two differences: no set ever matches ``/`` (in CPython 3.13.0 ``[!a]`` and
``[+-9]`` do, a bug: python/cpython#130942), and ``!`` negates only as the first character of a set
(CPython drops the reversed range of ``[z-a!b]`` first, and then takes the ``!`` for a negation).
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from typing import Generic, NamedTuple, TypeAlias, TypeVar

V = TypeVar("V", bound=Hashable)

# The factor by which greedy matching may exceed one pass; longer stretches are simulated.
_SHORT = 4
# Each segment of an indexed pattern is a node; deeper patterns would cost 300 times their length.
_MAX_INDEXED_SEGMENTS = 32
_MAX_CACHED_LENGTH = 2048
# Rests of patterns are parsed when they are met, at about 20 us if as long as this.
_LONGEST_TAIL = 255

_TOKEN = re.compile(r"\*+|[^*?\[]+|[?\[]")


class _Set:
    """One character inside (or, `negated`, outside) the ranges [bounds[0], bounds[1]), ..."""

    __slots__ = ("bounds", "negated")

    def __init__(self, bounds: Sequence[int], negated: bool) -> None:
        self.bounds = tuple(bounds)
        self.negated = negated

    def has(self, character: str) -> bool:
        return bool(bisect_right(self.bounds, ord(character)) & 1) != self.negated


_ANY = _Set((), negated=True)

# What stands between two `*`: a string, or a tuple where at least one character is a set.
_Run: TypeAlias = str | tuple[str | _Set, ...]


def _fits(run: _Run, text: str, at: int) -> bool:
    """Whether `run` stands in `text` at `at`; `text` must be long enough."""
    if isinstance(run, str):
        return text.startswith(run, at)
    for offset, item in enumerate(run, at):
        if not (text[offset] == item if isinstance(item, str) else item.has(text[offset])):
            return False
    return True


def _find(run: _Run, text: str, start: int, end: int) -> int:
    if isinstance(run, str):
        return text.find(run, start, end)
    return next((at for at in range(start, end - len(run) + 1) if _fits(run, text, at)), -1)


class _Segment:
    """A segment with wildcards: `first * inner[0] * ... * last`, or `first` alone."""

    __slots__ = ("first", "inner", "last", "least", "simulated", "starred")

    def __init__(self, runs: Sequence[_Run]) -> None:
        self.first = runs[0]
        self.inner = tuple(runs[1:-1])
        self.starred = len(runs) > 1
        self.last: _Run = runs[-1] if self.starred else ""
        self.least = sum(map(len, runs))
        self.simulated = any(not isinstance(r, str) and len(r) > _SHORT for r in self.inner)

    def matches(self, text: str) -> bool:
        if len(text) < self.least or not _fits(self.first, text, 0):
            return False
        if not self.starred:
            return len(text) == self.least
        end = len(text) - len(self.last)
        if not _fits(self.last, text, end):
            return False
        if self.simulated:
            return _simulate((self,), text)
        at = len(self.first)
        # The leftmost place of a run leaves most room for the rest: nothing is ever tried twice.
        for run in self.inner:
            at = _find(run, text, at, end)
            if at < 0:
                return False
            at += len(run)
        return True

    def literal_ends(self) -> tuple[str, str]:
        """The literal text that every match begins with, and the one it ends with."""
        prefix = _leading_literal(self.first)
        suffix = _leading_literal((self.last if self.starred else self.first)[::-1])
        return prefix, suffix[::-1]


def _leading_literal(run: _Run) -> str:
    sets = (at for at, item in enumerate(run) if not isinstance(item, str))
    return "".join(map(str, run[: next(sets, len(run))]))


def _parse_segment(text: str) -> str | _Segment:
    """A segment other than `**`; a string where there is no wildcard in it."""
    runs: list[list[str | _Set]] = [[]]
    at = 0
    # `*` alone needs a character
    rest = "?*" if text == "*" else text
    closed = "]" in rest
    while token := _TOKEN.match(rest, at):
        at = token.end()
        match token[0][0]:
            case "*":
                if runs[-1] or len(runs) == 1:
                    runs.append([])
            case "?":
                # `*?` means `?*`, which leaves a plain string to search for behind the star
                runs[-1 if runs[-1] or len(runs) == 1 else -2].append(_ANY)
            case "[":
                first = at + rest.startswith("!", at)
                end = rest.find("]", first + 1) if closed else -1
                if closed := end >= 0:
                    runs[-1].append(_parse_set(rest[first:end], negated=first > at))
                    at = end + 1
                else:
                    runs[-1].append("[")
            case _:
                runs[-1].extend(token[0])
    frozen = [_freeze(run) for run in runs]
    return text if len(frozen) == 1 and isinstance(frozen[0], str) else _Segment(frozen)


def _parse_set(body: str, negated: bool) -> _Set:
    ranges = []
    at = 0
    while at < len(body):
        low = high = body[at]
        at += 1
        if body.startswith("-", at) and at + 1 < len(body):
            high = body[at + 1]
            at += 2
        if low <= high:
            ranges.append((ord(low), ord(high) + 1))
    bounds: list[int] = []
    for start, end in sorted(ranges):
        if bounds and start <= bounds[-1]:
            bounds[-1] = max(bounds[-1], end)
        else:
            bounds += (start, end)
    return _Set(bounds, negated)


def _freeze(run: list[str | _Set]) -> _Run:
    literal = [item for item in run if isinstance(item, str)]
    return "".join(literal) if len(literal) == len(run) else tuple(run)


def _simulate(segments: Sequence[str | _Segment | None], topic: str) -> bool:
    """Match by following all alternatives at once; `None` stands for `**`.

    Bit i of `reached` says that the pattern so far can end before topic[i]. Each character of the
    pattern is a few operations on integers of len(topic) bits, whatever the alternatives are.
    """
    place: dict[str, int] = {}
    for at, character in enumerate(topic):
        place[character] = place.get(character, 0) | 1 << at
    slashes = place.get("/", 0)
    others = (1 << len(topic)) - 1 ^ slashes
    # below[i]: where one of the i lowest characters stands; a range is a difference of two of them
    codes = sorted(map(ord, place))
    below = [0]
    for code in codes:
        below.append(below[-1] | place[chr(code)])

    def step(reached: int, run: _Run) -> int:
        for item in run:
            if isinstance(item, str):
                where = place.get(item, 0)
            else:
                where = others if item.negated else 0
                for bound in item.bounds:
                    where ^= below[bisect_left(codes, bound)]
                where &= others
            reached = (reached & where) << 1
            if not reached:
                break
        return reached

    def star(reached: int) -> int:
        # the carry of the addition runs from each bit to the end of its segment
        return (others + (reached & others)) ^ others | reached

    def cross(reached: int, segment: str | _Segment) -> int:
        if isinstance(segment, str):
            return step(reached, segment)
        reached = step(reached, segment.first)
        for run in (*segment.inner, segment.last) if segment.starred else ():
            reached = step(star(reached), run)
        return reached

    reached = 1
    for number, segment in enumerate(segments, 1):
        if segment is not None:
            reached = cross(reached, segment)
            if number < len(segments):
                reached = (reached & slashes) << 1
        elif number == len(segments):
            return True
        else:
            # none, or at least one character and a slash after the first place reached
            reached |= (slashes & -((reached & -reached) << 1)) << 1
        if not reached:
            return False
    return bool(reached >> len(topic) & 1)


class Glob:
    """One pattern, ready to match; made by `compile_glob`.

    Matching n characters of topic against m of pattern neither recurses nor backtracks. It is
    greedy and takes O(n + m) for any pattern in which fixed stretches between two wildcards are
    strings or short: `?` and sets between two `*` of a segment at most 4 characters, segments
    between two `**` at most 4 segments. Other patterns, and those with two or more `**` and a fixed
    part between them on a topic with empty segments, take O((n + m) * n / 64): bit-parallel.

    Attributes:
        pattern: the text it was made from.
    """

    __slots__ = ("_groups", "_open", "_segments", "_simulated", "pattern")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        parts = _split_pattern(pattern)
        parsed = {part: None if part == "**" else _parse_segment(part) for part in set(parts)}
        self._segments = [parsed[part] for part in parts]
        self._open = parts[-1] == "**"
        self._groups: list[list[str | _Segment]] = [[]]
        for segment in self._segments:
            if segment is None:
                self._groups.append([])
            else:
                self._groups[-1].append(segment)
        self._simulated = any(len(group) > _SHORT for group in self._groups[1:-1])

    def matches(self, topic: str) -> bool:
        """Whether the whole of `topic` matches."""
        # Greed is right only where `**` may span whatever it likes, see the module's text.
        picky = len(self._groups) > 2 and ("//" in topic or topic.startswith("/"))
        if self._simulated or picky:
            return _simulate(self._segments, topic)
        return self._match_greedily(topic.split("/"))

    def _match_greedily(self, topic: list[str]) -> bool:
        head, tail = self._groups[0], self._groups[-1]
        if len(self._groups) == 1:
            return len(topic) == len(head) and _group_fits(head, topic, 0)
        at = len(head)
        # a final `**` takes at least one segment, be it empty
        end = len(topic) - (1 if self._open else len(tail))
        if at > end or not _group_fits(head, topic, 0) or not _group_fits(tail, topic, end):
            return False
        for group in self._groups[1:-1]:
            starts = range(at, end - len(group) + 1)
            found = next((start for start in starts if _group_fits(group, topic, start)), -1)
            if found < 0:
                return False
            at = found + len(group)
        return self._open or end != at + 1 or topic[at] != ""


def _split_pattern(pattern: str) -> list[str]:
    """The segments of a pattern; `**` behind `**` adds nothing and is left out."""
    parts = pattern.split("/")
    return [
        part for at, part in enumerate(parts) if part != "**" or at == 0 or parts[at - 1] != "**"
    ]


def _group_fits(group: list[str | _Segment], topic: list[str], at: int) -> bool:
    for offset, segment in enumerate(group, at):
        text = topic[offset]
        if not (segment == text if isinstance(segment, str) else segment.matches(text)):
            return False
    return True


def compile_glob(pattern: str) -> Glob:
    """The matcher of `pattern`. Every string is a valid pattern; nothing is raised.

    Short patterns come from a bounded cache; long ones are compiled anew, in O(len(pattern)).
    """
    return _cached_glob(pattern) if len(pattern) <= _MAX_CACHED_LENGTH else Glob(pattern)


_cached_glob = lru_cache(maxsize=512)(Glob)


def _decode(topic: bytes) -> str | None:
    try:
        return topic.decode()
    except UnicodeDecodeError:
        return None


def glob_matches(pattern: str, topic: bytes) -> bool:
    """Whether `pattern` matches `topic`. A topic that is not UTF-8 matches no pattern."""
    text = _decode(topic)
    return text is not None and compile_glob(pattern).matches(text)


class _Spelled(NamedTuple, Generic[V]):
    """A value whose pattern was written with more `**` than are needed."""

    pattern: str
    value: V


_Key: TypeAlias = "V | _Spelled[V]"
_Leaf: TypeAlias = "tuple[str, _Key[V]]"
"""The only value below a place, and what is left of its pattern: nothing, or `/` and segments.

Most patterns differ early and are few below that, so that a tuple saves the nodes for the rest; the
garbage collector leaves it alone, where a million nodes would cost it 100 ms again and again.
"""
_Child: TypeAlias = "_Node[V] | _Leaf[V]"
_Shapes: TypeAlias = "dict[tuple[int, int], dict[tuple[str, str], dict[str, _Segment]]]"


class _Node(Generic[V]):
    """The patterns that have the same segments so far.

    `literals` holds what follows by the next segment, where that has no wildcards, `wildcards` the
    rest; all of these but `*` and `**` stand also in `shapes`, by the lengths of their literal ends
    and then by these ends. Nothing is allocated before it is needed.
    """

    __slots__ = ("entries", "literals", "shapes", "wildcards")

    def __init__(self) -> None:
        self.entries: dict[_Key[V], None] | None = None
        self.literals: dict[str, _Child[V]] | None = None
        self.wildcards: dict[str, _Child[V]] | None = None
        self.shapes: _Shapes | None = None

    def child(self, part: str) -> _Child[V] | None:
        child = self.literals.get(part) if self.literals else None
        return child or (self.wildcards.get(part) if self.wildcards else None)

    def add_child(self, part: str, child: _Child[V]) -> None:
        segment = None if part in ("*", "**") else _parse_segment(part)
        if isinstance(segment, str):
            self.literals = self.literals or {}
            self.literals[part] = child
            return
        self.wildcards = self.wildcards or {}
        self.wildcards[part] = child
        if segment is not None:
            ends = segment.literal_ends()
            self.shapes = self.shapes or {}
            buckets = self.shapes.setdefault((len(ends[0]), len(ends[1])), {})
            buckets.setdefault(ends, {})[part] = segment

    def add_node(self, part: str) -> _Node[V]:
        node: _Node[V] = _Node()
        self.add_child(part, node)
        return node

    def split(self, part: str, leaf: _Leaf[V]) -> _Node[V]:
        """Puts a node in the place of `leaf`, which moves one segment down."""
        node: _Node[V] = _Node()
        of_kind = self.literals if self.literals and part in self.literals else self.wildcards
        assert of_kind is not None
        of_kind[part] = node
        tail, key = leaf
        part, slash, rest = tail[1:].partition("/")
        if not tail:
            node.entries = {key: None}
        elif part == "**":
            node.add_node(part).entries = {key: None}
        else:
            node.add_child(part, (slash + rest, key))
        return node

    def remove_child(self, part: str) -> None:
        segment = None if part in ("*", "**") else _parse_segment(part)
        if isinstance(segment, str):
            assert self.literals is not None
            del self.literals[part]
            return
        assert self.wildcards is not None
        del self.wildcards[part]
        if segment is not None:
            assert self.shapes is not None
            ends = segment.literal_ends()
            shape = (len(ends[0]), len(ends[1]))
            buckets = self.shapes[shape]
            del buckets[ends][part]
            if not buckets[ends]:
                del buckets[ends]
            if not buckets:
                del self.shapes[shape]

    def is_empty(self) -> bool:
        return not (self.entries or self.literals or self.wildcards)

    def step(self, text: str) -> Iterator[_Child[V]]:
        """The children, `**` aside, whose segment matches `text`."""
        if self.literals and (literal := self.literals.get(text)):
            yield literal
        wildcards = self.wildcards
        if not wildcards:
            return
        if text and (star := wildcards.get("*")):
            yield star
        for (prefix, suffix), buckets in self.shapes.items() if self.shapes else ():
            if prefix + suffix <= len(text):
                ends = text[:prefix], text[len(text) - suffix :]
                for part, segment in buckets.get(ends, {}).items():
                    if segment.matches(text):
                        yield wildcards[part]


def _first_leaf(parts: Sequence[str]) -> int:
    """Behind which segment of a pattern the rest may be a leaf.

    A leaf is reached at several places of a topic where a `**` comes before it. It must then match
    at one of them only, and be quick at all others: the number of its segments decides.
    """
    inner = [at for at, part in enumerate(parts) if part == "**"]
    return 0 if not inner or inner == [len(parts) - 1] else inner[-1] + 1


@lru_cache(maxsize=4096)
def _parse_tail(tail: str) -> list[str | _Segment]:
    """The segments of a leaf's rest, but for a `**` at its end."""
    parts = tail.removesuffix("/**").split("/")[1:]
    return [_parse_segment(part) for part in parts]


def _tail_matches(tail: str, topic: list[str], at: int) -> bool:
    left, segments = len(topic) - at, tail.count("/")
    if left < segments or (left > segments and not tail.endswith("/**")):
        return False
    return not tail or _group_fits(_parse_tail(tail), topic, at)


class GlobIndex(Generic[V]):
    """Which of many patterns match a topic: a trie over the segments of the patterns.

    A match costs O(segments of the topic * live nodes); a node is live while what leads to it
    matches, so that patterns which differ in a literal segment, or in the literal ends of a segment
    with wildcards (`foo*-1`, `foo*-2`), cost nothing. Three things are tried one after the other:
    segments with wildcards and the same literal ends in one place (`*a*`, `*b*`; about 1 us each),
    the distinct lengths of such ends in one place, and patterns of more than 32 segments. Add and
    remove cost O(len(pattern)), however many patterns and values there are.
    """

    def __init__(self) -> None:
        self.clear()

    def __len__(self) -> int:
        """The number of pairs of pattern and value."""
        return self._length

    def clear(self) -> None:
        """Remove everything."""
        self._root: _Node[V] = _Node()
        self._deep: dict[str, tuple[Glob, dict[V, None]]] = {}
        self._length = 0

    def add(self, pattern: str, value: V) -> None:
        """Let topics that match `pattern` yield `value`. A pair that is present is left alone."""
        parts = _split_pattern(pattern)
        if len(parts) > _MAX_INDEXED_SEGMENTS:
            if pattern not in self._deep:
                self._deep[pattern] = (Glob(pattern), {})
            is_new = _put(self._deep[pattern][1], value)
        else:
            is_new = self._add_indexed(parts, _key(pattern, parts, value))
        self._length += is_new

    def _add_indexed(self, parts: list[str], key: _Key[V]) -> bool:
        node, first_leaf = self._root, _first_leaf(parts)
        for at, part in enumerate(parts):
            child = node.child(part)
            if child is None:
                tail = _tail(parts, at)
                if at >= first_leaf and part != "**" and len(tail) <= _LONGEST_TAIL:
                    node.add_child(part, (tail, key))
                    return True
                child = node.add_node(part)
            elif isinstance(child, tuple):
                if child == (_tail(parts, at), key):
                    return False
                child = node.split(part, child)
            node = child
        if node.entries is None:
            node.entries = {}
        return _put(node.entries, key)

    def remove(self, pattern: str, value: V) -> None:
        """Undo `add(pattern, value)`.

        Raises:
            KeyError: the pair is not present.
        """
        if pattern in self._deep:
            entries = self._deep[pattern][1]
            del entries[value]
            if not entries:
                del self._deep[pattern]
        else:
            parts = _split_pattern(pattern)
            self._remove_indexed(parts, _key(pattern, parts, value))
        self._length -= 1

    def _remove_indexed(self, parts: list[str], key: _Key[V]) -> None:
        node, path = self._root, []
        for at, part in enumerate(parts):
            child = node.child(part)
            path.append((node, part))
            if isinstance(child, tuple) and child == (_tail(parts, at), key):
                break
            if child is None or isinstance(child, tuple):
                raise KeyError(key)
            node = child
        else:
            if node.entries is None:
                raise KeyError(key)
            del node.entries[key]
            if not node.is_empty():
                return
        while path:
            node, part = path.pop()
            node.remove_child(part)
            if not node.is_empty():
                return

    def match(self, topic: bytes) -> list[V]:
        """The values of all patterns that match `topic`, in no particular order.

        A value appears once for each of its patterns that match. A topic that is not UTF-8 matches
        nothing.
        """
        text = _decode(topic)
        if text is None:
            return []
        values = [
            key.value if isinstance(key, _Spelled) else key for key in self._walk(text.split("/"))
        ]
        for glob, entries in self._deep.values():
            if glob.matches(text):
                values += entries
        return values

    def _walk(self, topic: list[str]) -> list[_Key[V]]:
        """What matches. All nodes that are reached are followed in step."""
        keys: list[_Key[V]] = []
        live = [self._root]
        # The `**` nodes: those whose span may end here, those that may only after this segment
        # (`**` does not span one empty segment), and all that were met. A pattern that ends in
        # `**` matches as soon as its node is met, since a segment is left for it to take.
        spans: dict[_Node[V], None] = {}
        late: dict[_Node[V], None] = {}
        met: dict[_Node[V], None] = {}
        for at, text in enumerate(topic, 1):
            opened: dict[_Node[V], None] = {}
            for node in live:
                if node.wildcards and (double := node.wildcards.get("**")):
                    assert isinstance(double, _Node)
                    opened[double] = None
            met |= opened
            fronts = (*live, *(spans | opened))
            live = []
            for node in fronts:
                for child in node.step(text):
                    if not isinstance(child, tuple):
                        live.append(child)
                    elif _tail_matches(child[0], topic, at):
                        keys.append(child[1])
            spans |= late
            late = {} if text else opened
            if text:
                spans |= opened
            if not (live or spans or late):
                break
        for node in (*live, *met):
            if node.entries:
                keys += node.entries
        return keys


def _tail(parts: list[str], at: int) -> str:
    """What follows parts[at], with the slash before it."""
    return "/".join(("", *parts[at + 1 :]))


def _key(pattern: str, parts: list[str], value: V) -> _Key[V]:
    return value if len(parts) == pattern.count("/") + 1 else _Spelled(pattern, value)


def _put(entries: dict[V, None], key: V) -> bool:
    """Whether it is new."""
    before = len(entries)
    entries[key] = None
    return len(entries) > before
