"""A model on shapes, to count memory: without numbers, and held as its weights would be once they are read."""

from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PretrainedConfig, PreTrainedModel

from lit_rlhf.models.holding import FrozenDtype, dtype_of

BLOCK, BLOCKS = 64, 256  # weights that share a scale of one byte, and scales that share one of four


def shape_of(auto_class: Any, config: PretrainedConfig, held: FrozenDtype | None, **options: Any) -> PreTrainedModel:
    """A model whose weights take what they would take, and on the way there no more than that.

    Args:
        auto_class: of transformers, which says what kind of model.
        config: the model's.
        held: the dtype of its weights; None = torch's default.
        options: of `from_config`.
    """
    with _disable_current_modes(), torch.device("meta"):  # nothing is counted of what files are read into piecemeal
        model = auto_class.from_config(config, dtype=dtype_of(held), **options)
        if held == "nf4":
            pack_linears(model)
    model.to_empty(device="cpu")
    model.tie_weights()
    return cast(PreTrainedModel, model)


def pack_linears(model: PreTrainedModel) -> None:
    """Put a stand-in for NF4 in place of each linear layer but heads, as transformers puts that of bitsandbytes."""
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and id(layer) not in heads:
                setattr(parent, name, PackedLinear(layer))


class PackedLinear(nn.Linear):
    """Takes what a linear layer of bitsandbytes takes in NF4 with quantised constants, its forward pass included.

    Args:
        layer: in whose place it stands.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
        self.compute_dtype = torch.bfloat16
        count = layer.weight.numel()
        scales = -(-count // BLOCK)
        packed = torch.empty(-(-count // 2) + scales + 4 * -(-scales // BLOCKS), 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        """Whatever becomes of the parameter, it tells what it stands for, as those of bitsandbytes do."""
        super()._apply(fn, recurse)
        self.weight.quant_state = SimpleNamespace(shape=torch.Size((self.out_features, self.in_features)))  # type: ignore[attr-defined]
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(…, out) in the dtype of (…, in), by way of the whole weight in bfloat16."""
        product: Tensor = Unpacked.apply(x.to(self.compute_dtype), self.weight, self.bias, self.out_features)
        return product.to(x.dtype)


class Unpacked(torch.autograd.Function):
    """The product with a weight that is unpacked once for it, and once more for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        """(…, out)."""
        ctx.shape = (out_features, x.shape[-1])
        return F.linear(x, x.new_empty(ctx.shape), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """That of x; nothing here learns."""
        return gradients[0] @ gradients[0].new_empty(ctx.shape), None, None, None
