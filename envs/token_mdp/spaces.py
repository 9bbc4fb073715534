"""Observation and action spaces. Axes: P longest prompt, T most new tokens, V vocabulary (width of the logits)."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

EMPTY = -1  # fills the unused cells of the flat observation, where no attention mask tells them from token 0


def observation_space(vocab_size: int, max_prompt_length: int, max_new_tokens: int, flat: bool) -> spaces.Space[Any]:
    """Space of one observation.

    Dict: `input_ids` (P+T,) with prompt and response side by side from column 0, zeros after them,
    `attention_mask` (P+T,), `prompt_length` (1,), `length` (1,); the newest token is `input_ids[length - 1]`.

    Flat: (P+T,) with the prompt ending at column P-1 and the response starting at column P, -1 in unused cells.
    So the t-th response token always has the same column, and one Box holds the whole state.
    """
    width = max_prompt_length + max_new_tokens
    if flat:
        return spaces.Box(EMPTY, vocab_size - 1, (width,), np.int64)
    return spaces.Dict(
        {
            "input_ids": spaces.Box(0, vocab_size - 1, (width,), np.int64),
            "attention_mask": spaces.Box(0, 1, (width,), np.int8),
            "prompt_length": spaces.Box(0, max_prompt_length, (1,), np.int64),
            "length": spaces.Box(0, width, (1,), np.int64),
        }
    )
