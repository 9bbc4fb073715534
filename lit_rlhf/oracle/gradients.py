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
from lit_rlhf.oracle.groups import Groups, listed_groups, own_slopes
from lit_rlhf.oracle.methods import OnPolicyMethod
from lit_rlhf.oracle.problems import Problem
from lit_rlhf.oracle.solution import objective, policy_values
from lit_rlhf.oracle.tables import TablePolicy

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
        tree, logits = problem.tree, self.policy.logits
        mask = torch.arange(tree.max_new_tokens) < tree.lengths[:, None]
        tables = [tree.tabulate(self.policy.logprob_fn, prompt) for prompt in problem.prompts]
        ref_tables = [[level.detach() for level in tree.tabulate(problem.reference, p)] for p in problem.prompts]
        old = self.policy if old_policy is None else old_policy
        old_tables = [[level.detach() for level in tree.tabulate(old.logprob_fn, p)] for p in problem.prompts]
        scores = torch.stack([problem.reward_fn(p, tree.completions, tree.lengths).double() for p in problem.prompts])

        logprobs = torch.stack([tree.along(table) for table in tables])  # (prompts, C, T)
        ref_logprobs = torch.stack([tree.along(table) for table in ref_tables])
        of_each = torch.eye(logprobs.numel(), dtype=torch.float64).view(-1, *logprobs.shape)
        rows = torch.autograd.grad(logprobs, logits, of_each, retain_graph=True, is_grads_batched=True)[0]
        self.jacobian = rows.flatten(1)  # (prompts C T, parameters)
        J = objective(logprobs.sum(-1), ref_logprobs.sum(-1), scores, beta).mean()
        self.exact = torch.autograd.grad(J, logits)[0].flatten()

        def values(kl_coef: float) -> Tensor:
            of_prompts = zip(old_tables, ref_tables, scores, strict=True)
            return torch.cat([tree.along(policy_values(tree, *one, kl_coef).values) for one in of_prompts])

        self.old_logprobs = torch.stack([tree.completion_logprobs(table) for table in old_tables])  # (prompts, C)
        best = torch.stack([tree.most_likely(table) for table in old_tables])
        prompts = len(problem.prompts)
        self.everything = Groups(
            logprobs=logprobs.detach().flatten(0, 1),
            old_logprobs=torch.cat([tree.along(table) for table in old_tables]),
            ref_logprobs=ref_logprobs.flatten(0, 1),
            response_mask=mask.repeat(prompts, 1),
            response_ids=tree.completions.repeat(prompts, 1),
            scores=scores.flatten(),
            greedy_scores=scores.gather(1, best[:, None]).expand_as(scores).flatten(),
            values=values(beta),
            score_values=values(0.0),
            weights=self.old_logprobs.exp().flatten() / prompts,
            rows=torch.arange(scores.numel()),
            group_index=torch.arange(scores.numel()),
        )

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
        probabilities, slopes = groups.weights.view(-1, size).sum(1), slopes.view(-1, size * T)
        chunk = max(1, 10_000_000 // len(self.jacobian))
        for place, slope, probability in zip(
            places.split(chunk), slopes.split(chunk), probabilities.split(chunk), strict=True
        ):
            dense = slope.new_zeros(len(slope), len(self.jacobian)).scatter_add(1, place, slope)
            steps = -dense @ self.jacobian
            mean += probability @ steps
            square += probability @ steps.square().sum(1)
        return mean, square
