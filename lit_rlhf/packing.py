"""Packed batches: one row of real tokens and a layout that says which of them form a sequence.

A batch is N *nodes*, each a real token with its position. A *sequence* is a list of nodes; a node may belong to several
sequences: a chosen and a rejected response both list the nodes of their prompt, so the prompt goes through every linear
layer once. Only attention sees sequences: it gathers queries, keys and values into length buckets, runs causal
attention without a mask, and scatters back; on CUDA in half precision the sequences lie end to end in variable-length
flash attention instead. No padding reaches a linear layer.

Axes: N nodes, B sequences, C cells of all sequences end to end (a shared node counts in each), M response tokens,
H heads, D head dimension.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

IMPLEMENTATION = "lit_rlhf_packed"
# Starting another bucket costs about as much as this many query-key pairs (measured on CPU, 6 heads of 64).
BUCKET_OVERHEAD = 20_000
# Whether the kernel takes fewer heads of keys than of queries: torch 2.12 says so, 2.11 has no such argument.
VARLEN_SHARES_KEYS = "enable_gqa" in inspect.signature(varlen_attn).parameters


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


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for packed rows (with a layout) and for decoding (with a 4-D mask), under transformers' interface.

    Args:
        module: the attention layer, as transformers hands it over.
        query: (1, H, N, D) for packed rows; (B, H, 1, D) when decoding.
        key: (1, H_kv, N, D); (B, H_kv, L, D) when decoding.
        value: as key.
        attention_mask: None for packed rows; (B, 1, 1, L) bool, True = attend, when decoding.
        dropout: must be 0 in packed rows: the ratio of new to old policy needs the same network twice.
        scaling: factor on the scores; 1/sqrt(D) if None.
        layout: of the packed row.
        sliding_window: attend to this many newest tokens, the query's own included (Mistral); None = all.
        softcap: scores become softcap tanh(score / softcap) (Gemma 2); None = they stay.
        kwargs: what transformers passes besides; a model for which they change the result runs in padded batches.

    Returns:
        (1, N, H, D) or (B, 1, H, D), and None for the attention weights.
    """
    if query.dtype != value.dtype:  # under autocast, rotary embeddings promote queries and keys to float32
        query, key = query.to(value.dtype), key.to(value.dtype)
    groups = query.shape[1] // key.shape[1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None:
        assert attention_mask is not None, "decoding needs a mask of the cached keys"
        if sliding_window is not None:  # keys stand at their positions: column = position
            newest = attention_mask.sum(-1, keepdim=True) - 1
            column = torch.arange(key.shape[-2], device=key.device)
            attention_mask = attention_mask & (column > newest - sliding_window)
        return _decode_attention(query, key, value, attention_mask, scaling, groups, softcap), None

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, D)
    if softcap is None and takes_variable_lengths(q, v):
        return _end_to_end_attention(q, k, v, layout.end_to_end, scaling, groups, sliding_window).unsqueeze(0), None
    outputs = []
    for cells in layout.buckets:
        bucket_q, bucket_k, bucket_v = (x[cells].transpose(1, 2) for x in (q, k, v))  # (n, H, L, D)
        band = _band(cells.shape[1], sliding_window, q.device)
        if softcap is None:
            out = F.scaled_dot_product_attention(
                bucket_q,
                bucket_k,
                bucket_v,
                attn_mask=band,
                dropout_p=dropout,
                is_causal=band is None,
                scale=scaling,
                enable_gqa=groups > 1,
            )
        else:
            out = _capped_attention(bucket_q, bucket_k, bucket_v, band, scaling, groups, softcap)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (n L, H, D)
    return torch.cat(outputs)[layout.source].unsqueeze(0), None


def takes_variable_lengths(q: Tensor, v: Tensor) -> bool:
    """Whether flash attention can take these queries and values: half precision on CUDA, compute capability 8 or more.

    Heads of one width, at most 256 numbers and a multiple of 8, as the kernel asks for.
    """
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and q.shape[-1] == v.shape[-1] <= 256
        and q.shape[-1] % 8 == 0
    )


def _end_to_end_attention(
    q: Tensor, k: Tensor, v: Tensor, cells: EndToEnd, scaling: float, groups: int, sliding_window: int | None
) -> Tensor:
    """(N, H, D) outputs; queries, keys and values (N, H, D) are laid end to end by sequence, without any padding."""
    q, k, v = (x[cells.nodes] for x in (q, k, v))
    grouped: dict[str, Any] = {}
    if groups > 1 and VARLEN_SHARES_KEYS:
        grouped = {"enable_gqa": True}
    elif groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out = varlen_attn(
        q,
        k,
        v,
        cells.bounds,
        cells.bounds,
        cells.longest,
        cells.longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out[cells.source]


def _capped_attention(
    q: Tensor, k: Tensor, v: Tensor, band: Tensor | None, scaling: float, groups: int, softcap: float
) -> Tensor:
    """Attention with capped scores, which no fused kernel offers: (n, H, L, D) by way of all (n, H, L, L) scores."""
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scaling / softcap))
    if band is None:
        band = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    weights = torch.softmax(scores.masked_fill(~band, float("-inf")), dim=-1, dtype=torch.float32)
    return weights.to(v.dtype) @ v


def _band(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """(L, L) bool mask of a sliding window, or None where the window covers the sequence and plain causal will do."""
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < sliding_window)


def _decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    groups: int,
    softcap: float | None,
) -> Tensor:
    """One query per row against its cached keys; query heads of a group share keys, so none is repeated in memory."""
    B, H, T, D = query.shape
    q = query.reshape(B, H // groups, groups * T, D) * scaling
    weights = q @ key.transpose(-1, -2)
    if softcap is not None:
        weights = softcap * torch.tanh(weights / softcap)
    weights = weights.masked_fill(~attention_mask, float("-inf"))
    out = torch.softmax(weights, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    return out.reshape(B, H, T, value.shape[-1]).transpose(1, 2)  # MLA: values narrower than queries


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask function of packed rows: the layout says it all."""


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
