"""Module and data of a config, made for a command that looks at them and trains nothing."""

import warnings
from collections.abc import Sequence
from typing import Self, cast

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lit_rlhf.cli.main import AlignmentCLI, make_cli


class WithoutTrainer(AlignmentCLI):
    """Makes what a config says, and no Trainer."""

    @classmethod
    def of(cls, argv: Sequence[str], prog: str) -> Self:
        """By the command line behind the command, which the name of the program ends with."""
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        return cast(Self, make_cli(cls, prog, {}, save_config_callback=None, args=list(argv), run=False))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of a run's config.yaml that are of `Trainer.fit`, and change nothing here."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="as of fit; no checkpoint is read here")
        parser.add_argument("--weights_only", type=bool | None, default=None, help="as of fit; no file is read here")

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """There is none."""
        return None  # type: ignore[return-value]
