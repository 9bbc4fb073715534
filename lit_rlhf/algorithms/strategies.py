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


def check_strategy(trainer: Trainer) -> None:
    """Refuse a strategy that a run would go wrong under, before anything is set up for it.

    Raises:
        UserError: FSDP1, which rollouts, chunks of the head and exports do not know; ZeRO-3, likewise; ZeRO with
            options whose steps would not be those of one device.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise UserError(f"trainer.strategy (fsdp) is FSDP1, which is not supported: use {FSDP2}")
    if not isinstance(strategy, DeepSpeedStrategy):
        return
    config: dict[str, Any] = strategy.config or {}
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 or zero.get("offload_optimizer") or zero.get("offload_param"):
        raise UserError(
            f"trainer.strategy (deepspeed) cuts or offloads more than ZeRO-2 does, which is not supported: use "
            f"{FSDP2}, or deepspeed_stage_2"
        )
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


def holds_pieces(trainer: Trainer) -> bool:
    """Whether ranks hold pieces of weights, or of what the optimiser makes of them."""
    return isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy | DeepSpeedStrategy)


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
