"""Packed batches: one row of real tokens and a layout that says which of them form a sequence.

A batch is N *nodes*, each a real token with its position. A *sequence* is a list of nodes; a node may belong to several
sequences: a chosen and a rejected response both list the nodes of their prompt, so the prompt goes through every linear
layer once. Only attention (`attention.py`) sees sequences, through the layout. No padding reaches a linear layer.

Axes: N nodes, B sequences, C cells of all sequences end to end (a shared node counts in each), M response tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Starting another bucket costs about as much as this many query-key pairs (measured on CPU, 6 heads of 64).
BUCKET_OVERHEAD = 20_000


class EndToEnd(NamedTuple):
    """The sequences one after the other, for variable-length attention."""

    nodes: Tensor  # (C,) int64: the nodes of each sequence in turn
    bounds: Tensor  # (B+1,) int32: where each sequence begins, and the end of the last
    longest: int  # tokens of the longest sequence
    source: Tensor  # (N,) int64: where a node's output stands among the cells


class Layout(NamedTuple):
    """Which nodes form which sequence, ready for attention."""

    buckets: tuple[
        Tensor, ...
    ]  # each (n, L) int64: the nodes of n sequences of similar length; cells past an end hold 0
    source: Tensor  # (N,) int64: where a node's output stands among the cells of all buckets, laid end to end
    end_to_end: EndToEnd

    def padding_fraction(self) -> float:
        """Share of the buckets' cells that hold no token; linear layers never meet them."""
        return 1 - len(self.end_to_end.nodes) / sum(bucket.numel() for bucket in self.buckets)


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


def plan_buckets(lengths: Sequence[int], overhead: float = BUCKET_OVERHEAD) -> list[list[int]]:
    """Partition sequences into buckets so that padded attention plus a fixed cost per bucket is least.

    Dynamic programming over the sorted lengths: a bucket of n sequences, the longest of length L, costs
    n L^2 + overhead. Optimal, since an optimal partition is contiguous in sorted order.

    Args:
        lengths: length of each sequence.
        overhead: cost of one more bucket, in query-key pairs.

    Returns:
        Lists of sequence numbers, shortest bucket first; within a bucket, by length.
    """
    order = np.argsort(lengths, kind="stable")
    squares = np.square(np.asarray(lengths, dtype=np.float64)[order])
    n = len(order)
    best = np.zeros(n + 1)
    cut = np.zeros(n + 1, dtype=np.int64)
    for end in range(1, n + 1):
        costs = best[:end] + np.arange(end, 0, -1) * squares[end - 1] + overhead
        cut[end] = costs.argmin()
        best[end] = costs[cut[end]]
    buckets = []
    while n > 0:
        buckets.append(order[cut[n] : n].tolist())
        n = int(cut[n])
    return buckets[::-1]


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
            nodes_of[sequence] = nodes
            parts[sequence] = [predictors, targets, np.full(len(targets), sequence)]

    predictors, target_ids, sequence_ids = (np.concatenate(column) for column in zip(*parts, strict=True))
    return PackedBatch(
        input_ids=torch.as_tensor(np.concatenate(input_ids), dtype=torch.int64),
        position_ids=torch.as_tensor(np.concatenate(position_ids), dtype=torch.int64),
        layout=make_layout(nodes_of, num_nodes=start),
        predictors=torch.as_tensor(predictors, dtype=torch.int64),
        target_ids=torch.as_tensor(target_ids, dtype=torch.int64),
        sequence_ids=torch.as_tensor(sequence_ids, dtype=torch.int64),
        last_nodes=torch.as_tensor(np.array([nodes[-1] for nodes in nodes_of]), dtype=torch.int64),
    )


def make_layout(nodes_of: Sequence[np.ndarray], num_nodes: int) -> Layout:
    """Layout of sequences given as node lists; every node must occur in at least one."""
    buckets = []
    source, source_end_to_end = np.zeros(num_nodes, dtype=np.int64), np.zeros(num_nodes, dtype=np.int64)
    plan = plan_buckets([len(nodes) for nodes in nodes_of])
    offset = 0
    for members in plan:
        L = len(nodes_of[members[-1]])
        # Cells right of an end hold node 0. No real query sees them (attention is causal) and no output is read there.
        cells = np.zeros((len(members), L), dtype=np.int64)
        for row, sequence in enumerate(members):
            nodes = nodes_of[sequence]
            cells[row, : len(nodes)] = nodes
            source[nodes] = offset + row * L + np.arange(len(nodes))
        buckets.append(torch.from_numpy(cells))
        offset += cells.size
    ordered = [nodes_of[sequence] for members in plan for sequence in members]
    all_nodes = np.concatenate(ordered)
    source_end_to_end[all_nodes] = np.arange(len(all_nodes))
    bounds = np.concatenate([[0], np.cumsum([len(nodes) for nodes in ordered])])
    end_to_end = EndToEnd(
        torch.from_numpy(all_nodes.astype(np.int64)),
        torch.from_numpy(bounds.astype(np.int32)),
        len(ordered[-1]),
        torch.from_numpy(source_end_to_end),
    )
    return Layout(tuple(buckets), torch.from_numpy(source), end_to_end)
