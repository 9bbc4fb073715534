"""Contestant: this library, through its command line's own modules, data modules, callbacks and Trainer.

With `--bare`, the same forward passes, losses and AdamW in a plain loop: what Lightning, logging and callbacks cost is
the difference.
"""

import argparse
import gc
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback

import lit_rlhf.rollout.play
from benchmarks import workload
from benchmarks.rounds import clock, serve
from lit_rlhf.algorithms.preference import sequence_logprobs
from lit_rlhf.cli.main import run
from lit_rlhf.losses import bradley_terry_loss, dpo_loss
from token_mdp import TokenVectorEnv

MODULES = {"sft": "SFT", "reward": "RewardModel", "dpo": "DPO", "dpo_cached": "DPO", "ppo": "PPO", "generate": "SFT"}


class Clock(Callback):
    """Times the loop alone: set-up, tokenisation and a cache of reference log-probs come before it."""

    seconds = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start."""
        Clock.seconds = -_now()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop."""
        Clock.seconds += _now()

    on_predict_start, on_predict_end = on_train_start, on_train_end


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # kernels run behind the host
    return clock()


class ForcedLengths(TokenVectorEnv):
    """Ends each response at its prescribed length, whatever the policy says, so that all contestants write as much."""

    lengths = np.zeros(0, dtype=np.int64)  # by prompt

    def step(self, actions: np.ndarray) -> Any:
        """As the environment, with the end token where it is due and nowhere else."""
        slots = self._every_slot
        due = self._slots.response_lengths(slots) + 1 >= self.lengths[self._stream.prompt_index]
        return super().step(np.where(due, workload.EOS, np.where(actions < workload.FIRST_WORD, 3, actions)))


def write_inputs(folder: Path, task: str, shape: workload.Shape, pairs: list[workload.Pair]) -> None:
    """Models and data as files, as a user has them."""
    workload.save_model(folder / "model", shape)
    if task == "ppo":
        workload.save_model(folder / "reward_model", shape, classifier=True)
    rows = [{side: workload.as_text(ids) for side, ids in pair.items()} for pair in pairs]
    for pair in rows:  # the end token is the library's affair
        pair["chosen"], pair["rejected"] = (pair[side].removesuffix(" </s>") for side in ("chosen", "rejected"))
    if task == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    elif task in ("ppo", "generate"):
        rows = [{"prompt": row["prompt"]} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(folder: Path, task: str, options: argparse.Namespace) -> list[str]:
    """The command line of a round."""
    rows, batch = folder / "rows.jsonl", options.batch
    settings = {
        "trainer.accelerator": "cpu" if not torch.cuda.is_available() else "gpu",
        "trainer.devices": 1,
        "trainer.max_epochs": 1,
        "trainer.gradient_clip_val": 1.0,
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.limit_val_batches": 0,
        "trainer.default_root_dir": folder / "run",
        "trainer.callbacks": "benchmarks.ours.Clock",
        "model": f"lit_rlhf.{MODULES[task]}",
        "model.policy": folder / "model",
    }
    if options.precision is not None:
        settings |= {"trainer.precision": options.precision}
    if task != "generate":
        settings |= {"model.learning_rate": 1e-5, "model.lr_scheduler": "constant", "export.folder": "null"}
    if options.lora is not None:
        settings |= {"model.lora": f"{{r: {options.lora}}}"}
    if task == "dpo_cached":
        settings |= {"model.cache_reference": "true"}
    if task == "ppo":
        settings |= {
            "model.critic": folder / "reward_model",
            "model.num_minibatches": 1,
            "trainer.accumulate_grad_batches": max(1, len(ForcedLengths.lengths) // batch),
            "data": "lit_rlhf.RolloutDataModule",
            "data.train": rows,
            "data.validation": "null",
            "data.reward": "lit_rlhf.RewardModelReward",
            "data.reward.model": folder / "reward_model",
            "data.rollout_size": len(ForcedLengths.lengths),
            "data.num_slots": options.slots,
            "data.max_new_tokens": workload.MAX_NEW_TOKENS,
        }
    else:
        kind = "SFT" if task in ("sft", "generate") else "Preference"
        settings |= {"data": f"lit_rlhf.{kind}DataModule", "data.validation": "null"}
        settings |= (
            {
                "data.predict": rows,
                "model.generation.max_new_tokens": workload.MAX_NEW_TOKENS,
                "model.generation.num_slots": options.slots,
            }
            if task == "generate"
            else {"data.max_tokens": "null", "data.batch_size": batch}
        )
        settings |= {"data.train": rows}
    words = ["predict" if task == "generate" else "fit"]
    return words + [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def train_through_the_command_line(argv: list[str]) -> dict[str, Any]:
    """A round of ours."""
    metrics = run(argv).trainer.callback_metrics
    speed = {name: float(value) for name, value in metrics.items() if name.startswith("perf/")}
    return {"seconds": Clock.seconds, **speed}


def train_in_a_plain_loop(argv: list[str], task: str) -> dict[str, Any]:
    """A round of the same work without a Trainer."""
    cli = lit_rlhf.cli.main.AlignmentCLI(
        lit_rlhf.cli.main.AlignmentModule,
        lit_rlhf.cli.main.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=None,
        run=False,
        args=argv[1:],
    )
    module: Any = cli.model
    data: Any = cli.datamodule
    data.trainer = cli.trainer
    data.setup("fit")
    loader = data.train_dataloader()
    reference: dict[int, Any] = {}
    if task == "dpo_cached":
        with torch.no_grad():
            reference = {i: sequence_logprobs(module.policy, batch.packed) for i, batch in enumerate(loader)}
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
    start = _now()
    for i, batch in enumerate(loader):
        with cli.trainer.precision_plugin.forward_context():
            if task == "sft":
                loss = -module.policy(batch.packed)[0].sum() / batch.denominator
            elif task == "reward":
                chosen, rejected = module.reward_model(batch.packed, batch.packed.last_nodes).chunk(2)
                loss = bradley_terry_loss(chosen, rejected).mean()
            else:
                with torch.no_grad():
                    held = reference.get(i) or sequence_logprobs(module.frozen["reference"], batch.packed)
                loss = dpo_loss(*sequence_logprobs(module.policy, batch.packed), *held, 0.1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"seconds": _now() - start}


def main() -> None:
    """Prepare, then serve rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=sorted(MODULES))
    parser.add_argument("--shape", default="small", choices=sorted(workload.SHAPES))
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--fixed", type=int, help="length of every response, instead of the heavy tail")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", help="of the Trainer; the device's own if not given")
    parser.add_argument("--lora", type=int, help="rank of an adapter that learns in place of all weights")
    parser.add_argument("--bare", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(int(os.environ.get("BENCHMARK_THREADS", "1")))
    shape = workload.SHAPES[options.shape]
    pairs = workload.make_pairs(options.pairs, shape, options.seed)
    ForcedLengths.lengths = workload.response_lengths(options.pairs, options.seed)
    if options.fixed is not None:
        ForcedLengths.lengths[:] = options.fixed
    lit_rlhf.rollout.play.TokenVectorEnv = ForcedLengths  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, options.task, shape, pairs)
        argv = arguments(folder, options.task, options)

        def run_round() -> dict[str, Any]:
            gc.collect()  # the Trainer of the last round would count as memory of this one
            result = train_in_a_plain_loop(argv, options.task) if options.bare else train_through_the_command_line(argv)
            if torch.cuda.is_available():
                result["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
            return result

        # One batch first: memory pools, lazy imports, kernels.
        if options.task == "generate":
            lengths, ForcedLengths.lengths = ForcedLengths.lengths, np.full(options.pairs, 4)
            train_through_the_command_line([*argv, "--trainer.limit_predict_batches", "1"])
            ForcedLengths.lengths = lengths
        elif options.task != "ppo":
            train_through_the_command_line([*argv, "--trainer.limit_train_batches", "1"])
        serve(run_round)


if __name__ == "__main__":
    from benchmarks import ours  # the module whose Clock the command line imports, not its twin __main__

    ours.main()
