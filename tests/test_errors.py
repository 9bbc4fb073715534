import math
import re
from collections.abc import Callable
from inspect import isclass, signature
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, get_origin

import datasets
import numpy as np
import pandas
import pytest
import torch

import lit_rlhf.callbacks
import lit_rlhf.losses
import lit_rlhf.oracle
from lit_rlhf import DPO, PPO, SFT, PreferenceDataModule, RewardModel, RolloutDataModule, SFTDataModule
from lit_rlhf.errors import UserError, hints_of, looks_like_a_path, one_line, place_of, require, require_types
from lit_rlhf.rollout.data_module import OF_REWARDS


@pytest.mark.parametrize("name", ["./model", "../model", "/nowhere/model", "~/model", "a/b/c", r"runs\sft", ".hidden"])
def test_a_name_with_dots_or_several_slashes_was_meant_as_a_path(name):
    assert looks_like_a_path(name)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "demo", "owner/name.v2"])
def test_a_name_of_a_hub_was_not(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not looks_like_a_path(name)


def test_a_name_in_a_folder_that_is_there_was_meant_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert looks_like_a_path("runs/sft") and not looks_like_a_path("owner/sft")


def test_what_does_not_hold_is_refused_with_name_value_and_what_is_expected():
    require(True, "beta", 0.0, "more than 0")
    with pytest.raises(UserError, match=r"^beta \(0\.0\) must be more than 0$"):
        require(False, "beta", 0.0, "more than 0")


LONG = "a\n  b\n" * 500
MANY_LINES = {  # what is given that reads as many lines, or one without end -> who refuses it
    "an array as a limit": lambda: SFTDataModule(max_tokens=np.ones((40, 40))),
    "a tensor as a source": lambda: SFTDataModule(torch.ones(40, 40)),
    "a dataset as a source": lambda: SFTDataModule(datasets.Dataset.from_dict({"text": ["a"]})),
    "a dataset beside the demo": lambda: SFTDataModule("demo", datasets.Dataset.from_dict({"text": ["a"]})),
    "rows in place of a name": lambda: SFTDataModule(train=[{"source": "a", "split": ["b"] * 500}]),
    "an array of columns": lambda: SFTDataModule(columns=np.ones((40, 40)), validation=None),
    "a tensor as a format": lambda: SFTDataModule(format=torch.ones(40, 40), validation=None),
    "an array of a template": lambda: SFTDataModule(chat_template_kwargs=np.ones((40, 40))),
    "an array as a rate": lambda: SFT("demo", from_scratch=True, learning_rate=np.ones((40, 40))),
    "a mapping as a schedule": lambda: SFT("demo", from_scratch=True, lr_scheduler={"x": ["b"] * 500}),
    "a text for two numbers": lambda: SFT("demo", from_scratch=True, adam_betas=LONG),
    "a list as a dtype": lambda: SFT("demo", from_scratch=True, frozen_dtype=["b"] * 500),
    "a tensor as a reward": lambda: RolloutDataModule(torch.ones(40, 40)),
}


@pytest.mark.parametrize("mistake", MANY_LINES)
def test_a_value_of_many_lines_is_shown_in_one_and_cut(mistake):
    with pytest.raises(UserError) as told:
        MANY_LINES[mistake]()
    assert len(str(told.value).splitlines()) == 1 and len(str(told.value)) < 300
    assert one_line("a\n  b " + "x" * 600, 500) == "a b " + "x" * 496 + "..."


class Shaped(Protocol):
    """What has a shape."""


def taking(
    flag: bool,
    count: int | None,
    rate: float,
    name: str | Path = "x",
    kind: Literal["a", "b", "c"] | None = "a",
    betas: tuple[float, float] = (0, 1),
    options: dict[str, Any] | None = None,
    loss: list[Path] | Callable[..., Any] = print,
    stops: tuple[str, ...] = (),
    ranks: dict[str, int] | None = None,
    frame: pandas.DataFrame | None = None,
    anything: Any = None,
    shaped: Shaped | None = None,
    **others: Any,
):
    """What a constructor may take."""


ARRAYS = [np.array([0.5]), np.array(["a", "b"]), torch.tensor([1.0, 2.0]), pandas.DataFrame({"a": [1, 2]})]
GIVEN = [
    ("flag", [True, np.False_], ["yes", 1, None], "true or false"),
    ("count", [None, 3, np.int32(3)], ["3", 3.0, True], "a whole number or null"),
    ("rate", [1, 0.5, np.float32(1), math.nan], ["1", None, False, 1j], "a number"),
    ("name", ["x", Path("x")], [3], "text or Path"),
    ("kind", ["a", "b", None], [3, "A", "", True, ["a"]], "a, b, c or null"),
    ("betas", [(1, 2), [1, 2], (1, 2, 3)], [0.5, {1: 2}, "12"], "a list"),
    ("options", [{}, None], [[], "x"], "a mapping or null"),
    ("loss", [[], print, Path], ["print", 1.0], "a list or a function"),
    ("stops", [(), ["END"]], ["END", 3], "a list"),
    ("frame", [None], [{"a": 1}, 3, True], "DataFrame or null"),
    ("anything", [object(), *ARRAYS], [], "any"),
    ("shaped", [object()], [], "any: a protocol is not asked"),
    ("others", [{}], [], "any"),
    ("unknown", [object()], [], "any"),
]


@pytest.mark.parametrize(("name", "right", "wrong", "expected"), GIVEN)
def test_values_of_another_type_than_the_annotation_are_refused(name, right, wrong, expected):
    for value in right:
        require_types(taking, {name: value})
    for value in wrong:
        with pytest.raises(UserError, match=rf"^{name} \({re.escape(repr(value))}\) must be {expected}$"):
            require_types(taking, {name: value})


@pytest.mark.parametrize(
    ("name", "value", "item", "expected"),
    [
        ("betas", (1, "2"), "betas[1] ('2')", "a number"),
        ("loss", [Path("x"), 3], "loss[1] (3)", "Path"),
        ("stops", ["END", None], "stops[1] (None)", "text"),
        ("ranks", {"q_proj": "4"}, "ranks['q_proj'] ('4')", "a whole number"),
    ],
)
def test_items_of_another_type_than_the_annotation_says_are_refused_by_their_place(name, value, item, expected):
    with pytest.raises(UserError, match=f"^{re.escape(item)} must be {expected}$"):
        require_types(taking, {name: value})


@pytest.mark.parametrize("value", ARRAYS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["flag", "count", "rate", "name", "kind", "betas", "options", "loss"])
def test_arrays_and_tables_are_refused_by_name_wherever_none_is_expected(name, value):
    with pytest.raises(UserError, match=rf"^{name} \(\S.*\) must be [^\n]+$"):
        require_types(taking, {name: value})


def test_types_that_only_a_type_checker_can_read_are_left_alone():
    require_types(type("T", (), {"__annotations__": {"rate": "Missing"}}), {"rate": "x"})


def ones(prompts, responses):
    return [1.0] * len(responses)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("TextReward", {"function": ones, "timeout": "1"}),
        ("TextReward", {"function": ones, "abstain": "yes"}),
        ("TextReward", {"function": ones, "special_tokens": 1}),
        ("RewardModelReward", {"model": "x", "max_tokens": "9"}),
        ("RewardModelReward", {"model": 3}),
        ("RewardShaping", {"whiten": "no"}),
        ("RewardShaping", {"clip": "1"}),
        ("FixedKL", {"kl_coef": "0.1"}),
        ("AdaptiveKL", {"target": None}),
        ("GenerationSettings", {"max_new_tokens": "8"}),
        ("LoRA", {"r": "16"}),
        ("LoRA", {"use_dora": "yes"}),
        ("LossTerm", {"function": ones, "weight": "1"}),
        ("ReferenceUpdate", {"every": 1.5}),
        ("SFT", {"learning_rate": "1e-5"}),
        ("SFT", {"from_scratch": "yes"}),
        ("RewardModel", {"fresh_head": "yes"}),
        ("DPO", {"beta": "0.1"}),
        ("DPO", {"cache_reference": "no"}),
        ("PPO", {"policy": "demo", "ppo_epochs": "4"}),
        ("PPO", {"policy": "demo", "critic_warmup": "1"}),
        ("SFTDataModule", {"max_tokens": "100"}),
        ("PreferenceDataModule", {"shuffle": "yes"}),
        ("RolloutDataModule", {"reward": ones, "rollout_size": "16"}),
    ],
)
def test_a_constructor_names_the_argument_that_is_of_another_type(name, arguments):
    *_, (argument, value) = arguments.items()
    with pytest.raises(UserError, match=rf"{argument} \({re.escape(repr(value))}\) must be [^\n]+$"):
        getattr(lit_rlhf, name)(**arguments)


NEEDED = {
    "Distillation": {"policy": "demo", "teacher": "x"},
    "EnsembleReward": {"models": ["x", "y"]},
    "OnPolicyDistillation": {"policy": "demo", "teacher": "x"},
    "OnPolicyMethod": {"advantages": lit_rlhf.losses.rloo, "loss": lit_rlhf.losses.ppo_policy_loss},
    "PPO": {"policy": "demo"},
    "ProcessRewardModelReward": {"model": "x"},
    "RewardModelReward": {"model": "x"},
    "RolloutDataModule": {"reward": ones},
}
SETTLED = [("OnlineDPO", "loss_average")]  # by the class, which does not take them
PUBLIC = [
    constructor
    for module in (lit_rlhf, lit_rlhf.callbacks, lit_rlhf.losses, lit_rlhf.oracle)
    for constructor in (getattr(module, name) for name in module.__all__)
    if isclass(constructor)
]


def words_of(constructor):
    hints = {}
    for base in reversed(constructor.__mro__):
        hints |= hints_of(vars(base).get("__init__")) if base.__module__.startswith("lit_rlhf.") else {}
    choices = {
        name: [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal] for name, hint in hints.items()
    }
    open_ones = {name: found for name, found in choices.items() if (constructor.__name__, name) not in SETTLED}
    return [(constructor, name, get_args(found[0])) for name, found in open_ones.items() if found]


@pytest.mark.parametrize(("constructor", "name", "words"), [*chain.from_iterable(map(words_of, PUBLIC))])
def test_a_word_that_an_option_does_not_have_is_refused_with_those_that_it_has(constructor, name, words):
    assert all(isinstance(word, str) for word in words)
    needed = NEEDED.get(constructor.__name__, {})
    for misspelt in (words[-1].title(), "", "yes"):
        with pytest.raises(UserError, match=rf"{name} \('?{misspelt}'?\)[^\n]* must be {words[0]}[^\n]* {words[-1]}"):
            constructor(**needed, **{name: misspelt})


def names_of(constructor):
    bases = [base for base in constructor.__mro__ if base.__module__.startswith("lit_rlhf.")]
    return {name for base in bases for name in list(signature(base.__init__).parameters)[1:]} - {"args", "kwargs"}


EVERY_OPTION = [
    (constructor, name)
    for constructor in (SFT, RewardModel, DPO, PPO, SFTDataModule, PreferenceDataModule, RolloutDataModule)
    for name in sorted(names_of(constructor) - set(OF_REWARDS))
]


@pytest.mark.parametrize(("constructor", "name"), EVERY_OPTION)
def test_every_option_that_is_given_an_array_is_named(constructor, name):
    for array in ARRAYS:
        with pytest.raises(UserError, match=rf"{name} \([^\n]+\) must be [^\n]+$"):
            constructor(**{name: array})


@pytest.mark.parametrize("name", OF_REWARDS)
def test_what_stands_for_rewards_and_is_an_array_is_named(name):
    for array in ARRAYS:
        given = {name: array} if name in ("reward", "rewards") else {"reward": ones, name: array}
        with pytest.raises(UserError, match=r"^data\.(reward: \S[^\n]* is no function|[^\n]* must be a mapping)"):
            RolloutDataModule(**given)


def raised_by(call):
    try:
        call()
    except Exception as error:
        return error


def test_the_place_of_an_error_is_the_last_line_of_the_file_of_the_called_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import json\n\ndef outer():\n    inner()\n\ndef inner():\n    json.loads('{')\n")
    names = {"__name__": "mine"}
    exec(compile(file.read_text(), str(file), "exec"), names)
    assert place_of(raised_by(lambda: names["outer"]())) != ""

    def caller():
        names["outer"]()

    error = raised_by(caller)
    error = error.with_traceback(error.__traceback__.tb_next)  # from the function that called
    assert place_of(error) == f", in {file}:7"  # not within json


def test_a_call_that_itself_failed_has_no_place():
    def two(a, b):
        return a + b

    error = raised_by(lambda: two(1))
    assert place_of(error.with_traceback(error.__traceback__.tb_next)) == ""
