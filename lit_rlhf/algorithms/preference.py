"""What algorithms that learn from pairs share."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.data.batches import PreferenceBatch
from lit_rlhf.data.formats import Kind
from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.roles import Reference


class PreferenceModule(AlignmentModule):
    """Base of the algorithms that learn from a `PreferenceDataModule`; what a subclass sets, `AlignmentModule` says."""

    learns_from: ClassVar[Kind] = "preference"
    prefix: ClassVar[str] = "train"  # of the training metrics of a method, before their slash

    def log_pairs(self, stage: str, batch: PreferenceBatch, losses: Tensor, metrics: dict[str, Tensor]) -> None:
        """Log a micro-batch of B pairs; in training also how long their responses are, which a bias would feed on.

        Args:
            stage: train, val or test.
            batch: the pairs.
            losses: (B,).
            metrics: further means over the pairs.
        """
        means = {"loss": losses.detach().mean(), **metrics}
        if stage == "train":
            chosen, rejected = batch.packed.response_lengths.chunk(2)
            means |= {"chosen_length": chosen.mean(), "rejected_length": rejected.mean()}
        self.log_mean(stage, means, weight=len(losses))

    @torch.no_grad()
    def log_rewards(
        self,
        stage: str,
        batch: PreferenceBatch,
        losses: Tensor,
        logprobs: Sequence[Tensor],
        rewards: Sequence[Tensor],
    ) -> None:
        """Log the loss, the rewards that log-probs imply (whatever the loss compares), and why they moved.

        Args:
            stage: train, val or test.
            batch: the pairs.
            losses: (B,).
            logprobs: (B,) log π of chosen and of rejected responses; both may fall while the margin grows.
            rewards: (B,) likewise, of DPO and KTO β log π/π_ref.
        """
        columns = pair_metrics(*(column.detach() for column in (*logprobs, *rewards)))
        prefix = self.prefix if stage == "train" else stage
        self.watch({f"{prefix}/reward_margin": columns["reward_margin"]})
        self.log_pairs(stage, batch, losses, {f"{prefix}/{name}": values.mean() for name, values in columns.items()})


def response_logprobs(policy: Policy | Reference | nn.Module, packed: PackedBatch, ld_alpha: float = 1.0) -> Tensor:
    """(B,) log π(y|x) of each response, summed over its tokens; of pairs, `desensitized` where `ld_alpha` is not 1."""
    token_logprobs, _ = policy(packed)
    if ld_alpha != 1:
        token_logprobs = desensitized(token_logprobs, packed, ld_alpha)
    return packed.sum_by_sequence(token_logprobs)


def sequence_logprobs(policy: Policy | Reference | nn.Module, packed: PackedBatch) -> tuple[Tensor, Tensor]:
    """(B,) log π(y|x) of chosen and of rejected responses, summed over their tokens."""
    chosen, rejected = response_logprobs(policy, packed).chunk(2)
    return chosen, rejected


def desensitized(token_logprobs: Tensor, packed: PackedBatch, alpha: float) -> Tensor:
    """Log-probs of response tokens, of which those beyond the length of the pair's other response count `alpha`.

    Liu et al. 2024 (LD-DPO), Eq. 8, https://arxiv.org/abs/2409.06411: log π(y|x) = Σ_{t ≤ l} log π(y_t) + α Σ_{t > l}
    log π(y_t) with l the shorter length of the two, so that a response says less by being long alone.

    Args:
        token_logprobs: (M,) of the response tokens of `packed`.
        packed: pairs, all chosen responses before all rejected ones.
        alpha: 1 = plain log-probs, 0 = nothing beyond the shorter length.

    Returns:
        (M,).
    """
    lengths = packed.response_lengths
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    firsts = lengths.cumsum(0) - lengths
    places = torch.arange(len(token_logprobs), device=token_logprobs.device) - firsts[packed.sequence_ids]
    return torch.where(places < shorter[packed.sequence_ids], token_logprobs, alpha * token_logprobs)


@check_shapes
def pair_metrics(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    chosen_rewards: Float[Tensor, " B"],
    rejected_rewards: Float[Tensor, " B"],
) -> dict[str, Float[Tensor, " B"]]:
    """What to log of each pair: its implicit rewards r̂ = β log π/π_ref, whatever the loss compares, and why they moved.

    Args:
        chosen: log π of the chosen responses; they may fall while the margin grows.
        rejected: log π of the rejected responses.
        chosen_rewards: r̂ of the chosen responses.
        rejected_rewards: r̂ of the rejected responses.
    """
    return {
        "reward_accuracy": agrees(chosen_rewards, rejected_rewards),
        "reward_margin": chosen_rewards - rejected_rewards,
        "chosen_reward": chosen_rewards,
        "rejected_reward": rejected_rewards,
        "chosen_logprobs": chosen,
        "rejected_logprobs": rejected,
    }


@check_shapes
def agrees(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Whether the scores of a pair agree with its label; a tie is half right."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


@check_shapes
def agreement(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> dict[str, Float[Tensor, ""]]:
    """How well the scores of B pairs agree with the labels."""
    return {"accuracy": agrees(chosen, rejected).mean(), "margin": (chosen - rejected).detach().mean()}
