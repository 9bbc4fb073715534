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

from lit_rlhf.engine.layout import Layout, make_layout


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
    nodes_of: list[np.ndarray] = [np.empty(0)] * (num_responses * len(examples))
    input_ids, position_ids = [], []
    prompt_lengths = [0] * len(nodes_of)
    parts: list[list[np.ndarray]] = [[] for _ in nodes_of]
    start = 0
    for i, example in enumerate(examples):
        if len(example.responses) != num_responses:
            raise ValueError(f"example {i} has {len(example.responses)} responses, the first has {num_responses}")
        P = len(example.prompt_ids)
        if P == 0 or any(len(response) == 0 for response in example.responses):
            raise ValueError(f"example {i} has an empty prompt or response; drop such rows before packing")
        prompt_nodes = np.arange(start, start + P)
        input_ids.append(example.prompt_ids)
        position_ids.append(np.arange(P))
        start += P
        for k, response in enumerate(example.responses):
            T = len(response)
            nodes = np.concatenate([prompt_nodes, np.arange(start, start + T)])
            input_ids.append(response)
            position_ids.append(np.arange(P, P + T))
            start += T
            predictors, targets = nodes[P - 1 : -1], np.asarray(response)
            if example.loss_masks is not None:
                mask = np.asarray(example.loss_masks[k], dtype=bool)
                predictors, targets = predictors[mask], targets[mask]
            sequence = k * len(examples) + i
            nodes_of[sequence], prompt_lengths[sequence] = nodes, P
            parts[sequence] = [predictors, targets, np.full(len(targets), sequence)]

    predictors, target_ids, sequence_ids = (np.concatenate(column) for column in zip(*parts, strict=True))
    return PackedBatch(
        input_ids=torch.as_tensor(np.concatenate(input_ids), dtype=torch.int64),
        position_ids=torch.as_tensor(np.concatenate(position_ids), dtype=torch.int64),
        layout=make_layout(nodes_of, start, prompt_lengths if num_responses > 1 else None),
        predictors=torch.as_tensor(predictors, dtype=torch.int64),
        target_ids=torch.as_tensor(target_ids, dtype=torch.int64),
        sequence_ids=torch.as_tensor(sequence_ids, dtype=torch.int64),
        last_nodes=torch.as_tensor(np.array([nodes[-1] for nodes in nodes_of]), dtype=torch.int64),
    )
