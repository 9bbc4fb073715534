"""What MkDocs is told beyond mkdocs.yml, so that README.md and docs/ are written once, for readers on GitHub and here.

- README.md, CONTRIBUTING.md and CHANGELOG.md are pages too.
- A link to a file of the repository leads to a page of its source; one in code font to the line of that name or text.
- docs/api.md names the public names; here each of them leads to its docstring, on a page a package.
- Equations between dollars become MathML, which browsers draw by themselves.
- Chapters of the course can be had as notebooks.
"""

import html
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import latex2mathml.converter
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # MkDocs runs this file as one without a package

from website.links import LINK, line_of, outside_fences  # noqa: E402
from website.notebooks import notebook  # noqa: E402

OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".jinja": "jinja"}
MADE_YOURSELF = ("Reward", "RolloutBackend")  # classes whose methods one overrides; of others the arguments count
EQUATION = re.compile(r'<(?P<tag>span|div) class="arithmatex">(?P<open>\\\(|\\\[)(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/."""
    for path, address in OUTSIDE.items():
        add(files, config, address, (ROOT / path).read_text())
    for package, names in public_names().items():
        add(files, config, f"api/{package}.md", api_page(package, names))
    for path in linked_sources():
        add(files, config, f"source/{path}.md", source_page(path))
    for file in list(files.documentation_pages()):
        if is_chapter(file.src_uri):
            cells = nbformat.writes(notebook((ROOT / "docs" / file.src_uri).read_text()))
            add(files, config, notebook_of(file.src_uri), cells)
    return files


def add(files: Files, config: MkDocsConfig, address: str, content: str) -> None:
    """One more file, at an address relative to docs/."""
    files.append(File.generated(config, address, content=content))


def is_chapter(address: str) -> bool:
    """Whether a page has cells that run one after the other."""
    return address.startswith("course/") and address != "course/index.md"


def notebook_of(address: str) -> str:
    """The address of a chapter's notebook."""
    return address.removesuffix(".md") + ".ipynb"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where their targets are on the site."""
    address = page.file.src_uri
    if address.startswith("source/"):
        return markdown
    if address == "api.md":
        return linked_names(markdown)
    homes = {page: path for path, page in OUTSIDE.items()}
    origin = homes.get(address, f"docs/{address}")
    for text in outside_fences(markdown):
        markdown = markdown.replace(text, LINK.sub(lambda found: relinked(found, origin, address), text), 1)
    if is_chapter(address):
        title, rest = markdown.split("\n", 1)
        file = Path(notebook_of(address)).name
        markdown = f"{title}\n\n[As a notebook]({file}){{ .notebook download={file} }}\n{rest}"
    return markdown


def relinked(found: re.Match[str], origin: str, address: str) -> str:
    """A link of `origin`, a path in the repository, as the page at `address` of the site has it."""
    target, _, anchor = found["target"].partition("#")
    if not target or ":" in target.split("/")[0]:
        return found[0]
    path = os.path.normpath(os.path.join(os.path.dirname(origin), target))
    if path in OUTSIDE:
        there = OUTSIDE[path]
    elif path.startswith("docs/"):
        there = path.removeprefix("docs/")
    elif (ROOT / path).is_dir():
        return found["text"]
    else:
        there = f"source/{path}.md"
        line = line_of(ROOT / path, found["text"])
        anchor = f"__codelineno-0-{line}" if line else ""
    way = os.path.relpath(there, os.path.dirname(address) or ".")
    return f"{found['mark']}[{found['text']}]({way}{'#' * bool(anchor)}{anchor})"


def linked_sources() -> Iterator[str]:
    """Files of the repository outside of docs/ that a page links to."""
    paths = set()
    for page in [*(ROOT / name for name in OUTSIDE), *(ROOT / "docs").rglob("*.md")]:
        for text in outside_fences(page.read_text()):
            for found in LINK.finditer(text):
                target = (page.parent / found["target"].partition("#")[0]).resolve()
                if target.is_file() and target.is_relative_to(ROOT):
                    paths.add(target.relative_to(ROOT).as_posix())
    return (path for path in sorted(paths - OUTSIDE.keys()) if not path.startswith("docs/"))


def source_page(path: str) -> str:
    """A file of the repository with numbered lines that links lead to."""
    language = LANGUAGES.get(Path(path).suffix, "text")
    head = "---\nsearch:\n  exclude: true\nhide:\n  - navigation\n  - toc\n---\n"
    code = (ROOT / path).read_text().rstrip()
    return f'{head}# `{path}`\n\n`````{{ .{language} linenums="1" }}\n{code}\n`````\n'


def public_names() -> dict[str, list[str]]:
    """The names of docs/api.md, by their package."""
    packages: dict[str, list[str]] = {}
    for line in (ROOT / "docs" / "api.md").read_text().splitlines():
        if line.startswith("## "):
            packages[line.removeprefix("## ")] = []
        elif found := re.match(r"- `(\w+)`:", line):
            packages[list(packages)[-1]].append(found[1])
    return packages


def api_page(package: str, names: list[str]) -> str:
    """The docstrings of a package's public names."""
    entries = []
    for name in names:
        closed = package in ("lit_rlhf", "lit_rlhf.callbacks") and name not in MADE_YOURSELF
        entries.append(f"::: {package}.{name}\n" + "    options: {members: false}\n" * closed)
    return f"# {package}\n\n" + "\n".join(entries)


def linked_names(markdown: str) -> str:
    """The list of public names, each a link to its docstring."""
    package, lines = "", []
    for line in markdown.splitlines():
        if line.startswith("## "):
            package = line.removeprefix("## ")
            line = f"## [{package}](api/{package}.md)"
        lines.append(re.sub(r"^- `(\w+)`:", rf"- [`\1`](api/{package}.md#{package}.\1):", line))
    return "\n".join(lines)


def on_page_content(content: str, **_: Any) -> str:
    """Set the equations."""
    return EQUATION.sub(mathml, content)


def mathml(found: re.Match[str]) -> str:
    """An equation in TeX as MathML."""
    display = "block" if found["open"] == r"\[" else "inline"
    return latex2mathml.converter.convert(html.unescape(found["tex"]).strip(), display=display)
