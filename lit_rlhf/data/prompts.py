"""Prompts to complete: ids, and the other columns of their rows."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.batches import Origins, PromptBatch
from lit_rlhf.data.formats import Kind, Row, Sources, as_prompt, to_tokenize
from lit_rlhf.data.microbatches import MicroBatch
from lit_rlhf.data.naming import Role, Source, parse_sources
from lit_rlhf.data.plain import as_json, require_text
from lit_rlhf.data.ragged import ragged
from lit_rlhf.data.reader import Options
from lit_rlhf.data.report import Report
from lit_rlhf.data.sources import no_rows, place_of, placed_rows, weighted
from lit_rlhf.data.token_cache import FEATURES, cached_rows, hash_of, tokenized_rows
from lit_rlhf.data.tokenize import EMPTY
from lit_rlhf.errors import UserError

AS_THEY_ARE = Options(None)


class PromptDataset(Dataset):
    """Prompts and the other columns of their rows.

    Args:
        prompt_ids: n arrays (P,) int64.
        columns: n values each; None where a row lacks it.
        response_ids: n arrays (T,) int64 where the completions of the rows are to be scored.
        origins: of the rows, where they were read from sources.
        step_ends: n arrays (K,) int64 where each of their steps is to be.
        reports: what became of the rows of each source.
    """

    def __init__(
        self,
        prompt_ids: list[np.ndarray],
        columns: dict[str, list[Any]],
        response_ids: list[np.ndarray] | None = None,
        origins: Origins | None = None,
        step_ends: list[np.ndarray] | None = None,
        reports: Sequence[Report] = (),
    ) -> None:
        self.prompt_ids = prompt_ids
        self.columns = columns
        self.response_ids = response_ids
        self.origins = origins
        self.step_ends = step_ends
        self.reports = list(reports)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, batch: MicroBatch) -> PromptBatch:
        return self.take(batch.indices)

    def take(self, rows: np.ndarray) -> PromptBatch:
        """Some of the prompts as a batch."""
        return PromptBatch(
            [self.prompt_ids[row] for row in rows],
            {name: [values[row] for row in rows] for name, values in self.columns.items()},
            rows,
            None if self.response_ids is None else [self.response_ids[row] for row in rows],
            self.origins,
            None if self.step_ends is None else [self.step_ends[row] for row in rows],
        )


def load_prompts(
    sources: Sources | list[Source],
    role: Role,
    tokenizer: PreTrainedTokenizerBase,
    options: Options = AS_THEY_ARE,
    seed: int = 0,
    kind: Kind = "prompts",
    num_proc: int | None = None,
    of: Kind | None = None,
) -> PromptDataset:
    """Prompts as ids, and all columns of their rows as they are.

    Args:
        sources: see `naming.parse_sources`.
        role: what the prompts are for.
        tokenizer: makes ids; message lists end with its template's generation prompt.
        options: of tokenisation.
        seed: of the share that a weight below 1 takes.
        kind: prompts, or scored (scored_steps) where a completion (steps) must stand beside each.
        num_proc: processes that tokenise; None = this one.
        of: sft, preference, unpaired or stepwise, where the rows are of that kind: their prompts are taken, and beside
            each the completion that it is known to have. There may be none.

    Raises:
        UserError: bad rows or sources, or no prompt left.
    """
    ids: dict[str, list[np.ndarray]] = {name: [] for name in FEATURES[kind] if name.endswith(("_ids", "_ends"))}
    rows: list[Row] = []
    places: list[Callable[[int], str]] = []
    origins: list[tuple[int, int]] = []
    reports: list[Report] = []
    for source in parse_sources(sources):
        read, numbers, texts = [], [], []
        for number, (at, row) in enumerate(placed_rows(source, of or kind, role)):
            prompt = row if of is None else as_prompt(row)
            if prompt is not None:
                require_text(prompt, at)
                read.append(prompt)
                numbers.append(number)
                texts.append(as_json(to_tokenize(prompt, kind), at))
        if not read:
            if of is not None:
                continue
            raise no_rows(source, kind)
        # By what was read, not by its file: ids of other prompts are never paired with these columns.
        cached = cached_rows(functools.partial(iter, texts), hash_of(texts))
        place = functools.partial(_place_of_kept, source, of or kind, role, numbers)
        table = tokenized_rows(cached, place, kind, tokenizer, options, num_proc).data
        statuses, found = table.column("status").to_numpy(), table.column("control_tokens")
        repeats = table.column("repeats_prompt").to_numpy() if "repeats_prompt" in FEATURES[kind] else ()
        report = Report.of(f"{role} prompts {source.name}", statuses, found, tokenizer, learnt=False, repeats=repeats)
        kept = weighted(usable(report, statuses, options), source, seed)
        reports.append(report)
        for name, values in ids.items():
            column = ragged(table.column(name))
            values += [column[row] for row in kept]
        rows += [read[row] for row in kept]
        origins += [(len(places), row) for row in kept.tolist()]
        places.append(place)
    of_responses = ids.get("response_ids"), Origins(places, origins), ids.get("step_ends")
    return PromptDataset(ids["prompt_ids"], to_columns(rows), *of_responses, reports)


def _place_of_kept(source: Source, kind: Kind, role: Role, numbers: Sequence[int], kept: int) -> str:
    return place_of(source, kind, role, numbers[kept])


def usable(report: Report, statuses: np.ndarray, options: Options) -> np.ndarray:
    """The numbers of the prompts that can be used; what became of all is reported.

    Raises:
        UserError: none can.
    """
    used = statuses <= EMPTY
    dropped = (np.flatnonzero(~used) + 1).tolist()  # named, since what is made of the others has a row for each of them
    note = f"{f': rows {dropped[:8]}' if dropped else ''}{' and more' if len(dropped) > 8 else ''}"
    report.say(options, note)
    if report.kept == 0:
        raise UserError(f"no prompt is left to use. {report}. {report.remedy(options)}")
    return np.flatnonzero(used)


def to_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Rows to columns, None where a row lacks one."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
