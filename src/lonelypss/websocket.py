"""Websockets: the same messages without a request for each (docs/topics/protocol.md).

`Websockets` holds the connections of this process; a `Connection` is one of them:

arrived: frame -> session.receive -> act (subscribe, pass a message on) -> session.answer -> frames
queue:   message -> session.deliver -> frames, or, where the window is full, waiting
flush:   frames -> the socket

All that happens in one go when the frame comes. One reader and one writer task per connection take
over where something has to be waited for: the database, the disk, a peer that takes nothing. Frames
leave in the order in which they were made, since most use up a number that both ends count. What
waits is bounded: whoever takes too little is disconnected, and learns from that that something was
missed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

from lonelypsp import messages as m
from lonelypsp import session as s
from lonelypsp.compression import decompress, decompress_pieces
from lonelypsp.errors import LocalProtocolError
from lonelypsp.guard import identity
from lonelypsp.interests import Topics
from lonelypsp.replay import Code
from lonelypsp.spool import Body, Spool
from lonelypss.asgi import Receive, Scope, Send, respond
from lonelypss.config import BroadcasterConfig
from lonelypss.dictionaries import Dictionaries, Dictionary, Offer, Withdrawal
from lonelypss.fanout import Fanout
from lonelypss.intake import Intake, write
from lonelypss.logs import Lines
from lonelypss.metrics import NO_METRICS, Metrics
from lonelypss.outgoing import INLINE, Notice, Outgoing, Waiting
from lonelypss.peers import Registry
from lonelypss.routes import Refused, as_refused
from lonelypss.store.base import Subscription
from lonelypss.tls import Identified
from lonelypss.tracing import NO_TRACING, MessageStep, Tracing

log = logging.getLogger(__name__)

_OPEN, _CLOSED = s.Phase.OPEN, s.Phase.CLOSED

Work: TypeAlias = Coroutine[Any, Any, None]

_READY_BYTES = 256 * 1024  # of frames made ahead of the socket
# What one websocket gets done before the others have their turn: so many acknowledgements, or a
# quarter of other frames, which take four times as long. If there were as many of either, who once
# fell behind while others send could never catch up.
_TURN = 128
_NO_ACK = 4
_PATIENCE = 5.0  # seconds for the goodbye
TOO_SLOW = 4408
RESTART = 1012


class Closing(Exception):
    """Why this end closes a connection."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def as_closing(e: Any) -> Closing:
    """The close code of an error: 4000 and the http status. Anything else is a bug.

    Also of an ASGI event where a frame was expected.
    """
    match e:
        case {"type": "websocket.disconnect"}:
            code, reason = e.get("code") or 1005, e.get("reason") or ""
            return Closing(1005, f"by the peer, with {code} {reason}".rstrip())
        case {"type": _}:
            return Closing(4400, "a text frame: all messages are binary")
        case Closing():
            return e
        case s.ConnectionBroken():
            return Closing(e.close_code, str(e))
    refused = as_refused(e)
    return Closing(4000 + refused.status, str(refused))


BURST = "lonelyps.burst"
"""Name of the ASGI extension that is a `Burst`."""


class Burst(Protocol):
    """Frames of a websocket, as many at once as there are. `lonelypss serve` has it; elsewhere it
    is made of ASGI events, one per frame.

    Attributes:
        on_burst: may be called with what has arrived while somebody is in `receive_burst`; it
            returns what that shall return now, None: nothing, all is done.
    """

    on_burst: Callable[[list[bytes]], list[bytes] | None]

    async def receive_burst(self) -> list[bytes]:
        """What has arrived. Raises Closing: nothing will."""
        ...

    def send_now(self, messages: list[bytes]) -> bool:
        """Sends them if that needs no waiting; whether it did."""
        ...

    async def send_burst(self, messages: list[bytes]) -> None:
        """Sends them, waiting while the peer takes nothing. Raises OSError: the peer is gone."""
        ...


class _Asgi:
    """See `Burst`."""

    on_burst: Callable[[list[bytes]], list[bytes] | None]

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send

    def send_now(self, messages: list[bytes]) -> bool:
        return False

    async def receive_burst(self) -> list[bytes]:
        event = await self._receive()
        if not event.get("bytes"):
            raise as_closing(event)
        return [event["bytes"]]

    async def send_burst(self, messages: list[bytes]) -> None:
        for message in messages:
            await self._send({"type": "websocket.send", "bytes": message})


class Incoming:
    """Where the parts of a body go. The session hands over a part, `store` puts it away."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self._part: memoryview | bytes = b""

    def write(self, part: memoryview) -> None:
        self._part = part

    async def store(self) -> None:
        part, self._part = self._part, b""
        if len(part) > INLINE:
            await write(self.spool, part)
        else:
            self.spool.write(part)


class Websockets:
    """The websockets of one process, and the endpoint that they connect to.

    Args:
        registry: who of them wants what.
        fanout: where messages go that they send.
        intake: where bodies are stored.
    """

    def __init__(
        self,
        config: BroadcasterConfig,
        registry: Registry[Connection],
        intake: Intake,
        metrics: Metrics = NO_METRICS,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self.config = config
        self.registry = registry
        self.intake = intake
        self.fanout: Fanout
        self.metrics = metrics
        self.tracing = tracing
        self.refusals = Lines(log)
        self.endings = Lines(log)
        self.dictionaries = Dictionaries(config, self._changed)
        self.connections: set[Connection] = set()
        self.rounds = asyncio.Semaphore(config.max_notifies)
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsent: list[Connection] = []
        self._undelivered: list[tuple[list[Connection], bytes, Body, MessageStep]] = []
        self._flushing = False
        self._origins = {o.strip() for o in config.websocket_origins.split(",") if o.strip()}

    @property
    def receive_url(self) -> str | None:
        """Where other broadcasters send what concerns us, see `Registry`."""
        return self.registry.url

    def deliver(self, topic: bytes, body: Body, step: MessageStep) -> int:
        """Queues a message for all that want it; how many. Shares `body` with the caller."""
        connections = self.registry.match(topic)
        if connections:
            self._queue(connections, topic, body, step)
        return len(connections)

    def deliver_later(self, topic: bytes, body: Body, step: MessageStep) -> int:
        """As `deliver`, but only `flush` queues it; before that, its publisher may be answered."""
        connections = self.registry.match(topic)
        if connections:
            self._undelivered.append((connections, topic, body.share(), step))
            self._flush_soon()
        return len(connections)

    def _queue(
        self, connections: list[Connection], topic: bytes, body: Body, step: MessageStep
    ) -> None:
        if body.data is not None:
            self.dictionaries.collect(body.data)
        outgoing = Outgoing(topic, body, self.intake, step.copies(len(connections)))
        now = time.time()
        self.metrics.queued(len(connections))
        for connection in connections:
            try:
                connection.queue(outgoing, now)
            except Exception as e:  # noqa: BLE001 logged as what it is
                connection.failed(e)
        outgoing.release()

    def has_frames(self, connection: Connection) -> None:
        """Sends what `connection` has made so far, and will have made, in this turn of the loop."""
        self._unsent.append(connection)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Sends everything that was made; see `has_frames` and `deliver_later`."""
        self._flushing = True
        while self._unsent or self._undelivered:
            unsent, self._unsent = self._unsent, []
            for connection in unsent:
                try:
                    connection.flush()
                except Exception as e:  # noqa: BLE001 logged as what it is
                    connection.failed(e)
            undelivered, self._undelivered = self._undelivered, []
            for connections, topic, body, step in undelivered:
                self._queue(connections, topic, body, step)
                body.close()
        self._flushing = False

    def missed(self, topic: bytes) -> None:
        """Tells those who want `topic` that they may have missed something."""
        for connection in self.registry.match(topic):
            connection.queue_notice(topic)

    def gap(self) -> None:
        """Anybody may have missed something, on any topic."""
        for connection in self.connections:
            if topic := connection.some_topic():
                connection.queue_notice(topic)

    def spawn(self, work: Work) -> asyncio.Task[None]:
        """Work that outlives its connection."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def watch(self) -> None:
        """Disconnects those that acknowledge nothing."""
        timeout = self.config.websocket_ack_timeout
        while True:
            await asyncio.sleep(timeout / 4)
            for connection in self.connections:
                connection.check_progress(time.monotonic())

    async def close(self) -> None:
        """Ends all connections, and waits for the messages that came from them."""
        for connection in list(self.connections):
            connection.fail(Closing(RESTART, "this broadcaster is stopping"))
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self.dictionaries.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            await respond(send, 426, b'{"detail":"Upgrade Required"}', b"application/json")
            return
        await receive()
        if refused := self._refusal(scope):
            client = scope.get("client")
            text, about = "websocket from %s refused: %s", client and client[0]
            self.refusals.write(
                logging.INFO, about, text, client, refused, client=about, reason=str(refused)
            )
            await _refuse(scope, send, refused)
            return
        await Connection(self, scope, receive, send).run()

    def _refusal(self, scope: Scope) -> Refused | None:
        if len(self.connections) >= self.config.max_websockets:
            return Refused(503, "this broadcaster has max_websockets open", 5)
        origins = [v.decode("latin-1") for n, v in scope["headers"] if n == b"origin"]
        if origins and not self._origins.issuperset(origins):
            return Refused(403, f"pages of {origins[0]!r} are not among websocket_origins")
        return None

    def _changed(self, new: Dictionary, old: Dictionary | None) -> None:
        for connection in self.connections:
            if connection.training:
                connection.offer(Offer(self.config, new))
                if old is not None:
                    connection.offer(Withdrawal(old))


async def _refuse(scope: Scope, send: Send, refused: Refused) -> None:
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 4000 + refused.status})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    if refused.retry_after is not None:
        headers.append((b"retry-after", b"%d" % refused.retry_after))
    start = {"type": "websocket.http.response.start", "status": refused.status, "headers": headers}
    await send(start)
    await send({"type": "websocket.http.response.body", "body": f"{refused}\n".encode()})


class Connection:
    """One websocket.

    Attributes:
        training: whether it takes trained dictionaries.
    """

    def __init__(self, hub: Websockets, scope: Scope, receive: Receive, send: Send) -> None:
        config, auth = hub.config, hub.config.auth
        if who := identity(scope):
            auth = replace(auth, to_broadcaster=Identified(auth.to_broadcaster, who))
        self.hub = hub
        self.config = config
        self.training = False
        self.name = ":".join(map(str, scope.get("client") or ("unknown",)))
        self._send = send
        burst: Burst | None = scope.get("extensions", {}).get(BURST)
        self._socket: Burst = burst or _Asgi(receive, send)
        self.session = s.BroadcasterSession(
            auth,
            allow_zstd=hub.dictionaries.allowed,
            allow_training=hub.dictionaries.training_allowed,
            minimal=config.websocket_minimal_headers,
            limits=s.Limits(
                unanswered=config.websocket_send_max_unacknowledged,
                owed=config.websocket_max_unprocessed_receives + 1,
                body_length=config.spool_quota,
                frame_length=config.outgoing_max_ws_message_size,
                subscriptions=config.websocket_max_subscriptions,
            ),
            sink=lambda start: Incoming(hub.intake.spool(start.compressed_length)),
            check_hash=False,
            presets=hub.dictionaries.preset_data,
        )
        self._frames: list[bytes] = []
        self._ready_bytes = 0
        self._writing = False
        self._work: Work | None = None  # that `arrived` left to the reader
        self._waiting: deque[Waiting] = deque()
        self._waiting_bytes = 0
        self._streaming = False
        self._wake = asyncio.Event()  # the writer: something is to be sent
        self._acknowledged = asyncio.Event()  # the writer: the window has room again
        self._relieved = asyncio.Event()  # the reader: fewer answers are owed, or wait
        self._asked: deque[s.SubscriptionAsked] = deque()
        self._subscribing: asyncio.Task[None] | None = None
        self._acks = 0
        self._progress = (0, 0.0)
        self._ended: asyncio.Future[Closing] = asyncio.get_running_loop().create_future()

    # its life

    async def run(self) -> None:
        """From the handshake to the end, whoever ends it."""
        reader = asyncio.create_task(self._guard(self._read()))
        writer: asyncio.Task[None] | None = None
        try:
            await self._send({"type": "websocket.accept"})
            writer = asyncio.create_task(self._guard(self._write()))
            closing = await asyncio.shield(self._ended)
        finally:
            self.session.close()
            await _cancelled(reader, writer)
            await self._clean_up()
        await self._goodbye(closing)

    def fail(self, closing: Closing) -> None:
        """Ends the connection; the first reason counts."""
        if not self._ended.done():
            self._ended.set_result(closing)

    async def _guard(self, work: Work) -> None:
        try:
            await work
        except OSError as e:  # the peer is gone
            self.fail(Closing(1006, f"connection lost: {e}"))
        except Exception as e:  # noqa: BLE001 logged as what it is
            self.failed(e)

    def failed(self, e: Exception) -> None:
        """Ends the connection for `e`."""
        try:
            self.fail(as_closing(e))
        except Exception:
            log.exception("websocket %s: a bug", self.name)
            self.fail(Closing(1011, "an error of the broadcaster"))

    async def _clean_up(self) -> None:
        self._socket.on_burst = _unread
        if self._work is not None:
            self._work.close()
        self.hub.connections.discard(self)
        if self.training:
            self.hub.dictionaries.listeners -= 1
        if self._subscribing is not None:
            await _cancelled(self._subscribing)
        self.hub.registry.forget(self)
        while self._waiting:
            self._waiting.popleft().release()
        self._frames.clear()
        unfinished = self.session.unfinished
        if isinstance(unfinished, Incoming):
            unfinished.spool.close()

    async def _goodbye(self, closing: Closing) -> None:
        level = logging.WARNING if closing.code in (TOO_SLOW, 1011) else logging.INFO
        self.hub.endings.write(
            level,
            (self.name.rpartition(":")[0], closing.code),
            "websocket %s closed: %d %s",
            *(self.name, closing.code, closing),
            client=self.name,
            code=closing.code,
            reason=str(closing),
        )
        if closing.code in (1005, 1006):
            return
        reason = str(closing).encode()[:120].decode("utf-8", "ignore")
        message = {"type": "websocket.close", "code": closing.code, "reason": reason}
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._send(message)
        except (OSError, TimeoutError, RuntimeError) as e:  # the peer was quicker, or takes nothing
            log.debug("websocket %s: no goodbye: %r", self.name, e)

    def check_progress(self, now: float) -> None:
        """Fails if something was sent long ago and nothing acknowledged since."""
        acks, since = self._progress
        if self.session.room == self.session.limits.unanswered or acks != self._acks or not since:
            self._progress = (self._acks, now)
        elif now - since > self.config.websocket_ack_timeout:
            self.fail(
                Closing(TOO_SLOW, "too slow: nothing was acknowledged for websocket_ack_timeout")
            )

    # reading

    async def _read(self) -> None:
        socket, session = self._socket, self.session
        try:
            async with asyncio.timeout(self.config.websocket_open_timeout):
                first, *burst = await socket.receive_burst()
        except TimeoutError:
            raise Closing(4408, "no CONFIGURE within websocket_open_timeout") from None
        event = session.receive(first, time.time())
        assert isinstance(event, s.Configured)  # the session says so
        await self.hub.fanout.remember(self._codes())
        self._configured(event)
        self._socket.on_burst = self.arrived
        while True:
            if self._work is not None:
                work, self._work = self._work, None
                await work
            left = self.arrived(burst)
            if left is None:
                burst = await socket.receive_burst()
            else:
                burst = left
                await asyncio.sleep(0)

    def arrived(self, burst: list[bytes]) -> list[bytes] | None:
        """See `Burst.on_burst`. Deals with frames until one has to wait for something."""
        receive, came, now = self.session.receive, time.monotonic(), time.time()
        done, left = 0, _TURN
        try:
            for frame in burst:
                if left <= 0:
                    break
                done += 1
                event = receive(frame, now)
                if type(event) is s.Answered:
                    left -= 1
                    self._answered()
                elif (work := self._handle(event, came)) is not None:
                    self._work = work
                    break
                else:
                    left -= _NO_ACK
        except Exception as e:  # noqa: BLE001 logged as what it is
            self.failed(e)
            return None
        self.hub.flush()
        return burst[done:] if done < len(burst) or self._work is not None else None

    def _answered(self) -> None:
        self._acks += 1
        self._acknowledged.set()
        if self._waiting:
            self._make_frames()

    def _handle(self, event: s.Event, came: float) -> Work | None:
        """Acts on an event; what is returned has to be waited for before the next.

        Args:
            came: `time.monotonic()` when its frame had arrived.
        """
        if isinstance(event, s.BodyArrived):
            if not self._small_message(event, came):
                return self._message(event, came, self._codes())
        elif isinstance(event, s.SubscriptionAsked):
            self._subscription(event)
        elif isinstance(event, s.PartArrived):
            return self._part(event, self._codes())
        return self._relief() if self._overfed else None

    @property
    def _overfed(self) -> bool:
        """Who takes no answers is not read: the socket fills up, and the peer notices."""
        most = self.config.websocket_max_unprocessed_receives
        return self.session.owed >= most or self._ready_bytes >= 2 * _READY_BYTES

    async def _relief(self) -> None:
        while self._overfed:
            self._relieved.clear()
            await self._relieved.wait()

    def _codes(self) -> Sequence[Code]:
        """Of the message that was just received. Only those that do not sign a url of this
        connection could have been used elsewhere."""
        return self.config.auth.shared.take()

    async def _part(self, event: s.PartArrived, codes: Sequence[Code]) -> None:
        assert isinstance(event.sink, Incoming)
        await event.sink.store()
        if codes:
            await self.hub.fanout.remember(codes)
        self._answer(event)
        await self._relief()

    def _configured(self, event: s.Configured) -> None:
        self._push(self.session.confirm_configure(time.time()))
        dictionaries, config = self.hub.dictionaries, self.config
        self.hub.connections.add(self)
        if event.zstd:
            self.offer(Offer(config, None))
            if preset := dictionaries.presets.get(event.message.initial_dict):
                self.offer(Offer(config, preset))
        if event.training:
            self.training = True
            dictionaries.listeners += 1
            for trained in dictionaries.trained:
                self.offer(Offer(config, trained))

    def _small_message(self, event: s.BodyArrived, came: float) -> bool:
        """A message as most are: for our own websockets only. False: it is not one of those."""
        topic = event.head.topic
        if event.body is None or event.compressor is not None:
            return False
        if self.hub.fanout.urls_known(topic, came) != {}:
            return False
        if self.hub.fanout.is_loop(topic, event.head.tracing):
            self._answer(event)
            return True
        body = Body(bytes(event.body), None, len(event.body), event.head.sha512)
        with self._step(event) as step:
            count = self.hub.deliver_later(topic, body, step)
            self._answer(event, count)
            step.answered(count)
        self.hub.metrics.notified("websocket", time.monotonic() - came)
        body.close()
        return True

    def _step(self, event: s.BodyArrived) -> MessageStep:
        head = event.head
        return self.hub.tracing.notify(
            "websocket", head.topic, head.decompressed_length, head.tracing
        )

    async def _message(self, event: s.BodyArrived, came: float, codes: Sequence[Code]) -> None:
        """Any message: to our own websockets at once, then to everybody else."""
        fanout, topic = self.hub.fanout, event.head.topic
        body = await self._body(event)
        if fanout.is_loop(topic, event.head.tracing):
            self._answer(event, 0, body.sha512)
            body.close()
            return
        step = self._step(event)
        try:
            urls = await fanout.match(topic, came, codes)
            count = self.hub.deliver(topic, body, step)
            if urls:
                await self.hub.rounds.acquire()
                self.hub.spawn(self._post(event, body.share(), urls, count, came, step))
            else:
                with step:
                    self._answer(event, count, body.sha512)
                    step.answered(count)
                self.hub.metrics.notified("websocket", time.monotonic() - came)
        except BaseException as e:
            step.end(e)
            raise
        finally:
            body.close()
        await self._relief()

    async def _post(
        self,
        event: s.BodyArrived,
        body: Body,
        urls: dict[str, list[Subscription]],
        count: int,
        came: float,
        step: MessageStep,
    ) -> None:
        try:
            with step:
                count += await self.hub.fanout.post(event.head.topic, body, urls, step=step)
                self._answer(event, count, body.sha512)
                step.answered(count)
            self.hub.metrics.notified("websocket", time.monotonic() - came)
        except Exception as e:  # noqa: BLE001 logged as what it is
            self.failed(e)
        finally:
            self.hub.rounds.release()
            body.close()

    def _answer(self, event: s.Owed, count: int = 0, sha512: bytes | None = None) -> None:
        for frame in self.session.answer(
            event, time.time(), subscribers=count, decompressed_sha512=sha512
        ):
            self._push(frame)
        self._relieved.set()

    async def _body(self, event: s.BodyArrived) -> Body:
        """The message as it was before compression."""
        head, compressor = event.head, event.compressor
        if event.body is not None:
            if compressor is None:
                return Body(bytes(event.body), None, len(event.body), head.sha512)
            if head.decompressed_length <= INLINE:
                return Body.of(
                    decompress(
                        event.body,
                        dictionary=compressor.dictionary,
                        expected_length=head.decompressed_length,
                        max_window_size=self.config.decompression_max_window_size,
                    )
                )
            return await self._decompress(event.body, compressor, head)
        assert isinstance(event.sink, Incoming)
        with event.sink.spool as spool:
            await event.sink.store()
            body = spool.finish(head.sha512)
        if compressor is None:
            return body
        try:
            return await self._decompress(body.view(), compressor, head)
        finally:
            body.close()

    async def _decompress(
        self, data: bytes | memoryview, compressor: s.Compressor, head: s.Head
    ) -> Body:
        with self.hub.intake.spool(head.decompressed_length) as spool:
            await asyncio.to_thread(self._decompress_to, spool, data, compressor, head)
            return spool.seal()

    def _decompress_to(
        self, spool: Spool, data: bytes | memoryview, compressor: s.Compressor, head: s.Head
    ) -> None:
        for piece in decompress_pieces(
            data,
            dictionary=compressor.dictionary,
            expected_length=head.decompressed_length,
            max_window_size=self.config.decompression_max_window_size,
        ):
            spool.write(piece)

    @property
    def waiting(self) -> int:
        """How many messages wait."""
        return len(self._waiting)

    # subscribing

    def some_topic(self) -> bytes | None:
        """A topic that it wants, if any."""
        session = self.session
        return next(iter(session.topics), b"" if session.globs else None)

    def _subscription(self, event: s.SubscriptionAsked) -> None:
        self._asked.append(event)
        if self._subscribing is None or self._subscribing.done():
            self._subscribing = self.hub.spawn(self._guard(self._subscribe()))

    async def _subscribe(self) -> None:
        """What piles up while the database writes goes into its next transaction together."""
        while self._asked:
            batch = [self._asked.popleft()]
            while self._asked and self._asked[0].subscribes is batch[0].subscribes:
                batch.append(self._asked.popleft())
            topics = Topics.of(
                [e.message.topic for e in batch if isinstance(e.message, _EXACT)],
                [e.message.glob for e in batch if isinstance(e.message, _GLOB)],
            )
            if batch[0].subscribes:
                await self.hub.registry.add(self, topics)
            else:
                await self.hub.registry.remove(self, topics)
            for event in batch:
                self._answer(event)

    # sending

    def queue(self, outgoing: Outgoing, now: float) -> None:
        """Makes a copy of a message, or has it wait."""
        session = self.session
        if not self._waiting and self._ready_bytes < _READY_BYTES and not self._streaming:
            if session.phase is _CLOSED:
                return
            if session.room > 0 and (frame := outgoing.frame(session, now)) is not None:
                self._push(frame)
                return
        config, held = self.config, self._waiting_bytes
        if len(self._waiting) >= config.websocket_max_pending_sends or (
            held and held + outgoing.length > config.websocket_max_pending_bytes
        ):
            self.fail(
                Closing(
                    TOO_SLOW,
                    f"too slow: {len(self._waiting):,} messages of {held:,} bytes"
                    " wait (websocket_max_pending_sends, websocket_max_pending_bytes)",
                )
            )
            return
        self._wait(outgoing.share())

    def queue_notice(self, topic: bytes) -> None:
        """Says once that something on `topic` may have been missed, however often this is called
        before it is sent."""
        if not any(isinstance(w, Notice) and w.topic == topic for w in self._waiting):
            self.offer(Notice(topic))

    def offer(self, waiting: Offer | Withdrawal | Notice) -> None:
        """What is rare and small is not bounded: there is one per topic or dictionary."""
        self._wait(waiting)

    def _wait(self, waiting: Waiting) -> None:
        self._waiting.append(waiting)
        self._waiting_bytes += waiting.length
        self._wake.set()

    def _push(self, frame: bytes) -> None:
        if not self._frames:
            self.hub.has_frames(self)
        self._frames.append(frame)
        self._ready_bytes += len(frame)

    def flush(self) -> None:
        """Sends what was made, or, where that takes time, has the writer do it."""
        if self._writing or not self._socket.send_now(self._frames):
            self._wake.set()
            return
        self._frames = []
        self._ready_bytes = 0
        self._relieved.set()
        if self._waiting:
            self._make_frames()

    def _make_frames(self) -> None:
        """As many of those that wait as the window and the socket have room for."""
        session, waiting = self.session, self._waiting
        while waiting and self._ready_bytes < _READY_BYTES and not self._streaming:
            if session.room <= 0 or session.phase is not _OPEN:
                return
            frame = waiting[0].frame(session, time.time())
            if frame is None:
                self._wake.set()
                return
            self._push(frame)
            self._done(waiting.popleft())

    def _done(self, waited: Waiting) -> None:
        self._waiting_bytes -= waited.length
        waited.release()

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._write_frames()
            self._make_frames()
            while not self._frames and self._waiting and self.session.room > 0:
                large = self._waiting[0]
                assert isinstance(large, Outgoing)  # all else fits a frame
                await self._stream(large)
                self._make_frames()

    async def _write_frames(self) -> None:
        self._writing = True  # nobody may overtake
        while self._frames:
            frames, self._frames = self._frames, []
            await self._socket.send_burst(frames)
            self._ready_bytes -= sum(map(len, frames))
        self._writing = False
        self._relieved.set()

    async def _stream(self, outgoing: Outgoing) -> None:
        """A message that needs time: to be compressed, or more frames than one."""
        session = self.session
        payload, body = await outgoing.packed(session.compressor_for(outgoing.body.length))
        if body.data is not None and session.one_frame(payload):
            return  # now it is one like all others
        try:
            session.open_stream(payload)
        except LocalProtocolError as e:
            log.warning("websocket %s: %s; it is told that it missed a message", self.name, e)
            self._replace(outgoing, Notice(payload.topic))
            return
        self._streaming = True
        while session.sending:
            while session.room <= 0:
                self._acknowledged.clear()
                await self._acknowledged.wait()
            part = session.next_part(time.time())
            data = await _read_part(body, part)
            await self._write_frames()
            await self._socket.send_burst([b"".join((part.head, data))])
        self._streaming = False
        self._done(self._waiting.popleft())

    def _replace(self, outgoing: Outgoing, notice: Notice) -> None:
        self._waiting[0] = notice
        self._done(outgoing)


_EXACT = (m.SubscribeExact, m.UnsubscribeExact)
_GLOB = (m.SubscribeGlob, m.UnsubscribeGlob)


async def _read_part(body: Body, part: s.PartFrame) -> bytes | memoryview:
    if body.data is not None:
        return memoryview(body.data)[part.offset : part.offset + part.length]
    return await asyncio.to_thread(body.read_at, part.offset, part.length)


def _unread(burst: list[bytes]) -> None:
    """See `Burst.on_burst`: the connection has ended."""


async def _cancelled(*tasks: asyncio.Task[None] | None) -> None:
    """Cancels tasks and waits until they are over."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)
