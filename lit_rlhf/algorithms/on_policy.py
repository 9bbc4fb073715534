"""What on-policy algorithms share: they play episodes, score them, and are judged by held-out ones."""

from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.losses.kl import KLController, k1
from lit_rlhf.rollout.experience import episode_means
from lit_rlhf.rollout.play import GenerationSettings, complete, episode_rows
from lit_rlhf.rollout.shaping import RewardShaping
from token_mdp import Episode, FinishReason


class OnPolicyModule(AlignmentModule):
    """Base of the algorithms that learn from a `RolloutDataModule`; their reference is a frozen network."""

    kl: KLController
    shaping: RewardShaping
    temperature: float
    seed: int
    rollout_metrics: dict[str, float]  # of the rollout that is being learnt from
    stopped: bool  # whether the rest of this iteration's minibatches go unused

    @property
    def rollout_settings(self) -> GenerationSettings:
        """The policy as it is trained: the whole distribution at this temperature."""
        return GenerationSettings(temperature=self.temperature, seed=self.seed)

    def scores(self, episodes: list[Episode], lengths: Tensor) -> Tensor:
        """(B,) rewards of a rollout, shaped."""
        rewards = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
        cut = torch.tensor([e.finish_reason is FinishReason.LENGTH for e in episodes])
        self.shaping.observe(self.moments_over_ranks(rewards))
        return self.shaping.scores(rewards, lengths, cut)

    def on_train_epoch_end(self) -> None:
        """Log the rollout that this iteration learnt from."""
        for name, value in self.rollout_metrics.items():
            self.log(name, value, sync_dist=True, prog_bar=name in ("rollout/score", "rollout/kl"))

    def evaluate(self, prompts: PromptBatch, stage: str) -> None:
        """Log score, KL to the reference and length of one episode per held-out prompt."""
        episodes = self.play_prompts(prompts)
        batch = move_data_to_device(pack([Example(e.prompt_ids, (e.response_ids,)) for e in episodes]), self.device)
        logprobs, _ = self.policy(batch, self.temperature)
        ref_logprobs, _ = self.frozen_network("reference")(batch, self.temperature)
        kl = batch.sum_by_sequence(k1(logprobs, ref_logprobs)).mean()
        self.log_mean(stage, {"kl": kl, **episode_means(episodes)}, weight=len(episodes))

    def play_prompts(self, prompts: PromptBatch) -> list[Episode]:
        """One scored episode per prompt, within the limits of training."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        settings = replace(self.rollout_settings, max_new_tokens=data.max_new_tokens, num_slots=data.num_slots)
        return complete(self.policy, self.tokenizer, prompts, settings, data.reward_fn)

    def sample_table(self, prompts: PromptBatch) -> list[dict[str, Any]]:
        """Completions of held-out prompts with their scores."""
        episodes = self.play_prompts(prompts)
        return [
            row | {"score": episode.reward} | episode.components
            for row, episode in zip(episode_rows(self.tokenizer, episodes), episodes, strict=True)
        ]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the iteration has come to; the data module keeps prompts and rollout."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["on_policy"] = {
            "kl": self.kl.state_dict(),
            "shaping": self.shaping.state_dict(),
            "rollout_metrics": self.rollout_metrics,
            "stopped": self.stopped,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the checkpoint was taken."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["on_policy"]
        self.kl.load_state_dict(state["kl"])
        self.shaping.load_state_dict(state["shaping"])
        self.rollout_metrics, self.stopped = state["rollout_metrics"], state["stopped"]
