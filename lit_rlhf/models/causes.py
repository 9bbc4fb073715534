"""Where the numbers of two ways through a model part, or where one of them fails: the cause that a user is told."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from lit_rlhf.models.trunk import backbone

TOLERANCE = 1e-3  # of the largest number


@contextmanager
def silent_transformers() -> Iterator[None]:
    """While inside, transformers says nothing of what goes wrong: a message of ours will."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def difference(ours: Tensor, own: Tensor) -> float:
    """Largest difference, as a share of the largest number."""
    return float((ours - own).abs().max() / own.abs().max())


def said(error: Exception) -> str:
    """An error in a line, and in which module it came up."""
    modules = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    kinds = [type(module).__name__ for module in modules if isinstance(module, nn.Module)]
    where = f" in {kinds[-1]}" if kinds else ""
    return f"{type(error).__name__}{where}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[dict[str, list[Tensor]]]:
    """While inside, the outputs of each module by token: (1, S, d) at each call."""
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.ndim == 3 and first.shape[0] == 1:
                outputs.setdefault(name, []).append(first[0])

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in backbone(model).named_modules() if name]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def first_difference(own: dict[str, list[Tensor]], ours: dict[str, list[Tensor]], model: PreTrainedModel) -> str:
    """Which module was the first to give other numbers, as the end of a sentence; empty where none is known."""
    for name, parts in ours.items():  # in the order of their ends: a module's parts before itself
        widths = {part.shape[1] for part in (*parts, *own.get(name, parts))}
        if len(parts) > 1 or len(widths) > 1 or name not in own:  # called otherwise, or not a row for each token
            continue
        theirs = torch.cat(own[name])
        if theirs.shape == parts[0].shape and not difference(parts[0], theirs) <= TOLERANCE:
            parent = name.rpartition(".")[0] or name
            return f", first in {type(backbone(model).get_submodule(parent)).__name__} ({parent})"
    return ""
