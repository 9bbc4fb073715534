"""A plain linear output head: log-probabilities of the taken tokens with gradients made by hand, chunk by chunk.

Where there is one chunk, its logits are held for the backward pass and turned into their own gradient in place; of
several none is held, and they are made anew. Weights are converted to the compute dtype once a pass, not per chunk;
gradients of several chunks add up in float32.

Axes: M response tokens, C tokens of a chunk, V vocabulary, d width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_rlhf.engine.memory import kind_of

# Softmax statistics are made over rows whose copies take no memory to speak of. On a CPU they stay in its cache: 0.37 s
# instead of 0.42 s for 800 x 16 384.
BLOCK_BYTES = {"cpu": 2 * 2**20}
PART_BYTES = 64 * 2**20  # as much on other devices, and of gradients
# The logit of an id without a token: e to the power of it is 0, and 0 times it, as in the entropy, is not NaN.
NO_TOKEN = -1e30


def is_plain_linear(head: Any, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> bool:
    """Whether calling the head is nothing but a product with its whole weight."""
    return (
        type(head) in kinds
        and not isinstance(head.weight, DTensor)
        and not (head._forward_hooks or head._forward_pre_hooks)
    )


def parameters(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a plain linear head."""
    return head.weight, head.bias


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """What hidden states are multiplied in: their own dtype, or that of autocast."""
    return autocast_dtype(hidden.device.type) or hidden.dtype


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast multiplies in on such a device; None where it is off."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


class LinearLogprobs(torch.autograd.Function):
    """Log-probs and entropies of a plain linear head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        temperature: float,
        with_entropy: bool,
        size: int,
        unused_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(M,) log-probs; (M,) entropies, or (0,)."""
        ctx.dtype = compute_dtype(hidden)
        w, b = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        parts = []
        for h, t in zip(hidden.split(size), target_ids.split(size), strict=True):
            z = logits(h.to(ctx.dtype), w, b, temperature, unused_ids)
            parts.append((*statistics(z, t, with_entropy),))
        taken, normalisers, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, target_ids, normalisers, entropies)
        # Kept beside the saved tensors, since the backward pass turns it into its own gradient.
        ctx.held = z if len(parts) == 1 and any(ctx.needs_input_grad) else None
        ctx.settings = temperature, with_entropy, size, unused_ids
        return taken, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias."""
        hidden, weight, bias, target_ids, normalisers, entropies = ctx.saved_tensors
        temperature, with_entropy, size, unused_ids = ctx.settings
        sums = GradientSums(hidden, weight, bias, ctx.dtype, ctx.needs_input_grad, unused_ids)
        for rows in chunks(len(hidden), size):
            z, ctx.held = ctx.held, None  # no longer those of the chunk before, while the next are made
            if z is None:
                z = sums.logits(rows, temperature)
            entropy = (entropies[rows], gradients[1][rows]) if with_entropy else None
            to_gradient_(z, target_ids[rows], normalisers[rows], gradients[0][rows], entropy)
            sums.add(rows, z if temperature == 1.0 else z.div_(temperature))
        return *sums.results(), None, None, None, None, None


class LinearNLL(torch.autograd.Function):
    """Summed negative log-likelihood of a plain linear head, its gradient made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        count: int,
        size: int,
        unused_ids: Tensor | None,
    ) -> Tensor:
        """() the sum over the first `count`; what is behind them fills up."""
        counted = (torch.arange(len(hidden), device=hidden.device) < count).float()
        sums = GradientSums(hidden, weight, bias, compute_dtype(hidden), ctx.needs_input_grad, unused_ids)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows in chunks(len(hidden), size):
            z = sums.logits(rows, 1.0)
            taken, normalisers, _ = statistics(z, target_ids[rows], with_entropy=False)
            total -= taken @ counted[rows]
            to_gradient_(z, target_ids[rows], normalisers, -counted[rows], None)
            sums.add(rows, z)
            del z  # before the next are made
        ctx.save_for_backward(*sums.results())
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients are there; they scale with that of the sum, in place."""
        return *(None if x is None else scale_(x, gradients[0]) for x in ctx.saved_tensors), None, None, None, None


class GradientSums:
    """Gradients of a linear layer, added up over chunks of its inputs; products are made in `dtype`."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        needed: tuple[bool, ...],
        unused_ids: Tensor | None,
    ) -> None:
        self.inputs, self.dtype, self.unused_ids = hidden, dtype, unused_ids
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.results_in = weight.dtype, None if bias is None else bias.dtype
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight_sum: Tensor | None = None
        self.bias_sum: Tensor | None = None
        self.needed = needed

    def logits(self, rows: slice, temperature: float) -> Tensor:
        """(C, V) logits / temperature of `rows`."""
        return logits(self.inputs[rows].to(self.dtype), self.weight, self.bias, temperature, self.unused_ids)

    def add(self, rows: slice, gradient: Tensor) -> None:
        """Take the (C, V) gradient of the logits of `rows`."""
        whole = rows == slice(0, len(self.inputs))
        if self.hidden is not None:
            self.hidden[rows] = gradient @ self.weight
        if self.needed[1]:
            inputs = self.inputs[rows].to(self.dtype)
            if whole:
                self.weight_sum = gradient.t() @ inputs
            else:
                if self.weight_sum is None:
                    self.weight_sum = torch.zeros_like(self.weight, dtype=torch.float32)
                self.add_product(gradient.t(), inputs)
        if self.bias is not None and self.needed[2]:
            total = gradient.sum(0, dtype=torch.float32)
            self.bias_sum = total if self.bias_sum is None else self.bias_sum + total

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add a product to the weight's gradient; one in half precision by blocks, so that it is never there whole."""
        assert self.weight_sum is not None
        if left.dtype == self.weight_sum.dtype:
            self.weight_sum.addmm_(left, right)
            return
        size = max(1, PART_BYTES // (4 * right.shape[1]))
        for block, part in zip(self.weight_sum.split(size), left.split(size), strict=True):
            block += part @ right

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias in the dtypes of these."""
        sums = zip((self.weight_sum, self.bias_sum), self.results_in, strict=True)
        weight, bias = (None if total is None else total.to(dtype) for total, dtype in sums)
        return self.hidden, weight, bias


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply by a float32 scalar: rounded to the dtype of x, it would bend the whole gradient by up to 0.2 %."""
    for block in x.split(max(1, PART_BYTES // (4 * x[0].numel()))):
        block.copy_(block.float().mul_(factor))  # the block itself where it is float32
    return x


def logits(
    hidden: Float[Tensor, "C d"],
    weight: Float[Tensor, "V d"],
    bias: Float[Tensor, " V"] | None,
    temperature: float,
    unused_ids: Int[Tensor, " U"] | None,
) -> Float[Tensor, "C V"]:
    """(C, V) logits / temperature."""
    z = hidden @ weight.t() if bias is None else torch.addmm(bias, hidden, weight.t())
    return mask_(z if temperature == 1.0 else z.div_(temperature), unused_ids)


def mask_(z: Float[Tensor, "*rows V"], unused_ids: Int[Tensor, " U"] | None) -> Float[Tensor, "*rows V"]:
    """Take the probability from (..., V) logits of ids without a token, in place."""
    return z if unused_ids is None else z.index_fill_(-1, unused_ids, max(NO_TOKEN, torch.finfo(z.dtype).min))


def statistics(
    z: Float[Tensor, "C V"], target_ids: Int[Tensor, " C"], with_entropy: bool
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"], Float[Tensor, " entropies"]]:
    """Log-probs of the targets, log Σ exp of all logits, and entropies (or none): (C,) or (0,), float32."""
    normalisers, entropies = [], []
    for block in blocks(z):
        block = block.float()
        normaliser = block.logsumexp(-1)
        normalisers.append(normaliser)
        if with_entropy:  # H = log Σ exp z - Σ p z
            probs = (block - normaliser[:, None]).exp_()
            entropies.append(normaliser - probs.mul_(block).sum(-1))
    total = torch.cat(normalisers)
    taken = z.gather(-1, target_ids[:, None])[:, 0].float() - total
    return taken, total, torch.cat(entropies) if with_entropy else total[:0]


def to_gradient_(
    z: Float[Tensor, "C V"],
    target_ids: Int[Tensor, " C"],
    normalisers: Float[Tensor, " C"],
    gradient: Float[Tensor, " C"],
    entropy: tuple[Float[Tensor, " C"], Float[Tensor, " C"]] | None,
) -> None:
    """Turn (C, V) logits into the gradient of the loss by them, in place.

    ∂ log p_y / ∂z_v = 1[v = y] - p_v and ∂H / ∂z_v = -p_v (log p_v + H).

    Args:
        z: (C, V).
        target_ids: (C,) y.
        normalisers: (C,) log Σ exp z.
        gradient: (C,) of the loss by log p_y.
        entropy: (C,) H and (C,) the gradient of the loss by it.
    """
    start = 0
    for block in blocks(z):
        rows = slice(start, start + len(block))
        start = rows.stop
        logprobs = block.float().sub_(normalisers[rows, None])  # the block itself where it is float32
        if entropy is None:
            factor = gradient[rows, None]
        else:
            factor = (logprobs + entropy[0][rows, None]).mul_(entropy[1][rows, None]).add_(gradient[rows, None])
        result = logprobs.exp_().mul_(-factor)
        result[torch.arange(len(block), device=z.device), target_ids[rows]] += gradient[rows]
        block.copy_(result)
        del logprobs, result  # before the next block's are made


def blocks(z: Tensor) -> tuple[Tensor, ...]:
    """Rows that are worked on together."""
    return z.split(max(1, BLOCK_BYTES.get(kind_of(z.device), PART_BYTES) // (4 * z.shape[-1])))


def chunks(length: int, size: int) -> Iterator[slice]:
    """Slices of `size` that cover `length`."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
