"""https, from the client to broadcasters and from broadcasters to its listener."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority
from client.fakes import auth, broadcaster, config, noop, urls
from lonelypsc import tls
from lonelypsc.client import PubSubRequestError
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.helpers.uvicorn_bind_config import handle_bind_with_uvicorn
from lonelypsc.config.ws_config import make_websocket_pub_sub_config
from lonelypsc.http_client import HttpPubSubClient

MANUAL = {"type": "manual", "callback": noop}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def notify(fake: Any, **settings: Any) -> None:
    made = config(
        fake, bind=MANUAL, host="http://h", outgoing_retries_per_broadcaster=1, **settings
    )
    async with HttpPubSubClient(made) as client:
        await client.notify(topic=b"t", data=b"x")


async def test_broadcasters_with_certificates_of_both_sides(
    authority: Authority, tmp_path: Path
) -> None:
    listening = tls.listening(*authority.issue("127.0.0.1"), authority.ca)
    cert, key = authority.issue("us@example.org")
    together = tmp_path / "together.pem"
    together.write_bytes(Path(key).read_bytes() + Path(cert).read_bytes())
    async with broadcaster(tls=listening) as fake:
        assert fake.url.startswith("https:")
        ca = {"tls_ca_file": authority.ca}
        await notify(fake, **ca, tls_client_cert=cert, tls_client_key=key)
        await notify(fake, **ca, tls_client_cert=str(together))
        assert fake.paths == ["/v1/notify"] * 2
        with pytest.raises(PubSubRequestError):  # it shows no certificate
            await notify(fake, **ca)
        stranger = Authority(tmp_path, "other")
        cert, key = stranger.issue("us@example.org", file="stranger")
        with pytest.raises(PubSubRequestError):
            await notify(fake, **ca, tls_client_cert=cert, tls_client_key=key)
        assert len(fake.paths) == 2


@pytest.mark.parametrize(
    ("name", "trusts", "says"),
    [
        ("127.0.0.1", False, "certificate verify failed"),
        ("other.example", True, "certificate verify failed"),
    ],
)
async def test_broadcasters_that_are_not_who_they_should_be(
    name: str, trusts: bool, says: str, authority: Authority
) -> None:
    async with broadcaster(tls=tls.listening(*authority.issue(name), None)) as fake:
        with pytest.raises(PubSubRequestError, match=says):
            await notify(fake, **({"tls_ca_file": authority.ca} if trusts else {}))
        assert fake.paths == []


async def head_of(port: int, context: ssl.SSLContext) -> bytes:
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        try:
            writer.write(b"GET /v1/receive HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            return (await reader.read())[:12]
        finally:
            writer.transport.abort()


@pytest.mark.parametrize("manual", [True, False])
async def test_the_listener_of_the_client(manual: bool, authority: Authority) -> None:
    cert, key = authority.issue("127.0.0.1")
    bind: Any = {"type": "uvicorn", "host": "127.0.0.1", "port": 0}
    bind |= {"tls_cert": cert, "tls_key": key, "tls_client_ca": authority.ca}
    host = "https://127.0.0.1:{port}"
    if manual:
        from programs import free_port

        bind["port"] = free_port()
        host = host.replace("{port}", str(bind["port"]))
        bind = await handle_bind_with_uvicorn(bind)
    async with broadcaster() as fake:
        async with HttpPubSubClient(config(fake, bind=bind, host=host)) as client:
            async with client.subscribe_exact(b"t"):
                url = urls(client)[0]
                assert url in fake.rows
                port = int(url.rpartition(":")[2].partition("/")[0])
                known = authority.connecting(authority.issue("b@example.org"))
                assert await head_of(port, known) == b"HTTP/1.1 405"
                with suppress(OSError):  # in TLS 1.3 it is refused after its handshake
                    assert await head_of(port, authority.connecting()) == b""
                old = authority.connecting(authority.issue("b@example.org"))
                old.maximum_version = ssl.TLSVersion.TLSv1_2
                assert await head_of(port, old) == b"HTTP/1.1 405"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tls_ca_file": "missing.pem"}, "tls_ca_file: .*missing.pem"),
        ({"tls_ca_file": "empty.pem"}, "tls_ca_file: .*empty.pem"),
        ({"tls_client_cert": "empty.pem"}, "tls_client_cert, tls_client_key: .*empty.pem"),
        ({"tls_client_cert": "a.crt", "tls_client_key": "b.key"}, "tls_client_cert, tls_client"),
        ({"tls_client_key": "a.key"}, "tls_client_key: needs tls_client_cert"),
    ],
)
def test_files_that_cannot_be_used(
    settings: dict[str, str], says: str, authority: Authority, tmp_path: Path
) -> None:
    authority.issue("a")
    authority.issue("b")
    (tmp_path / "empty.pem").write_text("")
    made = {name: str(tmp_path / file) for name, file in settings.items()}
    with pytest.raises(ValueError, match=says):
        config("https://h", host="http://h", bind=MANUAL, **made)
    with pytest.raises(ValueError, match=says):
        make_websocket_pub_sub_config(broadcasters=[{"host": "wss://h"}], auth=auth("none"), **made)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tls_cert": "missing"}, "bind: tls_cert, tls_key: .*missing"),
        ({"tls_key": "k"}, "need tls_cert"),
        ({"tls_client_ca": "k"}, "need tls_cert"),
        ({"limits": 5}, "bind: limits"),
    ],
)
def test_binds_that_cannot_be_used(settings: dict[str, Any], says: str) -> None:
    bind = {"type": "uvicorn", "host": "x", "port": 1, **settings}
    with pytest.raises(ValueError, match=says):
        make_http_pub_sub_config(
            bind=bind, host="http://h", broadcasters=[{"host": "http://h"}], auth=auth("none")
        )


def test_a_key_with_a_password_is_refused_and_nobody_is_asked(
    authority: Authority, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization

    cert, key = authority.issue("a")
    opened = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    locked = opened.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    Path(key).write_bytes(locked)
    with pytest.raises(ValueError, match="a key with a password"):
        tls.connecting(None, cert, key)


def test_a_context_and_files_exclude_each_other(authority: Authority) -> None:
    with pytest.raises(ValueError, match="ssl_context"):
        make_websocket_pub_sub_config(
            broadcasters=[{"host": "wss://h"}],
            auth=auth("none"),
            ssl_context=ssl.create_default_context(),
            tls_ca_file=authority.ca,
        )
