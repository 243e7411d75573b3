"""Subscriptions and messages: order, cancelling, gaps, leaving."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lonelypsc.client import (
    PubSubClient,
    PubSubError,
    PubSubRequestConnectionAbandonedError,
    PubSubRequestRefusedError,
)
from lonelypsc.content import Content
from lonelypsp.errors import LocalProtocolError
from lonelypsp.explain import Explanation
from lonelypsp.interests import Topics
from lonelypsp.spool import Body

DEADLINE = 5.0


class Transport:
    """Remembers what was asked for; `fail` is raised by the next request."""

    def __init__(self) -> None:
        self.hub: Any = None
        self.calls: list[tuple[str, Topics | None]] = []
        self.fail: BaseException | None = None
        self.hold: asyncio.Event | None = None
        self.entered = asyncio.Event()

    async def start(self, hub: Any) -> None:
        self.hub = hub
        hub.established()

    async def stop(self) -> None:
        self.calls.append(("stop", None))

    async def ensure(self, topics: Topics) -> None:
        await self._note("ensure", topics)

    async def release(self, topics: Topics) -> None:
        await self._note("release", topics)

    async def _note(self, verb: str, topics: Topics) -> None:
        self.calls.append((verb, topics))
        self.entered.set()
        if self.hold is not None:
            await self.hold.wait()
        if self.fail is not None:
            failure, self.fail = self.fail, None
            raise failure

    async def notify(
        self, topic: bytes, content: Content, explain: bool, tracing: bytes = b""
    ) -> tuple[int, Explanation | None]:
        return content.length, Explanation(()) if explain else None

    async def send(self, data: bytes, topic: bytes = b"a") -> bool:
        taken: bool = await self.hub.deliver(topic, Body.of(data))
        return taken


@pytest.fixture
def transport() -> Transport:
    return Transport()


@pytest.fixture
async def client(transport: Transport) -> AsyncIterator[PubSubClient]:
    async with PubSubClient(transport, receive_buffer_messages=3) as client:
        yield client


async def soon(awaitable: Any) -> Any:
    async with asyncio.timeout(DEADLINE):
        return await awaitable


async def test_messages_come_in_order_and_end_with_the_next(
    client: PubSubClient, transport: Transport
) -> None:
    async with client.subscribe_exact(b"a", b"b") as subscription:
        messages = await subscription.messages()
        await transport.send(b"1")
        await transport.send(b"2", b"b")
        first = await soon(messages.__anext__())
        assert (first.topic, first.data.read(1), first.data.tell()) == (b"a", b"1", 1)
        first.data.seek(0)
        assert first.data.read() == b"1"
        second = await soon(messages.__anext__())
        assert first.data.closed
        assert second.data.read() == b"2"
    assert second.data.closed


async def test_kept_from_entering_on(client: PubSubClient, transport: Transport) -> None:
    transport.hold = asyncio.Event()
    subscription = client.subscribe_exact(b"a")
    entering = asyncio.create_task(subscription.__aenter__())
    await soon(transport.entered.wait())
    assert transport.hub.wants(b"a")
    assert transport.hub.wanted == Topics.of([b"a"])
    await transport.send(b"early")
    transport.hold.set()
    await soon(entering)
    message = await soon((await subscription.messages()).__anext__())
    assert message.data.read() == b"early"
    await subscription.__aexit__(None, None, None)


@pytest.mark.parametrize("how", ["refused", "cancelled"])
async def test_a_wish_that_fails_is_undone(
    client: PubSubClient, transport: Transport, how: str
) -> None:
    subscription = client.subscribe(exact=[b"a"], glob=["b/*"])
    if how == "refused":
        transport.fail = PubSubRequestRefusedError("no")
        with pytest.raises(PubSubRequestRefusedError):
            await subscription.__aenter__()
    else:
        transport.hold = asyncio.Event()
        entering = asyncio.create_task(subscription.__aenter__())
        await soon(transport.entered.wait())
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
    assert not transport.hub.wants(b"a")
    assert not transport.hub.wants(b"b/1")
    assert client.exact_subscriptions == client.glob_subscriptions == {}


async def test_every_change_of_a_subscription_is_one_request(
    client: PubSubClient, transport: Transport
) -> None:
    subscription = client.subscribe_multi()
    await subscription.subscribe_exact(b"a")
    await subscription.subscribe_exact(b"z")
    await subscription.subscribe_glob("b/*")
    await subscription.unsubscribe_exact(b"z")
    async with subscription:
        await subscription.subscribe_exact(b"c")
        await subscription.subscribe_exact(b"c")
        await subscription.unsubscribe_glob("b/*")
        with pytest.raises(ValueError, match="not in this subscription: 'b/"):
            await subscription.unsubscribe_glob("b/*")
        with pytest.raises(ValueError, match="not in"):
            await subscription.unsubscribe_exact(b"z")
    assert transport.calls == [
        ("ensure", Topics.of([b"a"], ["b/*"])),
        ("ensure", Topics.of([b"c"])),
        ("release", Topics.of([], ["b/*"])),
        ("release", Topics.of([b"a", b"c"])),
    ]


async def test_an_empty_subscription_sends_nothing(
    client: PubSubClient, transport: Transport
) -> None:
    async with client.subscribe_multi():
        pass
    assert transport.calls == []


async def test_what_is_given_up_is_received_until_the_broadcaster_answered(
    client: PubSubClient, transport: Transport
) -> None:
    subscription = await client.subscribe_exact(b"a").__aenter__()
    transport.hold = asyncio.Event()
    transport.entered.clear()
    leaving = asyncio.create_task(subscription.__aexit__(None, None, None))
    await soon(transport.entered.wait())
    assert transport.hub.wanted == Topics.of()
    assert transport.hub.wants(b"a")
    transport.hold.set()
    await soon(leaving)
    assert not transport.hub.wants(b"a")


async def test_overlaps_give_a_message_once_per_subscription(
    client: PubSubClient, transport: Transport
) -> None:
    async with (
        client.subscribe(exact=[b"a"], glob=["*", "?"]) as one,
        client.subscribe_glob("**") as two,
    ):
        await transport.send(b"x")
        for subscription in (one, two):
            messages = await subscription.with_timeout(0.02)
            message = await soon(messages.__anext__())
            assert message is not None
            assert message.data.read() == b"x"
            assert await soon(messages.__anext__()) is None


class TestGaps:
    """on_receiving runs before the first message, and after every gap."""

    @pytest.fixture
    def runs(self) -> list[str]:
        return []

    async def test_before_the_first_message_arrives(
        self, client: PubSubClient, transport: Transport, runs: list[str]
    ) -> None:
        ready = asyncio.Event()

        async def on_receiving() -> None:
            runs.append("ready")
            ready.set()

        async with client.subscribe_exact(b"a", on_receiving=on_receiving) as subscription:
            messages = await subscription.messages()
            assert runs == []
            pending = asyncio.create_task(messages.__anext__())
            await soon(ready.wait())
            await transport.send(b"1")
            await soon(pending)
            await transport.send(b"2")
            await soon(messages.__anext__())
            assert runs == ["ready"]
            ready.clear()
            pending = asyncio.create_task(messages.__anext__())
            await asyncio.sleep(0)
            transport.hub.gap()  # found while waiting
            await soon(ready.wait())
            await transport.send(b"3")
            assert (await soon(pending)).data.read() == b"3"
            assert runs == ["ready", "ready"]

    async def test_again_when_it_failed_or_was_cancelled(
        self, client: PubSubClient, transport: Transport, runs: list[str]
    ) -> None:
        async def on_receiving() -> None:
            runs.append("run")
            if len(runs) == 1:
                raise OSError("no state")
            if len(runs) == 2:
                await asyncio.Event().wait()

        async with client.subscribe_exact(b"a", on_receiving=on_receiving) as subscription:
            await transport.send(b"1")
            messages = await subscription.with_timeout(0.02)
            with pytest.raises(OSError, match="no state"):
                await soon(messages.__anext__())
            assert await soon(messages.__anext__()) is None
            message = await soon(messages.__anext__())
            assert message is not None
            assert message.data.read() == b"1"
            assert len(runs) == 3

    async def test_a_timeout_of_its_own_is_not_ours(
        self, client: PubSubClient, transport: Transport
    ) -> None:
        async def on_receiving() -> None:
            raise TimeoutError("of the program")

        async with client.subscribe_exact(b"a", on_receiving=on_receiving) as subscription:
            messages = await subscription.with_timeout(5)
            with pytest.raises(TimeoutError, match="of the program"):
                await soon(messages.__anext__())

    async def test_a_gap_during_the_run_runs_it_again(
        self, client: PubSubClient, transport: Transport, runs: list[str]
    ) -> None:
        async def on_receiving() -> None:
            runs.append("run")
            if len(runs) == 1:
                transport.hub.gap()

        async with client.subscribe_exact(b"a", on_receiving=on_receiving) as subscription:
            await transport.send(b"1")
            await soon((await subscription.messages()).__anext__())
        assert len(runs) == 2

    async def test_after_an_overflow(
        self, client: PubSubClient, transport: Transport, runs: list[str]
    ) -> None:
        async def on_receiving() -> None:
            runs.append("run")

        async with client.subscribe_exact(b"a", on_receiving=on_receiving) as subscription:
            messages = await subscription.messages()
            assert [await transport.send(b"%d" % n) for n in range(5)] == [True] * 3 + [False] * 2
            got = [(await soon(messages.__anext__())).data.read() for _ in range(3)]
            assert got == [b"0", b"1", b"2"]
            assert runs == ["run"]
            await transport.send(b"5")
            assert not all([await transport.send(b"") for _ in range(3)])
            await soon(messages.__anext__())
            assert runs == ["run", "run"]


@pytest.mark.parametrize("seed", range(30))
async def test_cancelling_loses_no_message(seed: int) -> None:
    """Waits are cancelled at random points, in the three ways programs do it."""
    rng = random.Random(seed)
    transport = Transport()
    async with PubSubClient(transport) as client:
        async with client.subscribe_exact(b"a") as subscription:
            messages = await subscription.messages()

            async def send() -> None:
                for n in range(100):
                    await transport.send(b"%d" % n)
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)

            async def receive() -> bytes | None:
                kind = rng.randrange(3)
                try:
                    if kind == 0:
                        message = await asyncio.wait_for(messages.__anext__(), rng.random() / 5000)
                    elif kind == 1:
                        async with asyncio.timeout(rng.random() / 5000):
                            message = await messages.__anext__()
                    else:
                        task = asyncio.create_task(messages.__anext__())
                        for _ in range(rng.randrange(4)):
                            await asyncio.sleep(0)
                        if task.cancel():
                            await asyncio.wait((task,))
                            assert task.cancelled()
                            return None
                        message = task.result()
                except TimeoutError:
                    return None
                return bytes(message.data.read())

            sending = asyncio.create_task(send())
            got: list[bytes] = []
            async with asyncio.timeout(DEADLINE):
                while len(got) < 100:
                    if (data := await receive()) is not None:
                        got.append(data)
            await sending
            assert got == [b"%d" % n for n in range(100)]


class TestLeaving:
    """In any order, with a message held and another task waiting."""

    async def test_subscription_first(self, client: PubSubClient, transport: Transport) -> None:
        subscription = await client.subscribe_exact(b"a").__aenter__()
        messages = await subscription.messages()
        await transport.send(b"1")
        await soon(messages.__anext__())
        waiting = asyncio.create_task(messages.__anext__())
        await asyncio.sleep(0)
        await soon(subscription.__aexit__(None, None, None))
        with pytest.raises(PubSubRequestConnectionAbandonedError, match="subscription was left"):
            await soon(waiting)
        with pytest.raises(PubSubRequestConnectionAbandonedError):
            await soon(messages.__anext__())
        for call in (subscription.messages(), subscription.subscribe_exact(b"c")):
            with pytest.raises(RuntimeError, match="left"):
                await call

    async def test_client_first(self, transport: Transport) -> None:
        client = PubSubClient(transport)
        await client.__aenter__()
        subscription = await client.subscribe_exact(b"a").__aenter__()
        messages = await subscription.messages()
        await transport.send(b"1")
        held = await soon(messages.__anext__())
        await transport.send(b"2")
        waiting = asyncio.create_task(messages.__anext__())
        other = await client.subscribe_exact(b"b").__aenter__()
        blocked = asyncio.create_task((await other.messages()).__anext__())
        await soon(waiting)
        await asyncio.sleep(0)
        await soon(client.__aexit__(None, None, None))
        with pytest.raises(PubSubRequestConnectionAbandonedError, match="client was left"):
            await soon(blocked)
        with pytest.raises(PubSubError):
            await soon(messages.__anext__())
        await soon(subscription.__aexit__(None, None, None))
        await soon(other.__aexit__(None, None, None))
        assert held.data.closed
        assert transport.calls[-1] == ("stop", None)

    async def test_an_error_of_the_program_is_not_masked(
        self, client: PubSubClient, transport: Transport
    ) -> None:
        with pytest.raises(KeyError):  # noqa: PT012
            async with client.subscribe_exact(b"a"):
                transport.fail = PubSubRequestRefusedError("no")
                raise KeyError
        with pytest.raises(PubSubRequestRefusedError):
            async with client.subscribe_exact(b"a"):
                transport.fail = PubSubRequestRefusedError("no")
        assert client.exact_subscriptions == {}


async def test_a_second_wish_waits_for_the_first(
    client: PubSubClient, transport: Transport
) -> None:
    async with client.subscribe_multi() as subscription:
        transport.hold = asyncio.Event()
        first = asyncio.create_task(subscription.subscribe_exact(b"a"))
        await soon(transport.entered.wait())
        second = asyncio.create_task(subscription.subscribe_exact(b"a"))
        await asyncio.sleep(0)
        assert not second.done()
        transport.fail = PubSubRequestRefusedError("no")
        transport.hold.set()
        with pytest.raises(PubSubRequestRefusedError):
            await soon(first)
        await soon(second)
        assert client.exact_subscriptions == {b"a": 1}


async def test_misuse(transport: Transport) -> None:
    client = PubSubClient(transport)
    with pytest.raises(RuntimeError, match="not entered"):
        client.subscribe_exact(b"a")
    with pytest.raises(RuntimeError, match="not entered"):
        await client.notify(topic=b"a", data=b"")
    async with client:
        with pytest.raises(RuntimeError, match="once"):
            await client.__aenter__()
        with pytest.raises(TypeError, match="exact topic is bytes"):
            client.subscribe_exact("a")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="glob is str"):
            client.subscribe_glob(b"a")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="list of topics"):
            client.subscribe(glob="foo/*")
        with pytest.raises(LocalProtocolError, match="65,535"):
            client.subscribe_exact(b"a" * 65_536)
        with pytest.raises(LocalProtocolError, match="65,535"):
            await client.notify(topic=b"a" * 65_536, data=b"")
        subscription = client.subscribe_exact(b"a")
        with pytest.raises(RuntimeError, match="not entered"):
            await subscription.messages()
        async with subscription:
            with pytest.raises(RuntimeError, match="once"):
                await subscription.__aenter__()
            await subscription.messages()
            with pytest.raises(RuntimeError, match="already"):
                await subscription.with_timeout(1)
    with pytest.raises(RuntimeError, match="once"):
        await client.__aenter__()


class TestDirect:
    """The low level of the older client."""

    async def test_handles(self, client: PubSubClient, transport: Transport) -> None:
        one = await client.direct_subscribe_exact(topic=b"a")
        many = await client.direct_subscribe_multiple([b"a", b"b"], ["c"])
        assert client.exact_subscriptions == {b"a": 2, b"b": 1}
        assert client.active_glob_subscriptions == {many.glob["c"]: "c"}
        assert set(client.active_exact_subscriptions) == {one, *many.exact.values()}
        for handle in (one, one, *many.exact.values()):
            await client.direct_unsubscribe_exact(subscription_id=handle)
        await client.direct_unsubscribe_glob(subscription_id=many.glob["c"])
        assert client.exact_subscriptions == client.glob_subscriptions == {}

    async def test_receivers(self, client: PubSubClient, transport: Transport) -> None:
        got: list[Any] = []

        class Receiver:
            async def on_message(self, message: Any) -> None:
                got.append(message.data.read())
                await message.cleanup()
                await message.cleanup()
                assert message.data.closed
                if message.topic == b"bad":
                    raise KeyError

        first = await client.direct_register_on_message(receiver=Receiver())
        await client.direct_register_on_message(receiver=Receiver())
        assert await transport.send(b"1")
        assert await transport.send(b"2", b"bad")
        await client.direct_unregister_on_message(registration_id=first)
        assert await transport.send(b"3")
        assert got == [b"1", b"1", b"2", b"2", b"3"]

    async def test_status(self, transport: Transport) -> None:
        events: list[str] = []

        class Handler:
            def __getattr__(self, name: str) -> Any:
                async def note() -> None:
                    events.append(name.removeprefix("on_connection_"))

                return note

        async with PubSubClient(transport) as client:
            registration = await client.direct_register_status_handler(receiver=Handler())
            transport.hub.gap()
            async with asyncio.timeout(DEADLINE):
                while len(events) < 3:
                    await asyncio.sleep(0)
            await client.direct_unregister_status_handler(registration_id=registration)
            with pytest.raises(ValueError, match="status handler"):
                await client.direct_unregister_status_handler(registration_id=registration)
            await client.direct_register_status_handler(receiver=Handler())
        assert events == ["established", "lost", "established", "established", "abandoned"]
