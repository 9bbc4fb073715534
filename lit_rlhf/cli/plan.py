"""What a config would take, in memory and time, without a weight: the run is rehearsed on shapes."""

import copy
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import LightningArgumentParser

from lit_rlhf.callbacks.memory import size_of, table
from lit_rlhf.callbacks.performance import default_precision, dtype_of_precision, measured_flops
from lit_rlhf.callbacks.rehearsal import Rehearsal, rehearse
from lit_rlhf.cli.without_trainer import WithoutTrainer
from lit_rlhf.engine.memory import LiveMemory, planned_for, shapes, total_memory
from lit_rlhf.errors import UserError, require

MOST_GPUS = 2**16
ADVICE = {  # what a config may change, where it does not do so already
    "model.activation_checkpointing": "blocks are computed twice",
    "data.max_tokens": "half the tokens of a micro-batch",
    "model.lora": "an adapter on frozen weights",
    "model.hold_reference": "the reference is parked on the CPU between uses",
    "model.cache_reference": "the reference's log-probs are computed once",
}


class Device(NamedTuple):
    """What a run is planned for."""

    gpus: int | None  # None = the accelerator of the config, one of it
    kind: str  # cuda or cpu
    memory: int  # bytes of each
    stated: bool  # by option, not found here


class PlanCLI(WithoutTrainer):
    """Makes module and data of a config on shapes."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of the plan, beside those of a run."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--gpus", type=int | None, default=None, help="plan for so many GPUs")
        parser.add_argument(
            "--memory", type=float | str | None, default=None, help="GB (10^9 bytes) of each; null = of this"
        )
        parser.add_argument("--tflops", type=float | None, default=None, help="10^12 operations a second of each")

    def instantiate_classes(self) -> None:
        """While what is counted is on."""
        given = self.config
        self.device = device_of(given)
        self.memory = LiveMemory()
        self.memory.phase = "load"
        options = given.trainer.as_dict()
        if options.get("precision") is None:
            options["precision"] = "bf16-mixed" if given.gpus else default_precision(options.get("accelerator", "auto"))
        self.options = options
        with planned_for(self.device.kind, self.device.memory), shapes(), self.memory:
            super().instantiate_classes()


def plan(argv: Sequence[str]) -> None:
    """Print what a config would take.

    Args:
        argv: the command line behind the command: as of `fit`, and --gpus, --memory, --tflops.

    Raises:
        UserError: options that mean nothing, or a config that `fit` would refuse.
    """
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        cli, found = rehearsed(argv)
        print("\n".join(report(cli, found)))
        if max(found.peaks.values()) > cli.device.memory:
            print("\n".join(advice(cli, found, argv)))
    finally:
        log.setLevel(level)


def rehearsed(argv: Sequence[str]) -> tuple[PlanCLI, Rehearsal]:
    """The rehearsal of a command line, and what was made of it."""
    cli = PlanCLI.of(argv, "lit-rlhf plan")
    with planned_for(cli.device.kind, cli.device.memory):
        return cli, rehearse(cli.model, cli.datamodule, cli.options, cli.memory, cli.device.gpus or 1)


def device_of(given: Any) -> Device:
    """What is to be planned for.

    Raises:
        UserError: no number of GPUs, or no memory.
    """
    gpus, memory, tflops = given.gpus, gigabytes(given.memory), given.tflops
    require(gpus is None or 1 <= gpus <= MOST_GPUS, "--gpus", gpus, f"1 to {MOST_GPUS}")
    require(memory is None or 0 < memory < 10**6, "--memory", memory, "GB, above 0")
    require(tflops is None or 0 < tflops < 10**6, "--tflops", tflops, "10^12 operations a second, above 0")
    here = torch.device("cuda" if torch.cuda.is_available() and given.trainer.accelerator != "cpu" else "cpu")
    if gpus and memory is None and here.type == "cpu":
        raise UserError(f"--gpus ({gpus}): this machine has none whose memory could be asked for; add --memory, in GB")
    size = total_memory(here) if memory is None else int(memory * 1e9)
    return Device(gpus, "cuda" if gpus else here.type, size, memory is not None)


def gigabytes(given: float | str | None) -> float | None:
    """Memory as it is given by option: a number, or one with its unit behind it."""
    if not isinstance(given, str):
        return given
    number = re.fullmatch(r"(\d+(?:\.\d+)?) ?GB?", given, re.IGNORECASE)
    require(number is not None, "--memory", given, "a number of GB (10^9 bytes), such as 24")
    assert number is not None
    return float(number[1])


def report(cli: PlanCLI, found: Rehearsal) -> Iterator[str]:
    """What is held, the peak of each phase, whether it fits, and how long it takes at least."""
    peak, device = max(found.peaks.values()), cli.device
    name = type(cli.model).__name__
    yield f"{name}, planned on shapes: no weight was read. On each {place(device)}:"
    yield ""
    yield from table(found.held)
    yield ""
    yield f"{'phase':<22}{'peak':>12}{'of it':>8}"
    for phase, size in found.peaks.items():
        yield f"{phase:<22}{size_of(size):>12}{size / device.memory:>8.0%}"
    fits = "fits" if peak <= device.memory else "does not fit"
    yield f"{size_of(peak)} at most: it {fits} into {size_of(device.memory)}"
    yield from times(cli, found)


def place(device: Device) -> str:
    """What it is planned for, in words."""
    kind = "GPU" if device.gpus or (torch.cuda.is_available() and not device.stated) else "device"
    of = f" of {device.gpus}" if device.gpus else ""
    return f"{kind}{of}, with {size_of(device.memory)}{'' if device.stated else ' (found here)'}"


def times(cli: PlanCLI, found: Rehearsal) -> Iterator[str]:
    """How long learning takes at the rate of a product of matrices, which is the least."""
    stated = cli.config.tflops
    if cli.device.gpus and not stated:
        yield "time: no GPU is measured here; --tflops says what one does, as 400 of an H100 in bfloat16"
        return
    dtype = dtype_of_precision(cli.options["precision"])
    rate = stated * 1e12 if stated else measured_flops(torch.device("cpu"), dtype)
    whose = "as stated" if stated else "a product of matrices, measured here on the CPU"
    seconds = found.flops / rate
    unit = "iteration, beside its rollout" if hasattr(cli.datamodule, "rewards") else "epoch"
    yield f"time, at {rate / 1e12:.3g} TFLOP/s ({whose}), of which a run reaches a part:"
    yield f"  {seconds:.3g} s for the heaviest micro-batch: {found.tokens} tokens, {found.flops / 1e12:.3g} TFLOP"
    yield f"  {found.micro_batches * seconds:.3g} s for {found.micro_batches} such, an {unit}"


def advice(cli: PlanCLI, found: Rehearsal, argv: Sequence[str]) -> Iterator[str]:
    """What each change would come to."""
    yield "what would take less:"
    for option, value in changes(cli, found):
        try:
            _, less = rehearsed([*argv, f"--{option}={value}"])
        except (UserError, SystemExit):
            continue  # does not go together with the rest
        yield f"  --{option}={value}: {size_of(max(less.peaks.values()))} ({ADVICE[option]})"


def changes(cli: PlanCLI, found: Rehearsal) -> Iterator[tuple[str, str]]:
    """Options that the config could change, with another value."""
    model, data = (copy.copy(part.init_args) for part in (cli.config.model, cli.config.data))
    if "max_tokens" in data:
        yield "data.max_tokens", str(max(1, found.tokens // 2))
    if "activation_checkpointing" in model and not model.activation_checkpointing:
        yield "model.activation_checkpointing", "true"
    if "lora" in model and model.lora is None and not model.get("from_scratch"):
        yield "model.lora", "{r: 16}"
    if "hold_reference" in model and model.hold_reference is None and model.lora is None:
        yield "model.hold_reference", "parked"
    if "cache_reference" in model and not model.cache_reference and not model.get("reference_free"):
        yield "model.cache_reference", "true"
