"""What `lit-rlhf` can do, told without reading the libraries that do it."""

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from lit_rlhf.errors import UNREADABLE, UserError

# LightningCLI runs of a YAML.
RUNS = {
    "fit": "Train the model that a YAML names, and export it.",
    "validate": "Measure the model on the held-out rows of data.validation.",
    "test": "Measure the model on the rows of data.test.",
    "predict": "Complete prompts, or score completions, into predictions.jsonl.",
}
# Any other: a function in the file of that name, under `lit_rlhf.cli`.
PROGRAMS = {
    "chat": "Talk to a model, or to two of them side by side.",
    "score": "Score the responses in a file by a reward model or a function.",
    "data": "Show rows as the model will see them, and what became of all.",
    "doctor": "Say what went wrong in a run, since when, and what helps.",
    "compare": "Play finished runs on the same held-out prompts.",
    "export": "Write the model that a checkpoint holds as a Hugging Face folder.",
    "plan": "Say what a config would take, in memory and time, without a weight.",
}
FIRST = {
    "doctor": "run",
    "chat": "model",
    "score": "reward",
}  # the option of a program whose value may stand first without its name
# How those are written that cannot do without arguments.
WRITTEN = {
    "chat": "lit-rlhf chat runs/sft/model",
    "score": "lit-rlhf score runs/reward_model/model --data=rows.jsonl --output=scored.jsonl",
    "doctor": "lit-rlhf doctor runs/ppo",
    "export": "lit-rlhf export --ckpt_path=X.ckpt --folder=model",
}
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"  # hyphens, and what word processors make of them
OF_CONFIGS = ("data", "plan")  # of these, the ones that take a config as runs do
WORDS = ("last", "best", "hpc", "registry", "null")  # for a checkpoint that is to be found
COMMANDS = (*RUNS, *PROGRAMS)
USAGE = "lit-rlhf [-c CONFIG] COMMAND ..."
DESCRIPTION = "Align language models with PyTorch Lightning: SFT, reward models, PPO, DPO, kin."
HELP = f"""usage: {USAGE}

{DESCRIPTION}

commands:
{chr(10).join(f"  {name:<10}{said}" for name, said in (RUNS | PROGRAMS).items())}

options:
  -h, --help           Show this message; after a command, its options.
  --version            Show the version.
  -c, --config CONFIG  A YAML of options: after a command, its own; before it,
                       with the command's name above them.

The options of a class: lit-rlhf fit --model.help lit_rlhf.DPO"""


def require_command(argv: Sequence[str]) -> None:
    """Refuse a command line that names no command, or one that there is not, or that cannot be read."""
    try:
        here = os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the current folder is gone: change into one that is there") from error
    for argument in (*argv, here):
        try:
            argument.encode()
        except UnicodeEncodeError as error:  # bytes that Python could not read in the system's encoding
            shown = argument.encode("utf-8", "backslashreplace").decode()
            raise UserError(f"{shown} {UNREADABLE}") from error
    if not argv:
        raise UserError(f"no command is given; write lit-rlhf and one of {', '.join(COMMANDS)}")
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = did_you_mean(argv[0], COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {argv[0]!r}{near}")
    for word in stray_words(argv):
        raise UserError(f"{word}: {_meant(word, argv)}")


def stray_words(argv: Sequence[str]) -> list[str]:
    """Words of a command line that belong to nothing: neither a command, nor an option, nor the value of one."""
    command = next((number for number, word in enumerate(argv) if word in COMMANDS), len(argv))
    free = command + (2 if argv[command : command + 1] and argv[command] in FIRST else 1)
    before = ["", *argv]
    return [
        word
        for number, (word, previous) in enumerate(zip(argv, before, strict=False))
        if number >= free
        and (not word.startswith("-") or re.match(r"-\w[\w.]+=", word))
        and ("=" in previous or not previous.startswith("-"))
    ]


def _meant(word: str, argv: Sequence[str]) -> str:
    """What is to be written in place of a word that belongs to nothing."""
    command = next(given for given in argv if given in COMMANDS)
    name = word.lstrip(DASHES)
    if word in COMMANDS:
        return f"one command at a time; write lit-rlhf {command} ..., and then lit-rlhf {word} ..."
    if word.endswith(("}", "]")):
        return "the shell has cut a value at its spaces; put it in quotes, as in --model.lora='{r: 8}'"
    if name != word or "=" in word:
        return f"an option begins with two hyphens; write --{name}"
    if command not in (*RUNS, "plan"):
        return f"expected options behind {command}; lit-rlhf {command} --help shows them"
    if word.endswith((".yaml", ".yml", ".json")):
        return f"a config is named by --config; write lit-rlhf {command} --config={word}"
    if word.endswith(".ckpt"):
        return f"a checkpoint is named by --ckpt_path; write --ckpt_path={word}"
    return f"expected options behind {command}, such as --config=configs/sft.yaml"


def options_of(argv: Sequence[str]) -> list[str]:
    """What stands behind the command, all of it options."""
    name, *rest = argv
    if name in FIRST and rest and not rest[0].startswith("-"):
        return [f"--{FIRST[name]}={rest[0]}", *rest[1:]]
    return rest


def require_checkpoint_there(argv: Sequence[str]) -> None:
    """Refuse a command line that names a checkpoint where nothing is; what is there is looked at later on."""
    for argument, following in pairwise([*argv, ""]):
        option, _, value = argument.partition("=")
        name = value or (
            "" if following.startswith("--") else following
        )  # the parser tells of a value that is not there
        if option == "--ckpt_path" and name not in (*WORDS, "") and "://" not in name and not Path(name).exists():
            raise UserError(f"ckpt_path: there is no checkpoint {Path(name).absolute()}")


def did_you_mean(given: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The nearest name as a question, two that are as near, or nothing."""
    near = difflib.get_close_matches(given, list(dict.fromkeys(names)), n=2, cutoff=cutoff)
    alike = {difflib.SequenceMatcher(None, name, given).ratio() for name in near}
    return f"; did you mean {' or '.join(sorted(near if len(alike) == 1 else near[:1]))}?" if near else ""
