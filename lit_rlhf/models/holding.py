"""How weights are held: in which dtype those that never learn, and how a model in half precision is tried in float32.

What learns is held as the Trainer's `precision` says. Weights are read in the dtype that they will have, never cast
afterwards: of a file in that very dtype, the pages that the system has read are the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_rlhf.engine.memory import only_shapes
from lit_rlhf.errors import UserError, require

FrozenDtype = Literal["float32", "bfloat16", "nf4"]
# What `frozen_dtype` may be beside a precision that casts weights, or computes in another half precision.
BESIDE = {"bf16-true": ("bfloat16", "nf4"), "16-true": (), "64-true": (), "16-mixed": ("float32",)}

UNCUT = [False]  # see `reading_in`


def require_frozen_dtype(frozen_dtype: str | None) -> None:
    """Refuse what is no dtype of frozen weights, or cannot be made here; before any weight is read."""
    names = get_args(FrozenDtype)
    require(frozen_dtype in (None, *names), "frozen_dtype", frozen_dtype, f"one of {', '.join(names)}, or null")
    if frozen_dtype == "nf4" and not only_shapes():
        require_bitsandbytes("frozen_dtype: nf4")


def require_bitsandbytes(option: str) -> Any:
    """The package that quantises.

    Raises:
        UserError: it is not there.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"{option} needs bitsandbytes, which is not installed: pip install '.[quantized]' in a checkout of lit-rlhf"
        )
    import bitsandbytes

    return bitsandbytes


def require_precision(frozen_dtype: str | None, precision: str) -> None:
    """Refuse a dtype of frozen weights that the Trainer's precision would undo."""
    fitting = BESIDE.get(precision)
    if frozen_dtype is not None and fitting is not None and frozen_dtype not in fitting:
        own = "computes in float16" if precision == "16-mixed" else "holds all weights in its own dtype"
        raise UserError(
            f"frozen_dtype ({frozen_dtype}) and trainer.precision ({precision}) exclude each other: that precision "
            f"{own}; drop frozen_dtype, or set trainer.precision: bf16-mixed or 32-true"
        )


def dtype_by(precision: str | None) -> torch.dtype:
    """The dtype of weights that learn under a precision of Lightning's; wider ones are cast by it."""
    return {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(str(precision), torch.float32)


def dtype_of(held: FrozenDtype | None) -> torch.dtype:
    """The dtype that weights are read in; None = torch's default, as Lightning's `init_module` sets it."""
    if held is None:
        return torch.get_default_dtype()
    return torch.float32 if held == "float32" else torch.bfloat16  # beside layers in NF4, too


def quantization(held: FrozenDtype | None) -> dict[str, Any]:
    """What transformers is told beside the dtype.

    NF4 with constants that are quantised once more, as in QLoRA (Dettmers et al. 2023,
    https://arxiv.org/abs/2305.14314): 4.13 bits a weight, for linear layers but heads.
    """
    if held != "nf4":
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": "cpu"}}  # strategies move it


def num_weights(parameter: Tensor) -> int:
    """How many weights a parameter holds; in NF4 a byte holds two."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


@contextmanager
def reading_in(dtype: torch.dtype, uncut: bool = False) -> Iterator[None]:
    """While inside, weights are read in this dtype, unless a model is told otherwise.

    Args:
        dtype: of weights.
        uncut: all networks that are made will be cut over ranks (`AlignmentModule.configure_model`). Until then their
            weights are left as they are in files, so that ranks of a machine share their pages, and none holds a whole
            model: pieces alone are cast.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    UNCUT.append(uncut)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        UNCUT.pop()


def stays_uncut(held: FrozenDtype | None) -> bool:
    """Whether weights that are read now, to be held so, are left to be cut first."""
    return UNCUT[-1] and held != "nf4"


@contextmanager
def in_float32(model: nn.Module, whole: bool) -> Iterator[None]:
    """While inside, a model computes in float32, whatever its weights are held in: small differences then count.

    Args:
        model: in float32 already, or not.
        whole: cast all of it, not each block, and each part outside of blocks, for its own passes alone, so that one at
            a time is there in float32. Some models, such as Mamba, look at the dtype of a part before they call it.
    """
    quantized: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "compute_dtype", None), torch.dtype)]
    before = [module.compute_dtype for module in quantized]
    for module in quantized:
        module.compute_dtype = torch.float32
    cast = [Widened(part) for part in ([model] if whole else parts(model)) if is_half(part)]
    handles: list[Any] = []
    for one in cast:
        if whole:
            one.widen()
        else:
            handles.append(one.part.register_forward_pre_hook(one.widen))
            handles.append(one.part.register_forward_hook(one.narrow, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for one in cast:
            one.narrow()
        for module, dtype in zip(quantized, before, strict=True):
            module.compute_dtype = dtype


class Widened:
    """A part of a model whose weights are in float32 for a while, and then again what they were, to the bit."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part
        self.held: list[tuple[nn.Parameter, Tensor]] = []

    def widen(self, *call: Any) -> None:
        """Cast them; `call` is what hooks are given."""
        self.held += [(p, p.data) for p in self.part.parameters() if p.is_floating_point()]
        for parameter, data in self.held:
            parameter.data = data.float()

    def narrow(self, *call: Any) -> None:
        """Put them back."""
        for parameter, data in reversed(self.held):
            parameter.data = data
        self.held.clear()


def is_half(module: nn.Module) -> bool:
    """Whether any of its weights is in half precision."""
    return any(p.is_floating_point() and p.dtype.itemsize < 4 for p in module.parameters())


def parts(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model, and what has weights outside of them."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) or next(child.parameters(recurse=False), None) is not None:
            yield child
        else:
            yield from parts(child)
