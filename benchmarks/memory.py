"""Tensor memory of each stage, planned and then taken, full and with LoRA; a JSON line per row, then a table.

    python -m benchmarks.memory

Planned is what `lit-rlhf plan` says of the same command line. Taken is the peak of torch's profiler, which hears of
each allocation, over what the weights took before. Every row is a process of its own; the run is two optimiser steps.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile

from benchmarks import workload
from benchmarks.ours import MODULES, write_inputs
from benchmarks.rounds import conditions, print_table
from lit_rlhf.cli.main import AlignmentCLI, run
from lit_rlhf.cli.plan import rehearsed
from lit_rlhf.engine.memory import bytes_of

LORA = "{r: 8}"
ROWS = {  # stage, what its roles are, options
    "sft": ("sft", "full", []),
    "sft_lora": ("sft", "adapter", [f"--model.lora={LORA}"]),
    "reward": ("reward", "full", []),
    "reward_lora": ("reward", "adapter", [f"--model.lora={LORA}"]),
    "dpo": ("dpo", "policy, copy", []),
    "dpo_lora": ("dpo", "one base", [f"--model.lora={LORA}"]),
    "ppo": ("ppo", "policy, copy, critic, reward model", []),
    "ppo_head": ("ppo", "policy with critic's head, parked copy", ["--model.hold_critic=head"]),
    "ppo_lora": ("ppo", "one base, reward by a function", [f"--model.lora={LORA}"]),
}


def count(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that takes no memory."""
    return [float(len(response)) for response in responses]


def arguments(folder: Path, row: str, options: argparse.Namespace) -> list[str]:
    """The command line of a row, without its command."""
    stage, _, more = ROWS[row]
    settings: dict[str, Any] = {
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": 2,
        "trainer.gradient_clip_val": 1.0,
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.limit_val_batches": 0,
        "trainer.logger": "false",
        "trainer.default_root_dir": folder / "run",
        "model": f"lit_rlhf.{MODULES[stage]}",
        "model.policy": folder / "model",
        "model.learning_rate": 1e-5,
        "model.lr_scheduler": "constant",
        "export.folder": "null",
        "data.train": folder / "rows.jsonl",
        "data.validation": "null",
    }
    if stage == "ppo":
        reward = (
            {"data.reward": "lit_rlhf.RewardModelReward", "data.reward.model": folder / "reward_model"}
            if row == "ppo"
            else {"data.reward": "benchmarks.memory.count"}
        )
        settings |= {
            "model.num_minibatches": 2,
            "data": "lit_rlhf.RolloutDataModule",
            **reward,
            "data.rollout_size": 2 * options.batch,
            "data.num_slots": options.batch,
            "data.max_new_tokens": workload.MAX_NEW_TOKENS // 2,
        }
    else:
        settings |= {"data": f"lit_rlhf.{'SFT' if stage == 'sft' else 'Preference'}DataModule"}
        settings |= {"data.max_tokens": options.max_tokens}
    first = {name: settings.pop(name) for name in ("model", "data")}
    if row == "ppo_head":
        more = [*more, "--model.hold_reference=parked"]
    return [f"--{key}={value}" for key, value in (first | settings).items()] + more


class Taken(Callback):
    """What the networks took before `fit`, and from there on each allocation, by torch's profiler."""

    profiler: Any = None
    held = 0
    since = seconds = 0.0
    tokens = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Weights are there; none of their gradients is."""
        rewards = getattr(trainer.datamodule, "rewards", None)
        networks = [*pl_module.networks(), *([] if rewards is None else rewards.networks())]
        Taken.held = bytes_of(p for network in networks for p in network.parameters())
        Taken.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        Taken.profiler.start()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """No more of it."""
        Taken.profiler.stop()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Its tokens are learnt from."""
        Taken.since = time.process_time()
        Taken.tokens += batch.packed.input_ids.numel()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """And were."""
        Taken.seconds += time.process_time() - Taken.since


def taken(argv: list[str]) -> int:
    """Bytes at the peak of a run."""
    run(["fit", *argv, "--trainer.callbacks=benchmarks.memory.Taken"])
    now = peak = Taken.held
    for event in Taken.profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def measure(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    torch.set_num_threads(1)
    shape = workload.SHAPES[options.shape]
    stage, roles, _ = ROWS[row]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, stage, shape, workload.make_pairs(options.pairs, shape, options.seed))
        argv = arguments(folder, row, options)
        _, found = rehearsed(argv)
        planned = max(found.peaks.values())
        peak = taken(argv)
    assert AlignmentCLI.root is not None
    return {
        "stage": stage,
        "roles": roles,
        "row": row,
        "tensor_mb": peak / 1e6,
        "planned_mb": planned / 1e6,
        "gap": planned / peak - 1,
        "weights_mb": Taken.held / 1e6,
        "tokens_per_second": Taken.tokens / Taken.seconds,
        "phases": {phase: round(size / 1e6, 1) for phase, size in found.peaks.items()},
    }


def main() -> None:
    """Each row in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=sorted(ROWS), help="this one alone, in this process")
    parser.add_argument("--shape", default="small", choices=sorted(workload.SHAPES))
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="episodes of a minibatch of PPO")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a micro-batch of the others")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.row is not None:
        print(json.dumps(measure(options.row, options)), flush=True)
        return
    given = {name: getattr(options, name) for name in ("shape", "pairs", "batch", "max_tokens", "seed")}
    conditions(**given)
    lines = []
    for row in ROWS:
        words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", "--row", row, *words], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{row} died ({done.returncode}):\n{done.stderr[-3000:]}")
        lines.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(lines[-1]), flush=True)
    columns = ("stage", "roles", "taken, MB", "planned, MB", "planned / taken - 1", "tokens/s of learning")
    keys = ("stage", "roles", "tensor_mb", "planned_mb", "gap", "tokens_per_second")
    print_table("tensor memory", columns, [[line[key] for key in keys] for line in lines])


if __name__ == "__main__":
    from benchmarks import memory  # the module whose callback the command line imports, not its twin __main__

    memory.main()
