"""Supervised fine-tuning: imitate demonstrations."""

from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.load_balance import find_load_balance
from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.data.batches import SFTBatch
from lit_rlhf.losses import load_balancing_loss, nll
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import load_policy_with_tokenizer
from lit_rlhf.rollout.play import GenerationSettings


class SFT(AlignmentModule):
    """Supervised fine-tuning: minimise -Σ log π(y_t | x, y_<t) over the response tokens.

    Ouyang et al. 2022, step 1, https://arxiv.org/abs/2203.02155. Where the config of a mixture of experts asks for a
    load-balancing loss, the loss has that term, as in transformers; it weighs micro-batches by their response tokens.

    Args:
        policy: folder or hub name of a Hugging Face causal LM, or of an adapter of PEFT; "demo" is the embedded one.
        from_scratch: start from random weights in the shape of that model's config.
        lora: train an adapter on frozen weights; null = all weights, or the adapter in policy's folder.
        merge_start: fold the adapter in policy's folder into its base before anything else.
        trust_remote_code: run model code that comes with the weights.
        generation: how `predict` and the sample tables write completions.
        kwargs: the optimiser's settings, see `AlignmentModule`.
    """

    learns_from = "sft"
    balances_experts = True

    def __init__(
        self,
        policy: str = "demo",
        from_scratch: bool = False,
        lora: LoRA | None = None,
        merge_start: bool = False,
        trust_remote_code: bool = False,
        generation: GenerationSettings = GenerationSettings(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.policy, self.tokenizer = load_policy_with_tokenizer(
            policy, from_scratch, trust_remote_code, lora, merge_start, self.frozen_dtype
        )
        self.generation = generation
        self.load_balance = find_load_balance(self.policy, policy)
        if from_scratch:
            self.untrained = (
                "from_scratch is true, so the weights are random; to predict, set model.from_scratch: false and "
                "model.policy to the folder that a run exported, or name a checkpoint as ckpt_path"
            )

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        """One micro-batch: the negative log-likelihood of the demonstrated tokens."""
        balance, lengths = self.load_balance, batch.packed.response_lengths
        total, router_logits = self.policy.nll(batch.packed, with_router_logits=balance is not None)
        count = len(batch.packed.target_ids)
        if balance is not None:
            uneven = load_balancing_loss(torch.cat(router_logits), balance.top_k)
            total = total + balance.coef * uneven * count
            self.log_mean("train", {"load_balancing_loss": uneven.detach()}, weight=count)
        self.log_mean("train", {"loss": total.detach() / count}, weight=count)
        self.log_mean("train", {"response_length": lengths.mean()}, weight=len(lengths))
        return total / batch.denominator

    def evaluate(self, batch: SFTBatch, stage: str) -> None:
        """Log the loss, a mean over all response tokens."""
        logprobs, _ = self.policy(batch.packed)
        self.log_mean(stage, {"loss": nll(logprobs).mean()}, weight=len(logprobs))
