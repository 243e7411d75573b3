"""What the log looks like, what never stands in it, and that nobody can flood it."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lonelypsp import secretsfile
from lonelypss import logs
from lonelypss.logs import IN_ALL, PER_DESTINATION, PERIOD, JsonFormatter, Lines, TextFormatter
from lonelypss.store.base import Kind
from programs import Program, command, run, started
from programs import broadcaster as serving

from .harness import Peer, Subscriber, broadcaster, config, exchange, free_port, hmac_auth

CONTEXT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NASTY = "a\r\nb\x00\x1b[31m\u2028\u202e\ud800é"


def record(text: str, *args: object, error: BaseException | None = None, **extra: Any) -> Any:
    info = None if error is None else (type(error), error, error.__traceback__)
    made = logging.LogRecord("lonelypss.x", logging.WARNING, "x.py", 1, text, args, info)
    made.__dict__.update(extra)
    return made


def raised(text: str) -> Exception:
    try:
        raise RuntimeError(text)  # noqa: TRY301 it needs a traceback
    except RuntimeError as e:
        return e


def as_json(line: str) -> dict[str, Any]:
    assert len(line.splitlines()) == 1
    assert line.isascii()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


# The two formats


def test_text() -> None:
    line = TextFormatter().format(record("%r and %s", b"t\n", "plain"))
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING lonelypss\.x: b't\\n' and plain", line
    )


@given(st.text() | st.just(NASTY))
def test_text_is_one_line_whatever_it_holds(text: str) -> None:
    assert len(TextFormatter().format(record("%s", text)).splitlines()) == 1
    assert len(TextFormatter().format(record("%s", text)).split("\n")) == 1


def test_a_traceback_in_text_is_indented() -> None:
    error = raised("first\n2026-01-01 00:00:00,000 WARNING lonelypss: forged\x1b[2J")
    first, *others = TextFormatter().format(record("it failed", error=error)).split("\n")
    assert first.endswith("it failed")
    assert others[0] == "  Traceback (most recent call last):"
    assert [line for line in others if not line.startswith("  ")] == []
    assert "\x1b" not in "".join(others)


def test_json() -> None:
    fields = {"topic": b"t\xff\n", "url": "http://h/", "attempt": 3, "time": "never", "odd": {1}}
    event = as_json(JsonFormatter(bytes).format(record("%s x", NASTY, fields=fields)))
    assert datetime.fromisoformat(event.pop("time")).utcoffset() is not None
    assert event.pop("pid") > 0
    assert event == {
        "level": "warning",
        "logger": "lonelypss.x",
        "message": NASTY + " x",
        "topic": "t\\xff\n",
        "url": "http://h/",
        "attempt": 3,
        "odd": "{1}",
    }


def test_times_are_rfc_3339() -> None:
    time = as_json(JsonFormatter(bytes).format(record("x")))["time"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)


@given(st.text(), st.binary(), st.text())
def test_json_is_one_line_whatever_it_holds(text: str, topic: bytes, reason: str) -> None:
    fields = {"topic": topic, "reason": reason}
    error = raised(text)
    event = as_json(JsonFormatter(bytes).format(record("%s", text, error=error, fields=fields)))
    assert event["message"] == text
    assert event["reason"] == reason
    assert event["exception"].startswith("Traceback (most recent call last):\n")


@pytest.mark.parametrize(
    ("current", "fields", "expected"),
    [
        (b"", {}, None),
        (CONTEXT, {}, CONTEXT),
        (b"", {"tracing": CONTEXT}, CONTEXT),
        (CONTEXT.replace(b"b7", b"c8"), {"tracing": CONTEXT}, CONTEXT),
        (b"", {"tracing": b"something else"}, None),
    ],
)
def test_traces_in_json(current: bytes, fields: dict[str, Any], expected: bytes | None) -> None:
    event = as_json(JsonFormatter(lambda: current).format(record("x", fields=fields)))
    assert "tracing" not in event
    found = event.get("trace_id"), event.get("span_id")
    _, trace, span, _ = expected.decode().split("-") if expected else (None,) * 4
    assert found == (trace, span)


def test_the_span_that_is_current() -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    from lonelypss.tracing import current_step

    assert current_step(config())() == b""
    current = current_step(config(tracing=True))
    assert current() == b""
    tracer = trace.get_tracer("test", tracer_provider=TracerProvider())
    with tracer.start_as_current_span("x") as span:
        event = as_json(JsonFormatter(current).format(record("x")))
    assert event["span_id"] == f"{span.get_span_context().span_id:016x}"


# The rule against floods


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(clock: Clock, caplog: pytest.LogCaptureFixture) -> Lines:
    logger = logging.getLogger("test_logs")
    caplog.set_level(logging.INFO, "test_logs")
    return Lines(logger, clock)


def test_each_destination_has_its_share(
    lines: Lines, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(100):
        for host in "ab":
            lines.write(logging.WARNING, host, "%s %d", host, n)
    written = caplog.messages
    assert written == [f"{host} {n}" for n in range(PER_DESTINATION) for host in "ab"]
    caplog.clear()
    clock.now += PERIOD
    for _ in range(2):
        lines.write(logging.WARNING, "a", "again")
    assert caplog.messages == ["again [and 80 such lines that were left out]", "again"]
    assert [r.fields for r in caplog.records] == [{"left_out": 80}, {}]  # type: ignore[attr-defined]


def test_all_together_are_bounded(
    lines: Lines, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Also what is remembered: the rest is told with the next line, whoever that is about."""
    for n in range(10_000):
        lines.write(logging.WARNING, n, "x")
    assert caplog.messages == ["x"] * IN_ALL
    assert len(lines._windows) <= logs.MOST_DESTINATIONS
    caplog.clear()
    clock.now += PERIOD
    lines.write(logging.WARNING, "new", "x")
    (text,) = caplog.messages
    told = int(re.findall(r"\d+", text)[0])
    assert told == 10_000 - IN_ALL - sum(w.left_out for w in lines._windows.values())
    assert told > 0


def test_nothing_is_left_out_at_debug(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "test_logs")
    for _ in range(3 * PER_DESTINATION):
        lines.write(logging.INFO, "a", "x")
    assert len(caplog.messages) == 3 * PER_DESTINATION


def test_tracebacks(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    for n in range(3 * PER_DESTINATION):
        try:
            raise LookupError(n)  # noqa: TRY301
        except LookupError:
            lines.write(logging.ERROR, "a", "it failed", exc_info=True)
    errors = [r.exc_info[1].args[0] for r in caplog.records]  # type: ignore[index, union-attr]
    assert errors == list(range(PER_DESTINATION))


def test_what_is_not_logged_counts_nothing(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3 * PER_DESTINATION):
        lines.write(logging.DEBUG, "a", "x")
    lines.write(logging.INFO, "a", "y")
    assert caplog.messages == ["y"]


async def test_a_dead_host_with_many_urls(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    async with broadcaster() as one, Subscriber() as alive:
        for n in range(300):
            url = f"http://127.0.0.1:{port}/{n}"
            await one.store.subscribe(Kind.EXACT, b"t", url, None)
        await one.store.subscribe(Kind.EXACT, b"t", alive.base + "/wrong", None)
        alive.handler = lambda _: b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"
        assert await one.notify() == 0
    failed = [r for r in caplog.records if "delivery of" in r.getMessage()]
    assert len(failed) == PER_DESTINATION + 1
    (other,) = [r.fields for r in failed if "wrong" in r.getMessage()]  # type: ignore[attr-defined]
    assert other == {
        "topic": b"t",
        "url": f"{alive.base}/wrong",
        "reason": "status 404",
        "next": "it has no recovery url, nothing follows",
        "tracing": b"",
    }


async def test_a_hostile_peer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with broadcaster(hmac_auth) as one:
        for n in range(100):
            request = Peer().notify(b"t", b"%d" % n)
            assert (await exchange(one.port, request.bytes())).status == 401
        response = await one.notify()
        assert response == 0
    refused = [m for m in caplog.messages if "answered 401" in m]
    assert len(refused) == PER_DESTINATION


# The command


def secrets_of(directory: Path, kind: str, canaries: list[str]) -> None:
    """Secrets that can be told from anything else in a log, however they are written there."""
    for n in range(2):
        secret = f"canary-{kind}-{n}-" + "k" * 60
        if kind == "hmac":
            secret = base64.urlsafe_b64encode(secret.encode()[:64]).decode()
        canaries.append(secret)
    result = run(
        "lonelypss", "setup",
        *(f"--{d}-auth={kind}" for d in ("to-broadcasters", "to-subscribers")),
        f"--to-broadcasters-secret={canaries[-2]}", f"--to-subscribers-secret={canaries[-1]}",
        cwd=directory,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def events(program: Program) -> list[dict[str, Any]]:
    return [as_json(line) for line in program.rest()]


async def send_all_kinds(url: str, directory: Path, recovery: str) -> None:
    """Messages and refusals of all kinds, with topics and urls that try to break lines."""
    port = int(url.rpartition(":")[2])
    auth = secretsfile.load((directory / "subscriber-secrets.json").read_text(), None)
    peer = Peer(auth)
    topic = b"t\r\n2026-01-01 00:00:00,000 ERROR x: forged\x00\xff"
    dead = f"http://127.0.0.1:{free_port()}/"
    requests = [
        peer.subscribe(dead + "gone", topic, recovery),
        peer.subscribe("http://user:canary-password@h/", topic),
        peer.subscribe("http://h/\r\nforged", topic),
        peer.notify(topic, b"x", tracing=CONTEXT),
        Peer().notify(topic, b"x"),
    ]
    for request in requests:
        await exchange(port, request.bytes())
    for value in ("Bearer canary-wrong-token", "X-HMAC 1:canary-wrong", "canary-nothing"):
        request = peer.notify(topic)
        request.authorization = value
        assert (await exchange(port, request.bytes())).status in (401, 403, 400)
    await exchange(
        port, b"POST /v1/notify HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nnonsense!"
    )


@pytest.mark.parametrize("kind", ["hmac", "token"])
@pytest.mark.parametrize("form", ["json", "text"])
def test_no_secrets_and_no_broken_lines(tmp_path: Path, kind: str, form: str) -> None:
    canaries = ["canary-password", "canary-wrong", "canary-nothing", "canary-hmac", "canary-token"]
    secrets_of(tmp_path, kind, canaries)
    options = [f"--log-format={form}", "--log-level=debug", "--sweep-missed-interval=0.1"]
    options += ["--missed-constant=0", "--missed-jitter=0", "--missed-expo-factor=0"]
    with serving(tmp_path, *options) as (program, url):
        recovery = f"http://127.0.0.1:{free_port()}/recover"
        asyncio.run(send_all_kinds(url, tmp_path, recovery))
        socket = url.replace("http", "ws")
        sent = run("lonelypsc", "notify", "t", "x", f"--broadcaster={socket}", cwd=tmp_path)
        assert sent.returncode == 0, sent.stderr
        program.line("MISSED notice about")
        assert program.stop() == 0
        output = program.rest()
    whole = "\n".join([*output, sent.stdout, sent.stderr])
    assert [secret for secret in canaries if secret in whole] == []
    if form == "text":
        start = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w.]+: |\{\"event\"|  "
        assert [line for line in output if not re.match(start, line)] == []
        assert not [line for line in output if line.startswith("2026-01-01 00:00:00,000")]
        return
    found = [as_json(line) for line in output]
    (failed,) = [e for e in found if e.get("message", "").startswith("delivery of topic")]
    assert failed["url"].endswith("/gone")
    assert failed["topic"].startswith("t\r\n2026")
    assert "cannot connect" in failed["reason"]
    assert failed["next"] == "a MISSED notice follows"
    assert failed["trace_id"] == CONTEXT.decode().split("-")[1]
    refused = [e for e in found if e.get("status") in (401, 403)]
    assert {(e["path"], e["client"]) for e in refused} == {("/v1/notify", "127.0.0.1")}
    notice = next(e for e in found if e.get("message", "").startswith("MISSED notice about"))
    assert notice["url"] == recovery
    assert notice["attempt"] == 1


def test_workers_log_json_under_their_own_ids(tmp_path: Path) -> None:
    options = ["--log-format=json", "--workers=2", "--db=sqlite:///x.db"]
    with serving(tmp_path, *options) as (program, _):
        for _ in range(2):
            program.line("other broadcasters reach")
        assert program.stop() == 0
        lines = events(program)
    warned = [e for e in lines if "no authorization" in e.get("message", "")]
    assert [e["level"] for e in warned] == ["warning"]
    reached = [e["pid"] for e in lines if "other broadcasters reach" in e.get("message", "")]
    assert len({*reached, program.process.pid}) == 3


def test_errors_of_the_command_are_json_too(tmp_path: Path) -> None:
    secret = "postgresql://me:canary-password@127.0.0.1:1/db"
    arguments = ["--log-format=json", f"--db={secret}", "--db-timeout=0.5"]
    with started(command("lonelypss", "serve", *arguments), tmp_path) as program:
        assert program.process.wait(40) == 1
        *_, last = events(program)
    assert "the database is not available" in last["message"]
    assert last["level"] == "critical"
    assert "canary" not in "".join(program.seen)


def test_last_words(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    error = raised("why")
    logs._log_last_words(type(error), error, error.__traceback__)
    (line,) = [JsonFormatter(bytes).format(r) for r in caplog.records]
    assert as_json(line)["exception"].endswith("RuntimeError: why")
