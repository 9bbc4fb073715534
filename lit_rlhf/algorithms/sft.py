"""Supervised fine-tuning: imitate demonstrations."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.data.batches import SFTBatch
from lit_rlhf.losses import nll
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.fingerprints import weight_files
from lit_rlhf.models.hub import resolve
from lit_rlhf.models.loading import load_policy_with_tokenizer
from lit_rlhf.rollout.play import GenerationSettings


class SFT(AlignmentModule):
    """Supervised fine-tuning: minimise -Σ log π(y_t | x, y_<t) over the response tokens.

    Ouyang et al. 2022, step 1, https://arxiv.org/abs/2203.02155.

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
        self.unread = policy if from_scratch else None  # where weights may lie that are not read
        if from_scratch:
            self.untrained = (
                "from_scratch is true, so the weights are random and only fit makes use of them: set "
                "model.from_scratch: false and model.policy to the folder that a run exported, or name a checkpoint "
                "as ckpt_path"
            )

    def on_fit_start(self) -> None:
        """Say which stored weights a run from scratch does without."""
        begins_anew = self.untrained is not None and self.trainer.ckpt_path is None
        if begins_anew and self.unread is not None and weight_files(resolve(self.unread)):
            rank_zero_info(
                f"from_scratch: the weights of {self.unread} are not read, the run starts from random ones; set "
                "model.from_scratch: false to start from them"
            )

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        """One micro-batch: the negative log-likelihood of the demonstrated tokens."""
        lengths, count = batch.packed.response_lengths, len(batch.packed.target_ids)
        total = self.policy.nll(batch.packed)
        total = total + count * self.balance_term("policy", count)
        self.log_mean("train", {"loss": total.detach() / count}, weight=count)
        self.log_mean("train", {"response_length": lengths.mean()}, weight=len(lengths))
        return total / batch.denominator

    def evaluate(self, batch: SFTBatch, stage: str) -> None:
        """Log the loss, a mean over all response tokens."""
        logprobs, _ = self.policy(batch.packed)
        self.log_mean(stage, {"loss": nll(logprobs).mean()}, weight=len(logprobs))
