"""Token MDPs with a known optimum, for checking an algorithm of yours: see docs/oracle.md."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_rlhf.oracle.solution import Oracle, RewardFn
from lit_rlhf.oracle.tables import TablePolicy
from lit_rlhf.oracle.tree import LogprobFn, TokenTree
from token_mdp import TokenVectorEnv


class Problem(NamedTuple):
    """A token MDP, a reference on it and a reward between 0 and 1."""

    name: str
    tree: TokenTree
    prompts: list[Tensor]  # each (P,) int64
    reference: LogprobFn
    reward_fn: RewardFn

    def oracle(self, beta: float) -> Oracle:
        """The problem solved at this weight of the KL."""
        return Oracle(self.tree, self.prompts, self.reference, self.reward_fn, beta)

    def table_policy(self) -> TablePolicy:
        """A table that starts as the reference."""
        return TablePolicy(self.tree, self.prompts, self.reference)

    def env(self, num_envs: int, **options: Any) -> TokenVectorEnv:
        """The problem as a Gymnasium environment; `options` are those of `TokenVectorEnv`."""
        rewards = {
            prompt_ids.numpy().tobytes(): self.reward_fn(prompt_ids, self.tree.completions, self.tree.lengths).tolist()
            for prompt_ids in self.prompts
        }
        listed = zip(self.tree.completions.numpy(), self.tree.lengths.tolist(), strict=True)
        row_of = {tokens[:length].tobytes(): row for row, (tokens, length) in enumerate(listed)}

        def reward(prompts: list[np.ndarray], responses: list[np.ndarray]) -> list[float]:
            pairs = zip(prompts, responses, strict=True)
            return [rewards[prompt.tobytes()][row_of[response.tobytes()]] for prompt, response in pairs]

        return TokenVectorEnv(
            prompts=[prompt_ids.tolist() for prompt_ids in self.prompts],
            num_envs=num_envs,
            vocab_size=self.tree.vocab_size,
            stop_token_ids=sorted(set(range(self.tree.vocab_size)) - set(self.tree.open_ids.tolist())),
            max_new_tokens=self.tree.max_new_tokens,
            reward_fn=reward,
            **options,
        )


def random_problem(vocab_size: int = 4, max_new_tokens: int = 5, num_prompts: int = 1, seed: int = 0) -> Problem:
    """Every completion has a reward of its own, drawn from [0, 1]: nothing generalises."""
    tree = TokenTree(vocab_size, [0], max_new_tokens)
    draw = torch.Generator().manual_seed(seed)
    rewards = torch.rand(num_prompts, tree.num_completions, generator=draw, dtype=torch.float64)
    return _problem("random", tree, lambda number: rewards[number], num_prompts, seed)


def sparse_problem(vocab_size: int = 5, max_new_tokens: int = 4, num_right: int = 3, seed: int = 0) -> Problem:
    """A few completions earn 1 and all others 0."""
    tree = TokenTree(vocab_size, [0], max_new_tokens)
    right = torch.randperm(tree.num_completions, generator=torch.Generator().manual_seed(seed))[:num_right]
    rewards = torch.zeros(tree.num_completions, dtype=torch.float64)
    rewards[right] = 1.0
    return _problem("sparse", tree, lambda number: rewards, 1, seed)


def trap_problem(vocab_size: int = 3, max_new_tokens: int = 6, seed: int = 0) -> Problem:
    """The start that looks best is wrong: token 1 earns 0.5 whatever follows, token 2 earns 1 once and 0.1 else.

    Under the reference the mean reward after token 2 is far below that after token 1, so each early step leads away
    from the best completion, which is token 2 all the way.
    """
    tree = TokenTree(vocab_size, [0], max_new_tokens)
    first, all_twos = tree.completions[:, 0], (tree.completions == 2).all(1)
    rewards = torch.where(first == 1, 0.5, torch.where(first == 2, 0.1, 0.0)).double()
    rewards[all_twos] = 1.0
    return _problem("trap", tree, lambda number: rewards, 1, seed)


def small_problems() -> list[Problem]:
    """The problems of docs/optimality.md: vocabularies of 3 to 8 tokens, completions of up to 3 to 8."""
    return [
        random_problem(4, 5),
        random_problem(8, 3, num_prompts=2)._replace(name="wide"),
        random_problem(3, 8)._replace(name="long"),
        sparse_problem(),
        trap_problem(),
    ]


def _problem(name: str, tree: TokenTree, rewards: Callable[[int], Tensor], num_prompts: int, seed: int) -> Problem:
    """Prompts of two tokens and a reference with logits from N(0, 1/4)."""
    prompts = [torch.tensor([1, number]) for number in range(num_prompts)]
    reference = TablePolicy(tree, prompts)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        reference.logits.copy_(0.5 * torch.randn(reference.logits.shape, generator=draw, dtype=torch.float64))

    def reward_fn(prompt_ids: Tensor, completions: Tensor, lengths: Tensor) -> Tensor:
        return rewards(int(prompt_ids[1]))

    return Problem(name, tree, prompts, reference.logprob_fn, reward_fn)
