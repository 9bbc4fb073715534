"""Paying the slots of a vector env: step rewards at once, rewards of whole responses at once or deferred."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from token_mdp.checks import check_flag
from token_mdp.episodes import Episode, FinishReason, FloatArray, IntArray
from token_mdp.prompts import PromptQueue
from token_mdp.rewards import STEPS_AND_END, finite_sum
from token_mdp.saved_state import filled
from token_mdp.slots import Slots
from token_mdp.stream import Stream
from token_mdp.task import TokenTask

Infos = dict[str, npt.NDArray[Any]]


def empty_slots(
    task: TokenTask, num_slots: int, queue: PromptQueue, deferred: bool
) -> tuple[Slots, Stream, SlotRewards]:
    """The parts of a vector env before its first reset."""
    slots = Slots(num_slots, task.prompts.max_length, task.max_new_tokens, task.flat)
    stream = Stream(task.prompts, queue, slots)
    return slots, stream, SlotRewards(task, slots, stream, deferred)


class SlotRewards:
    """Rewards of B slots, and the finished episodes that wait for theirs.

    Args:
        task: knows the reward functions.
        slots: the responses.
        stream: which prompt each response answers.
        deferred: keep finished episodes for `take` rather than scoring them in the step that ends them.
    """

    def __init__(self, task: TokenTask, slots: Slots, stream: Stream, deferred: bool) -> None:
        num_slots = len(stream.status)
        self.deferred = deferred
        self.totals = np.zeros(num_slots)  # (B,) paid to the current episodes so far
        self._task = task
        self._slots = slots
        self._stream = stream
        self._potential = np.zeros(num_slots)  # (B,) Φ of the current states
        self._step_rewards = np.zeros((num_slots, task.max_new_tokens if task.pays_steps else 0))  # (B, T)
        self._waiting: list[Episode] = []

    def begin(self, slots: IntArray) -> None:
        """New episodes have started in `slots`."""
        self.totals[slots] = 0.0
        if self._task.shapes and len(slots):
            self._potential[slots] = self._task.potentials(
                self._stream.prompt_index[slots], self._slots.responses(slots)
            )

    def pay(
        self, running: IntArray, tokens: IntArray, lengths: IntArray, reasons: npt.NDArray[np.int8]
    ) -> tuple[FloatArray, Infos, Infos]:
        """Rewards of the step in which `tokens` made the responses of `running` `lengths` long and ended for `reasons`.

        Returns:
            (B,) rewards; infos of the running slots; infos of those that ended, both (n,) per key.
        """
        rewards = np.zeros(len(self.totals))
        step_infos: Infos = {}
        end_infos: Infos = {}
        if self._task.pays_steps and len(running):
            paid, parts, self._potential[running] = self._task.step_rewards(
                self._stream.prompt_index[running],
                tokens,
                lambda rows: self._slots.responses(running[rows]),
                reasons,
                self._potential[running],
            )
            rewards[running] = paid
            self._step_rewards[running, lengths - 1] = paid
            step_infos = {f"reward/{name}": values for name, values in parts.items()}
        ended = reasons != 0
        done = running[ended]
        if len(done):
            end_infos = {"response_length": lengths[ended], "finish_reason": reasons[ended]}
            if self.deferred:
                self._waiting += [
                    self._episode(*end) for end in zip(done.tolist(), reasons[ended].tolist(), strict=True)
                ]
            else:
                scores, components = self._task.outcome_rewards(
                    self._stream.prompt_index[done], self._slots.responses(done)
                )
                rewards[done] = finite_sum(STEPS_AND_END, rewards[done], scores, self._stream.prompt_index[done])
                end_infos |= {f"reward/{name}": values for name, values in components.items()}
        self.totals += rewards
        return rewards, step_infos, end_infos

    def take(self, score: bool) -> list[Episode]:
        """The waiting episodes, ascending in episode id; if the reward function fails they stay."""
        check_flag("score", score)
        episodes = sorted(self._waiting, key=lambda episode: episode.episode_id)
        if score and episodes:
            rewards, components = self._task.outcome_rewards(
                [episode.prompt_index for episode in episodes], [episode.response_ids for episode in episodes]
            )
            episodes = [
                episode._replace(
                    reward=float(rewards[row]),
                    components={name: float(values[row]) for name, values in components.items()},
                )
                for row, episode in enumerate(episodes)
            ]
        self.forget()
        return episodes

    def forget(self) -> None:
        """Drop the waiting episodes."""
        self._waiting = []

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return {
            "totals": self.totals.tolist(),
            "potential": self._potential.tolist(),
            "step_rewards": self._step_rewards.tolist(),
            "waiting": [episode.as_plain() for episode in self._waiting],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` saved."""
        self.totals = filled(self.totals, state["totals"])
        self._potential = filled(self._potential, state["potential"])
        self._step_rewards = filled(self._step_rewards, state["step_rewards"])
        self._waiting = [Episode.from_plain(episode) for episode in state["waiting"]]

    def _episode(self, slot: int, reason: int) -> Episode:
        response = self._slots.response(slot)
        return Episode(
            episode_id=int(self._stream.episode_id[slot]),
            prompt_index=int(self._stream.prompt_index[slot]),
            prompt_ids=self._slots.prompt(slot),
            response_ids=response,
            finish_reason=FinishReason(reason),
            reward=float("nan"),
            components={},
            step_rewards=self._step_rewards[slot, : len(response)].copy() if self._task.pays_steps else None,
        )
