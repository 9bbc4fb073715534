"""What a user gets wrong is answered by one message."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_rlhf import RewardModel
from lit_rlhf.callbacks.export import export
from lit_rlhf.cli.mistakes import refused_argument, users_mistake
from lit_rlhf.engine.sharding import full_state_dict
from tests.cli.command_line import QUICK, SMALL_PPO, run
from tests.tiny import save_tiny


def nan_reward(prompts, responses, **columns):
    return [float("nan")] * len(responses)


TOOLS = "lightning.pytorch.callbacks"
PRUNING = [f"--trainer.callbacks.{o}" for o in ("pruning_fn=l1_unstructured", "make_pruning_permanent=false")]
NO_VALIDATION = "--data.validation=null"
OWN_REWARD = ["--data.monitors=null", "--data.reward=lit_rlhf.TextReward"]
MISTAKES = {  # what users get wrong -> config, options, and words that must be in the answer
    "unknown option": ("dpo", ["--model.betta=3"], "there is no option --model.betta; did you mean beta?"),
    "unknown option of the Trainer": ("sft", ["--trainer.max_stps=3"], "did you mean max_steps?"),
    "unknown option of an option": ("ppo", ["--model.kl.kl_coeff=3"], "here it is model.kl.kl_coef, of"),
    "value of a class": ("ppo", ["--model.kl=lit_rlhf.FixedKL", "--model.kl.kl_coef=-1"], "--model.kl.kl_coef (-1"),
    "value of a class of Lightning's": (
        "sft",
        ["--trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: x, mode: up}}]"],
        "--trainer.callbacks: lightning.pytorch.callbacks.early_stopping.EarlyStopping: `mode` can be min, max, got up",
    ),
    "reward model that is none": (
        "ppo",
        ["--data.monitors={a: {class_path: lit_rlhf.RewardModelReward, init_args: {model: runs/sft/model}}}"],
        "reward model: runs/sft/model holds no trained reward head",
    ),
    "option at the top": (
        "sft",
        ["--lr_scheduler=constant"],
        "lr_scheduler is an option of a part: write model.lr_scheduler\n",
    ),
    "devices that are no number": ("sft", ["--trainer.devices=two"], "trainer.devices ('two'): `devices` selected"),
    "devices without an end": ("sft", ["--trainer.devices=[0,1,2"], "trainer.devices ('[0,1,2'): `devices` selected"),
    "callbacks alike": (
        "sft",
        ["--trainer.callbacks=[{class_path: ModelCheckpoint}, {class_path: ModelCheckpoint}]"],
        "trainer.callbacks: two of ModelCheckpoint would take each other's state in checkpoints",
    ),
    "no nodes": ("sft", ["--trainer.num_nodes=0"], "trainer.num_nodes (0): `num_nodes` must be"),
    "time that is none": ("sft", ["--trainer.max_time=x"], "trainer.max_time ('x'): `Timer(duration='x')` is not"),
    "accelerator that is not there": (
        "sft",
        ["--trainer.accelerator=tpu"],
        "trainer.accelerator (tpu): a package is not",
    ),
    "validation after no micro-batches": ("sft", ["--trainer.val_check_interval=0"], "val_check_interval (0) must be "),
    "validation after more than an epoch": (
        "sft",
        ["--trainer.val_check_interval=9999"],
        "`val_check_interval` (9999)",
    ),
    "validation after no epochs": ("sft", ["--trainer.check_val_every_n_epoch=0"], "check_val_every_n_epoch (0) must"),
    "ranks out of one process": ("sft", ["--trainer.strategy=ddp_spawn"], "strategy (ddp_spawn) makes its ranks"),
    "one device of two": ("sft", ["--trainer.strategy=single_device", "--trainer.devices=2"], "asks for 2: use ddp"),
    "ZeRO-3": ("sft", ["--trainer.strategy=deepspeed_stage_3"], "which is not supported: use lightning."),
    "ranks out of a notebook": ("sft", ["--trainer.strategy=ddp_notebook"], "use ddp, which starts the program anew"),
    "no steps": ("sft", ["--trainer.max_steps=0"], "max_steps (0) must be more than 0, or nothing is learnt"),
    "no time": ("sft", ["--trainer.max_time=00:00:00:00"], "ended before its first step, by trainer.max_time"),
    "logger without its folder": (
        "sft",
        ["--trainer.logger=CSVLogger"],
        "lightning.pytorch.loggers.CSVLogger: save_dir is missing",
    ),
    "callback without its argument": (
        "sft",
        [f"--trainer.callbacks=[{{class_path: {TOOLS}.EarlyStopping}}]"],
        "lightning.pytorch.callbacks.EarlyStopping: monitor is missing",
    ),
    "plugin without its argument": (
        "sft",
        ["--trainer.plugins=[{class_path: lightning.pytorch.plugins.MixedPrecision}]"],
        "lightning.pytorch.plugins.MixedPrecision: precision and device are missing",
    ),
    "masks beside weights": (
        "sft",
        [f"--trainer.callbacks={TOOLS}.ModelPruning", *PRUNING],
        "make_pruning_permanent: false leaves masks",
    ),
    "no batches": ("sft", ["--trainer.limit_train_batches=0"], "limit_train_batches (0) must be more than 0"),
    "rate without an end": ("sft", ["--model.learning_rate=1e999"], "learning_rate (inf) must be 0 or more and finite"),
    "workers beyond all measure": ("sft", ["--data.num_workers=1000000"], "num_workers (1000000) must be at most "),
    "finder of batch sizes": ("dpo", [f"--trainer.callbacks={TOOLS}.BatchSizeFinder"], "choose data.max_tokens"),
    "finder of rates on policy": (
        "ppo",
        [f"--trainer.callbacks={TOOLS}.LearningRateFinder"],
        "a policy's loss does not",
    ),
    "argument that the class does not have": (
        "sft",
        ["--model.dict_kwargs={x: 1}"],
        "lit_rlhf.SFT: AlignmentModule.__init__() got an unexpected keyword argument 'x'",
    ),
    "option of another algorithm": ("dpo", ["--model.kl=3"], "--model.kl; here it is model.beta\nFor all options: lit"),
    "mistake in an option of PPO": ("ppo", ["--model.gamma=x"], "--model.help lit_rlhf.PPO"),
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
        "weight ('x') of demo must be a number",
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
        "there is no module nowhere in the current folder or among what is installed",
    ),
    "value out of range": ("sft", ["--model.generation.top_p=2"], "top_p (2.0)"),
    "unknown accelerator": ("sft", ["--trainer.accelerator=cpuu"], "cpuu"),
    "unknown strategy": ("sft", ["--trainer.strategy=ddpp"], "Use auto or ddp, lightning.pytorch.strategies.ModelPa"),
    "empty model": (
        "sft",
        ["--model.policy="],
        "model.policy (empty text) must be a model's folder, or its name on the",
    ),
    "module as a loss": ("dpo", ["--model.loss=lit_rlhf.SFT"], "--model.loss: expected the import path of a function"),
    "module as a policy loss": (
        "ppo",
        ["--model.loss=lit_rlhf.DPO"],
        "--model.loss: expected the import path of a fun",
    ),
    "list that is not closed": ("sft", ["--model.adam_betas=[0.9,"], "expected a list, '[0.9]', got [0.9,"),
    "reward model without a head": (
        "reward_model",
        ["--model.fresh_head=false"],
        "no trained reward head: its config names ['LlamaForCausalLM']. Where one is to be trained, set model.fresh_h",
    ),
    "source by another key": (
        "sft",
        [NO_VALIDATION, '--data.train={"path": "demo", "weight": 1}'],
        "weight ('demo') of path must be a number above 0, and finite; to take nothing of a source leave it out; a s",
    ),
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
    "micro-batch too small": ("sft", ["--data.max_tokens=3"], " tokens are more than data.max_tokens (3)"),
    "missing data": ("sft", [NO_VALIDATION, "--data.train=nowhere.jsonl"], "nowhere.jsonl"),
    "malformed row": ("sft", [NO_VALIDATION, "--data.train=malformed.jsonl"], "malformed.jsonl, line 2"),
    "JSON syntax": ("sft", [NO_VALIDATION, "--data.train=syntax.jsonl"], "syntax.jsonl, line 1"),
    "empty data": ("dpo", [NO_VALIDATION, "--data.train=empty.jsonl"], "empty.jsonl"),
    "prompts longer than the context": (
        "dpo",
        [NO_VALIDATION, "--data.train=long.jsonl"],
        "prompt alone reaches max_length",
    ),
    "missing model": ("dpo", ["--model.policy=runs/nowhere/model"], "runs/nowhere/model: no model"),
    "vocabularies that differ": ("dpo", ["--model.policy=mixed"], "the model embeds 40"),
    "KL target below 0": (
        "ppo",
        ["--model.kl=lit_rlhf.AdaptiveKL", "--model.kl.init_args.target=-6"],
        "target (-6.0) must be more than 0",
    ),
    "no room for a prompt": ("ppo", ["--data.max_new_tokens=256"], "max_new_tokens (256) leaves no room"),
    "causal LM as reward model": (
        "ppo",
        ["--data.reward.init_args.model=runs/sft/model"],
        "no trained reward head: its config names ['LlamaForCausalLM']. Train a reward model first (lit_rlhf.Reward",
    ),
    "reward model with another tokenizer": (
        "ppo",
        [*SMALL_PPO, "--data.reward.init_args.model=other_reward_model"],
        "another tokenizer",
    ),
    "NaN reward": (
        "ppo",
        [*SMALL_PPO, *OWN_REWARD, "--data.reward.init_args.function=tests.cli.test_mistakes.nan_reward", NO_VALIDATION],
        "data.reward (tests.cli.test_mistakes.nan_reward) returned values that are not finite: nan (demo, row",
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
    assert len([line for line in answer.splitlines() if not line.startswith("For all options: ")]) == 1
    assert not any(noise in said for noise in ("Traceback", "Namespace", "Does not validate"))
    assert not Path("out/broken/model").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no command is given"),
        (["fti"], "there is no command 'fti'; did you mean fit?"),
        (["fit", "--model.policy=x"], "--model.policy: name a class first, by --config or --model="),
        (["fit"], "there is neither model nor data; name a config, as in lit-rlhf fit --config=configs/sft.yaml"),
        (["compare", "--policies=a,b"], "--policies: expected a list, '[a,b]', got a,b"),
        (["compare", "--max_prompts=0"], "max_prompts (0) must be 1 or more"),
        (["x"], "there is no command 'x'; there are fit, validate, test, predict, chat, score, data, doctor, "),
        (["fit", "--config="], "--config: expected the name of a YAML file, got empty text"),
        (["fit", "--config={model: x"], "--config: while parsing a flow mapping in line 1"),
        (
            ["data", "--model=lit_rlhf.SFT", "--rowz=3"],
            "there is no option --rowz\nFor all options: lit-rlhf data --help",
        ),
        (["comprae"], "there is no command 'comprae'; did you mean compare?"),
        (["compare", "--polices=[sft]"], "there is no option --polices; did you mean policies?"),
        (["compare", "--policies=[]"], "policies is empty"),
        (["compare", "--root=nowhere"], "nowhere/sft/model"),
        (["compare", "--root=nowhere"], "nowhere holds no finished run; choose by --policies"),
    ],
)
def test_a_mistake_outside_of_a_config_is_answered_by_one_message_too(arguments, words, capsys):
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) <= 2


BROKEN_REWARDS = {  # body of the function -> words of the answer
    "return [float('nan')] + [0.0] * (len(responses) - 1)": "returned values that are not finite: nan (demo, row ",
    "return None": "must return one number per response, shape (16,), got None (demo, row ",
    "raise SystemExit": "raised SystemExit, in ",
    "raise ValueError('one\\ntwo')": "raised ValueError: one two, in ",
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
    options = [f"--data.reward={name}.score", "--data.monitors=null"]
    options += ["--data.rollout_size=16", "--data.num_slots=8", "--data.max_new_tokens=8", "--model.critic=null"]
    assert run("fit", "--config", config, *QUICK, *options, "--trainer.default_root_dir=out/reward") == 2
    said = capsys.readouterr().err.split("error: ")[-1]
    assert said.startswith(f"--data.reward ({name}.score)")
    assert BROKEN_REWARDS[body] in said
    assert "KeyError" not in said or f"{name}.py:2" in said
    assert len(said) < 700


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("logger", ["WandbLogger", "MLFlowLogger", "CometLogger"])
def test_a_logger_whose_package_is_missing_is_answered_in_one_line(logger, workdir, monkeypatch, capsys):
    package = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet_ml"}[logger]
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    assert run("fit", "--config", config, *QUICK, f"--trainer.logger={logger}") == 2
    said = capsys.readouterr().err
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said
    assert line.startswith(
        f"error: lightning.pytorch.loggers.{logger} needs a package that is not installed: pip install"
    )


def test_what_lightning_refuses_in_words_is_the_users():
    assert str(users_mistake(MisconfigurationException("one\n two"))) == "one two"


def test_what_a_constructor_says_is_taken_out_of_the_wall_around_it():
    wall = (
        "Does not validate against any of the Union subtypes\nSubtypes: [<class 'A'>, <class 'NoneType'>]\nErrors:\n"
        "  - the size (64) is not\n    a multiple of 7\n  - Expected a <class 'NoneType'>\n"
        "Given value type: <class 'N'>\nGiven value: Namespace(class_path='lit_rlhf.SFT', init_args=Namespace(a=1))"
    )
    assert str(refused_argument(wall)) == "lit_rlhf.SFT: the size (64) is not a multiple of 7"
    several = wall.replace("  - the", "  - Import path a.B does not correspond to a subclass of C\n  Errors:\n  - the")
    assert str(refused_argument(several)) == "lit_rlhf.SFT: the size (64) is not a multiple of 7"
    assert str(refused_argument("plain\nwords")) == "an argument: plain words"
