"""Who inside a process wants which topics: a client's subscriptions, a broadcaster's websockets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from lonelypsp.globs import GlobIndex
from lonelypsp.wire import BYTES16, TEXT16

V = TypeVar("V", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Topics:
    """A set of exact topics and a set of globs."""

    exact: frozenset[bytes]
    globs: frozenset[str]

    @classmethod
    def of(cls, exact: Iterable[bytes] = (), globs: Iterable[str] = ()) -> Topics:
        """Checked topics.

        Raises:
            TypeError: an exact topic is not bytes or a glob not str.
            LocalProtocolError: one is longer than 65,535 bytes, or a glob is not encodable.
        """
        if isinstance(exact, bytes) or isinstance(globs, str):
            raise TypeError("give a list of topics, not one")
        return cls(frozenset(map(_exact, exact)), frozenset(map(_glob, globs)))

    @property
    def keys(self) -> list[bytes | str]:
        """All of them: topics are bytes, globs text."""
        return [*self.exact, *self.globs]

    def each(self) -> Iterator[Topics]:
        """One set per topic and per glob."""
        for topic in self.exact:
            yield Topics(frozenset((topic,)), frozenset())
        for glob in self.globs:
            yield Topics(frozenset(), frozenset((glob,)))

    def __len__(self) -> int:
        return len(self.exact) + len(self.globs)

    def __or__(self, other: Topics) -> Topics:
        return Topics(self.exact | other.exact, self.globs | other.globs)

    def __sub__(self, other: Topics) -> Topics:
        return Topics(self.exact - other.exact, self.globs - other.globs)

    def __and__(self, other: Topics) -> Topics:
        return Topics(self.exact & other.exact, self.globs & other.globs)

    def __str__(self) -> str:
        names = [repr(t) for t in sorted(self.exact)] + [repr(g) for g in sorted(self.globs)]
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _exact(topic: bytes) -> bytes:
    if not isinstance(topic, bytes):
        raise TypeError(f"an exact topic is bytes, not {topic!r}")
    BYTES16.encode(topic, "topic")
    return topic


def _glob(glob: str) -> str:
    if not isinstance(glob, str):
        raise TypeError(f"a glob is str, not {glob!r}")
    TEXT16.encode(glob, "glob")
    return glob


NO_TOPICS = Topics(frozenset(), frozenset())


class Interests(Generic[V]):
    """Owners and what they want.

    Wanting and receiving are two things: what an owner gives up is no longer wanted, so that the
    broadcaster is told, but is received until the broadcaster has answered.
    """

    def __init__(self) -> None:
        self.exact: Counter[bytes] = Counter()
        self.globs: Counter[str] = Counter()
        self._exact_owners: dict[bytes, dict[V, None]] = {}
        self._glob_owners: GlobIndex[V] = GlobIndex()

    @property
    def wanted(self) -> Topics:
        return Topics(frozenset(self.exact), frozenset(self.globs))

    def is_wanted(self, key: bytes | str) -> bool:
        """Whether somebody wants this very topic, or this very glob."""
        return key in (self.exact if isinstance(key, bytes) else self.globs)

    def add(self, owner: V, topics: Topics) -> None:
        self.exact.update(topics.exact)
        self.globs.update(topics.globs)
        for topic in topics.exact:
            self._exact_owners.setdefault(topic, {})[owner] = None
        for glob in topics.globs:
            self._glob_owners.add(glob, owner)

    def give_up(self, topics: Topics) -> None:
        """One owner of each no longer wants it."""
        for topic in topics.exact:
            _decrement(self.exact, topic)
        for glob in topics.globs:
            _decrement(self.globs, glob)

    def remove(self, owner: V, topics: Topics) -> None:
        """From now on `owner` gets none of these."""
        for topic in topics.exact:
            owners = self._exact_owners[topic]
            del owners[owner]
            if not owners:
                del self._exact_owners[topic]
        for glob in topics.globs:
            self._glob_owners.remove(glob, owner)

    def match(self, topic: bytes) -> list[V]:
        """Each owner that receives `topic`, once."""
        exact = self._exact_owners.get(topic, ())
        if not len(self._glob_owners):
            return list(exact)
        return list(dict.fromkeys((*exact, *self._glob_owners.match(topic))))

    def wants(self, topic: bytes) -> bool:
        """Whether anybody receives `topic`."""
        return topic in self._exact_owners or bool(self._glob_owners.match(topic))


def _decrement(counter: Counter[V], key: V) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
