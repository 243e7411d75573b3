"""The log of `lonelypss serve`: one event, one line, as text or JSON; and no floods.

What peers say of themselves (topics, urls, reasons) can hold anything. In text, control characters
are escaped and the lines of a traceback are indented: a line that starts otherwise is an event. In
JSON, an event is one line, its traceback one field.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Hashable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from lonelypsp.tracecontext import decode

log = logging.getLogger(__name__)

FORMATS = ("text", "json")
PERIOD = 10.0
"""Seconds; see `Lines`."""
PER_DESTINATION = 20
IN_ALL = 500
MOST_DESTINATIONS = 1000
"""What is remembered about."""

# what ends a line or steers a terminal somewhere, and what cannot be encoded
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), text)


class TextFormatter(logging.Formatter):
    """For people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).splitlines()
        return "\n".join(f"  {_escaped(line)}" for line in lines)


class JsonFormatter(logging.Formatter):
    """For programs. `time` is RFC 3339 in UTC. What a line has as `extra={"fields": {...}}` are
    fields of their own; of those, `tracing` bytes become `trace_id` and `span_id`.

    Args:
        current: the tracing bytes of the step that is current.
    """

    def __init__(self, current: Callable[[], bytes]) -> None:
        super().__init__()
        self._current = current

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        event: dict[str, Any] = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
        }
        found = decode(fields.pop("tracing", b"") or self._current())
        if found:
            _, event["trace_id"], event["span_id"], _ = found["traceparent"].split("-")
        event |= {name: _plain(value) for name, value in fields.items() if name not in event}
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)  # which escapes all that is not ASCII


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def set_up(level: str, form: str, current: Callable[[], bytes] = bytes) -> None:
    """Makes the log of this process go to stderr.

    Args:
        level: name of a level of `logging`.
        form: one of `FORMATS`.
        current: see `JsonFormatter`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(current) if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    if form == "json":
        sys.excepthook = _log_last_words
    # at debug, the server would write down what peers send, authorization included
    logging.getLogger("uvicorn.error").setLevel("INFO" if level == "debug" else "WARNING")


def in_json() -> bool:
    """Whether this process was set up for JSON."""
    return any(isinstance(h.formatter, JsonFormatter) for h in logging.getLogger().handlers)


def _log_last_words(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    log.critical("ended by an error", exc_info=(kind, error, trace))


class _Window:
    """What was written about one destination since `started`, and how much was left out."""

    __slots__ = ("left_out", "started", "written")

    def __init__(self) -> None:
        self.started = -PERIOD
        self.written = 0
        self.left_out = 0

    def renew(self, now: float) -> None:
        if now - self.started >= PERIOD:
            self.started = now
            self.written = 0


class Lines:
    """Lines of one kind about the doing of others, who could flood the log with them.

    **The rule**: in `PERIOD` seconds, `PER_DESTINATION` lines about one destination are written,
    and `IN_ALL` of the kind. The next one about it says how many were left out. At level debug,
    nothing is left out.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = logger
        self._clock = clock
        self._windows: dict[Hashable, _Window] = {}
        self._all = _Window()
        self._forgotten = 0  # left out about destinations that are not remembered

    def write(
        self,
        level: int,
        destination: Hashable,
        text: str,
        *args: object,
        exc_info: bool = False,
        **fields: object,
    ) -> None:
        """Writes a line, or counts that it is left out.

        Args:
            destination: what it is about, as far as it matters for the rule.
            text, args, exc_info: as of `Logger.log`.
            fields: of a line of JSON.
        """
        log = self._log
        if not log.isEnabledFor(level):
            return
        if not log.isEnabledFor(logging.DEBUG):
            left_out = self._left_out(destination)
            if left_out is None:
                return
            if left_out:
                text += " [and %d such lines that were left out]"
                args = (*args, left_out)
                fields["left_out"] = left_out
        log.log(level, text, *args, exc_info=exc_info, extra={"fields": fields})

    def _left_out(self, destination: Hashable) -> int | None:
        """How many were left out before this one; None: this one is, too."""
        now, window = self._clock(), self._windows.get(destination)
        if window is None:
            window = self._remember(destination)
        window.renew(now)
        self._all.renew(now)
        if window.written >= PER_DESTINATION or self._all.written >= IN_ALL:
            window.left_out += 1
            return None
        window.written += 1
        self._all.written += 1
        left_out = window.left_out + self._forgotten
        window.left_out = self._forgotten = 0
        return left_out

    def _remember(self, destination: Hashable) -> _Window:
        if len(self._windows) >= MOST_DESTINATIONS:
            oldest = next(iter(self._windows))
            self._forgotten += self._windows.pop(oldest).left_out
        window = self._windows[destination] = _Window()
        return window
