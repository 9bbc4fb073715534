"""Learning from labelled completions that can be listed: KTO on a table of logits, and the optimum that it states."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.table_preferences import lbfgs
from lit_rlhf.losses import kto_loss, mismatched_kl
from lit_rlhf.oracle import Oracle, Problem, TablePolicy


def desirability(oracle: Oracle, threshold: float = 0.5) -> Tensor:
    """(prompts, C) probability that a completion is called desirable: σ(reward - the worst one's + threshold)."""
    return (oracle.rewards - oracle.rewards.min(1, keepdim=True).values + threshold).sigmoid()


def learn_kto(problem: Problem, oracle: Oracle, desirable: Tensor, steps: int = 300) -> TablePolicy:
    """Minimise KTO's loss over completions of the reference, labelled with these probabilities, by L-BFGS.

    z₀ is that of the completions themselves: on a table a completion behind another prompt is one that the reference
    writes there.
    """
    policy, drawn = problem.table_policy(), oracle.ref_logprobs.exp()
    optimizer = lbfgs([policy.logits], steps)

    def mean_loss() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for logprobs, reference, weights, share in zip(
            oracle.logprobs(policy.logprob_fn), oracle.ref_logprobs, drawn, desirable, strict=True
        ):
            kl = mismatched_kl((weights * (logprobs.detach() - reference)).sum(), 1.0)
            yes = torch.ones_like(weights, dtype=torch.bool)
            of_label = (kto_loss(logprobs, reference, label, oracle.beta, kl) for label in (yes, ~yes))
            wanted, unwanted = of_label
            total = total + (weights * (share * wanted + (1 - share) * unwanted)).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(mean_loss)  # type: ignore[no-untyped-call]
    return policy


def kto_optimum(oracle: Oracle, desirable: Tensor) -> Tensor:
    """(prompts, C) log-probs of KTO's minimum where each completion is desirable with probability p above ½.

    Over completions y of the reference z₀ is 0, its mean log-ratio being -KL(π_ref‖π). What is left of the loss is
    -(2p - 1) σ(β h), so that at the minimum (2p - 1) β σ'(β h) = μ e^h with μ such that π sums to one. Where β h is
    small, π is near π_ref (2p - 1) / E[2p - 1].
    """
    rows = zip(oracle.ref_logprobs, 2 * desirable - 1, strict=True)
    return torch.stack([reference + _logratios(reference, worth.log(), oracle.beta) for reference, worth in rows])


def _logratios(reference: Tensor, log_worth: Tensor, beta: float) -> Tensor:
    def of_price(log_price: Tensor) -> Tensor:  # (C,) h, by bisection: what is compared falls with h while β ≤ 1
        return bisect(
            lambda h: log_worth + F.logsigmoid(beta * h) + F.logsigmoid(-beta * h) - h - log_price,
            torch.zeros_like(reference),
        )

    log_price = bisect(lambda price: torch.logsumexp(reference + of_price(price), 0), reference.new_zeros(()))
    return of_price(log_price)


def bisect(falling: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Where a function that falls is 0, element by element, between -200 and 200."""
    low, high = torch.full_like(like, -200.0), torch.full_like(like, 200.0)
    for _ in range(100):
        middle = (low + high) / 2
        above = falling(middle) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


class Unpaired(NamedTuple):
    """KTO among `benchmarks.siblings.SIBLINGS`."""

    def optimum(self, oracle: Oracle) -> Tensor:
        """(prompts, C) log-probs of the optimum that it states."""
        return kto_optimum(oracle, desirability(oracle))

    own_optimum = optimum

    def learn(self, problem: Problem, oracle: Oracle) -> TablePolicy:
        """The policy that it finds on labels with their exact probabilities."""
        return learn_kto(problem, oracle, desirability(oracle))
