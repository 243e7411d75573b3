"""Two sessions, anything that is allowed in any order, frames that take any time to arrive."""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from lonelypsp import session as s
from sessions import (
    AUTHS,
    NOW,
    OlderBroadcaster,
    OlderSubscriber,
    Pair,
    packed,
    plain,
    sha512,
    unpacked,
)

TOPICS = st.sampled_from([b"", b"a", b"a/b", b"\xff"])
GLOBS = st.sampled_from(["", "a", "*", "a/**"])
WORDS = b"words and words and words and words "
BODIES = st.sampled_from([b"", b"x", WORDS * 10, bytes(range(256)) * 6, WORDS * 60])
DICTIONARIES = st.sampled_from([(65_536, WORDS), (65_537, b"other " + WORDS), (70_000, b"d")])


class Side:
    """One end, and what is on its way to the other.

    Attributes:
        frames: made by it, not arrived.
        owed: events that it has to answer.
        sent: messages of its own, in their order: topic and body.
        arrived: what it received, as in `sent`.
        asked, confirmed: frames that need an answer, and answers.
        streaming: body and payload of which parts are to be sent.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        self.frames: deque[bytes] = deque()
        self.owed: list[Any] = []
        self.sent: list[tuple[bytes, bytes]] = []
        self.arrived: list[tuple[bytes, bytes]] = []
        self.asked = self.confirmed = 0
        self.streaming: tuple[s.Payload, bytes, bytes] | None = None

    def send(self, *frames: bytes) -> None:
        self.frames.extend(frames)


class Connection(RuleBasedStateMachine):
    auth = "hmac"
    subscriber: type[s.SubscriberSession] = s.SubscriberSession
    broadcaster: type[s.BroadcasterSession] = s.BroadcasterSession

    @initialize(
        minimal=st.tuples(st.booleans(), st.booleans()),
        unanswered=st.integers(1, 8),
    )
    def opened(self, minimal: Any, unanswered: int) -> None:
        limits = s.Limits(frame_length=700, unanswered=unanswered)
        ends = Pair(
            AUTHS[self.auth](),
            client={"minimal": minimal[0], "limits": limits},
            server={"minimal": minimal[1], "limits": limits},
            subscriber=self.subscriber,
            broadcaster=self.broadcaster,
        )
        self.client, self.server = Side(ends.client), Side(ends.server)
        self.sides = {"client": self.client, "server": self.server}
        self.missed: list[bytes] = []
        self.missed_arrived: list[bytes] = []
        self.subscriptions: list[Any] = []
        self.subscriptions_arrived: list[Any] = []

    # what the subscriber asks for

    def ask(self, kind: str, key: Any, wanted: Any) -> None:
        client = self.client
        if client.session.room:
            verb = "unsubscribe" if key in wanted else "subscribe"
            client.send(getattr(client.session, f"{verb}_{kind}")(key, NOW))
            client.asked += 1
            self.subscriptions.append((verb, key))

    @rule(topic=TOPICS)
    def subscribe_or_unsubscribe(self, topic: bytes) -> None:
        self.ask("exact", topic, self.client.session.topics)

    @rule(glob=GLOBS)
    def subscribe_or_unsubscribe_glob(self, glob: str) -> None:
        self.ask("glob", glob, self.client.session.globs)

    # bodies

    def payload(self, side: Side, topic: bytes, body: bytes, identifier: bytes) -> Any:
        compressor = side.session.compressor_for(len(body))
        if compressor is None or not body:
            return plain(body, topic, identifier), body
        return packed(body, compressor, topic, identifier)

    @rule(
        end=st.sampled_from(["client", "server"]),
        topic=TOPICS,
        body=BODIES,
        identifier=st.binary(min_size=4, max_size=4),  # as of older clients
        in_parts=st.booleans(),
    )
    def send_a_body(
        self, end: str, topic: bytes, body: bytes, identifier: bytes, in_parts: bool
    ) -> None:
        side = self.sides[end]
        if side.streaming is not None or not side.session.room:
            return
        payload, data = self.payload(side, topic, body, identifier)
        if in_parts:
            side.session.open_stream(payload)
            side.streaming = payload, data, body
            self.send_parts(end, 1)
            return
        whole = side.session.notify if end == "client" else side.session.deliver
        side.send(whole(payload, data, NOW))
        side.asked += 1
        side.sent.append((topic, body))

    @rule(end=st.sampled_from(["client", "server"]), count=st.integers(1, 4))
    def send_parts(self, end: str, count: int) -> None:
        side = self.sides[end]
        while side.streaming is not None and count and side.session.room:
            payload, data, body = side.streaming
            part = side.session.next_part(NOW)
            side.send(part.head + data[part.offset : part.offset + part.length])
            side.asked += 1
            count -= 1
            if part.last:
                assert not side.session.sending
                side.streaming = None
                side.sent.append((payload.topic, body))

    # what else the broadcaster says, not between the parts of a body

    @precondition(lambda self: self.server.streaming is None)
    @rule(topic=TOPICS)
    def tell_missed(self, topic: bytes) -> None:
        self.server.send(self.server.session.missed(topic, NOW))
        self.missed.append(topic)

    @precondition(lambda self: self.server.streaming is None)
    @rule()
    def enable_preset(self) -> None:
        session = self.server.session
        if 1 not in session.compressors:
            self.server.send(session.enable_preset(1, NOW, level=3, min_size=100))

    @precondition(lambda self: self.server.streaming is None)
    @rule(dictionary=DICTIONARIES)
    def enable_or_disable_custom(self, dictionary: tuple[int, bytes]) -> None:
        session, (compressor, data) = self.server.session, dictionary
        if compressor in session.compressors:
            self.server.send(session.disable_custom(compressor, NOW))
        elif compressor not in session._retired:
            frame = session.enable_custom(compressor, data, NOW, level=3, min_size=300)
            self.server.send(frame)

    # time passes

    @rule(to=st.sampled_from(["client", "server"]), count=st.integers(1, 5))
    def frames_arrive(self, to: str, count: int) -> None:
        side = self.sides[to]
        other = self.client if side is self.server else self.server
        for _ in range(min(count, len(other.frames))):
            self.arrived(side, other.frames.popleft())

    def arrived(self, side: Side, frame: bytes) -> None:
        event = side.session.receive(frame, NOW)
        if isinstance(event, s.Answered):
            side.confirmed += 1
        elif isinstance(event, s.TopicMissed):
            self.missed_arrived.append(event.topic)
        elif isinstance(event, s.PartArrived | s.BodyArrived | s.SubscriptionAsked):
            side.owed.append(event)
            if isinstance(event, s.BodyArrived):
                side.arrived.append((event.head.topic, unpacked(event)))
            if isinstance(event, s.SubscriptionAsked):
                key = event.message.glob if hasattr(event.message, "glob") else event.message.topic
                verb = "subscribe" if event.subscribes else "unsubscribe"
                self.subscriptions_arrived.append((verb, key))
        else:
            assert isinstance(event, s.Enabled | s.Disabled)

    @rule(end=st.sampled_from(["client", "server"]), which=st.integers(0, 20))
    def answer(self, end: str, which: int) -> None:
        """In any order."""
        side = self.sides[end]
        if side.owed:
            event = side.owed.pop(which % len(side.owed))
            whole = None
            if isinstance(event, s.BodyArrived) and event.compressor is not None:
                whole = sha512(unpacked(event))
            side.send(*side.session.answer(event, NOW, decompressed_sha512=whole))

    @invariant()
    def windows_are_kept(self) -> None:
        for side in self.sides.values():
            outstanding = side.asked - side.confirmed
            assert side.session.limits.unanswered - side.session.room == outstanding >= 0
            assert side.session.owed >= len(side.owed)

    def settle(self) -> None:
        """Everything is sent, arrives, and is answered."""
        sides = self.sides.items()
        while any(x.frames or x.owed or x.streaming for _, x in sides):
            for end, side in sides:
                self.send_parts(end, 100)
                self.frames_arrive(end, 1000)
                while side.owed:
                    self.answer(end, -1)

    @rule()
    def nothing_is_lost(self) -> None:
        self.settle()
        client, server = self.client.session, self.server.session
        assert self.client.arrived == self.server.sent
        assert self.server.arrived == self.client.sent
        assert self.missed_arrived == self.missed
        assert self.subscriptions_arrived == self.subscriptions
        assert client.topics == server.topics
        assert client.globs == server.globs
        assert client.compressors == server.compressors
        assert client.room == client.limits.unanswered
        assert server.room == server.limits.unanswered
        assert client.owed == server.owed == 0
        assert server._peer_counters == (client._counter,)
        if self.auth == "hmac":  # else nothing shows how the other one counts
            assert server._counter in client._peer_counters

    def teardown(self) -> None:
        if hasattr(self, "sides"):
            self.nothing_is_lost()


class Unsigned(Connection):
    auth = "none"


class OfOlderSubscriber(Connection):
    subscriber = OlderSubscriber


class OfOlderBroadcaster(Connection):
    broadcaster = OlderBroadcaster


ENOUGH = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestSigned, TestUnsigned = Connection.TestCase, Unsigned.TestCase
TestOlderSubscriber, TestOlderBroadcaster = OfOlderSubscriber.TestCase, OfOlderBroadcaster.TestCase
TestSigned.settings = TestUnsigned.settings = ENOUGH
TestOlderSubscriber.settings = TestOlderBroadcaster.settings = ENOUGH
