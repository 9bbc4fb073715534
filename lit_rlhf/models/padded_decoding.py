"""How policies decode that run in padded batches: by the cache that the model itself makes, or without any.

Slots that are prefilled together form a cohort: their rows, left-padded to one length, share a cache and go on
together, as in transformers' `generate`. A model whose numbers change with padding on the left has a cohort for each
row.

Axes: n slots, R rows of a cohort, L its longest row, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lit_rlhf.engine.layout import Sequences, make_layout
from lit_rlhf.models.decoder import Decoder, in_order
from lit_rlhf.models.policy import Policy

# Each cohort costs a pass of the model at each step. With more than these, all slots are prefilled anew, as one.
MOST_COHORTS = 8


class Cohort:
    """Rows that share a cache; a row whose slot has left goes along unread until none is left."""

    def __init__(self, slots: np.ndarray) -> None:
        self.slots = slots  # (R,); -1 = it has left
        self.attention_mask = torch.empty(0)  # (R, L) bool, True = a real token
        self.cache: Any = None


class OwnCacheDecoder(Decoder):
    """Next-token logits by caches of the model's own; arguments as of `Decoder`."""

    def __init__(self, policy: Policy, num_slots: int, max_length: int) -> None:
        super().__init__(policy, num_slots, max_length)
        self.cohorts: list[Cohort] = []

    def clear(self) -> None:
        """Forget everything: call it after each weight update."""
        super().clear()
        self.cohorts = []

    def _extends(
        self, slots: np.ndarray, input_ids: np.ndarray, lengths: np.ndarray, episode_ids: np.ndarray | None
    ) -> np.ndarray:
        extends = super()._extends(slots, input_ids, lengths, episode_ids)
        self._drop(slots[~extends])
        crowded = self.policy.caching != "alone" and len(self.cohorts) >= MOST_COHORTS
        return np.zeros_like(extends) if crowded and not extends.all() else extends

    def _keep(self, slots: np.ndarray) -> None:
        self._drop(np.setdiff1d(np.arange(len(self.cached_lengths)), slots))

    def _drop(self, slots: np.ndarray) -> None:
        for cohort in self.cohorts:
            cohort.slots[np.isin(cohort.slots, slots)] = -1
        self.cohorts = [cohort for cohort in self.cohorts if (cohort.slots >= 0).any()]

    def _prefill(self, slots: np.ndarray, input_ids: np.ndarray, lengths: np.ndarray) -> Tensor:
        self._drop(slots)
        groups = np.split(slots, len(slots)) if self.policy.caching == "alone" else [slots]
        parts = []
        for group in groups:
            cohort = Cohort(group.copy())
            L = int(lengths[group].max())
            columns = np.arange(L) - (L - lengths[group])[:, None]  # (R, L) of the observation; below 0 is padding
            ids = input_ids[group[:, None], columns.clip(0)]
            cohort.attention_mask = torch.from_numpy(columns >= 0).to(self.policy.model.device)
            parts.append((np.flatnonzero(np.isin(slots, group)), self._pass(cohort, ids)))
            self.cohorts.append(cohort)
        return in_order(parts)

    def _decode(self, slots: np.ndarray, num_active: int, input_ids: np.ndarray, lengths: np.ndarray) -> Tensor:
        parts = []
        for cohort in self.cohorts:
            going = np.isin(cohort.slots, slots)
            if not going.any():  # prefilled just now
                continue
            newest = input_ids[cohort.slots, lengths[cohort.slots] - 1] * going  # any token for rows that have left
            mask = cohort.attention_mask
            cohort.attention_mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self._pass(cohort, newest[:, None])[torch.from_numpy(going)]
            parts.append((np.searchsorted(slots, cohort.slots[going]), logits))
        return in_order(parts)

    def _pass(self, cohort: Cohort, ids: np.ndarray) -> Tensor:
        """(R, V) logits after (R, T) further tokens."""
        given = torch.from_numpy(ids).to(self.policy.model.device)
        logits, cohort.cache = self.policy.decode_padded(given, cohort.attention_mask, cohort.cache)
        return logits


class RecomputingDecoder(Decoder):
    """Next-token logits of models without a cache that gives their numbers: all tokens are computed at each step."""

    def _keep(self, slots: np.ndarray) -> None:
        """Nothing is kept."""

    def _extends(
        self, slots: np.ndarray, input_ids: np.ndarray, lengths: np.ndarray, episode_ids: np.ndarray | None
    ) -> np.ndarray:
        return np.zeros(len(slots), dtype=bool)

    def _prefill(self, slots: np.ndarray, input_ids: np.ndarray, lengths: np.ndarray) -> Tensor:
        device = self.policy.model.device
        ids = np.concatenate([input_ids[slot, : lengths[slot]] for slot in slots])
        ends = lengths[slots].cumsum()
        sequences = Sequences(np.arange(len(ids)), lengths[slots])
        layout = move_data_to_device(make_layout(sequences, num_nodes=len(ids)), device)
        return self.policy.recompute(torch.from_numpy(ids).to(device), layout, torch.from_numpy(ends - 1).to(device))

    def _decode(self, slots: np.ndarray, num_active: int, input_ids: np.ndarray, lengths: np.ndarray) -> Tensor:
        raise AssertionError("no slot goes on without a cache")
