"""Hidden states to log-probabilities of the taken tokens, without the (B, S, V) tensor.

Only positions that predict a response token reach the head, in chunks sized by memory; a chunk's logits are recomputed
in the backward pass, so that at most one chunk of them is alive. The head is called as a module: tied weights, a bias,
LoRA and FSDP2 need no special case. Log-probabilities are in nats and float32, whatever the compute dtype.

Axes: M response tokens, C tokens of a chunk, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# The most that the float32 logits of one chunk may take.
CHUNK_BYTES = 256 * 2**20


def token_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    target_ids: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor | None]:
    """Log π(y_t | x, y_<t) of each taken token, π being the softmax of logits / temperature.

    Args:
        head: maps hidden states to logits over the vocabulary.
        hidden: (M, d) hidden states that predict the taken tokens.
        target_ids: (M,) the taken tokens.
        temperature: the logits are divided by it, as in sampling: what is trained is what is sampled from.
        with_entropy: also return the entropy of each next-token distribution.
        chunk_bytes: memory that the float32 logits of one chunk may take.

    Returns:
        (M,) float32 log-probs, and (M,) float32 entropies or None.
    """
    if hidden.shape[0] == 0:
        empty = hidden.sum(-1).float()  # keeps the graph: a rank without response tokens still joins the backward pass
        return empty, (empty if with_entropy else None)

    def chunk_logprobs(hidden: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = head(hidden).float() / temperature
        logprobs = torch.log_softmax(logits, dim=-1)
        taken = logprobs.gather(-1, target_ids.unsqueeze(-1)).squeeze(-1)
        return taken, (-(logprobs.exp() * logprobs).sum(-1) if with_entropy else None)

    size = max(1, chunk_bytes // (4 * vocabulary_size(head)))
    if hidden.shape[0] <= size:
        return chunk_logprobs(hidden, target_ids)
    parts = [
        checkpoint(chunk_logprobs, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(size), target_ids.split(size), strict=True)
    ]
    taken = torch.cat([part[0] for part in parts])
    return taken, (torch.cat([part[1] for part in parts]) if with_entropy else None)


def vocabulary_size(head: Callable[[Tensor], Tensor]) -> int:
    """V, the width of the logits."""
    size = getattr(head, "out_features", None)
    if size is None:
        raise TypeError(f"the output head {type(head).__name__} has no out_features; a linear layer was expected")
    return int(size)
