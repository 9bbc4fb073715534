"""Every shipped YAML runs; what a user gets wrong is answered by one message."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf import SFT, RewardModel
from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.callbacks.export import export
from lit_rlhf.cli.main import AlignmentCLI, main, users_mistake
from lit_rlhf.engine.sharding import full_state_dict
from tests.tiny import save_tiny

CONFIGS = sorted(Path("configs").glob("*.yaml"))
QUICK = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder in which the models that later configs start from have been exported."""
    folder = tmp_path_factory.mktemp("configs")
    torch.manual_seed(0)
    for module, name in ((SFT("demo", from_scratch=True), "sft"), (None, "reward_model")):
        module = module or RewardModel(str(folder / "runs/sft/model"))
        export(module, full_state_dict(module.exportable()), folder / "runs" / name / "model")
    return folder


def run(*args):
    """The command line in this process; returns the exit status."""
    try:
        main([str(arg) for arg in args])
    except SystemExit as exit:
        return exit.code
    return 0


def predictions(root):
    """What `predict` wrote, row by row."""
    return [json.loads(line) for line in Path(root, "predictions.jsonl").read_text().splitlines()]


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


@pytest.mark.filterwarnings("ignore")
def test_predict_writes_completions_as_json_lines_in_the_order_of_the_prompts(workdir, monkeypatch):
    config = Path("configs/dpo.yaml").absolute()
    monkeypatch.chdir(workdir)
    prompts = [{"id": i, "prompt": f"Hello number {i}"} for i in range(5)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    options = ["--data.predict=prompts.jsonl", "--trainer.default_root_dir=out/predict"]
    assert run("predict", "--config", config, *QUICK, *options, "--model.generation.max_new_tokens=4") == 0
    rows = predictions("out/predict")
    assert [{"id": row["id"], "prompt": row["prompt"]} for row in rows] == prompts
    assert all(row["finish_reason"] in ("stop", "length") for row in rows)


@pytest.mark.filterwarnings("ignore")
def test_predict_scores_with_the_head_that_a_reward_model_was_trained_with(workdir, monkeypatch):
    config = Path("configs/reward_model.yaml").absolute()
    monkeypatch.chdir(workdir)
    Path("scored.jsonl").write_text('{"prompt": "Say hello.", "completion": " Hello!", "id": 7}\n')
    options = ["--model.policy=runs/reward_model/model", "--data.predict=scored.jsonl"]
    assert run("predict", "--config", config, *QUICK, *options, "--trainer.default_root_dir=out/scores") == 0

    model = AutoModelForSequenceClassification.from_pretrained("runs/reward_model/model")
    tokenizer = AutoTokenizer.from_pretrained("runs/reward_model/model")
    ids = tokenizer("Say hello. Hello!", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], dim=1)).logits.item()
    [row] = predictions("out/scores")
    assert row["score"] == pytest.approx(expected, rel=1e-3) and row["id"] == 7


@pytest.mark.filterwarnings("ignore")
def test_a_head_just_drawn_predicts_nothing(workdir, monkeypatch, capsys):
    config = Path("configs/reward_model.yaml").absolute()
    monkeypatch.chdir(workdir)
    Path("scored.jsonl").write_text('{"prompt": "Say hello.", "completion": " Hello!"}\n')
    options = ["--data.predict=scored.jsonl", "--trainer.default_root_dir=out/drawn"]
    assert run("predict", "--config", config, *QUICK, *options) == 2
    assert "holds no trained reward head, so its scores would be random" in capsys.readouterr().err
    assert not Path("out/drawn/predictions.jsonl").exists()


@pytest.mark.filterwarnings("ignore")
def test_what_dropped_prompts_were_is_said_and_the_answers_keep_their_ids(workdir, monkeypatch):
    config = Path("configs/dpo.yaml").absolute()
    monkeypatch.chdir(workdir)
    said = []
    monkeypatch.setattr("lit_rlhf.data.prompts.rank_zero_info", said.append)
    Path("gaps.jsonl").write_text("".join(json.dumps({"id": i, "prompt": "Hello" * (i != 1)}) + "\n" for i in range(3)))
    options = ["--data.predict=gaps.jsonl", "--trainer.default_root_dir=out/gaps"]
    assert run("predict", "--config", config, *QUICK, *options, "--model.generation.max_new_tokens=2") == 0
    assert said == ["predict prompts gaps.jsonl: 3 rows, 2 used, 1 dropped (1 no whole token as prompt): rows [2]"]
    assert [row["id"] for row in predictions("out/gaps")] == [0, 2]


@pytest.mark.filterwarnings("ignore")  # of the arguments that the tests were called with, among others
def test_the_command_line_can_be_used_from_python_without_a_command(workdir, monkeypatch):
    config = str(Path("configs/sft.yaml").absolute())
    monkeypatch.chdir(workdir)
    cli = AlignmentCLI(
        AlignmentModule,
        LightningDataModule,
        run=False,
        auto_configure_optimizers=False,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=["--config", config],
    )
    assert isinstance(cli.model, SFT) and cli.datamodule.tokenizer is cli.model.tokenizer


@pytest.mark.filterwarnings("ignore")
def test_more_processes_than_a_cpu_has_cores_are_refused_before_any_starts(monkeypatch, capsys):
    monkeypatch.setattr(AlignmentCLI, "_run_subcommand", lambda cli, name: None)  # would start them all
    options = ["--config", "configs/sft.yaml", *QUICK]
    assert run("fit", *options, "--trainer.devices=999") == 2
    assert "trainer.devices (999) must be at most " in capsys.readouterr().err
    assert run("fit", *options, "--trainer.devices=2") == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("completion", ["null", "5", '[{"role": "assistant", "content": "x"}]'])
def test_a_completion_that_cannot_be_scored_is_named_with_its_line(completion, workdir, monkeypatch, capsys):
    config = Path("configs/reward_model.yaml").absolute()
    monkeypatch.chdir(workdir)
    good, bad = '{"prompt": "a", "completion": "b"}', f'{{"prompt": "a", "completion": {completion}}}'
    Path("unscored.jsonl").write_text(f"{good}\n{bad}\n")
    options = ["--model.policy=runs/reward_model/model", "--data.predict=unscored.jsonl"]
    assert run("predict", "--config", config, *QUICK, *options, "--trainer.default_root_dir=out/unscored") == 2
    assert "unscored.jsonl, line 2" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_the_last_checkpoint_is_the_newest_of_the_run(workdir, monkeypatch):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    options = ["--trainer.limit_val_batches=0", "--trainer.default_root_dir=out/last"]
    assert run("fit", "--config", config, *QUICK, *options, "--trainer.max_steps=2") == 0
    assert run("fit", "--config", config, *QUICK, *options, "--trainer.max_steps=3", "--ckpt_path=last") == 0
    assert json.loads(Path("out/last/summary.json").read_text())["steps"] == 3
    assert sorted(path.name for path in Path("out/last").rglob("*.ckpt"))[-1].endswith("step=3.ckpt")


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_run_says_how_it_goes_on(workdir, monkeypatch, capsys):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    step = SFT.training_step

    def interrupt(self, batch, batch_idx):
        if self.global_step == 2:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SFT, "training_step", interrupt)
    options = ["--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint"]
    options += ["--trainer.callbacks.every_n_train_steps=1", "--trainer.default_root_dir=out/stopped"]
    assert run("fit", "--config", config, *QUICK, *options) == 130
    said = capsys.readouterr().err
    assert "no model was exported. The run goes on from its newest checkpoint with --ckpt_path=out/stopped" in said
    assert not Path("out/stopped/model").exists()


@pytest.mark.filterwarnings("ignore")
def test_random_weights_predict_nothing(workdir, monkeypatch, capsys):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    assert run("predict", "--config", config, *QUICK, "--trainer.default_root_dir=out/random") == 2
    assert "from_scratch is true, so the weights are random" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_columns_that_predict_would_overwrite_are_refused_and_known_completions_kept(workdir, monkeypatch, capsys):
    config = Path("configs/dpo.yaml").absolute()
    monkeypatch.chdir(workdir)
    options = ["--data.predict=columns.jsonl", "--trainer.default_root_dir=out/columns"]
    options.append("--model.generation.max_new_tokens=2")
    Path("columns.jsonl").write_text('{"prompt": "Hello", "completion": " you", "id": 3}\n')
    assert run("predict", "--config", config, *QUICK, *options) == 0
    [row] = predictions("out/columns")
    assert set(row) == {"prompt", "completion", "finish_reason", "reference_completion", "id"}
    assert row["reference_completion"] == " you"
    Path("columns.jsonl").write_text('{"prompt": "Hello", "finish_reason": "x"}\n')
    assert run("predict", "--config", config, *QUICK, *options) == 2
    assert "predict writes ['finish_reason']" in capsys.readouterr().err


def nan_reward(prompts, responses, **columns):
    return [float("nan")] * len(responses)


NO_VALIDATION = "--data.validation=null"
SMALL_PPO = ["--data.rollout_size=16", "--data.num_slots=8", "--data.max_new_tokens=8"]
OWN_REWARD = ["--data.monitors=null", "--data.reward=lit_rlhf.TextReward"]
MISTAKES = {  # what users get wrong -> config, options, and words that must be in the answer
    "unknown option": ("dpo", ["--model.betta=3"], "there is no option --model.betta; did you mean beta?"),
    "unknown option of the Trainer": ("sft", ["--trainer.max_stps=3"], "did you mean max_steps?"),
    "unknown option of an option": ("ppo", ["--model.kl.kl_coeff=3"], "did you mean kl_coef?"),
    "option of another algorithm": ("dpo", ["--model.kl=3"], "no option --model.kl\nFor all options: lit-rlhf fit"),
    "mistake in an option of PPO": ("ppo", ["--model.gamma=x"], "--model.help lit_rlhf.PPO, "),
    "loss without its module": ("dpo", ["--model.loss=ipo_loss"], "did you mean lit_rlhf.losses.ipo_loss?"),
    "unknown loss": ("dpo", ["--model.loss=sigmoyd"], "got sigmoyd; lit_rlhf.losses has alpha_dpo_loss, "),
    "mistyped loss": ("dpo", ["--model.loss=lit_rlhf.losses.ipo_los"], "'ipo_los'; did you mean ipo_loss?"),
    "unknown class": (
        "sft",
        ["--model=lit_rlhf.SFTT"],
        "has no attribute 'SFTT'; did you mean SFT?\nFor all options: lit-rlhf fit --help, ",
    ),
    "pairs as demonstrations": (
        "sft",
        ["--data=lit_rlhf.PreferenceDataModule"],
        "SFT learns from a SFTDataModule, not from a PreferenceDataModule",
    ),
    "demonstrations as pairs": ("dpo", ["--data=lit_rlhf.SFTDataModule"], "DPO learns from a PreferenceDataModule"),
    "prompts as pairs": (
        "reward_model",
        ["--data=lit_rlhf.RolloutDataModule", *OWN_REWARD[1:], "--data.reward.function=lit_rlhf.demo.gold_reward"],
        "RewardModel learns from a PreferenceDataModule",
    ),
    "negative seed": ("sft", ["--data.seed=-1"], "seed (-1) must be 0 or more"),
    "negative seed of all": ("sft", ["--seed_everything=-1"], "seed_everything (-1) must be in [0, 2^32)"),
    "negative workers": ("sft", ["--data.num_workers=-1"], "num_workers (-1) must be 0 or more"),
    "no accumulation": ("sft", ["--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches (0) must be 1 or"),
    "clipping below 0": ("sft", ["--trainer.gradient_clip_val=-0.5"], "gradient_clip_val (-0.5) must be 0 or more"),
    "weight that is no number": (
        "sft",
        [NO_VALIDATION, '--data.train=[{"source": "demo", "weight": "x"}]'],
        "weight ('x') must be a number",
    ),
    "split of a file": ("sft", [NO_VALIDATION, '--data.train=[{"source": "demo", "split": "x"}]'], "files have none"),
    "export over the run": (
        "sft",
        ["--export.folder=..", "--trainer.default_root_dir=out/a/b"],
        "no export of a model",
    ),
    "best of another run": ("sft", ["--ckpt_path=best"], "name its file"),
    "root that cannot be": ("sft", ["--trainer.default_root_dir=/proc/nowhere/x"], "/proc/nowhere/x cannot be made"),
    "loaders made anew": ("ppo", ["--trainer.reload_dataloaders_every_n_epochs=1"], "would play the same prompts"),
    "abbreviated option": ("sft", ["--trainer.max_epoch=3"], "--trainer.max_epoch; did you mean max_epochs?"),
    "value of a wrong type": (
        "sft",
        ["--model.learning_rate=abc"],
        "--model.learning_rate: expected a number, got abc",
    ),
    "no checkpoint yet": ("sft", ["--ckpt_path=last", "--trainer.default_root_dir=out/new"], "no checkpoint under"),
    "function of a module that is not there": (
        "ppo",
        [*OWN_REWARD, "--data.reward.function=nowhere.brief"],
        "modules are found in the current folder",
    ),
    "value out of range": ("sft", ["--model.generation.top_p=2"], "top_p (2.0)"),
    "unknown accelerator": ("sft", ["--trainer.accelerator=cpuu"], "cpuu"),
    "unknown strategy": ("sft", ["--trainer.strategy=ddpp"], "ddpp"),
    "missing checkpoint": ("sft", ["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
    "no checkpoint": ("sft", ["--ckpt_path=malformed.jsonl"], "malformed.jsonl is no checkpoint"),
    "model as checkpoint": ("sft", ["--ckpt_path=runs/sft/model"], "runs/sft/model is no checkpoint"),
    "negative rate": ("sft", ["--model.learning_rate=-1"], "learning_rate (-1.0) must be 0 or more"),
    "betas out of range": ("sft", ["--model.adam_betas=[2,2]"], "must be two numbers in [0, 1)"),
    "fewer than no samples": ("sft", ["--samples.num_prompts=-1"], "num_prompts (-1) must be 0 or more"),
    "no prompt left": ("sft", ["--data.max_prompt_length=0"], "max_prompt_length (0) must be 1 or more"),
    "prompts as long as the context": (
        "sft",
        ["--data.max_prompt_length=4096"],
        "must be less than the model's context",
    ),
    "micro-batch too small": ("sft", ["--data.max_tokens=3"], "raise max_tokens"),
    "missing data": ("sft", [NO_VALIDATION, "--data.train=nowhere.jsonl"], "nowhere.jsonl"),
    "malformed row": ("sft", [NO_VALIDATION, "--data.train=malformed.jsonl"], "malformed.jsonl, line 2"),
    "JSON syntax": ("sft", [NO_VALIDATION, "--data.train=syntax.jsonl"], "syntax.jsonl, line 1"),
    "empty data": ("dpo", [NO_VALIDATION, "--data.train=empty.jsonl"], "empty.jsonl"),
    "prompts longer than the context": ("dpo", [NO_VALIDATION, "--data.train=long.jsonl"], "1 too long"),
    "missing model": ("dpo", ["--model.policy=runs/nowhere/model"], "runs/nowhere/model: no model"),
    "vocabularies that differ": ("dpo", ["--model.policy=mixed"], "the model embeds 40"),
    "KL target below 0": (
        "ppo",
        ["--model.kl=lit_rlhf.AdaptiveKL", "--model.kl.init_args.target=-6"],
        "target (-6.0) must be more than 0",
    ),
    "no room for a prompt": ("ppo", ["--data.max_new_tokens=256"], "max_new_tokens (256) leaves no room"),
    "causal LM as reward model": ("ppo", ["--data.reward.init_args.model=runs/sft/model"], "no trained reward head"),
    "reward model with another tokenizer": (
        "ppo",
        [*SMALL_PPO, "--data.reward.init_args.model=other_reward_model"],
        "another tokenizer",
    ),
    "NaN reward": (
        "ppo",
        [*SMALL_PPO, *OWN_REWARD, "--data.reward.init_args.function=tests.cli.test_configs.nan_reward", NO_VALIDATION],
        "nan_reward (of data.reward, data.monitors or gold) must return one finite number",
    ),
}


@pytest.fixture(scope="module")
def mistaken(workdir):
    """Files and folders that are wrong, in the folder with the models that are right."""
    (workdir / "malformed.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 3}\n')
    (workdir / "syntax.jsonl").write_text('{"prompt": "a", "completion": "b"\n')
    (workdir / "empty.jsonl").write_text("")
    (workdir / "long.jsonl").write_text(json.dumps({"prompt": "a " * 999, "chosen": "b", "rejected": "c"}) + "\n")
    mixed = save_tiny(workdir / "mixed")  # a model of 40 tokens beside the demo's tokenizer
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(workdir / "runs/sft/model" / file, mixed / file)
    reward_model = RewardModel(str(save_tiny(workdir / "other")))
    export(reward_model, full_state_dict(reward_model.exportable()), workdir / "other_reward_model")
    return workdir


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_a_mistake_is_answered_by_one_message_and_status_2(mistake, mistaken, monkeypatch, capsys):
    name, options, words = MISTAKES[mistake]
    config = Path(f"configs/{name}.yaml").absolute()
    monkeypatch.chdir(mistaken)
    assert run("fit", "--config", config, *QUICK, "--trainer.default_root_dir=out/broken", *options) == 2
    said = capsys.readouterr().err
    answer = said[said.index("error: ") :]
    assert words in answer
    assert len(answer.splitlines()) <= 6
    assert not any(noise in said for noise in ("Traceback", "Namespace", "Does not validate"))
    assert not Path("out/broken/model").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no command is given"),
        (["fti"], "there is no command 'fti'; did you mean fit?"),
        (["fit", "--model.policy=x"], "--model.policy: name a class first, by --config or --model="),
        (["fit"], "there is neither model nor data; name a config"),
        (["compare", "--policies=a,b"], "--policies: expected a list, '[a,b]', got a,b"),
        (["compare", "--max_prompts=0"], "max_prompts (0) must be 1 or more"),
        (["comprae"], "did you mean compare?\nusage: lit-rlhf [-c CONFIG] {fit,validate,test,predict,compare}"),
        (["compare", "--polices=[sft]"], "there is no option --polices; did you mean policies?"),
        (["compare", "--policies=[]"], "policies is empty"),
        (["compare", "--root=nowhere"], "nowhere/sft/model"),
        (["compare", "--root=nowhere"], "nowhere holds no finished run; choose by --policies"),
    ],
)
def test_a_mistake_outside_of_a_config_is_answered_by_one_message_too(arguments, words, capsys):
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) <= 2


BROKEN_REWARDS = {  # body of the function -> words of the answer
    "return [float('nan')] + [0.0] * (len(responses) - 1)": "must return one finite number per response; 1 of ",
    "return None": "must return one finite number per response, (",
    "return columns['zz']": "raised KeyError: 'zz', in ",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("body", sorted(BROKEN_REWARDS))
def test_a_broken_reward_function_is_named_with_its_place_and_the_remedy(body, workdir, monkeypatch, capsys):
    config = Path("configs/ppo.yaml").absolute()
    monkeypatch.chdir(workdir)
    monkeypatch.syspath_prepend(str(workdir))
    name = f"reward{sorted(BROKEN_REWARDS).index(body)}"
    Path(f"{name}.py").write_text(f"def score(prompts, responses, **columns):\n    {body}\n")
    options = ["--data.reward=lit_rlhf.TextReward", f"--data.reward.function={name}.score", "--data.monitors=null"]
    options += ["--data.rollout_size=16", "--data.num_slots=8", "--data.max_new_tokens=8", "--model.critic=null"]
    assert run("fit", "--config", config, *QUICK, *options, "--trainer.default_root_dir=out/reward") == 2
    said = capsys.readouterr().err.split("error: ")[-1]
    assert said.startswith(f"reward function {name}.score (of data.reward")
    assert BROKEN_REWARDS[body] in said
    assert "KeyError" not in said or f"{name}.py:2" in said
    assert len(said) < 700


def test_a_full_disk_is_named_and_an_unknown_failure_keeps_its_traceback():
    full = OSError(errno.ENOSPC, "No space left on device", "runs/sft/last.ckpt")
    wrapped = RuntimeError("while saving")
    wrapped.__cause__ = full
    assert users_mistake(wrapped) is full
    assert users_mistake(RuntimeError("a mistake of ours")) is None


def test_the_module_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "lit_rlhf", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "fit" in done.stdout
