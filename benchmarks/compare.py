"""Our speed and memory beside a peer's, on the same work, in one run.

    python -m benchmarks.compare --task sft --peer trl --peer-python /path/to/python/with/trl

Contestants take turns, one process each, after a batch of warm-up. Every round prints a JSON line; then come a table,
and one JSON line with the medians. `speedup` is the median over rounds of the peer's time over ours in the same round,
the peer being tuned. Without `--peer`, ours stands beside its own bare step alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import workload
from benchmarks.rounds import Contestant, conditions, print_table

TASKS = ("sft", "reward", "dpo", "dpo_cached", "ppo", "generate")
PAIRS = {"sft": 16, "reward": 16, "dpo": 16, "dpo_cached": 16, "ppo": 16, "generate": 64}


def useful_tokens(task: str, options: argparse.Namespace) -> int:
    """Tokens that count, the same for every contestant: no padding; of generation the new ones only."""
    shape = workload.SHAPES[options.shape]
    pairs = workload.make_pairs(options.pairs, shape, options.seed)
    new = workload.response_lengths(options.pairs, options.seed)
    if task == "generate":
        return options.pairs * options.fixed if options.fixed is not None else int(new.sum())
    if task == "ppo":
        return sum(len(pair["prompt"]) for pair in pairs) + int(new.sum())
    return sum(workload.sequences(task, pairs)[0])


def contestants(task: str, options: argparse.Namespace) -> list[Contestant]:
    """Ours first; then our bare step, the tuned peer, and the peer with its defaults."""
    common = ["--task", task, "--shape", options.shape, "--pairs", str(options.pairs), "--batch", str(options.batch)]
    common += ["--slots", str(options.slots), "--seed", str(options.seed)]
    if task == "generate" and options.fixed is not None:
        common += ["--fixed", str(options.fixed)]
    ours = [sys.executable, "-m", "benchmarks.ours", *common]
    if options.precision is not None:
        ours += ["--precision", options.precision]
    entries = {"ours": ours}
    if task not in ("ppo", "generate"):
        entries["ours, no Trainer"] = [*ours, "--bare"]
    python = options.peer_ppo_python if task == "ppo" else options.peer_python
    if options.peer == "trl" and not python:
        print(
            "ppo: ours alone; --peer-ppo-python or $PEER_PPO_PYTHON must name a Python with TRL 1.12, the last with PPO"
        )
    elif options.peer == "trl":
        peer = [python, "-m", "benchmarks.peer_trl", *common]
        if task == "generate":
            entries["transformers generate"] = [*peer, "--tuned"]
        else:
            entries |= {"trl tuned": [*peer, "--tuned"], "trl default": peer}
        if task == "sft":
            entries["trl packing"] = [*peer, "--tuned", "--packing"]
    return [Contestant(name, command, options.threads) for name, command in entries.items()]


def compare(task: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds of a task; print and return its medians."""
    tokens = useful_tokens(task, options)
    players = contestants(task, options)
    for number in range(options.rounds):
        for player in players:
            result = player.play()
            line = {"task": task, "contestant": player.name, "round": number, **result}
            print(json.dumps(line | {"tokens_per_second": tokens / result["seconds"]}), flush=True)
    for player in players:
        player.close()
    figures = {player.name: medians(player, players[0], tokens) for player in players}
    columns = ("contestant", "tokens/s", "ours is faster by", "peak memory, MB")
    print_table(f"{task}: {tokens} tokens a round", columns, [(name, *row) for name, row in figures.items()])

    mine = figures.pop("ours")
    summary: dict[str, Any] = {"task": task, "tokens_per_second": mine.tokens_per_second}
    summary |= {"peer_tokens_per_second": None, "speedup": None}
    summary |= {"peak_memory_mb": mine.peak_memory_mb, "peer_peak_memory_mb": None}
    for name, theirs in figures.items():
        if name == "ours, no Trainer":
            summary["lightning_overhead"] = 1 / theirs.speedup - 1
        elif name in ("trl tuned", "transformers generate"):
            summary |= {
                "peer_tokens_per_second": theirs.tokens_per_second,
                "speedup": theirs.speedup,
                "peer_peak_memory_mb": theirs.peak_memory_mb,
            }
        else:
            prefix = name.replace(" ", "_")
            summary |= {f"{prefix}_tokens_per_second": theirs.tokens_per_second, f"speedup_to_{prefix}": theirs.speedup}
    if task not in ("ppo", "generate"):
        shape = workload.SHAPES[options.shape]
        flops = workload.training_flops(task, shape, workload.make_pairs(options.pairs, shape, options.seed))
        summary["useful_gflops_per_second"] = flops * mine.tokens_per_second / tokens / 1e9
    print(json.dumps(summary), flush=True)
    return summary


class Medians(NamedTuple):
    """Of a contestant, over its rounds."""

    tokens_per_second: float
    speedup: float  # its time over ours in the same round
    peak_memory_mb: float  # the most, not the median


def medians(player: Contestant, ours: Contestant, tokens: int) -> Medians:
    """What the rounds of a contestant come to."""
    seconds = [result["seconds"] for result in player.results]
    ratios = [theirs / mine["seconds"] for theirs, mine in zip(seconds, ours.results, strict=True)]
    memory = max(result["peak_memory_mb"] for result in player.results)
    return Medians(tokens / statistics.median(seconds), statistics.median(ratios), memory)


def describe(options: argparse.Namespace) -> None:
    """Print the conditions of the whole run."""
    peers = {}
    for name in ("peer_python", "peer_ppo_python") if options.peer else ():
        python = getattr(options, name)
        if python:
            ask = "from importlib.metadata import version as v; print('trl', v('trl'), 'torch', v('torch'))"
            peers[name] = subprocess.check_output([python, "-c", ask], text=True).strip()
    conditions(
        threads=options.threads,
        clock="CPU seconds of the process" if options.threads == 1 else "wall seconds",
        precision=options.precision or "the device's own",
        **{name: getattr(options, name) for name in ("shape", "pairs", "batch", "slots", "rounds", "seed")},
        **peers,
    )


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all")
    parser.add_argument("--peer", choices=["trl"], help="what to compare with; none = our own bare step alone")
    parser.add_argument(
        "--peer-python", default=os.environ.get("PEER_PYTHON"), help="a Python that has TRL; also $PEER_PYTHON"
    )
    parser.add_argument(
        "--peer-ppo-python", default=os.environ.get("PEER_PPO_PYTHON"), help="one that has TRL 1.12, the last with PPO"
    )
    parser.add_argument("--shape", default="small", choices=sorted(workload.SHAPES))
    parser.add_argument("--pairs", type=int, help="how many a round takes; by task if not given")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--slots", type=int, default=16, help="completions written at the same time")
    parser.add_argument("--fixed", type=int, help="length of every completion of `generate`, instead of a heavy tail")
    parser.add_argument("--precision", help="of ours: a Trainer's; the device's own if not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="with one, time is CPU time: other work does not count")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("pairs", "batch", "slots", "fixed", "rounds", "threads"):
        count = getattr(options, name)
        if count is not None and count < 1:
            parser.error(f"--{name} must be 1 or more, not {count}")
    if options.peer is not None and (options.peer_python is None or not Path(options.peer_python).exists()):
        parser.error("--peer trl needs --peer-python or $PEER_PYTHON: a Python with TRL, see docs/performance.md")
    if options.peer is not None and options.peer_ppo_python and not Path(options.peer_ppo_python).exists():
        parser.error(f"--peer-ppo-python or $PEER_PPO_PYTHON: there is no {options.peer_ppo_python}")
    if options.peer is None:
        print("no peer: ours stands beside its own bare step (the same model and losses in a plain loop)")
    describe(options)
    for task in TASKS if options.task == "all" else (options.task,):
        compare(task, argparse.Namespace(**{**vars(options), "pairs": options.pairs or PAIRS[task]}))


if __name__ == "__main__":
    main()
