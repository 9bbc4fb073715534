"""Linear layers whose weights lie in the kernel's order while they do not change: during rollouts on a CPU.

A product of a few rows with a large weight spends most of its time bringing the weight into the order that the kernel
reads. A policy that acts keeps its weights, so this is done once for all steps of a rollout: into oneDNN's blocked
layout, with which 5 to 16 rows take half the time (`docs/performance.md`). The price is the memory of the weights once
more until the rollout ends.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_rlhf.logprobs import is_plain_linear


@contextmanager
def packed_linears(network: nn.Module) -> Iterator[None]:
    """While inside, plain linear layers multiply by a packed copy of their weights; no gradient flows through them.

    Layers that do more than multiply (LoRA) stay as they are, and so do those within compiled code, which would be
    compiled anew, and a network for which `can_pack` is False.
    """
    compiled = {
        part for module in network.modules() if module._compiled_call_impl is not None for part in module.modules()
    }
    layers = [m for m in network.modules() if is_plain_linear(m) and m not in compiled] if can_pack(network) else []
    for layer in layers:
        layer.forward = packed_forward(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def can_pack(network: nn.Module) -> bool:
    """Whether there is such a kernel for this network: float32 on a CPU, with oneDNN and without autocast."""
    weight = next(network.parameters())
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not torch.is_autocast_enabled("cpu")
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
