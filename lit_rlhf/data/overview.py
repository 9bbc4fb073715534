"""What became of the rows of some data, and what an epoch takes of them, in figures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.duplicates import digest, repeats
from lit_rlhf.data.examples import PackedDataset
from lit_rlhf.data.report import Report

BINS = 20  # of a histogram, at most


@dataclass(frozen=True)
class Lengths:
    """Of one part of the examples, in tokens."""

    least: int
    median: float
    mean: float
    p95: float
    most: int
    edges: list[float]  # of the bins of a histogram: a length belongs to the last bin that begins at or below it
    counts: list[int]  # of each bin

    @classmethod
    def of(cls, lengths: np.ndarray) -> "Lengths":
        """Count (n,) lengths, n >= 1."""
        least, most = int(lengths.min()), int(lengths.max())
        width = -(-(most - least + 1) // BINS)  # whole tokens, so that no bin is empty for its bounds alone
        bins = -(-(most - least + 1) // width)
        counts, edges = np.histogram(lengths, bins, (least, least + bins * width))
        median, p95 = np.quantile(lengths, [0.5, 0.95]).tolist()
        return cls(least, median, float(lengths.mean()), p95, most, edges.tolist(), counts.tolist())


@dataclass(frozen=True)
class Fates:
    """Of the rows of one source: each read row is whole, cut, dropped for a reason, or not taken."""

    source: str
    read: int
    whole: int
    cut: int
    dropped: dict[str, int]  # reason -> rows
    not_taken: int  # usable, and beyond the share that the weight of the source takes
    empty: int  # of those whole: with a response that says nothing
    repeating: int  # whose response begins with the whole prompt
    control: dict[str, int]  # control token -> rows that spell it out


@dataclass(frozen=True)
class Overview:
    """Of one role's rows."""

    sources: list[Fates]
    examples: int  # of an epoch
    tokens: int  # of these, a prompt that responses share once
    learnt: int | None  # of these tokens, those that the loss counts; None of prompts, whose responses it counts
    lengths: dict[str, Lengths]  # by part
    repeated: int  # distinct rows of which the like came before
    in_train: int | None  # distinct rows that are in the training data, too; None of these themselves
    prompts_in_train: int | None  # distinct rows whose prompt is


@dataclass(frozen=True)
class Contents:
    """Digests of the distinct rows that are taken."""

    rows: list[bytes]
    prompts: list[bytes | None]

    @classmethod
    def of(cls, data: PackedDataset | PromptBatch, rows: np.ndarray) -> "Contents":
        """Those of some data, whose examples are these (n,) rows."""
        first = np.unique(rows, return_index=True)[1].tolist()
        if isinstance(data, PromptBatch):
            found = [digest([ids]) for ids in data.prompt_ids]
            return cls([found[at] for at in first], [found[at] for at in first])
        contents, prompts = data.contents(), data.prompts()
        return cls([contents[at] for at in first], [prompts[at] for at in first])


def overview(
    data: PackedDataset | PromptBatch, reports: Sequence[Report], ends: int = 0, train: Contents | None = None
) -> tuple[Overview, Contents]:
    """Count rows and tokens.

    Args:
        data: of one role.
        reports: of each of its sources.
        ends: tokens of an example that a score is read at, where the loss counts those alone; 0 = others.
        train: the training data's, for other roles.
    """
    rows = rows_of(data, reports)
    taken = Contents.of(data, rows)
    if isinstance(data, PromptBatch):
        whole = np.array([len(ids) for ids in data.prompt_ids])
        lengths, learnt = {"prompt": whole}, None
    else:
        whole = data.lengths()
        lengths = data.part_lengths() | {"whole": whole}
        learnt = ends * len(rows) or int(data.learnt().sum())
    return Overview(
        fates(reports, np.unique(rows)),
        len(rows),
        int(whole.sum()),
        learnt,
        {name: Lengths.of(of) for name, of in lengths.items() if len(of)},
        int(repeats(taken.rows).sum()),
        *(_also_in(taken.rows, train.rows), _also_in(taken.prompts, train.prompts)) if train else (None, None),
    ), taken


def rows_of(data: PackedDataset | PromptBatch, reports: Sequence[Report]) -> np.ndarray:
    """(n,) the rows that the examples are, counted over all sources."""
    if isinstance(data, PackedDataset):
        return data.rows
    assert data.origins is not None, "prompts of a data module are read from sources"
    firsts = np.cumsum([0, *(report.rows for report in reports)])
    return np.array([firsts[source] + row for source, row in data.origins.rows], dtype=np.int64)


def fates(reports: Sequence[Report], taken: np.ndarray) -> list[Fates]:
    """What became of the rows of each source, of which an epoch takes these (n,)."""
    firsts = np.cumsum([0, *(report.rows for report in reports)])
    return [
        Fates(
            report.name.split(" ", 2)[2],  # behind the role and what they are
            report.rows,
            report.kept - report.truncated,
            report.truncated,
            report.dropped,
            report.kept - int(((taken >= first) & (taken < first + report.rows)).sum()),
            report.empty,
            report.repeating,
            report.control_tokens,
        )
        for report, first in zip(reports, firsts.tolist(), strict=False)
    ]


def _also_in(found: Sequence[bytes | None], others: Sequence[bytes | None]) -> int:
    known = set(others) - {None}
    return sum(one in known for one in found)
