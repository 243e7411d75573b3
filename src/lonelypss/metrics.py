"""What a broadcaster counts about itself, for Prometheus.

`Metrics` counts nothing, and is what everybody is given by default. `PrometheusMetrics` counts, and
has the endpoint /metrics. Workers of one command share their numbers through files in a directory
that `lonelypss serve` makes (PROMETHEUS_MULTIPROC_DIR), so that any of them answers for all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lonelypss.asgi import ASGIApp, Receive, Scope, Send, respond
from lonelypss.config import ConfigError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_QUICK = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0)
_SLOW = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)

GAUGES = {
    "ready": "1 while /readyz says 200, else 0; of workers the worst.",
    "websockets": "Open websockets.",
    "websocket_queue": "Messages that wait for a websocket with a full window.",
    "outgoing_connections": "Connections to subscribers.",
    "outgoing_queue": "Deliveries that wait for a connection.",
    "notifies_in_flight": "Messages that are being delivered.",
    "notifies_limit": "max_notifies, of all workers.",
    "websockets_limit": "max_websockets, of all workers.",
    "spool_bytes": "Bytes of spool_quota in use.",
    "spool_quota_bytes": "spool_quota, of all workers.",
    "missed_backlog": "MISSED notices in the database, due or not, of all broadcasters.",
    "subscriptions": "Subscriptions in the database.",
}
"""What `Metrics.sample` is given, and its help."""


class Metrics:
    """Counts nothing."""

    table: Mapping[str, ASGIApp] = {}
    enabled = False

    def request(self, path: str, status: int, seconds: float) -> None:
        """An HTTP request was answered."""

    def matched(self, seconds: float) -> None:
        """The subscriptions of a topic were found."""

    def notified(self, transport: str, seconds: float) -> None:
        """A publisher got its answer."""

    def delivered(self, outcome: str, seconds: float) -> None:
        """A delivery to a url ended as confirmed, failed, skipped or unsubscribed."""

    def queued(self, websockets: int) -> None:
        """A message was queued for so many websockets."""

    def notice(self, outcome: str, number: int = 1) -> None:
        """MISSED notices were recorded, confirmed, retried or given_up."""

    def looped(self) -> None:
        """A message was refused because it goes round in circles."""

    def pruned(self, subscriptions: int) -> None:
        """A url gave no sign of life, and its subscriptions were removed."""

    def breaker(self, state: str) -> None:
        """A host is now open (left alone), half_open (being tried) or closed (works again)."""

    def url_refused(self, kind: str) -> None:
        """A url that wanted to subscribe was refused, for its `url-syntax` or by `url-policy`."""

    def sample(self, values: Mapping[str, float], breakers: Mapping[str, int]) -> None:
        """The present values of `GAUGES`, and how many hosts there are in which state."""


NO_METRICS = Metrics()


class PrometheusMetrics(Metrics):
    """See the module's text.

    Raises:
        ConfigError: the package is missing.
    """

    enabled = True

    def __init__(self) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as e:
            raise ConfigError(f"metrics: {e}: pip install 'lonelypsc[metrics]'") from None
        self._prometheus = prometheus
        self._shared = bool(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
        registry = self._registry = prometheus.CollectorRegistry()

        def histogram(name: str, help: str, *labels: str, buckets: tuple[float, ...]) -> Any:
            return prometheus.Histogram(
                f"lonelypss_{name}_seconds", help, labels, buckets=buckets, registry=registry
            )

        def counter(name: str, help: str, *labels: str) -> Any:
            return prometheus.Counter(f"lonelypss_{name}", help, labels, registry=registry)

        self._requests = counter("requests", "HTTP requests answered.", "path", "status")
        self._request_time = histogram(
            "request", "Time to answer an HTTP request.", "path", buckets=_SLOW
        )
        self._match_time = histogram(
            "match", "Time to find the subscriptions of a topic.", buckets=_QUICK
        )
        self._notify_time = histogram(
            "notify", "Time until a publisher has its answer.", "transport", buckets=_SLOW
        )
        deliveries = histogram(
            "delivery", "Time of one delivery to a url.", "outcome", buckets=_SLOW
        )
        self._deliveries = {
            o: deliveries.labels(o) for o in ("confirmed", "failed", "skipped", "unsubscribed")
        }
        self._notify_by = {t: self._notify_time.labels(t) for t in ("http", "websocket")}
        self._queued = counter("websocket_deliveries", "Copies queued for websockets.")
        self._notices = counter(
            "missed_notices", "MISSED notices by what became of them.", "outcome"
        )
        self._loops = counter("loops", "Messages refused because of max_hops.")
        for outcome in ("recorded", "confirmed", "retried", "given_up"):
            self._notices.labels(outcome)  # from 0 on: the first one counts in an increase()
        self._pruned = counter(
            "subscriptions_pruned", "Subscriptions of urls without a sign of life, removed."
        )
        self._transitions = counter(
            "breaker_transitions", "Hosts that are left alone, tried, or work again.", "to"
        )
        for state in ("open", "half_open", "closed"):
            self._transitions.labels(state)
        self._refused_urls = counter("refused_urls", "Urls that may not subscribe.", "kind")
        for kind in ("url-syntax", "url-policy"):
            self._refused_urls.labels(kind)
        self._breakers = prometheus.Gauge(
            "lonelypss_breakers",
            "Hosts of subscribers: closed, connected; open, left alone; half_open, being tried.",
            ("state",),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._gauges = {
            name: prometheus.Gauge(
                f"lonelypss_{name}",
                help,
                registry=registry,
                multiprocess_mode=_MODES.get(name, "livesum"),
            )
            for name, help in GAUGES.items()
        }
        self.table = {"/metrics": self.scrape}

    def request(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, status).inc()
        self._request_time.labels(path).observe(seconds)

    def matched(self, seconds: float) -> None:
        self._match_time.observe(seconds)

    def notified(self, transport: str, seconds: float) -> None:
        self._notify_by[transport].observe(seconds)

    def delivered(self, outcome: str, seconds: float) -> None:
        self._deliveries[outcome].observe(seconds)

    def queued(self, websockets: int) -> None:
        self._queued.inc(websockets)

    def notice(self, outcome: str, number: int = 1) -> None:
        self._notices.labels(outcome).inc(number)

    def looped(self) -> None:
        self._loops.inc()

    def pruned(self, subscriptions: int) -> None:
        self._pruned.inc(subscriptions)

    def breaker(self, state: str) -> None:
        self._transitions.labels(state).inc()

    def url_refused(self, kind: str) -> None:
        self._refused_urls.labels(kind).inc()

    def sample(self, values: Mapping[str, float], breakers: Mapping[str, int]) -> None:
        for name, value in values.items():
            self._gauges[name].set(value)
        for state, number in breakers.items():
            self._breakers.labels(state).set(number)

    async def scrape(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["method"] != "GET":
            await respond(send, 405, b'{"detail":"Method Not Allowed"}', b"application/json")
            return
        prometheus = self._prometheus
        text = prometheus.generate_latest(self._everybody())
        await respond(send, 200, text, prometheus.CONTENT_TYPE_LATEST.encode())

    def _everybody(self) -> CollectorRegistry:
        """Our numbers, or those of all workers."""
        if not self._shared:
            return self._registry
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = self._prometheus.CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry


# each worker counts the same rows, whether it is alive or not
_MODES: dict[str, Any] = {"missed_backlog": "max", "subscriptions": "max", "ready": "livemin"}


def forget_worker(pid: int) -> None:
    """A worker process has died: what it had open is not open any more."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(pid)  # type: ignore[no-untyped-call]
