"""What a program may rely on, whichever transport its config names: one suite for both."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from hashlib import sha512
from pathlib import Path
from typing import Any

import pytest

from client.fakes import KINDS
from interop.peers import write_secrets
from lonelypsc.client import PubSubClient
from lonelypsc.client import PubSubClientConnectionStatus as Status
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.ws_config import make_websocket_pub_sub_config
from lonelypsc.errors import (
    PubSubError,
    PubSubRequestConnectionAbandonedError,
    PubSubRequestError,
    PubSubRequestRefusedError,
)
from lonelypsc.http_client import HttpPubSubClient
from lonelypsc.ws_client import WebsocketPubSubClient
from lonelypsp.errors import LocalProtocolError
from lonelypss.config import BroadcasterConfig
from programs import free_port
from servers import our_broadcaster, read_auth

DEADLINE = 20.0


@dataclass
class World:
    """A real broadcaster, and clients of one transport."""

    transport: str
    url: str
    secrets: Path
    stack: AsyncExitStack

    def make(self, *, secrets: Path | None = None, url: str = "", **settings: Any) -> PubSubClient:
        auth = read_auth(secrets or self.secrets)
        url = url or self.url
        if self.transport == "websocket":
            url = url.replace("http", "ws", 1)
            return WebsocketPubSubClient(
                make_websocket_pub_sub_config(broadcasters=[{"host": url}], auth=auth, **settings)
            )
        return HttpPubSubClient(
            make_http_pub_sub_config(
                bind={"type": "uvicorn", "host": "127.0.0.1", "port": 0},
                host="http://127.0.0.1:{port}",
                broadcasters=[{"host": url}],
                auth=auth,
                **settings,
            )
        )

    async def client(self, **settings: Any) -> PubSubClient:
        return await self.stack.enter_async_context(self.make(**settings))


@pytest.fixture(params=["http", "websocket"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@asynccontextmanager
async def world_of(
    transport: str, directory: Path, kind: Any, **options: Any
) -> AsyncIterator[World]:
    secrets = write_secrets(directory, kind)
    config = BroadcasterConfig(db="sqlite://", **options)
    async with our_broadcaster(config, secrets=secrets) as ours, AsyncExitStack() as stack:
        async with asyncio.timeout(DEADLINE):
            yield World(transport, ours.url, secrets, stack)


@pytest.fixture
async def world(transport: str, tmp_path: Path) -> AsyncIterator[World]:
    async with world_of(transport, tmp_path, "hmac") as world:
        yield world


async def read(messages: Any) -> tuple[bytes, bytes]:
    message = await anext(messages)
    data = message.data.read()
    assert message.sha512 == sha512(data).digest()
    return message.topic, data


# Sending and receiving


@pytest.mark.parametrize("allowed", [True, False])
async def test_explained(transport: str, tmp_path: Path, allowed: bool) -> None:
    async with world_of(transport, tmp_path, "hmac", explain=allowed) as world:
        client = await world.client()
        async with client.subscribe(exact=[b"a"], glob=["*"]) as subscription:
            messages = await subscription.messages()
            result = await client.notify(topic=b"a", data=b"x", explain=True)
            assert result.notified == 1
            assert await read(messages) == (b"a", b"x")
            if transport == "http" and allowed:
                assert result.explanation is not None
                (one,) = result.explanation.subscribers
                assert (one.outcome, one.exact, one.globs) == ("delivered", True, ("*",))
            else:
                assert result.explanation is None
            assert (await client.notify(topic=b"a", data=b"x")).explanation is None


async def test_forwarded_too_often(transport: str, tmp_path: Path) -> None:
    async with world_of(transport, tmp_path, "hmac", max_hops=2) as world:
        client = await world.client()
        async with client.subscribe(exact=[b"a"]) as subscription:
            messages = await subscription.messages()
            await client.notify(topic=b"a", data=b"x")
            for _ in range(2):
                message = await anext(messages)
                await client.notify(topic=b"a", data=b"x", forwarding=message)
            message = await anext(messages)
            large = b"x" * 200_000  # which takes another way
            for data in (b"x", large):
                if transport == "http":
                    with pytest.raises(PubSubRequestRefusedError, match=r"508.*max_hops"):
                        await client.notify(topic=b"a", data=data, forwarding=message)
                else:
                    result = await client.notify(topic=b"a", data=data, forwarding=message)
                    assert result.notified == 0
            assert (await client.notify(topic=b"a", data=b"end")).notified == 1
            assert await read(messages) == (b"a", b"end")


@pytest.mark.parametrize("kind", KINDS)
async def test_exact_and_glob(transport: str, tmp_path: Path, kind: str) -> None:
    async with world_of(transport, tmp_path, kind) as world:
        client = await world.client()
        async with client.subscribe(exact=[b"foo/bar", b"\0\xff"], glob=["baz/*"]) as subscription:
            messages = await subscription.messages()
            for topic in (b"foo/bar", b"baz/1", b"\0\xff"):
                assert (await client.notify(topic=topic, data=b"on " + topic)).notified == 1
                assert await read(messages) == (topic, b"on " + topic)
            for topic in (b"foo", b"baz/1/2"):
                assert (await client.notify(topic=topic, data=b"x")).notified == 0


@pytest.mark.parametrize(
    "data",
    [b"", b"x", bytearray(b"y" * 1000), memoryview(b"z" * 70_000), bytes(range(256)) * 20_000],
    ids=["empty", "bytes", "bytearray", "memoryview", "5 MB"],
)
async def test_bodies(world: World, data: Any) -> None:
    client = await world.client(message_body_spool_size=1_000_000)
    async with client.subscribe_exact(b"t") as subscription:
        messages = await subscription.messages()
        assert (await client.notify(topic=b"t", data=data)).notified == 1
        assert await read(messages) == (b"t", bytes(data))


@pytest.mark.parametrize("known", [False, True], ids=["hashed here", "hash given"])
@pytest.mark.parametrize("size", [0, 1000, 9_000_000])
async def test_files(world: World, tmp_path: Path, size: int, known: bool) -> None:
    """From where the file stands, for as long as it is said; the program hears of the progress."""
    content = bytes(n % 251 for n in range(1000)) * (size // 1000)
    path = tmp_path / "file"
    path.write_bytes(b"before" + content + b"after")
    heard: list[tuple[int, int]] = []
    client = await world.client(message_body_spool_size=1_000_000)
    async with client.subscribe_exact(b"t") as subscription:
        messages = await subscription.messages()
        with path.open("rb") as file:
            file.seek(6)
            result = await client.notify(
                topic=b"t",
                sync_file=file,
                length=size,
                sha512=sha512(content).digest() if known else None,
                progress=lambda sent, total: heard.append((sent, total)),
            )
        assert result.notified == 1
        message = await anext(messages)
        assert message.data.seekable()
        assert message.data.seek(0, io.SEEK_END) == size
        message.data.seek(0)
        assert message.data.read() == content
    if size:
        assert heard[-1] == (size, size)
        assert heard == sorted(heard)


async def test_a_file_that_ends_too_soon(world: World, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(9_000_000))

    class Shrinking(io.FileIO):
        def read(self, size: int | None = -1) -> Any:
            return b"" if self.tell() > 4_000_000 else super().read(size)

    client = await world.client()
    with Shrinking(path) as file:
        with pytest.raises(ValueError, match="the file ends at"):
            await client.notify(
                topic=b"t", sync_file=file, sha512=sha512(bytes(9_000_000)).digest()
            )
    assert (await client.notify(topic=b"t", data=b"x")).notified == 0


async def test_order_is_kept(world: World) -> None:
    client = await world.client()
    async with client.subscribe_exact(b"t") as subscription:
        messages = await subscription.messages()
        for n in range(50):
            await client.notify(topic=b"t", data=b"%d" % n)
        assert [await read(messages) for _ in range(50)] == [(b"t", b"%d" % n) for n in range(50)]


async def test_many_at_once(world: World) -> None:
    client = await world.client()
    async with client.subscribe_exact(b"t") as subscription:
        messages = await subscription.messages()
        sent = [client.notify(topic=b"t", data=b"%d" % n) for n in range(300)]
        assert {result.notified for result in await asyncio.gather(*sent)} == {1}
        assert {await read(messages) for _ in range(300)} == {(b"t", b"%d" % n) for n in range(300)}


async def test_overlaps_and_several_subscriptions(world: World) -> None:
    """A client gets one copy, each of its subscriptions hands it over once."""
    one, two = await world.client(), await world.client()
    async with (
        one.subscribe(exact=[b"a/b"], glob=["a/*", "**"]) as first,
        one.subscribe_exact(b"a/b") as second,
        two.subscribe_glob("a/*") as third,
    ):
        iterators = [await s.messages() for s in (first, second, third)]
        for n in range(3):
            assert (await two.notify(topic=b"a/b", data=b"%d" % n)).notified == 2
        for messages in iterators:
            assert [(await read(messages))[1] for _ in range(3)] == [b"0", b"1", b"2"]


# Subscriptions


async def test_topics_come_and_go(world: World) -> None:
    client = await world.client()
    async with client.subscribe_multi() as subscription:
        messages = await subscription.messages()
        await subscription.subscribe_exact(b"a")
        await subscription.subscribe_glob("b*")
        assert (await client.notify(topic=b"a", data=b"1")).notified == 1
        assert (await client.notify(topic=b"bc", data=b"2")).notified == 1
        await subscription.unsubscribe_exact(b"a")
        assert (await client.notify(topic=b"a", data=b"3")).notified == 0
        await subscription.unsubscribe_glob("b*")
        assert (await client.notify(topic=b"bc", data=b"4")).notified == 0
        with pytest.raises(ValueError, match="not"):
            await subscription.unsubscribe_exact(b"a")
        assert [await read(messages), await read(messages)] == [(b"a", b"1"), (b"bc", b"2")]


async def test_leaving_unsubscribes(world: World) -> None:
    publisher, client = await world.client(), world.make()
    async with client:
        async with client.subscribe_exact(b"t"):
            assert (await publisher.notify(topic=b"t", data=b"")).notified == 1
        assert (await publisher.notify(topic=b"t", data=b"")).notified == 0
        await client.subscribe_exact(b"u").__aenter__()
        assert (await publisher.notify(topic=b"u", data=b"")).notified == 1
    async with asyncio.timeout(DEADLINE):  # a closed websocket is noticed a moment later
        while (await publisher.notify(topic=b"u", data=b"")).notified:
            pass


async def test_with_timeout(world: World) -> None:
    client = await world.client()
    async with client.subscribe_exact(b"t") as subscription:
        messages = await subscription.with_timeout(0.02)
        assert await anext(messages) is None
        await client.notify(topic=b"t", data=b"x")
        while (message := await anext(messages)) is None:
            pass
        assert message.data.read() == b"x"
        assert await anext(messages) is None


async def test_on_receiving_runs_first_and_after_an_overflow(world: World) -> None:
    gaps: list[int] = []
    seen: list[bytes] = []

    async def on_receiving() -> None:
        gaps.append(len(seen))

    client = await world.client(receive_buffer_messages=3)
    async with client.subscribe_exact(b"t", on_receiving=on_receiving) as subscription:
        messages = await subscription.messages()
        await client.notify(topic=b"t", data=b"first")
        seen.append((await read(messages))[1])
        assert gaps == [0]
        for n in range(6):
            await client.notify(topic=b"t", data=b"%d" % n)
        for _ in range(3):
            seen.append((await read(messages))[1])
        assert seen == [b"first", b"0", b"1", b"2"]
        assert gaps == [0, 1]
        await client.notify(topic=b"t", data=b"last")
        assert (await read(messages))[1] == b"last"


async def test_cancelled_waiting_loses_nothing(world: World) -> None:
    client = await world.client()
    async with client.subscribe_exact(b"t") as subscription:
        messages = await subscription.messages()
        for n in range(5):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.005):
                    await anext(messages)
            await client.notify(topic=b"t", data=b"%d" % n)
            assert await read(messages) == (b"t", b"%d" % n)


@pytest.mark.parametrize("act", ["notify", "subscribe"])
async def test_a_cancelled_call_hurts_nobody(world: World, act: str) -> None:
    client = await world.client()
    async with client.subscribe_exact(b"t") as subscription:
        messages = await subscription.messages()
        for turns in range(12):
            call: Any = (
                client.notify(topic=b"u", data=b"x")
                if act == "notify"
                else client.subscribe_exact(b"v").__aenter__()
            )
            task = asyncio.create_task(call)
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert (await client.notify(topic=b"t", data=b"%d" % turns)).notified == 1
            assert (await read(messages))[1] == b"%d" % turns


# Direct use


class Receiver:
    def __init__(self) -> None:
        self.got: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()
        self.states: asyncio.Queue[str] = asyncio.Queue()

    async def on_message(self, message: Any) -> None:
        self.got.put_nowait((message.topic, message.data.read()))
        await message.cleanup()

    async def on_connection_established(self) -> None:
        self.states.put_nowait("established")

    async def on_connection_lost(self) -> None:
        self.states.put_nowait("lost")

    async def on_connection_abandoned(self) -> None:
        self.states.put_nowait("abandoned")


async def test_direct_subscriptions_and_receivers(world: World) -> None:
    client = await world.client()
    receiver = Receiver()
    await client.direct_register_on_message(receiver=receiver)
    exact = await client.direct_subscribe_exact(topic=b"a")
    glob = await client.direct_subscribe_glob(glob="b*")
    for topic in (b"a", b"bc"):
        assert (await client.notify(topic=topic, data=b"x")).notified == 1
        assert await receiver.got.get() == (topic, b"x")
    await client.direct_unsubscribe_exact(subscription_id=exact)
    assert (await client.notify(topic=b"a", data=b"x")).notified == 0
    await client.direct_unsubscribe_glob(subscription_id=glob)
    assert (await client.notify(topic=b"bc", data=b"x")).notified == 0


async def test_a_failing_receiver_is_logged_and_the_message_confirmed(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Receiver):
        async def on_message(self, message: Any) -> None:
            await super().on_message(message)
            raise RuntimeError("a bug of the program")

    client, receiver = await world.client(), Failing()
    await client.direct_register_on_message(receiver=receiver)
    await client.direct_subscribe_exact(topic=b"a")
    for _ in range(2):
        assert (await client.notify(topic=b"a", data=b"x")).notified == 1
        assert await receiver.got.get() == (b"a", b"x")
    while "a bug of the program" not in caplog.text:
        await asyncio.sleep(0)


async def test_status(world: World) -> None:
    client, receiver = world.make(), Receiver()
    assert client.connection_status is Status.LOST
    async with client:
        await client.direct_register_status_handler(receiver=receiver)
        async with client.subscribe_exact(b"t"):
            assert client.connection_status is Status.OK
            assert await receiver.states.get() == "established"
    assert client.connection_status is Status.ABANDONED


# Errors


async def test_misuse_is_told_before_anything_is_sent(world: World) -> None:
    client = world.make()
    with pytest.raises(RuntimeError, match="enter"):
        await client.notify(topic=b"t", data=b"")
    async with client:
        with pytest.raises(RuntimeError, match="once"):
            await client.__aenter__()
        with pytest.raises(LocalProtocolError, match="topic: 65,536 bytes"):
            await client.notify(topic=bytes(65_536), data=b"")
        with pytest.raises(ValueError, match="exactly one of data and sync_file"):
            await client.notify(topic=b"t")
        with pytest.raises(ValueError, match="length is 5"):
            await client.notify(topic=b"t", data=b"abc", length=5)
        with pytest.raises(ValueError, match="sha512 must be 64 bytes"):
            await client.notify(topic=b"t", data=b"abc", sha512=b"short")
        async with client.subscribe_exact(b"t") as subscription:
            await subscription.messages()
            with pytest.raises(RuntimeError):
                await subscription.messages()


async def test_leaving_the_client_ends_what_waits(world: World) -> None:
    client = world.make()
    async with client:
        subscription = client.subscribe_exact(b"t")
        await subscription.__aenter__()
        waiting = asyncio.create_task(anext(await subscription.messages()))
        await asyncio.sleep(0)
    with pytest.raises(PubSubRequestConnectionAbandonedError):
        await waiting
    with pytest.raises((RuntimeError, PubSubError)):
        await client.notify(topic=b"t", data=b"")


@pytest.mark.parametrize("act", ["subscribe", "notify"])
@pytest.mark.parametrize("why", ["other secrets", "nobody there"])
async def test_what_cannot_be_done_is_an_error_that_says_why(
    world: World, tmp_path: Path, act: str, why: str
) -> None:
    settings: dict[str, Any] = {"secrets": write_secrets(tmp_path, "hmac")}
    if why == "nobody there":
        settings = {"url": f"http://127.0.0.1:{free_port()}"}
    retries = {"websocket": "outgoing_initial_connect_retries"}
    settings[retries.get(world.transport, "outgoing_retries_per_broadcaster")] = 1
    client = await world.client(**settings)
    with pytest.raises(PubSubRequestError) as caught:  # noqa: PT012 one of two calls
        if act == "notify":
            await client.notify(topic=b"t", data=b"x")
        else:
            await client.subscribe_exact(b"t").__aenter__()
    expected = "403" if why == "other secrets" else "127.0.0.1"
    assert expected in str(caught.value)


async def test_every_task_and_socket_ends_with_the_client(world: World) -> None:
    before = asyncio.all_tasks()
    async with world.make() as client, client.subscribe_exact(b"t") as subscription:
        messages = await subscription.messages()
        await client.notify(topic=b"t", data=b"x")
        await read(messages)
    deadline: Callable[[], set[Any]] = lambda: {  # noqa: E731
        t for t in asyncio.all_tasks() - before if "lonelypsc" in repr(t.get_coro())
    }
    assert not deadline()
