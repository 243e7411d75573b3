"""The rules of a websocket connection, for both of its ends (docs/topics/protocol.md).

A session is one end without the connection: `receive` takes a frame and says what it means, every
other method says which bytes to send. It has no clock, waits for nothing, and holds no body.

The table below says for each message when it may come, what it is signed over, and what answers
it. What else there is to know:

- Each end answers the other's frames in the order in which they came; the two directions do not
  know of each other. `answer` may be called in any order and gives out what is due.
- Frames must be sent in the order in which they were made: each may use up a counter value.
- Authorization covers the hash of the whole body, so that every part is signed with it.
- Whatever `receive` raises ends the connection; what a sending method raises changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from io import BytesIO
from os import urandom
from typing import Any, ClassVar, TypeAlias, TypedDict, Unpack

from lonelypsp import messages as m
from lonelypsp.compression import FIRST_CUSTOM, UNCOMPRESSED, WITHOUT_DICTIONARY
from lonelypsp.connection_url import (
    BROADCASTER_START,
    SUBSCRIBER_START,
    connection_nonce,
    connection_url,
    next_counter,
)
from lonelypsp.errors import AuthResult, LocalProtocolError, RemoteProtocolError
from lonelypsp.headers import NONCE_LENGTH
from lonelypsp.messages import Buffer, Message
from lonelypsp.parts import SMALLEST_PART, Reassembly, Sink, part_length
from lonelypsp.signing import AuthConfig, Authenticator


class Phase(Enum):
    NEW = "new"
    CONFIGURED = "configured, but not confirmed"
    OPEN = "open"
    CLOSED = "closed"


class Url(Enum):
    """Whether a message is signed over a url of the connection, and in which fields."""

    NONE = auto()
    OWN = auto()
    """The next one of its sender."""
    OWN_AS_RECOVERY = auto()
    REQUEST = auto()
    """That of the message it answers."""


class Inside(Enum):
    """Whether a message may stand between the parts of a body from the same sender."""

    YES = auto()
    ACCEPTED = auto()
    """Never sent there, because older peers give up; taken from those who send it."""
    NO = auto()
    ONLY = auto()


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        answer: what answers the message.
        more: what answers it instead where it does not complete a body.
    """

    phase: Phase
    url: Url
    inside: Inside
    answer: type[Message] | None = None
    more: type[Message] | None = None

    @cached_property
    def place(self) -> str | None:
        """The field that is signed with a url of its sender, which uses up a value of the counter;
        None: none is."""
        return {Url.OWN: "url", Url.OWN_AS_RECOVERY: "recovery"}.get(self.url)

    @cached_property
    def usual(self) -> bool:
        """Whether it may come at any time while the connection is open and no body is begun."""
        return self.phase is Phase.OPEN and self.inside is not Inside.ONLY


_NEW, _CONFIGURED, _OPEN, _CLOSED = Phase
_YES, _ACCEPTED, _NO, _ONLY = Inside.YES, Inside.ACCEPTED, Inside.NO, Inside.ONLY
_NOTIFIED = (m.ConfirmNotify, m.ContinueNotify)
_RECEIVED = (m.ConfirmReceive, m.ContinueReceive)

RULES: Mapping[type[Message], Rule] = {
    # from a subscriber
    m.Configure: Rule(_NEW, Url.NONE, _NO),
    m.SubscribeExact: Rule(_OPEN, Url.OWN, _YES, m.ConfirmSubscribeExact),
    m.SubscribeGlob: Rule(_OPEN, Url.OWN, _YES, m.ConfirmSubscribeGlob),
    m.UnsubscribeExact: Rule(_OPEN, Url.OWN, _YES, m.ConfirmUnsubscribeExact),
    m.UnsubscribeGlob: Rule(_OPEN, Url.OWN, _YES, m.ConfirmUnsubscribeGlob),
    m.Notify: Rule(_OPEN, Url.NONE, _ACCEPTED, m.ConfirmNotify),
    m.NotifyStreamStart: Rule(_OPEN, Url.NONE, _NO, *_NOTIFIED),
    m.NotifyStreamPart: Rule(_OPEN, Url.NONE, _ONLY, *_NOTIFIED),
    m.ContinueReceive: Rule(_OPEN, Url.OWN, _YES),
    m.ConfirmReceive: Rule(_OPEN, Url.OWN, _YES),
    # from a broadcaster
    m.ConfirmConfigure: Rule(_CONFIGURED, Url.NONE, _NO),
    m.ConfirmSubscribeExact: Rule(_OPEN, Url.REQUEST, _YES),
    m.ConfirmSubscribeGlob: Rule(_OPEN, Url.REQUEST, _YES),
    m.ConfirmUnsubscribeExact: Rule(_OPEN, Url.REQUEST, _YES),
    m.ConfirmUnsubscribeGlob: Rule(_OPEN, Url.REQUEST, _YES),
    m.ConfirmNotify: Rule(_OPEN, Url.NONE, _YES),
    m.ContinueNotify: Rule(_OPEN, Url.NONE, _YES),
    m.ReceiveStreamStart: Rule(_OPEN, Url.OWN, _NO, *_RECEIVED),
    m.ReceiveStreamPart: Rule(_OPEN, Url.OWN, _ONLY, *_RECEIVED),
    m.EnableZstdPreset: Rule(_OPEN, Url.OWN, _ACCEPTED),
    m.EnableZstdCustom: Rule(_OPEN, Url.OWN, _ACCEPTED),
    m.DisableZstdCustom: Rule(_OPEN, Url.OWN, _ACCEPTED),
    m.Missed: Rule(_OPEN, Url.OWN_AS_RECOVERY, _ACCEPTED),
}

_USUAL = frozenset(cls for cls, rule in RULES.items() if rule.usual)
_SUBSCRIBES = (m.SubscribeExact, m.SubscribeGlob)
_TO_SUBSCRIBER = [
    *(m.ConfirmSubscribeExact, m.ConfirmSubscribeGlob, m.ConfirmUnsubscribeExact),
    *(m.ConfirmUnsubscribeGlob, m.ConfirmNotify, m.ContinueNotify),
]
_NO_COUNTER = (0,)
_MOST_SUBSCRIBERS = (1 << 32) - 1
_NOTHING: Mapping[str, Any] = {}
_ONLY_ITSELF = (_NOTHING,)
HEAD_ALLOWANCE = 1024
"""More than the headers of a frame have, but for topic, identifier and tracing, with our
authenticators."""


COUNTS_PARTS = b"counts-parts"
"""What our CONFIGURE has as x-tracing, see `BroadcasterSession`."""
_WINDOW = b"window="
"""What our answer to that has as x-tracing, followed by `Limits.unanswered`."""
_OLDER_WINDOW = 3
_OLDER_SIGNED_PARTS = 257
"""Older subscribers sign the id of a part that they acknowledge in 8 bits, where they sign with
hmac, and give up at id 256. The last part is acknowledged without its id."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a session ends. The overflow rule is the same for all: the frame that would be one
    too many is not made (`LocalProtocolError`), or breaks the connection if it came from the peer.

    Attributes:
        unanswered: our frames that wait for an answer: the window. See `Session.room`.
        owed: the peer's frames that wait for our answer, 4429. Stop reading before.
        body_length: of what the peer sends, before and after decompression, 4413.
        frame_length: of frames that carry a part of a body. Older subscribers take 4 MiB.
        subscriptions: of the connection, 4429.
        compressors: enabled at a time, 4429.
        dictionary_length: of a dictionary received, 4413.
    """

    unanswered: int = 128
    owed: int = 255
    body_length: int = 1 << 36
    frame_length: int | None = 3_670_016
    subscriptions: int = 100_000
    compressors: int = 8
    dictionary_length: int = 1 << 20


class ConnectionBroken(RemoteProtocolError):
    """The peer broke the rules: close the connection.

    Attributes:
        close_code: 4000 + the http status of the same failure: 4400, 4403, 4413, 4429, or 4503 if
            the authorization cannot be checked now.
    """

    @property
    def close_code(self) -> int:
        return 4000 + self.status


@dataclass(frozen=True, slots=True)
class Compressor:
    id: int
    level: int
    min_size: int
    max_size: int
    dictionary: bytes | None

    def fits(self, length: int) -> bool:
        unlimited = self.max_size == m.UNLIMITED
        return self.min_size <= length and (unlimited or length < self.max_size)


@dataclass(slots=True)
class Payload:
    """A body to be sent, without the body.

    Attributes:
        length, sha512: of the bytes as they are sent, i.e. after compression.
        decompressed_length, decompressed_sha512: needed where there is a compressor.
        tracing: goes with it, see `lonelypsp.tracecontext`.
    """

    topic: bytes
    identifier: bytes
    length: int
    sha512: bytes
    compressor: int = UNCOMPRESSED
    decompressed_length: int | None = None
    decompressed_sha512: bytes | None = None
    tracing: bytes = b""
    head: _Head | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def fields(self) -> dict[str, Any]:
        whole = self.decompressed_length
        return {
            "tracing": self.tracing,
            "topic": self.topic,
            "identifier": self.identifier,
            "compressor": self.compressor,
            "compressed_length": self.length,
            "decompressed_length": self.length if whole is None else whole,
            "sha512": self.sha512,
        }


@dataclass(slots=True)
class PartFrame:
    """A frame to send: `head`, then `length` bytes of the body from `offset`."""

    head: bytes
    offset: int
    length: int
    last: bool


class _Head:
    """What stands before a body in one frame, as far as it is the same for all who get it."""

    __slots__ = ("cls", "exchange", "fields", "unsigned")

    def __init__(self, cls: type[m.Notify | m.StreamStart], payload: Payload, body: Buffer) -> None:
        message = cls(**payload.fields, body=body)
        self.cls = cls
        self.unsigned = m.Unsigned(message)
        self.fields = message.signed()
        self.exchange = _body_exchange(message, payload, last=True)


Head: TypeAlias = m.Notify | m.StreamStart


class Exchange:
    """A frame that is to be answered, as both ends see it.

    Attributes:
        answer: what the answer is.
        repeats: fields that it has from the frame.
        covers: what it is signed with besides; a peer may choose any of these.
        given: whether it is known, and only waits for its turn.
    """

    __slots__ = ("answer", "covers", "given", "repeats")

    def __init__(
        self,
        answer: type[Message],
        repeats: dict[str, Any],
        covers: Sequence[Mapping[str, Any]],
    ) -> None:
        self.answer = answer
        self.repeats = repeats
        self.covers = covers
        self.given = False


# What a frame can mean. Those that come often are not frozen, which would triple their cost.
@dataclass(frozen=True, slots=True)
class Configured:
    """To the broadcaster; next: `confirm_configure`.

    Attributes:
        zstd, training: which compressors may be enabled, as both ends agree.
    """

    message: m.Configure
    zstd: bool
    training: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """To the subscriber: now it may send."""


@dataclass(slots=True)
class SubscriptionAsked:
    """To the broadcaster: do it, then `answer`."""

    exchange: Exchange
    message: m.SubscribeExact | m.SubscribeGlob | m.UnsubscribeExact | m.UnsubscribeGlob

    @property
    def subscribes(self) -> bool:
        return isinstance(self.message, _SUBSCRIBES)


@dataclass(slots=True)
class PartArrived:
    """A body is not complete: `answer` when more may come. The sink has the bytes."""

    exchange: Exchange
    head: m.StreamStart
    part_id: int
    sink: Sink


@dataclass(slots=True)
class BodyArrived:
    """A body is complete: use it, then `answer`.

    Attributes:
        compressor: what `head.compressor` stands for.
        body: a view of the frame, if the whole came in it; else `sink` has it.
    """

    exchange: Exchange
    head: Head
    compressor: Compressor | None
    body: Buffer | None
    sink: Sink | None


@dataclass(slots=True)
class Answered:
    """The oldest unanswered frame of ours was answered by `message`."""

    message: Message


@dataclass(frozen=True, slots=True)
class Enabled:
    compressor: Compressor


@dataclass(frozen=True, slots=True)
class Disabled:
    compressor: Compressor


@dataclass(frozen=True, slots=True)
class TopicMissed:
    """To the subscriber: a message on this topic may not have reached it."""

    topic: bytes


@dataclass(frozen=True, slots=True)
class Ignored:
    """Nothing to do."""


Owed: TypeAlias = SubscriptionAsked | PartArrived | BodyArrived
Event: TypeAlias = (
    Owed | Configured | Opened | Answered | Enabled | Disabled | TopicMissed | Ignored
)


@dataclass(slots=True)
class _Sending:
    """A body of which parts were, or will be, sent."""

    payload: Payload
    part_id: int = 0
    offset: int = 0
    after_start: int = 0
    """Our counter after the start."""


@dataclass(frozen=True, slots=True)
class _Receiving:
    """A body of which parts came."""

    body: Reassembly
    sink: Sink
    compressor: Compressor | None


class Options(TypedDict, total=False):
    """What both ends can be given.

    Attributes:
        minimal: in which form headers are sent; default: minimal.
        limits: see there.
        sink: where a body goes that does not come in one frame; asked when its start is verified.
            What it or its `write` raises, `receive` raises. Default: `BytesIO`.
        check_hash: False where such sinks compare the hash of the whole themselves.
        presets: id -> dictionary, for the ids from 2 to 65535 that both ends were given.
        nonce: 32 bytes; default: random.
    """

    minimal: bool
    limits: Limits
    sink: Callable[[m.StreamStart], Sink]
    check_hash: bool
    presets: Mapping[int, bytes]
    nonce: bytes


def _in_memory(start: m.StreamStart) -> Sink:
    return BytesIO()


class Session:
    """What both ends have in common. Use `SubscriberSession` or `BroadcasterSession`.

    Attributes:
        phase: where the connection is.
        topics, globs: what is subscribed to, counting requests that are not answered yet.
        compressors: id -> those that may be used for sending, oldest first.
    """

    _START: ClassVar[type[m.StreamStart]]
    _PART: ClassVar[type[m.StreamPart]]
    _decode: Callable[[Buffer], Message]
    _handlers: Mapping[type[Message], Callable[[Any, float], Event]]
    _counter: int
    _peer_counters: tuple[int, ...]
    """For the next message of the peer that is signed over a url: one of them is right."""
    _most_parts: int | None = None
    """Of one body, which the peer can acknowledge; None: any number."""

    def __init__(
        self, sign: Authenticator, judge: Authenticator, **options: Unpack[Options]
    ) -> None:
        self._sign, self._judge = sign, judge
        self._minimal = options.get("minimal", True)
        self._new_sink = options.get("sink", _in_memory)
        self._check_hash = options.get("check_hash", True)
        self._presets = options.get("presets", {})
        self._own_nonce = options.get("nonce") or urandom(NONCE_LENGTH)
        self.limits = options.get("limits", Limits())
        self._window = self.limits.unanswered
        self._nonce = ""
        self._unanswered: deque[Exchange] = deque()
        self._asked = 0  # frames ever sent that need an answer
        self._owed: deque[Exchange] = deque()
        self._sending: _Sending | None = None
        self._receiving: _Receiving | None = None
        # compressors no longer enabled, and the number of frames asked before
        self._retired: dict[int, tuple[Compressor, int]] = {}
        self.phase = Phase.NEW
        self.topics: set[bytes] = set()
        self.globs: set[str] = set()
        self.compressors: dict[int, Compressor] = {}

    # what can be asked of it

    @property
    def room(self) -> int:
        """How many more frames that need an answer may be sent now."""
        return self._window - len(self._unanswered)

    @property
    def owed(self) -> int:
        """How many frames of the peer wait for our answer."""
        return len(self._owed)

    @property
    def sending(self) -> bool:
        """Whether a body was begun and not all of its parts were sent."""
        return self._sending is not None

    @property
    def unfinished(self) -> Sink | None:
        """Where the body goes of which not all parts have come."""
        return None if self._receiving is None else self._receiving.sink

    def compressor_for(self, length: int) -> Compressor | None:
        """The newest one that fits a body of `length` bytes."""
        for compressor in reversed(self.compressors.values()):
            if compressor.fits(length):
                return compressor
        return None

    def close(self) -> None:
        """What comes from now on is ignored, and answers are dropped."""
        self.phase = Phase.CLOSED

    # receiving

    def receive(self, frame: Buffer, now: float) -> Event:
        """What `frame` means.

        Raises:
            ConnectionBroken: the peer broke the rules.

        Whatever it raises, the session is closed.
        """
        if self.phase is _CLOSED:
            return Ignored()
        try:
            message = self._decode(frame)
            cls = type(message)
            if self.phase is not _OPEN or self._receiving is not None or cls not in _USUAL:
                self._in_place(message)
            return self._handlers[cls](message, now)
        except RemoteProtocolError as e:
            self.close()
            raise ConnectionBroken(str(e), status=e.status) from e
        except Exception:  # of a sink or an authenticator: the frame took effect in part
            self.close()
            raise

    def _misplaced(self, cls: type[Message], *, receiving: bool) -> str | None:
        """Why a message cannot come now; None: it can."""
        rule = RULES[cls]
        if rule.phase is not self.phase:
            return f"{cls.__name__} while the connection is {self.phase.value}"
        inside = rule.inside
        if (self._receiving is None) if receiving else not self._began:
            return f"{cls.__name__} without a start" if inside is Inside.ONLY else None
        if inside is Inside.YES or inside is Inside.ONLY:
            return None
        if inside is Inside.ACCEPTED and receiving:
            return None
        return f"{cls.__name__} between the parts of a body"

    @property
    def _began(self) -> bool:
        return self._sending is not None and self._sending.part_id > 0

    def _in_place(self, message: Message) -> None:
        if misplaced := self._misplaced(type(message), receiving=True):
            raise RemoteProtocolError(misplaced)

    def _verify(
        self, message: Any, now: float, covers: Sequence[Mapping[str, Any]] = _ONLY_ITSELF
    ) -> str:
        """Checks the authorization; the url that was signed.

        Args:
            covers: what is signed besides the fields of the message; any of them may be right.
        """
        rule, fields = RULES[type(message)], message.signed()
        result, url = AuthResult.FORBIDDEN, ""
        place = rule.place
        for counter in self._peer_counters if place else _NO_COUNTER:
            if place:
                fields[place] = url = connection_url(self._nonce, counter)
            for more in covers:
                fields |= more
                result = self._judge.check(message.OPERATION, fields, message.authorization, now)
                if result is AuthResult.OK:
                    if place:
                        self._peer_counters = (next_counter(counter),)
                    return url
                if result is AuthResult.UNAVAILABLE:
                    raise RemoteProtocolError(
                        "authorization cannot be checked now", status=result.status
                    )
        raise RemoteProtocolError(f"{type(message).__name__}: {result.name.lower()}", status=403)

    def _on_whole(self, message: m.Notify, now: float) -> Event:
        compressor = self._acceptable(message)
        self._verify(message, now)
        exchange = self._owe(_body_exchange(message, message, last=True))
        return BodyArrived(exchange, message, compressor, message.body, None)

    def _on_start(self, message: m.StreamStart, now: float) -> Event:
        compressor = self._acceptable(message)
        self._verify(message, now)
        last = len(message.body) == message.compressed_length
        exchange = self._owe(_body_exchange(message, message, last=last))
        if last:
            if hashlib.sha512(message.body).digest() != message.sha512:
                raise RemoteProtocolError("the body does not have the SHA-512 that came with it")
            return BodyArrived(exchange, message, compressor, message.body, None)
        if len(message.body) > message.compressed_length:  # before there is a sink to be closed
            most = message.compressed_length
            raise RemoteProtocolError(f"the body is longer than the {most:,} bytes declared")
        sink = self._new_sink(message)
        body = Reassembly(message, sink, check_hash=self._check_hash)
        self._receiving = _Receiving(body, sink, compressor)
        body.add(message)
        return PartArrived(exchange, message, 0, sink)

    def _on_part(self, message: m.StreamPart, now: float) -> Event:
        assert self._receiving is not None  # the table says so
        body, sink, head = self._receiving.body, self._receiving.sink, self._receiving.body.start
        covers = {"topic": head.topic, "sha512": head.sha512, "tracing": head.tracing}
        self._verify_part(message, now, covers)
        last = body.add(message)
        exchange = self._owe(_body_exchange(message, head, last=last))
        if not last:
            return PartArrived(exchange, head, message.part_id, sink)
        compressor, self._receiving = self._receiving.compressor, None
        return BodyArrived(exchange, head, compressor, None, sink)

    def _verify_part(self, message: m.StreamPart, now: float, covers: Mapping[str, Any]) -> None:
        self._verify(message, now, (covers,))

    def _acceptable(self, head: Head) -> Compressor | None:
        """Checks what a body says of itself; its compressor."""
        if max(head.compressed_length, head.decompressed_length) > self.limits.body_length:
            most = self.limits.body_length
            raise RemoteProtocolError(f"a body may have {most:,} bytes", status=413)
        if head.compressor == UNCOMPRESSED:
            return None
        compressor = self.compressors.get(head.compressor)
        if compressor is None and head.compressor in self._retired:
            compressor = self._retired[head.compressor][0]
        if compressor is None or head.compressed_length == 0:
            raise RemoteProtocolError(f"compressor {head.compressor}: not enabled, or no data")
        return compressor

    def _owe(self, exchange: Exchange) -> Exchange:
        if len(self._owed) >= self.limits.owed:
            raise RemoteProtocolError(f"{len(self._owed)} frames wait for an answer", status=429)
        self._owed.append(exchange)
        return exchange

    def _on_answer(self, message: Message, now: float) -> Event:
        cls = type(message)
        if not self._unanswered:
            raise RemoteProtocolError(f"{cls.__name__} where no answer is due")
        due = self._unanswered[0]
        if cls is not due.answer:
            raise RemoteProtocolError(f"{cls.__name__} where {due.answer.__name__} is due")
        for key, value in due.repeats.items():
            if getattr(message, key) != value:
                raise RemoteProtocolError(
                    f"{cls.__name__}: another {key} than that of the oldest frame"
                )
        self._verify(message, now, due.covers)
        self._unanswered.popleft()
        return Answered(message)

    # sending

    def answer(
        self,
        event: Owed,
        now: float,
        *,
        subscribers: int = 0,
        decompressed_sha512: bytes | None = None,
    ) -> list[bytes]:
        """Answers what `event` told of. The frames to send now: none as long as an earlier one is
        not answered, else this and those that waited for it.

        Args:
            subscribers: for CONFIRM_NOTIFY: how many the message reached, at most 2^32 - 1.
            decompressed_sha512: for CONFIRM_NOTIFY, where the body was compressed.
        """
        exchange = event.exchange
        if exchange.given:
            raise LocalProtocolError(f"{exchange.answer.__name__} was given already")
        if not 0 <= subscribers <= _MOST_SUBSCRIBERS:  # it may be sent later than it is given
            raise LocalProtocolError(f"{subscribers} subscribers cannot be signed")
        if decompressed_sha512 is not None and _is_whole(event):
            # for a stream older peers sign the other
            exchange.covers = ({**exchange.covers[0], "sha512": decompressed_sha512},)
        if exchange.answer is m.ConfirmNotify:
            exchange.repeats["subscribers"] = subscribers
        exchange.given = True
        owed, frames = self._owed, []
        while owed and owed[0].given and self.phase is not _CLOSED:
            due = owed[0]
            frames.append(self._send(due.answer, now, due.repeats, due.covers[0]))
            owed.popleft()
        return frames

    def open_stream(self, payload: Payload) -> None:
        """Begins a body; call `next_part` until the last one.

        Raises:
            LocalProtocolError: it cannot be sent, and nothing of it was; or it is not its turn.
        """
        self._out_of_place(self._START)
        if self._sending is not None:
            raise LocalProtocolError("the body before is not sent yet: call next_part")
        self._check_payload(payload)
        if self._most_parts is not None and self._parts_of(payload) > self._most_parts:
            raise LocalProtocolError(
                f"an older subscriber cannot acknowledge more than {self._most_parts} signed parts,"
                f" which {payload.length:,} bytes may take: raise frame_length"
            )
        self._sending = _Sending(payload)

    def next_part(self, now: float) -> PartFrame:
        """The next frame of the body that was begun.

        Raises:
            LocalProtocolError: there is no room; or the compressor is no longer enabled, which
                shows before anything is sent, and `sending` is over.
        """
        s = self._sending
        if s is None:
            raise LocalProtocolError("no body was begun: call open_stream")
        self._reserve()
        if s.part_id == 0:
            self._sending = None
            self._check_payload(s.payload)
            self._sending = s
            message = self._made(self._START, now, {**s.payload.fields, "body": b""}, _NOTHING)
        else:
            fields = {
                "tracing": s.payload.tracing,  # what the start had is signed with every part
                "identifier": s.payload.identifier,
                "part_id": s.part_id,
                "body": b"",
            }
            covers = {"topic": s.payload.topic, "sha512": s.payload.sha512}
            message = self._made(self._PART, now, fields, covers)
        head = m.encode_head(message, minimal=self._minimal)
        length = part_length(s.payload.length - s.offset, self.limits.frame_length, len(head))
        last = s.offset + length == s.payload.length
        frame = PartFrame(head, s.offset, length, last)
        self._sent(_body_exchange(message, s.payload, last=last), RULES[type(message)])
        if s.part_id == 0:
            s.after_start = self._counter
        s.offset, s.part_id = s.offset + length, s.part_id + 1
        if last:
            self._sending = None
            self._body_sent(s)
        return frame

    def one_frame(self, payload: Payload) -> bool:
        """Whether the body certainly fits one frame."""
        most = self.limits.frame_length
        own = len(payload.topic) + len(payload.identifier) + len(payload.tracing)
        return most is None or own + HEAD_ALLOWANCE + payload.length <= most

    def _parts_of(self, payload: Payload) -> int:
        """How many parts a body has at most."""
        most = self.limits.frame_length
        head = len(payload.identifier) + len(payload.tracing) + HEAD_ALLOWANCE
        first = part_length(payload.length, most, head + len(payload.topic))
        other = part_length(max(payload.length, SMALLEST_PART), most, head)
        return 1 - (first - payload.length) // other

    def _body_sent(self, sent: _Sending) -> None:
        pass

    def _check_payload(self, payload: Payload) -> None:
        if payload.compressor == UNCOMPRESSED:
            return
        if payload.compressor not in self.compressors:
            raise LocalProtocolError(f"compressor {payload.compressor} is not enabled")
        if not payload.length or payload.decompressed_length is None:
            raise LocalProtocolError("a compressed body has a length, and had one before")

    def _reserve(self) -> None:
        if self.room <= 0:
            raise LocalProtocolError(
                f"{len(self._unanswered)} frames wait for an answer: look at `room` before"
            )

    def _send(
        self,
        cls: type[Message],
        now: float,
        fields: Mapping[str, Any],
        covers: Mapping[str, Any] = _NOTHING,
    ) -> bytes:
        """The frame of a message that needs no answer, now as good as sent."""
        message = self._made(cls, now, fields, covers)
        frame = m.encode(message, minimal=self._minimal)
        if RULES[cls].place:
            self._counter = next_counter(self._counter)
        return frame

    def _made(
        self, cls: type[Any], now: float, fields: Mapping[str, Any], covers: Mapping[str, Any]
    ) -> Message:
        """A message, signed."""
        if self.phase is not _OPEN or self._sending is not None or cls not in _USUAL:
            self._out_of_place(cls)
        made: Message = cls(**fields)
        rule, signed = RULES[cls], made.signed()
        if rule.place:
            signed[rule.place] = connection_url(self._nonce, self._counter)
        signed |= covers
        authorization = self._sign.authorize(cls.OPERATION, signed, now)
        if authorization is not None:
            object.__setattr__(made, "authorization", authorization)
        return made

    def _out_of_place(self, cls: type[Message]) -> None:
        """Raises LocalProtocolError where a message cannot be sent now."""
        if misplaced := self._misplaced(cls, receiving=False):
            raise LocalProtocolError(misplaced)

    def _sent(self, exchange: Exchange, rule: Rule) -> None:
        """Takes note of a frame that is to be answered."""
        self._unanswered.append(exchange)
        self._asked += 1
        if rule.place:
            self._counter = next_counter(self._counter)

    def _whole(
        self, cls: type[m.Notify | m.StreamStart], payload: Payload, body: Buffer, now: float
    ) -> bytes:
        """A body in one frame."""
        if len(body) != payload.length:
            raise LocalProtocolError(f"{len(body):,} bytes of a body of {payload.length:,}")
        if payload.compressor != UNCOMPRESSED:
            self._check_payload(payload)
        if self.room <= 0:
            self._reserve()
        if self.phase is not _OPEN or self._sending is not None:
            self._out_of_place(cls)
        head = payload.head
        if head is None or head.cls is not cls:
            head = payload.head = _Head(cls, payload, body)
        rule = RULES[cls]
        if rule.place:
            head.fields["url"] = connection_url(self._nonce, self._counter)
        authorization = self._sign.authorize(cls.OPERATION, head.fields, now)
        if self._minimal:
            frame = head.unsigned.frame(authorization, body)
        else:
            message = cls(**payload.fields, authorization=authorization, body=body)
            frame = m.encode(message, minimal=False)
        self._sent(head.exchange, rule)
        return frame

    def _contradiction(self, message: Any) -> str | None:
        """Why a request to subscribe or unsubscribe makes no sense."""
        wanted, key = self._wanted(message)
        if isinstance(message, _SUBSCRIBES) != (key in wanted):
            return None
        return f"{type(message).__name__}: {key!r} is {'' if key in wanted else 'not '}subscribed"

    def _change(self, message: Any) -> None:
        wanted, key = self._wanted(message)
        (wanted.add if isinstance(message, _SUBSCRIBES) else wanted.remove)(key)

    def _wanted(self, message: Any) -> tuple[set[Any], Any]:
        globs = "glob" in message.HEADERS
        return (self.globs, message.glob) if globs else (self.topics, message.topic)


class SubscriberSession(Session):
    """The end of a client: `configure`, until `Opened` arrives; then anything.

    Args:
        enable_zstd, enable_training: which compressors the broadcaster may enable.
        initial_dict: the preset dictionary wished for; 0: none.
        tracing: of CONFIGURE.

    Attributes:
        peer_window: frames that the broadcaster sends before it waits for an answer.

    Older broadcasters count every part of a body, older subscribers only its start; and a
    broadcaster that serves those may sign parts in any way. So the next message behind a body is
    verified with both counts. Parts need not be verified: the hash of the whole is signed with the
    start. A part's authorization that is valid is used up all the same.
    """

    _START, _PART = m.NotifyStreamStart, m.NotifyStreamPart

    def __init__(
        self,
        auth: AuthConfig,
        *,
        enable_zstd: bool = False,
        enable_training: bool = False,
        initial_dict: int = 0,
        tracing: bytes = COUNTS_PARTS,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(auth.to_broadcaster, auth.to_subscriber, **options)
        self._counter, self._peer_counters = SUBSCRIBER_START, (BROADCASTER_START,)
        self._decode = m.decode_from_broadcaster
        self._zstd, self._training = enable_zstd, enable_zstd and enable_training
        self._initial_dict, self._tracing = initial_dict, tracing
        self.peer_window = _OLDER_WINDOW
        self._handlers = dict.fromkeys(_TO_SUBSCRIBER, self._on_answer) | {
            m.ConfirmConfigure: self._on_confirm_configure,
            m.ReceiveStreamStart: self._on_start,
            m.ReceiveStreamPart: self._on_part,
            m.EnableZstdPreset: self._on_enable,
            m.EnableZstdCustom: self._on_enable,
            m.DisableZstdCustom: self._on_disable,
            m.Missed: self._on_missed,
        }

    def configure(self, now: float) -> bytes:
        fields = {
            "subscriber_nonce": self._own_nonce,
            "enable_zstd": self._zstd,
            "enable_training": self._training,
            "initial_dict": self._initial_dict,
            "tracing": self._tracing,
        }
        frame = self._send(m.Configure, now, fields)
        self.phase = Phase.CONFIGURED
        return frame

    def subscribe_exact(self, topic: bytes, now: float) -> bytes:
        return self._ask(m.SubscribeExact(topic=topic), {"topic": topic}, now)

    def subscribe_glob(self, glob: str, now: float) -> bytes:
        return self._ask(m.SubscribeGlob(glob=glob), {"glob": glob}, now)

    def unsubscribe_exact(self, topic: bytes, now: float) -> bytes:
        return self._ask(m.UnsubscribeExact(topic=topic), {"topic": topic}, now)

    def unsubscribe_glob(self, glob: str, now: float) -> bytes:
        return self._ask(m.UnsubscribeGlob(glob=glob), {"glob": glob}, now)

    def notify(self, payload: Payload, body: Buffer, now: float) -> bytes:
        """A message in one frame; see `one_frame`."""
        return self._whole(m.Notify, payload, body, now)

    def _ask(self, message: Message, fields: dict[str, Any], now: float) -> bytes:
        if contradiction := self._contradiction(message):
            raise LocalProtocolError(contradiction)
        self._reserve()
        url = connection_url(self._nonce, self._counter)
        frame = self._send(type(message), now, fields)
        self._unanswered.append(_request_exchange(message, url))
        self._asked += 1
        self._change(message)
        return frame

    def _on_confirm_configure(self, message: m.ConfirmConfigure, now: float) -> Event:
        self._verify(message, now)
        self._nonce = connection_nonce(self._own_nonce, message.broadcaster_nonce)
        digits = message.tracing.removeprefix(_WINDOW)
        if digits != message.tracing and digits.isdigit() and len(digits) < 10:
            self.peer_window = int(digits)
        self.phase = Phase.OPEN
        return Opened()

    def _verify_part(self, message: m.StreamPart, now: float, covers: Mapping[str, Any]) -> None:
        after_start, next_part = self._peer_counters[0], self._peer_counters[-1]
        url = connection_url(self._nonce, next_part)
        fields = {**message.signed(), "url": url, **covers}
        self._judge.check(message.OPERATION, fields, message.authorization, now)
        self._peer_counters = (after_start, next_counter(next_part))

    def _on_enable(self, message: m.EnableZstdPreset | m.EnableZstdCustom, now: float) -> Event:
        self._verify(message, now)
        compressor, custom = message.compressor, isinstance(message, m.EnableZstdCustom)
        if compressor == UNCOMPRESSED:
            return Ignored()
        if not (self._training if custom else self._zstd):
            raise RemoteProtocolError("a compressor that was not asked for")
        if compressor in self.compressors or (compressor >= FIRST_CUSTOM) != custom:
            raise RemoteProtocolError(f"compressor {compressor} cannot be enabled so, or again")
        if len(self.compressors) >= self.limits.compressors:
            raise RemoteProtocolError("too many compressors", status=429)
        dictionary = self._dictionary(message)
        enabled = Compressor(
            compressor, message.level, message.min_size, message.max_size, dictionary
        )
        self.compressors[compressor] = enabled
        return Enabled(enabled)

    def _dictionary(self, message: m.EnableZstdPreset | m.EnableZstdCustom) -> bytes | None:
        if isinstance(message, m.EnableZstdCustom):
            if len(message.dictionary) > self.limits.dictionary_length:
                raise RemoteProtocolError("the dictionary is too large", status=413)
            if hashlib.sha512(message.dictionary).digest() != message.sha512:
                raise RemoteProtocolError("the dictionary does not have the SHA-512 signed")
            return bytes(message.dictionary)
        if message.compressor == WITHOUT_DICTIONARY:
            return None
        if message.compressor not in self._presets:
            raise RemoteProtocolError(f"no preset dictionary has the id {message.compressor}")
        return self._presets[message.compressor]

    def _on_disable(self, message: m.DisableZstdCustom, now: float) -> Event:
        self._verify(message, now)
        if message.compressor not in self.compressors:
            raise RemoteProtocolError(f"compressor {message.compressor} is not enabled")
        return Disabled(self.compressors.pop(message.compressor))

    def _on_missed(self, message: m.Missed, now: float) -> Event:
        self._verify(message, now)
        return TopicMissed(message.topic)


class BroadcasterSession(Session):
    """The end of a broadcaster: after `Configured`, `confirm_configure`; then anything.

    Args:
        allow_zstd, allow_training: whether compressors may be enabled, if the subscriber agrees.
        counts_parts: whether the subscriber counts each part of a body as a message, or only the
            start as older ones do; if those sign with hmac, a body may have 257 parts. None: find
            out. Whoever sends x-tracing, or what else the older
            client never does, counts each. A third party's client that counts each and looks
            exactly like the older one cannot be told from it.
    """

    _START, _PART = m.ReceiveStreamStart, m.ReceiveStreamPart

    def __init__(
        self,
        auth: AuthConfig,
        *,
        allow_zstd: bool = False,
        allow_training: bool = False,
        counts_parts: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(auth.to_subscriber, auth.to_broadcaster, **options)
        self._counter, self._peer_counters = BROADCASTER_START, (SUBSCRIBER_START,)
        self._decode = m.decode_from_subscriber
        self._zstd, self._training, self._counts_parts = allow_zstd, allow_training, counts_parts
        self._subscriber_nonce = b""
        self._own_trace = b""
        self._handlers = {
            m.Configure: self._on_configure,
            m.SubscribeExact: self._on_asked,
            m.SubscribeGlob: self._on_asked,
            m.UnsubscribeExact: self._on_asked,
            m.UnsubscribeGlob: self._on_asked,
            m.Notify: self._on_whole,
            m.NotifyStreamStart: self._on_start,
            m.NotifyStreamPart: self._on_part,
            m.ContinueReceive: self._on_answer,
            m.ConfirmReceive: self._on_answer,
        }

    def deliver(self, payload: Payload, body: Buffer, now: float) -> bytes:
        """A message in one frame; see `one_frame`."""
        return self._whole(m.ReceiveStreamStart, payload, body, now)

    def confirm_configure(self, now: float) -> bytes:
        fields = {"broadcaster_nonce": self._own_nonce, "tracing": self._own_trace}
        frame = self._send(m.ConfirmConfigure, now, fields)
        self._nonce = connection_nonce(self._subscriber_nonce, self._own_nonce)
        self.phase = Phase.OPEN
        return frame

    def missed(self, topic: bytes, now: float) -> bytes:
        """Not between the parts of a body, see `sending`; nor the following."""
        return self._send(m.Missed, now, {"topic": topic})

    def enable_preset(
        self, compressor: int, now: float, *, level: int, min_size: int, max_size: int = m.UNLIMITED
    ) -> bytes:
        dictionary = None
        if compressor != WITHOUT_DICTIONARY:
            if compressor not in self._presets:
                raise LocalProtocolError(f"no preset dictionary has the id {compressor}")
            dictionary = self._presets[compressor]
        enabled = Compressor(compressor, level, min_size, max_size, dictionary)
        return self._enable(m.EnableZstdPreset, enabled, now, {}, allowed=self._zstd)

    def enable_custom(
        self,
        compressor: int,
        dictionary: bytes,
        now: float,
        *,
        level: int,
        min_size: int,
        max_size: int = m.UNLIMITED,
    ) -> bytes:
        if compressor < FIRST_CUSTOM:
            raise LocalProtocolError(f"own dictionaries have ids from {FIRST_CUSTOM}")
        enabled = Compressor(compressor, level, min_size, max_size, dictionary)
        more = {"sha512": hashlib.sha512(dictionary).digest(), "dictionary": dictionary}
        return self._enable(m.EnableZstdCustom, enabled, now, more, allowed=self._training)

    def disable_custom(self, compressor: int, now: float) -> bytes:
        """What the subscriber sends until it knows is still taken."""
        if compressor < FIRST_CUSTOM or compressor not in self.compressors:
            raise LocalProtocolError(f"compressor {compressor} cannot be disabled")
        if self._sending is not None and self._sending.payload.compressor == compressor:
            raise LocalProtocolError(f"a body with compressor {compressor} was begun")
        frame = self._send(m.DisableZstdCustom, now, {"compressor": compressor})
        self._retired[compressor] = self.compressors.pop(compressor), self._asked
        return frame

    def _enable(
        self,
        cls: type[Message],
        enabled: Compressor,
        now: float,
        more: Mapping[str, Any],
        *,
        allowed: bool,
    ) -> bytes:
        if not allowed:
            raise LocalProtocolError("the subscriber did not ask for such a compressor")
        if enabled.id in self.compressors or enabled.id in self._retired:
            raise LocalProtocolError(f"compressor {enabled.id} was enabled already")
        if len(self.compressors) >= self.limits.compressors:
            raise LocalProtocolError(f"{len(self.compressors)} compressors are enabled")
        fields = {
            "compressor": enabled.id,
            "level": enabled.level,
            "min_size": enabled.min_size,
            "max_size": enabled.max_size,
            **more,
        }
        frame = self._send(cls, now, fields)
        self.compressors[enabled.id] = enabled
        return frame

    def _body_sent(self, sent: _Sending) -> None:
        if not self._counts_parts:
            self._counter = sent.after_start

    def _on_configure(self, message: m.Configure, now: float) -> Event:
        self._verify(message, now)
        self._zstd = self._zstd and message.enable_zstd
        self._training = self._zstd and self._training and message.enable_training
        wish = message.initial_dict
        if self._zstd and wish > WITHOUT_DICTIONARY and wish not in self._presets:
            raise RemoteProtocolError(f"no preset dictionary has the id {wish}")
        self._subscriber_nonce = message.subscriber_nonce
        authorization = message.authorization or ""
        if not self._counts_parts and authorization.startswith("X-HMAC "):
            self._most_parts = _OLDER_SIGNED_PARTS
        if message.tracing == COUNTS_PARTS:
            self._own_trace = b"%s%d" % (_WINDOW, self.limits.unanswered)
        self.phase = Phase.CONFIGURED
        return Configured(message, self._zstd, self._training)

    def _on_asked(self, message: Any, now: float) -> Event:
        url = self._verify(message, now)
        if contradiction := self._contradiction(message):
            raise RemoteProtocolError(contradiction)
        self._change(message)
        if len(self.topics) + len(self.globs) > self.limits.subscriptions:
            raise RemoteProtocolError("too many subscriptions", status=429)
        return SubscriptionAsked(self._owe(_request_exchange(message, url)), message)

    def _verify(
        self, message: Any, now: float, covers: Sequence[Mapping[str, Any]] = _ONLY_ITSELF
    ) -> str:
        url = super()._verify(message, now, covers)
        if self._counts_parts is None and _never_from_older_client(message):
            self._counts_parts, self._most_parts = True, None
        return url

    def _on_answer(self, message: Message, now: float) -> Event:
        event = super()._on_answer(message, now)
        if self._retired:
            answered = self._asked - len(self._unanswered)
            self._retired = {i: r for i, r in self._retired.items() if r[1] >= answered}
        return event


def _never_from_older_client(message: Any) -> bool:
    if isinstance(message, m.Notify | m.StreamStart) and len(message.identifier) != 4:
        return True
    if isinstance(message, m.ConfirmReceive) and message.num_subscribers != 1:
        return True
    return bool(message.tracing)


def _is_whole(event: Owed) -> bool:
    return isinstance(event, BodyArrived) and isinstance(event.head, m.Notify)


def _request_exchange(message: Any, url: str) -> Exchange:
    """What is due for a request to subscribe or unsubscribe that was signed over `url`."""
    answer = RULES[type(message)].answer
    assert answer is not None  # the table says so
    key = "glob" if "glob" in message.HEADERS else "topic"
    return Exchange(answer, {key: getattr(message, key)}, ({"url": url},))


def _body_exchange(message: Any, head: Head | Payload, *, last: bool) -> Exchange:
    """What is due for a body, or a part of one that `head` began; the same on both ends."""
    rule = RULES[type(message)]
    if not last:
        assert rule.more is not None  # the table says so
        repeats = {"identifier": head.identifier, "part_id": message.part_id}
        return Exchange(rule.more, repeats, _ONLY_ITSELF)
    assert rule.answer is not None  # the table says so
    repeats = {"identifier": head.identifier}
    if rule.answer is m.ConfirmReceive:
        return Exchange(rule.answer, repeats, _ONLY_ITSELF)
    signed: Sequence[Mapping[str, Any]] = ({"topic": head.topic, "sha512": head.sha512},)
    if isinstance(head, Payload) and head.decompressed_sha512 is not None:
        signed = (*signed, {"topic": head.topic, "sha512": head.decompressed_sha512})
    return Exchange(rule.answer, repeats, signed)
