"""`lonelypss serve` with TLS: both transports, certificates of both sides, new certificates."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority
from lonelypsc.client import PubSubError
from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.ws_config import make_websocket_pub_sub_config
from lonelypsc.http_client import HttpPubSubClient
from lonelypsc.ws_client import WebsocketPubSubClient
from lonelypsp.errors import AuthResult
from lonelypsp.signing import AuthConfig, Fields, Nothing
from lonelypss import server
from lonelypss.config import BroadcasterConfig
from programs import broadcaster, run

NOBODY = AuthConfigFromParts(Nothing(), Nothing())
PATIENCE = 30.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path)
    made.issue("127.0.0.1", file="server")
    return made


def tls(directory: Path, *more: str) -> list[str]:
    return [
        f"--tls-cert={directory}/server.crt",
        f"--tls-key={directory}/server.key",
        f"--outgoing-ca-file={directory}/ca.pem",
        *more,
    ]


def http_client(url: str, authority: Authority, directory: Path, **tls: str) -> Any:
    bind: Any = {"type": "uvicorn", "host": "127.0.0.1", "port": 0}
    bind |= {"tls_cert": f"{directory}/server.crt", "tls_key": f"{directory}/server.key"}
    return HttpPubSubClient(
        make_http_pub_sub_config(
            bind=bind,
            host="https://127.0.0.1:{port}",
            broadcasters=[{"host": url}],
            auth=NOBODY,
            tls_ca_file=authority.ca,
            outgoing_retries_per_broadcaster=1,
            **tls,
        )
    )


def ws_client(url: str, authority: Authority, directory: Path, **tls: str) -> Any:
    return WebsocketPubSubClient(
        make_websocket_pub_sub_config(
            broadcasters=[{"host": url.replace("https", "wss")}],
            auth=NOBODY,
            tls_ca_file=authority.ca,
            outgoing_initial_connect_retries=0,
            **tls,
        )
    )


CLIENTS = {"http": http_client, "websocket": ws_client}


async def round_trip(client: Any) -> None:
    async with client, client.subscribe_exact(b"t") as subscription:
        messages = await subscription.messages()
        async with asyncio.timeout(PATIENCE):
            assert (await client.notify(topic=b"t", data=b"x" * 100_000)).notified == 1
            assert (await anext(messages)).data.read() == b"x" * 100_000


@pytest.mark.parametrize("kind", CLIENTS)
async def test_round_trip(kind: str, authority: Authority, tmp_path: Path) -> None:
    with broadcaster(tmp_path, *tls(tmp_path)) as (_, url):
        assert url.startswith("https://")
        await round_trip(CLIENTS[kind](url, authority, tmp_path))
        other = Authority(tmp_path, "other")
        with pytest.raises(PubSubError):  # whom we do not trust
            await round_trip(CLIENTS[kind](url, other, tmp_path))


class Remembers(Nothing):
    """Remembers who has sent what."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def check(
        self, operation: str, fields: Fields, authorization: str | None, now: float
    ) -> AuthResult:
        self.seen.append((operation, fields.get("peer_certificate")))
        assert "tracing" in set(fields)
        return AuthResult.OK


@asynccontextmanager
async def served(config: BroadcasterConfig) -> AsyncIterator[str]:
    """What `lonelypss serve` runs, in this process."""
    (sock,) = server.bind("127.0.0.1", 0)
    settings = server.Settings(config, None, 5, "warning")
    made = server.make(settings, lambda: None)
    running = asyncio.create_task(made._serve([sock]))
    try:
        async with asyncio.timeout(PATIENCE):
            while not made.started:
                await asyncio.sleep(0.01)
        yield f"https://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        made.should_exit = True
        await running


@pytest.mark.parametrize("kind", CLIENTS)
async def test_who_connects(kind: str, authority: Authority, tmp_path: Path) -> None:
    up = Remembers()
    config = BroadcasterConfig(
        db="sqlite://",
        tls_cert=f"{tmp_path}/server.crt",
        tls_key=f"{tmp_path}/server.key",
        tls_client_ca=authority.ca,
        outgoing_ca_file=authority.ca,
        auth=AuthConfig(up, Nothing()),
    )
    cert, key = authority.issue("127.0.0.1", "me.example", file="me")
    async with served(config) as url:
        await round_trip(
            CLIENTS[kind](url, authority, tmp_path, tls_client_cert=cert, tls_client_key=key)
        )
        before = list(up.seen)
        stranger = Authority(tmp_path, "stranger").issue("me.example", file="stranger")
        for shown in (
            {},
            {"tls_client_cert": stranger[0], "tls_client_key": stranger[1]},
        ):
            with pytest.raises(PubSubError):
                await round_trip(CLIENTS[kind](url, authority, tmp_path, **shown))
        assert up.seen == before
    asked = {op: certificate for op, certificate in up.seen if not op.startswith("CONFIRM")}
    assert {"http": "NOTIFY", "websocket": "STATEFUL_CONFIGURE"}[kind] in asked
    for operation, certificate in asked.items():
        assert certificate is not None, operation
        assert ("DNS", "me.example") in certificate["subjectAltName"]


async def test_without_certificates_there_is_no_such_field(tmp_path: Path) -> None:
    Authority(tmp_path).issue("127.0.0.1", file="server")
    up = Remembers()
    config = BroadcasterConfig(db="sqlite://", auth=AuthConfig(up, Nothing()))
    config = replace(config, tls_cert=f"{tmp_path}/server.crt", tls_key=f"{tmp_path}/server.key")
    async with served(config) as url:
        port = int(url.rpartition(":")[2])
        body = b"\0\0\0\x09http://h/"
        assert (await asyncio.to_thread(ask, port, body)).startswith(b"HTTP/1.1 200 ")
    assert up.seen == [("CHECK_SUBSCRIPTIONS", None)]


def untrusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def ask(port: int, body: bytes) -> bytes:
    head = b"POST /v1/check_subscriptions HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
    with (
        socket.create_connection(("127.0.0.1", port), PATIENCE) as raw,
        untrusting().wrap_socket(raw) as sock,
    ):
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        return sock.recv(100)


def test_connections_that_are_none(authority: Authority, tmp_path: Path) -> None:
    """Old TLS, no TLS, half a handshake: closed, in time, without a word in the log."""
    options = ["--db=sqlite://", "--incoming-http-timeout-head=1"]
    with broadcaster(tmp_path, *tls(tmp_path, *options)) as (program, url):
        port = int(url.rpartition(":")[2])
        old = untrusting()
        old.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            old.minimum_version = ssl.TLSVersion.TLSv1
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
            with pytest.raises(OSError):
                old.wrap_socket(sock)
        for said in (b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b""):
            started = time.monotonic()
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
                sock.sendall(said)
                with suppress(ConnectionResetError):
                    while sock.recv(100):  # an alert, perhaps
                        pass
            assert time.monotonic() - started < PATIENCE
        assert ask(port, b"\0\0\0\x09http://h/").startswith(b"HTTP/1.1 200 ")
        assert program.stop() == 0
        assert not [line for line in program.rest() if "Traceback" in line or "ERROR" in line]


@pytest.mark.parametrize("workers", [1, 2])
def test_new_certificates(workers: int, authority: Authority, tmp_path: Path) -> None:
    with broadcaster(tmp_path, f"--workers={workers}", *tls(tmp_path)) as (program, url):
        port = int(url.rpartition(":")[2])

        def shown() -> bytes:
            with (
                socket.create_connection(("127.0.0.1", port), PATIENCE) as raw,
                untrusting().wrap_socket(raw) as sock,
            ):
                return sock.getpeercert(binary_form=True) or b""

        begun = "other broadcasters reach the websockets of this one"
        while sum(begun in line for line in program.seen) < workers:
            program.line(begun)
        first = shown()
        authority.issue("127.0.0.1", file="server")
        (tmp_path / "good.key").write_bytes((tmp_path / "server.key").read_bytes())
        (tmp_path / "server.key").write_text("not a key")
        program.process.send_signal(signal.SIGHUP)
        for _ in range(workers):
            program.line("the certificate that is in use stays: tls_cert: .*server.crt")
        assert {shown() for _ in range(10)} == {first}
        (tmp_path / "good.key").rename(tmp_path / "server.key")
        program.process.send_signal(signal.SIGHUP)
        for _ in range(workers):
            program.line("new connections get what is now in")
        second = {shown() for _ in range(10)}
        assert len(second) == 1
        assert first not in second
        assert program.stop() == 0


async def test_broadcasters_reach_each_other_over_https(
    authority: Authority, tmp_path: Path
) -> None:
    authority.issue("127.0.0.1", file="peer")
    options = tls(
        tmp_path,
        f"--tls-client-ca={authority.ca}",
        f"--outgoing-client-cert={tmp_path}/peer.crt",
        f"--outgoing-client-key={tmp_path}/peer.key",
        "--peer-url=https://127.0.0.1:{port}",
    )
    cert, key = authority.issue("127.0.0.1", file="me")
    shown = {"tls_client_cert": cert, "tls_client_key": key}
    with broadcaster(tmp_path, *options) as (_, one), broadcaster(tmp_path, *options) as (_, two):
        async with (
            ws_client(one, authority, tmp_path, **shown) as here,
            ws_client(two, authority, tmp_path, **shown) as there,
            there.subscribe_exact(b"t") as subscription,
        ):
            messages = await subscription.messages()
            async with asyncio.timeout(PATIENCE):
                assert (await here.notify(topic=b"t", data=b"x")).notified == 1
                assert (await anext(messages)).data.read() == b"x"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tls-key=k"], "tls_key and tls_client_ca need tls_cert"),
        (["--tls-client-ca=k"], "tls_key and tls_client_ca need tls_cert"),
        (["--tls-cert=missing.pem"], "tls_cert: missing.pem: "),
        (["--tls-cert=ca.pem"], "tls_cert: ca.pem: "),
        (["--tls-cert=a.crt", "--tls-key=b.key"], "tls_cert: a.crt, tls_key: b.key: "),
        (
            ["--tls-cert=a.crt", "--tls-key=a.key", "--tls-client-ca=missing.pem"],
            "tls_client_ca: missing.pem: ",
        ),
        (["--peer-url=https://h:{port}"], "peer_url: .* https there needs tls_cert"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_options_that_cannot_work(
    command: str, options: list[str], says: str, authority: Authority, tmp_path: Path
) -> None:
    import re

    authority.issue("a")
    authority.issue("b")
    ended = run("lonelypss", command, *options, cwd=tmp_path)
    assert ended.returncode == 2
    assert re.search(f"lonelypss: {says}", ended.stderr), ended.stderr
