"""All groups of responses that a policy may write to a prompt, each with its probability. Axes as in the package."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.errors import require
from lit_rlhf.oracle.problems import Problem
from lit_rlhf.oracle.solution import policy_values
from lit_rlhf.oracle.tables import TablePolicy

MAX_ROWS = 4_000_000  # responses in all groups together: 4 million of 3 tokens take about 1 GB


class Groups(NamedTuple):
    """What a loss may be computed from: n groups of G responses to one prompt each, in B = n G rows of T cells.

    A loss of one's own is given one group at a time, G rows, in which `weights` are 1/G.
    """

    logprobs: Float[
        Tensor, "B T"
    ]  # log π of the tokens, now; carries the gradient, and 0 past an end, as all of (B, T)
    old_logprobs: Float[Tensor, "B T"]  # log π_old, of the policy that wrote them
    ref_logprobs: Float[Tensor, "B T"]  # log π_ref
    response_mask: Bool[Tensor, "B T"]
    response_ids: Int[Tensor, "B T"]
    scores: Float[Tensor, " B"]  # r(x, y)
    greedy_scores: Float[Tensor, " B"]  # r of the response that π_old would write greedily to the same prompt
    values: Float[Tensor, "B T"]  # V of π_old, the KL charged in the reward: what a perfect critic knows
    score_values: Float[Tensor, "B T"]  # likewise of the score alone
    weights: Float[Tensor, " B"]  # probability of the row's group under π_old, shared by its rows: they sum to one
    rows: Int[Tensor, " B"]  # the response among all, prompt after prompt
    group_index: Int[Tensor, " B"]

    @property
    def group_size(self) -> int:
        """G."""
        return int((self.group_index == self.group_index[0]).sum())

    def one_by_one(self) -> Iterator["Groups"]:
        """Each group alone."""
        size = self.group_size
        for start in range(0, len(self.rows), size):
            group = Groups(*(column[start : start + size] for column in self))
            yield group._replace(weights=torch.full_like(group.weights, 1 / size), group_index=group.group_index * 0)

    def with_gradient(self) -> "Groups":
        """The same, whose log-probs collect one."""
        return self._replace(logprobs=self.logprobs.detach().requires_grad_())


@check_shapes
def own_slopes(groups: Groups, loss: Callable[[Groups], Tensor]) -> Float[Tensor, "B T"]:
    """(B, T) ∂ loss / ∂ log π of each token, of a function that is given one group at a time.

    Raises:
        ValueError: it gives anything but a scalar that depends on the log-probs.
    """
    slopes = []
    for group in map(Groups.with_gradient, groups.one_by_one()):
        value = loss(group)
        if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
            kind = f"{tuple(value.shape)} without a gradient" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"a loss must give a scalar tensor that depends on logprobs, not {kind}")
        slopes.append(torch.autograd.grad(value, group.logprobs)[0])
    return torch.cat(slopes)


def every_response(problem: Problem, beta: float, tables: list[list[Tensor]], old_policy: TablePolicy) -> Groups:
    """All responses to all prompts, prompt after prompt, each a group of its own.

    Args:
        problem: whose responses they are.
        beta: weight of the KL, for `values`.
        tables: of π, for each prompt.
        old_policy: π_old.
    """
    tree, prompts = problem.tree, problem.prompts
    scores = torch.stack([problem.reward_fn(p, tree.completions, tree.lengths).double() for p in prompts])
    with torch.no_grad():
        ref_tables = [tree.tabulate(problem.reference, prompt) for prompt in prompts]
        old_tables = [tree.tabulate(old_policy.logprob_fn, prompt) for prompt in prompts]
        logprobs, old, ref = (torch.cat([*map(tree.along, of_all)]) for of_all in (tables, old_tables, ref_tables))
    values, score_values = (
        torch.cat(
            [
                tree.along(policy_values(tree, *of_one, kl_coef).values)
                for of_one in zip(old_tables, ref_tables, scores, strict=True)
            ]
        )
        for kl_coef in (beta, 0.0)
    )
    best = torch.stack([tree.most_likely(table) for table in old_tables])
    mask = torch.arange(tree.max_new_tokens) < tree.lengths[:, None]
    return Groups(
        logprobs=logprobs,
        old_logprobs=old,
        ref_logprobs=ref,
        response_mask=mask.repeat(len(prompts), 1),
        response_ids=tree.completions.repeat(len(prompts), 1),
        scores=scores.flatten(),
        greedy_scores=scores.gather(1, best[:, None]).expand_as(scores).flatten(),
        values=values,
        score_values=score_values,
        weights=old.sum(1).exp() / len(prompts),
        rows=torch.arange(scores.numel()),
        group_index=torch.arange(scores.numel()),
    )


@check_shapes
def listed_groups(
    logprobs: Float[Tensor, " C"], group_size: int, ordered: bool = False
) -> tuple[Int[Tensor, "n G"], Float[Tensor, " n"]]:
    """The groups of one prompt and their probabilities: (n, G) int64 and (n,).

    Responses of a group are drawn independently. Where their order is of no account, a group stands for all orders: of
    C responses there are (C + G - 1 over G), not C^G.

    Args:
        logprobs: (C,) log π_old of the responses.
        group_size: G.
        ordered: list each order by itself.

    Raises:
        ValueError: there are too many.
    """
    C, G = len(logprobs), group_size
    require(G >= 1, "group_size", G, "1 or more")
    count = C**G if ordered else math.comb(C + G - 1, G)
    if count * G > MAX_ROWS:
        raise ValueError(
            f"{C} responses make {count:,} groups of {G}, more than can be listed ({MAX_ROWS:,} rows); lower "
            "group_size, or take a problem with fewer responses"
        )
    every = itertools.product(range(C), repeat=G) if ordered else itertools.combinations_with_replacement(range(C), G)
    groups = torch.tensor(list(every), dtype=torch.int64)
    log_orders = torch.zeros(len(groups), dtype=torch.float64)
    if not ordered:  # G! / (n_1! n_2! ...); a run's factorial is the product of the places within it
        place = torch.ones(len(groups), dtype=torch.float64)
        for i in range(1, G):
            place = torch.where(groups[:, i] == groups[:, i - 1], place + 1, 1.0)
            log_orders += math.log(i + 1) - place.log()
    return groups, (log_orders + logprobs[groups].sum(1)).exp()
