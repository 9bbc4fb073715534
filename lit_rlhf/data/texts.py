"""Tokens as text: what `predict` writes, and what rewards of text read."""

from typing import Any

import numpy as np


def as_texts(
    tokenizer: Any, prompt_ids: np.ndarray, response_ids: np.ndarray, special: bool = False
) -> tuple[str, str]:
    """A prompt and the response that goes on from it: both together are the text of all their tokens.

    So white space stands where the model wrote it, at the beginning and at the end too.

    Args:
        tokenizer: the policy's.
        prompt_ids: (P,).
        response_ids: (T,).
        special: write special tokens too, as <think> or the end token.
    """

    def text(ids: np.ndarray) -> str:
        return str(tokenizer.decode(ids.tolist(), skip_special_tokens=not special))

    prompt, whole = text(prompt_ids), text(np.concatenate([prompt_ids, response_ids]))
    # There is none where the boundary cuts a character, or the tokenizer writes a word differently after another.
    return prompt, whole[len(prompt) :] if whole.startswith(prompt) else text(response_ids)
