"""Closed, open, half-open: by the clock of the test."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lonelypss.breaker import Breaker, State

THRESHOLD, LEAST, MOST = 3, 1.0, 8.0


def breaker() -> Breaker:
    return Breaker(THRESHOLD, LEAST, MOST)


def fail(one: Breaker, now: float, *, connected: bool = False) -> bool:
    return one.failed(now, now, connected=connected, timeout=False)


def opened(*, connected: bool = False) -> Breaker:
    one = breaker()
    assert [fail(one, n, connected=connected) for n in range(THRESHOLD)] == [False, False, True]
    assert one.state is State.OPEN
    return one


def test_failures_of_one_moment_count_as_one() -> None:
    one = breaker()
    for _ in range(100):
        assert not one.failed(10.0, 5.0, connected=True, timeout=False)
    assert not fail(one, 11.0)
    assert not one.failed(12.0, 10.5, connected=True, timeout=False), "it began before that"
    assert fail(one, 13.0)


def test_timeouts_count_each() -> None:
    one = breaker()
    got = [one.failed(10.0, 5.0, connected=True, timeout=True) for _ in range(4)]
    assert got == [False, False, True, False]


def test_what_could_not_be_reached_works_again_once_it_is_connected() -> None:
    one = opened()
    one.probe(one.until)
    assert (one.state, one.probing) == (State.HALF_OPEN, True)
    assert not one.trial()
    one.connected()
    assert (one.state, one.probing) == (State.CLOSED, False)
    assert fail(one, one.until + 1), "one failure is enough now"


def test_what_was_silent_has_to_answer_first() -> None:
    one = opened(connected=True)
    assert not one.trial()
    one.probe(one.until)
    one.connected()
    assert one.state is State.HALF_OPEN
    assert [one.trial(), one.trial()] == [True, False]
    one.probing = False  # it was not even sent
    assert one.trial()
    assert not one.failed(one.until + 1, 0.0, connected=True, timeout=True), "sent long before"
    assert fail(one, one.until + 1, connected=True)
    assert (one.state, one.probing) == (State.OPEN, False)


def test_pauses_grow_up_to_a_limit() -> None:
    one = opened()
    now, pauses = 2.0, []
    for _ in range(6):
        pauses.append(one.until - now)
        now = one.until
        one.probe(now)
        assert fail(one, now)
    for pause, plan in zip(pauses, [1.0, 2.0, 4.0, 8.0, 8.0, 8.0], strict=True):
        assert 0.75 * plan <= pause <= plan


class BreakerMachine(RuleBasedStateMachine):
    """Whatever happens: it never opens too early, never for too long, and tries one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.one = breaker()
        self.now = 0.0
        self.failures = 0
        self.trials = 0
        self.proved = False  # a connection closed it: the next failure opens it

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(age=st.floats(0, 30), connected=st.booleans(), timeout=st.booleans())
    def fail(self, age: float, connected: bool, timeout: bool) -> None:
        before = self.one.state
        self.failures += 1
        has_opened = self.one.failed(self.now, self.now - age, connected=connected, timeout=timeout)
        assert has_opened == (before is not State.OPEN and self.one.state is State.OPEN)
        if has_opened:
            if before is State.CLOSED:
                assert self.proved or self.failures >= THRESHOLD
            self.proved, self.trials = False, 0
            assert self.now < self.one.until <= self.now + MOST

    @precondition(lambda self: self.one.state is State.OPEN)
    @rule()
    def probe(self) -> None:
        self.now = max(self.now, self.one.until)
        self.one.probe(self.now)

    @precondition(lambda self: self.one.state is State.HALF_OPEN and not self.trials)
    @rule()
    def connected(self) -> None:
        self.one.connected()
        self.proved = self.one.state is State.CLOSED

    @rule()
    def trial(self) -> None:
        if self.one.trial():
            assert self.one.state is State.HALF_OPEN
            self.trials += 1

    @precondition(lambda self: self.trials)
    @rule()
    def unsent(self) -> None:
        self.trials -= 1
        self.one.probing = False

    @invariant()
    def one_at_a_time(self) -> None:
        assert self.trials <= 1
        if self.one.state is not State.HALF_OPEN:
            assert not self.one.probing


TestBreaker = BreakerMachine.TestCase


@given(st.integers(1, 20), st.integers(0, 40))
def test_threshold(threshold: int, failures: int) -> None:
    one = Breaker(threshold, LEAST, MOST)
    got = [fail(one, float(n)) for n in range(failures)]
    assert got.count(True) == (failures >= threshold)
    assert (one.state is State.OPEN) == (failures >= threshold)
