"""Rewards by a word: folders that score, and functions by their import paths."""

import numpy as np
import pytest
import torch

from lit_rlhf import LoRA, ProcessRewardModel, ProcessRewardModelReward, RewardModel, RewardModelReward, UserError
from lit_rlhf.callbacks.export import export
from lit_rlhf.rollout.judges import judge_of
from lit_rlhf.rollout.rewards import TextReward
from tests.tiny import tiny_tokenizer

IDS = ([np.array([3, 4])], [np.array([5, 6, 2])])


def brief(prompts, responses):
    return [-float(len(response.split())) for response in responses]


@pytest.mark.parametrize(
    ("make", "kind"), [(RewardModel, RewardModelReward), (ProcessRewardModel, ProcessRewardModelReward)]
)
@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_a_folder_of_weights_or_of_an_adapter_scores_by_the_kind_of_its_head(make, kind, lora, folder, tmp_path):
    module = make(str(folder), lora=lora)
    export(module, module.exported_weights(), tmp_path / "model")
    judge = judge_of(str(tmp_path / "model"), "reward")
    assert type(judge) is kind
    judge.bind(tiny_tokenizer(), torch.device("cpu"))
    assert np.isfinite(judge(*IDS)).all()


def test_a_function_is_found_by_its_path_and_rewards_stay_what_they_are():
    judge = judge_of(f"{__name__}.brief", "reward")
    judge.bind(tiny_tokenizer(), torch.device("cpu"))
    assert isinstance(judge, TextReward) and judge(*IDS) == [-2.0]
    assert judge_of(judge, "reward") is judge
    assert isinstance(judge_of(brief, "reward"), TextReward)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("no_such_module.brief", "reward: no_such_module.brief is neither a folder nor .*No module named"),
        (f"{__name__}.briefer", "reward: .* is neither a folder nor the import path of a function .*briefer"),
        (f"{__name__}.IDS", "reward: .* is no function"),
        ("runs/reward/model", "reward: .*runs/reward/model"),
    ],
)
def test_what_is_not_there_or_scores_nothing_is_refused_in_a_line(given, said):
    with pytest.raises(UserError, match=said) as refused:
        judge_of(given, "reward")
    assert "\n" not in str(refused.value)


def test_a_policy_is_no_judge(folder):
    with pytest.raises(UserError, match=r"reward: .* holds no reward model; name the folder"):
        judge_of(str(folder), "reward")
