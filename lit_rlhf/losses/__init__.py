"""Losses as pure functions of tensors: no model, config, logger or device in this folder.

Each is elementwise: tokens give losses per token, pairs give losses per pair, and the caller sums and divides by the
denominator of the *global* batch (`losses.sum() / batch.denominator`), so that no split into micro-batches, ranks or
padded rows changes the mean. The AOT losses alone compare ranks within the batch they are given; BCO's shift is the
caller's, who keeps it the same over a step.

Shapes are those of the annotations: other ones, which would broadcast, are a ValueError that names the tensors.

Axes: B pairs, M response tokens of all sequences of a packed batch. Log-probabilities are in nats.
"""

from lit_rlhf.losses.advantages import Advantages, ScoredRollout, gae
from lit_rlhf.losses.baselines import dr_grpo, grpo, reinforce, reinforce_plus_plus, remax, rloo
from lit_rlhf.losses.comparisons import (
    bradley_terry_loss,
    centring_loss,
    rao_kupper_loss,
    scaled_bradley_terry_loss,
    score_difference_loss,
)
from lit_rlhf.losses.distillation import forward_kl, generalized_jensen_shannon, reverse_kl
from lit_rlhf.losses.divergences import (
    alpha_dpo_loss,
    alpha_link,
    f_dpo_loss,
    forward_kl_dpo_loss,
    forward_kl_link,
    jensen_shannon_dpo_loss,
    jensen_shannon_link,
    reverse_kl_link,
)
from lit_rlhf.losses.load_balancing import load_balancing_loss
from lit_rlhf.losses.per_token import (
    chosen_nll_loss,
    length_normalized_dpo_loss,
    length_normalized_ipo_loss,
    rpo_loss,
    wpo_loss,
)
from lit_rlhf.losses.policy_gradients import (
    PolicyLoss,
    PolicyTokens,
    cispo_policy_loss,
    gspo_policy_loss,
    policy_gradient_loss,
    ppo_policy_loss,
    value_loss,
)
from lit_rlhf.losses.preference import (
    conservative_dpo_loss,
    discopop_loss,
    dpo_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    offset_dpo_loss,
    robust_dpo_loss,
    soft_label_dpo_loss,
)
from lit_rlhf.losses.rating import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_pair_loss, sppo_hard_loss
from lit_rlhf.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from lit_rlhf.losses.selection import best_and_worst, best_of_group
from lit_rlhf.losses.supervised import nll, process_reward_loss
from lit_rlhf.losses.transport import aot_loss, aot_unpaired_loss
from lit_rlhf.losses.unpaired import kto_loss, mismatched_kl

__all__ = [
    "Advantages",
    "PolicyLoss",
    "PolicyTokens",
    "ScoredRollout",
    "alpha_dpo_loss",
    "alpha_link",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_pair_loss",
    "best_and_worst",
    "best_of_group",
    "bradley_terry_loss",
    "centring_loss",
    "chosen_nll_loss",
    "cispo_policy_loss",
    "conservative_dpo_loss",
    "cpo_loss",
    "discopop_loss",
    "dpo_loss",
    "dr_grpo",
    "exo_pair_loss",
    "f_dpo_loss",
    "forward_kl",
    "forward_kl_dpo_loss",
    "forward_kl_link",
    "gae",
    "generalized_jensen_shannon",
    "grpo",
    "gspo_policy_loss",
    "hinge_loss",
    "ipo_loss",
    "jensen_shannon_dpo_loss",
    "jensen_shannon_link",
    "kto_loss",
    "length_normalized_dpo_loss",
    "length_normalized_ipo_loss",
    "load_balancing_loss",
    "mismatched_kl",
    "nca_pair_loss",
    "nll",
    "offset_dpo_loss",
    "orpo_loss",
    "policy_gradient_loss",
    "ppo_policy_loss",
    "process_reward_loss",
    "rao_kupper_loss",
    "reinforce",
    "reinforce_plus_plus",
    "remax",
    "reverse_kl",
    "reverse_kl_link",
    "rloo",
    "robust_dpo_loss",
    "rpo_loss",
    "scaled_bradley_terry_loss",
    "score_difference_loss",
    "simpo_loss",
    "soft_label_dpo_loss",
    "sppo_hard_loss",
    "value_loss",
    "wpo_loss",
]
