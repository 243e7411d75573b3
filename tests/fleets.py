"""Broadcasters as programs that share a database, and clients that count what they get."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import postgres
from broadcaster.harness import Peer
from lonelypsc.client import PubSubClient
from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.config.ws_config import make_websocket_pub_sub_config
from lonelypsc.http_client import HttpPubSubClient
from lonelypsc.ws_client import WebsocketPubSubClient
from lonelypss.config import BroadcasterConfig
from lonelypss.store import Store
from lonelypss.store.choose import make_store
from programs import Program, command, free_port, run, started
from servers import read_auth

DEADLINE = 60.0


@dataclass
class Fleet:
    """Broadcasters that share a database, authorization included."""

    directory: Path
    db: str
    workers: int
    ports: list[int]
    options: tuple[str, ...] = ()
    programs: dict[int, Program] = field(default_factory=dict)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    async def start(self, port: int) -> None:
        argv = command(
            "lonelypss", "serve", f"--port={port}", f"--db={self.db}", f"--workers={self.workers}",
            "--peer-lease=3", "--missed-constant=0.2", "--missed-expo-factor=0",
            "--missed-jitter=0", *self.options,
        )  # fmt: skip
        program = self.stack.enter_context(started(argv, self.directory))
        await asyncio.to_thread(program.line, "lonelypss listens on")
        self.programs[port] = program

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        """What the database holds, past the broadcasters."""
        url = self.db.replace("sqlite:///", f"sqlite:///{self.directory}/")
        store = make_store(BroadcasterConfig(db=url))
        await store.open()
        try:
            yield store
        finally:
            await store.close()

    def peer(self) -> Peer:
        """Makes requests one by one, and sees each answer as it is."""
        return Peer(read_auth(self.directory / "subscriber-secrets.json"))

    def client(self, kind: str, *urls: str) -> PubSubClient:
        """One that knows these broadcasters, or all."""
        auth = AuthConfigFromParts(
            *get_auth_config_from_file(self.directory / "subscriber-secrets.json")
        )
        hosts = urls or self.urls
        if kind == "websocket":
            return WebsocketPubSubClient(
                make_websocket_pub_sub_config(
                    broadcasters=[{"host": url.replace("http", "ws", 1)} for url in hosts],
                    auth=auth,
                )
            )
        return HttpPubSubClient(
            make_http_pub_sub_config(
                bind={"type": "uvicorn", "host": "127.0.0.1", "port": 0},
                host="http://127.0.0.1:{port}",
                broadcasters=[{"host": url} for url in hosts],
                auth=auth,
                outgoing_retries_per_broadcaster=5,
            )
        )


DATABASES: dict[str, Callable[[Path], str]] = {
    "sqlite": lambda directory: "sqlite:///one.db",
    "postgres": lambda directory: postgres.shared().database(),
}


@asynccontextmanager
async def running(
    directory: Path, database: str, workers: int, number: int, *options: str
) -> AsyncIterator[Fleet]:
    """A fleet on one of `DATABASES`, or at a database url."""
    assert run("lonelypss", "setup", cwd=directory).returncode == 0
    ports = [free_port() for _ in range(number)]
    make = DATABASES.get(database, lambda _: database)
    fleet = Fleet(directory, make(directory), workers, ports, options)
    async with fleet.stack:
        await asyncio.gather(*(fleet.start(port) for port in ports))
        yield fleet
        for program in fleet.programs.values():
            assert await asyncio.to_thread(program.stop) == 0, program.rest()


class Receiver:
    """A client that wants topics, and what it got."""

    def __init__(self, client: PubSubClient, **topics: Any) -> None:
        self.client = client
        self.topics = topics
        self.got: Counter[bytes] = Counter()
        self.gaps = 0
        self.news = asyncio.Event()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Receiver]:
        async with (
            self.client,
            self.client.subscribe(on_receiving=self._receiving, **self.topics) as subscription,
        ):
            reader = asyncio.create_task(self._read(await subscription.messages()))
            try:
                yield self
            finally:
                reader.cancel()
                await asyncio.wait([reader])

    async def _receiving(self) -> None:
        self.gaps += 1
        self.news.set()

    async def _read(self, messages: Any) -> None:
        async for message in messages:
            self.got[message.data.read()] += 1
            self.news.set()

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not done():
                self.news.clear()
                await self.news.wait()
