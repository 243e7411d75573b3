"""What waits for websockets: messages, packed once for all of them, and notices."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator
from typing import Protocol

from lonelypsp import session as s
from lonelypsp.compression import compress, compress_pieces, pays
from lonelypsp.spool import Body, Spool
from lonelypsp.tracecontext import Step
from lonelypss.intake import Intake

INLINE = 64 * 1024
"""Bytes up to which hashing and compressing is done in the event loop."""
_CHUNK = 1024 * 1024


class Waiting(Protocol):
    """What is sent when its turn has come.

    Attributes:
        length: bytes of memory it holds.
    """

    length: int

    def frame(self, session: s.BroadcasterSession, now: float) -> bytes | None:
        """The frame to send; None: see `Outgoing`."""
        ...

    def release(self) -> None: ...


class Outgoing:
    """One message on its way to any number of websockets, compressed once per compressor."""

    __slots__ = ("_holders", "_intake", "_packed", "_packing", "body", "length", "payload", "step")

    def __init__(self, topic: bytes, body: Body, intake: Intake, step: Step) -> None:
        self.body = body.share()
        self.length = body.length if body.data is not None else 0
        self.payload = s.Payload(
            topic, _identifier(), body.length, body.sha512, tracing=step.tracing
        )
        self.step = step
        self._holders = 1
        self._intake = intake
        self._packed: dict[int, tuple[s.Payload, Body]] | None = None
        self._packing: dict[int, asyncio.Task[tuple[s.Payload, Body]]] = {}

    def share(self) -> Outgoing:
        self._holders += 1
        return self

    def release(self) -> None:
        self._holders -= 1
        if self._holders:
            return
        self.body.close()
        for _, body in (self._packed or {}).values():
            body.close()
        self.step.end()

    def frame(self, session: s.BroadcasterSession, now: float) -> bytes | None:
        """The message in one frame; None: it needs more than that, or time. See `packed`."""
        compressor = session.compressor_for(self.body.length)
        if compressor is None:
            payload, data = self.payload, self.body.data
        else:
            packed = self._packed and self._packed.get(compressor.id)
            if not packed:
                if self.body.data is None or self.body.length > INLINE:
                    return None
                packed = self._pack(compressor)
                self._keep(compressor, packed)
            payload, data = packed[0], packed[1].data
        if data is None or not session.one_frame(payload):
            return None
        return session.deliver(payload, data, now)

    async def packed(self, compressor: s.Compressor | None) -> tuple[s.Payload, Body]:
        """What is sent with `compressor`; work for it is done once, in a thread."""
        if compressor is None:
            return self.payload, self.body
        if self._packed and compressor.id in self._packed:
            return self._packed[compressor.id]
        task = self._packing.get(compressor.id)
        if task is None:
            task = asyncio.create_task(self._pack_in_thread(compressor))
            self._packing[compressor.id] = task
        return await asyncio.shield(task)

    async def _pack_in_thread(self, compressor: s.Compressor) -> tuple[s.Payload, Body]:
        self.share()
        try:
            if self.body.data is not None:
                packed = await asyncio.to_thread(self._pack, compressor)
            else:
                length = self.body.length
                with self._intake.spool(length + length // 128 + 1024) as spool:
                    packed = await asyncio.to_thread(self._pack_to, spool, compressor)
            self._keep(compressor, packed)
            return packed
        finally:
            self.release()

    def _keep(self, compressor: s.Compressor, packed: tuple[s.Payload, Body]) -> None:
        if self._packed is None:
            self._packed = {}
        self._packed[compressor.id] = packed

    def _pack(self, compressor: s.Compressor) -> tuple[s.Payload, Body]:
        data = self.body.data
        assert data is not None  # the others are packed to a spool
        packed = compress(data, dictionary=compressor.dictionary, level=compressor.level)
        return self._about(compressor, Body.of(packed))

    def _pack_to(self, spool: Spool, compressor: s.Compressor) -> tuple[s.Payload, Body]:
        for piece in compress_pieces(
            self._chunks(),
            length=self.body.length,
            dictionary=compressor.dictionary,
            level=compressor.level,
        ):
            spool.write(piece)
        return self._about(compressor, spool.seal())

    def _chunks(self) -> Iterator[bytes]:
        for offset in range(0, self.body.length, _CHUNK):
            yield self.body.read_at(offset, _CHUNK)

    def _about(self, compressor: s.Compressor, packed: Body) -> tuple[s.Payload, Body]:
        plain = self.payload
        if not pays(plain.length, packed.length):
            packed.close()
            return plain, self.body.share()
        payload = s.Payload(
            plain.topic,
            plain.identifier,
            packed.length,
            packed.sha512,
            compressor.id,
            plain.length,
            plain.sha512,
            plain.tracing,
        )
        return payload, packed


_prefix = os.urandom(4)
_numbers = itertools.count()


def _identifier() -> bytes:
    # need only differ among the messages that one websocket has not acknowledged
    return _prefix + (next(_numbers) & 0xFFFFFFFF).to_bytes(4, "big")


class Notice:
    """Says that messages on a topic may have been missed."""

    length = 0

    def __init__(self, topic: bytes) -> None:
        self.topic = topic

    def frame(self, session: s.BroadcasterSession, now: float) -> bytes | None:
        return session.missed(self.topic, now)

    def release(self) -> None:
        pass
