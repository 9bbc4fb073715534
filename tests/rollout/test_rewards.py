import functools
import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lit_rlhf import Reward, RewardModel, RewardModelReward, TextReward, UserError
from lit_rlhf.callbacks.export import export
from lit_rlhf.demo import gold_reward
from lit_rlhf.engine.sharding import full_state_dict
from tests.tiny import EOS, save_tiny, tiny_tokenizer
from tests.tiny_tokenizers import byte_tokenizer
from token_mdp import Shared
from token_mdp.verifiable import ExactAnswer, RegexMatch


def ones(prompts, responses):
    return [1.0] * len(responses)


def by_answer(prompts, responses, answer):
    return [float(x == "yes") for x in answer]


def by_all(prompts, responses, **columns):
    return [float(len(columns) == 2)] * len(responses)


async def later(prompts, responses):
    return [1.0] * len(responses)


class Grader:
    def __call__(self, prompts, responses, answer):
        return by_answer(prompts, responses, answer)

    def grade(self, prompts, responses, **columns):
        return by_all(prompts, responses, **columns)


class LaterGrader:
    async def __call__(self, prompts, responses):
        return [1.0]


def bound(function, tokenizer=None, **options):
    reward = TextReward(function, **options)
    reward.bind(tokenizer or tiny_tokenizer(), torch.device("cpu"))
    return reward


FUNCTIONS = {
    "no column": ones,
    "one by name": by_answer,
    "all": by_all,
    "lambda": lambda prompts, responses, answer=None, **others: [1.0] * len(answer),
    "object": Grader(),
    "method": Grader().grade,
    "partial": functools.partial(by_all),
    "partial with a column": functools.partial(by_answer, answer=["yes"]),
    "shared": Shared(by_answer),
    "keywords": lambda prompts, responses, *, answer: [float(answer == ["yes"])],
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_of_any_kind_get_the_columns_that_they_name(function):
    reward = bound(function)
    reward.check_columns(["answer", "prompt"])
    assert list(reward([np.array([5])], [np.array([6])], answer=["yes"], prompt=["w5"])) == [1.0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda prompts: [1.0], "too many positional arguments"),
        (lambda: [1.0], "too many positional arguments"),
        (lambda prompts, responses, solution: [1.0], "missing a required argument: 'solution'"),
        (lambda prompts, responses, *, solution: [1.0], "missing a required .*argument: 'solution'"),
    ],
)
def test_a_function_that_cannot_be_called_so_is_refused_before_anything_is_scored(function, said):
    with pytest.raises(
        UserError, match=rf"cannot be called as function\(prompts, .*({said}).*the columns \['answer'\]"
    ):
        bound(function).check_columns(["answer"])


def test_a_function_that_does_not_tell_what_it_takes_is_tried():
    bound(dict.fromkeys).check_columns(["answer"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Grader, r"is no function .*: give an object of it, Grader\(...\)"),
        (RegexMatch, r"give an object of it, RegexMatch\(...\)"),
        (3, r"3 is no function \(prompts, responses, \*\*columns\)"),
        ("my_rewards.brief", "'my_rewards.brief' is no function"),
        (None, "None is no function"),
        ([1.0], "is no function"),
        (later, r"later is async; give a plain function that runs it"),
        (functools.partial(later), "later is async"),
        (LaterGrader(), "LaterGrader is async"),
        (Shared(later), "Shared is async|later is async"),
    ],
)
def test_what_is_no_function_of_text_is_refused_by_its_name(given, said):
    with pytest.raises(UserError, match=said):
        TextReward(given)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_means_nothing_is_refused(timeout):
    with pytest.raises(UserError, match=r"timeout \(.*\) must be seconds above 0 and finite, or null"):
        TextReward(ones, timeout=timeout)


def test_a_call_that_takes_longer_than_its_timeout_is_stopped():
    def endless(prompts, responses):
        while True:
            pass

    with pytest.raises(TimeoutError, match=r"longer than timeout, 0\.1 s"):
        bound(endless, timeout=0.1)([np.array([5])], [np.array([6])])


@pytest.mark.parametrize("special", [False, True])
def test_text_is_what_predict_writes_and_special_tokens_are_an_option(special):
    seen = []
    reward = bound(lambda p, r: seen.append((p, r)) or [0.0], byte_tokenizer(), special_tokens=special)
    tokenizer = byte_tokenizer()
    prompt, response = ((np.array(tokenizer(text)["input_ids"])) for text in ("def f():\n", "    return 1\n<eos>"))
    reward([prompt], [response])
    assert seen == [(["def f():\n"], ["    return 1\n<eos>" if special else "    return 1\n"])]


@pytest.mark.parametrize("budget", [0, -7])
def test_a_budget_without_a_token_is_refused(budget):
    with pytest.raises(UserError, match=rf"max_tokens \({budget}\) must be 1 or more"):
        RewardModelReward("model", max_tokens=budget)


def test_special_tokens_of_words_are_left_out():
    seen = []
    bound(lambda p, r: seen.append((p, r)) or [0.0])([np.array([1, 5])], [np.array([6, 7, EOS])])
    assert seen[0][0] == ["w5"] and seen[0][1][0].split() == ["w6", "w7"]


def test_rewards_are_told_by_import_path():
    class Own(Reward):
        pass

    assert str(TextReward(gold_reward)) == "lit_rlhf.demo.gold.gold_reward"
    assert str(TextReward(functools.partial(functools.partial(ones)))) == "tests.rollout.test_rewards.ones"
    assert str(TextReward(Grader())) == "tests.rollout.test_rewards.Grader"
    assert str(Own()).endswith("Own")


def test_reward_model_scores_are_the_same_in_transformers_with_pad_equal_to_eos(tmp_path):
    module = RewardModel(str(save_tiny(tmp_path / "lm", pad_is_eos=True)))
    export(module, full_state_dict(module.exportable()), tmp_path / "rm")
    reward = RewardModelReward(str(tmp_path / "rm"))
    reward.bind(tiny_tokenizer(pad_is_eos=True), torch.device("cpu"))
    prompts = [np.array([5, 6, 7]), np.array([8])]
    responses = [np.array([9, EOS]), np.array([10, 11, 12, 13, EOS])]
    scores = reward(prompts, responses)

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    pad = model.config.pad_token_id
    assert pad != EOS
    with torch.no_grad():
        padded = model(torch.tensor([[5, 6, 7, 9, EOS, pad], [8, 10, 11, 12, 13, EOS]])).logits[:, 0]
    np.testing.assert_allclose(scores, padded.numpy(), rtol=1e-4, atol=1e-5)


def test_scores_do_not_depend_on_the_token_budget(tmp_path):
    module = RewardModel(str(save_tiny(tmp_path / "lm")))
    export(module, full_state_dict(module.exportable()), tmp_path / "rm")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 40, rng.integers(1, 9)) for _ in range(7)]
    small, large = (
        RewardModelReward(str(tmp_path / "rm"), max_tokens=budget)(prompts, prompts[::-1]) for budget in (10, 10_000)
    )
    np.testing.assert_allclose(small, large, rtol=1e-4, atol=1e-5)


def test_a_reward_model_with_another_tokenizer_is_refused(tmp_path):
    module = RewardModel(str(save_tiny(tmp_path / "lm")))
    export(module, full_state_dict(module.exportable()), tmp_path / "rm")
    other = tiny_tokenizer()
    other.add_tokens(["extra"])
    with pytest.raises(UserError, match="was trained with another tokenizer than the policy"):
        RewardModelReward(str(tmp_path / "rm")).bind(other, torch.device("cpu"))


def test_a_column_that_a_class_reads_by_its_name_is_missed_before_anything_is_played():
    TextReward(ExactAnswer("solution")).check_columns(["prompt", "solution"])
    with pytest.raises(UserError, match=r"ExactAnswer: there is no column 'solution' .*; there are \['answer'\]$"):
        TextReward(ExactAnswer("solution")).check_columns(["answer"])


def test_a_function_that_changes_the_folder_does_not_move_the_run(tmp_path):
    def wanders(prompts, responses):
        os.chdir(tmp_path)
        return ones(prompts, responses)

    before, ids = os.getcwd(), [np.array([1])]
    assert bound(wanders)(ids, ids) == [1.0] and os.getcwd() == before
