"""Adapters of PEFT on one frozen base: what a run asks for, which there are, and which of them are on.

PEFT puts its layers into the model (`inject_adapter_in_model`) and computes in them. Several roles may stand on one
base: each forward pass says which adapters are on, and none changes which of them learn.
"""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_rlhf.errors import UserError, named_by, require, require_types
from lit_rlhf.models.adapter_layers import ALL_LINEAR, candidates, leave_out, regex_fault, require_layers, scalar_head
from lit_rlhf.models.heads import OF_RESPONSES, OF_STEPS

PLAIN_NAME = re.compile(r"\w+(\.\w+)*")
MOST_RANK = 2**16  # no layer is as wide


@dataclass(frozen=True)
class LoRA:
    """Train a low-rank adapter in place of the weights W, which are frozen: W + (alpha / r) B A.

    Hu et al. 2021, https://arxiv.org/abs/2106.09685. By PEFT, whose options these are, by the names of the papers.

    Args:
        r: rank of A and B.
        alpha: with r, the factor on B A.
        dropout: of what A is given, in training; for SFT and reward models alone, since PPO's ratio and DPO's log-ratio
            compare two passes of one network. The responses of a pair share it in the prompt that they share.
        target_modules: the layers, by the end of their name or a list of ends, or by a regular expression of whole
            names; all-linear = every linear layer but the head.
        exclude_modules: layers among them that get none, likewise.
        use_rslora: the factor is alpha / √r (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        use_dora: learn magnitudes of the columns apart (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
        init: of A: "default" is uniform as in Kaiming, "gaussian" normal; B starts as 0: nothing is changed yet.
        rank_pattern: another r by the end, or a regular expression, of a layer's name.
        alpha_pattern: another alpha, likewise.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    exclude_modules: str | list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init: Literal["default", "gaussian"] = "default"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what is no adapter."""
        with named_by("lora"):
            require_types(type(self), vars(self))
        require(1 <= self.r <= MOST_RANK, "lora.r", self.r, f"1 to {MOST_RANK}")
        require(0 < self.alpha < float("inf"), "lora.alpha", self.alpha, "more than 0 and finite")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "in [0, 1)")
        require(bool(self.target_modules), "lora.target_modules", self.target_modules, "all-linear, or names of layers")
        ranks = all(1 <= r <= MOST_RANK for r in self.rank_pattern.values())
        require(ranks, "lora.rank_pattern", self.rank_pattern, f"1 to {MOST_RANK}")
        positive = all(0 < alpha < float("inf") for alpha in self.alpha_pattern.values())
        require(positive, "lora.alpha_pattern", self.alpha_pattern, "more than 0 and finite")
        for option in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            given = getattr(self, option)
            for pattern in [given] if isinstance(given, str) else given or ():
                fault = regex_fault(pattern)
                require(fault is None, f"lora.{option}", pattern, f"a name or a regular expression ({fault})")
        for option in ("target_modules", "exclude_modules"):
            given = getattr(self, option)
            if isinstance(given, str) and PLAIN_NAME.fullmatch(given):  # of which PEFT would make a pattern
                object.__setattr__(self, option, [given])

    def config(self, base: str, task_type: str) -> Any:
        """The same as PEFT's `LoraConfig`.

        Args:
            base: folder or hub name of the frozen model.
            task_type: of PEFT: CAUSAL_LM, or one whose scalar head is trained and saved as a whole, see `heads.py`.
        """
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules),
            exclude_modules=self.exclude_modules,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=True if self.init == "default" else self.init,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            base_model_name_or_path=base,
            task_type=task_type,
        )


def refuse_dropout(lora: LoRA | None, stage: str) -> None:
    """Refuse dropout where two passes of the same network must agree."""
    if lora is not None and lora.dropout > 0:
        raise UserError(
            f"lora.dropout ({lora.dropout}) must be 0 in {stage}: it compares passes of the policy with each other, "
            "and dropout would make them differ by chance; SFT and reward models take it"
        )


class Adapters:
    """The adapters in a model, by name; its own weights are frozen.

    Args:
        model: whose weights they are put beside.
        base: folder or hub name that the model came from.
    """

    def __init__(self, model: PreTrainedModel, base: str) -> None:
        self.model, self.base = model, base
        self.layers: dict[str, Any] = {}  # PEFT's layers by name
        self.trained: set[str] = set()
        self.on: tuple[str, ...] | None = None
        model.requires_grad_(False)

    def add(self, name: str, config: Any) -> None:
        """Put a new adapter, which learns, into the layers that its config names.

        Raises:
            UserError: it names some that are not there.
        """
        require_layers(self.model, config)
        leave_out(config, scalar_head(self.model))
        self._inject(name, config, trained=True)

    def _inject(self, name: str, config: Any, trained: bool) -> None:
        from peft import inject_adapter_in_model

        config = copy.deepcopy(config)
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in self.model.modules())
        task_type = config.task_type
        if task_type == OF_STEPS.task_type:
            config.task_type = OF_RESPONSES.task_type  # the one whose head PEFT takes for none of all linear layers
        with quiet_peft():
            inject_adapter_in_model(config, self.model, name)
        config.task_type = task_type
        self.layers = dict(lora_layers(self.model))
        self.trained |= {name} if trained else set()
        self.on = None
        for parameter in self.parameters(name):  # in half precision, most of what it learns would be rounded away
            parameter.data = parameter.data.float()
        for other in self.names:  # PEFT lets the last alone learn
            for parameter in self.parameters(other):
                parameter.requires_grad_(other in self.trained)

    def load(self, name: str, config: Any, weights: Mapping[str, Tensor], trained: bool = True) -> None:
        """Put an adapter with these weights into the model.

        Args:
            name: of the adapter here.
            config: PEFT's, of the adapter.
            weights: by the names of PEFT's files, less their prefix.
            trained: whether it goes on learning.

        Raises:
            UserError: the weights do not fit the model.
        """
        from peft import set_peft_model_state_dict

        own = {key: tensor for key, tensor in weights.items() if ".lora_" in key}
        lost = sorted({key.partition(".lora_")[0] for key in own} - set(candidates(self.model)))
        if lost:
            raise UserError(
                f"its adapters of {', '.join(lost[:3])} would be lost: {type(self.model).__name__}, as {self.base} is "
                "loaded, has no such layers. Is that its base? Else train it without them (lora.target_modules), or "
                "export it merged (export.merge: true) and start from that"
            )
        self.require_same_base({key: tensor for key, tensor in weights.items() if key not in own})
        try:
            self._inject(name, config, trained)
        except ValueError as error:  # of layers that are not there
            raise UserError(f"adapter_config.json: {str(error).splitlines()[0]}") from error
        self.require_ranks(name, own)
        try:
            with quiet_peft():
                result: Any = set_peft_model_state_dict(self.model, own, adapter_name=name)
        except RuntimeError as error:
            raise UserError(
                f"the adapter is of another base than {self.base}: {str(error).strip().splitlines()[-1].strip()}"
            ) from error
        lacking = [key for key in result.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
        if lacking:
            raise UserError(f"the adapter's file lacks {len(lacking)} weights that its config names, like {lacking[0]}")
        if left := sorted(result.unexpected_keys):
            raise UserError(
                f"the adapter's file holds {len(left)} of {len(own)} weights that adapter_config.json does not name, "
                f"like {left[0]}: they would be lost. Correct target_modules there, or copy both files of one adapter"
            )

    def require_ranks(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Refuse weights of another rank than their config says, which PEFT would call another base's."""
        for key, tensor in weights.items():
            layer, _, part = key.partition(".lora_")
            held = self.layers[layer].r.get(name) if layer in self.layers else None
            if part.removeprefix("embedding_") in ("A", "A.weight") and held not in (None, len(tensor)):
                raise UserError(
                    f"the adapter's file holds {layer} in rank {len(tensor)}, and adapter_config.json says {held}: "
                    "correct r (or rank_pattern) there, or copy both files of one adapter"
                )

    def require_same_base(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse weights of the base in an adapter's file, where PEFT puts those of heads, that are not as they are."""
        here = {name.replace(".base_layer.", "."): p for name, p in self.model.named_parameters(remove_duplicate=False)}
        for key, theirs in weights.items():
            ours = here.get(key.replace(".base_layer.", "."))
            # As near as bfloat16 is, in which they may have been written.
            if ours is None or ours.shape != theirs.shape or not torch.allclose(ours, theirs.to(ours), 2**-7, 1e-6):
                raise UserError(
                    f"the adapter brings other weights of {key.removesuffix('.weight')} than {self.base} has: merge it "
                    "by PEFT's merge_and_unload, and start from that"
                )

    def copy(self, name: str, new: str, trained: bool = False) -> None:
        """Put a copy of an adapter, as it is now, into the model."""
        self._inject(new, without_dropout(self.model.peft_config[name]), trained)
        for ours, theirs in zip(self.parameters(new), self.parameters(name), strict=True):
            ours.data.copy_(theirs.data)

    @property
    def names(self) -> list[str]:
        """All of them."""
        return list(self.model.peft_config) if self.layers else []

    def switch(self, names: Sequence[str]) -> None:
        """Let these be on and no others, in this order; which of them learn stays as it is.

        PEFT's own `set_adapter` would freeze those that are off, and lose the gradients of passes already made.
        """
        if self.on != tuple(names):
            self.on = tuple(names)
            for layer in self.layers.values():
                layer._active_adapter = list(names)

    def parameters(self, name: str) -> Iterator[nn.Parameter]:
        """Those of one adapter."""
        for layer in self.layers.values():
            for kind in dict.fromkeys(layer.adapter_layer_names):  # each DoRA adapter names its magnitudes once more
                held = getattr(layer, kind)
                if name in held:
                    yield from held[name].parameters() if isinstance(held[name], nn.Module) else [held[name]]

    def merge(self, names: Sequence[str]) -> None:
        """Fold adapters into the base, for good, and take PEFT's layers out of the model."""
        for name, layer in self.layers.items():
            base = layer.get_base_layer()
            if uses(self.model, base.weight) > 1:
                untie(self.model, name, base)
            layer.merge(adapter_names=[adapter for adapter in names if adapter in layer.r])
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, base)
        del self.model.peft_config
        self.layers, self.on = {}, None
        self.trained.clear()


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers in a model, by name."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def without_dropout(config: Any) -> Any:
    """The config of an adapter that shall give the same numbers each time; what it saves besides is seen to here."""
    config = copy.deepcopy(config)
    config.lora_dropout, config.modules_to_save, config.inference_mode = 0.0, None, False
    return config


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without what PEFT warns of and is seen to here: transposed weights, and heads that are tied to embeddings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        yield


def uses(model: nn.Module, weight: Tensor) -> int:
    """How many modules hold this very weight."""
    return sum(held is weight for module in model.modules() for held in module._parameters.values())


def untie(model: Any, name: str, layer: Any) -> None:
    """Give a layer a weight of its own, which it had in common with another: the embeddings with the head."""
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    for holder in (model.config, model.config.get_text_config()):
        holder.tie_word_embeddings = False
    pairs: Mapping[str, str] = model.all_tied_weights_keys
    model.all_tied_weights_keys = {a: b for a, b in pairs.items() if f"{name}.weight" not in (a, b)}
