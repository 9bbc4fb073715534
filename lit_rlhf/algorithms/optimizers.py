"""The optimiser by its name: AdamW of torch, or that of bitsandbytes, which keeps its moments in 8 bits."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from lit_rlhf.algorithms.settings import OptimizerSettings
from lit_rlhf.models.holding import require_bitsandbytes


def make_optimizer(
    settings: OptimizerSettings, groups: list[dict[str, Any]], modules: Iterable[nn.Module], fused: bool
) -> Optimizer:
    """An optimiser of these groups.

    Args:
        settings: the optimiser's.
        groups: of parameters, with learning rates and decay.
        modules: those that are trained, in which embeddings are told from other matrices.
        fused: one kernel for the whole step, where torch makes it.
    """
    shared: dict[str, Any] = {"betas": settings.adam_betas, "eps": settings.adam_eps}
    if settings.optimizer == "adamw":
        return AdamW(groups, **shared, fused=fused)
    bitsandbytes = require_bitsandbytes("optimizer: adamw_8bit")
    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(groups, **shared)
    # Few tokens of a batch touch a row of an embedding, so that its moments differ by more than 8 bits hold; as in
    # transformers, they stay in 32 (Dettmers et al. 2022, section 2.3, https://arxiv.org/abs/2110.02861).
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in modules:
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer
