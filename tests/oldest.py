"""Print constraints that hold each dependency to the oldest release that pyproject.toml allows: `make test-oldest`."""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lower_bound(requirement: str) -> str:
    """`name==version`."""
    found = re.fullmatch(r"([\w-]+)(?:\[.*\])?>=([\d.]+)(?:,.*)?", requirement)
    assert found, f"pyproject.toml: {requirement} has no lower bound"
    return f"{found[1]}=={found[2]}"


if __name__ == "__main__":
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    print(*map(lower_bound, project["dependencies"] + project["optional-dependencies"]["test"]), sep="\n")
