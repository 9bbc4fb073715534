"""Gradients of one part of a loss made at once, so that its activations are gone before the next part's are made.

Axes: M response tokens.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function


def backward_early(losses: Float[Tensor, " M"], parameters: Iterable[nn.Parameter], weight: Tensor) -> Tensor:
    """The same losses, whose gradients are there already and are handed out when the whole loss goes backward.

    For networks whose parameters are whole, and gradients that need no loss scale. What learns from the losses should
    be small, such as an adapter: its gradients are held, in place of activations, until the whole loss goes backward.

    Args:
        losses: every one has the same share in the whole loss.
        parameters: that may learn from them.
        weight: () what each will be multiplied by, so that gradients are rounded as in one backward pass.

    Returns:
        (M,) losses, equal to those given.
    """
    learns = [parameter for parameter in parameters if parameter.requires_grad]
    with torch.autocast(losses.device.type, enabled=False):  # as Lightning's own backward pass
        gradients = torch.autograd.grad(losses, learns, weight.to(losses).expand_as(losses), allow_unused=True)
    return with_gradients(losses.detach(), weight, gradients, learns)


def with_gradients(
    losses: Float[Tensor, " M"], weight: Tensor, gradients: Sequence[Tensor | None], learns: Sequence[Tensor]
) -> Float[Tensor, " M"]:
    """Losses whose gradients are there already.

    Args:
        losses: every one has the same share in the whole loss.
        weight: () what each was multiplied by as the gradients were made.
        gradients: of their weighted sum.
        learns: what they are by.
    """
    held: Tensor = _Held.apply(losses, weight, tuple(gradients), *learns)
    return held


class _Held(Function):
    """Hands out gradients that were made for another weight of the losses."""

    @staticmethod
    def forward(
        ctx: Any, losses: Tensor, weight: Tensor, gradients: tuple[Tensor | None, ...], *learns: Tensor
    ) -> Tensor:
        ctx.weight, ctx.gradients = weight, gradients
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale = upstream[0] / ctx.weight
        gradients, ctx.gradients = ctx.gradients, ()
        return None, None, None, *(None if gradient is None else gradient.mul_(scale) for gradient in gradients)
