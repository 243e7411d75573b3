"""Publishers, subscribers and those who change subscriptions, all at once; what they did and saw is
a history for `checker`."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from broadcaster.harness import (
    Answer,
    Close,
    Peer,
    Received,
    Response,
    Signed,
    Subscriber,
    confirm_missed,
    confirm_receive,
    exchange,
    reply,
)
from checker import Got, History, Key, Notice, Sent
from lonelypss.store import Kind, Store

TOPICS = ["a0", "a1", "b0", "b1"]
PATTERNS = [
    *(("exact", topic) for topic in TOPICS),
    *(("glob", pattern) for pattern in ("a*", "b?", "*1", "*")),
]
PROBE = "probe"
KEPT = {"0": [("exact", PROBE)], "1": [("exact", PROBE), ("glob", "?1")]}
"""What subscribers want all the time, by the end of their urls."""
MOODS = {
    # shares of: confirm, confirm after a while, refuse, break off, hang
    "good": (1.0, 0.0, 0.0, 0.0, 0.0),
    "mixed": (0.7, 0.1, 0.12, 0.07, 0.01),
    "away": (0.0, 0.0, 0.5, 0.5, 0.0),
    "cut off": (0.0, 0.0, 0.0, 0.0, 1.0),
}


class Workload:
    """Sends to broadcasters at `ports` of this host.

    Args:
        peer: makes a peer with authorization, one for each who sends.
        seed: for everything that is random.
        pause: seconds, at most, between two requests of one sender.
    """

    def __init__(
        self, ports: list[int], peer: Callable[[], Peer], seed: int, *, pause: float = 0.02
    ) -> None:
        self.ports = ports
        self.peer = peer
        self.random = random.Random(seed)
        self.pause = pause
        self.history = History(time.monotonic)
        self.mood = "mixed"
        self.urls: list[str] = []
        self._recovery: dict[str, str] = {}
        self._run = self.random.randbytes(4).hex()
        self._sent = 0
        self._subscribers: list[Subscriber] = []

    # Who does what

    @asynccontextmanager
    async def running(self, publishers: int = 4) -> AsyncIterator[Workload]:
        """All at work, until it is left; subscribers stay until the end of `listening`."""
        stopping = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for number in range(publishers):
                group.create_task(self._publish(f"publisher {number}", stopping))
            for number, url in enumerate(self.urls):
                group.create_task(self._control(f"controller {number}", url, stopping))
            try:
                yield self
            finally:
                stopping.set()

    @asynccontextmanager
    async def listening(self, servers: int = 3) -> AsyncIterator[Workload]:
        """Subscribers with two urls each, all of which want the probe."""
        async with AsyncExitStack() as stack:
            for _ in range(servers):
                subscriber = Subscriber(auth=self.peer().auth)
                subscriber.handler = partial(self._answer, subscriber)
                await stack.enter_async_context(subscriber)
                self._subscribers.append(subscriber)
                for number in range(2):
                    url = f"{subscriber.url}?{number}"
                    self.urls.append(url)
                    self._recovery[url] = f"{subscriber.recovery}?{number}"
            for number, url in enumerate(self.urls):
                await self._set(f"controller {number}", self.peer(), url, self._kept(url))
            yield self

    def _kept(self, url: str) -> set[Key]:
        return {Key(url, *pattern) for pattern in KEPT[url[-1]]}

    async def _publish(self, who: str, stopping: asyncio.Event) -> None:
        peer = self.peer()
        while not stopping.is_set():
            await self.notify(who, peer, self.random.choice(TOPICS), self.random.choice(self.ports))
            await asyncio.sleep(self.random.random() * self.pause)

    async def _control(self, who: str, url: str, stopping: asyncio.Event) -> None:
        peer = self.peer()
        while not stopping.is_set():
            keys = [Key(url, *pattern) for pattern in PATTERNS]
            if self.random.random() < 0.2:
                chosen = self.random.sample(keys, self.random.randrange(len(keys)))
                await self._set(who, peer, url, self._kept(url) | {*chosen})
            else:
                wanted = self.random.random() < 0.6
                await self._change(who, peer, self.random.choice(keys), wanted)
            await asyncio.sleep(self.random.random() * 4 * self.pause)

    async def notify(self, who: str, peer: Peer, topic: str, port: int) -> int | None:
        """How many confirmed, if that is known."""
        self._sent += 1
        sent = Sent(f"{self._run}-{self._sent}", topic)
        body = f"{sent.id} {topic} {self.random.randbytes(self.random.randrange(1500)).hex()} "
        body += hashlib.sha256(body.encode()).hexdigest()
        request = peer.notify(topic.encode(), body.encode())
        self.history.add(who, "invoke", "notify", sent)
        response = await self._ask(port, request)
        if isinstance(response, str):
            self.history.add(who, response, "notify")
            return None
        if response.status != 200:
            # the database was not there, and so nobody was asked
            assert response.status == 503, response
            self.history.add(who, "fail", "notify")
            return None
        count = peer.count(response, request)
        self.history.add(who, "ok", "notify", count)
        return count

    async def _change(self, who: str, peer: Peer, key: Key, wanted: bool) -> None:
        verb = "subscribe" if wanted else "unsubscribe"
        recovery = self._recovery[key.url] if wanted else None
        if key.kind == "exact":
            request = peer.subscribe(key.url, key.pattern.encode(), recovery, verb=verb)
        else:
            request = peer.subscribe_glob(key.url, key.pattern, recovery, verb=verb)
        self.history.add(who, "invoke", verb, key)
        response = await self._ask(self.random.choice(self.ports), request)
        # 409: it was so already
        self.history.add(who, self._outcome(response, 200, 409), verb)

    async def _set(self, who: str, peer: Peer, url: str, keys: set[Key]) -> None:
        recovery = self._recovery[url]
        exact = sorted((k.pattern.encode(), recovery) for k in keys if k.kind == "exact")
        globs = sorted((k.pattern, recovery) for k in keys if k.kind == "glob")
        self.history.add(who, "invoke", "set", (url, keys))
        response = await self._ask(
            self.random.choice(self.ports), peer.set(url, tuple(exact), tuple(globs))
        )
        self.history.add(who, self._outcome(response, 200), "set")

    async def _ask(self, port: int, request: Signed) -> Response | str:
        """The response, or what is known without one."""
        try:
            return await exchange(port, request.bytes())
        except ConnectionRefusedError:
            return "fail"
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            return "info"

    def _outcome(self, response: Response | str, *good: int) -> str:
        if isinstance(response, str):
            return response
        if response.status in good:
            return "ok"
        assert response.status == 503, response
        return "info"

    # What subscribers see

    async def _answer(self, subscriber: Subscriber, received: Received) -> Answer:
        names = ("yes", "late", "no", "break", "hang")
        mood = self.random.choices(names, MOODS[self.mood])[0]
        if self.mood == "mixed" and PROBE.encode() in received.body:
            mood = "yes"
        answer = mood if mood in ("yes", "late", "no") else ""
        confirmation = self._write_down(subscriber, received, answer)
        if mood == "late":
            await asyncio.sleep(self.random.random() * 0.4)
        if mood == "no":
            return reply(b"not now", 500)
        if mood == "break":
            raise Close(reset=True)
        return None if mood == "hang" else reply(confirmation)

    def _write_down(self, subscriber: Subscriber, received: Received, answer: str) -> bytes:
        number = received.path.rpartition("?")[2]
        url = f"{subscriber.url}?{number}"
        if "/v1/recover" in received.path:
            notice = Notice(url, received.missed.decode(), answer in ("yes", "late"))
            self.history.add(subscriber.base, "ok", "missed", notice)
            return confirm_missed(received, self._recovery[url], subscriber.auth)
        text, _, digest = received.message.decode("utf-8", "replace").rpartition(" ")
        topic = received.head.topic.decode()
        intact = text.split()[1:2] == [topic]
        intact &= hashlib.sha256(f"{text} ".encode()).hexdigest() == digest
        got = Got(url, text.partition(" ")[0], topic, intact, answer)
        self.history.add(subscriber.base, "ok", "receive", got)
        return confirm_receive(received, url, subscriber.auth)

    # The end

    async def probe(self) -> None:
        """Returns when a message to each broadcaster has reached everybody."""
        peer = self.peer()
        for port in self.ports:
            while await self.notify("prober", peer, PROBE, port) != len(self.urls):
                await asyncio.sleep(0.05)
        self.history.add("prober", "ok", "probed")

    async def finish(self, store: Store) -> None:
        """Writes down what the database holds."""
        rows = set()
        for url in self.urls:
            for row in await store.subscriptions(url):
                kind = "exact" if row.kind == Kind.EXACT else "glob"
                rows.add(Key(url, kind, row.pattern.decode()))
        self.history.add("database", "ok", "rows", rows)
        pending = set()
        owners = {recovery: url for url, recovery in self._recovery.items()}
        for notice in await store.claim_missed(float("inf"), 100_000, 1.0):
            pending.add((owners[notice.recovery], notice.topic.decode()))
        self.history.add("database", "ok", "notices", pending)
        counted = sum(len(s.requests) for s in self._subscribers)
        self.history.add("subscribers", "ok", "sinks", counted)
