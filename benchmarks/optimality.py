"""Every algorithm against the closed form, on token MDPs small enough to list all completions.

    python benchmarks/optimality.py [--output docs/data/optimality.jsonl] [--problems trap] [--betas 0.1]

One JSON line per (algorithm, MDP, β), then a table. The losses, estimators and the environment are the project's own;
the policies are tables of logits, which can be the optimum exactly: what is left is the algorithm's own error.
`gap` is (J* - J)/(J* - J_ref), 0 at the optimum of E[r] - β KL and 1 at the reference; `kl_to_optimum` is KL(π‖π°) in
nats, π° being that optimum, or for losses that have another one (`optimum`: "own") theirs.

The MDP "words" is for `lit_rlhf.PPO` and `lit_rlhf.DPO` themselves, on a tiny Llama (benchmarks/words.py); with
PEER_PYTHON and PEER_PPO_PYTHON set (docs/performance.md), TRL's trainers learn it from as many episodes and pairs.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Container, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from lit_rlhf import losses
from lit_rlhf.advantages import gae, token_rewards, whiten
from lit_rlhf.kl import k1
from lit_rlhf.losses import bradley_terry_loss, dpo_loss, ppo_policy_loss, value_loss
from lit_rlhf.oracle import (
    Oracle,
    Problem,
    TablePolicy,
    divergence_optimum,
    kl_divergence,
    optimal_logprobs,
    small_problems,
)
from token_mdp import TokenVectorEnv

BETAS = (0.05, 0.1, 0.5, 1.0)
WORD_BETAS = (0.1, 0.5)
ON_WORDS = ("ppo_module", "trl_ppo", "dpo_module", "trl_dpo")


class Rollout(NamedTuple):
    """B episodes as rows of T cells."""

    prompt_numbers: Tensor  # (B,) int64
    responses: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool
    scores: Tensor  # (B,)


def play(policy: TablePolicy, env: TokenVectorEnv, rng: np.random.Generator, num_episodes: int) -> Rollout:
    """Sample episodes from a table in the environment."""
    cumulative = policy.logits.detach().softmax(-1).cumsum(-1).numpy()
    tree, P = policy.tree, env.task.prompts.max_length
    observation: Any
    observation, info = env.reset(options={"max_episodes": num_episodes})
    while info["active"].any():
        responses = torch.from_numpy(observation["input_ids"][:, P:])
        taken = torch.from_numpy(observation["length"][:, 0] - observation["prompt_length"][:, 0])
        states = policy.states(torch.from_numpy(info["prompt_index"]), responses)
        state = states.gather(1, taken.clamp(max=tree.max_new_tokens - 1)[:, None])[:, 0].numpy()
        draws = rng.random(env.num_envs)
        actions = (draws[:, None] > cumulative[state, :-1]).sum(1)
        observation, _, _, _, info = env.step(actions)
    episodes = env.pop_episodes()
    lengths = torch.tensor([len(e.response_ids) for e in episodes])
    mask = torch.arange(tree.max_new_tokens) < lengths[:, None]
    responses = torch.zeros(mask.shape, dtype=torch.int64)
    responses[mask] = torch.from_numpy(np.concatenate([e.response_ids for e in episodes]))
    numbers = torch.tensor([e.prompt_index for e in episodes])
    return Rollout(numbers, responses, mask, torch.tensor([e.reward for e in episodes], dtype=torch.float64))


def learn_ppo(
    problem: Problem,
    beta: float,
    iterations: int = 400,
    rollout_size: int = 1024,
    critic_learning_rate: float = 0.1,
    gae_lambda: float = 0.95,
    ppo_epochs: int = 2,
    num_minibatches: int = 4,
    clip_range: float = 0.2,
    critic_warmup: int = 10,
    start_kl_coef: float = 0.5,
    seed: int = 0,
) -> TablePolicy:
    """PPO as `lit_rlhf.PPO` does it, on tables: KL in the reward, GAE, whitened advantages, clipped ratios."""
    rng = np.random.default_rng(seed)
    shuffle = torch.Generator().manual_seed(seed)
    policy = problem.table_policy()
    ref_logprobs = policy(torch.arange(len(policy.logits))).detach()
    critic = torch.zeros(len(policy.logits), dtype=torch.float64, requires_grad=True)
    env = problem.env(rollout_size, reward_mode="deferred", copy=False, autoreset_mode="NextStep")
    env.reset(seed=seed)
    learning_rate = min(0.02 / beta, 0.1)  # logits have to move by as much as r/β
    groups = [{"params": [policy.logits], "lr": learning_rate}, {"params": [critic], "lr": critic_learning_rate}]
    optimizer = torch.optim.Adam(groups, eps=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for iteration in range(iterations):
        rollout = play(policy, env, rng, rollout_size)
        states = policy.states(rollout.prompt_numbers, rollout.responses)
        mask, actions = rollout.mask, rollout.responses[..., None]
        with torch.no_grad():
            old_logprobs = policy(states).gather(-1, actions)[..., 0]
            kl = k1(old_logprobs, ref_logprobs[states].gather(-1, actions)[..., 0])
            values = critic[states]
            # Small coefficients are approached from above: at once, PPO commits before it has seen all completions.
            kl_coef = beta * max(start_kl_coef / beta, 1.0) ** max(1 - 2 * iteration / iterations, 0.0)
            rewards = token_rewards(rollout.scores, kl, kl_coef, mask)
            advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=gae_lambda)
            advantages = whiten(advantages, mask)
        tokens = [x[mask] for x in (states, rollout.responses, old_logprobs, advantages, values, returns)]
        for _ in range(ppo_epochs):
            for rows in torch.randperm(len(tokens[0]), generator=shuffle).chunk(num_minibatches):
                state, action, old, advantage, old_value, target = (x[rows] for x in tokens)
                logprobs = policy(state).gather(-1, action[:, None])[:, 0]
                loss = value_loss(critic[state], old_value, target, None).mean()
                if iteration >= critic_warmup:
                    loss = loss + ppo_policy_loss(logprobs, old, advantage, clip_range).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        schedule.step()
    return policy


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
    problem: Problem, oracle: Oracle, loss: Callable[..., Tensor], pairs: Pairs, beta: float, steps: int = 150
) -> TablePolicy:
    """Minimise the mean of a loss of the DPO family over pairs, by L-BFGS: no sampling error but the labels'."""
    policy = problem.table_policy()
    optimizer = lbfgs([policy.logits], steps)
    lengths = oracle.tree.lengths.double()

    def mean_loss() -> Tensor:
        optimizer.zero_grad()
        logprobs = oracle.logprobs(policy.logprob_fn)
        losses_of_pairs = labelled_loss(loss, logprobs, oracle.ref_logprobs, pairs, beta, lengths)
        total = (pairs.weight * losses_of_pairs).sum()
        total.backward()
        return total

    optimizer.step(mean_loss)
    return policy


def labelled_loss(
    loss: Callable[..., Tensor], logprobs: Tensor, ref_logprobs: Tensor, pairs: Pairs, beta: float, lengths: Tensor
) -> Tensor:
    """(N,) expected loss of each pair over its label; `logprobs` (prompts, C) of all completions."""

    def one_way(chosen: Tensor, rejected: Tensor) -> Tensor:
        where = [(pairs.prompt, chosen), (pairs.prompt, rejected)]
        of_pair = [x[index] for x in (logprobs, ref_logprobs) for index in where]
        extra = {"chosen_lengths": lengths[chosen], "rejected_lengths": lengths[rejected]}
        wanted = {name: extra[name] for name in extra if name in names_of(loss)}
        return loss(*of_pair, beta, **wanted)

    kept, flipped = one_way(pairs.first, pairs.second), one_way(pairs.second, pairs.first)
    return pairs.first_wins * kept + (1 - pairs.first_wins) * flipped


def names_of(loss: Callable[..., Tensor]) -> tuple[str, ...]:
    """The arguments of a loss or of a partial one."""
    function: Any = getattr(loss, "func", loss)
    return tuple(function.__code__.co_varnames[: function.__code__.co_argcount])


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


def link_optimum(link: Callable[[Tensor], Tensor], oracle: Oracle, beta: float) -> Tensor:
    """(prompts, C) log-probs of the optimum under another divergence."""
    rows = zip(oracle.ref_logprobs, oracle.rewards, strict=True)
    return torch.stack([divergence_optimum(reference, rewards, beta, link) for reference, rewards in rows])


class Sibling(NamedTuple):
    """A loss of the DPO family whose optimum on preferences between all completions is known."""

    loss: Callable[..., Tensor]
    optimum: Callable[[Oracle, float], Tensor] | None = None  # (prompts, C) log-probs; None = that of E[r] - β KL
    flipped: float = 0.0  # share of labels turned round
    all_pairs: bool = False  # the optimum depends on who meets whom, or how well-conditioned the problem is
    steps: int = 150  # of L-BFGS; bounded or steep links make the problem ill-conditioned


SIBLINGS = {
    "dpo": Sibling(dpo_loss),
    "robust_dpo": Sibling(partial(losses.robust_dpo_loss, label_smoothing=0.1), flipped=0.1),
    "ipo": Sibling(
        losses.ipo_loss,
        lambda oracle, beta: optimal_logprobs(oracle.ref_logprobs, win_rates(oracle), beta),
        all_pairs=True,
    ),
    "length_normalized_dpo": Sibling(
        losses.length_normalized_dpo_loss,
        lambda oracle, beta: length_normalized_optimum(oracle, oracle.rewards / beta),
    ),
    "length_normalized_ipo": Sibling(
        losses.length_normalized_ipo_loss,
        lambda oracle, beta: length_normalized_optimum(oracle, win_rates(oracle) / beta),
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


def measure(problem: Problem, beta: float, algorithms: Container[str]) -> Iterator[dict[str, Any]]:
    """A line for each of the algorithms."""
    oracle = problem.oracle(beta)

    def line(algorithm: str, start: float, policy: TablePolicy, **more: Any) -> dict[str, Any]:
        evaluation = oracle.evaluate(policy.logprob_fn)
        figures = {"gap": evaluation.gap, "kl_to_optimum": evaluation.kl_to_optimum}
        seconds = time.process_time() - start
        return {"algorithm": algorithm, "mdp": problem.name, "beta": beta} | figures | {"seconds": seconds} | more

    if "ppo" in algorithms:
        start = time.process_time()
        yield line("ppo", start, learn_ppo(problem, beta))

    for name, sibling in SIBLINGS.items():
        if name not in algorithms:
            continue
        start = time.process_time()
        pairs = exact_pairs(oracle, None if sibling.all_pairs else 16).flipped(sibling.flipped)
        policy = learn_preferences(problem, oracle, sibling.loss, pairs, beta, sibling.steps)
        if sibling.optimum is None:
            yield line(name, start, policy, correlation=implicit_reward_correlation(oracle, policy))
        else:
            own = kl_to(oracle, policy, sibling.optimum(oracle, beta))
            yield line(name, start, policy, kl_to_optimum=own, optimum="own")

    if "dpo_sampled" in algorithms:
        start, count = time.process_time(), 1_000_000
        policy = learn_preferences(problem, oracle, dpo_loss, gathered(sampled_pairs(oracle, count)), beta)
        yield line("dpo_sampled", start, policy, pairs=count, expected_kl=expected_kl(oracle, count))

    if "reward_model" in algorithms:
        start = time.process_time()
        scores = learn_reward_model(oracle, exact_pairs(oracle))
        error = scores - oracle.rewards
        numbers = problem.table_policy().numbers
        learnt = problem._replace(reward_fn=lambda prompt_ids, *_: scores[numbers[tuple(prompt_ids.tolist())]])
        yield line(
            "reward_model",
            start,
            optimal_policy(learnt, beta),
            reward_error=(error - error.mean(1, keepdim=True)).abs().max().item(),
            calibration_error=calibration_error(oracle, scores),
        )


def optimal_policy(problem: Problem, beta: float) -> TablePolicy:
    """The closed form as a table."""
    oracle, policy = problem.oracle(beta), problem.table_policy()
    with torch.no_grad():
        for number, ref_table in enumerate(oracle.ref_tables):
            start = number * policy.states_per_prompt
            advantages = torch.cat(oracle.optimal_values(number).advantages)
            policy.logits[start : start + len(advantages)] = torch.cat(ref_table) + advantages / beta
    return policy


def print_table(rows: list[dict[str, Any]]) -> None:
    """Gap and KL by algorithm and β, the worst over the MDPs; of several learning rates, the one of least KL."""
    table = Table(title="Worst over the MDPs: gap | KL to the optimum [nats]", title_justify="left")
    table.add_column("algorithm")
    betas = sorted({row["beta"] for row in rows})
    for beta in betas:
        table.add_column(f"β = {beta:g}", justify="right")
    for algorithm in dict.fromkeys(row["algorithm"] for row in rows):
        cells = []
        for beta in betas:
            ours = [row for row in rows if row["algorithm"] == algorithm and row["beta"] == beta]
            if not ours:
                cells.append("")
                continue
            if algorithm in ON_WORDS:
                ours = [min(ours, key=lambda row: row["kl_to_optimum"])]
            gap, kl = (max(row[key] for row in ours) for key in ("gap", "kl_to_optimum"))
            cells.append(f"{'own' if 'optimum' in ours[0] else f'{gap:.3%}'} | {kl:.5f}")
        table.add_row(algorithm, *cells)
    Console(width=120).print(table)


def main(
    output: str | None = None,
    problems: tuple[str, ...] = ("random", "wide", "long", "sparse", "trap", "words"),
    betas: tuple[float, ...] = BETAS,
    algorithms: tuple[str, ...] = ("ppo", *SIBLINGS, "dpo_sampled", "reward_model", *ON_WORDS),
    peer_python: str | None = os.environ.get("PEER_PYTHON"),
    peer_ppo_python: str | None = os.environ.get("PEER_PPO_PYTHON"),
) -> None:
    """Measure and print.

    Args:
        output: file for the JSON lines as well, such as docs/data/optimality.jsonl.
        problems: names among `small_problems`, and words.
        betas: weights of the KL; on words, those of them that are in WORD_BETAS.
        algorithms: names as in the lines.
        peer_python: a Python that has TRL, for trl_dpo; without one it is left out.
        peer_ppo_python: one that has TRL 1.12, for trl_ppo.
    """
    from benchmarks.words import measure_words  # from here: a script finds it only now

    torch.set_num_threads(1)
    pythons = {"trl_ppo": peer_ppo_python, "trl_dpo": peer_python}
    tables = (measure(p, beta, algorithms) for p in small_problems() if p.name in problems for beta in betas)
    words = measure_words([beta for beta in betas if beta in WORD_BETAS], algorithms, pythons)
    rows = []
    for row in chain(chain.from_iterable(tables), words if "words" in problems else ()):
        rows.append(row)
        print(json.dumps(row), flush=True)
    print_table(rows)
    if output is not None:
        Path(output).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    auto_cli(main, as_positional=False)
