"""Proximal policy optimisation with a KL penalty: play, score, estimate advantages, improve."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.advantages import Moments, gae, make_row_mask, masked_moments, pad_rows, token_rewards, unpad_rows, whiten
from lit_rlhf.batches import PromptBatch, RolloutBatch
from lit_rlhf.errors import UserError
from lit_rlhf.experience import Experience, pack_episodes, plan_minibatches
from lit_rlhf.kl import AdaptiveKL, FixedKL, k1, k3
from lit_rlhf.losses import clip_fraction, ppo_policy_loss, value_loss
from lit_rlhf.module import AlignmentModule
from lit_rlhf.packing import Example, PackedBatch, pack
from lit_rlhf.policy import frozen_copy, load_policy, load_scorer, load_tokenizer, scorer_from_policy
from lit_rlhf.rollout import GenerationSettings, Play, complete, completion_rows, episode_rows
from token_mdp import Episode, FinishReason


class PPO(AlignmentModule):
    """Proximal policy optimisation: maximise E[r(x, y)] - β KL(π‖π_ref).

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for language models Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, and Ouyang et al. 2022, https://arxiv.org/abs/2203.02155

    One Lightning epoch is one iteration: the policy plays `rollout_size` episodes of the data module, they are scored
    once, and `ppo_epochs` passes over them follow. `trainer.max_epochs` counts iterations.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; also the reference.
        critic: folder or hub name of a reward model to start the critic from; None = the policy's trunk, fresh head.
        kl: the coefficient of the KL penalty in the reward, fixed or adaptive; None = FixedKL(0.05).
        clip_range: ε of the clipped policy ratio.
        value_clip_range: the critic may move this far from its value at rollout; null = no clipping.
        value_coef: weight of the critic's loss.
        entropy_coef: weight of the entropy bonus.
        gamma: discount; 1 in RLHF.
        gae_lambda: λ of generalised advantage estimation.
        ppo_epochs: passes over a rollout.
        num_minibatches: optimiser steps per pass; with accumulate_grad_batches, each takes several micro-batches.
        missing_end_penalty: subtracted from the score of a response that the length limit ended.
        temperature: divides the logits in sampling and in training alike.
        critic_learning_rate: peak rate of the critic; null = learning_rate.
        seed: of sampling and of minibatches.
        trust_remote_code: run model code that comes with the weights.
        generation: how `predict` and the sample tables write completions.
        kwargs: the optimiser's settings, see `AlignmentModule`.
    """

    def __init__(
        self,
        policy: str = "demo",
        critic: str | None = None,
        kl: FixedKL | AdaptiveKL | None = None,
        clip_range: float = 0.2,
        value_clip_range: float | None = 0.2,
        value_coef: float = 0.1,
        entropy_coef: float = 0.0,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        ppo_epochs: int = 4,
        num_minibatches: int = 4,
        missing_end_penalty: float = 0.0,
        temperature: float = 1.0,
        critic_learning_rate: float | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
        generation: GenerationSettings = GenerationSettings(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if temperature <= 0:
            raise UserError(f"temperature ({temperature}) must be more than 0: PPO learns from sampled responses")
        if min(ppo_epochs, num_minibatches) < 1:
            raise UserError(f"ppo_epochs ({ppo_epochs}) and num_minibatches ({num_minibatches}) must be 1 or more")
        self.policy = load_policy(policy, trust_remote_code=trust_remote_code)
        self.tokenizer = load_tokenizer(policy, self.policy.model.config, trust_remote_code)
        self.frozen["reference"] = frozen_copy(self.policy)
        self.critic = scorer_from_policy(self.policy) if critic is None else load_scorer(critic)
        self.kl = FixedKL() if kl is None else kl
        self.clip_range = clip_range
        self.value_clip_range = value_clip_range
        self.value_coef = value_coef
        self.entropy_coef = entropy_coef
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.ppo_epochs = ppo_epochs
        self.num_minibatches = num_minibatches
        self.missing_end_penalty = missing_end_penalty
        self.temperature = temperature
        self.critic_learning_rate = critic_learning_rate
        self.seed = seed
        self.generation = generation
        self.rollout_metrics: dict[str, float] = {}

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> Tensor:
        """One micro-batch of the current rollout."""
        logprobs, entropy = self.policy(batch.packed, self.temperature, with_entropy=self.entropy_coef != 0)
        values = self.critic(batch.packed, batch.packed.predictors)
        policy_losses = ppo_policy_loss(logprobs, batch.old_logprobs, batch.advantages, self.clip_range)
        value_losses = value_loss(values, batch.old_values, batch.returns, self.value_clip_range)
        losses = policy_losses + self.value_coef * value_losses
        metrics = {
            "loss": losses,
            "ppo/policy_loss": policy_losses,
            "ppo/value_loss": value_losses,
            "ppo/approx_kl": k3(batch.old_logprobs, logprobs),
            "ppo/clip_fraction": clip_fraction(logprobs, batch.old_logprobs, self.clip_range),
            "ppo/ratio": (logprobs - batch.old_logprobs).exp(),
        }
        if entropy is not None:
            losses = losses - self.entropy_coef * entropy
            metrics["ppo/entropy"] = entropy
        self.log_mean("train", {name: x.detach().mean() for name, x in metrics.items()}, weight=len(losses))
        return losses.sum() / batch.denominator

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Play held-out prompts."""
        self.evaluate(batch, "val")

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """As validation, on the test prompts."""
        self.evaluate(batch, "test")

    def evaluate(self, prompts: PromptBatch, stage: str) -> None:
        """Log score, KL to the reference and length of one episode per prompt."""
        episodes = self.play_prompts(prompts)
        packed = pack([Example(e.prompt_ids, (e.response_ids,)) for e in episodes])
        old_logprobs, ref_logprobs, _ = self.forward_rollout(packed)
        metrics = {
            "score": torch.tensor(np.mean([e.reward for e in episodes])),
            "kl": packed.sum_by_sequence(k1(old_logprobs, ref_logprobs)).mean(),
            **episode_means(episodes),
        }
        self.log_mean(stage, {name: value.float() for name, value in metrics.items()}, weight=len(episodes))

    def play_prompts(self, prompts: PromptBatch) -> list[Episode]:
        """One scored episode per prompt, within the limits of training."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        settings = replace(self.rollout_settings, max_new_tokens=data.max_new_tokens, num_slots=data.num_slots)
        return complete(self.policy, self.tokenizer, prompts, settings, data.reward_fn)

    @property
    def rollout_settings(self) -> GenerationSettings:
        """The policy as it is trained: the whole distribution at this temperature."""
        return GenerationSettings(temperature=self.temperature, seed=self.seed)

    def experience(self, played: Play) -> Experience:
        """Score a rollout once: log-probs, KL, token rewards, values, advantages.

        The forward passes run on the micro-batches of the first pass, as they will be trained on: the first ratio of
        new to old policy is exactly 1.
        """
        episodes, ranks = played.episodes, self.trainer.world_size
        prompt_ids, response_ids = [e.prompt_ids for e in episodes], [e.response_ids for e in episodes]
        rng = np.random.default_rng([self.seed, self.trainer.current_epoch, self.global_rank])
        accumulation = self.trainer.accumulate_grad_batches
        plan = plan_minibatches(len(episodes), self.ppo_epochs, self.num_minibatches, accumulation, rng)
        first_pass = [rows for step in plan[: self.num_minibatches] for rows in step]
        order = np.concatenate(first_pass)

        parts = [self.forward_rollout(pack_episodes(prompt_ids, response_ids, rows)) for rows in first_pass]
        old_logprobs, ref_logprobs, old_values = (torch.cat(column) for column in zip(*parts, strict=True))

        lengths = torch.tensor([len(response_ids[i]) for i in order])
        row_mask = make_row_mask(torch.arange(len(order)).repeat_interleave(lengths), len(order))
        kl = pad_rows(k1(old_logprobs, ref_logprobs), row_mask)
        rewards = token_rewards(self.scores(episodes)[order], kl, self.kl.kl_coef, row_mask)
        values = pad_rows(old_values, row_mask)
        advantages, returns = (
            unpad_rows(rows, row_mask) for rows in gae(rewards, values, row_mask, self.gamma, self.gae_lambda)
        )
        moments = Moments(*self.sum_over_ranks(torch.stack(masked_moments(advantages))))
        columns = {
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "old_values": old_values,
            "advantages": whiten(advantages, moments=moments),
            "returns": returns,
        }
        sampled = torch.from_numpy(np.concatenate([played.sampled_logprobs[i] for i in order]))
        self.rollout_metrics = self.mean_over_ranks(
            {
                "rollout/score": torch.tensor(np.mean([e.reward for e in episodes])),
                "rollout/kl": kl.sum(1).mean(),
                "rollout/sampler_gap": (sampled - old_logprobs).abs().mean(),
                "ppo/explained_variance": 1 - (returns - old_values).var() / returns.var().clamp(min=1e-8),
                **{f"rollout/{name}": value for name, value in episode_means(episodes).items()},
            }
        ) | {"rollout/kl_coef": self.kl.kl_coef}
        self.kl.update(self.rollout_metrics["rollout/kl"], num_episodes=len(episodes) * ranks)

        row_of = np.argsort(order)
        split = {name: column.split(lengths.tolist()) for name, column in columns.items()}
        tokens = {name: [parts[row] for row in row_of] for name, parts in split.items()}
        counts = torch.tensor([float(sum(len(response_ids[i]) for i in np.concatenate(step))) for step in plan])
        return Experience(prompt_ids, response_ids, tokens, plan, self.sum_over_ranks(counts).tolist())

    def scores(self, episodes: list[Episode]) -> Tensor:
        """(B,) rewards, less the penalty where the length limit and no stop token ended the response."""
        cut = torch.tensor([e.finish_reason is FinishReason.LENGTH for e in episodes])
        return torch.tensor([e.reward for e in episodes], dtype=torch.float32) - self.missing_end_penalty * cut

    @torch.no_grad()
    def forward_rollout(self, packed: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Old log-probs, reference log-probs and values of a micro-batch, (M,) each, on the CPU."""
        batch = move_data_to_device(packed, self.device)
        with self.trainer.precision_plugin.forward_context():
            logprobs, _ = self.policy(batch, self.temperature)
            ref_logprobs, _ = self.frozen_network("reference")(batch, self.temperature)
            values = self.critic(batch, batch.predictors)
        return logprobs.cpu(), ref_logprobs.cpu(), values.cpu()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, back on the CPU."""
        return self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum").cpu()

    def mean_over_ranks(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Means of scalars over all ranks, each of which plays equally many episodes."""
        sums = self.sum_over_ranks(torch.stack([value.double() for value in metrics.values()]))
        return dict(zip(metrics, (sums / self.trainer.world_size).tolist(), strict=True))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the KL coefficient; the data module keeps prompts and rollout."""
        checkpoint["kl"] = self.kl.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the KL coefficient of the run that goes on."""
        super().on_load_checkpoint(checkpoint)
        self.kl.load_state_dict(checkpoint["kl"])

    @torch.no_grad()
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Complete each prompt."""
        return completion_rows(self.policy, self.tokenizer, batch, self.generation)

    def sample_table(self, prompts: PromptBatch) -> list[dict[str, Any]]:
        """Completions of held-out prompts with their scores."""
        episodes = self.play_prompts(prompts)
        return [
            row | {"score": episode.reward} | episode.components
            for row, episode in zip(episode_rows(self.tokenizer, episodes), episodes, strict=True)
        ]

    def exportable(self) -> PreTrainedModel:
        """The aligned causal LM."""
        return self.policy.model


def episode_means(episodes: list[Episode]) -> dict[str, Tensor]:
    """What a person asks of episodes besides their score: length, how many ended by themselves, reward components."""
    means = {
        "response_length": np.mean([len(e.response_ids) for e in episodes]),
        "eos_fraction": np.mean([e.finish_reason is FinishReason.STOP for e in episodes]),
        **{name: np.mean([e.components[name] for e in episodes]) for name in episodes[0].components},
    }
    return {name: torch.tensor(float(mean)) for name, mean in means.items()}
