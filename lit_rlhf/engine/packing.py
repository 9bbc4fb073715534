"""Packed batches: one row of real tokens and a layout that says which of them form a sequence.

A batch is N *nodes*, each a real token with its position. A *sequence* is a list of nodes; a node may belong to several
sequences: a chosen and a rejected response both list the nodes of their prompt, so the prompt goes through every linear
layer once. Only attention (`attention.py`) sees sequences, through the layout (`layout.py`). No padding reaches linear
layers.

Axes: N nodes, B sequences, M response tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_rlhf.engine.layout import Layout, Sequences, make_layout, ranges


class Example(NamedTuple):
    """A prompt and the responses that share it, as rows before packing."""

    prompt_ids: np.ndarray  # (P,) int64, P >= 1
    responses: tuple[np.ndarray, ...]  # each (T,) int64, T >= 1
    loss_masks: tuple[np.ndarray, ...] | None = None  # each (T,) bool: True = the loss counts this token; None = all


class PackedBatch(NamedTuple):
    """Sequences packed without padding, shared prompts stored once.

    Sequences are in the order of `sequence_order`: `chunk(2)` splits preferences into chosen and rejected.
    """

    input_ids: Tensor  # (N,) int64
    position_ids: Tensor  # (N,) int64
    layout: Layout
    predictors: Tensor  # (M,) int64: the node whose hidden state predicts a response token
    target_ids: Tensor  # (M,) int64: that response token
    sequence_ids: Tensor  # (M,) int64: the sequence it belongs to, ascending
    last_nodes: Tensor  # (B,) int64: the last node of each sequence

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.last_nodes.shape[0]

    @property
    def response_lengths(self) -> Tensor:
        """(B,) float32: response tokens of each sequence."""
        return self.sum_by_sequence(
            torch.ones(len(self.target_ids), dtype=torch.float32, device=self.target_ids.device)
        )

    def sum_by_sequence(self, token_values: Tensor) -> Tensor:
        """(M,) values of response tokens -> (B,) sums over each sequence."""
        sums = token_values.new_zeros(self.num_sequences)
        return sums.index_add(0, self.sequence_ids, token_values)


def pack(examples: Sequence[Example]) -> PackedBatch:
    """Pack examples into one row of real tokens.

    Args:
        examples: at least one, each with at least one response.

    Raises:
        ValueError: an empty prompt or response.
    """
    for i, example in enumerate(examples):
        if len(example.prompt_ids) == 0 or any(len(response) == 0 for response in example.responses):
            raise ValueError(f"example {i} has an empty prompt or response; drop such rows before packing")
    # Nodes: of each example the prompt, then its responses.
    spans = [ids for example in examples for ids in (example.prompt_ids, *example.responses)]
    counts = np.array([len(example.responses) for example in examples])
    lengths = np.array([len(ids) for ids in spans])
    starts = np.cumsum(lengths) - lengths
    prompts = np.cumsum(counts + 1) - (counts + 1)  # which spans they are
    input_ids = np.concatenate(spans).astype(np.int64)
    position_starts = np.repeat(lengths[prompts], counts + 1)  # of responses; prompts begin at 0
    position_starts[prompts] = 0
    position_ids = np.arange(len(input_ids)) - np.repeat(starts - position_starts, lengths)

    owners, numbers = sequence_order(counts)
    P, T = lengths[prompts[owners]], lengths[prompts[owners] + 1 + numbers]
    prompt_starts, response_starts = starts[prompts[owners]], starts[prompts[owners] + 1 + numbers]
    halves = np.stack([prompt_starts, response_starts], axis=1), np.stack([P, T], axis=1)
    sequences = Sequences(ranges(*(half.ravel() for half in halves)), P + T)
    predictors = sequences.nodes[ranges(sequences.starts() + P - 1, T)]
    targets, sequence_ids = ranges(response_starts, T), np.repeat(np.arange(len(T)), T)
    if any(example.loss_masks is not None for example in examples):
        mask = np.concatenate([mask_of(examples[i], k) for i, k in zip(owners, numbers, strict=True)])
        predictors, targets, sequence_ids = predictors[mask], targets[mask], sequence_ids[mask]
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        layout=make_layout(sequences, len(input_ids), P if counts.max() > 1 else None),
        predictors=torch.from_numpy(predictors),
        target_ids=torch.from_numpy(input_ids[targets]),
        sequence_ids=torch.from_numpy(sequence_ids),
        last_nodes=torch.from_numpy(response_starts + T - 1),
    )


def sequence_order(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B,) example of each sequence, and which of its responses: the first of every example, then each one's second.

    Args:
        counts: (examples,) responses of each.
    """
    owners = np.repeat(np.arange(len(counts)), counts)
    numbers = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.argsort(numbers, kind="stable")
    return owners[order], numbers[order]


def mask_of(example: Example, response: int) -> np.ndarray:
    """(T,) bool: which tokens of this response the loss counts."""
    if example.loss_masks is None:
        return np.ones(len(example.responses[response]), dtype=bool)
    return np.asarray(example.loss_masks[response], dtype=bool)
