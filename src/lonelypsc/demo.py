"""`lonelypsc demo`: everything once, small, in a temporary directory."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from fastapi import APIRouter

from lonelypsc.client import PubSubClient, PubSubClientSubscription
from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import HttpPubSubBind, make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.http_client import HttpPubSubClient

_PATIENCE = 20.0
_LISTEN: HttpPubSubBind = {"type": "uvicorn", "host": "127.0.0.1", "port": 0}
# so that nobody waits long for the notice to the subscriber that died
_QUICK_NOTICES = ("--missed-constant=1", "--missed-expo-factor=0", "--missed-jitter=0")


class DemoFailed(Exception):
    """Something did not happen as it should."""


class Say(Protocol):
    """Tells the user what happened: a name for scripts, a text for people."""

    def __call__(self, event: str, text: str, **fields: Any) -> None: ...


async def run(say: Say) -> None:
    """Shows how it works, then removes everything.

    Raises:
        DemoFailed: it does not.
    """
    with tempfile.TemporaryDirectory(prefix="lonelyps-demo-") as directory:
        try:
            async with asyncio.timeout(3 * _PATIENCE), AsyncExitStack() as stack:
                await _Demo(Path(directory), say, stack).play()
        except TimeoutError:
            raise DemoFailed("the demo took too long; is this machine very busy?") from None
    say("done", "\nDone; everything is removed again. Next: lonelypss setup")


class _Demo:
    def __init__(self, directory: Path, say: Say, stack: AsyncExitStack) -> None:
        self._directory = directory
        self._say = say
        self._stack = stack
        self._secrets = str(directory / "subscriber-secrets.json")

    async def play(self) -> None:
        await self._start_broadcaster()
        await self._deliver()
        await self._miss()

    async def _start_broadcaster(self) -> None:
        setup = await self._stack.enter_async_context(self._program("lonelypss", "setup"))
        await setup.communicate()
        if setup.returncode:
            raise DemoFailed("`lonelypss setup` failed; pip install 'lonelypsc[standard]'")
        self._say("setup", "1. lonelypss setup: secrets for hmac in both directions")
        process = await self._stack.enter_async_context(
            self._program("lonelypss", "serve", "--port=0", "--json", *_QUICK_NOTICES)
        )
        self._broadcaster = (await _event(process, "listening"))["url"]
        self._say(
            "broadcaster",
            f"2. a broadcaster with an SQLite database listens on {self._broadcaster}",
            url=self._broadcaster,
        )

    async def _deliver(self) -> None:
        one, two = await self._client(_LISTEN), await self._client(_LISTEN)
        exact = await self._stack.enter_async_context(one.subscribe_exact(b"orders/42"))
        self._say("subscribed", "3. subscriber A wants exactly orders/42", exact="orders/42")
        glob = await self._stack.enter_async_context(two.subscribe_glob("orders/*"))
        self._say("subscribed", "   subscriber B wants orders/* (a glob)", glob="orders/*")

        async def bind_nothing(router: APIRouter) -> None: ...

        self._publisher = await self._client({"type": "manual", "callback": bind_nothing})
        receiving = asyncio.gather(_first(exact), _first(glob))
        await self._notify("4.", b"orders/42", b"it is paid", 2)
        for name, text in zip("AB", await receiving, strict=True):
            self._say("message", f"   {name} received {text!r}", subscriber=name, data=text)
        await self._notify("5.", b"orders/43", b"it is new", 1)

    async def _miss(self) -> None:
        port = _free_port()
        async with self._listener(port) as victim:
            await _event(victim, "listening")
            self._say("subscribed", "6. subscriber C, another program, wants orders/42, too")
            victim.kill()
            await victim.wait()
        self._say("killed", "   C is killed: no time to unsubscribe")
        await self._notify("7.", b"orders/42", b"it is sent", 2)
        self._say("missed", "   C did not get it: the broadcaster notes a MISSED notice for C")
        async with self._listener(port) as reborn:
            await _event(reborn, "listening")
            self._say("restarted", "8. C is started again")
            await _event(reborn, "gap")
            self._say("recovered", "   C got the notice: it knows that messages were missed")
            reborn.terminate()
            await reborn.wait()

    async def _notify(self, step: str, topic: bytes, data: bytes, expected: int) -> None:
        result = await self._publisher.notify(topic=topic, data=data)
        self._say(
            "notified",
            f"{step} the publisher sends {data.decode()!r} on {topic.decode()}:"
            f" {result.notified} confirmed",
            topic=topic.decode(),
            notified=result.notified,
        )
        if result.notified != expected:
            raise DemoFailed(f"{result.notified} instead of {expected} got the message")

    async def _client(self, bind: HttpPubSubBind) -> PubSubClient:
        manual = bind["type"] == "manual"
        config = make_http_pub_sub_config(
            bind=bind,
            host="http://127.0.0.1" if manual else "http://127.0.0.1:{port}",
            broadcasters=[{"host": self._broadcaster}],
            auth=AuthConfigFromParts(*get_auth_config_from_file(self._secrets)),
        )
        return await self._stack.enter_async_context(HttpPubSubClient(config))

    @asynccontextmanager
    async def _listener(self, port: int) -> AsyncIterator[Process]:
        options = ("--exact=orders/42", f"--bind=127.0.0.1:{port}", "--json")
        where = (f"--broadcaster={self._broadcaster}", f"--secrets={self._secrets}")
        async with self._program("lonelypsc", "listen", *options, *where) as process:
            yield process

    @asynccontextmanager
    async def _program(self, module: str, *arguments: str) -> AsyncIterator[Process]:
        """`python -m module arguments`, ended at the latest with the context."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LONELYPS")}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *arguments),
            cwd=self._directory,
            env=environment,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=DEVNULL,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
            await process.communicate()


async def _event(process: Process, name: str) -> Any:
    """The next line of that name which `process` prints with --json."""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_PATIENCE):
            while line := await process.stdout.readline():
                event = json.loads(line)
                if event["event"] == name:
                    return event
    except TimeoutError:
        raise DemoFailed(f"no {name!r} within {_PATIENCE:.0f} s") from None
    raise DemoFailed(f"a program ended before it printed {name!r}")


async def _first(subscription: PubSubClientSubscription) -> str:
    async for message in await subscription.messages():
        return message.data.read().decode()
    raise DemoFailed("no message arrived")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port
