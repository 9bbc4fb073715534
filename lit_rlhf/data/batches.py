"""The typed batches that travel from data and rollout to `training_step`.

Axes: B examples or pairs, N packed nodes, M response tokens of all sequences (see `packing.py`).
A batch is one micro-batch. `denominator` makes its loss a share of the mean over the *global* batch: a loss is
`losses.sum() / batch.denominator`, whatever the split into micro-batches, accumulation steps and ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.errors import UserError


class SFTBatch(NamedTuple):
    """Demonstrations; B sequences."""

    packed: PackedBatch
    denominator: Tensor  # () float32: response tokens of the global batch / (accumulation steps x ranks)


class PreferenceBatch(NamedTuple):
    """B pairs as 2 B sequences: all chosen, then all rejected, each pair's prompt stored once."""

    packed: PackedBatch
    row_ids: Tensor  # (B,) int64: the rows of the data set that the pairs are
    margin: Tensor  # (B,) float32: by how much chosen should beat rejected; 0 where the data has none
    denominator: Tensor  # () float32: pairs of the global batch / (accumulation steps x ranks)


class StepwiseBatch(NamedTuple):
    """B solutions, of which K steps were judged."""

    packed: PackedBatch
    step_nodes: Tensor  # (K,) int64: the last node of each step, solution after solution
    labels: Tensor  # (K,) float32: 1 = the step is right, 0 = it is wrong, between them how probably
    solution_ids: Tensor  # (K,) int64: the solution that it belongs to, ascending
    denominator: Tensor  # () float32: steps of the global batch / (accumulation steps x ranks)


class Mismatched(NamedTuple):
    """As many responses as a micro-batch has, each behind a prompt that is not its own."""

    packed: PackedBatch  # B sequences
    row_ids: Tensor  # (B,) int64: the completions of the data set whose prompts these are


class UnpairedBatch(NamedTuple):
    """B completions, each desirable or not; those of one row share its prompt."""

    packed: PackedBatch
    row_ids: Tensor  # (B,) int64: the completions of the data set that these are
    desirable: Tensor  # (B,) bool
    # Of each micro-batch of an optimiser step, with its first; with the others none. Where nothing is learnt, its own.
    mismatched: tuple[Mismatched, ...]
    denominator: Tensor  # () float32: completions of the global batch / (accumulation steps x ranks)


class Origins(NamedTuple):
    """Where each of the data's prompts comes from, for messages."""

    places: list[Callable[[int], str]]  # of each source: its row -> file and line, which reads the file again
    rows: list[tuple[int, int]]  # of each prompt: its source and its row there

    def place(self, number: int) -> str:
        """File and line of a prompt; its number alone where the file is no longer what it was."""
        source, row = self.rows[number]
        try:
            return self.places[source](row)
        except (OSError, UserError, StopIteration):
            return f"prompt {number + 1}"


class PromptBatch(NamedTuple):
    """B prompts for playing held-out episodes; left on the CPU, the environment deals in numpy."""

    prompt_ids: list[np.ndarray]  # B of (P,) int64
    columns: dict[str, list[Any]]  # the other columns of the data, B values each, handed to the reward function
    numbers: np.ndarray | None = None  # (B,) int64: which of the data's prompts they are; None = the first B
    response_ids: list[np.ndarray] | None = None  # B of (T,) int64: completions to be scored, where the data are such
    origins: Origins | None = None  # of all the data's prompts
    step_ends: list[np.ndarray] | None = None  # B of (K,) int64: where in a response its steps have their last tokens

    def place(self, index: int) -> str:
        """Where prompt `index` of these stands in the data, for a message."""
        number = index if self.numbers is None else int(self.numbers[index])
        return f"prompt {number + 1}" if self.origins is None else self.origins.place(number)

    def take(self, rows: slice | Sequence[int]) -> "PromptBatch":
        """Some of the prompts, with their columns and numbers."""
        numbers = np.arange(len(self.prompt_ids)) if self.numbers is None else self.numbers
        kept = range(len(self.prompt_ids))[rows] if isinstance(rows, slice) else rows
        columns = {name: [values[row] for row in kept] for name, values in self.columns.items()}
        return PromptBatch([self.prompt_ids[row] for row in kept], columns, numbers[rows], origins=self.origins)


class RolloutBatch(NamedTuple):
    """A minibatch of the current rollout; B sequences of a prompt and the response the policy gave."""

    packed: PackedBatch
    old_logprobs: Tensor  # (M,) log π_old of the response tokens
    ref_logprobs: Tensor  # (M,) log π_ref
    advantages: Tensor  # (M,) as the method whitens them, over the whole rollout and all ranks, or not
    denominator: Tensor  # () float32: response tokens of the minibatch over all ranks / (accumulation steps x ranks)
    old_values: Tensor | None = None  # (M,) critic at rollout; None without a critic
    returns: Tensor | None = None  # (M,) what the critic is to predict; likewise
    weights: Tensor | None = None  # (M,) of the tokens' losses, 1 in the mean of a minibatch or so; None = all weigh 1


class NoBatch(NamedTuple):
    """In place of a micro-batch that an optimiser step could have needed, had its episodes been longer."""
