"""Policies of the oracle that are neural networks."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.errors import require
from lit_rlhf.oracle.tree import LogprobFn


def causal_lm(
    model: PreTrainedModel, temperature: float = 1.0, max_tokens: int = 65_536, requires_grad: bool = False
) -> LogprobFn:
    """A Hugging Face causal LM as a policy for the oracle.

    Each prefix is one row of a plain forward pass: no cache, no packing, no padding, so that it also checks those.

    Args:
        model: evaluated without dropout; a model loaded for packed batches gets its plain attention for the duration.
        temperature: the logits are divided by it; more than 0.
        max_tokens: of prompt and prefix tokens in one forward pass.
        requires_grad: keep the graph of the whole tree, for exact gradients on very small ones.

    Returns:
        Maps prompt_ids (P,), P >= 1, and prefixes (n, t) to (n, V) float64 log-probs of the next token.
    """
    if not hasattr(model, "config"):
        kind = type(model).__name__
        raise ValueError(
            f"causal_lm takes a Hugging Face causal LM, not a {kind}; of a DPO or PPO module, policy.model"
        )
    require(0 < temperature < math.inf, "temperature", temperature, "more than 0 and finite")
    vocab_size = model.config.get_text_config().vocab_size

    def logprob_fn(prompt_ids: Tensor, prefixes: Tensor) -> Tensor:
        if not len(prompt_ids) or not 0 <= prompt_ids.min() <= prompt_ids.max() < vocab_size:
            raise ValueError(
                f"a model's prompt must be one or more token ids, 0 to {vocab_size - 1}; got {prompt_ids.tolist()}"
            )
        rows = torch.cat([prompt_ids.cpu().expand(len(prefixes), -1), prefixes], dim=1)
        training = [module for module in model.modules() if module.training]
        implementation = model.config._attn_implementation
        try:
            model.eval()
            if implementation == IMPLEMENTATION:
                model.set_attn_implementation("eager")  # every model has it; it keeps soft caps and sinks
            with torch.set_grad_enabled(requires_grad):
                logprobs = []
                for chunk in rows.split(max(1, max_tokens // rows.shape[1])):
                    logits = model(input_ids=chunk.to(model.device), use_cache=False, logits_to_keep=1).logits[:, -1]
                    logprobs.append(torch.log_softmax(logits.cpu().double() / temperature, dim=-1))
        finally:
            if implementation == IMPLEMENTATION:
                model.set_attn_implementation(implementation)
            for module in training:
                module.training = True
        return torch.cat(logprobs)

    return logprob_fn
