from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lonelypsp import messages as m
from lonelypsp import session as s
from lonelypsp.signing import AuthConfig, Hmac, Nothing, Token

NOW = 1_700_000_000.25
AUTHS: dict[str, Callable[[], AuthConfig]] = {
    "none": lambda: AuthConfig(Nothing(), Nothing()),
    "token": lambda: AuthConfig(Token("up"), Token("down")),
    "hmac": lambda: AuthConfig(Hmac(b"u" * 64), Hmac(b"d" * 64)),
}
EVERY_AUTH = pytest.mark.parametrize("auth", AUTHS.values(), ids=AUTHS)
SMALL = s.Limits(frame_length=600)


def sha512(data: bytes) -> bytes:
    return hashlib.sha512(data).digest()


def payload(body: bytes, topic: bytes = b"t", identifier: bytes = b"abcd") -> s.Payload:
    return s.Payload(topic, identifier, len(body), sha512(body))


def subscriber(auth: AuthConfig, **options: Any) -> s.SubscriberSession:
    return s.SubscriberSession(auth, **{"enable_zstd": True, "enable_training": True} | options)


def broadcaster(auth: AuthConfig, **options: Any) -> s.BroadcasterSession:
    return s.BroadcasterSession(auth, **{"allow_zstd": True, "allow_training": True} | options)


class Pair:
    """Both ends of a connection; frames arrive at once."""

    def __init__(self, auth: AuthConfig, client: Any = None, server: Any = None) -> None:
        self.client = subscriber(auth, **client or {})
        self.server = broadcaster(auth, **server or {})
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
        assert self.answer_down(asked) == [
            s.Answered(
                m.ConfirmSubscribeExact(topic=topic, authorization=self.client_saw.authorization)
            )
        ]


def parts(sender: s.Session, body: bytes, about: s.Payload) -> Iterator[bytes]:
    sender.open_stream(about)
    while sender.sending:
        part = sender.next_part(NOW)
        yield part.head + body[part.offset : part.offset + part.length]


@EVERY_AUTH
def test_smoke(auth: Any) -> None:
    pair = Pair(auth(), {"limits": SMALL}, {"limits": SMALL})
    asked = pair.up(pair.client.subscribe_exact(b"t", NOW))
    (confirmed,) = pair.answer_down(asked)
    assert isinstance(confirmed.message, m.ConfirmSubscribeExact)
    event = pair.up(pair.client.notify(payload(b"hello"), b"hello", NOW))
    (confirmed,) = pair.answer_down(event, subscribers=3)
    assert confirmed.message.subscribers == 3
    body = bytes(range(256)) * 20
    for sender, receiver, answerer in (
        (pair.server, pair.client, pair.answer_up),
        (pair.client, pair.server, pair.answer_down),
    ):
        for frame in parts(sender, body, payload(body)):
            event = receiver.receive(frame, NOW)
            assert answerer(event)
        assert event.sink.getvalue() == body
    assert pair.down(pair.server.missed(b"t", NOW)) == s.TopicMissed(b"t")
