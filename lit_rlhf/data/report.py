"""What became of the rows of some data: counted once, said once."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from lit_rlhf.data import tokenize


@dataclass(frozen=True)
class Report:
    """What became of the rows of some data."""

    name: str
    rows: int
    kept: int
    truncated: int = 0  # kept, cut to the length limit
    empty: int = 0  # kept, with a response that says nothing
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows

    @classmethod
    def of(cls, name: str, statuses: np.ndarray) -> "Report":
        """Count statuses; see `tokenize.STATUS`."""
        counts = Counter(np.asarray(statuses).tolist())
        truncated, empty = counts[tokenize.TRUNCATED], counts[tokenize.EMPTY]
        dropped = {word: counts[status] for status, word in enumerate(tokenize.STATUS) if status > tokenize.EMPTY}
        return cls(
            name,
            rows=len(statuses),
            kept=counts[tokenize.KEPT] + truncated + empty,
            truncated=truncated,
            empty=empty,
            dropped={reason: count for reason, count in dropped.items() if count},
        )

    def __str__(self) -> str:
        parts = [f"{self.rows} rows, {self.kept} used"]
        if self.truncated:
            parts.append(f"{self.truncated} of them truncated")
        if self.empty:
            parts.append(f"{self.empty} of them {tokenize.STATUS[tokenize.EMPTY]}")
        if self.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            parts.append(f"{self.rows - self.kept} dropped ({reasons})")
        return f"{self.name}: {', '.join(parts)}"
