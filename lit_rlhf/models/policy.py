"""Hugging Face models in their roles: a causal LM as policy or reference, a one-label classifier as reward or critic.

Both take packed batches (`packing.py`) and do all their work inside `forward` (or a method registered like it), so that
FSDP2 and DDP see every parameter where they expect it. `loading.py` makes them from folders.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lit_rlhf.engine.attention import as_mask
from lit_rlhf.engine.divergence import Divergence, Predictions, divergences, learning
from lit_rlhf.engine.early_backward import with_gradients
from lit_rlhf.engine.layout import Layout
from lit_rlhf.engine.linear_head import mask_
from lit_rlhf.engine.logprobs import nll_sum, token_logprobs
from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.models.network import AdaptedHead, Network, ScalarHead, scalar
from lit_rlhf.models.trunk import (
    CACHES,
    arguments_of,
    backbone,
    padded_outputs,
)

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ResultT = TypeVar("ResultT")
# How rows in padded batches share a model's own cache: left-padded to one length, with a mask at each step or, where a
# state holds what was read, at the first alone; or each row by itself. None = there is no cache that gives its numbers.
Caching = Literal["together", "by state", "alone"] | None


class Policy(Network):
    """A causal LM that gives the log-probs of response tokens; also the frozen reference.

    Its distribution is over the tokens that the tokenizer has: ids without one are left out of sampling and log-probs
    alike, whoever learns (see `tokens.keep_to_tokens`).

    Other roles may stand on its trunk: with other adapters on it gives their log-probs, and through a scalar head their
    scores. They are called through this network, which strategies wrap as a whole (`roles.py`).
    """

    unused_ids: Tensor | None  # (U,) ids without a token

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.scale = 1.0  # of the logits: Cohere and Granite multiply them by a number
        self.cap = cap_of(model.config.get_text_config())  # of the logits; None = they have none
        self.caching: Caching = "together"  # how its own cache serves padded batches
        self.heads = nn.ModuleDict()  # scalar heads of other roles on this trunk, by role
        self.register_buffer("unused_ids", None, persistent=False)
        self.kept: list[tuple[Any, Tensor]] | None = None  # what was read last, and its hidden states

    @contextmanager
    def shared_pass(self) -> Iterator[None]:
        """While inside, roles that read a batch by the same adapters, one right after the other, share a pass."""
        self.kept = []
        try:
            yield
        finally:
            self.kept = None

    def hidden_states(self, batch: PackedBatch, adapters: Sequence[str] | None) -> Tensor:
        """(N, d) last hidden states, with these adapters on."""
        self.switch(adapters)
        asked = id(batch), None if self.adapters is None else self.adapters.on
        for read, hidden in self.kept or ():
            if read == asked:
                return hidden
        hidden = self.read(batch, learns=adapters is None or tuple(adapters) == self.active)
        if self.kept is not None:
            self.kept = [(asked, hidden)]
        return hidden

    def forward(
        self,
        batch: PackedBatch,
        temperature: float = 1.0,
        with_entropy: bool = False,
        adapters: Sequence[str] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(M,) float32 log-probs of the response tokens, and (M,) entropies if asked for.

        Args:
            batch: packed prompts and responses.
            temperature: divides the logits.
            with_entropy: also return entropies.
            adapters: that are on; None = the policy's.
        """
        hidden = self.hidden_states(batch, adapters)
        taken = self.scaled(hidden[batch.predictors]), batch.target_ids
        return token_logprobs(self.head, *taken, temperature, with_entropy, unused_ids=self.unused_ids)

    def score(self, batch: PackedBatch, nodes: Tensor, role: str) -> Tensor:
        """Scores at each of the given nodes by another role's head, its adapters on: (len(nodes),) float32."""
        head = cast(ScalarHead, self.heads[role])
        return cast(Tensor, head(self.hidden_states(batch, head.adapters)[nodes]))

    def nll(self, batch: PackedBatch) -> Tensor:
        """() float32 -Σ log π over all response tokens, for losses that weigh them alike."""
        self.switch()
        states = self.scaled(self.read(batch)[batch.predictors])
        return nll_sum(self.head, states, batch.target_ids, unused_ids=self.unused_ids)

    def divergence(
        self,
        batch: PackedBatch,
        teacher: "Policy",
        divergence: Divergence,
        temperature: float = 1.0,
        weights: Tensor | None = None,
    ) -> Tensor:
        """(M,) float32 divergences from a teacher's next-token distributions, each of the same share in the loss.

        Args:
            batch: packed prompts and responses.
            teacher: of the same tokens.
            divergence: see `engine/divergence.py`, as the whole.
            temperature: divides the logits of both.
            weights: (M,) of the tokens; None = 1 each.
        """
        self.switch()
        mine = Predictions(self.head, self.scaled(self.read(batch)[batch.predictors]), self.unused_ids)
        values, gradients = teacher.beside(batch, lambda t: divergences(mine, t, divergence, temperature, weights))
        if not gradients:
            return values
        return with_gradients(values, torch.ones((), device=values.device), gradients, learning(mine))

    def beside(self, batch: PackedBatch, what: Callable[[Predictions], ResultT]) -> ResultT:
        """What is made of this network's predictions of the response tokens, without a gradient by it."""
        self.switch()
        with torch.no_grad():
            hidden = self.scaled(self.read(batch, learns=False)[batch.predictors])
        return what(Predictions(self.head, hidden, self.unused_ids))

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
        self.switch()
        hidden = backbone(self.model)(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask if layout is None else as_mask(layout),
            use_cache=True,
            **{self.cache_argument: cache},
        ).last_hidden_state
        return self.logits(hidden[:, -1] if nodes is None else hidden[0, nodes])

    def decode_padded(self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Next-token logits from the model's own cache.

        Args:
            input_ids: (B, T) left-padded prompts, or (B, 1) newest token of each row.
            attention_mask: (B, L) bool, True = a real token, of those in the cache and these.
            cache: of the call before; None for prompts.

        Returns:
            (B, V) logits, and the cache for the next call.
        """
        self.switch()
        name, taken = self.cache_argument, arguments_of(self.model)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        given = {"input_ids": input_ids, "position_ids": positions}
        if cache is None or self.caching == "together":
            given["attention_mask"] = attention_mask.long()
        outputs = backbone(self.model)(
            **{key: value for key, value in given.items() if key in taken},
            use_cache=True,
            **({} if cache is None else {name: cache}),
        )
        kept = [outputs[key] for key in CACHES if outputs.get(key) is not None]
        if not kept:
            raise LookupError("it hands out no cache")
        return self.logits(outputs.last_hidden_state[:, -1]), kept[0]

    def recompute(self, input_ids: Tensor, layout: Layout, nodes: Tensor) -> Tensor:
        """(B, V) next-token logits at these nodes of a packed row, without any cache."""
        self.switch()
        return self.logits(padded_outputs(self.model, input_ids, layout)[0][nodes])

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, d) to (B, V), as they are sampled from."""
        return mask_(self.head(self.scaled(hidden)), self.unused_ids)

    def scaled(self, hidden: Tensor) -> Tensor:
        """Hidden states of which the head makes logits in their scale."""
        return hidden if self.scale == 1.0 else hidden * self.scale

    @cached_property
    def cache_argument(self) -> str:
        """What this model calls its key-value cache."""
        for name in CACHES:
            if name in arguments_of(self.model):
                return name
        raise LookupError("it keeps no cache")

    @property
    def head(self) -> Any:
        """Scaled hidden states to logits."""
        linear: Any = self.model.get_output_embeddings()
        if self.adapters is not None and hasattr(linear, "base_layer"):
            on = [name for name in (self.active if self.adapters.on is None else self.adapters.on) if name in linear.r]
            linear = AdaptedHead(linear, self.adapters) if on else linear.base_layer
        return linear if self.cap is None else SoftCappedHead(linear, self.cap)

    @property
    def vocabulary_size(self) -> int:
        """V, the width of the logits: not always `len(tokenizer)`."""
        return int(self.head.out_features)


def cap_of(config: PretrainedConfig) -> float | None:
    """Of the logits, by the config: Gemma's `final_logit_softcapping`, RecurrentGemma's `logits_soft_cap`, xLSTM's."""
    for name, value in vars(config).items():
        if "logit" in name and "cap" in name and not ("attn" in name or "router" in name):
            return cast(float | None, value)
    return None


class SoftCappedHead:
    """Hidden states to softcap tanh(logits / softcap), as in Gemma 2; no module, so that no weight is listed twice."""

    def __init__(self, linear: nn.Module, softcap: float) -> None:
        self.linear, self.softcap = linear, softcap
        self.out_features = linear.out_features

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., d) to (..., V)."""
        return self.softcap * torch.tanh(self.linear(hidden) / self.softcap)


class Scorer(Network):
    """A classifier with one label, read at last tokens (a reward model), at every state (a critic) or at step ends."""

    def __init__(self, model: PreTrainedModel, fresh_head: bool = False) -> None:
        super().__init__(model)
        self.fresh_head = fresh_head  # just drawn: its scores mean nothing yet

    def forward(self, batch: PackedBatch, nodes: Tensor) -> Tensor:
        """Score at each of the given nodes: (len(nodes),) float32."""
        self.switch()
        hidden = self.read(batch)
        return scalar(cast(nn.Linear, self.model.score), hidden[nodes]) + self.bias

    @property
    def bias(self) -> float:
        """Added to the head's scores; in the config, since the head of transformers' classifiers has no bias."""
        return float(getattr(self.model.config, "score_bias", 0.0))

    @property
    def step_separator(self) -> str | None:
        """What stands behind the steps that a process reward model scores; None where its config does not say."""
        return getattr(self.model.config, "step_separator", None)


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


def frozen_copy(policy: Policy, dtype: torch.dtype | None = None) -> Policy:
    """The reference: a copy of the policy as it is in memory, without gradients, in eval mode for good.

    Args:
        policy: as it is.
        dtype: of its weights; None = those of the policy.
    """
    cast, shared = {}, policy.uncut is not None
    if dtype is not None or shared:  # what is there already is not copied as it is first; what will be cut, not at all
        cast = {id(p): nn.Parameter(p.detach().to(dtype or p.dtype, copy=not shared)) for p in policy.parameters()}
    copied = copy.deepcopy(policy, cast)
    if shared and dtype is not None:
        copied.uncut = dtype
    return freeze(copied)


def merged_copy(policy: Policy) -> Policy:
    """The policy without adapters, in weights of its own, those that are on folded in."""
    copied = freeze(copy.deepcopy(policy))
    assert copied.adapters is not None
    copied.adapters.merge(copied.active)
    copied.adapters = None
    return copied


def freeze(module: ModuleT) -> ModuleT:
    """Switch off gradients and training mode."""
    module.requires_grad_(False)
    return module.eval()
