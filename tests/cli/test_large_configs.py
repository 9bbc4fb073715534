"""Every recipe of `configs/large/` runs on a CPU, one after the other as its chain goes, on models of its architecture.

The real ones are planned, on their shapes: a config.json and a tokenizer are enough for that.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.cli.command_line import QUICK, run
from tests.large_models import (
    SHAPES,
    file_of,
    save_scoring_adapter,
    save_shape_of,
    save_tiny_of,
    write_rows,
)

FOLDER = Path("configs/large").absolute()
RECIPES = sorted(FOLDER.glob("*.yaml"))
CHAINS = {
    "qwen3_0.6b": ["sft", "dpo"],
    "llama3.2_1b": ["sft", "reward_model", "ppo", "dpo"],
    "qwen3_8b_lora": ["24gb", "reward_model", "80gb"],
    "llama3.1_8b": ["fsdp2"],
}


def config_of(chain, step):
    """The file of one step."""
    return FOLDER / f"{chain}_{step}.yaml"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of tiny models, by chain, and of rows."""
    folder = tmp_path_factory.mktemp("tiny")
    for chain in SHAPES:
        save_tiny_of(chain, folder / chain)
    write_rows(folder, count=16, longest=40)
    return folder


def given(config, chain, folder):
    """Options in place of what a recipe names on the hub."""
    options = yaml.safe_load(config.read_text())
    model, data = options["model"]["init_args"], options["data"]["init_args"]
    words = [] if model["policy"].startswith("runs/") else [f"--model.policy={folder / chain}"]
    for role in ("train", "validation"):
        if data[role] is not None:
            words.append(f"--data.{role}={file_of(data[role], folder)}")
    return words


def on_a_cpu(config):
    """Options in place of what a CPU cannot do."""
    said = config.read_text()
    words = [*QUICK, "--trainer.devices=1", "--trainer.precision=32-true", "--trainer.max_steps=2"]
    words += ["--trainer.max_epochs=1", "--trainer.accumulate_grad_batches=1"]
    words += ["--trainer.limit_val_batches=1", "--trainer.val_check_interval=null", "--samples.num_prompts=0"]
    if "strategy:" in said:
        words.append("--trainer.strategy=auto")
    if "nf4" in said and find_spec("bitsandbytes") is None:
        words.append("--model.frozen_dtype=bfloat16")
    if "lit_rlhf.PPO" in said:
        words += ["--data.rollout_size=8", "--data.num_slots=4", "--data.max_new_tokens=8"]
    else:
        words.append("--data.batch_size=8")
    if "num_proc" in said:
        words.append("--data.num_proc=null")
    return words


def test_every_recipe_is_in_a_chain():
    assert {config_of(chain, step) for chain, steps in CHAINS.items() for step in steps} == set(RECIPES)


@pytest.mark.parametrize("config", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_the_command_that_runs_it(config):
    commands = re.findall(r"^# +lit-rlhf fit --config (\S+)$", config.read_text(), re.M)
    assert f"configs/large/{config.name}" in commands
    assert all((FOLDER.parents[1] / command).exists() for command in commands)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chain", CHAINS)
def test_each_recipe_takes_two_steps_from_what_the_one_before_it_exported(chain, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for step in CHAINS[chain]:
        config = config_of(chain, step)
        words = ["fit", "--config", config, *given(config, chain, tiny), *on_a_cpu(config)]
        assert run(*words) == 0, capsys.readouterr().err
        root = Path(yaml.safe_load(config.read_text())["trainer"]["default_root_dir"])
        assert json.loads((root / "summary.json").read_text())["steps"] == 2
        assert any((root / "model").glob("*.safetensors"))


def write_shapes(folder, **other):
    """What plans of the recipes need, exports of the runs before them included, in place of the real models."""
    for chain in SHAPES:
        save_shape_of(chain, folder / chain, **other)
    for chain in ("qwen3_0.6b", "llama3.2_1b"):
        save_shape_of(chain, folder / "runs" / chain / "sft/model", **other)
    scores = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    save_shape_of("llama3.2_1b", folder / "runs/llama3.2_1b/reward_model/model", **other, **scores)
    save_scoring_adapter(folder / "qwen3_8b_lora", folder / "runs/qwen3_8b_lora/reward_model/model")
    write_rows(folder, count=48, longest=4096)


GPUS = {"qwen3_8b_lora_24gb": (1, 24), "llama3.1_8b_fsdp2": (8, 80)}  # one of 80 GB for the others


def plan_of(config, folder, monkeypatch, capsys, *options):
    """What the plan of a recipe says, for the hardware that the recipe is for."""
    monkeypatch.chdir(folder)
    (chain,) = (chain for chain in CHAINS if config.stem.startswith(f"{chain}_"))
    gpus, memory = GPUS.get(config.stem, (1, 80))
    words = ["plan", "--config", config, *given(config, chain, folder), f"--gpus={gpus}", f"--memory={memory}"]
    words += options
    assert run(*words) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [FOLDER / f"{name}.yaml" for name in GPUS], ids=lambda path: path.stem)
def test_models_as_wide_as_the_real_ones_have_a_plan_without_a_network_or_weights(
    config, tmp_path, monkeypatch, capsys
):
    write_shapes(tmp_path, num_hidden_layers=1)
    small = ["--data.max_length=512", "--data.max_tokens=1024", "--trainer.accumulate_grad_batches=1"]
    assert "it fits into" in plan_of(config, tmp_path, monkeypatch, capsys, *small)


@pytest.mark.slow  # a minute or two each: every operation of every block is done on shapes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_fits_into_the_memory_that_it_is_for(config, tmp_path, monkeypatch, capsys):
    write_shapes(tmp_path)
    said = plan_of(config, tmp_path, monkeypatch, capsys)
    assert f"it fits into {GPUS.get(config.stem, (1, 80))[1]}.00 GB" in said
