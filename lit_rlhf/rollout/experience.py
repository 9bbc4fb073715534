"""A scored rollout, cut into minibatches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_rlhf.data.batches import NoBatch, RolloutBatch
from lit_rlhf.engine.packing import Example, PackedBatch, pack
from lit_rlhf.losses.advantages import make_row_mask, pad_rows, unpad_rows
from lit_rlhf.losses.kl import k1
from lit_rlhf.rollout.minibatches import Plan
from lit_rlhf.rollout.play import Play
from token_mdp import Episode, FinishReason


class Experience(NamedTuple):
    """A scored rollout of this rank, kept on the CPU; each list has one entry per episode."""

    prompt_ids: list[np.ndarray]  # (P,) each
    response_ids: list[np.ndarray]  # (T,) each
    tokens: dict[str, list[Tensor]]  # (T,) each: the token columns of RolloutBatch, by their names there
    plan: Plan
    step_sizes: list[float]  # per optimiser step, what its loss is a mean over: response tokens of all ranks, or pairs

    def micro_batch(self, number: int, num_ranks: int, limit: int | None = None) -> RolloutBatch | NoBatch:
        """The micro-batch of this number among those of all passes; with a limit, only its first prompts."""
        step, part = divmod(number, len(self.plan[0]))
        rows = self.plan[step][part][:limit]
        if not len(rows):
            return NoBatch()
        order, size = packed_order(rows), self.step_sizes[step]
        columns = {name: torch.cat([column[i] for i in order]) for name, column in self.tokens.items()}
        if "weights" in columns:  # so that a sum over tokens / tokens is one over responses / responses
            responses = num_ranks * sum(part.size for part in self.plan[step])
            columns["weights"] = columns["weights"] * (size / responses)
        return RolloutBatch(
            packed=pack_episodes(self.prompt_ids, self.response_ids, rows),
            denominator=torch.tensor(size / (len(self.plan[step]) * num_ranks), dtype=torch.float32),
            **columns,
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors, lists and numbers only, so that a checkpoint loads without unpickling code."""
        return {
            "prompt_ids": [torch.from_numpy(ids) for ids in self.prompt_ids],
            "response_ids": [torch.from_numpy(ids) for ids in self.response_ids],
            "tokens": {name: [tensor.clone() for tensor in column] for name, column in self.tokens.items()},
            "plan": [[torch.from_numpy(rows) for rows in step] for step in self.plan],
            "step_sizes": self.step_sizes,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Experience":
        """The experience that gave `state`."""
        return cls(
            prompt_ids=[ids.numpy() for ids in state["prompt_ids"]],
            response_ids=[ids.numpy() for ids in state["response_ids"]],
            tokens=state["tokens"],
            plan=[[by_prompt(rows.numpy()) for rows in step] for step in state["plan"]],
            step_sizes=state["step_sizes"] if "step_sizes" in state else state["step_tokens"],  # of before pairs
        )


class PlannedRollout:
    """Played episodes of this rank and the micro-batches that they are learnt from.

    Its tensors are in the order of the first pass: B episodes, M response tokens of all, T of the longest.

    Args:
        played: the episodes.
        plan: of all passes.
        num_minibatches: optimiser steps of a pass.
        group_size: so many episodes in a row are completions of one prompt.
    """

    def __init__(self, played: Play, plan: Plan, num_minibatches: int, group_size: int = 1) -> None:
        self.plan = plan
        self.played = played
        self.first_pass = [rows for step in plan[:num_minibatches] for rows in step if len(rows)]
        self.order = np.concatenate([packed_order(rows) for rows in self.first_pass])
        self.episodes = [played.episodes[i] for i in self.order]
        self.lengths = torch.tensor([len(episode.response_ids) for episode in self.episodes])  # (B,)
        owners = torch.arange(len(self.episodes)).repeat_interleave(self.lengths)
        self.mask = make_row_mask(owners, len(self.episodes))  # (B, T)
        self.group_size, self.group_index = group_size, torch.from_numpy(self.order // group_size)  # (B,)
        self.prompt_index = torch.tensor([episode.prompt_index for episode in self.episodes])  # (B,)

    def micro_batches(self) -> Iterator[PackedBatch]:
        """Those of the first pass."""
        prompt_ids, response_ids = self.tokens()
        for rows in self.first_pass:
            yield pack_episodes(prompt_ids, response_ids, rows)

    def tokens(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Prompts and responses in the order they were played in."""
        episodes = self.played.episodes
        return [episode.prompt_ids for episode in episodes], [episode.response_ids for episode in episodes]

    def rows(self, flat: Tensor) -> Tensor:
        """(M,) -> (B, T)."""
        return pad_rows(flat, self.mask)

    def flat(self, rows: Tensor) -> Tensor:
        """(B, T) -> (M,)."""
        return unpad_rows(rows, self.mask)

    def step_rewards(self) -> Tensor | None:
        """(B, T) float32 what of the rewards was paid step by step, on its tokens; None where nothing was."""
        if self.episodes[0].step_rewards is None:
            return None
        paid = [episode.step_rewards for episode in self.episodes if episode.step_rewards is not None]
        return self.rows(torch.from_numpy(np.concatenate(paid)).float())

    def step_tokens(self) -> Tensor:
        """Response tokens of each optimiser step, on this rank."""
        return self.step_sums(self.lengths)

    def step_sums(self, values: Tensor) -> Tensor:
        """(B,) values of episodes -> their sum over each optimiser step, on this rank."""
        as_played = values.double().numpy()[np.argsort(self.order)]
        return torch.tensor([float(as_played[np.concatenate(step)].sum()) for step in self.plan])

    def means(self, scores: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> dict[str, Tensor]:
        """What to log of a rollout, as means over its episodes or tokens.

        Args:
            scores: (B,) shaped rewards.
            old_logprobs: (M,) log π_old of the response tokens.
            ref_logprobs: (M,) log π_ref of them.
        """
        sampled = torch.from_numpy(np.concatenate([self.played.sampled_logprobs[i] for i in self.order]))
        means = {
            **episode_means(self.played.episodes),
            "kl": k1(old_logprobs, ref_logprobs).sum() / len(self.episodes),
            "shaped_score": scores.mean(),
            "entropy": -old_logprobs.mean(),  # E[-log π], in nats per token, by the tokens that were sampled
            "sampler_gap": (sampled - old_logprobs).abs().mean(),
        }
        if self.group_size > 1:
            in_groups = scores[torch.from_numpy(np.argsort(self.order))].view(-1, self.group_size)
            means["equal_groups"] = (in_groups == in_groups[:, :1]).all(1).float().mean()
            means["best_score"] = in_groups.amax(1).mean()
        if self.played.dropped is not None:
            means["dropped_groups"] = torch.tensor(self.played.dropped * self.group_size / len(self.episodes))
        return {f"rollout/{name}": mean for name, mean in means.items()}

    def experience(self, columns: Mapping[str, Tensor], step_sizes: list[float]) -> Experience:
        """What is learnt from.

        Args:
            columns: (M,) each: the token columns of RolloutBatch, by their names there.
            step_sizes: per optimiser step, what its loss is a mean over.
        """
        row_of = np.argsort(self.order)
        parts = {name: column.split(self.lengths.tolist()) for name, column in columns.items()}
        tokens = {name: [rows[row] for row in row_of] for name, rows in parts.items()}
        return Experience(*self.tokens(), tokens, self.plan, step_sizes)


def pack_episodes(
    prompt_ids: Sequence[np.ndarray], response_ids: Sequence[np.ndarray], rows: np.ndarray
) -> PackedBatch:
    """Some episodes as a packed batch, in their `packed_order`; those of a row share their prompt: (n, s) numbers."""
    return pack([Example(prompt_ids[row[0]], tuple(response_ids[i] for i in row)) for row in rows])


def packed_order(rows: np.ndarray) -> np.ndarray:
    """(n s,) numbers of episodes as `pack` lays them: the first of each row, then the second of each, and so on."""
    return rows.T.ravel()


def by_prompt(rows: np.ndarray) -> np.ndarray:
    """(n, s) numbers of episodes; those of a checkpoint from before groups are (n,)."""
    return rows[:, None] if rows.ndim == 1 else rows


def repetition(response_ids: np.ndarray) -> float:
    """Share of the runs of four tokens of a response, (T,), that have stood in it before."""
    if len(response_ids) < 4:
        return 0.0
    runs = np.lib.stride_tricks.sliding_window_view(response_ids, 4)
    return 1 - len(np.unique(runs, axis=0)) / len(runs)


def episode_means(episodes: Sequence[Episode]) -> dict[str, Tensor]:
    """What a person asks of episodes: reward and its components, length, how many ended by themselves."""
    means = {
        "score": np.mean([e.reward for e in episodes]),
        "response_length": np.mean([len(e.response_ids) for e in episodes]),
        "eos_fraction": np.mean([e.finish_reason is FinishReason.STOP for e in episodes]),
        "repeated_fraction": np.mean([repetition(e.response_ids) for e in episodes]),
        **{name: np.mean([e.components[name] for e in episodes]) for name in episodes[0].components},
    }
    return {name: torch.tensor(float(mean)) for name, mean in means.items()}
