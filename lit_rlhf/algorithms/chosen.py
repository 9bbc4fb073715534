"""Functions that a YAML names by their import path, with options of their own: losses and advantage estimators.

    loss: lit_rlhf.losses.ppo_policy_loss
    loss: {function: my_losses.soft_clip, options: {slope: 4.0}}

Whatever makes no sense is refused by name when it is chosen, before any data is read.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_rlhf.engine.memory import numbers
from lit_rlhf.errors import UserError, place_of
from lit_rlhf.losses import Advantages, PolicyLoss, PolicyTokens, ScoredRollout

Estimator = Callable[[ScoredRollout], Advantages]


class Choice(Protocol):
    """A function and what it is called with beyond what every function of its kind gets."""

    @property
    def function(self) -> Callable[..., Any]:
        """In YAML, its import path."""

    @property
    def options(self) -> dict[str, Any] | None:
        """Arguments by name."""


@dataclass(frozen=True)
class ChosenFunction:
    """A loss of on-policy training, or an advantage estimator.

    Args:
        function: one of `lit_rlhf.losses`, or one of yours; in YAML, its import path.
        options: arguments of this function, such as {slope: 4.0}.
    """

    function: Callable[..., Any]
    options: dict[str, Any] | None = None


def name_of(chosen: Choice) -> str:
    """The function's name."""
    return getattr(chosen.function, "__name__", None) or type(chosen.function).__name__


def arguments_of(chosen: Choice, given: int) -> dict[str, inspect.Parameter]:
    """What the function takes beyond the first `given` arguments, by name."""
    return dict(list(inspect.signature(chosen.function).parameters.items())[given:])


def unbound(
    function: Callable[..., Any], options: dict[str, Any] | None
) -> tuple[Callable[..., Any], dict[str, Any] | None]:
    """The same with what `functools.partial` has bound by name among the options."""
    if not isinstance(function, partial) or function.args:
        return function, options
    return function.func, function.keywords | (options or {})


def check_options(
    chosen: Choice, given: int, filled: Collection[str] = (), takers: Callable[[str], str] = lambda name: ""
) -> None:
    """Refuse options that the function would ignore, and arguments that nothing gives.

    Args:
        chosen: the function and its options.
        given: how many arguments every function of its kind gets.
        filled: names of arguments that the caller fills in.
        takers: for an option that this function ignores, words that name those which take it.

    Raises:
        UserError: names the function and the option.
    """
    arguments, options = arguments_of(chosen, given), chosen.options or {}
    for name, value in options.items():
        if name not in arguments:
            own = f"takes {sorted(arguments)}" if arguments else "takes no options"
            raise UserError(f"{name_of(chosen)} would ignore {name} ({value}): it {own}{takers(name)}")
    missing = [
        name
        for name, parameter in arguments.items()
        if parameter.default is parameter.empty and name not in options and name not in filled
    ]
    if missing:
        raise UserError(f"{name_of(chosen)} needs {', '.join(missing)}: give it in the options of {name_of(chosen)}")


def tried(chosen: Choice, *args: Any, **inputs: Any) -> Any:
    """What the function makes of a sample.

    Raises:
        UserError: whatever it raised, with its place in a user's file.
    """
    try:
        return chosen.function(*args, **(inputs | (chosen.options or {})))
    except Exception as error:  # whatever a function of the user's raises
        if isinstance(error, ValueError) and chosen.function.__module__.startswith("lit_rlhf."):
            named = str(error).startswith(name_of(chosen))
            raise UserError(str(error) if named else f"{name_of(chosen)}: {error}") from error
        raise UserError(f"{name_of(chosen)} raised {type(error).__name__}: {error}{place_of(error)}") from error


def with_bound(given: ChosenFunction | Callable[..., Any]) -> ChosenFunction:
    """The chosen function, with what `functools.partial` has bound of it among its options."""
    chosen = given if isinstance(given, ChosenFunction) else ChosenFunction(given)
    return ChosenFunction(*unbound(chosen.function, chosen.options))


def with_settings(
    given: ChosenFunction | Callable[..., Any], settings: Mapping[str, Any], defaults: Mapping[str, inspect.Parameter]
) -> ChosenFunction:
    """The chosen function with those settings of its class that it names; its own options go before.

    Args:
        given: a function of one argument and options.
        settings: by name; None leaves it to the function.
        defaults: the constructor's parameters: a setting that was changed from its default counts as asked for.

    Raises:
        UserError: a setting was asked for, and the function does not name it.
    """
    chosen = with_bound(given)
    settings = {name: value for name, value in settings.items() if value is not None}
    named = {name: value for name, value in settings.items() if name in arguments_of(chosen, 1)}
    asked = {name: value for name, value in settings.items() if name in named or value != defaults[name].default}
    return replace(chosen, options=asked | (chosen.options or {}))


@numbers()
def sample_rollout(group_size: int = 4, values: bool = True, greedy: bool = False) -> ScoredRollout:
    """A group of completions of one prompt, with values where there is a critic, and scores of greedy responses."""
    B, T = group_size, 3
    mask = torch.arange(T) < torch.tensor([T, 1]).repeat(B)[:B, None]  # long and short ones in turn
    scores, rewards = torch.arange(1.0, B + 1) / B, -0.1 * mask
    rewards[:, 0] += scores
    same = torch.zeros(B, dtype=torch.int64)
    of_values, of_greedy = 0.25 * mask if values else None, torch.full((B,), 0.5) if greedy else None
    return ScoredRollout(rewards, of_values, mask, scores, same, same, torch.tensor(0.5), of_greedy)


@numbers()
def chosen_estimator(chosen: ChosenFunction, rollout: ScoredRollout | None = None) -> Estimator:
    """The advantage estimator, tried on a rollout; None = on four responses to one prompt.

    Raises:
        UserError: it cannot be computed, or gives something else than advantages of the rollout's shape.
    """
    check_options(chosen, given=1)
    rollout = sample_rollout() if rollout is None else rollout
    given, shape = tried(chosen, rollout), tuple(rollout.response_mask.shape)
    shapes = [tuple(rows.shape) for rows in given] if isinstance(given, tuple) and len(given) == 2 else given
    if shapes != [shape, shape]:
        raise UserError(
            f"{name_of(chosen)} must give Advantages, (B, T) each; for a rollout of {shape} it gave {shapes}"
        )
    return partial(chosen.function, **(chosen.options or {}))


@numbers()
def chosen_loss(chosen: ChosenFunction) -> Callable[[PolicyTokens], PolicyLoss]:
    """The policy loss, tried on three tokens of two responses.

    Raises:
        UserError: it cannot be computed, or gives something else than a finite loss per token with a gradient.
    """
    check_options(chosen, given=1)
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    old_logprobs, advantages = torch.tensor([-1.1, -1.8, -0.5]), torch.tensor([1.0, -1.0, 0.5])
    given = tried(chosen, PolicyTokens(logprobs, old_logprobs, advantages, torch.tensor([0, 0, 1])))
    if not isinstance(given, PolicyLoss) or given.losses.shape != (3,):
        raise UserError(f"{name_of(chosen)} must give a PolicyLoss, a loss per token, (M,); for 3 it gave {given}")
    return with_gradient(chosen, given.losses)


@numbers()
def chosen_comparison(chosen: ChosenFunction) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss of a reward model, tried on the scores of three pairs, of which one has no margin.

    Raises:
        UserError: it cannot be computed, or gives something else than a finite loss per pair with a gradient.
    """
    check_options(chosen, given=3)
    scores = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    losses = tried(chosen, scores, torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 0.0, 2.0]))
    if not isinstance(losses, Tensor) or losses.shape != (3,):
        raise UserError(f"{name_of(chosen)} must give a loss per pair, (B,); for 3 it gave {losses}")
    return with_gradient(chosen, losses)


def with_gradient(chosen: ChosenFunction, losses: Tensor) -> Callable[..., Any]:
    """The function with its options, unless from the losses that it gave nothing could be learnt."""
    if not losses.requires_grad:
        raise UserError(f"{name_of(chosen)} gives losses without a gradient: nothing would be learnt")
    if not losses.isfinite().all():
        raise UserError(f"{name_of(chosen)} gives losses that are not finite: {losses.tolist()}")
    return partial(chosen.function, **(chosen.options or {}))
