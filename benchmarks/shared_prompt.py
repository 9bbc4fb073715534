"""What more responses to a prompt cost: a forward and backward pass over a group beside one over a single response.

    python -m benchmarks.shared_prompt

A JSON line for each network, prompt, response and group: `seconds_of_one` and `seconds_of_group` (medians, of the CPU),
`ratio` (the median of the ratios of a round, in which group and single response take turns), `tokens` (the ratio of
distinct tokens, what the linear layers meet) and `operations` (that of useful operations, a shared prompt counted once:
a response's tokens see the whole prompt, and a policy's go through the output head). A table comes last.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks import workload
from benchmarks.rounds import conditions, print_table
from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.models.policy import Policy, Scorer

SIZES = ("128x64", "256x128", "1024x64", "4096x64")
GROUPS = (2, 8, 16)
Line = dict[str, Any]
NETWORKS: dict[str, Callable[[workload.Shape], Policy | Scorer]] = {
    "policy": lambda shape: Policy(workload.make_model(shape, attn_implementation=IMPLEMENTATION)),
    "scorer": lambda shape: Scorer(workload.make_model(shape, classifier=True, attn_implementation=IMPLEMENTATION)),
}


def size(text: str) -> tuple[int, int]:
    """Tokens of prompt and response, as in "4096x64"."""
    prompt, response = map(int, text.split("x"))
    return prompt, response


def training_pass(network: Policy | Scorer, prompt: int, response: int, group: int) -> Callable[[], float]:
    """A forward and backward pass over a prompt with a group of responses, which returns its CPU seconds."""
    rng = np.random.default_rng(0)

    def words(n: int) -> np.ndarray:
        return rng.integers(workload.FIRST_WORD, network.model.config.vocab_size, n)

    batch = pack([Example(words(prompt), tuple(words(response) for _ in range(group)))])

    def run() -> float:
        network.zero_grad()
        start = time.process_time()
        loss = network.nll(batch) if isinstance(network, Policy) else network(batch, batch.last_nodes).sum()
        loss.backward()
        return time.process_time() - start

    return run


def bounds(shape: workload.Shape, network: str, prompt: int, response: int, group: int) -> dict[str, float]:
    """How much more of distinct tokens and of useful operations a group has than a single response."""

    def operations(group: int) -> float:
        head_tokens = group * response if network == "policy" else 0
        return shape.forward_flops([prompt + response] * group, head_tokens, [prompt] * (group - 1))

    tokens = (prompt + group * response) / (prompt + response)
    return {"tokens": tokens, "operations": operations(group) / operations(1)}


def measure(name: str, shape: workload.Shape, sizes: Iterable[tuple[int, int]], repeats: int) -> Iterator[Line]:
    """The lines of a network, one for each prompt, response and group."""
    network = NETWORKS[name](shape)
    for prompt, response in sizes:
        passes = {group: training_pass(network, prompt, response, group) for group in (1, *GROUPS)}
        rounds = [{group: run() for group, run in passes.items()} for _ in range(repeats + 1)][1:]
        for group in GROUPS:
            figures = {
                "seconds_of_one": statistics.median(taken[1] for taken in rounds),
                "seconds_of_group": statistics.median(taken[group] for taken in rounds),
                "ratio": statistics.median(taken[group] / taken[1] for taken in rounds),
                **bounds(shape, name, prompt, response, group),
            }
            of = {"network": name, "prompt": prompt, "response": response, "group": group}
            yield of | {figure: round(value, 3) for figure, value in figures.items()}


def main(arguments: list[str] | None = None) -> None:
    """Measure all sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(workload.SHAPES), default="small")
    parser.add_argument(
        "--sizes", nargs="+", type=size, default=[size(text) for text in SIZES], metavar="PROMPTxRESPONSE"
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    conditions(threads=1, clock="CPU seconds of the process", repeats=options.repeats, shape=options.shape)
    shape = workload.SHAPES[options.shape]
    rows = []
    for name in options.networks:
        for line in measure(name, shape, options.sizes, options.repeats):
            print(json.dumps(line), flush=True)
            figures = (f"{line[figure]:.2f}" for figure in ("seconds_of_one", "ratio", "tokens", "operations"))
            rows.append((name, f"{line['prompt']:,}", str(line["response"]), str(line["group"]), *figures))
    columns = ("network", "prompt", "response", "group", "seconds of one", "group / one", "tokens", "operations")
    print_table("A group of responses beside one", columns, rows)


if __name__ == "__main__":
    main()
