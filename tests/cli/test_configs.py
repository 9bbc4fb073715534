"""Every shipped YAML runs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.cli.command_line import QUICK, SMALL_PPO, run

CONFIGS = sorted(Path("configs").glob("*.yaml"))


@pytest.mark.filterwarnings("ignore")  # a user's run warns where it likes; here it must only work
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_each_config_runs_two_steps_and_exports_a_model_that_transformers_loads(config, workdir, monkeypatch):
    config = config.absolute()
    monkeypatch.chdir(workdir)
    root = Path("out") / config.stem
    small = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", f"--trainer.default_root_dir={root}"]
    if "RolloutDataModule" in config.read_text():
        small += SMALL_PPO
    assert run("fit", "--config", config, *QUICK, *small) == 0

    scorers = {
        "reward_model": AutoModelForSequenceClassification,
        "process_reward_model": AutoModelForTokenClassification,
    }
    model = scorers.get(config.stem, AutoModelForCausalLM).from_pretrained(root / "model")
    summary = json.loads((root / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["peak_memory_mb"] > 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["reward_model", "ppo", "dpo"])
def test_the_overlays_for_little_memory_run_two_steps(stage, workdir, monkeypatch):
    configs = [
        Path("configs", f"{stage}.yaml"),
        *(Path("configs/overlays", f"{o}.yaml") for o in ("lora_dpo" if stage == "dpo" else "lora", "low_memory")),
    ]
    given = [word for config in configs for word in ("--config", config.absolute())]
    monkeypatch.chdir(workdir)
    small = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", f"--trainer.default_root_dir=out/low_{stage}"]
    assert run("fit", *given, *QUICK, *small, *(SMALL_PPO if stage == "ppo" else [])) == 0
    assert (Path("out") / f"low_{stage}" / "model" / "adapter_model.safetensors").exists()


REWARDS = """
data:
  init_args:
    reward: null
    rewards:
      right: {class_path: token_mdp.verifiable.ExactAnswer, init_args: {column: topic}}
      form:
        class_path: lit_rlhf.TextReward
        init_args: {function: my_rewards.form, special_tokens: true, abstain: true, timeout: 10}
      liked: {class_path: lit_rlhf.RewardModelReward, init_args: {model: runs/reward_model/model}}
      brief: my_rewards.brief
    reward_weights: {form: 0.2, liked: 0.5}
    monitors:
      length: my_rewards.brief
      careful:
        class_path: lit_rlhf.EnsembleReward
        init_args: {models: [runs/reward_model/model, out/twin], uncertainty_coef: 2.0}
"""
FUNCTIONS = """
def brief(prompts, responses):
    return [-len(response.split()) for response in responses]


def form(prompts, responses, topic):
    return [None if i % 2 else 1 for i in range(len(responses))]
"""


SEVERAL = ["--config", "several.yaml"]
ONE = ["--data.reward=my_rewards.brief", "--data.monitors=null"]
BY_NAME = ["--data.reward=null", "--data.rewards={brief: my_rewards.brief}", "--data.monitors=null"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", [SEVERAL, ONE, BY_NAME], ids=["several", "one", "by name"])
def test_rewards_are_named_in_yaml_and_on_the_command_line(given, workdir, monkeypatch, capsys):
    ppo = Path("configs/ppo.yaml").absolute()
    monkeypatch.chdir(workdir)
    monkeypatch.syspath_prepend(str(workdir))
    Path("my_rewards.py").write_text(FUNCTIONS)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # that of another test
    Path("several.yaml").write_text(REWARDS)
    shutil.copytree("runs/reward_model/model", "out/twin", dirs_exist_ok=True)
    options = ["--trainer.max_epochs=1", "--trainer.limit_val_batches=1", "--trainer.default_root_dir=out/rewards"]
    assert run("fit", "--config", ppo, *given, *options, *QUICK, *SMALL_PPO) == 0, capsys.readouterr().err
    metrics = json.loads(Path("out/rewards/summary.json").read_text())["metrics"]
    if given is SEVERAL:
        parts = {"right": 1.0, "form": 0.2, "liked": 0.5, "brief": 1.0}
        assert metrics["rollout/form_abstained"] == 0.5 == metrics["rollout/form"]
        assert metrics["rollout/length"] == metrics["rollout/brief"] < 0
        assert metrics["rollout/careful"] == pytest.approx(metrics["rollout/liked"], abs=1e-5)  # twins agree
        total = sum(weight * metrics[f"rollout/{name}"] for name, weight in parts.items())
        assert metrics["rollout/score"] == pytest.approx(total, abs=1e-5)
    else:
        assert metrics["rollout/score"] < 0
        assert ("rollout/brief" in metrics) == (given is BY_NAME)
