"""From a played rollout to what is learnt from: scores, the KL penalty, advantages."""

from typing import Any, ClassVar

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lit_rlhf.algorithms.chosen import ChosenFunction, Estimator, chosen_estimator, sample_rollout
from lit_rlhf.algorithms.kl_control import KLController, KLPenalty
from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.algorithms.settings import CriticSettings, SamplingSettings, UpdateSettings
from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.errors import UserError, named_by, require_alike
from lit_rlhf.losses import ScoredRollout
from lit_rlhf.losses.advantages import (
    Moments,
    explained_variance,
    make_row_mask,
    pad_rows,
    token_rewards,
    unpad_rows,
    whiten,
)
from lit_rlhf.losses.kl import k1
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.roles import Reference, Values
from lit_rlhf.rollout.experience import Experience, PlannedRollout
from lit_rlhf.rollout.keeping import columns_of, part_of, strongest
from lit_rlhf.rollout.minibatches import Minibatches
from lit_rlhf.rollout.play import Play
from lit_rlhf.rollout.shaping import RewardShaping
from token_mdp import Episode, FinishReason


class CreditingModule(AlignmentModule):
    """The half of `OnPolicyModule` that scores a rollout and credits its tokens.

    A subclass says what its estimators find in a `ScoredRollout`, and sets the attributes below.
    """

    prefix: ClassVar[str]  # of its metrics
    has_critic: ClassVar[bool] = False  # values
    plays_greedy: ClassVar[bool] = False  # scores of the most likely response to each prompt
    # Of each group so many responses are learnt from, those of the largest advantages in size; None = all.
    kept_of_group: ClassVar[int | None] = None
    compares_kept: ClassVar[bool] = False  # whether its loss compares them, so that they stay in one micro-batch

    policy: Policy
    reference: Reference
    critic: Values | None
    critic_settings: CriticSettings
    kl: KLController
    kl_penalty: KLPenalty
    shaping: RewardShaping
    sampling: SamplingSettings
    updates: UpdateSettings
    chosen_advantages: ChosenFunction
    advantages: Estimator
    whiten_advantages: bool
    rollout_metrics: dict[str, float]  # of the rollout that is being learnt from
    step_kl: list[Tensor]  # approximate KL of the optimiser step's micro-batches so far
    stopped: bool  # by target_kl, for the rest of this iteration
    returns_seen: Moments  # of all responses of the run so far, of all ranks

    def check_groups(self, group_size: int) -> None:
        """Refuse groups that the estimator of advantages cannot compare.

        Args:
            group_size: completions of each prompt.

        Raises:
            UserError: as the estimator puts it.
        """
        if group_size < 2 and self.sampling.dynamic_sampling:
            raise UserError(
                f"model.dynamic_sampling ({self.sampling.dynamic_sampling}) compares completions of one prompt, and "
                f"data.group_size is {group_size}: raise it, or set dynamic_sampling: 0"
            )
        with named_by(f"data.group_size ({group_size})"):
            sample = sample_rollout(group_size, self.has_critic, self.plays_greedy)
            chosen_estimator(self.chosen_advantages, sample)

    def experience(self, played: Play, minibatches: Minibatches) -> Experience:
        """Score a rollout once: charge the KL to the tokens, and credit them with advantages.

        The forward passes run on the micro-batches of the first pass, as they will be trained on: the first ratio of
        new to old policy is exactly 1.
        """
        group_size = self.trainer.datamodule.settings.group_size  # type: ignore[attr-defined]
        all_learnt = self.kept_of_group is None
        rollout = self.planned(played, minibatches if all_learnt else minibatches.of_all(group_size))
        old_logprobs, ref_logprobs, old_values = self.forward_rollout(rollout)

        scores = self.scores(rollout)
        kl_coef = self.kl.kl_coef if self.kl_penalty.place == "reward" else 0.0
        penalty = rollout.rows(self.kl_penalty.estimate(old_logprobs, ref_logprobs))
        rewards = self.credited(scores, rollout.step_rewards(), penalty, kl_coef, rollout.mask)
        if self.shaping.whiten:
            moments = self.moments_over_ranks(rollout.flat(rewards))
            rewards = whiten(rewards, rollout.mask, moments, keep_mean=True)

        values = None if old_values is None else rollout.rows(old_values)
        played_before, of_this = self.returns_seen, self.moments_over_ranks(rewards.sum(1))
        self.returns_seen = Moments(*(old + new for old, new in zip(played_before, of_this, strict=True)))
        scored = ScoredRollout(
            token_rewards=rewards,
            values=values,
            response_mask=rollout.mask,
            scores=scores,
            prompt_index=rollout.prompt_index,
            group_index=rollout.group_index,
            running_mean=self.returns_seen.mean,
            greedy_scores=self.greedy_scores(rollout),
        )
        estimated = self.advantages(scored)
        advantages, returns = rollout.flat(estimated.advantages), rollout.flat(estimated.returns)
        if self.whiten_advantages:
            advantages = whiten(advantages, moments=self.moments_over_ranks(advantages))
        columns = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "advantages": advantages}
        if old_values is not None:
            columns |= {"old_values": old_values, "returns": returns}
        kl = k1(old_logprobs, ref_logprobs)
        spreads = {"score": scores, "response_length": rollout.lengths, "token_kl": kl, "advantages": advantages}
        self.watch({f"rollout/{name}": values for name, values in spreads.items()})
        self.finish_rollout(rollout.means(scores, old_logprobs, ref_logprobs), old_values, returns, len(scores))
        if self.kept_of_group is not None:
            of_groups = estimated.advantages.sum(1).div(rollout.lengths)[np.argsort(rollout.order)]
            kept = strongest(of_groups.view(-1, rollout.group_size), self.kept_of_group)
            whole, rollout = rollout, self.planned(part_of(played, kept), minibatches)
            columns = columns_of(columns, whole, rollout, kept)
        columns |= self.token_weights(rollout)
        sizes = self.sum_over_ranks(self.step_sizes(rollout, columns["advantages"]))
        return rollout.experience(columns, sizes.clamp(min=1).tolist())

    def step_sizes(self, rollout: PlannedRollout, advantages: Tensor) -> Tensor:
        """What the loss of each optimiser step is a mean over, on this rank: its response tokens.

        Args:
            rollout: that is learnt from.
            advantages: (M,) of its tokens.
        """
        return rollout.step_tokens()

    def credited(
        self, scores: Tensor, step_rewards: Tensor | None, penalty: Tensor, kl_coef: float, mask: Tensor
    ) -> Tensor:
        """(B, T) token rewards: what was paid step by step where it was paid, and what the scores leave at the end.

        So a response earns its shaped score (B,) in all, whatever of it came early.
        """
        if step_rewards is None:
            return token_rewards(scores, penalty, kl_coef, mask)
        early = step_rewards * self.shaping.scale
        return token_rewards(scores - early.sum(1), penalty, kl_coef, mask) + early

    def planned(self, played: Play, minibatches: Minibatches) -> PlannedRollout:
        """The rollout, cut into micro-batches: those of this iteration, or of scoring what is not all learnt from."""
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

    def credited_tokens(self, packed: PackedBatch, scores: Tensor) -> dict[str, Tensor]:
        """KL to the reference of each response token, k1; with a critic its value and advantage, too: (M,) each.

        Advantages are not whitened; there are none where they compare completions of one prompt.

        Args:
            packed: B responses, each to a prompt of its own.
            scores: (B,) shaped rewards.
        """
        logprobs, ref_logprobs, *values = self.forward_packed(packed)
        readings = {"KL": k1(logprobs, ref_logprobs)}
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if values and data.settings.group_size == 1:
            mask, numbers = make_row_mask(packed.sequence_ids.cpu(), len(scores)), torch.arange(len(scores))
            kl_coef = self.kl.kl_coef if self.kl_penalty.place == "reward" else 0.0
            penalty = pad_rows(self.kl_penalty.estimate(logprobs, ref_logprobs), mask)
            rewards = token_rewards(scores, penalty, kl_coef, mask)
            mean = self.returns_seen.mean
            scored = ScoredRollout(rewards, pad_rows(values[0], mask), mask, scores, numbers, numbers, mean)
            readings |= {"advantage": unpad_rows(self.advantages(scored).advantages, mask), "value": values[0]}
        return readings

    def scores(self, rollout: PlannedRollout) -> Tensor:
        """(B,) rewards of a rollout, shaped."""
        rewards = torch.tensor([episode.reward for episode in rollout.episodes], dtype=torch.float64)
        self.shaping.observe(self.moments_over_ranks(rewards))
        return self.shaped(rollout.episodes)

    def shaped(self, episodes: list[Episode]) -> Tensor:
        """(B,) rewards of episodes, shaped by what has been observed."""
        rewards = torch.tensor([episode.reward for episode in episodes], dtype=torch.float64)
        lengths = torch.tensor([len(episode.response_ids) for episode in episodes])
        cut = torch.tensor([episode.finish_reason is FinishReason.LENGTH for episode in episodes])
        return self.shaping.scores(rewards, lengths, cut)

    def greedy_scores(self, rollout: PlannedRollout) -> Tensor | None:
        """(B,) shaped rewards of the most likely response to each episode's prompt, where such were played."""
        greedy = rollout.played.greedy
        if greedy is None:
            return None
        numbers = {episode.prompt_index: number for number, episode in enumerate(greedy)}
        rows = [numbers[index] for index in rollout.prompt_index.tolist()]
        return self.shaped(greedy)[rows]

    def token_weights(self, rollout: PlannedRollout) -> dict[str, Tensor]:
        """The column of what a token's loss weighs, where tokens do not weigh alike."""
        average = self.updates.loss_average
        if average == "tokens":
            return {}
        if average == "responses":
            weights = 1 / rollout.lengths
        else:
            limit = self.trainer.datamodule.settings.max_new_tokens  # type: ignore[attr-defined]
            weights = torch.full(rollout.lengths.shape, 1 / limit)
        return {"weights": weights.repeat_interleave(rollout.lengths)}

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

    @property
    def warming_up(self) -> bool:
        """Whether the critic learns alone in this iteration."""
        return self.trainer.current_epoch < self.critic_settings.critic_warmup

    def state_of_rollouts(self) -> dict[str, Any]:
        """What has been learnt about rollouts, for the checkpoint."""
        return {
            "kl": self.kl.state_dict(),
            "shaping": self.shaping.state_dict(),
            "rollout_metrics": self.rollout_metrics,
            "stopped": self.stopped,
            "returns_seen": [value.item() for value in self.returns_seen],
        }

    def load_state_of_rollouts(self, state: Any, name: str) -> None:
        """Go on from what a checkpoint has; one of before groups has no returns.

        Args:
            state: as `state_of_rollouts` gave it.
            name: of it, for messages.

        Raises:
            UserError: it is of another kind.
        """
        mine: dict[str, Any] = {"kl": None, "shaping": None, "rollout_metrics": {}, "stopped": False}
        require_alike(state, mine | {"returns_seen": [0.0] * 3}, name, tuple(mine))
        with named_by(name):
            self.kl.load_state_dict(state["kl"])
            self.shaping.load_state_dict(state["shaping"])
        self.rollout_metrics, self.stopped = state["rollout_metrics"], state["stopped"]
        self.returns_seen = Moments(*torch.tensor(state.get("returns_seen", [0.0] * 3), dtype=torch.float64))
