"""From scores and values to advantages: token rewards, GAE, whitening.

Axes: B episodes, T response cells, right-padded; `response_mask` (B, T) bool, True = a real response token, end token
included. False cells count nowhere: not at the end and not in the middle, where another speaker's tokens stand between
two turns. Packed (M,) tensors become rows by `pad_rows` and come back by `unpad_rows`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.errors import require


@check_shapes
def pad_rows(flat: Shaped[Tensor, " M"], row_mask: Bool[Tensor, "B T"]) -> Shaped[Tensor, "B T"]:
    """Packed tokens to rows: (M,) -> (B, T), 0 in the padding.

    Args:
        flat: (M,) one value per response token, row after row.
        row_mask: (B, T) bool with M cells True; `make_row_mask` makes it from sequence ids.

    Returns:
        (B, T) with the dtype of `flat`.

    Raises:
        ValueError: the mask is no (B, T) bool, or has not M cells True.
    """
    if (cells := int(row_mask.sum())) != len(flat):
        raise ValueError(f"row_mask has {cells} cells True for {len(flat)} values")
    return flat.new_zeros(row_mask.shape).masked_scatter(row_mask, flat)


@check_shapes
def unpad_rows(rows: Shaped[Tensor, "B T"], row_mask: Bool[Tensor, "B T"]) -> Shaped[Tensor, " M"]:
    """Rows to packed tokens: (B, T) -> (M,), the inverse of `pad_rows`.

    Args:
        rows: (B, T) one value per cell.
        row_mask: (B, T) bool with M cells True.

    Returns:
        (M,) the values of the True cells, row after row.
    """
    return rows[row_mask]


@check_shapes
def make_row_mask(sequence_ids: Int[Tensor, " M"], num_sequences: int) -> Bool[Tensor, "B T"]:
    """The mask of right-padded rows that hold packed tokens.

    Args:
        sequence_ids: (M,) int64, the sequence of each token, ascending.
        num_sequences: B; a sequence without tokens gets a row without True cells.

    Returns:
        (B, T) bool, True in the first n cells of a row for a sequence of n tokens; T is the longest.

    Example:
        >>> make_row_mask(torch.tensor([0, 0, 0, 2]), 3).int().tolist()
        [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    """
    lengths = torch.bincount(sequence_ids, minlength=num_sequences)
    longest = int(lengths.max()) if num_sequences else 0
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


@check_shapes
def token_rewards(
    scores: Float[Tensor, " B"], kl: Float[Tensor, "B T"], kl_coef: float, response_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Reward of each token: -kl_coef * kl_t, plus the score on the last response token.

    Ziegler et al. 2019, Eq. 2, https://arxiv.org/abs/1909.08593; Ouyang et al. 2022, Eq. 2. The last response token is
    the action that ended the episode (the end token, if there is one), not the cell after it.

    Args:
        scores: (B,) verdict on each whole response.
        kl: (B, T) estimate of each token's KL to the reference, in nats.
        kl_coef: weight of the penalty.
        response_mask: (B, T) bool; each row needs at least one True.

    Returns:
        (B, T), 0 outside of the mask.

    Raises:
        ValueError: a mask that would broadcast, or a response with no token, which no action could be paid for.
    """
    empty = (~response_mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"responses {empty[:8]} have no token to carry their score; drop them from the rollout")

    rewards = torch.where(response_mask, -kl_coef * kl, 0.0)
    last = response_mask.shape[1] - 1 - response_mask.int().flip(1).argmax(dim=1)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


class ScoredRollout(NamedTuple):
    """What an advantage estimator is computed from: B episodes of one rank, in rows of T response cells.

    In training, all fields are there, but for values without a critic, and greedy scores where none are played.
    """

    token_rewards: Float[Tensor, "B T"]  # r: the KL penalty where it is charged in the reward, and the score at the end
    values: Float[Tensor, "B T"] | None  # V of the state in which each token was taken; None without a critic
    response_mask: Bool[Tensor, "B T"]
    scores: Float[Tensor, " B"] | None = None  # verdict on each whole response, without the KL penalty
    prompt_index: Int[Tensor, " B"] | None = None  # which prompt it is to
    group_index: Int[Tensor, " B"] | None = None  # below B; completions of one prompt played together have the same
    running_mean: Float[Tensor, ""] | None = None  # of the returns of all responses of the run so far, on all ranks
    greedy_scores: Float[Tensor, " B"] | None = None  # of the most likely response to the same prompt


class Advantages(NamedTuple):
    """What an advantage estimator gives; both 0 outside of the mask."""

    advantages: Float[Tensor, "B T"]  # A, not whitened
    returns: Float[Tensor, "B T"]  # what the critic is to predict


@check_shapes
def gae(rollout: ScoredRollout, gamma: float = 1.0, gae_lambda: float = 0.95) -> Advantages:
    """Generalised advantage estimation: A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} - V_t.

    Schulman et al. 2016, Eq. 16, https://arxiv.org/abs/1506.02438. Time runs over the True cells of the mask alone:
    t + 1 is the row's next response token, so a gap between two turns is no step, and V after the last one is 0. What
    stands in False cells, a reward included, changes nothing.

    Args:
        rollout: with values.
        gamma: discount, 1 in RLHF.
        gae_lambda: 1 is Monte Carlo (no bias from V), 0 is one-step TD (least variance).

    Returns:
        Advantages, and returns = advantages + values.

    Raises:
        ValueError: there are no values, or a mask that would broadcast.
    """
    require(0 <= gamma <= 1, "gamma", gamma, "in [0, 1]")
    require(0 <= gae_lambda <= 1, "gae_lambda", gae_lambda, "in [0, 1]")
    if rollout.values is None:
        raise ValueError("gae needs the values of a critic")
    values, response_mask = rollout.values, rollout.response_mask
    advantages = torch.zeros_like(values)
    next_value = values.new_zeros(values.shape[0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        here = response_mask[:, t]
        delta = rollout.token_rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(here, delta + gamma * gae_lambda * next_advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, next_advantage, 0.0)
    return Advantages(advantages, torch.where(response_mask, advantages + values, 0.0))


class Moments(NamedTuple):
    """Sums over the cells that count; sums of several ranks add up to those of the whole."""

    sum: Float[Tensor, ""]  # float64
    sum_of_squares: Float[Tensor, ""]  # float64
    size: Float[Tensor, ""]  # float64: how many cells

    @property
    def mean(self) -> Float[Tensor, ""]:
        """() mean; 0 if nothing counts."""
        return self.sum / self.size.clamp(min=1)

    @property
    def variance(self) -> Float[Tensor, ""]:
        """() population variance; 0 if nothing counts."""
        return (self.sum_of_squares / self.size.clamp(min=1) - self.mean.square()).clamp(min=0)


@check_shapes
def masked_moments(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None) -> Moments:
    """Sum, sum of squares and number of the cells that count.

    Over ranks: `Moments(*all_reduce_sum(torch.stack(masked_moments(x, mask))))`.

    Args:
        x: any shape.
        mask: bool of the same shape, True = counts; None if every cell counts, as in packed tensors.

    Returns:
        The moments, each a scalar in float64 (float32 on MPS, which has no other), where sums of squares do not cancel.
    """
    if mask is not None:
        x = x[mask]
    x = x.to(torch.float32 if x.is_mps else torch.float64)
    return Moments(x.sum(), x.square().sum(), x.new_tensor(x.numel()))


@check_shapes
def explained_variance(residuals: Moments, returns: Moments) -> Float[Tensor, ""]:
    """How much of the returns a critic foresaw: 1 - Var(R - V)/Var(R).

    Args:
        residuals: moments of R - V over all ranks.
        returns: moments of R, likewise.

    Returns:
        () 1 for a perfect critic, 0 for one that knows the mean or any constant, less for one that misleads; 0 also
        where returns differ by rounding alone, and there is nothing to foresee.
    """
    rounding = 1e-12 * (residuals.variance + residuals.mean.square() + returns.mean.square())
    foreseen = 1 - residuals.variance / returns.variance
    return torch.where(returns.variance > rounding, foreseen, 0.0)


@check_shapes
def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
    moments: Moments | None = None,
    keep_mean: bool = False,
    epsilon: float = 1e-8,
) -> Float[Tensor, "*shape"]:
    """Mean 0 and variance 1 over the cells that count: (x - mean) / √(variance + epsilon).

    Args:
        x: any shape; the advantages of a whole rollout.
        mask: bool of the same shape, True = counts; None if every cell counts, as in packed tensors.
        moments: of x over all ranks; of this x alone if None.
        keep_mean: scale only, around the mean; for rewards, whose sign means something.
        epsilon: keeps a constant x finite (it becomes 0).

    Returns:
        The same shape and dtype, 0 outside of the mask.
    """
    moments = masked_moments(x, mask) if moments is None else moments
    whitened = (x - moments.mean) * torch.rsqrt(moments.variance + epsilon)
    if keep_mean:
        whitened = whitened + moments.mean
    whitened = whitened.to(x.dtype)
    if mask is None:
        return whitened
    return torch.where(mask, whitened, 0.0)
