"""Keys of the secrets files: the commands that change them, and a rotation under load."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import postgres
from broadcaster.harness import Peer, exchange
from fleets import DEADLINE, Fleet, Receiver
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsp import secretsfile
from lonelypsp.replay import ReplayGuard
from lonelypsp.signing import Authenticator
from lonelypss.cli import main
from programs import free_port, run

MAIN, SUBSCRIBER = "broadcaster-secrets.json", "subscriber-secrets.json"
UP, DOWN = "to-broadcaster", "to-subscriber"


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """Commands inside this process, in a directory with secrets."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LONELYPS")]:
        monkeypatch.delenv(name)
    runner = CliRunner()
    assert runner.invoke(main, "setup --to-subscribers-auth token").exit_code == 0
    return runner


def document(path: str | Path = MAIN) -> Any:
    return json.loads(Path(path).read_text())


def keys(runner: CliRunner, arguments: str, status: int = 0) -> Result:
    """Runs a command, and sees that no secret is shown."""
    result = runner.invoke(main, f"keys {arguments}")
    assert result.exit_code == status, result.output
    for path in Path().glob("*.json"):
        for direction in (UP, DOWN):
            for row in secretsfile.rows(document(path)[direction]):
                assert row["secret"] not in result.output
    return result


def listed(runner: CliRunner) -> list[tuple[str, str, bool]]:
    rows = json.loads(keys(runner, "ls --json").stdout)
    return [(row["direction"], row["id"], row["signs"]) for row in rows]


# one step after the other


def test_a_rotation(runner: CliRunner) -> None:
    before = {path: document(path) for path in (MAIN, SUBSCRIBER)}
    assert listed(runner) == [(UP, "default", True), (DOWN, "default", True)]
    keys(runner, "add --id new")
    assert listed(runner) == [
        (UP, "default", True), (UP, "new", False), (DOWN, "default", True), (DOWN, "new", False),
    ]  # fmt: skip
    for path, old in before.items():  # older peers go on
        for direction in (UP, DOWN):
            assert document(path)[direction]["secret"] == old[direction]["secret"]
            assert document(path)[direction]["type"] == old[direction]["type"]
    assert "lonelypss keys retire default" in keys(runner, "sign new").output
    assert listed(runner) == [
        (UP, "new", True), (UP, "default", False), (DOWN, "new", True), (DOWN, "default", False),
    ]  # fmt: skip
    keys(runner, "retire default")
    assert listed(runner) == [(UP, "new", True), (DOWN, "new", True)]
    assert document(MAIN) == document(SUBSCRIBER)
    for path in (MAIN, SUBSCRIBER):
        assert document(path)[UP]["secret"] != before[path][UP]["secret"]
        secretsfile.load(Path(path).read_text(), ReplayGuard())


def test_one_direction(runner: CliRunner) -> None:
    keys(runner, f"add --id new --direction {UP}")
    assert listed(runner) == [(UP, "default", True), (UP, "new", False), (DOWN, "default", True)]
    keys(runner, "sign new")
    assert listed(runner) == [(UP, "new", True), (UP, "default", False), (DOWN, "default", True)]
    keys(runner, f"retire default --direction {UP}")
    assert listed(runner) == [(UP, "new", True), (DOWN, "default", True)]


def test_keys_are_named_after_the_day(runner: CliRunner) -> None:
    ids = [json.loads(keys(runner, "add --json").stdout)["id"] for _ in range(3)]
    assert ids[1:] == [f"{ids[0]}-2", f"{ids[0]}-3"]
    row = document()[UP]["keys"][1]
    assert row["created"].startswith(ids[0])
    table = keys(runner, "ls").output
    assert "verifies" in table
    assert row["created"] in table


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("sign nobody", "no key 'nobody'; there are default"),
        ("retire nobody", "no key 'nobody'"),
        ("retire default", "the key 'default' signs: let another one sign first"),
        ("add --id default", "there is a key 'default' already"),
        ("add --id 'a b'", "the id of a key is made of"),
        ("add --id ''", "the id of a key is made of"),
        ("add --url http://h --write subscriber-secrets.json", "exists; choose another file"),
        ("add --url h --write new.json", "is not like http://10.0.0.7"),
        ("add --url http://h", "--write goes with rights"),
        ("add --write new.json", "--write goes with rights"),
        ("ls --secrets nowhere.json", "nowhere.json: No such file"),
        ("ls --secrets link.json", "is a link"),
        ("ls --secrets open.json", "chmod 600"),
        ("add --direction down", "'down'"),
    ],
)
def test_misuse_changes_nothing(runner: CliRunner, arguments: str, complaint: str) -> None:
    Path("link.json").symlink_to(MAIN)
    shutil.copy(MAIN, "open.json")
    Path("open.json").chmod(0o644)
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert complaint in keys(runner, arguments, 2).output.replace("\n", " ")
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_files_are_private_and_replaced_as_a_whole(runner: CliRunner, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.move(SUBSCRIBER, outside / "theirs.json")
    umask = os.umask(0)
    try:
        with Path(MAIN).open() as opened:
            keys(runner, f"add --id new --subscribers {outside / 'theirs.json'}")
            assert '"new"' not in opened.read()  # whoever is reading reads the file before
    finally:
        os.umask(umask)
    for path in (Path(MAIN), outside / "theirs.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "new" in path.read_text()
    assert not list(Path().glob(".*.new"))


def test_two_at_a_time_are_refused(runner: CliRunner) -> None:
    Path(f".{SUBSCRIBER}.new").symlink_to("elsewhere")
    before = Path(MAIN).read_bytes()
    assert "another `lonelypss keys` is at work" in keys(runner, "add", 2).output
    assert Path(MAIN).read_bytes() == before
    assert not Path("elsewhere").exists()


def test_the_owner_stays(runner: CliRunner) -> None:
    owner = 65_534 if os.geteuid() == 0 else os.geteuid()  # only root can give files away
    os.chown(MAIN, owner, -1)
    keys(runner, "add")
    assert os.stat(MAIN).st_uid == owner


def test_a_key_with_rights_is_for_one_subscriber(runner: CliRunner) -> None:
    keys(
        runner,
        "add --id tenant --notify 'a/**' --notify log --subscribe 'a/**' --url http://10.0.0."
        " --write tenant.json",
    )
    rights = {"notify": ["a/**", "log"], "subscribe": ["a/**"], "urls": ["http://10.0.0."]}
    row = document()[UP]["keys"][1]
    assert (row["id"], row["rights"]) == ("tenant", rights)
    assert "tenant" not in Path(SUBSCRIBER).read_text()
    theirs = document("tenant.json")
    assert theirs[UP]["secret"] == row["secret"]
    assert [key["id"] for key in theirs[UP]["keys"]] == ["tenant"]
    assert theirs[DOWN] == document()[DOWN]
    assert document()[UP]["secret"] not in Path("tenant.json").read_text()
    assert stat.S_IMODE(Path("tenant.json").stat().st_mode) == 0o600
    assert "http://10.0.0." in keys(runner, "ls").output
    assert "it signs in its subscriber's file" in keys(runner, "sign tenant", 2).output
    # a rotation of the others gives it no other key to sign with
    keys(runner, "add --id new --subscribers tenant.json")
    assert [key["id"] for key in document("tenant.json")[UP]["keys"]] == ["tenant"]
    assert [key["id"] for key in document("tenant.json")[DOWN]["keys"]] == ["default", "new"]
    keys(runner, "retire tenant")
    assert "tenant" not in Path(MAIN).read_text()


# all while everything runs


def copy(master: Path, name: str, *hosts: Path) -> None:
    for host in hosts:
        new = host / "new"
        shutil.copy(master / name, new)
        new.chmod(0o600)
        new.replace(host / name)


async def test_a_rotation_under_load_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two broadcasters and a client on machines of their own, which get the files one by one."""
    used: list[Authenticator] = []

    def reading(path: Path) -> tuple[Authenticator, Authenticator]:
        used.extend(pair := get_auth_config_from_file(path))
        return pair

    monkeypatch.setattr("fleets.get_auth_config_from_file", reading)
    master, client_host = tmp_path / "master", tmp_path / "client"
    hosts = [tmp_path / "one", tmp_path / "two"]
    for directory in (master, client_host, *hosts):
        directory.mkdir()
    assert run("lonelypss", "setup", cwd=master).returncode == 0
    copy(master, MAIN, *hosts)
    copy(master, SUBSCRIBER, client_host)
    db = postgres.shared().database()
    async with AsyncExitStack() as stack:
        fleets = [Fleet(host, db, 1, [free_port()]) for host in hosts]
        for fleet in fleets:
            await stack.enter_async_context(fleet.stack)
            await fleet.start(fleet.ports[0])
        clients = Fleet(client_host, db, 1, [fleet.ports[0] for fleet in fleets])
        receivers = {
            kind: await stack.enter_async_context(
                Receiver(clients.client(kind), exact=[b"t"]).listening()
            )
            for kind in ("http", "websocket")
        }
        everything = [receiver.client for receiver in receivers.values()]
        for kind in ("http", "websocket"):
            publisher = clients.client(kind)
            everything.append(await stack.enter_async_context(publisher))
        old = Peer(secretsfile.load((master / MAIN).read_text(), ReplayGuard()))
        assert {(await send_old(old, fleet)) for fleet in fleets} == {200}
        sent: list[bytes] = []
        stopping = False

        async def publish(number: int, client: Any) -> None:
            while not stopping:
                data = b"%d/%d" % (number, len(sent))
                assert (await client.notify(topic=b"t", data=data)).notified == 2
                sent.append(data)

        async def step(command: str, *ids: str) -> None:
            """Everybody gets the files, one after the other, and works with them."""
            done = await asyncio.to_thread(run, "lonelypss", "keys", *command.split(), cwd=master)
            assert done.returncode == 0, done.stderr
            for host, fleet in zip(hosts, fleets, strict=True):
                copy(master, MAIN, host)
                line = await asyncio.to_thread(
                    fleet.programs[fleet.ports[0]].line, "has changed: now"
                )
                assert f"to-broadcaster Hmac({', '.join(ids)})" in line
                await more(20)
            copy(master, SUBSCRIBER, client_host)
            async with asyncio.timeout(DEADLINE):
                while set(map(repr, used)) != {f"Hmac({', '.join(ids)})"}:
                    await asyncio.sleep(0.02)
            await more(20)

        async def more(number: int) -> None:
            wanted = len(sent) + number
            async with asyncio.timeout(DEADLINE):
                while len(sent) < wanted:
                    await asyncio.sleep(0.01)

        async with asyncio.TaskGroup() as group:
            for number, client in enumerate(everything[2:] * 2):
                group.create_task(publish(number, client))
            await more(20)
            await step("add --id new", "default", "new")
            await step("sign new", "new", "default")
            await step("retire default", "new")
            stopping = True
        for receiver in receivers.values():
            await receiver.until(lambda r=receiver: len(r.got) == len(sent))  # type: ignore[misc]
            assert dict(receiver.got) == dict.fromkeys(sent, 1)
            assert receiver.gaps == 1
        assert {(await send_old(old, fleet)) for fleet in fleets} == {403}


async def send_old(old: Peer, fleet: Fleet) -> int:
    request = old.notify(b"nobody")
    return (await exchange(fleet.ports[0], request.bytes())).status
