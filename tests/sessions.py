"""Two ends of a websocket connection without the connection, and what older peers do differently.

Nothing here is a test: `test_session*.py` share it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from lonelypsp import session as s
from lonelypsp.compression import compress, decompress
from lonelypsp.signing import AuthConfig, Hmac, Nothing, Token

NOW = 1_700_000_000.25
AUTHS: dict[str, Callable[[], AuthConfig]] = {
    "none": lambda: AuthConfig(Nothing(), Nothing()),
    "token": lambda: AuthConfig(Token("up"), Token("down")),
    "hmac": lambda: AuthConfig(Hmac(b"u" * 64), Hmac(b"d" * 64)),
}
SMALL = s.Limits(frame_length=600)
"""Bodies of more than about 500 bytes take several parts."""


def sha512(data: bytes) -> bytes:
    return hashlib.sha512(data).digest()


def plain(body: bytes, topic: bytes = b"t", identifier: bytes = b"abcd") -> s.Payload:
    return s.Payload(topic, identifier, len(body), sha512(body))


def packed(
    body: bytes, compressor: s.Compressor, topic: bytes = b"t", identifier: bytes = b"abcd"
) -> tuple[s.Payload, bytes]:
    """What is said of a compressed body, and the body."""
    data = compress(body, dictionary=compressor.dictionary, level=compressor.level)
    payload = s.Payload(
        topic, identifier, len(data), sha512(data), compressor.id, len(body), sha512(body)
    )
    return payload, data


def unpacked(event: s.BodyArrived) -> bytes:
    """The body of a message as it was before it was sent."""
    data = bytes(event.body) if event.body is not None else event.sink.getvalue()  # type: ignore[union-attr]
    if event.compressor is None:
        return data
    return decompress(
        data,
        dictionary=event.compressor.dictionary,
        expected_length=event.head.decompressed_length,
    )


def parts(sender: s.Session, payload: s.Payload, body: bytes) -> Iterator[bytes]:
    """The frames of a body, each made when it is asked for."""
    sender.open_stream(payload)
    while sender.sending:
        part = sender.next_part(NOW)
        yield part.head + body[part.offset : part.offset + part.length]


class Pair:
    """Both ends of an open connection; frames arrive at once.

    Args:
        client, server: options of the two sessions, and which class they are of.
        open: whether the handshake is done already.
    """

    def __init__(
        self,
        auth: AuthConfig | None = None,
        *,
        client: dict[str, Any] | None = None,
        server: dict[str, Any] | None = None,
        subscriber: type[s.SubscriberSession] = s.SubscriberSession,
        broadcaster: type[s.BroadcasterSession] = s.BroadcasterSession,
        open: bool = True,
    ) -> None:
        auth = auth or AUTHS["none"]()
        zstd = {"enable_zstd": True, "enable_training": True}
        self.client = subscriber(auth, **(zstd | (client or {})))
        allowed = {"allow_zstd": True, "allow_training": True}
        self.server = broadcaster(auth, **(allowed | (server or {})))
        if open:
            self.up(self.client.configure(NOW))
            assert self.down(self.server.confirm_configure(NOW)) == s.Opened()

    def up(self, frame: bytes) -> Any:
        return self.server.receive(frame, NOW)

    def down(self, frame: bytes) -> Any:
        return self.client.receive(frame, NOW)

    def answer_up(self, event: Any, **more: Any) -> list[Any]:
        """The client answers; what the broadcaster makes of it."""
        return [self.up(f) for f in self.client.answer(event, NOW, **more)]

    def answer_down(self, event: Any, **more: Any) -> list[Any]:
        return [self.down(f) for f in self.server.answer(event, NOW, **more)]

    def subscribe(self, topic: bytes = b"t") -> None:
        asked = self.up(self.client.subscribe_exact(topic, NOW))
        (answered,) = self.answer_down(asked)
        assert answered.message.topic == topic

    def deliver_parts(self, body: bytes, **more: Any) -> s.BodyArrived:
        """The broadcaster sends a body in parts, each acknowledged."""
        event: Any = None
        for frame in parts(self.server, plain(body, **more), body):
            event = self.down(frame)
            (answered,) = self.answer_up(event)
            assert isinstance(answered, s.Answered)
        assert isinstance(event, s.BodyArrived)
        return event

    def preset(self, compressor: int = 1) -> s.Compressor:
        frame = self.server.enable_preset(compressor, NOW, level=3, min_size=0)
        event = self.down(frame)
        assert isinstance(event, s.Enabled)
        return event.compressor

    def custom(self, compressor: int, dictionary: bytes) -> s.Compressor:
        frame = self.server.enable_custom(compressor, dictionary, NOW, level=3, min_size=0)
        event = self.down(frame)
        assert isinstance(event, s.Enabled)
        return event.compressor


class OlderSubscriber(s.SubscriberSession):
    """Counts a body as one message, however many parts it has, and judges its start alone (D1).

    Without x-tracing, as the older client.
    """

    def __init__(self, auth: AuthConfig, **options: Any) -> None:
        super().__init__(auth, **{"tracing": b"", **options})

    def _verify_part(self, message: Any, now: float, covers: Any) -> None:
        pass


class OlderBroadcaster(s.BroadcasterSession):
    """Counts every part, whatever the subscriber is (D1)."""

    def __init__(self, auth: AuthConfig, **options: Any) -> None:
        super().__init__(auth, **{"counts_parts": True, **options})


class Scripted:
    """An authenticator that gives out recorded values, and judges as another one."""

    def __init__(self, values: list[str], judge: Any) -> None:
        self.values, self._judge = deque(values), judge

    def authorize(self, operation: str, fields: Any, now: float) -> str | None:
        return self.values.popleft()

    def check(self, *args: Any) -> Any:
        return self._judge.check(*args)
