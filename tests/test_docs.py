"""What README and docs say is executed or checked."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    for page in PAGES:
        for number, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)):
            yield pytest.param(text, id=f"{page.stem}-{number}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", list(blocks("python")))
def test_python_examples_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "example", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("text", list(blocks("bash")))
def test_commands_name_targets_and_configs_that_exist(text):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in text.strip().splitlines():
        program, *words = line.split()
        if program == "make":
            assert words[0] in targets, line
        elif program == "lit-rlhf":
            assert words[0] in ("fit", "validate", "test", "predict", "compare"), line
            assert all((ROOT / word).exists() for word in words if word.endswith(".yaml")), line
        elif program == "python":
            assert words[0] == "-m" and (ROOT / f"{words[1].replace('.', '/')}.py").exists(), line
        else:
            assert program in ("tensorboard", "pip"), line


def test_the_readme_tree_names_every_file_of_the_package():
    tree = (ROOT / "README.md").read_text()
    missing = [
        path.name
        for path in (ROOT / "lit_rlhf").iterdir()
        if path.name not in ("__init__.py", "__main__.py", "__pycache__", "errors.py") and path.name not in tree
    ]
    assert not missing
