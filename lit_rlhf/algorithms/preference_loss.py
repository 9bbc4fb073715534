"""A loss of the DPO family as a YAML chooses it: a function, or a weighted sum of several with their own arguments.

    loss: lit_rlhf.losses.ipo_loss
    loss:
      - {function: lit_rlhf.losses.robust_dpo_loss, options: {label_smoothing: 0.1}}
      - {function: lit_rlhf.losses.chosen_nll_loss, weight: 0.2}

What a loss asks for by the name of an argument beyond the log-probs and β comes from the batch (`FROM_BATCH`) or from
its options. Whatever makes no sense is refused by name when it is chosen, before any data is read.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from lit_rlhf import losses
from lit_rlhf.algorithms.chosen import arguments_of, check_options, name_of, tried, unbound
from lit_rlhf.algorithms.resuming import ResumableModule
from lit_rlhf.algorithms.reward_shift import RewardShift
from lit_rlhf.data.batches import PreferenceBatch
from lit_rlhf.errors import UserError, damaged, named_by, require, require_alike, require_types

PAIR = 5  # chosen, rejected and reference log-probs, and β: what every loss of the family takes
FROM_BATCH = ("chosen_lengths", "rejected_lengths", "margin", "reward_shift")
# Three pairs that every loss is tried on when it is chosen: log-probs, and what the batch would fill in.
TRIED_PAIRS = torch.tensor([[-1.0, -2.0, -4.0], [-2.0, -1.0, -6.5], [-1.5, -1.0, -4.5], [-2.5, -2.0, -3.0]])
TRIED_INPUTS = {
    "chosen_lengths": torch.tensor([2.0, 3.0, 5.0]),
    "rejected_lengths": torch.tensor([3.0, 2.0, 4.0]),
    "margin": torch.tensor([0.5, 1.0, 2.0]),
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


WITHOUT_REFERENCE = {losses.simpo_loss: "SimPO", losses.cpo_loss: "CPO", losses.orpo_loss: "ORPO"}


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

    def __post_init__(self) -> None:
        """Refuse a weight that is no number."""
        require_types(type(self), vars(self))


class PreferenceLoss:
    """Losses of B pairs, as `dpo_loss`: Σ weight · term.

    Args:
        loss: one function, or terms.
        reference_free: the reference log-probs will be zeros.

    Attributes:
        inputs: those of `FROM_BATCH` that a term asks for and its options do not give.
        shift: the state of a loss that has one, else None.
    """

    def __init__(self, loss: Callable[..., Any] | Sequence[LossTerm], reference_free: bool = False) -> None:
        self.terms = [with_bound(term) for term in ([LossTerm(loss)] if callable(loss) else loss)]
        if not self.terms:
            raise UserError("loss is an empty list; give a function or at least one term")
        asked = [set(arguments_of(term, PAIR)) - set(term.options or {}) for term in self.terms]
        self.inputs = set(FROM_BATCH) & set().union(*asked)
        self.shift = RewardShift() if "reward_shift" in self.inputs else None
        samples = [try_term(term, reference_free) for term in self.terms]
        likelihoods = [name_of(term) for term in self.terms if term.function in WITH_LIKELIHOOD]
        if len(likelihoods) > 1:
            raise UserError(f"loss has the likelihood of the chosen response {len(likelihoods)} times: {likelihoods}")
        if [term.function for term in self.terms] == [losses.chosen_nll_loss]:
            raise UserError(
                "chosen_nll_loss alone would ignore beta, the reference and the rejected responses; add another term, "
                "or train SFT on the chosen responses"
            )
        for i, term in enumerate(self.terms):
            for other, values in zip(self.terms[:i], samples, strict=False):
                if torch.allclose(values, samples[i]):
                    raise UserError(
                        f"loss has {name_of(other)} and {name_of(term)}, which are the same loss twice; put their "
                        "weights together in one term"
                    )

    def inputs_from(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        """What the terms ask for beyond log-probs: lengths and margins of B pairs, (B,), and the running shift, ()."""
        wanted = {}
        if self.inputs & {"chosen_lengths", "rejected_lengths"}:
            wanted["chosen_lengths"], wanted["rejected_lengths"] = batch.packed.response_lengths.chunk(2)
        if "margin" in self.inputs:
            wanted["margin"] = batch.margin
        if self.shift is not None:
            wanted["reward_shift"] = self.shift.mean.to(batch.packed.input_ids.device)
        return wanted

    def observe(self, rewards: Tensor) -> None:
        """Take down the implicit rewards of a micro-batch's pairs, (B,), where the loss has state."""
        if self.shift is not None:
            self.shift.observe(rewards)

    def after_step(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Let the state follow, not before: all micro-batches of a step have the same."""
        if self.shift is not None:
            self.shift.update(sum_over_ranks)

    def state_dict(self) -> dict[str, Any]:
        """The state, for the checkpoint; nothing where there is none."""
        return {} if self.shift is None else self.shift.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        if self.shift is not None:
            self.shift.load_state_dict(state)

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
            wanted = {name: value for name, value in inputs.items() if name in arguments_of(term, PAIR)}
            total = total + term.weight * term.function(*pair, beta, **(wanted | (term.options or {})))
        return total


class KeepsPairLoss(ResumableModule):
    """A module whose loss of pairs may have a state: it follows the policy, and goes into every checkpoint."""

    loss: PreferenceLoss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's step; then the state of the loss follows the policy, where it has one."""
        super().optimizer_step(*args, **kwargs)
        self.loss.after_step(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the loss."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["loss"] = self.loss.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take that of the run that goes on."""
        super().on_load_checkpoint(checkpoint)
        require_alike(checkpoint.get("loss"), {}, damaged(self.resumed_file, "loss"))
        with named_by(damaged(self.resumed_file, "loss")):
            self.loss.load_state_dict(checkpoint["loss"])


def with_bound(term: LossTerm) -> LossTerm:
    """The same term with what `functools.partial` has bound among its options."""
    function, options = unbound(term.function, term.options)
    return replace(term, function=function, options=options)


def try_term(term: LossTerm, reference_free: bool = False) -> Tensor:
    """Refuse a term that could not be computed or would not mean what its options say.

    Returns:
        Its losses of `TRIED_PAIRS`, without the weight.

    Raises:
        UserError: names the loss and the option.
    """
    if alone := WITHOUT_REFERENCE.get(term.function):
        raise UserError(f"{name_of(term)} knows no reference: set model.class_path: lit_rlhf.{alone}, which holds none")
    check_options(term, PAIR, filled=FROM_BATCH, takers=_takers)
    require(0 < term.weight < math.inf, f"the weight of {name_of(term)}", term.weight, "more than 0, and finite")
    if reference_free and term.function in NEED_REFERENCE:
        raise UserError(f"{name_of(term)} rates each response against the reference: set reference_free: false")
    inputs = {name: value for name, value in TRIED_INPUTS.items() if name in arguments_of(term, PAIR)}
    values = tried(term, *TRIED_PAIRS.clone().requires_grad_(), 1.0, **inputs)
    if not isinstance(values, Tensor) or values.shape != (3,):
        given = tuple(values.shape) if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise UserError(f"{name_of(term)} must give one loss per pair, (B,); for three pairs it gave {given}")
    if not values.requires_grad:
        raise UserError(f"{name_of(term)} gives losses without a gradient: nothing would be learnt")
    values = values.detach()
    if not values.isfinite().all():
        given = f"{name_of(term)} with the options {term.options or {}}"
        raise UserError(f"{given} gives losses that are not finite: {values.tolist()}")
    return values


def _takers(argument: str) -> str:
    """The losses that take this option, in words; nothing where there are none."""
    names = [name for name in losses.__all__ if "ref_chosen_logprobs" in signature(getattr(losses, name)).parameters]
    those = [name for name in names if argument in arguments_of(LossTerm(getattr(losses, name)), PAIR)]
    return f"; {', '.join(those)} take it" if those else ""
