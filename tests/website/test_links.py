"""Links lead somewhere on GitHub, and those to code to the line that they name."""

import re
from pathlib import Path

import pytest

from website.links import LINK, line_of, outside_fences

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LOSS = "lit_rlhf/losses/preference.py"


def links(page):
    return [found for text in outside_fences(page.read_text()) for found in LINK.finditer(text)]


def test_code_in_fences_has_no_links():
    markdown = "See [a](b.md).\n\n```python\nx = [1](2)\n```\n\n````text\n```\n[c](d)\n```\n````\n\nAnd [e](f.md)."
    assert [found["target"] for text in outside_fences(markdown) for found in LINK.finditer(text)] == ["b.md", "f.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page):
    targets = {found["target"].partition("#")[0] for found in links(page) if "://" not in found["target"]} - {""}
    missing = {target for target in targets if not (page.parent / target).exists()}
    assert not missing, f"{page.name} links to what is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_source_that_show_code_name_a_line_of_it(page):
    for found in links(page):
        if found["target"].endswith(".py") and found["text"].startswith("`") and "/" not in found["text"]:
            path = page.parent / found["target"]
            assert line_of(path, found["text"]), f"{page.name}: {path.name} has not, or more than once, {found['text']}"


def test_a_name_leads_to_its_definition():
    lines = (ROOT / LOSS).read_text().splitlines()
    assert lines[line_of(ROOT / LOSS, "`dpo_loss`") - 1].startswith("def dpo_loss(")
    assert lines[line_of(ROOT / LOSS, "`lit_rlhf.losses.dpo_loss`") - 1].startswith("def dpo_loss(")


def test_text_that_is_no_code_or_no_line_leads_to_the_file(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ny = 2\ny = 2\n")
    assert line_of(tmp_path / "a.py", "`x = 1`") == 1
    assert line_of(tmp_path / "a.py", "`y = 2`") is None  # twice
    assert line_of(tmp_path / "a.py", "the file") is None
    assert line_of(tmp_path / "a.py", "`z`") is None


def test_every_page_of_the_docs_has_a_place_in_the_navigation():
    named = set(re.findall(r"^ +- .*?([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[2:]}
    assert not pages - named, "give these pages a place in the nav of mkdocs.yml"
