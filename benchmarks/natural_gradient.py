"""Natural gradient steps over the probabilities of all completions: for losses too ill-conditioned for L-BFGS.

Under a divergence with a bounded or steep link, the loss is a million times as curved in some completions' log-probs as
in others'. The Fisher information of the labels has the same scales, and they cancel:

    θ ← θ - (F + λ diag F)⁻¹ ∇L(θ),    F = E[∇ℓ ∇ℓᵀ],    π = softmax(θ) over the C completions of a prompt,

with λ halved by each step that lowers the loss and doubled by each that does not (Marquardt 1963).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.table_preferences import Pairs, both_ways
from lit_rlhf.oracle import Oracle


class Slopes:
    """Mean loss of a policy over pairs, and the derivatives of each pair's in its two log-probs, for either label."""

    def __init__(self, loss: Callable[..., Tensor], logprobs: Tensor, oracle: Oracle, pairs: Pairs) -> None:
        self.pairs = pairs
        first, second = (
            logprobs[pairs.prompt, which].detach().requires_grad_() for which in (pairs.first, pairs.second)
        )
        kept, flipped = both_ways(loss, first, second, oracle, pairs)
        self.mean = (self.shares[0] * kept + self.shares[1] * flipped).sum().item()
        self.of_labels = [torch.autograd.grad(losses.sum(), (first, second)) for losses in (kept, flipped)]

    @property
    def shares(self) -> tuple[Tensor, Tensor]:
        """(N,) each, how often a pair has the one label and the other."""
        wins, weight = self.pairs.first_wins, self.pairs.weight
        return weight * wins, weight * (1 - wins)

    def of_prompt(self, prompt: int, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """(C,) ∇L and (C, C) F in the logits of a prompt's completions, given their log-probs (C,)."""
        C, mine = len(logprobs), self.pairs.prompt == prompt
        ends = [self.pairs.first[mine], self.pairs.second[mine]]
        gradient, fisher = logprobs.new_zeros(C), logprobs.new_zeros(C * C)
        for share, slopes in zip(self.shares, self.of_labels, strict=True):
            weight, sides = share[mine], [slope[mine] for slope in slopes]
            for row, slope in zip(ends, sides, strict=True):
                gradient.index_add_(0, row, weight * slope)
                for column, other in zip(ends, sides, strict=True):
                    fisher.index_add_(0, row * C + column, weight * slope * other)
        policy, fisher = logprobs.exp(), fisher.view(C, C)
        fisher = fisher - policy[:, None] * fisher.sum(0)  # ∂ log π/∂θ = 1 - π from both sides
        fisher = fisher - fisher.sum(1, keepdim=True) * policy
        return gradient - policy * gradient.sum(), fisher


def learn_by_natural_gradient(
    oracle: Oracle, loss: Callable[..., Tensor], pairs: Pairs, evaluations: int = 1000, tolerance: float = 1e-9
) -> Tensor:
    """(prompts, C) log-probs that minimise the mean of a loss of the DPO family over pairs, from the reference on.

    Args:
        oracle: of the completions.
        loss: as those of `lit_rlhf.losses`.
        pairs: with their labels.
        evaluations: of the loss at most.
        tolerance: end once a step moves no log-prob by more, in nats.
    """
    logprobs, damping = oracle.ref_logprobs, 0.01
    here = Slopes(loss, logprobs, oracle, pairs)
    systems = [here.of_prompt(number, row) for number, row in enumerate(logprobs)]
    for _ in range(evaluations):
        steps = []
        for gradient, fisher in systems:
            damped = fisher + torch.diag(damping * fisher.diagonal() + 1e-18)
            steps.append(torch.linalg.solve(damped, gradient))
        moved = (logprobs - torch.stack(steps)).log_softmax(1)
        there = Slopes(loss, moved, oracle, pairs)
        if not there.mean <= here.mean + 1e-15:  # NaN included; near the end, differences are rounding
            damping *= 2
            continue
        change = (moved - logprobs).abs().max().item()
        logprobs, here, damping = moved, there, max(damping / 2, 1e-14)
        if change < tolerance:
            break
        systems = [here.of_prompt(number, row) for number, row in enumerate(logprobs)]
    return logprobs
