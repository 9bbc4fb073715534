"""Infos of a vector env as Gymnasium lays them out: a (B, …) array per key, zero where `_key` is False."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from token_mdp.episodes import IntArray


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
