"""The embedded task: a toy vocabulary, prompts and a rule reward, so that `gymnasium.make` runs without arguments.

The agent is shown one or two letters and an arrow, `a c →`, and should repeat the letters and stop: `a c <end>`.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from token_mdp.episodes import FloatArray, IntArray

VOCABULARY = ("<end>", "a", "b", "c", "d", "→")
END, ARROW = 0, 5
LETTERS = (1, 2, 3, 4)


class ToyTokenizer:
    """Token ids to text, with the part of a Hugging Face tokenizer's interface that the env needs."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The tokens' names with spaces between them; a vocabulary made wider goes on with <6>, <7>."""
        names = dict(enumerate(VOCABULARY))
        return " ".join(names.get(token, f"<{token}>") for token in ids if not (skip_special_tokens and token == END))


def echo_reward(prompts: list[IntArray], responses: list[IntArray]) -> FloatArray:
    """Share of right tokens: 1 if and only if the response is the prompt's letters and `<end>`.

    Position by position against the target; a longer response has more positions to be wrong at.

    Args:
        prompts: n prompts, letters and an arrow.
        responses: n responses.

    Returns:
        (n,) values in 0..1.
    """
    rewards = np.zeros(len(responses))
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        target = np.append(prompt[:-1], END)
        shared = min(len(target), len(response))
        rewards[row] = (target[:shared] == response[:shared]).sum() / max(len(target), len(response))
    return rewards


def toy_task() -> dict[str, Any]:
    """Keyword arguments of the task for `TokenEnv` and `TokenVectorEnv`: 20 prompts, V = 6, T = 4."""
    prompts = [[*letters, ARROW] for count in (1, 2) for letters in product(LETTERS, repeat=count)]
    return {
        "prompts": prompts,
        "vocab_size": len(VOCABULARY),
        "stop_token_ids": (END,),
        "max_new_tokens": 4,
        "reward_fn": echo_reward,
        "tokenizer": ToyTokenizer(),
    }
