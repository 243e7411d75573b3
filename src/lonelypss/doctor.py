"""What keeps a broadcaster from working, and what to do about it: `lonelypss doctor`.

Everything is looked at and nothing is changed. Each examination yields what it found.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from lonelypsp.signing import AuthConfig
from lonelypss import tls
from lonelypss.config import BroadcasterConfig, ConfigError, Database, without_password
from lonelypss.secrets import check_exposure, load_auth
from lonelypss.server import bind
from lonelypss.store.base import Condition, StoreUnavailable

CLOCK_DIFFERS = 5.0  # seconds; leases and signatures allow for that
CLOCK_IS_WRONG = 60.0  # half of what a signature may be off
_PATIENCE = 3.0


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    """It will work, but not as most people want it."""
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: what.
        text: what is so; no secret in it.
        advice: what to do; empty: nothing.
    """

    about: str
    level: Level
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Patient:
    """A broadcaster as it would be started; see `lonelypss serve`."""

    config: BroadcasterConfig
    secrets: str | None
    allow_readable_secrets: bool
    host: str
    port: int
    workers: int
    insecure: bool


async def examine(patient: Patient) -> AsyncIterator[Finding]:
    """All that is found, one after the other."""
    for finding in _packages(patient.config):
        yield finding
    for finding in _authorization(patient):
        yield finding
    for finding in _port(patient):
        yield finding
    condition: Condition | None = None
    async for finding, found in _database(patient):
        condition = found or condition
        yield finding
    if condition is not None:
        async for finding in _peers(patient, condition):
            yield finding
    for finding in _room(patient.config):
        yield finding


def _packages(config: BroadcasterConfig) -> Iterator[Finding]:
    wanted = {
        "uvicorn": "standard", "httptools": "standard", "websockets": "standard",
        "uvloop": "standard", "zstandard": "standard",
    }  # fmt: skip
    if Database.at(config.db).is_remote:
        wanted["asyncpg"] = "postgres"
    if config.metrics:
        wanted["prometheus_client"] = "metrics"
    missing = {name: extra for name, extra in wanted.items() if not importlib.util.find_spec(name)}
    for name, extra in missing.items():
        level = Level.WARNING if name in ("uvloop", "zstandard") else Level.PROBLEM
        yield Finding(
            "packages", level, f"{name} is not installed", f"pip install 'lonelypsc[{extra}]'"
        )
    if not missing:
        yield Finding("packages", Level.OK, "all that this configuration needs are installed")


def _authorization(patient: Patient) -> Iterator[Finding]:
    auth: AuthConfig = patient.config.auth
    if patient.secrets is None:
        yield Finding(
            "secrets",
            Level.WARNING,
            "no secrets file: whoever reaches the port can subscribe and send",
            "`lonelypss setup` writes one, --secrets names it",
        )
    else:
        try:
            auth = load_auth(patient.secrets, allow_readable=patient.allow_readable_secrets)
        except ConfigError as e:
            yield Finding("secrets", Level.PROBLEM, str(e), "see --secrets")
            return
        kinds = f"{auth.to_broadcaster!r} to broadcasters, {auth.to_subscriber!r} to subscribers"
        yield Finding("secrets", Level.OK, f"{patient.secrets}: {kinds}")
    try:
        tls.listening(patient.config)
        if not patient.insecure:
            check_exposure(
                auth,
                sorted({str(info[4][0]) for info in socket.getaddrinfo(patient.host, 0)}),
                encrypted=patient.config.tls_cert is not None,
                only_known=patient.config.tls_client_ca is not None,
            )
    except ConfigError as e:
        yield Finding("secrets", Level.PROBLEM, str(e), "see --secrets, --tls-cert, --host")
    except OSError:
        return  # the port says it


def _port(patient: Patient) -> Iterator[Finding]:
    where = f"port {patient.port} on {patient.host}"
    try:
        for sock in bind(patient.host, patient.port):
            sock.close()
    except OSError as e:
        advice = "choose another --port, or an address of this machine with --host"
        if _answers_healthz(patient.host, patient.port):
            yield Finding("port", Level.WARNING, f"a broadcaster listens on {where} already")
        else:
            text = f"cannot listen on {where}: {e.strerror or e}"
            yield Finding("port", Level.PROBLEM, text, advice)
        return
    yield Finding("port", Level.OK, f"{where} is free")


def _answers_healthz(host: str, port: int) -> bool:
    try:
        with closing(socket.create_connection((host, port), _PATIENCE)) as sock:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return sock.recv(1000).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


async def _database(patient: Patient) -> AsyncIterator[tuple[Finding, Condition | None]]:
    config = patient.config
    database, name = Database.at(config.db), without_password(config.db)

    def finding(level: Level, text: str, advice: str = "") -> tuple[Finding, None]:
        return Finding("database", level, text, advice), None

    if not database.is_shared:
        advice = "for more, --db sqlite:///lonelypss.db or --db postgresql://..."
        if patient.workers > 1:
            yield finding(Level.PROBLEM, "workers cannot share a database in memory", advice)
        else:
            yield finding(Level.WARNING, "in memory: subscriptions are gone at the end", advice)
        return
    try:
        if database.path is None:
            from lonelypss.store import postgres

            found = await postgres.examine(config.db)
        elif (new := _new_file(database.path)) is not None:
            yield finding(*new)
            return
        else:
            from lonelypss.store import sqlite

            found = await asyncio.to_thread(sqlite.examine, database.path)
    except StoreUnavailable as e:
        yield finding(Level.PROBLEM, str(e))
        return
    yield Finding("database", *_schema(name, found)), found
    if found.is_standby:
        advice = "name the primary in --db, or all servers and ?target_session_attrs=primary"
        yield finding(Level.PROBLEM, "it is a standby and takes no writes", advice)
    elif not found.can_create and found.schema != found.known:
        advice = "as its owner: GRANT CREATE ON SCHEMA public TO the user in --db"
        yield finding(Level.PROBLEM, "we may not make tables there", advice)
    wanted = config.db_pool_size * patient.workers
    if found.connections is not None and wanted > found.connections / 2:
        yield finding(
            Level.WARNING,
            f"this machine alone may open {wanted} of its {found.connections} connections",
            "lower --db-pool-size, or raise max_connections there",
        )
    yield Finding("clock", *_clock(found.clock - time.time())), None


def _new_file(name: str) -> tuple[Level, str, str] | None:
    """None: it is there."""
    path = Path(name).absolute()
    if path.exists():
        return None
    if os.access(path.parent, os.W_OK):
        return Level.OK, f"{path} is not there yet; the first start makes it", ""
    advice = f"make {path.parent}, writable for this user, or name another file with --db"
    return Level.PROBLEM, f"{path} cannot be made", advice


def _schema(name: str, found: Condition) -> tuple[Level, str, str]:
    if found.schema is None:
        return Level.OK, f"{name} answers; the first start makes its tables", ""
    if found.schema > found.known:
        text = f"{name} has schema version {found.schema}, this lonelypss knows {found.known}"
        return Level.PROBLEM, text, "run a newer lonelypss"
    if found.schema < found.known:
        text = f"{name} answers; the start brings its schema from {found.schema} to {found.known}"
        return Level.OK, text, ""
    return Level.OK, f"{name} answers, schema version {found.schema}", ""


def _clock(ahead: float) -> tuple[Level, str, str]:
    if abs(ahead) < CLOCK_DIFFERS:
        return Level.OK, "that of the database agrees with ours", ""
    level = Level.WARNING if abs(ahead) < CLOCK_IS_WRONG else Level.PROBLEM
    text = (
        f"that of the database is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} ours"
    )
    return level, text, "let NTP set both: signatures and leases carry times"


async def _peers(patient: Patient, found: Condition) -> AsyncIterator[Finding]:
    config = patient.config
    if Database.at(config.db).is_remote and config.peer_url is None:
        yield Finding(
            "peers",
            Level.WARNING,
            f"other machines cannot reach the websockets of this one: it says {config.peer_host}",
            "--peer-host ADDRESS --peer-url 'http://ADDRESS:{port}', with its address for them",
        )
    if config.peer_url is None or "{port}" in config.peer_url:
        try:
            for sock in bind(config.peer_host, 0):
                sock.close()
        except OSError as e:
            text = f"cannot listen on {config.peer_host}: {e.strerror or e}"
            yield Finding("peers", Level.PROBLEM, text, "an address of this machine as --peer-host")
    reached = await asyncio.gather(*(_reaches(url) for url in found.peers))
    for url, failure in zip(found.peers, reached, strict=True):
        if failure:
            text = f"{url} gives signs of life, but cannot be reached from here: {failure}"
            yield Finding("peers", Level.WARNING, text, "see --peer-url there, and firewalls")
    if found.peers and not any(reached):
        yield Finding("peers", Level.OK, f"{len(found.peers)} others are reached from here")


async def _reaches(url: str) -> str:
    """Why not; empty if it is reached."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(_PATIENCE):
            port = parts.port or (443 if parts.scheme == "https" else 80)
            _, writer = await asyncio.open_connection(parts.hostname, port)
    except TimeoutError:
        return "no answer"
    except OSError as e:
        return e.strerror or str(e)
    writer.transport.abort()
    return ""


def _room(config: BroadcasterConfig) -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = config.outgoing_connections + config.max_websockets + config.max_notifies + 100
    if files != resource.RLIM_INFINITY and files < wanted:
        yield Finding(
            "limits",
            Level.WARNING,
            f"{files} open files are allowed, {wanted} may be wanted",
            "`ulimit -n`, LimitNOFILE or nofile; or lower --outgoing-connections, --max-websockets",
        )
    directory = config.spool_directory or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=directory):
            free = shutil.disk_usage(directory).free
    except OSError as e:
        text = f"large messages cannot be kept in {directory}: {e.strerror or e}"
        yield Finding("spool", Level.PROBLEM, text, "see --spool-directory")
        return
    if free < config.spool_quota:
        text = (
            f"{free >> 20} MiB are free in {directory}, spool_quota is {config.spool_quota >> 20}"
        )
        yield Finding("spool", Level.WARNING, text, "lower --spool-quota, or use another disk")
    else:
        yield Finding("spool", Level.OK, f"{directory} has room for large messages")
