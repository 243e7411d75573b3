"""Settings: defaults, checks, secrets files, and the names older programs import."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import pytest

from client.fakes import noop
from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import BroadcastersShuffler, make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.config.http_config import (
    HttpPubSubBindConfigFromParts,
    HttpPubSubConfigFromParts,
    HttpPubSubConnectConfigFromParts,
    HttpPubSubGenericConfigFromParts,
)
from lonelypsp import secretsfile
from lonelypsp.auth.config import AuthConfigFromParts as OlderAuthConfigFromParts
from lonelypsp.errors import AuthResult
from lonelypsp.signing import Hmac, Nothing, Token

INCOMING, OUTGOING = Nothing(), Token("t")
BASE: dict[str, Any] = {
    "bind": {"type": "uvicorn", "host": "0.0.0.0", "port": 3002},
    "host": "http://127.0.0.1:3002",
    "broadcasters": [{"host": "http://127.0.0.1:3003"}],
    "auth": AuthConfigFromParts(INCOMING, OUTGOING),
}
MANUAL = {"type": "manual", "callback": noop}


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("host", "ftp://h", "host:"),
        ("host", "127.0.0.1:3002", "host:"),
        ("host", "http://", "host:"),
        ("host", "http://h?x=1", "query"),
        ("host", "http://h?", "query"),
        ("host", "http://h/p?x#1", "query"),
        ("host", "http://h#", "fragment"),
        ("host", "http://h /p", "spaces"),
        ("host", "http://h:99999", "host:"),
        ("host", "http://h:{port}", "port"),
        ("host", "http://h/" + "x" * 70_000, "65,524"),
        ("broadcasters", [], "broadcasters"),
        ("broadcasters", [{"host": "ws://h"}], "websocket"),
        ("broadcasters", [{"host": "http://h#1"}], "fragment"),
        ("broadcasters", [{"host": "http://h?x"}], "query"),
        ("broadcasters", [{"host": "http://u:p@h"}], "user name"),
        ("broadcasters", [{"host": "http://ü..h"}], "looked up"),
        ("broadcasters", [{"host": "http://h", "priority": "1"}], "priority"),
        ("bind", {"type": "other"}, "bind: type"),
        ("bind", {}, "bind: type"),
        ("bind", {"type": "uvicorn", "host": "x"}, "bind: port"),
        ("bind", {"type": "uvicorn", "port": 1}, "bind: host"),
        ("bind", {"type": "uvicorn", "host": "x", "port": 65_536}, "bind: port"),
        ("bind", {"type": "manual"}, "bind: callback"),
        ("auth", None, "auth: to_broadcaster"),
        ("outgoing_retries_per_broadcaster", 0, "outgoing_retries_per_broadcaster"),
        ("message_body_spool_size", -1, "message_body_spool_size"),
        ("outgoing_http_timeout_total", 0, "outgoing_http_timeout_total"),
        ("outgoing_http_timeout_sock_read", float("nan"), "outgoing_http_timeout_sock_read"),
        ("resubscribe_interval", 0, "resubscribe_interval"),
        ("resubscribe_interval", float("inf"), "resubscribe_interval"),
        ("receive_buffer_messages", 0, "receive_buffer_messages"),
        ("receive_buffer_bytes", 0, "receive_buffer_bytes"),
        ("max_receive_body", -1, "max_receive_body"),
        ("outgoing_http_min_rate", 0, "outgoing_http_min_rate"),
    ],
)
def test_what_cannot_work_is_named(setting: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_http_pub_sub_config(**(BASE | {setting: value}))


def test_unknown_setting() -> None:
    with pytest.raises(TypeError, match="colour"):
        make_http_pub_sub_config(**BASE, colour="red")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("http://h:1/", "http://h:1"),
        ("http://h:1/pubsub/#1", "http://h:1/pubsub#1"),
        ("https://h/pubsub#a#b", "https://h/pubsub#a#b"),
        ("http://[::1]:3", "http://[::1]:3"),
    ],
)
def test_host_is_normalised(given: str, kept: str) -> None:
    made = make_http_pub_sub_config(
        **(BASE | {"host": given, "broadcasters": [{"host": given.partition("#")[0]}]})
    )
    assert made.host == kept
    assert made.broadcasters[0]["host"] == kept.partition("#")[0]


def test_everything_else_has_a_default_and_is_an_attribute() -> None:
    made = make_http_pub_sub_config(**BASE, tracing=object())
    assert made.outgoing_retries_per_broadcaster == 2
    assert made.resubscribe_interval == 300.0
    assert made.outgoing_http_timeout_total == 30


def test_shuffler_goes_by_priority_and_mixes_equals() -> None:
    hosts = [
        {"host": "z"},
        {"host": "b", "priority": 2},
        {"host": "a", "priority": 1},
        {"host": "y"},
    ]
    orders = {tuple(b["host"] for b in BroadcastersShuffler(hosts)) for _ in range(200)}
    assert orders == {("a", "b", "z", "y"), ("a", "b", "y", "z")}


def test_positions_of_auth_parts() -> None:
    for made in (
        AuthConfigFromParts(INCOMING, OUTGOING),
        AuthConfigFromParts(to_broadcaster=OUTGOING, to_subscriber=INCOMING),
        OlderAuthConfigFromParts(OUTGOING, INCOMING),
        OlderAuthConfigFromParts(to_broadcaster=OUTGOING, to_subscriber=INCOMING),
    ):
        assert made.to_subscriber is INCOMING
        assert made.to_broadcaster is OUTGOING


@pytest.mark.parametrize(
    "arguments", [{}, {"incoming": INCOMING}, {"incoming": INCOMING, "to_subscriber": INCOMING}]
)
def test_auth_parts_are_given_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="exactly one of"):
        AuthConfigFromParts(**arguments)


def test_secrets_file(tmp_path: Path) -> None:
    path = tmp_path / "secrets.json"
    path.write_text(secretsfile.dump(secretsfile.generate("hmac"), secretsfile.generate("token")))
    incoming, outgoing = get_auth_config_from_file(path)
    assert isinstance(incoming, Token)
    assert isinstance(outgoing, Hmac)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\xff", b'{"version":"2","to-subscriber":{"type":"hmac","secret":"geheim"}}'],
)
def test_bad_secrets_file_is_named_and_keeps_its_secrets(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secrets.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"secrets\.json") as e:
        get_auth_config_from_file(str(path))
    assert "geheim" not in str(e.value)


def test_missing_secrets_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        get_auth_config_from_file(tmp_path / "none.json")


def test_older_parts() -> None:
    made = HttpPubSubConfigFromParts(
        bind_config=HttpPubSubBindConfigFromParts(bind=BASE["bind"], host=BASE["host"]),
        connect_config=HttpPubSubConnectConfigFromParts(
            broadcasters=BASE["broadcasters"], outgoing_retries_per_broadcaster=3
        ),
        generic_config=HttpPubSubGenericConfigFromParts(1, 2.0, None, None, 5.0, False),
        auth_config=BASE["auth"],
        tracing=None,
    )
    assert made.outgoing_retries_per_broadcaster == 3
    assert made.message_body_spool_size == 1


OLDER_NAMES = {
    "lonelypsc.http_client": "HttpPubSubClient",
    "lonelypsc.config.config": "HttpPubSubConfig make_http_pub_sub_config PubSubBroadcasterConfig"
    " SimplePubSubBroadcasterConfig PrioritizedPubSubBroadcasterConfig BroadcastersShuffler",
    "lonelypsc.config.http_config": "make_http_pub_sub_config HttpPubSubConfig"
    " HttpPubSubConfigFromParts HttpPubSubBindConfigFromParts HttpPubSubConnectConfigFromParts"
    " HttpPubSubGenericConfigFromParts HttpPubSubBindUvicornConfig HttpPubSubBindManualConfig"
    " HttpPubSubBindManualCallback DEFAULT_RESUBSCRIBE_INTERVAL",
    "lonelypsc.config.file_config": "get_auth_config_from_file",
    "lonelypsc.config.helpers.uvicorn_bind_config": "handle_bind_with_uvicorn"
    " BindWithUvicornCallback",
    "lonelypsc.client": "PubSubClient PubSubClientSubscription PubSubClientMessage"
    " PubSubClientMessageWithCleanup PubSubClientConnectionStatus PubSubError PubSubRequestError"
    " PubSubRequestAmbiguousError PubSubRequestRetriesExhaustedError PubSubRequestRefusedError"
    " PubSubRequestConnectionAbandonedError PubSubIrrecoverableError PubSubCancelRequested",
    "lonelypsc.http.notify.result": "HttpPubSubNotifyResult",
    "lonelypsp.auth.config": "AuthConfigFromParts AuthConfig AuthResult",
    "lonelypsp.tracing.impl.simple.config": "SimpleTracingConfig",
    "lonelypsp.tracing.impl.simple.db": "SimpleTracingDBSidecar",
    "lonelypsp.tracing.impl.simple.root": "SimpleTracingSubscriberRoot",
}


@pytest.mark.parametrize("module", OLDER_NAMES)
def test_promised_names(module: str) -> None:
    found = importlib.import_module(module)
    for name in OLDER_NAMES[module].split():
        assert hasattr(found, name), name


async def test_older_tracing_objects() -> None:
    from lonelypsp.tracing.impl.simple.config import SimpleTracingConfig
    from lonelypsp.tracing.impl.simple.db import SimpleTracingDBSidecar
    from lonelypsp.tracing.impl.simple.root import SimpleTracingSubscriberRoot

    settings = SimpleTracingConfig()
    async with SimpleTracingDBSidecar(settings, ":memory:") as db:
        make_http_pub_sub_config(
            **BASE, tracing=SimpleTracingSubscriberRoot(db=db, config=settings).stateless
        )


def test_what_was_accepted_before_a_restart_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secrets.json"
    file.write_text(secretsfile.dump(secretsfile.generate("hmac"), secretsfile.generate("hmac")))
    now = time.time()
    fields = {"tracing": b"", "recovery": "http://h/", "topic": b"t"}

    def accepts(value: str | None, **guard: Path) -> bool:
        incoming, _ = get_auth_config_from_file(file, **guard)
        return incoming.check("MISSED", fields, value, now) is AuthResult.OK

    signer, _ = get_auth_config_from_file(file)
    assert accepts(signer.authorize("MISSED", fields, now))
    assert not accepts(signer.authorize("MISSED", fields, now - 1.5))
    lagging = signer.authorize("MISSED", fields, now - 60)
    assert accepts(lagging, replay_path=tmp_path / "replay")
    assert not accepts(lagging, replay_path=tmp_path / "replay")
