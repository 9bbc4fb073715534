"""A GPU at work, unattended within ten minutes: MFU of training, decoding against the memory's bandwidth.

    make bench-gpu

A Llama of 1.2 billion parameters with random weights in bfloat16 (`--shape 1b`). Training goes through the command
line's own modules and Trainer; decoding is our slot cache with and without CUDA graphs, beside `generate` of
transformers. On a CPU it runs with a small shape, to show that the script works.
"""

import argparse
import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from benchmarks import workload
from benchmarks.compare import useful_tokens
from benchmarks.rounds import Contestant
from lit_rlhf.packing import IMPLEMENTATION
from lit_rlhf.policy import Policy
from lit_rlhf.rollout import GenerationSettings, play
from token_mdp import TokenVectorEnv


def training(task: str, options: argparse.Namespace) -> None:
    """Tokens per second and MFU of a stage; the second round counts."""
    settings = argparse.Namespace(**vars(options), fixed=None, seed=0)
    command = [sys.executable, "-m", "benchmarks.ours", "--task", task, "--shape", options.shape]
    command += ["--pairs", str(options.pairs), "--batch", str(options.batch), "--slots", str(options.slots)]
    contestant = Contestant("ours", command, threads=os.cpu_count() or 2)
    for _ in range(2):
        result = contestant.play()
    contestant.close()
    line: dict[str, Any] = {"task": task, "tokens_per_second": useful_tokens(task, settings) / result["seconds"]}
    if task != "ppo" and (peak := peak_flops()):
        shape = workload.SHAPES[options.shape]
        flops = workload.training_flops(task, shape, workload.make_pairs(options.pairs, shape))
        line["mfu"] = flops / result["seconds"] / peak
    print(json.dumps(line | {"peak_memory_mb": result["peak_memory_mb"]}), flush=True)


def decoding(options: argparse.Namespace) -> None:
    """New tokens per second of a rollout, by engine, and what bandwidth allows."""
    device, shape = device_of(), workload.SHAPES[options.shape]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = Policy(workload.make_model(shape, attn_implementation=IMPLEMENTATION).to(device, dtype).eval())
    prompts = [np.array(pair["prompt"]) for pair in workload.make_pairs(4 * options.slots, shape)]

    def rollout(cuda_graphs: bool) -> tuple[float, int]:
        env = TokenVectorEnv(
            prompts=prompts,
            num_envs=options.slots,
            vocab_size=shape.vocabulary,
            stop_token_ids=workload.EOS,
            max_new_tokens=options.new_tokens,
            reward_fn=lambda prompts, responses: np.zeros(len(responses)),
            reward_mode="deferred",
            copy=False,
        )
        start = now()
        played = play(policy, env, GenerationSettings(), len(prompts), env_seed=0, cuda_graphs=cuda_graphs)
        return now() - start, sum(len(episode.response_ids) for episode in played.episodes)

    def generate() -> tuple[float, int]:
        policy.model.set_attn_implementation("sdpa")
        start, written = now(), 0
        for first in range(0, len(prompts), options.slots):
            batch = prompts[first : first + options.slots]
            longest = max(map(len, batch))
            ids = torch.tensor([[workload.PAD] * (longest - len(p)) + p.tolist() for p in batch], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=device)
            out = policy.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=options.new_tokens
            )
            written += out[:, longest:].ne(workload.PAD).sum().item()
        policy.model.set_attn_implementation(IMPLEMENTATION)
        return now() - start, written

    engines = {"slot cache": lambda: rollout(False), "generate": generate}
    if device.type == "cuda":
        engines["slot cache, CUDA graphs"] = lambda: rollout(True)
    mean = float(np.mean([len(p) for p in prompts])) + options.new_tokens / 2
    kv_bytes = 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads) * dtype.itemsize * mean
    weights = (shape.linear_parameters() + shape.hidden * shape.vocabulary) * dtype.itemsize
    limit = options.slots * bandwidth(device) / (weights + options.slots * kv_bytes)
    for name, engine in engines.items():
        engine()
        seconds, written = engine()
        line = {"task": "decode", "engine": name, "slots": options.slots, "tokens_per_second": written / seconds}
        print(json.dumps(line | {"share_of_bandwidth_limit": written / seconds / limit}), flush=True)


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
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


def peak_flops() -> float | None:
    """Of the GPU in bfloat16, by its data sheet."""
    device = device_of()
    return get_available_flops(device, torch.bfloat16) if device.type == "cuda" else None


def main() -> None:
    """Run all phases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--shape", default="1b" if on_gpu else "tiny", choices=sorted(workload.SHAPES))
    parser.add_argument("--pairs", type=int, default=512 if on_gpu else 8)
    parser.add_argument("--batch", type=int, default=64 if on_gpu else 4, help="sequences or pairs of a micro-batch")
    parser.add_argument("--slots", type=int, default=64 if on_gpu else 4)
    parser.add_argument("--new-tokens", type=int, default=256 if on_gpu else 16)
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(json.dumps({"device": name, "torch": torch.__version__, **vars(options)}), flush=True)
    decoding(options)
    torch.cuda.empty_cache()
    for task in ("sft", "reward", "dpo_cached", "dpo"):
        training(task, options)
    options.pairs = min(options.pairs, 128)
    training("ppo", options)


if __name__ == "__main__":
    main()
