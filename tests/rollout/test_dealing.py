"""Dynamic sampling: others are dealt in place of groups whose rewards are all equal."""

import numpy as np
import pytest

from lit_rlhf import GRPO, UserError
from lit_rlhf.rollout.dealing import equal_groups, topped_up
from lit_rlhf.rollout.play import Play
from tests.ppo_runs import constant, count_w9, make
from token_mdp import Episode, FinishReason


def played(*rewards, start=0):
    ids = np.array([5])
    episodes = [Episode(start + i, 0, ids, ids, FinishReason.STOP, r, {}, None) for i, r in enumerate(rewards)]
    return Play(episodes, [np.array([float(episode.episode_id)]) for episode in episodes])


def test_a_group_is_equal_if_no_reward_differs():
    assert equal_groups(played(1.0, 1.0, 0.0, 0.5, 0.0, 0.0), 2).tolist() == [True, False, True]


def test_groups_that_teach_come_first_and_the_rest_is_filled_with_the_first_of_the_others():
    first, more = played(1.0, 1.0, 0.0, 0.5, 0.0, 0.0), played(0.2, 0.2, 0.3, 0.4, start=6)
    kept = topped_up(first, more, 2)
    assert [episode.episode_id for episode in kept.episodes] == [2, 3, 8, 9, 0, 1]
    assert [rows.item() for rows in kept.sampled_logprobs] == [2, 3, 8, 9, 0, 1]
    assert kept.dropped == 2
    assert topped_up(kept, played(0.0, 1.0, start=10), 2).dropped == 3


def by_prompt(prompts, responses, **columns):
    """Prompts that begin with an even word teach nothing."""
    told = zip(prompts, count_w9(prompts, [r.replace("w1", "w9") for r in responses]), strict=True)
    return [0.0 if int(prompt.split()[0][1:]) % 2 == 0 else value for prompt, value in told]


@pytest.mark.parametrize("rounds", [0, 10])
def test_a_rollout_is_filled_with_groups_that_teach(rounds, folder, tmp_path):
    data = {"group_size": 4, "rollout_size": 32}
    module, data, trainer = make(
        folder, tmp_path, reward=by_prompt, kind=GRPO, dynamic_sampling=rounds, data=data, learning_rate=0.0
    )
    trainer.fit(module, data)
    experience, metrics = trainer.train_dataloader.experience, module.rollout_metrics
    firsts = [ids.tolist() for ids in experience.prompt_ids[::4]]
    groups = [ids.tolist() for ids in experience.prompt_ids]
    assert groups == [first for first in firsts for _ in range(4)]  # whole groups, still in rows
    assert (metrics["rollout/equal_groups"] == 0) == (rounds > 0)
    dealt = trainer.train_dataloader.env.reset(options={"max_episodes": 4})[1]["episode_id"].max() // 4
    assert metrics.get("rollout/dropped_groups") == ((dealt - 8) / 8 if rounds else None)
    assert dealt > 8 or not rounds


def test_the_bound_ends_it_where_no_group_teaches(folder, tmp_path):
    module, data, trainer = make(
        folder, tmp_path, reward=constant, kind=GRPO, dynamic_sampling=3, data={"group_size": 4}
    )
    trainer.fit(module, data)
    assert module.rollout_metrics["rollout/equal_groups"] == 1.0
    assert module.rollout_metrics["rollout/dropped_groups"] == 3.0  # each group three times
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_it_needs_groups_and_a_number_of_rounds(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, dynamic_sampling=3)
    with pytest.raises(
        UserError, match=r"^model\.dynamic_sampling \(3\) compares completions .* data\.group_size is 1"
    ):
        trainer.fit(module, data)
    with pytest.raises(UserError, match=r"^dynamic_sampling \(-1\) must be 0 \(off\) or more rounds"):
        GRPO(str(folder), dynamic_sampling=-1)
