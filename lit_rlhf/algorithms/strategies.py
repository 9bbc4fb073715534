"""What strategies of Lightning's hold, and how DeepSpeed's steps are followed."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_rlhf.errors import UserError
from lit_rlhf.models.network import Network
from lit_rlhf.models.weights import stored_dtype

FSDP2 = "lightning.pytorch.strategies.ModelParallelStrategy (FSDP2)"
FSDP1_REFUSED = f"trainer.strategy (fsdp) is FSDP1, which is not supported: use {FSDP2}"
BEYOND_ZERO_2_REFUSED = (
    f"trainer.strategy (deepspeed) cuts or offloads more than ZeRO-2 does, which is not supported: use {FSDP2}, or "
    "deepspeed_stage_2"
)


def check_named_strategy(strategy: Any, devices: Any = "auto") -> None:
    """Refuse by its name what `check_strategy` would: to make it may take a package or a GPU that is not there.

    Args:
        strategy: as a config has it: a name, or a mapping of class_path and init_args.
        devices: likewise; a number, a list, or a word.

    Raises:
        UserError: FSDP1, more of DeepSpeed than ZeRO-2, or one device where several were asked for.
    """
    kind, options = name_and_options(strategy)
    if kind.startswith("fsdp"):
        raise UserError(FSDP1_REFUSED)
    wants = any(options.get(name) for name in ("offload_optimizer", "offload_parameters", "remote_device"))
    if kind.startswith("deepspeed") and (wants or options.get("stage") == 3 or "stage_3" in kind or "offload" in kind):
        raise UserError(BEYOND_ZERO_2_REFUSED)
    several = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 1
    if kind in ("single_device", "singledevicestrategy") and several > 1:
        raise UserError(
            f"trainer.strategy ({kind}) takes one device, and trainer.devices ({devices}) asks for {several}: use ddp, "
            "or trainer.devices: 1"
        )


def name_and_options(strategy: Any) -> tuple[str, Mapping[str, Any]]:
    """Of a strategy as a config has it: its name or that of its class, in small letters, and the arguments given."""
    if isinstance(strategy, str):
        return strategy.rpartition(".")[2].lower(), {}
    given = strategy if isinstance(strategy, Mapping) else vars(strategy)
    name, options = str(given.get("class_path")).rpartition(".")[2].lower(), given.get("init_args") or {}
    return name, options if isinstance(options, Mapping) else vars(options)


def check_strategy(trainer: Trainer) -> None:
    """Refuse a strategy that a run would go wrong under, before anything is set up for it.

    Raises:
        UserError: FSDP1, which rollouts, chunks of the head and exports do not know; ZeRO-3, likewise; ZeRO with
            options whose steps would not be those of one device.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise UserError(FSDP1_REFUSED)
    if not isinstance(strategy, DeepSpeedStrategy):
        return
    config: dict[str, Any] = strategy.config or {}
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 or zero.get("offload_optimizer") or zero.get("offload_param"):
        raise UserError(BEYOND_ZERO_2_REFUSED)
    if trainer.accumulate_grad_batches > 1:
        raise UserError(
            f"trainer.accumulate_grad_batches ({trainer.accumulate_grad_batches}): DeepSpeed would divide gradients by "
            "it twice and carry them over the end of an epoch; take larger micro-batches (data.max_tokens, or fewer "
            f"minibatches of PPO), or {FSDP2}"
        )
    if str(trainer.precision).startswith("16"):
        raise UserError(f"trainer.precision ({trainer.precision}) is not supported with DeepSpeed: use bf16-mixed")
    # Of its log alone; Lightning would look for it in a loader that has a batch size.
    config.setdefault("train_micro_batch_size_per_gpu", 1)


def check_tensor_parallel(group: int, ranks: int) -> None:
    """Refuse groups of ranks that would share tensors, and so do the same work.

    Args:
        group: ranks of each.
        ranks: of the run.
    """
    if group > 1:
        raise UserError(
            f"trainer.strategy: tensor_parallel_size is {group}, so that {group} ranks would do the same work; "
            f"tensor parallelism is not supported, set tensor_parallel_size: 1 and data_parallel_size: {ranks}"
        )


def cuts_networks(trainer: Trainer) -> bool:
    """Whether ranks hold pieces of all networks (FSDP2), or a plan stands for such a run."""
    return isinstance(trainer.strategy, ModelParallelStrategy) or getattr(trainer.strategy, "stands_for_pieces", False)


def holds_pieces(trainer: Trainer) -> bool:
    """Whether ranks hold pieces of weights, or of what the optimiser makes of them."""
    return cuts_networks(trainer) or isinstance(trainer.strategy, DeepSpeedStrategy)


def steps_by_itself(trainer: Trainer) -> bool:
    """Whether gradients are summed, clipped and gone within the strategy's own step: no parameter has any before it."""
    return isinstance(trainer.strategy, DeepSpeedStrategy)


def norm_of_own_step(trainer: Trainer) -> Tensor:
    """Of the gradients before clipping, after a step of such a strategy."""
    engine: Any = trainer.strategy.model
    return torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32)


def tell_read_whole(networks: Mapping[str, nn.Module]) -> None:
    """Say which networks each rank has held whole before they are cut: their weights are no pages of files.

    Args:
        networks: by their roles, not cut yet.
    """
    whole = [
        role
        for role, network in networks.items()
        if isinstance(network, Network)
        and (network.uncut is None or network.model.dtype != stored_dtype(network.model))
    ]
    if whole:
        rank_zero_info(
            f"each rank has held all weights of {', '.join(whole)} before it keeps its piece: they were drawn, cast, "
            "merged or normed as they were read, or by another way than the command line's (docs/memory.md)"
        )
