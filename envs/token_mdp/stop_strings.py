"""Ends of a response that are text, whatever tokens it is written in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from token_mdp.episodes import IntArray

BYTES_PER_CHARACTER = 4  # at most, in UTF-8; a token may be one byte
MARGIN = 8  # tokens further left, since the first of a text may lose a space or be the rest of a character


class StopStrings:
    """Texts that end a response as soon as they stand in it.

    Args:
        strings: none ends nothing; a single one may stand for itself.
        tokenizer: has `decode(ids)`; needed where there are strings.

    Raises:
        ValueError: they are no texts, or there is no tokenizer to read a response with.
    """

    def __init__(self, strings: Iterable[str] | str, tokenizer: Any) -> None:
        texts = [strings] if isinstance(strings, str) else list(strings)
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"stop_strings ({strings!r:.80}) must be texts, none of them empty")
        if texts and tokenizer is None:
            raise ValueError("stop_strings needs a tokenizer to read the response with")
        self.texts = tuple(texts)
        self._tokenizer = tokenizer
        self._window = max((len(text) for text in texts), default=0) * BYTES_PER_CHARACTER + MARGIN

    def end(self, response: IntArray) -> bool:
        """Whether one stands in a response that had none before its newest token."""
        text = self._tokenizer.decode(response[-self._window :].tolist())
        return any(stop in text for stop in self.texts)
