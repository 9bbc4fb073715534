"""Which slot plays which prompt: refilling from the queue, parking once the stream has started its last episode."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded

from token_mdp.episodes import IntArray
from token_mdp.prompts import PromptQueue, PromptStore
from token_mdp.saved_state import filled
from token_mdp.slots import Slots

# A WAITING slot has ended and will be reset; a PARKED one will not, in this stream.
RUNNING, WAITING, PARKED = 0, 1, 2


class Stream:
    """The episodes of B slots, in the order of their starts.

    Args:
        prompts: what the episodes start from.
        queue: deals the prompts.
        slots: where their tokens live.
    """

    def __init__(self, prompts: PromptStore, queue: PromptQueue, slots: Slots) -> None:
        self._prompts = prompts
        self.queue = queue
        self._slots = slots
        num_slots = len(slots.prompt_lengths)
        self.remaining: int | None = None  # episodes that may still start; None: no end
        self.next_episode_id = 0
        self.status = np.full(num_slots, PARKED, dtype=np.int8)  # (B,)
        self.prompt_index = np.full(num_slots, -1, dtype=np.int64)  # (B,) -1 in a slot that never got an episode
        self.episode_id = np.full(num_slots, -1, dtype=np.int64)  # (B,) likewise
        self.tokens_cut = np.zeros(num_slots, dtype=np.int64)  # (B,)

    @property
    def active(self) -> npt.NDArray[np.bool_]:
        """(B,) False for slots that are parked."""
        return self.status != PARKED

    @property
    def started(self) -> bool:
        """Whether there has been a stream; episodes count from its first start on."""
        return self.next_episode_id > 0

    def running(self, refills: bool) -> IntArray:
        """(n,) slots that a step plays; the others are parked, or wait for the reset that this step is to them.

        Args:
            refills: whether steps reset the slots that wait, or only the caller does.

        Raises:
            ResetNeeded: no slot will ever run again in this stream, or some wait for the caller.
        """
        running = np.flatnonzero(self.status == RUNNING)
        if len(running) < len(self.status):
            if not self.active.any():
                raise ResetNeeded(f"all {len(self.status)} slots are parked: the stream has drained; call reset()")
            if not refills and (self.status == WAITING).any():
                raise ResetNeeded(
                    f"the episodes of slots {np.flatnonzero(self.status == WAITING).tolist()} have ended; "
                    "reset them with options={'reset_mask': ...}"
                )
        return running

    def start(self, max_episodes: int | None) -> None:
        """A new stream of `max_episodes`, or of no end, with all slots empty; it begins with a group."""
        self.next_group()
        self.remaining = max_episodes
        self.status[:] = PARKED
        self.prompt_index[:] = self.episode_id[:] = -1
        self.tokens_cut[:] = 0
        self._slots.clear(slice(None))

    def next_group(self) -> None:
        """Begin the next group: its episodes are those of `episode_id // group_size`."""
        self.queue.next_group()
        self.next_episode_id += -self.next_episode_id % self.queue.group_size

    def begin(self, slots: IntArray, prompt_indices: list[int] | None = None) -> IntArray:
        """Start an episode in each of `slots`, ascending, as far as the stream reaches; park the others.

        Args:
            slots: (n,) slots to refill.
            prompt_indices: n prompts to start from; None draws from the queue.

        Returns:
            The slots in which an episode started.
        """
        reach = len(slots) if self.remaining is None else min(len(slots), self.remaining)
        self.status[slots[reach:]] = PARKED
        started = slots[:reach]
        for position, slot in enumerate(started.tolist()):
            index = self.queue.draw() if prompt_indices is None else prompt_indices[position]
            self._slots.begin(slot, self._prompts[index])
            self.prompt_index[slot] = index
            self.tokens_cut[slot] = self._prompts.tokens_cut[index]
            self.episode_id[slot] = self.next_episode_id
            self.next_episode_id += 1
        self.status[started] = RUNNING
        if self.remaining is not None:
            self.remaining -= reach
        return started

    def wait(self, slots: IntArray) -> None:
        """Mark ended slots as waiting for their reset; those that the stream has no episode left for park at once."""
        self.status[slots] = WAITING
        if self.remaining is not None:
            self.status[np.flatnonzero(self.status == WAITING)[self.remaining :]] = PARKED

    def infos(self, slots: IntArray) -> dict[str, npt.NDArray[Any]]:
        """Infos about the prompts of `slots`, (n,) each."""
        return {
            "prompt_index": self.prompt_index[slots],
            "prompt_length": self._slots.prompt_lengths[slots],
            "prompt_tokens_cut": self.tokens_cut[slots],
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return {
            "queue": self.queue.state_dict(),
            "remaining": self.remaining,
            "next_episode_id": self.next_episode_id,
            "status": self.status.tolist(),
            "prompt_index": self.prompt_index.tolist(),
            "episode_id": self.episode_id.tolist(),
            "responses": [self._slots.response(slot).tolist() for slot in range(len(self.status))],
        }

    def load_state_dict(self, state: dict[str, Any], rng: np.random.Generator) -> None:
        """Continue where `state` stopped; `rng` shuffles the passes to come."""
        self.queue.load_state_dict(state["queue"], rng)
        self.start(None if state["remaining"] is None else int(state["remaining"]))
        self.next_episode_id = int(state["next_episode_id"])
        self.status = filled(self.status, state["status"])
        self.prompt_index = filled(self.prompt_index, state["prompt_index"])
        self.episode_id = filled(self.episode_id, state["episode_id"])
        for slot, (index, response) in enumerate(zip(self.prompt_index.tolist(), state["responses"], strict=True)):
            if index == -1 and self.status[slot] == PARKED:
                continue
            self._slots.begin(slot, self._prompts[self._prompts.check_index(index)])
            self.tokens_cut[slot] = self._prompts.tokens_cut[index]
            self._slots.extend(slot, np.array(response, dtype=np.int64))
