"""A checkpoint says by plain values what its module was made of, and a stranger's one can name no code but ours."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_rlhf import (
    DPO,
    PPO,
    SFT,
    AdaptiveKL,
    FixedKL,
    GenerationSettings,
    KLPenalty,
    LossTerm,
    ReferenceUpdate,
    RewardModel,
    RewardShaping,
    UserError,
)
from lit_rlhf.algorithms import on_policy
from lit_rlhf.algorithms.chosen import ChosenFunction
from lit_rlhf.algorithms.hyperparameters import differing
from lit_rlhf.losses import dpo_loss, gae, ipo_loss, ppo_policy_loss, robust_dpo_loss
from tests.stages import STAGES, make_stage, make_trainer

OPTIONS = {
    "sft": {"generation": GenerationSettings(max_new_tokens=3, top_k=5), "adam_betas": (0.8, 0.9)},
    "reward_model": {"normalize": "mean_and_std", "fresh_head": True},
    "dpo": {"loss": [LossTerm(robust_dpo_loss, 0.7, {"label_smoothing": 0.1}), LossTerm(ipo_loss)], "beta": 0.3},
    "ppo": {
        "kl_penalty": KLPenalty("loss", "k3"),
        "shaping": RewardShaping(clip=3.0),
        "advantages": ChosenFunction(gae, {"gamma": 0.9}),
        "seed": 4,
    },
}
CLASSES = {"sft": SFT, "reward_model": RewardModel, "dpo": DPO, "ppo": PPO}


def save(inputs, folder, stage, **options):
    """A module after an epoch, and its checkpoint."""
    module, data = make_stage(stage, inputs, **options)
    saver = ModelCheckpoint(dirpath=folder, filename="end")
    make_trainer(folder, max_epochs=1, callbacks=[saver], enable_checkpointing=True).fit(module, data)
    return module, folder / "end.ckpt"


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """A module of each stage after an epoch, and its checkpoint."""
    return {stage: save(inputs, tmp_path_factory.mktemp(stage), stage, **OPTIONS[stage]) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_a_module_loads_from_its_checkpoint_by_itself(runs, stage):
    module, path = runs[stage]
    loaded = CLASSES[stage].load_from_checkpoint(path)
    assert {name: str(value) for name, value in loaded.hparams.items()} == {
        name: str(value) for name, value in module.hparams.items()
    }
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    for name, network in module.frozen.items():  # made anew from the folder that the run started from
        for ours, theirs in zip(network.parameters(), loaded.frozen[name].parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert loaded.untrained is None
    assert vars(loaded.optimizer_settings) == vars(module.optimizer_settings)
    if stage == "ppo":
        assert type(loaded.kl) is AdaptiveKL and vars(loaded.kl) == vars(module.kl)
        assert (loaded.kl_penalty, loaded.sampling) == (module.kl_penalty, module.sampling)
        assert loaded.shaping.settings == module.shaping.settings and loaded.shaping.settings.clip == 3.0
        assert loaded.shaping.state_dict() == module.shaping.state_dict()
        assert (loaded.advantages.func, loaded.advantages.keywords) == (gae, module.advantages.keywords)
        assert (loaded.loss.func, loaded.loss.keywords) == (ppo_policy_loss, module.loss.keywords)
    if stage == "dpo":
        assert loaded.loss.terms == module.loss.terms and loaded.beta == 0.3
    if stage == "sft":
        assert loaded.generation == OPTIONS["sft"]["generation"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_holds_tensors_and_plain_values_alone(runs, inputs, stage):
    _, path = runs[stage]
    stored = torch.load(path, weights_only=True)["hyper_parameters"]
    assert json.loads(json.dumps(stored)) == stored
    assert stored["policy"] == str(inputs / "model") and stored["learning_rate"] == 1e-2
    assert "trust_remote_code" not in stored


@pytest.mark.parametrize(
    ("kind", "options", "check"),
    [
        (DPO, {"loss": dpo_loss}, lambda module: module.loss.terms[0].function is dpo_loss),
        (
            DPO,
            {"loss": partial(robust_dpo_loss, label_smoothing=0.2)},
            lambda module: module.loss.terms[0].options == {"label_smoothing": 0.2},
        ),
        (
            DPO,
            {"reference_update": ReferenceUpdate(0.5, 2)},
            lambda module: module.reference_update == ReferenceUpdate(0.5, 2),
        ),
        (DPO, {"reference_update": None}, lambda module: module.reference_update is None),
        (PPO, {"kl": FixedKL(0.3)}, lambda module: type(module.kl) is FixedKL and module.kl.kl_coef == 0.3),
        (PPO, {"kl": None}, lambda module: type(module.kl) is FixedKL),
        (PPO, {"critic": "critic"}, lambda module: module.hparams.critic == "critic"),
    ],
    ids=["function", "partial", "settings", "no settings", "object", "no object", "folder"],
)
def test_functions_settings_and_objects_come_back_as_they_were(inputs, tmp_path, monkeypatch, kind, options, check):
    monkeypatch.chdir(tmp_path)
    if "critic" in options:
        from lit_rlhf.callbacks.export import export
        from lit_rlhf.engine.sharding import full_state_dict

        scorer = RewardModel(str(inputs / "model"))
        export(scorer, full_state_dict(scorer.exportable()), tmp_path / "critic")
    _, path = (
        save(inputs, tmp_path, kind.__name__.lower(), **options) if kind is DPO else save_ppo(inputs, tmp_path, options)
    )
    assert check(kind.load_from_checkpoint(path))


def save_ppo(inputs, folder, options):
    _, data = make_stage("ppo", inputs)
    module = PPO(str(inputs / "model"), ppo_epochs=1, num_minibatches=1, **options)
    saver = ModelCheckpoint(dirpath=folder, filename="end")
    make_trainer(folder, max_epochs=1, callbacks=[saver], enable_checkpointing=True).fit(module, data)
    return module, folder / "end.ckpt"


def test_the_chat_template_of_the_data_comes_with_the_checkpoint(inputs, tmp_path):
    module, data = make_stage("sft", inputs)
    template = "{% for m in messages %}{{ m['content'] }} w39 {% endfor %}"
    data.tokenization = replace(data.tokenization, chat_template=template)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="end")
    make_trainer(tmp_path, max_epochs=1, callbacks=[saver], enable_checkpointing=True).fit(module, data)
    assert SFT.load_from_checkpoint(tmp_path / "end.ckpt").tokenizer.chat_template == template


def test_arguments_that_are_given_go_before_those_of_the_run(runs):
    _, path = runs["sft"]
    loaded = SFT.load_from_checkpoint(path, learning_rate=0.5, generation=GenerationSettings(seed=9))
    assert loaded.learning_rate == loaded.hparams.learning_rate == 0.5 and loaded.generation.seed == 9


def test_arguments_of_a_file_go_before_those_of_the_run_and_the_others_are_the_runs(runs, tmp_path):
    (tmp_path / "hparams.yaml").write_text("{learning_rate: 0.5}")
    loaded = SFT.load_from_checkpoint(runs["sft"][1], hparams_file=tmp_path / "hparams.yaml")
    assert (loaded.learning_rate, loaded.generation) == (0.5, OPTIONS["sft"]["generation"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read as YAML: .*No such file"),
        ("{learning_rate: [", "cannot be read as YAML: .*line 1"),
        ("!!python/object/apply:os.getcwd []", "cannot be read as YAML: could not determine a constructor"),
        ("", "found None"),
        ("- 3", r"found \[3\]"),
    ],
)
def test_a_file_of_arguments_that_holds_none_is_told_by_name(content, words, runs, tmp_path):
    if content is not None:
        (tmp_path / "hparams.yaml").write_text(content)
    with pytest.raises(UserError, match=rf"^hparams_file: .*{tmp_path}/hparams.yaml[^\n]*{words}[^\n]*$"):
        SFT.load_from_checkpoint(runs["sft"][1], hparams_file=tmp_path / "hparams.yaml")


def halved(chosen, rejected, ref_chosen, ref_rejected, beta):
    """A loss of a user's own."""
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta) / 2


@pytest.mark.parametrize("loss", [halved, lambda *pair: dpo_loss(*pair) / 2], ids=["function", "lambda"])
def test_a_loss_of_ones_own_is_given_again(inputs, tmp_path, loss):
    _, path = save(inputs, tmp_path, "dpo", loss=loss)
    with pytest.raises(UserError, match=r"^loss.*pass loss="):
        DPO.load_from_checkpoint(path)
    assert DPO.load_from_checkpoint(path, loss=loss).loss.terms[0].function is loss


class Own(SFT):
    """A module of a user's own, with a constructor of its own."""

    def __init__(self, flavour: str, sizes: tuple[int, ...] = (1, 2), **kwargs) -> None:
        super().__init__(weight_decay=0.3, **kwargs)
        self.flavour, self.sizes = flavour, sizes


def test_a_module_of_ones_own_loads_too(inputs, tmp_path):
    _, data = make_stage("sft", inputs)
    module = Own("sweet", (3, 4), policy=str(inputs / "model"), learning_rate=1e-2)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="end")
    make_trainer(tmp_path, max_epochs=1, callbacks=[saver], enable_checkpointing=True).fit(module, data)
    loaded = Own.load_from_checkpoint(tmp_path / "end.ckpt")
    assert (loaded.flavour, loaded.sizes, loaded.learning_rate) == ("sweet", (3, 4), 1e-2)
    assert torch.equal(loaded.policy.head.weight, module.policy.head.weight)


def forge(runs, folder, **arguments):
    """A stranger's checkpoint: these arguments in place of its run's."""
    checkpoint = torch.load(runs["ppo"][1], weights_only=True)
    checkpoint["hyper_parameters"] |= arguments
    torch.save(checkpoint, folder / "forged.ckpt")
    return folder / "forged.ckpt"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kl", {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "harm"]}}),
        ("kl", {"class_path": "lit_rlhf.algorithms.sft.SFT", "init_args": {}}),
        ("kl", {"class_path": "lit_rlhf.files.subprocess.Popen", "init_args": {"args": ["touch", "harm"]}}),
        ("loss", "os.system"),
        ("loss", "antigravity.fly"),
        ("loss", "lit_rlhf.files.os.system"),
        ("loss", "lit_rlhf.files.write_lines"),
        ("loss", {"function": "lit_rlhf.files.write_lines", "options": {"file": "harm"}}),
        ("loss", {"function": "os.system", "options": {}}),
        ("loss", {"partial": "os.system", "keywords": {"command": "touch harm"}}),
        ("loss", {"not stored": "a lambda"}),
        ("shaping", {"class_path": "no.such.thing", "init_args": {}}),
        ("generation", {"max_new_tokens": 3, "of another version": 1}),
    ],
)
def test_a_checkpoint_names_no_code_but_this_librarys(runs, tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    path = forge(runs, tmp_path, **{name: value})
    with pytest.raises(UserError, match=rf"^{name}"):
        PPO.load_from_checkpoint(path)
    assert not (tmp_path / "harm").exists()


def test_a_checkpoint_does_not_ask_for_trust_or_for_another_way_of_being_made(runs, tmp_path, monkeypatch):
    path = forge(runs, tmp_path, trust_remote_code=True, _instantiator="lightning.pytorch.cli.instantiate_module")
    trusted, real = [], on_policy.load_policy_with_tokenizer
    monkeypatch.setattr(
        on_policy,
        "load_policy_with_tokenizer",
        lambda name, scratch, trust, *args: trusted.append(trust) or real(name, scratch, False, *args),
    )
    monkeypatch.setattr("lightning.pytorch.cli.instantiate_module", None)
    PPO.load_from_checkpoint(path)
    PPO.load_from_checkpoint(path, trust_remote_code=True)
    assert trusted == [False, True]


def test_what_is_no_checkpoint_of_this_algorithm_is_named(runs, tmp_path):
    _, path = runs["sft"]
    with pytest.raises(UserError, match="is a checkpoint of SFT: load it by SFT"):
        DPO.load_from_checkpoint(path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        SFT.load_from_checkpoint(tmp_path / "gone.ckpt")
    with pytest.raises(UserError, match="is no checkpoint of the Trainer's"):
        SFT.load_from_checkpoint(tmp_path)


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_loggers_show_the_arguments_of_a_run(inputs, tmp_path, logger):
    module, data = make_stage("ppo", inputs)
    make_trainer(tmp_path, max_epochs=1, logger=logger(tmp_path)).fit(module, data)
    (file,) = tmp_path.rglob("hparams.yaml")
    shown = yaml.safe_load(file.read_text())
    assert shown == dict(module.hparams)
    assert shown["kl"]["class_path"].endswith("AdaptiveKL") and shown["kl"]["init_args"]["target"] == 0.5
    loaded = PPO(str(inputs / "model"))
    assert isinstance(loaded, LightningModule) and loaded.hparams.loss.endswith("ppo_policy_loss")


def test_arguments_that_differ_are_named_as_on_the_command_line():
    fixed = {"class_path": "lit_rlhf.FixedKL", "init_args": {"kl_coef": 0.05}}
    given = {"beta": 0.1, "kl": fixed, "clip_range": 0.2, "gone": 1, "loss": "a"}
    mine = given | {"kl": {**fixed, "init_args": {"kl_coef": 0.2}}, "loss": "b", "new": 2}
    del mine["gone"]
    assert differing(given, mine) == {"kl.kl_coef": (0.05, 0.2), "loss": ("a", "b")}
    assert differing({"kl": None}, {"kl": fixed}) == {"kl": (None, fixed)}
