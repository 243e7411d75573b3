"""What one message costs in the codecs and in signing: µs per operation, the least of some rounds.

    python benchmarks/codecs.py [rounds]

One process, no I/O: run it on an idle core. Times include the call and, for `construct`, the
arguments by name, as callers write them.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable

from lonelypsp import bodies, messages, wire
from lonelypsp.connection_url import connection_url
from lonelypsp.messages import ConfirmNotify, ConfirmReceive, Notify, ReceiveStreamStart
from lonelypsp.replay import Verdict
from lonelypsp.signing import Hmac, to_sign

BODY = b"x" * 500
SHA512 = hashlib.sha512(BODY).digest()
NOW = 1_700_000_000.5
NONCE = "nF2JwGJq3s5OZNyJ8pGcVZ7r6T3V2c3PpQ5T3mU2n1E="
FIELDS = {
    "tracing": b"",
    "url": connection_url(NONCE, 5_000),
    "topic": b"benchmark/topic",
    "identifier": b"\1\2\3\4",
    "sha512": SHA512,
    "num_subscribers": 1,
    "subscribers": 1,
}


class Forgets:
    """A replay memory that costs nothing."""

    def mark(self, code: bytes, issued: float, expires: float, now: float) -> Verdict:
        return Verdict.NEW


HMAC = Hmac(b"k" * 64, replay=Forgets())
AUTHORIZATION = HMAC.authorize("RECEIVE", FIELDS, NOW)


def notify() -> Notify:
    return Notify(
        authorization=AUTHORIZATION,
        identifier=b"\1\2\3\4",
        topic=b"benchmark/topic",
        compressed_length=len(BODY),
        decompressed_length=len(BODY),
        sha512=SHA512,
        body=BODY,
    )


def receive() -> ReceiveStreamStart:
    return ReceiveStreamStart(
        authorization=AUTHORIZATION,
        identifier=b"\1\2\3\4",
        topic=b"benchmark/topic",
        compressed_length=len(BODY),
        decompressed_length=len(BODY),
        sha512=SHA512,
        body=BODY,
    )


def confirm_receive() -> ConfirmReceive:
    return ConfirmReceive(identifier=b"\1\2\3\4", authorization=AUTHORIZATION)


def confirm_notify() -> ConfirmNotify:
    return ConfirmNotify(identifier=b"\1\2\3\4", subscribers=3, authorization=AUTHORIZATION)


Case = tuple[str, Callable[[], object]]


def of_messages() -> list[Case]:
    up, down = messages.decode_from_subscriber, messages.decode_from_broadcaster
    cases: list[Case] = []
    for name, make, decode in (
        ("NOTIFY", notify, up),
        ("RECEIVE start", receive, down),
        ("CONFIRM_RECEIVE", confirm_receive, up),
        ("CONFIRM_NOTIFY", confirm_notify, down),
    ):
        message = make()
        data = messages.encode(message, minimal=True)
        view = memoryview(data)
        expanded = messages.encode(message, minimal=False)
        cases += [
            (f"{name}: construct", make),
            (f"{name}: encode_head", lambda m=message: messages.encode_head(m, minimal=True)),
            (f"{name}: encode", lambda m=message: messages.encode(m, minimal=True)),
            (f"{name}: decode", lambda f=decode, d=data: f(d)),
            (f"{name}: decode a view", lambda f=decode, d=view: f(d)),
            (f"{name}: encode expanded", lambda m=message: messages.encode(m, minimal=False)),
            (f"{name}: decode expanded", lambda f=decode, d=expanded: f(d)),
        ]
    return [*cases, ("SHA-512 of the body", lambda: hashlib.sha512(BODY).digest())]


def of_bodies() -> list[Case]:
    head = bodies.NotifyHead(b"benchmark/topic", SHA512, b"", b"\1\2\3\4", len(BODY))
    answer = bodies.ResponseConfirmReceive(AUTHORIZATION, b"", b"\1\2\3\4", 1)
    head_data, answer_data = wire.encode(head), wire.encode(answer)
    chunk = head_data + BODY
    return [
        ("NotifyHead: encode", lambda: wire.encode(head)),
        ("NotifyHead: HeadParser.feed", lambda: wire.HeadParser(bodies.NotifyHead).feed(chunk)),
        ("ResponseConfirmReceive: encode", lambda: wire.encode(answer)),
        (
            "ResponseConfirmReceive: decode",
            lambda: wire.decode(bodies.ResponseConfirmReceive, answer_data),
        ),
    ]


def of_signing() -> list[Case]:
    return [
        ("connection_url", lambda: connection_url(NONCE, 5_000)),
        ("RECEIVE: to_sign", lambda: to_sign("RECEIVE", FIELDS, 1_700_000_000, "AbCdEfGhIjKl1f")),
        ("RECEIVE: authorize", lambda: HMAC.authorize("RECEIVE", FIELDS, NOW)),
        ("RECEIVE: check", lambda: HMAC.check("RECEIVE", FIELDS, AUTHORIZATION, NOW)),
        ("CONFIRM_RECEIVE: authorize", lambda: HMAC.authorize("CONFIRM_RECEIVE", FIELDS, NOW)),
    ]


def least(call: Callable[[], object], rounds: int, times: int = 5_000) -> float:
    """Seconds per call in the fastest round."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(times):
            call()
        best = min(best, time.perf_counter() - start)
    return best / times


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    for name, call in [*of_messages(), *of_bodies(), *of_signing()]:
        print(f"{name:<34}{least(call, rounds) * 1e6:8.2f} µs")


if __name__ == "__main__":
    main()
