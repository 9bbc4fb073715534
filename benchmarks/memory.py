"""Tensor memory of each stage, planned and then taken, full and with LoRA; a JSON line per row, then a table.

    python -m benchmarks.memory
    python -m benchmarks.memory --peer-python /path/to/python/with/trl --peer-ppo-python /path/to/python/with/trl/1.12

Planned is what `lit-rlhf plan` says of the same command line. Taken is the peak of torch's profiler, which hears of
each allocation, over what the weights took before. Every row is a process of its own; the run is two optimiser steps,
and once more without the profiler for the time that they take.

With a peer, rows of `PEERS` are of its batches, `--batch` sequences or pairs, and are timed beside it in rounds, each
contestant in turn; of several settings the fastest of each counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.profiler import ProfilerActivity, profile

from benchmarks import compare, workload
from benchmarks.ours import MODULES, write_inputs
from benchmarks.rounds import ROOT, Contestant, conditions, print_table
from lit_rlhf.callbacks.performance import dtype_of_precision, measured_flops
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
OURS = {"ours": [], "ours, bfloat16": ["--precision", "bf16-mixed"]}
PEERS: dict[str, dict[str, list[str]]] = {  # of a row, the settings of TRL that it may be fastest in
    "sft_lora": {
        "float32": ["--tuned"],
        "packing": ["--tuned", "--packing"],
        "packing, bfloat16": ["--tuned", "--packing", "--bf16"],
    },
    "dpo_lora": {"float32": ["--tuned"], "bfloat16": ["--tuned", "--bf16"]},
    "ppo": {"float32": ["--tuned"], "bfloat16": ["--tuned", "--bf16"]},
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
        if options.alike and row in PEERS:
            settings |= {"data.max_tokens": "null", "data.batch_size": options.batch}
        else:
            settings |= {"data.max_tokens": options.max_tokens}
    first = {name: settings.pop(name) for name in ("model", "data")}
    if row == "ppo_head":
        more = [*more, "--model.hold_reference=parked"]
    return [f"--{key}={value}" for key, value in (first | settings).items()] + more


class Taken(Callback):
    """What the networks took before `fit`, and from there on each allocation, by torch's profiler."""

    profiler: Any = None
    profiles = True
    held = 0
    since = seconds = 0.0
    tokens = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Weights are there; none of their gradients is."""
        rewards = getattr(trainer.datamodule, "rewards", None)
        networks = [*pl_module.networks(), *([] if rewards is None else rewards.networks())]
        Taken.held = bytes_of(p for network in networks for p in network.parameters())
        Taken.seconds, Taken.tokens = 0.0, 0
        if Taken.profiles:
            Taken.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            Taken.profiler.start()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """No more of it."""
        if Taken.profiles:
            Taken.profiler.stop()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Its tokens are learnt from."""
        Taken.since = time.process_time()
        Taken.tokens += batch.packed.input_ids.numel()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """And were."""
        Taken.seconds += time.process_time() - Taken.since


def taken(argv: list[str]) -> int:
    """Bytes at the peak of a run; then the same run is timed."""
    argv = ["fit", *argv, "--trainer.callbacks=benchmarks.memory.Taken"]
    run(argv)
    Taken.profiles = False
    run(argv)
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
        cli, found = rehearsed(argv)
        planned = max(found.peaks.values())
        dtype = dtype_of_precision(cli.options["precision"])
        rate = measured_flops(torch.device("cpu"), dtype, time.process_time)
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
        "planned_seconds": found.flops / rate,  # of the heaviest micro-batch, at the rate of a product of matrices
        "seconds": found.tokens * Taken.seconds / Taken.tokens,
        "phases": {phase: round(size / 1e6, 1) for phase, size in found.peaks.items()},
    }


def beside_peer(row: str, python: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of ours and of the peer at its fastest, in turns, and what its tensors take then."""
    task = ROWS[row][0]
    words = ["--task", task, *common(options, "shape", "pairs", "batch", "seed")]
    words += ["--lora", "8"] if row.endswith("_lora") else []
    peer = [python, "-m", "benchmarks.peer_trl", *words]
    commands = {name: [sys.executable, "-m", "benchmarks.ours", *words, *more] for name, more in OURS.items()}
    commands |= {setting: [*peer, *more] for setting, more in PEERS[row].items()}
    players = {name: Contestant(name, command, threads=1) for name, command in commands.items()}
    for number in range(options.rounds):
        for name, player in players.items():
            print(json.dumps({"row": row, "contestant": name, "round": number, **player.play()}), flush=True)
    for player in players.values():
        player.close()
    times = {name: [result["seconds"] for result in player.results] for name, player in players.items()}
    of_each = {name: statistics.median(seconds) for name, seconds in times.items()}
    mine = min(OURS, key=of_each.__getitem__)
    setting = min(PEERS[row], key=of_each.__getitem__)
    tokens = compare.useful_tokens(task, options)
    response = ["--response", str(workload.MAX_NEW_TOKENS // 2)] if task == "ppo" else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "envs")]), "OMP_NUM_THREADS": "1"}
    held = json.loads(answer([*peer, *PEERS[row][setting], *response, "--memory"], environment))
    return {
        "setting": mine,
        "tokens_per_second": tokens / of_each[mine],
        "peer_setting": setting,
        "peer_tokens_per_second": tokens / of_each[setting],
        "peer_tensor_mb": held["tensor_mb"],
        "speedup": statistics.median(theirs / ours for theirs, ours in zip(times[setting], times[mine], strict=True)),
        "speedups": {name: seconds / of_each["ours"] for name, seconds in of_each.items()},  # of ours as it is
    }


def common(options: argparse.Namespace, *names: str) -> list[str]:
    """These options as words."""
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]


def answer(command: list[str], environment: dict[str, str] | None = None) -> str:
    """The last line that a process prints."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} died ({done.returncode}):\n{done.stderr[-3000:]}")
    return done.stdout.splitlines()[-1]


def main() -> None:
    """Each row in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=sorted(ROWS), help="this one alone, in this process")
    parser.add_argument("--shape", default="small", choices=sorted(workload.SHAPES))
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="episodes of a minibatch of PPO")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a micro-batch of the others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer-python", default=os.environ.get("PEER_PYTHON"), help="has TRL 1.16; or $PEER_PYTHON")
    parser.add_argument("--peer-ppo-python", default=os.environ.get("PEER_PPO_PYTHON"), help="has TRL 1.12")
    parser.add_argument("--rounds", type=int, default=3, help="of ours and the peer")
    parser.add_argument("--only", nargs="*", choices=sorted(ROWS), help="these rows alone")
    parser.add_argument("--alike", action="store_true", help="rows of `PEERS` in batches as the peer takes them")
    options = parser.parse_args()
    pythons = {"sft_lora": options.peer_python, "dpo_lora": options.peer_python, "ppo": options.peer_ppo_python}
    if options.row is not None:
        print(json.dumps(measure(options.row, options)), flush=True)
        return
    names = ("shape", "pairs", "batch", "max_tokens", "seed")
    conditions(**{name: getattr(options, name) for name in names}, rounds=options.rounds, **peer_versions(pythons))
    lines = []
    for row in options.only or ROWS:
        python = pythons.get(row)
        alike = ["--alike"] if python else []
        command = [sys.executable, "-m", "benchmarks.memory", "--row", row, *common(options, *names), *alike]
        lines.append(json.loads(answer(command)))
        if python:
            lines[-1] |= beside_peer(row, python, options)
        print(json.dumps(lines[-1]), flush=True)
    columns = ("stage", "roles", "taken, MB", "planned, MB", "planned / taken - 1", "tokens/s of learning", "time")
    keys = ("stage", "roles", "tensor_mb", "planned_mb", "gap", "tokens_per_second")
    share = [line["planned_seconds"] / line["seconds"] for line in lines]
    rows = [[*(line[key] for key in keys), f"{part:.0%}"] for line, part in zip(lines, share, strict=True)]
    print_table("tensor memory, and the planned part of the time taken", columns, rows)
    peers = [line for line in lines if "speedup" in line]
    if peers:
        columns = ("row", "setting", "tokens/s", "TRL", "its setting", "ours is faster by", "tensors, MB", "TRL's")
        keys = ("row", "setting", "tokens_per_second", "peer_tokens_per_second", "peer_setting", "speedup", "tensor_mb")
        print_table("beside TRL", columns, [[line[key] for key in (*keys, "peer_tensor_mb")] for line in peers])


def peer_versions(pythons: dict[str, str | None]) -> dict[str, str]:
    """What the peers' Pythons have."""
    ask = "from importlib.metadata import version as v; print('trl', v('trl'), 'torch', v('torch'))"
    return {f"peer_{row}": answer([python, "-c", ask]) for row, python in pythons.items() if python}


if __name__ == "__main__":
    from benchmarks import memory  # the module whose callback the command line imports, not its twin __main__

    memory.main()
