"""Tiny policies with adapters that have moved from where they started."""

import torch

from lit_rlhf.models.adapters import Adapters, LoRA
from lit_rlhf.models.policy import Policy
from tests.tiny import tiny_model

KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def linear_names(architecture: str) -> list[str]:
    """The ends of the names of all linear layers, the head's included."""
    modules = tiny_model(architecture).named_modules()
    return sorted({name.rpartition(".")[2] for name, m in modules if type(m).__name__ in ("Linear", "Conv1D")})


def adapted_policy(architecture: str = "llama", kind: str = "lora", **options) -> Policy:
    """A policy whose every linear layer has an adapter."""
    policy = Policy(tiny_model(architecture))
    policy.adapters = Adapters(policy.model, "base")
    settings = {"r": 4, "alpha": 2.0, "target_modules": linear_names(architecture)} | KINDS[kind] | options
    policy.adapters.add("policy", LoRA(**settings).config("base", "CAUSAL_LM"))
    policy.active = ("policy",)
    move(policy, "policy")
    return policy


def move(network, name: str, seed: int = 1, by: float = 0.1) -> None:
    """Let an adapter be as if it had learnt."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.adapters.parameters(name):
        parameter.data += by * torch.randn(parameter.shape, generator=generator)


def relative(ours: torch.Tensor, own: torch.Tensor) -> float:
    """The distance of two tensors, as a share of the length of the second."""
    return float((ours - own).detach().norm() / own.detach().norm())
