"""Calling reward functions: always batched, always checked, errors name the prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from numbers import Real
from typing import Any, NamedTuple

import gymnasium.error
import numpy as np

from token_mdp.answers import as_numbers, told
from token_mdp.episodes import FloatArray, IntArray

STEPS_AND_END = "the sum of the last step's reward and reward_fn has"  # what two envs say alike
RewardFn = Callable[..., Any]  # (prompts, responses, **columns) -> (n,)
RewardSpec = RewardFn | Mapping[str, Any] | Sequence[Any]


class RewardError(gymnasium.error.Error, ValueError):
    """A reward function failed, or returned something that is not one finite number per episode.

    Attributes:
        role: the function, as `reward_fn['style']`.
        problem: what it did, without the prompts.
        prompt_indices: of the prompts at fault; of all that it was asked about where that cannot be told.
    """

    def __init__(self, message: str, role: str = "", problem: str = "", prompt_indices: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.role = role
        self.problem = problem
        self.prompt_indices = list(prompt_indices)


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
    role: str,
    fn: RewardFn,
    prompt_indices: Sequence[int],
    arguments: tuple[Any, ...],
    columns: Mapping[str, Any],
    abstain: bool = False,
) -> FloatArray:
    """fn(prompts, responses, **columns) as (n,) float64.

    Args:
        role: what errors call the function.
        fn: the function.
        prompt_indices: (n,) prompts, for errors.
        arguments: prompts and responses.
        columns: per name n values.
        abstain: whether it may return None, which becomes NaN, for some of them.

    Raises:
        RewardError: `fn` raised or left the program, or returned None, another shape, or what is no finite real number.
        KeyboardInterrupt: Ctrl-C, which is no fault of the function's.
    """
    indices = [int(index) for index in prompt_indices]
    try:
        returned = fn(*arguments, **columns)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # as of event loops that were cancelled, and of code in Rust that panicked
        raise failed(role, f"raised {told(error)}", indices) from error
    try:
        values, answered = as_numbers(returned, len(indices), abstain)
    except ValueError as error:
        problem = f"must return one number per response, shape ({len(indices)},), got {error}"
        raise failed(role, problem, indices) from error
    check_finite(f"{role} returned", values[answered], np.array(indices, dtype=np.int64)[answered])
    return values


def failed(role: str, problem: str, prompt_indices: list[int]) -> RewardError:
    """The error of a function that failed at these prompts."""
    return RewardError(f"{role} {problem} ({name_prompts(prompt_indices)})", role, problem, prompt_indices)


def check_finite(said: str, values: FloatArray, prompt_indices: Sequence[int] | IntArray) -> None:
    """Refuse infinite and missing rewards, (n,), of these n prompts; `said` is where they come from, and a verb."""
    finite = np.isfinite(values)
    if not finite.all():
        indices, wrong = np.asarray(prompt_indices)[~finite].tolist(), values[~finite].tolist()
        role, _, verb = said.rpartition(" ")
        examples = ", ".join(f"{value}" for value in dict.fromkeys(map(str, wrong[:5])))
        raise RewardError(
            f"{said} {len(wrong)} values that are not finite, by prompt index: "
            f"{dict(islice(zip(indices, wrong, strict=True), 5))}",
            role,
            f"{verb} values that are not finite: {examples}",
            indices,
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
