"""Checking the options of `reset`, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium.error import ResetNeeded

from token_mdp.checks import as_array, check_count
from token_mdp.episodes import IntArray
from token_mdp.prompts import PromptStore
from token_mdp.task import BoolArray


class VectorReset(NamedTuple):
    """What a reset of B slots has to do."""

    slots: IntArray  # (n,) that get a new episode, ascending
    prompt_indices: list[int] | None  # n prompts to start from; None draws from the queue
    new_stream: bool  # or the current one goes on
    max_episodes: int | None  # length of the new stream; None never ends


def single_prompt(options: Mapping[str, Any] | None, prompts: PromptStore) -> int | None:
    """The prompt that the options of `TokenEnv.reset` ask for; None draws from the queue."""
    index = _known(options, ("prompt_index",)).get("prompt_index")
    return None if index is None else prompts.check_index(as_array(index).tolist())


def vector_reset(
    options: Mapping[str, Any] | None,
    prompts: PromptStore,
    num_slots: int,
    max_episodes: int | None,
    ready: bool,
    group_size: int = 1,
) -> VectorReset:
    """What the options of `TokenVectorEnv.reset` ask for.

    Args:
        options: as the caller gave them. `reset_mask` stays in there: wrappers around the env look for it afterwards.
        prompts: those that `prompt_index` may name.
        num_slots: B.
        max_episodes: length of a new stream if the options say nothing about it.
        ready: whether there is a stream that a `reset_mask` could go on with.
        group_size: episodes of a prompt, where the queue deals them.

    Raises:
        ValueError: an option that is unknown, malformed or contradicts another; the message has its value.
        ResetNeeded: some of the slots are to be reset, but there is no stream yet.
    """
    options = _known(options, ("max_episodes", "reset_mask", "prompt_index"))
    mask = options.get("reset_mask")
    slots = np.arange(num_slots) if mask is None else np.flatnonzero(_checked_mask(mask, num_slots, ready))
    prompt_indices = _checked_prompt_indices(options.get("prompt_index"), prompts, num_slots, slots)
    if mask is not None and "max_episodes" in options:
        raise ValueError("max_episodes starts a new stream and reset_mask continues one; pass one of them")
    if prompt_indices is not None and group_size > 1:
        raise ValueError(f"prompt_index places prompts and group_size ({group_size}) has them dealt; pass one of them")
    max_episodes = options.get("max_episodes", max_episodes)
    if max_episodes is not None:
        max_episodes = check_groups(max_episodes, group_size)
    return VectorReset(slots, prompt_indices, mask is None, max_episodes)


def check_groups(max_episodes: Any, group_size: int) -> int:
    """The length of a stream, which holds whole groups."""
    count = check_count("max_episodes", max_episodes)
    if count % group_size:
        raise ValueError(f"max_episodes ({count}) must be a multiple of group_size ({group_size})")
    return count


def queue_seed(seed: Any, num_slots: int) -> int | None:
    """The seed of the queue: the one given, or of a list with one for each slot the first that is not None.

    So it is in a `SyncVectorEnv` of envs that share a queue, where the first env that gets a seed shuffles.

    Raises:
        ValueError: neither an integer of at least 0, nor None, nor `num_slots` of these.
    """
    seeds = [seed] if seed is None or isinstance(seed, int | np.integer) else None
    if seeds is None and isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str) and np.ndim(seed) == 1:
        seeds = list(seed) if len(seed) == num_slots else None
    if seeds is None or not all(one is None or (isinstance(one, int | np.integer) and one >= 0) for one in seeds):
        raise ValueError(f"seed ({seed!r:.80}) must be None, an integer of at least 0, or {num_slots} of these")
    return next((int(one) for one in seeds if one is not None), None)


def _known(options: Mapping[str, Any] | None, names: tuple[str, ...]) -> Mapping[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ValueError(f"reset options ({options!r:.80}) must be None or a dict of {', '.join(map(repr, names))}")
    if unknown := [name for name in options if name not in names]:
        raise ValueError(f"reset options {unknown} are unknown; there are {', '.join(map(repr, names))}")
    return options


def _checked_mask(mask: Any, num_slots: int, ready: bool) -> BoolArray:
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (num_slots,):
        raise ValueError(f"options['reset_mask'] must be a bool array of shape ({num_slots},), got {mask!r:.80}")
    if not mask.any():
        raise ValueError("options['reset_mask'] is False everywhere; at least one slot must be reset")
    if not ready and not mask.all():
        raise ResetNeeded("reset all slots before resetting some of them with options['reset_mask']")
    return mask


def _checked_prompt_indices(
    prompt_index: Any, prompts: PromptStore, num_slots: int, slots: IntArray
) -> list[int] | None:
    if prompt_index is None:
        return None
    indices = as_array(prompt_index)
    if indices.shape not in ((), (num_slots,)):
        raise ValueError(f"options['prompt_index'] must be one index or {num_slots} of them, got shape {indices.shape}")
    return [prompts.check_index(index) for index in np.broadcast_to(indices, (num_slots,))[slots].tolist()]
