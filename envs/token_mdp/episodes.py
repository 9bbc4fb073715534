"""What an episode is once it has ended."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class FinishReason(IntEnum):
    """Why an episode ended; infos carry it as int8, where 0 means that it has not."""

    STOP = 1
    LENGTH = 2

    @property
    def label(self) -> str:
        """The words of the field: "stop" or "length"."""
        return self.name.lower()


class Episode(NamedTuple):
    """One finished episode: a prompt, the whole response to it, and what that earned."""

    episode_id: int  # counts the episodes of a vector env from 0, in order of their starts
    prompt_index: int  # row of `prompts` and `columns`
    prompt_ids: IntArray  # (prompt length,) as the agent saw it, that is, cut on the left to P
    response_ids: IntArray  # (T',) the end token included where finish_reason is STOP
    finish_reason: FinishReason
    reward: float  # of the whole response; NaN while it has not been scored
    components: dict[str, float]  # unweighted values by name; empty for a single unnamed reward function
    step_rewards: FloatArray | None  # (T',) process and shaping rewards; None where the env pays none

    def as_plain(self) -> dict[str, Any]:
        """The episode as Python values, for checkpoints."""
        arrays = {
            "prompt_ids": self.prompt_ids.tolist(),
            "response_ids": self.response_ids.tolist(),
            "finish_reason": int(self.finish_reason),
            "step_rewards": None if self.step_rewards is None else self.step_rewards.tolist(),
        }
        return self._asdict() | arrays

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Episode:
        """The episode that `as_plain` took apart."""
        step_rewards = plain["step_rewards"]
        arrays = {
            "prompt_ids": np.array(plain["prompt_ids"], dtype=np.int64),
            "response_ids": np.array(plain["response_ids"], dtype=np.int64),
            "finish_reason": FinishReason(plain["finish_reason"]),
            "step_rewards": None if step_rewards is None else np.array(step_rewards, dtype=np.float64),
        }
        return cls(**(plain | arrays))
