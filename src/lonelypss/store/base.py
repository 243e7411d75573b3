"""The contract of a store: what a broadcaster keeps in its database, and what it may rely on.

Once `subscribe`, `unsubscribe`, `set_subscriptions` or `drop` has returned, every `match` that
starts afterwards, in any process on the same database, sees it. What has returned survives a kill
and a power cut. A call that raises has changed nothing, with one exception: when the connection is
lost at the very moment of a commit, nobody can know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from importlib import resources
from typing import Generic, NamedTuple, Protocol, TypeVar

from lonelypsp.replay import Code

R = TypeVar("R")

PRUNED_AT_ONCE = 100


class Kind(IntEnum):
    """How a subscription's pattern is compared with topics."""

    EXACT = 0
    GLOB = 1


class Subscription(NamedTuple):
    """Whom to tell about which topics. A tuple, for it is made for every row that matches.

    Attributes:
        id: never used again, also after the row is gone.
        pattern: the topic, or the glob as UTF-8.
        url: where messages go.
        recovery: where to announce messages that could not be delivered, if anywhere.
    """

    id: int
    kind: Kind
    pattern: bytes
    url: str
    recovery: str | None


@dataclass(frozen=True, slots=True)
class MissedNotice:
    """A topic on which a subscription missed something, claimed by whoever holds this object.

    Attributes:
        generation: grows with each further failure, so that one during the notice is not lost.
        recovery: where to send the notice.
        attempts: how often that failed before.
        url: where the messages would have gone.
    """

    id: int
    generation: int
    subscription_id: int
    recovery: str
    topic: bytes
    attempts: int
    url: str


@dataclass(frozen=True, slots=True)
class Quotas:
    """How many subscriptions there may be; None: any number. Broadcasters' own urls are exempt.

    Attributes:
        per_url: of one url.
        per_origin: of all urls with one scheme, host and port together.
    """

    per_url: int | None = None
    per_origin: int | None = None

    def check(self, of_url: int, of_origin: int) -> None:
        """
        Raises:
            OverQuota: there are more.
        """
        for name, limit, found in (
            ("max_subscriptions_per_url", self.per_url, of_url),
            ("max_subscriptions_per_origin", self.per_origin, of_origin),
        ):
            if limit is not None and found > limit:
                raise OverQuota(f"more than {limit:,} subscriptions ({name})")


class OverQuota(Exception):
    """There would be too many subscriptions; nothing was changed. The text names the option."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A database as it was found, and left.

    Attributes:
        schema: the version of its tables; None: there are none of ours yet.
        known: the version that this lonelypss makes.
        peers: urls of processes on it that gave a sign of life.
        clock: its time, seconds since the epoch, in the middle of the question.
        can_create: whether we may make and change tables.
        is_standby: whether it takes no writes.
        connections: most that it takes of us; None: as many as we like.
    """

    schema: int | None
    known: int
    peers: list[str]
    clock: float
    can_create: bool = True
    is_standby: bool = False
    connections: int | None = None


class StoreUnavailable(Exception):
    """The database cannot answer now. The same call may succeed later.

    Attributes:
        retry_after: seconds a client should wait before it tries again.
    """

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UsedBefore(Exception):
    """A signature was accepted before, here or by another broadcaster."""


class StoreCorrupt(StoreUnavailable):
    """The database is damaged, or not ours. Nothing gets better until somebody looks at it."""


class Store(Protocol):
    """What every database can do. Each method may raise StoreUnavailable.

    Times are unix seconds and come from the caller.
    """

    @property
    def in_threads(self) -> bool:
        """Whether threads of this process work for it now."""
        ...

    async def open(self) -> None:
        """Connect and bring the schema up to date.

        Raises:
            StoreCorrupt: the database is damaged or not ours.
        """

    async def close(self) -> None:
        """Finish what is queued and disconnect. Closing twice is fine."""

    async def match(
        self, topic: bytes, since: float = math.inf, codes: Sequence[Code] = ()
    ) -> Sequence[Subscription]:
        """The subscriptions to `topic`, exact and glob, in no particular order.

        Args:
            since: `time.monotonic()` when the message had arrived. What the database said then or
                later is good enough, so that messages that arrive together share one question.
            codes: to `remember` on the way.

        Raises:
            UsedBefore: as for `remember`.
        """

    async def remember(self, codes: Sequence[Code]) -> None:
        """Have these signatures known at all broadcasters; returns once they are.

        Those of one machine share a file for that (`lonelypsp.replay`), so that only a database
        that several machines share is ever given any.

        Raises:
            UsedBefore: one of them was known. The others may be known now.
            StoreUnavailable: nobody can tell whether they were. They may be known now.
        """

    def found(self, topic: bytes, since: float) -> Sequence[Subscription] | None:
        """What `match` would return, if that is known without waiting; else None."""

    async def subscribe(self, kind: Kind, pattern: bytes, url: str, recovery: str | None) -> bool:
        """Add a subscription.

        Returns:
            Whether it is new. An existing one is left as it is, its recovery url too.

        Raises:
            UnicodeDecodeError: a glob is not UTF-8.
            OverQuota: there would be too many.
        """

    async def unsubscribe(self, kind: Kind, pattern: bytes, url: str) -> bool:
        """Remove a subscription, and its missed notices. Returns whether it existed."""

    async def subscriptions(self, url: str) -> list[Subscription]:
        """What `url` is subscribed to, sorted by kind, then by the bytes of the pattern."""

    async def set_subscriptions(
        self,
        url: str,
        exact: Iterable[tuple[bytes, str | None]],
        globs: Iterable[tuple[str, str | None]],
    ) -> None:
        """Replace all subscriptions of `url` by these pairs of pattern and recovery, or none.

        A subscription that was there before keeps its id; if nothing changes, nothing is written.

        Raises:
            OverQuota: some are new, and there would be too many.
        """

    async def drop(self, subscriptions: Sequence[Subscription]) -> None:
        """Remove exactly these rows, not equal ones that were added after they were removed."""

    async def record_missed(self, items: Sequence[tuple[Subscription, bytes]], due: float) -> None:
        """Note that each subscription missed something on the topic, to be announced at `due`.

        Subscriptions without a recovery url, and those that are gone, are left out. Where the topic
        is noted already, the earlier time counts. A note stays as it is if it cannot be taken back,
        nobody is sending its notice now, and that is due no later.
        """

    async def clear_missed(self, items: Sequence[tuple[Subscription, bytes]]) -> None:
        """Take back notes made as a precaution, unless something else happened to them since."""

    async def claim_missed(self, now: float, limit: int, lease: float) -> list[MissedNotice]:
        """Take up to `limit` notices that are due; nobody else gets them for `lease` seconds.

        What has waited longest comes first. Follow up with `finish_missed`, `retry_missed` or
        `postpone_missed`.
        """

    async def finish_missed(self, notice: MissedNotice, now: float) -> None:
        """Forget a notice that was confirmed or given up.

        If there was another failure since it was claimed, it is due at `now` instead; also if
        somebody else had it meanwhile, and has released it.
        """

    async def retry_missed(self, notice: MissedNotice, due: float) -> None:
        """Release a notice until `due` and count the attempt.

        If there was another failure since it was claimed, counting starts again.
        """

    async def postpone_missed(self, notices: Sequence[tuple[MissedNotice, float]]) -> None:
        """Release notices until these times as if they had not been claimed."""

    async def next_due(self) -> float | None:
        """When the first notice can be claimed, if there is any."""

    async def renew_peer(self, url: str, until: float, now: float) -> bool:
        """Let the broadcaster that gets messages at `url` count as alive until then.

        Returns:
            Whether it did at `now`. If not, others may have removed its subscriptions.
        """

    async def remove_peer(self, url: str) -> None:
        """Remove the subscriptions of a broadcaster that stops, and that it is alive."""

    async def drop_dead_peers(self, now: float) -> list[str]:
        """Remove the subscriptions of all broadcasters that no longer count as alive.

        One that was only asleep, and subscribes again before it renews, is found again for a day.

        Returns:
            The urls that had subscriptions, sorted.
        """

    # Subscribers that give no sign of life

    async def renew_leases(self, urls: Collection[str], now: float) -> None:
        """Note that these subscribers were alive at `now`. A new one counts as alive at first."""

    async def prune(self, now: float, ttl: float, until: float) -> dict[str, int]:
        """Remove all subscriptions of some urls that gave no sign of life for `ttl` seconds.

        Of several who call this at one time, only one gets to remove a url. Urls for which a notice
        is still to be sent, and those of broadcasters, are left alone. If nobody called this before
        the time that the last call gave as `until`, signs of life may have gone unnoticed: all
        count as alive at `now`, then.

        Args:
            until: by when it is called again at the latest.

        Returns:
            How many subscriptions each url had. If that are `PRUNED_AT_ONCE` urls, there may be
            more.
        """

    async def counts(self) -> dict[str, int]:
        """How many `exact`, `glob` and `missed` rows there are, for operators."""


class Difference(Generic[R]):
    """How to get from the subscriptions that a url has to those that are wanted, all sorted.

    Args:
        present: id, kind, pattern and recovery of rows.
        exact, globs: pattern and recovery.
        recovery: from a recovery url to what is in a row.

    Attributes:
        added: kind, pattern, recovery.
        changed: id, recovery.
        dropped: ids.
        any_glob: whether globs are among what is added or dropped.
    """

    def __init__(
        self,
        present: Iterable[tuple[int, int, bytes, R]],
        exact: Iterable[tuple[bytes, str | None]],
        globs: Iterable[tuple[str, str | None]],
        recovery: Callable[[str | None], R],
    ) -> None:
        wanted = {(int(Kind.EXACT), topic): recovery(r) for topic, r in exact}
        wanted |= {(int(Kind.GLOB), glob.encode()): recovery(r) for glob, r in globs}
        surplus = {(kind, pattern): (id, found) for id, kind, pattern, found in present}
        added, changed = [], []
        for key, value in wanted.items():
            before = surplus.pop(key, None)
            if before is None:
                added.append((*key, value))
            elif before[1] != value:
                changed.append((before[0], value))
        self.added = sorted(added, key=lambda row: row[:2])
        self.changed = sorted(changed, key=lambda row: row[0])
        self.dropped = sorted(id for id, _ in surplus.values())
        self.any_glob = any(kind == Kind.GLOB for kind, *_ in (*added, *surplus))


def load_queries(name: str) -> dict[str, str]:
    """The statements in the file `name` of this package, by the `-- name: x` above each."""
    text = resources.files(__package__).joinpath(name).read_text("utf-8")
    _, *parts = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))
