"""Null where none may be, and parts that are no mapping, are refused by the option's name."""

from typing import Any, Literal

import pytest
from jsonargparse import Namespace
from lightning.pytorch import Trainer

from lit_rlhf import PPO, SFT, FixedKL, GenerationSettings, SFTDataModule
from lit_rlhf.callbacks import HuggingFaceExport
from lit_rlhf.cli.values import argument_types, may_be_null, option_of, type_in_words, wrong_values
from tests.cli.command_line import QUICK, run


def found(model=None, **parts):
    arguments = Namespace(class_path="lit_rlhf.SFT", init_args=Namespace(**model or {}))
    config = Namespace(**{"trainer": Namespace(), "model": arguments, **parts})
    kinds = {"trainer": Trainer, "export": HuggingFaceExport}
    groups = {name: kind for name, kind in kinds.items() if name in config}
    return list(wrong_values(config, groups))


def test_null_is_refused_where_the_type_has_none_at_any_depth():
    assert found({"learning_rate": None}) == [("model.learning_rate", None, "a number")]
    assert found({"lr_scheduler": None}) == [("model.lr_scheduler", None, "'constant' or 'cosine' or 'linear'")]
    assert found({"generation": Namespace(top_p=None, top_k=None)}) == [("model.generation.top_p", None, "a number")]
    assert found({"generation": 3}) == [("model.generation", 3, "a mapping of the arguments of GenerationSettings")]
    callback = Namespace(class_path="lightning.pytorch.callbacks.EarlyStopping", init_args=Namespace(mode=None))
    assert found(trainer=Namespace(callbacks=[callback])) == [("trainer.callbacks.mode", None, "text")]
    reward = Namespace(class_path="lit_rlhf.RewardShaping", init_args=Namespace(whiten=None))
    assert [option for option, *_ in found({"rewards": {"a": reward}})] == ["model.rewards.a.whiten"]


def test_null_is_taken_where_it_is_a_type_or_the_default():
    assert (
        found({"generation": Namespace(top_k=None)}, trainer=Namespace(max_epochs=None, limit_val_batches=None)) == []
    )


@pytest.mark.parametrize("given", [None, 3, []])
def test_a_part_that_is_no_mapping_is_refused(given):
    assert found(export=given) == [("export", given, "a mapping of the arguments of HuggingFaceExport")]
    assert found(trainer=given) == [("trainer", given, "a mapping of the arguments of Trainer")]


def test_types_of_arguments_come_from_the_bases_too():
    assert argument_types(SFT)["learning_rate"] is float
    assert argument_types(SFTDataModule)["num_workers"] is int
    assert argument_types(GenerationSettings)["temperature"] is float
    assert argument_types(Trainer)["max_steps"] is int


def test_types_that_hold_null_and_types_in_words():
    assert may_be_null(int | None) and may_be_null(Any) and may_be_null(None)
    assert not (may_be_null(int) or may_be_null(Literal["a"]) or may_be_null(list[int]) or may_be_null(int | str))
    assert type_in_words(int | str) == "a whole number, or text"
    assert type_in_words(Literal["a", "b"]) == "'a' or 'b'"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.learning_rate=null"], "--model.learning_rate: expected a number, got null"),
        (["--trainer.max_steps=null"], "--trainer.max_steps: expected a whole number, got null"),
        (["--data.shuffle=null"], "--data.shuffle: expected true or false, got null"),
        (["--export=null"], "--export: expected a mapping, or a YAML file that holds one, got null"),
        (
            ["--model=lit_rlhf.algorithms.module.AlignmentModule"],
            "--model: name a class by model.class_path, such as lit_r",
        ),
    ],
)
def test_what_jsonargparse_lets_through_is_told_before_a_model_is_read(options, words, capsys):
    assert run("fit", "--config", "configs/sft.yaml", *QUICK, *options) == 2
    assert f"error: {words}" in capsys.readouterr().err


def test_a_class_is_found_by_the_option_that_names_it_with_its_arguments():
    def kl(coef):
        return Namespace(class_path="lit_rlhf.FixedKL", init_args=Namespace(kl_coef=coef))

    config = Namespace(
        model=Namespace(class_path="lit_rlhf.PPO", init_args=Namespace(kl=kl(0.1), others=[kl(0.2)], by={"a": kl(0.3)}))
    )
    for coef, option in {0.1: "model.kl", 0.2: "model.others", 0.3: "model.by.a", 0.4: None}.items():
        assert option_of(FixedKL, {"kl_coef": coef}, config) == option
    assert option_of(PPO, {}, config) is None  # a part of the run, which names its options itself
