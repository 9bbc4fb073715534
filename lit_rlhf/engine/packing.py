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

    Sequence k * len(examples) + i is response k of example i: `chunk(2)` splits preferences into chosen and rejected.
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
        examples: at least one; each with the same number of responses.

    Raises:
        ValueError: an empty prompt or response, or examples that differ in their number of responses.
    """
    num_responses = len(examples[0].responses)
    for i, example in enumerate(examples):
        if len(example.responses) != num_responses:
            raise ValueError(f"example {i} has {len(example.responses)} responses, the first has {num_responses}")
        if len(example.prompt_ids) == 0 or any(len(response) == 0 for response in example.responses):
            raise ValueError(f"example {i} has an empty prompt or response; drop such rows before packing")
    # Nodes: of each example the prompt, then its responses.
    spans = [(example.prompt_ids, *example.responses) for example in examples]
    span_lengths = np.array([[len(ids) for ids in row] for row in spans])
    span_starts = (np.cumsum(span_lengths) - span_lengths.ravel()).reshape(span_lengths.shape)
    input_ids = np.concatenate([ids for row in spans for ids in row]).astype(np.int64)
    span_positions = np.zeros_like(span_starts)
    span_positions[:, 1:] = span_lengths[:, :1]
    position_ids = np.arange(len(input_ids)) - np.repeat((span_starts - span_positions).ravel(), span_lengths.ravel())

    # Sequences: response 0 of every example, then response 1 of every example, and so on.
    P, T = np.tile(span_lengths[:, 0], num_responses), span_lengths[:, 1:].T.ravel()
    prompt_starts, response_starts = np.tile(span_starts[:, 0], num_responses), span_starts[:, 1:].T.ravel()
    halves = np.stack([prompt_starts, response_starts], axis=1), np.stack([P, T], axis=1)
    sequences = Sequences(ranges(*(half.ravel() for half in halves)), P + T)
    predictors = sequences.nodes[ranges(sequences.starts() + P - 1, T)]
    targets, sequence_ids = ranges(response_starts, T), np.repeat(np.arange(len(T)), T)
    if any(example.loss_masks is not None for example in examples):
        mask = np.concatenate([mask_of(example, k) for k in range(num_responses) for example in examples])
        predictors, targets, sequence_ids = predictors[mask], targets[mask], sequence_ids[mask]
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        layout=make_layout(sequences, len(input_ids), P if num_responses > 1 else None),
        predictors=torch.from_numpy(predictors),
        target_ids=torch.from_numpy(input_ids[targets]),
        sequence_ids=torch.from_numpy(sequence_ids),
        last_nodes=torch.from_numpy(response_starts + T - 1),
    )


def mask_of(example: Example, response: int) -> np.ndarray:
    """(T,) bool: which tokens of this response the loss counts."""
    if example.loss_masks is None:
        return np.ones(len(example.responses[response]), dtype=bool)
    return np.asarray(example.loss_masks[response], dtype=bool)
