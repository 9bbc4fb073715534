"""The peers, and the settings in which each may be fastest on a CPU; which of them that is, a run finds out.

A peer lives in a Python of its own, that an option or a variable of the environment names.
"""

import argparse
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

FLOAT32, BFLOAT16 = "float32", "bfloat16"


class Setting(NamedTuple):
    """How a contestant is run."""

    name: str
    precision: str
    words: Sequence[str]


class Peer(NamedTuple):
    """Another library."""

    option: str  # that names its Python
    package: str
    module: str
    settings: dict[str, Sequence[Setting]]  # by task

    @property
    def variable(self) -> str:
        """The variable that names its Python where the option does not."""
        return self.option.upper()


def tuned(*names: str) -> list[Setting]:
    """TRL without gradient checkpointing, in both precisions: as it is, and with each of these flags."""
    both = ((FLOAT32, ()), (BFLOAT16, ("--bf16",)))
    flags = [((), "tuned"), *(((f"--{name}",), name) for name in names)]
    return [Setting(name, precision, ("--tuned", *flag, *more)) for flag, name in flags for precision, more in both]


DEFAULT = Setting("default", BFLOAT16, ())
LOOP = [Setting("its own loop", FLOAT32, ()), Setting("its own loop", BFLOAT16, ("--bf16",))]
OF_PAIRS = [*tuned(), DEFAULT]
PEERS = {
    "trl": Peer(
        "peer_python",
        "trl",
        "benchmarks.peer_trl",
        {
            "sft": [*tuned("grouped", "packing"), DEFAULT],
            "reward": OF_PAIRS,
            "dpo": OF_PAIRS,
            "dpo_cached": OF_PAIRS,
            "generate": tuned("sorted"),
        },
    ),
    "trl 1.12": Peer(
        "peer_ppo_python",
        "trl",
        "benchmarks.peer_trl",
        {
            "sft": [*tuned("grouped", "packing"), DEFAULT],
            "reward": tuned(),
            "dpo": tuned(),
            "dpo_cached": tuned(),
            "ppo": tuned(),
        },
    ),
    "litgpt": Peer("litgpt_python", "litgpt", "benchmarks.peer_loops", {"sft": LOOP}),
    "torchtune": Peer("torchtune_python", "torchtune", "benchmarks.peer_loops", {"sft": LOOP}),
    "llama.cpp": Peer(
        "llama_cpp_python",
        "llama_cpp_python",
        "benchmarks.peer_llama_cpp",
        {"generate": [Setting("slots", FLOAT32, ()), Setting("slots", BFLOAT16, ("--bf16",))]},
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--peer-python` and its siblings."""
    for name, peer in PEERS.items():
        parser.add_argument(
            f"--{peer.option.replace('_', '-')}",
            default=os.environ.get(peer.variable),
            help=f"a Python that has {name}; or ${peer.variable}",
        )


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with what to do where a Python is missing that was named or is needed."""
    for peer in PEERS.values():
        python = getattr(options, peer.option)
        if python and not Path(python).exists():
            parser.error(f"--{peer.option.replace('_', '-')} or ${peer.variable}: there is no {python}")
    if options.peer is not None and not dict(present(options)):
        ways = " or ".join(f"${PEERS[name].variable}" for name in wanted(options))
        parser.error(f"--peer {options.peer} needs {ways}: a Python that has it, see docs/performance.md")


def wanted(options: argparse.Namespace) -> Sequence[str]:
    """The peers that `--peer` means."""
    return () if options.peer is None else [*PEERS] if options.peer == "best" else [options.peer]


def present(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Of these, the ones whose Python is named, and that Python."""
    for name in wanted(options):
        python = getattr(options, PEERS[name].option)
        if python:
            yield name, python


def versions(options: argparse.Namespace) -> dict[str, str]:
    """What the peers' Pythons have."""
    return {name: version_in(python, PEERS[name].package) for name, python in present(options)}


def version_in(python: str, package: str) -> str:
    """Of a package, and of torch if it is there."""
    ask = (
        "from importlib.metadata import version as v, packages_distributions as d; "
        f"print('{package}', v('{package}'), *(('torch', v('torch')) if 'torch' in d() else ()))"
    )
    return subprocess.check_output([python, "-c", ask], text=True).strip()


def entries(task: str, options: argparse.Namespace) -> Iterator[tuple[str, str, list[str]]]:
    """Name, precision and command of every peer of a task, but for its options."""
    for name, python in present(options):
        peer = PEERS[name]
        for setting in peer.settings.get(task, ()):
            yield f"{name}, {setting.name}", setting.precision, [python, "-m", peer.module, *setting.words]
