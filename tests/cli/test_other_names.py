"""Names that other libraries have for our options are answered with ours, of the classes in use."""

import pytest
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

import lit_rlhf
from lit_rlhf.cli.other_names import MEANINGS, OURS, name_here
from lit_rlhf.cli.unknown_options import hint, option_paths
from tests.cli.command_line import run

DATA = {"KTO": "Unpaired", "DPO": "Preference", "CPO": "Preference", "ORPO": "Preference", "SFT": "SFT"}
SAID = {  # class and what is typed -> the end of what is said
    ("PPO", "--model.kl_coef=1"): "; here it is model.kl.kl_coef, of model.kl=lit_rlhf.FixedKL",
    ("GRPO", "--model.beta=1"): "; here it is model.kl.kl_coef, of model.kl=lit_rlhf.FixedKL",
    ("DPO", "--model.kl_coef=1"): "; here it is model.beta",
    ("DPO", "--model.kl_penalty=1"): "; here it is model.beta",
    ("ORPO", "--model.beta=1"): "; here it is model.odds_coef",
    ("GRPO", "--data.num_generations=4"): "; here it is data.group_size",
    ("GRPO", "--model.num_generations=4"): "; here it is data.group_size",
    ("GRPO", "--data.batch_size=4"): "; here it is data.rollout_size",
    ("GRPO", "--data.max_length=4"): "; here it is data.max_prompt_length and data.max_new_tokens",
    ("SFT", "--model.max_length=4"): "; here it is data.max_length",
    ("SFT", "--trainer.batch_size=4"): "; here it is data.batch_size",
    ("SFT", "--optimizer.lr=1e-4"): "; here it is model.learning_rate",
    ("SFT", "--model.optimizer.lr=1e-4"): "; here it is model.learning_rate",
    ("SFT", "--trainer.gradient_accumulation_steps=4"): "; here it is trainer.accumulate_grad_batches",
    ("SFT", "--model.num_train_epochs=4"): "; here it is trainer.max_epochs",
    ("SFT", "--model.max_grad_norm=1"): "; here it is trainer.gradient_clip_val",
    ("SFT", "--trainer.bf16=true"): "; here it is trainer.precision=bf16-mixed",
    ("SFT", "--data.column=text"): "; here it is data.columns",
    ("SFT", "--model.lora.rank=8"): "; here it is model.lora.r",
    ("SFT", "--trainer.seed=1"): "; here it is seed_everything",
    ("SFT", "--seed=1"): "; here it is seed_everything",
    ("SFT", "--num_train_epochs=1"): "; here it is trainer.max_epochs",
}


@pytest.mark.parametrize(("model", "typed"), SAID)
def test_an_option_of_another_library_is_answered_with_ours_of_that_class(model, typed):
    data = getattr(lit_rlhf, f"{DATA.get(model, 'Rollout')}DataModule")
    kinds = {"trainer": Trainer, "model": getattr(lit_rlhf, model), "data": data}
    assert hint(typed.partition("=")[0], kinds, ()) == SAID[model, typed]


@pytest.mark.filterwarnings("ignore")
def test_a_class_that_is_named_by_a_word_of_its_own_counts_as_one_behind_an_equals_sign(capsys):
    words = ["--model", "lit_rlhf.GRPO", "--data", "lit_rlhf.RolloutDataModule", "--data.num_generations=4"]
    assert run("fit", *words) == 2
    said = capsys.readouterr().err.split("error: ")[-1].splitlines()[0]
    assert said == "there is no option --data.num_generations; here it is data.group_size"


def test_every_name_leads_to_an_option_that_some_class_has():
    public = [getattr(lit_rlhf, name) for name in lit_rlhf.__all__]
    parts = {"model": LightningModule, "data": LightningDataModule}
    kinds = [(part, cls) for cls in public for part, base in parts.items() if issubclass(cls, base)]
    paths = {"seed_everything", "ckpt_path", *option_paths({"trainer": Trainer})}
    paths.update(*(option_paths({part: cls}) for part, cls in kinds))
    for name, meanings in OURS.items():
        for here in meanings:
            option = here.split(" of ")[-1] if " of " in here else here
            assert option.split("=")[0].split(" ")[0] in paths, name
    assert len(OURS) == sum(len(names.split()) for names in MEANINGS)


def test_where_no_class_in_use_has_it_nothing_is_said():
    assert name_here("--model.kl_coef", ["model.beta"]) == ""
    assert name_here("--data.num_generations", ["data.max_tokens"]) == name_here("--model.nothing", ["model.x"]) == ""
