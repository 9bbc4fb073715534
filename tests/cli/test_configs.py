"""Every shipped YAML runs."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.cli.command_line import QUICK, SMALL_PPO, run

CONFIGS = sorted(Path("configs").glob("*.yaml"))


@pytest.mark.filterwarnings("ignore")  # a user's run warns where it likes; here it must only work
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_each_config_runs_two_steps_and_exports_a_model_that_transformers_loads(config, workdir, monkeypatch):
    config = config.absolute()
    monkeypatch.chdir(workdir)
    root = Path("out") / config.stem
    small = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", f"--trainer.default_root_dir={root}"]
    if config.stem.startswith("ppo"):
        small += SMALL_PPO
    assert run("fit", "--config", config, *QUICK, *small) == 0

    kind = AutoModelForSequenceClassification if config.stem == "reward_model" else AutoModelForCausalLM
    model = kind.from_pretrained(root / "model")
    summary = json.loads((root / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["peak_memory_mb"] > 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())
