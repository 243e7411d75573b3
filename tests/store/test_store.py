"""What every store must do. A new store joins by adding its factory to FACTORIES."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

import postgres
from lonelypsp.globs import glob_matches
from lonelypss import collector
from lonelypss.store import Kind, MissedNotice, OverQuota, Quotas, Store, Subscription, globset
from lonelypss.store.base import PRUNED_AT_ONCE
from lonelypss.store.postgres import PostgresStore
from lonelypss.store.sqlite import SqliteStore

T = TypeVar("T")
DEADLINE = 10.0


@dataclass(frozen=True)
class Factory:
    """How to make a store.

    Attributes:
        make: called with a directory of its own, and options of the store; twice with one directory
            means one database.
        shared: whether what is in the database outlives a store, and others see it.
    """

    name: str
    make: Callable[..., Store]
    shared: bool = True


def in_postgres(directory: Path, **options: Any) -> Store:
    url = directory / "url"
    if not url.exists():
        url.write_text(postgres.shared().database())
    return PostgresStore(url.read_text(), timeout=DEADLINE, **options)


FACTORIES = [
    Factory("sqlite-file", lambda path, **options: SqliteStore(str(path / "store.db"), **options)),
    Factory("sqlite-memory", lambda _, **options: SqliteStore(None, **options), shared=False),
    Factory("postgres", in_postgres),
]


@pytest.fixture(params=FACTORIES, ids=lambda f: f.name)
def factory(request: pytest.FixtureRequest) -> Factory:
    return request.param


@pytest.fixture
async def store(factory: Factory, tmp_path: Path) -> AsyncIterator[Store]:
    store = factory.make(tmp_path)
    await store.open()
    yield store
    await store.close()


@asynccontextmanager
async def limited(factory: Factory, directory: Path, number: int = 1) -> AsyncIterator[list[Store]]:
    """Stores with quotas of 5 for a url and 8 for an origin."""
    stores = [factory.make(directory, quotas=Quotas(5, 8)) for _ in range(number)]
    try:
        for store in stores:
            await store.open()
        yield stores
    finally:
        for store in stores:
            await store.close()


async def counters(store: Store) -> tuple[dict[str, int], dict[str, int]]:
    """What the database has counted by url and by origin."""
    if isinstance(store, SqliteStore):
        return await store._read(
            lambda db: (
                dict(db.execute("SELECT url, subscriptions FROM subscribers")),
                dict(db.execute("SELECT origin, subscriptions FROM origins")),
            )
        )
    assert isinstance(store, PostgresStore)

    async def work(db: Any) -> tuple[dict[str, int], dict[str, int]]:
        by_url = await db.fetch("SELECT url, subscriptions FROM lonelyps_subscribers")
        by_origin = await db.fetch("SELECT origin, subscriptions FROM lonelyps_origins")
        return {url.decode(): n for url, n in by_url}, dict(map(tuple, by_origin))

    return await store._call(work, None)


@pytest.fixture
async def other(factory: Factory, store: Store, tmp_path: Path) -> AsyncIterator[Store]:
    """A second store on the same database."""
    if not factory.shared:
        pytest.skip("nobody else can see it")
    other = factory.make(tmp_path)
    await other.open()
    yield other
    await other.close()


A, B = "http://a/receive", "http://b/receive"
RECOVERY = "http://a/recover"

ODD_TOPICS = [
    b"",
    b"\0",
    b"foo\0x",
    b"\xff\xfe",
    b"'; DROP TABLE subscriptions;--",
    b"%_*?[",
    "ünï/\u20ac".encode(),
    b"x" * 65_535,
    bytes(range(256)),
]


def urls(found: list[Subscription]) -> list[str]:
    return sorted(s.url for s in found)


async def subscribed(
    store: Store, pattern: bytes = b"t", kind: Kind = Kind.EXACT, recovery: str | None = RECOVERY
) -> Subscription:
    assert await store.subscribe(kind, pattern, A, recovery)
    return next(s for s in await store.subscriptions(A) if (s.kind, s.pattern) == (kind, pattern))


# Subscriptions


@pytest.mark.parametrize("topic", ODD_TOPICS, ids=lambda t: repr(t[:12]))
async def test_exact_subscriptions_match_their_topic_only(store: Store, topic: bytes) -> None:
    assert await store.match(topic) == []
    assert await store.subscribe(Kind.EXACT, topic, A, RECOVERY)
    (found,) = await store.match(topic)
    assert found == Subscription(found.id, Kind.EXACT, topic, A, RECOVERY)
    assert await store.match(topic + b"\0") == []
    assert await store.match(topic[:-1] + b"?") == []
    assert await store.unsubscribe(Kind.EXACT, topic, A)
    assert await store.match(topic) == []


@pytest.mark.parametrize(
    ("glob", "hits", "misses"),
    [
        ("foo/*", [b"foo/bar"], [b"foo", b"foo/bar/baz", b"foo/\xff"]),
        ("foo/**", [b"foo/bar/baz"], [b"foo", b"bar"]),
        ("foo", [b"foo"], [b"foo\0", b"foo\0x", b"fo"]),
        ("f\0*", [b"f\0oo"], [b"f", b"foo"]),
        ("ü?", ["üx".encode(), "üü".encode()], [b"ux"]),
        ("**/*.json", [b"a/b/c.json", b"c.json"], [b"c.jsonx"]),
        ("'%_", [b"'%_"], [b"'ab"]),
        ("a" * 65_534 + "*", [b"a" * 65_535], [b"a"]),
    ],
    ids=lambda value: repr(value)[:20],
)
async def test_globs_match(store: Store, glob: str, hits: list[bytes], misses: list[bytes]) -> None:
    subscription = await subscribed(store, glob.encode(), Kind.GLOB)
    for topic in hits:
        assert await store.match(topic) == [subscription]
    for topic in misses:
        assert await store.match(topic) == []
    assert await store.unsubscribe(Kind.GLOB, glob.encode(), A)
    for topic in hits:
        assert await store.match(topic) == []


async def test_a_glob_must_be_utf8(store: Store) -> None:
    with pytest.raises(UnicodeDecodeError):
        await store.subscribe(Kind.GLOB, b"\xff", A, None)
    assert (await store.counts())["glob"] == 0


@pytest.mark.parametrize("kind", Kind)
async def test_subscribing_twice_changes_nothing(store: Store, kind: Kind) -> None:
    before = await subscribed(store, b"t", kind)
    assert not await store.subscribe(kind, b"t", A, "http://other/recover")
    assert await store.match(b"t") == [before]


async def test_unsubscribing_what_is_not_there(store: Store) -> None:
    before = await subscribed(store, b"t")
    assert not await store.unsubscribe(Kind.EXACT, b"u", A)
    assert not await store.unsubscribe(Kind.EXACT, b"t", B)
    assert not await store.unsubscribe(Kind.GLOB, b"t", A)
    assert await store.match(b"t") == [before]


async def test_all_who_match_are_found_once_per_subscription(store: Store) -> None:
    for kind, pattern, url in [
        (Kind.EXACT, b"a/b", A),
        (Kind.GLOB, b"a/*", A),
        (Kind.GLOB, b"**", A),
        (Kind.EXACT, b"a/b", B),
        (Kind.EXACT, b"a/*", B),
        (Kind.GLOB, b"b/*", B),
    ]:
        await store.subscribe(kind, pattern, url, None)
    assert urls(await store.match(b"a/b")) == [A, A, A, B]
    assert urls(await store.match(b"a/*")) == [A, A, B]


@pytest.mark.parametrize(
    "url", ["http://h/a b?x=1&y='\"", "http://ü/\u20ac", "a\0b", "", "http://h/" + "x" * 65_526]
)
async def test_urls_survive(store: Store, url: str) -> None:
    await store.subscribe(Kind.EXACT, b"t", url, url)
    await store.subscribe(Kind.EXACT, b"t", url + "\0", None)
    assert sorted((s.url, s.recovery or "") for s in await store.match(b"t")) == [
        (url, url),
        (url + "\0", ""),
    ]
    assert len(await store.subscriptions(url)) == 1
    assert await store.unsubscribe(Kind.EXACT, b"t", url)
    assert urls(await store.match(b"t")) == [url + "\0"]


async def test_subscriptions_are_sorted_by_kind_and_bytes(store: Store) -> None:
    # UTF-16 would order the last two the other way round
    patterns = [b"", b"\0", b"B", b"a", b"a\0", b"ab", "\uff5e".encode(), "\U00010000".encode()]
    for pattern in random.Random(1).sample(patterns, len(patterns)):
        for kind in Kind:
            await store.subscribe(kind, pattern, A, None)
    await store.subscribe(Kind.EXACT, b"not mine", B, None)
    found = [(s.kind, s.pattern) for s in await store.subscriptions(A)]
    assert found == [(kind, pattern) for kind in Kind for pattern in patterns]
    assert await store.subscriptions("http://nobody/") == []


@pytest.mark.parametrize("count", [0, 1, 16, 17, 20, 40, 1200])
async def test_setting_the_same_again_keeps_every_id(store: Store, count: int) -> None:
    exact = [(b"t/%d" % n, RECOVERY if n % 3 else None) for n in range(count)]
    globs = [(f"g/{n}/*", RECOVERY if n % 3 else None) for n in range(count)]
    await store.set_subscriptions(A, exact, globs)
    before = await store.subscriptions(A)
    assert len(before) == 2 * count
    await store.set_subscriptions(A, iter(reversed(exact)), iter(reversed(globs)))
    assert await store.subscriptions(A) == before
    for n in range(0, count, 100):
        assert len(await store.match(b"t/%d" % n)) == 1
        assert len(await store.match(b"g/%d/x" % n)) == 1


async def test_set_inserts_deletes_and_updates(store: Store) -> None:
    await store.subscribe(Kind.EXACT, b"keep", B, None)
    await store.set_subscriptions(
        A, [(b"keep", None), (b"change", None), (b"go", None)], [("k/*", None), ("g/*", None)]
    )
    ids = {(s.kind, s.pattern): s.id for s in await store.subscriptions(A)}
    await store.set_subscriptions(
        A,
        [(b"keep", None), (b"change", RECOVERY), (b"new", None)],
        [("k/*", RECOVERY), ("n", None)],
    )
    after = await store.subscriptions(A)
    assert [(s.kind, s.pattern, s.recovery) for s in after] == [
        (Kind.EXACT, b"change", RECOVERY),
        (Kind.EXACT, b"keep", None),
        (Kind.EXACT, b"new", None),
        (Kind.GLOB, b"k/*", RECOVERY),
        (Kind.GLOB, b"n", None),
    ]
    for s in after:
        assert ids.get((s.kind, s.pattern), s.id) == s.id
    assert urls(await store.match(b"keep")) == [A, B]
    assert await store.match(b"g/x") == []
    assert [s.recovery for s in await store.match(b"k/x")] == [RECOVERY]
    await store.set_subscriptions(A, [], [])
    assert await store.subscriptions(A) == []
    assert await store.counts() == {"exact": 1, "glob": 0, "missed": 0}


async def sets_end_as_one_of_them(stores: list[Store]) -> None:
    """C23."""
    lists = [[(b"%d/%d" % (n, m), None) for m in range(50)] for n in range(8)]
    await asyncio.gather(
        *(stores[n % len(stores)].set_subscriptions(A, exact, []) for n, exact in enumerate(lists))
    )
    found = [(s.pattern, None) for s in await stores[0].subscriptions(A)]
    assert found in [sorted(x) for x in lists]


async def test_concurrent_sets_end_as_one_of_them(store: Store) -> None:
    await sets_end_as_one_of_them([store])


async def test_concurrent_sets_of_several_end_as_one_of_them(store: Store, other: Store) -> None:
    await sets_end_as_one_of_them([store, other])


@pytest.mark.parametrize("kind", Kind)
async def test_drop_removes_exactly_the_row(store: Store, kind: Kind) -> None:
    old = await subscribed(store, b"t", kind)
    await store.unsubscribe(kind, b"t", A)
    new = await subscribed(store, b"t", kind)
    assert new.id != old.id
    await store.drop([old])
    assert await store.match(b"t") == [new]
    await store.drop([new, new])
    assert await store.match(b"t") == []
    await store.drop([])


async def test_concurrent_calls_all_get_their_own_answer(store: Store) -> None:
    answers = await asyncio.gather(
        *(store.subscribe(Kind(n % 2), b"%d" % (n % 50), A, None) for n in range(200))
    )
    assert sum(answers) == 50
    assert await store.counts() == {"exact": 25, "glob": 25, "missed": 0}
    matches = await asyncio.gather(*(store.match(b"%d" % n) for n in range(60)))
    assert [len(m) for m in matches] == [1] * 50 + [0] * 10


async def test_a_cancelled_call_hurts_nobody(store: Store) -> None:
    tasks = [asyncio.create_task(store.subscribe(Kind.GLOB, b"%d" % n, A, None)) for n in range(30)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert await store.subscribe(Kind.EXACT, b"after", A, None)
    for n in range(1, 30, 2):
        assert len(await store.match(b"%d" % n)) == 1


async def test_closing_twice(store: Store) -> None:
    await store.close()
    await store.close()


# What other processes see


@pytest.mark.parametrize("kind", Kind)
async def test_others_see_each_change_at_once(store: Store, other: Store, kind: Kind) -> None:
    for n in range(20):
        one, two = (store, other) if n % 2 else (other, store)
        assert await one.subscribe(kind, b"t", A, RECOVERY)
        (seen,) = await two.match(b"t")
        assert [seen] == await one.match(b"t")
        await two.set_subscriptions(
            A, [(b"t", None)] if kind == Kind.EXACT else [], [("t", None)] if kind else []
        )
        (changed,) = await one.match(b"t")
        assert (changed.id, changed.recovery) == (seen.id, None)
        if n % 3:
            assert await two.unsubscribe(kind, b"t", A)
        else:
            await two.drop([changed])
        assert await one.match(b"t") == []


async def test_many_globs_from_elsewhere(store: Store, other: Store) -> None:
    for count in (3, 700, 2_000, 1_400, 0):
        await other.set_subscriptions(A, [], [(f"{n}/*", None) for n in range(count)])
        topics = [b"%d/x" % n for n in range(0, 2_000, 50)]
        found = await asyncio.gather(*(store.match(topic) for topic in topics))
        assert [bool(f) for f in found] == [n < count for n in range(0, 2_000, 50)]


async def test_globs_are_read_page_by_page_while_they_change(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{type(store).__module__}.PAGE", 7)
    await other.set_subscriptions(A, [], [(f"{n}/*", None) for n in range(100)])
    for n in range(30):
        store._globs._globs = globset._Globs()  # type: ignore[attr-defined] # as at the start
        reading = asyncio.create_task(store.match(b"99/x"))
        await other.unsubscribe(Kind.GLOB, b"%d/*" % n, A)
        await other.set_subscriptions(B, [], [("late/*", f"http://{n}/")])
        await reading
        assert await store.match(b"%d/x" % n) == []
        assert [s.recovery for s in await store.match(b"late/x")] == [f"http://{n}/"]
        found = await asyncio.gather(*(store.match(b"%d/x" % m) for m in range(100)))
        assert [len(f) for f in found] == [0] * (n + 1) + [1] * (99 - n)


async def test_many_globs_do_not_wake_the_garbage_collector(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `lonelypss serve`. It would look through all of them, for 100 ms and more."""
    await store.set_subscriptions(A, [], [(f"a{n}-*/{n}/*", None) for n in range(16_000)])
    looked_through: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if info["generation"] == 2:
            looked_through.append(len(gc.get_objects()))

    monkeypatch.setattr(collector, "_ours", False)
    with collector.taken_over():
        pass
    gc.callbacks.append(note)
    try:
        store._globs._globs = globset._Globs()  # type: ignore[attr-defined] # as at the start
        assert len(await store.match(b"a15999-x/15999/y")) == 1
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
    assert looked_through == []


async def test_more_subscribers_than_are_read_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_AT_ONCE", "_ROWS_AT_ONCE"):
        monkeypatch.setattr(f"{type(store).__module__}.{name}", 5, raising=False)
    for count in range(1, 17):
        await store.subscribe(Kind.EXACT, b"t", f"http://{count:02}/", None)
        found = urls(await store.match(b"t"))
        assert found == [f"http://{n:02}/" for n in range(1, count + 1)]


async def test_matching_while_globs_change(store: Store, other: Store) -> None:
    """What was there before a match and is there after it must be found by it."""
    await store.subscribe(Kind.GLOB, b"s/*", A, None)
    done = asyncio.Event()

    async def change() -> None:
        for n in range(6):
            await other.set_subscriptions(B, [], [(f"{n}/{m}/*", None) for m in range(800)])
            assert len(await other.match(b"%d/7/x" % n)) == 1
            assert len(await store.match(b"%d/799/x" % n)) == 1
        done.set()

    async def match() -> None:
        while not done.is_set():
            assert len(await store.match(b"s/x")) == 1
            await asyncio.sleep(0)

    await asyncio.gather(change(), match(), match())


async def test_two_sweepers_never_share_a_notice(store: Store, other: Store) -> None:
    subscription = await subscribed(store)
    topics = [b"%d" % n for n in range(100)]
    await store.record_missed([(subscription, t) for t in topics], due=1.0)
    claims = await asyncio.gather(
        *(s.claim_missed(2.0, 7, 60.0) for s in (store, other) for _ in range(10))
    )
    assert sorted(n.topic for claim in claims for n in claim) == sorted(topics)


async def test_everything_is_there_after_reopening(
    factory: Factory, store: Store, tmp_path: Path
) -> None:
    if not factory.shared:
        pytest.skip("nothing outlives it")
    subscription = await subscribed(store, b"*", Kind.GLOB)
    await store.record_missed([(subscription, b"x")], due=5.0)
    await store.close()
    again = factory.make(tmp_path)
    await again.open()
    try:
        assert await again.match(b"x") == [subscription]
        assert [n.topic for n in await again.claim_missed(5.0, 9, 60.0)] == [b"x"]
    finally:
        await again.close()


# Missed notices


@pytest.mark.parametrize("topic", ODD_TOPICS, ids=lambda t: repr(t[:12]))
async def test_a_notice_from_failure_to_confirmation(store: Store, topic: bytes) -> None:
    subscription = await subscribed(store)
    assert await store.next_due() is None
    await store.record_missed([(subscription, topic)], due=100.0)
    assert await store.next_due() == 100.0
    assert await store.claim_missed(99.0, 10, 60.0) == []
    (notice,) = await store.claim_missed(100.0, 10, 60.0)
    assert notice == MissedNotice(notice.id, 1, subscription.id, RECOVERY, topic, 0, A)
    assert await store.next_due() == 160.0
    assert await store.claim_missed(159.0, 10, 60.0) == []
    await store.finish_missed(notice, 101.0)
    assert await store.next_due() is None
    assert await store.match(b"t") == [subscription]


async def test_several_topics_of_one_subscription(store: Store) -> None:
    subscription = await subscribed(store, b"**", Kind.GLOB)
    await store.record_missed([(subscription, t) for t in (b"a", b"b", b"c")], due=1.0)
    assert {n.topic for n in await store.claim_missed(1.0, 10, 60.0)} == {b"a", b"b", b"c"}
    assert (await store.counts())["missed"] == 3


async def test_nothing_is_recorded_without_a_recovery_url_or_a_row(store: Store) -> None:
    silent = await subscribed(store, b"silent", recovery=None)
    gone = await subscribed(store, b"gone")
    await store.unsubscribe(Kind.EXACT, b"gone", A)
    await store.record_missed([(silent, b"t"), (gone, b"t")], due=1.0)
    await store.record_missed([], due=1.0)
    assert (await store.counts())["missed"] == 0


@pytest.mark.parametrize("how", ["unsubscribe", "drop", "set", "no recovery"])
async def test_notices_go_with_their_subscription(store: Store, how: str) -> None:
    stays = await subscribed(store, b"stays")
    goes = await subscribed(store, b"goes")
    await store.record_missed([(stays, b"t"), (goes, b"t"), (goes, b"u")], due=1.0)
    match how:
        case "unsubscribe":
            await store.unsubscribe(Kind.EXACT, b"goes", A)
        case "drop":
            await store.drop([goes])
        case "set":
            await store.set_subscriptions(A, [(b"stays", RECOVERY)], [])
        case _:
            await store.set_subscriptions(A, [(b"stays", RECOVERY), (b"goes", None)], [])
    assert [n.subscription_id for n in await store.claim_missed(1.0, 9, 1.0)] == [stays.id]


async def test_a_notice_goes_to_the_present_recovery_url(store: Store) -> None:
    subscription = await subscribed(store)
    await store.record_missed([(subscription, b"t")], due=1.0)
    await store.set_subscriptions(A, [(b"t", "http://new/recover")], [])
    (notice,) = await store.claim_missed(1.0, 9, 1.0)
    assert notice.recovery == "http://new/recover"


async def test_the_longest_due_come_first_and_no_more_than_asked(store: Store) -> None:
    subscription = await subscribed(store)
    for due in (5.0, 3.0, 9.0, 1.0, 7.0):
        await store.record_missed([(subscription, b"%d" % due)], due=due)
    assert [n.topic for n in await store.claim_missed(8.0, 3, 60.0)] == [b"1", b"3", b"5"]
    assert [n.topic for n in await store.claim_missed(8.0, 3, 60.0)] == [b"7"]
    assert await store.claim_missed(8.0, 3, 60.0) == []
    assert await store.next_due() == 9.0


async def test_a_retry_waits_and_counts(store: Store) -> None:
    subscription = await subscribed(store)
    await store.record_missed([(subscription, b"t")], due=1.0)
    for attempts in range(4):
        (notice,) = await store.claim_missed(attempts * 10 + 1.0, 9, 60.0)
        assert notice.attempts == attempts
        await store.retry_missed(notice, due=attempts * 10 + 11.0)
        assert await store.next_due() == attempts * 10 + 11.0


async def test_what_is_postponed_was_never_tried(store: Store) -> None:
    subscription = await subscribed(store)
    await store.record_missed([(subscription, b"%d" % n) for n in range(3)], due=1.0)
    claimed = await store.claim_missed(1.0, 9, 60.0)
    await store.postpone_missed([(notice, 5.0 + n) for n, notice in enumerate(claimed)])
    await store.postpone_missed([])
    assert await store.next_due() == 5.0
    again = await store.claim_missed(6.0, 9, 60.0)
    assert again == claimed[:2]
    (third,) = await store.claim_missed(7.0, 9, 60.0)
    await store.finish_missed(third, now=7.0)
    await store.postpone_missed([(third, 8.0)])
    assert (await store.counts())["missed"] == 2


async def test_a_lost_lease_ends(store: Store) -> None:
    subscription = await subscribed(store)
    await store.record_missed([(subscription, b"t")], due=1.0)
    (lost,) = await store.claim_missed(1.0, 9, 60.0)
    (again,) = await store.claim_missed(61.0, 9, 60.0)
    assert again == lost


async def test_the_earlier_time_counts(store: Store) -> None:
    subscription = await subscribed(store)
    for due, expected in [(50.0, 50.0), (70.0, 50.0), (30.0, 30.0)]:
        await store.record_missed([(subscription, b"t")], due=due)
        assert await store.next_due() == expected
    assert (await store.counts())["missed"] == 1


async def test_a_failure_during_the_notice_is_announced_again(store: Store) -> None:
    subscription = await subscribed(store)
    await store.record_missed([(subscription, b"t")], due=1.0)
    (notice,) = await store.claim_missed(1.0, 9, 60.0)
    await store.retry_missed(notice, due=2.0)
    (notice,) = await store.claim_missed(2.0, 9, 60.0)
    await store.record_missed([(subscription, b"t")], due=90.0)
    await store.finish_missed(notice, now=3.0)
    assert await store.next_due() == 3.0
    (notice,) = await store.claim_missed(3.0, 9, 60.0)
    assert notice.attempts == 0
    await store.finish_missed(notice, now=4.0)
    assert await store.next_due() is None


async def test_a_failure_during_a_failed_notice_starts_the_count_again(store: Store) -> None:
    subscription = await subscribed(store)
    await store.record_missed([(subscription, b"t")], due=1.0)
    (notice,) = await store.claim_missed(1.0, 9, 60.0)
    await store.record_missed([(subscription, b"t")], due=2.0)
    await store.retry_missed(notice, due=20.0)
    (notice,) = await store.claim_missed(20.0, 9, 60.0)
    assert notice.attempts == 0


async def test_late_answers_about_a_notice_that_is_gone(store: Store) -> None:
    subscription = await subscribed(store)
    await store.record_missed([(subscription, b"t")], due=1.0)
    (old,) = await store.claim_missed(1.0, 9, 60.0)
    await store.finish_missed(old, now=2.0)
    await store.record_missed([(subscription, b"t")], due=5.0)
    await store.finish_missed(old, now=3.0)
    await store.retry_missed(old, due=4.0)
    assert await store.next_due() == 5.0


async def test_a_note_of_what_will_be_announced_stays_as_it_is(store: Store) -> None:
    subscription = await subscribed(store)
    for due in (5.0, 6.0, 7.0):
        await store.record_missed([(subscription, b"t")], due=due)
    (notice,) = await store.claim_missed(5.0, 9, 60.0)
    assert notice.generation == 2
    await store.retry_missed(notice, due=8.0)
    await store.record_missed([(subscription, b"t")], due=9.0)
    (notice,) = await store.claim_missed(8.0, 9, 60.0)
    assert (notice.generation, notice.attempts) == (2, 1)
    await store.retry_missed(notice, due=100.0)
    await store.record_missed([(subscription, b"t")], due=10.0)  # it would come too late
    (notice,) = await store.claim_missed(10.0, 9, 60.0)
    assert notice.generation == 3


async def test_whoever_was_too_slow_with_a_notice_does_not_end_it(store: Store) -> None:
    """It may have been sent before what failed while somebody else had it."""
    subscription = await subscribed(store)
    await store.record_missed([(subscription, b"t")], due=1.0)
    (slow,) = await store.claim_missed(1.0, 9, 60.0)
    (quick,) = await store.claim_missed(61.0, 9, 60.0)
    await store.retry_missed(quick, due=70.0)
    await store.record_missed([(subscription, b"t")], due=80.0)
    await store.finish_missed(slow, now=62.0)
    assert await store.next_due() == 62.0


@pytest.mark.parametrize(
    ("meanwhile", "left"),
    [("nothing", 0), ("another failure", 1), ("claimed", 1), ("retried", 1)],
)
async def test_a_precaution_is_taken_back_unless_something_happened(
    store: Store, meanwhile: str, left: int
) -> None:
    subscription = await subscribed(store)
    items = [(subscription, b"t")]
    await store.record_missed(items, due=1.0)
    if meanwhile == "another failure":
        await store.record_missed(items, due=2.0)
    elif meanwhile != "nothing":
        (notice,) = await store.claim_missed(1.0, 9, 60.0)
        if meanwhile == "retried":
            await store.retry_missed(notice, due=9.0)
    await store.clear_missed([*items, (subscription, b"never recorded")])
    assert (await store.counts())["missed"] == left


# Other broadcasters


async def test_a_peer_is_alive_until_its_time_is_over(store: Store) -> None:
    assert not await store.renew_peer(A, until=30.0, now=0.0)
    assert await store.renew_peer(A, until=40.0, now=29.9)
    assert not await store.renew_peer(A, until=70.0, now=40.0)
    assert not await store.renew_peer(B, until=70.0, now=40.0)


async def test_dead_peers_leave_no_subscriptions(store: Store) -> None:
    for url, until in [(A, 30.0), (B, 31.0)]:
        await store.renew_peer(url, until, now=0.0)
        await store.subscribe(Kind.EXACT, b"t", url, RECOVERY)
        await store.subscribe(Kind.GLOB, b"*", url, RECOVERY)
    await store.subscribe(Kind.EXACT, b"t", "http://client/receive", None)
    await store.record_missed([(s, b"t") for s in await store.match(b"t")], due=1.0)
    assert await store.drop_dead_peers(29.9) == []
    assert await store.drop_dead_peers(30.0) == [A]
    assert await store.drop_dead_peers(30.0) == []
    assert urls(await store.match(b"t")) == [B, B, "http://client/receive"]
    assert (await store.counts())["missed"] == 2


async def test_a_peer_that_was_only_asleep_is_found_again(store: Store) -> None:
    await store.renew_peer(A, until=30.0, now=0.0)
    await store.drop_dead_peers(30.0)
    await store.subscribe(Kind.EXACT, b"t", A, None)
    assert await store.drop_dead_peers(31.0) == [A]
    await store.drop_dead_peers(30.0 + 86_400)
    await store.subscribe(Kind.EXACT, b"t", A, None)
    assert await store.drop_dead_peers(31.0 + 86_400) == []


async def test_a_peer_that_stops_takes_its_subscriptions_along(store: Store) -> None:
    for url in (A, B):
        await store.renew_peer(url, until=30.0, now=0.0)
        await store.subscribe(Kind.EXACT, b"t", url, None)
    await store.remove_peer(A)
    await store.remove_peer(A)
    assert urls(await store.match(b"t")) == [B]
    assert not await store.renew_peer(A, until=40.0, now=1.0)
    assert await store.renew_peer(B, until=40.0, now=1.0)


# Quotas


ORIGINS = [
    ("http://h/x", "http://h"),
    ("http://H:80/y", "http://h"),
    ("http://h?q", "http://h"),
    ("http://h:443#f", "http://h:443"),
    ("https://h", "https://h"),
    ("https://h:443/x:80", "https://h"),
    ("https://h:80", "https://h:80"),
    ("http://[::1]:3002/a#b", "http://[::1]:3002"),
    ("http://10.0.0.1:8080/a?b", "http://10.0.0.1:8080"),
]


@pytest.mark.parametrize("kind", Kind)
async def test_what_is_counted(store: Store, kind: Kind) -> None:
    for number, (url, _) in enumerate(ORIGINS, 1):
        for n in range(number):
            assert await store.subscribe(kind, b"%d" % n, url, None)
            assert not await store.subscribe(kind, b"%d" % n, url, None)
    by_origin: Counter[str] = Counter()
    for number, (_, origin) in enumerate(ORIGINS, 1):
        by_origin[origin] += number
    expected = {url: number for number, (url, _) in enumerate(ORIGINS, 1)}
    assert await counters(store) == (expected, by_origin)
    await store.drop([s for url in expected for s in await store.subscriptions(url)])
    assert await counters(store) == ({}, {})


async def full(store: Store, url: str = A) -> None:
    await store.set_subscriptions(url, [(b"1", None), (b"2", None), (b"3", None)], [("4", None)])
    await store.subscribe(Kind.GLOB, b"5", url, None)


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.subscribe(Kind.EXACT, b"6", A, None),
        lambda store: store.subscribe(Kind.GLOB, b"6", A, None),
        lambda store: store.set_subscriptions(A, [(b"%d" % n, None) for n in range(6)], []),
        lambda store: store.set_subscriptions(A, [], [(f"{n}", None) for n in range(6)]),
    ],
    ids=["exact", "glob", "set exact", "set globs"],
)
async def test_one_too_many_changes_nothing(
    factory: Factory, tmp_path: Path, call: Callable[[Store], Coroutine[Any, Any, Any]]
) -> None:
    async with limited(factory, tmp_path) as (store,):
        await full(store)
        before = await store.subscriptions(A)
        with pytest.raises(
            OverQuota, match=r"more than 5 subscriptions \(max_subscriptions_per_url"
        ):
            await call(store)
        assert await store.subscriptions(A) == before
        assert await store.match(b"6") == []
        assert await counters(store) == ({A: 5}, {"http://a": 5})
        # what adds nothing is welcome, and so is what comes after something went
        assert not await store.subscribe(Kind.EXACT, b"1", A, None)
        await store.set_subscriptions(A, [(b"1", RECOVERY), (b"2", None), (b"9", None)], [])
        assert await store.subscribe(Kind.GLOB, b"7", A, None)
        assert await store.unsubscribe(Kind.EXACT, b"1", A)
        assert await store.subscribe(Kind.EXACT, b"8", A, None)
        assert await counters(store) == ({A: 4}, {"http://a": 4})


async def test_an_origin_has_a_quota_of_its_own(factory: Factory, tmp_path: Path) -> None:
    async with limited(factory, tmp_path) as (store,):
        await full(store, "http://h/1")
        for n in range(3):
            assert await store.subscribe(Kind.EXACT, b"%d" % n, "http://H:80/2", None)
        for url in ("http://h/2", "http://h/3", "http://h#1"):
            with pytest.raises(OverQuota, match=r"than 8 .*max_subscriptions_per_origin"):
                await store.subscribe(Kind.EXACT, b"x", url, None)
        assert await store.subscribe(Kind.EXACT, b"x", "http://h:81/1", None)
        assert await store.subscribe(Kind.EXACT, b"x", "https://h/1", None)


async def test_a_broadcaster_has_no_quota(factory: Factory, tmp_path: Path) -> None:
    async with limited(factory, tmp_path) as (store,):
        await full(store, B)
        await store.renew_peer(A, until=30.0, now=0.0)
        await full(store)
        for n in range(20):
            assert await store.subscribe(Kind(n % 2), b"more/%d" % n, A, None)
        await store.set_subscriptions(A, [(b"%d" % n, None) for n in range(30)], [])
        assert await counters(store) == ({B: 5}, {"http://b": 5})
        await store.remove_peer(A)
        await full(store)
        assert await counters(store) == ({A: 5, B: 5}, {"http://a": 5, "http://b": 5})
        await store.renew_peer(A, until=30.0, now=0.0)
        assert await counters(store) == ({B: 5}, {"http://b": 5})
        assert await store.drop_dead_peers(31.0) == [A]
        assert await counters(store) == ({B: 5}, {"http://b": 5})


async def test_quotas_hold_when_many_ask_at_once(factory: Factory, tmp_path: Path) -> None:
    number = 3 if factory.shared else 1
    async with limited(factory, tmp_path, number) as stores:
        outcomes = await asyncio.gather(
            *(
                stores[n % number].subscribe(Kind(n // 3 % 2), b"%d" % n, f"http://h/{n % 2}", None)
                for n in range(30)
            ),
            return_exceptions=True,
        )
        assert outcomes.count(True) == 8
        assert all(o is True or isinstance(o, OverQuota) for o in outcomes)
        by_url, by_origin = await counters(stores[0])
        assert by_origin == {"http://h": 8}
        assert sum(by_url.values()) == 8
        assert max(by_url.values()) <= 5


# Subscribers that give no sign of life


TTL = 100.0


async def begun(store: Store) -> float:
    """When those who subscribe now, and all who have, are looked after for the first time."""
    for url in (A, B):
        assert await store.subscribe(Kind.EXACT, b"t", url, RECOVERY)
        assert await store.subscribe(Kind.GLOB, b"t*", url, None)
    now = time.time() + 10_000
    assert await store.prune(now, TTL, now + 30) == {}
    return now


async def look(store: Store, now: float, until: float) -> dict[str, int]:
    """What is pruned while somebody looks every 20 seconds."""
    pruned: dict[str, int] = {}
    while now < until:
        now = min(now + 20, until)
        pruned |= await store.prune(now, TTL, now + 30)
    return pruned


async def test_who_gives_no_sign_of_life_is_pruned(store: Store) -> None:
    now = await begun(store)
    await store.renew_leases([A, "http://nobody/"], now + 50)
    await store.renew_leases([A], now + 1)  # somebody with a slow clock
    assert await look(store, now, now + 99) == {}
    assert await look(store, now + 99, now + 101) == {B: 2}
    assert urls(await store.match(b"t")) == [A, A]
    assert await look(store, now + 101, now + 149) == {}
    assert await look(store, now + 149, now + 151) == {A: 2}
    assert await store.match(b"t") == []
    assert await counters(store) == ({}, {})


async def test_all_begin_anew_when_nobody_has_looked(store: Store) -> None:
    now = await begun(store)
    assert await look(store, now, now + 80) == {}
    later = now + 5_000  # all broadcasters were stopped
    assert await look(store, later, later + 99) == {}
    assert await look(store, later + 99, later + 121) == {A: 2, B: 2}


async def test_a_new_subscriber_has_the_whole_time(store: Store) -> None:
    now = time.time()
    await store.prune(now - 1_000, TTL, now + 1_000)
    assert await store.subscribe(Kind.EXACT, b"t", A, None)
    assert await store.prune(now + 90, TTL, now + 1_000) == {}
    assert await store.prune(now + 1_000, TTL, now + 2_000) == {A: 1}


async def test_nobody_is_pruned_while_a_notice_is_to_come(store: Store) -> None:
    now = await begun(store)
    missed = next(s for s in await store.subscriptions(A) if s.recovery)
    await store.record_missed([(missed, b"t")], now + 1)
    assert await look(store, now, now + 500) == {B: 2}
    (notice,) = await store.claim_missed(now + 500, 9, 60.0)
    assert notice.url == A
    assert await look(store, now + 500, now + 520) == {}
    await store.retry_missed(notice, now + 900)
    assert await look(store, now + 520, now + 899) == {}
    (notice,) = await store.claim_missed(now + 900, 9, 60.0)
    await store.finish_missed(notice, now + 900)
    assert await look(store, now + 899, now + 901) == {A: 2}


async def test_broadcasters_are_not_pruned(store: Store) -> None:
    now = await begun(store)
    await store.renew_peer(A, until=now + 9_000, now=now)
    assert await look(store, now, now + 500) == {B: 2}
    assert urls(await store.match(b"t")) == [A, A]


async def test_only_one_prunes(store: Store, other: Store) -> None:
    now = await begun(store)
    await look(store, now, now + 90)
    pruned = await asyncio.gather(
        *(s.prune(now + 110, TTL, now + 140) for _ in range(5) for s in (store, other))
    )
    assert sorted(filter(None, pruned), key=len) in (
        [{A: 2, B: 2}],
        [{A: 2}, {B: 2}],
        [{B: 2}, {A: 2}],
    )


async def test_many_are_pruned_in_turns(store: Store) -> None:
    for n in range(PRUNED_AT_ONCE + 3):
        await store.subscribe(Kind(n % 2), b"t", f"http://{n}/", None)
    now = time.time() + 10_000
    await store.prune(now, TTL, now + 1_000)
    assert len(await store.prune(now + 101, TTL, now + 1_000)) == PRUNED_AT_ONCE
    assert len(await store.prune(now + 101, TTL, now + 1_000)) == 3
    assert await store.prune(now + 101, TTL, now + 1_000) == {}


# All of it at random, against a dict


@dataclass
class Row:
    id: int
    recovery: str | None


@dataclass
class Missed:
    due: float
    id: int = 0  # unknown before it is claimed
    lease: float = 0.0
    attempts: int = 0
    generation: int = 1

    def is_announced_by(self, due: float) -> bool:
        return self.due <= due and not self.lease and (self.generation > 1 or self.attempts > 0)


PATTERNS = st.sampled_from([b"a", b"a/b", b"a/*", b"**", b"*", b"", b"\0", "ü".encode()])
TOPICS = st.sampled_from([b"a", b"a/b", b"a/\xff", b"\xff", b"", b"\0", "ü".encode(), b"a/*"])
URLS = st.sampled_from([A, B])
RECOVERIES = st.sampled_from([None, RECOVERY, "http://b/recover"])


class StoreMachine(RuleBasedStateMachine):
    factory: Factory
    notices: Bundle[MissedNotice] = Bundle("notices")

    @initialize()
    def start(self) -> None:
        self.directory = TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.rows: dict[tuple[Kind, bytes, str], Row] = {}
        self.missed: dict[tuple[int, bytes], Missed] = {}
        self.ids_seen: set[int] = set()
        self.notice_ids_seen: set[int] = set()
        self.alive: dict[str, float] = {}
        self.now = 1000.0
        self.store = self.factory.make(Path(self.directory.name))
        self.run(self.store.open())

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(call, 10))

    def teardown(self) -> None:
        if hasattr(self, "store"):
            # once, for an error in the counters stays there
            counted = Counter(url for _, _, url in self.rows if url not in self.alive)
            assert self.run(counters(self.store)) == (
                counted,
                {url.removesuffix("/receive"): number for url, number in counted.items()},
            )
            self.run(self.store.close())
            self.runner.close()
            self.directory.cleanup()

    def learn_ids(self) -> None:
        """Take over the ids of new rows; everything else must be as the model says."""
        for url in (A, B):
            found = self.run(self.store.subscriptions(url))
            assert [(s.kind, s.pattern) for s in found] == sorted(
                key[:2] for key in self.rows if key[2] == url
            )
            for s in found:
                row = self.rows[s.kind, s.pattern, url]
                if row.id == 0:
                    assert s.id not in self.ids_seen, "an id was used again"
                    self.ids_seen.add(s.id)
                    row.id = s.id
                assert (row.id, row.recovery) == (s.id, s.recovery)

    def remove(self, key: tuple[Kind, bytes, str]) -> None:
        self.forget_missed(self.rows.pop(key).id)

    def forget_missed(self, id: int) -> None:
        self.missed = {key: m for key, m in self.missed.items() if key[0] != id}

    @rule(kind=st.sampled_from(Kind), pattern=PATTERNS, url=URLS, recovery=RECOVERIES)
    def subscribe(self, kind: Kind, pattern: bytes, url: str, recovery: str | None) -> None:
        is_new = (kind, pattern, url) not in self.rows
        assert self.run(self.store.subscribe(kind, pattern, url, recovery)) == is_new
        if is_new:
            self.rows[kind, pattern, url] = Row(0, recovery)
        self.learn_ids()

    @rule(kind=st.sampled_from(Kind), pattern=PATTERNS, url=URLS)
    def unsubscribe(self, kind: Kind, pattern: bytes, url: str) -> None:
        exists = (kind, pattern, url) in self.rows
        assert self.run(self.store.unsubscribe(kind, pattern, url)) == exists
        if exists:
            self.remove((kind, pattern, url))
        self.learn_ids()

    @rule(
        url=URLS,
        exact=st.dictionaries(PATTERNS, RECOVERIES),
        globs=st.dictionaries(PATTERNS.map(bytes.decode), RECOVERIES),
    )
    def set(self, url: str, exact: dict[bytes, str | None], globs: dict[str, str | None]) -> None:
        self.run(self.store.set_subscriptions(url, exact.items(), globs.items()))
        wanted = {(Kind.EXACT, topic, url): r for topic, r in exact.items()}
        wanted |= {(Kind.GLOB, glob.encode(), url): r for glob, r in globs.items()}
        for key in [key for key in self.rows if key[2] == url and key not in wanted]:
            self.remove(key)
        for key, recovery in wanted.items():
            row = self.rows.setdefault(key, Row(0, recovery))
            row.recovery = recovery
            if recovery is None:
                self.forget_missed(row.id)
        self.learn_ids()

    def model_match(self, topic: bytes) -> list[Subscription]:
        return sorted(
            (
                Subscription(row.id, kind, pattern, url, row.recovery)
                for (kind, pattern, url), row in self.rows.items()
                if (
                    pattern == topic
                    if kind == Kind.EXACT
                    else glob_matches(pattern.decode(), topic)
                )
            ),
            key=lambda s: s.id,
        )

    @rule(topic=TOPICS)
    def match(self, topic: bytes) -> None:
        found = self.run(self.store.match(topic))
        assert sorted(found, key=lambda s: s.id) == self.model_match(topic)

    @rule(topic=TOPICS, data=st.data())
    def drop(self, topic: bytes, data: st.DataObject) -> None:
        if matching := self.model_match(topic):
            subscription = data.draw(st.sampled_from(matching))
            self.run(self.store.drop([subscription]))
            self.remove((subscription.kind, subscription.pattern, subscription.url))
        self.learn_ids()

    @rule(topic=TOPICS, delay=st.integers(-5, 30))
    def record(self, topic: bytes, delay: int) -> None:
        due = self.now + delay
        matching = self.model_match(topic)
        self.run(self.store.record_missed([(s, topic) for s in matching], due))
        for s in matching:
            if s.recovery is None:
                continue
            if known := self.missed.get((s.id, topic)):
                if known.is_announced_by(due):
                    continue
                known.generation += 1
                known.due = min(known.due, due)
            else:
                self.missed[s.id, topic] = Missed(due)

    @rule(topic=TOPICS)
    def clear(self, topic: bytes) -> None:
        matching = self.model_match(topic)
        self.run(self.store.clear_missed([(s, topic) for s in matching]))
        for s in matching:
            m = self.missed.get((s.id, topic))
            if m and (m.generation, m.attempts, m.lease) == (1, 0, 0.0):
                del self.missed[s.id, topic]

    @rule(seconds=st.integers(0, 40))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(target=notices, limit=st.integers(1, 3))
    def claim(self, limit: int) -> Any:
        claimable = [m for m in self.missed.values() if max(m.due, m.lease) <= self.now]
        claimed = self.run(self.store.claim_missed(self.now, limit, 20.0))
        assert len(claimed) == min(limit, len(claimable))
        recoveries = {row.id: row.recovery for row in self.rows.values()}
        for n in claimed:
            m = self.missed[n.subscription_id, n.topic]
            assert max(m.due, m.lease) <= self.now
            assert (n.generation, n.attempts) == (m.generation, m.attempts)
            assert n.recovery == recoveries[n.subscription_id]
        for n in claimed:
            m = self.missed[n.subscription_id, n.topic]
            assert m.id == n.id or (m.id == 0 and n.id not in self.notice_ids_seen)
            m.id = n.id
            m.lease = self.now + 20.0
            self.notice_ids_seen.add(n.id)
        return multiple(*claimed)

    def row_of(self, notice: MissedNotice) -> Missed | None:
        """The row may be gone, and another in its place."""
        m = self.missed.get((notice.subscription_id, notice.topic))
        return m if m and m.id == notice.id else None

    @rule(notice=notices)
    def finish(self, notice: MissedNotice) -> None:
        self.run(self.store.finish_missed(notice, self.now))
        if m := self.row_of(notice):
            if m.generation == notice.generation and m.lease:
                del self.missed[notice.subscription_id, notice.topic]
            else:
                m.due, m.lease, m.attempts = self.now, 0.0, 0

    @rule(notice=notices, delay=st.integers(1, 30))
    def retry(self, notice: MissedNotice, delay: int) -> None:
        self.run(self.store.retry_missed(notice, self.now + delay))
        if m := self.row_of(notice):
            m.attempts = m.attempts + 1 if m.generation == notice.generation else 0
            m.due, m.lease = self.now + delay, 0.0

    @rule(notice=notices, delay=st.integers(1, 30))
    def postpone(self, notice: MissedNotice, delay: int) -> None:
        self.run(self.store.postpone_missed([(notice, self.now + delay)]))
        if m := self.row_of(notice):
            m.due, m.lease = self.now + delay, 0.0

    @rule(url=URLS, lease=st.integers(1, 60))
    def renew_peer(self, url: str, lease: int) -> None:
        was_alive = self.alive.get(url, 0.0) > self.now
        until = self.now + lease
        assert self.run(self.store.renew_peer(url, until, self.now)) == was_alive
        self.alive[url] = until

    @rule(url=URLS)
    def remove_peer(self, url: str) -> None:
        self.run(self.store.remove_peer(url))
        self.alive.pop(url, None)
        self.drop_all({url})

    @rule()
    def drop_dead_peers(self) -> None:
        dead = {url for url, until in self.alive.items() if until <= self.now}
        assert self.run(self.store.drop_dead_peers(self.now)) == self.drop_all(dead)

    def drop_all(self, urls: Collection[str]) -> list[str]:
        gone = [key for key in self.rows if key[2] in urls]
        for key in gone:
            self.remove(key)
        self.learn_ids()
        return sorted({key[2] for key in gone})

    @rule(url=URLS)
    def renew_lease(self, url: str) -> None:
        self.run(self.store.renew_leases([url], self.now))

    @precondition(lambda self: self.factory.shared)
    @rule()
    def reopen(self) -> None:
        self.run(self.store.close())
        self.store = self.factory.make(Path(self.directory.name))
        self.run(self.store.open())

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        exact = sum(kind == Kind.EXACT for kind, _, _ in self.rows)
        assert self.run(self.store.counts()) == {
            "exact": exact,
            "glob": len(self.rows) - exact,
            "missed": len(self.missed),
        }
        due = min((max(m.due, m.lease) for m in self.missed.values()), default=None)
        assert self.run(self.store.next_due()) == due


@pytest.mark.timeout(600)
@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.name)
def test_any_history_agrees_with_a_dict(factory: Factory) -> None:
    machine = type("Machine", (StoreMachine,), {"factory": factory})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
