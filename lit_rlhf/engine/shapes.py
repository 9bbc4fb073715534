"""Shapes as the annotations of a function state them, held at every call.

PyTorch broadcasts: a column (8, 1) beside a row (8,) becomes a table (8, 8) of all pairs, and the mean of that is a
loss that looks like any other. So public functions of tensors name their axes with jaxtyping, and `check_shapes`
refuses what breaks them:

    @check_shapes
    def bradley_terry_loss(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, " B"]: ...

An axis has one size in a call; `*shape` stands for any number of axes, the same ones wherever it is named, and "" for a
scalar. Fields of a named tuple are held like arguments. Dtypes are PyTorch's matter, but for masks: one of 0 and 1
would index instead of select. What is no tensor, such as the number or None that an argument may also be, passes. In
the test run beartype checks the whole annotation, results and dtypes too.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_args

import torch
from jaxtyping import AbstractArray, Bool
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Argument(NamedTuple):
    """A tensor that a function takes, by itself or as a field of a named tuple, as its annotation states it."""

    name: str
    position: int
    field: str | None
    axes: tuple[str, ...]
    is_mask: bool

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a call gives for it; None if nothing."""
        value = args[self.position] if self.position < len(args) else kwargs.get(self.name)
        return value if self.field is None else getattr(value, self.field, None)

    def fits(self, x: Tensor, sizes: dict[str, Any]) -> bool:
        """Whether `x` has these axes, at the `sizes` that they have elsewhere in the call; adds new ones there."""
        shape: Sequence[Any] = x.shape
        if self.axes and self.axes[0].startswith("*"):  # it takes what the others leave
            rest = max(0, len(shape) - len(self.axes) + 1)
            shape = (shape[:rest], *shape[rest:])
        if len(shape) != len(self.axes) or (self.is_mask and x.dtype != torch.bool):
            return False
        return all(sizes.setdefault(axis, size) == size for axis, size in zip(self.axes, shape, strict=True))

    @property
    def path(self) -> str:
        """As in "rollout.values"."""
        return self.name if self.field is None else f"{self.name}.{self.field}"

    def __str__(self) -> str:
        """As in "mask must be bool (B, T)"."""
        alone = len(self.axes) == 1 and self.axes[0].startswith("*")
        shape = "of the same shape" if alone else str(self.axes).replace("'", "")
        return f"{self.path} must be {'bool ' if self.is_mask else ''}{shape}"


def check_shapes(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse tensors that break the shapes in the function's annotations, instead of broadcasting them.

    The annotations are read once; a call costs microseconds. To `torch.compile` and `torch.func` it is a comparison of
    sizes.

    Args:
        function: with arguments annotated as `Float[Tensor, "B T"]`, or as that or a number or None.

    Returns:
        The function, which raises ValueError with names and shapes of the tensors that do not go together.
    """
    arguments = tensor_arguments(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        sizes: dict[str, Any] = {}
        for argument in arguments:
            x = argument.given(args, kwargs)
            if isinstance(x, Tensor) and not argument.fits(x, sizes):
                tensors = [(other.path, other.given(args, kwargs)) for other in arguments if other is not argument]
                shapes = ", ".join(f"{name} {tuple(y.shape)}" for name, y in tensors if isinstance(y, Tensor))
                got = f"{tuple(x.shape)} {x.dtype}" if argument.is_mask else f"{tuple(x.shape)}"
                beside = f" beside {shapes}" if shapes else ""
                raise ValueError(f"{function.__name__}: {argument}, got {got}{beside}")
        return function(*args, **kwargs)

    return checked


def tensor_arguments(function: Callable[..., Any]) -> tuple[Argument, ...]:
    """The arguments of a function that its annotations give a shape.

    Raises:
        TypeError: there is none, and so nothing to check.
    """
    arguments = tuple(
        Argument(name, position, field, tuple(array.dim_str.split()), is_mask=array.dtype is Bool)
        for position, (name, parameter) in enumerate(inspect.signature(function).parameters.items())
        for field, array in annotated_arrays(parameter.annotation)
    )
    if not arguments:
        raise TypeError(f'{function.__name__} has no argument with a shape, such as Float[Tensor, "B T"]')
    return arguments


def annotated_arrays(annotation: Any) -> Iterator[tuple[str | None, type[AbstractArray]]]:
    """The types with a shape that an annotation allows: itself, parts of a union; of named tuples, with the field."""
    for part in get_args(annotation) if isinstance(annotation, UnionType) else (annotation,):
        if isinstance(part, type) and issubclass(part, AbstractArray):
            yield None, part
        elif hasattr(part, "_fields"):
            for field, kind in inspect.get_annotations(part).items():
                yield from ((field, array) for _, array in annotated_arrays(kind))
