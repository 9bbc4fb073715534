"""The losses of preferences between completions, and of labels, whose optimum is known."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.natural_gradient import learn_by_natural_gradient
from benchmarks.table_preferences import Pairs, exact_pairs, learn_preferences, table_of
from benchmarks.table_unpaired import Unpaired
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


def against_one(pairs: Pairs) -> Pairs:
    """Those with the first completion alone: any margins between it and the others go together."""
    kept = pairs.first == 0
    return Pairs(*(column[kept] for column in pairs))._replace(weight=pairs.weight[kept] / pairs.weight[kept].sum())


def margin_optimum(margin: Callable[[Tensor], Tensor], oracle: Oracle) -> Tensor:
    """(prompts, C) log-probs of the policy whose implicit rewards exceed the first completion's by margin(p)."""
    wins = (oracle.rewards - oracle.rewards[:, :1]).sigmoid()
    return optimal_logprobs(oracle.ref_logprobs, margin(wins), oracle.beta)


class Sibling(NamedTuple):
    """A loss of the DPO family whose optimum on preferences with their exact probabilities is known."""

    loss: Callable[..., Tensor]
    optimum: Callable[[Oracle], Tensor] | None = None  # (prompts, C) log-probs; None = that of E[r] - β KL
    flipped: float = 0.0  # share of labels turned round
    opponents: Literal["some", "all", "one"] = "some"  # that each completion meets; the optimum may depend on it
    natural: bool = False  # learnt by natural gradient: a bounded or steep link is too ill-conditioned for L-BFGS

    def learn(self, problem: Problem, oracle: Oracle) -> TablePolicy:
        """The policy that the loss finds on preferences with their exact probabilities."""
        pairs = exact_pairs(oracle, 16 if self.opponents == "some" else None).flipped(self.flipped)
        if self.opponents == "one":
            pairs = against_one(pairs)
        if self.natural:
            return table_of(problem, oracle, learn_by_natural_gradient(oracle, self.loss, pairs))
        return learn_preferences(problem, oracle, self.loss, pairs)

    def own_optimum(self, oracle: Oracle) -> Tensor:
        """(prompts, C) log-probs of the optimum that the loss states."""
        return oracle.optimal_logprobs if self.optimum is None else self.optimum(oracle)


SIBLINGS: dict[str, Sibling | Unpaired] = {
    "dpo": Sibling(losses.dpo_loss),
    "robust_dpo": Sibling(partial(losses.robust_dpo_loss, label_smoothing=0.1), flipped=0.1),
    "conservative_dpo": Sibling(  # σ(z) = (1 - ε) p + ε (1 - p), which no policy meets for all pairs at once
        partial(losses.conservative_dpo_loss, label_smoothing=0.1),
        partial(margin_optimum, lambda wins: torch.logit(0.9 * wins + 0.1 * (1 - wins))),
        opponents="one",
    ),
    "exo_pair": Sibling(  # likewise z = (2p - 1) logit(1 - ε)
        partial(losses.exo_pair_loss, label_smoothing=0.05),
        partial(margin_optimum, lambda wins: (2 * wins - 1) * math.log(19)),
        opponents="one",
    ),
    "ipo": Sibling(
        losses.ipo_loss,
        lambda oracle: optimal_logprobs(oracle.ref_logprobs, win_rates(oracle), oracle.beta),
        opponents="all",
    ),
    "length_normalized_dpo": Sibling(
        losses.length_normalized_dpo_loss,
        lambda oracle: length_normalized_optimum(oracle, oracle.rewards / oracle.beta),
    ),
    "length_normalized_ipo": Sibling(
        losses.length_normalized_ipo_loss,
        lambda oracle: length_normalized_optimum(oracle, win_rates(oracle) / oracle.beta),
        opponents="all",
    ),
    "forward_kl_dpo": Sibling(losses.forward_kl_dpo_loss, partial(link_optimum, losses.forward_kl_link), natural=True),
    "jensen_shannon_dpo": Sibling(
        losses.jensen_shannon_dpo_loss, partial(link_optimum, losses.jensen_shannon_link), natural=True
    ),
    "alpha_dpo": Sibling(
        partial(losses.alpha_dpo_loss, alpha=0.5), partial(link_optimum, losses.alpha_link(0.5)), natural=True
    ),
    "kto": Unpaired(),
}
