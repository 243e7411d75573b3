"""Which urls messages and notices are posted to: their syntax, and where they may lead.

Whoever may subscribe makes the broadcaster send requests. So a url is judged twice: when it
subscribes, by all that can be seen in it, and whenever a connection is made, by the address that
its host turns out to have; the connection goes to that very address. Names are not looked up when
they subscribe: that would prove nothing about later, make subscribing as slow as the DNS, and tell
strangers which names exist.

What is always denied is denied to everybody. `url_deny` comes next, then `url_allow`, then the
preset `url_policy`. Urls of other broadcasters on our database are written there by themselves, and
refused to everybody else; lists and preset do not apply to them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import quote, unquote

from lonelypsp.bodies import BROADCASTER_ENDPOINTS

if TYPE_CHECKING:
    from lonelypss.config import BroadcasterConfig

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Origin: TypeAlias = tuple[str | int, ...]
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

PEER_PATHS = ("/v1/receive_for_websockets", "/v1/missed_for_websockets")
"""Where broadcasters on one database reach each other."""
CACHED_URL = 512
"""Characters up to which a url is remembered once it was judged."""


class UrlRefused(ValueError):
    """A url that no message can be posted to; the text begins with the kind of rule."""

    kind = "url-syntax"

    def __str__(self) -> str:
        return f"{self.kind}: {super().__str__()}"


class UrlDenied(UrlRefused):
    """A url that no message may be posted to; the text names the rule."""

    kind = "url-policy"


class UrlPreset(StrEnum):
    """What decides about addresses that neither list names."""

    INTERNAL = "internal"
    """They may be private or loopback."""
    PUBLIC = "public"
    """They must be public."""
    LISTED = "listed"
    """They are denied."""


# Syntax

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?:#(?P<fragment>.*))?",
    re.DOTALL,
)
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f\\]")
_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a url leads, and the part of the request head that never changes for it.

    Attributes:
        host: a name, or an address; IPv6 in brackets.
        address: that address, if it is one.
        head: of the request: the line, and the headers that are always the same.
        is_peer: whether the path is one of `PEER_PATHS`.
        origin: equal for urls that may share connections.
    """

    scheme: str
    host: str
    address: Address | None
    port: int
    path: str
    head: bytes
    is_peer: bool
    origin: Origin


def parse_target(url: str) -> Target:
    """Takes a subscriber's url apart, strictly.

    Raises:
        UrlRefused: it is not http(s), or its host is not a name or address in its plain spelling,
            or it holds a user name, spaces, control characters or backslashes.
    """
    if _FORBIDDEN.search(url):
        raise UrlRefused("a url has no spaces, control characters or backslashes")
    match = _URL.fullmatch(url)
    if match is None:
        raise UrlRefused("must be http(s)://host[:port][/path][?query][#fragment]")
    host, scheme = match["host"].lower(), match["scheme"]
    address = _check_host(host)
    default = 443 if scheme == "https" else 80
    port = int(match["port"] or default)
    if not 0 < port < 65536:
        raise UrlRefused(f"port {port} is not between 1 and 65535")
    path = match["path"] or "/"
    quoted = quote(path + (match["query"] or ""), safe="/?%!$&'()*+,;=:@-._~[]|")
    authority = host if port == default else f"{host}:{port}"
    head = (
        f"POST {quoted} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: lonelypss\r\nAccept: */*\r\n"
        "Content-Type: application/octet-stream\r\n"
    )
    if match["fragment"] is not None:
        # a fragment is lost on the way otherwise; it tells subscribers on one listener apart
        head += f"X-Subscription-Fragment: {quote(match['fragment'], safe='')}\r\n"
    is_peer = path.endswith(PEER_PATHS)
    origin = (scheme, host, port, "peer") if is_peer else (scheme, host, port)
    return Target(scheme, host, address, port, path, head.encode("ascii"), is_peer, origin)


def host_of(url: str) -> str:
    """Scheme, host and port of a url, usable or not."""
    return "/".join(url[:CACHED_URL].split("/", 3)[:3])


def _check_host(host: str) -> Address | None:
    labels = host.split(".")
    try:
        if host.startswith("["):
            return ipaddress.IPv6Address(host[1:-1])
        if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
            return ipaddress.IPv4Address(host)
    except ipaddress.AddressValueError:
        raise UrlRefused(f"host {host!r} is not an address in its plain spelling") from None
    if len(host) > 253 or not all(_NAME.fullmatch(label) for label in labels):
        raise UrlRefused(f"host {host!r} is not a host name")
    return None


# Addresses


def _networks(**named: str) -> list[tuple[Network, str]]:
    return [
        (ipaddress.ip_network(text), name.replace("_", " "))
        for name, texts in named.items()
        for text in texts.split()
    ]


_ALWAYS = _networks(
    unspecified="0.0.0.0/8 ::/128",
    link_local="169.254.0.0/16 fe80::/10 fec0::/10",
    multicast="224.0.0.0/4 ff00::/8",
    reserved="192.0.0.0/24 240.0.0.0/4 2001::/23 2001:db8::/32 3fff::/20",
    # 169.254.169.254 of most clouds is link-local, 192.0.0.192 of Oracle reserved
    a_metadata_service="100.100.100.200 168.63.129.16 fd00:ec2::254 fd20:ce::254",
)
_NOT_PUBLIC = _networks(
    loopback="127.0.0.0/8 ::1/128",
    private="10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7",
    shared="100.64.0.0/10",
    not_public="192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24",
)
_IN_USE = [ipaddress.IPv6Network(text) for text in ("2000::/3", "fc00::/7", "::1/128")]
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")
_METADATA_NAMES = {
    "metadata.google.internal",
    "metadata.goog",
    "metadata.azure.internal",
    "instance-data.ec2.internal",
}
_LOOPBACK = ipaddress.IPv4Address("127.0.0.1")


def judged_as(address: Address) -> list[Address]:
    """The addresses that a packet to `address` may reach: IPv4 that hides in IPv6, or itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address.sixtofour is not None:
        return [address.sixtofour]
    if address.teredo is not None:
        return list(address.teredo)
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):
        return [ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)]
    return [address]


def _always_denied(address: Address) -> str | None:
    """What `address` is that nobody may subscribe; None: nothing of the kind."""
    for network, name in _ALWAYS:
        if address in network:
            return name
    if address.version == 6 and not any(address in network for network in _IN_USE):
        return "reserved"
    return None


# Rules of the operator


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of `url_allow` or `url_deny`. Without network and name it means everything."""

    text: str
    network: Network | None
    name: re.Pattern[str] | None
    ports: range

    @property
    def is_for_names(self) -> bool:
        return self.network is None

    def has_name(self, host: str, port: int) -> bool:
        if self.network is not None or port not in self.ports:
            return False
        return self.name is None or self.name.fullmatch(host) is not None

    def has_address(self, address: Address, port: int) -> bool:
        if self.name is not None or port not in self.ports:
            return False
        return self.network is None or address in self.network


_RULE = re.compile(r"(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:\[\]]+))(?::(?P<ports>[0-9-]+))?")
_PATTERN = re.compile(r"[A-Za-z0-9_.*-]+")


def parse_rules(text: str) -> list[Rule]:
    """Entries like 10.0.0.0/8, [fd00::/8]:443, *.example.com:8000-8999, *:443; comma-separated.

    Raises:
        ValueError: names the entry that is none.
    """
    return [_rule(entry) for part in text.split(",") if (entry := part.strip())]


def _rule(entry: str) -> Rule:
    bare = entry.count(":") > 1 and not entry.startswith("[")  # IPv6 without a port
    match = _RULE.fullmatch(f"[{entry}]" if bare else entry)
    if match is None:
        raise ValueError(f"{entry!r} is no host[:port]")
    ports = parse_ports(match["ports"])[0] if match["ports"] else range(65536)
    host = match["six"] or match["host"]
    if host == "*":
        return Rule(entry, None, None, ports)
    try:
        return Rule(entry, ipaddress.ip_network(host), None, ports)
    except ValueError as e:
        if match["six"] or "/" in host or re.fullmatch(r"[0-9.*]+", host):
            raise ValueError(f"{entry!r}: {e}") from None
    if not _PATTERN.fullmatch(host):
        raise ValueError(f"{entry!r}: {host!r} is no host name, with or without *")
    name = re.compile(re.escape(host.lower()).replace(r"\*", ".*"))
    return Rule(entry, None, name, ports)


def parse_ports(text: str) -> list[range]:
    """Ports like 22,5900-5999.

    Raises:
        ValueError: names what is no port.
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not 0 < first <= last < 65536:
            raise ValueError(f"{part!r} is no port, and no range of ports")
        found.append(range(first, last + 1))
    return found


class UrlPolicy:
    """Judges urls and addresses as the options `url_...` say."""

    def __init__(self, config: BroadcasterConfig) -> None:
        self._preset = config.url_policy
        self._allow = parse_rules(config.url_allow)
        self._deny = parse_rules(config.url_deny)
        self._denied_ports = {p for ports in parse_ports(config.url_denied_ports) for p in ports}
        self._https_only = config.url_https_only
        self._cached = lru_cache(maxsize=65536)(self._judged)

    def target(self, url: str) -> Target:
        """Where a message to `url` goes; its address, unless it stands there, is judged later.

        Raises:
            UrlRefused: nowhere.
        """
        return self._cached(url) if len(url) <= CACHED_URL else self._judged(url)

    def check_subscriber(self, url: str, own: Iterable[tuple[str, int]]) -> None:
        """Whether `url` may subscribe, or be a recovery url.

        Args:
            own: host and port of listeners of this broadcaster, as far as they are known.

        Raises:
            UrlRefused: it may not.
        """
        target = self.target(url)
        path = unquote(target.path)
        if path.endswith(PEER_PATHS):
            raise UrlDenied(f"{path} belongs to broadcasters, which subscribe themselves")
        if path.endswith(_OWN_PATHS) and any(_leads_to(target, *pair) for pair in own):
            raise UrlDenied(f"{path} of this broadcaster is no subscriber")

    def check_address(self, target: Target, address: Address) -> None:
        """Whether a message for `target` may be sent to `address`.

        Raises:
            UrlDenied: it may not.
        """
        for judged in judged_as(address):
            hidden = "" if judged == address else f", which is in {address},"
            if (name := _always_denied(judged)) is not None:
                raise UrlDenied(f"{judged}{hidden} is {name}, and always denied")
            if not target.is_peer:
                self._check(target, judged, hidden)

    def allowed(self, target: Target, addresses: Iterable[Address], most: int) -> list[Address]:
        """Of the addresses of a host, in their order, up to `most` that messages may go to.

        Raises:
            UrlDenied: there is none; says what the first one is.
        """
        allowed: list[Address] = []
        refusal: UrlDenied | None = None
        for address in addresses:
            try:
                self.check_address(target, address)
            except UrlDenied as e:
                refusal = refusal or e
            else:
                allowed.append(address)
        if refusal is not None and not allowed:
            raise refusal
        return allowed[:most]

    def _judged(self, url: str) -> Target:
        target = parse_target(url)
        if not target.is_peer:
            if self._https_only and target.scheme != "https":
                raise UrlDenied("must be https (url_https_only)")
            if target.port in self._denied_ports:
                raise UrlDenied(f"port {target.port} is in url_denied_ports")
        if target.address is not None:
            self.check_address(target, target.address)
        else:
            self._check_name(target)
        return target

    def _check_name(self, target: Target) -> None:
        """What can be said before the addresses are known."""
        host, port = target.host, target.port
        if host in _METADATA_NAMES:
            raise UrlDenied(f"{host} is the name of a metadata service, and always denied")
        if target.is_peer:
            return
        for rule in self._deny:
            if rule.has_name(host, port):
                raise UrlDenied(f"{host} is in url_deny ({rule.text})")
        if host == "localhost" or host.endswith(".localhost"):
            self._check(target, _LOOPBACK, f" ({host})")
        elif self._preset is UrlPreset.LISTED and not any(
            rule.has_name(host, port) or (not rule.is_for_names and port in rule.ports)
            for rule in self._allow
        ):
            raise UrlDenied(f"{host} is not in url_allow (url_policy=listed)")

    def _check(self, target: Target, address: Address, hidden: str) -> None:
        for rule in self._deny:
            if rule.has_address(address, target.port):
                raise UrlDenied(f"{address}{hidden} is in url_deny ({rule.text})")
        if self._preset is UrlPreset.INTERNAL or self._is_allowed(target, address):
            return
        if self._preset is UrlPreset.LISTED:
            raise UrlDenied(f"{address}{hidden} is not in url_allow (url_policy=listed)")
        for network, name in _NOT_PUBLIC:
            if address in network:
                raise UrlDenied(
                    f"{address}{hidden} is {name} (url_policy=public); url_allow can except it"
                )

    def _is_allowed(self, target: Target, address: Address) -> bool:
        by_name = target.address is None
        return any(
            rule.has_address(address, target.port)
            or (by_name and rule.has_name(target.host, target.port))
            for rule in self._allow
        )


_OWN_PATHS = tuple(BROADCASTER_ENDPOINTS)


def _leads_to(target: Target, host: str, port: int) -> bool:
    """Whether `target` is a listener that was reached as `host`, or the same one by loopback."""
    if target.port != port:
        return False
    return (
        target.host.strip("[]") == host.lower().strip("[]")
        or target.host == "localhost"
        or (target.address is not None and target.address.is_loopback)
    )
