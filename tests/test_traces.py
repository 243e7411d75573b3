"""Spans of OpenTelemetry's own SDK, through a real publisher, broadcaster and subscriber."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.propagate import extract
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    Decision,
    Sampler,
    SamplingResult,
)
from opentelemetry.trace import SpanKind, StatusCode

from broadcaster.harness import Peer, exchange
from interop.peers import write_secrets
from lonelypsc.client import PubSubClient
from lonelypsc.config.config import make_http_pub_sub_config
from lonelypsc.config.ws_config import make_websocket_pub_sub_config
from lonelypsc.http_client import HttpPubSubClient
from lonelypsc.ws_client import WebsocketPubSubClient
from lonelypsp.tracecontext import hops
from lonelypss.app import App, Broadcaster
from lonelypss.config import BroadcasterConfig, ConfigError
from lonelypss.store.base import Kind
from lonelypss.tracing import OpenTelemetry
from programs import command, free_port, run, started
from servers import read_auth, serve

DEADLINE = 20.0
FAST_NOTICES: dict[str, Any] = {
    "missed_expo_factor": 0.0,
    "missed_constant": 0.0,
    "missed_jitter": 0.0,
    "sweep_missed_interval": 0.1,
}


@dataclass
class Spans:
    """Where spans of all parties end up."""

    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)
    provider: TracerProvider = field(default_factory=TracerProvider)

    def __post_init__(self) -> None:
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    @property
    def all(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    async def named(self, *names: str) -> list[ReadableSpan]:
        """Waits until there is a span of each name; the first of each."""
        while True:
            found = [[s for s in self.all if s.name == name] for name in names]
            if all(found):
                return [spans[0] for spans in found]
            await asyncio.sleep(0.005)


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def trace_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.trace_id


def about(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def assert_one_trace(*spans: ReadableSpan) -> None:
    """Each is the parent of the next."""
    assert len({trace_of(span) for span in spans}) == 1
    for parent, child in pairwise(spans):
        assert parent_of(child) == id_of(parent), (parent.name, child.name)


@dataclass
class World:
    transport: str
    broadcaster: Broadcaster
    url: str
    secrets: Path
    stack: AsyncExitStack

    async def client(self, transport: str = "", **settings: Any) -> PubSubClient:
        auth = read_auth(self.secrets)
        if (transport or self.transport) == "websocket":
            host = self.url.replace("http", "ws", 1)
            client = WebsocketPubSubClient(
                make_websocket_pub_sub_config(broadcasters=[{"host": host}], auth=auth, **settings)
            )
        else:
            settings.setdefault("host", "http://127.0.0.1:{port}")
            client = HttpPubSubClient(
                make_http_pub_sub_config(
                    bind={"type": "uvicorn", "host": "127.0.0.1", "port": 0},
                    broadcasters=[{"host": self.url}],
                    auth=auth,
                    **settings,
                )
            )
        return await self.stack.enter_async_context(client)


@asynccontextmanager
async def world_of(
    transport: str, directory: Path, spans: Spans | None, **options: Any
) -> AsyncIterator[World]:
    secrets = write_secrets(directory, "hmac")
    config = BroadcasterConfig(**{"db": "sqlite://", **options})
    tracing = None if spans is None else OpenTelemetry(spans.provider)
    broadcaster = Broadcaster(replace(config, auth=read_auth(secrets)), tracing=tracing)
    async with serve(App(broadcaster)) as url, AsyncExitStack() as stack:
        async with asyncio.timeout(DEADLINE):
            yield World(transport, broadcaster, url, secrets, stack)


@pytest.fixture(params=["http", "websocket"])
def transport(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def spans() -> Spans:
    return Spans()


async def test_one_trace(transport: str, tmp_path: Path, spans: Spans) -> None:
    tracer = trace.get_tracer("program", tracer_provider=spans.provider)
    async with world_of(transport, tmp_path, spans) as world:
        client = await world.client(tracing=spans.provider)

        async def on_receiving() -> None: ...

        async with client.subscribe_exact(b"orders/1", on_receiving=on_receiving) as subscription:
            messages = await subscription.messages()
            with tracer.start_as_current_span("publish"):
                await client.notify(topic=b"orders/1", data=b"paid")
            message = await anext(messages)
            with tracer.start_as_current_span("handle"):
                pass
            assert "traceparent" in message.trace_context
            ours = tracer.start_span("later", context=extract(message.trace_context))
            ours.end()
        names = ["publish", "notify", "fan out", "deliver", "receive", "process"]
        chain = await spans.named(*names)
        handled, later, recovered = await spans.named("handle", "later", "recover")
    assert_one_trace(*chain, handled)
    assert_one_trace(*chain, later)
    assert trace_of(recovered) != trace_of(handled)
    notify, fan_out, deliver = chain[1:4]
    assert [s.kind for s in chain[1:]] == [
        SpanKind.PRODUCER,
        SpanKind.SERVER,
        SpanKind.CLIENT if transport == "http" else SpanKind.PRODUCER,
        SpanKind.CONSUMER,
        SpanKind.CONSUMER,
    ]
    for span in chain[1:]:
        assert (
            about(span).items()
            >= {
                "messaging.system": "lonelyps",
                "messaging.destination.name": "orders/1",
                "messaging.message.body.size": 4,
                "lonelyps.topic.size": 8,
            }.items()
        )
        assert span.status.status_code is StatusCode.UNSET
    assert [about(s)["messaging.operation.type"] for s in chain[1:]] == [
        *["send"] * 3,
        "receive",
        "process",
    ]
    assert about(notify)["lonelyps.subscribers"] == about(fan_out)["lonelyps.subscribers"] == 1
    assert about(fan_out)["lonelyps.transport"] == transport
    assert about(fan_out)["lonelyps.outcome"] == "answered"
    if transport == "http":
        assert about(deliver)["lonelyps.outcome"] == "confirmed"
        assert about(deliver)["server.address"] == "127.0.0.1"
    else:
        assert about(deliver)["messaging.batch.message_count"] == 1


@pytest.mark.parametrize("size", [2000, 20_000, 300_000])
async def test_one_trace_for_each_subscriber(tmp_path: Path, spans: Spans, size: int) -> None:
    """Messages of all sizes, from a websocket to a websocket and a url."""
    async with world_of("http", tmp_path, spans, outgoing_max_ws_message_size=4096) as world:
        options: Any = {"tracing": spans.provider, "message_body_spool_size": 100_000}
        by_http = await world.client("http", **options)
        by_websocket = await world.client("websocket", max_websocket_message_size=5000, **options)
        async with by_http.subscribe_exact(b"t") as one, by_websocket.subscribe_exact(b"t") as two:
            readers = [await one.messages(), await two.messages()]
            assert (await by_websocket.notify(topic=b"t", data=b"x" * size)).notified == 2
            for reader in readers:
                assert len((await anext(reader)).data.read()) == size
        (fan_out,) = await spans.named("fan out")
    found: dict[str, list[ReadableSpan]] = {}
    for span in spans.all:
        if trace_of(span) == trace_of(fan_out):
            found.setdefault(span.name, []).append(span)
    counts = {name: len(spans) for name, spans in found.items()}
    assert counts == {"notify": 1, "fan out": 1, "deliver": 2, "receive": 2, "process": 2}
    assert {parent_of(s) for s in found["deliver"]} == {id_of(fan_out)}
    assert {parent_of(s) for s in found["receive"]} == {id_of(s) for s in found["deliver"]}


async def test_a_broadcaster_that_records_nothing_does_not_cut_it(
    transport: str, tmp_path: Path, spans: Spans
) -> None:
    async with world_of(transport, tmp_path, None) as world:
        client = await world.client(tracing=spans.provider)
        async with client.subscribe_exact(b"t") as subscription:
            messages = await subscription.messages()
            await client.notify(topic=b"t", data=b"x")
            await anext(messages)
        assert_one_trace(*await spans.named("notify", "receive", "process"))


async def test_a_client_that_records_nothing_still_shows_it(
    transport: str, tmp_path: Path, spans: Spans
) -> None:
    async with world_of(transport, tmp_path, spans) as world:
        client = await world.client()
        async with client.subscribe_exact(b"t") as subscription:
            messages = await subscription.messages()
            await client.notify(topic=b"t", data=b"x")
            message = await anext(messages)
            (deliver,) = await spans.named("deliver")
            parent = trace.get_current_span(extract(message.trace_context)).get_span_context()
            assert (parent.trace_id, parent.span_id) == (trace_of(deliver), id_of(deliver))
            assert trace.get_current_span() is trace.INVALID_SPAN


async def test_receivers_run_in_it(transport: str, tmp_path: Path, spans: Spans) -> None:
    seen: list[tuple[int, dict[str, str]]] = []

    class Receiver:
        async def on_message(self, message: Any) -> None:
            seen.append(
                (trace.get_current_span().get_span_context().span_id, message.trace_context)
            )
            await message.cleanup()

    async with world_of(transport, tmp_path, spans) as world:
        client = await world.client(tracing=spans.provider)
        await client.direct_register_on_message(receiver=Receiver())
        await client.direct_subscribe_exact(topic=b"t")
        await client.notify(topic=b"t", data=b"x")
        chain = await spans.named("notify", "fan out", "deliver", "receive")
    assert_one_trace(*chain)
    assert [span for span, _ in seen] == [id_of(chain[-1])]
    assert f"{id_of(chain[-1]):016x}" in seen[0][1]["traceparent"]


async def test_the_span_of_a_message_ends_with_it(tmp_path: Path, spans: Spans) -> None:
    """It is current while the program deals with the message, not before and not after, and knows
    of the program's errors."""
    current = trace.get_current_span
    async with world_of("http", tmp_path, spans) as world:
        client = await world.client(tracing=spans.provider)
        with pytest.raises(LookupError, match="no such order"):  # noqa: PT012
            async with client.subscribe_exact(b"t") as subscription:
                messages = await subscription.messages()
                for _ in range(2):
                    await client.notify(topic=b"t", data=b"x")
                await anext(messages)
                first = current().get_span_context().span_id
                # what another task iterates is no business of this one
                await asyncio.create_task(anext(messages))  # type: ignore[arg-type]
                assert current().get_span_context().span_id in (0, first)
                raise LookupError("no such order")
        await spans.named("process")
    one, two = [s for s in spans.all if s.name == "process"]
    assert id_of(one) == first
    assert (one.status.status_code, two.status.status_code) == (StatusCode.UNSET, StatusCode.ERROR)
    assert about(two)["error.type"] == "LookupError"


class DropsState(Sampler):
    """As some that people write: it takes everything, and forgets the tracestate."""

    def should_sample(self, *_: Any, **__: Any) -> SamplingResult:
        return SamplingResult(Decision.RECORD_AND_SAMPLE)

    def get_description(self) -> str:
        return "drops state"


SAMPLERS = {"on": ALWAYS_ON, "off": ALWAYS_OFF, "drops state": DropsState()}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
async def test_hops_are_counted_in_it(transport: str, tmp_path: Path, sampler: Sampler) -> None:
    provider = TracerProvider(sampler=sampler)
    async with world_of(transport, tmp_path, Spans(provider=provider), max_hops=2) as world:
        client = await world.client(tracing=provider)
        async with client.subscribe_exact(b"t") as subscription:
            messages = await subscription.messages()
            await client.notify(topic=b"t", data=b"x")
            for number in range(3):
                message = await anext(messages)
                assert hops(message.tracing) == number
                if number < 2:
                    await client.notify(topic=b"t", data=b"x", forwarding=message)


async def test_failed_deliveries_and_their_notices(tmp_path: Path, spans: Spans) -> None:
    """A url that nobody listens at, one that cannot be used, and a notice that arrives."""
    recovering = asyncio.Event()
    inside: list[int] = []

    async def on_receiving() -> None:
        inside.append(trace.get_current_span().get_span_context().trace_id)
        recovering.set()

    dead = f"http://127.0.0.1:{free_port()}/gone"
    async with world_of("http", tmp_path, spans, **FAST_NOTICES) as world:
        client = await world.client(tracing=spans.provider)
        async with client.subscribe_exact(b"other", on_receiving=on_receiving) as subscription:
            reading = asyncio.ensure_future(anext(await subscription.messages()))
            await recovering.wait()
            recovering.clear()
            (row,) = await world.broadcaster.store.match(b"other")
            await world.broadcaster.store.subscribe(Kind.EXACT, b"t", dead, row.recovery)
            await world.broadcaster.store.subscribe(Kind.EXACT, b"t", "ftp://h/", None)
            assert (await client.notify(topic=b"t", data=b"x")).notified == 0
            await recovering.wait()
            reading.cancel()
        fan_out, missed = await spans.named("fan out", "missed")
    failed = {about(s)["url.full"]: s for s in spans.all if s.name == "deliver"}
    assert set(failed) == {dead, "ftp://h/"}
    for span in failed.values():
        assert parent_of(span) == id_of(fan_out)
        assert about(span)["lonelyps.outcome"] == "failed"
        assert about(span)["error.type"] == "failed"
        assert span.status.status_code is StatusCode.ERROR
    assert "cannot connect" in (failed[dead].status.description or "")
    assert "url refused" in (failed["ftp://h/"].status.description or "")
    assert about(fan_out)["lonelyps.failed"] == 2
    notices = [s for s in spans.all if s.name == "missed" and trace_of(s) == trace_of(missed)]
    assert {s.kind for s in notices} == {SpanKind.CLIENT, SpanKind.CONSUMER}
    sent, got = sorted(notices, key=lambda s: s.kind is SpanKind.CONSUMER)
    (recover,) = [s for s in spans.all if s.name == "recover" and parent_of(s) == id_of(got)]
    assert_one_trace(sent, got, recover)
    assert inside[-1] == trace_of(recover)
    assert about(sent)["lonelyps.attempt"] == 1


async def test_refused_messages(tmp_path: Path, spans: Spans) -> None:
    """Who has no right to send leaves no span at the broadcaster; what goes wrong later does."""
    async with world_of("http", tmp_path, spans, spool_quota=1000) as world:
        options: Any = {"tracing": spans.provider, "outgoing_retries_per_broadcaster": 1}
        client = await world.client(**options)
        with pytest.raises(Exception, match="413"):
            await client.notify(topic=b"t", data=b"x" * 11 * 1024 * 1024)
        notify, fan_out = await spans.named("notify", "fan out")
        assert_one_trace(notify, fan_out)
        assert about(fan_out)["lonelyps.outcome"] == "refused"
        assert {s.status.status_code for s in (notify, fan_out)} == {StatusCode.ERROR}
        spans.exporter.clear()
        directory = tmp_path / "others"
        directory.mkdir()
        world.secrets = write_secrets(directory, "hmac")
        stranger = await world.client(**options)
        with pytest.raises(Exception, match="403"):
            await stranger.notify(topic=b"t", data=b"x")
        assert [s.name for s in spans.all] == ["notify"]


class Faulty(SpanProcessor):
    def __init__(self, *fail: str) -> None:
        self.fail = fail

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        if "start" in self.fail:
            raise RuntimeError("on_start")

    def on_end(self, span: ReadableSpan) -> None:
        if "end" in self.fail:
            raise RuntimeError("on_end")


class FaultyExporter(SpanExporter):
    def export(self, spans: Any) -> Any:
        raise OSError("no route to the collector")


class FaultySampler:
    def should_sample(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("sampler")

    def get_description(self) -> str:
        return "faulty"


class NoProvider:
    def get_tracer(self, *_: Any, **__: Any) -> Any:
        return object()  # which can do nothing


def _with(processor: Any) -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(processor)
    return provider


PROVIDERS = {
    "start": lambda: _with(Faulty("start")),
    "end": lambda: _with(Faulty("end")),
    "exporter": lambda: _with(SimpleSpanProcessor(FaultyExporter())),
    "sampler": lambda: TracerProvider(sampler=FaultySampler()),  # type: ignore[arg-type]
    "no tracer": NoProvider,
    "never sampled": lambda: TracerProvider(sampler=ALWAYS_OFF),
}


@pytest.mark.parametrize("make", PROVIDERS.values(), ids=PROVIDERS)
async def test_no_fault_of_a_provider_touches_a_message(
    transport: str, tmp_path: Path, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spans = Spans(provider=make()) if make is not NoProvider else None
    provider = NoProvider() if spans is None else spans.provider
    secrets = write_secrets(tmp_path, "hmac")
    config = BroadcasterConfig(db="sqlite://", auth=read_auth(secrets))
    broadcaster = Broadcaster(config, tracing=OpenTelemetry(provider))
    async with serve(App(broadcaster)) as url, AsyncExitStack() as stack:
        async with asyncio.timeout(DEADLINE):
            client = await World(transport, broadcaster, url, secrets, stack).client(
                tracing=provider
            )
            async with client.subscribe_exact(b"t") as subscription:
                messages = await subscription.messages()
                for n in range(20):
                    assert (await client.notify(topic=b"t", data=b"%d" % n)).notified == 1
                    assert (await anext(messages)).data.read() == b"%d" % n
    lines = [r for r in caplog.records if "spans are lost" in r.getMessage()]
    assert len(lines) < 20  # not one for each


OFF = """
    import asyncio, sys
    from lonelypsc.config.config import make_http_pub_sub_config
    from lonelypsc.config.ws_config import make_websocket_pub_sub_config
    from lonelypsc.http_client import HttpPubSubClient
    from lonelypsc.ws_client import WebsocketPubSubClient
    from lonelypsp.signing import AuthConfig, Nothing
    from lonelypss.app import App, Broadcaster
    from lonelypss.config import BroadcasterConfig
    from servers import serve

    async def main():
        async with serve(App(Broadcaster(BroadcasterConfig(db="sqlite://")))) as url:
            http = HttpPubSubClient(make_http_pub_sub_config(
                bind={"type": "uvicorn", "host": "127.0.0.1", "port": 0},
                host="http://127.0.0.1:{port}", broadcasters=[{"host": url}],
                auth=AuthConfig(Nothing(), Nothing())))
            socket = WebsocketPubSubClient(make_websocket_pub_sub_config(
                broadcasters=[{"host": url.replace("http", "ws")}],
                auth=AuthConfig(Nothing(), Nothing())))
            for client in (http, socket):
                async with client, client.subscribe_exact(b"t") as subscription:
                    messages = await subscription.messages()
                    assert (await client.notify(topic=b"t", data=b"x")).notified == 1
                    assert (await anext(messages)).trace_context == {}

    asyncio.run(main())
    assert not [m for m in sys.modules if m.startswith("opentelemetry")]
"""


def test_off_imports_nothing() -> None:
    code = textwrap.dedent(OFF)
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).parent,
        check=True,
        timeout=DEADLINE,
    )


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.startswith(("opentelemetry", "lonelypsp.otel"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delattr("lonelypsp.otel", raising=False)
    with pytest.raises(ConfigError, match=r"tracing: .* pip install 'lonelypsc\[otel\]'"):
        Broadcaster(BroadcasterConfig(db="sqlite://", tracing=True))
    config = make_websocket_pub_sub_config(
        broadcasters=[{"host": "ws://127.0.0.1:1"}], auth=read_auth(None), tracing=True
    )
    with pytest.raises(ValueError, match=r"tracing: .* pip install 'lonelypsc\[otel\]'"):
        WebsocketPubSubClient(config)


# The command sends them


@contextmanager
def collector() -> Iterator[tuple[str, Callable[[], list[tuple[str, str, bytes]]]]]:
    """What takes spans by OTLP: its url, and (service, name, trace id) of the spans it has."""
    requests: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    def spans() -> list[tuple[str, str, bytes]]:
        return [
            (attribute.value.string_value, span.name, span.trace_id)
            for request in list(requests)
            for resource in request.resource_spans
            for attribute in resource.resource.attributes
            if attribute.key == "service.name"
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", spans
        finally:
            server.shutdown()
            thread.join()


def test_serve_sends_its_spans(tmp_path: Path) -> None:
    """From workers, to where the variables of OpenTelemetry say, the last ones when it stops; the
    log names their traces."""
    dead = f"http://127.0.0.1:{free_port()}/"
    with collector() as (endpoint, spans):
        options = ["--workers=2", "--db=sqlite:///x.db", "--tracing=true", "--log-format=json"]
        argv = command("lonelypss", "serve", "--json", "--port=0", *options)
        with started(argv, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as program:
            url = program.event("listening")["url"]
            asyncio.run(_subscribe(url, dead))
            sent = run("lonelypsc", "notify", "t", "x", f"--broadcaster={url}", cwd=tmp_path)
            assert sent.returncode == 0, sent.stderr
            failed = json.loads(program.line("delivery of topic"))
            assert program.stop() == 0
        found = [s for s in spans() if s[2].hex() == failed["trace_id"]]
    assert sorted(found)[:2] == [
        ("lonelypss", "deliver", found[0][2]),
        ("lonelypss", "fan out", found[0][2]),
    ]


async def _subscribe(url: str, subscriber: str) -> None:
    port = int(url.rpartition(":")[2])
    request = Peer().subscribe(subscriber, b"t")
    response = await exchange(port, request.bytes())
    assert response.status == 200, response


def test_a_collector_that_is_away_holds_up_nothing(tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    argv = command("lonelypss", "serve", "--json", "--port=0", "--db=sqlite://", "--tracing=true")
    with started(argv, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as program:
        url = program.event("listening")["url"]
        sent = run("lonelypsc", "notify", "t", "x", f"--broadcaster={url}", cwd=tmp_path)
        assert sent.returncode == 0, sent.stderr
        began = time.monotonic()
        assert program.stop() == 0
        assert time.monotonic() - began < 8  # an exporter by itself takes 10


def test_serve_without_an_exporter(tmp_path: Path) -> None:
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("")
    argv = ["--port=0", "--tracing=true"]
    result = run("lonelypss", "serve", *argv, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("lonelypss: tracing: ")
    assert last.endswith("pip install 'lonelypsc[otlp]'")
