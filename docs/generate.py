"""Fills the generated parts of README.md and docs/ from the code and from examples/.

A part stands between `<!-- generated: NAME ARGUMENT -->` and `<!-- end -->`. Without arguments the
files are rewritten; with --check nothing is written, and the status is 1 if something is stale.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from lonelypsc import errors
from lonelypsc.client import PubSubClient, PubSubClientSubscription
from lonelypsc.config.config import HttpPubSubConfig
from lonelypsc.config.ws_config import WebsocketPubSubConfig
from lonelypsp import bodies, messages, signing
from lonelypsp.session import RULES, Inside, Url
from lonelypsp.wire import layout
from lonelypss.config import options
from lonelypss.outcomes import Outcome

ROOT = Path(__file__).resolve().parent.parent
PART = re.compile(r"(?P<begin><!-- generated: (?P<name>.+?) -->\n).*?(?P<end><!-- end -->)", re.S)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def code(text: object) -> str:
    return f"`{text}`".replace("|", "\\|") if text != "" else ""


def sentence(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def example(name: str) -> str:
    return f"```python\n{(ROOT / 'examples' / name).read_text(encoding='utf-8')}```\n"


def option_table() -> str:
    rows = [
        (code(row.name), code("none" if row.default is None else row.default), row.unit, row.help)
        for row in options()
    ]
    return table(
        ("option", "default", "unit", "meaning"), [[sentence(c) for c in row] for row in rows]
    )


def endpoint_table(endpoints: Mapping[str, bodies.Endpoint]) -> str:
    return table(
        ("POST", "request body", "signed as", "body of the 200 answer", "signed as"),
        [
            (
                code(e.path),
                code(e.request.__name__),
                code(e.request_operation),
                code(e.response.__name__),
                code(e.response_operation),
            )
            for e in endpoints.values()
        ],
    )


def body_tables() -> str:
    named: dict[str, type] = {}
    for endpoints in (bodies.BROADCASTER_ENDPOINTS, bodies.SUBSCRIBER_ENDPOINTS):
        for endpoint in endpoints.values():
            for cls in (endpoint.request, endpoint.response):
                named.setdefault(cls.__name__, cls)
    return "\n".join(body_table(cls) for cls in named.values())


def body_table(cls: Any) -> str:
    rows = [(code(name), codec.wire) for name, codec in layout(cls).items()]
    if hasattr(cls, "TYPE"):
        rows.insert(0, ("type", f"u16, always {cls.TYPE}"))
    if "length" in layout(cls):
        rows.append(("message", "exactly `length` bytes, then the body ends"))
    elif getattr(cls, "TRAILING_IGNORED", False):
        rows.append(("", "what follows is ignored"))
    return f"**{cls.__name__}**\n\n{table(('field', 'on the wire'), rows)}"


def operation_table() -> str:
    return table(
        ("code", "operation", "secret", "signed after the common prefix", "once"),
        [
            (
                str(row.code),
                code(row.name),
                row.direction.value,
                "; ".join(f"{code(name)} ({codec.wire})" for name, codec in row.layout),
                "yes" if row.single_use else "no",
            )
            for row in signing.OPERATIONS.values()
        ],
    )


def outcome_table() -> str:
    return table(
        ("answer", "counted", "afterwards", "its host"),
        [(row.answer, row.count, row.then, row.host.value) for row in Outcome],
    )


def kinds_table() -> str:
    """Type numbers, and what may follow what: the rules of `lonelypsp.session`."""
    rows = []
    for end, registered in (
        ("subscriber", messages.FROM_SUBSCRIBER),
        ("broadcaster", messages.FROM_BROADCASTER),
    ):
        for kind, classes in sorted(registered.items()):
            for cls in classes:
                rule = RULES[cls]
                answers = [rule.answer, rule.more]
                rows.append(
                    (
                        end,
                        str(kind),
                        code(cls.__name__),
                        code(cls.OPERATION),
                        _URL_TEXTS[rule.url],
                        " or ".join(code(a.__name__) for a in answers if a is not None),
                        _INSIDE_TEXTS[rule.inside],
                    )
                )
    head = ("from", "type", "message", "signed as", "over a url", "answered by", "between parts")
    return table(head, rows)


_URL_TEXTS = {
    Url.NONE: "",
    Url.OWN: "its sender's next",
    Url.OWN_AS_RECOVERY: "its sender's next, as recovery",
    Url.REQUEST: "that of what it answers",
}
_INSIDE_TEXTS = {
    Inside.YES: "yes",
    Inside.ACCEPTED: "taken, never sent",
    Inside.NO: "no",
    Inside.ONLY: "only there",
}


def header_table() -> str:
    """The headers of each message, in the order of the minimal form."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for registered in (messages.FROM_SUBSCRIBER, messages.FROM_BROADCASTER):
        for classes in registered.values():
            for cls in classes:
                headers = ", ".join(code(header.name) for header in cls.HEADERS.values())
                rows.setdefault((headers, "yes" if cls.BODY else ""), []).append(cls.__name__)
    head = ("message", "headers", "body")
    return table(head, [(", ".join(map(code, names)), *row) for row, names in rows.items()])


def header_values() -> str:
    """How the value of each header is written."""
    texts: dict[str, list[str]] = {}
    for registered in (messages.FROM_SUBSCRIBER, messages.FROM_BROADCASTER):
        for header in (h for cs in registered.values() for c in cs for h in c.HEADERS.values()):
            ways = texts.setdefault(header.name, [])
            if header.wire not in ways:
                ways.append(header.wire)
    return table(
        ("header", "value"), [(code(name), "; or ".join(ways)) for name, ways in texts.items()]
    )


def settings_table(config: Any) -> str:
    helps = documented(inspect.getdoc(config) or "")
    rows = []
    for field in fields(config):
        default = code(field.default)
        if field.name in ("broadcasters", "auth") or field.default is MISSING:
            default = "required" if field.default_factory is MISSING else "empty"
        rows.append((code(field.name), default, sentence(helps[field.name])))
    return table(("setting", "default", "meaning"), rows)


def documented(doc: str) -> dict[str, str]:
    """The entries of a docstring's "Args:" section."""
    section = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", doc, re.S | re.M)
    assert section is not None
    entries = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|\Z)", section[1], re.S | re.M)
    return {name: re.sub(r"[;.] default:? [^.;]*\.?$", ".", sentence(t)) for name, t in entries}


def methods(*classes: type) -> str:
    parts = []
    for cls in classes:
        parts.append(f"### {cls.__name__}\n\n{sentence(first_paragraph(cls))}\n")
        listed = []
        for name, member in vars(cls).items():
            if name.startswith("_") or not inspect.isfunction(member):
                continue
            if not member.__doc__:
                continue
            doc = sentence(first_paragraph(member))
            listed.append(f"- `{name}({parameters(member)})`: {doc}\n")
        parts.append("".join(listed))
    return "\n".join(parts)


def parameters(function: Callable[..., Any]) -> str:
    shown: list[str] = []
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in "".join(shown):
            shown.append("*")
        if parameter.kind is parameter.VAR_POSITIONAL:
            shown.append(f"*{parameter.name}")
        elif parameter.default is parameter.empty:
            shown.append(parameter.name)
        else:
            shown.append(f"{parameter.name}={parameter.default!r}")
    return ", ".join(shown)


def first_paragraph(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n\n")[0]


def error_table() -> str:
    found = [
        cls
        for cls in vars(errors).values()
        if inspect.isclass(cls) and issubclass(cls, errors.PubSubError)
    ]
    rows = [(code(cls.__name__), sentence(first_paragraph(cls))) for cls in found]
    return table(("error", "meaning"), rows)


GENERATORS: Mapping[str, Callable[..., str]] = {
    "example": example,
    "options": option_table,
    "broadcaster endpoints": lambda: endpoint_table(bodies.BROADCASTER_ENDPOINTS),
    "subscriber endpoints": lambda: endpoint_table(bodies.SUBSCRIBER_ENDPOINTS),
    "bodies": body_tables,
    "outcomes": outcome_table,
    "operations": operation_table,
    "websocket kinds": kinds_table,
    "websocket headers": header_table,
    "websocket values": header_values,
    "client settings": lambda: settings_table(HttpPubSubConfig),
    "websocket settings": lambda: settings_table(WebsocketPubSubConfig),
    "client methods": lambda: methods(PubSubClient, PubSubClientSubscription),
    "client errors": error_table,
}


def generate(name: str) -> str:
    if name in GENERATORS:
        return GENERATORS[name]()
    kind, _, argument = name.partition(" ")
    return GENERATORS[kind](argument)


def filled(text: str) -> str:
    return PART.sub(lambda m: f"{m['begin']}{generate(m['name'])}{m['end']}", text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    stale = 0
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            stale = 1
            print(path.relative_to(ROOT), "is stale" if "--check" in sys.argv else "rewritten")  # noqa: T201
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    return stale if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
