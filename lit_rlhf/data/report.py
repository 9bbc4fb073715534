"""What became of the rows of some data: counted once, said once, and warned of where much of it is lost."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data import tokenize
from lit_rlhf.data.reader import Options

MUCH = 0.1  # share of the rows that may be cut or dropped without a warning


@dataclass(frozen=True)
class Report:
    """What became of the rows of some data."""

    name: str
    rows: int
    kept: int
    truncated: int = 0  # kept, cut to the length limit
    empty: int = 0  # kept, with a response that says nothing
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    learnt: bool = True  # not prompts that are completed or scored
    control_rows: int = 0  # whose texts spell out control tokens
    control_tokens: dict[str, int] = field(default_factory=dict)  # control token -> rows
    repeating: int = 0  # whose response begins with the whole prompt
    # What became of each row, see `tokenize.STATUS`.
    statuses: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8), repr=False, compare=False)

    @classmethod
    def of(
        cls,
        name: str,
        statuses: Any,
        control_tokens: Any = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        learnt: bool = True,
        repeats: Any = (),
    ) -> "Report":
        """Count what became of each row.

        Args:
            name: of the data.
            statuses: see `tokenize.STATUS`.
            control_tokens: ids of those that each row spells out.
            tokenizer: names them.
            learnt: whether they are not prompts that are completed or scored.
            repeats: of each row, whether its response begins with the whole prompt.
        """
        counts = Counter(np.asarray(statuses).tolist())
        truncated, empty = counts[tokenize.TRUNCATED], counts[tokenize.EMPTY]
        dropped = {word: counts[status] for status, word in enumerate(tokenize.STATUS) if status > tokenize.EMPTY}
        if not isinstance(control_tokens, pa.ChunkedArray):
            control_tokens = pa.chunked_array([pa.array(list(control_tokens), pa.list_(pa.int32()))])
        found = Counter(pc.list_flatten(control_tokens).to_pylist())
        return cls(
            name,
            rows=len(statuses),
            kept=counts[tokenize.KEPT] + truncated + empty,
            truncated=truncated,
            empty=empty,
            dropped={reason: count for reason, count in dropped.items() if count},
            learnt=learnt,
            control_rows=int(pc.sum(pc.greater(pc.list_value_length(control_tokens), 0)).as_py() or 0),
            control_tokens={
                str(token if tokenizer is None else tokenizer.convert_ids_to_tokens(token)): count
                for token, count in found.most_common()
            },
            repeating=int(np.count_nonzero(repeats)),
            statuses=np.asarray(statuses, dtype=np.uint8),
        )

    def say(self, options: Options, note: str = "") -> None:
        """Log it, with a note; as a warning with what to do where more than a tenth is not used whole.

        That none is left is an error, which says all of it; that responses double their prompts is warned of besides.

        Args:
            options: by which the rows were read.
            note: what to log besides.
        """
        asked = self.dropped.get(tokenize.STATUS[tokenize.REPEATED], 0)  # by `deduplicate`
        told, lost = f"{self}{self._read_as(options)}{note}", self.rows - self.kept + self.truncated - asked
        if self.kept and lost > MUCH * self.rows:
            rank_zero_warn(f"{told}: {lost} of {self.rows} rows are not used whole. {self.remedy(options)}")
        elif self.kept:
            rank_zero_info(told)
        if self.repeating > MUCH * self.rows:
            rank_zero_warn(
                f"{self.name}: in {self.repeating} of {self.rows} rows the response begins with the whole prompt, and "
                "is read behind it: the prompt stands there twice. Cut it off the responses; where chosen and rejected "
                "both begin with it, `columns: {aside: prompt}` does"
            )

    def __str__(self) -> str:
        parts = [f"{self.rows} rows, {self.kept} used"]
        if self.truncated:
            parts.append(f"{self.truncated} of them truncated")
        if self.empty:
            parts.append(f"{self.empty} of them {tokenize.STATUS[tokenize.EMPTY]}")
        if self.repeating:
            parts.append(f"{self.repeating} whose response begins with the whole prompt")
        if self.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            parts.append(f"{self.rows - self.kept} dropped ({reasons})")
        if self.control_rows:
            tokens = ", ".join(f"{token} in {count}" for token, count in list(self.control_tokens.items())[:5])
            parts.append(f"{self.control_rows} spell out control tokens ({tokens})")
        return f"{self.name}: {', '.join(parts)}"

    def _read_as(self, options: Options) -> str:
        if not self.control_rows:
            return ""
        if options.control_tokens == "escape":
            return ", read as plain text"
        return ", read as these tokens (control_tokens: escape reads them as plain text, refuse names the row)"

    def remedy(self, options: Options) -> str:
        """What to do about rows that are not used whole."""
        too_long = {tokenize.STATUS[status] for status in (tokenize.TOO_LONG, tokenize.LONG_PROMPT, tokenize.LONG_STEP)}
        if not (self.truncated or too_long & self.dropped.keys()):
            return "Are these the data that were meant?"
        if not self.learnt:
            return (
                f"A prompt may have {options.max_prompt_length} tokens, which is max_prompt_length or what the context "
                "leaves beside a response: raise the one, ask for shorter responses, or shorten the prompts"
            )
        truncates = options.truncation == "truncate"
        other = "drop leaves long rows out" if truncates else "truncate learns the beginnings of long rows"
        return (
            f"Raise max_length ({options.max_length}), at most to the model's context, or shorten the rows; "
            f"truncation: {other}"
        )
