"""Tokenised examples, packed into typed batches when asked for."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data import tokenize
from lit_rlhf.data.batches import Origins, PreferenceBatch, SFTBatch, StepwiseBatch
from lit_rlhf.data.duplicates import contents, digest, digests
from lit_rlhf.data.formats import Kind, Sources
from lit_rlhf.data.microbatches import MicroBatch
from lit_rlhf.data.naming import Role, Source, parse_sources
from lit_rlhf.data.ragged import parts, ragged
from lit_rlhf.data.reader import Options
from lit_rlhf.data.report import Report
from lit_rlhf.data.sources import place_of, weighted
from lit_rlhf.data.token_cache import tokenized
from lit_rlhf.engine.packing import Example, PackedBatch, pack
from lit_rlhf.errors import UserError


class PackedDataset(Dataset):
    """Examples of one role; indexed by a `MicroBatch`, it gives a typed batch.

    Args:
        table: tokenised rows of all sources, dropped ones included, without an indices mapping.
        rows: (n,) the rows of `table` that an epoch takes.
        reports: of each source.
        places: of each source: its row -> file and line.
        max_length: tokens that a prompt with a response may have; None = any number.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        rows: np.ndarray,
        reports: list[Report],
        places: Sequence[Callable[[int], str]] = (),
        max_length: int | None = None,
    ) -> None:
        self.table = table.with_format("arrow")
        self.rows = rows
        self.reports = reports
        self.places = list(places)
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_rows(self) -> int:
        """How many `row_ids` there are: they are below it."""
        return len(self)

    def lengths(self) -> np.ndarray:
        """(n,) tokens that each example puts into a packed batch."""
        raise NotImplementedError  # pragma: no cover

    def items(self) -> np.ndarray:
        """(n,) what the loss of each example is a mean over."""
        raise NotImplementedError  # pragma: no cover

    def learnt(self) -> np.ndarray:
        """(n,) tokens of each example that the loss counts."""
        raise NotImplementedError  # pragma: no cover

    def part_lengths(self) -> dict[str, np.ndarray]:
        """Tokens of the examples by part: its name -> (n,), or fewer where not each has it."""
        return {"prompt": self._list_lengths("prompt_ids")}

    def contents(self) -> list[bytes]:
        """A digest of each example: of its tokens, and of what is known of them."""
        found = contents(self.table.data)
        return [found[row] for row in self.rows]

    def prompts(self) -> list[bytes | None]:
        """A digest of each example's prompt; None where it has none."""
        return list(self._digests(["prompt_ids"]))

    def _digests(self, columns: list[str]) -> list[bytes]:
        found = digests(self.table.data, columns)
        return [found[row] for row in self.rows]

    def __getitem__(self, batch: MicroBatch) -> Any:
        raise NotImplementedError  # pragma: no cover

    def place(self, example: int) -> str:
        """File and line of an example, looked for in the file."""
        firsts = np.cumsum([0, *(report.rows for report in self.reports)])
        source = int(np.searchsorted(firsts, self.rows[example], side="right")) - 1
        return Origins(self.places, [(source, int(self.rows[example] - firsts[source]))]).place(0)

    def fingerprint(self) -> str:
        """Hash of the rows that an epoch takes and of all tokens, whatever file or cache they came from."""
        digest = hashlib.sha256(self.rows.tobytes())
        for name in self.table.column_names:
            column, kind = self.table.data.column(name), self.table.data.schema.field(name).type
            lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            if lists:
                for part in parts(column):
                    digest.update(pc.list_value_length(part).to_numpy(zero_copy_only=False).tobytes())
            digest.update(f"{name} {kind.value_type if lists else kind}".encode())
            for part in parts(column):
                digest.update((part.flatten() if lists else part).to_numpy(zero_copy_only=False).tobytes())
        return digest.hexdigest()

    def _take(self, batch: MicroBatch) -> pa.Table:
        return self.table[self.rows[batch.indices]]

    def _column(self, name: str) -> pa.ChunkedArray:
        """A column of the examples, in their order."""
        return self.table.data.column(name).take(pa.array(self.rows))

    def _list_lengths(self, column: str) -> np.ndarray:
        return pc.list_value_length(self.table.data.column(column)).to_numpy()[self.rows]

    def _count(self, mask: str) -> np.ndarray:
        """(n,) how many of each example's tokens a mask has."""
        counts = []
        for masks in parts(self.table.data.column(mask)):
            sums = np.concatenate([[0], np.cumsum(masks.flatten().to_numpy(zero_copy_only=False))])
            ends = np.cumsum(pc.list_value_length(masks).to_numpy())
            counts.append(np.diff(sums[np.concatenate([[0], ends])]))
        return np.concatenate(counts)[self.rows]


class SFTDataset(PackedDataset):
    """Demonstrations."""

    def lengths(self) -> np.ndarray:
        """(n,) tokens."""
        return self._list_lengths("input_ids")

    def items(self) -> np.ndarray:
        """(n,) response tokens."""
        return self._count("loss_mask")

    def learnt(self) -> np.ndarray:
        """(n,) those that the loss is a mean over."""
        return self.items()

    def part_lengths(self) -> dict[str, np.ndarray]:
        """What stands before the first token that is learnt, and what follows."""
        prompts = np.concatenate(
            [
                [int(mask.argmax()) for mask in ragged(pa.chunked_array([masks]))]
                for masks in parts(self._column("loss_mask"))
            ]
        )
        return {"prompt": prompts, "completion": self.lengths() - prompts}

    def prompts(self) -> list[bytes | None]:
        """What stands before the first token that is learnt, which is more than a beginning token."""
        rows = (ids for part in parts(self._column("input_ids")) for ids in ragged(pa.chunked_array([part])))
        return [
            digest([ids[:length]]) if length > 1 else None
            for ids, length in zip(rows, self.part_lengths()["prompt"].tolist(), strict=True)
        ]

    def __getitem__(self, batch: MicroBatch) -> SFTBatch:
        table = self._take(batch)
        # The first token has no predictor: it is the prompt of the rest.
        examples = [
            Example(ids[:1], (ids[1:],), (mask[1:],))
            for ids, mask in zip(ragged(table["input_ids"]), ragged(table["loss_mask"]), strict=True)
        ]
        return SFTBatch(pack(examples), torch.tensor(batch.denominator, dtype=torch.float32))


class PreferenceDataset(PackedDataset):
    """Pairs."""

    def count_margins(self) -> tuple[int, int]:
        """The pairs that an epoch takes, and how many of them have no margin, or 0."""
        margins = self.table.data.column("margin").to_numpy()[self.rows]
        return len(margins), int((margins == 0).sum())

    def lengths(self) -> np.ndarray:
        """(n,) tokens of the prompt and both responses."""
        return sum(self._list_lengths(column) for column in ("prompt_ids", "chosen_ids", "rejected_ids"))  # type: ignore[return-value]

    def items(self) -> np.ndarray:
        """(n,) ones: a loss for each pair."""
        return np.ones(len(self), dtype=np.int64)

    def learnt(self) -> np.ndarray:
        """(n,) tokens of the policy's own in both responses."""
        return self._count("chosen_mask") + self._count("rejected_mask")

    def part_lengths(self) -> dict[str, np.ndarray]:
        """Prompt and both responses."""
        return super().part_lengths() | {side: self._list_lengths(f"{side}_ids") for side in ("chosen", "rejected")}

    def __getitem__(self, batch: MicroBatch) -> PreferenceBatch:
        table = self._take(batch)
        names = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask")
        examples = [
            Example(prompt, (chosen, rejected), (chosen_mask, rejected_mask))
            for prompt, chosen, rejected, chosen_mask, rejected_mask in zip(
                *(ragged(table[name]) for name in names), strict=True
            )
        ]
        return PreferenceBatch(
            packed=pack(examples),
            row_ids=torch.from_numpy(batch.indices),
            margin=torch.tensor(table["margin"].to_numpy(), dtype=torch.float32),
            denominator=torch.tensor(batch.denominator, dtype=torch.float32),
        )


class StepwiseDataset(PackedDataset):
    """Solutions in steps."""

    def lengths(self) -> np.ndarray:
        """(n,) tokens of prompt and solution."""
        return self._list_lengths("prompt_ids") + self._list_lengths("response_ids")

    def items(self) -> np.ndarray:
        """(n,) steps that were judged."""
        return self._list_lengths("labels")

    def learnt(self) -> np.ndarray:
        """(n,) the last tokens of these."""
        return self.items()

    def part_lengths(self) -> dict[str, np.ndarray]:
        """Prompt and solution."""
        return super().part_lengths() | {"solution": self._list_lengths("response_ids")}

    def __getitem__(self, batch: MicroBatch) -> StepwiseBatch:
        table = self._take(batch)
        prompts, responses, ends = (ragged(table[name]) for name in ("prompt_ids", "response_ids", "step_ends"))
        packed = pack([Example(prompt, (response,)) for prompt, response in zip(prompts, responses, strict=True)])
        labels = table["labels"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return StepwiseBatch(
            packed=packed,
            step_nodes=response_nodes(packed, responses, ends),
            labels=torch.tensor(labels, dtype=torch.float32),
            solution_ids=torch.arange(len(ends)).repeat_interleave(torch.tensor([len(places) for places in ends])),
            denominator=torch.tensor(batch.denominator, dtype=torch.float32),
        )


def response_nodes(packed: PackedBatch, responses: list[np.ndarray], places: list[np.ndarray]) -> torch.Tensor:
    """(K,) nodes of some tokens of each response, by their places in it, one response of an example after the other.

    Args:
        packed: examples of one response each.
        responses: B of (T,).
        places: B of (k,), below T.
    """
    first_nodes = packed.last_nodes.numpy() + 1 - np.array([len(response) for response in responses])
    return torch.from_numpy(np.concatenate([first + own for first, own in zip(first_nodes, places, strict=True)]))


def load_examples(
    sources: Sources | list[Source],
    kind: Kind,
    role: Role,
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    num_proc: int | None = None,
    seed: int = 0,
    dataset: type[PackedDataset] = SFTDataset,
    deduplicate: bool = False,
) -> PackedDataset:
    """Read, check, tokenise and count; from the cache on disk where nothing has changed.

    Args:
        sources: see `naming.parse_sources`.
        kind: of the rows.
        role: what the rows are for; chooses splits and files.
        tokenizer: makes ids, by its chat template where rows are messages.
        options: of tokenisation.
        num_proc: processes that tokenise; None = this one.
        seed: of the share that a weight below 1 takes.
        dataset: what packs rows of this kind.
        deduplicate: drop rows of the same tokens as an earlier one that is used, whichever source has that.

    Raises:
        UserError: bad rows or sources, or no row left.
    """
    known: set[bytes] = set()
    tables, rows, reports, places, offset = [], [], [], [], 0
    for source in parse_sources(sources):
        table = tokenized(source, kind, role, tokenizer, options, num_proc)
        statuses = table.data.column("status").to_numpy().copy()
        for row, content in enumerate(contents(table.data)) if deduplicate else ():
            if content in known and statuses[row] <= tokenize.EMPTY:
                statuses[row] = tokenize.REPEATED
            elif statuses[row] <= tokenize.EMPTY:
                known.add(content)
        control_tokens = table.data.column("control_tokens")
        repeats = table.data.column("repeats_prompt").to_numpy()
        report = Report.of(f"{role} data {source.name}", statuses, control_tokens, tokenizer, repeats=repeats)
        report.say(options)
        if report.kept == 0:
            raise UserError(f"no row is left to use. {report}. {report.remedy(options)}")
        rows.append(weighted(np.flatnonzero(statuses <= tokenize.EMPTY), source, seed) + offset)
        tables.append(table.remove_columns("repeats_prompt"))  # counted, and no part of the examples
        reports.append(report)
        places.append(functools.partial(place_of, source, kind, role))
        offset += len(table)
    return dataset(datasets.concatenate_datasets(tables), np.concatenate(rows), reports, places, options.max_length)
