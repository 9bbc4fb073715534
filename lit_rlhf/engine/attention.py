"""Attention of packed rows under transformers' interface, and of decode steps with a slot cache.

Packed rows: queries, keys and values are gathered into the layout's length buckets, causal attention runs in each
without a mask, and the outputs are scattered back. On a CPU, where that costs less, a prompt that responses share is
attended once (`shared_attention.py`). On CUDA in half precision the sequences lie end to end in variable-length flash
attention instead.

Axes: N nodes, C cells of all sequences end to end (a shared node counts in each), n rows of a bucket, T queries and L
keys of a row or of a cache, H heads, D head dimension, B rows when decoding.
"""

import inspect
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lit_rlhf.engine.blocked_attention import SHARED_COST, blocked_attention, suits_blocked_attention
from lit_rlhf.engine.layout import EndToEnd, Layout, SharedPrompts
from lit_rlhf.engine.memory import has_numbers, kind_of
from lit_rlhf.engine.rounding import add_rows
from lit_rlhf.engine.shared_attention import band, capped_attention, shared_attention

IMPLEMENTATION = "lit_rlhf_packed"
# Whether the kernel takes fewer heads of keys than of queries: torch 2.12 says so, 2.11 has no such argument.
VARLEN_SHARES_KEYS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for packed rows (by the layout in their mask) and for decoding, under transformers' interface.

    Args:
        module: the attention layer, as transformers hands it over.
        query: (1, H, N, D) for packed rows; (B, H, 1, D) when decoding.
        key: (1, H_kv, N, D); (B, H_kv, L, D) when decoding.
        value: as key.
        attention_mask: for packed rows the layout, `as_mask`; (B, 1, 1, L) bool, True = attend, when decoding.
        dropout: must be 0 in packed rows: the ratio of new to old policy needs the same network twice.
        scaling: factor on the scores; 1/sqrt(D) if None.
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
    assert attention_mask is not None, "packed rows need their layout, decoding a mask of the cached keys"
    layout: Layout | None = getattr(attention_mask, "packed_layout", None)
    if layout is None:
        if sliding_window is not None:  # keys stand at their positions: column = position
            newest = attention_mask.sum(-1, keepdim=True) - 1
            column = torch.arange(key.shape[-2], device=key.device)
            attention_mask = attention_mask & (column > newest - sliding_window)
        return _decode_attention(query, key, value, attention_mask, scaling, groups, softcap), None

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, D)
    if softcap is None and takes_variable_lengths(q, v):
        return _end_to_end_attention(q, k, v, layout.end_to_end, scaling, groups, sliding_window).unsqueeze(0), None
    if shared_is_faster(layout.shared, q, v, sliding_window, softcap):
        count = len(layout.shared.source)  # nodes behind these belong to no sequence
        out = shared_attention(q[:count], k[:count], v[:count], layout.shared, scaling, sliding_window, softcap)
        return add_rows(out, len(q) - count).unsqueeze(0), None
    settings = dropout, scaling, groups, softcap
    outputs = [_attend(q[c], k[c], v[c], band(c.shape[1], sliding_window, q.device), *settings) for c in layout.buckets]
    return torch.cat(outputs)[layout.source].unsqueeze(0), None


def as_mask(layout: Layout) -> Tensor:
    """A layout as models hand it on to their attention: all of them their mask, some (StableLM, Nemotron) nothing else.

    Masks with four axes stay as they are on the way, whatever they hold.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.source.device)
    mask.packed_layout = layout  # type: ignore[attr-defined]
    return mask


def shared_is_faster(
    shared: SharedPrompts | None, q: Tensor, v: Tensor, sliding_window: int | None, softcap: float | None
) -> TypeGuard[SharedPrompts]:
    """Whether prompts that sequences share are to be attended once: a kernel is there, and none over whole ones faster.

    Kernels for other devices keep `lse` to themselves.
    """
    if shared is None or softcap is not None:
        return shared is not None
    plain = sliding_window is None or shared.longest <= sliding_window  # as blocks are alone
    blocked = plain and suits_blocked_attention(q, v, shared.longest)
    return kind_of(q.device) == "cpu" and (not blocked or shared.cost < SHARED_COST)


def takes_variable_lengths(q: Tensor, v: Tensor) -> bool:
    """Whether flash attention can take these queries and values: half precision on CUDA, compute capability 8 or more.

    Heads of one width, at most 256 numbers and a multiple of 8, as the kernel asks for.
    """
    return (
        kind_of(q.device) == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and (not has_numbers(q) or torch.cuda.get_device_capability(q.device) >= (8, 0))  # planned for are new ones
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


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float,
    groups: int,
    softcap: float | None,
) -> Tensor:
    """(n T, H, D) outputs of a bucket: queries (n, T, H, D), keys and values (n, L, H_kv, D).

    The mask broadcasts to (n, H, T, L), True = attend; None = causal.
    """
    if mask is None and softcap is None and not dropout and suits_blocked_attention(q, v, q.shape[1]):
        return blocked_attention(q, k, v, scaling).flatten(0, 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if softcap is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
        )
    else:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        out, _ = capped_attention(q, k, v, mask, mask is None, scaling, softcap)
    return out.transpose(1, 2).flatten(0, 1)


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
    q = query.reshape(B, H // groups, groups * T, D)
    if softcap is None and q.dtype == torch.float32 and kind_of(q.device) == "cpu" and value.shape[-1] == D:
        out = F.scaled_dot_product_attention(q, key, value, attn_mask=attention_mask, scale=scaling)
        return out.reshape(B, H, T, D).transpose(1, 2)
    q = q * scaling
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
