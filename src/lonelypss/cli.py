"""The command line of the broadcaster."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

try:
    import click
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError as e:
    raise SystemExit(f"{e}: the command line needs pip install 'lonelypsc[standard]'") from None

from lonelypsp.signing import AuthConfig, Nothing
from lonelypss import config as configuration
from lonelypss import logs, setup_files, tls
from lonelypss.config import ConfigError, Database, Loaded, Option, options, without_password
from lonelypss.keys import DIRECTIONS, Files
from lonelypss.secrets import SECRETS_FILE, check_exposure, load_auth
from lonelypss.store.base import Kind, Store, StoreUnavailable, Subscription
from lonelypss.store.choose import make_store
from lonelypss.urlpolicy import UrlPolicy, UrlRefused

log = logging.getLogger(__name__)

DEFAULT_PORT = 3003
_KINDS = click.Choice(["hmac", "token", "none"])
_GROUPS = (
    ("peer_", "Other broadcasters"),
    ("max_websockets", "Websockets"),
    ("websocket_", "Websockets"),
    ("outgoing_max_ws_", "Websockets"),
    ("compression_", "Compression"),
    ("decompression_", "Compression"),
    ("incoming_", "Listening"),
    ("tls_", "Listening"),
    ("outgoing_", "Deliveries to subscribers"),
    ("missed_", "MISSED notices"),
    ("sweep_", "MISSED notices"),
    ("journal_", "MISSED notices"),
    ("unsubscribe_", "Deliveries to subscribers"),
    ("url_", "Urls of subscribers"),
    ("", "Storage and limits"),
)


def fail(message: str, status: int = 1) -> NoReturn:
    """Ends the command with one line on stderr."""
    if logs.in_json():
        log.critical("%s", message)
    else:
        click.echo(f"lonelypss: {message}", err=True)
    sys.exit(status)


@contextmanager
def _explained() -> Iterator[None]:
    """What the user can mend ends in one line."""
    try:
        yield
    except ConfigError as e:
        fail(str(e), 2)
    except StoreUnavailable as e:
        fail(f"the database is not available: {e}")


class _Group(click.Group):
    """Also takes the older spelling `lonelypss --setup ...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--setup" in args:
            args = ["setup", *(a for a in args if a != "--setup")]
        return super().parse_args(ctx, args)


class _Grouped(click.Command):
    """Help in which the options of the table stand in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                group = parameter.group if isinstance(parameter, _TableOption) else "Options"
                groups.setdefault(group, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


class _TableOption(click.Option):
    """The flag of one row of the options table."""

    def __init__(self, row: Option) -> None:
        default = "none" if row.default is None else row.default
        shown = f"[{row.unit}; default: {default}]" if row.unit else f"[default: {default}]"
        super().__init__([row.flag, row.name], metavar="VALUE", help=f"{row.help}  {shown}")
        self.group = next(title for prefix, title in _GROUPS if row.name.startswith(prefix))


def _secrets_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--secrets",
        envvar="LONELYPSS_SECRETS",
        metavar="FILE",
        help=f"The secrets file that `lonelypss setup` wrote.  [default: {SECRETS_FILE} if it"
        " exists, else no authorization]",
    )(command)


def _readable_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--allow-readable-secrets",
        is_flag=True,
        envvar="LONELYPSS_ALLOW_READABLE_SECRETS",
        help="Take a secrets file that other users may read, or that is a link, as where Kubernetes"
        " mounts it.",
    )(command)


def _config_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--config",
        envvar="LONELYPSS_CONFIG",
        metavar="FILE",
        help="A TOML file of `option = value` lines.",
    )(command)


def _json_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(command)


def _configured(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --secrets, --config and the options table, and passes on `secrets` and `loaded`."""

    @wraps(command)
    def run(config: str | None, secrets: str | None, **rest: Any) -> None:
        names = [row.name for row in options()]
        flags = {name: rest.pop(name) for name in names}
        if flags["db"] is not None:
            flags["db"] = _database_url(flags["db"])
        with _explained():
            path = None if config is None else Path(config)
            nothing = AuthConfig(Nothing(), Nothing())
            loaded = configuration.load(flags, os.environ, path, nothing)
            command(loaded=loaded, secrets=_secrets_file(secrets), **rest)

    for row in reversed(options()):
        parameters = run.__dict__.setdefault("__click_params__", [])
        parameters.append(_TableOption(row))
    return _secrets_option(_config_option(run))


_host_option = click.option(
    "--host", default="127.0.0.1", show_default=True, envvar="LONELYPSS_HOST",
    help="Address to listen on. Bind to an internal one; --tls-cert is for https.",
)  # fmt: skip
_port_option = click.option(
    "--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True,
    envvar="LONELYPSS_PORT", help="0 takes a free one.",
)  # fmt: skip
_workers_option = click.option(
    "--workers", type=click.IntRange(1, 256), default=1, show_default=True,
    envvar="LONELYPSS_WORKERS", help="Processes that share the port; limits count per process.",
)  # fmt: skip
_insecure_option = click.option(
    "--insecure", is_flag=True, envvar="LONELYPSS_INSECURE", help="Also listen where others could"
    " send without a secret, or read it: on an address that is not a loopback, with 'none', or"
    " with tokens without TLS.",
)  # fmt: skip


def _secrets_file(given: str | None) -> str | None:
    if given is not None:
        return given
    return SECRETS_FILE if os.path.exists(SECRETS_FILE) else None


def _database_url(text: str) -> str:
    return "sqlite:///lonelypss.db" if text == "sqlite" else text


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  lonelypss setup                       write secrets and a main.py here
  lonelypss serve                       run a broadcaster on 127.0.0.1:3003
  lonelypss check-config                what is in force, and where it comes from
  lonelypss doctor                      what is in the way, and what to do
  lonelypss subs ls --topic orders/42   who would get a message
""",
)
@click.version_option(version("lonelypsc"), "--version", prog_name="lonelypss")
def main() -> None:
    """lonelypss: the lonelyps broadcaster.

    Keeps subscriptions in a database and passes each message on to the urls that subscribed.
    """


# setup
@main.command(
    epilog="""\b
Examples:
  lonelypss setup
  lonelypss setup --to-subscribers-auth none
  lonelypss setup --db sqlite:////var/lib/lonelypss/lonelypss.db
""",
)
@click.option("--db", default="sqlite", show_default=True, help="`sqlite`, or a database url.")
@click.option(
    "--to-broadcasters-auth", type=_KINDS, default="hmac", show_default=True,
    help="How subscribers authorize what they send to broadcasters.",
)  # fmt: skip
@click.option(
    "--to-broadcasters-secret", metavar="SECRET",
    help="Instead of a new one. hmac: URL-safe base64 of 64 bytes; token: any visible ASCII.",
)  # fmt: skip
@click.option(
    "--to-subscribers-auth", type=_KINDS, default="hmac", show_default=True,
    help="How broadcasters authorize what they send to subscribers.",
)  # fmt: skip
@click.option("--to-subscribers-secret", metavar="SECRET", help="Instead of a new one.")
def setup(
    db: str,
    to_broadcasters_auth: str,
    to_broadcasters_secret: str | None,
    to_subscribers_auth: str,
    to_subscribers_secret: str | None,
) -> None:
    """Write secrets and a main.py into this directory.

    Also spelled `lonelypss --setup`. Writes broadcaster-secrets.json and subscriber-secrets.json
    (the same content, readable by you alone) and main.py, which runs under `uvicorn main:app`. If
    one of them exists, nothing is written.
    """
    with _explained():
        try:
            written = setup_files.write(
                Path(),
                _database_url(db),
                setup_files.direction(to_broadcasters_auth, to_broadcasters_secret),
                setup_files.direction(to_subscribers_auth, to_subscribers_secret),
            )
        except FileExistsError as e:
            fail(f"{e}; nothing was written. Move it away or use another directory")
        except OSError as e:
            fail(f"cannot write here: {e.strerror}")
    for path in written:
        click.echo(f"wrote {path}")
    click.echo(
        "\nNext:\n"
        f"- start a broadcaster on port {DEFAULT_PORT}: lonelypss serve\n"
        f"  (or: uvicorn main:app --port {DEFAULT_PORT} --no-access-log)\n"
        f"- give each subscriber a copy of {setup_files.SUBSCRIBER_SECRETS_FILE}, in a safe way:\n"
        "  whoever has it can subscribe and send"
    )


# serve
@main.command(
    cls=_Grouped,
    epilog="""\b
Every option of the table can also be set in the environment as LONELYPSS_<NAME>, e.g.
LONELYPSS_DB, or in the --config file. Flags win over the environment, that over the file.

\b
Examples:
  lonelypss serve
  lonelypss serve --host 10.0.0.5 --workers 2 --db sqlite:////var/lib/lonelypss.db
  LONELYPSS_MISSED_MAX_RETRIES=20 lonelypss serve --secrets broadcaster-secrets.json

\b
Exit status: 0 stopped by SIGINT or SIGTERM, 1 cannot run, 2 wrong use or port taken.
""",
)
@_host_option
@_port_option
@_workers_option
@click.option(
    "--grace", type=click.IntRange(0, 3600), default=10, show_default=True,
    envvar="LONELYPSS_GRACE", help="Seconds that running requests get when it stops.",
)  # fmt: skip
@click.option(
    "--drain", type=click.IntRange(0, 3600), default=0, show_default=True,
    envvar="LONELYPSS_DRAIN", help="Seconds that it goes on when it is to stop, while /readyz says"
    " 503: as long as a load balancer takes to notice.",
)  # fmt: skip
@_insecure_option
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info",
    show_default=True, envvar="LONELYPSS_LOG_LEVEL", help="Of the log on stderr.",
)  # fmt: skip
@click.option(
    "--log-format", type=click.Choice(logs.FORMATS), default="text", show_default=True,
    envvar="LONELYPSS_LOG_FORMAT", help="Of the log: for people, or one JSON object a line.",
)  # fmt: skip
@_json_option
@_readable_option
@_configured
def serve(
    loaded: Loaded,
    secrets: str | None,
    allow_readable_secrets: bool,
    host: str,
    port: int,
    workers: int,
    grace: int,
    drain: int,
    insecure: bool,
    log_level: str,
    log_format: str,
    as_json: bool,
) -> None:
    """Run a broadcaster until SIGINT or SIGTERM.

    Prints one line when it listens; with --json {"event": "listening", "url": ..., "port": ...}.
    """
    from lonelypss import server

    settings = server.Settings(
        loaded.config, secrets, grace, log_level, drain, log_format, allow_readable_secrets
    )
    if log_format == "json":
        settings.set_up_logging()  # now, so that errors go there, too
    in_memory = not Database.at(loaded.config.db).is_shared
    if in_memory and workers > 1:
        raise ConfigError(
            f"db: {loaded.config.db} is a database inside one process; --workers {workers} needs"
            " one that they can share, e.g. --db sqlite:///lonelypss.db"
        )
    peer_url = loaded.config.peer_url
    if peer_url is not None and "{port}" not in peer_url and workers > 1:
        raise ConfigError(
            f"peer_url: {peer_url} leads to any of the {workers} workers, and must lead to one:"
            " write {port} for its port, or leave peer_url out"
        )
    if secrets is None:
        warning = (
            "no authorization: whoever reaches this port can subscribe and send."
            " `lonelypss setup` writes secrets, --secrets names them."
        )
        if log_format == "json":
            log.warning("%s", warning)
        else:
            click.echo(f"WARNING: {warning}", err=True)
        auth = loaded.config.auth
    else:
        auth = load_auth(secrets, allow_readable=allow_readable_secrets)
    tls.listening(loaded.config)
    settings.set_up_logging()
    if not in_memory:
        asyncio.run(_check_database(loaded))
    try:
        sockets = server.bind(host, port)
    except OSError as e:
        fail(_bind_error(host, port, e), 2)
    try:
        if not insecure:
            check_exposure(
                auth,
                [sock.getsockname()[0] for sock in sockets],
                encrypted=loaded.config.tls_cert is not None,
                only_known=loaded.config.tls_client_ca is not None,
            )
    except ConfigError:
        for sock in sockets:
            sock.close()
        raise

    def announce() -> None:
        _announce(sockets[0], loaded.config.tls_cert is not None, as_json)

    sys.exit(server.serve(settings, sockets, workers, announce))


def _bind_error(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; choose another with --port, or 0 for a free one"
    return f"cannot listen on {host}, port {port}: {error.strerror}; see --host and --port"


async def _check_database(loaded: Loaded) -> None:
    """One clear error now instead of one from every worker."""
    store = make_store(loaded.config)
    try:
        await store.open()
    finally:
        await store.close()


def _announce(sock: Any, secure: bool, as_json: bool) -> None:
    host, port = sock.getsockname()[:2]
    url = f"{'https' if secure else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    if as_json:
        event = {"event": "listening", "url": url, "host": host, "port": port, "pid": os.getpid()}
        click.echo(json.dumps(event))
    else:
        click.echo(f"lonelypss listens on {url} (Ctrl-C stops it)")


# check-config
@main.command(
    "check-config",
    cls=_Grouped,
    epilog="""\b
Examples:
  lonelypss check-config
  LONELYPSS_JOURNAL_AFTER=0 lonelypss check-config --config lonelypss.toml --json
""",
)
@_json_option
@_readable_option
@_configured
def check_config(
    loaded: Loaded, secrets: str | None, allow_readable_secrets: bool, as_json: bool
) -> None:
    """Print every option in force, and where it comes from.

    Takes the options of `lonelypss serve`, checks them and the secrets file, starts nothing.
    """
    tls.listening(loaded.config)
    auth = loaded.config.auth
    if secrets is not None:
        auth = load_auth(secrets, allow_readable=allow_readable_secrets)
    rows = [
        (row.name, _masked(getattr(loaded.config, row.name)), row.unit, loaded.sources[row.name])
        for row in options()
    ]
    source = secrets or "no secrets file"
    rows.append(("auth: to-broadcaster", repr(auth.to_broadcaster), "", source))
    rows.append(("auth: to-subscriber", repr(auth.to_subscriber), "", source))
    if as_json:
        keys = ("option", "value", "unit", "source")
        click.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2))
        return
    _print_table(
        ("option", "value", "unit", "source"),
        [(name, "none" if value is None else str(value), *rest) for name, value, *rest in rows],
    )


def _masked(value: Any) -> Any:
    return without_password(value) if isinstance(value, str) else value


# keys
@main.group(
    epilog="""\b
A rotation, each step while everything runs (docs/how-to/keys.md):
  lonelypss keys add            then copy both files to everybody
  lonelypss keys sign ID        then copy them again
  lonelypss keys retire OLD     two minutes after the last copy, and copy them again
"""
)
def keys() -> None:
    """Change the keys of the secrets files, without a restart.

    Whoever runs looks at its secrets file once a second.
    """


_direction_option = click.option(
    "--direction", "directions", multiple=True, type=click.Choice(DIRECTIONS), default=DIRECTIONS,
    help="Only this one.  [default: both]",
)  # fmt: skip


def _files_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds --secrets and --subscribers, and passes on `files`."""

    @wraps(command)
    def run(secrets: str | None, subscribers: Sequence[str], **rest: Any) -> None:
        main = Path(secrets or SECRETS_FILE)
        beside = main.with_name(setup_files.SUBSCRIBER_SECRETS_FILE)
        others = [Path(p) for p in subscribers] or ([beside] if beside.exists() else [])
        with _explained():
            command(files=Files(main, others), **rest)

    option = click.option(
        "--subscribers", multiple=True, metavar="FILE", help="Secrets files of subscribers, to be"
        f" changed alike.  [default: {setup_files.SUBSCRIBER_SECRETS_FILE} beside the other, if"
        " it exists]",
    )  # fmt: skip
    return _secrets_option(option(run))


@keys.command("ls")
@_json_option
@_files_options
def keys_ls(files: Files, as_json: bool) -> None:
    """List the keys, never their secrets."""
    rows = [asdict(key) for key in files.listed()]
    cells = [
        (
            row["id"],
            row["direction"],
            row["type"],
            "signs" if row["signs"] else "verifies",
            row["created"] or "unknown",
            "all" if row["rights"] is None else json.dumps(row["rights"]),
        )
        for row in rows
    ]
    head = ("id", "direction", "type", "use", "created", "rights")
    _print(rows, as_json, head, cells)


@keys.command(
    "add",
    epilog="""\b
Examples:
  lonelypss keys add
  lonelypss keys add --id tenant-a --notify 'a/**' --subscribe 'a/**' \\
      --url http://10.0.1. --write tenant-a-secrets.json
""",
)
@click.option("--id", metavar="ID", help="Its name.  [default: today's date]")
@_direction_option
@click.option("--notify", multiple=True, metavar="GLOB", help="It may send to these topics only.")
@click.option(
    "--subscribe", multiple=True, metavar="GLOB", help="It may subscribe to these topics only."
)
@click.option("--url", multiple=True, metavar="PREFIX", help="It may act for such urls only.")
@click.option(
    "--write", metavar="FILE", help="Write a secrets file for the subscriber who gets a key with"
    " rights.",
)  # fmt: skip
@_json_option
@_files_options
def keys_add(
    files: Files,
    id: str | None,
    directions: Sequence[str],
    notify: Sequence[str],
    subscribe: Sequence[str],
    url: Sequence[str],
    write: str | None,
    as_json: bool,
) -> None:
    """Add a new key, which only verifies for now.

    With --notify, --subscribe or --url it has rights: broadcasters accept it from a subscriber, who
    may do nothing else. Without, it is for everybody.
    """
    asked = {"notify": notify, "subscribe": subscribe, "urls": url}
    rights = {name: list(allowed) for name, allowed in asked.items() if allowed}
    if bool(write) != bool(rights):
        raise click.UsageError(
            "--write goes with rights (--notify, --subscribe, --url): the subscriber who gets such"
            " a key needs a file of its own"
        )
    id, written = files.add(id, directions, rights, Path(write) if write else None)
    if rights:
        next_ = f"copy {files.main} to every broadcaster, then give {write} to its subscriber"
    else:
        next_ = f"copy the files to everybody; once all have them: lonelypss keys sign {id}"
    _changed(id, written, next_, as_json)


@keys.command("sign")
@click.argument("id")
@_direction_option
@_json_option
@_files_options
def keys_sign(files: Files, id: str, directions: Sequence[str], as_json: bool) -> None:
    """Let the key ID sign from now on. Everybody must know it already."""
    before = [key.id for key in files.listed() if key.signs and key.id != id]
    written = files.sign_with(id, directions)
    old = f"retire {before[0]}" if before else "ls"
    next_ = f"copy the files to everybody; two minutes after the last: lonelypss keys {old}"
    _changed(id, written, next_, as_json)


@keys.command("retire")
@click.argument("id")
@_direction_option
@_json_option
@_files_options
def keys_retire(files: Files, id: str, directions: Sequence[str], as_json: bool) -> None:
    """Remove the key ID. What is signed with it is refused from then on."""
    _changed(id, files.retire(id, directions), "copy the files to everybody", as_json)


def _changed(id: str, written: Sequence[Path], next_: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"id": id, "written": [str(path) for path in written]}))
        return
    for path in written:
        click.echo(f"wrote {path}")
    click.echo(f"Next: {next_}")


# doctor
@main.command(
    cls=_Grouped,
    epilog="""\b
Examples:
  lonelypss doctor
  lonelypss doctor --host 10.0.0.5 --db postgresql://lonelyps@db.internal/lonelyps

\b
Exit status: 0 nothing is in the way, 1 something is, 2 wrong use.
""",
)
@_host_option
@_port_option
@_workers_option
@_insecure_option
@_json_option
@_readable_option
@_configured
def doctor(
    loaded: Loaded,
    secrets: str | None,
    allow_readable_secrets: bool,
    host: str,
    port: int,
    workers: int,
    insecure: bool,
    as_json: bool,
) -> None:
    """Look for what keeps a broadcaster from working, and say what to do.

    Takes the options of `lonelypss serve`. Looks at packages, secrets, port, database (reachable?
    which schema? its clock?), other broadcasters, limits and disk; changes and starts nothing.
    """
    from lonelypss.doctor import Finding, Level, Patient, examine

    patient = Patient(loaded.config, secrets, allow_readable_secrets, host, port, workers, insecure)

    async def findings() -> list[Finding]:
        return [finding async for finding in examine(patient)]

    found = asyncio.run(findings())
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        for finding in found:
            click.echo(f"{finding.level:8}  {finding.about:9}  {_plain(finding.text)}")
            if finding.advice:
                click.echo(f"{'':19}  -> {finding.advice}")
    sys.exit(any(finding.level is Level.PROBLEM for finding in found))


# subs
@main.group()
def subs() -> None:
    """Look at subscriptions, and remove them."""


@subs.command(
    "ls",
    epilog="""\b
Examples:
  lonelypss subs ls                                         how many there are
  lonelypss subs ls --topic orders/42                       who gets a message on that topic
  lonelypss subs ls --url http://10.0.0.7:3002/v1/receive   what that subscriber wants
""",
)
@click.option("--url", help="Only the subscriptions of this url.")
@click.option("--topic", help="Only those that a message on this topic goes to, globs too.")
@click.option("--db", metavar="URL", help="As for serve.")
@_config_option
@_json_option
def subs_ls(
    url: str | None, topic: str | None, db: str | None, config: str | None, as_json: bool
) -> None:
    """List subscriptions of a url, or those that match a topic; else count them."""

    async def look(store: Store) -> list[Subscription] | dict[str, int]:
        if topic is not None:
            found = await store.match(topic.encode("utf-8", "surrogateescape"))
            return [s for s in found if url in (None, s.url)]
        return await store.counts() if url is None else await store.subscriptions(url)

    found = _with_store(db, config, look)
    if isinstance(found, dict):
        _print(found, as_json, ("kind", "rows"), list(found.items()))
        return
    rows = [_row(s) for s in sorted(found, key=lambda s: (s.url, s.kind, s.pattern))]
    _print(rows, as_json, ("kind", "pattern", "url", "recovery"), [tuple(r.values()) for r in rows])


@subs.command(
    "rm",
    epilog="""\b
Example:
  lonelypss subs rm http://10.0.0.7:3002/v1/receive --exact orders/42 --glob 'logs/*'
""",
)
@click.argument("url")
@click.option("--exact", multiple=True, metavar="TOPIC", help="This topic; may be repeated.")
@click.option("--glob", multiple=True, metavar="GLOB", help="This glob; may be repeated.")
@click.option("--all", "everything", is_flag=True, help="All subscriptions of the url.")
@click.option("--db", metavar="URL", help="As for serve.")
@_config_option
@_json_option
def subs_rm(
    url: str,
    exact: Sequence[str],
    glob: Sequence[str],
    everything: bool,
    db: str | None,
    config: str | None,
    as_json: bool,
) -> None:
    """Remove subscriptions of URL. A running subscriber may well subscribe again."""
    if everything == bool(exact or glob):
        raise click.UsageError("give --exact and --glob, or --all")
    wanted = {(Kind.EXACT, t.encode("utf-8", "surrogateescape")) for t in exact}
    wanted |= {(Kind.GLOB, g.encode("utf-8", "surrogateescape")) for g in glob}

    async def remove(store: Store) -> list[Subscription]:
        found = await store.subscriptions(url)
        doomed = [s for s in found if everything or (s.kind, s.pattern) in wanted]
        await store.drop(doomed)
        return doomed

    removed = [_row(s) for s in _with_store(db, config, remove)]
    if as_json:
        click.echo(json.dumps(removed, indent=2))
    else:
        click.echo(f"removed {len(removed)} subscription(s) of {url}")
    if not removed:
        sys.exit(1)


# explain
@main.command(
    epilog="""\b
Examples:
  lonelypss explain orders/42
  lonelypss explain orders/42 --db postgresql://lonelyps@db.internal/lonelyps --json

\b
Nothing is sent. What becomes of a real message tells
  lonelypsc notify orders/42 'a test' --explain
"""
)
@click.argument("topic")
@click.option("--db", metavar="URL", help="As for serve.")
@_config_option
@_json_option
def explain(topic: str, db: str | None, config: str | None, as_json: bool) -> None:
    """Tell who gets a message on TOPIC, which of their patterns match, and whom the url policy of
    this configuration refuses."""

    async def look(store: Store) -> list[Subscription]:
        return list(await store.match(topic.encode("utf-8", "surrogateescape")))

    with _explained():
        loaded = _loaded(db, config)
        policy = UrlPolicy(loaded.config)
    matched: dict[str, list[Subscription]] = {}
    for subscription in _with_store(db, config, look):
        matched.setdefault(subscription.url, []).append(subscription)
    rows = []
    for url in sorted(matched):
        because = sorted("the topic" if s.kind is Kind.EXACT else _row(s)["pattern"]
                         for s in matched[url])  # fmt: skip
        rows.append({"url": url, "because": because, "outcome": _verdict(policy, url)})
    head = ("url", "because of", "outcome")
    _print(rows, as_json, head, [(r["url"], ", ".join(r["because"]), r["outcome"]) for r in rows])


def _verdict(policy: UrlPolicy, url: str) -> str:
    try:
        target = policy.target(url)
    except UrlRefused as e:
        return f"refused: {e}"
    if target.is_peer:
        return "goes to the websockets of a broadcaster"
    return "is posted there" if target.address else "is posted there, if its address is allowed"


def _row(subscription: Subscription) -> dict[str, Any]:
    return {
        "kind": subscription.kind.name.lower(),
        "pattern": subscription.pattern.decode("utf-8", "backslashreplace"),
        "url": subscription.url,
        "recovery": subscription.recovery,
    }


def _with_store(db: str | None, config: str | None, work: Callable[[Store], Any]) -> Any:
    async def run(store: Store) -> Any:
        try:
            await store.open()
            return await work(store)
        finally:
            await store.close()

    with _explained():
        loaded = _loaded(db, config)
        database = Database.at(loaded.config.db)
        there = database.path is None or os.path.exists(database.path)
        if not database.is_shared or not there:
            raise ConfigError(f"db: there is no database at {database.path}; see --db")
        return asyncio.run(run(make_store(loaded.config)))


def _loaded(db: str | None, config: str | None) -> Loaded:
    flags = {"db": None if db is None else _database_url(db)}
    file = None if config is None else Path(config)
    return configuration.load(flags, os.environ, file, AuthConfig(Nothing(), Nothing()))


def _print(value: Any, as_json: bool, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    if as_json:
        click.echo(json.dumps(value, indent=2))
    else:
        _print_table(head, [["" if cell is None else str(cell) for cell in row] for row in rows])


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, no_wrap=name == head[0], overflow="fold")
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = 10_000
    console.print(table)


def _plain(text: str) -> Text:
    """As it stands, without what could steer a terminal."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))
