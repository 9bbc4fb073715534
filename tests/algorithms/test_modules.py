"""Rewards."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lit_rlhf import RewardModel, RewardModelReward, RolloutDataModule, TextReward, UserError
from lit_rlhf.callbacks.export import export
from lit_rlhf.engine.sharding import full_state_dict
from tests.tiny import EOS, save_tiny, tiny_tokenizer


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, responses: [1.0] * len(responses),
        lambda prompts, responses, answer: [float(x == "yes") for x in answer],
        lambda prompts, responses, **columns: [float(len(columns) == 2)] * len(responses),
    ],
    ids=["no column", "one by name", "all"],
)
def test_a_reward_function_gets_the_columns_that_it_names(function):
    reward = TextReward(function)
    reward.bind(tiny_tokenizer(), torch.device("cpu"))
    ids = [np.array([5])]
    assert reward(ids, ids, answer=["yes"], prompt=["w5"]).tolist() == [1.0]


def test_a_reward_function_that_asks_for_a_column_that_is_not_there_hears_which_are():
    reward = TextReward(lambda prompts, responses, solution: [1.0])
    reward.bind(tiny_tokenizer(), torch.device("cpu"))
    ids = [np.array([5])]
    with pytest.raises(UserError, match=r"'solution'; it is called as .*\*\*columns\), columns \['answer'\]"):
        reward(ids, ids, answer=["yes"])
    with pytest.raises(UserError, match="a function of text becomes one as TextReward"):
        RolloutDataModule(lambda prompts, responses: [1.0])


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


def test_a_text_reward_reads_text_without_special_tokens():
    reward = TextReward(lambda prompts, responses, topic: [len(r.split()) for r in responses])
    reward.bind(tiny_tokenizer(), torch.device("cpu"))
    assert reward([np.array([1, 5])], [np.array([6, 7, EOS])], topic=["any"]).tolist() == [2]
