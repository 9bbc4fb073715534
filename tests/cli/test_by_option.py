"""A value that is refused is told by the option that gave it, as the user wrote it."""

import pytest

from lit_rlhf.cli.by_option import by_option

CONFIG = """model:
  init_args:
    policy: runs/sft/model
    critic: runs/gone/model
    weight_decay: 0.1
    adam_betas: [2, 2]
    kl: {class_path: lit_rlhf.FixedKL, init_args: {kl_coef: -1}}
data:
  init_args:
    seed: -1
"""
TYPED = [
    "--model.learning_rate=-1e-3",
    "--model.seed",
    "3",
    "--data.columns={a: b}",
    "--data.reward.init_args.model=gone",
]
SAID = {  # what is said -> and with the option; the config is c.yaml
    "learning_rate (-0.001) must be 0 or more": "--model.learning_rate (-0.001) must be 0 or more",
    "weight_decay (0.1) must be less": "c.yaml, line 5, model.weight_decay (0.1) must be less",
    "adam_betas ((2.0, 2.0)) must be two": "c.yaml, line 6, model.adam_betas ((2.0, 2.0)) must be two",
    "model.kl: kl_coef (-1.0) must be": "c.yaml, line 7, model.kl.kl_coef (-1.0) must be",
    "seed (-1) must be": "c.yaml, line 10, data.seed (-1) must be",
    "seed (3) must be": "--model.seed (3) must be",
    "model.critic: runs/gone/model: no": "c.yaml, line 4, model.critic: runs/gone/model: no",
    "'runs/sft/model': no model": "c.yaml, line 3, model.policy: 'runs/sft/model': no model",
    "runs/sft/model holds a head": "c.yaml, line 3, model.policy: runs/sft/model holds a head",
    "reward model: gone: no model": "--data.reward.init_args.model: reward model: gone: no model",
}
LEFT = (  # what no option has given, or what is about something else
    "learning_rate (-2.0) must be 0 or more",
    "seed (4) must be",
    "rate (-0.001) must be 0 or more",
    "lora: the policy has no layer of that name",
    "gone are the rows",
    "trainer.callbacks: EarlyStopping",
    "no row is left",
    "",
)


@pytest.mark.parametrize("said", [*SAID, *LEFT])
def test_a_value_that_is_refused_is_told_by_the_option_that_gave_it(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert by_option(said, ["fit", "--config=c.yaml", *TYPED]) == SAID.get(said, said)
    assert by_option(said, ["fit"]) == said


def test_of_roles_that_read_one_folder_the_one_that_does_not_say_its_name_is_the_policy():
    one = ["--model.policy=gone", "--data.reward.model=gone", "--model.reference=gone"]
    assert by_option("gone: no model", one) == "--model.policy: gone: no model"
    assert by_option("model.reference: gone: no model", one) == "--model.reference: gone: no model"
    assert by_option("reward model: gone: no model", one) == "--data.reward.model: reward model: gone: no model"


def test_what_is_typed_stands_before_a_config_and_the_last_one_holds(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    typed = ["--data.seed=-1", "fit", "--data.init_args.seed=-1", f"--config={tmp_path}/c.yaml"]
    assert by_option("seed (-1) must be", typed) == "--data.init_args.seed (-1) must be"
