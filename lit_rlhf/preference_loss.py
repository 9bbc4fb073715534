"""A loss of the DPO family as a YAML chooses it: a function, or a weighted sum of several with their own arguments.

    loss: lit_rlhf.losses.ipo_loss
    loss:
      - {function: lit_rlhf.losses.robust_dpo_loss, options: {label_smoothing: 0.1}}
      - {function: lit_rlhf.losses.chosen_nll_loss, weight: 0.2}

What a loss asks for by the name of an argument beyond the log-probs and β comes from the batch (`FROM_BATCH`) or from
its options. Whatever makes no sense is refused by name when it is chosen, before any data is read.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_rlhf import losses
from lit_rlhf.errors import UserError

PAIR = 5  # chosen, rejected and reference log-probs, and β: what every loss of the family takes
FROM_BATCH = ("chosen_lengths", "rejected_lengths", "reward_shift")
WITH_LIKELIHOOD = (losses.rpo_loss, losses.chosen_nll_loss)
# Where each log-ratio should go by itself means something for log-ratios alone, not for bare log-probs.
NEED_REFERENCE = (
    losses.nca_pair_loss,
    losses.bco_pair_loss,
    losses.sppo_hard_loss,
    losses.apo_zero_loss,
    losses.apo_down_loss,
    losses.f_dpo_loss,
    losses.forward_kl_dpo_loss,
    losses.jensen_shannon_dpo_loss,
    losses.alpha_dpo_loss,
)


@dataclass(frozen=True)
class LossTerm:
    """One term of a preference loss.

    Args:
        function: any of the preference losses in `lit_rlhf.losses`, or one of yours; in YAML, its import path.
        weight: the term counts this much in the sum.
        options: arguments of this function beyond the log-probs and beta, such as {label_smoothing: 0.1}.
    """

    function: Callable[..., Any]
    weight: float = 1.0
    options: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", None) or type(self.function).__name__

    @property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """What the function takes beyond the log-probs and β, by name."""
        return dict(list(inspect.signature(self.function).parameters.items())[PAIR:])


class PreferenceLoss:
    """Losses of B pairs, as `dpo_loss`: Σ weight · term.

    Args:
        loss: one function, or terms.
        reference_free: the reference log-probs will be zeros.

    Attributes:
        inputs: those of `FROM_BATCH` that a term asks for and its options do not give.
    """

    def __init__(self, loss: Callable[..., Any] | Sequence[LossTerm], reference_free: bool = False) -> None:
        self.terms = [LossTerm(loss)] if callable(loss) else list(loss)
        if not self.terms:
            raise UserError("loss is an empty list; give a function or at least one term")
        self.inputs = {
            name for term in self.terms for name in FROM_BATCH if name in set(term.arguments) - set(term.options or {})
        }
        for term in self.terms:
            check_term(term, reference_free)
        likelihoods = [term.name for term in self.terms if term.function in WITH_LIKELIHOOD]
        if len(likelihoods) > 1:
            raise UserError(f"loss has the likelihood of the chosen response {len(likelihoods)} times: {likelihoods}")
        for i, term in enumerate(self.terms):
            if term.function in [other.function for other in self.terms[:i]]:
                raise UserError(f"loss has {term.name} twice; put its weights together in one term")

    def __call__(
        self,
        chosen_logprobs: Tensor,
        rejected_logprobs: Tensor,
        ref_chosen_logprobs: Tensor,
        ref_rejected_logprobs: Tensor,
        beta: float,
        **inputs: Tensor,
    ) -> Tensor:
        """(B,) losses; `inputs` are those of `FROM_BATCH`, (B,) or () each."""
        pair = (chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
        total = torch.zeros_like(chosen_logprobs)
        for term in self.terms:
            wanted = {name: value for name, value in inputs.items() if name in term.arguments}
            total = total + term.weight * term.function(*pair, beta, **(wanted | (term.options or {})))
        return total


def check_term(term: LossTerm, reference_free: bool = False) -> None:
    """Refuse a term that could not be computed or would not mean what its options say.

    Raises:
        UserError: names the loss and the option.
    """
    options = term.options or {}
    for name in options:
        if name not in term.arguments:
            takers = [other for other in losses.__all__ if other.endswith("_loss") and _takes(other, name)]
            those = f"; {', '.join(takers)} take it" if takers else ""
            own = f"takes {sorted(term.arguments)}" if term.arguments else "takes no options"
            raise UserError(f"{term.name} would ignore {name} ({options[name]}): it {own}{those}")
    missing = [
        name
        for name, parameter in term.arguments.items()
        if parameter.default is parameter.empty and name not in options and name not in FROM_BATCH
    ]
    if missing:
        raise UserError(f"{term.name} needs {', '.join(missing)}: give it in the term's options")
    if not term.weight > 0:
        raise UserError(f"the weight of {term.name} ({term.weight}) must be more than 0")
    if reference_free and term.function in NEED_REFERENCE:
        raise UserError(f"{term.name} rates each response against the reference: set reference_free: false")
    one = torch.ones(1)
    inputs = {name: one for name in FROM_BATCH if name in term.arguments}
    try:
        probe = term.function(one, one, one, one, 1.0, **(inputs | options))
    except (TypeError, ValueError) as error:
        raise UserError(f"{term.name}: {error}") from error
    if probe.shape != (1,):
        raise UserError(f"{term.name} must give one loss per pair, (B,); for one pair it gave {tuple(probe.shape)}")


def _takes(function: str, argument: str) -> bool:
    parameters = inspect.signature(getattr(losses, function)).parameters
    return argument in list(parameters)[PAIR:]
