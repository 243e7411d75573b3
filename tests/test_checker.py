"""The test of the test: what the checker must find, and what it must not call an error.

Broken broadcasters run in this process, each with one bug that such a system might well have.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from broadcaster.harness import FAST_NOTICES, Peer, Running, broadcaster, hmac_auth
from checker import Event, Expectation, Got, History, Key, Notice, Sent, Verdict, check
from lonelypsp.spool import Body
from lonelypss.fanout import Delivery, Round
from lonelypss.store import Kind, StoreUnavailable, Subscription
from workload import Workload

# Whole runs

Break = Callable[[Any, pytest.MonkeyPatch], None]
BUGS: dict[str, tuple[set[str], Break]] = {}


def bug(*invariants: str) -> Callable[[Break], Break]:
    """What breaks in the broadcaster, and which invariant with it: one of these at least."""

    def register(function: Break) -> Break:
        BUGS[function.__name__] = (set(invariants), function)
        return function

    return register


@bug("I2")
def failures_are_not_recorded(one: Any, patch: pytest.MonkeyPatch) -> None:
    async def record(*failed: Any) -> None:
        pass

    patch.setattr(one.missed, "record", record)


@bug("I2")
def failures_are_swallowed(one: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Round, "_missed", lambda round_, urls: [])


@bug("I2")
def a_url_is_forgotten(one: Any, patch: pytest.MonkeyPatch) -> None:
    by_url = one.fanout._by_url
    patch.setattr(one.fanout, "_by_url", lambda found: dict(list(by_url(found).items())[:3]))


@bug("I2")
def notices_of_other_topics_are_overwritten(one: Any, patch: pytest.MonkeyPatch) -> None:
    record = one.store.record_missed

    async def overwrite(items: Any, due: float) -> None:
        await record([(subscription, b"a0") for subscription, _ in items], due)

    patch.setattr(one.store, "record_missed", overwrite)


@bug("I2")
def more_are_counted_than_confirmed(one: Any, patch: pytest.MonkeyPatch) -> None:
    post = one.fanout.post

    async def count(*arguments: Any) -> int:
        return int(await post(*arguments)) + 1

    patch.setattr(one.fanout, "post", count)


@bug("I2")
def subscribe_is_answered_before_it_is_done(one: Any, patch: pytest.MonkeyPatch) -> None:
    subscribe = one.store.subscribe
    late = set()

    async def answer_first(*row: Any) -> bool:
        async def work() -> None:
            await asyncio.sleep(0.1)
            await subscribe(*row)

        task = asyncio.create_task(work())
        late.add(task)
        task.add_done_callback(late.discard)
        return True

    patch.setattr(one.store, "subscribe", answer_first)


@bug("I3")
def unsubscribe_does_nothing(one: Any, patch: pytest.MonkeyPatch) -> None:
    async def unsubscribe(*row: Any) -> bool:
        return True

    patch.setattr(one.store, "unsubscribe", unsubscribe)


@bug("I3")
def globs_match_too_much(one: Any, patch: pytest.MonkeyPatch) -> None:
    match = one.store.match

    async def careless(topic: bytes, *more: Any, **named: Any) -> list[Subscription]:
        return [*await match(topic, *more, **named), *await match(b"z1")]  # for "*1" and "*"

    patch.setattr(one.store, "match", careless)


@bug("I3")
def bodies_are_cut(one: Any, patch: pytest.MonkeyPatch) -> None:
    notify = one.fanout.notify

    async def cut(topic: bytes, body: Body, *more: Any) -> Any:
        return await notify(topic, Body.of(bytes(body.view()[:-1])), *more)

    patch.setattr(one.fanout, "notify", cut)


@bug("I3")
def topics_are_mixed_up(one: Any, patch: pytest.MonkeyPatch) -> None:
    notify = one.fanout.notify

    async def mix(topic: bytes, *more: Any) -> Any:
        return await notify(topic.replace(b"a", b"b"), *more)

    patch.setattr(one.fanout, "notify", mix)


@bug("I3")
def the_publisher_is_told_that_nothing_was_done(one: Any, patch: pytest.MonkeyPatch) -> None:
    notify = one.fanout.notify
    turn = itertools.count()

    async def fail_late(*message: Any) -> Any:
        reached = await notify(*message)
        if next(turn) % 5 == 4:
            raise StoreUnavailable("after all")
        return reached

    patch.setattr(one.fanout, "notify", fail_late)


@bug("I4")
def messages_are_sent_twice(one: Any, patch: pytest.MonkeyPatch) -> None:
    class Silent(Delivery):
        __slots__ = ()

        def finish(self, reply: Any) -> None:
            pass

    post = one.sender.post

    def twice(delivery: Any) -> None:
        if isinstance(delivery, Delivery):
            again = copy.copy(delivery)
            again.__class__ = Silent
            post(again)
        post(delivery)

    patch.setattr(one.sender, "post", twice)


@bug("I4")
def confirmed_notices_come_again(one: Any, patch: pytest.MonkeyPatch) -> None:
    async def not_finished(notice: Any, now: float) -> None:
        await one.store.retry_missed(notice, now)

    patch.setattr(one.store, "finish_missed", not_finished)


@bug("I1", "I2")  # if it is subscribed again in time, only what it missed meanwhile shows
def a_notice_ends_the_subscription(one: Any, patch: pytest.MonkeyPatch) -> None:
    retry = one.store.retry_missed

    async def drop_too(notice: Any, due: float) -> None:
        await retry(notice, due)
        await one.store.drop([Subscription(notice.subscription_id, Kind.EXACT, b"", "", None)])

    patch.setattr(one.store, "retry_missed", drop_too)


@bug("I1")
def a_set_forgets_the_last(one: Any, patch: pytest.MonkeyPatch) -> None:
    write = one.store.set_subscriptions

    async def forget(url: str, exact: Any, globs: Any) -> None:
        await write(url, exact, list(globs)[:-1])

    patch.setattr(one.store, "set_subscriptions", forget)


@asynccontextmanager
async def working(running: Running, seed: int = 1) -> Any:
    workload = Workload([running.port], lambda: Peer(hmac_auth()), seed, pause=0.01)
    async with workload.listening():
        yield workload


async def run(break_it: Break | None, seconds: float) -> Verdict:
    options = {**FAST_NOTICES, "outgoing_http_timeout_sock_read": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        async with broadcaster(hmac_auth, **options) as running, working(running) as workload:
            if break_it is not None:
                break_it(running.broadcaster, patch)
            async with workload.running():
                await asyncio.sleep(seconds)
            workload.mood = "good"
            await workload.finish(running.store)
    # how much is done in that time is the machine's business
    return check(workload.history, Expectation(acknowledged=10, received=10))


async def test_a_whole_broadcaster_passes() -> None:
    verdict = await run(None, 1.0)
    assert verdict.passed, verdict
    assert verdict.counts["missed ok"]


@pytest.mark.parametrize("name", BUGS)
async def test_a_broken_one_is_found_out(name: str) -> None:
    invariants, break_it = BUGS[name]
    for seconds in (0.3, 1.2, 6.0):  # longer only where the machine is slow
        verdict = await run(break_it, seconds)
        if invariants & verdict.errors.keys():
            return
    raise AssertionError(verdict)


# Histories by hand

URL = "http://a/"
EXACT, GLOB = Key(URL, "exact", "t"), Key(URL, "glob", "*")
TOLD = Notice(URL, "t", True)


def sent(id: str, count: int | None = 1, *, type: str = "ok", topic: str = "t") -> list[Any]:
    return [("p", "invoke", "notify", Sent(id, topic)), ("p", type, "notify", count)]


def asked(f: str, key: Any = EXACT, type: str = "ok") -> list[Any]:
    return [("c", "invoke", f, key), ("c", type, f, None)]


def got(id: str, answer: str = "yes", **change: Any) -> tuple[Any, ...]:
    return ("s", "ok", "receive", Got(URL, id, "t", True, answer)._replace(**change))


def missed(notice: Notice = TOLD) -> tuple[Any, ...]:
    return ("s", "ok", "missed", notice)


def fault(seen: Any = True) -> list[Any]:
    return [("k", "invoke", "kill", None), ("k", "ok", "kill", seen)]


def judged(*events: Any, rows: Any = (EXACT,), pending: Any = (), **expected: Any) -> Verdict:
    clock = itertools.count()
    history = History(lambda: next(clock) * 0.1)
    for event in events:
        for one in event if isinstance(event, list) else [event]:
            history.add(*one)
    counted = sum(e.f in ("receive", "missed") for e in history)
    end = [("rows", set(rows)), ("notices", set(pending)), ("sinks", counted)]
    for f, value in end:
        history.add("end", "ok", f, value)
    least = {"acknowledged": 0, "received": 0, **expected}
    return check(history, Expectation(**least))


LATER = [("k", "ok", "healed", None)] * 40  # four seconds
GOOD: dict[str, Any] = {
    "nothing": judged(rows=()),
    "delivered": judged(asked("subscribe"), sent("1"), got("1")),
    "delivered late": judged(asked("subscribe"), sent("1", 0), got("1", "no"), missed()),
    "announced": judged(asked("subscribe"), sent("1", 0), missed()),
    "pending": judged(asked("subscribe"), sent("1", 0), pending={(URL, "t")}),
    "not acknowledged": judged(asked("subscribe"), sent("1", None, type="info")),
    "refused": judged(asked("subscribe"), sent("1", None, type="fail")),
    "not yet subscribed": judged(sent("1", 0), asked("subscribe")),
    "no longer subscribed": judged(
        asked("subscribe"), sent("1", 0), asked("unsubscribe"), rows=()
    ),
    "nobody knows": judged(asked("subscribe", type="info"), sent("1", 0), rows=()),
    "nobody knows, it was": judged(asked("subscribe", type="info"), sent("1"), got("1")),
    "nobody knows yet": judged(
        asked("subscribe", type="info"), asked("unsubscribe"), sent("1"), got("1")
    ),
    "repeated without an answer": judged(asked("subscribe"), sent("1"), got("1", ""), got("1")),
    "a set that nobody knows": judged(
        asked("subscribe"), asked("set", (URL, {GLOB}), "info"), rows=(GLOB,)
    ),
    "told again after a fault": judged(
        asked("subscribe"), sent("1", 0), fault(), missed(), missed(), LATER[:1],
        ("k", "ok", "probed", None),
    ),
}  # fmt: skip
BAD: dict[str, tuple[str, Any]] = {
    "lost": ("I1", judged(asked("subscribe"), rows=())),
    "back again": ("I1", judged(asked("subscribe"), asked("unsubscribe"))),
    "of a set": ("I1", judged(asked("set", (URL, {EXACT, GLOB})))),
    "mix of two lists": (
        "I1",
        judged(asked("subscribe"), asked("set", (URL, {GLOB}), "info"), rows=(EXACT, GLOB)),
    ),
    "known again": (
        "I1",
        judged(
            asked("subscribe", type="info"), LATER, ("k", "ok", "probed", None), asked("subscribe"),
            rows=(),
        ),
    ),
    "neither nor": ("I2", judged(asked("subscribe"), sent("1", 0))),
    "refused, not announced": ("I2", judged(asked("subscribe"), sent("1", 0), got("1", "no"))),
    "announced before": (
        "I2",
        judged(asked("subscribe"), sent("1", 0), missed(), sent("2", 0)),
    ),
    "not confirmed": (
        "I2",
        judged(
            asked("subscribe"), sent("1", 0), missed(TOLD._replace(confirmed=False)),
        ),
    ),
    "counted": ("I2", judged(asked("subscribe"), sent("1", 2), got("1"))),
    "never sent": ("I3", judged(asked("subscribe"), got("1"))),
    "cut": ("I3", judged(asked("subscribe"), sent("1"), got("1", intact=False))),
    "other topic": ("I3", judged(asked("subscribe"), sent("1"), got("1", topic="u"))),
    "not subscribed": ("I3", judged(sent("1"), got("1"), rows=())),
    "not done": ("I3", judged(asked("subscribe"), sent("1", None, type="fail"), got("1"))),
    "notice about nothing": ("I3", judged(asked("subscribe"), missed())),
    "twice": ("I4", judged(asked("subscribe"), sent("1"), got("1"), got("1"))),
    "thrice": ("I4", judged(asked("subscribe"), sent("1"), got("1", ""), got("1", ""), got("1"))),
    "told twice": ("I4", judged(asked("subscribe"), sent("1", 0), missed(), missed())),
    "from nowhere": ("I5", judged()),
    "not recovered": ("I7", judged(LATER[:1], rows=())),
    "recovered late": (
        "I7", judged(LATER, ("k", "ok", "probed", None), rows=(), recovery=1.0),
    ),
}  # fmt: skip
VOID: dict[str, Any] = {
    "the fault did not happen": judged(rows=(), faults=frozenset({"kill"})),
    "the fault was not seen": judged(fault(seen=None), rows=()),
    "the fault did not end": judged(fault()[:1], rows=()),
    "no end": judged(sent("1")[:1], rows=()),
    "no begin": judged(sent("1")[1:], rows=()),
    "two at a time": judged(sent("1")[:1], sent("2")[:1], sent("1")[1:], rows=()),
    "nothing was sent": judged(rows=(), acknowledged=1),
    "nothing came": judged(rows=(), received=1),
    "nothing was missed": judged(rows=(), missed=1),
    "no end of the run": check([Event(0.0, "a", "ok", "sinks", 0)], Expectation(acknowledged=0)),
    "requests that were not written down": judged(("s", "ok", "sinks", 1), rows=()),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_no_error(name: str) -> None:
    assert GOOD[name].passed, GOOD[name]


@pytest.mark.parametrize("name", BAD)
def test_what_is_an_error(name: str) -> None:
    invariant, verdict = BAD[name]
    assert not verdict.void
    assert invariant in verdict.errors, verdict


@pytest.mark.parametrize("name", VOID)
def test_a_run_that_proves_nothing_does_not_pass(name: str) -> None:
    assert VOID[name].void
    assert not VOID[name].passed
    assert "void: " in str(VOID[name])


def test_a_history_on_disk(tmp_path: Any) -> None:
    history = History(lambda: 1.5)
    history.add("c", "invoke", "set", (URL, {EXACT}))
    history.write(tmp_path / "history")
    assert json.loads((tmp_path / "history").read_text()) == [
        1.5, "c", "invoke", "set", [URL, [list(EXACT)]]
    ]  # fmt: skip
