"""What networks in every role have in common: a model, what was found out about it, and the adapters on it."""

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_rlhf.engine.linear_head import compute_dtype
from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.engine.rounding import add_rows, drop_rows, missing_rows
from lit_rlhf.models.adapter_folders import Origin
from lit_rlhf.models.adapters import Adapters
from lit_rlhf.models.checkpointing import Checkpointing
from lit_rlhf.models.fingerprints import Fingerprints
from lit_rlhf.models.trunk import packed_outputs


class Network(nn.Module):
    """A Hugging Face model in a role; what was found out about it when it was loaded stands here (see `probe.py`).

    Args:
        model: with its head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.quiet = False  # stays in evaluation mode while it learns: training mode would draw random numbers
        self.adapters: Adapters | None = None  # where its own weights are a frozen base
        self.active: tuple[str, ...] = ()  # the adapters that are on in this network's own role
        self.origin: Origin | None = None  # of the adapter that learns
        self.read_from: tuple[str, ...] = ()  # folders and hub names of the weights that it was made of
        self.stands_on: Fingerprints = {}  # those among them whose weights no checkpoint holds
        self.checkpointing: Checkpointing | None = None  # of activations
        self.balanced = False  # whether a load-balancing loss of its experts is trained
        self.routers: tuple[Tensor, ...] = ()  # (N, E) router logits by layer, of the last pass that it learns from
        # What pieces will be held in, where its weights are shared with files or other networks until they are cut.
        self.uncut: torch.dtype | None = None
        self.register_state_dict_post_hook(without_base)
        self.register_load_state_dict_pre_hook(with_base)

    def train(self, mode: bool = True) -> Self:
        """As of any module, but that a model which must be quiet never enters training mode."""
        super().train(mode)
        if self.quiet:
            self.model.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """As of any module, but that buffers which no folder holds keep their dtype, as where transformers loads them.

        Of rotary frequencies in bfloat16, every position past a few hundred would be another one.
        """
        held = [
            (module, name, module._buffers[name])
            for module in self.modules()
            for name in module._non_persistent_buffers_set
        ]
        super()._apply(fn, recurse)
        for module, name, before in held:
            after = module._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                module._buffers[name] = before.to(after.device)
        return self

    def switch(self, adapters: Sequence[str] | None = None) -> None:
        """Start a pass: let these adapters be on; None = those of the network's own role."""
        if self.adapters is not None:
            self.adapters.switch(self.active if adapters is None else adapters)
        if self.checkpointing is not None:
            self.checkpointing.switch()

    def read(self, batch: PackedBatch, learns: bool = True) -> Tensor:
        """(N, d) last hidden states; where experts are to be balanced, what their routers gave is kept.

        Args:
            batch: N nodes.
            learns: whether this is a pass of the network's own role.
        """
        asked = {"output_router_logits": True} if self.balanced and learns and torch.is_grad_enabled() else {}
        hidden, routers = packed_outputs(self.model, batch.input_ids, batch.position_ids, batch.layout, **asked)
        if asked:
            self.routers = routers
        return hidden

    def settle(self) -> None:
        """Hold pieces in the dtype that they learn in, once they are cut; weights in half precision widen exactly."""
        if self.uncut == torch.float32:
            self.float()
        self.uncut = None

    def checkpoint_activations(self) -> None:
        """Compute blocks twice from now on, rather than keep what their gradients are made of."""
        self.checkpointing = Checkpointing(self.model, self.adapters, self.quiet)


def without_base(network: Network, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Leave weights that never learn out of a state dict: a frozen base, and other roles' frozen adapters and heads."""
    if network.adapters is not None:
        trained = {f"{prefix}{name}" for name, parameter in network.named_parameters() if parameter.requires_grad}
        for name in [name for name in state if name.startswith(prefix) and name not in trained]:
            del state[name]


def with_base(network: Network, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Weights that a state dict leaves out, see `without_base`, stay as they are."""
    if network.adapters is not None:
        for part, module in network.named_modules(remove_duplicate=False):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and not tensor.requires_grad and name not in module._non_persistent_buffers_set:
                    state.setdefault(f"{prefix}{part}.{name}", tensor)


class AdaptedHead:
    """A head with adapters, which are those of its first pass whenever chunks of its logits are made anew."""

    def __init__(self, layer: Any, adapters: Adapters) -> None:
        self.layer, self.adapters, self.on = layer, adapters, adapters.on
        self.out_features = layer.out_features

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., d) to (..., V)."""
        assert self.on is not None
        self.adapters.switch(self.on)
        return cast(Tensor, self.layer(hidden))


def scalar(linear: nn.Linear, hidden: Tensor) -> Tensor:
    """(n, d) to (n,) float32, by a head that learns in float32 on whatever the trunk is held in."""
    hidden = hidden.to(linear.weight.dtype)
    more = missing_rows(len(hidden), compute_dtype(hidden), hidden.device)
    return drop_rows(cast(Tensor, linear(add_rows(hidden, more))), more).squeeze(-1).float()


class ScalarHead(nn.Module):
    """A scalar head on another network's trunk.

    Args:
        linear: hidden states to one score.
        adapters: those that are on in the trunk when it is read.
        bias: added to the scores.
    """

    def __init__(self, linear: nn.Linear, adapters: Sequence[str] = (), bias: float = 0.0) -> None:
        super().__init__()
        self.linear, self.adapters, self.bias = linear, tuple(adapters), bias

    def forward(self, hidden: Tensor) -> Tensor:
        """(n, d) to (n,) float32."""
        return scalar(self.linear, hidden) + self.bias
