"""Who wants what: the client, its subscriptions and its messages, whatever the transport."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import count
from types import TracebackType
from typing import BinaryIO, Protocol

from lonelypsc.content import BytesLike, Content, Progress
from lonelypsc.delivery import Buffer, PubSubClientMessage, SharedBody
from lonelypsc.errors import (
    Attempt,
    PubSubBindError,
    PubSubCancelRequested,
    PubSubError,
    PubSubIrrecoverableError,
    PubSubRequestAmbiguousError,
    PubSubRequestConnectionAbandonedError,
    PubSubRequestError,
    PubSubRequestQueueFullError,
    PubSubRequestRefusedError,
    PubSubRequestRetriesExhaustedError,
)
from lonelypsc.tracing import NO_TRACING, Tracing
from lonelypsp import tracecontext
from lonelypsp.explain import ExplainedSubscriber, Explanation
from lonelypsp.interests import NO_TOPICS, Interests, Topics
from lonelypsp.spool import Body
from lonelypsp.tracecontext import Step
from lonelypsp.wire import BYTES16

__all__ = [
    "Attempt",
    "DirectSubscribeMultipleResult",
    "ExplainedSubscriber",
    "Explanation",
    "Hub",
    "PubSubBindError",
    "PubSubCancelRequested",
    "PubSubClient",
    "PubSubClientConnectionStatus",
    "PubSubClientMessage",
    "PubSubClientMessageWithCleanup",
    "PubSubClientSubscription",
    "PubSubError",
    "PubSubIrrecoverableError",
    "PubSubNotifyResult",
    "PubSubRequestAmbiguousError",
    "PubSubRequestConnectionAbandonedError",
    "PubSubRequestError",
    "PubSubRequestQueueFullError",
    "PubSubRequestRefusedError",
    "PubSubRequestRetriesExhaustedError",
    "Transport",
]

logger = logging.getLogger(__name__)

OnReceiving = Callable[[], Awaitable[object]]


class PubSubClientConnectionStatus(Enum):
    """Whether messages can arrive. LOST: not yet, or some may have been missed just now."""

    LOST = auto()
    OK = auto()
    ABANDONED = auto()


@dataclass(frozen=True, slots=True)
class PubSubNotifyResult:
    """How a notify ended.

    Attributes:
        notified: how many subscribers confirmed that they got it.
        explanation: what became of it at each, if that was asked for and the broadcaster allows it
            (its option `explain`). Not over a websocket, where the answer comes before that.
    """

    notified: int
    explanation: Explanation | None = None


@dataclass(frozen=True, slots=True)
class PubSubClientMessageWithCleanup:
    """A message for a directly registered receiver: valid until it awaits `cleanup()`."""

    topic: bytes
    sha512: bytes
    data: BinaryIO
    cleanup: Callable[[], Awaitable[None]]
    tracing: bytes = b""

    @property
    def trace_context(self) -> dict[str, str]:
        """See `PubSubClientMessage.trace_context`."""
        return tracecontext.decode(self.tracing)


@dataclass(frozen=True, slots=True)
class DirectSubscribeMultipleResult:
    """The handle of each topic and of each glob."""

    exact: dict[bytes, int]
    glob: dict[str, int]


class OnMessageReceiver(Protocol):
    async def on_message(self, message: PubSubClientMessageWithCleanup, /) -> None: ...


class StatusHandler(Protocol):
    async def on_connection_lost(self) -> None: ...
    async def on_connection_established(self) -> None: ...
    async def on_connection_abandoned(self) -> None: ...


class Hub(Protocol):
    """What a transport sees of the client."""

    @property
    def wanted(self) -> Topics:
        """Everything that broadcasters should send us, what is being asked for included."""
        ...

    def is_wanted(self, key: bytes | str) -> bool:
        """Whether this very topic, or glob, is among `wanted`."""
        ...

    def wants(self, topic: bytes) -> bool:
        """Whether a message on `topic` has a receiver here."""
        ...

    @property
    def waits_for_receivers(self) -> bool:
        """Whether `deliver` has to wait for the program; if not, `offer` does the same."""
        ...

    def offer(self, topic: bytes, body: Body, tracing: bytes = b"") -> bool:
        """As `deliver`, but for buffers only."""
        ...

    async def deliver(self, topic: bytes, body: Body, tracing: bytes = b"") -> bool:
        """Hands a checked message to all who want it and takes over `body`.

        Args:
            tracing: what came with it.

        Returns:
            False: the buffer of one of them is full, it did not get the message.
        """
        ...

    def gap(self) -> None:
        """Messages may have been missed, on any topic."""
        ...

    def missed(self, topic: bytes, tracing: bytes = b"") -> None:
        """A broadcaster said so of `topic`; `tracing` came with that."""
        ...

    def lost(self) -> None:
        """No broadcaster can send us anything at the moment."""
        ...

    def established(self) -> None:
        """Everything wanted arrives from now on; what came before may have been missed."""
        ...

    def abandoned(self, reason: str) -> None:
        """Nothing will ever arrive again."""
        ...


class Transport(Protocol):
    """How a client talks with broadcasters. All methods are called on one event loop."""

    async def start(self, hub: Hub) -> None:
        """Called once, before anything else; messages may be delivered from now on."""
        ...

    async def stop(self) -> None:
        """Gives up all subscriptions, then frees everything. Called once after `start`."""
        ...

    async def ensure(self, topics: Topics) -> None:
        """Returns when the broadcaster confirmed that it will send us `topics`, which the hub
        wants already. Raises PubSubRequestError."""
        ...

    async def release(self, topics: Topics) -> None:
        """Returns when the broadcaster confirmed that it will not send us those of `topics` that
        the hub does not want any more. Raises PubSubRequestError."""
        ...

    async def notify(
        self, topic: bytes, content: Content, explain: bool, tracing: bytes
    ) -> tuple[int, Explanation | None]:
        """Sends a prepared message, and `tracing` with it; the number of subscribers, and what
        became of each. Raises PubSubRequestError."""
        ...


@dataclass(eq=False)
class _Owner:
    """Who wants topics: a subscription through its buffer, or a direct handle without one."""

    buffer: Buffer | None
    topics: Topics = NO_TOPICS


class PubSubClient:
    """Subscribes and notifies; enter it once with `async with`.

    Args:
        transport: how to reach broadcasters and be reached by them.
        receive_buffer_messages: bound of each subscription's buffer.
        receive_buffer_bytes: bound of each subscription's buffer.
        tracing: where spans go.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        receive_buffer_messages: int = 1000,
        receive_buffer_bytes: int = 64 * 1024 * 1024,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._transport = transport
        self._tracing = tracing
        self._bounds = (receive_buffer_messages, receive_buffer_bytes)
        self._interests: Interests[_Owner] = Interests()
        self._buffers: set[Buffer] = set()
        self._ids = count()
        self._direct: dict[int, _Owner] = {}
        self._receivers: dict[int, OnMessageReceiver] = {}
        self._handlers: dict[int, StatusHandler] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._telling = asyncio.Lock()
        self._entered = False
        self.connection_status = PubSubClientConnectionStatus.LOST

    async def __aenter__(self) -> PubSubClient:
        if self._entered or self.connection_status is not PubSubClientConnectionStatus.LOST:
            raise RuntimeError("a client is entered once; make a new one")
        self._entered = True
        try:
            await self._transport.start(_ClientHub(self))
        except BaseException:
            self._entered = False
            self.connection_status = PubSubClientConnectionStatus.ABANDONED
            raise
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        self._entered = False
        already = self.connection_status is PubSubClientConnectionStatus.ABANDONED
        self._abandon("the client was left")
        try:
            await self._transport.stop()
        except PubSubError as e:
            if exc_type is None:
                raise
            logger.warning("leaving the client: %s", e)
        finally:
            if not already:
                self._announce("on_connection_abandoned")
            await asyncio.gather(*self._background)

    def _abandon(self, reason: str) -> None:
        self.connection_status = PubSubClientConnectionStatus.ABANDONED
        for buffer in self._buffers:
            buffer.close(reason)
        self._buffers.clear()

    def _check_entered(self) -> None:
        if not self._entered:
            raise RuntimeError("not entered: use the client inside `async with`")

    def subscribe_exact(
        self, topic: bytes, *rest: bytes, on_receiving: OnReceiving | None = None
    ) -> PubSubClientSubscription:
        """A subscription to exact topics; nothing is sent before it is entered.

        Args:
            topic: up to 65,535 bytes.
            rest: more of them.
            on_receiving: awaited before the first message and again after every gap, i.e. when
                messages may have been missed; e.g. reads the current state elsewhere.
        """
        return self.subscribe(exact=(topic, *rest), on_receiving=on_receiving)

    def subscribe_glob(
        self, glob: str, *rest: str, on_receiving: OnReceiving | None = None
    ) -> PubSubClientSubscription:
        """A subscription to all topics that match a pattern, see `lonelypsp.globs`."""
        return self.subscribe(glob=(glob, *rest), on_receiving=on_receiving)

    def subscribe(
        self,
        *,
        exact: Iterable[bytes] | None = None,
        glob: Iterable[str] | None = None,
        on_receiving: OnReceiving | None = None,
    ) -> PubSubClientSubscription:
        """A subscription to any mix of exact topics and patterns."""
        self._check_entered()
        return PubSubClientSubscription(self, Topics.of(exact or (), glob or ()), on_receiving)

    def subscribe_multi(
        self, *, on_receiving: OnReceiving | None = None
    ) -> PubSubClientSubscription:
        """A subscription to nothing yet."""
        return self.subscribe(on_receiving=on_receiving)

    async def notify(
        self,
        *,
        topic: bytes,
        data: BytesLike | None = None,
        sync_file: BinaryIO | None = None,
        length: int | None = None,
        sha512: bytes | None = None,
        progress: Progress | None = None,
        explain: bool = False,
        forwarding: PubSubClientMessage | PubSubClientMessageWithCleanup | None = None,
        trace_initializer: object = None,
    ) -> PubSubNotifyResult:
        """Sends a message to all subscribers of `topic`.

        Args:
            topic: up to 65,535 bytes.
            data: the message; or
            sync_file: a seekable binary file that holds it from its current position on. It is
                read in threads, twice unless `sha512` is given; leave it alone meanwhile.
            length: bytes of the file to send; default: up to its end.
            sha512: the message's hash (64 bytes) if it is known; then nothing is hashed.
            progress: called with (bytes sent, bytes in all), from 0 again when a try failed.
            explain: ask what became of the message at each subscriber.
            forwarding: the message that this one passes on, from another broadcaster; lets
                broadcasters stop what goes round in circles.
            trace_initializer: accepted for older callers and ignored.

        Raises:
            LocalProtocolError: the topic is too long.
            ValueError: the message is not given exactly once, or `length` or `sha512` cannot be.
            PubSubRequestError: it was not, or maybe not, delivered to the subscribers.
        """
        self._check_entered()
        BYTES16.encode(topic, "topic")
        content = Content(
            data=data, sync_file=sync_file, length=length, sha512=sha512, progress=progress
        )
        await content.prepare()
        with self._tracing.notify(topic, content.length) as step:
            tracing = step.tracing
            if forwarding is not None:
                tracing = tracecontext.forwarded(forwarding.tracing, tracing)
            notified, explanation = await self._transport.notify(topic, content, explain, tracing)
            step.answered(notified)
        return PubSubNotifyResult(notified, explanation)

    # who wants what
    async def _want(self, owner: _Owner, topics: Topics) -> None:
        """Registers before it asks, so that nothing confirmed is dropped."""
        self._check_entered()
        topics -= owner.topics
        if not topics:
            return
        self._interests.add(owner, topics)
        owner.topics |= topics
        try:
            await self._transport.ensure(topics)
        except BaseException:
            owner.topics -= topics
            self._interests.give_up(topics)
            self._interests.remove(owner, topics)
            raise

    async def _release(self, owner: _Owner, topics: Topics) -> None:
        """What arrives until the broadcaster has answered is still accepted: if it were refused,
        the broadcaster would drop a subscription that is perhaps wanted again by then."""
        topics &= owner.topics
        if not topics:
            return
        owner.topics -= topics
        self._interests.give_up(topics)
        try:
            if self._entered:
                await self._transport.release(topics)
        finally:
            self._interests.remove(owner, topics)

    async def _open(self, topics: Topics) -> _Owner:
        buffer = Buffer(*self._bounds)
        owner = _Owner(buffer)
        self._buffers.add(buffer)
        try:
            await self._want(owner, topics)
        except BaseException:
            self._buffers.discard(buffer)
            buffer.close("subscribing failed")
            raise
        return owner

    async def _close(self, owner: _Owner, lock: asyncio.Lock) -> None:
        assert owner.buffer is not None
        owner.buffer.close("the subscription was left")
        self._buffers.discard(owner.buffer)
        async with lock:
            await self._release(owner, owner.topics)

    # what the transport tells us
    def _offer(self, topic: bytes, body: Body, tracing: bytes = b"") -> bool:
        with self._tracing.receive(topic, body.length, tracing) as step:
            shared = SharedBody(topic, body, step.tracing)
            try:
                return self._offer_shared(shared, step)
            finally:
                shared.release()

    def _offer_shared(self, shared: SharedBody, step: Step) -> bool:
        taken = True
        for owner in self._interests.match(shared.topic):
            if owner.buffer is not None and not owner.buffer.offer(shared):
                logger.warning(
                    "a subscription's buffer is full: refused a message on %r", shared.topic
                )
                step.failed("a subscription's buffer is full")
                taken = False
        return taken

    async def _deliver(self, topic: bytes, body: Body, tracing: bytes = b"") -> bool:
        with self._tracing.receive(topic, body.length, tracing) as step:
            shared = SharedBody(topic, body, step.tracing)
            try:
                taken = self._offer_shared(shared, step)
                for receiver in list(self._receivers.values()):
                    await _call_receiver(receiver, shared)
            finally:
                shared.release()
        return taken

    def _missed(self, topic: bytes, tracing: bytes = b"") -> None:
        with self._tracing.missed(topic, tracing) as step:
            self._gap(step.tracing)

    def _gap(self, tracing: bytes = b"") -> None:
        if self.connection_status is PubSubClientConnectionStatus.OK:
            self._mark_gaps(tracing)
            self._announce("on_connection_lost", "on_connection_established")

    def _lost(self) -> None:
        if self.connection_status is PubSubClientConnectionStatus.OK:
            self.connection_status = PubSubClientConnectionStatus.LOST
            self._announce("on_connection_lost")

    def _established(self) -> None:
        self.connection_status = PubSubClientConnectionStatus.OK
        self._mark_gaps()
        self._announce("on_connection_established")

    def _abandoned(self, reason: str) -> None:
        self._abandon(reason)
        self._announce("on_connection_abandoned")

    def _mark_gaps(self, tracing: bytes = b"") -> None:
        for buffer in self._buffers:
            buffer.mark_gap(tracing)

    def _announce(self, *events: str) -> None:
        """Tells the status handlers, in the order of the events."""
        if self._handlers:
            task = asyncio.create_task(self._tell_all(events))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _tell_all(self, events: Iterable[str]) -> None:
        async with self._telling:  # first come, first served
            for event in events:
                await self._tell(event)

    async def _tell(self, event: str) -> None:
        for handler in list(self._handlers.values()):
            try:
                await getattr(handler, event)()
            except Exception:
                logger.exception("a status handler failed")

    # the low level of the older client
    @property
    def exact_subscriptions(self) -> dict[bytes, int]:
        """Topic -> how many want it."""
        return dict(self._interests.exact)

    @property
    def glob_subscriptions(self) -> dict[str, int]:
        """Glob -> how many want it."""
        return dict(self._interests.globs)

    @property
    def active_exact_subscriptions(self) -> dict[int, bytes]:
        """Direct handle -> topic."""
        return {i: topic for i, owner in self._direct.items() for topic in owner.topics.exact}

    @property
    def active_glob_subscriptions(self) -> dict[int, str]:
        """Direct handle -> glob."""
        return {i: glob for i, owner in self._direct.items() for glob in owner.topics.globs}

    async def direct_subscribe_exact(self, *, topic: bytes) -> int:
        """Wants `topic` without a buffer: messages go to registered receivers. Returns a handle."""
        return await self._subscribe_direct(Topics.of(exact=(topic,)))

    async def direct_subscribe_glob(self, *, glob: str) -> int:
        return await self._subscribe_direct(Topics.of(globs=(glob,)))

    async def _subscribe_direct(self, topics: Topics) -> int:
        owner = _Owner(None)
        await self._want(owner, topics)
        handle = next(self._ids)
        self._direct[handle] = owner
        return handle

    async def direct_subscribe_multiple(
        self, exact: Iterable[bytes], glob: Iterable[str]
    ) -> DirectSubscribeMultipleResult:
        """As many direct subscriptions, all or none."""
        result = DirectSubscribeMultipleResult({}, {})
        wanted = Topics.of(exact, glob)
        try:
            for topic in wanted.exact:
                result.exact[topic] = await self.direct_subscribe_exact(topic=topic)
            for pattern in wanted.globs:
                result.glob[pattern] = await self.direct_subscribe_glob(glob=pattern)
        except BaseException:
            for handle in (*result.exact.values(), *result.glob.values()):
                await self._unsubscribe_direct(handle)
            raise
        return result

    async def direct_unsubscribe_exact(self, *, subscription_id: int) -> None:
        """Unknown handles are ignored."""
        await self._unsubscribe_direct(subscription_id)

    async def direct_unsubscribe_glob(self, *, subscription_id: int) -> None:
        """Unknown handles are ignored."""
        await self._unsubscribe_direct(subscription_id)

    async def _unsubscribe_direct(self, handle: int) -> None:
        owner = self._direct.pop(handle, None)
        if owner is not None:
            await self._release(owner, owner.topics)

    async def direct_register_on_message(self, *, receiver: OnMessageReceiver) -> int:
        """`receiver.on_message(message)` is awaited for every message of this client before it is
        confirmed; what it raises is logged. Returns a registration id."""
        self._check_entered()
        registration = next(self._ids)
        self._receivers[registration] = receiver
        return registration

    async def direct_unregister_on_message(self, *, registration_id: int) -> None:
        self._receivers.pop(registration_id, None)

    async def direct_register_status_handler(self, *, receiver: StatusHandler) -> int:
        """`on_connection_established` is awaited at once if the connection is; LOST and OK follow
        after each gap."""
        self._check_entered()
        registration = next(self._ids)
        self._handlers[registration] = receiver
        if self.connection_status is PubSubClientConnectionStatus.OK:
            await receiver.on_connection_established()
        return registration

    async def direct_unregister_status_handler(self, *, registration_id: int) -> None:
        if self._handlers.pop(registration_id, None) is None:
            raise ValueError(f"no status handler has the registration id {registration_id}")


class _ClientHub:
    """The narrow side of a client that its transport gets."""

    def __init__(self, client: PubSubClient) -> None:
        self._interests = client._interests
        self.wants = client._interests.wants
        self.deliver = client._deliver
        self.offer = client._offer
        self._receivers = client._receivers
        self.is_wanted = client._interests.is_wanted
        self.gap = client._gap
        self.missed = client._missed
        self.lost = client._lost
        self.established = client._established
        self.abandoned = client._abandoned

    @property
    def wanted(self) -> Topics:
        return self._interests.wanted

    @property
    def waits_for_receivers(self) -> bool:
        return bool(self._receivers)


async def _call_receiver(receiver: OnMessageReceiver, shared: SharedBody) -> None:
    message = shared.hold().message()
    cleaned = False

    async def cleanup() -> None:
        nonlocal cleaned
        if not cleaned:
            cleaned = True
            message.data.close()
            shared.release()

    try:
        await receiver.on_message(
            PubSubClientMessageWithCleanup(
                message.topic, message.sha512, message.data, cleanup, message.tracing
            )
        )
    except Exception:
        logger.exception("a message receiver failed; the message is confirmed all the same")
        await cleanup()


@dataclass(eq=False)
class PubSubClientSubscription:
    """Topics that a program wants while it is inside `async with`.

    Messages are kept from entering on, up to the bounds of the buffer (see `lonelypsc.delivery`).
    """

    _client: PubSubClient
    _queued: Topics
    _on_receiving: OnReceiving | None
    _owner: _Owner | None = None
    _left: bool = False
    _messages: _Messages | None = field(default=None, repr=False)
    # one change at a time: a second one must not count on what the first may not get
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    async def __aenter__(self) -> PubSubClientSubscription:
        """Returns when the broadcaster has confirmed. Raises PubSubRequestError if it does not."""
        if self._owner is not None or self._left:
            raise RuntimeError("a subscription is entered once; make a new one")
        self._owner = await self._client._open(self._queued)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        owner, self._left = self._owner, True
        if owner is None:
            return
        if self._messages is not None:
            self._messages.drop(error)
        try:
            await self._client._close(owner, self._lock)
        except PubSubError as e:
            if exc_type is None:
                raise
            logger.warning("leaving a subscription: %s", e)

    async def subscribe_exact(self, topic: bytes) -> None:
        """Adds a topic: when entered, else at once; returns when the broadcaster confirmed."""
        await self._add(Topics.of(exact=(topic,)))

    async def subscribe_glob(self, glob: str) -> None:
        """Adds a pattern, as `subscribe_exact`."""
        await self._add(Topics.of(globs=(glob,)))

    async def unsubscribe_exact(self, topic: bytes) -> None:
        """Removes a topic. Raises ValueError if it is not in this subscription."""
        await self._remove(Topics.of(exact=(topic,)))

    async def unsubscribe_glob(self, glob: str) -> None:
        """Removes a pattern. Raises ValueError if it is not in this subscription."""
        await self._remove(Topics.of(globs=(glob,)))

    async def _add(self, topics: Topics) -> None:
        async with self._lock:
            self._check_not_left()
            if self._owner is None:
                self._queued |= topics
            else:
                await self._client._want(self._owner, topics)

    async def _remove(self, topics: Topics) -> None:
        async with self._lock:
            self._check_not_left()
            present = self._queued if self._owner is None else self._owner.topics
            if not topics & present:
                raise ValueError(f"not in this subscription: {topics}")
            if self._owner is None:
                self._queued -= topics
            else:
                await self._client._release(self._owner, topics)

    def _check_not_left(self) -> None:
        if self._left:
            raise RuntimeError("the subscription was left")

    async def messages(self) -> AsyncIterator[PubSubClientMessage]:
        """The messages, for ever; once per subscription.

        Cancelling a pending `__anext__` loses no message. After the subscription or the client was
        left it raises PubSubRequestConnectionAbandonedError.

        Raises:
            RuntimeError: not entered, left, or called before.
        """
        return self._iterate()

    async def with_timeout(self, seconds: float) -> AsyncIterator[PubSubClientMessage | None]:
        """As `messages`, but yields None whenever `seconds` pass without a message."""
        return _TimedMessages(self._iterate(), seconds)

    def _iterate(self) -> _Messages:
        self._check_not_left()
        if self._owner is None:
            raise RuntimeError("not entered: use the subscription inside `async with`")
        if self._messages is not None:
            raise RuntimeError("already iterating: messages() can be called once")
        assert self._owner.buffer is not None
        self._messages = _Messages(self._owner.buffer, self._on_receiving, self._client._tracing)
        return self._messages


class _Messages:
    def __init__(self, buffer: Buffer, on_receiving: OnReceiving | None, tracing: Tracing) -> None:
        self._buffer = buffer
        self._on_receiving = on_receiving
        self._tracing = tracing
        self._held: tuple[SharedBody, PubSubClientMessage, Step] | None = None

    def __aiter__(self) -> _Messages:
        return self

    async def __anext__(self) -> PubSubClientMessage:
        self.drop()
        # Nothing is awaited between taking a message and returning it: a cancellation loses none.
        while True:
            if self._buffer.gap and not self._buffer.closed:
                await self._close_gap()
            elif (body := self._buffer.take()) is not None:
                self.drop()  # of another task that was here meanwhile
                step = self._tracing.process(body.topic, body.length, body.tracing)
                step.make_current()
                message = body.message(step.tracing)
                self._held = body, message, step
                return message
            else:
                await self._buffer.news()

    async def _close_gap(self) -> None:
        self._buffer.gap = False
        if self._on_receiving is not None:
            try:
                with self._tracing.recover(self._buffer.gap_tracing):
                    await self._on_receiving()
            except BaseException:
                self._buffer.gap = True
                raise

    def drop(self, error: BaseException | None = None) -> None:
        """Ends the validity of the message that was returned last; `error`: of the program."""
        if self._held is not None:
            body, message, step = self._held
            self._held = None
            message.data.close()
            body.release()
            step.end(error)


class _TimedMessages:
    def __init__(self, messages: _Messages, seconds: float) -> None:
        self._messages = messages
        self._seconds = seconds

    def __aiter__(self) -> _TimedMessages:
        return self

    async def __anext__(self) -> PubSubClientMessage | None:
        try:
            async with asyncio.timeout(self._seconds) as limit:
                return await self._messages.__anext__()
        except TimeoutError:
            if limit.expired():
                return None
            raise  # of on_receiving
