"""The closed form, values by backward induction, and a policy's distance to both. Axes as in the package docstring."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.oracle.tree import LogprobFn, Prompts, TokenTree, prompt_tensors

# prompt_ids (P,), completions (C, T) with 0 past their ends, lengths (C,) -> (C,) rewards
RewardFn = Callable[[Tensor, Tensor, Tensor], Tensor]


class Values(NamedTuple):
    """Tables of what is to come: the score at the end minus β times the KL of tokens yet to be taken."""

    values: list[Tensor]  # (K^t,) V(s): before a token is taken
    action_values: list[Tensor]  # (K^t, V) Q(s, a): after it is taken; its own KL is not subtracted

    @property
    def advantages(self) -> list[Tensor]:
        """(K^t, V) Q - V. With KL in the reward, GAE estimates this minus β log π/π_ref of the token."""
        return [q - v[:, None] for q, v in zip(self.action_values, self.values, strict=True)]


@check_shapes
def optimal_values(tree: TokenTree, ref_table: Sequence[Tensor], rewards: Float[Tensor, " C"], beta: float) -> Values:
    """V*(s) = β log Σ_a π_ref(a|s) exp(Q*(s, a)/β), by backward induction; V* of the root is β log Z.

    The optimal policy is π*(a|s) = π_ref(a|s) exp((Q* - V*)/β): `advantages` = β log π*/π_ref.
    Ziebart 2010; in this form Levine 2018, section 2, https://arxiv.org/abs/1805.00909

    Args:
        tree: of the completions.
        ref_table: of π_ref, by `tree.tabulate`.
        rewards: (C,) of the completions.
        beta: weight of the KL, more than 0.
    """
    tree.check_table(ref_table, "ref_table")
    return _backward_induction(tree, rewards, lambda t, q: beta * torch.logsumexp(ref_table[t] + q / beta, dim=-1))


@check_shapes
def policy_values(
    tree: TokenTree, table: Sequence[Tensor], ref_table: Sequence[Tensor], rewards: Float[Tensor, " C"], beta: float
) -> Values:
    """V^π(s) = Σ_a π(a|s) (Q^π(s, a) - β log π/π_ref): what a critic learns when KL is in the reward.

    Args:
        tree: of the completions.
        table: of π, by `tree.tabulate`.
        ref_table: of π_ref.
        rewards: (C,) of the completions.
        beta: weight of the KL; 0 for the plain value.
    """
    tree.check_table(table)
    tree.check_table(ref_table, "ref_table")
    return _backward_induction(
        tree, rewards, lambda t, q: (table[t].exp() * q).sum(-1) - beta * kl_divergence(table[t], ref_table[t])
    )


@check_shapes
def kl_divergence(
    logprobs: Float[Tensor, "*rows C"], other_logprobs: Float[Tensor, "*rows C"]
) -> Float[Tensor, "*rows"]:
    """KL(π‖π_other) = Σ_y π(y) log π(y)/π_other(y) over the last axis, where outcomes are listed: (..., C) -> (...)."""
    impossible = logprobs == -torch.inf  # 0 log 0 = 0
    logratio = torch.where(impossible, 0.0, logprobs - other_logprobs)
    return (logprobs.exp() * logratio).sum(-1)


@check_shapes
def log_partition(
    ref_logprobs: Float[Tensor, "*rows C"], rewards: Float[Tensor, "*rows C"], beta: float
) -> Float[Tensor, "*rows"]:
    """Log Z(x) = log Σ_y π_ref(y|x) exp(r(x, y)/β): (..., C) -> (...)."""
    return torch.logsumexp(ref_logprobs + rewards / beta, dim=-1)


@check_shapes
def optimal_logprobs(
    ref_logprobs: Float[Tensor, "*rows C"], rewards: Float[Tensor, "*rows C"], beta: float
) -> Float[Tensor, "*rows C"]:
    """Log π*(y|x) = log π_ref(y|x) + r(x, y)/β - log Z(x): (..., C) -> (..., C)."""
    return ref_logprobs + rewards / beta - log_partition(ref_logprobs, rewards, beta)[..., None]


@check_shapes
def divergence_optimum(
    ref_logprobs: Float[Tensor, " C"],
    rewards: Float[Tensor, " C"],
    beta: float,
    link: Callable[[Tensor], Tensor],
    steps: int = 80,
) -> Float[Tensor, " C"]:
    """The policy that maximises E_π[r] - β D_f(π‖π_ref): f'(π/π_ref) = (r - λ)/β, λ such that π sums to one.

    Wang et al. 2023, https://arxiv.org/abs/2309.16240. By bisection, for the log-ratio of each completion within that
    for λ; so any increasing link will do. `optimal_logprobs` is the case of `reverse_kl_link`.

    Args:
        ref_logprobs: (C,) log π_ref(y|x).
        rewards: (C,) r(x, y).
        beta: weight of the divergence.
        link: f' as a function of the log-ratio, such as those of `lit_rlhf.losses`.
        steps: of both bisections.

    Returns:
        (C,) log-probs.
    """
    # At the reference, λ = r - β f'(1) lies within the rewards; where f' is bounded, λ lies above them.
    at_reference = rewards - beta * link(torch.zeros_like(rewards))
    most = (1 - ref_logprobs).nan_to_num(posinf=1.0)  # of a log-ratio, and beyond: π would be e
    least = torch.full_like(rewards, -60.0)
    while least[0] > -1e12 and (link(least) > (rewards.min() - at_reference.max()) / beta).any():
        least = 2 * least

    def logratios(multiplier: Tensor) -> Tensor:
        low, high = least, most
        for _ in range(steps):
            middle = (low + high) / 2
            below = link(middle) < (rewards - multiplier) / beta
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    low, high = at_reference.min(), at_reference.max()
    for _ in range(steps):
        middle = (low + high) / 2
        too_much = torch.logsumexp(ref_logprobs + logratios(middle), dim=0) > 0
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    optimum = ref_logprobs + logratios((low + high) / 2)
    return optimum - optimum.logsumexp(0)


@check_shapes
def objective(
    logprobs: Float[Tensor, "*rows C"],
    ref_logprobs: Float[Tensor, "*rows C"],
    rewards: Float[Tensor, "*rows C"],
    beta: float,
) -> Float[Tensor, "*rows"]:
    """J(π) = E_π[r] - β KL(π‖π_ref): (..., C) -> (...)."""
    return (logprobs.exp() * rewards).sum(-1) - beta * kl_divergence(logprobs, ref_logprobs)


@check_shapes
def bayes_accuracy(chosen_rewards: Float[Tensor, " N"], rejected_rewards: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """() accuracy that no reward model can beat in the mean on preferences drawn by Bradley-Terry: mean of σ(|Δr|).

    Args:
        chosen_rewards: (N,) true rewards of one response of each pair; which one is called chosen does not matter.
        rejected_rewards: (N,) of the other.
    """
    if chosen_rewards.numel() == 0:
        raise ValueError("bayes_accuracy of no pairs: chosen_rewards is empty")
    return (chosen_rewards - rejected_rewards).abs().sigmoid().mean()


class Evaluation(NamedTuple):
    """What a policy attains; means over the prompts."""

    reward: float  # E_π[r]
    kl: float  # KL(π‖π_ref), nats per completion
    objective: float  # J(π)
    gap: float  # (J* - J)/(J* - J_ref): 0 optimal, 1 the reference; NaN for constant rewards, where J* = J_ref
    kl_to_optimum: float  # KL(π‖π*), nats per completion


class Oracle:
    """The solved problem: a reference, a reward and β on a set of prompts.

    Args:
        tree: of the completions, the same for all prompts.
        prompts: each (P,) token ids; their order numbers them.
        reference: π_ref, as `causal_lm(model)` or any function of a prompt and prefixes.
        reward_fn: scores all completions of a prompt at once.
        beta: weight of the KL, more than 0.

    Attributes:
        ref_tables: for each prompt, the table of π_ref.
        ref_logprobs: (len(prompts), C) log π_ref(y|x).
        rewards: (len(prompts), C) r(x, y).
        log_partition: (len(prompts),) log Z(x).
        optimal_logprobs: (len(prompts), C) log π*(y|x).
        optimal_objective: J(π*), mean over prompts.
        reference_objective: J(π_ref) = E_ref[r], likewise.
    """

    def __init__(
        self, tree: TokenTree, prompts: Prompts, reference: LogprobFn, reward_fn: RewardFn, beta: float
    ) -> None:
        if not beta > 0:
            raise ValueError(f"beta ({beta}) must be more than 0: without KL the optimum is the best completion alone")
        self.tree, self.prompts, self.beta = tree, prompt_tensors(prompts), beta
        if not self.prompts:
            raise ValueError("prompts is empty; give at least one, (P,) token ids")
        with torch.no_grad():
            self.ref_tables = [tree.tabulate(reference, prompt_ids) for prompt_ids in self.prompts]
            self.ref_logprobs = torch.stack([tree.completion_logprobs(table) for table in self.ref_tables])
            rewards = [torch.as_tensor(reward_fn(ids, tree.completions, tree.lengths)) for ids in self.prompts]
        for values in rewards:
            if values.shape != (tree.num_completions,) or not values.isfinite().all():
                got = tuple(values.shape) if values.isfinite().all() else values[~values.isfinite()][:3].tolist()
                raise ValueError(f"reward_fn must give ({tree.num_completions},) finite rewards, got {got}")
        self.rewards = torch.stack(rewards).cpu().double()
        self.log_partition = log_partition(self.ref_logprobs, self.rewards, beta)
        self.optimal_logprobs = optimal_logprobs(self.ref_logprobs, self.rewards, beta)
        self.optimal_objective = beta * self.log_partition.mean().item()
        self.reference_objective = (self.ref_logprobs.exp() * self.rewards).sum(-1).mean().item()

    def logprobs(self, policy: LogprobFn) -> Tensor:
        """(len(prompts), C) log π(y|x) of all completions."""
        tables = [self.tree.tabulate(policy, prompt_ids) for prompt_ids in self.prompts]
        return torch.stack([self.tree.completion_logprobs(table) for table in tables])

    def evaluate(self, policy: LogprobFn) -> Evaluation:
        """Reward, KL, objective and the distance to the optimum of a policy, all exact.

        Where the reward is the same for all completions, the reference is the optimum, and `gap` is NaN: 0/0.
        """
        with torch.no_grad():
            logprobs = self.logprobs(policy)
            reward = (logprobs.exp() * self.rewards).sum(-1).mean().item()
            kl = kl_divergence(logprobs, self.ref_logprobs).mean().item()
            kl_to_optimum = kl_divergence(logprobs, self.optimal_logprobs).mean().item()
        attained, room = reward - self.beta * kl, self.optimal_objective - self.reference_objective
        # A constant reward leaves no room but rounding, and a ratio of roundings means nothing.
        rounding = 1e-13 * (self.beta + self.rewards.abs().max().item())
        gap = (self.optimal_objective - attained) / room if room > rounding else float("nan")
        return Evaluation(reward, kl, attained, gap, kl_to_optimum)

    def optimal_values(self, prompt: int) -> Values:
        """V*, Q* and advantages of the prompt of this number, its place in `prompts`; see `optimal_values`."""
        if torch.as_tensor(prompt).ndim or not 0 <= prompt < len(self.prompts):
            raise ValueError(f"prompt ({prompt}) must be the number of a prompt, 0 to {len(self.prompts) - 1}")
        return optimal_values(self.tree, self.ref_tables[prompt], self.rewards[prompt], self.beta)


def _backward_induction(tree: TokenTree, rewards: Tensor, state_value: Callable[[int, Tensor], Tensor]) -> Values:
    """From the last level to the first; `state_value(level, action_values)` is the Bellman operator."""
    values: list[Tensor] = []
    action_values: list[Tensor] = []
    for level, closed in reversed(list(enumerate(tree.by_level(rewards.double())))):
        q = closed.new_empty(len(closed), tree.vocab_size)
        if values:
            q[:, tree.open_ids] = values[-1].view(len(closed), len(tree.open_ids))
        q[:, tree.closing_ids(level)] = closed
        action_values.append(q)
        values.append(state_value(level, q))
    return Values(values[::-1], action_values[::-1])
