"""A broadcaster of the older implementation, run by the interpreter of its own environment.

    python -I reference_broadcaster.py --directory D [--port P] [--secrets FILE | --to-...]

Prints `READY <port>` when it accepts connections; its log goes to stderr. It stops on
SIGTERM, and when its standard input ends, so that it cannot outlive the tests.
"""

import argparse
import asyncio
import json
import logging
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from lonelypsp.auth.config import AuthConfigFromParts
from lonelypsp.auth.helpers.hmac_auth_config import (
    IncomingHmacAuthDBReentrantConfig,
    IncomingHmacAuthSqliteDBConfig,
    ToBroadcasterHmacAuth,
    ToSubscriberHmacAuth,
)
from lonelypsp.auth.helpers.none_auth_config import ToBroadcasterNoneAuth, ToSubscriberNoneAuth
from lonelypsp.auth.helpers.token_auth_config import ToBroadcasterTokenAuth, ToSubscriberTokenAuth
from lonelypss.bknd.sweep_missed import sweep_missed
from lonelypss.config.config import (
    CompressionConfigFromParts,
    ConfigFromParts,
    GenericConfigFromValues,
    MissedRetryStandard,
    NotifySessionStandard,
    TracingConfigSimple,
)
from lonelypss.config.helpers.sqlite_db_config import SqliteDBConfig
from lonelypss.config.lifespan import setup_config, teardown_config
from lonelypss.middleware.config import ConfigMiddleware
from lonelypss.middleware.ws_receiver import WSReceiverMiddleware
from lonelypss.router import router
from lonelypss.util.ws_receiver import SimpleFanoutWSReceiver


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True, help="where its databases are")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--secrets", type=Path, help="a subscriber- or broadcaster-secrets.json")
    for direction in ("to-broadcaster", "to-subscriber"):
        parser.add_argument(f"--{direction}", choices=("none", "token", "hmac"))
        parser.add_argument(f"--{direction}-secret")
    parser.add_argument("--timeout-total", type=float, default=90)
    parser.add_argument("--timeout-sock-read", type=float, default=60)
    parser.add_argument("--timeout-sock-connect", type=float, default=5)
    parser.add_argument("--sweep-missed-interval", type=float, default=10)
    parser.add_argument("--missed-max-retries", type=int, default=20)
    parser.add_argument("--no-compression", action="store_true")
    parser.add_argument("--dictionary", type=Path, help="a preset dictionary, with id 7")
    return parser.parse_args()


def read_secrets(arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Scheme and secret of each direction; what is said on the command line wins."""
    secrets: dict[str, dict[str, str]] = {}
    if arguments.secrets is not None:
        secrets = json.loads(arguments.secrets.read_text())
    for direction, scheme, secret in (
        ("to-broadcaster", arguments.to_broadcaster, arguments.to_broadcaster_secret),
        ("to-subscriber", arguments.to_subscriber, arguments.to_subscriber_secret),
    ):
        if scheme is not None:
            secrets[direction] = {"type": scheme, "secret": secret or ""}
    return secrets


def make_auth(secrets: dict[str, dict[str, str]], directory: Path) -> Any:
    none = {"type": "none", "secret": ""}
    incoming = secrets.get("to-broadcaster", none)
    outgoing = secrets.get("to-subscriber", none)
    hmac_db = IncomingHmacAuthDBReentrantConfig(
        IncomingHmacAuthSqliteDBConfig(str(directory / "recent-hmacs.db"))
    )

    to_broadcaster: Any
    if incoming["type"] == "hmac":
        to_broadcaster = ToBroadcasterHmacAuth(secret=incoming["secret"], db_config=hmac_db)
    elif incoming["type"] == "token":
        to_broadcaster = ToBroadcasterTokenAuth(token=incoming["secret"])
    else:
        to_broadcaster = ToBroadcasterNoneAuth()

    to_subscriber: Any
    if outgoing["type"] == "hmac":
        to_subscriber = ToSubscriberHmacAuth(secret=outgoing["secret"], db_config=hmac_db)
    elif outgoing["type"] == "token":
        to_subscriber = ToSubscriberTokenAuth(token=outgoing["secret"])
    else:
        to_subscriber = ToSubscriberNoneAuth()
    return AuthConfigFromParts(to_broadcaster=to_broadcaster, to_subscriber=to_subscriber)


def dictionaries(arguments: argparse.Namespace) -> dict[int, Any]:
    if arguments.dictionary is None:
        return {}
    import zstandard

    data = zstandard.ZstdCompressionDict(arguments.dictionary.read_bytes())
    data.precompute_compress(level=3)
    return {7: (data, 3)}


def make_config(arguments: argparse.Namespace) -> Any:
    return ConfigFromParts(
        auth=make_auth(read_secrets(arguments), arguments.directory),
        db=SqliteDBConfig(str(arguments.directory / "subscriptions.db")),
        generic=GenericConfigFromValues(
            message_body_spool_size=10 * 1024 * 1024,
            outgoing_http_timeout_total=arguments.timeout_total,
            outgoing_http_timeout_connect=None,
            outgoing_http_timeout_sock_read=arguments.timeout_sock_read,
            outgoing_http_timeout_sock_connect=arguments.timeout_sock_connect,
            websocket_accept_timeout=2,
            websocket_max_pending_sends=255,
            websocket_max_unprocessed_receives=255,
            websocket_large_direct_send_timeout=0.3,
            websocket_send_max_unacknowledged=3,
            websocket_minimal_headers=True,
            sweep_missed_interval=arguments.sweep_missed_interval,
        ),
        missed=MissedRetryStandard(
            expo_factor=1,
            expo_base=2,
            expo_max=10,
            max_retries=arguments.missed_max_retries,
            constant=1,
            jitter=2,
        ),
        compression=CompressionConfigFromParts(
            compression_allowed=not arguments.no_compression,
            compression_dictionary_by_id=dictionaries(arguments),
            outgoing_max_ws_message_size=16 * 1024 * 1024,
            allow_training=not arguments.no_compression,
            compression_min_size=32,
            compression_trained_max_size=16 * 1024,
            compression_training_low_watermark=100 * 1024,
            compression_training_high_watermark=10 * 1024 * 1024,
            compression_retrain_interval_seconds=60 * 60 * 60,
            decompression_max_window_size=8 * 1024 * 1024,
        ),
        tracing=TracingConfigSimple(),
        notify_session=NotifySessionStandard(),
    )


def make_app(arguments: argparse.Namespace, base_url: str) -> FastAPI:
    config = make_config(arguments)
    fanout = SimpleFanoutWSReceiver(
        receiver_url=f"{base_url}/v1/receive_for_websockets",
        recovery=f"{base_url}/v1/missed_for_websockets",
        db=config,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await setup_config(config)
        try:
            async with fanout, sweep_missed(config):
                yield
        finally:
            await teardown_config(config)

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(ConfigMiddleware, config=config)
    app.add_middleware(WSReceiverMiddleware, ws_receiver=fanout)
    app.include_router(router)
    app.router.redirect_slashes = False
    return app


class AnnouncingServer(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            print(f"READY {sockets[0].getsockname()[1]}", flush=True)


class StopAtEnd(asyncio.Protocol):
    """Stops the server when standard input ends: whoever started it is gone."""

    def __init__(self, server: uvicorn.Server) -> None:
        self.server = server

    def eof_received(self) -> None:
        self.server.should_exit = True


async def main() -> None:
    arguments = parse_arguments()
    # The socket is bound here: with port 0 there is then no moment at which the port is
    # known and not yet ours, and the urls below can be made from it.
    # with the protocol named, asyncio switches off the delay of small writes, as it does for
    # sockets that uvicorn makes itself
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((arguments.host, arguments.port))
    port = listener.getsockname()[1]
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    server = AnnouncingServer(
        uvicorn.Config(
            make_app(arguments, f"http://{arguments.host}:{port}"),
            log_config=None,
            timeout_graceful_shutdown=2,
        )
    )
    await asyncio.get_running_loop().connect_read_pipe(lambda: StopAtEnd(server), sys.stdin)
    await server.serve(sockets=[listener])


if __name__ == "__main__":
    asyncio.run(main())
