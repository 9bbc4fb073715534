"""What every decoder does: tell slots that go on by one token from those that begin anew.

A slot whose observation extends the cached row by exactly one token decodes that token; any other slot is prefilled. No
reset signal from the environment is needed; a decoder that is told whose episode a slot plays need not compare tokens.

Axes: S slots, n active slots, V vocabulary.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from lit_rlhf.models.policy import Policy

NOBODY = -1  # lends what a slot has already


class Decoder(ABC):
    """Next-token logits for the observations of a vector environment.

    Args:
        policy: its weights must not change between `clear()` calls.
        num_slots: S.
        max_length: the longest prompt plus response.
    """

    lends = False  # whether a slot's keys and values can be another's, too

    def __init__(self, policy: Policy, num_slots: int, max_length: int) -> None:
        self.policy = policy
        self.cached_ids = np.zeros((num_slots, max_length), dtype=np.int64)  # by slot
        self.cached_lengths = np.zeros(num_slots, dtype=np.int64)  # by slot; 0 = nothing cached
        self.cached_episodes = np.full(num_slots, -1, dtype=np.int64)  # by slot, where the caller names them
        self.cached_groups = np.full(num_slots, -1, dtype=np.int64)  # likewise

    def clear(self) -> None:
        """Forget everything: call it after each weight update."""
        self.cached_lengths[:] = 0

    @torch.no_grad()
    def logits(
        self,
        input_ids: np.ndarray,
        lengths: np.ndarray,
        active: np.ndarray | None = None,
        episode_ids: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> Tensor:
        """Logits of the next token of each active slot.

        Args:
            input_ids: (S, P+T) int64 right-padded observations.
            lengths: (S,) tokens that are real.
            active: (S,) bool; parked slots are skipped. None = all.
            episode_ids: (S,) whose tokens these are, no id twice; so that no step needs to compare all that is cached.
                None = the cached tokens tell.
            groups: (S,) slots of one number have the same prompt, so that one of them computes it for all. None = no
                prompts are known to be the same.

        Returns:
            (n, V) logits of the active slots, in slot order.
        """
        slots = np.arange(len(lengths)) if active is None else np.flatnonzero(active)
        if active is not None:
            self.cached_lengths[~active] = 0  # other rows may be written over a parked slot's
        self._keep(slots)
        extends = self._extends(slots, input_ids, lengths, episode_ids)
        fresh, going = slots[~extends], slots[extends]
        lenders = self._lenders(fresh, going, groups)
        alone = lenders == fresh
        decodes = extends.copy()
        decodes[~extends] = ~alone  # the last token of a prompt that is lent, whose logits nobody lends
        parts: list[tuple[np.ndarray, Tensor]] = []
        if alone.any():
            parts.append((np.flatnonzero(~decodes), self._prefill(fresh[alone], input_ids, lengths)))
        for slot, lender in zip(fresh[~alone].tolist(), lenders[~alone].tolist(), strict=True):
            self._lend(lender, slot, int(lengths[slot]) - 1)
        if decodes.any():
            parts.append((np.flatnonzero(decodes), self._decode(slots[decodes], len(slots), input_ids, lengths)))
        self.cached_ids[fresh] = input_ids[fresh, : self.cached_ids.shape[1]]
        self.cached_ids[going, lengths[going] - 1] = input_ids[going, lengths[going] - 1]
        self.cached_lengths[slots] = lengths[slots]
        if episode_ids is not None:
            self.cached_episodes[slots] = episode_ids[slots]
        if groups is not None:
            self.cached_groups[slots] = groups[slots]
        return in_order(parts)

    def _lenders(self, fresh: np.ndarray, going: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
        """(len(fresh),) the slot that each which begins anew has its prompt's cache from; itself = it computes it.

        Those that go on lend, and the first of a group to begin. One that has just played another of its group still
        has the prompt: from `NOBODY`.
        """
        lenders = fresh.copy()
        if groups is None or not self.lends:
            return lenders
        lender_of = {int(groups[slot]): int(slot) for slot in going}
        for number, slot in enumerate(fresh.tolist()):
            group = int(groups[slot])
            has_it = self.cached_lengths[slot] > 0 and self.cached_groups[slot] == group
            lenders[number] = NOBODY if has_it else lender_of.setdefault(group, slot)
        return lenders

    def _lend(self, lender: int, slot: int, length: int) -> None:
        """Copy the cache of so many tokens from slot to slot; nothing from `NOBODY`."""
        raise NotImplementedError

    def _extends(
        self, slots: np.ndarray, input_ids: np.ndarray, lengths: np.ndarray, episode_ids: np.ndarray | None
    ) -> np.ndarray:
        """(n,) bool: the observation is the cached row and exactly one token more."""
        cached = self.cached_lengths[slots]
        longer = (cached > 0) & (lengths[slots] == cached + 1)
        if episode_ids is not None:
            return longer & (self.cached_episodes[slots] == episode_ids[slots])
        L = int(cached.max(initial=0))
        differs = (self.cached_ids[slots, :L] != input_ids[slots, :L]) & (np.arange(L) < cached[:, None])
        return longer & ~differs.any(1)

    @abstractmethod
    def _keep(self, slots: np.ndarray) -> None:
        """Only these slots play; no other goes on."""

    @abstractmethod
    def _prefill(self, slots: np.ndarray, input_ids: np.ndarray, lengths: np.ndarray) -> Tensor:
        """(len(slots), V) logits of slots that begin anew."""

    @abstractmethod
    def _decode(self, slots: np.ndarray, num_active: int, input_ids: np.ndarray, lengths: np.ndarray) -> Tensor:
        """(len(slots), V) logits of slots that go on, of `num_active` that play."""


def in_order(parts: list[tuple[np.ndarray, Tensor]]) -> Tensor:
    """(n, V) logits of all parts: each says which of the n its rows are."""
    if len(parts) == 1 and (np.diff(parts[0][0]) > 0).all():
        return parts[0][1]
    order = np.argsort(np.concatenate([where for where, _ in parts]))
    return torch.cat([logits for _, logits in parts])[torch.from_numpy(order)]
