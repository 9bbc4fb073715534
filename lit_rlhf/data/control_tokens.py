"""Special tokens that a row spells out in its own texts: found, and kept, refused, or marked so that they stay text.

Whoever writes `<|im_end|>` into a message ends the turn with it, unless it is written as text. Marks travel through the
chat template with the text, so that what the template itself writes can be told from what the row wrote.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

ControlTokens = Literal["keep", "escape", "refuse"]
BEGIN, END = "\ufdd0", "\ufdd1"  # noncharacters of Unicode: no text has them


class Unmarked(NamedTuple):
    """A text without marks, and what they said."""

    text: str
    plain: list[tuple[int, int]]  # characters that are text whatever tokens they spell
    positions: list[int]  # those of the marked text, moved


class ControlTokenFinder:
    """Finds the special tokens of a tokenizer in texts.

    Special are those that the tokenizer flags so, and those that it lists as `chat_control_tokens`; further added ones
    (`<think>`, `<tool_call>`) are words that answers are meant to hold.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder.values()
        tokens = {str(token) for token in added if token.special} | set(map(str, tokenizer.all_special_tokens))
        tokens |= set(getattr(tokenizer, "chat_control_tokens", None) or ())
        longest_first = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
        either = "|".join(map(re.escape, longest_first)) or "(?!)"
        self.pattern = re.compile(either)
        self.marks = re.compile(f"{BEGIN}({either}){END}|[{BEGIN}{END}]")

    def find(self, value: Any) -> list[str]:
        """The control tokens in all texts of a value, as often as they occur."""
        return [token for text in _texts(value) for token in self.pattern.findall(text)]

    def mark(self, value: Any) -> Any:
        """The same value with marks round the control tokens of its texts."""
        if isinstance(value, str):
            bare = value.replace(BEGIN, "").replace(END, "")  # nobody forges marks
            return self.pattern.sub(f"{BEGIN}\\g<0>{END}", bare)
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list) else value

    def unmark(self, text: str, positions: list[int]) -> Unmarked:
        """Take the marks out of a text; `positions` are in it."""
        parts, plain, removed, at, length = [], [], [], 0, 0
        for match in self.marks.finditer(text):
            parts += [text[at : match.start()], match[1] or ""]
            length += match.start() - at
            # A mark alone, where the template has cut between two: nothing plain, but tokens end there.
            plain.append((length, length + len(match[1] or "")))
            length += len(match[1] or "")
            removed += [match.start(), match.end() - 1] if match[1] else [match.start()]
            at = match.end()
        return Unmarked("".join([*parts, text[at:]]), plain, [p - bisect_left(removed, p) for p in positions])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
