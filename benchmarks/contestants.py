"""Who takes part: each contestant starts its processes once and then runs trials on demand."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

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
FANS = ("fan1", "fan10", "fan100", "fan")
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


@dataclass(frozen=True)
class Trial:
    """What one trial gave. Times in seconds, `cpu` in seconds of processor time by role."""

    messages: int
    deliveries: int
    expected: int
    failures: int
    first_failure: str | None
    seconds: float
    p50: float
    p99: float
    cpu: dict[str, float]

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
        children = {"publisher": seats.publisher, "server": seats.server, "subscriber": receiver}
        before = {role: child.cpu_seconds() for role, child in children.items()}
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
        after = {role: child.cpu_seconds() for role, child in children.items()}
        return Trial(
            messages=answer["messages"],
            deliveries=deliveries,
            expected=expected,
            failures=answer["failures"],
            first_failure=answer["first failure"],
            seconds=ended - answer["started"],
            p50=answer["p50"],
            p99=answer["p99"],
            cpu={
                role: round(now - then, 2)
                for role in children
                if (now := after[role]) is not None and (then := before[role]) is not None
            },
        )

    async def _received(self, child: Child, count: int, seconds: float) -> tuple[int, float]:
        answer = await child.command("received", count=count, seconds=seconds, timeout=seconds + 5)
        return answer["received"], answer["last"]


class Lonelyps(Contestant):
    """Ours or the older implementation: a broadcaster, a publisher, a subscriber, a sink."""

    crowd_counts = False
    _scheme = "http"

    def __init__(self, name: str, implementation: str, auth: str, *, plain: bool = False) -> None:
        self.name = name
        self.bases = OLDER_HMAC if auth == "hmac" else OLDER_NONE
        self.workloads = ("one", "many", "fan")
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
        return await start_sink(directory, server, secrets, stack)


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
    """A thousand urls on the topic "fan", subscribed as their owner would do it."""
    auth = secretsfile.load(secrets.read_text(), ReplayGuard())
    entry = json.loads(secrets.read_text()).get("to-broadcaster")
    key = [secretsfile.decode_key(entry["secret"]).hex()] if entry else []
    sink = await Child.start(
        "sink", directory, [sys.executable, str(HERE / "sink.py"), "0", *key], commanded=False
    )
    stack.push_async_callback(sink.stop)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        for number in range(CROWD):
            url = f"http://127.0.0.1:{sink.port}/{number}"
            body = SubscribeExact(url=url, topic=b"fan", recovery=None)
            fields = {"url": url, "topic": b"fan", "recovery": None, "tracing": b""}
            value = auth.to_broadcaster.authorize("SUBSCRIBE_EXACT", fields, time.time())
            response = await client.post(
                "/v1/subscribe/exact",
                content=encode(body),
                headers={"Authorization": value} if value else {},
            )
            response.raise_for_status()
    return sink


class Broker(Contestant):
    """Redis or NATS; `share` is another row of the same server, whose processes it uses."""

    def __init__(self, name: str, kind: str, mode: str, share: Broker | None = None) -> None:
        self.name = name
        self.mode = mode
        self.workloads = ("one", "many", "pipe")
        if mode == "confirmed":
            self.workloads += ("fan",)
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
