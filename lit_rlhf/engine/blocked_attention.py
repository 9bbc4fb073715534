"""Causal attention in bfloat16 on CPUs without matrix units: products of matrices, over blocks of queries.

torch's flash attention has no bfloat16 kernel of its own for such a CPU: it goes forward at the speed of float32 and
backward at half of that, where products of these sizes are two to three times as fast. So the scores of a block of
queries, which stay in a core's cache, are made in float32, as that kernel makes them, and again on the way back
(FlashAttention's recomputation, https://arxiv.org/abs/2205.14135).

Axes: M rows times heads of keys, G heads of queries to one of keys, T tokens, D head dimension; b queries of a block
and the L keys up to its last one; m of the rows at once.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.engine.memory import kind_of

LONGEST = 1024  # tokens; torch's kernel is as fast from there on
# Of the cost of whole sequences: where prompts that are attended once cost less, torch's kernel is faster over these.
SHARED_COST = 0.57
BLOCK = 64  # queries
AT_ONCE = 2**17  # scores, half a megabyte


def suits_blocked_attention(q: Tensor, v: Tensor, length: int) -> bool:
    """Whether this is for queries and values (..., D) of rows of such a length."""
    return (
        kind_of(q.device) == "cpu"
        and q.dtype == torch.bfloat16
        and length <= LONGEST
        and q.shape[-1] == v.shape[-1]
        and not torch.cpu._is_amx_tile_supported()
    )


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Causal attention whose weights are of the queries' dtype, and whose softmax is in float32.

    Args:
        q: (n, T, H, D)
        k: (n, T, H_kv, D)
        v: as k.
        scaling: factor on the scores.

    Returns:
        (n, T, H, D)
    """
    n, T, H, D = q.shape
    shared = k.shape[2]
    queries = q.view(n, T, shared, H // shared, D).permute(0, 2, 3, 1, 4).reshape(n * shared, H // shared, T, D)
    keys, values = (x.transpose(1, 2).reshape(n * shared, T, D) for x in (k, v))
    out: Tensor = _Blocks.apply(queries, keys, values, scaling)
    return out.view(n, H, T, D).transpose(1, 2)


class _Blocks(torch.autograd.Function):
    """Outputs (M, G, T, D) of queries (M, G, T, D), keys and values (M, T, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scaling = scaling
        out = torch.empty_like(q)
        for rows, block, seen in _blocks(q):
            weights = _weights(_flat(q[rows, :, block]), k[rows, seen], q.shape[1], scaling)
            out[rows, :, block] = torch.bmm(weights, v[rows, seen]).view_as(out[rows, :, block])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, block, seen in _blocks(q):
            queries, d_out = _flat(q[rows, :, block]), _flat(grad[rows, :, block])
            weights = _weights(queries, k[rows, seen], q.shape[1], ctx.scaling)
            dv[rows, seen] += torch.bmm(weights.transpose(1, 2), d_out)
            d_weights = torch.bmm(d_out, v[rows, seen].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            dq[rows, :, block] = torch.bmm(d_scores, k[rows, seen]).view_as(dq[rows, :, block])
            dk[rows, seen] += torch.bmm(d_scores.transpose(1, 2), queries)
        return dq.mul_(ctx.scaling), dk.mul_(ctx.scaling), dv, None


def _blocks(q: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Rows, queries and the keys that these see; at least one row, and as many as the cache has room for."""
    M, G, T, _ = q.shape
    count = -(-T // BLOCK)
    for number in range(count):
        block = slice(T * number // count, T * (number + 1) // count)
        step = max(1, AT_ONCE // (G * (block.stop - block.start) * block.stop))
        for first in range(0, M, step):
            yield slice(first, first + step), block, slice(0, block.stop)


def _flat(x: Tensor) -> Tensor:
    """(m, G b, D) of (m, G, b, D)."""
    return x.reshape(len(x), -1, x.shape[-1])


def _weights(q: Tensor, k: Tensor, groups: int, scaling: float) -> Tensor:
    """(m, G b, L) of queries (m, G b, D) and keys (m, L, D); the newest b keys are seen causally, all others wholly."""
    size = q.shape[1] // groups
    with torch.autocast("cpu", enabled=False):  # which would make them in bfloat16
        scores = torch.bmm(q.float().mul_(scaling), k.float().transpose(1, 2))
    newer = torch.full((size, size), -math.inf, device=q.device).triu_(1)
    scores[..., -size:] += newer.repeat(groups, 1)
    return torch.softmax(scores, -1).to(q.dtype)
