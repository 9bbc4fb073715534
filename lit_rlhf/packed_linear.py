"""Linear layers whose weights are made ready for the kernel while they do not change: during rollouts.

A product of a few rows with a large weight spends most of its time on the weight. A policy that acts keeps its weights,
so what each step would do is done once for all steps of a rollout. Under autocast they are cast to half precision: read
in two bytes a step, not in four that are written in two and read again. In float32 on a CPU they are brought into
oneDNN's blocked layout, with which 5 to 16 rows take half the time (`docs/performance.md`). The price is the memory of
such a copy until the rollout ends.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_rlhf.logprobs import autocast_dtype, is_plain_linear


@contextmanager
def packed_linears(network: nn.Module) -> Iterator[None]:
    """While inside, plain linear layers multiply by a ready copy of their weights; no gradient flows through them.

    Layers that do more than multiply (LoRA) stay as they are, and so do those within compiled code, which would be
    compiled anew, and a network for which neither `must_cast` nor `can_pack` holds.
    """
    compiled = {
        part for module in network.modules() if module._compiled_call_impl is not None for part in module.modules()
    }
    ready = cast_forward if must_cast(network) else packed_forward if can_pack(network) else None
    layers = [m for m in network.modules() if is_plain_linear(m) and m not in compiled] if ready is not None else []
    for layer in layers:
        assert ready is not None
        layer.forward = ready(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def must_cast(network: nn.Module) -> bool:
    """Whether each product would cast its float32 weight: under autocast, whose own cache Lightning switches off."""
    weight = next(network.parameters())
    return weight.dtype == torch.float32 and autocast_dtype(weight.device.type) is not None


def cast_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """X W^T + b with the weights as they are now, in the dtype of autocast."""
    assert isinstance(layer, nn.Linear)
    dtype = autocast_dtype(layer.weight.device.type)
    weight = layer.weight.detach().to(dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    return lambda x: F.linear(x, weight, bias)


def can_pack(network: nn.Module) -> bool:
    """Whether there is such a kernel for this network: float32 on a CPU, with oneDNN and without autocast."""
    weight = next(network.parameters())
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and autocast_dtype("cpu") is None
    )


def packed_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """X W^T + b with the weights as they are now."""
    assert isinstance(layer, nn.Linear)
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
    bias = None if layer.bias is None else layer.bias.detach()

    def forward(x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product

    return forward
