"""Every option: where its value comes from, and which values are refused."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from lonelypsp.signing import AuthConfig, Nothing
from lonelypss.config import (
    BroadcasterConfig,
    ConfigError,
    Database,
    Option,
    UnsubscribeImmediate,
    load,
    options,
    without_password,
)

AUTH = AuthConfig(Nothing(), Nothing())
ROWS = options()


def kinds(row: Option) -> list[Any]:
    return list(getattr(row.type, "__args__", (row.type,)))


def is_optional(row: Option) -> bool:
    return type(None) in kinds(row)


def values(row: Option) -> list[tuple[str, Any, str]]:
    """Three values of an option: as text, as it is used, and as TOML."""
    if row.name == "db":
        return [(f"sqlite:///{n}.db", f"sqlite:///{n}.db", f'"sqlite:///{n}.db"') for n in "abc"]
    if row.name == "peer_url":
        urls = ("http://10.0.0.5:3003", "https://[::1]:{port}/a", "http://a/{port}")
        return [(url, url, f'"{url}"') for url in urls]
    if row.name in ("url_allow", "url_deny"):
        rules = ("10.0.0.0/8, a", "[fd00::/8]:443", "*:80-90")
        return [(text, text, f'"{text}"') for text in rules]
    if row.name == "url_denied_ports":
        return [(text, text, f'"{text}"') for text in ("22", "1-79, 81", "")]
    kind = next(k for k in kinds(row) if k is not type(None))
    if issubclass(kind, StrEnum):
        return [(k.value, k, f'"{k.value}"') for k in (*kind, *kind)][1:4]
    if kind is str:
        return [(f"/{n}", f"/{n}", f'"/{n}"') for n in "abc"]
    if kind is bool:
        return [("on", True, "true"), ("false", False, "false"), ("1", True, '"on"')]
    least = int(row.least or 0)
    numbers = [kind(least + n) for n in (3, 4, 5)]
    return [(str(n), n, str(n)) for n in numbers]


def loaded(
    tmp_path: Path,
    row: Option,
    *,
    flag: Any = None,
    env: str | None = None,
    toml: str | None = None,
) -> tuple[Any, str]:
    file = None
    if toml is not None:
        file = tmp_path / "broadcaster.toml"
        file.write_text(f"{row.name} = {toml}\n")
    environment = {} if env is None else {row.env: env}
    result = load({row.name: flag}, environment, file, AUTH)
    return getattr(result.config, row.name), result.sources[row.name]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_precedence(row: Option, tmp_path: Path) -> None:
    flag, env, file = values(row)
    source = str(tmp_path / "broadcaster.toml")
    assert loaded(tmp_path, row) == (row.default, "default")
    assert loaded(tmp_path, row, toml=file[2]) == (file[1], source)
    assert loaded(tmp_path, row, toml=file[2], env=env[0]) == (env[1], row.env)
    assert loaded(tmp_path, row, toml=file[2], env=env[0], flag=flag[0]) == (flag[1], row.flag)
    assert loaded(tmp_path, row, flag=flag[1]) == (flag[1], row.flag)
    assert row.env == "LONELYPSS_" + row.name.upper()
    assert row.flag == "--" + row.name.replace("_", "-")


def bad_values(row: Option) -> list[tuple[str, str]]:
    """Values as text and as TOML that the option cannot have."""
    kind = next(k for k in kinds(row) if k is not type(None))
    if row.name == "db":
        return [(t, f'"{t}"') for t in ("", "x", "sqlite:///", "sqlite:/x", "mysql://h/d", "none")]
    if row.name == "peer_url":
        bad_urls = (
            "x",
            "ws://a",
            "http://",
            "http://a/",
            "http://a/?b",
            "http://a#b",
            "http://{x}",
        )
        return [(t, f'"{t}"') for t in bad_urls]
    if row.name in ("url_allow", "url_deny"):
        return [(text, f'"{text}"') for text in ("10.0.0.1/8", "h:", "h:0", "a b")]
    if row.name == "url_denied_ports":
        return [(text, f'"{text}"') for text in ("x", "0", "9-1", "70000")]
    if issubclass(kind, StrEnum):
        return [("", '""'), ("OBEY", '"OBEY"'), ("true", "true")]
    if kind is str:
        return []
    if kind is bool:
        return [("yes", '"yes"'), ("", '""'), ("2", "2"), ("none", '"none"')]
    bad = [("x", '"x"'), ("1 2", '"1 2"'), ("nan", "nan" if kind is float else '"nan"')]
    bad += [("inf", "inf" if kind is float else '"inf"'), ("-1", "-1"), ("0x10", '"0x10"')]
    if kind is int:
        bad += [("1.5", "1.5"), ("1e3", "1e3")]
    if row.least:
        bad.append((str(row.least / 2) if kind is float else str(int(row.least) - 1),) * 2)
    if not is_optional(row):
        bad += [("", '""'), ("none", '"none"')]
    return bad


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_bad_values_name_the_option_and_the_source(row: Option, tmp_path: Path) -> None:
    for text, toml in bad_values(row):
        for how, source in [
            ({"flag": text}, row.flag),
            ({"env": text}, row.env),
            ({"toml": toml}, "broadcaster.toml"),
        ]:
            with pytest.raises(ConfigError) as caught:
                loaded(tmp_path, row, **how)
            assert row.name in str(caught.value), (text, how)
            assert source in str(caught.value), (text, how)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
@pytest.mark.parametrize("toml", ["true", "[1]", "{a = 1}", "2020-01-01"])
def test_types_of_the_file(row: Option, toml: str, tmp_path: Path) -> None:
    if toml == "true" and row.type is bool:
        return
    with pytest.raises(ConfigError, match=row.name):
        loaded(tmp_path, row, toml=toml)


@pytest.mark.parametrize("row", [r for r in ROWS if is_optional(r)], ids=lambda r: r.name)
@pytest.mark.parametrize("text", ["none", "None", "NONE", ""])
def test_none(row: Option, text: str, tmp_path: Path) -> None:
    assert loaded(tmp_path, row, env=text) == (None, row.env)
    assert loaded(tmp_path, row, flag=text) == (None, row.flag)
    assert loaded(tmp_path, row, toml=f'"{text}"')[0] is None


@pytest.mark.parametrize("row", [r for r in ROWS if r.least is not None], ids=lambda r: r.name)
def test_least(row: Option) -> None:
    assert row.least is not None
    least = next(k for k in kinds(row) if k is not type(None))(row.least)
    config = BroadcasterConfig(**{row.name: least})
    assert getattr(config, row.name) == least
    with pytest.raises(ConfigError, match=f"{row.name} .* must be at least"):
        BroadcasterConfig(**{row.name: least - 1})


def test_numbers_of_a_file_may_be_whole(tmp_path: Path) -> None:
    row = next(r for r in ROWS if r.name == "outgoing_http_timeout_total")
    assert loaded(tmp_path, row, toml="20") == (20, str(tmp_path / "broadcaster.toml"))


def test_unknown_names(tmp_path: Path) -> None:
    file = tmp_path / "broadcaster.toml"
    file.write_text("max_notifys = 5\n")
    with pytest.raises(ConfigError, match=r"broadcaster\.toml: unknown option 'max_notifys'"):
        load({}, {}, file, AUTH)
    # others' variables are none of our business
    sources = load({}, {"LONELYPSS_SOMETHING": "x"}, None, AUTH).sources
    assert set(sources.values()) == {"default"}
    with pytest.raises(TypeError):
        BroadcasterConfig(max_notifys=5)  # type: ignore[call-arg]


@pytest.mark.parametrize("text", ["x", "a = ", "a = 1\na = 2\n", "\xff"])
def test_files_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    file = tmp_path / "broadcaster.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"broadcaster\.toml"):
        load({}, {}, file, AUTH)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        load({}, {}, tmp_path / "missing.toml", AUTH)


def test_secrets_do_not_show() -> None:
    assert "auth" not in repr(BroadcasterConfig())
    assert "auth" not in {row.name for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_every_option_is_described(row: Option) -> None:
    assert row.help.endswith(".")
    assert row.unit or row.name in ("missed_expo_base", "missed_expo_max")


@pytest.mark.parametrize(
    ("url", "path", "is_shared"),
    [
        ("sqlite://", None, False),
        ("sqlite:///:memory:", None, False),
        ("sqlite:///a.db", "a.db", True),
        ("sqlite:////a/b.db", "/a/b.db", True),
        ("postgresql://u:p@h/d", None, True),
        ("postgres://h", None, True),
    ],
)
def test_databases(url: str, path: str | None, is_shared: bool) -> None:
    assert Database.at(url) == Database(path, is_shared)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:p@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u:p/@:x@h:1/d", "postgresql://u:***@h:1/d"),
        ("postgresql://u@h/d?password=p&x=y", "postgresql://u@h/d?password=***&x=y"),
        ("postgresql://h/d?user=u&sslpassword=p", "postgresql://h/d?user=u&sslpassword=***"),
        ("http://10.0.0.7:{port}", "http://10.0.0.7:{port}"),
        ("sqlite:///a:b@c.db", "sqlite:///a:***@c.db"),
    ],
)
def test_without_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_what_is_no_database_is_told_without_its_password() -> None:
    with pytest.raises(ConfigError, match=r"db: 'mysql://u:\*\*\*@h' is none of sqlite:///"):
        Database.at("mysql://u:p@h")


def test_missed_delay() -> None:
    config = BroadcasterConfig(missed_jitter=0.0)
    assert [config.missed_delay(n) for n in range(4)] == [2, 3, 5, 9]
    assert config.missed_delay(11) == config.missed_delay(149) == 2049
    assert config.missed_delay(150) is None
    jittered = {BroadcasterConfig().missed_delay(0) for _ in range(100)}
    assert len(jittered) > 1
    assert all(2 <= d < 4 for d in jittered if d is not None)
    # G7: kept for at least 76 hours
    assert sum(config.missed_delay(n) or 0 for n in range(150)) > 76 * 3600


def test_pause_that_is_no_number() -> None:
    with pytest.raises(ConfigError, match="missed_expo_base"):
        BroadcasterConfig(missed_expo_base=1e300)


def test_enum() -> None:
    assert BroadcasterConfig().unsubscribe_immediate is UnsubscribeImmediate.OBEY
    with pytest.raises(ConfigError, match="unsubscribe_immediate"):
        BroadcasterConfig(unsubscribe_immediate="ignore")  # type: ignore[arg-type]
