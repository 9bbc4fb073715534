"""Prompts to complete: ids, and the other columns of their rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.batching import MicroBatch
from lit_rlhf.data.examples import FEATURES, FUNCTIONS, ragged, tokenized
from lit_rlhf.data.formats import EXPECTED, Kind, Row, Sources
from lit_rlhf.data.reader import Options
from lit_rlhf.data.report import Report
from lit_rlhf.data.sources import Role, iterate_rows, parse_sources, weighted
from lit_rlhf.data.tokenize import EMPTY
from lit_rlhf.errors import UserError

AS_THEY_ARE = Options(None)


class PromptDataset(Dataset):
    """Prompts and the other columns of their rows.

    Args:
        prompt_ids: n arrays (P,) int64.
        columns: n values each; None where a row lacks it.
        response_ids: n arrays (T,) int64 where the completions of the rows are to be scored.
    """

    def __init__(
        self,
        prompt_ids: list[np.ndarray],
        columns: dict[str, list[Any]],
        response_ids: list[np.ndarray] | None = None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.columns = columns
        self.response_ids = response_ids

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
        )


def load_prompts(
    sources: Sources,
    role: Role,
    tokenizer: PreTrainedTokenizerBase,
    options: Options = AS_THEY_ARE,
    seed: int = 0,
    kind: Kind = "prompts",
    num_proc: int | None = None,
) -> PromptDataset:
    """Prompts as ids, and all columns of their rows as they are.

    Args:
        sources: see `sources.parse_sources`.
        role: what the prompts are for.
        tokenizer: makes ids; message lists end with its template's generation prompt.
        options: of tokenisation.
        seed: of the share that a weight below 1 takes.
        kind: prompts, or scored where a completion must stand beside each.
        num_proc: processes that tokenise; None = this one.

    Raises:
        UserError: bad rows or sources, or no prompt left.
    """
    ids: dict[str, list[np.ndarray]] = {name: [] for name in FEATURES[kind] if name.endswith("_ids")}
    rows: list[Row] = []
    for source in parse_sources(sources):
        read = list(iterate_rows(source, kind, role))
        table = tokenized(source, kind, role, tokenizer, options, num_proc).data
        statuses, found = table.column("status").to_numpy(), table.column("control_tokens")
        report = Report.of(f"{role} prompts {source.name}", statuses, found, tokenizer, learnt=False)
        kept = weighted(usable(report, statuses, options), source.weight, seed)
        for name, values in ids.items():
            column = ragged(table.column(name))
            values += [column[row] for row in kept]
        rows += [read[row] for row in kept]
    return PromptDataset(ids["prompt_ids"], to_columns(rows), ids.get("response_ids"))


def held_out_prompts(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: Options, kind: Kind, name: str
) -> PromptDataset:
    """The same of rows that were read and checked for another kind of data; reported under `name`."""
    if not rows:
        raise UserError(f"{name}: there are no rows; expected {EXPECTED['prompts']}")
    columns: dict[str, Any] = FUNCTIONS[kind](rows, tokenizer, options)
    report = Report.of(name, columns["status"], columns["control_tokens"], tokenizer, learnt=False)
    kept = usable(report, np.array(columns["status"]), options)
    taken = {
        column: [columns[column][row] for row in kept] for column in ("prompt_ids", "response_ids") if column in columns
    }
    return PromptDataset(taken["prompt_ids"], to_columns([rows[row] for row in kept]), taken.get("response_ids"))


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
        raise UserError(f"no prompt is left to use. {report}")
    return np.flatnonzero(used)


def to_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Rows to columns, None where a row lacks one."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
