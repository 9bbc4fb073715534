"""`Dataset.map` into a file of the cache, by processes that may be killed.

Each writes the part that one of `datasets`' own pool would, and `datasets` then finds them all: the pool may wait for
ever for a process that is gone.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from lit_rlhf.data.processes import ProcessDied, Send, in_processes
from lit_rlhf.errors import UserError

PART = "_{rank:05d}_of_{num_proc:05d}"  # what `datasets` adds to the name of a file


class RowMap(NamedTuple):
    """What batches of rows become, and where that is kept."""

    function: Callable[[Sequence[str], Sequence[int]], dict[str, Any]]  # of rows and their numbers
    features: datasets.Features
    file: Path
    place: Callable[[int], str]  # where row i comes from

    @property
    def files(self) -> list[Path]:
        """What is kept: one file for all rows or one for each part, perhaps not all of them."""
        return sorted(self.file.parent.glob(f"{self.file.stem}*.arrow"))

    @property
    def is_whole(self) -> bool:
        """Whether all of it is kept, in however many parts."""
        of = Counter(file.stem.rpartition("_of_")[2] for file in self.files)
        return self.file.exists() or any(parts == int(number) for number, parts in of.items())

    def find_or_make(self, rows: datasets.Dataset, num_proc: int | None) -> datasets.Dataset:
        """The rows mapped, or found where they are kept.

        Raises:
            UserError: a process was killed.
        """
        if num_proc is not None and not self.is_whole:
            self.make_parts(rows, num_proc)
        how = {"num_proc": num_proc, "suffix_template": PART, "desc": "Tokenizing"}
        return self.map(rows, self.function, self.file, **how)

    def make_parts(self, rows: datasets.Dataset, number: int) -> None:
        """Fill the file of each part, in a process each."""
        limits = [len(rows) * i // number for i in range(number + 1)]
        done = Counter[int]()
        try:
            with datasets.utils.tqdm(total=len(rows), unit=" examples", desc=f"Tokenizing (num_proc={number})") as bar:
                for i, count in in_processes(functools.partial(self.make_part, rows, limits), number):
                    done[i] += count
                    bar.update(count)
        except ProcessDied as death:
            place = self.place(min(limits[death.number] + done[death.number], len(rows) - 1))
            raise UserError(
                f"a process of num_proc ({number}) {death.how} as it tokenised from {place} on; is the memory full? "
                "Take fewer processes, or null for none"
            ) from None

    def make_part(self, rows: datasets.Dataset, limits: Sequence[int], i: int, send: Send) -> None:
        """Fill the file of part i; sends how many rows are done."""

        def function(batch: Sequence[str], numbers: Sequence[int]) -> dict[str, Any]:
            made = self.function(batch, [limits[i] + number for number in numbers])
            send(len(batch))
            return made

        datasets.disable_progress_bars()
        suffix = PART.format(rank=i, num_proc=len(limits) - 1)
        part = rows.select(range(limits[i], limits[i + 1]))
        try:
            self.map(part, function, self.file.with_stem(self.file.stem + suffix))
        except ValueError as error:  # `datasets` closes what the disk had no room for a second time
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None  # the chain does not travel
            raise

    def map(self, rows: datasets.Dataset, function: Callable[..., Any], file: Path, **how: Any) -> datasets.Dataset:
        """Have `datasets` map rows into a file."""
        return rows.map(
            function,
            input_columns="row",
            with_indices=True,
            batched=True,
            remove_columns=["row"],
            features=self.features,
            cache_file_name=str(file),
            new_fingerprint=file.stem.removeprefix("cache-"),
            **how,
        )
