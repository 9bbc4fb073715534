"""What of an error a user can mend, in one line: our own words, and those of the libraries that a run stands on."""

import linecache
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_rlhf.algorithms.strategies import FSDP2
from lit_rlhf.cli.disk_errors import disk_error, refused_by_disk
from lit_rlhf.errors import UserError, one_line
from token_mdp import RewardError

DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by|exited)")
BETWEEN = {*sys.stdlib_module_names, "lightning", "torch", "jsonargparse"}  # packages that only do what a config says
HANDED_BACK = ("estimated_stepping_batches", "clip_gradients")  # where our modules ask Lightning about a config
LONGEST = 500  # characters of what a library says
NEEDED_BY = {  # packages that options of the Trainer need
    "transformer_engine": "precision",
    "bitsandbytes": "precision",
    "torch_xla": "accelerator",
    "deepspeed": "strategy",
}
TWICE = re.compile(r"Found more than one stateful callback of type `(\w+)`")
SPOKEN_OF = {
    "Timer(duration": "max_time",
    "for __new__()": "max_time",
    "gpu backend": "accelerator",
    "MPSAccelerator": "accelerator",
}
OTHER_TYPE = re.compile(r"^Import path [\w.]+ does not correspond to a subclass of \w+$")
WALL = (
    "Errors:",
    "Does not validate against",
    "Subtypes:",
    "Expected a <class 'NoneType'>",
    "Expected a <class 'list'>",
)


def users_mistake(error: BaseException | None, root: Path | None = None) -> BaseException | None:
    """What the user can mend among an error and its causes: jsonargparse wraps what a constructor raises.

    Args:
        error: what ended the program.
        root: folder of the run, which an error of the disk is about where it names no file.
    """
    while error is not None:
        if isinstance(error, UserError | RewardError):
            return error
        if refused := refused_by_disk(error):
            return UserError(disk_error(refused, root or Path.cwd()))
        if isinstance(error, RuntimeError) and (dead := DEAD_WORKER.search(str(error))):
            return UserError(
                f"process {dead[1]} of data.num_workers has died; is the memory full? The run goes on from its newest "
                "checkpoint with --ckpt_path=last"
            )
        if isinstance(error, ModuleNotFoundError) and (told := missing_package(str(error))):
            return told
        if not others_code(error):
            if file := while_restoring(error):
                return UserError(
                    f"ckpt_path: {file} does not fit this run, or is damaged ({type(error).__name__}: "
                    f"{one_line(error, 200)}); resume the config that wrote it, or take an older one"
                )
            if isinstance(error, MisconfigurationException) or (raised_in_lightning(error) and on_purpose(error)):
                return UserError(one_line(error, LONGEST))
        error = error.__cause__
    return None


def modules(error: BaseException) -> list[tuple[str, str]]:
    """The modules and functions that an error came through, the one that raised it last."""
    frames = traceback.walk_tb(error.__traceback__)
    return [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame, _ in frames]


def others_code(error: BaseException) -> bool:
    """Whether an error came through code that is neither of the command line nor of what it hands a config to.

    What goes wrong in or below a callback, ours or a user's, is a fault there and needs its traceback.
    """
    found = False
    for module, function in modules(error):
        if module.startswith("lightning.") and function in HANDED_BACK:
            found = False
        elif module.partition(".")[0] not in BETWEEN and not module.startswith("lit_rlhf.cli."):
            found = True
    return found


def on_purpose(error: BaseException) -> bool:
    """Whether an error was raised by a statement that says so, rather than by what failed there."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip().startswith("raise ")


def refused_by_constructor(error: BaseException) -> bool:
    """Whether an error says what is wrong with arguments; any other, of code that is not Lightning's, is a fault."""
    called_wrongly = isinstance(error, TypeError) and "__init__() " in str(error)
    return (
        called_wrongly
        or on_purpose(error)
        or not modules(error)
        or modules(error)[-1][0].startswith(("lightning.", "jsonargparse."))
    )


def while_restoring(error: BaseException) -> str | None:
    """The checkpoint that Lightning was taking up when an error came up, if it was."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        named = frame.f_globals.get("__name__", "").endswith(".checkpoint_connector")
        if named and "restore" in frame.f_code.co_name:
            return str(getattr(getattr(frame.f_locals.get("self"), "trainer", None), "ckpt_path", "the checkpoint"))
    return None


def raised_in_lightning(error: BaseException) -> bool:
    """Whether an error comes from Lightning's own code."""
    return any(module.startswith("lightning.") for module, _ in modules(error)[-1:])


def refused_option(error: BaseException, options: Mapping[str, Any]) -> UserError:
    """What the Trainer's constructor says, with the option that it is about and what was given for it.

    Args:
        error: of the constructor.
        options: its arguments.
    """
    said = one_line(error, LONGEST)
    if isinstance(error, UserError):
        return error
    if told := missing_package(said):
        about = [name for package, name in NEEDED_BY.items() if package in said and options.get(name)]
        return UserError(f"trainer.{about[0]} ({options[about[0]]}): {told}" if about else str(told))
    if alike := TWICE.search(said):
        return UserError(
            f"trainer.callbacks: two of {alike[1]} would take each other's state in checkpoints, having one monitor "
            "and intervals: give one others, or leave it out"
        )
    if "enable_checkpointing=False" in said:
        return UserError(
            "trainer.enable_checkpointing (False) goes with no ModelCheckpoint, and trainer.callbacks has one: give "
            "trainer.callbacks without it, or leave the option out"
        )
    said = re.sub(r" Example choices: .*", f" Use auto or ddp, {FSDP2}, or deepspeed_stage_2", said)
    about = [name for words, name in SPOKEN_OF.items() if words in said]
    about += [name for name in options if re.search(rf"(?<![\w.]){name}\b", said)]
    shown = f"{about[0]} ({one_line(repr(options.get(about[0])))})" if about else type(error).__name__
    return UserError(f"trainer.{shown}: {said}" if about else f"trainer: {said}")


def refused_argument(message: str) -> UserError:
    """What a constructor says of its arguments, out of all that jsonargparse says of that.

    Args:
        message: of jsonargparse, with a line for each type that the value could have been of, and then the value.
    """
    what = re.search(r"class_path='?([\w.]+)", message)
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    first = next((number for number, line in enumerate(lines) if line.startswith("Errors:")), -1) + 1
    last = next((number for number, line in enumerate(lines) if line.startswith("Given value")), len(lines))
    said = [line for line in lines[first:last] if line and not line.startswith(WALL)]
    said = [line for line in said if not OTHER_TYPE.search(line)] or said  # of a value that could be of several
    return UserError(f"{what[1] if what else 'an argument'}: {one_line(' '.join(said), LONGEST)}")


def missing_package(message: str) -> UserError | None:
    """What Lightning says of a package that an optional class needs; None if a message says no such thing."""
    missing = re.search(r"Requirement '([^']+)' not met", message)
    if missing is None:
        return None
    wanted = re.search(r"class_path '([\w.]+)'", message)
    needs = f"{wanted[1]} needs a package that" if wanted else "a package"
    return UserError(f"{needs} is not installed: pip install '{missing[1]}'")
