"""Infos of a vector env as Gymnasium lays them out: a (B, …) array per key, zero where `_key` is False."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from token_mdp.episodes import IntArray
from token_mdp.slots import Slots
from token_mdp.stream import RUNNING, Stream
from token_mdp.task import BoolArray, TokenTask


class SlotInfos:
    """What the agent is told about B slots besides their observations: prompts, episodes, allowed tokens.

    Args:
        task: knows which tokens are allowed.
        slots: the responses.
        stream: the prompts.
    """

    def __init__(self, task: TokenTask, slots: Slots, stream: Stream) -> None:
        self.allowed: BoolArray | None = None  # (B, V) with an action_mask, from the first reset on
        self._task = task
        self._slots = slots
        self._stream = stream
        self._every_slot = np.arange(len(stream.status))

    def action_masks(self) -> BoolArray:
        """(B, V) True for each token that may come next, a copy."""
        if self.allowed is not None:
            return self.allowed.copy()
        return np.ones((len(self._every_slot), self._task.vocab_size), dtype=np.bool_)

    def put_state(self, infos: dict[str, Any], slots: IntArray, copy: bool) -> None:
        """Infos of the states that `slots` are in; `episode_id`, `active` and masks tell about all slots at any time.

        Masks of slots that go on through a partial reset are for agents that read no `_action_mask`, as TorchRL's.
        Without `copy`, the mask is the env's own, as observations are.
        """
        stream, num_slots = self._stream, len(self._every_slot)
        put(infos, num_slots, slots, stream.infos(slots))
        everywhere = {"episode_id": stream.episode_id.copy(), "active": stream.active}
        if self._task.action_mask:
            mask = self._ask().view(np.int8)
            everywhere["action_mask"] = mask.copy() if copy else mask
        put(infos, num_slots, self._every_slot, everywhere)

    def _ask(self) -> BoolArray:
        if self.allowed is None:  # once: memory that is new to the process costs more than what is written to it
            self.allowed = self.action_masks()
        if callable(self._task.action_mask):
            running = np.flatnonzero(self._stream.status == RUNNING)
            rows = self._task.allowed_tokens(self._stream.prompt_index[running], self._slots.responses(running))
            self.allowed[self._stream.status != RUNNING] = True
            for slot, row in zip(running.tolist(), rows, strict=True):
                self.allowed[slot] = row
        return self.allowed

    def put_final(self, infos: dict[str, Any], done: IntArray, at_end: Mapping[str, npt.NDArray[Any]]) -> None:
        """`final_obs` and `final_info` of the slots that are about to be refilled."""
        num_slots = len(self._every_slot)
        final_obs = np.full(num_slots, None, dtype=object)
        for slot in done.tolist():
            final_obs[slot] = self._slots.observation_of(slot)
        values = self._stream.infos(done) | {"episode_id": self._stream.episode_id[done]}
        if self._task.action_mask:
            values["action_mask"] = np.ones((len(done), self._task.vocab_size), dtype=np.int8)
        final_info: dict[str, Any] = {}
        # The observation's own keys are for TorchRL, whose reader of a Dict looks for them here and nowhere else.
        # `prompt_length`, a key of both, stays (B,) as in every info; the reader broadcasts it.
        put(final_info, num_slots, done, {**self._slots.rows_of_observation(done), **values, **at_end})
        infos |= {"final_obs": final_obs, "_final_obs": slot_mask(num_slots, done)}
        infos |= {"final_info": final_info, "_final_info": slot_mask(num_slots, done)}


def put(infos: dict[str, Any], num_slots: int, slots: IntArray, values: Mapping[str, npt.NDArray[Any]]) -> None:
    """Add `values`, (n, …) per key, for the n given slots; no key at all where n is 0, as in `SyncVectorEnv`.

    The arrays in `values` become the infos' own where the slots are all of them.
    """
    if not len(slots):
        return
    if len(slots) == num_slots:
        for key, rows in values.items():
            infos[key], infos[f"_{key}"] = rows, ~np.zeros(num_slots, dtype=np.bool_)  # np.ones takes 1 µs more
        return
    for key, rows in values.items():
        array = np.zeros((num_slots, *rows.shape[1:]), dtype=rows.dtype)
        array[slots] = rows
        infos[key], infos[f"_{key}"] = array, slot_mask(num_slots, slots)


def slot_mask(num_slots: int, slots: IntArray) -> npt.NDArray[np.bool_]:
    """(B,) True at `slots`."""
    mask = np.zeros(num_slots, dtype=np.bool_)
    mask[slots] = True
    return mask
