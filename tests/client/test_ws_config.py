"""Settings of the websocket client: as the older one has them, checked, and ours."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from lonelypsc.config import ws_config as module
from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.ws_config import WebsocketPubSubConfig, make_websocket_pub_sub_config
from lonelypsp.signing import Nothing

AUTH = AuthConfigFromParts(Nothing(), Nothing())
OLDER: dict[str, Any] = {
    "broadcasters": [{"host": "ws://10.0.0.1:3003", "priority": 1}, {"host": "wss://x/prefix/"}],
    "outgoing_initial_connect_retries": 2,
    "outgoing_min_reconnect_interval": 60,
    "max_websocket_message_size": 3_670_016,
    "websocket_open_timeout": 5,
    "websocket_close_timeout": 5,
    "websocket_heartbeat_interval": 10,
    "websocket_minimal_headers": True,
    "max_sent_notifications": None,
    "max_unsent_notifications": None,
    "max_expected_acks": None,
    "max_received": None,
    "max_unsent_acks": None,
    "allow_compression": True,
    "compression_dictionary_by_id": {},
    "initial_compression_dict_id": None,
    "allow_training_compression": True,
    "decompression_max_window_size": 0,
    "auth": AUTH,
}
"""What a program of the older client gives, in the order of its parameters."""
DEFAULTS: dict[str, Any] = {
    name: value for name, value in OLDER.items() if name not in ("broadcasters", "auth")
} | {
    "outgoing_initial_connect_retries": 10,
    "outgoing_min_reconnect_interval": 1,
    "decompression_max_window_size": 8 * 1024 * 1024,
}
"""Where the older client has none."""


def make(**settings: Any) -> WebsocketPubSubConfig:
    return make_websocket_pub_sub_config(
        **({"broadcasters": [{"host": "ws://127.0.0.1:3003"}], "auth": AUTH} | settings)
    )


def test_a_call_of_the_older_client_works_by_name_and_by_position() -> None:
    by_name = make_websocket_pub_sub_config(**OLDER)
    assert by_name == make_websocket_pub_sub_config(*OLDER.values())
    for name, value in OLDER.items():
        if name != "broadcasters":
            assert getattr(by_name, name) == value
    assert [b["host"] for b in by_name.broadcasters] == ["ws://10.0.0.1:3003", "wss://x/prefix"]
    assert list(inspect.signature(WebsocketPubSubConfig).parameters)[: len(OLDER)] == list(OLDER)


def test_only_broadcasters_and_authorization_have_to_be_given() -> None:
    config = make()
    for name, value in DEFAULTS.items():
        assert getattr(config, name) == value, name
    assert set(OLDER) - set(DEFAULTS) == {"broadcasters", "auth"}
    with pytest.raises(ValueError, match="auth"):
        make_websocket_pub_sub_config(broadcasters=[{"host": "ws://x"}])
    with pytest.raises(TypeError, match="broadcasters"):
        make_websocket_pub_sub_config(auth=AUTH)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("broadcasters", []),
        ("broadcasters", [{"host": "http://127.0.0.1:3003"}]),
        ("broadcasters", [{"host": "127.0.0.1:3003"}]),
        ("broadcasters", [{"url": "ws://127.0.0.1:3003"}]),
        ("broadcasters", [{"host": "ws://user@127.0.0.1:3003"}]),
        ("broadcasters", [{"host": "ws://127.0.0.1:3003", "priority": "1"}]),
        ("outgoing_initial_connect_retries", -1),
        ("outgoing_initial_connect_retries", None),
        ("outgoing_min_reconnect_interval", -1),
        ("outgoing_min_reconnect_interval", float("nan")),
        ("outgoing_min_reconnect_interval", None),
        ("max_websocket_message_size", 100),
        ("max_websocket_receive_size", 100),
        ("websocket_open_timeout", 0),
        ("websocket_close_timeout", -1),
        ("websocket_heartbeat_interval", 0),
        ("max_sent_notifications", 0),
        ("max_unsent_notifications", 0),
        ("max_expected_acks", 0),
        ("max_expected_acks", 201),
        ("max_received", 0),
        ("max_unsent_acks", 0),
        ("decompression_max_window_size", -1),
        ("compression_dictionary_by_id", {1: (b"x", 3)}),
        ("compression_dictionary_by_id", {65_536: (b"x", 3)}),
        ("compression_dictionary_by_id", {"7": (b"x", 3)}),
        ("compression_dictionary_by_id", {7: b"dictionary"}),
        ("initial_compression_dict_id", 7),
        ("message_body_spool_size", -1),
        ("max_receive_body", -1),
        ("receive_buffer_messages", 0),
        ("receive_buffer_bytes", 0),
    ],
)
def test_what_cannot_work_is_refused_by_its_name(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=setting):
        make(**{setting: value})


def test_unknown_settings() -> None:
    with pytest.raises(TypeError, match="max_recieved"):
        make(max_recieved=5)


def test_presets_of_both_makes() -> None:
    import zstandard

    data = zstandard.ZstdCompressionDict(b"d" * 200)
    config = make(
        compression_dictionary_by_id={7: (data, 3), 8: (b"bytes", 5)}, initial_compression_dict_id=8
    )
    assert config.presets == {7: b"d" * 200, 8: b"bytes"}


def test_the_older_groups() -> None:
    split = list(OLDER.items())
    config = module.WebsocketPubSubConfigFromParts(
        connect=module.WebsocketPubSubConnectConfigFromParts(**dict(split[:3])),
        generic=module.WebsocketGenericConfigFromParts(**dict(split[3:13])),
        compression=module.WebsocketCompressionConfigFromParts(
            **dict(split[13:18])
            | {"compression_dictionary_by_id": {7: [(1, b"a"), (3, b"a")], 8: []}}
        ),
        auth=AUTH,
    )
    assert config.compression_dictionary_by_id == {7: (b"a", 3)}
    assert config.websocket_open_timeout == 5


def test_secrets_are_not_shown() -> None:
    assert "auth" not in repr(make())
