"""Judges a history of a fleet: what was promised, against what the subscribers saw.

A history is a list of events. Whoever does something writes `invoke` before, and `ok`, `fail`
(nothing happened) or `info` (nobody knows) after it, under a name that does one thing at a time.
Events and their values:

    notify                  Sent; ok: how many confirmed
    subscribe, unsubscribe  Key; ok: it is so now
    set                     (url, all its keys)
    receive                 Got, only ok: a message that a subscriber has read to its end
    missed                  Notice, only ok
    rows, notices           only ok, at the end: all that the database holds
    sinks                   only ok, once: how many requests the subscribers counted until then
    healed, probed          only ok: faults are over; everybody is reached by each broadcaster
    anything else           a fault: invoke when it begins, ok with what proves that it happened

From that follow, for each subscription, the times at which it was certainly there or certainly not,
and from those the invariants (`_Checks`). A run is void, not passed, if it proves nothing.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, is_dataclass
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

SETTLE = 3.0
"""Seconds in which a change nobody knows about may still happen: in the hands of a database that
was cut off, for example."""
OPERATIONS = frozenset({"notify", "subscribe", "unsubscribe", "set"})
OBSERVATIONS = frozenset(
    {"receive", "missed", "rows", "notices", "sinks", "healed", "probed"}
)  # fmt: skip
EXPLAINED = 12


class Key(NamedTuple):
    """One subscription."""

    url: str
    kind: str
    pattern: str

    def matches(self, topic: str) -> bool:
        """Topics of histories have one segment, so that the standard library is the oracle."""
        if self.kind == "exact":
            return self.pattern == topic
        return fnmatchcase(topic, self.pattern)


class Sent(NamedTuple):
    id: str
    topic: str


class Got(NamedTuple):
    """`answer`: "yes" confirmed, "late" confirmed when the broadcaster may have given up, "no"
    refused, "" nothing."""

    url: str
    id: str
    topic: str
    intact: bool
    answer: str


class Notice(NamedTuple):
    url: str
    topic: str
    confirmed: bool


class Event(NamedTuple):
    t: float
    who: str
    type: str
    f: str
    value: Any


class History(list[Event]):
    """Events in the order of their times."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock

    def add(self, who: str, type: str, f: str, value: Any = None) -> None:
        self.append(Event(self.clock(), who, type, f, value))

    def write(self, path: Path) -> None:
        """One line of JSON for each."""
        with path.open("w") as out:
            for event in self:
                print(json.dumps(event, default=_plain), file=out)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) else sorted(value)  # type: ignore[arg-type]


@dataclass
class Expectation:
    """What a run must hold in order to prove anything.

    Attributes:
        faults: kinds that must have happened.
        acknowledged, received, missed: least numbers.
        recovery: seconds from `healed` to `probed`.
    """

    faults: frozenset[str] = frozenset()
    acknowledged: int = 50
    received: int = 50
    missed: int = 0
    recovery: float = 15.0


@dataclass
class Verdict:
    """`void`: why it proves nothing. `errors`: invariant -> what broke it."""

    void: list[str] = field(default_factory=list)
    errors: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def passed(self) -> bool:
        return not self.void and not self.errors

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {n}" for name, n in sorted(self.counts.items()))
        lines = [f"void: {reason}" for reason in self.void]
        for invariant, errors in sorted(self.errors.items()):
            lines.append(f"{invariant}: {len(errors)} times, first {errors[0]}")
        return "\n".join([*(lines or ["passed"]), counts])


class _Line:
    """What is known about one subscription at each time: True, False, or None for unknown."""

    def __init__(self) -> None:
        self.times = [float("-inf")]
        self.states: list[bool | None] = [False]
        self.settles = float("-inf")

    def at(self, t: float, state: bool | None) -> None:
        if state != self.states[-1]:
            self.times.append(t)
            self.states.append(state)

    def during(self, begin: float, end: float) -> set[bool | None]:
        first = bisect_right(self.times, begin) - 1
        return set(self.states[first : bisect_right(self.times, end)])

    def begin(self, t: float, wanted: bool) -> bool | None:
        """An attempt to make it so; what it was before."""
        before = self.states[-1]
        if before != wanted:
            self.at(t, None)
        return before

    def end(self, begun: float, t: float, type: str, wanted: bool, before: bool | None) -> None:
        if type == "info":
            self.settles = t + SETTLE
        elif begun >= self.settles:
            self.at(t, wanted if type == "ok" else before)


@dataclass
class _Operation:
    f: str
    value: Any
    begin: float
    end: float
    type: str
    result: Any


def check(history: Iterable[Event], expected: Expectation | None = None) -> Verdict:
    """Is everything kept that was promised?"""
    return _Checks(list(history), expected or Expectation()).verdict


class _Checks:
    def __init__(self, history: list[Event], expected: Expectation) -> None:
        self.history = history
        self.expected = expected
        self.verdict = Verdict()
        self.start, self.end = (history[0].t, history[-1].t) if history else (0.0, 0.0)
        self.seen: dict[str, list[Event]] = defaultdict(list)
        self.faults: list[_Operation] = []
        self.operations: list[_Operation] = []
        self.lines: dict[str, dict[Key, _Line]] = defaultdict(dict)
        self._read()
        self._draw_lines()
        self._is_void()
        if not self.verdict.void:
            self._rows_are_what_was_answered()
            self._delivered_or_announced()
            self._no_phantoms()
            self._no_duplicates()
            self._recovered()

    def error(self, invariant: str, text: str, *about: str) -> None:
        """With the events that are about the same message, subscriber or topic."""
        found = self.verdict.errors[invariant]
        if not found:
            window = [e for e in self.history if all(repr(word) in repr(e.value) for word in about)]
            for t, who, type, f, value in window[:EXPLAINED]:
                text += f"\n    {t - self.start:9.4f} {who} {type} {f} {value!r}"
        found.append(text)

    # What happened

    def _read(self) -> None:
        under_way: dict[str, Event] = {}
        for event in self.history:
            self.verdict.counts[f"{event.f} {event.type}"] += 1
            if event.f in OBSERVATIONS:
                self.seen[event.f].append(event)
            elif event.type == "invoke":
                if event.who in under_way:
                    self.verdict.void.append(f"{event.who} does two things at a time")
                under_way[event.who] = event
            elif (begun := under_way.pop(event.who, None)) is None or begun.f != event.f:
                self.verdict.void.append(f"{event.who} ended what it had not begun: {event}")
            else:
                done = _Operation(
                    event.f, begun.value, begun.t, event.t, event.type, event.value
                )  # fmt: skip
                (self.operations if event.f in OPERATIONS else self.faults).append(done)
        for event in under_way.values():
            self.verdict.void.append(f"nobody knows how this ended: {event}")

    def _draw_lines(self) -> None:
        """Each url has one controller, so that its operations do not overlap."""
        for operation in sorted(self.operations, key=lambda o: o.begin):
            if operation.f == "set":
                url, keys = operation.value
                every = self.lines[url].keys() | keys
                wishes = {key: key in keys for key in every}
            elif operation.f in ("subscribe", "unsubscribe"):
                url = operation.value.url
                wishes = {operation.value: operation.f == "subscribe"}
            else:
                continue
            for key, wanted in wishes.items():
                line = self.lines[url].setdefault(key, _Line())
                before = line.begin(operation.begin, wanted)
                line.end(operation.begin, operation.end, operation.type, wanted, before)

    def _is_void(self) -> None:
        """A run that proves nothing must not pass."""
        void, expected = self.verdict.void, self.expected
        happened = {fault.f for fault in self.faults if fault.type == "ok" and fault.result}
        if missing := expected.faults - happened:
            void.append(f"these faults did not happen: {sorted(missing)}")
        for fault in self.faults:
            if fault.type != "ok" or not fault.result:
                void.append(f"a fault that cannot prove it happened: {fault}")
        acknowledged = sum(o.f == "notify" and o.type == "ok" for o in self.operations)
        for name, number, least in [
            ("acknowledged messages", acknowledged, expected.acknowledged),
            ("received messages", len(self.seen["receive"]), expected.received),
            ("notices", len(self.seen["missed"]), expected.missed),
        ]:
            if number < least:
                void.append(f"{number} {name}, less than {least}")
        for name in ("rows", "notices", "sinks"):
            if len(self.seen[name]) != 1:
                void.append(f"{len(self.seen[name])} times {name}, not once")
        if self.seen["sinks"]:
            counted = self.seen["sinks"][0].value
            before = self.history[: self.history.index(self.seen["sinks"][0])]
            written = sum(event.f in ("receive", "missed") for event in before)
            if counted != written:
                void.append(f"the subscribers counted {counted} requests and wrote down {written}")

    # The invariants

    def _rows_are_what_was_answered(self) -> None:
        """I1: what was answered is in the database. I5: nothing else is."""
        rows: set[Key] = self.seen["rows"][0].value
        for url, lines in self.lines.items():
            for key, line in lines.items():
                if line.states[-1] is not None and line.states[-1] != (key in rows):
                    what = "was answered, and is gone" if line.states[-1] else "was removed, and is"
                    self.error("I1", f"{key} {what}", *key)
            self._whole_list(url, {key for key in rows if key.url == url})
        for key in rows - set(chain.from_iterable(self.lines.values())):
            self.error("I5", f"nobody ever asked for {key}", *key)

    def _whole_list(self, url: str, rows: set[Key]) -> None:
        """A set that nobody knows about was done or not done."""
        changes = [o for o in self.operations if o.f != "notify" and _url(o) == url]
        if not changes or (last := changes[-1]).f != "set" or last.type != "info":
            return
        before = {key: line.during(last.begin - 1e-9, last.begin - 1e-9).pop()
                  for key, line in self.lines[url].items()}  # fmt: skip
        if None in before.values():
            return
        if rows not in (last.value[1], {key for key, state in before.items() if state}):
            self.error("I1", f"{url} has a mix of two lists", url)

    def _delivered_or_announced(self) -> None:
        """I2: an acknowledged message was delivered, or its absence was or will be announced, to
        every subscription that is still there."""
        took = [e.value for e in self.seen["receive"] if e.value.answer in ("yes", "late")]
        got = {(each.url, each.id) for each in took}
        announced: dict[tuple[str, str], float] = {}
        for event in self.seen["missed"]:
            if event.value.confirmed:  # the last one counts
                announced[event.value.url, event.value.topic] = event.t
        pending: set[tuple[str, str]] = self.seen["notices"][0].value
        confirmed = Counter(each.id for each in took)
        for sent in (o for o in self.operations if o.f == "notify" and o.type == "ok"):
            id, topic = sent.value
            if sent.result > confirmed[id]:
                self.error("I2", f"{sent.result} confirmed {id}, it was {confirmed[id]}", id)
            for url, lines in self.lines.items():
                if (url, id) in got or (url, topic) in pending:
                    continue
                if announced.get((url, topic), self.start) >= sent.begin:
                    continue
                for key, line in lines.items():
                    if key.matches(topic) and line.during(sent.begin, self.end) == {True}:
                        self.error("I2", f"{key} never heard of {id} on {topic}", id)
                        break

    def _no_phantoms(self) -> None:
        """I3: only what was sent, whole, to those who may have wanted it."""
        sent = {o.value.id: o for o in self.operations if o.f == "notify"}
        topics = {o.value.topic: o.begin for o in reversed(list(sent.values()))}
        for event in self.seen["receive"]:
            got: Got = event.value
            origin = sent.get(got.id)
            if origin is None or not got.intact or origin.value.topic != got.topic:
                self.error("I3", f"{got} is not what was sent", got.id)
            elif origin.type == "fail":
                self.error("I3", f"{got} although the publisher was told: nothing done", got.id)
            elif not self._may_want(got.url, got.topic, origin.begin, event.t):
                self.error("I3", f"{got} by a subscriber that did not want it", got.id)
        for event in self.seen["missed"]:
            notice: Notice = event.value
            begun = topics.get(notice.topic, float("inf"))
            if begun > event.t or not self._may_want(notice.url, notice.topic, begun, event.t):
                self.error("I3", f"{notice} about nothing", notice.url, notice.topic)

    def _may_want(self, url: str, topic: str, begin: float, end: float) -> bool:
        return any(
            key.matches(topic) and line.during(begin, end) != {False}
            for key, line in self.lines[url].items()
        )

    def _no_duplicates(self) -> None:
        """I4: once, and again only where the answer did not arrive. A notice for each failure, and
        again only after a fault."""
        answers: dict[tuple[str, str], list[str]] = defaultdict(list)
        for event in self.seen["receive"]:
            answers[event.value.url, event.value.id].append(event.value.answer)
        for (url, id), given in answers.items():
            if len(given) > 2 or any(given[:-1]):
                self.error("I4", f"{url} got {id} {len(given)} times: {given}", url, id)
        confirmed = {
            (e.value.url, e.value.id) for e in self.seen["receive"] if e.value.answer == "yes"
        }
        sent: Counter[str] = Counter()
        reached: Counter[tuple[str, str]] = Counter()
        for operation in self.operations:
            if operation.f == "notify":
                id, topic = operation.value
                sent[topic] += 1
                reached.update((url, topic) for url in self.lines if (url, id) in confirmed)
        told = Counter(e.value[:2] for e in self.seen["missed"] if e.value.confirmed)
        for (url, topic), number in told.items():
            most = sent[topic] - reached[url, topic] + len(self.faults)
            if number > most:
                self.error("I4", f"{url} heard {number} times that it missed {topic}", url, topic)

    def _recovered(self) -> None:
        """I7: soon after the last fault everybody is reached again."""
        probed = [e.t for e in self.seen["probed"]]
        for event in self.seen["healed"]:
            took = next((t for t in probed if t >= event.t), float("inf")) - event.t
            if took > self.expected.recovery:
                self.error("I7", f"{took:.1f} s after the end of {event.value} not all are reached")


def _url(operation: _Operation) -> str:
    url: str = operation.value[0]
    return url
