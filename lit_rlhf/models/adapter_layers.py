"""Which layers of a model an adapter goes into, by the names that were given for them."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_rlhf.errors import UserError
from lit_rlhf.models.heads import SCALAR_HEAD, head_kind

ALL_LINEAR = "all-linear"


def regex_fault(pattern: str) -> str | None:
    """What is wrong with a regular expression, if anything is."""
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


def candidates(model: nn.Module) -> list[str]:
    """Names of the layers that an adapter may go into: not a scalar head, which learns as a whole."""
    kinds, head = (nn.Linear, nn.Embedding, Conv1D), scalar_head(model)
    names = (name for name, module in model.named_modules() if isinstance(module, kinds) and ".lora_" not in name)
    return [name.removesuffix(".base_layer") for name in names if name != head]


def scalar_head(model: nn.Module) -> str | None:
    """Name of the scalar head in a classifier; None in other models."""
    return SCALAR_HEAD if head_kind([type(model).__name__]) is not None else None


def leave_out(config: Any, name: str | None) -> None:
    """Let a pattern of layers' names not mean the layer of this name; None = none."""
    if name is not None and isinstance(config.target_modules, str) and config.target_modules.lower() != ALL_LINEAR:
        given = config.exclude_modules
        config.exclude_modules = f"(?:{given})|{name}" if isinstance(given, str) else [*(given or ()), name]


def require_layers(model: PreTrainedModel, config: Any) -> None:
    """Refuse names of layers that no layer has, which PEFT would pass over, and exclusions that leave none.

    Also those of what is no layer for an adapter: a scalar head, or a whole block.

    Raises:
        UserError: names them, and those that there are.
    """
    names, head = candidates(model), scalar_head(model)
    if head is not None and not isinstance(config.target_modules, str) and head in config.target_modules:
        raise UserError(f"lora.target_modules: {head} is the scalar head, which learns as a whole in any case: drop it")
    for option in ("target_modules", "exclude_modules"):
        given = getattr(config, option)
        if given is None or (isinstance(given, str) and given.lower() == ALL_LINEAR):
            continue
        if isinstance(given, str):
            if not named(names, given):
                raise UserError(
                    f"lora.{option}: {given} is read as a regular expression of whole names and matches none, such as "
                    f"{next(iter(names), 'none')}; a list names layers by the ends of their names"
                )
            if option == "target_modules":
                refuse_blocks(model, config, names)
            continue
        refuse_missing(f"lora.{option}", [end for end in given if not named(names, [end])], names)
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, option) or {}
        missing = [p for p in patterns if not any(re.match(rf"(.*\.)?({p})$", name) for name in names)]
        refuse_missing(f"lora.{option}", missing, names)
    output, excluded = model.get_output_embeddings(), config.exclude_modules
    plain = [name for name in names if isinstance(held := model.get_submodule(name), nn.Embedding) or held is output]
    every = isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR
    targets = [name for name in named(names, config.target_modules) if not (every and name in plain)]
    if excluded and not set(targets) - set(named(names, excluded)):
        raise UserError(
            f"lora.exclude_modules ({_said(excluded)}) leaves no layer of lora.target_modules "
            f"({_said(config.target_modules)}); there are {', '.join(_ends(names))}"
        )


def refuse_blocks(model: nn.Module, config: Any, layers: Sequence[str]) -> None:
    """Refuse a pattern that matches more than layers, such as a whole block."""
    known = {*layers, scalar_head(model)}
    names = [name for name, _ in model.named_modules() if name not in known and name.rpartition(".")[0] not in known]
    names = [name for name in names if ".lora_" not in name and ".base_layer" not in name]
    matched = named(names, config.target_modules)
    if blocks := [name for name in matched if name not in named(matched, config.exclude_modules)]:
        example = r".*\.(q_proj|v_proj)"
        raise UserError(
            f"lora.target_modules: {config.target_modules} matches {blocks[0] or 'the whole model'}, too, which is no "
            f"linear layer: write a pattern of layers alone, such as {example}; there are {', '.join(_ends(layers))}"
        )


def named(names: Iterable[str], given: Any) -> list[str]:
    """Those of the names that are meant: by the ends of a list, by a pattern of whole names, or all."""
    if isinstance(given, str) and given.lower() == ALL_LINEAR:
        return list(names)
    if isinstance(given, str):
        return [name for name in names if re.fullmatch(given, name)]
    return [name for name in names if any(name == end or name.endswith(f".{end}") for end in given or ())]


def refuse_missing(option: str, missing: Sequence[str], names: Iterable[str]) -> None:
    """Refuse names that no layer has."""
    if missing:
        there = ", ".join(_ends(names))
        raise UserError(f"{option}: no layer of this model is named {', '.join(missing)}; there are {there}")


def _ends(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _said(given: Any) -> str:
    return given if isinstance(given, str) else ", ".join(sorted(given))
