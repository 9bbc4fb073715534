"""Run by `test_strategies.py`: all four stages a few steps under one strategy, on two ranks; writes JSON."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_rlhf import AdaptiveKL, KLPenalty, LoRA, RewardShaping
from lit_rlhf.algorithms import reference_cache
from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.algorithms.reference_update import ReferenceUpdate
from lit_rlhf.callbacks import HuggingFaceExport
from lit_rlhf.engine import logprobs
from lit_rlhf.engine.logprobs import CHUNK_MOST
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.losses import bco_pair_loss
from lit_rlhf.models.holding import reading_in
from tests.forked_ranks import in_two_ranks
from tests.stages import ON_POLICY, STAGES, make_stage
from tests.tiny import VOCABULARY

STOPPED_PPO = {  # in its second iteration, after the critic has warmed up: see `BetweenRanks`
    "target_kl": 1.0,
    "critic_warmup": 1,
    "kl_penalty": KLPenalty("loss", "k3"),
    "shaping": RewardShaping(normalize="standardize", whiten=True),
    "gamma": 0.0,  # each token's return is its own reward
}
MOVING_DPO = {"loss": bco_pair_loss, "reference_update": ReferenceUpdate(alpha=1.0, every=2)}
# One step of the whole data set; a large epsilon keeps the size of the gradient in what AdamW does with it.
WHOLE = {"lr_scheduler": "constant", "warmup_steps": 0, "adam_eps": 0.5}
WHOLE_TRAINER: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 100}
WHOLE_DPO = WHOLE | {"reference_free": True}
WHOLE_RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole_sft": ("sft", WHOLE),
    "whole_reward_model": ("reward_model", WHOLE | {"normalize": None}),
    "whole_process_reward_model": ("process_reward_model", WHOLE),
    "whole_dpo": ("dpo", WHOLE_DPO),
    "whole_kto": ("kto", WHOLE),
    "whole_orpo": ("orpo", WHOLE),
    "whole_distillation": ("distillation", WHOLE),
    "whole_lora": ("sft", WHOLE | {"lora": LoRA(r=4), "activation_checkpointing": True}),
    "chunked_sft": ("sft", WHOLE),  # the head sees a few tokens at a time, as in a large batch
    "chunked_dpo": ("dpo", WHOLE_DPO),
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{stage: (stage, {}) for stage in STAGES},
    "reward_model": ("reward_model", {"normalize": "mean_and_std"}),
    "stopped_ppo": ("ppo", STOPPED_PPO),
    "dpo_cached": ("dpo", {"cache_reference": True}),
    "dpo_moving": ("dpo", MOVING_DPO),
    "best_reward_model": ("reward_model", {}),
    "process_reward_model": ("process_reward_model", {"lora": LoRA(r=4)}),
    # Policy, reference and critic on one base, which is held in another dtype than what learns.
    "lora_ppo": ("ppo", {"lora": LoRA(r=4), "frozen_dtype": "bfloat16", "activation_checkpointing": True}),
    "head_ppo": ("ppo", {"hold_critic": "head"}),  # one pass for two roles
    # Groups, a rollout of its own for the baseline, and groups that are dealt again by one rank more than by the other.
    **{stage: (stage, {}) for stage in ("grpo", "remax", "dapo")},
    "raft": ("raft", {}),  # some of each group are learnt from
    "online_dpo": ("online_dpo", {"reference_update": ReferenceUpdate(alpha=1.0, every=4), "loss": bco_pair_loss}),
    "on_policy_distillation": ("on_policy_distillation", {}),
    **WHOLE_RUNS,
}


class Shares(Callback):
    """Keeps the items of each micro-batch and the denominator that its loss was divided by."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note them."""
        self.seen.append((len(batch.packed.target_ids), batch.denominator.item()))


class BetweenRanks(Callback):
    """Puts the target KL between those of the ranks: above their mean at the first step that shows any, then below.

    A rank that decided by its own KL would stop too early at the one, or too late at the other.
    """

    def __init__(self) -> None:
        self.stopped: list[bool] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Before the module judges the step."""
        kls = gather(torch.stack(pl_module.step_kl).mean().item())
        mean, steps = sum(kls) / 2, len(self.stopped)
        side = max(kls) if steps == 5 else min(kls)
        target_kl = (mean + side) / 2 if steps > 4 else 1.0
        pl_module.updates = replace(pl_module.updates, target_kl=target_kl)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """What the module made of it."""
        self.stopped.append(pl_module.stopped)


class Hears(AdaptiveKL):
    """Keeps what the controller is told."""

    def __init__(self) -> None:
        super().__init__(0.1, target=0.5, horizon=100)
        self.heard: list[tuple[float, int]] = []

    def update(self, kl: float, num_episodes: int) -> None:
        """Note it and adapt."""
        self.heard.append((kl, num_episodes))
        super().update(kl, num_episodes)


def parts_of_rank_0(parts: reference_cache.Parts, num_rows: int) -> torch.Tensor:
    """As after a kill that left the parts of one rank alone; its zeros would show if that rank used them."""
    return torch.full((num_rows, 2), 0.0 if dist.get_rank() == 0 else float("nan"))


def outcome(trainer: Trainer, module: AlignmentModule) -> dict[str, Any]:
    """Last metrics and what the exported weights sum to."""
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    weights = full_state_dict(module.exportable())
    checksum = sum(float(w.double().abs().sum()) for w in weights.values())
    held_in = sorted({str(parameter.dtype) for parameter in module.parameters()})
    return {"metrics": metrics, "steps": trainer.global_step, "checksum": checksum, "held_in": held_in}


def gather(mine: Any) -> list[Any]:
    """What each rank has."""
    ranks: list[Any] = [None, None]
    dist.all_gather_object(ranks, mine)
    return ranks


def main(folder: Path, name: str, runs: Sequence[str]) -> None:
    """Fit each of these runs, or all; rank 0 writes what came out."""
    reference_cache.Parts.load = parts_of_rank_0  # type: ignore[method-assign]
    results: dict[str, Any] = {}
    for run in runs or RUNS:
        stage, options = RUNS[run]
        seed_everything(0, verbose=False)  # FSDP2 shards what each rank has drawn, as the CLI's runs do
        # Left to itself, this strategy takes both processes for one tensor-parallel group and shards nothing.
        sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        strategy: Any = "ddp" if name == "ddp" else sharded
        with reading_in(torch.float32, uncut=name == "fsdp2_uncut"):  # as the command line does for this strategy
            module, data = make_stage(stage, folder, **options)
        if stage in ON_POLICY:
            module.kl = Hears()  # type: ignore[assignment]
        shares, between = Shares(), BetweenRanks()
        first = ModelCheckpoint(filename="{epoch}", monitor="epoch", mode="min", save_top_k=-1)  # the first is the best
        watching: dict[str, list[Callback]] = {"stopped_ppo": [between], "best_reward_model": [first]}
        logprobs.CHUNK_MOST = 4 * VOCABULARY * 7 if run.startswith("chunked") else CHUNK_MOST
        options = WHOLE_TRAINER if run in WHOLE_RUNS else {"max_epochs": 2, "gradient_clip_val": 1.0}
        precision = "bf16-mixed" if name == "fsdp2_bf16" else "32-true"
        trainer = Trainer(
            default_root_dir=folder / name / run,
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            callbacks=[HuggingFaceExport(), shares, *watching.get(run, [])],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            enable_checkpointing=run == "best_reward_model",
            logger=False,
            precision=precision,
            **options,
        )
        trainer.fit(module, data)
        results[run] = outcome(trainer, module)
        if stage in ON_POLICY:
            loader: Any = trainer.train_dataloader
            results[run]["shares"] = gather(shares.seen)
            for column in {"advantages", "returns"} & loader.experience.tokens.keys():
                results[run][column] = gather(torch.cat(loader.experience.tokens[column]).tolist())
            results[run]["prompts"] = gather([ids.tolist() for ids in loader.experience.prompt_ids])
            mine = {
                "stopped": between.stopped,
                "heard": module.kl.heard,
                "seen": module.shaping.state_dict()["seen"],
                "rollout": module.rollout_metrics,
                "returns": module.returns_seen.mean.item(),
            }
            results[run]["of_all"] = gather(mine)
            own_weights = sum(float(w.double().sum()) for w in module.state_dict().values())
            results[run]["own_weights"] = gather(own_weights) if name == "ddp" else None
        if run == "dpo_moving":
            results[run]["shift"] = gather([module.loss.shift.mean.item(), module.loss.shift.pairs_seen.item()])
            networks = (full_state_dict(network) for network in (module.policy, module.reference))
            results[run]["apart"] = [
                float((a.double() - b.double()).abs().sum())
                for a, b in zip(*(n.values() for n in networks), strict=True)
            ]
    if trainer.is_global_zero:
        (folder / f"{name}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    sys.exit(in_two_ranks(main, Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
