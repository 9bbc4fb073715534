"""A scored rollout and its cut into minibatches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_rlhf.batches import RolloutBatch
from lit_rlhf.errors import UserError
from lit_rlhf.packing import Example, PackedBatch, pack


class Experience(NamedTuple):
    """A scored rollout of this rank, kept on the CPU; each list has one entry per episode."""

    prompt_ids: list[np.ndarray]  # (P,) each
    response_ids: list[np.ndarray]  # (T,) each
    tokens: dict[str, list[Tensor]]  # (T,) each: the token columns of RolloutBatch, by their names there
    plan: list[list[np.ndarray]]  # per optimiser step, the episodes of each of its micro-batches
    step_tokens: list[float]  # per optimiser step, its response tokens over all ranks

    def minibatches(self, num_ranks: int, start: int = 0) -> Iterator[RolloutBatch]:
        """The micro-batches of all passes, from the one numbered `start`."""
        micro_batches = [
            (rows, total / (len(step) * num_ranks))
            for step, total in zip(self.plan, self.step_tokens, strict=True)
            for rows in step
        ]
        for rows, denominator in micro_batches[start:]:
            yield RolloutBatch(
                packed=pack_episodes(self.prompt_ids, self.response_ids, rows),
                denominator=torch.tensor(denominator, dtype=torch.float32),
                **{name: torch.cat([column[i] for i in rows]) for name, column in self.tokens.items()},
            )

    def state_dict(self) -> dict[str, Any]:
        """Tensors, lists and numbers only, so that a checkpoint loads without unpickling code."""
        return {
            "prompt_ids": [torch.from_numpy(ids) for ids in self.prompt_ids],
            "response_ids": [torch.from_numpy(ids) for ids in self.response_ids],
            "tokens": {name: [tensor.clone() for tensor in column] for name, column in self.tokens.items()},
            "plan": [[torch.from_numpy(rows) for rows in step] for step in self.plan],
            "step_tokens": self.step_tokens,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Experience":
        """The experience that gave `state`."""
        return cls(
            prompt_ids=[ids.numpy() for ids in state["prompt_ids"]],
            response_ids=[ids.numpy() for ids in state["response_ids"]],
            tokens=state["tokens"],
            plan=[[rows.numpy() for rows in step] for step in state["plan"]],
            step_tokens=state["step_tokens"],
        )


def pack_episodes(
    prompt_ids: Sequence[np.ndarray], response_ids: Sequence[np.ndarray], rows: Sequence[int] | np.ndarray
) -> PackedBatch:
    """Some episodes as a packed batch, in the order of `rows`."""
    return pack([Example(prompt_ids[i], (response_ids[i],)) for i in rows])


def plan_minibatches(
    num_episodes: int, passes: int, num_minibatches: int, accumulation: int, rng: np.random.Generator
) -> list[list[np.ndarray]]:
    """A fresh permutation per pass, cut into optimiser steps and these into micro-batches.

    Args:
        num_episodes: episodes of this rank.
        passes: over the rollout.
        num_minibatches: optimiser steps per pass.
        accumulation: micro-batches per optimiser step.
        rng: shuffles.

    Returns:
        passes x num_minibatches steps, each a list of `accumulation` arrays of episode numbers.

    Raises:
        UserError: fewer episodes than micro-batches.
    """
    micro = num_minibatches * accumulation
    if num_episodes < micro:
        raise UserError(
            f"a rollout of {num_episodes} episodes per rank cannot be cut into num_minibatches ({num_minibatches}) x "
            f"accumulate_grad_batches ({accumulation}) micro-batches; raise rollout_size or lower these"
        )
    plan = []
    for _ in range(passes):
        parts = np.array_split(rng.permutation(num_episodes), micro)
        plan += [parts[i : i + accumulation] for i in range(0, micro, accumulation)]
    return plan
