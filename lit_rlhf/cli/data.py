"""The rows of a config as the model will see them, and what became of all: by its own data module, without a weight."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
from lightning.pytorch.cli import LightningArgumentParser

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.algorithms.reward_model import RewardModel
from lit_rlhf.cli.data_page import page
from lit_rlhf.cli.data_report import print_report
from lit_rlhf.cli.without_trainer import WithoutTrainer
from lit_rlhf.data.checks import require_learns_from
from lit_rlhf.data.formats import Kind
from lit_rlhf.data.locating import input_files
from lit_rlhf.data.modules import ExamplesDataModule
from lit_rlhf.data.naming import Role
from lit_rlhf.data.overview import Contents, Overview, overview, rows_of
from lit_rlhf.data.reader import Options
from lit_rlhf.data.tokenize import EMPTY
from lit_rlhf.data.viewing import ShownRow, Viewer
from lit_rlhf.errors import UserError, require
from lit_rlhf.files import make_room, write_json, write_lines
from lit_rlhf.models.tokens import tokenizer_beside
from lit_rlhf.rollout.data_module import RolloutDataModule
from lit_rlhf.rollout.rewards import Reward

ROLES: dict[Role, str] = {"train": "fit", "validation": "validate", "test": "test"}  # and the stage that reads each


class Looked(NamedTuple):
    """What there is to see of one role's rows."""

    overview: Overview
    micro_batches: int | None  # of an epoch; None where none is learnt from, and of prompts
    rows: list[ShownRow]


class DataCLI(WithoutTrainer):
    """Makes the data module of a config; of the model there is the tokenizer alone, and rewards score nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of the view, beside those of a run."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--show", type=int, default=3, help="rows of each source that became the same, at most")
        parser.add_argument("--html", type=str | None, default=None, help="write a page of the same, token by token")
        parser.add_argument("--json", type=str | None, default=None, help="write the figures, and the rows")

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        self.parser.add_instantiator(self.stand_in, AlignmentModule, subclasses=True, prepend=True)
        self.parser.add_instantiator(lambda kind, *args, **kwargs: Reward(), Reward, subclasses=True, prepend=True)

    def stand_in(self, kind: type, *args: Any, policy: str | None = None, **kwargs: Any) -> SimpleNamespace:
        """In the module's place, its class and its tokenizer."""
        try:
            if policy is None:
                raise UserError(f"model: {kind.__name__} has no `policy`, beside which its tokenizer would be found")
            tokenizer = tokenizer_beside(policy, kwargs.get("trust_remote_code", False))
        except UserError as error:
            self.failed = error  # jsonargparse keeps its words alone
            raise
        return SimpleNamespace(kind=kind, tokenizer=tokenizer, policy=policy)


def data(argv: Sequence[str]) -> None:
    """Show the rows of a config and what became of all.

    Args:
        argv: the command line behind the command: as of `fit`, and --show, --html, --json.

    Raises:
        UserError: options that mean nothing, or data that `fit` would refuse.
    """
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)  # what is said of rows at their reading stands in the report
    try:
        cli = DataCLI.of(argv, "lit-rlhf data")
        given = cli.config
        require(given.show >= 0, "--show", given.show, "0 or more")
        packs_rows(cli.datamodule)
        inputs = [file for role, named in cli.datamodule.sources.items() if named for file in input_files(named, role)]
        for option, ending in (("html", ".html"), ("json", ".json")):
            if given[option] is not None:
                make_room(Path(given[option]), f"--{option}", ending, inputs)
        looked = dict(look(cli, given.show))
        head = heading(cli)
        print_report(head, looked)
        if given.json is not None:
            write_json(as_plain(head, looked), Path(given.json))
        if given.html is not None:
            write_lines([page(as_plain(head, looked))], Path(given.html))
    finally:
        log.setLevel(level)


def look(cli: DataCLI, show: int) -> Iterator[tuple[str, Looked]]:
    """Each role that the config names rows for; the training data's first rows are shown, or else the next role's.

    Raises:
        UserError: a data module that is none of this library's, or of other rows than the module learns from.
    """
    module: Any = cli.datamodule
    packs = packs_rows(module)
    kind: Kind = module.kind if packs else "prompts"
    require_learns_from(cli.model.kind, kind)
    train: Contents | None = None
    for role, stage in ROLES.items():
        sources = module.sources[role]
        if sources is None or (role == "test" and sources == module.sources["validation"]):
            continue
        module.setup(stage)
        rows: Any = (module.datasets if packs else module.prompts)[role]
        reports = rows.reports if packs else module.reports[role]
        at_ends = issubclass(cli.model.kind, RewardModel)
        figures, contents = overview(rows, reports, 2 * at_ends, train)
        tokens = rows if packs else dict(zip(rows.origins.rows, rows.prompt_ids, strict=True))
        viewer = Viewer(kind, role, sources, module.tokenizer, options_of(module), tokens, at_ends)
        shown = [] if train is not None else shown_rows(viewer, rows_of(rows, reports), reports, show)
        train = contents if train is None else train
        batches = len(module.train_dataloader()) if packs and role == "train" else None
        yield role, Looked(figures, batches, list(shown))


def shown_rows(viewer: Viewer, taken: np.ndarray, reports: Sequence[Any], show: int) -> Iterator[ShownRow]:
    """Of each source the first rows that became the same: kept, cut, or dropped for one reason."""
    first = 0
    for source, report in enumerate(reports):
        own = taken[(taken >= first) & (taken < first + report.rows)] - first
        numbers: list[int] = []
        for status in np.unique(report.statuses).tolist():
            alike = np.flatnonzero(report.statuses == status)
            numbers += (np.intersect1d(alike, own) if status <= EMPTY else alike)[:show].tolist()
        yield from viewer.rows(source, numbers, report.statuses)
        first += report.rows


def packs_rows(module: Any) -> bool:
    """Whether a data module is of rows that are learnt from, rather than of prompts.

    Raises:
        UserError: it is none of this library's.
    """
    if not isinstance(module, ExamplesDataModule | RolloutDataModule):
        raise UserError(f"data: {type(module).__name__} is a class of your own; those of lit_rlhf can be looked into")
    return isinstance(module, ExamplesDataModule)


def options_of(module: Any) -> Options:
    """How a data module of either kind has read its rows."""
    return cast(Options, module.read_by[0] if packs_rows(module) else module.read_by)


def heading(cli: DataCLI) -> dict[str, Any]:
    """What is looked at."""
    module: Any = cli.datamodule
    packs, options = packs_rows(module), options_of(module)
    return {
        "data": type(module).__name__,
        "model": cli.model.kind.__name__,
        "tokenizer": cli.model.policy,
        "max_length": options.max_length if packs else options.max_prompt_length,
        "max_tokens": module.batches.max_tokens if packs else None,
    }


def as_plain(head: dict[str, Any], looked: dict[str, Looked]) -> dict[str, Any]:
    """All of it as plain values, for JSON."""
    roles = {
        role: {**asdict(one.overview), "micro_batches": one.micro_batches, "rows": list(map(plain_row, one.rows))}
        for role, one in looked.items()
    }
    return {**head, "roles": roles}


def plain_row(row: ShownRow) -> dict[str, Any]:
    """A row with its tokens as objects."""
    parts = [
        {**part._asdict(), **{name: [t._asdict() for t in getattr(part, name)] for name in ("tokens", "left_out")}}
        for part in row.parts
    ]
    return {**row._asdict(), "parts": parts}
