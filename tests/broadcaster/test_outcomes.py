"""The outcome table. What it does over sockets is in test_fanout.py and test_sender.py."""

from __future__ import annotations

import pytest

from lonelypsp.bodies import UNSUBSCRIBE_IMMEDIATE
from lonelypss.outcomes import Host, Outcome, Reply, judge, wish


@pytest.mark.parametrize("body", [b"", b"text", UNSUBSCRIBE_IMMEDIATE])
@pytest.mark.parametrize("status", [*range(200, 600, 7), 200, 204, 299, 410, 429, 503])
def test_every_status_has_an_outcome(status: int, body: bytes) -> None:
    expected = Outcome.REJECTED
    if status in (429, 503):
        expected = Outcome.BUSY
    elif body == UNSUBSCRIBE_IMMEDIATE and (status < 300 or status == 410):
        expected = Outcome.HINT
    elif status < 300:
        assert judge(Reply(status, body)) is None
        return
    assert judge(Reply(status, body)) is expected


@pytest.mark.parametrize("outcome", Outcome)
def test_what_did_not_come_has_the_outcome_that_its_error_has(outcome: Outcome) -> None:
    assert judge(Reply(0, b"", "why", "", outcome)) is outcome


def test_the_table_is_whole() -> None:
    for row in Outcome:
        assert row.label in ("confirmed", "failed", "skipped", "unsubscribed")
        assert (row.label in ("failed", "skipped")) == row.then.startswith("MISSED")
        assert (row.count == "its count") == (row is Outcome.CONFIRMED)
        assert row.answer
    silent = {row for row in Outcome if row.host in (Host.FAILS, Host.SILENT)}
    assert silent == {Outcome.BROKEN, Outcome.SILENT, Outcome.UNREACHABLE}


@pytest.mark.parametrize(
    ("status", "asked", "seconds"),
    [
        (503, "7", 7),
        (429, "7", 7),
        (500, "7", 0),
        (200, "7", 0),
        (503, "", 0),
        (503, "0", 1),
        (503, "-1", 0),
        (503, "1000000000", 3600),
        (503, "9" * 5000, 3600),
        (503, "soon", 0),
        (503, "1.5", 0),
        (503, "\xb2", 0),
        (503, "Wed, 21 Oct 2015 07:28:00 GMT", 0),
    ],
)
def test_retry_after(status: int, asked: str, seconds: float) -> None:
    """X27"""
    assert wish(Reply(status, b"", "", asked)) == seconds
