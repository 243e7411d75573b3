import asyncio
import json
import os
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lonelypsc.cli import main as client_cli
from lonelypsp.bodies import SubscribeExact
from lonelypsp.secretsfile import decode_key
from lonelypsp.signing import Hmac
from lonelypsp.wire import encode
from lonelypss.cli import main as broadcaster_cli
from lonelypss.config import options
from lonelypss.store.base import Kind
from lonelypss.store.sqlite import SqliteStore
from programs import broadcaster, command, environment, eventually, free_port, run, started, workers

KINDS = ("hmac", "token", "none")
FILES = ("broadcaster-secrets.json", "subscriber-secrets.json", "main.py")


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """Commands inside this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LONELYPS")]:
        monkeypatch.delenv(name)
    return CliRunner()


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


# setup
@pytest.mark.parametrize(("up", "down"), list(product(KINDS, KINDS)))
@pytest.mark.usefixtures("open_umask")
def test_setup_writes_private_secrets(
    runner: CliRunner, tmp_path: Path, up: str, down: str
) -> None:
    result = runner.invoke(
        broadcaster_cli,
        f"--setup --db sqlite --to-broadcasters-auth {up} --to-subscribers-auth {down}",
    )
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES[:2]:
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    text = (tmp_path / FILES[0]).read_text()
    assert (tmp_path / FILES[1]).read_text() == text
    secrets = json.loads(text)
    assert secrets.pop("version") == "2"
    expected = {"to-broadcaster": up, "to-subscriber": down}
    assert {k: v["type"] for k, v in secrets.items()} == {
        k: v for k, v in expected.items() if v != "none"
    }
    listed = runner.invoke(broadcaster_cli, "check-config --json")
    assert listed.exit_code == 0
    for entry in secrets.values():
        assert entry["secret"] not in listed.output + result.output


@pytest.mark.parametrize("kind", KINDS)
def test_generated_main_runs_under_uvicorn(tmp_path: Path, kind: str) -> None:
    auth = (f"--to-broadcasters-auth={kind}", f"--to-subscribers-auth={kind}")
    assert run("lonelypss", "setup", *auth, cwd=tmp_path).returncode == 0
    argv = command("uvicorn", "main:app", "--port=0", "--no-access-log")
    with started(argv, tmp_path) as program:
        url = re.search(r"http://\S+", program.line("running on"))
        assert url is not None
        notified = run(
            "lonelypsc", "notify", "a", "b", "--json", f"--broadcaster={url[0]}", cwd=tmp_path
        )
        assert json.loads(notified.stdout) == {"topic": "a", "bytes": 1, "notified": 0}
        assert program.stop() in (0, -signal.SIGTERM)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_setup_refuses_what_exists(runner: CliRunner, tmp_path: Path, name: str, kind: str) -> None:
    if kind == "file":
        (tmp_path / name).write_text("mine")
    else:
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    result = runner.invoke(broadcaster_cli, "setup")
    assert result.exit_code == 1
    assert f"{name} exists; nothing was written" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == [name]
    if kind == "file":
        assert (tmp_path / name).read_text() == "mine"


def test_setup_takes_back_what_it_wrote_when_it_fails(
    runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def full_disk(path: Path, *arguments: int) -> int:
        if Path(path).name == "main.py":
            raise OSError(28, "No space left on device")
        return really_open(path, *arguments)

    monkeypatch.setattr("lonelypss.setup_files.os.open", full_disk)
    result = runner.invoke(broadcaster_cli, "setup")
    assert result.exit_code == 1
    assert result.stderr == "lonelypss: cannot write here: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--to-broadcasters-secret short", "64 bytes"),
        ("--to-subscribers-auth none --to-subscribers-secret x", "takes no secret"),
        ("--to-subscribers-auth token --to-subscribers-secret 'a b'", "visible ASCII"),
        ("--db mysql://x", "sqlite:///relative.db"),
        ("--to-broadcasters-auth rot13", "rot13"),
    ],
)
def test_setup_misuse(runner: CliRunner, tmp_path: Path, arguments: str, complaint: str) -> None:
    result = runner.invoke(broadcaster_cli, f"setup {arguments}")
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_setup_takes_given_secrets(runner: CliRunner, tmp_path: Path) -> None:
    key = "A" * 86
    arguments = f"--to-broadcasters-secret {key} --to-subscribers-auth token"
    result = runner.invoke(broadcaster_cli, f"setup {arguments} --to-subscribers-secret t0ken")
    assert result.exit_code == 0
    secrets = json.loads((tmp_path / FILES[0]).read_text())
    assert secrets["to-broadcaster"] == {"type": "hmac", "secret": key}
    assert secrets["to-subscriber"] == {"type": "token", "secret": "t0ken"}


# serve
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_stops_with_status_0(tmp_path: Path, workers: str, signum: int) -> None:
    with broadcaster(tmp_path, f"--workers={workers}") as (program, _):
        assert program.stop(signum) == 0
        assert not [line for line in program.rest() if "Traceback" in line]


def test_serve_says_that_the_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("lonelypss", "serve", f"--port={port}", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"lonelypss: port {port} on 127.0.0.1 is in use; choose another")


def test_serve_refuses_workers_without_a_common_database(tmp_path: Path) -> None:
    result = run("lonelypss", "serve", "--db=sqlite://", "--workers=2", cwd=tmp_path)
    assert result.returncode == 2
    assert "--workers 2 needs one that they can share" in result.stderr


def test_serve_without_secrets_warns_loudly(tmp_path: Path) -> None:
    with broadcaster(tmp_path, "--db=sqlite://") as (program, _):
        assert program.seen[0].startswith("WARNING: no authorization: whoever reaches this port")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--secrets=nowhere.json"], "nowhere.json: No such file"),
        (["--secrets=open.json"], "chmod 600"),
        (["--host=0.0.0.0"], "on 0.0.0.0, anybody could send and subscribe"),
        (["--config=bad.toml"], "unknown option 'nonsense'"),
        (["--journal-after=-1"], "journal_after is -1.0, must be at least 0"),
        (["--host=host.invalid"], "cannot listen on host.invalid"),
    ],
)
def test_serve_misuse(
    runner: CliRunner, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    (tmp_path / "open.json").write_text("{}")
    (tmp_path / "open.json").chmod(0o644)
    (tmp_path / "bad.toml").write_text("nonsense = 1\n")
    result = runner.invoke(broadcaster_cli, ["serve", "--port=0", *arguments])
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_serve_refuses_a_database_that_is_none(runner: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "lonelypss.db").write_bytes(b"not a database" * 500)
    result = runner.invoke(broadcaster_cli, ["serve", "--port=0"])
    assert result.exit_code == 1
    assert "the database is not available" in result.stderr


def test_workers_share_port_database_and_replay_memory(tmp_path: Path) -> None:
    assert run("lonelypss", "setup", cwd=tmp_path).returncode == 0
    secrets = json.loads((tmp_path / FILES[0]).read_text())
    with broadcaster(tmp_path, "--workers=2") as (program, url):
        with started(
            command(
                "lonelypsc", "listen", "--exact=a", "--json", "--count=20", f"--broadcaster={url}"
            ),
            tmp_path,
        ) as listener:
            listener.event("listening")
            notify = ("lonelypsc", "notify", "a", "b", "--json", f"--broadcaster={url}")
            with ThreadPoolExecutor(4) as pool:
                results = list(pool.map(lambda _: run(*notify, cwd=tmp_path), range(20)))
            assert [json.loads(r.stdout)["notified"] for r in results] == [1] * 20
            assert listener.process.wait(40) == 0
        assert _accepted_signatures(tmp_path, url, secrets, 16) == 1
        assert program.stop() == 0


def _accepted_signatures(tmp_path: Path, url: str, secrets: dict, times: int) -> int:
    """How many of as many connections get through with one and the same signed request."""
    request = SubscribeExact("http://127.0.0.1:9/v1/receive", b"x", None)
    fields = {"url": request.url, "topic": request.topic, "recovery": None, "tracing": b""}
    hmac = Hmac(decode_key(secrets["to-broadcaster"]["secret"]))
    header = hmac.authorize("SUBSCRIBE_EXACT", fields, time.time())
    assert header is not None
    statuses = []
    for _ in range(times):
        connection = HTTPConnection(url.removeprefix("http://"))
        headers = {"Authorization": header}
        connection.request("POST", "/v1/subscribe/exact", encode(request), headers)
        statuses.append(connection.getresponse().status)
        connection.close()
    assert set(statuses) == {200, 403}
    return statuses.count(200)


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    with broadcaster(tmp_path, "--workers=2") as (program, url):
        first = eventually(lambda: _children(program.process.pid, 2))
        os.kill(first[0], signal.SIGKILL)
        program.line(f"worker {first[0]} ended with status -9")
        eventually(lambda: first[0] not in (now := _children(program.process.pid, 2)) and now)
        result = run("lonelypsc", "notify", "a", "b", f"--broadcaster={url}", cwd=tmp_path)
        assert result.stdout == "notified 0 subscribers\n", result.stderr
        assert program.stop() == 0


def test_a_worker_waits_for_a_database_that_is_locked(tmp_path: Path) -> None:
    with broadcaster(tmp_path, "--workers=2") as (program, url):
        first = eventually(lambda: _children(program.process.pid, 2))
        with closing(sqlite3.connect(tmp_path / "lonelypss.db")) as other:
            other.execute("BEGIN EXCLUSIVE")
            os.kill(first[0], signal.SIGKILL)
            program.line("ended with status -9")
            program.line("ended with status 75; starting another")
            other.execute("ROLLBACK")
        eventually(lambda: first[0] not in (now := _children(program.process.pid, 2)) and now)
        result = run("lonelypsc", "notify", "a", "b", f"--broadcaster={url}", cwd=tmp_path)
        assert result.stdout == "notified 0 subscribers\n", result.stderr
        assert program.stop() == 0


def test_workers_end_with_their_supervisor(tmp_path: Path) -> None:
    with broadcaster(tmp_path, "--workers=2") as (program, url):
        eventually(lambda: _children(program.process.pid, 2))
        program.stop(signal.SIGKILL)
        eventually(lambda: not _answers(url))


def _answers(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    try:
        socket.create_connection((host, int(port))).close()
    except OSError:
        return False
    return True


def test_a_running_notify_is_finished_before_it_stops(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as slow, broadcaster(tmp_path) as (program, url):
        slow.settimeout(40)
        subscriber = f"http://127.0.0.1:{slow.getsockname()[1]}/v1/receive"
        connection = HTTPConnection(url.removeprefix("http://"))
        connection.request(
            "POST", "/v1/subscribe/exact", encode(SubscribeExact(subscriber, b"a", None))
        )
        assert connection.getresponse().status == 200
        connection.close()
        notify = command("lonelypsc", "notify", "a", "b", "--retries=1", f"--broadcaster={url}")
        with started(notify, tmp_path) as publisher:
            delivery, _ = slow.accept()
            with delivery:
                program.process.terminate()
                eventually(lambda: not _answers(url))
                assert publisher.process.poll() is None
                delivery.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\x00\x0a")
                publisher.line("notified 0 subscribers")
        assert program.process.wait(40) == 0
    counted = run("lonelypss", "subs", "ls", "--json", cwd=tmp_path)
    assert json.loads(counted.stdout) == {"exact": 0, "glob": 0, "missed": 0}


def _children(pid: int, number: int) -> list[int]:
    """The worker processes, when there are `number` of them."""
    found = workers(pid)
    return found if len(found) == number else []


# check-config
def test_check_config_names_value_and_source(runner: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("max_notifies = 7\nmissed_lease = 9\n")
    result = runner.invoke(
        broadcaster_cli,
        "check-config --config c.toml --json --missed-lease 5",
        env={"LONELYPSS_JOURNAL_AFTER": "0"},
    )
    assert result.exit_code == 0
    rows = {row["option"]: row for row in json.loads(result.stdout)}
    assert set(rows) >= {row.name for row in options()}
    assert (rows["max_notifies"]["value"], rows["max_notifies"]["source"]) == (7, "c.toml")
    assert (rows["missed_lease"]["value"], rows["missed_lease"]["source"]) == (5, "--missed-lease")
    journal = rows["journal_after"]
    assert (journal["value"], journal["source"]) == (0, "LONELYPSS_JOURNAL_AFTER")
    assert rows["db"]["source"] == "default"
    assert rows["auth: to-broadcaster"]["value"] == "Nothing()"


def test_check_config_for_people(runner: CliRunner) -> None:
    result = runner.invoke(broadcaster_cli, "check-config")
    assert re.search(r"^journal_after +0.25 +seconds +default", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", ["serve", "check-config"])
def test_help_shows_every_option_with_unit_and_default(runner: CliRunner, name: str) -> None:
    text = " ".join(runner.invoke(broadcaster_cli, [name, "--help"]).output.split())
    for row in options():
        assert row.flag in text
        assert f"default: {'none' if row.default is None else row.default}]" in text


@pytest.mark.parametrize("cli", [broadcaster_cli, client_cli])
def test_version_and_help(runner: CliRunner, cli: object) -> None:
    assert re.search(r"version \d+\.\d+", runner.invoke(cli, ["--version"]).output)
    assert "Examples:" in runner.invoke(cli, ["--help"]).output


# subs
def test_subs(runner: CliRunner, tmp_path: Path) -> None:
    assert runner.invoke(broadcaster_cli, "subs ls").exit_code == 2
    with broadcaster(tmp_path, "--db=sqlite:///lonelypss.db") as (_, url):
        listen = ("listen", "--exact=[b]x", "--glob=a/*", "--json", f"--broadcaster={url}")
        with started(command("lonelypsc", *listen), tmp_path) as listener:
            listener.event("listening")
            counts = json.loads(runner.invoke(broadcaster_cli, "subs ls --json").stdout)
            assert counts == {"exact": 1, "glob": 1, "missed": 0}
            matching = runner.invoke(broadcaster_cli, "subs ls --topic a/1 --json")
            (row,) = json.loads(matching.stdout)
            assert (row["kind"], row["pattern"]) == ("glob", "a/*")
            of_url = ["subs", "ls", "--url", row["url"]]
            assert "[b]x" in runner.invoke(broadcaster_cli, of_url).stdout
            remove = ["subs", "rm", row["url"]]
            assert runner.invoke(broadcaster_cli, remove).exit_code == 2
            removed = runner.invoke(broadcaster_cli, [*remove, "--glob=a/*", "--json"])
            assert json.loads(removed.stdout) == [row]
            assert runner.invoke(broadcaster_cli, [*remove, "--glob=a/*"]).exit_code == 1
            assert runner.invoke(broadcaster_cli, [*remove, "--all"]).exit_code == 0
            assert json.loads(runner.invoke(broadcaster_cli, [*of_url, "--json"]).stdout) == []


def test_explain(runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        (Kind.EXACT, "a/1", "http://10.0.0.7:3002/v1/receive"),
        (Kind.GLOB, "a/*", "http://10.0.0.7:3002/v1/receive"),
        (Kind.GLOB, "**", "http://10.0.0.8:3002/v1/receive"),
        (Kind.EXACT, "a/1", "http://subscriber.example/v1/receive"),
        (Kind.EXACT, "a/1", "http://10.0.0.9:3004/v1/receive_for_websockets"),
        (Kind.EXACT, "a/2", "http://10.0.0.1:3002/v1/receive"),
    ]

    async def fill() -> None:
        store = SqliteStore("lonelypss.db")
        await store.open()
        for kind, pattern, url in wanted:
            assert await store.subscribe(kind, pattern.encode(), url, None)
        await store.close()

    asyncio.run(fill())
    monkeypatch.setenv("LONELYPSS_URL_DENY", "10.0.0.8")
    result = runner.invoke(broadcaster_cli, "explain a/1 --json")
    assert result.exit_code == 0, result.output
    assert [(r["because"], r["outcome"].split(":")[0]) for r in json.loads(result.stdout)] == [
        (["a/*", "the topic"], "is posted there"),
        (["**"], "refused"),
        (["the topic"], "goes to the websockets of a broadcaster"),
        (["the topic"], "is posted there, if its address is allowed"),
    ]
    shown = runner.invoke(broadcaster_cli, "explain a/1").stdout
    assert "url_deny (10.0.0.8)" in shown
    assert "a/*, the topic" in shown
    assert json.loads(runner.invoke(broadcaster_cli, "explain other --json").stdout)[0]["url"]


# lonelypsc
@pytest.mark.parametrize("scheme", ["http", "ws"])
def test_listen_and_notify(tmp_path: Path, scheme: str) -> None:
    assert run("lonelypss", "setup", cwd=tmp_path).returncode == 0
    with broadcaster(tmp_path) as (_, url):
        where = f"--broadcaster={url.replace('http', scheme)}"
        listen = command("lonelypsc", "listen", "--glob=**", "--json", "--count=4", where)
        with started(listen, tmp_path) as listener:
            listener.event("listening")
            (tmp_path / "big").write_bytes(b"\xff" * 200_000)
            sent = [
                run("lonelypsc", "notify", "a", "héllo", where, cwd=tmp_path),
                run("lonelypsc", "notify", "b", "--file=big", "--json", where, cwd=tmp_path),
                run("lonelypsc", "notify", "c", "-", where, cwd=tmp_path, input="piped"),
                run("lonelypsc", "notify", "d", "", where, cwd=tmp_path),
            ]
            assert [r.stderr for r in sent] == [""] * 4
            assert sent[0].stdout == "notified 1 subscriber\n"
            assert json.loads(sent[1].stdout) == {"topic": "b", "bytes": 200_000, "notified": 1}
            got = [listener.event("message") for _ in sent]
            assert [m["topic"] for m in got] == ["a", "b", "c", "d"]
            assert [m["bytes"] for m in got] == [6, 200_000, 5, 0]
            assert (got[0]["data"], got[2]["data"], got[3]["data"]) == ("héllo", "piped", "")
            assert got[1]["cut"]
            assert "data_base64" in got[1]
            assert listener.process.wait(40) == 0


def test_notify_explained(tmp_path: Path) -> None:
    notify = ("notify", "a", "b", "--explain")
    with broadcaster(tmp_path, "--explain=true") as (_, url):
        where = f"--broadcaster={url}"
        nobody = f"http://127.0.0.1:{free_port()}/"
        body = encode(SubscribeExact(nobody, b"a", nobody))
        connection = HTTPConnection(url.removeprefix("http://"))
        connection.request("POST", "/v1/subscribe/exact", body)
        assert connection.getresponse().status == 200
        connection.close()
        result = run("lonelypsc", *notify, where, cwd=tmp_path)
        assert result.stderr == ""
        first, second = result.stdout.splitlines()
        assert first == "notified 0 subscribers"
        assert re.fullmatch(
            rf"failed  {re.escape(nobody)}  \(the topic\)  [\d.]+ ms: cannot connect: .*"
            r"; a MISSED notice follows",
            second,
        )
        result = run("lonelypsc", *notify, "--json", where, cwd=tmp_path)
        (one,) = json.loads(result.stdout)["explanation"]["subscribers"]
        assert (one["url"], one["outcome"], one["will_be_told"]) == (nobody, "failed", True)
    with broadcaster(tmp_path) as (_, url):
        result = run("lonelypsc", *notify, f"--broadcaster={url}", cwd=tmp_path)
        assert result.stdout == "notified 0 subscribers\n"
        assert "--explain true" in result.stderr
    result = run("lonelypsc", *notify, "--broadcaster=ws://127.0.0.1:1", cwd=tmp_path)
    assert result.returncode == 2
    assert "--explain needs an http" in result.stderr


@pytest.mark.parametrize("scheme", ["http", "ws"])
def test_ctrl_c_unsubscribes(tmp_path: Path, scheme: str) -> None:
    with broadcaster(tmp_path) as (_, url):
        where = f"--broadcaster={url.replace('http', scheme)}"
        listen = ("listen", "--exact=a\x1b[2J", where)
        with started(command("lonelypsc", *listen), tmp_path) as listener:
            listener.line("listening, Ctrl-C ends")
            notify = ("notify", "a\x1b[2J", "\x1b[0m", f"--broadcaster={url}")
            assert "notified 1" in run("lonelypsc", *notify, cwd=tmp_path).stdout
            assert listener.line("^a") == r"a\x1b[2J: \x1b[0m"
            assert listener.stop(signal.SIGINT) == 0

        def counted() -> Any:
            return json.loads(run("lonelypss", "subs", "ls", "--json", cwd=tmp_path).stdout)

        eventually(lambda: counted() == {"exact": 0, "glob": 0, "missed": 0})


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["notify", "a"], 2, "give either DATA or --file"),
        (["listen"], 2, "give --exact or --glob"),
        (["listen", "--exact=a", "--bind=nonsense"], 2, "--bind: 'nonsense' is not HOST:PORT"),
        (["notify", "a", "b", "--broadcaster=ftp://x"], 2, "broadcasters: host"),
        (["notify", "a", "--file=nowhere"], 1, "nowhere: No such file or directory"),
        (["notify", "a", "b", "--secrets=nowhere"], 1, "nowhere: No such file or directory"),
        (["notify", "a" * 70_000, "b"], 2, "topic: 70,000 bytes"),
        (["notify", "a", "b", "--retries=1", "--broadcaster={free}"], 1, "--broadcaster"),
        (
            ["notify", "a", "b", "--retries=1", "--broadcaster=ws://127.0.0.1:9"],
            1,
            "(--broadcaster",
        ),
        (["listen", "--exact=a", "--bind={taken}"], 1, "(--bind)"),
    ],
)
def test_client_errors_are_one_line(
    runner: CliRunner, arguments: list[str], status: int, complaint: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        addresses = {
            "free": f"http://127.0.0.1:{free_port()}",
            "taken": f"127.0.0.1:{taken.getsockname()[1]}",
        }
        result = runner.invoke(client_cli, [a.format(**addresses) for a in arguments])
    assert result.exit_code == status
    last = result.stderr.splitlines()[-1]
    assert complaint in last
    assert last.startswith(("lonelypsc: ", "Error: "))


def test_wrong_secret_names_the_setting(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory in (ours, theirs):
        directory.mkdir()
        assert run("lonelypss", "setup", cwd=directory).returncode == 0
    with broadcaster(ours) as (_, url):
        result = run("lonelypsc", "notify", "a", "b", f"--broadcaster={url}", cwd=theirs)
    assert result.returncode == 1
    assert "compare the secrets files" in result.stderr
    assert result.stderr.endswith("(--secrets, --broadcaster)\n")
    assert len(result.stderr.splitlines()) == 1


def test_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("no pseudo terminals")
    (tmp_path / "large").write_bytes(bytes(8 * 1024 * 1024))
    with broadcaster(tmp_path) as (_, url):
        leader, follower = os.openpty()
        try:
            argv = command("lonelypsc", "notify", "a", "--file=large", f"--broadcaster={url}")
            result = subprocess.run(
                argv,
                cwd=tmp_path,
                env=environment(TERM="xterm", COLUMNS="100"),
                stdout=subprocess.PIPE,
                stderr=follower,
                timeout=40,
                check=True,
            )
            shown = os.read(leader, 100_000).decode()
        finally:
            os.close(leader)
            os.close(follower)
    assert result.stdout == b"notified 0 subscribers\n"
    assert "/8.4 MB" in shown


def test_demo(tmp_path: Path) -> None:
    result = run("lonelypsc", "demo", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    events = [json.loads(line) for line in result.stdout.splitlines()]
    names = [event["event"] for event in events]
    assert names == [
        *("setup", "broadcaster", "subscribed", "subscribed", "notified", "message", "message"),
        *("notified", "subscribed", "killed", "notified", "missed", "restarted", "recovered"),
        "done",
    ]
    assert [e["notified"] for e in events if e["event"] == "notified"] == [2, 1, 2]
    assert list(tmp_path.iterdir()) == []
