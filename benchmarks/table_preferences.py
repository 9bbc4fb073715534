"""Learning from preferences between completions that can be listed: pairs, DPO on a table of logits, free rewards."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from lit_rlhf.losses import bradley_terry_loss
from lit_rlhf.oracle import Oracle, Problem, TablePolicy, kl_divergence, optimal_values


class Pairs(NamedTuple):
    """Preferences between two completions of one prompt, by their numbers in the oracle."""

    prompt: Tensor  # (N,) int64
    first: Tensor  # (N,) int64
    second: Tensor  # (N,) int64
    first_wins: Tensor  # (N,) in [0, 1]: a label, or its probability
    weight: Tensor  # (N,) sums to 1

    def flipped(self, share: float) -> "Pairs":
        """The labels that are seen when this share of them is turned round at random, in the mean."""
        return self._replace(first_wins=(1 - share) * self.first_wins + share * (1 - self.first_wins))


def exact_pairs(oracle: Oracle, per_completion: int | None = 16, seed: int = 0) -> Pairs:
    """The limit of infinite data: each completion against some others, with the probability that it wins.

    Args:
        oracle: of the completions.
        per_completion: opponents drawn for each; None = all of them.
        seed: of the draws.
    """
    prompts, C = oracle.rewards.shape
    draw = torch.Generator().manual_seed(seed)
    if per_completion is None:
        first, second = torch.triu_indices(C, C, offset=1)
    else:
        first = torch.arange(C).repeat(per_completion)
        second = torch.randint(C, (len(first),), generator=draw)
        second[:C] = (torch.arange(C) + 1) % C  # a ring, so that no completion stands apart
    prompt = torch.arange(prompts).repeat_interleave(len(first))
    first, second = first.repeat(prompts), second.repeat(prompts)
    wins = preference_probability(oracle, prompt, first, second)
    return Pairs(prompt, first, second, wins, torch.full_like(wins, 1 / len(wins)))


def sampled_pairs(oracle: Oracle, count: int, seed: int = 0) -> Pairs:
    """Preferences as data sets have them: two samples of the reference and a label by Bradley-Terry."""
    draw = torch.Generator().manual_seed(seed)
    prompts, C = oracle.rewards.shape
    prompt = torch.arange(count) % prompts
    first, second = torch.empty(2, count, dtype=torch.int64)
    for number, cumulative in enumerate(oracle.ref_logprobs.exp().cumsum(-1)):
        for drawn in (first, second):
            mine = drawn[number::prompts]
            draws = torch.rand(len(mine), generator=draw, dtype=torch.float64)
            mine.copy_(torch.searchsorted(cumulative, draws).clamp(max=C - 1))
    wins = preference_probability(oracle, prompt, first, second)
    labels = torch.bernoulli(wins, generator=draw)
    return Pairs(prompt, first, second, labels, torch.full_like(labels, 1 / count))


def gathered(pairs: Pairs) -> Pairs:
    """Equal pairs put together, with the share of wins: the same mean loss, computed once for each."""
    triples, row = torch.stack([pairs.prompt, pairs.first, pairs.second]).unique(dim=1, return_inverse=True)
    weight = pairs.weight.new_zeros(triples.shape[1]).index_add(0, row, pairs.weight)
    wins = pairs.weight.new_zeros(triples.shape[1]).index_add(0, row, pairs.weight * pairs.first_wins)
    return Pairs(*triples, wins / weight, weight)


def preference_probability(oracle: Oracle, prompt: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(N,) Bradley-Terry: σ(r(first) - r(second))."""
    return (oracle.rewards[prompt, first] - oracle.rewards[prompt, second]).sigmoid()


def learn_preferences(
    problem: Problem, oracle: Oracle, loss: Callable[..., Tensor], pairs: Pairs, steps: int = 150
) -> TablePolicy:
    """Minimise the mean of a loss of the DPO family over pairs, by L-BFGS: no sampling error but the labels'."""
    policy = problem.table_policy()
    optimizer = lbfgs([policy.logits], steps)

    def mean_loss() -> Tensor:
        optimizer.zero_grad()
        logprobs = oracle.logprobs(policy.logprob_fn)
        losses_of_pairs = labelled_loss(loss, logprobs, oracle, pairs)
        total = (pairs.weight * losses_of_pairs).sum()
        total.backward()
        return total

    optimizer.step(mean_loss)
    return policy


def labelled_loss(loss: Callable[..., Tensor], logprobs: Tensor, oracle: Oracle, pairs: Pairs) -> Tensor:
    """(N,) expected loss of each pair over its label; `logprobs` (prompts, C) of all completions."""
    of_pair = (logprobs[pairs.prompt, which] for which in (pairs.first, pairs.second))
    kept, flipped = both_ways(loss, *of_pair, oracle, pairs)
    return pairs.first_wins * kept + (1 - pairs.first_wins) * flipped


def both_ways(
    loss: Callable[..., Tensor], first: Tensor, second: Tensor, oracle: Oracle, pairs: Pairs
) -> tuple[Tensor, Tensor]:
    """(N,) loss of each pair if its first completion is chosen, and if the second is, given their log-probs (N,)."""
    lengths = oracle.tree.lengths.double()
    ref_first, ref_second = (oracle.ref_logprobs[pairs.prompt, which] for which in (pairs.first, pairs.second))
    wanted = inspect.signature(loss).parameters

    def lengths_of(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        extra = {"chosen_lengths": lengths[chosen], "rejected_lengths": lengths[rejected]}
        return {name: value for name, value in extra.items() if name in wanted}

    kept = loss(first, second, ref_first, ref_second, oracle.beta, **lengths_of(pairs.first, pairs.second))
    flipped = loss(second, first, ref_second, ref_first, oracle.beta, **lengths_of(pairs.second, pairs.first))
    return kept, flipped


def learn_reward_model(oracle: Oracle, pairs: Pairs, steps: int = 300) -> Tensor:
    """(prompts, C) scores that minimise the Bradley-Terry loss, one free score per completion."""
    scores = torch.zeros_like(oracle.rewards, requires_grad=True)
    optimizer = lbfgs([scores], steps)

    def mean_loss() -> Tensor:
        optimizer.zero_grad()
        first, second = scores[pairs.prompt, pairs.first], scores[pairs.prompt, pairs.second]
        wins = pairs.first_wins
        both = wins * bradley_terry_loss(first, second) + (1 - wins) * bradley_terry_loss(second, first)
        total = (pairs.weight * both).sum()
        total.backward()
        return total

    optimizer.step(mean_loss)
    return scores.detach()


def calibration_error(oracle: Oracle, scores: Tensor, count: int = 50_000, seed: int = 1) -> float:
    """ECE of the score differences as probabilities, on preferences held out."""
    pairs = sampled_pairs(oracle, count, seed)
    predicted = (scores[pairs.prompt, pairs.first] - scores[pairs.prompt, pairs.second]).sigmoid()
    return float(binary_calibration_error(predicted.float(), pairs.first_wins.int(), n_bins=15))


def lbfgs(parameters: list[Tensor], steps: int) -> torch.optim.LBFGS:
    """Full-batch L-BFGS that takes all its steps in one call."""
    return torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        max_eval=2 * steps,
        history_size=20,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )


def implicit_reward_correlation(oracle: Oracle, policy: TablePolicy) -> float:
    """Correlation of β log π/π_ref with r within prompts: the implicit reward is r up to a constant per prompt."""
    with torch.no_grad():
        implicit = oracle.beta * (oracle.logprobs(policy.logprob_fn) - oracle.ref_logprobs)
    centred = [x - x.mean(1, keepdim=True) for x in (implicit, oracle.rewards)]
    return torch.nn.functional.cosine_similarity(*(x.flatten() for x in centred), dim=0).item()


def kl_to(oracle: Oracle, policy: TablePolicy, optimum: Tensor) -> float:
    """KL(π‖π°), mean over prompts."""
    with torch.no_grad():
        return kl_divergence(oracle.logprobs(policy.logprob_fn), optimum).mean().item()


def table_of(problem: Problem, oracle: Oracle, logprobs: Tensor) -> TablePolicy:
    """The table whose completions have these log-probs, (prompts, C): π is the optimum of log π/π_ref at β = 1."""
    policy = problem.table_policy()
    with torch.no_grad():
        for number, ref_table in enumerate(oracle.ref_tables):
            logratios = logprobs[number] - oracle.ref_logprobs[number]
            advantages = torch.cat(optimal_values(oracle.tree, ref_table, logratios, beta=1.0).advantages)
            start = number * policy.states_per_prompt
            policy.logits[start : start + len(advantages)] = torch.cat(ref_table) + advantages
    return policy


def expected_kl(oracle: Oracle, count: int) -> float:
    """What statistics allow DPO on `count` sampled pairs: the mean KL(π‖π*) of the maximum-likelihood estimate.

    With Fisher information I of one pair about the rewards and δ ~ N(0, I⁺/N), KL(π‖π*) ≈ Var_π*(δ)/(2β²), whose mean
    is tr((diag π* - π* π*ᵀ) I⁺)/(2 N β²).
    """
    total = 0.0
    for reference, rewards, optimum in zip(oracle.ref_logprobs, oracle.rewards, oracle.optimal_logprobs, strict=True):
        drawn, best = reference.exp(), optimum.exp()
        slope = (rewards[:, None] - rewards).sigmoid() * (rewards - rewards[:, None]).sigmoid()
        weights = drawn[:, None] * drawn * slope
        information = 2 * (torch.diag(weights.sum(1)) - weights)
        variance = torch.diag(best) - best[:, None] * best
        total += torch.trace(variance @ torch.linalg.pinv(information, hermitian=True)).item()
    prompts = len(oracle.rewards)
    return total / prompts / (2 * (count / prompts) * oracle.beta**2)
