"""What broadcasters are answered, case by case, over real sockets."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

from client.fakes import KINDS, Broadcaster, broadcaster, config, urls
from conversation import Conversation
from lonelypsc import endpoints
from lonelypsc.http_client import HttpPubSubClient
from lonelypsc.listener import Listener
from lonelypsp.bodies import ReceiveHead, ResponseConfirmMissed
from lonelypsp.guard import HttpLimits
from lonelypsp.spool import Spool
from lonelypsp.wire import decode, encode
from servers import serve
from waiting import until

DROP = b"\x00\x0a"
GOOD = base64.b64encode(hashlib.sha512(b"data").digest())
OTHER = base64.b64encode(hashlib.sha512(b"other").digest())


@asynccontextmanager
async def subscribed(kind: str = "hmac", **settings: Any) -> AsyncIterator[tuple[Any, Any, str]]:
    """(fake broadcaster, messages of a subscription to `t`, receive url)."""
    async with broadcaster(kind) as fake:
        async with HttpPubSubClient(config(fake, kind, **settings)) as client:
            async with client.subscribe_exact(b"t") as subscription:
                yield fake, await subscription.messages(), urls(client)[0]


async def nothing_waits(messages: Any) -> None:
    assert messages._buffer.take() is None


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("sha-512=:%s:", 200),
        ("sha-512=%s", 200),
        ("SHA-512=:%s:", 200),
        ("md5=:YWJj:, sha-512=:%s:", 200),
        (" sha-512 = %s ", 200),
        ("sha-512=:%s:;p=1", 200),
        ("sha-512=%s, sha-512=:%s:", 200),
        ("", 400),
        ("sha-512=", 400),
        ("sha-512=:", 400),
        ("sha-512=::", 400),
        ("sha-512=:%s", 400),
        ("sha512=%s", 400),
        ("sha-256=:%s:", 400),
        ("sha-512=%s, sha-512=" + OTHER.decode(), 400),
        ("sha-512=" + OTHER.decode(), 400),
        ("sha-512=" + base64.b64encode(b"x" * 43).decode(), 400),
        ("sha-512=%s*", 400),
        ("sha-512=\xff", 400),
    ],
)
async def test_digest(header: str, status: int) -> None:
    async with subscribed("none") as (fake, messages, url):
        value = header.replace("%s", GOOD.decode())
        await fake.deliver(url, b"t", b"data", headers={"Repr-Digest": value})
        got = fake.deliveries[0]
        assert (got.status, got.body == DROP) == (status, False)
        if status == 200:
            assert (await messages.__anext__()).data.read() == b"data"
        else:
            assert got.headers["Content-Type"].startswith("text/plain")
            assert 5 < len(got.body) < 200
            await nothing_waits(messages)


CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "no digest": ("hmac", {"headers": {"Repr-Digest": None}}, 400),
    "no authorization": ("hmac", {"headers": {"Authorization": None}}, 401),
    "no token": ("token", {"headers": {"Authorization": None}}, 401),
    "wrong authorization": ("hmac", {"headers": {"Authorization": "X-HMAC 1:a:b"}}, 403),
    "wrong token": ("token", {"headers": {"Authorization": "Bearer other"}}, 403),
    "not ascii": ("token", {"headers": {"Authorization": "Bearer \xe9"}}, 403),
    "encoded": ("none", {"headers": {"Content-Encoding": "gzip"}}, 415),
    "V10": ("none", {"headers": {"Repr-Digest": "sha-512=:" + "A" * 65_536 + ":"}}, 431),
    # no limit is set here, so the claim is believed until the body ends
    "V14": ("none", {"change": lambda raw: raw[:-12] + b"\xff" * 8 + raw[-4:]}, 400),
    "V22": ("none", {"change": lambda raw: b"\xff\xff" + raw[2:]}, 400),
    "V23": ("none", {"change": lambda raw: raw[:5] + b"\xff" + raw[6:]}, 400),
    "V24": ("none", {"change": lambda raw: raw[:2] + b"\xff\xff" + raw[4:]}, 400),
    "empty": ("none", {"change": lambda raw: b""}, 400),
    "head cut": ("none", {"change": lambda raw: raw[:9]}, 400),
    "short": ("none", {"change": lambda raw: raw[:-1]}, 400),
    "long": ("none", {"change": lambda raw: raw + b"x"}, 400),
    "other content": ("none", {"change": lambda raw: raw[:-1] + b"x"}, 400),
    "other host": ("hmac", {"headers": {"Host": "elsewhere:1"}}, 200),
}


@pytest.mark.parametrize("name", CASES)
async def test_receive(name: str) -> None:
    kind, arguments, status = CASES[name]
    async with subscribed(kind) as (fake, messages, url):
        for fake.step in (None, 1 if name != "V10" else 997):
            await fake.deliver(url, b"t", b"data", **arguments)
            got = fake.deliveries.pop()
            assert (got.status, got.body == DROP) == (status, False)
            if status != 200:
                await nothing_waits(messages)
                assert fake.rows[url]


async def test_replay_is_refused() -> None:
    async with subscribed("hmac") as (fake, messages, url):
        sent: list[Any] = []
        post = fake.post

        async def twice(*arguments: Any) -> Any:
            sent.append(arguments)
            return await post(*arguments)

        fake.post = twice
        await fake.deliver(url, b"t", b"data")
        again = await post(*sent[0])
        assert again.status == 403
        await messages.__anext__()
        await nothing_waits(messages)


@pytest.mark.parametrize("kind", KINDS)
async def test_unknown_topic_is_dropped_but_only_for_who_may_send(kind: str) -> None:
    async with subscribed(kind) as (fake, _messages, url):
        fake.rows[url][b"old"] = None
        assert await fake.deliver(url, b"old", b"x" * 1_000_000, row=b"old") == 0
        assert (fake.deliveries[0].status, fake.deliveries[0].body) == (410, DROP)
        assert b"old" not in fake.rows[url]
        if kind != "none":
            await fake.deliver(url, b"old", b"x", headers={"Authorization": None})
            assert (fake.deliveries[1].status, fake.deliveries[1].body == DROP) == (401, False)


async def test_a_claim_above_the_limit_is_refused_before_the_body_comes() -> None:
    """V14, V15"""
    async with subscribed("none", max_receive_body=10) as (_fake, messages, url):
        port = int(url.rpartition(":")[2].partition("/")[0])
        async with Conversation(port) as conversation:
            head = encode(ReceiveHead(b"", b"t", b"id", 2**64 - 1))
            await conversation.send(
                b"POST /v1/receive HTTP/1.1\r\nHost: h\r\nRepr-Digest: sha-512=" + GOOD
                + b"\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(head), head)
            )  # fmt: skip
            assert (await conversation.receive(1))[0] == [413]
        await nothing_waits(messages)


async def test_too_long_and_other_methods_and_paths() -> None:
    async with subscribed("none", max_receive_body=10) as (fake, _messages, url):
        await fake.deliver(url, b"t", b"x" * 10)
        await fake.deliver(url, b"t", b"x" * 11)
        assert [d.status for d in fake.deliveries] == [200, 413]
        assert b"max_receive_body" in fake.deliveries[1].body
        async with httpx.AsyncClient(verify=False, trust_env=False) as http:
            for path, status in (("/v1/receive", 405), ("/docs", 404), ("/v1/receive/", 404)):
                response = await http.get(url.replace("/v1/receive", path))
                assert response.status_code == status


async def test_large_bodies_go_to_disk_and_are_shared(tmp_path: Path) -> None:
    async with broadcaster() as fake:
        made = config(fake, message_body_spool_size=1000, spool_directory=str(tmp_path))
        async with HttpPubSubClient(made) as client:
            async with client.subscribe_exact(b"t") as one, client.subscribe_glob("*") as two:
                data = os.urandom(3_000_000)
                await client.notify(topic=b"t", data=data)
                first = await (await one.messages()).__anext__()
                second = await (await two.messages()).__anext__()
                body = one._messages._held[0]._body  # type: ignore[union-attr,index]
                assert body.on_disk
                assert first.data.read(10) == data[:10]
                assert second.data.read() == data
                await one.__aexit__(None, None, None)
                assert second.data.seek(5) == 5
                assert second.data.read(10) == data[5:15]
            assert not body.on_disk
            with pytest.raises(ValueError, match="closed"):
                second.data.read()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 999, 1000, 1001, 6300, 6400, 100_000])
async def test_bodies_arrive_whole_whatever_is_gathered(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some end where what was gathered has just been written."""
    data = bytes(n % 251 for n in range(length))
    for piece, chunk in ((1000, 1), (1000, 100), (1000, 1000), (10**6, 100)):
        monkeypatch.setattr(endpoints, "_DISK_PIECE", piece)

        async def chunks(size: int = chunk) -> AsyncIterator[bytes]:
            for at in range(size, length, size):
                yield data[at : at + size]

        with Spool(length, memory_limit=-1) as spool:
            await endpoints._to_disk(spool, data[:chunk], chunks())
            body = spool.finish(hashlib.sha512(data).digest())
        assert body.read_at(0, length) == data
        body.close()


async def test_full_disk_is_507(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async with subscribed("none", message_body_spool_size=1000) as (fake, messages, url):
        monkeypatch.setattr(Spool, "write", full)
        await fake.deliver(url, b"t", b"x" * 2000)
        assert (fake.deliveries[0].status, fake.deliveries[0].body == DROP) == (507, False)
        await nothing_waits(messages)


@pytest.mark.parametrize(
    ("limits", "sizes", "statuses"),
    [
        ({"receive_buffer_messages": 2}, [1, 1, 1], [200, 200, 503]),
        ({"receive_buffer_bytes": 100}, [500, 1], [200, 503]),
        ({"receive_buffer_bytes": 100}, [60, 40, 1], [200, 200, 503]),
    ],
)
async def test_full_buffer_is_503(
    limits: dict[str, int], sizes: list[int], statuses: list[int]
) -> None:
    async with subscribed("hmac", **limits) as (fake, messages, url):
        for size in sizes:
            await fake.deliver(url, b"t", b"x" * size)
        assert [d.status for d in fake.deliveries] == statuses
        assert fake.deliveries[-1].headers["Retry-After"] == "1"
        assert fake.deliveries[-1].body != DROP
        assert fake.rows[url]
        await messages.__anext__()
        await messages.__anext__() if len(sizes) > 2 else None
        assert await fake.deliver(url, b"t", b"x") == 1


class TestRecover:
    @pytest.mark.parametrize("kind", KINDS)
    async def test_a_gap_and_a_check(self, kind: str) -> None:
        runs: list[str] = []

        async def on_receiving() -> None:
            runs.append("run")

        async with broadcaster(kind) as fake:
            async with HttpPubSubClient(config(fake, kind)) as client:
                async with client.subscribe_exact(b"t", on_receiving=on_receiving) as subscription:
                    messages = await subscription.messages()
                    await client.notify(topic=b"t", data=b"1")
                    await messages.__anext__()
                    url, recovery = urls(client)
                    fake.rows[url].clear()
                    got = await fake.miss(recovery, b"whatever")
                    assert got.status == 200
                    reply = decode(ResponseConfirmMissed, got.body)
                    assert (reply.authorization is None) == (kind == "none")
                    await until(lambda: fake.rows[url] == {b"t": recovery})
                    await client.notify(topic=b"t", data=b"2")
                    await messages.__anext__()
                    assert runs == ["run", "run"]

    @pytest.mark.parametrize(
        ("kind", "body", "status"),
        [
            ("none", b"", 400),
            ("none", b"\0\0\0\5abc", 400),
            ("none", b"\0\0\0\1t trailing", 200),
            ("none", b"x" * 200_000, 413),
            ("hmac", b"\0\0\0\1x", 403),
        ],
    )
    async def test_statuses(self, kind: str, body: bytes, status: int) -> None:
        async with broadcaster(kind) as fake, HttpPubSubClient(config(fake, kind)) as client:
            got = await fake.miss(urls(client)[1], b"t", body)
            assert (got.status, got.body == DROP) == (status, False)


class TestMounted:
    """In the program's own app, also several clients that differ only in the fragment."""

    @asynccontextmanager
    async def clients(
        self,
        fake: Broadcaster,
        kind: str,
        prefix: str,
        fragments: list[str],
        outer: str = "fastapi",
    ) -> AsyncIterator[list[Any]]:
        inner = Starlette() if outer == "starlette" else FastAPI()
        app: Any = Starlette(routes=[Mount("/outer", inner)]) if outer == "mount" else inner
        listener = Listener("127.0.0.1", 0, app)
        await listener.start()
        base = f"http://127.0.0.1:{listener.port}{'/outer' if outer == 'mount' else ''}{prefix}"

        async def include(router: APIRouter) -> None:
            if isinstance(inner, FastAPI):
                inner.include_router(router, prefix=prefix)
            else:
                inner.routes.append(Mount(prefix, router) if prefix else Mount("/", router))

        made = [
            HttpPubSubClient(
                config(
                    fake,
                    kind,
                    bind={"type": "manual", "callback": include},
                    host=base + ("#" + fragment if fragment else ""),
                )
            )
            for fragment in fragments
        ]
        for client in made:
            await client.__aenter__()
        try:
            yield made
        finally:
            for client in made:
                await client.__aexit__(None, None, None)
            await listener.stop()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("prefix", ["", "/pubsub"])
    @pytest.mark.parametrize("outer", ["fastapi", "starlette", "mount"])
    async def test_alone(self, kind: str, prefix: str, outer: str) -> None:
        async with broadcaster(kind) as fake:
            async with self.clients(fake, kind, prefix, [""], outer) as (client,):
                async with client.subscribe_exact(b"t") as subscription:
                    assert (await client.notify(topic=b"t", data=b"1")).notified == 1
                    message = await (await subscription.messages()).__anext__()
                    assert message.data.read() == b"1"

    @pytest.mark.parametrize(
        ("kind", "hints"), [("hmac", True), ("hmac", False), ("token", True), ("none", True)]
    )
    @pytest.mark.parametrize("outer", ["fastapi", "mount"])
    async def test_siblings_get_exactly_their_own(self, kind: str, hints: bool, outer: str) -> None:
        async with broadcaster(kind, fragments=hints) as fake:
            fragments = ["1", "zwei/%C3%A4", ""]
            async with self.clients(fake, kind, "/p", fragments, outer) as clients:
                opened = [await c.subscribe_exact(b"t").__aenter__() for c in clients]
                messages = [await s.messages() for s in opened]
                assert (await clients[0].notify(topic=b"t", data=b"all")).notified == 3
                for iterator in messages:
                    assert (await iterator.__anext__()).data.read() == b"all"
                    assert iterator._buffer.take() is None
                second = clients[1]
                assert await fake.deliver(urls(second)[0], b"t", b"one") == 1
                assert (await messages[1].__anext__()).data.read() == b"one"
                assert messages[0]._buffer.take() is messages[2]._buffer.take() is None
                # whom it is for does not want it, another does
                await fake.deliver(urls(clients[2])[0], b"x", b"")
                assert fake.deliveries[-1].body == DROP
                for iterator in messages:
                    iterator._buffer.gap = False
                assert (await fake.miss(urls(second)[1], b"t")).status == 200
                if kind == "hmac":
                    assert [i._buffer.gap for i in messages] == [False, True, False]
                else:
                    assert messages[1]._buffer.gap
                for subscription in opened:
                    await subscription.__aexit__(None, None, None)

    async def test_without_hint_and_signature_who_wants_it_gets_it(self) -> None:
        async with broadcaster("none", fragments=False) as fake:
            async with self.clients(fake, "none", "", ["1", "2"]) as (one, two):
                async with two.subscribe_exact(b"t") as subscription:
                    assert (await one.notify(topic=b"t", data=b"x")).notified == 1
                    await (await subscription.messages()).__anext__()

    async def test_an_unknown_fragment_is_dropped(self) -> None:
        async with broadcaster("token") as fake:
            async with self.clients(fake, "token", "", ["1"]) as (one,):
                async with one.subscribe_exact(b"t"):
                    await fake.deliver(urls(one)[0] + "7", b"t", b"x")
                    assert fake.deliveries[0].body == DROP


@pytest.mark.parametrize("stripped", [True, False])
async def test_prefix_of_host_with_and_without_a_stripping_proxy(stripped: bool) -> None:
    async with broadcaster("hmac") as fake:
        made = config(fake, "hmac", host="http://127.0.0.1:{port}/pub%20sub#1")
        async with HttpPubSubClient(made) as client:
            async with client.subscribe_exact(b"t"):
                url = urls(client)[0]
                post = fake.post

                async def proxied(url: str, *rest: Any) -> Any:
                    return await post(url.replace("/pub%20sub", "") if stripped else url, *rest)

                fake.post = proxied  # type: ignore[method-assign]
                assert await fake.deliver(url, b"t", b"x") == 1


async def test_turned_away_while_leaving() -> None:
    statuses: list[int] = []
    async with broadcaster("hmac") as fake:
        async with HttpPubSubClient(config(fake)) as client:
            await client.subscribe_exact(b"t").__aenter__()
            url, recovery = urls(client)

            async def at_teardown(path: str, body: bytes) -> None:
                assert path == "/v1/set_subscriptions"
                await fake.deliver(url, b"t", b"x")
                statuses.append((await fake.miss(recovery, b"t")).status)

            fake.script.append(at_teardown)
        got = fake.deliveries[0]
        assert (got.status, got.headers["Retry-After"]) == (503, "1")
        assert got.body != DROP
        assert statuses == [503]
        assert fake.topics() == set()


async def test_sender_that_goes_away_leaves_nothing() -> None:
    async with subscribed("none") as (fake, _messages, url):
        port = int(url.rpartition(":")[2].partition("/")[0])
        _reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v1/receive HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
            b"Repr-Digest: sha-512=" + GOOD + b"\r\n\r\n\0\0"
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert await fake.deliver(url, b"t", b"data") == 1


STALLED = (
    b"POST /v1/receive HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
    b"Repr-Digest: sha-512=" + GOOD + b"\r\n\r\n\0\0"
)


async def is_cut_off(url: str) -> None:
    port = int(url.rpartition(":")[2].partition("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(STALLED)
    async with asyncio.timeout(5):
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
    writer.close()
    await writer.wait_closed()


async def test_sender_that_stalls_is_cut_off() -> None:
    bind = {"type": "uvicorn", "host": "127.0.0.1", "port": 0}
    limits = HttpLimits(rate_window=0.1)
    async with subscribed("none", bind={**bind, "limits": limits}) as (_fake, _messages, url):
        await is_cut_off(url)


async def test_sender_that_stalls_is_cut_off_under_another_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoints, "_LIMITS", HttpLimits(rate_window=0.1))
    app = FastAPI()

    async def include(router: APIRouter) -> None:
        app.include_router(router)

    async with serve(app) as url:
        bind = {"type": "manual", "callback": include}
        async with subscribed("none", bind=bind, host=url) as (fake, messages, receive):
            await is_cut_off(receive)
            await fake.deliver(receive, b"t", b"data", headers={"Content-Encoding": "gzip"})
            assert fake.deliveries[0].status == 415
            await nothing_waits(messages)


async def test_what_was_just_dropped_is_checked_when_it_is_wanted_again() -> None:
    async with broadcaster() as fake:
        async with HttpPubSubClient(config(fake)) as client:
            url = urls(client)[0]
            await fake.deliver(url, b"t", b"late")
            async with client.subscribe_exact(b"t"):
                fake.rows[url].clear()  # the broadcaster acts on the answer only now
                await until(lambda: fake.topics() == {b"t"})
