"""Authorization of a broadcaster: what is in the secrets file, and what is remembered where."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import postgres
from lonelypsp import secretsfile
from lonelypsp.messages import decode_from_subscriber
from lonelypsp.replay import (
    NOT_SHARED,
    ReplayGuard,
    SharedReplayGuard,
)
from lonelypsp.session import Limits, SubscriberSession
from lonelypsp.signing import AuthConfig
from lonelypss.app import App, Broadcaster
from lonelypss.config import ConfigError
from lonelypss.secrets import check_exposure, load_auth
from servers import serve

from .harness import (
    FAST_NOTICES,
    Peer,
    Received,
    Running,
    Signed,
    Subscriber,
    config,
    confirm_missed,
    reply,
    until_async,
)
from .websocket_peer import Peer as Socket
from .websocket_peer import raw_socket, websocket_peer

REQUESTS: dict[str, Callable[[Peer, str], Signed]] = {
    "subscribe exact": lambda p, url: p.subscribe(url, b"u"),
    "subscribe glob": lambda p, url: p.subscribe_glob(url, "u*"),
    "unsubscribe exact": lambda p, url: p.subscribe(url, b"t", verb="unsubscribe"),
    "unsubscribe glob": lambda p, url: p.subscribe_glob(url, "t*", verb="unsubscribe"),
    "check": lambda p, url: p.check(url),
    "set": lambda p, url: p.set(url, ((b"u", None),)),
    "notify": lambda p, _: p.notify(b"t"),
}


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    path = tmp_path / "broadcaster-secrets.json"
    path.write_text(secretsfile.dump(secretsfile.generate("hmac"), secretsfile.generate("hmac")))
    path.chmod(0o600)
    return path


@asynccontextmanager
async def on(db: str, secrets: Path, **options: Any) -> AsyncIterator[Running]:
    one = Broadcaster(config(db=db, auth=load_auth(secrets, db=db), **options))
    async with serve(App(one)) as url:
        yield Running(one, int(url.rpartition(":")[2]), Peer(of_client(secrets)))


def url_of(running: Running) -> str:
    return f"http://127.0.0.1:{running.port}"


def of_client(secrets: Path) -> AuthConfig:
    return secretsfile.load(secrets.read_text(), ReplayGuard())


# One memory for all broadcasters on PostgreSQL


@pytest.mark.parametrize("name", REQUESTS)
async def test_what_one_broadcaster_accepted_no_other_does(name: str, secrets: Path) -> None:
    db = postgres.shared().database()
    async with Subscriber(auth=of_client(secrets)) as subscriber:
        async with on(db, secrets) as one, on(db, secrets) as two:
            await one.ok(one.peer.subscribe(subscriber.url, b"t"))
            await one.ok(one.peer.subscribe_glob(subscriber.url, "t*"))
            recorded = REQUESTS[name](one.peer, subscriber.url)
            assert (await one.send(recorded)).status == 200
            rows = await one.store.subscriptions(subscriber.url)
            for running in (two, one, two):
                response = await running.send(recorded)
                assert response.status == 403
                assert b"was used before" in response.body
        async with on(db, secrets) as one:  # another process, as it were
            assert (await one.send(recorded)).status == 403
            assert await one.store.subscriptions(subscriber.url) == rows
        assert len(subscriber.requests) == (name == "notify")


async def test_played_to_both_at_once(secrets: Path) -> None:
    db = postgres.shared().database()
    async with Subscriber(auth=of_client(secrets)) as subscriber:
        async with on(db, secrets) as one, on(db, secrets) as two:
            await one.ok(one.peer.subscribe(subscriber.url, b"t"))
            recorded = [one.peer.notify(b"t", b"%d" % n) for n in range(20)]
            answers = await asyncio.gather(
                *(running.send(request) for request in recorded for running in (one, two, one))
            )
        statuses = sorted(answer.status for answer in answers)
        assert statuses == [200] * 20 + [403] * 40
        assert sorted(r.message for r in subscriber.requests) == sorted(
            b"%d" % n for n in range(20)
        )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
async def test_played_again_when_the_database_was_restarted(
    secrets: Path, signum: signal.Signals
) -> None:
    with postgres.server() as server:
        db = server.database()
        async with Subscriber(auth=of_client(secrets)) as subscriber:
            async with on(db, secrets) as one, on(db, secrets) as two:
                await one.ok(one.peer.subscribe(subscriber.url, b"t"))
                clocks = [lambda s=s: time.time() + s for s in (-100, 0, 100)]
                peers = [Peer(of_client(secrets), clock=clock) for clock in clocks]
                recorded = [peer.notify(b"t") for peer in peers]
                for request in recorded:
                    await one.ok(request)
                await asyncio.to_thread(server.stop, signum)
                meanwhile = one.peer.notify(b"t")
                response = await one.send(meanwhile)
                assert (response.status, "retry-after" in response.headers) == (503, True)
                await asyncio.to_thread(server.start)
                async with asyncio.timeout(60):
                    while (await one.send(meanwhile)).status == 503 and signum == signal.SIGINT:
                        await asyncio.sleep(0.05)
                # after a crash nobody else can tell what was used: sign it again
                elsewhere = 403 if signum == signal.SIGINT else 503
                for running, status in ((two, elsewhere), (one, 403)):
                    assert {(await running.send(r)).status for r in recorded} == {status}
                latest = Peer(of_client(secrets), clock=lambda: time.time() + 115)
                await two.ok(latest.notify(b"t"))
            delivered = len(recorded) + (signum == signal.SIGINT) + 1
            assert len(subscriber.requests) == delivered


async def test_what_was_not_accepted_while_the_database_was_away_may_come_again(
    secrets: Path,
) -> None:
    """Older clients do not sign anew when they repeat a request."""
    with postgres.server() as server:
        db = server.database()
        async with on(db, secrets) as one:
            await one.ok(one.peer.check("http://h/"))
            await asyncio.to_thread(server.stop, signal.SIGINT)
            request = one.peer.subscribe("http://h/")
            assert (await one.send(request)).status == 503
            assert (await one.send(request)).status == 503
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(60):
                while (response := await one.send(request)).status == 503:
                    await asyncio.sleep(0.05)
            assert response.status == 200


@asynccontextmanager
async def recording(running: Running, secrets: Path, frames: list[bytes]) -> AsyncIterator[Socket]:
    async with raw_socket(url_of(running)) as socket:
        peer = Socket(
            socket, SubscriberSession(of_client(secrets), limits=Limits(frame_length=5000))
        )

        async def send(frame: bytes) -> None:
            frames.append(frame)
            await socket.send(frame)

        peer.send = send  # type: ignore[method-assign]
        await peer.send(peer.session.configure(time.time()))
        await peer.event()
        yield peer


async def test_what_came_over_a_websocket_does_not_come_again(secrets: Path) -> None:
    """Neither the beginning of a connection, nor messages, whose signatures hold nothing of it."""
    db = postgres.shared().database()
    frames: list[bytes] = []
    async with on(db, secrets) as one, on(db, secrets) as two:
        async with recording(one, secrets, frames) as peer:
            configure = frames.pop()
            assert await peer.notify(b"t", b"x") == 0
            assert await peer.notify(b"t", b"y" * 12_000) == 0
        assert len(frames) > 3
        async with raw_socket(url_of(two)) as socket:
            await socket.send(configure)
            assert (await Socket(socket, peer.session).closed()).code == 4403
        for frame in frames[:2]:
            async with websocket_peer(url_of(two), of_client(secrets)) as other:
                await other.send(frame)
                assert (await other.closed()).code == 4403
        # over HTTP they are signed alike
        async with Subscriber(auth=of_client(secrets)) as subscriber:
            await two.ok(two.peer.subscribe(subscriber.url, b"t"))
            for frame, body in zip(frames, [b"x", *[b"y" * 12_000] * 3], strict=False):
                recorded: Any = decode_from_subscriber(frame)
                request = two.peer.notify(b"t", body, identifier=recorded.identifier)
                request.authorization = recorded.authorization
                assert (await two.send(request)).status == 403
            assert not subscriber.requests


async def test_a_connection_that_asks_while_the_database_is_away_is_told_so(secrets: Path) -> None:
    with postgres.server() as server:
        db = server.database()
        async with on(db, secrets) as one:
            await asyncio.to_thread(server.stop, signal.SIGINT)
            async with raw_socket(url_of(one)) as socket:
                session = SubscriberSession(of_client(secrets))
                await socket.send(session.configure(time.time()))
                assert (await Socket(socket, session).closed()).code == 4503


async def test_a_confirmed_notice_counts_once(secrets: Path) -> None:
    """A subscriber's answer to one broadcaster, played to another one by whoever sits between."""
    db = postgres.shared().database()
    auth = of_client(secrets)
    async with Subscriber(auth=auth) as subscriber:
        used: list[bytes] = []

        def answer(received: Received) -> bytes:
            if "/v1/recover" not in received.path:
                return reply(b"", 500)
            if not used:
                used.append(confirm_missed(received, subscriber.recovery, auth))
            if len(subscriber.requests) > 4:
                return subscriber.confirm(received)
            return reply(used[0])

        subscriber.handler = answer
        for expected in (2, 5):
            async with on(db, secrets, **FAST_NOTICES) as running:
                if expected == 2:
                    await running.ok(
                        running.peer.subscribe(subscriber.url, b"t", subscriber.recovery)
                    )
                assert await running.notify(b"t") == 0
                await subscriber.got(expected)
                await until_async(lambda r=running: _no_notice(r))


async def _no_notice(running: Running) -> bool:
    return (await running.store.counts())["missed"] == 0


def test_auth_for_one_database_is_not_used_with_another(secrets: Path) -> None:
    auth = load_auth(secrets, db="postgresql://h/d")
    with pytest.raises(ConfigError, match="db: the authorization was loaded for PostgreSQL"):
        Broadcaster(config(auth=auth))


def test_where_signatures_are_remembered(secrets: Path, tmp_path: Path) -> None:
    db = f"sqlite:///{tmp_path}/one.db"
    assert load_auth(secrets, db=db).shared is NOT_SHARED
    assert (tmp_path / "one.db.replay").is_dir()
    load_auth(secrets, tmp_path / "mine", db="postgresql://h/d")
    assert (tmp_path / "mine").is_dir()
    assert isinstance(load_auth(secrets, db="postgres://h/d").shared, SharedReplayGuard)
    before = set(tmp_path.iterdir())
    load_auth(secrets)
    load_auth(secrets, db="sqlite://")
    assert set(tmp_path.iterdir()) == before


def test_signatures_cannot_be_remembered_in_a_file(secrets: Path, tmp_path: Path) -> None:
    (tmp_path / "one.db.replay").touch()
    with pytest.raises(ConfigError, match=r"one\.db\.replay: .*a file of before can be deleted"):
        load_auth(secrets, db=f"sqlite:///{tmp_path}/one.db")


# Keys with rights


@pytest.fixture
def tenant(secrets: Path) -> AuthConfig:
    """Of a subscriber whose key may do little."""
    document = secretsfile.parse(secrets.read_text())
    key = {"id": "tenant", "secret": (secretsfile.generate("hmac") or {})["secret"]}
    rights = {"notify": ["a/**"], "subscribe": ["a/**"], "urls": ["http://localhost"]}
    entry = document["to-broadcaster"]
    entry["keys"] = [{"id": "default", "secret": entry["secret"]}, {**key, "rights": rights}]
    secrets.write_text(json.dumps(document))
    document["to-broadcaster"] = {"type": "hmac", "secret": key["secret"]}
    return secretsfile.load(json.dumps(document), ReplayGuard())


async def test_rights_over_http(secrets: Path, tenant: AuthConfig) -> None:
    here, elsewhere = "http://localhost:1/", "http://127.0.0.1:1/"
    async with on("sqlite://", secrets) as running:
        peer = Peer(tenant)
        cases: list[tuple[Signed, str | None]] = [
            (peer.subscribe(here, b"a/b"), None),
            (peer.subscribe(here, b"b"), "subscribe"),
            (peer.subscribe(elsewhere, b"a/b"), "urls"),
            (peer.subscribe(here, b"a/b", elsewhere), "urls"),
            (peer.subscribe_glob(here, "a/*"), None),
            (peer.subscribe_glob(here, "*/b"), "subscribe"),
            (peer.subscribe(elsewhere, b"a/b", verb="unsubscribe"), "urls"),
            (peer.check(here), None),
            (peer.check(elsewhere), "urls"),
            (peer.set(here, ((b"a/b", None),), (("a/**", None),)), None),
            (peer.set(here, ((b"a/b", None), (b"b", None))), "subscribe"),
            (peer.set(here, (), (("**", None),)), "subscribe"),
            (peer.set(here, ((b"a/b", elsewhere),)), "urls"),
            (peer.set(elsewhere, ()), "urls"),
            (peer.notify(b"b"), "notify"),
        ]
        for request, missing in cases:
            response = await running.send(request)
            assert response.status == (200 if missing is None else 403), (request, response)
            if missing:
                assert b"the key 'tenant' has no right to" in response.body
                assert f"(its '{missing}' rights".encode() in response.body
        found = {s.pattern for s in await running.store.subscriptions(here)}
        assert found == {b"a/b", b"a/**"}
        assert await running.store.subscriptions(elsewhere) == []
        # of others it cannot do anything, and they can do everything
        await running.ok(running.peer.subscribe(elsewhere, b"b"))
        assert (await running.send(peer.notify(b"b"))).status == 403
        await running.ok(running.peer.notify(b"other"))


async def test_a_list_under_the_signature_of_another_one_is_refused(
    secrets: Path, tenant: AuthConfig
) -> None:
    async with on("sqlite://", secrets) as running:
        peer, url = Peer(tenant), "http://localhost:1/"
        allowed, other = peer.set(url, ((b"a/b", None),)), peer.set(url, ((b"b", None),))
        for signed, body in ((allowed, other), (other, allowed)):
            head = 2 + 2 + len(url) + 1 + 64
            mixed = Signed(signed.path, signed.body[:head] + body.body[head:], signed.authorization)
            assert (await running.send(mixed)).status in (400, 403)
        assert await running.store.subscriptions(url) == []


async def test_rights_over_websockets(secrets: Path, tenant: AuthConfig) -> None:
    async with on("sqlite://", secrets) as running:
        async with websocket_peer(url_of(running), tenant) as peer:
            await peer.subscribe(b"a/b", globs=("a/*",))
            assert await peer.notify(b"a/b", b"x") == 1
            await peer.send(peer.session.notify(peer.payload(b"b", b"x"), b"x", time.time()))
            closed = await peer.closed()
            assert closed.code == 4403
            assert "no right to send to b'b'" in closed.reason
        for ask in (lambda s: s.subscribe_exact(b"b", time.time()), _everything):
            async with websocket_peer(url_of(running), tenant) as peer:
                await peer.send(ask(peer.session))
                assert (await peer.closed()).code == 4403


def _everything(session: SubscriberSession) -> bytes:
    return session.subscribe_glob("**", time.time())


# What strangers could do


class Exposed(NamedTuple):
    kind: str
    secret: str | None
    addresses: list[str]
    encrypted: bool
    complaint: str | None


LONG, ANYWHERE = "x" * 32, ["127.0.0.1", "10.0.0.5"]


@pytest.mark.parametrize(
    "case",
    [
        Exposed("none", None, ["127.0.0.1", "::1"], False, None),
        Exposed("none", None, ANYWHERE, False, "on 10.0.0.5, anybody could send"),
        Exposed("none", None, ["::"], True, "on ::, anybody could send"),
        Exposed("none", None, ["fe80::1%eth0"], True, "anybody could send"),
        Exposed("token", LONG, ["127.0.0.2"], False, None),
        Exposed("token", LONG, ["0.0.0.0"], False, "tokens could be read on the way"),
        Exposed("token", LONG, ["0.0.0.0"], True, None),
        Exposed("token", "short", ["0.0.0.0"], True, "a token of 5 characters could be guessed"),
        Exposed("token", "short", ["127.0.0.1"], False, None),
        Exposed("hmac", None, ["0.0.0.0"], False, None),
    ],
)
def test_who_could_send_without_a_secret(case: Exposed, secrets: Path) -> None:
    entry = secretsfile.generate(case.kind)
    if entry and case.secret:
        entry["secret"] = case.secret
    secrets.write_text(secretsfile.dump(entry, None))
    auth = load_auth(secrets)
    if case.complaint is None:
        check_exposure(auth, case.addresses, encrypted=case.encrypted)
        return
    check_exposure(auth, case.addresses, encrypted=case.encrypted, only_known=True)
    with pytest.raises(ConfigError) as caught:
        check_exposure(auth, case.addresses, encrypted=case.encrypted)
    assert case.complaint in str(caught.value)
    assert "--insecure" in str(caught.value)
    assert LONG not in str(caught.value)


def test_secrets_that_others_may_read_are_taken_when_asked_for(secrets: Path) -> None:
    secrets.chmod(0o644)
    link = secrets.with_name("link")
    link.symlink_to(secrets)
    for path, complaint in ((secrets, "chmod 600"), (link, "it is a link")):
        with pytest.raises(ConfigError, match=complaint) as caught:
            load_auth(path)
        assert "--allow-readable-secrets" in str(caught.value)
        load_auth(path, allow_readable=True)
