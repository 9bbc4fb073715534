"""Which completions of a prompt are learnt from, and their columns."""

import numpy as np
import torch

from lit_rlhf.rollout.experience import PlannedRollout
from lit_rlhf.rollout.keeping import columns_of, part_of, strongest
from lit_rlhf.rollout.play import Play
from token_mdp import Episode, FinishReason


def test_the_largest_in_size_are_kept_the_most_positive_first():
    advantages = torch.tensor([[0.0, -1.5, 1.5, 0.0], [0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, -2.0]])
    assert strongest(advantages, 2).tolist() == [[2, 1], [4, 5], [8, 11]]
    assert strongest(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 1).tolist() == [[1], [2]]


def test_columns_follow_their_episodes_whatever_the_plans():
    lengths = [1, 3, 2, 2, 1, 3]  # two groups of three
    episodes = [
        Episode(i, i // 3, np.array([7]), np.arange(n) + 10 * i, FinishReason.STOP, 0.0, {}, None)
        for i, n in enumerate(lengths)
    ]
    played = Play(episodes, [np.full(n, float(i)) for i, n in enumerate(lengths)])
    whole = PlannedRollout(played, [[np.array([[3, 4, 5], [0, 1, 2]])]], 1, group_size=3)
    column = torch.cat([torch.from_numpy(episodes[i].response_ids) for i in whole.order])

    kept = np.array([[2, 0], [3, 5]])
    part = PlannedRollout(part_of(played, kept), [[np.array([[2, 3], [0, 1]])]], 1, group_size=2)
    tokens = columns_of({"ids": column}, whole, part, kept)["ids"]
    experience = part.experience({"advantages": tokens}, [4.0])
    for ids, of_tokens in zip(experience.response_ids, experience.tokens["advantages"], strict=True):
        assert of_tokens.tolist() == ids.tolist()
    assert [ids.tolist() for ids in experience.response_ids] == [[20, 21], [0], [30, 31], [50, 51, 52]]
