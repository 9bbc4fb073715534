"""How a user names where rows come from, and for what they are."""

import math
import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from lit_rlhf.data.formats import Sources
from lit_rlhf.data.held_out import Side
from lit_rlhf.data.mapping import Format
from lit_rlhf.errors import UserError, one_line

Role = Literal["train", "validation", "test", "predict"]  # what the rows are for
# What each stage of the Trainer needs.
STAGES: dict[str, tuple[Role, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}

DEMO = "demo"


class Source(NamedTuple):
    """One origin of rows, how much of it an epoch takes, and how its rows come to have our columns."""

    name: str
    weight: float = 1.0  # passes over its rows in an epoch; 0.5 is a random half, the same in every epoch
    split: str | None = None  # of a `datasets` name; chosen by what the rows are for if None
    config: str | None = None  # of a `datasets` name
    format: Format | None = None  # see `mapping.reshaped`
    columns: Mapping[str, str] = {}  # our name -> the rows'
    side: Side | None = None  # of a split into rows to learn from and held-out ones; None = all rows

    def read_for(self, role: Role) -> Role:
        """What its rows were made for, when they are read for a role: held-out ones are among those of training."""
        return role if self.side is None else "train"

    def cut(self, share: float, held_out: bool) -> "Source":
        """One side of its rows; of those that are held out each once, however often it would be learnt."""
        return self._replace(side=Side(share, held_out), weight=1.0 if held_out else self.weight)

    def __str__(self) -> str:
        return f"{self.side.share:g} of {self.name}" if self.side is not None and self.side.held_out else self.name


def parse_sources(
    sources: Sources | list[Source],
    format: Format | None = None,
    columns: Mapping[str, str] | None = None,
    option: str = "data",
) -> list[Source]:
    """Read the forms in which a user may name sources.

    Args:
        sources: a name; a list of names; a list of mappings with `source` and perhaps the other fields of `Source`; or
            a mapping from name to weight.
        format: of the sources that name none.
        columns: likewise.
        option: that names them, for the message.

    Raises:
        UserError: another form, an unknown key, or a value that a field cannot have.
    """
    if isinstance(sources, dict) and "source" not in sources:
        sources = [{"source": name, "weight": weight} for name, weight in sources.items()]
    entries: list[Any] = list(sources) if isinstance(sources, list) or type(sources) is tuple else [sources]
    if not entries:
        raise UserError(f"{option}: the list of sources is empty; name a file, a folder, a dataset, or {DEMO!r}")
    defaults = {"weight": 1.0, "split": None, "config": None, "format": format, "columns": columns}
    return [entry if isinstance(entry, Source) else _parse_source(entry, defaults, option) for entry in entries]


def _parse_source(entry: Any, defaults: dict[str, Any], option: str) -> Source:
    given = entry if isinstance(entry, dict) else {"source": entry}
    unknown = set(given) - {"source", *defaults}
    if unknown or "source" not in given:
        keys = ", ".join(("source", *defaults))
        raise UserError(f"{option}: a source has the keys {keys}; found {sorted(map(str, given))}")
    name = os.fspath(given["source"]) if isinstance(given["source"], str | os.PathLike) else None
    if not name:
        raise UserError(
            f"{option}: expected the name of a file, a folder or a dataset, or {DEMO!r}; got {one_line(repr(entry))}"
        )
    fields = {**defaults, **{key: value for key, value in given.items() if key != "source"}}
    try:
        weight = math.nan if isinstance(fields["weight"], bool | str) else float(fields["weight"])
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(
            f"{option}: weight ({one_line(repr(fields['weight']), 40)}) of {name} must be a number above 0, and "
            "finite; to take nothing of a source leave it out; a source with more to say is {source: NAME, weight: 1}"
        )
    for key in ("split", "config"):
        if not isinstance(fields[key], str | None):
            raise UserError(f"{option}: {key} ({one_line(repr(fields[key]))}) of {name} must be a name")
    named = fields["format"]
    if named is not None and not (isinstance(named, str) and named in get_args(Format)):
        raise UserError(
            f"{option}: format ({one_line(repr(named))}) of {name} must be {' or '.join(get_args(Format))}, or null"
        )
    columns = {} if fields["columns"] is None else fields["columns"]
    if not isinstance(columns, Mapping) or not all(
        isinstance(value, str) for pair in columns.items() for value in pair
    ):
        raise UserError(
            f"{option}: columns ({one_line(repr(columns))}) of {name} must map our names to the file's, "
            "{prompt: question}"
        )
    return Source(name, weight, fields["split"], fields["config"], fields["format"], dict(columns))
