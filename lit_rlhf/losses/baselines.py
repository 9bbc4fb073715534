"""Advantages without a critic: what a response returned, over a baseline that is not learnt.

With the KL penalty in the reward (k1), the return of a response is R = r(x, y) - β log π/π_ref, which at the optimum is
the same for each response to a prompt: there no group has an advantage left, whatever it is divided by.

Axes: B episodes, T response cells, as in `advantages.py`. G completions of one prompt are a group.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.errors import require
from lit_rlhf.losses.advantages import Advantages, ScoredRollout, gae

EPSILON = 1e-4  # beside a standard deviation of rewards


@check_shapes
def reinforce(
    rollout: ScoredRollout,
    gamma: float = 1.0,
    baseline: Literal["none", "running_mean", "critic"] = "running_mean",
) -> Advantages:
    """Reward to go over a baseline: A_t = Σ_k γ^k r_{t+k} - b.

    Williams 1992 (REINFORCE), https://doi.org/10.1007/BF00992696; the running mean is the moving average of Ahmadian et
    al. 2024, https://arxiv.org/abs/2402.14740, over all responses so far rather than over steps.

    Args:
        rollout: with `running_mean` or `values` where that is the baseline.
        gamma: discount, 1 in RLHF.
        baseline: "none"; "running_mean" = mean return of all responses of the run so far; "critic" = its values, as of
            `gae` with λ = 1.

    Returns:
        Advantages, and the reward to go.

    Raises:
        ValueError: the rollout does not have the baseline.
    """
    require(baseline in ("none", "running_mean", "critic"), "baseline", baseline, "none, running_mean or critic")
    if baseline == "critic":
        return gae(rollout, gamma, 1.0)
    returns = _reward_to_go(rollout, gamma)
    if baseline == "none":
        return Advantages(returns, returns)
    if rollout.running_mean is None:
        raise ValueError("baseline: running_mean needs the mean return of the run so far")
    return _over(rollout, returns, rollout.running_mean.to(returns.dtype).expand(len(returns)))


@check_shapes
def rloo(rollout: ScoredRollout) -> Advantages:
    """REINFORCE leave-one-out: A_i = R_i - Σ_{j≠i} R_j / (G - 1), on each token of response i.

    Ahmadian et al. 2024 (RLOO), https://arxiv.org/abs/2402.14740. The baseline does not depend on the response, so the
    gradient is unbiased.

    Args:
        rollout: groups of 2 or more.

    Returns:
        Advantages, and the reward to go.

    Raises:
        ValueError: a group of one.
    """
    group = group_statistics(rollout, "rloo")
    others = (group.sizes * group.mean - group.returns) / (group.sizes - 1)
    return on_each_token(rollout, group.returns - others)


@check_shapes
def grpo(rollout: ScoredRollout, epsilon: float = EPSILON) -> Advantages:
    """Group relative advantages: A_i = (R_i - mean of the group) / (its standard deviation + ε), on each token.

    Shao et al. 2024 (DeepSeekMath), section 4.1.2, https://arxiv.org/abs/2402.03300. The standard deviation is that of
    a sample (G - 1), as in peers. The division weighs prompts by how sure their outcome is, and so a KL penalty in the
    loss, which it does not divide, by as much less.

    Args:
        rollout: groups of 2 or more.
        epsilon: keeps a group of equal returns finite: its advantages are 0.

    Returns:
        Advantages, and the reward to go.

    Raises:
        ValueError: a group of one.
    """
    require(epsilon > 0, "epsilon", epsilon, "more than 0: equal returns have no standard deviation")
    group = group_statistics(rollout, "grpo")
    return on_each_token(rollout, (group.returns - group.mean) / (group.std + epsilon))


@check_shapes
def dr_grpo(rollout: ScoredRollout) -> Advantages:
    """Group relative advantages, not divided: A_i = R_i - mean of the group, on each token.

    Liu et al. 2025 (Dr. GRPO), section 3.2, https://arxiv.org/abs/2503.20783. The mean holds the response's own
    return: it is (G - 1)/G of `rloo`'s advantage, so that a KL penalty in the loss weighs G/(G - 1) times as much.

    Args:
        rollout: groups of 2 or more.

    Returns:
        Advantages, and the reward to go.

    Raises:
        ValueError: a group of one.
    """
    group = group_statistics(rollout, "dr_grpo")
    return on_each_token(rollout, group.returns - group.mean)


@check_shapes
def reinforce_plus_plus(rollout: ScoredRollout, gamma: float = 1.0, group_baseline: bool = False) -> Advantages:
    """Reward to go, to be whitened over the whole rollout: A_t = Σ_k γ^k r_{t+k}.

    Hu et al. 2025 (REINFORCE++), https://arxiv.org/abs/2501.03262, with the KL penalty in the token rewards. The
    whitening, over all ranks, is the caller's (`whiten_advantages`).

    Args:
        rollout: with groups of 2 or more where their means are the baseline.
        gamma: discount, 1 in RLHF.
        group_baseline: subtract the mean return of the group: the paper's REINFORCE++-baseline.

    Returns:
        Advantages, not yet whitened, and the reward to go.

    Raises:
        ValueError: a group of one where its mean is the baseline.
    """
    returns = _reward_to_go(rollout, gamma)
    if not group_baseline:
        return Advantages(returns, returns)
    return _over(
        rollout, returns, group_statistics(rollout, "reinforce_plus_plus with group_baseline").mean.to(returns.dtype)
    )


@check_shapes
def remax(rollout: ScoredRollout, gamma: float = 1.0) -> Advantages:
    """Reward to go over the score of the most likely response: A_t = Σ_k γ^k r_{t+k} - r(x, ȳ), ȳ greedy.

    Li et al. 2024, Algorithm 1, https://arxiv.org/abs/2310.10505. ȳ is one more response to each prompt; its score is
    taken without a KL penalty, since any number that the response does not move is a baseline.

    Args:
        rollout: with `greedy_scores`.
        gamma: discount, 1 in RLHF.

    Returns:
        Advantages, and the reward to go.

    Raises:
        ValueError: no greedy responses were played.
    """
    if rollout.greedy_scores is None:
        raise ValueError("remax needs the scores of greedy responses, which lit_rlhf.ReMax plays")
    returns = _reward_to_go(rollout, gamma)
    return _over(rollout, returns, rollout.greedy_scores.to(returns.dtype))


def _reward_to_go(rollout: ScoredRollout, gamma: float = 1.0) -> Float[Tensor, "B T"]:
    """(B, T) discounted rewards from each token on: `gae` of a critic that says 0, with λ = 1."""
    nothing = torch.zeros_like(rollout.token_rewards)
    return gae(rollout._replace(values=nothing), gamma, 1.0).advantages


class _Groups(NamedTuple):
    """Of each response the return, and what its group comes to; (B,) float64 each."""

    returns: Float[Tensor, " B"]
    sizes: Float[Tensor, " B"]
    mean: Float[Tensor, " B"]
    std: Float[Tensor, " B"]  # of a sample


@check_shapes
def group_statistics(rollout: ScoredRollout, name: str) -> _Groups:
    """Returns of whole responses and of their groups.

    Raises:
        ValueError: a group of one, or no groups; `name` says whose.
    """
    returns = torch.where(rollout.response_mask, rollout.token_rewards, 0.0).double().sum(1)
    if rollout.group_index is None:
        raise ValueError(f"{name} compares completions of one prompt and needs the group_index of each")
    sizes = _by_group(torch.ones_like(returns), rollout.group_index)
    if (sizes < 2).any():
        raise ValueError(f"{name} compares completions of one prompt: 2 or more are needed")
    mean = _by_group(returns, rollout.group_index) / sizes
    squares = _by_group((returns - mean).square(), rollout.group_index)
    return _Groups(returns, sizes, mean, (squares / (sizes - 1)).sqrt())


def _by_group(values: Float[Tensor, " B"], group_index: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """(B,) for each response the sum over its group."""
    return torch.zeros_like(values).index_add(0, group_index, values)[group_index]


@check_shapes
def on_each_token(rollout: ScoredRollout, advantages: Float[Tensor, " B"]) -> Advantages:
    """A response's advantage on each of its tokens; and the reward to go."""
    rows = advantages[:, None].to(rollout.token_rewards.dtype) * rollout.response_mask
    return Advantages(rows, _reward_to_go(rollout))


def _over(rollout: ScoredRollout, returns: Float[Tensor, "B T"], baseline: Float[Tensor, " B"]) -> Advantages:
    """Returns over the baseline of each response; and the returns."""
    return Advantages((returns - baseline[:, None]) * rollout.response_mask, returns)
