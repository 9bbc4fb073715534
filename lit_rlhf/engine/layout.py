"""Layouts: which nodes of a packed row form which sequence, in the shapes that attention kernels take.

Axes: N nodes, B sequences, C cells of all sequences end to end (a shared node counts in each), n rows of a bucket, T
queries and L keys of a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Costs of attention forward and backward, measured on a CPU with 6 heads of 64, in pairs of a query with a key (70 ns).
KEY_BLOCK = 512  # keys that torch's kernel takes at once: of a causal square it leaves out blocks that no query sees
BUCKET_OVERHEAD = 3_000  # of one more bucket
NODE_OVERHEAD = 2.0  # of one more bucket of whole sequences, for each node: its gradient is spread over all of them
MERGE_OVERHEAD = 100  # of a query that attends in two parts
SHARED_GAIN = 0.9  # prompts are attended once only where that costs less than this share of whole sequences


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


class Answers(NamedTuple):
    """Prompts of similar length, each with all of its responses end to end, which attend to it.

    Cells past an end hold node 0; what stands there as a query is not read, and as a key not seen.
    """

    queries: Tensor  # (n, T) int64: the nodes of all responses to a prompt
    keys: Tensor  # (n, L) int64: the nodes of the prompt
    lengths: Tensor  # (n,) int64: tokens of the prompt
    positions: Tensor  # (n, T) int64: of the queries, counted from the start of the prompt
    filled: bool  # whether no cell of `keys` is past an end


class SharedPrompts(NamedTuple):
    """The sequences of a layout in two parts: prompts and responses by themselves, and responses with their prompts."""

    squares: tuple[Tensor, ...]  # each (n, L) int64: the nodes of prompts and of responses of similar length, each once
    source: Tensor  # (N,) int64: where a node stands among the cells of all squares, laid end to end
    answers: tuple[Answers, ...]
    responses: Tensor  # (R,) int64: the nodes of all responses
    response_source: Tensor  # (R,) int64: where they stand among the queries of all answers, laid end to end
    prompts: Tensor  # (Q,) int64: the nodes of all prompts
    prompt_source: Tensor  # (Q,) int64: where they stand among the keys of all answers, laid end to end
    longest: int  # tokens of the longest prompt with response
    cost: float  # of this, over that of whole sequences


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
    overhead = BUCKET_OVERHEAD + NODE_OVERHEAD * num_nodes
    plan = plan_buckets(sequences.lengths, overhead=overhead)
    buckets, source = lay(sequences, plan, num_nodes)
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
        shared = share_prompts(
            sequences, num_nodes, prompt_lengths, plan_cost(plan, sequences.lengths, overhead=overhead)
        )
    return Layout(buckets, source, end_to_end, shared)


def share_prompts(
    sequences: Sequences, num_nodes: int, prompt_lengths: np.ndarray, whole_cost: float
) -> SharedPrompts | None:
    """The same sequences in two parts, so that each prompt is attended once; None where whole ones cost less.

    Args:
        sequences: as of `make_layout`.
        num_nodes: likewise.
        prompt_lengths: likewise.
        whole_cost: of whole sequences, as of `plan_cost`.
    """
    if SHARED_GAIN * whole_cost <= 2 * BUCKET_OVERHEAD:
        return None
    _, leaders, group = np.unique(sequences.nodes[sequences.starts()], return_index=True, return_inverse=True)
    prompts = sequences.take(leaders, last=prompt_lengths[leaders])
    by_prompt = np.argsort(group, kind="stable")
    responses = sequences.take(by_prompt, prompt_lengths[by_prompt])
    answers = Sequences(responses.nodes, np.bincount(group[by_prompt], responses.lengths).astype(np.int64))
    squares = Sequences(*(np.concatenate(pair) for pair in zip(prompts, responses, strict=True)))
    square_plan = plan_buckets(squares.lengths)
    plan = plan_buckets(prompts.lengths, answers.lengths)
    cost = plan_cost(square_plan, squares.lengths)
    cost += plan_cost(plan, prompts.lengths, answers.lengths)
    if cost >= SHARED_GAIN * whole_cost:
        return None
    cells, source = lay(squares, square_plan, num_nodes)
    queries, response_source = lay(answers, plan, num_nodes)
    keys, prompt_source = lay(prompts, plan, num_nodes)
    position = np.zeros(num_nodes, dtype=np.int64)
    position[sequences.nodes] = ranges(np.zeros_like(sequences.lengths), sequences.lengths)
    positions = torch.from_numpy(position)
    lengths = [torch.from_numpy(prompts.lengths[members]) for members in plan]
    return SharedPrompts(
        cells,
        source,
        tuple(
            Answers(*each, positions[each[0]], filled=len(each[0]) == 1)
            for each in zip(queries, keys, lengths, strict=True)
        ),
        responses=torch.from_numpy(responses.nodes),
        response_source=response_source[responses.nodes],
        prompts=torch.from_numpy(prompts.nodes),
        prompt_source=prompt_source[prompts.nodes],
        longest=int(sequences.lengths.max()),
        cost=float(cost / whole_cost),
    )


def lay(sequences: Sequences, plan: Sequence[np.ndarray], num_nodes: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Each bucket's (n, L) cells; and (N,) where nodes stand among the cells of all buckets, laid end to end.

    Cells right of an end hold node 0. No real query sees them (attention is causal) and no output is read there.
    """
    ordered = sequences.take(np.concatenate(plan))
    rows = np.array([len(members) for members in plan])
    widths = np.maximum.reduceat(ordered.lengths, np.cumsum(rows) - rows)
    row_widths = np.repeat(widths, rows)
    filled = ranges(np.cumsum(row_widths) - row_widths, ordered.lengths)
    cells, source = np.zeros(row_widths.sum(), dtype=np.int64), np.zeros(num_nodes, dtype=np.int64)
    cells[filled] = ordered.nodes
    source[ordered.nodes] = filled
    buckets = torch.from_numpy(cells).split((rows * widths).tolist())
    views = tuple(bucket.view(len(members), -1) for bucket, members in zip(buckets, plan, strict=True))
    return views, torch.from_numpy(source)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(sum of lengths,) int64: the numbers of each range in turn."""
    return np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)


def pairs(keys: np.ndarray, queries: np.ndarray | None = None) -> np.ndarray:
    """Cost of a row of a bucket; `queries` None = as the keys, causal, else those of responses to a prompt."""
    return keys * (keys + np.minimum(keys, KEY_BLOCK)) / 2 if queries is None else (keys + MERGE_OVERHEAD) * queries


def plan_cost(
    plan: Sequence[np.ndarray],
    lengths: np.ndarray,
    queries: np.ndarray | None = None,
    overhead: float = BUCKET_OVERHEAD,
) -> float:
    """Of attention over all buckets, in pairs; arguments as of `plan_buckets`."""
    return sum(
        len(rows) * float(pairs(lengths[rows].max(), None if queries is None else queries[rows].max())) + overhead
        for rows in plan
    )


def plan_buckets(
    lengths: np.ndarray, queries: np.ndarray | None = None, overhead: float = BUCKET_OVERHEAD
) -> list[np.ndarray]:
    """Partition rows into buckets so that padded attention plus a fixed cost per bucket is least.

    Dynamic programming over the sorted lengths: a bucket of n rows costs n times the `pairs` of its longest, plus the
    overhead. Of causal squares it is optimal, since an optimal partition is contiguous in sorted order and parts none
    that are alike; of rows with other numbers of queries than keys, the best of those that are.

    Args:
        lengths: (B,) keys of each row.
        queries: (B,) queries of each; None = its keys, causal.
        overhead: cost of one more bucket, in pairs.

    Returns:
        Arrays of row numbers, shortest bucket first; within a bucket, by length.
    """
    widths = lengths if queries is None else queries
    order = np.lexsort((widths, lengths))
    sizes = np.stack([lengths[order], widths[order]])
    firsts = np.flatnonzero(np.concatenate([[True], (sizes[:, 1:] != sizes[:, :-1]).any(0)]))  # of each kind
    keys, widths = sizes[:, firsts].astype(np.float64)
    bounds = np.append(firsts, len(order))
    best, cut = np.zeros(len(bounds)), np.zeros(len(bounds), dtype=np.int64)
    for end in range(1, len(bounds)):
        widest = None if queries is None else np.maximum.accumulate(widths[:end][::-1])[::-1]
        costs = best[:end] + (bounds[end] - bounds[:end]) * pairs(keys[end - 1], widest) + overhead
        cut[end] = costs.argmin()
        best[end] = costs[cut[end]]
    buckets, end = [], len(bounds) - 1
    while end > 0:
        buckets.append(order[bounds[cut[end]] : bounds[end]])
        end = int(cut[end])
    return buckets[::-1]
