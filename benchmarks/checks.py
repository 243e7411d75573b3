"""What the checks of urls, limits, loops, rights and hosts cost a notify, in µs of a broadcaster.

    python benchmarks/checks.py [rounds]

The broadcaster of budget.py, whole and with one kind of check taken out, in turn. The difference of
the least times is what that kind costs. Signatures are not among them: they were always there.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import uvloop
from budget import broadcaster
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import lonelypss.routes
import lonelypss.server
from lonelypsp.onewrite import OneWrite
from lonelypsp.rights import Rights
from lonelypsp.shortcut import with_shortcut
from lonelypss.fanout import Fanout
from lonelypss.urlpolicy import UrlPolicy, parse_target


def constant(result: Any) -> Callable[..., Any]:
    return lambda *_: result


@contextmanager
def nothing() -> Iterator[None]:
    yield


def no_limits() -> Any:
    """uvicorn's own protocol with our shortcut, but without the guard."""

    def make(config: Any, shortcuts: Any) -> Any:
        base = with_shortcut(HttpToolsProtocol, shortcuts)

        class Unguarded(base):  # type: ignore[misc, valid-type]
            def connection_made(self, transport: Any) -> None:
                super().connection_made(OneWrite(transport, self.loop.call_soon))

        return Unguarded

    return mock.patch.object(lonelypss.server, "http_protocol", make)


def no_policy() -> Any:
    targets: dict[str, Any] = {}

    def target(self: UrlPolicy, url: str) -> Any:
        found = targets.get(url)
        if found is None:
            found = targets[url] = parse_target(url)
        return found

    return mock.patch.object(UrlPolicy, "target", target)


def no_rights_and_loops() -> Any:
    stack = ExitStack()
    for owner, name, result in (
        (Fanout, "is_loop", False),
        (Rights, "judge", None),
        (lonelypss.routes, "identity", {}),
    ):
        stack.enter_context(mock.patch.object(owner, name, constant(result)))
    return stack


WITHOUT: dict[str, Callable[[], Any]] = {
    "limits of the listener": no_limits,
    "url policy": no_policy,
    "loops, rights, identity": no_rights_and_loops,
}


async def measure(without: Callable[[], Any], rounds: int) -> float:
    import budget

    with tempfile.TemporaryDirectory() as directory, without():
        budget.http_protocol = lonelypss.server.http_protocol
        return await broadcaster(rounds, Path(directory))


async def main(rounds: int) -> None:
    best = dict.fromkeys(["all checks", *WITHOUT], float("inf"))
    for _ in range(3):
        best["all checks"] = min(best["all checks"], await measure(nothing, rounds))
        for name, without in WITHOUT.items():
            best[name] = min(best[name], await measure(without, rounds))
    whole = best["all checks"]
    print(f"| a notify at the broadcaster, all checks | {whole:.1f} µs | |\n|---|--:|--:|")
    for name in WITHOUT:
        cost = whole - best[name]
        print(f"| {name} | {cost:.1f} µs | {cost / whole:.1%} |")


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 30))
