"""Start, drive and stop peers of the older implementation from a test.

    async with reference_broadcaster(tmp_path, secrets=secrets) as broadcaster:
        async with reference_client(tmp_path, broadcaster.url, secrets=secrets) as client:
            await client.subscribe_exact(b"topic")
            assert await client.notify(b"topic", b"hello") == 1
            message = await client.next_message()

Everything waits for what it needs with a deadline, and fails with the stderr of the process
in its text. The stderr of every process is also written to the test's own when the process
has ended, so that pytest shows it with a failure.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import secrets as random_secrets
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from .reference_venv import reference_python

HERE = Path(__file__).resolve().parent
# Long, because a busy machine may take seconds only to import the packages of a peer.
DEADLINE = 30.0
STOP_DEADLINE = 20.0
LONGEST_LINE = 16 * 1024 * 1024
# Not among the ports that the system gives to outgoing connections, so that none of those
# takes a port between our choosing it and its being bound.
PORTS = range(20_000, 32_000)
PORT_TRIES = 5

Scheme = Literal["none", "token", "hmac"]


class PeerError(Exception):
    """A peer ended or did not do in time what the test waited for."""


class PeerCommandError(Exception):
    """The peer answered a command with an error; `error` is the name of its type there."""

    def __init__(self, error: str, message: str) -> None:
        super().__init__(f"{error}: {message}")
        self.error = error


def free_port(host: str = "127.0.0.1") -> int:
    for _ in range(100):
        port = random.SystemRandom().choice(PORTS)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            with contextlib.suppress(OSError):
                probe.bind((host, port))
                return port
    raise PeerError(f"no free port in {PORTS} on {host}")


def make_payload(size: int, seed: int = 0) -> bytes:
    """What `ReferenceClient.notify_generated` sends for the same arguments."""
    return random.Random(seed).randbytes(size)


def write_secrets(
    directory: Path, to_broadcaster: Scheme = "hmac", to_subscriber: Scheme | None = None
) -> Path:
    """A new subscriber-secrets.json with random secrets, the same scheme both ways if not said."""
    contents: dict[str, Any] = {"version": "2"}
    for direction, scheme in (
        ("to-broadcaster", to_broadcaster),
        ("to-subscriber", to_subscriber or to_broadcaster),
    ):
        if scheme != "none":
            contents[direction] = {"type": scheme, "secret": random_secrets.token_urlsafe(64)}
    path = directory / f"secrets-{random_secrets.token_hex(4)}.json"
    path.write_text(json.dumps(contents))
    return path


def strong_etag(
    url: str, recovery: str, *, exact: Iterable[bytes] = (), globs: Iterable[str] = ()
) -> bytes:
    """The etag of a url's subscriptions, worked out independently of the code under test."""

    def field(value: bytes) -> bytes:
        return struct.pack(">H", len(value)) + value

    missed = field(recovery.encode())
    document = b"URL" + field(url.encode())
    document += b"\nEXACT" + b"".join(field(topic) + missed for topic in sorted(exact))
    encoded = sorted(glob.encode() for glob in globs)
    document += b"\nGLOB" + b"".join(field(glob) + missed for glob in encoded) + b"\n"
    return hashlib.sha512(document).digest()


class Peer:
    """A child process; its stdin is kept open as long as it shall live."""

    def __init__(self, process: asyncio.subprocess.Process, stderr_path: Path) -> None:
        self._process = process
        self._stderr_path = stderr_path

    @classmethod
    async def start(cls, directory: Path, script: str, *arguments: str) -> Self:
        # Finding the interpreter is quick once conftest.py has had the environment made.
        python = await asyncio.to_thread(reference_python)
        stderr_path = directory / f"{Path(script).stem}-{random_secrets.token_hex(4)}.stderr"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        with stderr_path.open("wb") as stderr:
            # -I: neither this folder nor anything of ours may be importable there
            process = await asyncio.create_subprocess_exec(
                str(python),
                "-I",
                "-u",
                str(HERE / script),
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                limit=LONGEST_LINE,
                env=environment,
            )
        return cls(process, stderr_path)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def stderr(self) -> str:
        return self._stderr_path.read_text(errors="replace")

    def failure(self, what: str) -> PeerError:
        text = f"{self._stderr_path.stem} (pid {self.pid}, exit status {self.returncode}): {what}"
        return PeerError(f"{text}\n{self.stderr()[-8000:]}")

    async def read_line(self) -> bytes:
        assert self._process.stdout is not None
        return await self._process.stdout.readline()

    async def write_line(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise self.failure("does not read any more") from exc

    async def kill(self) -> None:
        """As a crash would end it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def stop(self) -> None:
        """Let it end in good order, which the end of its input asks for, or end it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_DEADLINE):
                await self._process.wait()
        finally:
            await self.kill()

    async def discard(self) -> None:
        """Last step of every test: no process and no transport stays, and its log is shown."""
        try:
            with contextlib.suppress(TimeoutError):
                await self.stop()
        finally:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                await self._process.stdin.wait_closed()
            if text := self.stderr():
                print(f"--- {self._stderr_path.stem} (pid {self.pid})\n{text}", file=sys.stderr)


class ReferenceBroadcaster(Peer):
    port: int
    directory: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def websocket_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    async def wait_until_ready(self) -> None:
        try:
            async with asyncio.timeout(DEADLINE):
                line = await self.read_line()
                if not line:
                    await self._process.wait()
        except TimeoutError as exc:
            raise self.failure("is not ready in time") from exc
        word, _, port = line.decode().partition(" ")
        if word != "READY":
            raise self.failure("did not start")
        self.port = int(port)

    async def discard(self) -> None:
        try:
            await super().discard()
        finally:
            # lets the pipe's transport see its end before the test's loop is closed
            while await self.read_line():
                pass

    def terminate(self) -> None:
        """SIGTERM, as a service manager would; await `stop()` for the end."""
        self._process.send_signal(signal.SIGTERM)


@asynccontextmanager
async def reference_broadcaster(
    directory: Path,
    *,
    secrets: Path | None = None,
    port: int = 0,
    options: Sequence[str] = (),
) -> AsyncIterator[ReferenceBroadcaster]:
    """A broadcaster with its databases in `directory`, none auth unless `secrets` is a file.

    Starting another one with the same directory (and port) after `kill()` or `stop()` is a
    restart. `options` are command line arguments of reference_broadcaster.py.
    """
    arguments = ["--directory", str(directory), "--port", str(port), *options]
    if secrets is not None:
        arguments += ["--secrets", str(secrets)]
    peer = await ReferenceBroadcaster.start(directory, "reference_broadcaster.py", *arguments)
    try:
        peer.directory = directory
        await peer.wait_until_ready()
        yield peer
    finally:
        await peer.discard()


@dataclass(frozen=True)
class Received:
    subscription: int
    topic: bytes
    length: int
    sha512: bytes
    """The hash that came with the message."""
    computed_sha512: bytes
    """The hash of what the application read."""
    data: bytes | None
    """The message itself if it has at most 4096 bytes."""

    def is_exactly(self, topic: bytes, data: bytes) -> bool:
        digest = hashlib.sha512(data).digest()
        return (self.topic, self.length, self.sha512, self.computed_sha512) == (
            topic,
            len(data),
            digest,
            digest,
        )


class ReferenceClient(Peer):
    port: int
    host: str
    """What it tells broadcasters: its urls are this plus /v1/receive and /v1/recover."""

    def __init__(self, process: asyncio.subprocess.Process, stderr_path: Path) -> None:
        super().__init__(process, stderr_path)
        self.events: list[dict[str, Any]] = []
        """Every event since the start, taken by `next_event` or not."""
        self._untaken: list[dict[str, Any]] = []
        self._answers: dict[int, dict[str, Any]] = {}
        self._last_id = 0
        self._ended = False
        self._changed = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            while line := await self.read_line():
                parsed = json.loads(line)
                async with self._changed:
                    if "event" in parsed:
                        self.events.append(parsed)
                        self._untaken.append(parsed)
                    else:
                        self._answers[parsed["id"]] = parsed
                    self._changed.notify_all()
        finally:
            # its output ends a moment before it does, and its exit status is worth telling
            await self._process.wait()
            async with self._changed:
                self._ended = True
                self._changed.notify_all()

    async def command(self, op: str, *, timeout: float = DEADLINE, **fields: Any) -> dict[str, Any]:
        """Send any command that reference_client.py describes and await its answer."""
        self._last_id += 1
        own_id = self._last_id
        await self.write_line(json.dumps({"id": own_id, "op": op, **fields}).encode())
        try:
            async with asyncio.timeout(timeout), self._changed:
                while own_id not in self._answers:
                    if self._ended:
                        raise self.failure(f"ended before it answered {op}")
                    await self._changed.wait()
                answer = self._answers.pop(own_id)
        except TimeoutError as exc:
            raise self.failure(f"no answer to {op} in {timeout} s") from exc
        if not answer["ok"]:
            raise PeerCommandError(answer["error"], answer["message"])
        return answer

    async def next_event(
        self, kind: str, *, timeout: float = DEADLINE, **fields: Any
    ) -> dict[str, Any]:
        """Take the first event of that kind (and with those fields) that was not yet taken."""

        def wanted(event: dict[str, Any]) -> bool:
            return all(event.get(k) == v for k, v in {"event": kind, **fields}.items())

        try:
            async with asyncio.timeout(timeout), self._changed:
                while not (found := [e for e in self._untaken if wanted(e)]):
                    if self._ended:
                        raise self.failure(f"ended before {kind} {fields}")
                    await self._changed.wait()
                self._untaken.remove(found[0])
                return found[0]
        except TimeoutError as exc:
            raise self.failure(f"no {kind} {fields} in {timeout} s; {self._untaken=}") from exc

    async def next_message(
        self, subscription: int | None = None, *, timeout: float = DEADLINE
    ) -> Received:
        fields = {} if subscription is None else {"subscription": subscription}
        event = await self.next_event("message", timeout=timeout, **fields)
        return Received(
            subscription=event["subscription"],
            topic=bytes.fromhex(event["topic_hex"]),
            length=event["length"],
            sha512=bytes.fromhex(event["sha512"]),
            computed_sha512=bytes.fromhex(event["computed_sha512"]),
            data=bytes.fromhex(event["data_hex"]) if "data_hex" in event else None,
        )

    def untaken_messages(self) -> int:
        """How many messages came that no `next_message` took.

        To show that something does not arrive, send a last message that does, take it, and
        then look here: nobody has to guess how long to wait.
        """
        return sum(event["event"] == "message" for event in self._untaken)

    async def subscribe(
        self, *, exact: Iterable[bytes] = (), globs: Iterable[str] = (), delay: float = 0
    ) -> int:
        """One subscription object for all of them; its number.

        `delay` makes it hold every message, and so the HTTP answer, that many seconds.
        """
        topics = [topic.hex() for topic in exact]
        answer = await self.command("subscribe", exact_hex=topics, glob=list(globs), delay=delay)
        number: int = answer["subscription"]
        return number

    async def subscribe_exact(self, topic: bytes, *, delay: float = 0) -> int:
        return await self.subscribe(exact=[topic], delay=delay)

    async def subscribe_glob(self, glob: str, *, delay: float = 0) -> int:
        return await self.subscribe(globs=[glob], delay=delay)

    async def unsubscribe(self, subscription: int) -> None:
        await self.command("unsubscribe", subscription=subscription)

    async def notify(self, topic: bytes, data: bytes, *, timeout: float = DEADLINE) -> int:
        """How many subscribers were notified, as told to the client."""
        return await self._notify(topic, timeout, data_hex=data.hex())

    async def notify_generated(
        self, topic: bytes, size: int, seed: int = 0, *, timeout: float = DEADLINE
    ) -> int:
        """For large messages: the client sends what `make_payload(size, seed)` returns."""
        return await self._notify(topic, timeout, size=size, seed=seed)

    async def notify_file(self, topic: bytes, path: Path, *, timeout: float = DEADLINE) -> int:
        return await self._notify(topic, timeout, path=str(path))

    async def _notify(self, topic: bytes, timeout: float, **fields: Any) -> int:
        answer = await self.command("notify", timeout=timeout, topic_hex=topic.hex(), **fields)
        notified: int = answer["notified"]
        return notified

    async def check(self) -> bytes:
        """The etag that the broadcaster has of this client's subscriptions; http only."""
        answer = await self.command("check")
        return bytes.fromhex(answer["etag_hex"])

    def expected_etag(self, *, exact: Iterable[bytes] = (), globs: Iterable[str] = ()) -> bytes:
        base, hash_mark, fragment = self.host.partition("#")
        receive, recover = (
            f"{base}/v1/{path}{hash_mark}{fragment}" for path in ("receive", "recover")
        )
        return strong_etag(receive, recover, exact=exact, globs=globs)

    async def exit(self) -> list[dict[str, Any]]:
        """Leave subscriptions and client; what went wrong meanwhile, best an empty list."""
        await self.command("exit")
        closed = await self.next_event("closed", timeout=STOP_DEADLINE)
        await self.stop()
        errors: list[dict[str, Any]] = closed["errors"]
        return errors

    async def discard(self) -> None:
        try:
            await super().discard()
        finally:
            await self._reading


@asynccontextmanager
async def reference_client(
    directory: Path,
    *broadcasters: str,
    secrets: Path | None = None,
    transport: Literal["http", "websocket"] = "http",
    port: int = 0,
    host: str | None = None,
    options: Sequence[str] = (),
) -> AsyncIterator[ReferenceClient]:
    """A client that listens (http) or is connected (websocket).

    `broadcasters` are their urls, http:// or ws:// as the transport. `host` is what it tells
    broadcasters if not its plain address; "{port}" in it becomes the port, as in
    "http://127.0.0.1:{port}#1". `options` are command line arguments of reference_client.py.
    """
    client = await _start_client(
        directory,
        broadcasters,
        secrets,
        transport,
        port,
        host or "http://127.0.0.1:{port}",
        options,
    )
    try:
        if transport == "websocket":
            await client.next_event("status", status="established")
        yield client
    finally:
        await client.discard()


async def _start_client(
    directory: Path,
    broadcasters: Sequence[str],
    secrets: Path | None,
    transport: str,
    port: int,
    host: str,
    options: Sequence[str],
) -> ReferenceClient:
    for tries_left in reversed(range(PORT_TRIES)):
        own_port = port or free_port()
        own_host = host.replace("{port}", str(own_port))
        arguments = ["--transport", transport, "--port", str(own_port), "--host", own_host]
        for url in broadcasters:
            arguments += ["--broadcaster", url]
        if secrets is not None:
            arguments += ["--secrets", str(secrets)]
        client = await ReferenceClient.start(directory, "reference_client.py", *arguments, *options)
        try:
            await client.next_event("ready")
        except BaseException as exc:
            await client.discard()
            # its way of saying that somebody else has taken the port
            if isinstance(exc, PeerError) and client.returncode == 3 and not port and tries_left:
                continue
            raise
        client.port = own_port
        client.host = own_host
        return client
    raise AssertionError("the last try returns or raises")
