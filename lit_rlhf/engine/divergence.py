"""Divergences of two next-token distributions per token, without either (M, V) tensor.

The logits of student and teacher are there for the same chunk of tokens, and the gradient is made while they are: the
teacher's head is not needed again in the backward pass, and no logits are kept or made anew. A divergence is any
function of two (C, V) log-prob tensors.

Axes: M response tokens, C tokens of a chunk, V vocabulary, d and e widths of student and teacher.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_rlhf.engine.linear_head import chunks, compute_dtype, mask_
from lit_rlhf.engine.logprobs import chunk_size, vocabulary_size
from lit_rlhf.engine.rounding import add_rows, drop_rows, missing_rows

Divergence = Callable[[Tensor, Tensor], Tensor]


class Predictions(NamedTuple):
    """What next-token distributions are made of."""

    head: Any  # hidden states to logits
    hidden: Float[Tensor, "M d"]
    unused_ids: Tensor | None = None  # ids without a token, which have no probability

    def logprobs(self, hidden: Tensor, width: int, temperature: float) -> Float[Tensor, "C V"]:
        """Of a chunk of hidden states, over the first `width` ids; those beyond have no token with one of the two."""
        more = missing_rows(len(hidden), compute_dtype(hidden), hidden.device)
        logits = drop_rows(self.head(add_rows(hidden, more)), more).float()
        logits = mask_(logits, self.unused_ids)[:, :width]
        return torch.log_softmax(logits / temperature, dim=-1)


def divergences(
    student: Predictions,
    teacher: Predictions,
    divergence: Divergence,
    temperature: float = 1.0,
    weights: Float[Tensor, " M"] | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Float[Tensor, " M"], list[Tensor | None]]:
    """The divergence of each token, and the gradients of their weighted sum.

    Args:
        student: its hidden states and head learn.
        teacher: of the same tokens.
        divergence: of (C, V) log-probs of teacher and student, in this order; gives (C,).
        temperature: divides the logits of both.
        weights: of the tokens; None = 1 each.
        chunk_bytes: memory that the float32 logits of one of the two may take in a chunk; None = a share of the
            device's.

    Returns:
        (M,) weighted divergences without a graph; gradients by `learning(student)`, none without gradients.
    """
    learns = learning(student) if torch.is_grad_enabled() else []
    size = min(chunk_size(part.head, student.hidden.device, chunk_bytes) for part in (student, teacher))
    width = min(vocabulary_size(part.head) for part in (student, teacher))
    values, of_hidden = [], []
    sums: list[Tensor | None] = [None for _ in learns[1:]]
    for rows in chunks(len(student.hidden), size):
        with torch.no_grad():
            of_teacher = teacher.logprobs(teacher.hidden[rows], width, temperature)
        hidden = student.hidden[rows].detach().requires_grad_(bool(learns))
        value = divergence(of_teacher, student.logprobs(hidden, width, temperature))
        value = value if weights is None else value * weights[rows]
        values.append(value.detach())
        if learns:
            first, *others = torch.autograd.grad(value.sum(), [hidden, *learns[1:]], allow_unused=True)
            of_hidden.append(torch.zeros_like(hidden) if first is None else first)
            sums = [added(total, gradient) for total, gradient in zip(sums, others, strict=True)]
    if not values:
        return student.hidden.new_zeros(0, dtype=torch.float32), [None for _ in learns]
    gradients = [torch.cat(of_hidden), *sums] if learns else []
    return torch.cat(values), gradients


def added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """A sum over chunks, in float32 beyond the first."""
    if total is None or gradient is None:
        return gradient if total is None else total
    return total.float().add_(gradient)


def learning(predictions: Predictions) -> list[Tensor]:
    """What the gradients of a student are by: its hidden states, and the weights of its head that learn."""
    module = predictions.head
    while not isinstance(module, nn.Module):  # an adapted or a capped head stands around a layer
        module = getattr(module, "linear", None) or module.layer
    return [predictions.hidden, *(p for p in module.parameters() if p.requires_grad)]
