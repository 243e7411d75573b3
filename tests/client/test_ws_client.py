"""The websocket client against broadcasters that behave in every way that happens.

The ids D12 and so on are defects of the older client; what the other ones are, and where they are
tested: D17, D25, D26 and D36 are rules of the session (test_session_refusals.py,
test_session_signed.py), D22, D24 and D40 are the same over HTTP (test_both_transports.py).
"""

from __future__ import annotations

import asyncio
import builtins
import io
import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from websockets.asyncio.server import ServerConnection, serve

from lonelypsc import ws_client
from lonelypsc.client import PubSubClient, PubSubClientConnectionStatus
from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.ws_config import make_websocket_pub_sub_config
from lonelypsc.errors import (
    PubSubError,
    PubSubRequestAmbiguousError,
    PubSubRequestConnectionAbandonedError,
    PubSubRequestQueueFullError,
)
from lonelypsc.ws_client import WebsocketPubSubClient
from lonelypsp import messages as m
from lonelypsp import session as s
from lonelypsp.compression import compress
from lonelypsp.signing import AuthConfig, Nothing
from lonelypsp.spool import Body
from programs import free_port
from servers import our_broadcaster
from waiting import until

DEADLINE = 20.0
NOBODY = AuthConfigFromParts(Nothing(), Nothing())


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ws_client, "_RECONNECT_SPREAD", 0.0)


class Broadcaster:
    """Does what the test says with each connection.

    Attributes:
        script: what to do with the first connection, the second, and so on; the last for all
            that follow.
        confirmed: identifiers of notifies in the order in which they came, and on which connection.
    """

    def __init__(self, *script: Callable[[Conversation], Awaitable[None]]) -> None:
        self.script = list(script)
        self.connections = 0
        self.topics: list[bytes] = []
        self.url = ""

    async def handle(self, socket: ServerConnection) -> None:
        number = min(self.connections, len(self.script) - 1)
        self.connections += 1
        await self.script[number](Conversation(self, socket))


class Conversation:
    def __init__(self, broadcaster: Broadcaster, socket: ServerConnection) -> None:
        self.broadcaster = broadcaster
        self.socket = socket
        self.session = s.BroadcasterSession(AuthConfig(Nothing(), Nothing()))

    async def receive(self) -> s.Event:
        frame = await self.socket.recv()
        assert isinstance(frame, bytes)
        return self.session.receive(frame, time.time())

    async def open(self) -> None:
        assert isinstance(await self.receive(), s.Configured)
        await self.socket.send(self.session.confirm_configure(time.time()))

    async def answer(self, event: Any, **given: Any) -> None:
        for frame in self.session.answer(event, time.time(), **given):
            await self.socket.send(frame)

    async def deliver(self, topic: bytes, data: bytes) -> None:
        payload = s.Payload(topic, b"abcd", len(data), Body.of(data).sha512)
        await self.socket.send(self.session.deliver(payload, data, time.time()))

    async def next_message(self) -> s.BodyArrived:
        """Answers what comes before."""
        while not isinstance(event := await self.receive(), s.BodyArrived):
            if isinstance(event, s.SubscriptionAsked | s.PartArrived):
                await self.answer(event)
        self.broadcaster.topics.append(event.head.topic)
        return event


async def obey(talk: Conversation) -> None:
    """As a good one does, for ever."""
    await talk.open()
    while True:
        await talk.answer(await talk.next_message(), subscribers=1)


def close_with(code: int, reason: str) -> Callable[[Conversation], Awaitable[None]]:
    async def close(talk: Conversation) -> None:
        await talk.socket.close(code, reason)

    return close


@asynccontextmanager
async def broadcaster(
    *script: Callable[[Conversation], Awaitable[None]], **options: Any
) -> AsyncIterator[Broadcaster]:
    scripted = Broadcaster(*script)
    async with asyncio.timeout(DEADLINE):
        async with serve(scripted.handle, "127.0.0.1", 0, max_size=None, **options) as server:
            scheme = "wss" if "ssl" in options else "ws"
            scripted.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield scripted


def make(*urls: str, **settings: Any) -> PubSubClient:
    defaults = {
        "outgoing_min_reconnect_interval": 0.0,
        "outgoing_initial_connect_retries": 0,
        "websocket_close_timeout": 1.0,
        "auth": NOBODY,
    }
    hosts = [{"host": url, "priority": n} for n, url in enumerate(urls)]
    return WebsocketPubSubClient(
        make_websocket_pub_sub_config(broadcasters=hosts, **(defaults | settings))  # type: ignore[arg-type]
    )


class Statuses:
    def __init__(self) -> None:
        self.seen: list[str] = []

    async def on_connection_established(self) -> None:
        self.seen.append("established")

    async def on_connection_lost(self) -> None:
        self.seen.append("lost")

    async def on_connection_abandoned(self) -> None:
        self.seen.append("abandoned")


# Connecting


async def test_entering_needs_no_broadcaster() -> None:
    """An unreachable one is told to whoever asks for something."""
    async with make(f"ws://127.0.0.1:{free_port()}") as client:
        with pytest.raises(PubSubRequestConnectionAbandonedError, match="cannot connect"):
            await client.notify(topic=b"t", data=b"")
        assert client.connection_status is PubSubClientConnectionStatus.ABANDONED


async def test_without_the_package_entering_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    really = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "websockets":
            raise ImportError(f"No module named {name!r}")
        return really(name, *rest)

    client = make("ws://127.0.0.1:1")
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(PubSubError, match=r"pip install 'lonelypsc\[standard\]'"):
        await client.__aenter__()


async def test_tls_with_an_own_authority(tmp_path: Path) -> None:
    authority = trustme.CA()
    there = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(there)
    async with broadcaster(obey, ssl=there) as server:
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        async with make(server.url, ssl_context=trusting) as client:
            assert (await client.notify(topic=b"t", data=b"x")).notified == 1
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        async with make(server.url, tls_ca_file=str(tmp_path / "ca.pem")) as client:
            assert (await client.notify(topic=b"t", data=b"x")).notified == 1
        async with make(server.url) as client:
            with pytest.raises(PubSubRequestConnectionAbandonedError, match="certificate"):
                await client.notify(topic=b"t", data=b"x")


async def test_a_broadcaster_that_never_confirms_is_given_up() -> None:
    """D14 of the older client: it waits for ever."""

    async def hang(talk: Conversation) -> None:
        await talk.socket.wait_closed()

    async with broadcaster(hang, obey) as server:
        settings = {"websocket_open_timeout": 0.2, "outgoing_initial_connect_retries": 3}
        async with make(server.url, **settings) as client:
            assert (await client.notify(topic=b"t", data=b"")).notified == 1
        assert server.connections == 2


async def test_the_next_broadcaster_is_tried() -> None:
    async with broadcaster(close_with(4503, "no database")) as bad, broadcaster(obey) as good:
        nobody = f"ws://127.0.0.1:{free_port()}"
        async with make(nobody, bad.url, good.url) as client:
            assert (await client.notify(topic=b"t", data=b"")).notified == 1
        assert bad.connections == 1


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (close_with(4403, "authorization of CONFIGURE: forbidden"), "4403 authorization of CONF"),
        (close_with(4503, "later"), "4503 later"),
        (close_with(1012, "stopping"), "1012 stopping"),
        (lambda talk: talk.socket.send("text"), "text frame"),
        (lambda talk: talk.socket.send(b"\0\1\0\x63"), "broke the rules"),
    ],
)
async def test_why_all_was_given_up_is_told(script: Any, told: str) -> None:
    async with broadcaster(script) as server, make(server.url) as client:
        with pytest.raises(PubSubRequestConnectionAbandonedError) as caught:
            await client.subscribe_exact(b"t").__aenter__()
        assert told in str(caught.value)
        assert server.url in str(caught.value)


async def test_what_is_no_websocket() -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(http, "127.0.0.1", 0)
    async with server, make(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        with pytest.raises(PubSubRequestConnectionAbandonedError, match="404"):
            await client.notify(topic=b"t", data=b"")


async def test_pauses_between_rounds_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    class Quick:
        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

        async def sleep(self, seconds: float) -> None:
            pauses.append(seconds)

    monkeypatch.setattr(ws_client, "asyncio", Quick())
    async with make(f"ws://127.0.0.1:{free_port()}", outgoing_initial_connect_retries=8) as client:
        with pytest.raises(PubSubRequestConnectionAbandonedError):
            await client.notify(topic=b"t", data=b"")
    assert [int(p) for p in pauses] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert len(set(pauses)) == 8


async def test_a_name_that_no_host_can_have() -> None:
    """It counts as a failed try, not as a failure of the client."""
    async with broadcaster(obey) as server, make("ws://a..b", server.url) as client:
        assert (await client.notify(topic=b"t", data=b"")).notified == 1


async def test_retries_are_counted_until_a_connection_lasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that is confirmed and then broken is a failed try, too."""

    async def confirm_and_leave(talk: Conversation) -> None:
        await talk.open()
        await talk.socket.close(1012, "stopping")

    monkeypatch.setattr(ws_client, "_LONGEST_PAUSE", 0.0)
    monkeypatch.setattr("random.random", lambda: 0.0)
    settings = {"outgoing_min_reconnect_interval": 60, "outgoing_initial_connect_retries": 3}
    async with broadcaster(confirm_and_leave) as server, make(server.url, **settings) as client:
        statuses = Statuses()
        await client.direct_register_status_handler(receiver=statuses)
        await until(lambda: client.connection_status is PubSubClientConnectionStatus.ABANDONED)
        assert server.connections == 4
        await until(lambda: "abandoned" in statuses.seen)
        with pytest.raises(PubSubRequestConnectionAbandonedError, match="1012 stopping") as caught:
            await client.notify(topic=b"t", data=b"")
        assert len(caught.value.attempts) == 4
    assert statuses.seen.count("abandoned") == 1


# Reconnecting


async def test_what_is_not_confirmed_is_sent_again_in_order() -> None:
    """D16: the older client sends it in reverse order."""
    got: list[bytes] = []

    async def take_three(talk: Conversation) -> None:
        await talk.open()
        for _ in range(3):
            got.append((await talk.next_message()).head.topic)
        await talk.socket.close(1012, "")

    async with broadcaster(take_three, obey) as server, make(server.url) as client:
        await asyncio.gather(*(client.notify(topic=b"%d" % n, data=b"x") for n in range(6)))
        assert got == [b"0", b"1", b"2"]
        assert server.topics == [b"0", b"1", b"2", *(b"%d" % n for n in range(6))]


async def test_what_may_have_arrived_is_ambiguous_when_all_is_given_up() -> None:
    async def take_one(talk: Conversation) -> None:
        await talk.open()
        await talk.next_message()
        await talk.socket.close(1012, "")

    async with broadcaster(take_one, close_with(4503, "")) as server:
        async with make(server.url, max_sent_notifications=1) as client:
            sent = asyncio.create_task(client.notify(topic=b"1", data=b"x"))
            unsent = asyncio.create_task(client.notify(topic=b"2", data=b"x"))
            with pytest.raises(PubSubRequestAmbiguousError, match="sent, but not confirmed"):
                await sent
            with pytest.raises(PubSubRequestConnectionAbandonedError):
                await unsent


async def test_everything_is_subscribed_again_and_each_gap_told_once() -> None:
    runs = 0

    async def on_receiving() -> None:
        nonlocal runs
        runs += 1

    asked: list[set[bytes | str]] = []

    async def lose(talk: Conversation) -> None:
        await talk.open()
        wanted: set[bytes | str] = set()
        while len(wanted) < 3:
            event = await talk.receive()
            assert isinstance(event, s.SubscriptionAsked)
            await talk.answer(event)
            message = event.message
            wanted.add(message.topic if isinstance(message, m.SubscribeExact) else message.glob)  # type: ignore[union-attr]
        asked.append(wanted)
        await talk.deliver(b"a", b"%d" % len(asked))
        if len(asked) < 4:
            await talk.receive()
            await talk.socket.close(1012, "")
        else:
            await talk.next_message()

    async with broadcaster(lose) as server, make(server.url) as client:
        statuses = Statuses()
        await client.direct_register_status_handler(receiver=statuses)
        async with client.subscribe(
            exact=[b"a", b"b"], glob=["c*"], on_receiving=on_receiving
        ) as subscription:
            messages = await subscription.messages()
            for n in range(1, 5):
                assert (await anext(messages)).data.read() == b"%d" % n
                assert runs <= n
            assert runs == 4
            assert asked == [{b"a", b"b", "c*"}] * 4
            await until(lambda: statuses.seen[-1] == "established")
            # lost and established take turns
            assert statuses.seen == (["established", "lost"] * 4)[: len(statuses.seen)]
            assert client.connection_status is PubSubClientConnectionStatus.OK


async def test_own_messages_and_unsubscribes_are_no_gaps() -> None:
    """D19: the older client's status flips, and on_receiving runs."""
    statuses, runs = Statuses(), 0

    async def on_receiving() -> None:
        nonlocal runs
        runs += 1

    async with our_broadcaster() as ours:
        settings = {"max_websocket_message_size": 4096, "allow_compression": False}
        async with make(ours.url.replace("http", "ws"), **settings) as client:
            await client.direct_register_status_handler(receiver=statuses)
            async with client.subscribe_exact(b"t", on_receiving=on_receiving) as subscription:
                messages = await subscription.messages()
                for _ in range(3):
                    assert (await client.notify(topic=b"t", data=bytes(50_000))).notified == 1
                    assert len((await anext(messages)).data.read()) == 50_000
                    async with client.subscribe_exact(b"other"):
                        pass
            assert runs == 1
            assert statuses.seen in ([], ["established"])


async def test_a_missed_notice_is_told_at_once() -> None:
    """D15: the older client looks at it when something else comes."""
    runs = asyncio.Semaphore(0)

    async def on_receiving() -> None:
        runs.release()

    async with asyncio.timeout(DEADLINE), our_broadcaster() as ours:
        async with make(ours.url.replace("http", "ws")) as client:
            async with client.subscribe_exact(b"t", on_receiving=on_receiving) as subscription:
                waiting = asyncio.ensure_future(anext(await subscription.messages()))
                await runs.acquire()
                ours.broadcaster.websockets.missed(b"t")
                await runs.acquire()
                waiting.cancel()


# Bounds


async def test_one_more_unsent_message_is_refused() -> None:
    release = asyncio.Event()

    async def slow(talk: Conversation) -> None:
        await talk.open()
        await release.wait()
        while True:
            await talk.answer(await talk.next_message(), subscribers=1)

    async with broadcaster(slow) as server:
        settings = {"max_sent_notifications": 2, "max_unsent_notifications": 3}
        async with make(server.url, **settings) as client:
            await client_is_connected(client)
            calls = [asyncio.create_task(client.notify(topic=b"t", data=b"")) for _ in range(5)]
            await asyncio.sleep(0)
            await until(lambda: len(client._transport.waiting) == 3)  # type: ignore[attr-defined]
            with pytest.raises(PubSubRequestQueueFullError, match="max_unsent_notifications"):
                await client.notify(topic=b"t", data=b"")
            with pytest.raises(asyncio.QueueFull):  # what the older client raises
                await client.notify(topic=b"t", data=b"")
            release.set()
            assert [r.notified for r in await asyncio.gather(*calls)] == [1] * 5


async def client_is_connected(client: Any) -> None:
    await until(lambda: client._transport.link is not None)


async def test_a_small_window_is_no_obstacle() -> None:
    """D39: parts of a large message that exceed it cost the older client its connection."""
    async with asyncio.timeout(DEADLINE), our_broadcaster() as ours:
        settings = {
            "max_expected_acks": 1,
            "max_websocket_message_size": 4096,
            "allow_compression": False,
        }
        async with make(ours.url.replace("http", "ws"), **settings) as client:
            async with client.subscribe(
                exact=[b"%d" % n for n in range(20)], glob=["t*"]
            ) as subscription:
                messages = await subscription.messages()
                sent = [client.notify(topic=b"t", data=bytes([n]) * 100_000) for n in range(5)]
                assert [r.notified for r in await asyncio.gather(*sent)] == [1] * 5
                got = {(await anext(messages)).data.read() for _ in range(5)}
                assert got == {bytes([n]) * 100_000 for n in range(5)}


async def test_more_than_fits_is_read_later() -> None:
    """D29: in the older client exceeding `max_received` ends all delivery without a word."""
    async with asyncio.timeout(DEADLINE), our_broadcaster() as ours:
        url = ours.url.replace("http", "ws")
        async with make(url, max_received=2) as receiver, make(url) as sender:
            held = asyncio.Event()
            got: list[bytes] = []

            class Slow:
                async def on_message(self, message: Any) -> None:
                    await held.wait()
                    got.append(message.data.read())
                    await message.cleanup()

            await receiver.direct_register_on_message(receiver=Slow())
            await receiver.direct_subscribe_exact(topic=b"t")
            sent = [sender.notify(topic=b"t", data=b"%d" % n) for n in range(200)]
            assert {r.notified for r in await asyncio.gather(*sent)} == {1}
            held.set()
            await until(lambda: len(got) == 200)
            assert got == [b"%d" % n for n in range(200)]


async def test_a_dictionary_that_is_taken_back_while_it_is_used() -> None:
    """The message is packed again."""
    data = b"0123456789" * 20_000
    used: list[int] = []
    withdrawn, packed = asyncio.Event(), asyncio.Event()

    async def withdraw(talk: Conversation) -> None:
        talk.session = s.BroadcasterSession(
            AuthConfig(Nothing(), Nothing()), allow_zstd=True, allow_training=True
        )
        await talk.open()
        await talk.socket.send(
            talk.session.enable_custom(65_536, b"d" * 500, time.time(), level=3, min_size=32)
        )
        await packed.wait()
        await talk.socket.send(talk.session.disable_custom(65_536, time.time()))
        withdrawn.set()
        event = await talk.next_message()
        used.append(event.head.compressor)
        await talk.answer(event, subscribers=1)
        await talk.next_message()

    async with broadcaster(withdraw) as server, make(server.url) as client:
        await client_is_connected(client)
        link: Any = client._transport.link  # type: ignore[attr-defined]
        await until(lambda: 65_536 in link.session.compressors)
        really = link._pack

        async def slowly(notify: Any) -> Any:
            result = await really(notify)
            packed.set()
            await until(lambda: 65_536 not in link.session.compressors)
            return result

        link._pack = slowly
        assert (await client.notify(topic=b"t", data=data)).notified == 1
        assert used == [0]


async def test_many_at_once_do_not_flood_the_broadcaster() -> None:
    """D12: an older broadcaster disconnects above 255 unanswered messages."""
    window, total = 128, 1000
    too_many: list[bytes | str] = []

    async def answer_at_the_last_moment(talk: Conversation) -> None:
        await talk.open()
        for done in range(0, total, window):
            events = [await talk.next_message() for _ in range(min(window, total - done))]
            with suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    too_many.append(await talk.socket.recv())
            for event in events:
                await talk.answer(event, subscribers=1)
        await talk.socket.wait_closed()

    async with broadcaster(answer_at_the_last_moment) as server, make(server.url) as client:
        calls = (client.notify(topic=b"t", data=b"x") for _ in range(total))
        assert {r.notified for r in await asyncio.gather(*calls)} == {1}
        assert not too_many
        assert server.connections == 1


async def test_a_disk_without_room_costs_the_connection_and_not_the_client(tmp_path: Path) -> None:
    closed: asyncio.Queue[Any] = asyncio.Queue()

    async def send_large(talk: Conversation) -> None:
        await talk.open()
        data = bytes(10_000)
        payload = s.Payload(b"t", b"abcd", len(data), Body.of(data).sha512)
        talk.session.limits = s.Limits(frame_length=4096)
        talk.session.open_stream(payload)
        part = talk.session.next_part(time.time())
        await talk.socket.send(part.head + data[: part.length])
        await talk.socket.wait_closed()
        closed.put_nowait((talk.socket.close_code, talk.socket.close_reason))

    settings = {"spool_directory": str(tmp_path / "absent"), "message_body_spool_size": 0}
    async with broadcaster(send_large, obey) as server, make(server.url, **settings) as client:
        assert (await client.notify(topic=b"t", data=b"")).notified == 1
        assert server.connections == 2
        assert await closed.get() == (4507, "no room on the disk")


# What the program does


async def test_a_receiver_may_notify() -> None:
    """The answer is read while the receiver is awaited, behind however many messages."""
    got: list[bytes] = []

    async with asyncio.timeout(DEADLINE), our_broadcaster() as ours:
        url = ours.url.replace("http", "ws")
        # the second message, and those that follow while the first is looked at, wait on disk
        async with make(url, receive_buffer_bytes=1) as client, make(url) as other:

            class Echo:
                async def on_message(self, message: Any) -> None:
                    got.append(message.data.read())
                    await message.cleanup()
                    if message.topic == b"question":
                        assert (await client.notify(topic=b"answer", data=got[-1])).notified == 1

            await client.direct_register_on_message(receiver=Echo())
            await client.direct_subscribe_glob(glob="*")
            for asked in range(0, 100, 20):
                questions = (
                    other.notify(topic=b"question", data=b"%d" % n)
                    for n in range(asked, asked + 20)
                )
                await asyncio.gather(*questions)
            await until(lambda: len(got) == 200)
            assert Counter(got) == {b"%d" % n: 2 for n in range(100)}


async def test_a_receiver_at_work_when_the_connection_is_lost() -> None:
    """It ends its work; what waited behind it was not acknowledged; order is kept."""
    go, got = asyncio.Event(), []

    async def deliver(talk: Conversation) -> None:
        await talk.open()
        number = talk.broadcaster.connections
        for n in range(3):
            await talk.deliver(b"t", b"%d.%d" % (number, n))
        if number == 1:
            await until(lambda: begun.is_set())
            await talk.socket.close(1012, "")
        else:
            go.set()
            await talk.socket.wait_closed()

    begun = asyncio.Event()

    class Slow:
        async def on_message(self, message: Any) -> None:
            begun.set()
            await go.wait()
            got.append(message.data.read())
            await message.cleanup()

    async with broadcaster(deliver) as server, make(server.url) as client:
        await client.direct_register_on_message(receiver=Slow())
        await until(lambda: len(got) == 4)
        assert got == [b"1.0", b"2.0", b"2.1", b"2.2"]


async def test_leaving_while_a_receiver_is_at_work() -> None:
    async def deliver(talk: Conversation) -> None:
        await talk.open()
        await talk.deliver(b"t", b"1")
        await talk.deliver(b"t", b"2")
        await talk.socket.wait_closed()

    begun, ended = asyncio.Event(), []

    class Endless:
        async def on_message(self, message: Any) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                await message.cleanup()
                ended.append(message)

    async with broadcaster(deliver) as server:
        async with make(server.url) as client:
            await client.direct_register_on_message(receiver=Endless())
            await begun.wait()
        assert len(ended) == 1


@pytest.mark.parametrize("size", [1, 300_000])
async def test_what_progress_raises_notify_raises(size: int) -> None:
    def progress(sent: int, of: int) -> None:
        raise KeyError("of the program")

    settings = {"max_websocket_message_size": 100_000}
    async with broadcaster(obey) as server, make(server.url, **settings) as client:
        with pytest.raises(KeyError, match="of the program"):
            await client.notify(topic=b"t", data=bytes(size), progress=progress)
        assert (await client.notify(topic=b"t", data=b"")).notified == 1
        assert server.connections == 1


@pytest.mark.parametrize("large", [False, True])
async def test_what_an_authenticator_raises_the_call_raises(large: bool) -> None:
    """It is nobody else's call that fails, and the connection stays."""

    class Fails(Nothing):
        def authorize(self, operation: str, fields: Any, now: float) -> str | None:
            if fields.get("topic") == b"bad":
                raise RuntimeError("no key")
            return None

    data = bytes(200_000 if large else 1)
    auth = AuthConfigFromParts(Nothing(), Fails())
    settings = {"auth": auth, "max_websocket_message_size": 50_000, "max_sent_notifications": 1}
    async with broadcaster(obey) as server, make(server.url, **settings) as client:
        await client_is_connected(client)
        good = [asyncio.create_task(client.notify(topic=b"good", data=data)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="no key"):
            await client.notify(topic=b"bad", data=b"x")
        assert [(await task).notified for task in good] == [1, 1]
        with pytest.raises(RuntimeError, match="no key"):
            await client.subscribe_exact(b"bad").__aenter__()
        await client.direct_subscribe_exact(topic=b"fine")
        assert server.connections == 1


@pytest.mark.parametrize("moment", ["asked", "answered"])
async def test_a_cancelled_subscribe_is_taken_back(moment: str) -> None:
    seen: asyncio.Queue[str] = asyncio.Queue()
    go = asyncio.Event()

    async def slow(talk: Conversation) -> None:
        await talk.open()
        while True:
            event = await talk.receive()
            assert isinstance(event, s.SubscriptionAsked)
            seen.put_nowait(type(event.message).__name__)
            await go.wait()
            await talk.answer(event)

    async with broadcaster(slow) as server, make(server.url) as client:
        subscribing = asyncio.create_task(client.subscribe_exact(b"t").__aenter__())
        assert await seen.get() == "SubscribeExact"
        if moment == "answered":
            transport: Any = client._transport
            (future,) = transport._confirming.values()
            future.add_done_callback(lambda _: subscribing.cancel())
            go.set()
        else:
            subscribing.cancel()
        await asyncio.wait((subscribing,))
        assert subscribing.cancelled()
        go.set()
        assert await seen.get() == "UnsubscribeExact"
        assert client.exact_subscriptions == {}


# Large messages


async def test_a_large_file_is_sent_again_from_where_it_began() -> None:
    """D16: the older client does not rewind it."""
    got: list[bytes] = []

    async def break_off(talk: Conversation) -> None:
        await talk.open()
        part = await talk.receive()
        assert isinstance(part, s.PartArrived)
        await talk.answer(part)
        await talk.receive()
        await talk.socket.close(1012, "")

    async def take(talk: Conversation) -> None:
        await talk.open()
        event = await talk.next_message()
        assert isinstance(event.sink, io.BytesIO)
        got.append(event.sink.getvalue())
        await talk.answer(event, subscribers=1)
        await talk.next_message()

    data = bytes(range(256)) * 1000
    file = io.BytesIO(b"head" + data)
    file.seek(4)
    settings = {"max_websocket_message_size": 50_000}
    async with broadcaster(break_off, take) as server, make(server.url, **settings) as client:
        assert (await client.notify(topic=b"t", sync_file=file)).notified == 1
        assert got == [data]


async def test_a_cancelled_large_message_stops_before_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While it is packed; one that was begun has to be sent to its end."""
    packing, cancelled = threading.Event(), threading.Event()

    def pack(*given: Any, **options: Any) -> bytes:
        packing.set()
        assert cancelled.wait(DEADLINE)
        return compress(*given, **options)

    monkeypatch.setattr(ws_client, "compress", pack)

    async def enable(talk: Conversation) -> None:
        talk.session = s.BroadcasterSession(AuthConfig(Nothing(), Nothing()), allow_zstd=True)
        await talk.open()
        await talk.socket.send(talk.session.enable_preset(1, time.time(), level=3, min_size=32))
        while True:
            await talk.answer(await talk.next_message(), subscribers=1)

    async with broadcaster(enable) as server, make(server.url) as client:
        await client_is_connected(client)
        link: Any = client._transport.link  # type: ignore[attr-defined]
        await until(lambda: link.session.compressors)
        call = asyncio.create_task(client.notify(topic=b"cancelled", data=bytes(3_000_000)))
        await until(packing.is_set)
        call.cancel()
        await asyncio.wait((call,))
        cancelled.set()
        assert (await client.notify(topic=b"t", data=b"")).notified == 1
        assert server.topics == [b"t"]
        assert not link._sent


# Compression


class Compressing:
    """Enables zstd without a dictionary, and a preset one; returns every message as it came."""

    PRESET = b"a dictionary may be any bytes: 0123456789" * 10

    def __init__(self) -> None:
        self.used: list[int] = []
        self.asked: list[tuple[bool, bool, int]] = []

    async def __call__(self, talk: Conversation) -> None:
        session = talk.session = s.BroadcasterSession(
            AuthConfig(Nothing(), Nothing()), allow_zstd=True, presets={7: self.PRESET}
        )
        configured = await talk.receive()
        assert isinstance(configured, s.Configured)
        ask = configured.message
        self.asked.append((ask.enable_zstd, ask.enable_training, ask.initial_dict))
        await talk.socket.send(session.confirm_configure(time.time()))
        if configured.zstd:
            for frame in (
                session.enable_preset(1, time.time(), level=3, min_size=10_000),
                session.enable_preset(7, time.time(), level=5, min_size=32, max_size=10_000),
            ):
                await talk.socket.send(frame)
        while True:
            event = await talk.next_message()
            self.used.append(event.head.compressor)
            body = event.body if event.sink is None else event.sink.getvalue()  # type: ignore[attr-defined]
            assert body is not None
            await talk.answer(event, subscribers=1)
            await self.give_back(talk, event.head, bytes(body))

    async def give_back(self, talk: Conversation, head: s.Head, body: bytes) -> None:
        payload = s.Payload(head.topic, head.identifier, len(body), head.sha512)
        if head.compressor:
            payload.compressor = head.compressor
            payload.decompressed_length = head.decompressed_length
            payload.decompressed_sha512 = head.sha512
        talk.session.limits = s.Limits(frame_length=20_000)
        talk.session.open_stream(payload)
        while talk.session.sending:
            part = talk.session.next_part(time.time())
            await talk.socket.send(part.head + body[part.offset : part.offset + part.length])


NOISE = random.Random(1).randbytes(300_000)
COMPRESSED = [
    # what is sent, with which compressor
    (b"x" * 5, 0),
    (b"0123456789" * 20, 7),
    (b"0123456789" * 5_000, 1),
    (b"0123456789" * 20_000, 1),
    (NOISE[:30_000], 0),  # does not pay
    (NOISE, 0),
    (NOISE[:200_000] + bytes(200_000), 1),
    (NOISE[:10_000] + bytes(3_000_000), 1),
    (bytes(1_200_000), 0),  # a receiver would take it for an attack
]


@pytest.mark.parametrize("source", ["data", "sync_file"])
@pytest.mark.parametrize("spool", [50_000, 10_000_000])
async def test_compression(source: str, spool: int) -> None:
    """Both ways, of all sizes, from memory and from disk, in one frame and in parts."""
    there = Compressing()
    settings = {
        "compression_dictionary_by_id": {7: (there.PRESET, 5)},
        "initial_compression_dict_id": 7,
        "message_body_spool_size": spool,
        "max_websocket_message_size": 100_000,
    }
    async with broadcaster(there) as server, make(server.url, **settings) as client:
        got: asyncio.Queue[bytes] = asyncio.Queue()

        class Receiver:
            async def on_message(self, message: Any) -> None:
                got.put_nowait(message.data.read())
                await message.cleanup()

        await client.direct_register_on_message(receiver=Receiver())
        await client_is_connected(client)
        link: Any = client._transport.link  # type: ignore[attr-defined]
        await until(lambda: len(link.session.compressors) == 2)
        for data, _ in COMPRESSED:
            given: Any = {source: data if source == "data" else io.BytesIO(data)}
            assert (await client.notify(topic=b"t", **given)).notified == 1
            assert await got.get() == data
        assert there.used == [compressor for _, compressor in COMPRESSED]
        assert there.asked == [(True, True, 7)]


@pytest.mark.parametrize("why", ["setting", "no zstandard"])
async def test_without_compression(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "no zstandard":
        monkeypatch.setattr(ws_client, "available", lambda: False)
    there = Compressing()
    async with broadcaster(there) as server:
        async with make(server.url, allow_compression=why != "setting") as client:
            assert (await client.notify(topic=b"t", data=bytes(100_000))).notified == 1
    assert there.used == [0]
    assert there.asked == [(False, False, 0)]


@pytest.mark.parametrize("declared", [1000, 1_000_000])
async def test_a_bomb_costs_the_connection(declared: int) -> None:
    """More than was declared: it is not unpacked any further, and the client goes on."""
    closed: asyncio.Queue[Any] = asyncio.Queue()

    async def bomb(talk: Conversation) -> None:
        session = talk.session = s.BroadcasterSession(
            AuthConfig(Nothing(), Nothing()), allow_zstd=True
        )
        await talk.open()
        await talk.socket.send(session.enable_preset(1, time.time(), level=3, min_size=0))
        packed = compress(bytes(100_000_000), dictionary=None, level=3)
        hashed = Body.of(packed).sha512
        payload = s.Payload(b"t", b"abcd", len(packed), hashed, 1, declared, bytes(64))
        await talk.socket.send(session.deliver(payload, packed, time.time()))
        await talk.socket.wait_closed()
        closed.put_nowait(talk.socket.close_code)

    async with broadcaster(bomb, obey) as server, make(server.url) as client:
        assert await closed.get() == 4400
        assert (await client.notify(topic=b"t", data=b"")).notified == 1


# Leaving


async def test_leaving_says_goodbye() -> None:
    codes: asyncio.Queue[Any] = asyncio.Queue()

    async def listen(talk: Conversation) -> None:
        await talk.open()
        await talk.socket.wait_closed()
        codes.put_nowait(talk.socket.close_code)

    async with broadcaster(listen) as server:
        async with make(server.url) as client:
            await client_is_connected(client)
        assert await codes.get() == 1000


@pytest.mark.parametrize("turns", range(1, 7))
async def test_a_cancelled_leaving_leaves_nothing_behind(turns: int) -> None:
    async def mute(talk: Conversation) -> None:
        await talk.open()
        talk.socket.transport.pause_reading()
        await gone.wait()
        talk.socket.transport.abort()  # what does not read does not notice the end

    gone = asyncio.Event()
    async with broadcaster(mute, close_timeout=0.1) as server:
        client = make(server.url, websocket_close_timeout=None)
        await client.__aenter__()
        await client_is_connected(client)
        socket = client._transport.link.socket  # type: ignore[attr-defined]
        leaving = asyncio.create_task(client.__aexit__(None, None, None))
        for _ in range(turns):
            await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait((leaving,))
        assert not client._transport._tasks  # type: ignore[attr-defined]
        await socket._gone
        gone.set()


async def test_leaving_with_direct_subscriptions() -> None:
    """D23: the older client raises."""
    async with broadcaster(obey) as server:
        async with make(server.url) as client:
            await client.direct_subscribe_exact(topic=b"t")
            await client.direct_subscribe_glob(glob="*")


async def test_leaving_waits_a_bounded_time_for_a_goodbye() -> None:
    async def mute(talk: Conversation) -> None:
        await talk.open()
        talk.socket.transport.pause_reading()
        await left.wait()
        talk.socket.transport.abort()

    left = asyncio.Event()

    async with broadcaster(mute, close_timeout=0.1) as server:
        async with make(server.url, websocket_close_timeout=0.1) as client:
            await client_is_connected(client)
            started = time.monotonic()
        assert time.monotonic() - started < 5
        left.set()


@pytest.mark.parametrize("turns", range(0, 30, 3))
async def test_entering_and_leaving_at_any_moment(turns: int) -> None:
    async with broadcaster(obey) as server:
        async with make(server.url) as client:
            calls = [
                asyncio.create_task(client.notify(topic=b"t", data=b"x")),
                asyncio.create_task(client.subscribe_exact(b"t").__aenter__()),
            ]
            for _ in range(turns):
                await asyncio.sleep(0)
        done, _ = await asyncio.wait(calls)
        for task in done:
            expected = (PubSubError, RuntimeError) if turns == 0 else PubSubError
            assert task.exception() is None or isinstance(task.exception(), expected)


async def test_a_cancelled_notify_is_harmless() -> None:
    """D13: the late answer ends the older client."""
    answers: asyncio.Queue[None] = asyncio.Queue()

    async def slow(talk: Conversation) -> None:
        await talk.open()
        while True:
            event = await talk.next_message()
            await answers.get()
            await talk.answer(event, subscribers=1)

    async with broadcaster(slow) as server, make(server.url) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.notify(topic=b"t", data=b"x")
        answers.put_nowait(None)
        answers.put_nowait(None)
        assert (await client.notify(topic=b"u", data=b"x")).notified == 1
        assert server.connections == 1
