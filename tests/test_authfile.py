"""Authorization that follows its file."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from lonelypsp import secretsfile
from lonelypsp.authfile import AuthFile, NotPrivate, current, exposure, read_private
from lonelypsp.errors import AuthResult
from lonelypsp.replay import ReplayGuard
from lonelypsp.signing import AuthConfig, Hmac, Nothing, Token

OPERATION, FIELDS = "CHECK_SUBSCRIPTIONS", {"tracing": b"", "url": "http://h/"}
NOW = 1_700_000_000.0


def write(path: Path, *tokens: str) -> None:
    rows = [{"id": token, "secret": token} for token in tokens]
    entry = secretsfile.with_rows({"type": "token"}, rows)
    new = path.with_name("new")
    new.write_text(secretsfile.dump(entry, None))
    new.chmod(0o600)
    new.replace(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "secrets.json"
    write(path, "one")
    return path


def followed(path: Path, loads: list[int] | None = None) -> AuthConfig:
    def load() -> AuthConfig:
        if loads is not None:
            loads.append(1)
        return secretsfile.load(read_private(path), ReplayGuard())

    return AuthFile(path, load).config()


def test_it_follows_the_file_once_a_second(path: Path) -> None:
    loads: list[int] = []
    auth = followed(path, loads).to_broadcaster
    assert auth.authorize(OPERATION, FIELDS, NOW) == "Bearer one"
    write(path, "two", "one")
    assert auth.authorize(OPERATION, FIELDS, NOW + 0.9) == "Bearer one"
    assert auth.authorize(OPERATION, FIELDS, NOW + 1) == "Bearer two"
    assert auth.check(OPERATION, FIELDS, "Bearer one", NOW + 1) is AuthResult.OK
    write(path, "two")
    assert auth.check(OPERATION, FIELDS, "Bearer one", NOW + 2) is AuthResult.FORBIDDEN
    assert repr(auth) == "Token(two)"
    for second in range(3, 10):
        auth.authorize(OPERATION, FIELDS, NOW + second)
    assert len(loads) == 3


def test_a_clock_that_is_set_back_does_not_stop_it(path: Path) -> None:
    auth = followed(path).to_broadcaster
    auth.authorize(OPERATION, FIELDS, NOW)
    write(path, "two")
    assert auth.authorize(OPERATION, FIELDS, NOW - 3600) == "Bearer two"


@pytest.mark.parametrize("change", ["garbage", "gone", "open", "link"])
def test_a_file_that_cannot_be_used_leaves_what_was(
    path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    auth = followed(path).to_broadcaster
    if change == "garbage":
        path.write_text('{"version": "2", "to-broadcaster": {"type": "token", "secret": 7}}')
    elif change == "gone":
        path.unlink()
    elif change == "open":
        write(path, "s3cret")
        path.chmod(0o604)
        os.utime(path, (1, 1))
    else:
        write(path.with_name("other"), "s3cret")
        path.unlink()
        path.symlink_to("other")
    with caplog.at_level(logging.INFO):
        for second in range(1, 5):
            assert auth.authorize(OPERATION, FIELDS, NOW + second) == "Bearer one"
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "the keys before stay in force" in caplog.text
    assert "s3cret" not in caplog.text
    path.unlink(missing_ok=True)
    write(path, "two")
    assert auth.authorize(OPERATION, FIELDS, NOW + 9) == "Bearer two"


def test_its_first_reading_may_fail(path: Path) -> None:
    path.unlink()
    with pytest.raises(FileNotFoundError):
        followed(path)


def test_what_is_behind_it(path: Path) -> None:
    auth = followed(path)
    assert isinstance(current(auth.to_broadcaster), Token)
    assert isinstance(current(auth.to_subscriber), Nothing)
    plain = Hmac(bytes(64))
    assert current(plain) is plain


# files with secrets


def test_a_private_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("é", encoding="utf-8")
    path.chmod(0o600)
    assert read_private(path) == "é"
    assert exposure(path.stat()) is None


@pytest.mark.parametrize("mode", [0o601, 0o602, 0o604, 0o610, 0o620, 0o640, 0o644, 0o666, 0o777])
def test_a_file_that_others_may_use_is_not(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_text("s3cret")
    path.chmod(mode)
    with pytest.raises(NotPrivate, match=f"mode {mode:04o}") as caught:
        read_private(path)
    assert "s3cret" not in str(caught.value)
    assert read_private(path, allow_readable=True) == "s3cret"


def test_nor_is_a_link(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(NotPrivate, match="it is a link"):
        read_private(tmp_path / "link")
    assert read_private(tmp_path / "link", allow_readable=True) == "x"


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: None], ids=["directory", "none"])
def test_nor_what_is_no_file(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "file"
    make(path)
    with pytest.raises((FileNotFoundError, IsADirectoryError)):
        read_private(path)


def test_a_pipe_does_not_keep_us_waiting(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path, 0o600)
    assert read_private(path) == ""
