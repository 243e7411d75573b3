"""What one key of the secrets file may do (docs/how-to/keys.md).

A right that is left out allows everything. Topics are allowed by globs, a glob by one that covers
it, and urls by their beginnings, part by part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lonelypsp.connection_url import CONNECTION_SCHEME
from lonelypsp.errors import LocalProtocolError, RemoteProtocolError
from lonelypsp.globs import compile_glob, glob_matches

_NAMES = ("notify", "subscribe", "urls")
_TAIL = "/**"


class NotAllowed(RemoteProtocolError):
    """A right is missing; the message says which, to whoever has proved that the key is his."""

    def __init__(self, key: str, right: str, what: str) -> None:
        super().__init__(
            f"the key {key!r} has no right to {what} (its {right!r} rights in the secrets file of"
            " the broadcasters)",
            status=403,
        )


@dataclass(frozen=True, slots=True)
class Rights:
    """None: everything is allowed.

    Attributes:
        notify: globs of topics to which messages may be sent.
        subscribe: globs of topics, exact or by glob, that may be subscribed to.
        urls: beginnings of the urls for which that may be done, recovery urls included. Websockets
            have none.
    """

    notify: tuple[str, ...] | None = None
    subscribe: tuple[str, ...] | None = None
    urls: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for glob in (*(self.notify or ()), *(self.subscribe or ())):
            compile_glob(glob)
        for prefix in self.urls or ():
            _prefix(prefix)

    @classmethod
    def of(cls, document: Any) -> Rights:
        """The rights as they stand in the secrets file.

        Raises:
            LocalProtocolError: they are no rights.
        """
        if not isinstance(document, dict) or not document.keys() <= set(_NAMES):
            raise LocalProtocolError(f'"rights" may hold {", ".join(_NAMES)}, and nothing else')
        for name, allowed in document.items():
            if not isinstance(allowed, list) or not all(isinstance(a, str) and a for a in allowed):
                raise LocalProtocolError(f'"rights": "{name}" must be a list of texts')
        return cls(**{name: tuple(allowed) for name, allowed in document.items()})

    def judge(self, key: str, operation: str, fields: Mapping[str, Any]) -> None:
        """Judges a request whose signature is right.

        Args:
            key: id of the key that signed it.

        Raises:
            NotAllowed: a right is missing.
        """
        if judge := _JUDGES.get(operation):
            judge(self, key, fields)

    def _notify(self, key: str, fields: Mapping[str, Any]) -> None:
        if not _covers_topic(self.notify, fields["topic"]):
            raise NotAllowed(key, "notify", f"send to {_shown(fields['topic'])}")

    def _exact(self, key: str, fields: Mapping[str, Any]) -> None:
        self._check_topic(key, fields["topic"])
        self._check_urls(key, (fields["url"], fields["recovery"]))

    def _glob(self, key: str, fields: Mapping[str, Any]) -> None:
        self._check_glob(key, fields["glob"])
        self._check_urls(key, (fields["url"], fields["recovery"]))

    def _look(self, key: str, fields: Mapping[str, Any]) -> None:
        self._check_urls(key, (fields["url"],))

    def _set(self, key: str, fields: Mapping[str, Any]) -> None:
        self._check_urls(key, (fields["url"],))
        if self.subscribe is None and self.urls is None:
            return
        exact, globs = fields["listed"]()
        for topic, _ in exact:
            self._check_topic(key, topic)
        for glob, _ in globs:
            self._check_glob(key, glob)
        self._check_urls(key, {recovery for _, recovery in (*exact, *globs)})

    def _check_topic(self, key: str, topic: bytes) -> None:
        if not _covers_topic(self.subscribe, topic):
            raise NotAllowed(key, "subscribe", f"subscribe to {_shown(topic)}")

    def _check_glob(self, key: str, glob: str) -> None:
        allowed = self.subscribe
        if allowed is not None and not any(covers(rule, glob) for rule in allowed):
            raise NotAllowed(key, "subscribe", f"subscribe to the glob {_shown(glob)}")

    def _check_urls(self, key: str, urls: Iterable[str | None]) -> None:
        if self.urls is None:
            return
        for url in urls:
            if not url or url.startswith(CONNECTION_SCHEME):
                continue
            if not any(url_starts_with(url, prefix) for prefix in self.urls):
                raise NotAllowed(key, "urls", f"act for the url {_shown(url)}")


_JUDGES: Mapping[str, Callable[[Rights, str, Mapping[str, Any]], None]] = {
    "NOTIFY": Rights._notify,
    "SUBSCRIBE_EXACT": Rights._exact,
    "SUBSCRIBE_GLOB": Rights._glob,
    "CHECK_SUBSCRIPTIONS": Rights._look,
    "SET_SUBSCRIPTIONS": Rights._set,
}


def _shown(what: str | bytes) -> str:
    return repr(what) if len(what) <= 200 else f"{what[:200]!r}..."


def _covers_topic(allowed: tuple[str, ...] | None, topic: bytes) -> bool:
    return allowed is None or any(glob_matches(rule, topic) for rule in allowed)


def covers(rule: str, glob: str) -> bool:
    """Whether nothing that `glob` matches lies outside `rule`.

    Only where that is plain: they are equal, or `rule` is `**`, or it is a text without wildcards
    and `/**`, and `glob` begins with that text and a slash.
    """
    if rule in (glob, "**"):
        return True
    text = rule.removesuffix(_TAIL)
    return text != rule and not set("*?[") & set(text) and glob.startswith(text + "/")


_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[!\"$->@-~]*)?(\?[!\"$-~]*)?(#[!-~]*)?"
)
_PREFIX = re.compile(
    r"(?P<scheme>https?)://(?P<host>\.?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|(\d{1,3}\.){1,3}"
    r"|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?(?P<path>(/[A-Za-z0-9._~-]+)*)/?"
)
_OCTETS = re.compile(r"(\d{1,3}\.){3}\d{1,3}")


def _prefix(text: str) -> re.Match[str]:
    found = _PREFIX.fullmatch(text)
    if found is None:
        raise LocalProtocolError(
            f'"rights": "urls": {text!r} is not like http://10.0.0.7:3002/v1, http://10.0.0. or'
            " https://.example.internal"
        )
    return found


def url_starts_with(url: str, prefix: str) -> bool:
    """Whether `url` lies under `prefix`, compared part by part.

    The scheme must be equal. So must the host, but that `10.0.0.` stands for all addresses of four
    numbers that begin so, and `.example.internal` for all names that end so. The port must be
    equal; where the prefix has none, any will do. The path of the prefix covers itself and all
    that lies below it. A url with a user, with `..` in its path, or that is no plain url, lies
    under none.
    """
    rule, found = _prefix(prefix), re.fullmatch(_URL, url)
    if found is None or found["scheme"] != rule["scheme"]:
        return False
    return (
        _host_fits(found["host"].lower(), rule["host"].lower())
        and rule["port"] in (None, found["port"])
        and _path_fits(found["path"] or "", rule["path"])
    )


def _host_fits(host: str, rule: str) -> bool:
    if rule.startswith("."):
        return host.endswith(rule) and len(host) > len(rule)
    if rule.endswith("."):
        return host.startswith(rule) and _OCTETS.fullmatch(host) is not None
    return host == rule


def _path_fits(path: str, rule: str) -> bool:
    if not rule:
        return True
    plain = path.lower().replace("%2e", ".").replace("%2f", "/").replace("%5c", "/")
    if {"..", "."} & set(plain.replace("\\", "/").split("/")):
        return False
    return path == rule or path.startswith(rule + "/")
