"""Write docs/api.md, the list of public names: `make api`."""

import importlib
import inspect
import textwrap
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
PACKAGES = (
    "lit_rlhf",
    "lit_rlhf.losses",
    "lit_rlhf.callbacks",
    "lit_rlhf.oracle",
    "lit_rlhf.demo",
    "token_mdp",
    "token_mdp.verifiable",
)
ALIASES = {  # types of functions and values, which have no docstring
    "MODEL_DIR": "Folder of the tokenizer and the Llama configuration, without weights.",
    "LogprobFn": "A policy for the oracle: prompt (P,) and prefixes (n, t) to (n, V) log-probs of the next token.",
    "RewardFn": "A reward for the oracle: prompt (P,), completions (C, T) and their lengths (C,) to (C,) rewards.",
}
HEAD = """# Public names

What a YAML or a script of yours may name, by the package that it is imported from; all else may move, also where the
docs look into a room. A line is the first of the docstring; `help(name)` has the rest: shapes, units, errors, sources.
`make api` writes this page.
"""


def page() -> str:
    """The page as it should be."""
    parts = [HEAD]
    for package in PACKAGES:
        parts.append(f"\n## {package}\n")
        names = importlib.import_module(package).__all__
        rooms = sorted({room_of(package, name) for name in names})
        for room in rooms:
            parts.append(f"\n### {room}\n\n" if package == "lit_rlhf" else "\n" * (room == rooms[0]))
            parts += [line_of(package, name) for name in names if room_of(package, name) == room]
    return "".join(parts)


def room_of(package: str, name: str) -> str:
    """The room of `lit_rlhf`, or the file of a package that is a room itself, in which a name is defined."""
    inside = getattr(importlib.import_module(package), name).__module__.removeprefix(f"{package}.")
    return inside.split(".")[0] if name not in ALIASES else ""


def line_of(package: str, name: str) -> str:
    """A name and the first line of its docstring."""
    said = ALIASES.get(name) or inspect.getdoc(getattr(importlib.import_module(package), name))
    assert said, f"{package}.{name} has no docstring"
    return (
        textwrap.fill(f"- `{name}`: {said.splitlines()[0]}", 120, subsequent_indent="  ", break_on_hyphens=False) + "\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page())
