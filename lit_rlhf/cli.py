"""The command line: `lit-rlhf fit|validate|test|predict --config X.yaml` and `lit-rlhf compare`.

LightningCLI with no class given: the YAML names model and data by `class_path`, their constructors are the schema.
"""

import errno
import logging
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from transformers.utils.logging import disable_progress_bar

from lit_rlhf.callbacks import CompletionWriter, HuggingFaceExport, RunSummary, SampleTable
from lit_rlhf.errors import UserError
from lit_rlhf.module import AlignmentModule
from lit_rlhf.performance import Performance, default_precision
from token_mdp import RewardError

COMPARE = "compare"  # the one subcommand that is no LightningCLI run
DESCRIPTION = (
    "Align language models: fit, validate, test and predict run a YAML; compare plays finished runs side by side."
)
HINT = f"For all options: lit-rlhf fit --help, lit-rlhf fit --model.help lit_rlhf.DPO, lit-rlhf {COMPARE} --help"

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EROFS, errno.EACCES, errno.EPERM)


class Parser(LightningArgumentParser):
    """Answers a mistake with what is wrong, not with two screens of usage; takes no abbreviated option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and where to look; exit with status 2."""
        # jsonargparse lists every type that a value failed to be, and repeats the whole value.
        noise = (
            "Does not validate against",
            "Subtypes:",
            "Errors:",
            "- Expected a <class 'NoneType'>",
            "Given value type",
        )
        lines = [line for line in message.splitlines() if not line.strip().startswith(noise)]
        lines = [
            line for line in lines if not line.strip().startswith(("Given value: Namespace", "Given value: Nested"))
        ]
        print("error: " + "\n".join(lines) + f"\n{HINT}", file=sys.stderr)
        raise SystemExit(2)


class AlignmentCLI(LightningCLI):
    """Adds what every run has: the tokenizer from model to data, exports, samples, throughput."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of the callbacks that every run has."""
        parser.add_lightning_class_args(HuggingFaceExport, "export")
        parser.add_lightning_class_args(SampleTable, "samples")
        parser.add_lightning_class_args(CompletionWriter, "predictions")
        parser.add_lightning_class_args(Performance, "performance")
        parser.add_lightning_class_args(RunSummary, "summary")
        parser.link_arguments("model.tokenizer", "data.init_args.tokenizer", apply_on="instantiate")

    def instantiate_classes(self) -> None:
        """A value that a constructor refuses is the user's to mend, whoever wrote the constructor."""
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse wraps our own errors in the whole of what was given
            raise users_mistake(error.__cause__ or error.__context__) or UserError(str(error)) from None

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Look at the checkpoint before it, a model or any data is read."""
        super().parse_arguments(parser, args)
        checkpoint = self.config[self.config["subcommand"]].get("ckpt_path")
        if checkpoint not in (None, "best", "last", "hpc"):
            require_checkpoint(Path(checkpoint))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With the precision that suits the device, unless the user names one."""
        trainer = self._get(self.config_init, "trainer", default={})
        if trainer.get("precision") is None and trainer.get("plugins") is None:
            kwargs["precision"] = default_precision(trainer.get("accelerator", "auto"))
        return super().instantiate_trainer(**kwargs)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; what the user can mend is said in one message, with exit status 2."""
    argv = list(sys.argv[1:] if args is None else args)
    quiet_libraries()
    if str(Path.cwd()) not in sys.path:  # a user's own functions are found here, as with `python -m lit_rlhf`
        sys.path.insert(0, str(Path.cwd()))
    try:
        if argv[:1] == [COMPARE]:
            from lit_rlhf.compare import compare

            auto_cli(compare, args=argv[1:], as_positional=False, parser_class=Parser, prog=f"lit-rlhf {COMPARE}")
        else:
            run(None if args is None else argv)  # LightningCLI warns when it is handed the process's own arguments
    except Exception as error:
        mistake = users_mistake(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None


def require_checkpoint(path: Path) -> None:
    """Refuse what is neither one of torch's archives nor a folder of sharded weights, without reading it."""
    if not path.exists():
        raise UserError(f"ckpt_path: there is no checkpoint {path.absolute()}")
    if (path / "config.json").exists() or (path.is_file() and not zipfile.is_zipfile(path)):
        raise UserError(
            f"ckpt_path: {path.absolute()} is no checkpoint of the Trainer's, such as a run keeps under its "
            "default_root_dir; an exported model is named by model.policy"
        )


def quiet_libraries() -> None:
    """Keep advertisements, bars for the reading of a file, and warnings about Lightning's own code off the terminal."""
    disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip: For seamless" not in record.getMessage())


def users_mistake(error: BaseException | None) -> BaseException | None:
    """What the user can mend among an error and its causes: jsonargparse wraps what a constructor raises."""
    while error is not None:
        if isinstance(error, RewardError) and isinstance(error.__cause__, UserError):
            return error.__cause__  # names the user's function, not the environment's argument
        if isinstance(error, UserError | RewardError | MisconfigurationException):
            return error
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error
        error = error.__cause__
    return None


def run(argv: list[str] | None) -> Any:
    """One LightningCLI run; None reads the process's own arguments."""
    return AlignmentCLI(
        AlignmentModule,
        LightningDataModule,
        parser_class=Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,  # the modules configure their own
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lit-rlhf", "description": DESCRIPTION},
        args=argv,
    )
