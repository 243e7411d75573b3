"""The files of deploy/ name only what exists, and what they would start works."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import stat
import subprocess
import urllib.request
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import postgres
from lonelypsc.config.auth_config import AuthConfigFromParts
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.file_config import get_auth_config_from_file
from lonelypsc.config.ws_config import make_websocket_pub_sub_config
from lonelypsc.http_client import HttpPubSubClient
from lonelypsc.ws_client import WebsocketPubSubClient
from lonelypss.cli import main as commands
from lonelypss.config import options
from programs import ROOT, Program, broadcaster, command, free_port, run, started

DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
UNIT = (DEPLOY / "lonelypss.service").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
BROADCASTERS = ["broadcaster-1", "broadcaster-2"]
ALERTS: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "lonelypss.json").read_text())
QUERIES = [t["expr"] for panel in DASHBOARD["panels"] for t in panel.get("targets", [])]
RUNBOOK = (ROOT / "docs" / "how-to" / "operate.md").read_text()


def unit_command() -> list[str]:
    found = re.search(r"^ExecStart=(.+)$", UNIT, re.MULTILINE)
    assert found is not None
    return found[1].split()


def stopping(arguments: list[str]) -> int:
    """Seconds that these arguments of `lonelypss serve` allow for a stop."""
    parsed = commands.commands["serve"].make_context("serve", list(arguments)).params
    return parsed["drain"] + parsed["grace"]


# Docker


def test_the_image_is_made_of_files_that_exist_and_nothing_else() -> None:
    stage = DOCKERFILE.partition("\nFROM ")[2].partition("\nFROM ")[0]
    copied = [name for line in re.findall(r"^COPY (.+)$", stage, re.MULTILINE)
              for name in line.split()[:-1]]  # fmt: skip
    assert set(copied) >= {"src", "constraints.txt", "pyproject.toml"}
    assert all((ROOT / name).exists() for name in copied)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    assert ignored[1] == "*"


def test_the_image_runs_lonelypss_itself_and_not_as_root() -> None:
    assert 'ENTRYPOINT ["lonelypss"]\nCMD ["serve"]' in DOCKERFILE
    assert "\nUSER 10001:10001\n" in DOCKERFILE
    assert "-c constraints.txt '.[standard,postgres,metrics,otlp]'" in DOCKERFILE


def test_the_image_asks_a_broadcaster_whether_it_is_alive(tmp_path: Path) -> None:
    found = re.search(r"^HEALTHCHECK .*\\\n +CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)
    assert found is not None
    argv = json.loads(found[1])

    def check(port: str) -> int:
        env = {**os.environ, "LONELYPSS_PORT": port}
        return subprocess.run(argv, env=env, check=False, capture_output=True).returncode

    with broadcaster(tmp_path) as (_, url):
        port = url.rpartition(":")[2]
        assert check(port) == 0
    assert check(port) == 1


@pytest.mark.parametrize(
    "path", ["Dockerfile", "deploy/lonelypss.service", "deploy/compose.yaml", "deploy/README.md"]
)
def test_variables_exist(path: str) -> None:
    text = (ROOT / path).read_text()
    parameters = commands.commands["serve"].params
    known = {row.env for row in options()} | {str(p.envvar) for p in parameters if p.envvar}
    assert set(re.findall(r"\bLONELYPSS_[A-Z_]+", text)) <= known


@pytest.mark.parametrize("name", BROADCASTERS)
def test_compose_gives_broadcasters_time_to_stop(name: str) -> None:
    service = COMPOSE["services"][name]
    program, *arguments = service["command"]
    assert program == "serve"
    assert stopping(arguments) + 10 <= int(service["stop_grace_period"].rstrip("s"))


def test_compose_tells_nobody_secrets_and_publishes_nothing() -> None:
    for name, service in COMPOSE["services"].items():
        for port in service.get("ports", []):
            assert re.match(r"127\.0\.0\.1:|\$\{BIND_ADDRESS:-127\.0\.0\.1\}:", port), name
        for key, value in service.get("environment", {}).items():
            if "PASSWORD" in key:
                assert value.startswith("${DB_PASSWORD:?")
    assert "ports" not in COMPOSE["services"]["postgres"]
    assert COMPOSE["networks"]["database"] == {"internal": True}


def test_compose_mounts_files_that_exist() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source, _, rest = volume.partition(":")
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
                assert rest.endswith(":ro")
            else:
                assert source in COMPOSE["volumes"]
    targets = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = targets["scrape_configs"]
    (scraped,) = job["static_configs"]
    assert scraped["targets"] == [f"{name}:3003" for name in BROADCASTERS]


def container(name: str, directory: Path, db: str) -> dict[str, str]:
    """The variables of a container, with names of this machine instead of its network's."""
    variables = dict(COMPOSE["services"][name]["environment"])
    assert variables["LONELYPSS_PEER_URL"] == f"http://{name}:{{port}}"
    assert variables["LONELYPSS_DB"] == "postgresql://lonelyps@postgres/lonelyps"
    return {
        **variables,
        "LONELYPSS_HOST": "127.0.0.1",
        "LONELYPSS_PORT": str(free_port()),
        "LONELYPSS_DB": db,
        "LONELYPSS_PEER_HOST": "127.0.0.1",
        "LONELYPSS_PEER_URL": "http://localhost:{port}",
        "LONELYPSS_SECRETS": str(directory / "broadcaster-secrets.json"),
        "LONELYPSS_SPOOL_DIRECTORY": str(directory),
        "PGPASSWORD": "not asked for",
    }


async def test_what_compose_starts_passes_messages_on_and_stops(tmp_path: Path) -> None:
    """Two broadcasters with its variables and arguments, on a real PostgreSQL."""
    assert run("lonelypss", "setup", cwd=tmp_path).returncode == 0
    db = postgres.shared().database()
    auth = AuthConfigFromParts(*get_auth_config_from_file(tmp_path / "subscriber-secrets.json"))
    programs: list[Program] = []
    urls: list[str] = []
    async with AsyncExitStack() as stack:
        for name in BROADCASTERS:
            variables = container(name, tmp_path, db)
            arguments = [*COMPOSE["services"][name]["command"], "--drain=1"]
            (tmp_path / name).mkdir()
            program = stack.enter_context(
                started(command("lonelypss", *arguments), tmp_path / name, **variables)
            )
            await asyncio.to_thread(program.line, "lonelypss listens on")
            programs.append(program)
            urls.append(f"127.0.0.1:{variables['LONELYPSS_PORT']}")
        async with asyncio.timeout(30):
            subscriber = await stack.enter_async_context(
                WebsocketPubSubClient(
                    make_websocket_pub_sub_config(
                        broadcasters=[{"host": f"ws://{urls[0]}"}], auth=auth
                    )
                )
            )
            subscription = await stack.enter_async_context(subscriber.subscribe(exact=[b"t"]))
            messages = await subscription.messages()
            publisher = await stack.enter_async_context(
                HttpPubSubClient(
                    make_http_pub_sub_config(
                        bind={"type": "uvicorn", "host": "127.0.0.1", "port": 0},
                        host="http://127.0.0.1:{port}",
                        broadcasters=[{"host": f"http://{urls[1]}"}],
                        auth=auth,
                    )
                )
            )
            assert (await publisher.notify(topic=b"t", data=b"across")).notified == 1
            assert (await anext(aiter(messages))).data.read() == b"across"
        for program in programs:
            assert await asyncio.to_thread(program.stop) == 0


# systemd


def test_the_unit_runs_a_command_that_exists_and_gives_it_time_to_stop() -> None:
    program, *arguments = unit_command()
    assert program.endswith("/lonelypss")
    assert arguments.pop(0) == "serve"
    found = re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert found is not None
    assert stopping(arguments) + 10 <= int(found[1])
    files = re.search(r"^LimitNOFILE=(\d+)$", UNIT, re.MULTILINE)
    needed = {row.name: row.default for row in options()}
    assert files is not None
    assert int(files[1]) > 2 * (needed["outgoing_connections"] + needed["max_websockets"])


def test_systemd_finds_no_fault_with_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    program = tmp_path / "lonelypss"
    program.write_text("#!/bin/sh\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    unit = tmp_path / "lonelypss.service"
    unit.write_text(UNIT.replace(unit_command()[0], str(program)))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert verified.returncode == 0, verified.stderr
    assert "lonelypss.service" not in verified.stderr


# Prometheus and Grafana


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a broadcaster answers to Prometheus."""
    directory = tmp_path_factory.mktemp("exposed")
    with broadcaster(directory, "--metrics=true") as (_, url):
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
            text: str = response.read().decode()
    return text


@cache
def names(exposed: str) -> frozenset[str]:
    found: set[str] = {"up"}
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", exposed, re.MULTILINE):
        suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        found |= {name + suffix for suffix in suffixes}
    return frozenset(found)


@pytest.mark.parametrize("query", [*QUERIES, *(rule["expr"] for rule in ALERTS)])
def test_what_is_asked_for_is_exposed(query: str, exposed: str) -> None:
    asked = set(re.findall(r"\b(?:lonelypss_\w+|up)\b", re.sub(r'"[^"]*"', '""', query)))
    assert asked
    assert asked <= names(exposed)
    for label in re.findall(r'(?:outcome|transport)="[^"]+"', query):
        assert label in exposed


def test_everything_that_is_exposed_is_on_the_dashboard(exposed: str) -> None:
    everything = " ".join(QUERIES)
    found = re.findall(r"^# TYPE (\S+) (\S+)$", exposed, re.MULTILINE)
    shown = [name for name, kind in found if not name.endswith("_created")]
    assert not [name for name in shown if name not in everything]


def test_panels_do_not_overlap_and_say_what_they_show() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not taken & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        assert panel["title"]


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_tells_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert page == "docs/how-to/operate.md"
    assert anchor == rule["alert"].lower()
    assert f"\n### {rule['alert']}\n" in RUNBOOK


def test_every_alert_is_tested() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    assert [test["name"] for test in tests] == [rule["alert"] for rule in ALERTS]


def test_prometheus_accepts_rules_and_queries(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    shown = [
        {"record": f"panel{n}", "expr": query.replace("$__rate_interval", "1m")}
        for n, query in enumerate(QUERIES)
    ]
    queries = tmp_path / "queries.yml"
    queries.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": shown}]}))
    for argv in (
        ["check", "config", "prometheus.yml"],
        ["test", "rules", "alerts_test.yml"],
        ["check", "rules", str(queries)],
    ):
        done = subprocess.run(
            [promtool, *argv],
            cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
