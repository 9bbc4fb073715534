"""Algorithms that learn from pairs by the policy's log-probs alone: no reference is loaded, held or computed."""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.preference import PreferenceModule, sequence_logprobs
from lit_rlhf.data.batches import PreferenceBatch
from lit_rlhf.models.adapters import LoRA, refuse_dropout
from lit_rlhf.models.loading import load_policy_with_tokenizer
from lit_rlhf.rollout.play import GenerationSettings


class ReferenceFreeModule(PreferenceModule):
    """Base of SimPO, CPO and ORPO, which say what a pair costs (`losses_of`) and a response is worth (`reward_of`).

    Args:
        policy: folder or hub name of the causal LM to start from.
        lora: train an adapter on frozen weights; null = all weights, or the adapter in policy's folder.
        merge_start: fold the adapter in policy's folder into its base before anything else.
        trust_remote_code: run model code that comes with the weights.
        generation: how `predict` and the sample tables write completions.
        kwargs: the optimiser's settings, see `AlignmentModule`.
    """

    def __init__(
        self,
        policy: str = "demo",
        lora: LoRA | None = None,
        merge_start: bool = False,
        trust_remote_code: bool = False,
        generation: GenerationSettings = GenerationSettings(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        refuse_dropout(lora, type(self).__name__)
        self.policy, self.tokenizer = load_policy_with_tokenizer(
            policy, False, trust_remote_code, lora, merge_start, self.frozen_dtype
        )
        self.generation = generation

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """One micro-batch: the losses of its pairs."""
        return self.pair_losses(batch, "train").sum() / batch.denominator

    def evaluate(self, batch: PreferenceBatch, stage: str) -> None:
        """Log loss, rewards and their accuracy, as means over all pairs."""
        self.pair_losses(batch, stage)

    def pair_losses(self, batch: PreferenceBatch, stage: str) -> Tensor:
        """(B,) losses of the pairs, logged."""
        logprobs, lengths = sequence_logprobs(self.policy, batch.packed), batch.packed.response_lengths.chunk(2)
        losses = self.losses_of(*logprobs, *lengths) + self.balance_term("policy", len(logprobs[0]))
        rewards = [self.reward_of(*response) for response in zip(logprobs, lengths, strict=True)]
        self.log_rewards(stage, batch, losses, logprobs, rewards)
        return losses

    def losses_of(self, chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
        """(B,) losses of pairs, from (B,) log-probs and (B,) lengths of their responses."""
        raise NotImplementedError(f"{type(self).__name__} says what a pair costs")  # pragma: no cover

    def reward_of(self, logprobs: Tensor, lengths: Tensor) -> Tensor:
        """(B,) what the loss compares of responses."""
        raise NotImplementedError(f"{type(self).__name__} says what it compares")  # pragma: no cover
