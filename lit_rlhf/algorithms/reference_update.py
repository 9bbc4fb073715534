"""TR-DPO: a reference that follows the policy."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lit_rlhf.errors import UserError, require_types
from lit_rlhf.models.holding import FrozenDtype
from lit_rlhf.models.policy import Policy


@dataclass(frozen=True)
class ReferenceUpdate:
    """Move the reference's weights towards the policy's: π_ref ← α π + (1 - α) π_ref.

    Gorbatovski et al. 2024 (TR-DPO), https://arxiv.org/abs/2404.09656: α = 1 is the hard update, less the soft one.

    Args:
        alpha: α in (0, 1].
        every: optimiser steps between two updates.
    """

    alpha: float = 0.6
    every: int = 512

    def __post_init__(self) -> None:
        """Refuse what would never move the reference, or past the policy."""
        require_types(type(self), vars(self))
        if not 0 < self.alpha <= 1:
            raise UserError(f"alpha ({self.alpha}) of the reference's update must be in (0, 1]; 1 copies the policy")
        if self.every < 1:
            raise UserError(f"every ({self.every}) must be 1 or more optimiser steps between two updates")

    def require_whole(self, policy: Policy, frozen_dtype: FrozenDtype | None) -> None:
        """Refuse a policy that learns an adapter, and a reference that is held in less than the policy."""
        if policy.adapters is not None:
            raise UserError("reference_update moves whole weights, and here an adapter learns: drop one of them")
        if frozen_dtype is not None:
            raise UserError("reference_update moves the reference, and frozen_dtype is of weights that stay: drop one")

    @staticmethod
    def moving(frozen: dict[str, nn.Module]) -> Policy:
        """The reference, taken out of the frozen networks: one that moves is state, and goes into every checkpoint."""
        reference = cast(Policy, frozen.pop("reference"))
        reference.stands_on = {}
        return reference.train()  # Lightning warns of eval mode; dropout is 0 anyway

    def follow(self, step: int, reference: nn.Module, policy: nn.Module) -> None:
        """Move the reference where it is due after the optimiser step of this number, from 1."""
        if step % self.every == 0:
            self.apply(reference, policy)

    @torch.no_grad()
    def apply(self, reference: nn.Module, policy: nn.Module) -> None:
        """Move the reference, in place; sharded networks move shard by shard."""
        for module in reference.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward without a backward leaves the root gathered
        for held, trained in zip(reference.parameters(), policy.parameters(), strict=True):
            held.lerp_(trained.to(held.dtype), self.alpha)
