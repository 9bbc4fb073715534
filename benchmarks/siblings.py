"""The losses of the DPO family whose optimum on preferences between all completions is known in closed form."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.table_preferences import exact_pairs, learn_preferences
from lit_rlhf import losses
from lit_rlhf.oracle import Oracle, Problem, TablePolicy, divergence_optimum, optimal_logprobs


def win_rates(oracle: Oracle) -> Tensor:
    """(prompts, C) probability that a completion beats one drawn uniformly from all."""
    return (oracle.rewards[:, :, None] - oracle.rewards[:, None, :]).sigmoid().mean(-1)


def length_normalized_optimum(oracle: Oracle, targets: Tensor) -> Tensor:
    """Log π with (log π/π_ref)/|y| = target + c, c such that π sums to one: (prompts, C)."""
    lengths = oracle.tree.lengths.double()
    low, high = -targets.max(1).values - 60, -targets.min(1).values + 60
    for _ in range(100):
        middle = (low + high) / 2
        mass = torch.logsumexp(oracle.ref_logprobs + lengths * (targets + middle[:, None]), dim=1)
        low, high = torch.where(mass < 0, middle, low), torch.where(mass < 0, high, middle)
    return oracle.ref_logprobs + lengths * (targets + low[:, None])


def link_optimum(link: Callable[[Tensor], Tensor], oracle: Oracle) -> Tensor:
    """(prompts, C) log-probs of the optimum under another divergence."""
    rows = zip(oracle.ref_logprobs, oracle.rewards, strict=True)
    return torch.stack([divergence_optimum(reference, rewards, oracle.beta, link) for reference, rewards in rows])


class Sibling(NamedTuple):
    """A loss of the DPO family whose optimum on preferences between all completions is known."""

    loss: Callable[..., Tensor]
    optimum: Callable[[Oracle], Tensor] | None = None  # (prompts, C) log-probs; None = that of E[r] - β KL
    flipped: float = 0.0  # share of labels turned round
    all_pairs: bool = False  # the optimum depends on who meets whom, or how well-conditioned the problem is
    steps: int = 150  # of L-BFGS; bounded or steep links make the problem ill-conditioned

    def learn(self, problem: Problem, oracle: Oracle) -> TablePolicy:
        """The policy that the loss finds on preferences with their exact probabilities."""
        pairs = exact_pairs(oracle, None if self.all_pairs else 16).flipped(self.flipped)
        return learn_preferences(problem, oracle, self.loss, pairs, self.steps)

    def own_optimum(self, oracle: Oracle) -> Tensor:
        """(prompts, C) log-probs of the optimum that the loss states."""
        return oracle.optimal_logprobs if self.optimum is None else self.optimum(oracle)


SIBLINGS = {
    "dpo": Sibling(losses.dpo_loss),
    "robust_dpo": Sibling(partial(losses.robust_dpo_loss, label_smoothing=0.1), flipped=0.1),
    "ipo": Sibling(
        losses.ipo_loss,
        lambda oracle: optimal_logprobs(oracle.ref_logprobs, win_rates(oracle), oracle.beta),
        all_pairs=True,
    ),
    "length_normalized_dpo": Sibling(
        losses.length_normalized_dpo_loss,
        lambda oracle: length_normalized_optimum(oracle, oracle.rewards / oracle.beta),
    ),
    "length_normalized_ipo": Sibling(
        losses.length_normalized_ipo_loss,
        lambda oracle: length_normalized_optimum(oracle, win_rates(oracle) / oracle.beta),
        all_pairs=True,
    ),
    "forward_kl_dpo": Sibling(losses.forward_kl_dpo_loss, partial(link_optimum, losses.forward_kl_link), steps=600),
    "jensen_shannon_dpo": Sibling(
        losses.jensen_shannon_dpo_loss,
        partial(link_optimum, losses.jensen_shannon_link),
        all_pairs=True,
        steps=600,
    ),
    "alpha_dpo": Sibling(
        partial(losses.alpha_dpo_loss, alpha=0.5), partial(link_optimum, losses.alpha_link(0.5)), steps=600
    ),
}
