"""Layouts: which nodes of a packed row form which sequence, in the shapes that attention kernels take.

Axes: N nodes, B sequences, C cells of all sequences end to end (a shared node counts in each), n rows of a bucket, T
queries and L keys of a row.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Measured on a CPU, 6 heads of 64, in cells of a causal square, of which the kernel leaves out most of the upper half.
BUCKET_OVERHEAD = 20_000  # what starting another bucket costs
MASKED_CELL = 1.7  # what a cell costs under a mask, where nothing is left out
SHARED_GAIN = 0.8  # sequences are attended in two parts only where that costs less than this share of them whole


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


def make_layout(nodes_of: Sequence[np.ndarray], num_nodes: int, prompt_lengths: Sequence[int] | None = None) -> Layout:
    """Layout of sequences given as node lists; every node must occur in at least one.

    Args:
        nodes_of: the nodes of each sequence.
        num_nodes: N.
        prompt_lengths: of each sequence, how many first nodes are also others'; None = no sequence shares any.
    """
    lengths = [len(nodes) for nodes in nodes_of]
    plan = plan_buckets(lengths)
    buckets, sources = lay(nodes_of, plan)
    ordered = [nodes_of[sequence] for members in plan for sequence in members]
    all_nodes = np.concatenate(ordered)
    end_to_end = EndToEnd(
        torch.from_numpy(all_nodes.astype(np.int64)),
        torch.from_numpy(np.concatenate([[0], np.cumsum([len(nodes) for nodes in ordered])]).astype(np.int32)),
        len(ordered[-1]),
        source_of(num_nodes, [(all_nodes, np.arange(len(all_nodes)))]),
    )
    shared = None
    if prompt_lengths is not None:
        shared = share_prompts(nodes_of, num_nodes, prompt_lengths, plan_cost(plan, lengths))
    return Layout(buckets, source_of(num_nodes, sources), end_to_end, shared)


def share_prompts(
    nodes_of: Sequence[np.ndarray], num_nodes: int, prompt_lengths: Sequence[int], whole_cost: float
) -> SharedPrompts | None:
    """The same sequences in two parts, where a shared prompt is attended once; None where whole ones cost less.

    Args:
        nodes_of: as of `make_layout`.
        num_nodes: likewise.
        prompt_lengths: likewise.
        whole_cost: of whole sequences, as of `plan_cost`.
    """
    sharing: dict[int, list[int]] = {}
    for sequence, nodes in enumerate(nodes_of):
        sharing.setdefault(int(nodes[0]), []).append(sequence)
    squares, parts = [], []
    for group in sharing.values():
        P, lengths = prompt_lengths[group[0]], [len(nodes_of[sequence]) for sequence in group]
        whole = cost(len(group), max(lengths))
        if len(group) > 1 and P**2 + sum(cost(1, length, length - P) for length in lengths) < whole:
            squares.append(nodes_of[group[0]][:P])
            parts.extend(group)
        else:
            squares.extend(nodes_of[sequence] for sequence in group)
    if not parts:
        return None
    lengths, queries = [len(nodes_of[s]) for s in parts], [len(nodes_of[s]) - prompt_lengths[s] for s in parts]
    square_plan, part_plan = plan_buckets([len(nodes) for nodes in squares]), plan_buckets(lengths, queries)
    split = plan_cost(square_plan, [len(nodes) for nodes in squares]) + plan_cost(part_plan, lengths, queries)
    if split >= SHARED_GAIN * whole_cost:
        return None
    buckets, sources = lay(squares, square_plan)
    after = sum(bucket.numel() for bucket in buckets)
    own = [nodes_of[s][prompt_lengths[s] :] for s in parts]
    query_cells, query_sources = lay(own, part_plan, after)
    key_cells, _ = lay([nodes_of[s] for s in parts], part_plan)
    starts = [torch.tensor([prompt_lengths[parts[i]] for i in members]) for members in part_plan]
    continuations = tuple(Continuations(*each) for each in zip(query_cells, key_cells, starts, strict=True))
    return SharedPrompts(buckets, continuations, source_of(num_nodes, sources + query_sources))


def lay(
    nodes_of: Sequence[np.ndarray], plan: Sequence[Sequence[int]], offset: int = 0
) -> tuple[tuple[Tensor, ...], list[tuple[np.ndarray, np.ndarray]]]:
    """Each bucket's (n, L) cells; and of each sequence its nodes and the cells where they stand, counted from `offset`.

    Cells right of an end hold node 0. No real query sees them (attention is causal) and no output is read there.
    """
    buckets, sources = [], []
    for members in plan:
        L = max(len(nodes_of[sequence]) for sequence in members)
        cells = np.zeros((len(members), L), dtype=np.int64)
        for row, sequence in enumerate(members):
            nodes = nodes_of[sequence]
            cells[row, : len(nodes)] = nodes
            sources.append((nodes, offset + row * L + np.arange(len(nodes))))
        buckets.append(torch.from_numpy(cells))
        offset += cells.size
    return tuple(buckets), sources


def source_of(num_nodes: int, sources: Iterable[tuple[np.ndarray, np.ndarray]]) -> Tensor:
    """(N,) int64: a cell where each node stands; of a node in several, the last."""
    source = np.zeros(num_nodes, dtype=np.int64)
    for nodes, cells in sources:
        source[nodes] = cells
    return torch.from_numpy(source)


def cost(rows: int, keys: int, queries: int | None = None) -> float:
    """Of attention over a bucket, in cells of a causal square; `queries` of its rows if they are fewer than keys."""
    return rows * keys * (keys if queries is None else MASKED_CELL * queries)


def plan_cost(plan: Sequence[Sequence[int]], lengths: Sequence[int], queries: Sequence[int] | None = None) -> float:
    """Of attention over all buckets."""
    return sum(
        cost(len(rows), max(lengths[i] for i in rows), None if queries is None else max(queries[i] for i in rows))
        + BUCKET_OVERHEAD
        for rows in plan
    )


def plan_buckets(
    lengths: Sequence[int], queries: Sequence[int] | None = None, overhead: float = BUCKET_OVERHEAD
) -> list[list[int]]:
    """Partition sequences into buckets so that padded attention plus a fixed cost per bucket is least.

    Dynamic programming over the sorted lengths: a bucket of n sequences, the longest of length L, costs
    n L^2 + overhead. Optimal, since an optimal partition is contiguous in sorted order; of continuations, whose queries
    are fewer than keys, the best of those that are.

    Args:
        lengths: length of each sequence.
        queries: how many of its last tokens are queries; None = all.
        overhead: cost of one more bucket, in cells.

    Returns:
        Lists of sequence numbers, shortest bucket first; within a bucket, by length.
    """
    order = np.argsort(lengths, kind="stable")
    keys = np.asarray(lengths, dtype=np.float64)[order]
    widths = None if queries is None else MASKED_CELL * np.asarray(queries, dtype=np.float64)[order]
    n = len(order)
    best = np.zeros(n + 1)
    cut = np.zeros(n + 1, dtype=np.int64)
    for end in range(1, n + 1):
        widest = keys[end - 1] if widths is None else np.maximum.accumulate(widths[:end][::-1])[::-1]
        costs = best[:end] + np.arange(end, 0, -1) * keys[end - 1] * widest + overhead
        cut[end] = costs.argmin()
        best[end] = costs[cut[end]]
    buckets = []
    while n > 0:
        buckets.append(order[cut[n] : n].tolist())
        n = int(cut[n])
    return buckets[::-1]
