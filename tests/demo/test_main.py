"""`python -m lit_rlhf.demo`: its stages, which end in `compare`."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_rlhf.cli.main import main
from lit_rlhf.demo import __main__ as demo


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
@pytest.mark.parametrize("lora", [False, True])
def test_the_demo_starts_each_stage_from_the_one_before_and_says_what_it_achieved(lora, tmp_path, monkeypatch, capsys):
    started = []

    def accept(command, check=False):
        """The command line reads the options of a stage; what it would leave behind is written here."""
        _, _, module, *words = command
        assert module == "lit_rlhf"
        started.append(words)
        if words[0] == "fit":
            with pytest.raises(SystemExit, match="0"):
                main([*words, "--print_config"])
            (folder,) = [word.partition("=")[2] for word in words if word.startswith("--trainer.default_root_dir=")]
            stage = Path(folder).name
            Path(folder).mkdir(parents=True)
            metrics = {name: 0.25 for name in demo.ACHIEVED[stage]}
            (Path(folder) / "summary.json").write_text(json.dumps({"metrics": metrics}))
        else:
            write_results(Path("runs/demo"), ppo=0.78, dpo=0.75)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(demo.subprocess, "run", accept)
    monkeypatch.chdir(tmp_path)
    demo.demo(seed=3, lora=lora)

    sft, reward_model, ppo, dpo, comparison = started
    assert not any(word.startswith("--model.policy") or "overlays" in word for word in sft)
    for command in (reward_model, ppo, dpo):
        assert "--model.policy=runs/demo/sft/model" in command
        assert {"--seed_everything=3", "--data.seed=3"} < set(command)
        overlay = "lora_dpo.yaml" if command is dpo else "lora.yaml"
        assert (f"--config={demo.CONFIGS}/overlays/{overlay}" in command) == lora
    trained = "runs/demo/reward_model/model"
    assert {f"--model.critic={trained}", f"--data.reward.init_args.model={trained}", "--model.seed=3"} < set(ppo)
    assert comparison == ["compare", "--root=runs/demo"]
    lines = capsys.readouterr().out.splitlines()
    for stage, names in demo.ACHIEVED.items():
        (line,) = [line for line in lines if line.startswith(f"{stage}: ") and " in " in line]
        assert all(f"{name} 0.250" in line for name in names)
    assert lines[-1] == "win rate over sft: ppo 0.78, dpo 0.75; at least 0.75 was to be reached"


@pytest.mark.parametrize("rates", [{"ppo": 0.74, "dpo": 0.9}, {"ppo": 0.9, "dpo": 0.74}], ids=str)
def test_a_demo_whose_policies_do_not_win_as_they_should_ends_with_status_1(tmp_path, rates, capsys):
    write_results(tmp_path, **rates)
    with pytest.raises(SystemExit, match="1"):
        demo.judge(tmp_path)
    assert "0.74" in capsys.readouterr().out


def write_results(root, **rates):
    (root / "results.json").write_text(json.dumps({stage: {"win_rate": rate} for stage, rate in rates.items()}))


def test_the_demo_ends_with_a_stage_that_fails(monkeypatch):
    monkeypatch.setattr(demo.subprocess, "run", lambda command: SimpleNamespace(returncode=2))
    with pytest.raises(SystemExit, match="2"):
        demo.demo()
