"""Proximal policy optimisation with a KL penalty: play, score, estimate advantages, improve."""

import math
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.data.batches import RolloutBatch
from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.errors import require
from lit_rlhf.losses import clip_fraction, ppo_policy_loss, value_loss
from lit_rlhf.losses.advantages import (
    explained_variance,
    gae,
    make_row_mask,
    pad_rows,
    token_rewards,
    unpad_rows,
    whiten,
)
from lit_rlhf.losses.kl import FixedKL, KLController, KLPenalty, clamped_logratio, k3
from lit_rlhf.models.loading import (
    check_same_tokens,
    load_policy_with_tokenizer,
    load_scorer,
    load_tokenizer,
    scorer_from_policy,
)
from lit_rlhf.models.policy import frozen_copy
from lit_rlhf.rollout.experience import Experience, pack_episodes, plan_minibatches, rollout_means, split_by_episode
from lit_rlhf.rollout.play import GenerationSettings, Play
from lit_rlhf.rollout.shaping import RewardShaping


class PPO(OnPolicyModule):
    """Proximal policy optimisation: maximise E[r(x, y)] - β KL(π‖π_ref).

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for language models Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, and Ouyang et al. 2022, https://arxiv.org/abs/2203.02155

    One Lightning epoch is one iteration: the policy plays `rollout_size` episodes of the data module, they are scored
    once, and `ppo_epochs` passes over them follow. `trainer.max_epochs` counts iterations.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; also the reference.
        critic: folder or hub name of a reward model to start the critic from; None = the policy's trunk, fresh head.
        kl: β, the coefficient of the KL penalty, fixed or adaptive; None = FixedKL(0.05).
        kl_penalty: whether the KL is charged in the reward or in the loss, and its estimator.
        shaping: normalisation, clipping, length and missing-end penalties of rewards; None = rewards as they come.
        clip_range: ε of the clipped policy ratio.
        value_clip_range: the critic may move this far from its value at rollout; null = no clipping.
        value_coef: weight of the critic's loss.
        entropy_coef: weight of the entropy bonus.
        gamma: discount; 1 in RLHF.
        gae_lambda: λ of generalised advantage estimation.
        ppo_epochs: passes over a rollout.
        num_minibatches: optimiser steps per pass; with accumulate_grad_batches, each takes several micro-batches.
        target_kl: end an iteration's learning before the step whose minibatch shows a mean KL per token from the
            rollout's policy, k3 over all ranks, beyond this; null = never.
        critic_warmup: first iterations in which the critic alone learns.
        temperature: divides the logits in sampling and in training alike.
        critic_learning_rate: peak rate of the critic; null = learning_rate.
        adam_eps: AdamW's epsilon; PPO's customary 1e-5 damps the steps of parameters that get hardly any gradient.
        seed: of sampling and of minibatches.
        trust_remote_code: run model code that comes with the weights.
        generation: how `predict` writes completions; the sample tables show the policy as it is trained.
        kwargs: the optimiser's settings, see `AlignmentModule`.
    """

    learns_from = "prompts"

    def __init__(
        self,
        policy: str = "demo",
        critic: str | None = None,
        kl: KLController | None = None,
        kl_penalty: KLPenalty = KLPenalty(),
        shaping: RewardShaping | None = None,
        clip_range: float = 0.2,
        value_clip_range: float | None = 0.2,
        value_coef: float = 0.1,
        entropy_coef: float = 0.0,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        ppo_epochs: int = 4,
        num_minibatches: int = 4,
        target_kl: float | None = None,
        critic_warmup: int = 0,
        temperature: float = 1.0,
        critic_learning_rate: float | None = None,
        adam_eps: float = 1e-5,
        seed: int = 0,
        trust_remote_code: bool = False,
        generation: GenerationSettings = GenerationSettings(),
        **kwargs: Any,
    ) -> None:
        super().__init__(adam_eps=adam_eps, **kwargs)
        sampled = 0 < temperature < math.inf
        require(sampled, "temperature", temperature, "more than 0 (PPO learns from sampled responses) and finite")
        require(seed >= 0, "seed", seed, "0 or more")
        require(ppo_epochs >= 1, "ppo_epochs", ppo_epochs, "1 or more")
        require(num_minibatches >= 1, "num_minibatches", num_minibatches, "1 or more")
        require(critic_warmup >= 0, "critic_warmup", critic_warmup, "0 or more")
        require(target_kl is None or target_kl > 0, "target_kl", target_kl, "more than 0, or null to take every step")
        require(0 < clip_range < math.inf, "clip_range", clip_range, "more than 0 and finite")
        clips = value_clip_range is None or 0 < value_clip_range < math.inf
        require(clips, "value_clip_range", value_clip_range, "more than 0 and finite, or null for no clipping")
        require(0 <= value_coef < math.inf, "value_coef", value_coef, "0 or more and finite")
        require(0 <= entropy_coef < math.inf, "entropy_coef", entropy_coef, "0 or more and finite")
        require(0 <= gamma <= 1, "gamma", gamma, "in [0, 1]")
        require(0 <= gae_lambda <= 1, "gae_lambda", gae_lambda, "in [0, 1]")
        require((critic_learning_rate or 0) >= 0, "critic_learning_rate", critic_learning_rate, "0 or more, or null")
        self.policy, self.tokenizer = load_policy_with_tokenizer(policy, trust_remote_code=trust_remote_code)
        self.frozen["reference"] = frozen_copy(self.policy)
        if critic is None:
            self.critic = scorer_from_policy(self.policy, trust_remote_code)
        else:
            self.critic = load_scorer(critic, trust_remote_code=trust_remote_code)
            theirs = load_tokenizer(critic, self.critic.model.config, trust_remote_code)
            check_same_tokens(self.tokenizer, theirs, f"critic {critic}")
        self.kl = FixedKL() if kl is None else kl
        self.kl_penalty = kl_penalty
        self.shaping = RewardShaping() if shaping is None else shaping
        self.clip_range = clip_range
        self.value_clip_range = value_clip_range
        self.value_coef = value_coef
        self.entropy_coef = entropy_coef
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.ppo_epochs = ppo_epochs
        self.num_minibatches = num_minibatches
        self.target_kl = target_kl
        self.critic_warmup = critic_warmup
        self.temperature = temperature
        self.critic_learning_rate = critic_learning_rate
        self.seed = seed
        self.generation = generation
        self.rollout_metrics: dict[str, float] = {}
        self.step_kl: list[Tensor] = []  # approximate KL of the optimiser step's micro-batches so far
        self.stopped = False  # by target_kl, for the rest of this iteration

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> Tensor:
        """One micro-batch of the current rollout."""
        logprobs, entropy = self.policy(batch.packed, self.temperature, with_entropy=self.entropy_coef != 0)
        values = self.critic(batch.packed, batch.packed.predictors)
        policy_losses = ppo_policy_loss(logprobs, batch.old_logprobs, batch.advantages, self.clip_range)
        value_losses = value_loss(values, batch.old_values, batch.returns, self.value_clip_range)
        approx_kl = k3(batch.old_logprobs, logprobs.detach())

        losses = policy_losses + self.value_coef * value_losses
        metrics = {
            "ppo/policy_loss": policy_losses,
            "ppo/value_loss": value_losses,
            "ppo/approx_kl": approx_kl,
            "ppo/clip_fraction": clip_fraction(logprobs, batch.old_logprobs, self.clip_range),
            "ppo/ratio": clamped_logratio(logprobs, batch.old_logprobs).exp(),
        }
        if self.kl_penalty.place == "loss":
            metrics["ppo/kl_loss"] = self.kl_penalty.loss(logprobs, batch.old_logprobs, batch.ref_logprobs)
            kl_coef = self.rollout_metrics["rollout/kl_coef"]  # self.kl has adapted to this rollout for the next one
            losses = losses + kl_coef * metrics["ppo/kl_loss"]
        if entropy is not None:
            metrics["ppo/entropy"] = entropy
            losses = losses - self.entropy_coef * entropy
        self.step_kl.append(approx_kl.sum() / batch.denominator)
        if not self.stopped:
            means = {name: x.detach().mean() for name, x in (metrics | {"loss": losses}).items()}
            self.log_mean("train", means, weight=len(losses))
        return losses.sum() / batch.denominator

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop the gradients that this step shall not use: AdamW leaves parameters without one as they are.

        All after a stop by target_kl; the policy's while the critic warms up. The steps themselves are taken as
        planned, so that schedule, validation, `max_steps` and the ranks' exchange of gradients stay in step.
        """
        if self.target_kl is not None:
            mean_kl = self.trainer.strategy.reduce(torch.stack(self.step_kl).mean(), reduce_op="mean")
            self.stopped = self.stopped or mean_kl.item() > self.target_kl
            self.log("ppo/stopped", float(self.stopped))
        self.step_kl = []
        if self.stopped:
            optimizer.zero_grad()
        elif self.warming_up:
            self.policy.zero_grad()
        if self.critic_learning_rate is not None:
            self.log("train/critic_learning_rate", optimizer.param_groups[-1]["lr"])
        super().on_before_optimizer_step(optimizer)

    @property
    def warming_up(self) -> bool:
        """Whether the critic learns alone in this iteration."""
        return self.trainer.current_epoch < self.critic_warmup

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The critic's learning rate is its own."""
        critic_rate = self.learning_rate if self.critic_learning_rate is None else self.critic_learning_rate
        return [
            *self.decay_groups(self.policy.parameters(), self.learning_rate),
            *self.decay_groups(self.critic.parameters(), critic_rate),
        ]

    def experience(self, played: Play) -> Experience:
        """Score a rollout once: log-probs, KL, token rewards, values, advantages.

        The forward passes run on the micro-batches of the first pass, as they will be trained on: the first ratio of
        new to old policy is exactly 1.
        """
        episodes = played.episodes
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
        scores = self.scores([episodes[i] for i in order], lengths)
        kl_coef = self.kl.kl_coef if self.kl_penalty.place == "reward" else 0.0
        penalty = pad_rows(self.kl_penalty.estimate(old_logprobs, ref_logprobs), row_mask)
        rewards = token_rewards(scores, penalty, kl_coef, row_mask)
        if self.shaping.whiten:
            moments = self.moments_over_ranks(unpad_rows(rewards, row_mask))
            rewards = whiten(rewards, row_mask, moments, keep_mean=True)
        values = pad_rows(old_values, row_mask)
        advantages, returns = (
            unpad_rows(rows, row_mask) for rows in gae(rewards, values, row_mask, self.gamma, self.gae_lambda)
        )
        columns = {
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "old_values": old_values,
            "advantages": whiten(advantages, moments=self.moments_over_ranks(advantages)),
            "returns": returns,
        }

        foresight = explained_variance(self.moments_over_ranks(returns - old_values), self.moments_over_ranks(returns))
        self.rollout_metrics = {
            **self.mean_over_ranks(rollout_means(played, order, scores, old_logprobs, ref_logprobs)),
            "rollout/kl_coef": self.kl.kl_coef,
            "ppo/explained_variance": foresight.item(),
        }
        if not self.warming_up:
            self.kl.update(self.rollout_metrics["rollout/kl"], len(episodes) * self.trainer.world_size)
        self.stopped, self.step_kl = False, []

        counts = torch.tensor([float(sum(len(response_ids[i]) for i in np.concatenate(step))) for step in plan])
        tokens = split_by_episode(columns, order, response_ids)
        return Experience(prompt_ids, response_ids, tokens, plan, self.sum_over_ranks(counts).tolist())

    @torch.no_grad()
    def forward_rollout(self, packed: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Old log-probs, reference log-probs and values of a micro-batch, (M,) each, on the CPU."""
        batch = move_data_to_device(packed, self.device)
        with self.trainer.precision_plugin.forward_context():
            logprobs, _ = self.policy(batch, self.temperature)
            ref_logprobs, _ = self.frozen_network("reference")(batch, self.temperature)
            values = self.critic(batch, batch.predictors)
        return logprobs.cpu(), ref_logprobs.cpu(), values.cpu()
