"""Linear layers whose weights are made ready for the kernel while they do not change: during rollouts.

A product of a few rows with a large weight spends most of its time on the weight. A policy that acts keeps its weights,
so what each step would do is done once for all steps of a rollout. Under autocast they are cast to half precision: read
in two bytes a step, not in four that are written in two and read again. On a CPU they are brought into oneDNN's blocked
layout, with which 4 to 32 rows take half the time (`docs/performance.md`). The price is the memory of
such a copy until the rollout ends, and of the kernels that oneDNN keeps for good: one for each number of rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_rlhf.engine.linear_head import autocast_dtype, is_plain_linear
from lit_rlhf.engine.memory import has_numbers, kind_of

# More are no faster by oneDNN; prefill has any number, and a kernel takes 0.4 MB for each shape of layer.
MOST_ROWS = 32


@contextmanager
def packed_linears(network: nn.Module) -> Iterator[None]:
    """While inside, plain linear layers multiply by a ready copy of their weights; no gradient flows through them.

    GPT-2's `Conv1D`, whose weight is transposed, is such a layer too. Layers that do more than multiply (LoRA) or hold
    the weights of several experts in one stay as they are, and so do those within compiled code, which would be
    compiled anew, and a network for which neither `must_cast` nor `can_pack` holds.
    """
    compiled = {
        part for module in network.modules() if module._compiled_call_impl is not None for part in module.modules()
    }
    ready = packed_forward if can_pack(network) else cast_forward if must_cast(network) else None
    linears = [m for m in network.modules() if is_plain_linear(m, (nn.Linear, Conv1D)) and m not in compiled]
    layers: list[Any] = [] if ready is None else linears
    for layer in layers:
        assert ready is not None
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        layer.forward = ready(weight.T if isinstance(layer, Conv1D) else weight, bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def must_cast(network: nn.Module) -> bool:
    """Whether each product would cast its float32 weight: under autocast, whose own cache Lightning switches off."""
    weight = next(network.parameters())
    return weight.dtype == torch.float32 and autocast_dtype(weight.device.type) is not None


def cast_forward(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """X W^T + b with the weights as they are now, in the dtype of autocast."""
    weight, bias = _cast(weight, bias)
    return lambda x: F.linear(x, weight, bias)


def _cast(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As autocast would; as they are without it."""
    dtype = autocast_dtype(weight.device.type) or weight.dtype
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def can_pack(network: nn.Module) -> bool:
    """Whether oneDNN has a kernel for the precision that this network multiplies in: float32 or bfloat16 on a CPU."""
    weight = next(network.parameters())
    computed = autocast_dtype(weight.device.type) or weight.dtype
    return (
        kind_of(weight.device) == "cpu"
        and (computed == torch.float32 or (computed == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def packed_forward(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """X W^T + b with the weights as they are now, in the dtype of autocast if there is one."""
    weight, bias = _cast(weight, bias)
    if not has_numbers(weight):  # there is no such kernel for shapes; the copy takes as much
        copied = weight.clone()
        return lambda x: F.linear(x, copied, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def forward(x: Tensor) -> Tensor:
        if x.numel() > MOST_ROWS * x.shape[-1]:
            return F.linear(x, weight, bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), packed, bias, "none", [], "")
        return product

    return forward
