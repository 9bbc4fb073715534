"""Where each role lives, in words, and which parameters are its own: for those who count memory."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lit_rlhf.models.policy import Policy, Scorer
from lit_rlhf.models.roles import OnTrunk, OwnModel, SameBase, policy_parameters


def place_of(view: Any) -> str:
    """Where a role lives; a view that is a text, as of a function or of cached numbers, says it itself."""
    if isinstance(view, Policy | Scorer):
        learns = any(parameter.requires_grad for parameter in view.parameters())
        return "adapter, own base" if view.adapters is not None else "own model" if learns else "own model, frozen"
    if isinstance(view, SameBase):
        return "policy's base"
    if isinstance(view, OwnModel):
        return "own model, parked" if view.parked else "own model, frozen"
    if isinstance(view, OnTrunk):
        return "head on policy's trunk" if view.adapter is None else "adapter, policy's base"
    return str(view)


def parameters_of(view: Any) -> Iterable[nn.Parameter]:
    """Those that a role brings along: of the policy not what other roles put on its base."""
    if isinstance(view, Policy):
        return policy_parameters(view)
    if isinstance(view, SameBase):
        adapters = view.policy.adapters
        return [] if adapters is None else [p for name in view.adapters for p in adapters.parameters(name)]
    if isinstance(view, OwnModel):
        return view.network.parameters()
    return view.parameters() if isinstance(view, Scorer | OnTrunk) else []
