"""What only a server can do to its stores: go away, come back, refuse, be changed by others."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from os import urandom
from typing import Any

import pytest

import postgres
from lonelypsp.replay import Code
from lonelypss.store import Kind, Store, StoreCorrupt, StoreUnavailable
from lonelypss.store import postgres as module
from lonelypss.store.base import UsedBefore
from lonelypss.store.postgres import PostgresStore
from postgres import Postgres
from programs import free_port

A = "http://a/receive"
DEADLINE = 30.0


@pytest.fixture
def url() -> str:
    return postgres.shared().database()


@pytest.fixture
def server() -> Iterator[Postgres]:
    """One of its own, to be stopped."""
    with postgres.server() as server:
        yield server


@asynccontextmanager
async def opened(url: str, number: int = 1) -> AsyncIterator[list[PostgresStore]]:
    stores = [PostgresStore(url) for _ in range(number)]
    try:
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*(store.open() for store in stores))
        yield stores
    finally:
        for store in stores:
            await store.close()


async def available(store: Store) -> list[str]:
    """What is subscribed to "t", as soon as the database answers again."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                return [s.url for s in await store.match(b"t")]
            except StoreUnavailable:
                await asyncio.sleep(0.02)


# Opening


async def test_many_start_at_once_on_an_empty_database(url: str) -> None:
    async with opened(url, 8) as stores:
        assert await stores[0].subscribe(Kind.GLOB, b"t*", A, None)
        for store in stores:
            assert [s.url for s in await store.match(b"topic")] == [A]


async def test_a_newer_schema_is_refused(url: str) -> None:
    async with opened(url):
        pass
    database = url.rpartition("/")[2]
    postgres.shared().sql("UPDATE lonelyps_meta SET value = 99 WHERE key = 'schema'", database)
    with pytest.raises(
        StoreCorrupt, match=r"schema version 99, this lonelypss knows \d+: run a newer"
    ):
        await PostgresStore(url).open()


async def test_an_older_schema_is_brought_up_to_date(url: str) -> None:
    database = url.rpartition("/")[2]
    sql = partial(postgres.shared().sql, database=database)
    sql(module._MIGRATIONS[0])
    sql(
        "UPDATE lonelyps_meta SET value = 1 WHERE key = 'schema';"
        "INSERT INTO lonelyps_subscriptions (kind, pattern, url) VALUES"
        " (1, 't*', 'http://A:80/x'), (0, 'u', 'http://a/x'), (0, 't', 'http://peer/')"
    )
    sql("INSERT INTO lonelyps_peers VALUES ('http://peer/', 1)")
    async with opened(url) as (store,):
        assert len(await store.match(b"t")) == 2
        assert sql("SELECT * FROM lonelyps_origins") == "http://a|2\n"
        assert await store.unsubscribe(Kind.EXACT, b"u", "http://a/x")
        assert sql("SELECT origin, subscriptions FROM lonelyps_subscribers") == "http://a|1\n"


SET_FOREVER = """
import asyncio, sys
from lonelypss.store.postgres import PostgresStore

async def main():
    store = PostgresStore(sys.argv[1])
    await store.open()
    for turn in range(10**9):
        await store.set_subscriptions(
            "http://a/receive",
            [(b"%d/%d" % (turn % 2, n), None) for n in range(700)],
            [(f"{turn % 2}/{n}/*", None) for n in range(50)],
        )
        print(turn, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("sets", [1, 2, 3])
async def test_a_kill_during_a_set_leaves_the_old_or_the_new_list(url: str, sets: int) -> None:
    """C24."""
    command = [sys.executable, "-c", SET_FOREVER, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(sets):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    lists = [
        {b"%d/%d" % (turn, n) for n in range(700)} | {b"%d/%d/*" % (turn, n) for n in range(50)}
        for turn in range(2)
    ]
    async with opened(url) as (store,):
        await store.set_subscriptions("http://b/", [], [])  # not stuck
        assert {s.pattern for s in await store.subscriptions(A)} in lists


async def test_many_subscriptions_are_looked_up_by_index(url: str) -> None:
    sql = partial(postgres.shared().sql, database=url.rpartition("/")[2])
    async with opened(url) as (store,):
        sql(
            "INSERT INTO lonelyps_subscriptions (kind, pattern, url)"
            " SELECT 0, ('t' || n)::bytea, 'http://a/' FROM generate_series(1, 20000) AS n;"
        )
        sql("ANALYZE")
        assert len(await store.match(b"t77")) == 1
    plan = sql(
        f"SET plan_cache_mode = force_generic_plan; PREPARE m (bytea[]) AS {module._SQL['match']}"
        " EXPLAIN (COSTS OFF) EXECUTE m (ARRAY['t77'::bytea])"
    )
    assert "Index Scan using lonelyps_subscriptions_key" in plan
    assert "Seq Scan on lonelyps_subscriptions" not in plan


async def test_what_others_have_in_the_database_is_left_alone(url: str) -> None:
    database = url.rpartition("/")[2]
    postgres.shared().sql("CREATE TABLE subscriptions (mine text)", database)
    async with opened(url):
        pass
    assert postgres.shared().sql("SELECT count(*) FROM subscriptions", database) == "0\n"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda url: url.rpartition("/")[0] + "/nowhere", "does not exist: create it"),
        (lambda url: url.replace("postgres@", "nobody:s3cret@"), "does not let this user in"),
        (
            lambda url: f"postgresql://u:s3cret@127.0.0.1:{free_port()}/d",
            "cannot be reached: is the server up",
        ),
        (lambda url: url.replace("127.0.0.1", "host.invalid"), "cannot be reached"),
    ],
    ids=["database", "user", "port", "host"],
)
async def test_an_impossible_url_says_what_to_change(url: str, change, complaint: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(StoreUnavailable, match=complaint) as caught:
        await PostgresStore(change(url)).open()
    assert "s3cret" not in str(caught.value)


async def test_a_user_without_rights_is_told_which(url: str) -> None:
    database = url.rpartition("/")[2]
    postgres.shared().sql(
        "DO $$ BEGIN CREATE ROLE weak LOGIN; EXCEPTION WHEN duplicate_object THEN END $$", database
    )
    with pytest.raises(StoreUnavailable, match="GRANT it CREATE on the schema"):
        await PostgresStore(url.replace("postgres@", "weak@")).open()


async def test_without_prepared_statements(url: str) -> None:
    async with opened(f"{url}?statement_cache_size=0") as (store,):
        assert await store.subscribe(Kind.EXACT, b"t", A, None)
        assert await available(store) == [A]


# Others on the same database


async def test_what_was_answered_counts_everywhere(url: str) -> None:
    """Many subscribe and unsubscribe globs at several stores; whoever has the answer looks at
    another store."""
    async with opened(url, 3) as stores:

        async def member(number: int) -> None:
            pattern, topic = b"%d/*" % number, b"%d/x" % number
            for turn in range(15):
                here, there = stores[(number + turn) % 3], stores[(number + turn + 1) % 3]
                assert await here.subscribe(Kind.GLOB, pattern, A, None)
                assert [s.pattern for s in await there.match(topic)] == [pattern]
                assert await there.unsubscribe(Kind.GLOB, pattern, A)
                assert await here.match(topic) == []

        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*(member(number) for number in range(12)))


async def test_concurrent_sets_of_one_url_leave_one_of_their_lists(url: str) -> None:
    async with opened(url, 2) as stores:
        lists = [
            (
                [(b"%d/%d" % (n, i), None) for i in range(50)],
                [(f"{n}/{i}/*", None) for i in range(50)],
            )
            for n in range(6)
        ]
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(
                *(stores[n % 2].set_subscriptions(A, *wanted) for n, wanted in enumerate(lists))
            )
        found = await stores[0].subscriptions(A)
        patterns = {s.pattern for s in found}
        assert patterns in [{t for t, _ in e} | {g.encode() for g, _ in gs} for e, gs in lists]


async def test_changes_of_globs_and_rows_do_not_wait_for_each_other_for_ever(url: str) -> None:
    async with opened(url, 3) as stores:

        async def member(number: int) -> None:
            store = stores[number % 3]
            for turn in range(8):
                exact = [(b"t%d" % i, None) for i in range(turn % 3, 6)]
                globs = [(f"g{i}*", None) for i in range(turn % 4, 6)]
                await store.set_subscriptions(f"http://{number % 4}/", exact, globs)
                await store.drop(await store.subscriptions(f"http://{(number + 1) % 4}/"))

        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*(member(number) for number in range(9)))


async def test_everybody_claims_something_else(url: str) -> None:
    async with opened(url, 3) as stores:
        for n in range(60):
            assert await stores[0].subscribe(Kind.EXACT, b"t", f"http://{n}/", f"http://{n}/r")
        missed = [(s, b"t") for s in await stores[0].match(b"t")]
        await stores[0].record_missed(missed, 100.0)
        claimed = await asyncio.gather(
            *(store.claim_missed(200.0, 7, 60.0) for store in stores for _ in range(4))
        )
        ids = [notice.id for notices in claimed for notice in notices]
        assert len(ids) == len(set(ids)) == 60


async def test_an_edit_by_hand_reaches_the_globs(url: str) -> None:
    async with opened(url) as (store,):
        assert await store.subscribe(Kind.GLOB, b"a*", A, None)
        assert len(await store.match(b"abc")) == 1
        postgres.shared().sql("DELETE FROM lonelyps_subscriptions", url.rpartition("/")[2])
        assert await store.match(b"abc") == []


async def test_a_forgotten_transaction_of_another_program_is_not_waited_for(url: str) -> None:
    """It holds the row that every change of globs needs."""
    async with opened(url) as (store,):
        holder = asyncio.create_task(
            asyncio.to_thread(
                postgres.shared().sql,
                "BEGIN; SELECT * FROM lonelyps_meta FOR UPDATE; SELECT pg_sleep(3); COMMIT",
                url.rpartition("/")[2],
            )
        )
        async with asyncio.timeout(DEADLINE):
            while True:
                started = time.monotonic()
                try:
                    await store.unsubscribe(Kind.GLOB, b"x", A)
                    await store.subscribe(Kind.GLOB, b"x", A, None)
                except StoreUnavailable as e:
                    refusal = str(e)
                    break
        assert "in time" in refusal
        assert time.monotonic() - started < 2.5
        assert [s.pattern for s in await store.match(b"x")] in ([], [b"x"])
        await holder
        assert await store.unsubscribe(Kind.GLOB, b"x", A) in (True, False)


# The server goes away


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGQUIT, signal.SIGKILL])
async def test_a_restart_under_load(server: Postgres, signum: signal.Signals) -> None:
    """Every call ends soon, with an answer or 503; what was answered is there afterwards."""
    url = server.database()
    async with opened(url, 2) as stores:
        assert await stores[0].subscribe(Kind.EXACT, b"t", A, None)
        kept: set[bytes] = set()
        refused = 0
        slowest = 0.0
        stopping = False

        async def member(number: int) -> None:
            nonlocal refused, slowest
            store, turn = stores[number % 2], 0
            while not stopping:
                turn += 1
                pattern = b"%d/%d/*" % (number, turn)
                started = time.monotonic()
                try:
                    if await store.subscribe(Kind.GLOB, pattern, A, None):
                        kept.add(pattern)
                    found = [s.pattern for s in await store.match(pattern.replace(b"*", b"x"))]
                    assert found == [pattern]
                except StoreUnavailable:
                    refused += 1
                    await asyncio.sleep(0.01)
                slowest = max(slowest, time.monotonic() - started)

        members = [asyncio.create_task(member(number)) for number in range(6)]
        try:
            async with asyncio.timeout(DEADLINE):
                while len(kept) < 100:
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(server.stop, signum)
                before = refused
                while refused < before + 20:
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(server.start)
                assert await available(stores[0]) == [A]
                grown = len(kept) + 100
                while len(kept) < grown:
                    await asyncio.sleep(0.01)
        finally:
            stopping = True
            await asyncio.gather(*members)
        assert slowest < 5.0
        found = {s.pattern for s in await stores[1].subscriptions(A)}
        assert kept <= found


async def test_one_connection_is_lost(url: str) -> None:
    async with opened(url) as (store,):
        assert await store.subscribe(Kind.EXACT, b"t", A, None)
        postgres.shared().sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            f" WHERE application_name = 'lonelypss' AND datname = '{url.rpartition('/')[2]}'"
        )
        assert [s.url for s in await store.match(b"t")] == [A]


async def test_no_more_connections(server: Postgres) -> None:
    url = server.database()
    async with opened(url) as (store,):
        assert await store.subscribe(Kind.EXACT, b"t", A, None)
        server.sql(f"ALTER DATABASE {url.rpartition('/')[2]} CONNECTION LIMIT 0")
        server.sql("CREATE ROLE limited LOGIN")
        other = PostgresStore(url.replace("postgres@", "limited@"))
        with pytest.raises(StoreUnavailable, match="takes no more connections"):
            await other.open()


async def test_closed(url: str) -> None:
    async with opened(url) as (store,):
        await store.close()
        await store.close()
        with pytest.raises(StoreUnavailable, match="closed"):
            await store.match(b"t")


async def test_nobody_is_forgotten_who_asks_when_the_last_answer_is_given(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncio.timeout(DEADLINE), opened(url) as (store,):
        gate, begun = asyncio.Event(), asyncio.Semaphore(0)

        async def match(topics: list[bytes], codes: Any) -> tuple[list[list[Any]], dict[Any, Any]]:
            begun.release()
            await gate.wait()
            return [[] for _ in topics], {}

        async def late() -> None:
            await gate.wait()  # in the same turn of the loop as those who answer
            await store.match(b"late")

        monkeypatch.setattr(store, "_match", match)
        asked = []
        for topic in (b"1", b"2"):  # one after the other, so that each is a question of its own
            asked.append(asyncio.create_task(store.match(topic)))
            await begun.acquire()
        asked.append(asyncio.create_task(late()))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*asked)


# Signatures that were accepted


def codes(number: int, stamp: float | None = None) -> list[Code]:
    stamp = int(time.time() if stamp is None else stamp)
    return [Code(stamp, urandom(16)) for _ in range(number)]


async def verdict(store: Store, code: Code, topic: bytes | None = None) -> str:
    try:
        if topic is None:
            await store.remember([code])
        else:
            await store.match(topic, codes=[code])
    except UsedBefore:
        return "used"
    except StoreUnavailable:
        return "unavailable"
    return "new"


@pytest.mark.parametrize("topic", [None, b"t"], ids=["remember", "match"])
async def test_a_signature_is_new_once_wherever_it_comes(url: str, topic: bytes | None) -> None:
    async with opened(url, 2) as stores:
        given = codes(700)  # more than one question holds
        for turn in ("new", "used"):
            answers = await asyncio.gather(
                *(verdict(stores[n % 2], code, topic) for n, code in enumerate(given))
            )
            assert set(answers) == {turn}
            stores.reverse()
        assert await verdict(stores[0], Code(given[0].stamp + 1, given[0].code), topic) == "new"


async def test_of_those_who_come_at_once_one_is_the_first(url: str) -> None:
    async with opened(url, 3) as stores:
        given = codes(40)
        answers = await asyncio.gather(
            *(verdict(store, code, b"t") for code in given for store in stores * 2)
        )
        assert answers.count("new") == 40
        assert answers.count("used") == 200


async def test_whoever_matches_without_a_signature_is_not_refused_with_others(url: str) -> None:
    async with opened(url) as (store,):
        assert await store.subscribe(Kind.EXACT, b"t", A, None)
        (code,) = codes(1)
        assert await verdict(store, code, b"t") == "new"
        found, again = await asyncio.gather(store.match(b"t"), verdict(store, code, b"t"))
        assert ([s.url for s in found], again) == ([A], "used")


async def test_a_message_and_its_signature_take_one_round_trip(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(url) as (store,):
        await store.remember(codes(1, time.time() + 60))  # begins the memory
        calls: list[Any] = []
        call = store._call

        async def counted(*arguments: Any) -> Any:
            calls.append(arguments)
            return await call(*arguments)

        monkeypatch.setattr(store, "_call", counted)
        for number in range(1, 20):
            (code,) = codes(1)
            assert await verdict(store, code, b"t") == "new"
            assert len(calls) == number


async def test_extending_the_memory_is_not_waited_for(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(url) as (store,):
        now = int(time.time())
        await store.remember(codes(1, now))
        asked = []
        match_once = store._match_once

        async def counted(*arguments: Any) -> Any:
            asked.append(arguments)
            return await match_once(*arguments)

        monkeypatch.setattr(store, "_match_once", counted)
        for second in range(1, 13):
            await store.remember(codes(1, now + second))
            assert len(asked) == second
            if store._extending is not None:
                await store._extending


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
async def test_signatures_outlive_the_server(server: Postgres, signum: signal.Signals) -> None:
    """Also those of signers whose clocks are ahead: none is new twice."""
    url, now = server.database(), time.time()
    async with opened(url, 2) as stores:
        given = [code for skew in (-119, -60, -1, 0, 1, 60, 119) for code in codes(3, now + skew)]
        for code in given:
            assert await verdict(stores[0], code, b"t") == "new"
        await asyncio.to_thread(server.stop, signum)
        (unlucky,) = codes(1)
        assert await verdict(stores[0], unlucky, b"t") == "unavailable"
        await asyncio.to_thread(server.start)
        await available(stores[0])
        await available(stores[1])
        answers = {await verdict(store, code, b"t") for store in stores for code in given}
        assert answers == ({"used"} if signum == signal.SIGINT else {"unavailable"})
        # what nobody can have signed before
        (later,) = codes(1, now + 150)
        assert [await verdict(store, later) for store in stores] == ["new", "used"]


async def test_after_a_crash_the_memory_is_back_in_seconds(server: Postgres) -> None:
    url = server.database()
    async with opened(url) as (store,):
        assert await verdict(store, *codes(1)) == "new"
        await asyncio.to_thread(server.stop, signal.SIGKILL)
        await asyncio.to_thread(server.start)
        await available(store)
        started = time.monotonic()
        async with asyncio.timeout(DEADLINE):
            while (answer := await verdict(store, *codes(1))) != "new":
                assert answer == "unavailable"
                await asyncio.sleep(0.05)
        assert time.monotonic() - started < 10


async def test_old_signatures_are_forgotten_and_not_accepted(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = url.rpartition("/")[2]

    def kept() -> int:
        return int(
            postgres.shared().sql("SELECT count(*) FROM lonelyps_used WHERE code <> ''", database)
        )

    monkeypatch.setattr("lonelypss.store.postgres._SHORTEN_INTERVAL", 0.05)
    monkeypatch.setattr("lonelypss.store.postgres._SHORTEN_ROWS", 2)
    async with opened(url) as (store,):
        now = time.time()
        old, recent = codes(7, now - 1000), codes(2, now - 200)
        for code in (*old, *recent):
            assert await verdict(store, code) in ("new", "unavailable")
        async with asyncio.timeout(DEADLINE):
            while kept() > len(recent):
                await asyncio.sleep(0.05)
        assert {await verdict(store, code) for code in old} == {"unavailable"}
        assert {await verdict(store, code) for code in recent} == {"used"}


async def test_a_lost_connection_accepts_nothing(url: str) -> None:
    """The question may have arrived all the same."""
    async with opened(url) as (store,):
        assert await verdict(store, *codes(1)) == "new"
        database = url.rpartition("/")[2]
        holder = asyncio.create_task(
            asyncio.to_thread(
                postgres.shared().sql,
                "BEGIN; LOCK TABLE lonelyps_used; SELECT pg_sleep(0.3);"
                " SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                f" WHERE application_name = 'lonelypss' AND datname = '{database}'",
                database,
            )
        )
        answers = set()
        while not holder.done():
            answers.add(await verdict(store, *codes(1), b"t"))
        assert answers == {"new", "unavailable"}
        await holder
        assert await verdict(store, *codes(1), b"t") == "new"
