"""Hidden states to log-probabilities of the taken tokens, without the (B, S, V) tensor.

Only positions that predict a response token reach the head. Where their logits fit into a share of the device's memory,
they are held for the backward pass; else they are made in chunks, and made anew in the backward pass, so that at most
one chunk of them is alive. A head that is no plain linear layer (LoRA, a weight of tensor parallelism) is called as the
module it is; of a plain one, `linear_head.py` makes the gradients. Log-probs are in nats and float32, whatever the
compute dtype.

Axes: M response tokens, V vocabulary, d width.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_rlhf.engine.linear_head import LinearLogprobs, LinearNLL, compute_dtype, is_plain_linear, mask_, parameters
from lit_rlhf.engine.memory import total_memory
from lit_rlhf.engine.rounding import add_rows, drop_rows, missing_rows
from lit_rlhf.engine.shapes import check_shapes

# The float32 logits of one chunk may take this share of the device's memory, within these bounds.
CHUNK_SHARE, CHUNK_LEAST, CHUNK_MOST = 1 / 64, 64 * 2**20, 2**29


@check_shapes
def token_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "M d"],
    target_ids: Int[Tensor, " M"],
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_bytes: int | None = None,
    unused_ids: Int[Tensor, " U"] | None = None,
) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"] | None]:
    """Log π(y_t | x, y_<t) of each taken token, π being the softmax of logits / temperature.

    Args:
        head: maps hidden states to logits over the vocabulary.
        hidden: (M, d) hidden states that predict the taken tokens.
        target_ids: (M,) the taken tokens.
        temperature: the logits are divided by it, as in sampling: what is trained is what is sampled from.
        with_entropy: also return the entropy of each next-token distribution.
        chunk_bytes: memory that the float32 logits of one chunk may take; None = a share of the device's.
        unused_ids: (U,) ids without a token, which have no probability; None = there is none.

    Returns:
        (M,) float32 log-probs, and (M,) float32 entropies or None.
    """
    if hidden.shape[0] == 0:
        empty = head(hidden).float().sum(-1)  # keeps the graph: a rank without response tokens joins the backward pass
        return empty, (empty if with_entropy else None)
    size = chunk_size(head, hidden.device, chunk_bytes)
    more = missing_rows(len(target_ids), compute_dtype(hidden), hidden.device)
    hidden, target_ids = add_rows(hidden, more), add_rows(target_ids, more)

    def chunk_logprobs(hidden: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        logprobs = torch.log_softmax(mask_(head(hidden).float() / temperature, unused_ids), dim=-1)
        taken = logprobs.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)
        return taken, (-(logprobs.exp() * logprobs).sum(-1) if with_entropy else None)

    if is_plain_linear(head):
        settings = temperature, with_entropy, size, unused_ids
        taken, entropy = LinearLogprobs.apply(hidden, *parameters(head), target_ids, *settings)
    elif hidden.shape[0] <= size:
        taken, entropy = chunk_logprobs(hidden, target_ids)
    else:
        parts = [
            checkpoint(chunk_logprobs, h, t, use_reentrant=False)
            for h, t in zip(hidden.split(size), target_ids.split(size), strict=True)
        ]
        taken = torch.cat([part[0] for part in parts])
        entropy = torch.cat([part[1] for part in parts]) if with_entropy else None
    return drop_rows(taken, more), (drop_rows(entropy, more) if with_entropy else None)


@check_shapes
def nll_sum(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "M d"],
    target_ids: Int[Tensor, " M"],
    chunk_bytes: int | None = None,
    unused_ids: Int[Tensor, " U"] | None = None,
) -> Float[Tensor, ""]:
    """-Σ log π(y_t | x, y_<t) over all taken tokens: () float32.

    With several chunks the gradient is made in the forward pass, while a chunk's logits are there: three products of
    matrices instead of four. That needs every token to weigh the same in the loss, hence a sum. Args as above.
    """
    size = chunk_size(head, hidden.device, chunk_bytes)
    if is_plain_linear(head) and hidden.shape[0] > size and torch.is_grad_enabled():
        count = len(target_ids)
        more = missing_rows(count, compute_dtype(hidden), hidden.device)
        filled = add_rows(hidden, more), *parameters(head), add_rows(target_ids, more)
        total: Tensor = LinearNLL.apply(*filled, count, size, unused_ids)
        return total
    return -token_logprobs(head, hidden, target_ids, chunk_bytes=chunk_bytes, unused_ids=unused_ids)[0].sum()


def chunk_size(head: Callable[[Tensor], Tensor], device: torch.device, chunk_bytes: int | None = None) -> int:
    """C, how many tokens' logits may be alive at once; the same on a device whatever else it holds."""
    if chunk_bytes is None:
        chunk_bytes = int(min(max(total_memory(device) * CHUNK_SHARE, CHUNK_LEAST), CHUNK_MOST))
    return max(1, chunk_bytes // (4 * vocabulary_size(head)))


def vocabulary_size(head: Callable[[Tensor], Tensor]) -> int:
    """V, the width of the logits."""
    size = getattr(head, "out_features", None)
    if size is None:
        raise TypeError(f"the output head {type(head).__name__} has no out_features; a linear layer was expected")
    return int(size)
