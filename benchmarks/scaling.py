"""How cost grows with response length, batch, vocabulary and model size, and with finished rows: fitted exponents.

    python -m benchmarks.scaling

Each JSON line is a sweep: y ~ x^exponent, fitted on logarithms; a table of the exponents comes last. Theory says 1 for
batch, vocabulary (of the head alone), and parameters; between 1 and 2 for response length, attention being quadratic; 0
for slots that have finished.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from benchmarks import workload
from benchmarks.rounds import conditions, print_table
from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.engine.logprobs import nll_sum
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.models.decoding import SlotDecoder
from lit_rlhf.models.policy import Policy

VOCABULARIES = (8192, 16_384, 32_768, 65_536)
BASE = workload.Shape(hidden=192, layers=4, heads=6, kv_heads=2, intermediate=512, vocabulary=4096)


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median CPU seconds of a call, after one of warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def training_step(shape: workload.Shape, num_sequences: int, response: int) -> Callable[[], None]:
    """Forward and backward pass over equal sequences of a 32-token prompt and a response."""
    policy = Policy(workload.make_model(shape, attn_implementation=IMPLEMENTATION))
    rng = np.random.default_rng(0)
    ids = [rng.integers(workload.FIRST_WORD, shape.vocabulary, 32 + response) for _ in range(num_sequences)]
    batch = pack([Example(row[:32], (row[32:],)) for row in ids])

    def step() -> None:
        policy.zero_grad()
        policy.nll(batch).backward()

    return step


def head_step(vocabulary: int) -> Callable[[], None]:
    """Forward and backward pass of the output head alone."""
    head, hidden = torch.nn.Linear(192, vocabulary, bias=False), torch.randn(256, 192, requires_grad=True)
    targets = torch.randint(vocabulary, (256,))

    def step() -> None:
        head.zero_grad()
        nll_sum(head, hidden, targets).backward()

    return step


def head_products(vocabulary: int) -> Callable[[], None]:
    """The three products of matrices of `head_step` and nothing else: what the machine makes of the theory."""
    weight, hidden, logits = torch.randn(vocabulary, 192), torch.randn(256, 192), torch.empty(256, vocabulary)

    def step() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.t(), hidden)

    return step


def decode_step(num_slots: int, num_active: int) -> Callable[[], None]:
    """A decode step of the slot cache in which the other slots have finished."""
    policy = Policy(workload.make_model(BASE, attn_implementation=IMPLEMENTATION).eval())
    decoder = SlotDecoder(policy, num_slots, 512)
    ids = np.random.default_rng(0).integers(workload.FIRST_WORD, BASE.vocabulary, (num_slots, 512))
    lengths, active, episodes = np.full(num_slots, 64), np.arange(num_slots) < num_active, np.arange(num_slots)
    decoder.logits(ids, lengths, episode_ids=episodes)

    def step() -> None:
        lengths[active] += 1
        decoder.logits(ids, lengths, active, episodes)

    return step


def sweep(
    name: str, what: str, sizes: Sequence[float], make: Callable[[int], Callable[[], None]], repeats: int
) -> float:
    """Time each size, print a line; returns the exponent."""
    costs = [seconds(make(i), repeats) for i in range(len(sizes))]
    exponent = fitted_exponent(sizes, costs)
    line = {"sweep": name, "of": what, "sizes": list(sizes), "cpu_seconds": [round(c, 4) for c in costs]}
    print(json.dumps(line | {"exponent": round(exponent, 2)}), flush=True)
    return exponent


def fitted_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The e of cost = c size^e, by least squares on logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def main(arguments: list[str] | None = None) -> None:
    """Run all sweeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smallest", action="store_true", help="only the two smallest sizes of each sweep")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    conditions(threads=1, clock="CPU seconds of the process", repeats=options.repeats, shape=asdict(BASE))
    rows = []

    def run(name: str, what: str, sizes: Sequence[int], make: Callable[[int], Callable[[], None]]) -> None:
        taken = sizes[:2] if options.smallest else sizes
        exponent = sweep(name, what, taken, lambda i: make(taken[i]), options.repeats)
        rows.append((name, what, f"{taken[0]:,} to {taken[-1]:,}", f"{exponent:.2f}"))

    run("training step", "response length", (64, 128, 256, 512), lambda n: training_step(BASE, 4, n))
    run("training step", "sequences", (2, 4, 8, 16), lambda n: training_step(BASE, n, 96))
    run("head alone", "vocabulary", VOCABULARIES, head_step)
    run("its products alone", "vocabulary", VOCABULARIES, head_products)
    run("training step", "layers", (4, 8, 16, 32), lambda n: training_step(replace(BASE, layers=n), 4, 96))
    shapes = [replace(BASE, hidden=h, intermediate=h * 8 // 3) for h in (96, 192, 384, 768)]
    weights = [shape.linear_parameters() for shape in shapes]
    run("training step", "weights, by width", weights, lambda n: training_step(shapes[weights.index(n)], 4, 96))
    run("decode step", "active of 32 slots", (4, 8, 16, 32), lambda n: decode_step(32, n))
    run("decode step", "finished slots beside 4 active", (4, 28, 124, 508), lambda n: decode_step(4 + n, 4))
    print_table("Cost grows as size to the power of", ("what", "by", "sizes", "exponent"), rows)


if __name__ == "__main__":
    main()
