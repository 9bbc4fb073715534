"""The on-policy road: play, score, charge the KL, estimate advantages, learn. A method is an estimator and a loss."""

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf.algorithms.chosen import ChosenFunction, chosen_estimator, chosen_loss
from lit_rlhf.algorithms.kl_control import FixedKL, KLController, KLPenalty
from lit_rlhf.algorithms.lightning_tools import takes_gradients_early
from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.algorithms.settings import CriticSettings, SamplingSettings, UpdateSettings
from lit_rlhf.data.batches import NoBatch, PromptBatch, RolloutBatch
from lit_rlhf.engine.early_backward import backward_early
from lit_rlhf.engine.packing import Example, PackedBatch, pack
from lit_rlhf.errors import UserError, damaged, named_by, require_alike
from lit_rlhf.losses import PolicyTokens, ScoredRollout, value_loss
from lit_rlhf.losses.advantages import explained_variance, token_rewards, whiten
from lit_rlhf.losses.kl import k1, k3
from lit_rlhf.models.adapters import LoRA, refuse_dropout
from lit_rlhf.models.loading import load_policy_with_tokenizer
from lit_rlhf.models.roles import HoldReference, OnTrunk, Reference, Values, policy_parameters, reference_of
from lit_rlhf.rollout.experience import Experience, PlannedRollout, episode_means
from lit_rlhf.rollout.minibatches import Minibatches
from lit_rlhf.rollout.play import GenerationSettings, Play, complete, episode_rows
from lit_rlhf.rollout.shaping import RewardShaping
from token_mdp import Episode, FinishReason


class Term(NamedTuple):
    """A part of the loss."""

    name: str
    weight: float
    losses: Tensor  # (M,)


class OnPolicyModule(AlignmentModule):
    """Base of the algorithms that learn from a `RolloutDataModule`: maximise E[r(x, y)] - β KL(π‖π_ref).

    One Lightning epoch is one iteration: the policy plays `rollout_size` episodes of the data module, they are scored
    once, and `ppo_epochs` passes over them follow. `trainer.max_epochs` counts iterations.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; also the reference.
        advantages: estimator of advantages: a function of a `ScoredRollout` that gives `Advantages`.
        loss: policy loss: a function of `PolicyTokens` that gives a `PolicyLoss`.
        kl: β, the coefficient of the KL penalty, fixed or adaptive; None = FixedKL(0.05).
        kl_penalty: whether the KL is charged in the reward or in the loss, and its estimator.
        shaping: normalisation, clipping, length and missing-end penalties of rewards; None = rewards as they come.
        entropy_coef: weight of the entropy bonus.
        ppo_epochs: passes over a rollout.
        num_minibatches: optimiser steps per pass; each takes as many micro-batches as `data.max_tokens` asks for, and
            `accumulate_grad_batches` at least.
        target_kl: end an iteration's learning before the step whose minibatch shows a mean KL per token from the
            rollout's policy, k3 over all ranks, beyond this; null = never.
        temperature: divides the logits in sampling and in training alike.
        seed: of sampling and of minibatches.
        lora: train an adapter on frozen weights; null = all weights, or the adapter in policy's folder.
        merge_start: fold the adapter in policy's folder into its base before anything else.
        hold_reference: where the reference lives: "base" = on the policy's frozen base, the adapters that learn being
            off; "copy" = a model of its own; "parked" = likewise, on the CPU between uses; null = base if there is one.
        trust_remote_code: run model code that comes with the weights.
        generation: how `predict` writes completions; the sample tables show the policy as it is trained.
        kwargs: the optimiser's settings, see `AlignmentModule`.
    """

    learns_from = "prompts"
    prefix: ClassVar[str]  # of its metrics

    def __init__(
        self,
        policy: str,
        advantages: ChosenFunction,
        loss: ChosenFunction,
        kl: KLController | None = None,
        kl_penalty: KLPenalty = KLPenalty(),
        shaping: RewardShaping | None = None,
        entropy_coef: float = 0.0,
        ppo_epochs: int = 4,
        num_minibatches: int = 4,
        target_kl: float | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        lora: LoRA | None = None,
        merge_start: bool = False,
        hold_reference: HoldReference | None = None,
        trust_remote_code: bool = False,
        generation: GenerationSettings = GenerationSettings(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.updates = UpdateSettings(ppo_epochs, num_minibatches, target_kl, entropy_coef)
        self.sampling = SamplingSettings(temperature, seed)
        with named_by("model.advantages"):
            self.advantages = chosen_estimator(advantages)
        with named_by("model.loss"):
            self.loss = chosen_loss(loss)
        self.kl = FixedKL() if kl is None else kl
        if not hasattr(self.kl, "kl_coef"):
            raise UserError(f"model.kl: {type(kl).__name__} has no kl_coef; name FixedKL or AdaptiveKL, or null")
        self.kl_penalty = kl_penalty
        self.shaping = RewardShaping() if shaping is None else shaping
        self.generation = generation
        refuse_dropout(lora, type(self).__name__)
        self.policy, self.tokenizer = load_policy_with_tokenizer(
            policy, False, trust_remote_code, lora, merge_start, self.frozen_dtype
        )
        self.reference: Reference = reference_of(
            self.policy, self.frozen, hold_reference, frozen_dtype=self.frozen_dtype
        )
        self.critic: Values | None = None
        self.critic_settings = CriticSettings(0.0, None, 0, None)
        self.rollout_metrics: dict[str, float] = {}  # of the rollout that is being learnt from
        self.step_kl: list[Tensor] = []  # approximate KL of the optimiser step's micro-batches so far
        self.stopped = False  # by target_kl, for the rest of this iteration

    def views(self) -> dict[str, Any]:
        """Policy, reference and, where there is one, critic."""
        critic = {} if self.critic is None else {"critic": self.critic}
        return {**super().views(), "reference": self.reference, **critic}

    def training_step(self, batch: RolloutBatch | NoBatch, batch_idx: int) -> Tensor:
        """One micro-batch of the current rollout: Σ weight · term, a mean over the tokens of the global minibatch."""
        if isinstance(batch, NoBatch):
            return torch.zeros((), device=self.device, requires_grad=True)
        tokens, updates = batch.packed, self.updates
        with self.policy.shared_pass():
            value = [] if self.critic is None else [self.value_term(batch)]
            logprobs, entropy = self.policy(tokens, self.sampling.temperature, with_entropy=updates.entropy_coef != 0)
        policy = self.loss(PolicyTokens(logprobs, batch.old_logprobs, batch.advantages, tokens.sequence_ids))

        terms = [Term("policy_loss", 1.0, policy.losses), *value]
        if self.kl_penalty.place == "loss":
            kl_losses = self.kl_penalty.loss(logprobs, batch.old_logprobs, batch.ref_logprobs)
            terms.append(Term("kl_loss", self.rollout_metrics["rollout/kl_coef"], kl_losses))  # β has adapted since
        if entropy is not None:
            terms.append(Term("entropy", -updates.entropy_coef, entropy))

        balance = self.balance_term("policy", len(logprobs), told=not self.stopped)
        losses = sum((term.weight * term.losses for term in terms), start=torch.zeros_like(logprobs)) + balance
        self.log_terms(batch, losses, terms, policy.metrics, k3(batch.old_logprobs, logprobs.detach()))
        return losses.sum() / batch.denominator

    def value_term(self, batch: RolloutBatch) -> Term:
        """The critic's part of the loss; of an adapter it goes backward at once, before the policy goes forward."""
        assert self.critic is not None and batch.old_values is not None and batch.returns is not None
        settings = self.critic_settings
        values = self.critic(batch.packed, batch.packed.predictors)
        losses = value_loss(values, batch.old_values, batch.returns, settings.value_clip_range)
        losses = losses + self.balance_term("critic", len(values), told=not self.stopped)
        apart = self.policy.adapters is not None and not (
            isinstance(self.critic, OnTrunk) and self.critic.adapter is None
        )
        if apart and settings.value_coef > 0 and takes_gradients_early(self.trainer):
            weight = settings.value_coef / (batch.denominator * self.trainer.accumulate_grad_batches)
            losses = backward_early(losses, self.parameters(), weight)
        return Term("value_loss", settings.value_coef, losses)

    def log_terms(
        self, batch: RolloutBatch, losses: Tensor, terms: list[Term], metrics: dict[str, Tensor], approx_kl: Tensor
    ) -> None:
        """Log a micro-batch, unless its step is not taken; its KL from the rollout's policy may stop the next ones."""
        self.step_kl.append(approx_kl.sum() / batch.denominator)
        if not self.stopped:
            named = {term.name: term.losses for term in terms} | {"approx_kl": approx_kl} | metrics
            means = {f"{self.prefix}/{name}": values.detach().mean() for name, values in named.items()}
            self.log_mean("train", {**means, "loss": losses.detach().mean()}, weight=len(losses))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop the gradients that this step shall not use: AdamW leaves parameters without one as they are.

        All after a stop by target_kl; the policy's while the critic warms up. The steps themselves are taken as
        planned, so that schedule, validation, `max_steps` and the ranks' exchange of gradients stay in step.
        """
        if self.updates.target_kl is not None:
            mean_kl = self.trainer.strategy.reduce(torch.stack(self.step_kl).mean(), reduce_op="mean")
            self.stopped = self.stopped or mean_kl.item() > self.updates.target_kl
            self.log(f"{self.prefix}/stopped", float(self.stopped))
        self.step_kl = []
        if self.stopped:
            optimizer.zero_grad()
        elif self.warming_up:
            for parameter in policy_parameters(self.policy):
                parameter.grad = None
        if self.critic_settings.critic_learning_rate is not None:
            self.log("train/critic_learning_rate", optimizer.param_groups[-1]["lr"])
        super().on_before_optimizer_step(optimizer)

    @property
    def warming_up(self) -> bool:
        """Whether the critic learns alone in this iteration."""
        return self.trainer.current_epoch < self.critic_settings.critic_warmup

    def optimizer_options(self) -> dict[str, Any]:
        """Those of the critic's optimiser, too."""
        rate = {} if self.critic is None else {"critic_learning_rate": self.critic_settings.critic_learning_rate}
        return {**super().optimizer_options(), **rate}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The critic's learning rate may be its own."""
        groups = self.optimizer_settings.groups(policy_parameters(self.policy), self.learning_rate)
        if self.critic is not None:
            own = self.critic_settings.critic_learning_rate
            rate = self.learning_rate if own is None else own
            groups += self.optimizer_settings.groups(self.critic.parameters(), rate)
        return groups

    def experience(self, played: Play, minibatches: Minibatches) -> Experience:
        """Score a rollout once: charge the KL to the tokens, and credit them with advantages.

        The forward passes run on the micro-batches of the first pass, as they will be trained on: the first ratio of
        new to old policy is exactly 1.
        """
        rollout = self.planned(played, minibatches)
        old_logprobs, ref_logprobs, old_values = self.forward_rollout(rollout)

        scores = self.scores(rollout)
        kl_coef = self.kl.kl_coef if self.kl_penalty.place == "reward" else 0.0
        penalty = rollout.rows(self.kl_penalty.estimate(old_logprobs, ref_logprobs))
        rewards = token_rewards(scores, penalty, kl_coef, rollout.mask)
        if self.shaping.whiten:
            moments = self.moments_over_ranks(rollout.flat(rewards))
            rewards = whiten(rewards, rollout.mask, moments, keep_mean=True)

        values = None if old_values is None else rollout.rows(old_values)
        of_prompts = rollout.prompt_index, rollout.group_index
        estimated = self.advantages(ScoredRollout(rewards, values, rollout.mask, scores, *of_prompts))
        advantages, returns = rollout.flat(estimated.advantages), rollout.flat(estimated.returns)
        columns = {
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "advantages": whiten(advantages, moments=self.moments_over_ranks(advantages)),
        }
        if old_values is not None:
            columns |= {"old_values": old_values, "returns": returns}
        self.finish_rollout(rollout.means(scores, old_logprobs, ref_logprobs), old_values, returns, len(scores))
        return rollout.experience(columns, self.sum_over_ranks(rollout.step_tokens()).tolist())

    def planned(self, played: Play, minibatches: Minibatches) -> PlannedRollout:
        """The rollout, cut into the micro-batches of this iteration."""
        rng = np.random.default_rng([self.sampling.seed, self.trainer.current_epoch, self.global_rank])
        prompt_tokens = np.array([len(episode.prompt_ids) for episode in played.episodes])
        response_tokens = np.array([len(episode.response_ids) for episode in played.episodes])
        plan = minibatches.plan(prompt_tokens, response_tokens, rng, self.most_of_ranks)
        return PlannedRollout(played, plan, minibatches.num_minibatches, minibatches.group_size)

    @torch.no_grad()
    def forward_rollout(self, rollout: PlannedRollout) -> tuple[Tensor, Tensor, Tensor | None]:
        """Old log-probs, reference log-probs and, with a critic, values: (M,) each, on the CPU."""
        with self.reference.at_hand():
            parts = [self.forward_packed(packed) for packed in rollout.micro_batches()]
        old_logprobs, ref_logprobs, *values = (torch.cat(column) for column in zip(*parts, strict=True))
        return old_logprobs, ref_logprobs, values[0] if values else None

    def forward_packed(self, packed: PackedBatch) -> list[Tensor]:
        """The same of one micro-batch."""
        batch, temperature = move_data_to_device(packed, self.device), self.sampling.temperature
        with self.trainer.precision_plugin.forward_context(), self.policy.shared_pass():
            logprobs = self.policy(batch, temperature)[0]
            values = [] if self.critic is None else [self.critic(batch, batch.predictors)]
            ref_logprobs = self.reference(batch, temperature)[0]
        return [column.cpu() for column in (logprobs, ref_logprobs, *values)]

    def scores(self, rollout: PlannedRollout) -> Tensor:
        """(B,) rewards of a rollout, shaped."""
        rewards = torch.tensor([episode.reward for episode in rollout.episodes], dtype=torch.float64)
        cut = torch.tensor([episode.finish_reason is FinishReason.LENGTH for episode in rollout.episodes])
        self.shaping.observe(self.moments_over_ranks(rewards))
        return self.shaping.scores(rewards, rollout.lengths, cut)

    def finish_rollout(
        self, means: dict[str, Tensor], old_values: Tensor | None, returns: Tensor, num_episodes: int
    ) -> None:
        """Note what to log of the rollout, and let β follow its KL; β is that of the rollout until then."""
        self.rollout_metrics = {**self.mean_over_ranks(means), "rollout/kl_coef": self.kl.kl_coef}
        if old_values is not None:
            errors, targets = self.moments_over_ranks(returns - old_values), self.moments_over_ranks(returns)
            self.rollout_metrics[f"{self.prefix}/explained_variance"] = explained_variance(errors, targets).item()
        if not self.warming_up:
            self.kl.update(self.rollout_metrics["rollout/kl"], num_episodes * self.trainer.world_size)
        self.stopped, self.step_kl = False, []

    def on_train_epoch_end(self) -> None:
        """Log the rollout that this iteration learnt from."""
        for name, value in self.rollout_metrics.items():
            self.log(name, value, sync_dist=True, prog_bar=name in ("rollout/score", "rollout/kl"))
        super().on_train_epoch_end()

    def evaluate(self, prompts: PromptBatch, stage: str) -> None:
        """Log score, KL to the reference and length of one episode per held-out prompt."""
        episodes = self.play_prompts(prompts)
        batch = move_data_to_device(pack([Example(e.prompt_ids, (e.response_ids,)) for e in episodes]), self.device)
        logprobs, _ = self.policy(batch, self.sampling.temperature)
        ref_logprobs, _ = self.reference(batch, self.sampling.temperature)
        kl = batch.sum_by_sequence(k1(logprobs, ref_logprobs)).mean()
        self.log_mean(stage, {"kl": kl, **episode_means(episodes)}, weight=len(episodes))

    def play_prompts(self, prompts: PromptBatch) -> list[Episode]:
        """One scored episode per prompt, within the limits of training."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        settings = data.settings.bound(self.sampling.generation)
        return complete(self.policy, self.tokenizer, prompts, settings, data.rewards)

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
        mine: dict[str, Any] = {"kl": None, "shaping": None, "rollout_metrics": {}, "stopped": False}
        name = damaged(self.resumed_file, "on_policy")
        require_alike(state, mine, name, tuple(mine))
        with named_by(name):
            self.kl.load_state_dict(state["kl"])
            self.shaping.load_state_dict(state["shaping"])
        self.rollout_metrics, self.stopped = state["rollout_metrics"], state["stopped"]
