"""Layouts: which nodes of a packed row form which sequence, in the shapes that attention kernels take.

Axes: N nodes, B sequences, C cells of all sequences end to end (a shared node counts in each), n rows of a bucket, T
queries and L keys of a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Measured on a CPU, 6 heads of 64, in cells of a causal square, of which the kernel leaves out most of the upper half.
BUCKET_OVERHEAD = 20_000  # what starting another bucket costs
MASKED_CELL = 1.7  # what a cell costs under a mask, where nothing is left out
SHARED_GAIN = 0.8  # sequences are attended in two parts only where that costs less than this share of them whole


class Sequences(NamedTuple):
    """The nodes of sequences, one sequence after the other."""

    nodes: np.ndarray  # (C,) int64
    lengths: np.ndarray  # (B,) int64

    def starts(self) -> np.ndarray:
        """(B,) int64: where each begins among the nodes."""
        return np.cumsum(self.lengths) - self.lengths

    def take(self, members: np.ndarray, first: np.ndarray | int = 0, last: np.ndarray | None = None) -> "Sequences":
        """Those of these numbers, each from its token `first` to before its token `last`."""
        lengths = (self.lengths[members] if last is None else last) - first
        return Sequences(self.nodes[ranges(self.starts()[members] + first, lengths)], lengths)


class EndToEnd(NamedTuple):
    """The sequences one after the other, for variable-length attention."""

    nodes: Tensor  # (C,) int64: the nodes of each sequence in turn
    bounds: Tensor  # (B+1,) int32: where each sequence begins, and the end of the last
    longest: int  # tokens of the longest sequence
    source: Tensor  # (N,) int64: where a node's output stands among the cells


class Continuations(NamedTuple):
    """Responses of similar length that attend to a prompt whose own attention is made elsewhere, once for all of them.

    Cells past an end hold node 0; what stands there as a query is not read, and as a key not seen.
    """

    queries: Tensor  # (n, T) int64: the nodes of n responses
    keys: Tensor  # (n, L) int64: the nodes of each one's prompt, then its own
    starts: Tensor  # (n,) int64: tokens of the prompt


class SharedPrompts(NamedTuple):
    """The sequences of a layout, each shared prompt attended once."""

    buckets: tuple[Tensor, ...]  # each (n, L) int64: as in `Layout`, of prompts and of sequences that share none
    continuations: tuple[Continuations, ...]
    source: Tensor  # (N,) int64: where a node's output stands among the cells of buckets and queries, laid end to end


class Layout(NamedTuple):
    """Which nodes form which sequence, ready for attention."""

    buckets: tuple[
        Tensor, ...
    ]  # each (n, L) int64: the nodes of n sequences of similar length; cells past an end hold 0
    source: Tensor  # (N,) int64: where a node's output stands among the cells of all buckets, laid end to end
    end_to_end: EndToEnd
    shared: SharedPrompts | None = None  # None = whole sequences cost less

    def padding_fraction(self) -> float:
        """Share of the buckets' cells that hold no token; linear layers never meet them."""
        return 1 - len(self.end_to_end.nodes) / sum(bucket.numel() for bucket in self.buckets)


def make_layout(sequences: Sequences, num_nodes: int, prompt_lengths: np.ndarray | None = None) -> Layout:
    """Layout of sequences; every node must occur in at least one.

    Args:
        sequences: the nodes of each.
        num_nodes: N.
        prompt_lengths: (B,) int64: of each sequence, how many first nodes are also others'; None = none shares any.
    """
    plan = plan_buckets(sequences.lengths)
    buckets, source = lay(sequences, plan, np.zeros(num_nodes, dtype=np.int64))
    ordered = sequences.take(np.concatenate(plan))
    end_to_end_source = np.zeros(num_nodes, dtype=np.int64)
    end_to_end_source[ordered.nodes] = np.arange(len(ordered.nodes))
    end_to_end = EndToEnd(
        torch.from_numpy(ordered.nodes),
        torch.from_numpy(np.concatenate([[0], np.cumsum(ordered.lengths)]).astype(np.int32)),
        int(ordered.lengths[-1]),
        torch.from_numpy(end_to_end_source),
    )
    shared = None
    if prompt_lengths is not None:
        shared = share_prompts(sequences, num_nodes, prompt_lengths, plan_cost(plan, sequences.lengths))
    return Layout(buckets, torch.from_numpy(source), end_to_end, shared)


def share_prompts(
    sequences: Sequences, num_nodes: int, prompt_lengths: np.ndarray, whole_cost: float
) -> SharedPrompts | None:
    """The same sequences in two parts, where a shared prompt is attended once; None where whole ones cost less.

    Args:
        sequences: as of `make_layout`.
        num_nodes: likewise.
        prompt_lengths: likewise.
        whole_cost: of whole sequences, as of `plan_cost`.
    """
    if SHARED_GAIN * whole_cost <= 2 * BUCKET_OVERHEAD:
        return None
    lengths, own_lengths = sequences.lengths, sequences.lengths - prompt_lengths
    _, leaders, group = np.unique(sequences.nodes[sequences.starts()], return_index=True, return_inverse=True)
    sizes, longest = np.bincount(group), np.zeros(len(leaders), dtype=np.int64)
    np.maximum.at(longest, group, lengths)
    parted = prompt_lengths[leaders] ** 2 + np.bincount(group, MASKED_CELL * lengths * own_lengths)
    split = (sizes > 1) & (parted < sizes * longest**2)
    if not split.any():
        return None
    parts, whole = np.flatnonzero(split[group]), np.flatnonzero(~split[group])
    prompts = sequences.take(leaders[split], last=prompt_lengths[leaders[split]])
    rest = sequences.take(whole)
    squares = Sequences(*(np.concatenate(pair) for pair in zip(prompts, rest, strict=True)))
    continued, own = sequences.take(parts), sequences.take(parts, prompt_lengths[parts])
    square_plan, part_plan = plan_buckets(squares.lengths), plan_buckets(continued.lengths, own.lengths)
    split_cost = plan_cost(square_plan, squares.lengths) + plan_cost(part_plan, continued.lengths, own.lengths)
    if split_cost >= SHARED_GAIN * whole_cost:
        return None
    buckets, source = lay(squares, square_plan, np.zeros(num_nodes, dtype=np.int64))
    queries, source = lay(own, part_plan, source, offset=sum(bucket.numel() for bucket in buckets))
    keys, _ = lay(continued, part_plan, np.zeros(num_nodes, dtype=np.int64))
    starts = [torch.from_numpy(prompt_lengths[parts[members]]) for members in part_plan]
    continuations = tuple(Continuations(*each) for each in zip(queries, keys, starts, strict=True))
    return SharedPrompts(buckets, continuations, torch.from_numpy(source))


def lay(
    sequences: Sequences, plan: Sequence[np.ndarray], source: np.ndarray, offset: int = 0
) -> tuple[tuple[Tensor, ...], np.ndarray]:
    """Each bucket's (n, L) cells; and the (N,) `source` with the cells, from `offset` on, where their nodes now stand.

    Cells right of an end hold node 0. No real query sees them (attention is causal) and no output is read there.
    """
    ordered = sequences.take(np.concatenate(plan))
    rows = np.array([len(members) for members in plan])
    widths = np.maximum.reduceat(ordered.lengths, np.cumsum(rows) - rows)
    row_widths = np.repeat(widths, rows)
    filled = ranges(np.cumsum(row_widths) - row_widths, ordered.lengths)
    cells, source = np.zeros(row_widths.sum(), dtype=np.int64), source.copy()
    cells[filled] = ordered.nodes
    source[ordered.nodes] = offset + filled
    buckets = torch.from_numpy(cells).split((rows * widths).tolist())
    return tuple(bucket.view(len(members), -1) for bucket, members in zip(buckets, plan, strict=True)), source


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(sum of lengths,) int64: the numbers of each range in turn."""
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def plan_cost(plan: Sequence[np.ndarray], lengths: np.ndarray, queries: np.ndarray | None = None) -> float:
    """Of attention over all buckets, in cells of a causal square; `queries` of each sequence if fewer than its keys."""
    return sum(
        len(rows) * lengths[rows].max() * (lengths if queries is None else MASKED_CELL * queries)[rows].max()
        + BUCKET_OVERHEAD
        for rows in plan
    )


def plan_buckets(
    lengths: np.ndarray, queries: np.ndarray | None = None, overhead: float = BUCKET_OVERHEAD
) -> list[np.ndarray]:
    """Partition sequences into buckets so that padded attention plus a fixed cost per bucket is least.

    Dynamic programming over the sorted lengths: a bucket of n sequences, the longest of length L, costs
    n L^2 + overhead. Optimal, since an optimal partition is contiguous in sorted order and parts none that are alike;
    of continuations, whose queries are fewer than keys, the best of those that are.

    Args:
        lengths: (B,) length of each sequence.
        queries: (B,) how many of its last tokens are queries; None = all.
        overhead: cost of one more bucket, in cells.

    Returns:
        Arrays of sequence numbers, shortest bucket first; within a bucket, by length.
    """
    widths = lengths if queries is None else queries
    order = np.lexsort((widths, lengths))
    sizes = np.stack([lengths[order], widths[order]])
    firsts = np.flatnonzero(np.concatenate([[True], (sizes[:, 1:] != sizes[:, :-1]).any(0)]))  # of each kind
    keys, widths = sizes[:, firsts].astype(np.float64)
    bounds = np.append(firsts, len(order))
    best, cut = np.zeros(len(bounds)), np.zeros(len(bounds), dtype=np.int64)
    for end in range(1, len(bounds)):
        widest = keys[end - 1] if queries is None else MASKED_CELL * np.maximum.accumulate(widths[:end][::-1])[::-1]
        costs = best[:end] + (bounds[end] - bounds[:end]) * keys[end - 1] * widest + overhead
        cut[end] = costs.argmin()
        best[end] = costs[cut[end]]
    buckets, end = [], len(bounds) - 1
    while end > 0:
        buckets.append(order[bounds[cut[end]] : bounds[end]])
        end = int(cut[end])
    return buckets[::-1]
