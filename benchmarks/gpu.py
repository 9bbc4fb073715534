"""A GPU at work, unattended within ten minutes: MFU of training, decoding against the memory's bandwidth.

    make bench-gpu

A Llama of 1.2 billion parameters with random weights in bfloat16 (`--shape 1b`). Training goes through the command
line's own modules and Trainer. Decoding is our slot cache with and without CUDA graphs, beside `generate` of
transformers, once with responses of equal length and once with a heavy tail.

Every phase is a process of its own and prints a JSON line; one that fails or runs out of time says so in its line, and
the others go on. A phase that runs out of memory starts again with half the batch. On a CPU it runs with a tiny shape,
to show that the script works; `python -m benchmarks.gpu --phases sft decode` runs some of it.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks import workload
from benchmarks.compare import useful_tokens
from benchmarks.ours import ForcedLengths
from benchmarks.peer_trl import forced
from benchmarks.rounds import Contestant, conditions, print_table, serve
from lit_rlhf.callbacks.performance import measured_flops, peak_flops
from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.models.policy import Policy
from lit_rlhf.rollout.play import GenerationSettings, play

# In order of worth, should time run out; sequences (of PPO and SFT) or pairs of a micro-batch, for 80 GB.
BATCHES = {"sft": 64, "dpo": 32, "ppo": 8, "reward": 32, "dpo_cached": 32}
PHASES = ("sft", "dpo", "decode", "ppo", "reward", "dpo_cached")
ROUNDS = 3  # that count; engines take turns
LEAST_SECONDS = 30  # a phase is not begun with less time than this


def training(task: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Tokens per second and MFU of a stage, in the largest batch that the memory holds."""
    deadline = time.monotonic() + limit
    batch = options.batch or BATCHES[task]
    while True:
        try:
            return trained(task, batch, options, deadline)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower() or batch == 1:
                raise
            batch //= 2


def trained(task: str, batch: int, options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """As `training`, with this batch: the median round after one of warm-up."""
    pairs = min(options.pairs, 128) if task == "ppo" else options.pairs
    settings = argparse.Namespace(shape=options.shape, pairs=pairs, seed=0, fixed=None)
    command = [sys.executable, "-m", "benchmarks.ours", "--task", task, "--shape", options.shape]
    command += ["--pairs", str(pairs), "--batch", str(batch), "--slots", str(options.slots)]
    contestant = Contestant(task, command, threads=max(2, os.cpu_count() or 2))
    try:
        for _ in range(1 + ROUNDS):
            contestant.play(limit=deadline - time.monotonic())
    finally:
        contestant.close()
    result = sorted(contestant.results[1:], key=lambda result: result["seconds"])[ROUNDS // 2]
    line = {"batch": batch, "pairs": pairs, "tokens_per_second": useful_tokens(task, settings) / result["seconds"]}
    if task == "ppo":
        rollouts = result["perf/rollout_fraction"]
        line["rollout_fraction"] = rollouts
        rate = result.get("perf/mfu", 0.0) / (1 - rollouts) * (options.peak_flops or 0.0)  # while it learns
    else:
        shape = workload.SHAPES[options.shape]
        rate = workload.training_flops(task, shape, workload.make_pairs(pairs, shape)) / result["seconds"]
    line["useful_tflops_per_second"] = rate / 1e12
    if options.peak_flops:
        line["mfu"] = rate / options.peak_flops
    line["share_of_measured_matmul_rate"] = rate / options.matmul_flops
    return line | {"seconds": result["seconds"], "peak_memory_mb": result["peak_memory_mb"]}


def decode(options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """New tokens per second of a rollout, by engine and law of lengths, and what bandwidth allows.

    Every round prints its line as it ends; where the time runs out, the medians are those of the rounds so far.
    """
    deadline = time.monotonic() + limit
    command = [sys.executable, "-m", "benchmarks.gpu", "--serve", "--shape", options.shape]
    command += ["--slots", str(options.slots), "--new-tokens", str(options.new_tokens)]
    command += ["--bandwidth", str(options.bandwidth)]
    contestant = Contestant("decode", command, threads=max(2, os.cpu_count() or 2))
    try:
        while "engine" in contestant.play(limit=deadline - time.monotonic()):
            print(json.dumps({"phase": "decode", **contestant.results[-1]}), flush=True)
        return {"engines": medians(contestant.results[:-1])}
    except RuntimeError as error:
        return {"error": str(error)[-2000:], "engines": medians(contestant.results)}
    finally:
        contestant.close()


def medians(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each engine and law of lengths: the median of its rounds after one of warm-up, or its error."""
    lines = []
    for key in dict.fromkeys((line["engine"], line["lengths"]) for line in rounds):
        played = [line for line in rounds if (line["engine"], line["lengths"]) == key]
        counted = sorted(played[1:], key=lambda line: line.get("tokens_per_second", 0.0))
        failed = [line for line in played if "error" in line]
        no_time = {"engine": key[0], "lengths": key[1], "error": "no time for a round after that of warm-up"}
        lines.append(failed[0] if failed else counted[len(counted) // 2] if counted else no_time)
    return lines


def decoding(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rounds of all engines in this process, in turns; one that fails leaves its error and sits out the others."""
    device, shape, slots = device_of(), workload.SHAPES[options.shape], options.slots
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = Policy(workload.make_model(shape, attn_implementation=IMPLEMENTATION).to(device, dtype).eval())
    prompts = [np.array(pair["prompt"]) for pair in workload.make_pairs(4 * slots, shape)]
    heavy = np.minimum(workload.response_lengths(len(prompts)), options.new_tokens)
    laws = {"fixed": np.full(len(prompts), options.new_tokens), "heavy tail": heavy}
    engines: dict[str, Callable[[np.ndarray], int]] = {
        "slot cache": lambda due: rollout(policy, prompts, due, slots, cuda_graphs=False),
        "slot cache, CUDA graphs": lambda due: rollout(policy, prompts, due, slots, cuda_graphs=True),
        "generate": lambda due: generate(policy, prompts, due, slots),
    }
    if device.type != "cuda":
        del engines["slot cache, CUDA graphs"]
    for law, due in laws.items():
        context = np.mean([len(prompt) for prompt in prompts]) + (due**2).sum() / due.sum() / 2  # of a token written
        limit = bandwidth_limit(shape, slots, float(context), dtype.itemsize, options.bandwidth)
        failed = set()
        for number, (name, engine) in itertools.product(range(1 + ROUNDS), engines.items()):
            if name in failed:
                continue
            line: dict[str, Any] = {"engine": name, "lengths": law, "slots": slots, "round": number}
            try:
                start = now()
                rate = engine(due) / (now() - start)
                yield line | {"tokens_per_second": rate, "share_of_bandwidth_limit": rate / limit}
            except RuntimeError as error:
                failed.add(name)
                yield line | {"error": str(error)[-300:]}


def rollout(policy: Policy, prompts: list[np.ndarray], due: np.ndarray, slots: int, cuda_graphs: bool) -> int:
    """Complete every prompt in the token environment; returns the number of tokens written."""
    ForcedLengths.lengths = due
    env = ForcedLengths(
        prompts=prompts,
        num_envs=slots,
        vocab_size=policy.vocabulary_size,
        stop_token_ids=workload.EOS,
        max_new_tokens=int(due.max()),
        reward_fn=lambda prompts, responses: np.zeros(len(responses)),
        reward_mode="deferred",
        shuffle=False,
        copy=False,
    )
    played = play(policy, env, GenerationSettings(), len(prompts), env_seed=0, cuda_graphs=cuda_graphs)
    return sum(len(episode.response_ids) for episode in played.episodes)


@torch.no_grad()
def generate(policy: Policy, prompts: list[np.ndarray], due: np.ndarray, slots: int) -> int:
    """The same by transformers' `generate`, in batches of `slots`."""
    device = policy.model.device
    policy.model.set_attn_implementation("sdpa")
    try:
        for first in range(0, len(prompts), slots):
            batch, lengths = prompts[first : first + slots], due[first : first + slots]
            longest = max(map(len, batch))
            ids = [[workload.PAD] * (longest - len(prompt)) + prompt.tolist() for prompt in batch]
            mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch]
            policy.model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                do_sample=True,
                top_k=0,
                max_new_tokens=int(lengths.max()),
                logits_processor=[forced(lengths, longest)],
            )
    finally:
        policy.model.set_attn_implementation(IMPLEMENTATION)
    return int(due.sum())


def bandwidth_limit(shape: workload.Shape, slots: int, context: float, itemsize: int, bandwidth: float) -> float:
    """Tokens per second if a step did nothing but read every weight once and each row's keys and values.

    Args:
        shape: of the model.
        slots: rows of a step.
        context: tokens that a row has cached, in the mean over steps.
        itemsize: bytes of a number.
        bandwidth: bytes per second.
    """
    weights = shape.linear_parameters() + shape.hidden * shape.vocabulary
    cached = 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads) * context
    return slots * bandwidth / ((weights + slots * cached) * itemsize)


def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        start = now()
        target.copy_(source)
        best = min(best, now() - start)
    return 2 * source.nbytes / best


def now() -> float:
    """Wall time, with the device's work done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def device_of() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(options: argparse.Namespace) -> None:
    """Run the phases, as many as the time allows; print a line for each, then a table."""
    deadline = time.monotonic() + 60 * options.minutes
    rows = []
    for phase in options.phases:
        start = time.monotonic()
        left = deadline - start
        line: dict[str, Any] = {"phase": phase}
        if left < LEAST_SECONDS:
            line["skipped"] = f"{left:.0f} s of --minutes {options.minutes} were left"
        else:
            try:
                line |= decode(options, left) if phase == "decode" else training(phase, options, left)
            except RuntimeError as error:
                line["error"] = str(error)[-2000:]
        print(json.dumps(line | {"phase_seconds": round(time.monotonic() - start, 1)}), flush=True)
        rows += [table_row(phase, part) for part in line.get("engines") or [line]]
    print_table("Medians", ("phase", "tokens/s", "of the limit"), rows)


def table_row(phase: str, line: dict[str, Any]) -> tuple[Any, ...]:
    """Speed, and MFU or the share of what the memory's bandwidth allows."""
    name = f"{line['engine']}, {line['lengths']}" if "engine" in line else phase
    if "tokens_per_second" not in line:
        return name, "failed" if "error" in line else "skipped", ""
    limits = ("share_of_bandwidth_limit", "mfu", "share_of_measured_matmul_rate")
    return name, line["tokens_per_second"], next(line[key] for key in limits if key in line)


def main(arguments: list[str] | None = None) -> None:
    """Measure the device's ceilings, then run the phases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES)
    parser.add_argument("--minutes", type=float, default=9.0, help="phases that do not fit are left out or stopped")
    parser.add_argument("--shape", default="1b" if on_gpu else "tiny", choices=sorted(workload.SHAPES))
    parser.add_argument("--pairs", type=int, default=512 if on_gpu else 8)
    parser.add_argument("--batch", type=int, help="sequences or pairs of a micro-batch, instead of each phase's own")
    parser.add_argument("--slots", type=int, default=64 if on_gpu else 4)
    parser.add_argument("--new-tokens", type=int, default=128 if on_gpu else 16)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # as the process of `decode`
    parser.add_argument("--bandwidth", type=float, help="bytes per second; measured if not given")
    options = parser.parse_args(arguments)
    if options.serve:
        torch.set_num_threads(int(os.environ.get("BENCHMARK_THREADS", "1")))
        rounds = decoding(options)
        serve(lambda: next(rounds, {}))
        return
    device = device_of()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    options.bandwidth = options.bandwidth or measured_bandwidth(device)
    options.matmul_flops = measured_flops(device, dtype)
    options.peak_flops, options.mfu_is_over = peak_flops(device, dtype) or (None, "nothing")
    if on_gpu:
        torch.cuda.empty_cache()
    conditions(device=torch.cuda.get_device_name() if on_gpu else "CPU", **vars(options))
    measure(options)


if __name__ == "__main__":
    main()
