"""The on-policy road: play, score, charge the KL, estimate advantages, learn. A method is an estimator and a loss."""

from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf.algorithms.chosen import ChosenFunction, chosen_estimator, chosen_loss, sample_rollout
from lit_rlhf.algorithms.crediting import CreditingModule
from lit_rlhf.algorithms.kl_control import FixedKL, KLController, KLPenalty
from lit_rlhf.algorithms.lightning_tools import takes_gradients_early
from lit_rlhf.algorithms.samples import Sample, examples_of, read_samples, with_known_completions
from lit_rlhf.algorithms.settings import CriticSettings, LossAverage, SamplingSettings, UpdateSettings
from lit_rlhf.algorithms.teacher import Beside, named_reference
from lit_rlhf.data.batches import NoBatch, PromptBatch, RolloutBatch
from lit_rlhf.engine.early_backward import backward_early
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.errors import UserError, damaged, named_by
from lit_rlhf.losses import PolicyTokens, value_loss
from lit_rlhf.losses.kl import k1, k3
from lit_rlhf.models.adapters import LoRA, refuse_dropout
from lit_rlhf.models.loading import load_policy_with_tokenizer
from lit_rlhf.models.roles import HoldReference, OnTrunk, Reference, policy_parameters, reference_of
from lit_rlhf.rollout.experience import episode_means
from lit_rlhf.rollout.play import GenerationSettings, complete, episode_rows
from lit_rlhf.rollout.shaping import RewardShaping, nothing_seen
from token_mdp import Episode


class Term(NamedTuple):
    """A part of the loss."""

    name: str
    weight: float
    losses: Tensor  # (M,)


class OnPolicyModule(CreditingModule):
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
        whiten_advantages: bring advantages to mean 0 and variance 1 over the rollout of all ranks.
        loss_average: what the policy's loss is a mean over: "tokens" = of the whole minibatch; "responses" = of those
            of a response, and then responses; "max_new_tokens" = responses, each the sum over its tokens divided by
            the limit of a response.
        entropy_coef: weight of the entropy bonus.
        ppo_epochs: passes over a rollout.
        num_minibatches: optimiser steps per pass; each takes as many micro-batches as `data.max_tokens` asks for, and
            `accumulate_grad_batches` at least.
        target_kl: end an iteration's learning before the step whose minibatch shows a mean KL per token from the
            rollout's policy, k3 over all ranks, beyond this; null = never.
        temperature: divides the logits in sampling and in training alike.
        dynamic_sampling: rounds, at most, in which other groups are dealt in place of those whose rewards are all
            equal, and so teach nothing (DAPO); those that are left then are learnt from as they are; 0 = none.
        seed: of sampling and of minibatches.
        lora: train an adapter on frozen weights; null = all weights, or the adapter in policy's folder.
        merge_start: fold the adapter in policy's folder into its base before anything else.
        reference: folder or hub name of π_ref; null = the policy as it is before the first step.
        hold_reference: where the reference lives: "base" = on the policy's frozen base, the adapters that learn being
            off; "copy" = a model of its own; "parked" = likewise, on the CPU between uses; null = base if there is one.
        trust_remote_code: run model code that comes with the weights.
        generation: how `predict` writes completions; the sample tables show the policy as it is trained.
        kwargs: the optimiser's settings, see `AlignmentModule`.
    """

    learns_from = "prompts"

    def __init__(
        self,
        policy: str,
        advantages: ChosenFunction,
        loss: ChosenFunction,
        kl: KLController | None = None,
        kl_penalty: KLPenalty = KLPenalty(),
        shaping: RewardShaping | None = None,
        whiten_advantages: bool = True,
        loss_average: LossAverage = "tokens",
        entropy_coef: float = 0.0,
        ppo_epochs: int = 4,
        num_minibatches: int = 4,
        target_kl: float | None = None,
        temperature: float = 1.0,
        dynamic_sampling: int = 0,
        seed: int = 0,
        lora: LoRA | None = None,
        merge_start: bool = False,
        reference: str | None = None,
        hold_reference: HoldReference | None = None,
        trust_remote_code: bool = False,
        generation: GenerationSettings = GenerationSettings(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.updates = UpdateSettings(ppo_epochs, num_minibatches, target_kl, entropy_coef, loss_average)
        self.sampling = SamplingSettings(temperature, seed, dynamic_sampling)
        with named_by("model.advantages"):
            sample = sample_rollout(values=self.has_critic, greedy=self.plays_greedy)
            self.advantages = chosen_estimator(advantages, sample)
        self.chosen_advantages, self.whiten_advantages = advantages, whiten_advantages
        with named_by("model.loss"):
            self.loss = self.chosen_loss(loss)
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
        held = (hold_reference, self.frozen_dtype)
        if reference is None:
            self.reference = reference_of(self.policy, self.frozen, *held)
        else:
            beside = Beside(self.policy, self.tokenizer, self.frozen, *held, trust_remote_code)
            self.reference = self.other_reference(reference, beside)
        self.critic = None
        self.critic_settings = CriticSettings(0.0, None, 0, None)
        self.rollout_metrics, self.step_kl, self.stopped = {}, [], False
        self.returns_seen = nothing_seen()

    def other_reference(self, name: str, beside: Beside) -> Reference:
        """Another model than the policy was, see `named_reference`."""
        return named_reference(name, beside)

    def chosen_loss(self, loss: ChosenFunction) -> Any:
        """The policy loss, tried."""
        return chosen_loss(loss)

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

        terms = [Term("policy_loss", 1.0, policy.losses)]
        if self.kl_penalty.place == "loss":
            kl_losses = self.kl_penalty.loss(logprobs, batch.old_logprobs, batch.ref_logprobs, tokens.sequence_ids)
            terms.append(Term("kl_loss", self.rollout_metrics["rollout/kl_coef"], kl_losses))  # β has adapted since
        if entropy is not None:
            terms.append(Term("entropy", -updates.entropy_coef, entropy))
        if batch.weights is not None:
            terms = [term._replace(losses=term.losses * batch.weights) for term in terms]
        terms[1:1] = value

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
            self.watch({f"{self.prefix}/{name}": metrics[name] for name in metrics if name == "ratio"})
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

    def samples(self, prompts: PromptBatch) -> list[Sample]:
        """Completions of held-out prompts with their scores and, token by token, what would be learnt from them."""
        episodes = self.play_prompts(prompts)
        rows = [
            row | {"score": episode.reward} | episode.components
            for row, episode in zip(episode_rows(self.tokenizer, episodes), episodes, strict=True)
        ]
        readings = partial(self.credited_tokens, scores=self.shaped(episodes))
        known = with_known_completions(rows, prompts)
        return read_samples(known, examples_of(episodes), self.tokenizer, readings, self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the iteration has come to; the data module keeps prompts and rollout."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["on_policy"] = self.state_of_rollouts()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the checkpoint was taken."""
        super().on_load_checkpoint(checkpoint)
        self.load_state_of_rollouts(checkpoint["on_policy"], damaged(self.resumed_file, "on_policy"))
