"""What breaks a connection, from the specification and not from the code's own table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lonelypsp import messages as m
from lonelypsp import session as s
from sessions import NOW, SMALL, Pair, parts, plain, sha512

BODY = bytes(range(256)) * 20
HASH = sha512(BODY)
LIMITED = {"limits": SMALL}


def frame(message: m.Message, minimal: bool = True) -> bytes:
    return m.encode(message, minimal=minimal)


# one of each; `open` is said of a connection where topic "s" and glob "s*" are subscribed to, and
# what answers a frame is due exactly if the row is about such an answer

START: dict[str, Any] = {
    "identifier": b"abcd",
    "topic": b"t",
    "compressed_length": len(BODY),
    "decompressed_length": len(BODY),
    "sha512": HASH,
    "body": BODY[:500],
}
PART: dict[str, Any] = {"identifier": b"abcd", "part_id": 1, "body": BODY[500:1000]}
ZSTD: dict[str, Any] = {"level": 3, "min_size": 0}
FROM_SUBSCRIBER: dict[str, m.Message] = {
    "Configure": m.Configure(subscriber_nonce=bytes(32), enable_zstd=True, enable_training=True),
    "SubscribeExact": m.SubscribeExact(topic=b"t"),
    "SubscribeGlob": m.SubscribeGlob(glob="t"),
    "UnsubscribeExact": m.UnsubscribeExact(topic=b"s"),
    "UnsubscribeGlob": m.UnsubscribeGlob(glob="s*"),
    "Notify": m.Notify(
        **START
        | {"compressed_length": 500, "decompressed_length": 500, "sha512": sha512(BODY[:500])}
    ),
    "NotifyStreamStart": m.NotifyStreamStart(**START),
    "NotifyStreamPart": m.NotifyStreamPart(**PART),
    "ContinueReceive": m.ContinueReceive(identifier=b"abcd", part_id=0),
    "ConfirmReceive": m.ConfirmReceive(identifier=b"abcd"),
}
FROM_BROADCASTER: dict[str, m.Message] = {
    "ConfirmConfigure": m.ConfirmConfigure(broadcaster_nonce=bytes(32)),
    "ConfirmSubscribeExact": m.ConfirmSubscribeExact(topic=b"t"),
    "ConfirmSubscribeGlob": m.ConfirmSubscribeGlob(glob="t"),
    "ConfirmUnsubscribeExact": m.ConfirmUnsubscribeExact(topic=b"s"),
    "ConfirmUnsubscribeGlob": m.ConfirmUnsubscribeGlob(glob="s*"),
    "ConfirmNotify": m.ConfirmNotify(identifier=b"abcd", subscribers=1),
    "ContinueNotify": m.ContinueNotify(identifier=b"abcd", part_id=0),
    "ReceiveStreamStart": m.ReceiveStreamStart(**START),
    "ReceiveStreamPart": m.ReceiveStreamPart(**PART),
    "EnableZstdPreset": m.EnableZstdPreset(compressor=1, **ZSTD),
    "EnableZstdCustom": m.EnableZstdCustom(
        compressor=65_537, sha512=sha512(b"d"), dictionary=b"d", **ZSTD
    ),
    "DisableZstdCustom": m.DisableZstdCustom(compressor=65_536),
    "Missed": m.Missed(topic=b"t"),
}

# yes: it may come; due: if it answers the oldest unanswered frame; no: it breaks the connection
TO_BROADCASTER = """
                         new  configured  open  inside
Configure                yes  no          no    no
SubscribeExact           no   no          yes   yes
SubscribeGlob            no   no          yes   yes
UnsubscribeExact         no   no          yes   yes
UnsubscribeGlob          no   no          yes   yes
Notify                   no   no          yes   yes
NotifyStreamStart        no   no          yes   no
NotifyStreamPart         no   no          no    yes
ContinueReceive          no   no          due   due
ConfirmReceive           no   no          due   due
"""
TO_SUBSCRIBER = """
                         new  configured  open  inside
ConfirmConfigure         no   yes         no    no
ConfirmSubscribeExact    no   no          due   due
ConfirmSubscribeGlob     no   no          due   due
ConfirmUnsubscribeExact  no   no          due   due
ConfirmUnsubscribeGlob   no   no          due   due
ConfirmNotify            no   no          due   due
ContinueNotify           no   no          due   due
ReceiveStreamStart       no   no          yes   no
ReceiveStreamPart        no   no          no    yes
EnableZstdPreset         no   no          yes   yes
EnableZstdCustom         no   no          yes   yes
DisableZstdCustom        no   no          yes   yes
Missed                   no   no          yes   yes
"""


def rows(table: str) -> list[Any]:
    states, *lines = (line.split() for line in table.strip().splitlines())
    return [
        pytest.param(name, state, verdict, id=f"{name}-{state}")
        for name, *verdicts in lines
        for state, verdict in zip(states, verdicts, strict=True)
    ]


ASKS: dict[str, Callable[[Pair], Any]] = {
    "ContinueReceive": lambda ends: next(parts(ends.server, plain(BODY), BODY)),
    "ConfirmReceive": lambda ends: ends.server.deliver(plain(b"x"), b"x", NOW),
    "ConfirmSubscribeExact": lambda ends: ends.client.subscribe_exact(b"t", NOW),
    "ConfirmSubscribeGlob": lambda ends: ends.client.subscribe_glob("t", NOW),
    "ConfirmUnsubscribeExact": lambda ends: ends.client.unsubscribe_exact(b"s", NOW),
    "ConfirmUnsubscribeGlob": lambda ends: ends.client.unsubscribe_glob("s*", NOW),
    "ConfirmNotify": lambda ends: ends.client.notify(plain(b"x"), b"x", NOW),
    "ContinueNotify": lambda ends: next(parts(ends.client, plain(BODY), BODY)),
}


def ends_in(state: str) -> Pair:
    ends = Pair(client=LIMITED, server=LIMITED, open=False)
    if state == "new":
        return ends
    ends.up(ends.client.configure(NOW))
    if state == "configured":
        return ends
    ends.down(ends.server.confirm_configure(NOW))
    ends.subscribe(b"s")
    ends.answer_down(ends.up(ends.client.subscribe_glob("s*", NOW)))
    ends.custom(65_536, b"dictionary")
    if state == "inside":
        assert isinstance(ends.up(frame(m.NotifyStreamStart(**START))), s.PartArrived)
        assert isinstance(ends.down(frame(m.ReceiveStreamStart(**START))), s.PartArrived)
    return ends


def judge(session: s.Session, name: str, state: str, data: bytes, ends: Pair, verdict: str) -> None:
    if verdict == "due" and state in ("open", "inside"):
        ASKS[name](ends)
    if verdict == "no":
        with pytest.raises(s.ConnectionBroken) as caught:
            session.receive(data, NOW)
        assert caught.value.close_code == 4400
        assert session.phase is s.Phase.CLOSED
        assert session.receive(data, NOW) == s.Ignored()
    else:
        assert not isinstance(session.receive(data, NOW), s.Ignored)
        assert session.phase is not s.Phase.CLOSED


@pytest.mark.parametrize(("name", "state", "verdict"), rows(TO_BROADCASTER))
@pytest.mark.parametrize("minimal", [True, False], ids=["minimal", "expanded"])
def test_to_a_broadcaster(name: str, state: str, verdict: str, minimal: bool) -> None:
    ends = ends_in(state)
    judge(ends.server, name, state, frame(FROM_SUBSCRIBER[name], minimal), ends, verdict)


@pytest.mark.parametrize(("name", "state", "verdict"), rows(TO_SUBSCRIBER))
@pytest.mark.parametrize("minimal", [True, False], ids=["minimal", "expanded"])
def test_to_a_subscriber(name: str, state: str, verdict: str, minimal: bool) -> None:
    ends = ends_in(state)
    judge(ends.client, name, state, frame(FROM_BROADCASTER[name], minimal), ends, verdict)


@pytest.mark.parametrize("table", [TO_BROADCASTER, TO_SUBSCRIBER])
def test_an_answer_that_is_not_due(table: str) -> None:
    for row in rows(table):
        name, state, verdict = row.values
        if verdict == "due":
            ends = ends_in(state)
            known = FROM_SUBSCRIBER if table == TO_BROADCASTER else FROM_BROADCASTER
            end = ends.server if table == TO_BROADCASTER else ends.client
            judge(end, name, state, frame(known[name]), ends, "no")


def test_the_tables_are_complete() -> None:
    for known, messages, table in (
        (m.FROM_SUBSCRIBER, FROM_SUBSCRIBER, TO_BROADCASTER),
        (m.FROM_BROADCASTER, FROM_BROADCASTER, TO_SUBSCRIBER),
    ):
        names = [cls.__name__ for classes in known.values() for cls in classes]
        assert names == list(messages)
        assert {row.values[0] for row in rows(table)} == set(names)


@pytest.mark.parametrize("state", ["new", "configured", "open", "inside"])
def test_frames_of_the_other_direction_and_rubbish(state: str) -> None:
    """The numbers of the types are the same in both directions: most do not even decode."""
    for number in (0, 10, 11, 12, 13, 255):
        with pytest.raises(s.ConnectionBroken):
            ends_in(state).up(b"\0\1" + number.to_bytes(2, "big"))
    for rubbish in (b"", b"\0", b"\0\1\0", b"\0\1\0\1", b"text", bytes(100), b"\xff" * 100):
        with pytest.raises(s.ConnectionBroken):
            ends_in(state).up(rubbish)
        with pytest.raises(s.ConnectionBroken):
            ends_in(state).down(rubbish)
