"""A scored rollout and its cut into minibatches."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_rlhf.data.batches import RolloutBatch
from lit_rlhf.engine.packing import Example, PackedBatch, pack
from lit_rlhf.errors import UserError
from lit_rlhf.losses.kl import k1
from lit_rlhf.rollout.play import Play
from token_mdp import Episode, FinishReason


class Experience(NamedTuple):
    """A scored rollout of this rank, kept on the CPU; each list has one entry per episode."""

    prompt_ids: list[np.ndarray]  # (P,) each
    response_ids: list[np.ndarray]  # (T,) each
    tokens: dict[str, list[Tensor]]  # (T,) each: the token columns of RolloutBatch, by their names there
    plan: list[list[np.ndarray]]  # per optimiser step, the episodes of each of its micro-batches
    step_tokens: list[float]  # per optimiser step, its response tokens over all ranks

    def micro_batch(self, number: int, num_ranks: int, limit: int | None = None) -> RolloutBatch:
        """The micro-batch of this number among those of all passes; with a limit, only its first episodes."""
        step, part = divmod(number, len(self.plan[0]))
        rows = self.plan[step][part][:limit]
        return RolloutBatch(
            packed=pack_episodes(self.prompt_ids, self.response_ids, rows),
            denominator=torch.tensor(self.step_tokens[step] / (len(self.plan[step]) * num_ranks), dtype=torch.float32),
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


def split_by_episode(
    columns: Mapping[str, Tensor], order: np.ndarray, response_ids: Sequence[np.ndarray]
) -> dict[str, list[Tensor]]:
    """(M,) columns over the tokens of episodes in `order` -> for each, (T,) per episode, by episode number."""
    lengths = [len(response_ids[i]) for i in order]
    row_of = np.argsort(order)
    rows = {name: column.split(lengths) for name, column in columns.items()}
    return {name: [parts[row] for row in row_of] for name, parts in rows.items()}


def rollout_means(
    played: Play, order: np.ndarray, scores: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor
) -> dict[str, Tensor]:
    """What to log of a rollout, as means over its episodes or tokens.

    Args:
        played: the episodes of this rank.
        order: (B,) the order of the episodes in the tensors.
        scores: (B,) shaped rewards.
        old_logprobs: (M,) log π_old of the response tokens.
        ref_logprobs: (M,) log π_ref of them.
    """
    sampled = torch.from_numpy(np.concatenate([played.sampled_logprobs[i] for i in order]))
    means = {
        "shaped_score": scores.mean(),
        "kl": k1(old_logprobs, ref_logprobs).sum() / len(order),
        "sampler_gap": (sampled - old_logprobs).abs().mean(),
        **episode_means(played.episodes),
    }
    return {f"rollout/{name}": mean for name, mean in means.items()}


def episode_means(episodes: Sequence[Episode]) -> dict[str, Tensor]:
    """What a person asks of episodes: reward and its components, length, how many ended by themselves."""
    means = {
        "score": np.mean([e.reward for e in episodes]),
        "response_length": np.mean([len(e.response_ids) for e in episodes]),
        "eos_fraction": np.mean([e.finish_reason is FinishReason.STOP for e in episodes]),
        **{name: np.mean([e.components[name] for e in episodes]) for name in episodes[0].components},
    }
    return {name: torch.tensor(float(mean)) for name, mean in means.items()}


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
