"""A client of the older implementation, run by the interpreter of its own environment.

    python -I reference_client.py --broadcaster URL --port P [--secrets FILE] ...

It is driven by JSON lines. Each line on standard input is a command with an `id` that the
caller chooses and an `op`; it answers with one line {"id": ..., "ok": true, ...} or
{"id": ..., "ok": false, "error": <type>, "message": ...}. Commands run side by side, so
answers may come in another order.

    {"op": "subscribe", "exact_hex": [...], "glob": [...], "delay": seconds}
        -> {"subscription": n}. One subscription object for all of them. Each message makes it
        wait `delay` before it asks for the next, which holds the answer to the broadcaster.
    {"op": "subscribe_exact", "topic_hex": ...}, {"op": "subscribe_glob", "glob": ...}: the same
    {"op": "unsubscribe", "subscription": n}
        leaves that subscription object. unsubscribe_exact and unsubscribe_glob instead leave
        every object that subscribed to just that topic or that glob.
    {"op": "notify", "topic_hex": ..., "data_hex": ... or "size", "seed": ... or "path": ...}
        -> {"notified": n}; size and seed stand for random.Random(seed).randbytes(size)
    {"op": "check"}
        -> {"format": 0, "etag_hex": ...}, what the broadcaster says; http only
    {"op": "exit"}
        leaves every subscription, then the client; the same happens when the input ends

Unasked it writes lines with `event`: `ready`; `status` (with `status`); `on_receiving` and
`message` (with `subscription`, `topic_hex`, `length`, `sha512` as delivered, `computed_sha512`
of what was read, and `data_hex` if that is short); `iteration_failed`; `closed` with `errors`.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import socket
import sys
from pathlib import Path
from typing import Any

from lonelypsc.client import PubSubClient, PubSubClientSubscription
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.config.http_config import make_http_pub_sub_config
from lonelypsc.config.ws_config import make_websocket_pub_sub_config
from lonelypsc.http_client import HttpPubSubClient
from lonelypsc.ws_client import WebsocketPubSubClient
from lonelypsp.auth.config import AuthConfigFromParts
from lonelypsp.auth.helpers.none_auth_config import ToBroadcasterNoneAuth, ToSubscriberNoneAuth
from lonelypsp.tracing.impl.simple.config import SimpleTracingConfig
from lonelypsp.tracing.impl.simple.db import SimpleTracingDBSidecar
from lonelypsp.tracing.impl.simple.root import SimpleTracingSubscriberRoot

LONGEST_DATA_SHOWN = 4096
LONGEST_COMMAND = 256 * 1024 * 1024
TEARDOWN_SECONDS = 8.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--broadcaster", action="append", required=True)
    parser.add_argument("--transport", choices=("http", "websocket"), default="http")
    parser.add_argument("--bind-host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="where it listens; http only")
    parser.add_argument("--host", help="how broadcasters reach it, if not at that port")
    parser.add_argument("--secrets", type=Path)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--timeout-total", type=float, default=30)
    parser.add_argument("--resubscribe-interval", type=float, default=300)
    parser.add_argument("--no-retry-ambiguous", action="store_true")
    parser.add_argument("--no-compression", action="store_true")
    parser.add_argument("--max-frame", type=int, default=3_670_016)
    return parser.parse_args()


def emit(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def describe(exc: BaseException) -> dict[str, Any]:
    described: dict[str, Any] = {"error": type(exc).__name__, "message": str(exc)}
    if isinstance(exc, BaseExceptionGroup):
        described["errors"] = [describe(inner) for inner in exc.exceptions]
    return described


def make_auth(secrets: Path | None) -> Any:
    if secrets is None:
        return AuthConfigFromParts(
            to_broadcaster=ToBroadcasterNoneAuth(), to_subscriber=ToSubscriberNoneAuth()
        )
    to_subscriber, to_broadcaster = get_auth_config_from_file(str(secrets))
    return AuthConfigFromParts(to_broadcaster=to_broadcaster, to_subscriber=to_subscriber)


def make_http_client(arguments: argparse.Namespace, tracing: Any) -> PubSubClient[Any, Any]:
    return HttpPubSubClient(
        make_http_pub_sub_config(
            bind={"type": "uvicorn", "host": arguments.bind_host, "port": arguments.port},
            host=arguments.host or f"http://{arguments.bind_host}:{arguments.port}",
            broadcasters=[{"host": url} for url in arguments.broadcaster],
            outgoing_retries_per_broadcaster=arguments.passes,
            message_body_spool_size=10 * 1024 * 1024,
            outgoing_http_timeout_total=arguments.timeout_total,
            outgoing_http_timeout_connect=None,
            outgoing_http_timeout_sock_read=None,
            outgoing_http_timeout_sock_connect=5,
            outgoing_retry_ambiguous=not arguments.no_retry_ambiguous,
            resubscribe_interval=arguments.resubscribe_interval,
            auth=make_auth(arguments.secrets),
            tracing=tracing,
        )
    )


def make_websocket_client(arguments: argparse.Namespace) -> PubSubClient[Any, Any]:
    return WebsocketPubSubClient(
        make_websocket_pub_sub_config(
            broadcasters=[{"host": url} for url in arguments.broadcaster],
            outgoing_initial_connect_retries=arguments.passes,
            outgoing_min_reconnect_interval=1,
            max_websocket_message_size=arguments.max_frame,
            websocket_open_timeout=5,
            websocket_close_timeout=5,
            websocket_heartbeat_interval=10,
            websocket_minimal_headers=True,
            max_sent_notifications=None,
            max_unsent_notifications=None,
            max_expected_acks=None,
            max_received=None,
            max_unsent_acks=None,
            allow_compression=not arguments.no_compression,
            compression_dictionary_by_id={},
            initial_compression_dict_id=None,
            allow_training_compression=not arguments.no_compression,
            decompression_max_window_size=0,
            auth=make_auth(arguments.secrets),
        )
    )


class StatusReporter:
    async def on_connection_lost(self) -> None:
        emit(event="status", status="lost")

    async def on_connection_established(self) -> None:
        emit(event="status", status="established")

    async def on_connection_abandoned(self) -> None:
        emit(event="status", status="abandoned")


class Subscription:
    """One subscription object and the task that iterates over it."""

    def __init__(
        self, number: int, client: PubSubClient[Any, Any], command: dict[str, Any]
    ) -> None:
        self.number = number
        self.exact = [bytes.fromhex(topic) for topic in command.get("exact_hex", [])]
        self.glob: list[str] = command.get("glob", [])
        self.delay: float = command.get("delay", 0)
        self.handle: PubSubClientSubscription = client.subscribe(
            exact=self.exact, glob=self.glob, on_receiving=self.on_receiving
        )
        self.task: asyncio.Task[None] | None = None

    async def on_receiving(self) -> None:
        emit(event="on_receiving", subscription=self.number)

    async def enter(self) -> None:
        await self.handle.__aenter__()
        # what arrives before messages() would be confirmed and dropped
        self.task = asyncio.create_task(self.iterate(await self.handle.messages()))

    async def iterate(self, messages: Any) -> None:
        try:
            async for message in messages:
                self.report(message)
                if self.delay:
                    await asyncio.sleep(self.delay)
        except Exception as exc:
            emit(event="iteration_failed", subscription=self.number, **describe(exc))

    def report(self, message: Any) -> None:
        # read piece by piece, so that this process stays small whatever it is sent
        digest = hashlib.sha512()
        length = 0
        start = b""
        while piece := message.data.read(64 * 1024):
            digest.update(piece)
            length += len(piece)
            if length <= LONGEST_DATA_SHOWN:
                start += piece
        shown = {"data_hex": start.hex()} if length <= LONGEST_DATA_SHOWN else {}
        emit(
            event="message",
            subscription=self.number,
            topic_hex=message.topic.hex(),
            length=length,
            sha512=message.sha512.hex(),
            computed_sha512=digest.hexdigest(),
            **shown,
        )

    async def leave(self) -> None:
        # It must not be in __anext__ while the subscription is left; being cancelled there
        # loses nothing, and leaving releases the message it may hold.
        if self.task is not None:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.task
        await self.handle.__aexit__(None, None, None)


class Driver:
    def __init__(self, client: PubSubClient[Any, Any]) -> None:
        self.client = client
        self.subscriptions: dict[int, Subscription] = {}
        self.next_number = 0
        self.running: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=LONGEST_COMMAND)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            command = json.loads(line)
            if command["op"] == "exit":
                emit(id=command["id"], ok=True)
                return
            task = asyncio.create_task(self.answer(command))
            self.running.add(task)
            task.add_done_callback(self.running.discard)

    async def answer(self, command: dict[str, Any]) -> None:
        try:
            result = await getattr(self, "do_" + command["op"])(command)
        except Exception as exc:
            emit(id=command["id"], ok=False, **describe(exc))
        else:
            emit(id=command["id"], ok=True, **result)

    async def do_subscribe(self, command: dict[str, Any]) -> dict[str, Any]:
        number = self.next_number
        self.next_number += 1
        subscription = Subscription(number, self.client, command)
        await subscription.enter()
        self.subscriptions[number] = subscription
        return {"subscription": number}

    async def do_subscribe_exact(self, command: dict[str, Any]) -> dict[str, Any]:
        return await self.do_subscribe({**command, "exact_hex": [command["topic_hex"]]})

    async def do_subscribe_glob(self, command: dict[str, Any]) -> dict[str, Any]:
        return await self.do_subscribe({**command, "glob": [command["glob"]]})

    async def do_unsubscribe(self, command: dict[str, Any]) -> dict[str, Any]:
        await self.subscriptions.pop(command["subscription"]).leave()
        return {}

    async def do_unsubscribe_exact(self, command: dict[str, Any]) -> dict[str, Any]:
        return await self.leave_matching([bytes.fromhex(command["topic_hex"])], [])

    async def do_unsubscribe_glob(self, command: dict[str, Any]) -> dict[str, Any]:
        return await self.leave_matching([], [command["glob"]])

    async def leave_matching(self, exact: list[bytes], glob: list[str]) -> dict[str, Any]:
        left = [
            number
            for number, subscription in self.subscriptions.items()
            if subscription.exact == exact and subscription.glob == glob
        ]
        for number in left:
            await self.subscriptions.pop(number).leave()
        return {"subscriptions": left}

    async def do_notify(self, command: dict[str, Any]) -> dict[str, Any]:
        topic = bytes.fromhex(command["topic_hex"])
        if "path" in command:
            with Path(command["path"]).open("rb") as file:
                result = await self.client.notify(
                    trace_initializer=None, topic=topic, sync_file=file
                )
        else:
            if "data_hex" in command:
                data = bytes.fromhex(command["data_hex"])
            else:
                data = random.Random(command.get("seed", 0)).randbytes(command["size"])
            result = await self.client.notify(trace_initializer=None, topic=topic, data=data)
        return {"notified": result.notified}

    async def do_check(self, command: dict[str, Any]) -> dict[str, Any]:
        # of the connector's documented type only the http one has this method
        connector: Any = self.client.connector
        etag = await connector.check_subscriptions()
        return {"format": etag.format, "etag_hex": etag.etag.hex()}

    async def leave(self) -> list[dict[str, Any]]:
        """Everything that went wrong while leaving, each step having its own deadline."""
        for task in self.running:
            task.cancel()
        errors = []
        for subscription in self.subscriptions.values():
            try:
                async with asyncio.timeout(TEARDOWN_SECONDS):
                    await subscription.leave()
            except Exception as exc:
                errors.append(describe(exc))
        try:
            async with asyncio.timeout(TEARDOWN_SECONDS):
                await self.client.__aexit__(None, None, None)
        except Exception as exc:
            errors.append(describe(exc))
        return errors


def require_free_port(host: str, port: int) -> None:
    """Ends this process with status 3, which the caller knows, if the port is taken.

    Its own server would not do as a test: entering the client succeeds all the same.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            print(exc, file=sys.stderr)
            sys.exit(3)


async def wait_until_listening(host: str, port: int) -> None:
    """Its own server is started, not awaited: only connecting shows that it listens."""
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection(host, port)
            except OSError:
                await asyncio.sleep(0.01)
            else:
                writer.close()
                await writer.wait_closed()
                return


async def main() -> None:
    arguments = parse_arguments()
    if arguments.transport == "http":
        require_free_port(arguments.bind_host, arguments.port)
    tracing = SimpleTracingConfig()
    async with SimpleTracingDBSidecar(tracing, ":memory:") as sidecar:
        if arguments.transport == "http":
            root = SimpleTracingSubscriberRoot(db=sidecar, config=tracing)
            client = make_http_client(arguments, root.stateless)
        else:
            client = make_websocket_client(arguments)
        await client.__aenter__()
        driver = Driver(client)
        try:
            await client.direct_register_status_handler(receiver=StatusReporter())
            if arguments.transport == "http":
                await wait_until_listening(arguments.bind_host, arguments.port)
            emit(event="ready", port=arguments.port)
            await driver.run()
        finally:
            emit(event="closed", errors=await driver.leave())


if __name__ == "__main__":
    asyncio.run(main())
