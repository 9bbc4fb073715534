"""Completions that are desirable or not, and beside each prompt the completions of others.

Axes: n rows of one prompt and one or two completions, C completions of all rows.
"""

from typing import Any

import numpy as np
import torch

from lit_rlhf.data.batches import Mismatched, UnpairedBatch
from lit_rlhf.data.duplicates import numbered
from lit_rlhf.data.examples import PackedDataset
from lit_rlhf.data.microbatches import MicroBatch
from lit_rlhf.data.ragged import ragged
from lit_rlhf.engine.packing import Example, pack, sequence_order
from lit_rlhf.errors import UserError

SIDES = ("chosen", "rejected")  # desirable, undesirable
NAMES = ("desirable", "undesirable")


class UnpairedDataset(PackedDataset):
    """Completions with labels; a row of one prompt holds one of them or, from a pair, two.

    Each completion has another in its place, of another prompt, for good: what their log-probs are under the reference
    need be computed once.

    Raises:
        UserError: half of all completions have the same prompt, so that there are too few others.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        lengths = np.stack([self._list_lengths(f"{side}_ids") for side in SIDES], axis=1)
        self.rows_of, self.sides = np.nonzero(lengths)  # (C,) each, row by row
        self.counts = (lengths > 0).sum(1)  # (n,)
        self.firsts = np.cumsum(self.counts) - self.counts  # (n,) number of each row's first completion
        self.partners = partners(self._prompt_numbers()[self.rows_of])

    @property
    def num_rows(self) -> int:
        """C: log-probs are of completions."""
        return len(self.sides)

    def count_labels(self) -> tuple[int, int]:
        """Desirable and undesirable completions that an epoch takes."""
        undesirable = int(self.sides.sum())
        return len(self.sides) - undesirable, undesirable

    def lengths(self) -> np.ndarray:
        """(n,) tokens of the prompt and its completions."""
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        return np.sum([self._list_lengths(column) for column in columns], axis=0)

    def items(self) -> np.ndarray:
        """(n,) completions: a loss for each."""
        return self.counts

    def learnt(self) -> np.ndarray:
        """(n,) tokens of the policy's own in the completions."""
        return self._count("chosen_mask") + self._count("rejected_mask")

    def part_lengths(self) -> dict[str, np.ndarray]:
        """By part, those of the rows that have it."""
        both = {name: self._list_lengths(f"{side}_ids") for name, side in zip(NAMES, SIDES, strict=True)}
        return super().part_lengths() | {name: lengths[lengths > 0] for name, lengths in both.items()}

    def __getitem__(self, batch: MicroBatch) -> UnpairedBatch:
        completions = self._completions(batch.indices)
        step = (batch.indices,) if batch.step is None else batch.step
        return UnpairedBatch(
            packed=self._packed(batch.indices, completions),
            row_ids=torch.from_numpy(completions),
            desirable=torch.from_numpy(self.sides[completions] == 0),
            mismatched=tuple(map(self._mismatched, step)),
            denominator=torch.tensor(batch.denominator, dtype=torch.float32),
        )

    def _completions(self, rows: np.ndarray) -> np.ndarray:
        """(B,) the completions of rows, in the order of packed sequences."""
        owners, numbers = sequence_order(self.counts[rows])
        return self.firsts[rows[owners]] + numbers

    def _mismatched(self, rows: np.ndarray) -> Mismatched:
        completions = self._completions(rows)
        return Mismatched(self._packed(rows, self.partners[completions]), torch.from_numpy(completions))

    def _packed(self, rows: np.ndarray, completions: np.ndarray) -> Any:
        """The prompts of rows, each with as many of these completions, (B,), as it has of its own."""
        wanted, place = np.unique(np.concatenate([rows, self.rows_of[completions]]), return_inverse=True)
        table = self.table[self.rows[wanted]]
        columns = {name: ragged(table[name]) for name in table.column_names if name.endswith(("_ids", "_mask"))}
        owners, _ = sequence_order(self.counts[rows])
        taken: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in rows]
        prompts = [columns["prompt_ids"][at] for at in place[: len(rows)]]
        for owner, at, side in zip(owners, place[len(rows) :], self.sides[completions], strict=True):
            room = None if self.max_length is None else self.max_length - len(prompts[owner])
            taken[owner].append(tuple(columns[f"{SIDES[side]}_{part}"][at][:room] for part in ("ids", "mask")))
        return pack([Example(prompt, *zip(*of, strict=True)) for prompt, of in zip(prompts, taken, strict=True)])

    def _prompt_numbers(self) -> np.ndarray:
        """(n,) the same for rows of the same prompt."""
        return numbered(self._digests(["prompt_ids"]))


def partners(prompts: np.ndarray) -> np.ndarray:
    """(C,) a completion of another prompt for each, every one once: the data set, in an order drawn once, is shifted.

    Args:
        prompts: (C,) the prompt of each completion, as a number.

    Raises:
        UserError: one prompt has more than half of the completions.
    """
    of_prompt = np.bincount(prompts)
    shift = int(of_prompt.max())
    if 2 * shift > len(prompts):
        raise UserError(
            f"{shift} of {len(prompts)} completions are of one prompt: each needs another prompt's beside it, to "
            "estimate the KL; give rows of more prompts"
        )
    draw = np.random.default_rng(0).permutation(len(of_prompt))
    order = np.argsort(draw[prompts], kind="stable")
    found = np.empty_like(order)
    found[order] = np.roll(order, -shift)
    return found
