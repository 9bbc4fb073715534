"""The mean of a loss's gradient against that of the objective, by enumeration. Axes as in the package docstring.

judge = GradientJudge(problem, beta=0.1)
judge.measure(OnPolicyMethod.of(lit_rlhf.GRPO), group_size=4)      # or any function of one group of responses
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.errors import require
from lit_rlhf.oracle.groups import Groups, every_response, listed_groups, own_slopes
from lit_rlhf.oracle.methods import OnPolicyMethod
from lit_rlhf.oracle.problems import Problem
from lit_rlhf.oracle.solution import objective
from lit_rlhf.oracle.tables import TablePolicy

MAX_CELLS = 5_000  # of all responses to all prompts, (C, T) each: a square matrix of 200 MB
NOTHING = 1e-10  # a mean gradient below this share of its own spread, or of the exact one, is rounding


class GradientReport(NamedTuple):
    """How far a loss's gradient can be trusted. NaN where nothing is left in the mean: it has no direction."""

    cosine: float  # between its mean and the exact one: 1 = the same direction
    norm_ratio: float  # of the mean over the exact: what a learning rate can undo
    variance: float  # of a response's share, over the mean's square: as many responses until noise is as large as it


class GradientJudge:
    """Holds losses against ∇J, J(π) = E_π[r(x, y)] - β KL(π‖π_ref) of whole responses, at a policy that is a table.

    The mean is over all prompts, alike, and all groups of responses of the policy that wrote them, π_old; so it is that
    of an estimator on policy, or of one that has moved on from its rollout. A reward that is 0 leaves the KL alone.

    Args:
        problem: small: the policy's gradient by each response is kept.
        beta: weight of the KL; 0 or more.
        policy: π, a table of the problem; None = `problem.table_policy().moved(1.0)`, well away from the reference.
        old_policy: π_old, likewise; None = π, on policy.

    Attributes:
        exact: ∇J, by the logits of the policy, flat.

    Raises:
        ValueError: the problem is too large, or beta is negative.
    """

    def __init__(
        self,
        problem: Problem,
        beta: float,
        policy: TablePolicy | None = None,
        old_policy: TablePolicy | None = None,
    ) -> None:
        require(0 <= beta < math.inf, "beta", beta, "0 or more and finite")
        self.problem, self.beta = problem, beta
        self.policy = problem.table_policy().moved(1.0) if policy is None else policy
        tree, prompts, logits = problem.tree, problem.prompts, self.policy.logits
        if (cells := len(prompts) * tree.completions.numel()) > MAX_CELLS:
            raise ValueError(
                f"problem has {cells:,} tokens in all its responses, and GradientJudge keeps a gradient by each: "
                f"{MAX_CELLS:,} at most; lower its vocab_size or max_new_tokens"
            )
        tables = [tree.tabulate(self.policy.logprob_fn, prompt) for prompt in prompts]
        self.everything = every_response(problem, beta, tables, self.policy if old_policy is None else old_policy)

        logprobs = torch.stack([tree.along(table) for table in tables])  # (prompts, C, T)
        of_each = torch.eye(logprobs.numel(), dtype=torch.float64).view(-1, *logprobs.shape)
        rows = torch.autograd.grad(logprobs, logits, of_each, retain_graph=True, is_grads_batched=True)[0]
        self.jacobian = rows.flatten(1)  # (prompts C T, parameters)
        whole, C = logprobs.sum(-1), tree.num_completions
        ref_logprobs, scores = self.everything.ref_logprobs.sum(-1).view(-1, C), self.everything.scores.view(-1, C)
        self.exact = torch.autograd.grad(objective(whole, ref_logprobs, scores, beta).mean(), logits)[0].flatten()
        self.old_logprobs = self.everything.old_logprobs.sum(-1).view(-1, C)  # (prompts, C)

    def groups(self, group_size: int = 1, ordered: bool = False) -> Groups:
        """All groups of so many responses to one prompt.

        Args:
            group_size: G.
            ordered: list each order of a group by itself, for what depends on it; else one stands for all.

        Raises:
            ValueError: there are too many to list.
        """
        C, drawn, shares = self.problem.tree.num_completions, [], []
        for number, logprobs in enumerate(self.old_logprobs):
            groups, probabilities = listed_groups(logprobs, group_size, ordered)
            drawn.append(groups + number * C)
            shares.append(probabilities / (len(self.old_logprobs) * group_size))
        rows, weights = torch.cat(drawn).flatten(), torch.cat(shares).repeat_interleave(group_size)
        columns = Groups(*(column[rows] for column in self.everything))
        return columns._replace(weights=weights, group_index=torch.arange(len(rows)) // group_size)

    def measure(self, loss: OnPolicyMethod | Callable[[Groups], Tensor], group_size: int = 1) -> GradientReport:
        """Hold a loss against ∇J.

        Args:
            loss: a method; or a function of one group of responses, in whatever order, that gives its loss, (). A loss
                with the exact gradient is the mean over responses of a sum over tokens.
            group_size: responses to one prompt that the loss compares.
        """
        groups = self.groups(group_size)
        if isinstance(loss, OnPolicyMethod):
            return self.compare(groups, loss.slopes(groups, self.beta))
        return self.compare(groups, own_slopes(groups, loss))

    @check_shapes
    def compare(
        self, groups: Groups, slopes: Float[Tensor, "B T"], exact: Float[Tensor, " D"] | None = None
    ) -> GradientReport:
        """Hold slopes against ∇J, wherever they were computed.

        Args:
            groups: by `groups`.
            slopes: (B, T) ∂ loss of the row's group / ∂ log π of its tokens.
            exact: another gradient than ∇J, of what is to be maximised, flat.
        """
        exact = self.exact if exact is None else exact
        mean, square = self._moments(groups, slopes)
        norm, spread = mean.norm(), (square - mean.square().sum()).clamp(min=0)
        if norm <= NOTHING * torch.maximum(spread.sqrt(), exact.norm()):
            return GradientReport(math.nan, norm.item() / exact.norm().item(), math.nan)
        cosine = torch.nn.functional.cosine_similarity(mean, exact, dim=0)
        return GradientReport(
            cosine.item(), (norm / exact.norm()).item(), (groups.group_size * spread / norm.square()).item()
        )

    def _moments(self, groups: Groups, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Of the step that a group asks for, minus its loss's gradient: the mean, and the mean square of its norm."""
        size, T = groups.group_size, slopes.shape[1]
        mean, square = torch.zeros_like(self.exact), torch.zeros((), dtype=torch.float64)
        places = (groups.rows[:, None] * T + torch.arange(T)).view(-1, size * T)  # (n, G T) rows of the jacobian
        probabilities, slopes = groups.weights.view(-1, size).sum(1), slopes.reshape(-1, size * T)
        chunk = max(1, 10_000_000 // len(self.jacobian))
        for place, slope, probability in zip(
            places.split(chunk), slopes.split(chunk), probabilities.split(chunk), strict=True
        ):
            dense = slope.new_zeros(len(slope), len(self.jacobian)).scatter_add(1, place, slope)
            steps = -dense @ self.jacobian
            mean += probability @ steps
            square += probability @ steps.square().sum(1)
        return mean, square
