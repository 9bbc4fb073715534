"""A model of other weights that never learns, beside the policy: a reference or a teacher, and divergences from it."""

from typing import Any, NamedTuple

import torch
from torch import nn

from lit_rlhf.algorithms.chosen import ChosenFunction, check_options, name_of, tried
from lit_rlhf.engine.divergence import Divergence
from lit_rlhf.engine.memory import numbers
from lit_rlhf.errors import UserError, named_by
from lit_rlhf.models.adapter_folders import saved_adapter
from lit_rlhf.models.holding import FrozenDtype
from lit_rlhf.models.loading import load_policy_with_tokenizer
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.roles import (
    HoldReference,
    OwnModel,
    Reference,
    SameBase,
    is_base,
    own_reference,
    reference_of,
    shares_base,
)
from lit_rlhf.models.tokens import check_same_tokens, load_tokenizer


class Beside(NamedTuple):
    """The policy that a model is to stand beside, and how that is read and held."""

    policy: Policy  # that learns
    tokenizer: Any  # the policy's
    frozen: dict[str, nn.Module]  # networks outside of the module tree, to which it is added
    hold: HoldReference | None = None  # None = on the policy's base where it can be, else a copy
    frozen_dtype: FrozenDtype | None = None  # what its weights are held in
    trust_remote_code: bool = False  # run model code that comes with the weights


def frozen_model(name: str, role: str, beside: Beside) -> OwnModel:
    """Another model on the policy's device.

    Args:
        name: folder or hub name; of an adapter, on its own base.
        role: of it, for messages.
        beside: what it stands beside, and how it is held: "copy" or "parked"; None = copy.

    Raises:
        UserError: no such model, or one of another vocabulary.
    """
    policy, tokenizer, frozen, hold, frozen_dtype, trust_remote_code = beside
    with named_by(f"model.{role}"):
        network, theirs = load_policy_with_tokenizer(
            name, False, trust_remote_code, frozen_dtype=frozen_dtype, learns=False
        )
        view = own_reference(network, policy, frozen, hold, frozen_dtype)
    check_same_tokens(tokenizer, theirs, f"{role} {name}")
    assert isinstance(view, OwnModel)
    return view


def named_reference(name: str, beside: Beside) -> Reference:
    """Another model than the policy was as π_ref: on the policy's base where it can be, else a model of its own.

    It can where it is that base, or an adapter on it, unless `hold` says otherwise. Arguments and errors are those of
    `frozen_model`.
    """
    policy, tokenizer, frozen, hold, _, trust_remote_code = beside
    with named_by("model.reference"):
        saved = saved_adapter(name)
        shared = is_base(policy, name) if saved is None else shares_base(policy, saved)
    if not shared or hold in ("copy", "parked"):
        return frozen_model(name, "reference", beside)
    with named_by("model.reference"):
        theirs = load_tokenizer(name, policy.model.config, trust_remote_code)
        check_same_tokens(tokenizer, theirs, f"reference {name}")
        return SameBase(policy, ()) if saved is None else reference_of(policy, frozen, hold, saved=saved)


@numbers()
def chosen_divergence(chosen: ChosenFunction) -> Divergence:
    """The divergence, tried on two tokens of three words.

    Raises:
        UserError: it cannot be computed, or gives something else than a finite divergence per token with a gradient.
    """
    check_options(chosen, given=2)
    teacher, student = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [[0.0, 1.0, 0.5], [1.0, 0.0, 2.0]]])
    student.requires_grad_()
    given = tried(chosen, teacher.log_softmax(-1), student.log_softmax(-1))
    if not isinstance(given, torch.Tensor) or given.shape != (2,):
        shape = tuple(given.shape) if isinstance(given, torch.Tensor) else f"a {type(given).__name__}"
        raise UserError(f"{name_of(chosen)} must give one divergence per token, (M,); for two tokens it gave {shape}")
    if not given.requires_grad or not given.isfinite().all():
        raise UserError(f"{name_of(chosen)} gives divergences that are not finite, or have no gradient by the student")
    options = chosen.options or {}
    return lambda teacher_logprobs, logprobs: chosen.function(teacher_logprobs, logprobs, **options)
