"""Names to addresses, in threads that hold up nobody."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
import time
from typing import Any

import pytest

from lonelypss import resolver
from lonelypss.resolver import Resolver
from waiting import until

from .harness import within


async def test_names_that_exist_and_do_not() -> None:
    resolve = Resolver(2)
    async with within():
        assert ipaddress.ip_address("127.0.0.1") in await resolve("localhost")
        with pytest.raises(OSError):
            await resolve("does-not-exist.invalid")
    assert not resolve._asked


class Server:
    """Instead of the system's: a name server that hangs cannot be had without one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.answers = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, name: str, *_: Any, **__: Any) -> list[Any]:
        self.asked.append(name)
        if name.startswith("slow"):
            self.answers.wait(20)
        return [(0, 0, 0, "", ("10.0.0.1", 0))]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    one = Server(monkeypatch)
    yield one
    one.answers.set()


async def test_same_name_is_asked_for_once(server: Server) -> None:
    resolve = Resolver(4)
    waiting = [asyncio.ensure_future(resolve("slow")) for _ in range(100)]
    await until(lambda: server.asked)
    waiting[0].cancel()  # which disturbs no other
    server.answers.set()
    async with within():
        got = await asyncio.gather(*waiting[1:])
    assert server.asked == ["slow"]
    assert got == [[ipaddress.ip_address("10.0.0.1")]] * 99


async def test_bounds(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "MAX_ASKED", 3)
    resolve = Resolver(2)
    waiting = [asyncio.ensure_future(resolve(f"slow{n}")) for n in range(3)]
    await until(lambda: len(server.asked) == 2)
    with pytest.raises(OSError, match="outgoing_dns_threads"):
        await resolve("quick")
    server.answers.set()
    async with within():
        await asyncio.gather(*waiting)
        await resolve("quick")
    assert len(server.asked) == 4


async def test_close_waits_for_no_name_server(server: Server) -> None:
    resolve = Resolver(1)
    waiting = [asyncio.ensure_future(resolve(name)) for name in ("slow", "other")]
    await until(lambda: server.asked)
    started = time.monotonic()
    await resolve.close()
    assert time.monotonic() - started < 5
    assert all(task.cancelled() for task in waiting)
    server.answers.set()
    assert all(thread.daemon for thread in threading.enumerate() if "resolve" in thread.name)


def test_answer_after_the_loop_is_gone(server: Server) -> None:
    async def ask() -> None:
        resolve = Resolver(1)
        task = asyncio.ensure_future(resolve("slow"))
        await until(lambda: server.asked)
        await resolve.close()
        assert task.cancelled()

    asyncio.run(ask())
    server.answers.set()
    for thread in threading.enumerate():
        if "resolve" in thread.name:
            thread.join(10)
