"""What data cost as they grow: time and memory of reading, opening, planning and packing, with their exponents.

    python -m benchmarks.data_scale
    python -m benchmarks.data_scale --kind prompts --rows 1000 10000 100000

Each size is two processes: one that tokenises a file of so many rows, and one that finds the tokens in the cache, as
every later run and every rank does. A JSON line per size: `rows`, `tokens`; seconds to `tokenise`, to `open` from the
cache, to `begin` (what the plans of all epochs have in common), to `plan` an epoch, to `fingerprint` (for the cache of
reference log-probs) and for a `batch`; and `tokenise_memory_mb` and `memory_mb`, the most that the two processes held
of their own beyond what they held before, mapped files left out. The last line has the exponent of each over the sizes,
a line's slope in logarithms: 1 = in proportion to the rows, 0 = none.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

MEASURED = ("tokenise", "tokenise_memory_mb", "open", "begin", "plan", "fingerprint", "batch", "memory_mb")
KINDS = ("sft", "preference", "prompts")
BATCHES = 20  # of which the median counts


def write_rows(file: Path, kind: str, rows: int, words: int, seed: int = 0) -> None:
    """Rows of texts of unequal length, about `words` words each."""
    rng = np.random.default_rng(seed)
    with open(file, "w", encoding="utf-8") as out:
        for start in range(0, rows, 10_000):
            count = min(10_000, rows - start)
            lengths = rng.geometric(2 / words, (count, 3)) + 1
            drawn = iter(rng.integers(100, 999, int(lengths.sum())).tolist())
            for row in lengths.tolist():
                prompt, one, other = (" ".join(f"t{next(drawn)}" for _ in range(length)) for length in row)
                texts = {
                    "sft": {"prompt": prompt, "completion": " " + one},
                    "preference": {"prompt": prompt, "chosen": " " + one, "rejected": " " + other},
                    "prompts": {"prompt": prompt, "answer": one, "unread": other},
                }
                out.write(json.dumps(texts[kind]) + "\n")


def is_answered(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """A reward that reads one column of the two beside the prompt."""
    return [float(known in response) for known, response in zip(answer, responses, strict=True)]


def make_data(kind: str, file: str) -> Any:
    """The data module of such rows, with a tokenizer of words."""
    from benchmarks import workload
    from lit_rlhf import PreferenceDataModule, RolloutDataModule, SFTDataModule

    tokenizer = workload.make_tokenizer(workload.SHAPES["tiny"])
    settings: dict[str, Any] = {"train": file, "validation": None, "tokenizer": tokenizer}
    if kind == "prompts":
        return RolloutDataModule(is_answered, max_new_tokens=8, **settings)
    return {"sft": SFTDataModule, "preference": PreferenceDataModule}[kind](**settings, max_length=4096)


@contextmanager
def own_memory() -> Iterator[Callable[[], float]]:
    """Within, a thread looks at what this process holds of its own; calls give the most of it so far in MB."""
    process, stop = psutil.Process(), threading.Event()

    def held() -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    before, most = held(), [0]

    def watch() -> None:
        while not stop.wait(0.02):
            most[0] = max(most[0], held() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: max(most[0], held() - before) / 2**20
    finally:
        stop.set()
        watcher.join()


def timed(what: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    start = time.perf_counter()
    result = what()
    return time.perf_counter() - start, result


def measure(kind: str, file: str, first: bool) -> dict[str, float]:
    """In a process of its own: what the first that reads the rows takes, or a later one."""
    data = make_data(kind, file)
    if first:
        with own_memory() as most:
            seconds, _ = timed(lambda: data.setup("fit"))
            return {"tokenise": seconds, "tokenise_memory_mb": most()}
    with own_memory() as most:
        seconds, _ = timed(lambda: data.setup("fit"))
        result = {"open": seconds}
        if kind == "prompts":
            data.prompts = {split: data.rewards.read(prompts) for split, prompts in data.prompts.items()}
            result["tokens"] = sum(len(ids) for ids in data.prompts["train"].prompt_ids)
        else:
            rows = data.datasets["train"]
            seconds, loader = timed(data.train_dataloader)
            planning, plan = timed(lambda: loader.sampler.plan(1))
            result |= {"tokens": int(rows.lengths().sum()), "begin": seconds, "plan": planning}
            result["fingerprint"] = timed(rows.fingerprint)[0]
            result["batch"] = statistics.median(
                timed(lambda i=i: rows[plan[i]])[0] for i in range(min(BATCHES, len(plan)))
            )
        result["memory_mb"] = most()
    return result


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-9)), 1)[0])


def main(argv: list[str] | None = None) -> None:
    """Measure each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="sft")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--words", type=int, default=20, help="of a text, on average")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child:
        file, which = given.child
        print(json.dumps(measure(given.kind, file, which == "first")))
        return
    lines = []
    for rows in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            write_rows(file, given.kind, rows, given.words)
            line: dict[str, Any] = {"kind": given.kind, "rows": rows}
            for which in ("first", "later"):
                command = [sys.executable, "-m", "benchmarks.data_scale", "--kind", given.kind]
                done = subprocess.run(
                    [*command, "--child", str(file), which],
                    capture_output=True,
                    text=True,
                    env=os.environ | {"HF_HOME": folder, "HF_DATASETS_CACHE": f"{folder}/cache"},
                )
                if done.returncode:
                    raise SystemExit(f"{rows} rows: {done.stderr[-2000:]}")
                line |= json.loads(done.stdout.splitlines()[-1])
        lines.append(line)
        print(
            json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in line.items()})
        )
    if len(lines) > 1:
        sizes = [line["rows"] for line in lines]
        slopes = {name: exponent(sizes, [line[name] for line in lines]) for name in MEASURED if name in lines[0]}
        print(json.dumps({"kind": given.kind, "exponents": {name: round(slope, 2) for name, slope in slopes.items()}}))


if __name__ == "__main__":
    main()
