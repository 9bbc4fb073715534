"""The command line: `lit-rlhf fit|validate|test|predict --config X.yaml` and `lit-rlhf compare`.

LightningCLI with no class given: the YAML names model and data by `class_path`, their constructors are the schema.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from jsonargparse import auto_cli
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.algorithms.strategies import check_named_strategy
from lit_rlhf.callbacks import (
    Alarms,
    Baseline,
    CompletionWriter,
    Dashboard,
    GracefulStop,
    Histograms,
    HuggingFaceExport,
    MemoryTable,
    OneLineBar,
    ProgressLines,
    RunSummary,
    SampleTable,
)
from lit_rlhf.callbacks.performance import Performance, default_precision
from lit_rlhf.callbacks.progress import draws_bars
from lit_rlhf.cli.by_option import by_option
from lit_rlhf.cli.checkpoints import WholeCheckpointIO, choose_checkpoint
from lit_rlhf.cli.commands import DESCRIPTION, OF_CONFIGS, PROGRAMS, RUNS, USAGE, options_of, require_command
from lit_rlhf.cli.imports import failed_constructor, left_while_imported, refused_value
from lit_rlhf.cli.mistakes import (
    missing_package,
    raised_in_lightning,
    refused_argument,
    refused_by_constructor,
    refused_option,
    users_mistake,
)
from lit_rlhf.cli.parser import Parser, Program, with_bare_flags
from lit_rlhf.cli.ranks import Ranks, rank, tell
from lit_rlhf.cli.run_folder import claim_versions
from lit_rlhf.cli.section_help import SectionHelp
from lit_rlhf.cli.terminal import leave_to_the_run, log_above_bars, quiet_libraries
from lit_rlhf.cli.values import option_of, wrong_values
from lit_rlhf.cli.yaml_classes import PARTS
from lit_rlhf.cli.yaml_files import check_configs, configs_first
from lit_rlhf.errors import UserError, require
from lit_rlhf.files import clear, make_folder, write_lines
from lit_rlhf.models.holding import dtype_by, reading_in
from lit_rlhf.signals import SIGNALS, Stop

OF_EVERY_RUN: dict[str, type[Callback]] = {
    "export": HuggingFaceExport,
    "baseline": Baseline,
    "dashboard": Dashboard,
    "samples": SampleTable,
    "histograms": Histograms,
    "alarms": Alarms,
    "predictions": CompletionWriter,
    "performance": Performance,
    "summary": RunSummary,
    "roles": MemoryTable,
    "progress": ProgressLines,
}


class WholeConfig(SaveConfigCallback):
    """The run's config.yaml, whole or not there."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it into the folder of the logs; `predict` has none.

        Raises:
            OSError: the disk is full or may not be written to; names the file.
        """
        writes = stage != "predict" and trainer.is_global_zero and not self.already_saved
        if writes:
            claim_versions(trainer.loggers)
        log_dir = trainer.log_dir  # asked on all ranks, which it makes agree
        if writes:
            assert log_dir is not None
            for earlier in Path(log_dir).parent.glob("version_*"):  # of runs that may have been killed
                clear(earlier)
            write_lines([self.parser.dump(self.config, skip_none=False)], Path(log_dir) / self.config_filename)
        self.already_saved = True


class AlignmentCLI(LightningCLI):
    """Adds what every run has: the tokenizer from model to data, exports, samples, throughput."""

    root: ClassVar[Path | None] = None  # of the run that this process last set up
    ranks: ClassVar[Ranks | None] = None  # of that run
    failed: Exception | None = None  # of a constructor

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of the callbacks that every run has."""
        for name, callback in OF_EVERY_RUN.items():
            parser.add_lightning_class_args(callback, name)
        for action in parser._actions:  # what `instantiate_trainer` does where Lightning's own help says 32-true
            if action.dest == "trainer.precision":
                action.help = "As of the Trainer; null = bf16-mixed where the device has units for it, else 32-true."
        for name in {"trainer", *OF_EVERY_RUN} & parser.groups.keys():  # type: ignore[union-attr]
            section = parser.groups[name]  # type: ignore[index]
            section.add_argument(f"--{name}.help", action=SectionHelp, help="Show these options alone.")
        parser.link_arguments("model.tokenizer", "data.init_args.tokenizer", apply_on="instantiate")

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that the command line begins with; a parser takes long to make, and none is asked for the others'."""
        return {name: skipped for name, skipped in super().subcommands().items() if name in runs()}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """The usage line names all commands; each command's own, made before, does not repeat them."""
        super().setup_parser(*args, **kwargs)
        self.parser.usage = USAGE

    def instantiate_classes(self) -> None:
        """A value that a constructor refuses is the user's to mend, whoever wrote the constructor."""
        subcommand = self.config.get("subcommand")
        given = self.config if subcommand is None else self.config[subcommand]
        try:
            # Else they would be there in float32, or whole on each rank, first.
            with reading_in(dtype_by(given.trainer.precision), cuts(given.trainer.strategy)):
                super().instantiate_classes()
        except UserError:
            raise
        except ValueError as error:  # jsonargparse wraps our own errors in the whole of what was given
            raised = self.failed or error.__cause__ or error.__context__
            told = missing_package(str(error)) or users_mistake(raised)
            if told is None and raised is not None and not refused_by_constructor(raised):
                raise raised from None
            raise told or refused_argument(str(error)) from None

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        self.parser.add_instantiator(self.construct, object, subclasses=True)  # behind Lightning's, of model and data

    def construct(self, kind: Any, *args: Any, **kwargs: Any) -> Any:
        """An object that a config names; keeps its error, of which jsonargparse keeps the words alone."""
        try:
            return kind(*args, **kwargs)
        except Exception as error:
            self.failed = error
            subcommand = self.config.get("subcommand")
            option = option_of(kind, kwargs, self.config if subcommand is None else self.config[subcommand])
            told = failed_constructor(kind, error) or refused_value(kind, error, option is not None)
            if told is None:
                raise
            named = by_option(told, Parser.typed)
            if named == told:
                path = Parser.naming(f"{kind.__module__}.{kind.__qualname__}")
                named = (path or (f"{Parser.as_typed(option)}: " if option else "")) + told
            self.failed = UserError(named)
            raise self.failed from error

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Look at the checkpoint before it, a model or any data is read."""
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")  # none with `run=False`
        given = self.config if subcommand is None else self.config[subcommand]
        self._check_values(given)
        check_named_strategy(given.trainer.strategy, given.trainer.devices)
        if subcommand is not None and given.get("ckpt_path") is not None:  # a plan reads none
            root = Path(given.trainer.default_root_dir or ".")
            given.ckpt_path = choose_checkpoint(given.ckpt_path, root, training=subcommand == "fit")
        seed = given.get("seed_everything")
        if seed is not None and not isinstance(seed, bool):
            require(0 <= seed < 2**32, "seed_everything", seed, "in [0, 2^32)")

    def _check_values(self, given: Any) -> None:
        """Refuse what jsonargparse lets through.

        Raises:
            UserError: null where none may be, a part that is no mapping, a base class that can do nothing.
        """
        groups = {"trainer": Trainer} | {name: kind for name, kind in OF_EVERY_RUN.items() if name in given}
        for option, value, expected in wrong_values(given, groups):
            raise UserError(
                f"{Parser.as_typed(option)}: expected {expected}, got {'null' if value is None else repr(value)}"
            )
        for name, base in (("model", AlignmentModule), ("data", LightningDataModule)):
            if given[name].class_path.rpartition(".")[2] == base.__name__:
                raise UserError(f"{Parser.as_typed(name)}: name a class by {name}.class_path, such as {PARTS[name]}")

    def _parse_ckpt_path(self) -> None:
        """Lightning's would put the arguments in a checkpoint before those that the user gives."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With the precision that suits the device unless the user names one, and checkpoints that are whole."""
        given = self._get(self.config_init, "trainer", default={})
        if given.get("precision") is None and given.get("plugins") is None:
            kwargs["precision"] = default_precision(given.get("accelerator", "auto"))
        if self.subcommand == "predict" and given.get("logger") is None:
            kwargs["logger"] = False  # there is nothing to draw
        elif given.get("logger") in (None, True) and not given.get("barebones"):
            # As the Trainer makes it, without the -1 that it would draw as hp_metric.
            root, version = given.get("default_root_dir") or Path.cwd(), SLURMEnvironment.job_id()
            kwargs["logger"] = TensorBoardLogger(root, version=version, default_hp_metric=False)
        if given.get("num_sanity_val_steps") is None and not given.get("barebones"):
            kwargs["num_sanity_val_steps"] = -1  # all of it, so that every curve has its `Baseline`
        if given.get("enable_model_summary") is None:
            kwargs["enable_model_summary"] = False  # `MemoryTable` says more
        callbacks = given.get("callbacks")
        several = callbacks if isinstance(callbacks, list) else [callbacks]
        has_bar = any(isinstance(callback, ProgressBar) for callback in several)
        wants_bar = given.get("enable_progress_bar")
        if wants_bar is None and not draws_bars() and not has_bar:
            kwargs["enable_progress_bar"] = False
        elif wants_bar is not False and not has_bar and not given.get("barebones"):
            kwargs["callbacks"] = [*(callback for callback in several if callback is not None), OneLineBar()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except Exception as error:
            if not raised_in_lightning(error):
                raise
            raise refused_option(error, {**given, **kwargs}) from error
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise UserError(
                f"trainer.strategy ({given.get('strategy')}) makes its ranks out of this process, with all that it has "
                "read; use ddp, which starts the program anew for each"
            )
        if isinstance(trainer.accelerator, CPUAccelerator):  # each would be a process that waits for all others
            most = max(os.cpu_count() or 1, 8)
            require(trainer.num_devices <= most, "trainer.devices", trainer.num_devices, f"at most {most} on this CPU")
        AlignmentCLI.root, AlignmentCLI.ranks = Path(trainer.default_root_dir), Ranks(trainer)
        trainer.callbacks.append(GracefulStop())  # type: ignore[attr-defined]
        make_folder(AlignmentCLI.root, "trainer.default_root_dir")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        return trainer


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: with status 2, after a message of what the user can mend; with 128 and the number of the signal that
            ended the run, after a line of how it goes on.
    """
    argv = configs_first(sys.argv[1:] if args is None else args)
    if args is None:
        sys.argv[1:] = argv  # which LightningCLI reads
    quiet_libraries()
    leave_to_the_run()
    log_above_bars()
    if (here := os.getcwd()) not in sys.path:  # a user's own functions are found here, as with `python -m lit_rlhf`
        sys.path.insert(0, here)
    Parser.begin(argv)
    with SIGNALS.listening():
        try:
            command(argv, from_shell=args is None)
        except Stop as stop:
            if rank() == 0:
                print(stop.told or f"{stop} ended the program before its work began", file=sys.stderr)
            raise SystemExit(stop.status) from None
        except SystemExit as left:
            if told := left_while_imported(left):
                tell(f"error: {told}")
                raise SystemExit(2) from None
            raise
        except Exception as error:
            mistake = users_mistake(error, AlignmentCLI.root)
            if mistake is not None:
                tell(f"error: {by_option(str(mistake), argv)}")
                raise SystemExit(2) from None
            if AlignmentCLI.ranks is None or not AlignmentCLI.ranks.lost(error):
                raise
            raise SystemExit(AlignmentCLI.ranks.follow(error)) from None
        finally:
            if AlignmentCLI.ranks is not None:
                AlignmentCLI.ranks.end()


def command(argv: list[str], from_shell: bool) -> None:
    """Do what the command line says."""
    require_command(argv)
    check_configs(argv, (*RUNS, *OF_CONFIGS), ("trainer", *PARTS, *OF_EVERY_RUN))
    program = getattr(import_module(f"lit_rlhf.cli.{argv[0]}"), argv[0]) if argv[0] in PROGRAMS else None
    if program is not None and argv[0] in OF_CONFIGS:
        program(argv[1:])
    elif program is not None:
        about: Any = {"prog": f"lit-rlhf {argv[0]}", "description": PROGRAMS[argv[0]]}
        auto_cli(
            program, args=with_bare_flags(program, options_of(argv)), as_positional=False, parser_class=Program, **about
        )
    else:
        run(None if from_shell else argv)  # LightningCLI warns when it is handed the process's own arguments


def cuts(strategy: Any) -> bool:
    """Whether a Trainer's strategy, as a config names it, cuts networks over ranks (FSDP2)."""
    return str(getattr(strategy, "class_path", strategy)).rpartition(".")[2] == "ModelParallelStrategy"


def runs() -> dict[str, str]:
    """Of the runs, the one that the command line begins with; all of them where it begins with a config."""
    named = Parser.typed[:1]
    return {name: said for name, said in RUNS.items() if named == [name]} or RUNS


def run(argv: list[str] | None) -> Any:
    """One LightningCLI run; None reads the process's own arguments."""
    if argv is not None:
        Parser.begin(argv)
    described = {"description": DESCRIPTION, **{name: {"description": said} for name, said in runs().items()}}
    return make_cli(AlignmentCLI, "lit-rlhf", described, save_config_callback=WholeConfig, args=argv)


def make_cli(kind: type[AlignmentCLI], prog: str, parser_kwargs: dict[str, Any], **options: Any) -> Any:
    """A LightningCLI of any of our algorithms and data."""
    return kind(
        AlignmentModule,
        LightningDataModule,
        parser_class=Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,  # the modules configure their own
        parser_kwargs={"prog": prog, **parser_kwargs},
        **options,
    )
