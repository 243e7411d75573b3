"""What a key may do, and that nothing which it may do leads further."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lonelypsp.errors import AuthResult, LocalProtocolError
from lonelypsp.globs import glob_matches
from lonelypsp.rights import NotAllowed, Rights, covers, url_starts_with
from lonelypsp.signing import Hmac, Key, Token

NOW = 1_700_000_000.0
URL = "http://10.0.0.7:3002/v1/receive"


# topics and globs


@pytest.mark.parametrize(
    ("rule", "glob", "covered"),
    [
        ("a/**", "a/**", True),
        ("a/**", "a/b", True),
        ("a/**", "a/*", True),
        ("a/**", "a/b/**/c", True),
        ("a/**", "a/[!b]", True),
        ("a/b/**", "a/b/*", True),
        ("**", "anything/**", True),
        ("/**", "/x", True),
        ("a/*", "a/*", True),
        ("a/*", "a/b", False),  # it is, but the rule says only what is plain
        ("a/**", "a", False),
        ("a/**", "ab/*", False),
        ("a/**", "*/b", False),
        ("a/**", "**", False),
        ("a/**", "[a]/b", False),
        ("a/**", "?/b", False),
        ("a/b/**", "a/**", False),
        ("*/**", "x/y", False),
        ("a?/**", "a?/b", False),
        ("a[/**", "a[/b", False),
        ("a**", "ab", False),
    ],
)
def test_which_globs_a_rule_covers(rule: str, glob: str, covered: bool) -> None:
    assert covers(rule, glob) is covered


SEGMENT = st.text("ab*?[]!-", max_size=4) | st.just("**")
PATTERN = st.lists(SEGMENT, min_size=1, max_size=4).map("/".join)
TOPIC = st.lists(st.text("ab[]-!", max_size=3), min_size=1, max_size=5).map("/".join)


@given(rule=PATTERN | PATTERN.map(lambda p: p + "/**"), glob=PATTERN, topic=TOPIC, data=st.data())
@settings(max_examples=500, deadline=None)
def test_nothing_that_a_covered_glob_matches_lies_outside(
    rule: str, glob: str, topic: str, data: st.DataObject
) -> None:
    text = rule.removesuffix("/**")
    glob = data.draw(st.sampled_from([glob, f"{text}/{glob}", f"{text}/", f"{text}/**"]))
    topic = data.draw(st.sampled_from([topic, f"{text}/{topic}", f"{text}/", f"{text}//{topic}"]))
    if covers(rule, glob) and glob_matches(glob, topic.encode()):
        assert glob_matches(rule, topic.encode())


# urls


@pytest.mark.parametrize(
    ("prefix", "url", "fits"),
    [
        ("http://10.0.0.", URL, True),
        ("http://10.0.0.", "http://10.0.0.255", True),
        ("http://10.0.0.", "http://10.0.0.5.evil/", False),
        ("http://10.0.0.", "http://10.0.0.evil/", False),
        ("http://10.0.0.", "http://10.0.0.5.6/", False),
        ("http://10.0.0.", "http://10.0.0.x@evil/", False),
        ("http://10.0.0.", "http://10.0.0.@evil/", False),
        ("http://10.0.0.", "http://10.0.0.5@evil/", False),
        ("http://10.0.0.", "http://10.0.0.5:x@evil/", False),
        ("http://10.0.0.", "http://10.0.0.5\\@evil/", False),
        ("http://10.0.0.", "http://10.0.0.5#@evil/", True),  # evil is part of the fragment
        ("http://10.0.0.", "http://evil/?http://10.0.0.5/", False),
        ("http://10.0.0.", "https://10.0.0.5/", False),
        ("http://10.0.0.", "http://10.0.1.5/", False),
        ("http://10.0.0.", "http://10.0.0.5\r\nX: y/", False),
        ("http://10.0.0.", "http://10.0.0.5/\n", False),
        ("http://10.0.0.", " http://10.0.0.5/", False),
        ("http://10.0.0.", "HTTP://10.0.0.5/", False),
        ("http://10.0.0.", "http:10.0.0.5/", False),
        ("http://10.0.0.", "http:///10.0.0.5/", False),
        ("http://10.0.0.", "http://167772165/", False),
        ("http://10.0.0.", "http://10.0.0.٥/", False),
        ("http://10.0.0.", "file://10.0.0.5/", False),
        ("http://10.0.0.7", URL, True),
        ("http://10.0.0.7", "http://10.0.0.70/", False),
        ("http://10.0.0.7:3002", URL, True),
        ("http://10.0.0.7:3002", "http://10.0.0.7:30020/", False),
        ("http://10.0.0.7:3002", "http://10.0.0.7/", False),
        ("http://10.0.0.7/v1", URL, True),
        ("http://10.0.0.7/v1/", URL, True),
        ("http://10.0.0.7/v1", "http://10.0.0.7/v1", True),
        ("http://10.0.0.7/v1", "http://10.0.0.7/v1?x", True),
        ("http://10.0.0.7/v1", "http://10.0.0.7/v1#x", True),
        ("http://10.0.0.7/v1", "http://10.0.0.7/v10", False),
        ("http://10.0.0.7/v1", "http://10.0.0.7/", False),
        ("http://10.0.0.7/v1", "http://10.0.0.7/v1/../admin", False),
        ("http://10.0.0.7/v1", "http://10.0.0.7/v1/%2e%2E/admin", False),
        ("http://10.0.0.7/v1", "http://10.0.0.7/v1/..%2fadmin", False),
        ("http://10.0.0.7/v1", "http://10.0.0.7/v1/..\\admin", False),
        ("http://10.0.0.7/v1", "http://10.0.0.7?/v1/x", False),
        ("https://.example.internal", "https://a.b.example.internal:8443/x", True),
        ("https://.example.internal", "https://A.Example.internal/", True),
        ("https://.example.internal", "https://example.internal/", False),
        ("https://.example.internal", "https://evilexample.internal/", False),
        ("https://.example.internal", "https://a.example.internal.evil/", False),
        ("http://[fd00::1]", "http://[FD00::1]:80/x", True),
        ("http://[fd00::1]", "http://[fd00::10]/", False),
        ("http://h", "", False),
    ],
)
def test_urls_under_a_prefix(prefix: str, url: str, fits: bool) -> None:
    assert url_starts_with(url, prefix) is fits


HOSTILE = st.text("10.:/@\\?#ehttp[]%2xv\n ", max_size=30)


@given(rest=HOSTILE)
@settings(max_examples=500, deadline=None)
def test_no_spelling_gets_out_of_a_prefix(rest: str) -> None:
    """Judged by another parser."""
    from urllib.parse import urlsplit

    url = f"http://10.0.0.{rest}"
    if url_starts_with(url, "http://10.0.0."):
        parts = urlsplit(url)
        assert parts.username is None
        assert (parts.hostname or "").startswith("10.0.0.")
        assert all(octet.isdigit() for octet in (parts.hostname or "").split("."))


# what stands in the file


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ([], '"rights" may hold notify, subscribe, urls'),
        ({"notfy": ["a"]}, '"rights" may hold notify, subscribe, urls'),
        ({"notify": "a/**"}, '"notify" must be a list of texts'),
        ({"notify": [1]}, '"notify" must be a list of texts'),
        ({"subscribe": [""]}, '"subscribe" must be a list of texts'),
        ({"urls": ["10.0.0."]}, "is not like http://"),
        ({"urls": ["http://u@h"]}, "is not like http://"),
        ({"urls": ["http://"]}, "is not like http://"),
        ({"urls": ["http://h/?x"]}, "is not like http://"),
    ],
)
def test_bad_rights_are_refused(document: Any, complaint: str) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        Rights.of(document)
    assert complaint in str(caught.value)


# what is judged


RIGHTS = Rights.of({"notify": ["a/**", "log"], "subscribe": ["a/**"], "urls": ["http://10.0.0."]})
SUBSCRIBE: dict[str, Any] = {"url": URL, "recovery": None, "topic": b"a/b", "tracing": b""}
NOTIFY = {"topic": b"a/b", "identifier": b"i", "sha512": bytes(64), "tracing": b""}
SET = {"url": URL, "etag_format": 0, "etag": bytes(64), "tracing": b""}


def listed(*exact: Any, globs: Any = ()) -> Any:
    return {**SET, "listed": lambda: (exact, globs)}


CASES: list[tuple[str, dict[str, Any], str | None]] = [
    ("NOTIFY", NOTIFY, None),
    ("NOTIFY", {**NOTIFY, "topic": b"log"}, None),
    ("NOTIFY", {**NOTIFY, "topic": b"logs"}, "notify"),
    ("NOTIFY", {**NOTIFY, "topic": b"a"}, "notify"),
    ("NOTIFY", {**NOTIFY, "topic": b"a/\xff"}, "notify"),
    ("SUBSCRIBE_EXACT", SUBSCRIBE, None),
    ("SUBSCRIBE_EXACT", {**SUBSCRIBE, "recovery": ""}, None),
    ("SUBSCRIBE_EXACT", {**SUBSCRIBE, "topic": b"log"}, "subscribe"),
    ("SUBSCRIBE_EXACT", {**SUBSCRIBE, "url": "http://10.0.1.1/"}, "urls"),
    ("SUBSCRIBE_EXACT", {**SUBSCRIBE, "recovery": "http://10.0.1.1/"}, "urls"),
    ("SUBSCRIBE_EXACT", {**SUBSCRIBE, "url": "websocket:nonce:1"}, None),
    ("SUBSCRIBE_GLOB", {**SUBSCRIBE, "glob": "a/*"}, None),
    ("SUBSCRIBE_GLOB", {**SUBSCRIBE, "glob": "*"}, "subscribe"),
    ("SUBSCRIBE_GLOB", {**SUBSCRIBE, "glob": "a/*", "recovery": "http://x/"}, "urls"),
    ("CHECK_SUBSCRIPTIONS", {"url": URL, "tracing": b""}, None),
    ("CHECK_SUBSCRIPTIONS", {"url": "http://h/", "tracing": b""}, "urls"),
    ("SET_SUBSCRIPTIONS", listed(), None),
    ("SET_SUBSCRIPTIONS", listed((b"a/b", None), globs=[("a/*", URL)]), None),
    ("SET_SUBSCRIPTIONS", listed((b"a/b", None), (b"c", None)), "subscribe"),
    ("SET_SUBSCRIPTIONS", listed(globs=[("a/*", None), ("**", None)]), "subscribe"),
    ("SET_SUBSCRIPTIONS", listed((b"a/b", "http://h/")), "urls"),
    ("SET_SUBSCRIPTIONS", {**listed(), "url": "http://h/"}, "urls"),
]


@pytest.mark.parametrize(("operation", "fields", "missing"), CASES)
@pytest.mark.parametrize("kind", ["hmac", "token"])
def test_rights(kind: str, operation: str, fields: dict[str, Any], missing: str | None) -> None:
    def auth(rights: Rights | None) -> Any:
        key = Key(b"k" * 64, "tenant", rights)
        return Hmac([Key(b"o" * 64), key]) if kind == "hmac" else Token([Key(b"o"), key])

    signer = Hmac(b"k" * 64) if kind == "hmac" else Token("k" * 64)
    value = signer.authorize(operation, fields, NOW)
    assert auth(None).check(operation, fields, value, NOW) is AuthResult.OK
    assert auth(Rights()).check(operation, fields, value, NOW) is AuthResult.OK
    limited = auth(RIGHTS)
    if missing is None:
        assert limited.check(operation, fields, value, NOW) is AuthResult.OK
    else:
        with pytest.raises(NotAllowed) as caught:
            limited.check(operation, fields, value, NOW)
        assert caught.value.status == 403
        assert f"(its {missing!r} rights" in str(caught.value)
        assert "'tenant'" in str(caught.value)
        assert "k" * 64 not in str(caught.value)


def test_rights_are_not_looked_at_before_the_signature() -> None:
    def unreadable() -> Any:
        raise AssertionError

    fields = {**SET, "listed": unreadable}
    limited = Hmac([Key(b"k" * 64, "tenant", RIGHTS)])
    stranger = Hmac(b"x" * 64).authorize("SET_SUBSCRIPTIONS", fields, NOW)
    assert limited.check("SET_SUBSCRIPTIONS", fields, stranger, NOW) is AuthResult.FORBIDDEN


def test_a_long_topic_is_not_repeated_in_full() -> None:
    fields = {**NOTIFY, "topic": b"x" * 60_000}
    with pytest.raises(NotAllowed) as caught:
        RIGHTS.judge("tenant", "NOTIFY", fields)
    assert len(str(caught.value)) < 500
