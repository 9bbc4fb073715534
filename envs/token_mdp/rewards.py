"""Calling reward functions: always batched, always checked, errors name the prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from numbers import Real
from typing import Any, NamedTuple

import gymnasium.error
import numpy as np

from token_mdp.episodes import FloatArray, IntArray

STEPS_AND_END = "the sum of the last step's reward and reward_fn has"  # what two envs say alike
RewardFn = Callable[..., Any]  # (prompts, responses, **columns) -> (n,)
RewardSpec = RewardFn | Mapping[str, Any] | Sequence[Any]


class RewardError(gymnasium.error.Error, ValueError):
    """A reward function raised, or returned something that is not one finite number per episode."""


class Shared:
    """Handle for a live object among the env's arguments, such as a reward model: copies of the handle share it.

    `env.spec` deep-copies keyword arguments once per wrapper; a model handed in bare would be copied with them.
    Calls go through, and attributes where they are read: `Shared(model)(prompts, responses)`,
    `Shared(tokenizer).decode(ids)`.
    """

    def __init__(self, target: Any) -> None:
        self.target = target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the target."""
        return self.target(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "target":  # pickle asks for these before the target exists
            raise AttributeError(name)
        return getattr(self.target, name)

    def __copy__(self) -> Shared:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self

    def __repr__(self) -> str:
        return f"Shared({self.target!r})"


def bare(fn: Any) -> Any:
    """What a handle shares; anything else as it is."""
    return fn.target if isinstance(fn, Shared) else fn


class Component(NamedTuple):
    """One term of the reward: weight · fn."""

    name: str
    fn: RewardFn
    weight: float

    @property
    def role(self) -> str:
        """What errors call it."""
        return f"reward_fn[{self.name!r}]" if self.name else "reward_fn"


def as_components(reward_fn: RewardSpec) -> list[Component]:
    """Components of the reward Σ weight · fn; a single unnamed function becomes one component named "".

    Args:
        reward_fn: a function, a mapping from name to function or (function, weight), or a list of such, named
            after the functions.

    Raises:
        ValueError: no component, two of one name, a name taken by the env, something not callable, or a weight
            that is not a finite number.
    """
    if callable(reward_fn) and callable(bare(reward_fn)):
        return [Component("", reward_fn, 1.0)]
    if isinstance(reward_fn, Mapping):
        entries = [(str(name), *_with_weight(entry)) for name, entry in reward_fn.items()]
    elif isinstance(reward_fn, Sequence) and not isinstance(reward_fn, str):
        if len(reward_fn) == 2 and callable(reward_fn[0]) and isinstance(reward_fn[1], Real):
            raise ValueError(
                f"reward_fn {reward_fn!r} is a function and its weight; put the pair into a list, [(fn, w)]"
            )
        pairs = [_with_weight(entry) for entry in reward_fn]
        entries = [(_name_of(fn), fn, weight) for fn, weight in pairs]
    else:
        raise ValueError(
            f"reward_fn must be a function (prompts, responses, **columns) -> (n,), or several with weights, "
            f"got {reward_fn!r}"
        )
    names = [name for name, _, _ in entries]
    if not entries or len(set(names)) < len(names) or {"", "process", "shaping"} & set(names):
        raise ValueError(
            f"reward_fn needs at least one component, with unique names other than '', 'process' and 'shaping'; "
            f"got {names}; a mapping from name to (function, weight) lets you choose them"
        )
    for name, fn, weight in entries:
        if not callable(bare(fn)) or not isinstance(weight, Real) or not np.isfinite(float(weight)):
            raise ValueError(f"reward_fn[{name!r}] must be a function or (function, weight), got ({fn!r}, {weight!r})")
    return [Component(*entry) for entry in entries]


def call_batched(
    role: str, fn: RewardFn, prompt_indices: Sequence[int], arguments: tuple[Any, ...], columns: Mapping[str, Any]
) -> FloatArray:
    """fn(prompts, responses, **columns) as (n,) float64.

    Raises:
        RewardError: `fn` raised, or returned None, another shape, or a number that is not finite; the message names
            `role` and the prompt indices.
    """
    indices = [int(index) for index in prompt_indices]
    try:
        returned = fn(*arguments, **columns)
    except Exception as error:
        raise RewardError(f"{role} raised {type(error).__name__}: {error} ({name_prompts(indices)})") from error
    values = _as_array(returned)
    if values is None or values.shape != (len(indices),):
        got = "None" if returned is None else _describe(returned, values)
        raise RewardError(
            f"{role} must return one number per response, shape ({len(indices)},), got {got} ({name_prompts(indices)})"
        )
    check_finite(f"{role} returned", values, indices)
    return values


def check_finite(role: str, values: FloatArray, prompt_indices: Sequence[int] | IntArray) -> None:
    """Refuse infinite and missing rewards, (n,), of these n prompts; `role` says in words where they come from."""
    finite = np.isfinite(values)
    if not finite.all():
        wrong = zip(np.asarray(prompt_indices)[~finite].tolist(), values[~finite].tolist(), strict=True)
        raise RewardError(
            f"{role} {(~finite).sum()} values that are not finite, by prompt index: {dict(islice(wrong, 5))}"
        )


def finite_sum(role: str, left: FloatArray, right: FloatArray, prompt_indices: Sequence[int] | IntArray) -> FloatArray:
    """The sum of two rewards, (n,) each, of these n prompts; refused where it overflows, as by `check_finite`."""
    with np.errstate(over="ignore"):  # refused with the prompts instead
        total = left + right
    check_finite(role, total, prompt_indices)
    return total


def name_prompts(indices: list[int]) -> str:
    """The prompt indices for an error's text, or the first of very many."""
    return f"prompt indices {indices}" if len(indices) <= 10 else f"{len(indices)} prompts, the first {indices[:5]}"


def _name_of(fn: Any) -> str:
    fn = bare(fn)
    return getattr(fn, "__name__", type(fn).__name__)


def _with_weight(entry: Any) -> tuple[Any, Any]:
    if isinstance(entry, tuple | list) and len(entry) == 2:
        return entry[0], entry[1]
    return entry, 1.0


def without_torch(returned: Any) -> Any:
    """A torch tensor, perhaps bfloat16, on a GPU or with a gradient, as an array; anything else as it is."""
    if not hasattr(returned, "detach"):  # torch itself is not imported
        return returned
    tensor = returned.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:  # NumPy knows no bfloat16
        return tensor.float().numpy()


def _as_array(returned: Any) -> FloatArray | None:
    returned = without_torch(returned)
    try:
        # A list of one-element tensors also ends up here, and one with None in it, which float64 would call NaN.
        given = np.asarray(returned)
        if given.dtype.kind not in "biufO" or (given.dtype.kind == "O" and any(value is None for value in given.flat)):
            return None
        return np.array(returned, dtype=np.float64)  # a copy keeps the caller's buffer apart from ours
    except (TypeError, ValueError, OverflowError):
        return None


def _describe(returned: Any, values: FloatArray | None) -> str:
    return f"{returned!r:.80}" if values is None else f"shape {values.shape}"
