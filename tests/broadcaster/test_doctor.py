"""What `lonelypss doctor` finds, and what it advises."""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import postgres
from lonelypss import doctor
from lonelypss.config import BroadcasterConfig
from lonelypss.doctor import Level, Patient, examine
from lonelypss.store import postgres as postgres_module
from lonelypss.store.base import Condition
from lonelypss.store.choose import make_store
from programs import broadcaster, run

from .harness import free_port


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))


def patient(**options: Any) -> Patient:
    """One in good health, but for what is given."""
    about = {
        name: options.pop(name)
        for name in ("secrets", "host", "port", "workers", "insecure")
        if name in options
    }
    config = BroadcasterConfig(**{"db": "sqlite:///one.db", "spool_quota": 0, **options})
    healthy: dict[str, Any] = {
        "secrets": None, "allow_readable_secrets": False, "host": "127.0.0.1", "port": 0,
        "workers": 1, "insecure": False,
    }  # fmt: skip
    return Patient(config, **{**healthy, **about})


async def found(who: Patient, about: str) -> list[tuple[Level, str]]:
    """All about that, text and advice in one."""
    return [
        (finding.level, f"{finding.text} -> {finding.advice}")
        async for finding in examine(who)
        if finding.about == about
    ]


async def one(who: Patient, about: str) -> tuple[Level, str]:
    (finding,) = await found(who, about)
    return finding


async def test_all_is_well() -> None:
    levels = {f.about: f.level async for f in examine(patient(max_websockets=1))}
    assert levels.pop("secrets") is Level.WARNING, "there are none"
    levels.pop("limits", None)
    assert set(levels.values()) == {Level.OK}
    assert set(levels) == {"packages", "port", "database", "spool"}
    assert not os.listdir(), "nothing was made"


# Packages, secrets, port


@pytest.mark.parametrize(
    ("missing", "options", "level", "advice"),
    [
        ("uvicorn", {}, Level.PROBLEM, "lonelypsc[standard]"),
        ("uvloop", {}, Level.WARNING, "lonelypsc[standard]"),
        ("asyncpg", {"db": "postgresql://127.0.0.1:1/d"}, Level.PROBLEM, "lonelypsc[postgres]"),
        ("prometheus_client", {"metrics": True}, Level.PROBLEM, "lonelypsc[metrics]"),
    ],
)
async def test_packages(
    missing: str, options: dict[str, Any], level: Level, advice: str, monkeypatch: Any
) -> None:
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == missing else real(name)
    )
    is_bad, text = await one(patient(**options), "packages")
    assert is_bad is level
    assert text.startswith(f"{missing} is not installed")
    assert advice in text


async def test_secrets(tmp_path: Path) -> None:
    assert run("lonelypss", "setup", cwd=tmp_path).returncode == 0
    file = tmp_path / "broadcaster-secrets.json"
    level, text = await one(patient(secrets=str(file)), "secrets")
    assert level is Level.OK
    assert json.loads(file.read_text())["to-broadcaster"]["secret"] not in text
    file.chmod(0o644)
    level, text = await one(patient(secrets=str(file)), "secrets")
    assert level is Level.PROBLEM
    assert str(file) in text
    level, text = await one(patient(secrets="nowhere.json"), "secrets")
    assert (level, "nowhere.json" in text) == (Level.PROBLEM, True)


async def test_open_to_strangers() -> None:
    _, (level, text) = await found(patient(host="0.0.0.0"), "secrets")
    assert level is Level.PROBLEM
    assert "--insecure" in text
    assert len(await found(patient(host="0.0.0.0", insecure=True), "secrets")) == 1


async def test_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        level, text = await one(patient(port=taken.getsockname()[1]), "port")
        assert level is Level.PROBLEM
        assert "in use" in text
    level, text = await one(patient(host="192.0.2.1", port=3003), "port")
    assert (level, "--host" in text) == (Level.PROBLEM, True)
    with broadcaster(tmp_path) as (_, url):
        level, text = await one(patient(port=int(url.rpartition(":")[2])), "port")
        assert level is Level.WARNING
        assert "already" in text


# Database


async def test_database_in_memory() -> None:
    assert (await one(patient(db="sqlite://"), "database"))[0] is Level.WARNING
    level, text = await one(patient(db="sqlite://", workers=2), "database")
    assert level is Level.PROBLEM
    assert "--db sqlite:///lonelypss.db" in text


async def test_database_file(tmp_path: Path) -> None:
    level, text = await one(patient(db="sqlite:////nowhere/one.db"), "database")
    assert (level, "make /nowhere" in text) == (Level.PROBLEM, True)
    who = patient()
    store = make_store(who.config)
    await store.open()
    # while it runs, too
    assert (await one(who, "database"))[0] is Level.OK
    assert (await one(who, "clock"))[0] is Level.OK
    await store.close()
    before = sorted(tmp_path.iterdir())
    level, text = await one(who, "database")
    assert level is Level.OK
    assert "schema version" in text
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "one.db").write_bytes(b"no database at all " * 100)
    level, text = await one(who, "database")
    assert (level, "damaged" in text) == (Level.PROBLEM, True)


async def test_database_server() -> None:
    url = postgres.shared().database()
    who = patient(db=url)
    level, text = await one(who, "database")
    assert level is Level.OK
    assert "makes its tables" in text
    tables = postgres.shared().sql("SELECT tablename FROM pg_tables", url.rpartition("/")[2])
    assert "lonelyps" not in tables, "nothing was made"
    store = make_store(who.config)
    await store.open()
    level, text = await one(who, "database")
    assert (level, "schema version" in text) == (Level.OK, True)
    assert (await one(who, "clock"))[0] is Level.OK
    _, (level, text) = await found(patient(db=url, db_pool_size=50, workers=4), "database")
    assert (level, "max_connections" in text) == (Level.WARNING, True)
    await store.close()
    nobody = f"postgresql://u:s3cret@127.0.0.1:{free_port()}/d"
    level, text = await one(patient(db=nobody), "database")
    assert (level, "is the server up" in text, "s3cret" in text) == (Level.PROBLEM, True, False)


HEALTHY = Condition(3, 3, [], 0.0)


@pytest.mark.parametrize(
    ("change", "about", "level", "said"),
    [
        ({"schema": 4}, "database", Level.PROBLEM, "run a newer lonelypss"),
        ({"schema": 2}, "database", Level.OK, "from 2 to 3"),
        ({"is_standby": True}, "database", Level.PROBLEM, "target_session_attrs=primary"),
        ({"schema": None, "can_create": False}, "database", Level.PROBLEM, "GRANT CREATE"),
        ({"can_create": False}, "database", Level.OK, "schema version 3"),
        ({"clock": 4.0}, "clock", Level.OK, "agrees"),
        ({"clock": 10.0}, "clock", Level.WARNING, "10 s ahead of ours -> let NTP"),
        ({"clock": -100.0}, "clock", Level.PROBLEM, "100 s behind ours -> let NTP"),
    ],
)
async def test_conditions_of_a_database(
    change: dict[str, Any], about: str, level: Level, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look(url: str) -> Condition:
        condition = replace(HEALTHY, **change)
        return replace(condition, clock=condition.clock + time.time())

    monkeypatch.setattr(postgres_module, "examine", look)
    last = (await found(patient(db="postgresql://h/d"), about))[-1]
    assert last[0] is level
    assert said in last[1]


# Other broadcasters, limits, disk


async def test_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    url = postgres.shared().database()
    store = make_store(BroadcasterConfig(db=url))
    await store.open()
    now = time.time()
    with socket.create_server(("127.0.0.1", 0)) as there:
        peer = f"http://127.0.0.1:{there.getsockname()[1]}/v1/receive_for_websockets"
        await store.renew_peer(peer, now + 1000, now)
        await store.renew_peer("http://127.0.0.1:1/dead", now - 1, now)
        who = patient(db=url, peer_url="http://127.0.0.1:{port}")
        assert await found(who, "peers") == [(Level.OK, "1 others are reached from here -> ")]
        ((level, text), _) = await found(patient(db=url), "peers")
        assert (level, "--peer-url" in text) == (Level.WARNING, True)
    level, text = await one(who, "peers")
    assert (level, peer in text) == (Level.WARNING, True)
    await store.close()
    config = {"db": url, "peer_host": "192.0.2.1", "peer_url": "http://192.0.2.1:{port}"}
    level, text = (await found(patient(**config), "peers"))[0]
    assert (level, "--peer-host" in text) == (Level.PROBLEM, True)


async def test_open_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, most))
    level, text = await one(patient(), "limits")
    assert (level, "1000 open files" in text) == (Level.WARNING, True)


async def test_spool(tmp_path: Path) -> None:
    level, text = await one(patient(spool_directory="/nowhere"), "spool")
    assert (level, "--spool-directory" in text) == (Level.PROBLEM, True)
    level, text = await one(patient(spool_quota=2**60), "spool")
    assert (level, "--spool-quota" in text) == (Level.WARNING, True)


# The command


def test_command(tmp_path: Path) -> None:
    assert run("lonelypss", "setup", cwd=tmp_path).returncode == 0
    well = run("lonelypss", "doctor", "--port=0", cwd=tmp_path)
    assert well.returncode == 0, well.stdout
    assert "problem" not in well.stdout
    ill = run("lonelypss", "doctor", "--port=0", "--db=sqlite:////nowhere/x", cwd=tmp_path)
    assert ill.returncode == 1
    assert "-> make /nowhere" in ill.stdout
    told = run("lonelypss", "doctor", "--port=0", "--json", cwd=tmp_path)
    assert {f["about"] for f in json.loads(told.stdout)} >= {"packages", "secrets", "database"}
    wrong = run("lonelypss", "doctor", "--db=mysql://h/d", cwd=tmp_path)
    assert wrong.returncode == 2
