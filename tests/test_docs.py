import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from lonelypsc.cli import main as client
from lonelypsp.globs import glob_matches
from lonelypss.cli import main as broadcaster
from lonelypss.config import options
from programs import ROOT

GENERATOR: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "generate.py"))
PAGES: list[Path] = GENERATOR["pages"]()


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_generated_parts_are_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert GENERATOR["filled"](text) == text, "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_program_is_an_example(page: Path) -> None:
    by_hand = GENERATOR["PART"].sub("", page.read_text(encoding="utf-8"))
    assert "```python" not in by_hand
    assert "<!-- generated" not in by_hand, "a part without its end"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=by_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_in_the_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for program, name in re.findall(r"\b(lonelyps[cs]) ([a-z][a-z-]+)\b", text):
        group = client if program == "lonelypsc" else broadcaster
        assert name in group.commands, f"{program} {name}"


def test_options_that_the_security_page_names() -> None:
    text = (ROOT / "docs/topics/security.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", text))
    of_clients = {"replay_path"}
    assert named - of_clients <= {option.name for option in options()}
    assert len(named) > 20


def test_sections_that_docstrings_refer_to() -> None:
    titles = {
        page: set(re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE))
        for page in ("docs/topics/protocol.md", "docs/topics/design.md")
    }
    referred = set()
    for source in (ROOT / "src").rglob("*.py"):
        joined = " ".join(source.read_text(encoding="utf-8").split())
        referred |= set(re.findall(r'(docs/topics/\w+\.md), "([^"]+)"', joined))
    assert referred
    assert not [(page, title) for page, title in referred if title not in titles[page]]


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (row[1], re.findall("`([^`]*)`", row[2]), re.findall("`([^`]*)`", row[3]))
        for row in re.finditer(
            r"^\| `([^`]+)` \| (.*?) \| (.*?) ?\|$",
            (ROOT / "docs/topics/protocol.md").read_text().partition("## Globs")[2],
            re.MULTILINE,
        )
        if "/" in row[1] or "*" in row[1]
    ],
)
def test_glob_table(pattern: str, yes: list[str], no: list[str]) -> None:
    assert all(glob_matches(pattern, topic.encode()) for topic in yes)
    assert not any(glob_matches(pattern, topic.encode()) for topic in no)
