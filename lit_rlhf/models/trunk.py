"""Packed batches through a Hugging Face model without its head: by the layout, or else in padded batches."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_rlhf.engine.attention import IMPLEMENTATION, as_mask
from lit_rlhf.engine.layout import Layout
from lit_rlhf.engine.linear_head import autocast_dtype
from lit_rlhf.engine.rounding import add_rows, drop_rows, few_shapes

# What models call their keys and values, or states, of the tokens read so far. Transformers renamed them to `cache` in
# release 5.24, and warns of the old names; code that comes with weights may go on with them.
CACHES = "cache", "past_key_values", "cache_params", "state"


def packed_hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """(N, d) last hidden states of a packed row."""
    return packed_outputs(model, input_ids, position_ids, layout)[0]


def packed_outputs(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, layout: Layout, **asked: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(N, d) last hidden states of a packed row, and (N, E) router logits of each layer with experts, if asked for.

    Args:
        model: with its head, which is left out.
        input_ids: (N,).
        position_ids: (N,).
        layout: of the row.
        asked: `output_router_logits`, as the model calls it.
    """
    if not runs_packed(model):
        return padded_outputs(model, input_ids, layout, **asked)
    layout, more = few_shapes(layout, multiplied_in(model), input_ids.device)
    outputs = backbone(model)(
        input_ids=add_rows(input_ids, more).unsqueeze(0),
        position_ids=add_rows(position_ids, more).unsqueeze(0),
        attention_mask=as_mask(layout),
        use_cache=False,
        **asked,
    )
    routers = tuple(drop_rows(layer, more) for layer in _router_logits(outputs, asked))
    return drop_rows(outputs.last_hidden_state[0], more), routers


def multiplied_in(model: PreTrainedModel) -> torch.dtype:
    """The dtype of a model's products: that of autocast, or of its weights."""
    return autocast_dtype(model.device.type) or model.dtype


def padded_outputs(
    model: PreTrainedModel, input_ids: Tensor, layout: Layout, **asked: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As `packed_outputs`, by the model's own attention on right-padded batches, one for each bucket.

    No real token sees the padding on its right, since attention is causal. A shared prompt is computed with each of its
    responses; all give the same, so the states of one of them serve.
    """
    buckets = [backbone(model)(input_ids=input_ids[cells], use_cache=False, **asked) for cells in layout.buckets]
    hidden = torch.cat([outputs.last_hidden_state.flatten(0, 1) for outputs in buckets])[layout.source]
    layers = zip(*(_router_logits(outputs, asked) for outputs in buckets), strict=True)
    return hidden, tuple(torch.cat(layer)[layout.source] for layer in layers)


def _router_logits(outputs: Any, asked: dict[str, bool]) -> tuple[Tensor, ...]:
    return tuple(layer.flatten(0, -2) for layer in outputs.router_logits) if any(asked.values()) else ()


def runs_packed(model: PreTrainedModel) -> bool:
    """Whether this model's attention takes packed rows; else it runs in padded batches."""
    return bool(model.config._attn_implementation == IMPLEMENTATION)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head, adapters included: those of PEFT lie within its layers."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return cast(nn.Module, inner.model if inner.base_model is inner else inner.base_model)


def arguments_of(model: PreTrainedModel) -> frozenset[str]:
    """Names of what the model without its head takes."""
    return _arguments(type(backbone(model)).forward)


@functools.cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
