"""How a rollout is cut: optimiser steps by episodes, their micro-batches by tokens."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
from torch import Tensor

from lit_rlhf.errors import UserError

# Per optimiser step, the episodes of each of its micro-batches, some of which may have none: (n, s) numbers. The s of a
# row answer one prompt, which is packed once for them.
Plan = list[list[np.ndarray]]


@dataclass(frozen=True)
class Minibatches:
    """The cut of a rank's rollout, by the settings alone: an iteration has as many micro-batches as any other.

    Args:
        num_episodes: of this rank.
        ppo_epochs: passes over the rollout.
        num_minibatches: optimiser steps of a pass.
        accumulate_grad_batches: micro-batches of an optimiser step at least.
        max_tokens: of a micro-batch at most, prompts and responses; None = no limit.
        longest: tokens that an episode can have.
        group_size: episodes in a row that answer one prompt, and stay together in an optimiser step; in a micro-batch,
            too, where as many fit into it.
        longest_response: of `longest`, the tokens that are not shared in a group.
        whole_groups: a group may not be cut at all, since its episodes are compared in the loss.

    Raises:
        UserError: fewer groups than micro-batches, or a `max_tokens` that the longest episode, or the largest group
            that may not be cut, does not fit into.
    """

    num_episodes: int
    ppo_epochs: int
    num_minibatches: int
    accumulate_grad_batches: int
    max_tokens: int | None
    longest: int
    group_size: int = 1
    longest_response: int = 0
    whole_groups: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be cut."""
        if self.num_groups < self.num_minibatches * self.accumulate_grad_batches:
            groups = "" if self.group_size == 1 else f" in {self.num_groups} groups"
            raise UserError(
                f"a rollout of {self.num_episodes} episodes per rank{groups} cannot be cut into num_minibatches "
                f"({self.num_minibatches}) x accumulate_grad_batches ({self.accumulate_grad_batches}) micro-batches; "
                "raise rollout_size or lower these"
            )
        if self.max_tokens is not None and self.longest > self.max_tokens:
            raise UserError(
                f"the longest prompt and max_new_tokens are {self.longest} tokens, more than data.max_tokens "
                f"({self.max_tokens}) allows in a micro-batch; raise it to {self.longest}, or lower "
                "data.max_prompt_length or data.max_new_tokens"
            )
        if self.whole_groups and self.sharing < self.group_size:
            raise UserError(
                f"the longest prompt and {self.group_size} responses of max_new_tokens, which the loss compares, are "
                f"{self.tokens_of(self.group_size)} tokens, more than max_tokens ({self.max_tokens}) allows in a "
                f"micro-batch; raise max_tokens to {self.tokens_of(self.group_size)}, or lower max_new_tokens"
            )

    @property
    def num_groups(self) -> int:
        """Of this rank."""
        return self.num_episodes // self.group_size

    @property
    def sharing(self) -> int:
        """Episodes that are packed with one prompt: a whole group, or the largest equal part of it that fits."""
        parts = (size for size in range(self.group_size, 1, -1) if self.group_size % size == 0)
        return next((size for size in parts if self.max_tokens is None or self.tokens_of(size) <= self.max_tokens), 1)

    def tokens_of(self, sharing: int) -> int:
        """Of so many episodes and the prompt that they share, at most."""
        return self.longest + (sharing - 1) * self.longest_response

    @property
    def episodes_of_part(self) -> int:
        """Of an optimiser step's `accumulate_grad_batches`-th part at most."""
        return self.group_size * -(-self.num_groups // (self.num_minibatches * self.accumulate_grad_batches))

    @property
    def micro_batches(self) -> int:
        """Of an optimiser step, where all episodes are as long as can be."""
        rows = self.episodes_of_part // self.sharing
        together = rows if self.max_tokens is None else self.max_tokens // self.tokens_of(self.sharing)
        return self.accumulate_grad_batches * -(-rows // together)

    @property
    def most_tokens(self) -> int:
        """Of a micro-batch."""
        most = self.episodes_of_part // self.sharing * self.tokens_of(self.sharing)
        return most if self.max_tokens is None else min(most, self.max_tokens)

    def of_all(self, group_size: int) -> "Minibatches":
        """The cut in which a rollout is scored of whose groups, so large, a part alone is learnt from."""
        once = replace(self, whole_groups=False, ppo_epochs=1, num_minibatches=1, accumulate_grad_batches=1)
        return replace(once, num_episodes=self.num_groups * group_size, group_size=group_size)

    def __len__(self) -> int:
        return self.ppo_epochs * self.num_minibatches * self.micro_batches

    def plan(
        self,
        prompt_tokens: np.ndarray,
        response_tokens: np.ndarray,
        rng: np.random.Generator,
        agree: Callable[[Tensor], Tensor],
    ) -> Plan:
        """A fresh permutation per pass, cut into optimiser steps and these into micro-batches.

        Args:
            prompt_tokens: (episodes,) of each episode.
            response_tokens: (episodes,) likewise.
            rng: shuffles.
            agree: the greatest of all ranks' numbers, since sharded weights have all ranks take each pass together.

        Returns:
            ppo_epochs x num_minibatches steps, each a list of `micro_batches` arrays of episode numbers, (n, sharing).
            The empty ones come first: the last micro-batch of a step is the one after which Lightning steps.
        """
        parts_of_pass = self.num_minibatches * self.accumulate_grad_batches
        groups = np.arange(self.num_episodes).reshape(self.num_groups, -1, self.sharing)
        passes = [np.array_split(groups[rng.permutation(len(groups))], parts_of_pass) for _ in range(self.ppo_epochs)]
        rows = [part.reshape(-1, self.sharing) for parts in passes for part in parts]
        filled = [fill(r, prompt_tokens[r[:, 0]] + response_tokens[r].sum(1), self.max_tokens) for r in rows]
        counts = agree(torch.tensor([len(parts) for parts in filled])).tolist()
        cut = [halve(parts, count) for parts, count in zip(filled, counts, strict=True)]
        starts = range(0, len(cut), self.accumulate_grad_batches)
        steps = [list(itertools.chain(*cut[i : i + self.accumulate_grad_batches])) for i in starts]
        return [[groups[:0, 0]] * (self.micro_batches - len(step)) + step for step in steps]


def fill(rows: np.ndarray, num_tokens: np.ndarray, max_tokens: int | None) -> list[np.ndarray]:
    """Cut rows, of so many tokens each, where the next one would be too much; their order stays."""
    if max_tokens is None:
        return [rows]
    ends, taken = [], 0
    for number, tokens in enumerate(num_tokens.tolist()):
        if taken + tokens > max_tokens:
            ends.append(number)
            taken = 0
        taken += tokens
    return np.split(rows, ends)


def halve(parts: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Cut the parts of most rows in two until there are so many."""
    parts = list(parts)
    while len(parts) < count:
        largest = max(range(len(parts)), key=lambda number: len(parts[number]))
        parts[largest : largest + 1] = np.array_split(parts[largest], 2)
    return parts


def require_room(rollout_size: int, num_nodes: int, max_new_tokens: int, passes: int) -> None:
    """Refuse rollouts that a machine's memory cannot hold, before hours are spent on playing them.

    Args:
        rollout_size: episodes over all ranks.
        num_nodes: machines that share them.
        max_new_tokens: the longest that a response may be.
        passes: over a rollout, each of which has an order of its own.
    """
    # An episode with its arrays, its columns of tokens, and its number in each pass.
    needed = rollout_size // num_nodes * (1000 + 40 * max_new_tokens + 16 * passes)
    memory = psutil.virtual_memory().total
    if needed > memory:
        raise UserError(
            f"rollout_size ({rollout_size}) episodes of up to max_new_tokens ({max_new_tokens}), in ppo_epochs "
            f"({passes}) orders, would take about {needed / 1e9:,.0f} GB; this machine has {memory / 1e9:,.0f} GB"
        )
