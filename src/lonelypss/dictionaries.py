"""Which zstd dictionaries websockets are offered, and where they come from.

Presets are files that clients have, too. The others are trained from the messages that pass
through this process, and are the same for all its websockets, so that a message is compressed once
for all of them. Whoever gets such a dictionary sees fragments of messages, so only those get it who
may subscribe to everything anyway: all who hold the secret.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from lonelypsp.compression import FIRST_CUSTOM, MAX_LEVEL, WITHOUT_DICTIONARY, available
from lonelypsp.session import BroadcasterSession
from lonelypss.config import BroadcasterConfig, ConfigError

log = logging.getLogger(__name__)

_FIRST_SIZE, _SECOND_SIZE = 16 * 1024, 64 * 1024
_TRAINED_LEVEL = 3
_KEPT = 2


@dataclass(frozen=True, slots=True)
class Dictionary:
    id: int
    data: bytes
    level: int


def load_presets(config: BroadcasterConfig) -> dict[int, Dictionary]:
    """The dictionaries that `compression_dictionaries` names.

    Raises:
        ConfigError: the option is malformed, or a file cannot be read.
    """
    return {preset.id: preset for preset in _presets(config.compression_dictionaries)}


def _presets(option: str) -> Iterator[Dictionary]:
    for entry in filter(None, (part.strip() for part in option.split(","))):
        id_text, _, rest = entry.partition("=")
        path, _, level_text = rest.partition(":")
        try:
            id, level = int(id_text), int(level_text or 3)
        except ValueError:
            raise ConfigError(
                f"compression_dictionaries: {entry!r} is not id=path[:level]"
            ) from None
        if not (WITHOUT_DICTIONARY < id < FIRST_CUSTOM and 1 <= level <= MAX_LEVEL and path):
            raise ConfigError(
                f"compression_dictionaries: {entry!r}: an id is 2 to 65535,"
                f" a level 1 to {MAX_LEVEL}"
            )
        try:
            yield Dictionary(id, Path(path).read_bytes(), level)
        except OSError as e:
            raise ConfigError(f"compression_dictionaries: {path}: {e.strerror}") from None


class Dictionaries:
    """What the websockets of one process are offered.

    Args:
        changed: called after training with the new dictionary and with one to give up, if any.

    Attributes:
        presets: by id.
        trained: oldest first.
        listeners: how many websockets take trained dictionaries; without any, nothing is collected.
    """

    def __init__(
        self, config: BroadcasterConfig, changed: Callable[[Dictionary, Dictionary | None], None]
    ) -> None:
        self.config = config
        self.presets = load_presets(config)
        self.trained: list[Dictionary] = []
        self.listeners = 0
        self.allowed = config.compression_allowed and available()
        self.training_allowed = self.allowed and config.compression_training
        self._changed = changed
        self._ids = count(FIRST_CUSTOM)
        self._samples: list[bytes] = []
        self._collected = 0
        self._mark = config.compression_training_low_watermark
        self._resume_at = 0.0
        self._training: asyncio.Task[None] | None = None

    @property
    def preset_data(self) -> Mapping[int, bytes]:
        return {preset.id: preset.data for preset in self.presets.values()}

    def collect(self, data: bytes) -> None:
        """Takes note of a message that websockets get."""
        config = self.config
        if not self.listeners or self._training is not None:
            return
        if not config.compression_min_size <= len(data) < config.compression_trained_max_size:
            return
        if self._resume_at and time.monotonic() < self._resume_at:
            return
        self._samples.append(data)
        self._collected += len(data)
        if self._collected >= self._mark:
            self._training = asyncio.get_running_loop().create_task(self._train())

    async def close(self) -> None:
        if self._training is not None:
            await asyncio.wait((self._training,))

    async def _train(self) -> None:
        """One dictionary from what was collected."""
        config = self.config
        first = self._collected < config.compression_training_high_watermark
        size = _FIRST_SIZE if first else _SECOND_SIZE
        try:
            data = await asyncio.to_thread(_train, size, self._samples)
        except Exception:
            log.exception("no dictionary could be trained from %d messages", len(self._samples))
        else:
            self._take(Dictionary(next(self._ids), data, _TRAINED_LEVEL))
        self._mark = config.compression_training_high_watermark
        if not first:
            self._samples, self._collected = [], 0
            self._resume_at = time.monotonic() + config.compression_retrain_interval
        self._training = None

    def _take(self, new: Dictionary) -> None:
        self.trained.append(new)
        old = self.trained.pop(0) if len(self.trained) > _KEPT else None
        log.info("trained dictionary %d of %d bytes", new.id, len(new.data))
        self._changed(new, old)


def _train(size: int, samples: list[Any]) -> bytes:
    import zstandard

    return zstandard.train_dictionary(size, samples).as_bytes()


class Offer:
    """Announces a compressor to one websocket, see `lonelypss.websocket.Waiting`."""

    length = 0

    def __init__(self, config: BroadcasterConfig, dictionary: Dictionary | None) -> None:
        self._config, self._dictionary = config, dictionary

    def frame(self, session: BroadcasterSession, now: float) -> bytes | None:
        config, dictionary = self._config, self._dictionary
        if dictionary is None:
            return session.enable_preset(
                WITHOUT_DICTIONARY,
                now,
                level=config.compression_level,
                min_size=max(config.compression_trained_max_size, config.compression_min_size),
            )
        if dictionary.id < FIRST_CUSTOM:
            return session.enable_preset(
                dictionary.id, now, level=dictionary.level, min_size=config.compression_min_size
            )
        return session.enable_custom(
            dictionary.id,
            dictionary.data,
            now,
            level=dictionary.level,
            min_size=config.compression_min_size,
            max_size=config.compression_trained_max_size,
        )

    def release(self) -> None:
        pass


class Withdrawal:
    """Takes a trained dictionary back."""

    length = 0

    def __init__(self, dictionary: Dictionary) -> None:
        self._dictionary = dictionary

    def frame(self, session: BroadcasterSession, now: float) -> bytes | None:
        return session.disable_custom(self._dictionary.id, now)

    def release(self) -> None:
        pass
