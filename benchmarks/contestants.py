"""Who takes part: each contestant starts its processes once and then runs trials on demand."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import environments
import httpx
from processes import Child, free_port

from lonelypsp import secretsfile
from lonelypsp.bodies import SubscribeExact
from lonelypsp.replay import ReplayGuard
from lonelypsp.wire import encode

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
CROWD = 1000
DEAD = (4, 3, 3)
"""Hosts among them that refuse connections, that never answer, and that cannot be reached."""
MOST_LEARNING = 10
"""Messages after which dead hosts that still delay are taken for what they are."""
FANS = ("fan1", "fan10", "fan100", "fan", "fan16")
OLDER_HMAC = ("older, hmac", "older, hmac, no uvloop")
OLDER_NONE = ("older, none", "older, none, no uvloop")
PATIENCE = 90.0
"""Seconds beyond the bound of a trial after which it is a failure and not a slow one."""


@dataclass(frozen=True)
class Workload:
    """One column of work, and what bounds one trial of it."""

    key: str
    title: str
    topic: str
    in_flight: int
    subscribers: int
    count: int
    seconds: float

    @property
    def unit(self) -> str:
        if self.key == "subscribe":
            return "request"
        return "message" if self.subscribers == 1 else "delivery"


@dataclass(frozen=True)
class Trial:
    """What one trial gave. Times in seconds, `cpu` in seconds of processor time by role.

    Attributes:
        plain: with dead hosts, the rate of the same fan-out without them, right before and after.
    """

    messages: int
    deliveries: int
    expected: int
    failures: int
    first_failure: str | None
    seconds: float
    p50: float
    p99: float
    cpu: dict[str, float]
    plain: float | None = None

    @property
    def rate(self) -> float:
        return self.deliveries / self.seconds


@dataclass
class Seats:
    """The processes of one contestant, and how many messages each receiver has had so far."""

    server: Child
    publisher: Child
    one: Child
    crowd: Child | None = None


class Contestant(ABC):
    """One row of a table.

    Attributes:
        name: of the row.
        bases: names of the rows of the older implementation that it is compared with; the best of
            them counts.
        mode: what a publisher waits for, see its role.
        workloads: keys of those it takes part in.
        crowd_counts: whether the crowd can tell what it got; if not, what was confirmed counts.
    """

    name: str
    bases: tuple[str, ...] = OLDER_HMAC
    mode: str = "confirmed"
    workloads: tuple[str, ...]
    crowd_counts: bool = True

    @abstractmethod
    async def start(self, directory: Path, stack: AsyncExitStack) -> None:
        """Starts everything; `stack` ends it. Raises UnavailableError or ChildError."""

    @property
    @abstractmethod
    def seats(self) -> Seats: ...

    async def trial(self, work: Workload, *, count: int, seconds: float) -> Trial:
        seats = self.seats
        receiver = seats.one if work.topic == "one" else seats.crowd
        assert receiver is not None
        counts = self.crowd_counts or work.subscribers == 1
        usage = Usage(publisher=seats.publisher, server=seats.server, subscriber=receiver)
        earlier = await self._received(receiver, 0, 0) if counts else (0, 0.0)

        answer = await seats.publisher.command(
            "load",
            topic=work.topic,
            mode=self.mode,
            in_flight=work.in_flight,
            count=count,
            seconds=seconds,
            timeout=seconds + PATIENCE,
        )
        expected = answer["messages"] * work.subscribers
        ended: float = answer["ended"]
        if counts:
            # what failed for the publisher may still arrive, or never
            patience = 1.0 if answer["failures"] else PATIENCE
            received, last = await self._received(receiver, earlier[0] + expected, patience)
            deliveries = received - earlier[0]
            ended = max(ended, last)
        else:
            deliveries = answer["confirmed"]
        return _trial(answer, deliveries, expected, ended, usage)

    async def _received(self, child: Child, count: int, seconds: float) -> tuple[int, float]:
        answer = await child.command("received", count=count, seconds=seconds, timeout=seconds + 5)
        return answer["received"], answer["last"]


class Usage:
    """Processor time of some processes from now on, by role."""

    def __init__(self, **children: Child) -> None:
        self._children = children
        self._before = {role: child.cpu_seconds() for role, child in children.items()}

    def seconds(self) -> dict[str, float]:
        return {
            role: round(now - then, 2)
            for role, child in self._children.items()
            if (now := child.cpu_seconds()) is not None and (then := self._before[role]) is not None
        }


def _trial(
    answer: dict[str, Any], deliveries: int, expected: int, ended: float, usage: Usage
) -> Trial:
    return Trial(
        messages=answer["messages"],
        deliveries=deliveries,
        expected=expected,
        failures=answer["failures"],
        first_failure=answer["first failure"],
        seconds=ended - answer["started"],
        p50=answer["p50"],
        p99=answer["p99"],
        cpu=usage.seconds(),
    )


class Lonelyps(Contestant):
    """Ours or the older implementation: a broadcaster, a publisher, a subscriber, a sink.

    Attributes:
        learning: seconds that each message took until dead hosts delayed no more.
    """

    crowd_counts = False
    _scheme = "http"

    def __init__(self, name: str, implementation: str, auth: str, *, plain: bool = False) -> None:
        self.name = name
        self.bases = OLDER_HMAC if auth == "hmac" else OLDER_NONE
        self.workloads = ("one", "many", "fan", "subscribe")
        if implementation == "ours":
            self.workloads += ("dead",)
        self.learning: list[float] = []
        self._implementation = implementation
        self._auth = auth
        self._plain = plain

    @property
    def seats(self) -> Seats:
        return self._seats

    def python(self) -> Path:
        if self._implementation == "ours":
            return Path(sys.executable)
        return environments.reference_as_in_tests() if self._plain else environments.reference()

    async def start(self, directory: Path, stack: AsyncExitStack) -> None:
        python = await asyncio.to_thread(self.python)
        directory = directory / self.name.replace(" ", "-").replace(",", "")
        directory.mkdir()
        secrets = write_secrets(directory, self._auth)
        server = await start_broadcaster(self._implementation, python, directory, secrets, stack)
        publisher, one = [
            await start_client(
                role, self._implementation, python, directory, server, secrets, stack, self._scheme
            )
            for role in ("publisher", "subscriber")
        ]
        await one.command("subscribe", topic="one", timeout=PATIENCE)
        self._seats = Seats(server, publisher, one)
        self._seats.crowd = await self._start_crowd(directory, server, secrets, stack)

    async def _start_crowd(
        self, directory: Path, server: Child, secrets: Path, stack: AsyncExitStack
    ) -> Child:
        sink = await start_sink(directory, server, secrets, stack)
        if "dead" in self.workloads:
            dead = await start_dead(directory, stack)
            alive = [(f"http://127.0.0.1:{sink.port}/{n}", None) for n in range(CROWD - len(dead))]
            # their owners would be told that they missed something
            gone = [(f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{port}/r") for port in dead]
            await subscribe(server, secrets, b"dead", [*alive, *gone])
        return sink

    async def trial(self, work: Workload, *, count: int, seconds: float) -> Trial:
        if work.key == "subscribe":
            return await self._subscriptions(work, count, seconds)
        if work.key != "dead":
            return await super().trial(work, count=count, seconds=seconds)
        while not self.learning or (self.learning[-1] > 1 and len(self.learning) < MOST_LEARNING):
            self.learning.append((await super().trial(work, count=1, seconds=1)).seconds)
        plain = replace(work, topic="fan", subscribers=CROWD)
        before = await super().trial(plain, count=count, seconds=seconds / 2)
        trial = await super().trial(work, count=count, seconds=seconds)
        after = await super().trial(plain, count=count, seconds=seconds / 2)
        deliveries = before.deliveries + after.deliveries
        return replace(trial, plain=deliveries / (before.seconds + after.seconds))

    async def _subscriptions(self, work: Workload, count: int, seconds: float) -> Trial:
        usage = Usage(client=self._seats.one, server=self._seats.server)
        answer = await self._seats.one.command(
            "subscriptions",
            topic=work.topic,
            in_flight=work.in_flight,
            count=count,
            seconds=seconds,
            timeout=seconds + PATIENCE,
        )
        return _trial(answer, answer["confirmed"], answer["messages"], answer["ended"], usage)


class LonelypsWebsocket(Lonelyps):
    """The same with a websocket for each of publisher, subscriber, and the crowd."""

    crowd_counts = True
    _scheme = "ws"

    def __init__(self, implementation: str, auth: str) -> None:
        who = "lonelyps" if implementation == "ours" else "older"
        super().__init__(f"{who} websocket, {auth}", implementation, auth)
        self.bases = (f"older websocket, {auth}",)
        self.workloads = ("one", "many", "pipe", *FANS)

    async def _start_crowd(
        self, directory: Path, server: Child, secrets: Path, stack: AsyncExitStack
    ) -> Child:
        command = [sys.executable, PEERS / "ws_crowd.py", str(server.port), str(CROWD)]
        if self._auth == "hmac":
            command.append(secrets)
        crowd = await Child.start("crowd", directory, command)
        stack.push_async_callback(crowd.stop)
        return crowd


def write_secrets(directory: Path, kind: str) -> Path:
    path = directory / "subscriber-secrets.json"
    path.write_text(secretsfile.dump(secretsfile.generate(kind), secretsfile.generate(kind)))
    path.chmod(0o600)
    return path


async def start_broadcaster(
    implementation: str, python: Path, directory: Path, secrets: Path, stack: AsyncExitStack
) -> Child:
    if implementation == "ours":
        command: list[str | Path] = [python, PEERS / "our_broadcaster.py", directory, secrets]
    else:
        script = environments.INTEROP / "reference_broadcaster.py"
        command = [python, PEERS / "older_broadcaster.py", script]
        command += ["--directory", directory, "--secrets", secrets]
    child = await Child.start("broadcaster", directory, command)
    stack.push_async_callback(child.stop)
    return child


async def start_client(
    role: str,
    implementation: str,
    python: Path,
    directory: Path,
    server: Child,
    secrets: Path,
    stack: AsyncExitStack,
    scheme: str = "http",
    name: str = "",
) -> Child:
    url = f"{scheme}://127.0.0.1:{server.port}"
    command = [python, PEERS / "lonelyps_client.py", role, implementation, url, str(free_port())]
    if "hmac" in secrets.read_text():
        command.append(secrets)
    child = await Child.start(name or role, directory, command)
    stack.push_async_callback(child.stop)
    return child


async def start_sink(directory: Path, server: Child, secrets: Path, stack: AsyncExitStack) -> Child:
    """A thousand urls on the topic "fan"."""
    entry = json.loads(secrets.read_text()).get("to-broadcaster")
    key = [secretsfile.decode_key(entry["secret"]).hex()] if entry else []
    sink = await Child.start(
        "sink", directory, [sys.executable, str(HERE / "sink.py"), "0", *key], commanded=False
    )
    stack.push_async_callback(sink.stop)
    urls = [(f"http://127.0.0.1:{sink.port}/{number}", None) for number in range(CROWD)]
    await subscribe(server, secrets, b"fan", urls)
    return sink


async def start_dead(directory: Path, stack: AsyncExitStack) -> list[int]:
    """Ports of ten hosts that are dead, each in one of three ways."""
    dead = await Child.start(
        "dead", directory, [sys.executable, PEERS / "dead.py", *map(str, DEAD)]
    )
    stack.push_async_callback(dead.stop)
    ports: list[int] = (await dead.command("ports", timeout=5))["ports"]
    return ports


async def subscribe(
    server: Child, secrets: Path, topic: bytes, urls: Sequence[tuple[str, str | None]]
) -> None:
    """Subscribes pairs of url and recovery url as their owner would do it."""
    auth = secretsfile.load(secrets.read_text(), ReplayGuard())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        for url, recovery in urls:
            body = SubscribeExact(url=url, topic=topic, recovery=recovery)
            fields = {"url": url, "topic": topic, "recovery": recovery, "tracing": b""}
            value = auth.to_broadcaster.authorize("SUBSCRIBE_EXACT", fields, time.time())
            response = await client.post(
                "/v1/subscribe/exact",
                content=encode(body),
                headers={"Authorization": value} if value else {},
            )
            response.raise_for_status()


class Broker(Contestant):
    """Redis or NATS; `share` is another row of the same server, whose processes it uses."""

    def __init__(self, name: str, kind: str, mode: str, share: Broker | None = None) -> None:
        self.name = name
        self.mode = mode
        self.workloads = ("one", "many", "pipe")
        if mode == "confirmed":
            self.workloads += ("fan", "fan16")
        self._kind = kind
        self._share = share
        self._seats: Seats | None = None

    @property
    def seats(self) -> Seats:
        assert self._seats is not None
        return self._seats

    async def start(self, directory: Path, stack: AsyncExitStack) -> None:
        if self._share is not None:
            if self._share._seats is None:
                await self._share.start(directory, stack)
            self._seats = self._share.seats
            return
        make = environments.redis if self._kind == "redis" else environments.nats
        python = await asyncio.to_thread(make)
        directory = directory / self._kind
        directory.mkdir(exist_ok=True)
        port = free_port()
        server = await Child.start(
            "server", directory, self._server(python, port), ready=self._ready(), commanded=False
        )
        stack.push_async_callback(server.stop)

        async def role(name: str, *arguments: str) -> Child:
            script = "crowd.py" if name == "crowd" else f"{self._kind}_client.py"
            child = await Child.start(name, directory, [python, PEERS / script, *arguments])
            stack.push_async_callback(child.stop)
            return child

        publisher = await role("publisher", "publisher", str(port))
        one = await role("subscriber", "subscriber", str(port))
        await one.command("subscribe", topic="one", timeout=PATIENCE)
        crowd = await role("crowd", self._kind, str(port), "fan", str(CROWD))
        self._seats = Seats(server, publisher, one, crowd)

    def _server(self, python: Path, port: int) -> list[str | Path]:
        if self._kind == "nats":
            return [python.with_name("nats-server"), "-a", "127.0.0.1", "-p", str(port)]
        options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        return [environments.valkey_server(python), "--port", str(port), *options]

    def _ready(self) -> bytes:
        return b"Server is ready" if self._kind == "nats" else b"Ready to accept connections"


def contestants(suite: str) -> list[Contestant]:
    """All rows of "http" or "websocket", in the order of the tables."""
    redis = Broker("Redis, subscriber replies", "redis", "confirmed")
    nats = Broker("NATS, request", "nats", "confirmed")
    ours: list[Contestant] = [
        Lonelyps("lonelyps, hmac", "ours", "hmac"),
        Lonelyps("lonelyps, none", "ours", "none"),
        Lonelyps(OLDER_HMAC[0], "reference", "hmac"),
        Lonelyps(OLDER_HMAC[1], "reference", "hmac", plain=True),
        Lonelyps(OLDER_NONE[0], "reference", "none"),
        Lonelyps(OLDER_NONE[1], "reference", "none", plain=True),
    ]
    if suite == "websocket":
        ours = [LonelypsWebsocket(i, a) for i in ("ours", "reference") for a in ("hmac", "none")]
    return [
        *ours,
        redis,
        Broker("Redis, PUBLISH", "redis", "publish", share=redis),
        nats,
        Broker("NATS, publish and flush", "nats", "publish", share=nats),
    ]
