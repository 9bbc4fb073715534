"""B episodes side by side as NumPy arrays: a step writes one cell per slot, whatever the length."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from token_mdp.episodes import IntArray
from token_mdp.spaces import EMPTY

VectorObservation = dict[str, npt.NDArray[Any]] | IntArray


class Slots:
    """Tokens of B slots, laid out as in `token_mdp.spaces`.

    Args:
        num_slots: B.
        max_prompt_length: P.
        max_new_tokens: T.
        flat: the layout of the flat observation instead of the Dict.
    """

    def __init__(self, num_slots: int, max_prompt_length: int, max_new_tokens: int, flat: bool) -> None:
        width = max_prompt_length + max_new_tokens
        self._flat = flat
        self._max_prompt_length = max_prompt_length
        self._ids = np.full((num_slots, width), EMPTY if flat else 0, dtype=np.int64)
        self._attention_mask = np.zeros((num_slots, 0 if flat else width), dtype=np.int8)
        self._prompt_length = np.zeros((num_slots, 1), dtype=np.int64)
        self._length = np.zeros((num_slots, 1), dtype=np.int64)
        self._response_start = np.zeros(num_slots, dtype=np.int64)  # (B,) column of the first response token
        self._next_column = np.zeros(num_slots, dtype=np.int64)  # (B,) column that the next token goes to

    @property
    def prompt_lengths(self) -> IntArray:
        """(B,) a view, made when asked for: one kept beside its array would be another array in a copy of the env."""
        return self._prompt_length[:, 0]

    def clear(self, slot: int | slice) -> None:
        """Empty the slot, or several: neither prompt nor response."""
        self._ids[slot] = EMPTY if self._flat else 0
        self._attention_mask[slot] = 0
        self._prompt_length[slot] = self._length[slot] = 0
        self._response_start[slot] = self._next_column[slot] = 0

    def begin(self, slot: int, prompt: IntArray) -> None:
        """Replace the slot's episode by `prompt` and an empty response."""
        self.clear(slot)
        start = self._max_prompt_length if self._flat else len(prompt)
        self._ids[slot, start - len(prompt) : start] = prompt
        self._attention_mask[slot, : len(prompt)] = 1
        self._prompt_length[slot] = self._length[slot] = len(prompt)
        self._response_start[slot] = self._next_column[slot] = start

    def append(self, slots: IntArray, tokens: IntArray) -> None:
        """Write one token to each of `slots`."""
        columns = self._next_column[slots]
        self._ids[slots, columns] = tokens
        if not self._flat:
            self._attention_mask[slots, columns] = 1
        self._next_column[slots] = columns + 1
        lengths = self._length[:, 0]
        lengths[slots] += 1

    def extend(self, slot: int, tokens: IntArray) -> None:
        """Write several tokens to one slot."""
        start = self._next_column[slot]
        stop = start + len(tokens)
        self._ids[slot, start:stop] = tokens
        self._attention_mask[slot, start:stop] = 1
        self._next_column[slot] = stop
        self._length[slot] += len(tokens)

    def response_lengths(self, slots: IntArray) -> IntArray:
        """(n,) number of response tokens in each of `slots`."""
        return self._next_column[slots] - self._response_start[slots]

    def response(self, slot: int) -> IntArray:
        """The slot's response so far, a copy."""
        return self._ids[slot, self._response_start[slot] : self._next_column[slot]].copy()

    def responses(self, slots: IntArray) -> list[IntArray]:
        """The responses of `slots`, views: the task copies what it hands to functions of the caller."""
        ends = zip(slots.tolist(), self._response_start[slots].tolist(), self._next_column[slots].tolist(), strict=True)
        return [self._ids[slot, start:stop] for slot, start, stop in ends]

    def prompt(self, slot: int) -> IntArray:
        """The slot's prompt, a copy."""
        start = self._response_start[slot]
        return self._ids[slot, start - self.prompt_lengths[slot] : start].copy()

    def observation(self, copy: bool) -> VectorObservation:
        """(B, …) observations, fresh or the live arrays themselves."""
        if self._flat:
            return self._ids.copy() if copy else self._ids
        arrays = self._arrays()
        return {name: array.copy() for name, array in arrays.items()} if copy else arrays

    def observation_of(self, slot: int) -> VectorObservation:
        """One slot's observation as `TokenEnv` would return it, a copy."""
        if self._flat:
            return self._ids[slot].copy()
        return {name: array[slot].copy() for name, array in self._arrays().items()}

    def rows_of_observation(self, slots: IntArray) -> dict[str, npt.NDArray[Any]]:
        """(n, …) arrays of the Dict observation at `slots`, by key, copies; none for the flat layout."""
        return {} if self._flat else {name: array[slots] for name, array in self._arrays().items()}

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {
            "input_ids": self._ids,
            "attention_mask": self._attention_mask,
            "prompt_length": self._prompt_length,
            "length": self._length,
        }
