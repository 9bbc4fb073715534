"""Advantages that choose among the completions of a prompt, by their returns: those to imitate, and those to compare.

A return is the score, less the KL penalty where that is charged in the reward. Of completions that are as good, the
first is taken. Axes: B episodes, T response cells, as in `advantages.py`.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.losses.advantages import Advantages, ScoredRollout
from lit_rlhf.losses.baselines import group_statistics, on_each_token


@check_shapes
def best_of_group(rollout: ScoredRollout) -> Advantages:
    """Imitate the best completion of each prompt: A = 1 on its tokens, 0 on those of the others.

    Dong et al. 2023 (RAFT), Algorithm 1, https://arxiv.org/abs/2304.06767. With `policy_gradient_loss` the expected
    gradient is that of SFT on the best of N, which is at most log N - (N - 1)/N nats away from the policy (Beirami et
    al. 2024, Theorem 1, https://arxiv.org/abs/2401.01879).

    Args:
        rollout: groups of 2 or more.

    Returns:
        Advantages, and the reward to go.

    Raises:
        ValueError: a group of one.
    """
    returns = group_statistics(rollout, "best_of_group").returns
    assert rollout.group_index is not None
    return on_each_token(rollout, _best(returns, rollout.group_index).double())


@check_shapes
def best_and_worst(rollout: ScoredRollout) -> Advantages:
    """Compare the best completion of each prompt with the worst: ± half of what their returns differ by, 0 on others.

    Guo et al. 2024 (online DPO), section 3, https://arxiv.org/abs/2402.04792, whose judge sees two completions; of
    more, these two differ most. Groups of equal returns have nothing to compare: all their advantages are 0.

    Args:
        rollout: groups of 2 or more.

    Returns:
        Advantages, and the reward to go.

    Raises:
        ValueError: a group of one.
    """
    returns, index = group_statistics(rollout, "best_and_worst").returns, rollout.group_index
    assert index is not None
    best, worst = _best(returns, index), _best(-returns, index)
    difference = _greatest(returns, index) + _greatest(-returns, index)
    return on_each_token(rollout, 0.5 * difference * (best.double() - worst.double()))


def _best(values: Float[Tensor, " B"], group_index: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """Whether a response is the first among the best of its group."""
    places, none = torch.arange(len(values)), len(values)
    of_best = torch.where(values == _greatest(values, group_index), places, none)
    return places == -_greatest(-of_best, group_index)


def _greatest(values: Tensor, group_index: Int[Tensor, " B"]) -> Tensor:
    """(B,) for each response the greatest value of its group."""
    return torch.zeros_like(values).scatter_reduce(0, group_index, values, "amax", include_self=False)[group_index]


def best_of_n_kl(count: int) -> float:
    """KL(π_N‖π) = log N - (N - 1)/N nats, of the best of N samples of π to π itself.

    Beirami et al. 2024, https://arxiv.org/abs/2401.01879: exact where no two responses score alike and none is likely,
    else at most so much.

    Args:
        count: N, 1 or more.

    Returns:
        0 for N = 1, log 2 - ½ = 0.193 for N = 2, 1.204 for 8.
    """
    return math.log(count) - (count - 1) / count
