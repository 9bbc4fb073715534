"""Every preference loss, and how it is looked at in the log-ratios alone."""

import math
from functools import partial

import torch

from lit_rlhf.losses import (
    alpha_dpo_loss,
    alpha_link,
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    chosen_nll_loss,
    conservative_dpo_loss,
    discopop_loss,
    dpo_loss,
    exo_pair_loss,
    f_dpo_loss,
    forward_kl_dpo_loss,
    forward_kl_link,
    hinge_loss,
    ipo_loss,
    jensen_shannon_dpo_loss,
    jensen_shannon_link,
    length_normalized_dpo_loss,
    length_normalized_ipo_loss,
    nca_pair_loss,
    offset_dpo_loss,
    reverse_kl_link,
    robust_dpo_loss,
    rpo_loss,
    soft_label_dpo_loss,
    sppo_hard_loss,
    wpo_loss,
)

LOG2 = math.log(2)


ONE = torch.ones(1, dtype=torch.float64)


# Every loss of the family, with what it is when policy and reference agree (β = 0.5, log-probs -3 and -3, length 1).
FAMILY = {
    "dpo": (dpo_loss, LOG2),
    "conservative": (partial(conservative_dpo_loss, label_smoothing=0.1), LOG2),
    "robust": (partial(robust_dpo_loss, label_smoothing=0.1), LOG2),
    "offset": (partial(offset_dpo_loss, margin=math.log(3)), math.log(4)),  # log(1 + 3)
    "soft_label": (partial(soft_label_dpo_loss, margin=2.0), LOG2),
    "ipo": (ipo_loss, 1.0),  # (0 - 1/(2 * 0.5))²
    "hinge": (hinge_loss, 1.0),
    "exo": (partial(exo_pair_loss, label_smoothing=0.1), -LOG2 - 0.5 * math.log(0.9 * 0.1)),  # KL((½, ½)‖(0.9, 0.1))
    "nca": (nca_pair_loss, 2 * LOG2),
    "bco": (bco_pair_loss, 2 * LOG2),
    "sppo": (sppo_hard_loss, 2.0),  # (0 - 1)² + (0 + 1)²
    "aot": (aot_loss, LOG2),
    "aot_unpaired": (aot_unpaired_loss, LOG2),
    "apo_zero": (apo_zero_loss, 1.0),
    "apo_down": (apo_down_loss, 1.0),
    "discopop": (discopop_loss, 0.5 * (LOG2 + 1)),
    "length_normalized": (partial(length_normalized_dpo_loss, chosen_lengths=ONE, rejected_lengths=ONE), LOG2),
    "length_normalized_ipo": (partial(length_normalized_ipo_loss, chosen_lengths=ONE, rejected_lengths=ONE), 1.0),
    "rpo": (partial(rpo_loss, chosen_lengths=ONE), LOG2 + 3),
    "chosen_nll": (partial(chosen_nll_loss, chosen_lengths=ONE), 3.0),
    "wpo": (partial(wpo_loss, chosen_lengths=ONE, rejected_lengths=ONE), math.exp(-6) * LOG2),
    "f_reverse": (partial(f_dpo_loss, link=reverse_kl_link), LOG2),
    "f_forward": (partial(f_dpo_loss, link=forward_kl_link), LOG2),
    "f_jensen_shannon": (partial(f_dpo_loss, link=jensen_shannon_link), LOG2),
    "f_alpha": (partial(f_dpo_loss, link=alpha_link(0.5)), LOG2),
    "f_alpha_1": (partial(f_dpo_loss, link=alpha_link(1.0)), LOG2),
    "forward_kl": (forward_kl_dpo_loss, LOG2),
    "jensen_shannon": (jensen_shannon_dpo_loss, LOG2),
    "alpha": (partial(alpha_dpo_loss, alpha=0.5), LOG2),
}


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def randoms(seed, n=6):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(loss, chosen_logratio, rejected_logratio, beta=0.5):
    """The loss as a function of the log-ratios alone."""
    zeros = torch.zeros_like(chosen_logratio)
    return loss(chosen_logratio, rejected_logratio, zeros, zeros, beta)


def argmin_margin(loss, beta):
    """Where on a fine grid of margins h_w - h_l, shared evenly, the loss is least."""
    margins = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    return margins[at(loss, margins / 2, -margins / 2, beta).argmin()].item()


def descend(loss, start, steps=4000, learning_rate=1.0, beta=0.5):
    """Log-ratios (chosen, rejected) after these steps of plain gradient descent from `start`, two columns."""
    logratios = torch.stack(start).requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(at(loss, *logratios, beta).sum(), logratios)
        logratios = (logratios - learning_rate * gradient).detach().requires_grad_()
    return logratios.detach(), at(loss, *logratios, beta).detach()


STARTS = (randoms(0), randoms(1))
