"""Tokens as text: what `predict` writes, what rewards of text read, and what a person is shown token by token."""

from itertools import takewhile
from typing import Any

import numpy as np

WINDOW = 16  # tokens that are decoded together
HALF = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for a character whose tokens are not all there


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


def pieces(tokenizer: Any, ids: np.ndarray, before: np.ndarray | tuple[int, ...] = ()) -> list[str]:
    """Tokens as texts that make up the text of all, special tokens included.

    Args:
        tokenizer: decodes.
        ids: (T,) tokens.
        before: tokens that they follow, which say whether a space is due before the first.
    """
    ids = np.concatenate([np.array(before, dtype=np.int64), ids])

    def text_from(start: int, end: int) -> str:
        return str(tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False))

    parts, start, done = [], 0, ""
    for end in range(1, len(ids) + 1):
        text = text_from(start, end)
        if text.endswith(HALF) and end < len(ids):  # the rest of the character is to come
            parts.append("")
            continue
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(done, text, strict=False))
        parts.append(text[len(list(alike)) :])
        done = text
        if end - start > WINDOW:  # go on from this token, which says whether a space is due before the next
            start, done = end - 1, text_from(end - 1, end)
    return parts[len(before) :]
