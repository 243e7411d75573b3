"""Every option of a broadcaster, once: name, type, default, unit, help.

The command line, the environment, the configuration file, `check-config` and the table in
docs/reference/configuration.md all derive from the fields of `BroadcasterConfig`.
"""

from __future__ import annotations

import math
import random
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, get_type_hints

from lonelypsp.guard import HttpLimits
from lonelypsp.signing import AuthConfig, Nothing
from lonelypss.urlpolicy import UrlPreset, parse_ports, parse_rules

ENV_PREFIX = "LONELYPSS_"
MIB = 1024 * 1024


class ConfigError(Exception):
    """An option has an impossible value; the message names it and where it came from."""


class UnsubscribeImmediate(StrEnum):
    """What an (unsigned) answer `00 0a` to a message may do."""

    OBEY = "obey"
    """With status 2xx or 410 the subscription is removed."""
    QUARANTINE = "quarantine"
    """That must happen three times, with pauses, and nothing else in between."""
    IGNORE = "ignore"
    """It is a failed delivery."""


def _option(default: Any, unit: str, help: str, *, least: float | None = None) -> Any:
    return field(default=default, metadata={"unit": unit, "help": help, "least": least})


@dataclass(frozen=True, slots=True, kw_only=True)
class BroadcasterConfig:
    """How one broadcaster runs. `auth` comes from the secrets file, all else from options."""

    db: str = _option(
        "sqlite:///lonelypss.db",
        "url",
        "Where subscriptions are kept: sqlite:///relative.db, sqlite:////absolute.db, sqlite://"
        " (in memory, gone at exit), or postgresql://user:password@host/database, which any number"
        " of broadcasters can share.",
    )
    db_pool_size: int = _option(
        10, "connections", "Most connections of one process to PostgreSQL.", least=1
    )
    db_timeout: float = _option(
        1.0,
        "seconds",
        "In which PostgreSQL must answer; after that 503 with Retry-After. What changes many rows"
        " gets longer.",
        least=0.01,
    )
    metrics: bool = _option(
        False,
        "true | false",
        "Whether GET /metrics answers, for Prometheus, without authorization. Needs the package"
        " prometheus-client (pip install 'lonelypsc[metrics]').",
    )
    tracing: bool = _option(
        False,
        "true | false",
        "Whether spans of OpenTelemetry are made of messages, deliveries and MISSED notices (pip"
        " install 'lonelypsc[otel]'). `lonelypss serve` sends them as the variables OTEL_* say"
        " (pip install 'lonelypsc[otlp]'). The trace of a publisher reaches subscribers in any"
        " case.",
    )
    idle_poll: int = _option(
        200,
        "microseconds",
        "For which `lonelypss serve` looks for work before it sleeps, where the last work was"
        " followed by other work soon. It shortens the way of messages that come one by one, and"
        " takes processor time that nobody else wants. 0: it sleeps at once.",
        least=0,
    )
    explain: bool = _option(
        False,
        "true | false",
        "Whether a publisher that asks is told what became of its message at each subscriber, with"
        " urls, patterns and reasons. Whoever may send learns who listens.",
    )
    message_body_spool_size: int = _option(
        10 * MIB,
        "bytes",
        "A message up to this size stays in memory while it is passed on; a larger one goes"
        " through a temporary file.",
        least=0,
    )
    spool_directory: str | None = _option(
        None, "path", "Directory of those temporary files; by default the system's."
    )
    spool_quota: int = _option(
        32 * 1024 * MIB,
        "bytes",
        "All temporary files together. A message that does not fit now is answered 507, one that"
        " never fits 413.",
        least=0,
    )
    max_request_body: int = _option(
        64 * MIB,
        "bytes",
        "Largest body of any request but notify, which decides how long a list set_subscriptions"
        " can carry; above it 413.",
        least=131072,
    )
    max_notifies: int = _option(
        1024,
        "requests",
        "Messages being received or passed on at one time; above it 503 with Retry-After.",
        least=1,
    )
    tls_cert: str | None = _option(
        None,
        "path",
        "Certificate chain (PEM) of `lonelypss serve`, which then speaks https and wss. SIGHUP"
        " reads it again.",
    )
    tls_key: str | None = _option(
        None, "path", "Its private key (PEM); by default in the same file."
    )
    tls_client_ca: str | None = _option(
        None,
        "path",
        "Certificates (PEM) of the authorities one of which must have signed the certificate of who"
        " connects.",
    )
    incoming_http_timeout_head: float = _option(
        8.0,
        "seconds",
        "In which the head of a request must arrive, the first from the connection on; a second"
        " later 408. This and the other incoming_ options but min_rate and rate_window: only under"
        " `lonelypss serve`.",
        least=0.01,
    )
    incoming_http_timeout_idle: float = _option(
        25.0, "seconds", "Without a request, after which a connection is closed.", least=0.01
    )
    incoming_http_min_rate: int = _option(
        1024,
        "bytes per second",
        "Slower than this, the body of a request is answered 408.",
        least=1,
    )
    incoming_http_rate_window: float = _option(
        20.0,
        "seconds",
        "Over which that rate is averaged. Who takes nothing of the answers that wait for it for so"
        " long is disconnected.",
        least=0.01,
    )
    incoming_http_max_head: int = _option(
        16 * 1024,
        "bytes",
        "Largest head of a request, above it 431; half of it for the path alone, above it 414.",
        least=1024,
    )
    incoming_connections: int = _option(
        8192,
        "connections",
        "To one process, websockets not included, and at most half the files that it may open. One"
        " more closes the one that waits longest for a request; if all are busy, it gets 503 with"
        " Retry-After.",
        least=1,
    )
    max_hops: int = _option(
        3,
        "hops",
        "How often a message may have been forwarded from broadcaster to broadcaster, by programs"
        " that say so. One more, and it is going round in circles: 508, or over a websocket an"
        " answer that counts nobody.",
        least=0,
    )
    max_subscriptions_per_url: int | None = _option(
        1_000_000,
        "subscriptions",
        "Of one subscriber's url; a call that adds to more is answered 429.",
        least=1,
    )
    max_subscriptions_per_origin: int | None = _option(
        10_000_000,
        "subscriptions",
        "Of all urls with one scheme, host and port; a call that adds to more is answered 429.",
        least=1,
    )
    subscription_ttl: float | None = _option(
        None,
        "seconds",
        "Without a sign of life, after which a subscriber's subscriptions are removed, once no"
        " MISSED notice is to come. Give all broadcasters the same, and at least four times the"
        " resubscribe_interval of the clients (300 s). None: never.",
        least=1,
    )
    outgoing_http_timeout_total: float | None = _option(
        30.0,
        "seconds",
        "One delivery from start to answer, waiting for a connection included. Extended by the time"
        " that outgoing_http_min_rate allows for large messages.",
        least=0.1,
    )
    outgoing_http_timeout_connect: float | None = _option(
        None, "seconds", "Until a delivery has a connection, waiting for a free one included.",
        least=0.1,
    )  # fmt: skip
    outgoing_http_timeout_sock_read: float | None = _option(
        5.0, "seconds", "Without any progress on the connection of a delivery.", least=0.1
    )
    outgoing_http_timeout_sock_connect: float | None = _option(
        5.0, "seconds", "One attempt to connect to a subscriber, TLS included.", least=0.1
    )
    outgoing_http_min_rate: int = _option(
        MIB,
        "bytes per second",
        "Slower than this, the delivery of a large message may hit the total timeout.",
        least=1,
    )
    outgoing_connections: int = _option(
        1024, "connections", "To all subscribers together.", least=1
    )
    outgoing_connections_per_host: int = _option(
        32, "connections", "To one scheme, host and port.", least=1
    )
    outgoing_queue_per_host: int = _option(
        100_000,
        "deliveries",
        "Waiting for a connection to one host; what comes on top fails at once and is announced"
        " by a MISSED notice.",
        least=1,
    )
    outgoing_ca_file: str | None = _option(
        None,
        "path",
        "Certificates (PEM) of the authorities that vouch for https subscribers; by default those"
        " that the system trusts.",
    )
    outgoing_client_cert: str | None = _option(
        None, "path", "Certificate chain (PEM) that this broadcaster shows to https subscribers."
    )
    outgoing_client_key: str | None = _option(
        None, "path", "Its private key (PEM); by default in the same file."
    )
    outgoing_dns_threads: int = _option(
        16,
        "threads",
        "In which names of subscribers are looked up. A name server that hangs holds one for each"
        " name.",
        least=1,
    )
    url_policy: UrlPreset = _option(
        UrlPreset.INTERNAL,
        "internal | public | listed",
        "Where urls of subscribers may lead: also to private and loopback addresses; only to public"
        " ones, and what url_allow excepts; only to what url_allow lists. Link-local, multicast,"
        " reserved and metadata addresses are always denied.",
    )
    url_allow: str = _option(
        "",
        "host[:port], ...",
        "What url_policy=public excepts, or listed lists: addresses and networks (10.0.0.0/8,"
        " [fd00::/8]:443), names (*.example.com:8000-8999), or *:port. A name that is listed may"
        " lead to any address.",
    )
    url_deny: str = _option(
        "", "host[:port], ...", "What is denied in any case, written in the same way."
    )
    url_denied_ports: str = _option(
        "22, 23, 25, 53, 110, 111, 139, 143, 389, 445, 465, 587, 636, 993, 995, 1433, 1521, 2375, "
        "2379, 3306, 3389, 5432, 5672, 6379, 9042, 9092, 9200, 10250, 11211, 27017",
        "ports",
        "Ports, or ranges like 1-79, that no url may have; by default those of mail, databases and"
        " the like, some of which take a line of a message for a command.",
    )
    url_https_only: bool = _option(
        False, "true | false", "Whether urls of subscribers must be https."
    )
    outgoing_breaker_failures: int = _option(
        5,
        "failures",
        "Without a reply in between, after which a host is left alone: what is sent to it fails at"
        " once, and connections are tried in the background. 0: never.",
        least=0,
    )
    outgoing_breaker_pause: float = _option(
        0.5, "seconds", "Until the first of these; each further pause is twice as long.", least=0.1
    )
    outgoing_breaker_max_pause: float = _option(
        4.0, "seconds", "Longest of these pauses.", least=0.1
    )
    unsubscribe_immediate: UnsubscribeImmediate = _option(
        UnsubscribeImmediate.OBEY,
        "obey | quarantine | ignore",
        "What becomes of a subscription when a message is answered with 00 0a, which is not signed:"
        " it ends; it ends with the third such answer, each a minute after the one before, and no"
        " other in between; it stays.",
    )
    journal_after: float = _option(
        0.25,
        "seconds",
        "A fan-out that lasts longer writes down what is still open, so that even a killed"
        " broadcaster sends MISSED notices for it later. 0: before the first delivery.",
        least=0,
    )
    sweep_missed_interval: float = _option(
        10.0,
        "seconds",
        "Longest pause between two looks for MISSED notices that are due.",
        least=0.1,
    )
    missed_lease: float = _option(
        60.0, "seconds", "After which another broadcaster may repeat a notice that one took on.",
        least=1,
    )  # fmt: skip
    missed_expo_factor: float = _option(
        1.0, "seconds", "f in the pause before attempt n: f * b^min(n, m) + c + random * j.",
        least=0,
    )  # fmt: skip
    missed_expo_base: float = _option(2.0, "", "b of that pause.", least=1)
    missed_expo_max: int = _option(11, "", "m of that pause.", least=0)
    missed_constant: float = _option(1.0, "seconds", "c of that pause.", least=0)
    missed_jitter: float = _option(2.0, "seconds", "j of that pause.", least=0)
    missed_retry_budget: int = _option(
        256,
        "notices",
        "On their way at one time to hosts that have failed and not answered since; what comes on"
        " top counts as failed. Others are not delayed by them.",
        least=1,
    )
    missed_max_retries: int = _option(
        150, "attempts", "After which a notice is given up; by default after about three days.",
        least=1,
    )  # fmt: skip
    peer_url: str | None = _option(
        None,
        "url",
        "Where other broadcasters on the same database reach this process, so that their messages"
        " get to its websockets. By default derived from a port that it opens for that; {port}"
        " stands for that port. Without {port}, it leads to the main port, and none is opened.",
    )
    peer_host: str = _option(
        "127.0.0.1", "address", "Where that port is opened. Bind to an internal address."
    )
    peer_lease: float = _option(
        30.0,
        "seconds",
        "Without a sign of life, after which the others forget a broadcaster; at most a third"
        " later they have.",
        least=1,
    )
    max_websockets: int = _option(
        10_000, "connections", "Websockets of one process; above it 503 with Retry-After.", least=0
    )
    websocket_origins: str = _option(
        "",
        "origins",
        "Web pages that may open websockets, e.g. https://a.example,https://b.example. Programs"
        " send no Origin and are always allowed.",
    )
    websocket_open_timeout: float = _option(
        10.0, "seconds", "In which a new websocket must say what it wants.", least=0.1
    )
    websocket_ack_timeout: float = _option(
        30.0,
        "seconds",
        "A websocket that acknowledges nothing for so long, though it was sent something, is"
        " disconnected.",
        least=0.1,
    )
    websocket_max_message_size: int = _option(
        16 * MIB,
        "bytes",
        "Largest frame taken from a websocket; larger messages come in parts. A larger frame ends"
        " the connection (1009).",
        least=64 * 1024,
    )
    outgoing_max_ws_message_size: int = _option(
        3_670_016,
        "bytes",
        "Largest frame sent to a websocket; older clients take 4 MiB at most.",
        least=4096,
    )
    websocket_minimal_headers: bool = _option(
        True, "true | false", "Leave out the names of the headers of websocket messages."
    )
    websocket_send_max_unacknowledged: int = _option(
        1024,
        "frames",
        "Sent to one websocket and not acknowledged; what comes on top waits.",
        least=1,
    )
    websocket_max_unprocessed_receives: int = _option(
        255,
        "frames",
        "Taken from one websocket and not answered; above it nothing more is read from it.",
        least=1,
    )
    websocket_max_pending_sends: int = _option(
        10_000,
        "messages",
        "Waiting for one websocket. One more, and it is disconnected as too slow (4408).",
        least=1,
    )
    websocket_max_pending_bytes: int = _option(
        64 * MIB,
        "bytes",
        "In memory for messages that wait for one websocket. If a second message exceeds it, the"
        " websocket is disconnected as too slow (4408).",
        least=0,
    )
    websocket_max_subscriptions: int = _option(
        10_000, "subscriptions", "Of one websocket; one more ends the connection (4429).", least=1
    )
    compression_allowed: bool = _option(
        True,
        "true | false",
        "Whether bodies travel zstd-compressed over websockets, where the client agrees; needs the"
        " package zstandard.",
    )
    compression_level: int = _option(
        3, "level", "zstd level without a dictionary, 1 to 19.", least=1
    )
    compression_min_size: int = _option(
        32, "bytes", "Smaller bodies are not compressed, dictionary or not.", least=1
    )
    compression_trained_max_size: int = _option(
        16_384,
        "bytes",
        "Bodies from this size on are compressed without a dictionary, smaller ones with one, if"
        " there is one.",
        least=1,
    )
    compression_dictionaries: str = _option(
        "",
        "id=path[:level]",
        "Preset dictionaries, comma-separated, with ids from 2 to 65535; clients have the same"
        " ones under the same ids.",
    )
    compression_training: bool = _option(
        False,
        "true | false",
        "Whether dictionaries are trained from the messages of all websockets that agree, and sent"
        " to them. Saves bandwidth with many small, similar messages, and costs time.",
    )
    compression_training_low_watermark: int = _option(
        100 * 1024, "bytes", "Of messages, after which a first, small dictionary is made.", least=1
    )
    compression_training_high_watermark: int = _option(
        10 * MIB, "bytes", "Of messages, after which a larger dictionary is made.", least=1
    )
    compression_retrain_interval: float = _option(
        216_000.0, "seconds", "Between two dictionaries after that.", least=1
    )
    decompression_max_window_size: int = _option(
        8 * MIB, "bytes", "Of zstd data that is accepted.", least=1024
    )
    auth: AuthConfig = field(default=AuthConfig(Nothing(), Nothing()), repr=False)

    def __post_init__(self) -> None:
        for row in options():
            row.check(getattr(self, row.name))
        try:
            self.missed_delay(self.missed_max_retries - 1)
        except OverflowError:
            raise ConfigError(
                "missed_expo_base is too large: the last pause before a MISSED notice is no number"
            ) from None

    @property
    def has_secure_peer_port(self) -> bool:
        """Whether the port that is opened for other broadcasters speaks https."""
        url = self.peer_url or ""
        return url.startswith("https:") and "{port}" in url

    @property
    def http_limits(self) -> HttpLimits:
        return HttpLimits(
            head_timeout=self.incoming_http_timeout_head,
            idle_timeout=self.incoming_http_timeout_idle,
            min_rate=self.incoming_http_min_rate,
            rate_window=self.incoming_http_rate_window,
            max_head=self.incoming_http_max_head,
            max_connections=self.incoming_connections,
        )

    def missed_delay(self, attempt: int) -> float | None:
        """Seconds to wait before attempt number `attempt` (0 = first); None: give up."""
        if attempt >= self.missed_max_retries:
            return None
        grown = self.missed_expo_base ** min(self.missed_expo_max, attempt)
        return (
            self.missed_expo_factor * grown
            + self.missed_constant
            + random.random() * self.missed_jitter
        )


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the options table."""

    name: str
    type: Any
    default: Any
    unit: str
    help: str
    least: float | None

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def parse(self, text: str) -> Any:
        """The value that `text` stands for; raises ConfigError."""
        if self._optional and text.lower() in ("", "none"):
            return None
        try:
            return _SWITCH[text.lower()] if self._kind is bool else self._kind(text)
        except (KeyError, ValueError):
            raise ConfigError(f"{self.name}: {text!r} is not {self._wanted}") from None

    def check(self, value: Any) -> None:
        """Raises ConfigError if the option cannot have this value."""
        if value is None and self._optional:
            return
        fits = isinstance(value, (int, float) if self._kind is float else self._kind)
        if not fits or isinstance(value, bool) is not (self._kind is bool):
            raise ConfigError(f"{self.name}: {value!r} is not {self._wanted}")
        if self.least is not None and not (math.isfinite(value) and value >= self.least):
            none = ", or none" if self._optional else ""
            raise ConfigError(f"{self.name} is {value}, must be at least {self.least:g}{none}")
        if self.name == "db":
            Database.at(value)
        if self.name == "peer_url":
            _check_peer_url(value)
        if parse := _PARSED.get(self.name):
            try:
                parse(value)
            except ValueError as e:
                raise ConfigError(f"{self.name}: {e}") from None

    @property
    def _optional(self) -> bool:
        return type(None) in _kinds(self.type)

    @property
    def _kind(self) -> Any:
        return next(kind for kind in _kinds(self.type) if kind is not type(None))

    @property
    def _wanted(self) -> str:
        listed = self._kind is bool or issubclass(self._kind, StrEnum)
        return self.unit if listed else str(self._kind.__name__)


_PARSED: Mapping[str, Callable[[str], object]] = {
    "url_allow": parse_rules,
    "url_deny": parse_rules,
    "url_denied_ports": parse_ports,
}
_SWITCH = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}


def _kinds(annotation: Any) -> tuple[type, ...]:
    return getattr(annotation, "__args__", (annotation,))


def options() -> list[Option]:
    """The options table."""
    types = get_type_hints(BroadcasterConfig)
    return [
        Option(f.name, types[f.name], f.default, **f.metadata)
        for f in fields(BroadcasterConfig)
        if f.metadata
    ]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration and, by option name, where each value came from."""

    config: BroadcasterConfig
    sources: Mapping[str, str]


def load(
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Path | None,
    auth: AuthConfig,
) -> Loaded:
    """Arguments before environment before file before defaults.

    Args:
        flags: option name -> value as given on the command line; None: not given.
        environment: usually `os.environ`; `LONELYPSS_<NAME>` is read.
        file: a TOML file of `name = value` lines, or None.

    Raises:
        ConfigError: an unknown name in the file, or an impossible value; says where it stands.
    """
    in_file = _read_file(file)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for row in options():
        if flags.get(row.name) is not None:
            values[row.name], sources[row.name] = flags[row.name], row.flag
        elif row.env in environment:
            values[row.name], sources[row.name] = environment[row.env], row.env
        elif row.name in in_file:
            values[row.name], sources[row.name] = in_file[row.name], str(file)
        else:
            sources[row.name] = "default"
            continue
        try:
            if isinstance(values[row.name], str):
                values[row.name] = row.parse(values[row.name])
            row.check(values[row.name])
        except ConfigError as e:
            raise ConfigError(f"{e} (from {sources[row.name]})") from None
    return Loaded(replace(BroadcasterConfig(**values), auth=auth), sources)


def _read_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:  # not UTF-8, not TOML
        raise ConfigError(f"{file}: {e}") from None
    known = {row.name for row in options()}
    if unknown := sorted(set(document) - known):
        raise ConfigError(
            f"{file}: unknown option {unknown[0]!r}; `lonelypss check-config` lists them all"
        )
    return document


_PEER_URL = re.compile(r"https?://[^\s/?#{}]+(/[^\s/?#{}]+)*")


def _check_peer_url(url: str) -> None:
    if not _PEER_URL.fullmatch(url.replace("{port}", "1")):
        raise ConfigError(
            f"peer_url: {url!r} is not like http://10.0.0.5:3003 or http://10.0.0.5:{{port}}, with"
            " or without a path, but no slash at the end, no ? and no #"
        )


def without_password(url: str) -> str:
    """A url for messages and logs."""
    url = re.sub(r"(password)=[^&#]*", r"\1=***", url)
    return re.sub(r"(://[^:@]*):.*@", r"\1:***@", url)


@dataclass(frozen=True, slots=True)
class Database:
    """What a db url names.

    Attributes:
        path: the file of SQLite; None: there is none.
        is_shared: whether other processes can use it; False: it is in memory.
    """

    path: str | None
    is_shared: bool

    @property
    def is_remote(self) -> bool:
        """Whether other machines can use it."""
        return self.is_shared and self.path is None

    @classmethod
    def at(cls, url: str) -> Database:
        """Raises ConfigError: it is no url of a database that this version can use."""
        if url in ("sqlite://", "sqlite:///:memory:"):
            return cls(None, is_shared=False)
        if url.startswith("sqlite:///") and len(url) > len("sqlite:///"):
            return cls(url.removeprefix("sqlite:///"), is_shared=True)
        if url.startswith(("postgresql://", "postgres://")):
            return cls(None, is_shared=True)
        raise ConfigError(
            f"db: {without_password(url)!r} is none of sqlite:///relative.db,"
            " sqlite:////absolute.db, sqlite://,"
            " postgresql://user:password@host/database"
        )
