"""Which urls may subscribe, and which addresses are connected to."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lonelypss.config import BroadcasterConfig, ConfigError
from lonelypss.urlpolicy import (
    Address,
    UrlDenied,
    UrlPolicy,
    UrlPreset,
    UrlRefused,
    judged_as,
    parse_target,
)

from .harness import config


def policy(**options: Any) -> UrlPolicy:
    return UrlPolicy(config(**options))


# Syntax


def test_target_of_a_url() -> None:
    target = parse_target(
        "HTTP://".lower() + "Example.COM:8080/a b".replace(" ", "%20") + "?x=y#é/1"
    )
    assert target.origin == ("http", "example.com", 8080)
    assert target.head.split(b"\r\n")[:2] == [
        b"POST /a%20b?x=y HTTP/1.1",
        b"Host: example.com:8080",
    ]
    assert b"\r\nX-Subscription-Fragment: %C3%A9%2F1\r\n" in target.head


@pytest.mark.parametrize(
    ("url", "origin", "path", "host"),
    [
        ("http://h", ("http", "h", 80), "/", "h"),
        ("http://h/", ("http", "h", 80), "/", "h"),
        ("http://h:80/", ("http", "h", 80), "/", "h"),
        ("https://h:443/", ("https", "h", 443), "/", "h"),
        ("https://h:80/", ("https", "h", 80), "/", "h:80"),
        ("https://h?q", ("https", "h", 443), "/?q", "h"),
        ("http://127.0.0.1:3002/v1", ("http", "127.0.0.1", 3002), "/v1", "127.0.0.1:3002"),
        ("http://[::1]:3002/", ("http", "[::1]", 3002), "/", "[::1]:3002"),
        ("http://h/é?ü=ö", ("http", "h", 80), "/%C3%A9?%C3%BC=%C3%B6", "h"),
        ("http://h/a%2fb%", ("http", "h", 80), "/a%2fb%", "h"),
        ("http://h/a//b/../c", ("http", "h", 80), "/a//b/../c", "h"),
        ("http://h/'\"<>{}", ("http", "h", 80), "/'%22%3C%3E%7B%7D", "h"),
        (
            "http://my_host-1.example/x",
            ("http", "my_host-1.example", 80),
            "/x",
            "my_host-1.example",
        ),
        ("http://h/\u2028\x85", ("http", "h", 80), "/%E2%80%A8%C2%85", "h"),
        ("http://h/@:x@y", ("http", "h", 80), "/@:x@y", "h"),
        ("http://h/#", ("http", "h", 80), "/", "h"),
    ],
)
def test_urls(url: str, origin: Any, path: str, host: str) -> None:
    target = parse_target(url)
    assert target.origin == origin
    assert target.head.startswith(f"POST {path} HTTP/1.1\r\nHost: {host}\r\n".encode())
    assert (b"X-Subscription-Fragment" in target.head) == ("#" in url)


REFUSED_URLS = [
    # no url of ours
    "", "/x", "x", "not a url", "//h/", "http:", "http:/h", "http:///", "http://", "http://#x",
    "http://?x", "file:///etc/passwd", "ftp://h/", "gopher://h/", "unix:/run/x", "ws://h/",
    "http+unix://%2frun%2fx/", "data:,x", "javascript:x", "HTTP://h/", " http://h/", "http://h/ ",
    # the host is not a name or an address in its plain spelling
    "http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/", "http://127.1/", "http://0/",
    "http://0x7f.1/", "http://017700000001/", "http://①②⑦.0.0.1/", "http://127。0。0。1/",
    "http://ⓛocalhost/", "http://1.2.3.4.5/", "http://256.1.1.1/", "http://1.2.3.4./", "http://h./",
    "http://.h/", "http://a..b/", "http://-h/", "http://h-/", f"http://{'a' * 64}/",
    f"http://{'a.' * 127}a/", "http://é.example/", "http://a%2eb/", "http://[::1/", "http://::1/",
    "http://[]/", "http://[::1%25lo]/", "http://[v1.x]/", "http://[::g]/", "http://[1.2.3.4]/",
    "http://0x/", "http://1.0x1/", "http://a b/", "http://h,i/", "http://h;i/", "http://*/",
    # ports
    "http://h:/", "http://h:0/", "http://h:65536/", "http://h:99999/", "http://h:abc/",
    "http://h:-1/", "http://h:8 0/", "http://h:123456/", "http://h:+80/", "http://h:٣/",
    "http://h:80:80/",
    # user names, and what looks like them
    "http://u@h/", "http://u:p@h/", "http://@h/", "http://:@h/", "http://h:80@i/", "http://a@b@h/",
    # what would end a line, or be read differently by somebody else
    "http://h/\r\nX: y", "http://h/\n", "http://h/\t", "http://h/\0", "http://h/\x7f", "http://h\\i/",
    "http://h/\\i", "http://h/#\r\nX: y", "http://h/?a b", "http://h /", "http://h\n/",
    "http://h/#a b",
]  # fmt: skip


@pytest.mark.parametrize("url", REFUSED_URLS)
def test_refused_urls(url: str) -> None:
    with pytest.raises(UrlRefused, match=r"^url-syntax: "):
        parse_target(url)


def test_long_urls_are_not_remembered() -> None:
    one, long = policy(), "http://h/" + "x" * 60_000
    assert one.target(long) is not one.target(long)
    assert one.target("http://h/short") is one.target("http://h/short")


# What subscribes

LISTENERS = [("10.0.0.5", 3003), ("Lonely.example", 3003), ("[fd00::5]", 443)]


@pytest.mark.parametrize(
    ("url", "refusal"),
    [
        # T09
        ("http://10.0.0.5:3003/v1/notify", "of this broadcaster"),
        ("http://10.0.0.5:3003/v1/notify?q#f", "of this broadcaster"),
        ("http://10.0.0.5:3003/v1/n%6ftify", "of this broadcaster"),
        ("http://127.0.0.1:3003/prefix/v1/notify", "of this broadcaster"),
        ("http://[::1]:3003/v1/subscribe/exact", "of this broadcaster"),
        ("http://localhost:3003/v1/set_subscriptions", "of this broadcaster"),
        ("http://lonely.EXAMPLE:3003/v1/notify", "of this broadcaster"),
        ("https://[fd00::5]/v1/notify", "of this broadcaster"),
        ("http://elsewhere/v1/receive_for_websockets", "belongs to broadcasters"),
        ("http://elsewhere/v1/missed%5ffor_websockets", "belongs to broadcasters"),
        # an application may hold a broadcaster and a subscriber
        ("http://10.0.0.5:3003/v1/receive", None),
        ("http://10.0.0.5:3003/v1/notify/x", None),
        ("http://10.0.0.5:3004/v1/notify", None),
        ("http://10.0.0.6:3003/v1/notify", None),
        ("http://elsewhere:3003/v1/notify", None),
    ],
)
def test_own_endpoints(url: str, refusal: str | None) -> None:
    if refusal is None:
        policy().check_subscriber(url, LISTENERS)
    else:
        with pytest.raises(UrlDenied, match=refusal):
            policy().check_subscriber(url, LISTENERS)


# Addresses

ALWAYS_DENIED = [
    "0.0.0.0", "0.1.2.3", "169.254.0.1", "169.254.169.254", "224.0.0.1", "239.1.2.3", "240.0.0.1",
    "255.255.255.255", "192.0.0.192", "100.100.100.200", "168.63.129.16",
    "::", "fe80::1", "fec0::1", "ff02::1", "fd00:ec2::254", "fd20:ce::254", "100::1", "4000::1",
    "2001:db8::1", "3fff::1", "2001:10::1", "64:ff9b:1::7f00:1", "::ffff:0:7f00:1", "5f00::1",
    # IPv4 that hides in IPv6
    "::ffff:169.254.169.254", "::169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1",
    "2001:0:a9fe:a9fe::1", "2001:0:7f00:1::1", "2001:0:808:808:0:0:5601:5601",
    "::ffff:0.0.0.0", "::2",
]  # fmt: skip
NOT_PUBLIC = [
    "127.0.0.1", "127.255.255.255", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "100.64.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1",
    "::1", "fd00::1", "fc00::1",
    "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1", "2002:a00:1::",
    "2001:0:808:808:0:0:80ff:fffe",
]  # fmt: skip
PUBLIC = [
    "8.8.8.8", "1.1.1.1", "172.32.0.1", "172.15.255.255", "100.63.255.255", "169.253.0.1",
    "192.0.1.1", "2600::1", "2a00:1450::1", "64:ff9b::808:808", "2002:808:808::1",
    "::ffff:8.8.8.8",
]  # fmt: skip


def url_of(address: str) -> str:
    return f"http://[{address}]/" if ":" in address else f"http://{address}/"


@pytest.mark.parametrize("address", ALWAYS_DENIED)
@pytest.mark.parametrize("preset", UrlPreset)
def test_always_denied(address: str, preset: UrlPreset) -> None:
    """T01, T03: whatever the preset and the lists say, written in the url or found by its name."""
    one = policy(url_policy=preset, url_allow="*,0.0.0.0/0,::/0,h")
    with pytest.raises(UrlDenied, match=r"^url-policy: .* always denied$"):
        one.target(url_of(address))
    for name in ("http://h/", "http://h/v1/receive_for_websockets"):
        with pytest.raises(UrlDenied):
            one.allowed(one.target(name), [ipaddress.ip_address(address)], 4)


@pytest.mark.parametrize("address", NOT_PUBLIC + PUBLIC)
def test_presets(address: str) -> None:
    url, found = url_of(address), ipaddress.ip_address(address)
    assert policy().target(url).address == found
    public = policy(url_policy=UrlPreset.PUBLIC)
    if address in PUBLIC:
        assert public.target(url).address == found
    else:
        with pytest.raises(UrlDenied, match=r"url_policy=public.*url_allow"):
            public.target(url)
        excepted = policy(url_policy=UrlPreset.PUBLIC, url_allow="0.0.0.0/0,[::/0]:80")
        assert excepted.target(url).address == found
    with pytest.raises(UrlDenied, match="url_policy=listed"):
        policy(url_policy=UrlPreset.LISTED).target(url)


@pytest.mark.parametrize(
    ("address", "inner"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("::1", ["::1"]),
        ("::", ["::"]),
        ("::ffff:7f00:1", ["127.0.0.1"]),
        ("::7f00:1", ["127.0.0.1"]),
        ("64:ff9b::7f00:1", ["127.0.0.1"]),
        ("2002:7f00:1::", ["127.0.0.1"]),
        ("2001:0:808:808:0:0:80ff:fffe", ["8.8.8.8", "127.0.0.1"]),
    ],
)
def test_hidden_addresses(address: str, inner: list[str]) -> None:
    assert [str(a) for a in judged_as(ipaddress.ip_address(address))] == inner


@pytest.mark.parametrize(
    "host", ["metadata.google.internal", "METADATA.google.internal", "instance-data.ec2.internal"]
)
def test_names_of_metadata_services(host: str) -> None:
    with pytest.raises(UrlDenied, match="always denied"):
        policy(url_allow="*").target(f"http://{host}/")


# What an operator may say

JUDGEMENTS: list[tuple[dict[str, Any], str, str | None]] = [
    # https only
    ({"url_https_only": True}, "http://h/", "url_https_only"),
    ({"url_https_only": True}, "https://h/", None),
    # T07
    *(({}, f"http://h:{port}/", "url_denied_ports") for port in (22, 25, 5432, 6379, 2375, 11211)),
    *(({}, f"http://h:{port}/", None) for port in (80, 443, 3002, 8080, 1024, 65535)),
    ({"url_denied_ports": ""}, "http://h:25/", None),
    ({"url_denied_ports": "1-1023"}, "http://h/", "url_denied_ports"),
    ({"url_denied_ports": "", "url_deny": "*:25"}, "http://h:25/", r"url_deny \(\*:25\)"),
    ({"url_denied_ports": "", "url_deny": "*:25"}, "http://10.0.0.1:25/", "url_deny"),
    # deny
    ({"url_deny": "10.0.0.0/8"}, "http://10.1.2.3/", r"url_deny \(10.0.0.0/8\)"),
    ({"url_deny": "10.0.0.0/8"}, "http://[::ffff:10.1.2.3]/", "url_deny"),
    ({"url_deny": "10.0.0.0/8:8000-8999"}, "http://10.1.2.3:8080/", "url_deny"),
    ({"url_deny": "10.0.0.0/8:8000-8999"}, "http://10.1.2.3:9001/", None),
    ({"url_deny": "fd00::/8"}, "http://[fd00::1]/", "url_deny"),
    ({"url_deny": "[fd00::/8]:443"}, "http://[fd00::1]/", None),
    ({"url_deny": "[fd00::/8]:443"}, "https://[fd00::1]/", "url_deny"),
    ({"url_deny": "*.evil.example, bad"}, "http://a.b.evil.example/", "url_deny"),
    ({"url_deny": "*.evil.example, bad"}, "http://evil.example/", None),
    ({"url_deny": "*.evil.example, BAD"}, "http://bad/", "url_deny"),
    ({"url_deny": "127.0.0.0/8"}, "http://localhost/", "url_deny"),
    ({"url_deny": "10.0.0.5", "url_allow": "10.0.0.0/8"}, "http://10.0.0.5/", "url_deny"),
    # public
    ({"url_policy": "public"}, "http://localhost/", "loopback"),
    ({"url_policy": "public"}, "http://a.localhost/", "loopback"),
    ({"url_policy": "public"}, "http://h/", None),
    ({"url_policy": "public", "url_allow": "localhost:80"}, "http://localhost/", None),
    ({"url_policy": "public", "url_allow": "localhost:80"}, "http://localhost:81/", "loopback"),
    ({"url_policy": "public", "url_allow": "10.0.0.0/24"}, "http://10.0.0.9/", None),
    ({"url_policy": "public", "url_allow": "10.0.0.0/24"}, "http://10.0.1.9/", "private"),
    # listed
    ({"url_policy": "listed", "url_allow": "*.example:443"}, "https://a.example/", None),
    ({"url_policy": "listed", "url_allow": "*.example:443"}, "http://a.example/", "listed"),
    ({"url_policy": "listed", "url_allow": "*.example"}, "http://8.8.8.8/", "listed"),
    ({"url_policy": "listed", "url_allow": "*:443"}, "https://8.8.8.8/", None),
    ({"url_policy": "listed", "url_allow": "10.0.0.0/8:80"}, "http://h/", None),  # it may be there
    ({"url_policy": "listed", "url_allow": "10.0.0.0/8:80"}, "http://h:81/", "listed"),
    # other broadcasters are the operator's own
    (
        {"url_policy": "public", "url_https_only": True, "url_deny": "*"},
        "http://127.0.0.1:22/v1/receive_for_websockets",
        None,
    ),
    ({"url_policy": "listed"}, "http://h/v1/missed_for_websockets", None),
]


@pytest.mark.parametrize(("options", "url", "refusal"), JUDGEMENTS)
def test_judgements(options: dict[str, Any], url: str, refusal: str | None) -> None:
    options = {**options, "url_policy": UrlPreset(options.get("url_policy", "internal"))}
    if refusal is None:
        policy(**options).target(url)
    else:
        with pytest.raises(UrlDenied, match=f"^url-policy: .*{refusal}"):
            policy(**options).target(url)


@pytest.mark.parametrize(
    ("options", "found", "allowed"),
    [
        ({}, ["127.0.0.1", "10.0.0.1", "8.8.8.8", "::1", "2600::1"], [0, 1, 2, 3]),
        ({}, ["169.254.1.1", "fe80::1%1", "10.0.0.1"], [2]),
        ({"url_policy": UrlPreset.PUBLIC}, ["127.0.0.1", "8.8.8.8", "::1", "2600::1"], [1, 3]),
        ({"url_policy": UrlPreset.PUBLIC, "url_allow": "h"}, ["127.0.0.1", "0.0.0.0"], [0]),
        ({"url_policy": UrlPreset.PUBLIC, "url_allow": "i"}, ["127.0.0.1"], None),
        ({"url_policy": UrlPreset.LISTED, "url_allow": "10.0.0.0/8"}, ["11.0.0.1"], None),
        ({"url_deny": "10.0.0.0/8"}, ["10.0.0.1", "::ffff:10.0.0.2", "11.0.0.1"], [2]),
        ({}, [], []),
    ],
)
def test_addresses_of_a_name(
    options: dict[str, Any], found: list[str], allowed: list[int] | None
) -> None:
    """T04: each is judged, whatever came first."""
    one, addresses = policy(**options), [ipaddress.ip_address(a) for a in found]
    target = one.target("http://h/")
    if allowed is None:
        with pytest.raises(UrlDenied):
            one.allowed(target, addresses, 4)
    else:
        assert one.allowed(target, addresses, 4) == [addresses[n] for n in allowed]


@pytest.mark.parametrize(
    ("option", "value", "wrong"),
    [
        ("url_allow", "10.0.0.1/8", "host bits"),
        ("url_allow", "10.0.0.256", "10.0.0.256"),
        ("url_allow", "10.0.0.*", "10.0.0"),
        ("url_deny", "a b", "a b"),
        ("url_deny", "h:", "h:"),
        ("url_deny", "h:99999", "99999"),
        ("url_deny", "h:9-1", "9-1"),
        ("url_deny", "[fd00::/8", "fd00"),
        ("url_deny", "[h]:80", "h"),
        ("url_deny", "http://h/", "http"),
        ("url_denied_ports", "22,ssh", "ssh"),
        ("url_denied_ports", "0", "0"),
    ],
)
def test_rules_that_are_none(option: str, value: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option}: .*{wrong}"):
        BroadcasterConfig(**{option: value})


# T02: spellings that others would read as an address

INNER = [ipaddress.ip_address(a) for a in (*ALWAYS_DENIED, *NOT_PUBLIC, *PUBLIC)]


def number(value: int, base: str, padding: int) -> str:
    prefix = {"x": "0x", "X": "0X", "o": "0", "d": ""}[base]
    return prefix + "0" * padding * (base != "d") + format(value, base)


@st.composite
def spellings(draw: st.DrawFn) -> str:
    """Hosts that somebody may take for an address."""
    address: Address = draw(st.sampled_from(INNER))
    if isinstance(address, ipaddress.IPv6Address):
        text = draw(st.sampled_from([address.compressed, address.exploded]))
        zone = draw(st.sampled_from(["", "%lo", "%251", "%1"]))
        return f"[{text}{zone}]"
    # inet_aton: one to four numbers, the last of which takes the rest
    parts = draw(st.integers(1, 4))
    values = list(address.packed[: parts - 1])
    values.append(int.from_bytes(address.packed[parts - 1 :], "big"))
    bases = [draw(st.sampled_from("xXod")) for _ in values]
    text = ".".join(
        number(value, base, draw(st.integers(0, 2)))
        for value, base in zip(values, bases, strict=True)
    )
    if draw(st.booleans()):
        digits = draw(st.sampled_from(["０１２３４５６７８９", "٠١٢٣٤٥٦٧٨٩", "⓪①②③④⑤⑥⑦⑧⑨"]))
        text = text.translate(str.maketrans("0123456789", digits))
    return text.replace(".", draw(st.sampled_from([".", "。", "．", ".."]))) + draw(
        st.sampled_from(["", "", "", ".", "%00", ":"])
    )


@given(st.one_of(spellings(), st.from_regex(r"[0-9a-fx.:\[\]]{1,20}", fullmatch=True)))
def test_spellings(host: str) -> None:
    """What is taken is a name that nobody takes for an address, or an address in the one spelling
    that everybody reads alike, and one that may be connected to."""
    one = policy(url_policy=UrlPreset.PUBLIC)
    try:
        target = one.target(f"http://{host}/")
    except UrlRefused:
        return
    name = target.host.strip("[]")
    try:
        rows = socket.getaddrinfo(name, None, flags=socket.AI_NUMERICHOST)
    except OSError:
        assert target.address is None
    else:
        assert {ipaddress.ip_address(row[4][0]) for row in rows} == {target.address}
        assert target.address is not None
        one.check_address(target, target.address)
