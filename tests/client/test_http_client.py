"""Subscribe, receive and notify through a fake broadcaster on real sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from client.fakes import KINDS, auth, broadcaster, config, noop, urls
from lonelypsc import http_client
from lonelypsc.client import (
    PubSubRequestAmbiguousError,
    PubSubRequestConnectionAbandonedError,
    PubSubRequestRefusedError,
)
from lonelypsc.http_client import HttpPubSubClient
from lonelypsc.listener import Listener, answer
from waiting import until

pytestmark = pytest.mark.usefixtures("sleeps")


@pytest.mark.parametrize("kind", KINDS)
async def test_round_trip(kind: str) -> None:
    async with broadcaster(kind) as fake:
        async with HttpPubSubClient(config(fake, kind)) as client:
            async with client.subscribe(exact=[b"foo/bar"], glob=["baz/*"]) as subscription:
                messages = await subscription.messages()
                for topic in (b"foo/bar", b"baz/1"):
                    result = await client.notify(topic=topic, data=b"hello " + topic)
                    assert result.notified == 1
                    async with asyncio.timeout(5):
                        message = await messages.__anext__()
                    assert message.topic == topic
                    assert message.data.read() == b"hello " + topic
            assert fake.topics() == set()
        assert fake.paths == [
            "/v1/set_subscriptions",
            "/v1/notify",
            "/v1/notify",
            "/v1/set_subscriptions",
        ]


async def test_first_request_wipes_leftovers_and_later_ones_fit_their_size() -> None:
    async with broadcaster() as fake:
        async with HttpPubSubClient(config(fake)) as client:
            url, recovery = urls(client)
            fake.rows[url][b"leftover"] = None
            async with client.subscribe(exact=[b"%d" % n for n in range(600)], glob=["g"]):
                assert b"leftover" not in fake.topics()
                assert len(fake.topics()) == 601
                async with client.subscribe(exact=[b"x", b"0"], glob=["y", "g"]):
                    assert fake.rows[url][b"x"] == recovery
                    assert len(fake.topics()) == 603
                assert len(fake.topics()) == 601
            assert fake.topics() == set()
    one_by_one = {"/v1/subscribe/exact", "/v1/subscribe/glob"}
    assert fake.paths[0] == fake.paths[-1] == "/v1/set_subscriptions"
    assert one_by_one <= set(fake.paths) or fake.paths.count("/v1/set_subscriptions") >= 3


async def test_single_changes_of_a_large_set_and_conflicts() -> None:
    async with broadcaster() as fake:
        async with HttpPubSubClient(config(fake)) as client:
            url, recovery = urls(client)
            async with client.subscribe(exact=[b"%d" % n for n in range(600)]):
                fake.requests.clear()
                fake.rows[url][b"there"] = recovery
                async with client.subscribe(exact=[b"there"]):
                    pass
                async with client.subscribe(glob=["g/*"]):
                    fake.rows[url].pop("g/*")
                assert fake.paths == [
                    "/v1/subscribe/exact",
                    "/v1/unsubscribe/exact",
                    "/v1/subscribe/glob",
                    "/v1/unsubscribe/glob",
                ]


async def test_shared_topics_are_asked_for_once() -> None:
    async with broadcaster() as fake:
        async with HttpPubSubClient(config(fake)) as client:
            async with client.subscribe_exact(b"t"), client.subscribe_exact(b"t"):
                pass
            assert fake.paths == ["/v1/set_subscriptions"] * 2


async def test_the_second_is_not_confirmed_by_the_first_ones_failure() -> None:
    gate = asyncio.Event()

    async def refuse(path: str, body: bytes) -> tuple[int, bytes]:
        await gate.wait()
        return 400, b"no"

    async with broadcaster(script=[refuse]) as fake:
        async with HttpPubSubClient(config(fake)) as client:
            one, two = client.subscribe_exact(b"t"), client.subscribe_exact(b"t")
            entering = asyncio.create_task(one.__aenter__())
            await until(lambda: fake.requests)
            second = asyncio.create_task(two.__aenter__())
            await asyncio.sleep(0)
            gate.set()
            with pytest.raises(PubSubRequestRefusedError):
                await entering
            await second
            assert fake.topics() == {b"t"}
            await two.__aexit__(None, None, None)


@pytest.mark.parametrize(
    ("operation", "act"),
    [
        ("CONFIRM_NOTIFY", "notify"),
        ("SET_SUBSCRIPTIONS_RESPONSE", "subscribe"),
        ("CONFIRM_SUBSCRIBE_EXACT", "subscribe more"),
    ],
)
async def test_forged_replies_are_errors(operation: str, act: str) -> None:
    def forge(fields: dict[str, Any]) -> dict[str, Any]:
        forged = {"subscribers": 7, "etag": b"e" * 64, "url": "http://other"}
        return fields | {k: v for k, v in forged.items() if k in fields}

    async with broadcaster() as fake:
        made = config(fake, outgoing_retries_per_broadcaster=1)
        async with HttpPubSubClient(made) as client:
            async with client.subscribe(exact=[b"%d" % n for n in range(600)]):
                fake.forge, fake.forge_operations = forge, (operation,)
                with pytest.raises(PubSubRequestAmbiguousError, match="is forbidden"):  # noqa: PT012
                    if act == "notify":
                        await client.notify(topic=b"t", data=b"")
                    elif act == "subscribe":
                        await client.subscribe(exact=[b"x%d" % n for n in range(9)]).__aenter__()
                    else:
                        await client.subscribe_exact(b"y").__aenter__()
                fake.forge = None
                await until(lambda: len(fake.topics()) == 600)


async def test_unsigned_and_stale_replies_are_errors() -> None:
    async with broadcaster("none") as fake:
        made = config(fake, "none", auth=auth("hmac"), outgoing_retries_per_broadcaster=1)
        async with HttpPubSubClient(made) as client:
            with pytest.raises(PubSubRequestAmbiguousError, match="authorization is unauthorized"):
                await client.notify(topic=b"t", data=b"")


async def test_reconcile_repairs_and_tells() -> None:
    runs: list[int] = []

    async def on_receiving() -> None:
        runs.append(1)

    async with broadcaster() as fake:
        async with HttpPubSubClient(config(fake, resubscribe_interval=0.02)) as client:
            async with client.subscribe_exact(b"t", on_receiving=on_receiving) as subscription:
                messages = await subscription.messages()
                waiting = asyncio.create_task(messages.__anext__())
                await until(lambda: runs)
                await until(lambda: fake.paths.count("/v1/check_subscriptions") > 2)
                assert "/v1/set_subscriptions" not in fake.paths[1:]
                fake.rows.clear()
                await until(lambda: fake.topics() == {b"t"})
                await until(lambda: len(runs) == 2)
                waiting.cancel()


async def test_reconcile_failures_are_logged_and_retried(caplog: pytest.LogCaptureFixture) -> None:
    async with broadcaster() as fake:
        made = config(fake, resubscribe_interval=0.02)
        async with HttpPubSubClient(made) as client:
            async with client.subscribe_exact(b"t"):
                fake.rows.clear()
                fake.script += [(400, b"bad day")] * 2
                await until(lambda: fake.topics() == {b"t"})
    assert "cannot check the subscriptions of http://127.0.0.1" in caplog.text
    assert "bad day" in caplog.text


async def test_nothing_is_checked_before_anything_was_asked_for() -> None:
    async with broadcaster() as fake:
        async with HttpPubSubClient(config(fake, resubscribe_interval=0.001)) as client:
            await asyncio.sleep(0.05)
            await client.notify(topic=b"t", data=b"")
        assert fake.paths == ["/v1/notify"]


async def test_a_hung_subscribe_does_not_hold_up_notifies_and_is_undone() -> None:
    never = asyncio.Event()

    async def hang(path: str, body: bytes) -> None:
        await never.wait()

    async with broadcaster(script=[hang]) as fake:
        async with HttpPubSubClient(config(fake)) as client:
            entering = asyncio.create_task(client.subscribe_exact(b"t").__aenter__())
            await until(lambda: fake.requests)
            await client.notify(topic=b"t", data=b"")
            entering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await entering
            never.set()
        assert fake.topics() == set()


async def test_an_ambiguous_subscribe_is_taken_back() -> None:
    async def applied_but_lost(path: str, body: bytes) -> tuple[int, bytes]:
        fake.rows["somewhere"][b"t"] = None
        return 200, b""

    async with broadcaster(script=[applied_but_lost]) as fake:
        made = config(fake, outgoing_retries_per_broadcaster=1)
        async with HttpPubSubClient(made) as client:
            with pytest.raises(PubSubRequestAmbiguousError):
                await client.subscribe_exact(b"t").__aenter__()
            await until(lambda: fake.paths == ["/v1/set_subscriptions"] * 2)
            assert fake.rows[urls(client)[0]] == {}


async def test_leaving_the_client_takes_back_everything_at_once() -> None:
    async with broadcaster() as fake:
        async with HttpPubSubClient(config(fake)) as client:
            for n in range(3):
                await client.subscribe_exact(b"%d" % n).__aenter__()
            assert len(fake.topics()) == 3
        assert fake.topics() == set()
        assert fake.paths == ["/v1/set_subscriptions"] * 4


async def test_a_dead_broadcaster_is_an_error_of_leaving_but_all_is_freed() -> None:
    async with broadcaster() as fake:
        client = HttpPubSubClient(config(fake, outgoing_retries_per_broadcaster=1))
        await client.__aenter__()
        await client.subscribe_exact(b"t").__aenter__()
    with pytest.raises(PubSubRequestAmbiguousError, match="not reached"):
        await client.__aexit__(None, None, None)
    port = int(urls(client)[0].split(":")[2].partition("/")[0])
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_refusal_during_a_large_upload_is_seen() -> None:
    refusals = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal refusals
        refusals += 1
        await receive()
        await answer(send, 401, b"who are you", (b"connection", b"close"))

    listener = Listener("127.0.0.1", 0, app)
    await listener.start()
    bind = {"type": "manual", "callback": noop}
    made = config(f"http://127.0.0.1:{listener.port}", bind=bind)
    async with HttpPubSubClient(made) as client:
        with pytest.raises(PubSubRequestRefusedError, match="who are you"):
            await client.notify(topic=b"t", data=bytes(50_000_000))
    await listener.stop()


async def test_without_a_bind_it_notifies_but_cannot_subscribe() -> None:
    async with broadcaster() as fake:
        made = config(fake, bind={"type": "none"}, host="http://notify-only.invalid")
        async with HttpPubSubClient(made) as client:
            assert (await client.notify(topic=b"t", data=b"x")).notified == 0
            with pytest.raises(RuntimeError, match="bind: with type 'none'"):
                await client.subscribe_exact(b"t").__aenter__()
        assert fake.paths == ["/v1/notify"]


async def test_two_clients_in_one_process() -> None:
    async with broadcaster() as fake:
        async with HttpPubSubClient(config(fake)) as one, HttpPubSubClient(config(fake)) as two:
            async with one.subscribe_exact(b"t") as a, two.subscribe_glob("*") as b:
                assert (await one.notify(topic=b"t", data=b"x")).notified == 2
                for subscription in (a, b):
                    await (await subscription.messages()).__anext__()


async def test_leaving_waits_for_no_hung_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_STOP_PATIENCE", 0.02)
    never = asyncio.Event()

    async def hang(path: str, body: bytes) -> None:
        await never.wait()

    async with broadcaster(script=[hang, hang]) as fake:
        client = HttpPubSubClient(config(fake))
        await client.__aenter__()
        hung = [
            asyncio.create_task(client.subscribe_exact(b"t").__aenter__()),
            asyncio.create_task(client.notify(topic=b"t", data=b"")),
        ]
        await until(lambda: len(fake.requests) == 2)
        async with asyncio.timeout(5):
            await client.__aexit__(None, None, None)
            for task in hung:
                with pytest.raises(PubSubRequestConnectionAbandonedError):
                    await task
        assert fake.paths[-1] == "/v1/set_subscriptions"
        never.set()
