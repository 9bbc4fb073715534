"""What jsonargparse says of values that are of no type, in one line. Each is met on a command line of its own."""

import pytest

from lit_rlhf.cli.wording import wrong_value
from tests.cli.command_line import run

PPO = ["fit", "--model=lit_rlhf.PPO", "--data=lit_rlhf.RolloutDataModule"]
SFT = ["fit", "--model=lit_rlhf.SFT", "--data=lit_rlhf.SFTDataModule"]
SAID = {
    (
        *PPO,
        "--data.rollout_size",
    ): "--data.rollout_size: expected a value, as in --data.rollout_size=...; true and false",
    (*PPO, "--model.kl", "--trainer.max_steps=-1"): "--model.kl: expected a value, as in --model.kl=...",
    (*SFT, "--export.merge", "--model.lora.r=2"): "--export.merge: expected a value, as in --export.merge=...",
    (*SFT, "--config", "--export.merge=true"): "--config: expected a value, as in --config=...",
    (*SFT, "--ckpt_path", "--model.lora.r=2"): "--ckpt_path: expected a value, as in --ckpt_path=...",
    ("compare", "--root"): "--root: expected a value, as in --root=...",
    (*PPO, "--model.target_kl=nan"): "--model.target_kl: expected a number, or null, got nan",
    (
        *PPO,
        "--model.kl_penalty.estimator=k9",
    ): "--model.kl_penalty.estimator: expected 'k1' or 'k2' or 'k3' or 'k2_sequence', got",
    (*SFT, "--model.optimizer.kind=x"): "there is no option --model.optimizer.kind; optimizer has no options",
    (*SFT, "--data.max_tokens.of=3"): "there is no option --data.max_tokens.of; max_tokens has no options",
    (*SFT, "--model.lora=[4]"): "--model.lora: expected a mapping of options, such as '{r: 16}', or null, got [4]",
    (*PPO, "--model.kl_penalty=0.1"): "--model.kl_penalty: expected a mapping, or a YAML file that holds one, got 0.1; "
    "here it is model.kl.kl_coef, of model.kl=lit_rlhf.FixedKL",
    (*PPO, "--model.kl=0.1"): "--model.kl: expected the import path of a subclass of KLController, or null, got 0.1",
    (*PPO, "--model.kl=lit_rlhf.AdaptiveKL", "--model.kl.target=x"): "--model.kl.target: expected a number, got x",
    (
        *PPO,
        "--model.shaping.normalize=foo",
    ): "--model.shaping.normalize: expected 'scale' or 'standardize', or null, got",
    (*PPO, "--data.monitors=[1]"): "--data.monitors: expected a mapping, '{name: value}', or null, got [1]",
    (*PPO, "--data.rewards={a: 3}"): "--data.rewards: expected the import path of a subclass of Reward, or the import "
    "path of a function, or null, got {'a': 3}",
    (
        *PPO,
        "--data.rewards={a: os.getcwd}",
        "--data.reward_weights={a: x}",
    ): "--data.reward_weights: expected a number, ",
    (*PPO, "--data.reward=nowhere.f"): "--data.reward: expected the import path of a function, or null, got nowhere.f; "
    "there is no module nowhere in the current folder or among what is installed",
    (*PPO, "--data.reward=os.nothere"): "--data.reward: module 'os' has no attribute 'nothere'",
    (*PPO, "--data.rewards={a: os.nothere}"): "--data.rewards: module 'os' has no attribute 'nothere'",
    (*PPO, "--data.reward=brief"): "--data.reward: expected an import path, module.name, got brief",
    (*PPO, "--data.reward=lit_rlhf.KLPenalty"): "--data.reward: expected the import path of a subclass of Reward, or ",
    (*SFT, "--model.adam_betas=[0.9]"): "--model.adam_betas: expected a list of 2, got [0.9]",
    (*SFT, "--trainer.max_epochs=1.5"): "--trainer.max_epochs: expected a whole number, or null, got 1.5",
    (*SFT, "--seed_everything=1.5"): "--seed_everything: expected true or false, or a whole number, got 1.5",
    (*SFT, "--data.loss_on="): "--data.loss_on: expected 'response' or 'all', got empty text",
    (*SFT, "--trainer.max_steps=null"): "--trainer.max_steps: expected a whole number, got null",
    (*SFT, "--samples=3"): "--samples: expected a mapping, or a YAML file that holds one, got 3",
    (*SFT, "--data.loss_on=foo"): "--data.loss_on: expected 'response' or 'all', got foo",
    (
        "fit",
        "--model=os.system",
    ): "--model: expected the import path of a subclass of AlignmentModule, got os.system",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arguments", SAID, ids=lambda arguments: arguments[-1])
def test_a_value_of_no_type_that_it_may_have_is_answered_in_one_line(arguments, capsys):
    assert run(*arguments) == 2
    error, *hint = capsys.readouterr().err.split("error: ")[-1].strip().splitlines()
    assert error.startswith(SAID[arguments])
    assert len(hint) == 1 and hint[0].startswith("For all options: ") and len(error) < 250


@pytest.mark.filterwarnings("ignore")
def test_a_key_beside_a_class_path_is_told_where_it_belongs(capsys):
    model = "{class_path: lit_rlhf.SFT, learning_rate: 1.0, beta: 2, init_args: {policy: demo}}"
    assert run("fit", f"--model={model}") == 2
    said = capsys.readouterr().err.split("error: ")[-1]
    assert said.startswith("--model: beta, learning_rate must stand below init_args, not beside class_path\n")


def test_long_values_are_shown_shortened_and_other_messages_are_left_alone():
    message = f"Parser key \"a\":\n  Expected a <class 'int'>. Got value: {'x' * 999}"
    assert wrong_value(message, lambda name, value: f"--{name}") == f"--a: expected a whole number, got {'x' * 120}..."
    as_it_is = lambda name, value: name  # noqa: E731
    assert wrong_value("the following arguments are required: function", as_it_is) is None
    assert wrong_value('Parser key "a": something else. Got value: 3', as_it_is) is None
