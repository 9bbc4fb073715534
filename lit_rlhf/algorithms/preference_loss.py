"""A loss of the DPO family as a YAML chooses it: a function, or a weighted sum of several with their own arguments.

    loss: lit_rlhf.losses.ipo_loss
    loss:
      - {function: lit_rlhf.losses.robust_dpo_loss, options: {label_smoothing: 0.1}}
      - {function: lit_rlhf.losses.chosen_nll_loss, weight: 0.2}

What a loss asks for by the name of an argument beyond the log-probs and β comes from the batch (`FROM_BATCH`) or from
its options. Whatever makes no sense is refused by name when it is chosen, before any data is read.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_rlhf import losses
from lit_rlhf.errors import UserError, place_of, require

PAIR = 5  # chosen, rejected and reference log-probs, and β: what every loss of the family takes
FROM_BATCH = ("chosen_lengths", "rejected_lengths", "reward_shift")
# Three pairs that every loss is tried on when it is chosen: log-probs, and what the batch would fill in.
TRIED_PAIRS = torch.tensor([[-1.0, -2.0, -4.0], [-2.0, -1.0, -6.5], [-1.5, -1.0, -4.5], [-2.5, -2.0, -3.0]])
TRIED_INPUTS = {
    "chosen_lengths": torch.tensor([2.0, 3.0, 5.0]),
    "rejected_lengths": torch.tensor([3.0, 2.0, 4.0]),
    "reward_shift": torch.tensor(0.5),
}
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
        self.terms = [spread(term) for term in ([LossTerm(loss)] if callable(loss) else loss)]
        if not self.terms:
            raise UserError("loss is an empty list; give a function or at least one term")
        self.inputs = {
            name for term in self.terms for name in FROM_BATCH if name in set(term.arguments) - set(term.options or {})
        }
        tried = [try_term(term, reference_free) for term in self.terms]
        likelihoods = [term.name for term in self.terms if term.function in WITH_LIKELIHOOD]
        if len(likelihoods) > 1:
            raise UserError(f"loss has the likelihood of the chosen response {len(likelihoods)} times: {likelihoods}")
        if [term.function for term in self.terms] == [losses.chosen_nll_loss]:
            raise UserError(
                "chosen_nll_loss alone would ignore beta, the reference and the rejected responses; add another term, "
                "or train SFT on the chosen responses"
            )
        for i, term in enumerate(self.terms):
            for other, values in zip(self.terms[:i], tried, strict=False):
                if torch.allclose(values, tried[i]):
                    raise UserError(
                        f"loss has {other.name} and {term.name}, which are the same loss twice; put their weights "
                        "together in one term"
                    )

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


def spread(term: LossTerm) -> LossTerm:
    """The same term with what `functools.partial` has bound by name among its options."""
    if not isinstance(term.function, partial) or term.function.args:
        return term
    return replace(term, function=term.function.func, options=term.function.keywords | (term.options or {}))


def try_term(term: LossTerm, reference_free: bool = False) -> Tensor:
    """Refuse a term that could not be computed or would not mean what its options say.

    Returns:
        Its losses of `TRIED_PAIRS`, without the weight.

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
    require(0 < term.weight < math.inf, f"the weight of {term.name}", term.weight, "more than 0, and finite")
    if reference_free and term.function in NEED_REFERENCE:
        raise UserError(f"{term.name} rates each response against the reference: set reference_free: false")
    inputs = {name: value for name, value in TRIED_INPUTS.items() if name in term.arguments}
    try:
        values = term.function(*TRIED_PAIRS.clone().requires_grad_(), 1.0, **(inputs | options))
    except Exception as error:  # whatever a function of the user's raises
        if isinstance(error, ValueError) and term.function.__module__.startswith(losses.__name__):
            raise UserError(f"{term.name}: {error}") from error
        raise UserError(f"{term.name} raised {type(error).__name__}: {error}{place_of(error)}") from error
    if not isinstance(values, Tensor) or values.shape != (3,):
        given = tuple(values.shape) if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise UserError(f"{term.name} must give one loss per pair, (B,); for three pairs it gave {given}")
    if not values.requires_grad:
        raise UserError(f"{term.name} gives losses without a gradient: nothing would be learnt")
    values = values.detach()
    if not values.isfinite().all():
        raise UserError(f"{term.name} with the options {options} gives losses that are not finite: {values.tolist()}")
    return values


def _takes(function: str, argument: str) -> bool:
    parameters = inspect.signature(getattr(losses, function)).parameters
    return argument in list(parameters)[PAIR:]
