"""The command line: `lit-rlhf fit|validate|test|predict --config X.yaml` and `lit-rlhf compare`.

LightningCLI with no class given: the YAML names model and data by `class_path`, their constructors are the schema.
"""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_rlhf.callbacks import CompletionWriter, HuggingFaceExport, RunSummary, SampleTable
from lit_rlhf.errors import UserError
from lit_rlhf.module import AlignmentModule
from lit_rlhf.performance import Performance, default_precision
from token_mdp import RewardError


class Parser(LightningArgumentParser):
    """Answers a mistake with what is wrong, not with two screens of usage."""

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
        print("error: " + "\n".join(lines) + "\nFor all options: lit-rlhf fit --help", file=sys.stderr)
        raise SystemExit(2)


class AlignmentCLI(LightningCLI):
    """Adds what every run has: the tokenizer from model to data, exports, samples, throughput."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of the callbacks that every run has."""
        parser.add_lightning_class_args(HuggingFaceExport, "export")
        parser.add_lightning_class_args(SampleTable, "samples")
        parser.add_lightning_class_args(CompletionWriter, "predictions")
        parser.add_lightning_class_args(LearningRateMonitor, "lr_monitor")
        parser.add_lightning_class_args(Performance, "performance")
        parser.add_lightning_class_args(RunSummary, "summary")
        parser.link_arguments("model.tokenizer", "data.init_args.tokenizer", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With the precision that suits the device, unless the user names one."""
        trainer = self._get(self.config_init, "trainer", default={})
        if trainer.get("precision") is None and trainer.get("plugins") is None:
            kwargs["precision"] = default_precision(trainer.get("accelerator", "auto"))
        return super().instantiate_trainer(**kwargs)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; what the user can mend is said in one message, with exit status 2."""
    argv = list(sys.argv[1:] if args is None else args)
    try:
        if argv[:1] == ["compare"]:
            from lit_rlhf.compare import compare

            auto_cli(compare, args=argv[1:], as_positional=False)
        else:
            run(None if args is None else argv)  # LightningCLI warns when it is handed the process's own arguments
    except Exception as error:
        mistake = users_mistake(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None


def users_mistake(error: BaseException | None) -> BaseException | None:
    """What the user can mend among an error and its causes: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, UserError | RewardError | MisconfigurationException):
        error = error.__cause__
    return error


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
        args=argv,
    )
