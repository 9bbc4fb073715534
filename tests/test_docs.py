"""What README and docs say is executed or checked."""

import io
import re
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningModule
from torch.distributed.run import get_args_parser

import lit_rlhf
from lit_rlhf.cli.commands import COMMANDS
from lit_rlhf.cli.main import main
from tests.cli.command_line import QUICK, SMALL_PPO

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CHAPTERS = sorted((ROOT / "docs" / "course").glob("*.md"))  # whose Python runs in tests/website/test_chapters.py


def blocks(language, pages=PAGES):
    for page in pages:
        for number, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)):
            yield pytest.param(text, id=f"{page.stem}-{number}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", list(blocks("python")))
def test_python_examples_run(text, tmp_path, monkeypatch):
    if needs := re.match(r"# needs (\w+)\n", text):
        pytest.importorskip(needs.group(1), reason=f"needs {needs.group(1)}")
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "example", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("text", list(blocks("bash", PAGES + CHAPTERS)))
def test_commands_name_targets_and_configs_that_exist(text):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for line in text.strip().splitlines():
        program, *words = line.split()
        if program == "make":
            assert words[0] in targets, line
        elif program == "lit-rlhf":
            assert words[0] in COMMANDS, line
            assert all((ROOT / word).exists() for word in words if word.endswith(".yaml")), line
        elif program == "python":
            module = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
            assert (ROOT / module).exists(), line
        elif program == "torchrun":
            launched = get_args_parser().parse_args(words)
            assert (launched.module, launched.training_script) == (True, "lit_rlhf"), line
            assert launched.training_script_args[0] in COMMANDS, line
            assert all((ROOT / word).exists() for word in launched.training_script_args if word.endswith(".yaml")), line
        else:
            assert program in ("tensorboard", "pip", "vllm", "transformers", "curl"), line


def test_the_job_for_slurm_asks_for_a_task_for_each_device_of_its_config():
    (script,) = re.findall(r"```slurm\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.S)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.M))
    (command,) = (line.split() for line in script.splitlines() if line.startswith("srun "))
    options = dict(word.removeprefix("--").split("=") for word in command if "=" in word)
    config = yaml.safe_load((ROOT / command[command.index("--config") + 1]).read_text())
    assert command[1:3] == ["lit-rlhf", "fit"]
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == str(config["trainer"]["devices"])
    assert asked["nodes"] == options["trainer.num_nodes"]
    assert int(options["trainer.strategy.data_parallel_size"]) == int(asked["nodes"]) * int(asked["ntasks-per-node"])
    assert asked["signal"].startswith("SIGUSR1@")


SMALL = {  # appended to the commands of the README, so that they take seconds
    "fit": [*QUICK, "--trainer.max_steps=2", "--trainer.limit_val_batches=1"],
    "predict": QUICK,
    "compare": ["--max_prompts=4", "--generation.max_new_tokens=4"],
    "score": [],
    "export": [],
    "chat": ["--generation.max_new_tokens=4"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pages", [("README.md", "docs/use.md"), ("docs/lora.md",)])
def test_the_command_lines_of_pages_run_one_after_the_other(pages, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Hello", "chosen": " you", "rejected": " to you"}\n')
    function = "def brief(prompts, responses):\n    return [-len(response.split()) for response in responses]\n"
    (tmp_path / "my_rewards.py").write_text(function)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # that of another test
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", "".join((ROOT / page).read_text() for page in pages), re.S)
    commands = [
        line.split(" < ")[0].split() for block in blocks for line in block.splitlines() if line.startswith("lit-rlhf")
    ]
    assert commands
    for _, subcommand, *options in commands:
        on_policy = any(option.startswith("configs/ppo") for option in options)
        small = SMALL_PPO if on_policy and subcommand == "fit" else []
        if "--ckpt_path=X.ckpt" in options:  # which stands for any that a run has kept
            next((tmp_path / "runs" / "dpo").rglob("*.ckpt")).rename("X.ckpt")
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))  # of `chat`
        main([subcommand, *options, *SMALL[subcommand], *small])
    assert (tmp_path / "runs" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not DATA.is_dir(), reason=f"the stories and models are not in {DATA}")
def test_the_command_lines_on_real_text_run_one_after_the_other(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "results.md").read_text()
    (template,) = re.findall(r"```jinja\n(.*?)\n```", page, re.S)
    (tmp_path / "chat.jinja").write_text(template)
    commands = [line.split() for line in page.splitlines() if line.startswith("lit-rlhf") and "$DATA" in line]
    assert len(commands) > 4
    for _, subcommand, *options in commands:
        small = SMALL_PPO if "configs/ppo.yaml" in options else []
        limits = {"fit": SMALL["fit"], "predict": [*QUICK, "--trainer.limit_predict_batches=1"]}.get(
            subcommand, [*QUICK, "--trainer.limit_val_batches=1"]
        )
        main([subcommand, *(option.replace("$DATA", str(DATA)) for option in options), *limits, *small])
    assert {path.parent.name for path in tmp_path.glob("runs/**/model")} == {
        "sft",
        "reward_model",
        "dpo",
        "dpo_base",
        "ppo",
        "hh",
    }


def test_every_test_that_a_page_names_exists():
    defined = set(re.findall(r"def (test_\w+)", "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))))
    for page in PAGES + CHAPTERS:
        assert not set(re.findall(r"`(test_\w+)`", page.read_text())) - defined, page.name


def test_the_readme_names_every_method_beside_a_page():
    rows = [
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|") and "](docs/" in line
    ]
    methods = [name for name in lit_rlhf.__all__ if isinstance(getattr(lit_rlhf, name), type)]
    methods = [name for name in methods if issubclass(getattr(lit_rlhf, name), LightningModule)]
    assert {"SFT", "KTO", "PPO"} <= set(methods)
    assert [name for name in methods if not any(f"`{name}`" in row for row in rows)] == []


def test_the_tree_names_every_file_of_the_package():
    tree = (ROOT / "docs" / "architecture.md").read_text()
    missing = [
        path.name
        for path in (ROOT / "lit_rlhf").iterdir()
        if path.name not in ("__init__.py", "__main__.py", "__pycache__", "py.typed") and path.name not in tree
    ]
    assert not missing
