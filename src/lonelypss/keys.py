"""What `lonelypss keys` does to secrets files (docs/how-to/keys.md).

The files of broadcasters and of subscribers have the same keys, but for those with rights: a
subscriber who has one has a file with nothing else to sign with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from lonelypsp import secretsfile
from lonelypsp.errors import LocalProtocolError
from lonelypsp.replay import ReplayGuard
from lonelypsp.signing import Direction
from lonelypss import secrets
from lonelypss.config import ConfigError

Document: TypeAlias = dict[str, Any]
_UP = Direction.TO_BROADCASTER.value
DIRECTIONS = tuple(direction.value for direction in Direction)


@dataclass(frozen=True, slots=True)
class Listed:
    """A key without its secret.

    Attributes:
        signs: whether what leaves is signed with it; the others only verify.
    """

    direction: str
    id: str
    type: str
    signs: bool
    created: str | None
    rights: dict[str, list[str]] | None


class Files:
    """Secrets files that are changed together.

    Args:
        main: that of the broadcasters.
        others: which follow it, those of subscribers.

    Raises:
        ConfigError: one of them cannot be used.
    """

    def __init__(self, main: Path, others: Sequence[Path] = ()) -> None:
        self.main = main
        self._documents = {path: _document(path) for path in (main, *others)}

    def listed(self) -> list[Listed]:
        document = self._documents[self.main]
        return [
            Listed(
                direction,
                row["id"],
                document[direction]["type"],
                number == 0,
                row.get("created"),
                row.get("rights"),
            )
            for direction in _used(document, DIRECTIONS)
            for number, row in enumerate(secretsfile.rows(document[direction]))
        ]

    def add(
        self,
        id: str | None,
        directions: Sequence[str],
        rights: dict[str, list[str]],
        write: Path | None,
    ) -> tuple[str, list[Path]]:
        """Adds a key that only verifies.

        Args:
            id: None: named after the day.
            rights: empty: all.
            write: a new file for the subscriber who gets a key with rights.

        Returns:
            its id, and which files were written.
        """
        main = self._documents[self.main]
        directions = (_UP,) if rights else directions
        taken = {key.id for key in self.listed()}
        now = datetime.now(UTC)
        if id is None:
            id = _unused(f"{now:%Y-%m-%d}", taken)
        if id in taken:
            raise ConfigError(f"{self.main}: there is a key {id!r} already; choose another --id")
        new: dict[str, dict[str, Any]] = {}
        for direction in _used(main, directions):
            secret = secretsfile.generate(main[direction]["type"])
            assert secret is not None  # the direction is used
            new[direction] = {
                "id": id,
                "secret": secret["secret"],
                "created": f"{now:%Y-%m-%dT%H:%M:%SZ}",
                **({"rights": rights} if rights else {}),
            }
        if not new:
            raise ConfigError(f"{self.main}: {', '.join(directions)} has no authorization")
        changed = {}
        for path, document in self._documents.items():
            limited = rights or self._has_rights(document)
            given = {d: row for d, row in new.items() if d != _UP or not limited}
            if path == self.main or given:
                every = new if path == self.main else given
                changed[path] = _changed(document, every, lambda rows, row: [*rows, row])
        if write is not None:
            if write.exists():
                raise ConfigError(f"{write}: exists; choose another file with --write")
            own = {key: value for key, value in new[_UP].items() if key != "rights"}
            changed[write] = {**main, _UP: secretsfile.with_rows(main[_UP], [own])}
        return id, _write(changed)

    def _has_rights(self, document: Document) -> bool:
        """Whether it is that of a subscriber whose key has rights, who must not get another."""
        main = self._documents[self.main]
        signing = [document[d]["secret"] for d in _used(document, (_UP,))]
        return any(
            row["secret"] in signing and "rights" in row
            for direction in _used(main, (_UP,))
            for row in secretsfile.rows(main[direction])
        )

    def sign_with(self, id: str, directions: Sequence[str]) -> list[Path]:
        """Lets a key sign, instead of the one that did."""

        def first(rows: list[Document], row: Document) -> list[Document]:
            if "rights" in row:
                raise ConfigError(f"the key {id!r} has rights: it signs in its subscriber's file")
            return [row, *(other for other in rows if other["id"] != id)]

        return self._change(id, directions, first)

    def retire(self, id: str, directions: Sequence[str]) -> list[Path]:
        """Removes a key."""

        def without(rows: list[Document], row: Document) -> list[Document]:
            if rows[0]["id"] == id:
                raise ConfigError(
                    f"the key {id!r} signs: let another one sign first, `lonelypss keys sign ID`"
                )
            return [other for other in rows if other["id"] != id]

        return self._change(id, directions, without)

    def _change(
        self,
        id: str,
        directions: Sequence[str],
        change: Callable[[list[Document], Document], list[Document]],
    ) -> list[Path]:
        changed = {}
        for path, document in self._documents.items():
            found = {
                direction: row
                for direction in _used(document, directions)
                for row in secretsfile.rows(document[direction])
                if row["id"] == id
            }
            if found:
                changed[path] = _changed(document, found, change)
            elif path == self.main:
                known = sorted({key.id for key in self.listed() if key.direction in directions})
                raise ConfigError(f"{path}: no key {id!r}; there are {', '.join(known)}")
        return _write(changed)


def _document(path: Path) -> Document:
    text = secrets.read(path)
    try:
        secretsfile.load(text, ReplayGuard())
    except LocalProtocolError as e:
        raise ConfigError(f"{path}: {e}; `lonelypss setup` writes one") from None
    return secretsfile.parse(text)


def _used(document: Document, directions: Sequence[str]) -> list[str]:
    return [d for d in directions if document.get(d, {"type": "none"})["type"] != "none"]


def _changed(
    document: Document,
    rows: dict[str, Document],
    change: Callable[[list[Document], Document], list[Document]],
) -> Document:
    entries = {
        direction: secretsfile.with_rows(
            document[direction], change(secretsfile.rows(document[direction]), row)
        )
        for direction, row in rows.items()
        if direction in document
    }
    return {**document, **entries}


def _write(documents: dict[Path, Document]) -> list[Path]:
    texts = {path: json.dumps(document, indent=2) + "\n" for path, document in documents.items()}
    for path, text in texts.items():
        try:
            secretsfile.load(text, ReplayGuard())
        except LocalProtocolError as e:
            raise ConfigError(f"{path}: {e}") from None
    try:
        secrets.write_all(texts)
    except FileExistsError as e:
        raise ConfigError(
            f"{e.filename}: another `lonelypss keys` is at work; remove this file if it is not"
        ) from None
    except OSError as e:
        raise ConfigError(f"{e.filename}: {e.strerror}") from None
    return list(texts)


def _unused(name: str, taken: set[str]) -> str:
    names = (name if n == 1 else f"{name}-{n}" for n in count(1))
    return next(name for name in names if name not in taken)
