"""Activation checkpointing: blocks keep their input alone, and are computed once more in the backward pass.

The marks in transformers' models say where; torch's checkpoint does it, with the random numbers of the first pass. What
is added here: the second pass of a block has the adapters on that its first pass had, whoever has run since.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from lit_rlhf.errors import UserError
from lit_rlhf.models.adapters import Adapters


class Checkpointing:
    """The blocks of a network that are computed twice, in passes that learn.

    Args:
        model: of transformers.
        adapters: in it.
        quiet: whether it stays in evaluation mode while it learns.

    Raises:
        UserError: this model cannot do it.
    """

    def __init__(self, model: Any, adapters: Adapters | None, quiet: bool) -> None:
        self.marked: list[Any] = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self.adapters, self.on = adapters, False
        if not model.supports_gradient_checkpointing or not self.marked:
            raise UserError(
                f"activation_checkpointing: {type(model).__name__} has no blocks that can be computed twice; set it to "
                "false, and lower data.max_tokens where memory is short"
            )
        if quiet:
            raise UserError(
                f"activation_checkpointing: {type(model).__name__} stays in evaluation mode while it learns, where "
                "transformers computes nothing twice; set it to false"
            )
        for module in self.marked:
            module._gradient_checkpointing_func = self.run

    def switch(self) -> None:
        """Called at the start of each pass: blocks that decode keep their cache, and need no second pass."""
        if self.on != torch.is_grad_enabled():
            self.on = torch.is_grad_enabled()
            for module in self.marked:
                module.gradient_checkpointing = self.on

    def run(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block's output; what it was made of is made again when its gradient is asked for."""
        adapters = self.adapters
        on = None if adapters is None else adapters.on

        def as_first(*args: Any, **kwargs: Any) -> Any:
            if adapters is not None and on is not None:
                adapters.switch(on)
            return block(*args, **kwargs)

        return checkpoint(as_first, *args, use_reentrant=False, **kwargs)
