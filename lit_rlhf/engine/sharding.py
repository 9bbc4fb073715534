"""FSDP2 for the networks of a module: shard them, gather them for acting, collect full weights for an export."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method


def shard(network: nn.Module, mesh: DeviceMesh, compute: torch.dtype | None = None) -> None:
    """Shard a network over a mesh: each transformer block by itself, the rest (embeddings, head) as the root.

    Gradients are summed over ranks in float32, whatever they are made in.

    Args:
        network: a `Policy` or `Scorer`; already sharded ones are left alone.
        mesh: one-dimensional, the data-parallel ranks.
        compute: the dtype that weights are gathered in, where autocast computes in it; None = that they are held in.
    """
    if isinstance(network, FSDPModule):
        return
    model: Any = network.model
    block_names = set(model._no_split_modules or ())
    # Autocast sees to what is computed in which dtype: inputs stay as they are, and so between blocks in float32.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in network.modules():
        if type(module).__name__ in block_names:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)
    if compute is not None:
        model.get_input_embeddings().register_forward_hook(widen)
    for method in ("decode", "decode_padded", "recompute", "nll", "score", "divergence", "beside"):
        if hasattr(network, method):
            register_fsdp_forward_method(network, method)


def widen(module: nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
    """What an embedding gives, in float32, as one would give it whose weights are not gathered in less."""
    return embedded.float()


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Hold the whole weights while inside: ranks may then take different numbers of steps without waiting.

    A no-op for a network that is not sharded.
    """
    modules = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            # As FSDP2 has it: what the root holds is needed again at once, by the backward pass.
            module.set_reshard_after_forward(module is not network, recurse=False)
            module.reshard()


def full_state_dict(network: nn.Module) -> dict[str, Any]:
    """The whole weights on the CPU; every rank must call it, rank 0 gets them (the others {} if it is sharded)."""
    if not any(isinstance(module, FSDPModule) for module in network.modules()):
        return {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def is_sharded(network: nn.Module) -> bool:
    """Whether FSDP2 holds this network in pieces."""
    return isinstance(network, FSDPModule)


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm over all gradients, over all ranks if they are sharded."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
