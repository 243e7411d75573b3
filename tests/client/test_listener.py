"""Binding: ready when entered, clear errors, gone at once when left."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from client.fakes import broadcaster, config, noop, urls
from lonelypsc import listener as module
from lonelypsc.client import PubSubBindError, PubSubError
from lonelypsc.config.helpers.uvicorn_bind_config import handle_bind_with_uvicorn
from lonelypsc.http_client import HttpPubSubClient
from lonelypsc.listener import Listener, answer


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def uvicorn(port: int, host: str = "127.0.0.1") -> Any:
    return {"type": "uvicorn", "host": host, "port": port}


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await answer(send, 200, b"hello")


async def get(port: int, host: str = "127.0.0.1") -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    reply = await reader.read()
    writer.close()
    await writer.wait_closed()
    return reply


async def test_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        client = HttpPubSubClient(config("http://127.0.0.1:1", bind=uvicorn(port), host="http://h"))
        with pytest.raises(PubSubBindError, match=rf"bind: .*'127.0.0.1', port {port}: Addr") as e:
            await client.__aenter__()
    assert isinstance(e.value, PubSubError)
    assert isinstance(e.value, OSError)


@pytest.mark.parametrize("host", ["192.0.2.1", "does-not-exist.invalid"])
async def test_bad_address_is_named(host: str) -> None:
    client = HttpPubSubClient(config("http://127.0.0.1:1", bind=uvicorn(0, host), host="http://h"))
    with pytest.raises(PubSubBindError, match=host):
        await client.__aenter__()


async def test_without_uvicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn.config", None)
    with pytest.raises(PubSubBindError, match=r"lonelypsc\[standard\]"):
        await Listener("127.0.0.1", 0, hello).start()


async def test_same_port_again_and_again() -> None:
    port = free_port()
    started = time.monotonic()
    for _ in range(20):
        listener = Listener("127.0.0.1", port, hello)
        await listener.start()
        assert b"hello" in await get(port)
        idle = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0)
        await listener.stop()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        idle[1].close()
    print(f"{(time.monotonic() - started) / 20 * 1000:.1f} ms per round")


async def test_running_requests_finish_idle_connections_are_closed() -> None:
    begun, finish = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await finish.wait()
        await answer(send, 200, b"finished")

    listener = Listener("127.0.0.1", 0, slow)
    await listener.start()
    reader, idle = await asyncio.open_connection("127.0.0.1", listener.port)
    running = asyncio.create_task(get(listener.port))
    await begun.wait()
    stopping = asyncio.create_task(listener.stop())
    async with asyncio.timeout(5):
        assert await reader.read() == b""
        assert not stopping.done()
        finish.set()
        await stopping
        assert b"finished" in await running
    idle.close()


async def test_a_request_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE", 0.05)
    begun = asyncio.Event()

    async def stuck(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    listener = Listener("127.0.0.1", 0, stuck)
    await listener.start()
    running = asyncio.create_task(get(listener.port))
    await begun.wait()
    async with asyncio.timeout(5):
        await listener.stop()
        (ended,) = await asyncio.gather(running, return_exceptions=True)
        assert ended == b"" or b"500" in ended.split(b"\r\n")[0]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
async def test_a_name_with_several_addresses() -> None:
    listener = Listener("localhost", 0, hello)
    await listener.start()
    assert b"hello" in await get(listener.port, "localhost")
    await listener.stop()


class TestManual:
    async def test_error_at_once(self) -> None:
        async def bad(router: Any) -> None:
            raise KeyError("at once")

        with pytest.raises(KeyError, match="at once"):
            await HttpPubSubClient(
                config("http://127.0.0.1:1", bind={"type": "manual", "callback": bad})
            ).__aenter__()

    async def test_error_later_is_logged_and_raised_at_exit(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        go = asyncio.Event()

        async def bad(router: Any) -> None:
            await go.wait()
            raise KeyError("later")

        client = HttpPubSubClient(
            config("http://127.0.0.1:1", bind={"type": "manual", "callback": bad})
        )
        await client.__aenter__()
        go.set()
        async with asyncio.timeout(5):
            while "callback of the manual bind failed" not in caplog.text:
                await asyncio.sleep(0)
        with pytest.raises(KeyError, match="later"):
            await client.__aexit__(None, None, None)

    async def test_no_operation(self) -> None:
        async with broadcaster() as fake:
            bind = {"type": "manual", "callback": noop}
            async with HttpPubSubClient(config(fake, bind=bind)) as client:
                assert (await client.notify(topic=b"t", data=b"x")).notified == 0

    async def test_uvicorn_helper(self) -> None:
        port = free_port()
        bind = await handle_bind_with_uvicorn(uvicorn(port))
        async with broadcaster() as fake:
            made = config(fake, bind=bind, host=f"http://127.0.0.1:{port}")
            async with HttpPubSubClient(made) as client:
                async with client.subscribe_exact(b"t"):
                    async with asyncio.timeout(5):
                        while not (await client.notify(topic=b"t", data=b"x")).notified:
                            pass
            with pytest.raises(ConnectionRefusedError):
                await get(port)


@pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="no uvloop")
def test_on_uvloop() -> None:
    import uvloop

    async def rounds() -> None:
        port = free_port()
        for _ in range(3):
            async with broadcaster() as fake:
                made = config(fake, bind=uvicorn(port), host=f"http://127.0.0.1:{port}")
                async with HttpPubSubClient(made) as client:
                    async with client.subscribe_exact(b"t") as subscription:
                        assert urls(client)[0] == f"http://127.0.0.1:{port}/v1/receive"
                        assert (await client.notify(topic=b"t", data=b"x")).notified == 1
                        message = await (await subscription.messages()).__anext__()
                        assert message.data.read() == b"x"

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(rounds())


HEAVY = {"aiohttp", "fastapi", "starlette", "pydantic", "uvicorn", "click", "rich", "websockets"}


@pytest.mark.parametrize("module", ["http_client", "ws_client", "broadcasters", "endpoints"])
def test_importing_the_client_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, lonelypsc.{module}; print(*sys.modules)"
    assert not HEAVY & imported(code)


def test_a_client_that_only_notifies_imports_nothing_heavy() -> None:
    code = """
import asyncio, sys
from lonelypsc.config.config import HttpPubSubConfig
from lonelypsc.http_client import HttpPubSubClient
from lonelypsp.signing import AuthConfig, Nothing
config = HttpPubSubConfig(
    bind={"type": "none"}, host="http://notify-only.invalid",
    broadcasters=[{"host": "http://127.0.0.1:1"}], auth=AuthConfig(Nothing(), Nothing()),
)
async def main():
    async with HttpPubSubClient(config):
        print(*sys.modules)
asyncio.run(main())
"""
    assert not HEAVY & imported(code)


def imported(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found = set(done.stdout.split())
    assert "lonelypsc" in found
    return found
