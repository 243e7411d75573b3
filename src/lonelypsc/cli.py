"""The command line of the client."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, BinaryIO, NoReturn
from urllib.parse import urlsplit

try:
    import click
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
except ImportError as e:
    raise SystemExit(f"{e}: the command line needs pip install 'lonelypsc[standard]'") from None

from lonelypsc.client import (
    Explanation,
    PubSubClient,
    PubSubClientMessage,
    PubSubNotifyResult,
)
from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import HttpPubSubBind, make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.config.ws_config import make_websocket_pub_sub_config
from lonelypsc.errors import PubSubBindError, PubSubError, PubSubRequestRefusedError
from lonelypsc.http_client import HttpPubSubClient
from lonelypsc.ws_client import WebsocketPubSubClient
from lonelypsp.errors import ProtocolError
from lonelypsp.signing import AuthConfig, Nothing

SECRETS_FILE = "subscriber-secrets.json"
DEFAULT_BROADCASTER = "http://127.0.0.1:3003"
_PROGRESS_FROM = 4 * 1024 * 1024
_SHOWN = 64 * 1024


def fail(message: str, status: int = 1) -> NoReturn:
    """Ends the command with one line on stderr."""
    click.echo(f"lonelypsc: {' '.join(message.split())}", err=True)
    sys.exit(status)


@contextmanager
def _explained() -> Iterator[None]:
    """What the user can mend ends in one line."""
    try:
        yield
    except PubSubBindError as e:
        fail(f"{e} (--bind)")
    except PubSubRequestRefusedError as e:
        fail(f"{e} (--secrets, --broadcaster)")
    except PubSubError as e:
        fail(f"{e} (--broadcaster, --timeout, --retries)")
    except (ProtocolError, ValueError) as e:
        fail(str(e), 2)
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}" if e.filename else str(e))


@dataclass(frozen=True, slots=True)
class _Connection:
    """What all commands that talk with a broadcaster have in common."""

    broadcasters: Sequence[str]
    secrets: str | None
    timeout: float
    retries: int

    @property
    def by_websocket(self) -> bool:
        return all(url.startswith(("ws://", "wss://")) for url in self.broadcasters)

    def client(self, bind: HttpPubSubBind, host: str) -> PubSubClient:
        """Over websockets or HTTP, as the broadcasters' urls say.

        Args:
            bind, host: where messages arrive over HTTP.
        """
        if self.by_websocket:
            return WebsocketPubSubClient(
                make_websocket_pub_sub_config(
                    broadcasters=[{"host": url} for url in self.broadcasters],
                    auth=self._auth(),
                    websocket_open_timeout=self.timeout,
                    outgoing_initial_connect_retries=self.retries - 1,
                )
            )
        config = make_http_pub_sub_config(
            bind=bind,
            host=host,
            broadcasters=[{"host": url} for url in self.broadcasters],
            auth=self._auth(),
            outgoing_http_timeout_total=self.timeout,
            outgoing_retries_per_broadcaster=self.retries,
        )
        return HttpPubSubClient(config)

    def _auth(self) -> AuthConfig:
        path = self.secrets
        if path is None:
            if not os.path.exists(SECRETS_FILE):
                return AuthConfig(Nothing(), Nothing())
            path = SECRETS_FILE
        return AuthConfigFromParts(*get_auth_config_from_file(path))


def _connecting(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of `_Connection` and passes one on as `connection`."""

    def run(
        broadcaster: Sequence[str],
        secrets: str | None,
        timeout: float,
        retries: int,
        **rest: Any,
    ) -> None:
        logging.basicConfig(format="lonelypsc: %(message)s", level=logging.WARNING)
        command(connection=_Connection(broadcaster, secrets, timeout, retries), **rest)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__dict__.update(command.__dict__)
    for option in (
        click.option(
            "--retries", type=click.IntRange(min=1), default=2, show_default=True,
            envvar="LONELYPSC_RETRIES", help="Rounds over all broadcasters.",
        ),
        click.option(
            "--timeout", type=float, default=30.0, show_default=True, envvar="LONELYPSC_TIMEOUT",
            help="Seconds for one request, or to open a websocket; a large message gets more.",
        ),
        click.option(
            "--secrets", metavar="FILE", envvar="LONELYPSC_SECRETS",
            help="The secrets file shared with the broadcaster."
            f"  [default: {SECRETS_FILE} if it exists, else no authorization]",
        ),
        click.option(
            "--broadcaster", metavar="URL", multiple=True, default=[DEFAULT_BROADCASTER],
            show_default=True, envvar="LONELYPSC_BROADCASTER",
            help="http(s)://, or ws(s):// for a websocket; may be repeated.",
        ),
    ):  # fmt: skip
        run = option(run)
    return run


def _json_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(command)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  lonelypsc demo                            see it work, in a few seconds
  lonelypsc listen --exact orders/42        print what arrives
  lonelypsc notify orders/42 'it is paid'   send to all who listen
  lonelypsc listen --glob 'orders/*' --broadcaster ws://127.0.0.1:3003

Options can also be set in the environment, e.g. LONELYPSC_BROADCASTER and LONELYPSC_SECRETS.
""",
)
@click.version_option(version("lonelypsc"), "--version", prog_name="lonelypsc")
def main() -> None:
    """lonelypsc: send and receive messages through a lonelyps broadcaster.

    Over plain HTTP, without a connection that stays open, or over a websocket: the url of the
    broadcaster decides.
    """


# notify
@main.command(
    epilog="""\b
Examples:
  lonelypsc notify orders/42 'it is paid'
  lonelypsc notify backups/db --file dump.sql
  lonelypsc notify orders/42 'it is paid' --explain
  date | lonelypsc notify clock -
"""
)
@click.argument("topic")
@click.argument("data", required=False)
@click.option("--file", "path", metavar="FILE", help="Send the content of this file.")
@click.option(
    "--explain", is_flag=True,
    help="Tell what became of it at each subscriber. The broadcaster must allow it: explain=true.",
)  # fmt: skip
@_json_option
@_connecting
def notify(
    connection: _Connection,
    topic: str,
    data: str | None,
    path: str | None,
    explain: bool,
    as_json: bool,
) -> None:
    """Send a message to all subscribers of TOPIC; `-` as DATA reads it from stdin."""
    if (data is None) == (path is None):
        raise click.UsageError("give either DATA or --file")
    if explain and connection.by_websocket:
        raise click.UsageError("--explain needs an http(s):// --broadcaster")
    raw_topic = os.fsencode(topic)
    with _explained(), ExitStack() as held:
        file = held.enter_context(_message_file(data, path))
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        advance = held.enter_context(_progress(length))
        sent = _run(_notify(connection, raw_topic, file, advance, explain))
    if as_json:
        result = {**_text("topic", raw_topic), "bytes": length, **asdict(sent)}
        if not explain:
            del result["explanation"]
        click.echo(json.dumps(result))
        return
    click.echo(f"notified {sent.notified} subscriber{'' if sent.notified == 1 else 's'}")
    if sent.explanation is not None:
        _print_explanation(sent.explanation)
    elif explain:
        click.echo(
            "lonelypsc: the broadcaster explains nothing: start it with --explain true", err=True
        )


async def _notify(
    connection: _Connection,
    topic: bytes,
    file: BinaryIO,
    advance: Callable[[int, int], None] | None,
    explain: bool,
) -> PubSubNotifyResult:
    async with connection.client({"type": "none"}, host="http://notify-only.invalid") as client:
        return await client.notify(topic=topic, sync_file=file, progress=advance, explain=explain)


def _print_explanation(found: Explanation) -> None:
    for one in found.subscribers:
        because = [*(["the topic"] if one.exact else []), *map(repr, one.globs)]
        told = "; a MISSED notice follows" if one.will_be_told else ""
        reason = f": {one.reason}{told}" if one.reason else ""
        line = (
            f"{one.outcome}  {one.url}  ({', '.join(because)})  {one.seconds * 1000:.1f} ms{reason}"
        )
        click.echo(_printable(line))
    if found.websockets:
        click.echo(f"queued for {found.websockets} websockets")
    if found.omitted:
        click.echo(f"and {found.omitted} more")


@contextmanager
def _message_file(data: str | None, path: str | None) -> Iterator[BinaryIO]:
    if path is not None:
        with open(path, "rb") as named:
            yield named
        return
    with tempfile.TemporaryFile() as file:
        if data == "-":
            shutil.copyfileobj(sys.stdin.buffer, file)
        else:
            file.write(os.fsencode(data or ""))
        file.flush()
        yield file


@contextmanager
def _progress(length: int) -> Iterator[Callable[[int, int], None] | None]:
    console = Console(stderr=True)
    if length < _PROGRESS_FROM or not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=length)
        yield lambda sent, total: bar.update(task, completed=sent, total=total)


# listen
@main.command(
    epilog="""\b
Examples:
  lonelypsc listen --exact orders/42
  lonelypsc listen --glob 'orders/*' --glob 'logs/**' --json
  lonelypsc listen --exact a --bind 0.0.0.0:3002 --host-url http://10.0.0.7:3002
"""
)
@click.option("--exact", multiple=True, metavar="TOPIC", help="This topic; may be repeated.")
@click.option(
    "--glob", multiple=True, metavar="GLOB",
    help="Topics like this: * and ? within a segment, ** across; may be repeated.",
)  # fmt: skip
@click.option(
    "--bind", default="127.0.0.1:0", show_default=True, metavar="HOST:PORT",
    envvar="LONELYPSC_BIND", help="Where to listen for messages; port 0 takes a free one.",
)  # fmt: skip
@click.option(
    "--host-url", metavar="URL", envvar="LONELYPSC_HOST_URL",
    help="How the broadcaster reaches us; {port} stands for the port.  [default: from --bind]"
    " Neither is used with a websocket.",
)  # fmt: skip
@click.option("--count", type=click.IntRange(min=1), help="End after that many messages.")
@_json_option
@_connecting
def listen(
    connection: _Connection,
    exact: Sequence[str],
    glob: Sequence[str],
    bind: str,
    host_url: str | None,
    count: int | None,
    as_json: bool,
) -> None:
    """Print messages as they arrive; Ctrl-C unsubscribes and ends.

    With --json one object a line: {"event": "listening"} when subscribed, "message" with topic,
    bytes, sha512 and (the beginning of) data, "gap" when messages may have been missed.
    """
    if not exact and not glob:
        raise click.UsageError("give --exact or --glob")
    with _explained():
        host, port = _address(bind)
        shown = f"[{host}]" if ":" in host else host
        url = host_url or f"http://{shown}:{port or '{port}'}"
        client = connection.client({"type": "uvicorn", "host": host, "port": port}, url)
        topics = [os.fsencode(topic) for topic in exact]
        _run(_listen(client, topics, list(glob), count, _Printer(as_json)))


def _address(bind: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{bind}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None:
        raise click.UsageError(f"--bind: {bind!r} is not HOST:PORT")
    return host, port


async def _listen(
    client: PubSubClient,
    exact: list[bytes],
    globs: list[str],
    count: int | None,
    printer: _Printer,
) -> None:
    async with client:
        subscription = client.subscribe(exact=exact, glob=globs, on_receiving=printer.receiving)
        async with subscription:
            received = 0
            async for message in await subscription.messages():
                printer.message(message)
                received += 1
                if received == count:
                    break


class _Printer:
    """Shows what happens to a subscription, one line per event."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._began = False

    async def receiving(self) -> None:
        if self._began:
            self._event("gap", "-- messages may have been missed --")
        else:
            self._began = True
            self._event("listening", "-- listening, Ctrl-C ends --")

    def message(self, message: PubSubClientMessage) -> None:
        size = message.data.seek(0, os.SEEK_END)
        message.data.seek(0)
        data = message.data.read(_SHOWN)
        more = size - len(data)
        topic = _printable(os.fsdecode(message.topic))
        text = _printable(data.decode("utf-8", "backslashreplace")) + (" ..." if more else "")
        fields = {**_text("topic", message.topic), "bytes": size, "sha512": message.sha512.hex()}
        self._event("message", f"{topic}: {text}", **fields, **_text("data", data), cut=bool(more))

    def _event(self, event: str, text: str, **fields: Any) -> None:
        click.echo(json.dumps({"event": event, **fields}) if self._as_json else text)


def _text(name: str, value: bytes) -> dict[str, str]:
    """For JSON: as text, or as `<name>_base64` if it is none."""
    try:
        return {name: value.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(value).decode("ascii")}


def _printable(text: str) -> str:
    """Without what could steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# demo
@main.command()
@_json_option
def demo(as_json: bool) -> None:
    """See it work: a broadcaster, two subscribers, a publisher, and one that dies.

    Everything runs on free loopback ports with hmac authorization, takes a few seconds and is
    removed at the end. Needs the broadcaster, which is part of this distribution.
    """
    from lonelypsc.demo import DemoFailed, run

    def say(event: str, text: str, **fields: Any) -> None:
        click.echo(json.dumps({"event": event, **fields}) if as_json else text)

    with _explained():
        try:
            _run(run(say))
        except DemoFailed as e:
            fail(str(e))


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """As `asyncio.run`, but SIGINT and SIGTERM cancel the work once, so that it cleans up."""

    async def cancellable() -> Any:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop() -> None:
            for signum in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(signum)  # a second one ends it at once
            task.cancel()

        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, stop)
        return await work

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        sys.exit(0)
