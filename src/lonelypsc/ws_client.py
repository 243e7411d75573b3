"""A client on one websocket, with the same API as over HTTP (docs/topics/protocol.md).

notify -> waiting -> pump: frame -> the socket ... answer -> the result of notify
the socket -> frame -> session.receive -> the buffers of those who want it -> acknowledged

A `Link` is one connection; `WebsocketTransport` makes one after the other and keeps what has to
outlive them: what is wanted, and the messages that are not confirmed.

What is sent has an order: acknowledgements, then subscriptions, then messages, first come first
served, those first that a lost connection left unconfirmed. Frames are dealt with where they
arrive; one task per connection takes over where something has to be waited for. Receivers of the
program are awaited by another one: they may notify, and somebody has to read the answer to that.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from ssl import SSLContext
from typing import Any, TypeAlias

from lonelypsc.client import Hub, PubSubClient
from lonelypsc.config.config import BroadcastersShuffler, PubSubBroadcasterConfig
from lonelypsc.config.ws_config import WebsocketPubSubConfig
from lonelypsc.content import Content
from lonelypsc.errors import (
    Attempt,
    PubSubError,
    PubSubRequestAmbiguousError,
    PubSubRequestConnectionAbandonedError,
    PubSubRequestQueueFullError,
    PubSubRequestRefusedError,
)
from lonelypsc.tracing import make_tracing
from lonelypsc.ws_connection import ConnectionLost, Socket, connect, websockets_package
from lonelypsp import messages as m
from lonelypsp import session as s
from lonelypsp.compression import (
    available,
    compress,
    compress_pieces,
    decompress,
    decompress_pieces,
    pays,
)
from lonelypsp.errors import LocalProtocolError, RemoteProtocolError
from lonelypsp.explain import Explanation
from lonelypsp.interests import Topics
from lonelypsp.spool import Body, Spool

__all__ = ["WebsocketPubSubClient", "WebsocketTransport"]

logger = logging.getLogger(__name__)

PATH = "/v1/websocket"
INLINE = 64 * 1024
"""Bytes up to which hashing and compressing is done in the event loop."""
_CHUNK = 1024 * 1024
_BURST = 32  # frames looked at before the rest of the program gets its turn
_UNANSWERED = 128
_ACKS_PART = 16  # of the broadcaster's window: acknowledgements that leave together
_RECEIVED = 1000
_LONGEST_PAUSE = 60.0
_RECONNECT_SPREAD = 0.2  # seconds; not everybody comes back at the same moment

_OPEN = s.Phase.OPEN

Work: TypeAlias = Coroutine[Any, Any, None]
Key: TypeAlias = bytes | str
"""An exact topic, or a glob."""


def WebsocketPubSubClient(config: WebsocketPubSubConfig) -> PubSubClient:
    """A client on one websocket; does no I/O before it is entered.

    Entering returns without waiting for a connection. Entering a subscription waits until the
    broadcaster confirmed it, and raises PubSubRequestConnectionAbandonedError if none can be
    reached. Leaving closes the connection.
    """
    return PubSubClient(
        WebsocketTransport(config),
        receive_buffer_messages=config.receive_buffer_messages,
        receive_buffer_bytes=config.receive_buffer_bytes,
        tracing=make_tracing(config.tracing),
    )


class _Notify:
    """A message on its way out, over as many connections as it takes."""

    __slots__ = ("content", "identifier", "maybe_sent", "result", "topic", "tracing")

    def __init__(
        self, topic: bytes, content: Content, tracing: bytes, result: asyncio.Future[int]
    ) -> None:
        self.topic = topic
        self.content = content
        self.tracing = tracing
        self.identifier = _identifier()
        self.result = result
        self.maybe_sent = False

    def report(self, sent: int) -> None:
        """Tells the program; what its callback raises, its call of notify raises."""
        if self.result.done():
            return
        try:
            self.content.report(sent)
        except Exception as e:  # noqa: BLE001 whoever notifies gets it
            self.fail(e)

    def fail(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # seen, even if whoever waited is gone


_prefix = os.urandom(4)
_numbers = itertools.count()


def _identifier() -> bytes:
    # need only differ among the messages that a broadcaster has not confirmed
    return _prefix + (next(_numbers) & 0xFFFFFFFF).to_bytes(4, "big")


class WebsocketTransport:
    """See `lonelypsc.client.Transport`."""

    def __init__(self, config: WebsocketPubSubConfig) -> None:
        self.config = config
        self.waiting: deque[_Notify] = deque()
        """Messages to be sent; with `max_unsent_notifications`, one more is refused."""
        self.link: Link | None = None
        self.compression = config.allow_compression and available()
        self.presets = config.presets
        self._confirming: dict[Key, asyncio.Future[None]] = {}
        self._reason = ""  # why all was given up
        self._attempts: tuple[Attempt, ...] = ()
        self._tls: SSLContext | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.handing_over = asyncio.Lock()
        """Held by who awaits receivers of the program: messages stay in order when a connection
        follows another."""

    async def start(self, hub: Hub) -> None:
        websockets_package()  # an error now is better than one for each attempt
        self.hub = hub
        self._keeper = asyncio.create_task(self._keep(), name="websocket")

    async def stop(self) -> None:
        self._give_up("the client was left")
        link, tasks = self.link, (self._keeper, *self._tasks)
        for task in tasks:
            task.cancel()
        try:
            if link is not None:
                await link.socket.close(1000, "", self.config.websocket_close_timeout)
        finally:
            await asyncio.wait(tasks)

    def spawn(self, work: Work) -> asyncio.Task[None]:
        """A task that ends with the client at the latest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # what the client asks for

    async def ensure(self, topics: Topics) -> None:
        self._check()
        keys = [key for key in topics.keys if not self._has(key)]
        try:
            await self._settled(keys)
        except BaseException:
            # then the hub does not want them any more, and the broadcaster may have them
            asyncio.get_running_loop().call_soon(self._change, keys)
            raise

    async def release(self, topics: Topics) -> None:
        if self.link is None or self._reason:
            return  # without a connection there are no subscriptions
        keys = [k for k in topics.keys if not self.hub.is_wanted(k)]
        await self._settled([k for k in keys if self.link.knows(k)])

    async def notify(
        self, topic: bytes, content: Content, explain: bool, tracing: bytes
    ) -> tuple[int, Explanation | None]:
        self._check()
        most = self.config.max_unsent_notifications
        if most is not None and len(self.waiting) >= most:
            raise PubSubRequestQueueFullError(
                f"{len(self.waiting):,} messages wait to be sent (max_unsent_notifications)"
            )
        notify = _Notify(topic, content, tracing, asyncio.get_running_loop().create_future())
        self.waiting.append(notify)
        if self.link is not None:
            self.link.pump()
        try:
            return await notify.result, None  # the wire has no room for an explanation
        except asyncio.CancelledError:
            with suppress(ValueError):
                self.waiting.remove(notify)
            raise

    def _check(self) -> None:
        if self._reason:
            raise PubSubRequestConnectionAbandonedError(self._reason, self._attempts)

    def _has(self, key: Key) -> bool:
        return self.link is not None and self.link.has(key)

    async def _settled(self, keys: list[Key]) -> None:
        """Waits until the broadcaster has confirmed what is wanted of `keys`."""
        loop = asyncio.get_running_loop()
        futures = [self._confirming.setdefault(key, loop.create_future()) for key in keys]
        self._change(keys)
        if futures:
            await asyncio.wait(futures)
        for future in futures:
            future.result()

    def _change(self, keys: Iterable[Key]) -> None:
        if self.link is not None:
            self.link.change(keys)

    def confirmed(self, key: Key) -> None:
        """The broadcaster agrees with us about `key`."""
        future = self._confirming.pop(key, None)
        if future is not None:
            future.set_result(None)

    def refused(self, key: Key, error: Exception) -> bool:
        """The broadcaster cannot even be asked about `key`; whether somebody waits for that."""
        future = self._confirming.pop(key, None)
        if future is not None:
            future.set_exception(error)
            future.exception()  # seen, even if whoever waited is gone
        return future is not None

    # connections

    async def _keep(self) -> None:
        try:
            reason = await self._reconnect_forever()
        except Exception as e:
            logger.exception("the websocket client failed in an unforeseen way")
            reason = f"an error of the client, see its log: {e!r}"
        self._give_up(reason)
        self.hub.abandoned(reason)

    async def _reconnect_forever(self) -> str:
        """Connects again and again; why that is given up."""
        config = self.config
        shuffler = BroadcastersShuffler(config.broadcasters)
        attempts: list[Attempt] = []
        candidates, retries = iter(shuffler), 0
        while not self._reason:
            broadcaster = next(candidates, None)
            if broadcaster is None:
                if retries >= config.outgoing_initial_connect_retries:
                    self._attempts = tuple(attempts)
                    return "no broadcaster can be reached"
                await asyncio.sleep(min(2.0**retries, _LONGEST_PAUSE) + random.random())
                candidates, retries = iter(shuffler), retries + 1
                continue
            outcome, lived = await self._one_connection(broadcaster)
            attempts.append(Attempt(broadcaster["host"], outcome, False))
            if self._reason:
                break
            logger.warning("websocket to %s: %s", broadcaster["host"], outcome)
            if lived is not None and lived >= config.outgoing_min_reconnect_interval:
                candidates, retries = iter(shuffler), 0
                attempts.clear()
                await asyncio.sleep(random.random() * _RECONNECT_SPREAD)
        return self._reason

    async def _one_connection(
        self, broadcaster: PubSubBroadcasterConfig
    ) -> tuple[str, float | None]:
        """Uses one broadcaster as long as that goes; how it ended, and after how many seconds, or
        None if it never began."""
        try:
            link = await self._connect(broadcaster)
        except TimeoutError:
            return "no answer within websocket_open_timeout", None
        except PubSubError as e:
            return str(e), None
        began = time.monotonic()
        logger.info("websocket to %s is open", broadcaster["host"])
        self.link, patient = link, False
        try:
            await link.run(self._confirming)
            raise AssertionError("unreachable: a link runs until it fails")
        except PubSubError as e:
            return str(e), time.monotonic() - began
        except asyncio.CancelledError:
            patient = True  # `stop` says goodbye
            raise
        finally:
            if not patient:
                link.socket.abort("given up")
            self.link = None
            self.waiting.extendleft(reversed(link.end()))
            self.hub.lost()

    async def _connect(self, broadcaster: PubSubBroadcasterConfig) -> Link:
        """A connection that the broadcaster has confirmed. Raises PubSubError, TimeoutError."""
        config, url = self.config, broadcaster["host"] + PATH
        if self._tls is None and url.startswith("wss:"):
            self._tls = await asyncio.to_thread(config.tls)
        async with asyncio.timeout(config.websocket_open_timeout):
            socket = await connect(
                url,
                ssl_context=self._tls,
                max_size=config.max_websocket_receive_size,
                max_frames=config.max_received or _RECEIVED,
                heartbeat=config.websocket_heartbeat_interval,
            )
            try:
                link = Link(self, socket)
                await link.configure()
            except BaseException:
                socket.abort("not confirmed")
                raise
        return link

    def _give_up(self, reason: str) -> None:
        """Fails everything that waits; nothing more can be asked for."""
        if self._reason:
            return
        self._reason = reason
        left = [*(self.link.unconfirmed() if self.link is not None else ()), *self.waiting]
        self.waiting.clear()
        for notify in left:
            if notify.maybe_sent:
                text = f"sent, but not confirmed: {reason}"
                notify.fail(PubSubRequestAmbiguousError(text, self._attempts))
            else:
                notify.fail(PubSubRequestConnectionAbandonedError(reason, self._attempts))
        confirming, self._confirming = self._confirming, {}
        for future in confirming.values():
            future.set_exception(PubSubRequestConnectionAbandonedError(reason, self._attempts))
            future.exception()  # seen, even if whoever waited is gone


class _Incoming:
    """Where the parts of a body go. The session hands over a part, `store` puts it away."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self._part: memoryview | bytes = b""

    def write(self, part: memoryview) -> None:
        self._part = part

    async def store(self) -> None:
        part, self._part = self._part, b""
        if len(part) > INLINE:
            await asyncio.to_thread(self.spool.write, part)
        else:
            self.spool.write(part)


class Link:
    """One connection, from its handshake to its end."""

    def __init__(self, transport: WebsocketTransport, socket: Socket) -> None:
        config = transport.config
        self.transport = transport
        self.config = config
        self.hub = transport.hub
        self.socket = socket
        socket.on_writable = self.pump
        self.session = s.SubscriberSession(
            config.auth,
            enable_zstd=transport.compression,
            enable_training=config.allow_training_compression,
            initial_dict=(config.initial_compression_dict_id or 0) if transport.compression else 0,
            minimal=config.websocket_minimal_headers,
            limits=s.Limits(
                unanswered=config.max_expected_acks or _UNANSWERED,
                body_length=config.max_receive_body,
                frame_length=config.max_websocket_message_size,
            ),
            sink=lambda start: _Incoming(self._spool(start.compressed_length)),
            check_hash=False,
            presets=transport.presets,
        )
        self._expected: deque[Key | _Notify] = deque()
        """What each answer that is due is for."""
        self._sent: dict[_Notify, None] = {}
        self._changing: dict[Key, None] = {}
        """To be looked at: is it as it is wanted? In the order of asking."""
        self._in_flight: dict[Key, int] = {}
        self._initial: set[Key] = set()
        """What of all that was wanted at the start is not confirmed."""
        self._streaming: asyncio.Task[None] | None = None
        self._making_part = False
        self._progress = asyncio.Event()
        self._work: Work | None = None  # for the reader; nothing else is received before it is done
        self._handed: deque[tuple[s.BodyArrived, Body]] = deque()
        """For receivers of the program. Not more than `Limits.owed`, since the broadcaster has no
        answer to them; those above `receive_buffer_bytes` wait on disk."""
        self._handed_bytes = 0
        self._handing: asyncio.Task[None] | None = None

    async def configure(self) -> None:
        """Returns when the broadcaster has confirmed; raises PubSubError."""
        self.socket.send(self.session.configure(time.time()))
        with self._telling_why():
            while (frame := self.socket.take()) is None:
                await self.socket.arrived()
            self.session.receive(frame, time.time())

    async def run(self, confirming: Iterable[Key]) -> None:
        """Until the connection is lost, which is raised as PubSubError.

        Args:
            confirming: what somebody waits for.
        """
        wanted = self.hub.wanted
        self._initial.update(wanted.keys)
        self.change([*wanted.keys, *confirming])
        if not self._initial:
            self.hub.established()
        with self._telling_why():
            await self._read()

    @contextmanager
    def _telling_why(self) -> Iterator[None]:
        """Tells the broadcaster what ends the connection, if it is not the socket."""
        try:
            yield
        except RemoteProtocolError as e:
            self.socket.fail(4000 + e.status, str(e))
            raise ConnectionLost(f"the broadcaster broke the rules: {e}") from e
        except OSError as e:
            self.socket.fail(4507, "no room on the disk")
            raise ConnectionLost(f"cannot store a message (spool_directory): {e}") from e

    def end(self) -> list[_Notify]:
        """Frees everything but the socket; the messages that are to be sent again, in order."""
        if self._streaming is not None:
            self._streaming.cancel()
        self.session.close()
        self.socket.on_frames = _ignore
        if self._work is not None:
            self._work.close()
        while self._handed:  # none was acknowledged, and there is a gap anyway
            self._handed.popleft()[1].close()
        unfinished = self.session.unfinished
        if isinstance(unfinished, _Incoming):
            unfinished.spool.close()
        return self.unconfirmed()

    def unconfirmed(self) -> list[_Notify]:
        return [notify for notify in self._sent if not notify.result.done()]

    # subscriptions

    def has(self, key: Key) -> bool:
        """Whether the broadcaster has confirmed it, and nothing was asked since."""
        settled = key not in self._in_flight and key not in self._changing
        return settled and self._is_subscribed(key)

    def knows(self, key: Key) -> bool:
        """Whether the broadcaster has it, or may have it soon."""
        return key in self._in_flight or self._is_subscribed(key)

    def change(self, keys: Iterable[Key]) -> None:
        """Makes the broadcaster's mind about `keys` that of the hub."""
        self._changing.update(dict.fromkeys(keys))
        self.pump()

    def _is_subscribed(self, key: Key) -> bool:
        session = self.session
        return key in (session.topics if isinstance(key, bytes) else session.globs)

    def _send_change(self) -> None:
        key = next(iter(self._changing))
        del self._changing[key]
        session, now, wanted = self.session, time.time(), self.hub.is_wanted(key)
        if wanted is self._is_subscribed(key):
            if key not in self._in_flight:
                self._agreed(key)
            return
        try:
            if isinstance(key, bytes):
                ask = session.subscribe_exact if wanted else session.unsubscribe_exact
                frame = ask(key, now)
            else:
                ask_glob = session.subscribe_glob if wanted else session.unsubscribe_glob
                frame = ask_glob(key, now)
        except Exception as e:  # noqa: BLE001 of the authenticator; whoever waits gets it
            if not self.transport.refused(key, _told(e)):
                self.socket.abort(f"cannot ask for {key!r}: {e!r}")
            return
        self._expected.append(key)
        self._in_flight[key] = self._in_flight.get(key, 0) + 1
        self.socket.send(frame)

    def _changed(self, key: Key) -> None:
        self._in_flight[key] -= 1
        if self._in_flight[key] == 0:
            del self._in_flight[key]
            if key not in self._changing:
                self._agreed(key)

    def _agreed(self, key: Key) -> None:
        self.transport.confirmed(key)
        if key in self._initial:
            self._initial.discard(key)
            if not self._initial:
                self.hub.established()

    # sending

    def pump(self) -> None:
        """Sends what the window and the socket have room for."""
        waiting, most = self.transport.waiting, self.config.max_sent_notifications
        while not self._making_part and self._may_send:
            if self._changing:
                self._send_change()
            elif waiting and self._streaming is None and (most is None or len(self._sent) < most):
                self._send_message(waiting.popleft())
            else:
                return

    @property
    def _may_send(self) -> bool:
        """Whether there is room for one more frame that is to be answered."""
        session, socket = self.session, self.socket
        alive = socket.end is None and session.phase is _OPEN
        return alive and session.room > 0 and socket.writable.is_set()

    def _send_message(self, notify: _Notify) -> None:
        if notify.result.done():
            return  # nobody waits for it any more
        self._sent[notify] = None
        try:
            at_once = self._send_at_once(notify)
        except Exception as e:  # noqa: BLE001 whoever notifies gets it
            self._unsent(notify, e)
        else:
            if not at_once:
                self._streaming = self.transport.spawn(self._stream(notify))

    def _unsent(self, notify: _Notify, error: Exception) -> None:
        del self._sent[notify]
        notify.fail(_told(error))

    def _send_at_once(self, notify: _Notify) -> bool:
        """Sends a message as most are. False: it is not one of those."""
        content = notify.content
        compressor = self.session.compressor_for(content.length)
        data: bytes | memoryview | None = content.view
        if data is None or (compressor is not None and len(data) > INLINE):
            return False
        payload = _plain(notify)
        if compressor is not None:
            packed = compress(data, dictionary=compressor.dictionary, level=compressor.level)
            if pays(content.length, len(packed)):
                data, payload = packed, _packed(notify, compressor, Body.of(packed))
        if not self.session.one_frame(payload):
            return False
        self._send_whole(notify, payload, data)
        return True

    def _send_whole(self, notify: _Notify, payload: s.Payload, data: bytes | memoryview) -> None:
        frame = self.session.notify(payload, data, time.time())
        notify.maybe_sent = True
        self._expected.append(notify)
        self.socket.send(frame)

    async def _stream(self, notify: _Notify) -> None:
        """A message that needs time: to be read, compressed, or more frames than one."""
        packed = None
        try:
            payload, packed = await self._pack(notify)
            await self._room()
            while packed is not None and payload.compressor not in self.session.compressors:
                packed.close()  # the broadcaster has meanwhile taken back the dictionary
                payload, packed = await self._pack(notify)
                await self._room()
            source: Content | Body = packed or notify.content
            view = source.view if isinstance(source, Content) else source.data
            if notify.result.done():
                del self._sent[notify]  # nobody waits for it any more
            elif view is not None and self.session.one_frame(payload):
                self._send_whole(notify, payload, view)
            else:
                await self._send_parts(notify, payload, source)
        except Exception as e:  # noqa: BLE001 whoever notifies gets it
            self._unsent(notify, e)
        finally:
            self._streaming = None
            if packed is not None:
                packed.close()
        self.pump()

    async def _send_parts(
        self, notify: _Notify, payload: s.Payload, source: Content | Body
    ) -> None:
        self.session.open_stream(payload)
        notify.maybe_sent = True
        try:
            await self._send_rest(notify, source)
        except Exception as e:
            # the broadcaster waits for the rest, and there is no way to tell it
            self.socket.abort(f"a message could not be sent to its end: {e}")
            raise

    async def _send_rest(self, notify: _Notify, source: Content | Body) -> None:
        session = self.session
        while session.sending:
            await self._room()
            # nothing that is to be answered may be sent between making a part and sending it
            self._making_part = True
            try:
                part = session.next_part(time.time())
                self._expected.append(notify)
                data = await _read(source, part.offset, part.length)
                self.socket.send(b"".join((part.head, data)))
            finally:
                self._making_part = False
            if isinstance(source, Content):
                notify.report(part.offset + part.length)
            self.pump()

    async def _room(self) -> None:
        """Waits until one more frame may be sent; for ever, if the connection is over."""
        while not self._may_send:
            if self.socket.writable.is_set():
                self._progress.clear()
                await self._progress.wait()
            await self.socket.writable.wait()

    async def _pack(self, notify: _Notify) -> tuple[s.Payload, Body | None]:
        """What is sent for a message, and the compressed body if that is agreed."""
        content = notify.content
        compressor = self.session.compressor_for(content.length)
        if compressor is None:
            return _plain(notify), None
        if content.view is not None and content.length <= self.config.message_body_spool_size:
            data = await asyncio.to_thread(
                compress, content.view, dictionary=compressor.dictionary, level=compressor.level
            )
            body = Body.of(data)
        else:
            with self._spool(content.length + content.length // 128 + 1024) as spool:
                await asyncio.to_thread(_compress_to, spool, content, compressor)
                body = spool.seal()
        if not pays(content.length, body.length):
            body.close()
            return _plain(notify), None
        return _packed(notify, compressor, body), body

    # receiving

    async def _read(self) -> None:
        socket = self.socket
        socket.on_frames = self._arrived
        while True:
            while self._arrived():
                if self._work is not None:
                    work, self._work = self._work, None
                    await work
                else:
                    await asyncio.sleep(0)
            await socket.arrived()

    def _arrived(self) -> bool:
        """Deals with frames as long as nothing has to be waited for; whether the reader is needed,
        for `_work` or because there are many."""
        try:
            for _ in range(_BURST):
                if self._work is not None or (frame := self.socket.take()) is None:
                    break
                self._work = self._handle(self.session.receive(frame, time.time()))
            else:
                self.pump()
                return True
        except Exception as e:  # noqa: BLE001 the reader raises it
            self._work = _raise(e)
            return True
        self.pump()
        if self._work is None and not self.socket.writable.is_set():
            self._work = self._writable()  # no acknowledgements without end
        return self._work is not None

    async def _writable(self) -> None:
        await self.socket.writable.wait()

    def _handle(self, event: s.Event) -> Work | None:
        """Acts on an event; what is returned has to be waited for before the next."""
        if isinstance(event, s.Answered):
            self._answered(event.message)
        elif isinstance(event, s.BodyArrived):
            if not self._small_message(event):
                return self._message(event)
        elif isinstance(event, s.PartArrived):
            return self._part(event)
        elif isinstance(event, s.TopicMissed):
            logger.info("messages on %r may have been missed", event.topic)
            self.hub.missed(event.topic)
        return None

    async def _part(self, event: s.PartArrived) -> None:
        assert isinstance(event.sink, _Incoming)
        await event.sink.store()
        self._acknowledge(event)

    def _small_message(self, event: s.BodyArrived) -> bool:
        """A message as most are. False: it is not one of those."""
        if event.body is None or event.compressor is not None or self._must_hand_over:
            return False
        body = Body(bytes(event.body), None, len(event.body), event.head.sha512)
        self.hub.offer(event.head.topic, body, event.head.tracing)
        self._acknowledge(event)
        return True

    def _answered(self, message: m.Message) -> None:
        about = self._expected.popleft()
        self._progress.set()
        if isinstance(about, bytes | str):
            self._changed(about)
        elif isinstance(message, m.ConfirmNotify):
            del self._sent[about]
            about.report(about.content.length)
            if not about.result.done():
                about.result.set_result(message.subscribers)

    def _acknowledge(self, event: s.Owed) -> None:
        for frame in self.session.answer(event, time.time()):
            self.socket.send_late(frame, self.session.peer_window // _ACKS_PART)

    async def _message(self, event: s.BodyArrived) -> None:
        body = await self._body(event)
        if not self._must_hand_over:
            self.hub.offer(event.head.topic, body, event.head.tracing)
            self._acknowledge(event)
            return
        if body.data is not None:
            if self._handed_bytes + body.length > self.config.receive_buffer_bytes:
                body = await asyncio.to_thread(self._to_disk, body.data)
            else:
                self._handed_bytes += body.length
        self._handed.append((event, body))
        if self._handing is None:
            self._handing = self.transport.spawn(self._hand_over())

    @property
    def _must_hand_over(self) -> bool:
        """Whether the next message has to be awaited, or to wait behind one that has."""
        return self._handing is not None or self.hub.waits_for_receivers

    async def _hand_over(self) -> None:
        try:
            async with self.transport.handing_over:
                while self._handed:
                    event, body = self._handed.popleft()
                    if body.data is not None:
                        self._handed_bytes -= body.length
                    await self.hub.deliver(event.head.topic, body, event.head.tracing)
                    self._acknowledge(event)
        except Exception:
            logger.exception("delivering a message failed in an unforeseen way")
            self.socket.abort("an error of the client")
        finally:
            self._handing = None

    def _to_disk(self, data: bytes) -> Body:
        with Spool(len(data), memory_limit=-1, directory=self.config.spool_directory) as spool:
            spool.write(data)
            return spool.seal()

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
        assert isinstance(event.sink, _Incoming)
        with event.sink.spool as spool:
            await event.sink.store()
            body = spool.finish(head.sha512)
        if compressor is None:
            return body
        with closing(body):
            return await self._decompress(body.view(), compressor, head)

    async def _decompress(
        self, data: bytes | memoryview, compressor: s.Compressor, head: s.Head
    ) -> Body:
        def work() -> None:
            for piece in decompress_pieces(
                data,
                dictionary=compressor.dictionary,
                expected_length=head.decompressed_length,
                max_window_size=self.config.decompression_max_window_size,
            ):
                spool.write(piece)

        with self._spool(head.decompressed_length) as spool:
            await asyncio.to_thread(work)
            return spool.seal()

    def _spool(self, length: int) -> Spool:
        config = self.config
        return Spool(
            length,
            memory_limit=config.message_body_spool_size,
            directory=config.spool_directory,
        )


def _ignore() -> bool:
    return False


async def _raise(e: Exception) -> None:
    raise e


def _told(error: Exception) -> Exception:
    """What the program is told when something of it cannot be sent."""
    if isinstance(error, LocalProtocolError):
        return PubSubRequestRefusedError(f"cannot be sent over this websocket: {error}")
    return error


def _plain(notify: _Notify) -> s.Payload:
    content = notify.content
    return s.Payload(
        notify.topic, notify.identifier, content.length, content.sha512, tracing=notify.tracing
    )


def _packed(notify: _Notify, compressor: s.Compressor, body: Body) -> s.Payload:
    content = notify.content
    return s.Payload(
        notify.topic,
        notify.identifier,
        body.length,
        body.sha512,
        compressor.id,
        content.length,
        content.sha512,
        notify.tracing,
    )


def _compress_to(spool: Spool, content: Content, compressor: s.Compressor) -> None:
    """In a thread: a message too large for memory, compressed."""
    offsets = range(0, content.length, _CHUNK)
    chunks = (content.read(at, min(_CHUNK, content.length - at)) for at in offsets)
    for piece in compress_pieces(
        chunks,
        length=content.length,
        dictionary=compressor.dictionary,
        level=compressor.level,
    ):
        spool.write(piece)


async def _read(source: Content | Body, offset: int, length: int) -> bytes | memoryview:
    if isinstance(source, Content):
        if source.view is not None:
            return source.view[offset : offset + length]
        return await asyncio.to_thread(source.read, offset, length)
    if source.data is not None:
        return memoryview(source.data)[offset : offset + length]
    return await asyncio.to_thread(source.read_at, offset, length)
