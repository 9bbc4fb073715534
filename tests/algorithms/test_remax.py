"""ReMax: a greedy response to each prompt is the baseline."""

import numpy as np
import pytest
import torch

from lit_rlhf import PPO, FixedKL, ReMax, RewardShaping, UserError
from lit_rlhf.losses import policy_gradient_loss, remax
from lit_rlhf.rollout.play import GenerationSettings, complete
from tests.ppo_runs import make, solved


@pytest.mark.slow
def test_it_learns_to_write_the_rewarded_token(folder, tmp_path):
    assert solved(folder, tmp_path, ReMax, iterations=20) > 0.9


def test_defaults(folder):
    module = ReMax(str(folder))
    assert module.advantages.func is remax and module.loss.func is policy_gradient_loss
    assert not module.whiten_advantages


def last_word(prompts, responses, **columns):
    return [float(response.split()[-1][1:]) / 4 if response else 0.0 for response in responses]


@pytest.mark.parametrize("group_size", [1, 4])
def test_the_baseline_is_the_shaped_score_of_the_greedy_response_to_the_same_prompt(group_size, folder, tmp_path):
    seen = []

    def watched(rollout, gamma):
        seen.append(rollout)
        return remax(rollout, gamma)

    shaping = RewardShaping(clip=5.0, length_penalty=0.5)
    module, data, trainer = make(
        folder,
        tmp_path,
        reward=last_word,
        kind=ReMax,
        advantages=watched,
        shaping=shaping,
        data={"group_size": group_size, "num_slots": 3},
        learning_rate=0.0,
    )
    trainer.fit(module, data)
    rollout = seen[-1]
    settings = GenerationSettings(max_new_tokens=8, temperature=0.0)
    greedy = complete(module.policy, module.tokenizer, data.prompts["train"], settings)
    tokens = np.array([len(episode.response_ids) for episode in greedy])
    texts = [module.tokenizer.decode(episode.response_ids, skip_special_tokens=True) for episode in greedy]
    expected = np.minimum(last_word([], texts), 5.0) - 0.5 * tokens
    assert rollout.greedy_scores.tolist() == pytest.approx(expected[rollout.prompt_index].tolist())
    assert len(set(rollout.greedy_scores.tolist())) > 1
    assert len(set(rollout.prompt_index.tolist())) == 16 // group_size


def test_greedy_responses_are_no_part_of_what_is_learnt_or_logged(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, kind=ReMax, data={"group_size": 4}, kl=FixedKL(0.0))
    trainer.fit(module, data)
    assert len(trainer.train_dataloader.experience.response_ids) == 16
    assert module.shaping.seen.size == 16


def test_its_estimator_is_refused_where_nothing_is_played_greedily(folder):
    with pytest.raises(UserError, match=r"^model\.advantages: remax needs the scores of greedy responses, which"):
        PPO(str(folder), advantages=remax)
    assert torch.is_tensor(ReMax(str(folder)).returns_seen.size)
