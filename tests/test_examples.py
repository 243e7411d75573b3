"""Runs every example against a real broadcaster, with other ports and nothing else changed."""

import json
import re
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from certificates import Authority
from programs import (
    PATIENCE,
    ROOT,
    Program,
    broadcaster,
    command,
    eventually,
    free_port,
    run,
    started,
)

EXAMPLES = ROOT / "examples"


@contextmanager
def example(
    name: str, directory: Path, broadcaster_url: str | None = None
) -> Iterator[tuple[Program, str, str]]:
    """A copy of an example on free ports; yields it and the urls for its ports 3002 and 3003."""
    listener = f"127.0.0.1:{free_port()}"
    address = (broadcaster_url or f"http://127.0.0.1:{free_port()}").removeprefix("http://")
    text = (EXAMPLES / name).read_text()
    text = text.replace("0.0.0.0", "127.0.0.1")
    text = text.replace("127.0.0.1:3002", listener).replace("127.0.0.1:3003", address)
    text = text.replace("3002", listener.rpartition(":")[2])
    text = text.replace("port=3003", f"port={address.rpartition(':')[2]}")
    (directory / name).write_text(text)
    with started([sys.executable, "-W", "error", name], directory) as program:
        yield program, f"http://{listener}", f"http://{address}"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    assert run("lonelypss", "setup", cwd=tmp_path).returncode == 0
    return tmp_path


def notify(directory: Path, url: str, topic: str, data: str) -> int:
    result = run(
        "lonelypsc", "notify", topic, data, "--json", f"--broadcaster={url}", cwd=directory
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["notified"]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            response.read()
    except urllib.error.HTTPError as e:
        e.close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "name",
    [
        "usage.py",
        pytest.param(
            "usage_312.py",
            marks=pytest.mark.skipif(sys.version_info < (3, 12), reason="needs Python 3.12"),
        ),
    ],
)
def test_usage(directory: Path, name: str) -> None:
    with (
        broadcaster(directory) as (_, url),
        example(name, directory, url) as (program, _, _),
    ):
        for stage in ("exact match", "using glob", "a variety", "alt syntax", "arbitrary timeout"):
            program.line(stage)
            eventually(lambda: notify(directory, url, "foo/bar", "Hello!") == 1)
            assert program.line("Received") == "Received message on b'foo/bar': Hello!"
        program.line("Been 5 seconds without a message")
        for how in ("with bytes", "with a file"):
            program.line(how)
            program.line("Notified 0 subscribers to foo/baz")
        assert program.process.wait(40) == 0
    assert (directory / "hello.txt").read_text() == "Hello, world!"


def test_notify_only(directory: Path) -> None:
    with (
        broadcaster(directory) as (_, url),
        example("notify_only.py", directory, url) as (program, _, _),
    ):
        program.line("Notified 0 subscribers")
        assert program.process.wait(40) == 0


def test_manual_bind(directory: Path) -> None:
    with (
        broadcaster(directory) as (_, url),
        example("manual_bind.py", directory, url) as (_, own, _),
    ):
        eventually(lambda: notify(directory, url, "foo/bar", "Hello!") == 1)

        def latest() -> dict[str, str]:
            with urllib.request.urlopen(f"{own}/latest", timeout=5) as response:
                return json.loads(response.read())

        assert eventually(latest) == {"foo/bar": "Hello!"}


def test_shared_listener(directory: Path) -> None:
    with (
        broadcaster(directory) as (_, url),
        example("shared_listener.py", directory, url) as (program, _, _),
    ):
        for name in ("one", "two"):
            eventually(lambda name=name: notify(directory, url, f"foo/{name}", name) == 1)
        program.line(r"\[b'one', b'two'\]")
        assert program.process.wait(40) == 0


def test_large_file(directory: Path) -> None:
    with (
        broadcaster(directory) as (_, url),
        example("large_file.py", directory, url) as (program, _, _),
    ):
        program.line("Notified 1 subscribers to files/large")
        program.line("Received 33,554,432 bytes")
        assert program.process.wait(40) == 0
    assert (directory / "received.bin").stat().st_size == 32 * 1024 * 1024


def test_websocket(directory: Path) -> None:
    with (
        broadcaster(directory) as (_, url),
        example("websocket.py", directory, url) as (program, _, _),
    ):
        program.line("Sent 100 messages, received 100")
        program.line("Reading the current state")
        program.line(r"The last one: prices/\d+ is \d+\.99")
        assert program.process.wait(40) == 0


def test_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.issue("127.0.0.1", file="broadcaster")
    authority.issue("127.0.0.1", "orders.example", file="subscriber")
    with example("mutual_tls.py", tmp_path) as (server, _, url):
        server.line("listening on")
        with example("tls_subscriber.py", tmp_path, url) as (program, _, _):
            program.line("orders/42: paid")
            assert program.process.wait(40) == 0
        authority.issue("127.0.0.1", "stranger.example", file="subscriber")
        with example("tls_subscriber.py", tmp_path, url) as (program, _, _):
            assert program.process.wait(40) == 1  # it may subscribe, but not notify
            assert any("HTTP 403" in line for line in program.rest())
        assert server.stop() == 0


def test_recover(directory: Path) -> None:
    quick = ("--missed-constant=0.1", "--missed-expo-factor=0", "--missed-jitter=0")
    with broadcaster(directory, *quick) as (_, url):
        with example("recover.py", directory, url) as (program, own, _):
            program.line("Reading the current state")
            assert notify(directory, url, "foo/bar", "1") == 1
            program.line("Applying b'1'")
            program.process.kill()
        assert notify(directory, url, "foo/bar", "2") == 0
        with started([sys.executable, "recover.py"], directory) as again:
            again.line("Reading the current state")
            eventually(lambda: answers(own))
            # notices have failed meanwhile, so that it may be left alone for a moment yet
            eventually(lambda: notify(directory, url, "foo/bar", "3") == 1)
            again.line("Applying b'3'")


def test_traces(directory: Path) -> None:
    with broadcaster(directory) as (_, url), example("traces.py", directory, url) as (program, *_):
        program.line("Shipping what was paid")
        handed_on = program.line("Hand this on").split("-")[1]
        assert program.process.wait(40) == 0
        spans = [line.split() for line in program.rest() if re.match("[0-9a-f]{32} ", line)]
    assert sorted(name for _, name in spans) == ["notify", "pay", "process", "receive", "ship"]
    assert {trace for trace, _ in spans} == {handed_on}


def test_serve(directory: Path) -> None:
    with example("serve.py", directory) as (_, _, url):
        eventually(lambda: answers(url))
        assert notify(directory, url, "a", "b") == 0


def test_embed_broadcaster(directory: Path) -> None:
    with example("embed_broadcaster.py", directory) as (_, _, url):
        eventually(lambda: answers(url))
        with urllib.request.urlopen(url, timeout=5) as response:
            assert json.loads(response.read()) == {"exact": 0, "glob": 0, "missed": 0}
        pubsub = f"{url}/pubsub"
        listen = [sys.executable, "-m", "lonelypsc", "listen", "--exact=a", "--json"]
        with started([*listen, "--count=1", f"--broadcaster={pubsub}"], directory) as listener:
            listener.event("listening")
            assert notify(directory, pubsub, "a", "b") == 1
            assert listener.event("message")["data"] == "b"
            assert listener.process.wait(40) == 0


def test_bridges_back_to_back(directory: Path) -> None:
    """Two, in a ring. Each message is passed on as often as `max_hops` allows, and then refused."""
    (there := directory / "there").mkdir()
    for name in ("broadcaster-secrets.json", "subscriber-secrets.json"):
        (there / name).write_bytes((directory / name).read_bytes())
        (there / name).chmod(0o600)
    text = (EXAMPLES / "bridge.py").read_text()
    (directory / "bridge.py").write_text(text)
    with broadcaster(directory) as (_, near), broadcaster(there) as (_, far):
        forth = [sys.executable, "-W", "error", "bridge.py", near, far, "shared/**"]
        back = [sys.executable, "-W", "error", "bridge.py", far, near, "shared/**"]
        listen = ["lonelypsc", "listen", "--glob=**", "--json", f"--broadcaster={near}"]
        with (
            started(forth, directory) as first,
            started(back, directory) as second,
            started([sys.executable, "-m", *listen], directory) as listener,
        ):
            first.line("Passing on")
            second.line("Passing on")
            listener.event("listening")
            assert notify(directory, near, "shared/a", "x") == 2
            # near 0 -> far 1 -> near 2 -> far 3 -> near refuses 4
            assert [listener.event("message")["topic"] for _ in range(2)] == ["shared/a"] * 2
            second.line("Not passed on")
            second.line("508.*max_hops")
            assert notify(directory, near, "end", "x") == 1
            assert listener.event("message")["topic"] == "end"


def test_every_example_is_run() -> None:
    source = Path(__file__).read_text()
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert {name for name in names if f'"{name}"' in source} == names


def test_rolling_restart(directory: Path) -> None:
    """Two broadcasters on one file, as on one PostgreSQL."""
    ports = [free_port(), free_port()]
    text = (EXAMPLES / "rolling_restart.py").read_text()
    for port, free in zip(("3003", "3004", "3002"), (*ports, free_port()), strict=True):
        text = text.replace(port, str(free))
    (directory / "rolling_restart.py").write_text(text)
    serve = [command("lonelypss", "serve", f"--port={port}", "--drain=0") for port in ports]
    with ExitStack() as stack:
        running = [stack.enter_context(started(argv, directory)) for argv in serve]
        for one in running:
            one.line("lonelypss listens on")
        argv = [sys.executable, "-W", "error", "rolling_restart.py"]
        program = stack.enter_context(started(argv, directory))
        program.line("Sending, until Ctrl-C")
        for one, again in zip(running, serve, strict=True):
            assert one.stop() == 0
            stack.enter_context(started(again, directory)).line("lonelypss listens on")
        program.process.send_signal(signal.SIGINT)
        counts = re.findall(r"\d+", program.line("Sent "))
        assert counts[0] == counts[2]
        assert counts[1] == "0"
        assert program.process.wait(PATIENCE) == 0
