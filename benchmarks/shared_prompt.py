"""What more responses to a prompt cost: a forward and backward pass over a group beside one over a single response.

    python -m benchmarks.shared_prompt

A JSON line for each prompt, response and group: `seconds_of_one` and `seconds_of_group` (medians, of the CPU), `ratio`
(the median of the ratios of a round, in which group and single response take turns), `tokens` (the ratio of distinct
tokens, what the linear layers meet) and `operations` (that of useful operations, a shared prompt counted once: a
response's tokens see the whole prompt and go through the output head). A table comes last.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import workload
from benchmarks.rounds import conditions, print_table
from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.models.policy import Policy

SIZES = ("128x64", "256x128", "1024x64", "1024x256", "4096x64")
GROUPS = (2, 8, 16)


def size(text: str) -> tuple[int, int]:
    """Tokens of prompt and response, as in "4096x64"."""
    prompt, response = map(int, text.split("x"))
    return prompt, response


def training_pass(policy: Policy, prompt: int, response: int, group: int) -> Callable[[], float]:
    """A forward and backward pass over a prompt with a group of responses, which returns its CPU seconds."""
    rng = np.random.default_rng(0)

    def words(n: int) -> np.ndarray:
        return rng.integers(workload.FIRST_WORD, policy.vocabulary_size, n)

    batch = pack([Example(words(prompt), tuple(words(response) for _ in range(group)))])

    def run() -> float:
        policy.zero_grad()
        start = time.process_time()
        policy.nll(batch).backward()
        return time.process_time() - start

    return run


def bounds(shape: workload.Shape, prompt: int, response: int, group: int) -> dict[str, float]:
    """How much more of distinct tokens and of useful operations a group has than a single response."""

    def operations(group: int) -> float:
        return shape.forward_flops([prompt + response] * group, group * response, [prompt] * (group - 1))

    tokens = (prompt + group * response) / (prompt + response)
    return {"tokens": tokens, "operations": operations(group) / operations(1)}


def measure(policy: Policy, shape: workload.Shape, prompt: int, response: int, repeats: int) -> list[dict[str, Any]]:
    """The lines of a prompt and response, one for each group."""
    passes = {group: training_pass(policy, prompt, response, group) for group in (1, *GROUPS)}
    rounds = [{group: run() for group, run in passes.items()} for _ in range(repeats + 1)][1:]
    lines = []
    for group in GROUPS:
        line = {
            "seconds_of_one": statistics.median(taken[1] for taken in rounds),
            "seconds_of_group": statistics.median(taken[group] for taken in rounds),
            "ratio": statistics.median(taken[group] / taken[1] for taken in rounds),
            **bounds(shape, prompt, response, group),
        }
        rounded = {name: round(value, 3) for name, value in line.items()}
        lines.append({"prompt": prompt, "response": response, "group": group, **rounded})
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure all sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(workload.SHAPES), default="small")
    parser.add_argument(
        "--sizes", nargs="+", type=size, default=[size(text) for text in SIZES], metavar="PROMPTxRESPONSE"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    conditions(threads=1, clock="CPU seconds of the process", repeats=options.repeats, shape=options.shape)
    shape = workload.SHAPES[options.shape]
    policy = Policy(workload.make_model(shape, attn_implementation=IMPLEMENTATION))
    rows = []
    for prompt, response in options.sizes:
        for line in measure(policy, shape, prompt, response, options.repeats):
            print(json.dumps(line), flush=True)
            figures = (f"{line[name]:.2f}" for name in ("seconds_of_one", "ratio", "tokens", "operations"))
            rows.append((f"{prompt:,}", str(response), str(line["group"]), *figures))
    columns = ("prompt", "response", "group", "seconds of one", "group / one", "tokens", "operations")
    print_table("A group of responses beside one", columns, rows)


if __name__ == "__main__":
    main()
