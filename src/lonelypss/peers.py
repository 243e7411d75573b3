"""How messages from other broadcasters reach the websockets of this process.

In the database each process is one more subscriber, with a url of its own, to all that its
websockets want. `Registry` knows what that is and keeps the rows in step; `Peers` owns the url: the
listener behind it, the two endpoints, and the lease that lets others remove the rows of a process
that was killed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from functools import partial
from itertools import islice
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from lonelypsp.bodies import (
    UNSUBSCRIBE_IMMEDIATE,
    Missed,
    ReceiveHead,
    ResponseConfirmMissed,
    ResponseConfirmReceive,
)
from lonelypsp.digest import repr_digest
from lonelypsp.errors import AuthResult
from lonelypsp.guard import identity
from lonelypsp.interests import Interests, Topics
from lonelypsp.spool import Body
from lonelypsp.wire import HeadParser, decode, encode
from lonelypss.asgi import ASGIApp, Receive, Scope, Send, respond
from lonelypss.config import BroadcasterConfig, ConfigError, Database
from lonelypss.intake import Intake, fill
from lonelypss.routes import _AUTH_TEXTS, Refused, Route, _chunk
from lonelypss.store.base import Kind, Store, StoreUnavailable, Subscription
from lonelypss.tls import listening
from lonelypss.tracing import NO_TRACING, MessageStep, Tracing
from lonelypss.urlpolicy import PEER_PATHS, UrlRefused, parse_target

log = logging.getLogger(__name__)

V = TypeVar("V", bound=Hashable)
_Key: TypeAlias = bytes | str
"""An exact topic, or a glob."""

RECEIVE, MISSED = PEER_PATHS
_AT_ONCE = 1000  # rows in the hands of the store
_MAX_MISSED = 2 * (2 + 65_535)
_RETRY_PAUSE = 1.0
_GRACE = 5


class Registry(Generic[V]):
    """Who of the websockets of this process wants what, and the rows in the database for it.

    Rows follow what is wanted: whenever the first wants a topic or the last gives it up, the topic
    is marked, and one task at a time writes what is marked. So it does not matter in which order
    owners come and go, or which of them fail.

    Attributes:
        url: where other broadcasters send messages; None: there are no others, and no rows.
        recovery: where they announce what could not be delivered.
        match: `match(topic)` gives each owner that wants `topic`, once.
    """

    def __init__(self) -> None:
        self.url: str | None = None
        self.recovery: str | None = None
        self._store: Store
        self._interests: Interests[V] = Interests()
        self.match: Callable[[bytes], list[V]] = self._interests.match
        self._owned: dict[V, set[_Key]] = {}
        # True: the row is there, and nobody removes it. False: it may be there. Else it is not.
        self._rows: dict[_Key, bool] = {}
        self._marked: dict[_Key, asyncio.Future[Exception | None]] = {}
        self._writing: asyncio.Task[None] | None = None
        self._one_writer = asyncio.Lock()

    # what owners want

    async def add(self, owner: V, topics: Topics) -> None:
        """Lets `owner` get `topics`, those it has already left out.

        Returns once messages that start afterwards, at any broadcaster, reach it. If that fails, or
        is cancelled, `owner` gets none of the new ones.

        Raises:
            StoreUnavailable: other broadcasters cannot be told.
        """
        owned = self._owned.setdefault(owner, set())
        new = [key for key in _keys(topics) if key not in owned]
        owned.update(new)
        self._interests.add(owner, _topics(new))
        if self.url is None:
            return
        try:
            await _all([self._mark(key) for key in new if not self._rows.get(key)])
        except BaseException:
            self._take_back(owner, new)
            raise

    async def remove(self, owner: V, topics: Topics) -> None:
        """From now on `owner` gets none of `topics`; returns when other broadcasters know.

        If they cannot be told now, they are later. Nobody but them needs to care.
        """
        if pending := self._take_back(owner, _keys(topics)):
            await asyncio.wait(pending)

    def forget(self, owner: V) -> None:
        """From now on `owner` gets nothing. Other broadcasters are told in the background."""
        self._take_back(owner, self._owned.get(owner, ()))
        self._owned.pop(owner, None)

    def is_stale(self, topic: bytes) -> bool:
        """Whether a row that sends `topic` here is a mistake."""
        return not self.match(topic) and not self._marked and self._writing is None

    def _take_back(self, owner: V, keys: Iterable[_Key]) -> list[asyncio.Future[Exception | None]]:
        owned = self._owned.get(owner, set())
        gone = [key for key in keys if key in owned]
        owned.difference_update(gone)
        self._interests.give_up(_topics(gone))
        self._interests.remove(owner, _topics(gone))
        if self.url is None:
            return []
        return [self._mark(k) for k in gone if k in self._rows and not self._is_wanted(k)]

    def _is_wanted(self, key: _Key) -> bool:
        return key in (self._interests.exact if isinstance(key, bytes) else self._interests.globs)

    # the rows

    def start(self, store: Store, url: str, recovery: str) -> None:
        """From now on there are rows for `url`, at this moment none."""
        self.url, self.recovery, self._store = url, recovery, store
        self._rows.clear()
        for key in _keys(self._interests.wanted):
            self._mark(key)

    async def stop(self) -> None:
        """From now on the rows are left alone; somebody else removes them."""
        self.url = self.recovery = None
        if self._writing is not None:
            await asyncio.wait([self._writing])

    async def repair(self) -> bool:
        """Compares all rows with what is wanted, and sets them right.

        Returns:
            Whether some were gone, and so messages may have been missed.
        """
        url = self.url
        if url is None:
            return False
        async with self._one_writer:
            # in a thread, for there may be many
            found: Mapping[_Key, str | None] = await asyncio.to_thread(
                _by_key, await self._store.subscriptions(url)
            )
            wanted = dict.fromkeys(_keys(self._interests.wanted), self.recovery)
            gone = False
            if found != wanted:
                # of what is merely missing, nobody was told that it is there
                gone = any(self._rows.get(key) for key in wanted.keys() - found.keys())
                if wrong := self._wrong(found, wanted):
                    log.warning("the subscriptions of %s: %s; setting them right", url, wrong)
                    await self._set(url, wanted)
                    found = wanted
            self._rows = dict.fromkeys(found, True)
            return gone

    def _wrong(
        self, found: Mapping[_Key, str | None], wanted: Mapping[_Key, str | None]
    ) -> str | None:
        """What is wrong with the rows that were found. What is marked comes right anyway."""
        missing = wanted.keys() - found.keys() - self._marked.keys()
        surplus = found.keys() - wanted.keys() - self._marked.keys()
        changed = [key for key in found.keys() & wanted.keys() if found[key] != wanted[key]]
        if not (missing or surplus or changed):
            return None
        return (
            f"{len(missing)} are missing, {len(surplus)} too many, {len(changed)} with another"
            " recovery url"
        )

    async def _set(self, url: str, wanted: Mapping[_Key, str | None]) -> None:
        # whoever wants another one from now on must not think that it is there
        self._rows.update(dict.fromkeys(self._rows.keys() - wanted.keys(), False))
        await self._store.set_subscriptions(
            url,
            [(key, recovery) for key, recovery in wanted.items() if isinstance(key, bytes)],
            [(key, recovery) for key, recovery in wanted.items() if isinstance(key, str)],
        )

    def _mark(self, key: _Key) -> asyncio.Future[Exception | None]:
        """Has the row of `key` written; the result is why that failed, or None."""
        future = self._marked.get(key)
        if future is None:
            future = self._marked[key] = asyncio.get_running_loop().create_future()
            if self._writing is None:
                self._writing = asyncio.create_task(self._write(), name="peer subscriptions")
        return future

    async def _write(self) -> None:
        try:
            while self._marked:
                async with self._one_writer:
                    marked = dict(islice(self._marked.items(), _AT_ONCE))
                    for key in marked:
                        del self._marked[key]
                    outcomes = await asyncio.gather(*map(self._write_row, marked))
                for future, outcome in zip(marked.values(), outcomes, strict=True):
                    future.set_result(outcome)
                failed = [outcome for outcome in outcomes if outcome]
                if failed and self.url is not None:
                    log.warning(
                        "%d of %d subscriptions for other broadcasters could not be changed: %s",
                        *(len(failed), len(outcomes), failed[0]),
                    )
        finally:
            self._writing = None

    async def _write_row(self, key: _Key) -> Exception | None:
        url, store = self.url, self._store
        if url is None:
            return StoreUnavailable("this broadcaster is stopping")
        is_wanted, was_there = self._is_wanted(key), self._rows.get(key)
        if was_there is (True if is_wanted else None):
            return None
        kind, pattern = _row(key)
        self._rows[key] = False
        try:
            if not is_wanted:
                await store.unsubscribe(kind, pattern, url)
                del self._rows[key]
                return None
            if not await store.subscribe(kind, pattern, url, self.recovery):
                # A row nobody knew of. Others may be about to drop it, by its id, because they were
                # told that nobody wants it here.
                await store.unsubscribe(kind, pattern, url)
                await store.subscribe(kind, pattern, url, self.recovery)
            self._rows[key] = True
        except StoreUnavailable as e:
            return e
        except Exception as e:
            log.exception("a subscription could not be changed in an unforeseen way")
            return e
        return None


def _keys(topics: Topics) -> list[_Key]:
    return [*topics.exact, *topics.globs]


def _topics(keys: Iterable[_Key]) -> Topics:
    keys = list(keys)
    return Topics(
        frozenset(k for k in keys if isinstance(k, bytes)),
        frozenset(k for k in keys if isinstance(k, str)),
    )


def _row(key: _Key) -> tuple[Kind, bytes]:
    return (Kind.EXACT, key) if isinstance(key, bytes) else (Kind.GLOB, key.encode())


def _by_key(rows: Iterable[Subscription]) -> dict[_Key, str | None]:
    """The recovery urls of rows."""
    return {
        row.pattern if row.kind is Kind.EXACT else row.pattern.decode(): row.recovery
        for row in rows
    }


async def _all(futures: list[asyncio.Future[Exception | None]]) -> None:
    """Waits for all and raises what went wrong. Others wait, too: nobody may cancel them."""
    if futures:
        await asyncio.wait(futures)
    for future in futures:
        if (error := future.result()) is not None:
            raise error


class Local(Protocol):
    """The websockets of this process."""

    def deliver(self, topic: bytes, body: Body, step: MessageStep) -> int:
        """Queues a message for all that want it; how many. Shares `body` with the caller."""
        ...

    def missed(self, topic: bytes) -> None:
        """Tells those who want `topic` that they may have missed something."""
        ...

    def gap(self) -> None:
        """Tells all that they may have missed something."""
        ...


class Peers:
    """What other broadcasters need to reach the websockets of this process.

    Use it as an async context manager while the store is open. With a database in memory there are
    no others, and it does nothing.

    Args:
        registry: gets its rows for as long as this is entered.
        intake: where bodies are stored.
        local: gets what arrives.
        clock: unix seconds.

    Raises:
        ConfigError: `peer_url` is no url that others could use.

    Attributes:
        tls: of the port that is opened for them; None: it speaks plain HTTP.
        table: the endpoints, by path. They belong to the main port as well, where `peer_url` leads
            if it names no port of its own.
    """

    def __init__(
        self,
        config: BroadcasterConfig,
        store: Store,
        registry: Registry[Any],
        intake: Intake,
        local: Local,
        *,
        tracing: Tracing = NO_TRACING,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.store = store
        self.registry = registry
        self.intake = intake
        self.local = local
        self.tracing = tracing
        self.clock = clock
        self.table: Mapping[str, ASGIApp] = {
            RECEIVE: _Endpoint(self._receive, config),
            MISSED: _Endpoint(self._missed, config),
        }
        self.tls = listening(config) if config.has_secure_peer_port else None
        self._running = AsyncExitStack()
        _check_url(peer_url(config, 1))

    @property
    def url(self) -> str | None:
        """Where other broadcasters send messages, if there can be any."""
        return self.registry.url

    # its life

    async def __aenter__(self) -> Peers:
        if not Database.at(self.config.db).is_shared:
            return self
        async with AsyncExitStack() as starting:
            port = 0
            if self.config.peer_url is None or "{port}" in self.config.peer_url:
                port = await starting.enter_async_context(_listening(self))
            base = peer_url(self.config, port)
            starting.push_async_callback(self._leave, base + RECEIVE)
            await self._join(base)
            heart = asyncio.create_task(self._beat(), name="peer lease")
            starting.push_async_callback(_end, heart)
            self._running = starting.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._running.aclose()

    async def _join(self, base: str) -> None:
        url, now = base + RECEIVE, self.clock()
        # in this order there is never a row without a lease
        await self.store.renew_peer(url, now + self.config.peer_lease, now)
        await self.store.set_subscriptions(url, [], [])  # of one that was killed
        self.registry.start(self.store, url, base + MISSED)
        log.info("other broadcasters reach the websockets of this one at %s", url)

    async def _leave(self, url: str) -> None:
        await self.registry.stop()
        try:
            await self.store.remove_peer(url)
        except StoreUnavailable as e:
            log.warning(
                "cannot remove the subscriptions of %s, others will within %g seconds: %s",
                *(url, self.config.peer_lease * 4 / 3, e),
            )

    async def _beat(self) -> None:
        period = self.config.peer_lease / 3
        judges, pause = False, period
        while True:
            await asyncio.sleep(pause)
            try:
                judges, pause = await self.renew(judges), period
            except StoreUnavailable as e:
                log.warning("cannot renew the lease of this broadcaster, trying again: %s", e)
                judges, pause = False, min(_RETRY_PAUSE, period)
            except Exception:
                log.exception("renewing the lease of this broadcaster failed in an unforeseen way")
                judges, pause = False, period

    async def renew(self, judges: bool) -> bool:
        """Says that this broadcaster is alive, sets its rows right, removes those of the dead.

        Args:
            judges: whether it may call others dead. Whoever just came, or could not renew his own
                lease in time, gives those a chance who could not either.

        Returns:
            whether it may the next time.
        """
        url = self.url
        assert url is not None
        now = self.clock()
        was_alive = await self.store.renew_peer(url, now + self.config.peer_lease, now)
        if not was_alive:
            log.warning("the lease of this broadcaster (%s) ran out, it was stuck", url)
        if await self.registry.repair():
            self.local.gap()
        if judges and was_alive:
            for dead in await self.store.drop_dead_peers(now):
                log.warning("%s gave no sign of life: its subscriptions were removed", dead)
        return was_alive

    # the endpoints

    async def _receive(self, scope: Scope, receive: Receive) -> bytes:
        url = self._own(self.url)
        sha512 = repr_digest(_header(scope, b"repr-digest"))
        head, rest, more = await _head(receive)
        signed = {"topic": head.topic, "identifier": head.identifier, "sha512": sha512}
        self._check(scope, "RECEIVE", {"tracing": head.tracing, "url": url, **signed})
        if self.registry.is_stale(head.topic):
            raise _Stale
        with self.intake.spool(head.length) as spool:
            await fill(spool, rest, more, partial(_chunk, receive))
            with closing(spool.finish(sha512)) as body:
                with self.tracing.notify(
                    "broadcaster", head.topic, head.length, head.tracing
                ) as step:
                    count = self.local.deliver(head.topic, body, step)
                    step.answered(count)
        authorization = self._authorize(
            "CONFIRM_RECEIVE",
            {"identifier": head.identifier, "num_subscribers": count, "url": url},
        )
        return encode(ResponseConfirmReceive(authorization, b"", head.identifier, count))

    async def _missed(self, scope: Scope, receive: Receive) -> bytes:
        recovery = self._own(self.registry.recovery)
        missed = decode(Missed, await _whole(receive))
        signed = {"tracing": missed.tracing, "recovery": recovery, "topic": missed.topic}
        self._check(scope, "MISSED", signed)
        self.local.missed(missed.topic)
        authorization = self._authorize("CONFIRM_MISSED", {"topic": missed.topic, "url": recovery})
        return encode(ResponseConfirmMissed(authorization))

    def _own(self, url: str | None) -> str:
        """The url that was signed. Never one put together from the request, which went through
        proxies, and holds what its sender likes."""
        if url is None:
            raise Refused(404, "there are no other broadcasters: the database is in memory")
        return url

    def _check(self, scope: Scope, operation: str, signed: dict[str, Any]) -> None:
        value = _header(scope, b"authorization")
        result = self.config.auth.to_subscriber.check(
            operation,
            {**signed, **identity(scope)},
            None if value is None else value.decode("latin-1"),
            self.clock(),
        )
        if result is not AuthResult.OK:
            retry = 1 if result is AuthResult.UNAVAILABLE else None
            raise Refused(result.status, _AUTH_TEXTS[result], retry)

    def _authorize(self, operation: str, signed: dict[str, Any]) -> str | None:
        return self.config.auth.to_broadcaster.authorize(
            operation, {"tracing": b"", **signed}, self.clock()
        )


class _Stale(Exception):
    """Nobody here wants the topic; the row that says otherwise should go."""


class _Endpoint:
    """A route that can also answer "unsubscribe"."""

    def __init__(self, handler: Callable[[Scope, Receive], Any], config: BroadcasterConfig) -> None:
        self._route = Route(handler, config.http_limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._route(scope, receive, send)
        except _Stale:
            log.info("nobody here wants a topic that was sent here; its row is removed")
            await respond(send, 410, UNSUBSCRIBE_IMMEDIATE, b"application/octet-stream")


def _header(scope: Scope, name: bytes) -> bytes | None:
    values = [value for found, value in scope["headers"] if found == name]
    if len(values) > 1:
        raise Refused(400, f"more than one {name.decode().title()} header")
    return values[0] if values else None


async def _head(receive: Receive) -> tuple[ReceiveHead, bytes, bool]:
    parser = HeadParser(ReceiveHead)
    while True:
        chunk, more = await _chunk(receive)
        if (parsed := parser.feed(chunk)) is not None:
            return *parsed, more
        if not more:
            raise parser.end()


async def _whole(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        chunk, more = await _chunk(receive)
        body += chunk
        if len(body) > _MAX_MISSED:
            raise Refused(413, "longer than any MISSED notice")
    return body


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


# The url and the listener


def peer_url(config: BroadcasterConfig, port: int) -> str:
    """Where other broadcasters reach this process.

    Args:
        port: that of the listener.
    """
    if config.peer_url is not None:
        return config.peer_url.replace("{port}", str(port))
    host = config.peer_host
    with suppress(ValueError):  # a name
        address = ipaddress.ip_address(host)
        if address.is_unspecified:  # all share a file, so all are on this machine
            host = "127.0.0.1" if address.version == 4 else "::1"
        if address.version == 6:
            host = f"[{host}]"
    return f"http://{host}:{port}"


def _check_url(url: str) -> None:
    try:
        parse_target(url + RECEIVE)
    except UrlRefused as e:
        raise ConfigError(f"peer_url, peer_host: {url!r} is no url: {e}") from None


@asynccontextmanager
async def _listening(peers: Peers) -> AsyncIterator[int]:
    """Serves the endpoints on a free port of `peer_host`, which it gives."""
    try:
        import uvicorn

        from lonelypss.server import Listening, http_protocol
    except ImportError as e:
        raise ConfigError(
            f"{e}: websockets of several processes on one database need"
            " pip install 'lonelypsc[standard]', or peer_url"
        ) from None
    host = peers.config.peer_host
    try:
        sock = socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as e:
        raise ConfigError(f"peer_host: cannot listen on {host!r}: {e.strerror}") from None
    with sock:
        config = uvicorn.Config(
            _table_app(peers.table),
            http=http_protocol(peers.config, peers.table),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=_GRACE,
        )
        config.load()
        server = Listening(config, peers.tls, peers.config)
        server.lifespan = config.lifespan_class(config)
        # Not serve(): that would take over the signals of this process.
        await server.startup(sockets=[sock])
        try:
            yield sock.getsockname()[1]
        finally:
            await server.shutdown(sockets=[sock])


def _table_app(table: Mapping[str, ASGIApp]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = table.get(scope["path"])
        if endpoint is not None:
            await endpoint(scope, receive, send)
        else:
            await respond(send, 404, b'{"detail":"Not Found"}', b"application/json")

    return app
