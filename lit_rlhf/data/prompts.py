"""Prompts to complete: ids, and the other columns of their rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.batching import MicroBatch
from lit_rlhf.data.examples import ragged, tokenized
from lit_rlhf.data.formats import EXPECTED, Kind, Row, Sources
from lit_rlhf.data.report import Report
from lit_rlhf.data.sources import Role, iterate_rows, parse_sources, weighted
from lit_rlhf.data.tokenize import EMPTY, Options, tokenize_prompts
from lit_rlhf.errors import UserError


class PromptDataset(Dataset):
    """Prompts and the other columns of their rows."""

    def __init__(self, prompt_ids: list[np.ndarray], columns: dict[str, list[Any]]) -> None:
        self.prompt_ids = prompt_ids
        self.columns = columns

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, batch: MicroBatch) -> PromptBatch:
        return PromptBatch(
            [self.prompt_ids[index] for index in batch.indices],
            {name: [values[index] for index in batch.indices] for name, values in self.columns.items()},
            batch.indices,
        )


def load_prompts(
    sources: Sources,
    role: Role,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None = None,
    seed: int = 0,
    kind: Kind = "prompts",
    num_proc: int | None = None,
) -> tuple[list[np.ndarray], dict[str, list[Any]]]:
    """Prompts as ids, and all columns of their rows as they are.

    Args:
        sources: see `sources.parse_sources`.
        role: what the prompts are for.
        tokenizer: makes ids; message lists end with its template's generation prompt.
        max_prompt_length: longer prompts lose tokens on the left; None = no limit.
        seed: of the share that a weight below 1 takes.
        kind: prompts, or scored where a completion must stand beside each.
        num_proc: processes that tokenise; None = this one.

    Returns:
        n arrays (P,) int64, and n values for each column; None where a row lacks it.

    Raises:
        UserError: bad rows or sources, or no prompt left.
    """
    prompt_ids: list[np.ndarray] = []
    rows: list[Row] = []
    for source in parse_sources(sources):
        read = list(iterate_rows(source, kind, role))
        table = tokenized(source, kind, role, tokenizer, Options(max_prompt_length), num_proc).data
        ids = ragged(table.column("prompt_ids"))
        kept = usable(table.column("status").to_numpy(), f"{role} prompts {source.name}")
        for row in weighted(kept, source.weight, seed):
            prompt_ids.append(ids[row])
            rows.append(read[row])
    return prompt_ids, to_columns(rows)


def encode_prompts(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_prompt_length: int | None, name: str
) -> tuple[list[np.ndarray], np.ndarray]:
    """Ids of all prompts, and which of them can be used; the rest is reported under `name`."""
    if not rows:
        raise UserError(f"{name}: there are no rows; expected {EXPECTED['prompts']}")
    columns: dict[str, Any] = tokenize_prompts(rows, tokenizer, Options(max_prompt_length))
    return columns["prompt_ids"], usable(np.array(columns["status"]), name)


def usable(statuses: np.ndarray, name: str) -> np.ndarray:
    """The numbers of the prompts that can be used; what became of all is reported under `name`.

    Raises:
        UserError: none can.
    """
    report = Report.of(name, statuses)
    used = statuses <= EMPTY
    dropped = (np.flatnonzero(~used) + 1).tolist()  # named, since what is made of the others has a row for each of them
    rank_zero_info(f"{report}{f': rows {dropped[:8]}' if dropped else ''}{' and more' if len(dropped) > 8 else ''}")
    if report.kept == 0:
        raise UserError(f"no prompt is left to use. {report}")
    return np.flatnonzero(used)


def to_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Rows to columns, None where a row lacks one."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
