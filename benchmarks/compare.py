"""Our speed and memory beside the fastest peer's, on the same work, in one run.

    python -m benchmarks.compare --task sft --peer best --peer-python /path/to/python/with/trl

Contestants take turns, one process at a time, each after a warm-up. In the first round every setting of every peer
plays whose Python is named (`benchmarks/peers.py`); from there on the fastest of each precision. Every round prints a
JSON line; then come a table, and a JSON line of medians for each of ours. `speedup` is the median over rounds of the
time of the fastest peer over ours in the same round; `speedup_same_precision` of the fastest in our precision. Without
`--peer`, ours stands beside its own bare step alone.
"""

import argparse
import json
import statistics
import sys
from typing import Any, NamedTuple

from benchmarks import peers, workload
from benchmarks.peers import BFLOAT16, FLOAT32
from benchmarks.rounds import Contestant, conditions, print_table

TASKS = ("sft", "reward", "dpo", "dpo_cached", "ppo", "generate")
PAIRS = {"sft": 16, "reward": 16, "dpo": 16, "dpo_cached": 16, "ppo": 16, "generate": 64}
BARE = "ours, no Trainer"
OURS = {"32-true": "ours", "bf16-mixed": "ours, bfloat16"}  # by the Trainer's precision


class Entry(NamedTuple):
    """A contestant and what it computes in."""

    player: Contestant
    precision: str
    is_ours: bool


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


def contestants(task: str, options: argparse.Namespace) -> list[Entry]:
    """Ours, in each precision; then our bare step, if it stands beside that alone, or each setting of each peer."""
    common = ["--task", task, "--shape", options.shape, "--pairs", str(options.pairs), "--batch", str(options.batch)]
    common += ["--slots", str(options.slots), "--seed", str(options.seed)]
    if task == "generate" and options.fixed is not None:
        common += ["--fixed", str(options.fixed)]
    ours = [sys.executable, "-m", "benchmarks.ours", *common]
    found = []
    for precision, name in OURS.items() if options.precision is None else [(options.precision, "ours")]:
        kind = BFLOAT16 if "bf16" in precision else FLOAT32
        found.append((name, kind, [*ours, "--precision", precision], True))
        if options.peer is None and task not in ("ppo", "generate"):
            bare = BARE + name.removeprefix("ours")
            found.append((bare, kind, [*ours, "--precision", precision, "--bare"], True))
    found += [(name, kind, [*command, *common], False) for name, kind, command in peers.entries(task, options)]
    return [Entry(Contestant(name, command, options.threads), kind, mine) for name, kind, command, mine in found]


def compare(task: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all rounds of a task; print and return the medians of each of ours."""
    tokens = useful_tokens(task, options)
    players = contestants(task, options)
    if options.peer is not None and all(player.is_ours for player in players):
        print(f"{task}: no peer has a Python that is named; ours alone")
    playing = players
    for number in range(options.rounds):
        for entry in playing:
            result = entry.player.play()
            entry.player.close()
            line = {
                "task": task,
                "contestant": entry.player.name,
                "precision": entry.precision,
                "round": number,
                **result,
            }
            print(json.dumps(line | {"tokens_per_second": tokens / result["seconds"]}), flush=True)
        if number == 0:
            playing = [entry for entry in players if entry.is_ours or entry in fastest(players).values()]
    rows = [
        (entry.player.name, entry.precision, len(entry.player.results), *medians(entry, players[0], tokens))
        for entry in players
    ]
    columns = ("contestant", "precision", "rounds", "tokens/s", "time over ours", "peak memory, MB")
    print_table(f"{task}: {tokens} tokens a round", columns, rows)
    lines = [summary(task, entry, players, options, tokens) for entry in players if entry.player.name in OURS.values()]
    for line in lines:
        print(json.dumps(line), flush=True)
    return lines


def fastest(players: list[Entry]) -> dict[str, Entry]:
    """Of the peers that have played on, or once, the fastest by precision."""
    theirs = [entry for entry in players if not entry.is_ours]
    most = max((len(entry.player.results) for entry in theirs), default=0)
    found: dict[str, Entry] = {}
    for precision in (FLOAT32, BFLOAT16):
        for entry in theirs:
            if entry.precision == precision and len(entry.player.results) == most:
                held = found.setdefault(precision, entry)
                if seconds(entry) < seconds(held):
                    found[precision] = entry
    return found


def seconds(entry: Entry) -> float:
    """Of a round, in the middle."""
    return statistics.median(result["seconds"] for result in entry.player.results)


def summary(task: str, mine: Entry, players: list[Entry], options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """One of ours beside the fastest of all and the fastest of its precision."""
    ours = medians(mine, mine, tokens)
    found: dict[str, Any] = {"task": task, "precision": mine.precision, "tokens_per_second": ours.tokens_per_second}
    by_precision = fastest(players)
    best = min(by_precision.values(), key=seconds, default=None)
    alike = by_precision.get(mine.precision)
    for entry, ending in ((best, ""), (alike, "_same_precision")):
        theirs = None if entry is None else medians(entry, mine, tokens)
        found |= {
            f"best_peer{ending}": entry and f"{entry.player.name}, {entry.precision}",
            f"best_peer_tokens_per_second{ending}": theirs and theirs.tokens_per_second,
            f"speedup{ending}": theirs and theirs.ratio,
            f"best_peer_peak_memory_mb{ending}": theirs and theirs.peak_memory_mb,
        }
    found["peak_memory_mb"] = ours.peak_memory_mb
    for entry in players:
        if entry.player.name == BARE + mine.player.name.removeprefix("ours"):
            found["lightning_overhead"] = 1 / medians(entry, mine, tokens).ratio - 1
    if task not in ("ppo", "generate"):
        shape = workload.SHAPES[options.shape]
        flops = workload.training_flops(task, shape, workload.make_pairs(options.pairs, shape, options.seed))
        found["useful_gflops_per_second"] = flops * ours.tokens_per_second / tokens / 1e9
    return found


class Medians(NamedTuple):
    """Of a contestant, over its rounds."""

    tokens_per_second: float
    ratio: float  # of its time to that of one of ours in the same round
    peak_memory_mb: float  # the most, not the median


def medians(entry: Entry, ours: Entry, tokens: int) -> Medians:
    """What the rounds of a contestant come to."""
    pairs = zip(entry.player.results, ours.player.results, strict=False)  # a slow one has played the first alone
    ratios = [theirs["seconds"] / mine["seconds"] for theirs, mine in pairs]
    memory = max(result["peak_memory_mb"] for result in entry.player.results)
    return Medians(tokens / seconds(entry), statistics.median(ratios), memory)


def describe(options: argparse.Namespace) -> None:
    """Print the conditions of the whole run."""
    conditions(
        threads=options.threads,
        clock="CPU seconds of the process" if options.threads == 1 else "wall seconds",
        precision=options.precision or "float32 and bf16-mixed",
        **{name: getattr(options, name) for name in ("shape", "pairs", "batch", "slots", "rounds", "seed")},
        peers=peers.versions(options),
    )


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all")
    parser.add_argument(
        "--peer",
        choices=["best", *peers.PEERS],
        help="all whose Python is named, or one; none = our own bare step alone",
    )
    peers.add_options(parser)
    parser.add_argument("--shape", default="small", choices=sorted(workload.SHAPES))
    parser.add_argument("--pairs", type=int, help="how many a round takes; by task if not given")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--slots", type=int, default=16, help="completions written at the same time")
    parser.add_argument("--fixed", type=int, help="length of every completion of `generate`, instead of a heavy tail")
    parser.add_argument("--precision", help="of ours, a Trainer's; 32-true and bf16-mixed if not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="with one, time is CPU time: other work does not count")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("pairs", "batch", "slots", "fixed", "rounds", "threads"):
        count = getattr(options, name)
        if count is not None and count < 1:
            parser.error(f"--{name} must be 1 or more, not {count}")
    peers.check_options(parser, options)
    if options.peer is None:
        print("no peer: ours stands beside its own bare step (the same model and losses in a plain loop)")
    describe(options)
    for task in TASKS if options.task == "all" else (options.task,):
        compare(task, argparse.Namespace(**{**vars(options), "pairs": options.pairs or PAIRS[task]}))


if __name__ == "__main__":
    main()
