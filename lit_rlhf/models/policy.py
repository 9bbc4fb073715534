"""Hugging Face models in their roles: a causal LM as policy or reference, a one-label classifier as reward or critic.

Both take packed batches (`packing.py`) and do all their work inside `forward` (or a method registered like it), so that
FSDP2 and DDP see every parameter where they expect it. `loading.py` makes them from folders.
"""

import copy
import inspect
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.engine.logprobs import mask_, nll_sum, token_logprobs
from lit_rlhf.engine.packing import Layout, PackedBatch

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Policy(nn.Module):
    """A causal LM that gives the log-probs of response tokens; also the frozen reference.

    Its distribution is over the tokens that the tokenizer has: ids without one are left out of sampling and log-probs
    alike, whoever learns (see `tokens.keep_to_tokens`).
    """

    unused_ids: Tensor | None  # (U,) ids without a token

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("unused_ids", None, persistent=False)

    def forward(
        self, batch: PackedBatch, temperature: float = 1.0, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(M,) float32 log-probs of the response tokens, and (M,) entropies if asked for."""
        hidden = packed_hidden_states(self.model, batch.input_ids, batch.position_ids, batch.layout)
        taken = hidden[batch.predictors], batch.target_ids
        return token_logprobs(self.head, *taken, temperature, with_entropy, unused_ids=self.unused_ids)

    def nll(self, batch: PackedBatch) -> Tensor:
        """() float32 -Σ log π over all response tokens of the batch, for losses that weigh them alike."""
        hidden = packed_hidden_states(self.model, batch.input_ids, batch.position_ids, batch.layout)
        return nll_sum(self.head, hidden[batch.predictors], batch.target_ids, unused_ids=self.unused_ids)

    def decode(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cache: Any,
        attention_mask: Tensor | None = None,
        layout: Layout | None = None,
        nodes: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits from the slot cache: one new token per row, or whole prompts packed into one row.

        Args:
            input_ids: (B, 1) newest token of each row, or (1, N) packed prompts.
            position_ids: likewise.
            cache: the slot cache, which knows where the new keys and values go.
            attention_mask: (B, 1, 1, L) bool, True = a cached key of this row; None for packed prompts.
            layout: of the packed prompts.
            nodes: of the packed prompts, the last node of each.

        Returns:
            (B, V) logits.
        """
        if layout is not None and not runs_packed(self.model):  # without the cache, which only packed rows know
            return mask_(self.head(padded_hidden_states(self.model, input_ids[0], layout)[nodes]), self.unused_ids)
        hidden = backbone(self.model)(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=True,
            layout=layout,
            **{self.cache_argument: cache},
        ).last_hidden_state
        hidden = hidden[:, -1] if nodes is None else hidden[0, nodes]
        return mask_(self.head(hidden), self.unused_ids)

    @cached_property
    def cache_argument(self) -> str:
        """What this model calls its key-value cache.

        Transformers renamed `past_key_values` to `cache` in release 5.24, and warns of the old name; code that comes
        with weights may go on with it.
        """
        arguments = inspect.signature(type(backbone(self.model)).forward).parameters
        return "cache" if "cache" in arguments else "past_key_values"

    @property
    def head(self) -> Any:
        """Hidden states to logits."""
        linear = self.model.get_output_embeddings()
        softcap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return linear if softcap is None else SoftCappedHead(linear, softcap)

    @property
    def vocabulary_size(self) -> int:
        """V, the width of the logits: not always `len(tokenizer)`."""
        return int(self.head.out_features)


class SoftCappedHead:
    """Hidden states to softcap tanh(logits / softcap), as in Gemma 2; no module, so that no weight is listed twice."""

    def __init__(self, linear: nn.Module, softcap: float) -> None:
        self.linear, self.softcap = linear, softcap
        self.out_features = linear.out_features

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., d) to (..., V)."""
        return self.softcap * torch.tanh(self.linear(hidden) / self.softcap)


class Scorer(nn.Module):
    """A sequence classifier with one label: a reward model (read at last tokens) or a critic (read at every state)."""

    def __init__(self, model: PreTrainedModel, fresh_head: bool = False) -> None:
        super().__init__()
        self.model = model
        self.fresh_head = fresh_head  # just drawn: its scores mean nothing yet

    def forward(self, batch: PackedBatch, nodes: Tensor) -> Tensor:
        """Score at each of the given nodes: (len(nodes),) float32."""
        hidden = packed_hidden_states(self.model, batch.input_ids, batch.position_ids, batch.layout)
        return cast(Tensor, self.model.score(hidden[nodes]).squeeze(-1).float()) + self.bias  # type: ignore[operator]

    @property
    def bias(self) -> float:
        """Added to the head's scores; in the config, since the head of transformers' classifiers has no bias."""
        return float(getattr(self.model.config, "score_bias", 0.0))


def packed_hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """(N, d) last hidden states of a packed row."""
    if not runs_packed(model):
        return padded_hidden_states(model, input_ids, layout)
    outputs = backbone(model)(
        input_ids=input_ids.unsqueeze(0), position_ids=position_ids.unsqueeze(0), layout=layout, use_cache=False
    )
    return cast(Tensor, outputs.last_hidden_state[0])


def padded_hidden_states(model: PreTrainedModel, input_ids: Tensor, layout: Layout) -> Tensor:
    """(N, d) as `packed_hidden_states`, by the model's own attention on right-padded batches, one for each bucket.

    No real token sees the padding on its right, since attention is causal. A shared prompt is computed with each of its
    responses; all give the same, so the states of one of them serve.
    """
    rows = [backbone(model)(input_ids=input_ids[cells], use_cache=False) for cells in layout.buckets]
    return torch.cat([row.last_hidden_state.flatten(0, 1) for row in rows])[layout.source]


def runs_packed(model: PreTrainedModel) -> bool:
    """Whether this model's attention takes packed rows; else it runs in padded batches."""
    return bool(model.config._attn_implementation == IMPLEMENTATION)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head, adapters included: those of PEFT lie within its layers."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return cast(nn.Module, inner.model if inner.base_model is inner else inner.base_model)


def context_length(config: PretrainedConfig) -> int | None:
    """Positions that sequences may take; None where no limit is known.

    Past `original_max_position_embeddings`, LongRoPE (Phi-3) chooses the frequencies of every row by the longest row of
    the batch: the log-probs of a sequence would depend on its neighbours. These positions are left alone.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    limits = [getattr(text, "max_position_embeddings", None)]
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # some: by kind of layer
        if parameters.get("rope_type") == "longrope":
            limits.append(parameters["original_max_position_embeddings"])
    return min((int(limit) for limit in limits if limit is not None), default=None)


def frozen_copy(policy: Policy) -> Policy:
    """The reference: a copy of the policy as it is in memory, without gradients, in eval mode for good."""
    return freeze(copy.deepcopy(policy))


def freeze(module: ModuleT) -> ModuleT:
    """Switch off gradients and training mode."""
    module.requires_grad_(False)
    return module.eval()
