"""Attention of responses to prompts that they share: each prompt is attended once, forward and backward.

A token of a response sees its prompt and the response so far. The softmax over both is made of the two over each, by
the logarithms `lse` of their sums of exponentials, which fused kernels give besides their outputs (Dao et al. 2022,
"FlashAttention", Section 3.1, https://arxiv.org/abs/2205.14135):

    lse = log(exp(lse_own) + exp(lse_prompt)),    out = exp(lse_own - lse) out_own + exp(lse_prompt - lse) out_prompt

All responses to a prompt meet it in one call (Juravsky et al. 2024, "Hydragen", Sections 3.1 and 3.2,
https://arxiv.org/abs/2402.05099); by themselves, prompts and responses are plain causal sequences. The backward pass of
a kernel makes its weights from `lse`: given `out` and `lse` of the whole, it gives each part's share of the whole
gradient. So what is held for it are nodes alone.

Tensors of nodes are tables in here, a row for each node and head of keys, so that cells are laid out by picking whole
rows. Axes: N nodes, G heads of keys, g query heads to each, D head dimension; C cells of buckets end to end, n rows of
a bucket, T queries and L keys of each. A kernel's n G rows are in order of heads.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lit_rlhf.engine.layout import Answers, SharedPrompts

# What `scaled_dot_product_attention` calls on CPUs, keeping `lse` to itself.
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Call(NamedTuple):
    """What a kernel is called for."""

    queries: Tensor  # (n G, T) int64: rows of the tables
    keys: Tensor  # (n G, L) int64: likewise
    mask: Tensor | None  # broadcasts to (n G, 1, T, L), True = attend
    is_causal: bool  # besides


class Part(NamedTuple):
    """Calls, and where rows of the tables stand among their cells, laid end to end for each head."""

    calls: list[Call]
    query_source: Tensor  # of each row whose outputs are read
    key_source: Tensor  # of each row that is a key


class Parts(NamedTuple):
    """All attention of sequences that share prompts, as rows of the tables."""

    own: Part  # prompts and responses by themselves: every row
    prompt: Part  # responses to their prompts
    responses: Tensor  # the rows that are queries in `prompt`
    prompts: Tensor  # the rows that are keys there
    heads: int  # G


# Outputs (n G, g, T, D) and lse (n G, g, T) of queries (n G, g, T, D), keys and values (n G, 1, L, D).
Kernel = Callable[[Call, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared: SharedPrompts,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """(N, H, D) outputs of attention over sequences that share prompts: on a CPU, or anywhere with a soft cap.

    Args:
        q: (N, H, D) queries, H = G g.
        k: (N, G, D) keys.
        v: (N, G, D) values, or narrower ones; the outputs are as wide.
        shared: the sequences.
        scaling: factor on the scores.
        sliding_window: attend to this many newest tokens, the query's own included; None = all.
        softcap: scores become softcap tanh(score / softcap), and all of them are held; None = they stay.
    """
    num_nodes, heads, width = v.shape
    parts = parts_of(shared, sliding_window, heads)
    q, k, v = (x.reshape(num_nodes * heads, -1, x.shape[-1]) for x in (q, k, v))
    if softcap is None:
        if width < q.shape[-1]:  # the kernel takes heads of one width
            v = F.pad(v, (0, q.shape[-1] - width))
        out = _Flash.apply(q, k, v, parts, scaling)
    else:

        def capped(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return capped_attention(q, k, v, call.mask, call.is_causal, scaling, softcap)

        out, _ = merge(q, k, v, parts, capped)
    return out[..., :width].reshape(num_nodes, -1, width)


def parts_of(shared: SharedPrompts, sliding_window: int | None, heads: int) -> Parts:
    """The attention of a layout, for so many heads of keys."""
    head = torch.arange(heads, device=shared.source.device)

    def rows(nodes: Tensor) -> Tensor:
        """(R,) -> (R G,), node by node."""
        return (nodes[:, None] * heads + head).flatten()

    def bucket(nodes: Tensor) -> Tensor:
        """(n, T) -> (n G, T), head by head."""
        return (nodes * heads + head[:, None, None]).flatten(0, 1)

    def places(source: Tensor, buckets: Sequence[Tensor]) -> Tensor:
        """(R,) among cells laid end to end -> (R G,) where these are laid for each head in turn."""
        return (source[:, None] + head * sum(nodes.numel() for nodes in buckets)).flatten()

    own = []
    for nodes in shared.squares:
        mask = band(nodes.shape[1], sliding_window, nodes.device)
        own.append(Call(bucket(nodes), bucket(nodes), mask, is_causal=mask is None))
    prompt = []
    for answers in shared.answers:
        mask = seen(answers, sliding_window if shared.longest > (sliding_window or math.inf) else None)
        mask = None if mask is None else mask.repeat(heads, 1, 1, 1)
        prompt.append(Call(bucket(answers.queries), bucket(answers.keys), mask, is_causal=False))
    source = places(shared.source, shared.squares)
    response_source = places(shared.response_source, [answers.queries for answers in shared.answers])
    prompt_source = places(shared.prompt_source, [answers.keys for answers in shared.answers])
    return Parts(
        Part(own, source, source),
        Part(prompt, response_source, prompt_source),
        rows(shared.responses),
        rows(shared.prompts),
        heads,
    )


def merge(q: Tensor, k: Tensor, v: Tensor, parts: Parts, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Outputs (N G, g, D) and lse (N G, g) of queries (N G, g, D), keys and values (N G, 1, D)."""

    def attend(part: Part) -> list[Tensor]:
        results = [kernel(call, take(q, call.queries), take(k, call.keys), take(v, call.keys)) for call in part.calls]
        return [laid(each, parts.heads).index_select(0, part.query_source) for each in zip(*results, strict=True)]

    out, lse = attend(parts.own)
    from_prompt, lse_prompt = attend(parts.prompt)
    own, lse_own = (x.index_select(0, parts.responses) for x in (out, lse))
    share = torch.sigmoid(lse_prompt - lse_own).unsqueeze(-1)  # exp(lse_prompt - lse); one pass, not five
    whole = torch.lerp(own.to(share), from_prompt.to(share), share).to(out)
    lse_whole = torch.logaddexp(lse_own, lse_prompt)
    return out.index_copy_(0, parts.responses, whole), lse.index_copy_(0, parts.responses, lse_whole)


class _Flash(Function):
    """`merge` with torch's kernel for CPUs: (N G, g, D) outputs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: Parts, scaling: float) -> Tensor:
        def flash(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
            out, lse = FLASH(q, k, v, 0.0, call.is_causal, attn_mask=bias(call.mask, q.dtype), scale=scaling)
            return out, lse

        out, lse = merge(q, k, v, parts, flash)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.parts, ctx.scaling = parts, scaling
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        parts: Parts = ctx.parts
        upstream, groups = upstream.contiguous(), q.shape[1]

        def gradients(part: Part, lse: Tensor) -> list[Tensor]:
            """Of the rows that are queries, and of those that are keys and values; `lse` is of the first."""
            sizes = [call.queries.numel() // parts.heads for call in part.calls]
            sums = lse.new_full((parts.heads * sum(sizes), groups), math.inf)  # no weight where no row stands
            sums = sums.index_copy_(0, part.query_source, lse).view(parts.heads, -1, groups)
            found = []
            for call, each in zip(part.calls, sums.split(sizes, 1), strict=True):
                grad, queries, outputs = (take(x, call.queries) for x in (upstream, q, out))
                keys, values = (take(x, call.keys).expand(-1, groups, -1, -1) for x in (k, v))
                each = each.reshape(*call.queries.shape, groups).transpose(1, 2)
                dq, dk, dv = FLASH_BACKWARD(
                    *(grad, queries, keys, values, outputs, each, 0.0, call.is_causal),
                    attn_mask=bias(call.mask, q.dtype),
                    scale=ctx.scaling,
                )
                found.append((dq, dk.sum(1, keepdim=True), dv.sum(1, keepdim=True)))
            sources = part.query_source, part.key_source, part.key_source
            cells = [laid(each, parts.heads) for each in zip(*found, strict=True)]
            return [x.index_select(0, source) for x, source in zip(cells, sources, strict=True)]

        whole = gradients(parts.own, lse)
        rest = gradients(parts.prompt, lse.index_select(0, parts.responses))
        for x, rows, y in zip(whole, (parts.responses, parts.prompts, parts.prompts), rest, strict=True):
            x.index_add_(0, rows, y)
        return *whole, None, None


def take(x: Tensor, rows: Tensor) -> Tensor:
    """(n G, h, T, D): rows (n G, T) of a table (N G, h, D)."""
    return x.index_select(0, rows.flatten()).unflatten(0, tuple(rows.shape)).transpose(1, 2)


def laid(buckets: Sequence[Tensor], heads: int) -> Tensor:
    """(C G, h, ...): the cells of buckets (n G, h, T, ...), laid end to end for each head in turn."""
    return torch.cat([x.transpose(1, 2).unflatten(0, (heads, -1)).flatten(1, 2) for x in buckets], 1).flatten(0, 1)


def bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores: the least number where the mask is False.

    Not -inf: a query that sees no key at all has then an lse so low that it weighs nothing in a merge.
    """
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def band(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """(L, L) bool mask of a sliding window, or None where the window covers the sequence and plain causal will do."""
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < sliding_window)


def seen(answers: Answers, sliding_window: int | None) -> Tensor | None:
    """(n, 1, 1 or T, L) bool mask of the prompts' keys, or None where every query sees every cell."""
    column = torch.arange(answers.keys.shape[1], device=answers.keys.device)
    if sliding_window is None:
        return None if answers.filled else (column < answers.lengths[:, None])[:, None, None]
    near = answers.positions[..., None] - column < sliding_window
    return (near & (column < answers.lengths[:, None, None]))[:, None]


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scaling: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Attention with capped scores, which no fused kernel offers, by way of all scores: outputs and lse.

    Args:
        q: (n, H, T, D).
        k: (n, H or 1, L, D).
        v: as k.
        mask: broadcasts to (n, H, T, L), True = attend; None = all.
        is_causal: besides; L = T then.
        scaling: factor on the scores.
        softcap: what they are capped at.

    Returns:
        (n, H, T, D) and (n, H, T).
    """
    scores = (softcap * torch.tanh(q @ k.transpose(-1, -2) * (scaling / softcap))).float()
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1).to(v.dtype) @ v, torch.logsumexp(scores, dim=-1)
