"""Folders of PEFT's adapters: what one holds, and which base it is of (`adapter_exports.py` writes them).

Such a folder has no config.json, since transformers would look for a whole model beside it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file, find_adapter_config_file

from lit_rlhf.engine.memory import only_shapes
from lit_rlhf.errors import UserError, one_line
from lit_rlhf.models.adapters import MOST_RANK, without_dropout
from lit_rlhf.models.fingerprints import SINCE, Fingerprints, fingerprint, fingerprints
from lit_rlhf.models.heads import SCALAR_HEAD, ScalarHeadKind, adapter_head_kind
from lit_rlhf.models.holding import FrozenDtype
from lit_rlhf.models.hub import HUB_NAME, hint, hub_or_cache, require_json, resolve
from lit_rlhf.models.weight_checks import check_score_bias

PREFIX = "base_model.model."  # of each weight in PEFT's files
HEADS = (SCALAR_HEAD, "classifier")  # what PEFT saves as a whole for a classifier, if it is there
SCORE, SHIFT = f"{SCALAR_HEAD}.weight", f"{SCALAR_HEAD}.bias"  # classifiers of tokens have the second
BIAS_FILE = "score_bias.json"  # what is added to scores, and such: of a whole reward model, it stands in config.json
BASE_FILE = "base_fingerprint.json"  # of the weights that the adapter has learnt on
# Settings of an adapter that change nothing but its own layers.
TAKEN = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "use_rslora"),
    *("use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "task_type", "peft_type", "inference_mode", "base_model_name_or_path"),
    *("revision", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"),
}
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to start that subtract from it


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in a folder, or on the hub.

    Args:
        name: as the user gave it.
        base: folder or hub name of the model that it stands on.
        settings: what its adapter_config.json says.
    """

    name: str
    base: str
    settings: dict[str, Any]

    @property
    def head_kind(self) -> ScalarHeadKind | None:
        """What its trained scalar head scores; None where it has none."""
        return adapter_head_kind(self.settings.get("task_type"))

    def config(self) -> Any:
        """PEFT's config of it, without dropout.

        Raises:
            UserError: it is more than LoRA on some layers and, perhaps, a scalar head.
        """
        from peft import LoraConfig

        kind = self.settings.get("peft_type")
        defaults = LoraConfig().to_dict()
        further = sorted(
            key
            for key, value in self.settings.items()
            if key not in TAKEN and value and value != defaults.get(key) and value != "none"
        )
        saved = [name for name in self.settings.get("modules_to_save") or () if name not in HEADS]
        if kind != "LORA" or further or saved:
            what = f"{kind}" if kind != "LORA" else f"LoRA with {', '.join(further or saved)}"
            raise UserError(
                f"{self.name} is an adapter of another kind ({what}) than is trained on here, LoRA of whole layers: "
                "merge it by PEFT's merge_and_unload, and start from that"
            )
        if str(self.settings.get("init_lora_weights")).startswith(CHANGES_THE_BASE):
            raise UserError(
                f"{self.name} was made with init_lora_weights {self.settings['init_lora_weights']}, which changes the "
                "base: merge it by PEFT's merge_and_unload, and start from that"
            )
        known = {key: value for key, value in self.settings.items() if key in TAKEN and key in defaults}
        for key, kinds, most in (("r", int, MOST_RANK), ("lora_alpha", int | float, math.inf)):
            value = known.get(key, defaults[key])
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= most or value == math.inf:
                raise UserError(
                    f"{self.name}: {key} ({one_line(repr(value))}) in adapter_config.json must be a number above 0"
                )
        return without_dropout(LoraConfig(**{**known, "base_model_name_or_path": self.base}))

    def weights(self) -> dict[str, Tensor]:
        """Its weights by the names of its base's layers, the scalar head as `SCORE` and `SHIFT`.

        Raises:
            UserError: there is no whole file of them, or they have learnt on another base than is there now.
        """
        source = resolve(self.name)
        self.require_base()
        try:
            with hub_or_cache(source):
                file = cached_file(source, "adapter_model.safetensors")
            assert file is not None
            held = shapes_in(file) if only_shapes() else load_file(file)
        except (OSError, SafetensorError) as error:
            said = str(error).splitlines()[0].partition(" Checkout 'http")[0]  # of transformers, of folders here, too
            raise UserError(
                f"{self.name}: no adapter could be loaded there ({said}); expected adapter_model.safetensors beside "
                f"adapter_config.json{hint(source, error)}"
            ) from error
        if ruined := [key for key, tensor in held.items() if not torch.isfinite(tensor).all()]:
            raise UserError(
                f"{self.name}: {len(ruined)} tensors of its adapter_model.safetensors hold NaN or infinity, like "
                f"{ruined[0]}; take an earlier checkpoint of it, or copy it anew"
            )
        weights = {key.removeprefix(PREFIX): tensor for key, tensor in held.items()}
        of_head = re.compile(rf"({'|'.join(HEADS)})\.((?!lora_).*\.)?(weight|bias)")
        heads = {key: f"{SCALAR_HEAD}.{found[3]}" for key in weights if (found := of_head.fullmatch(key))}
        return {heads.get(key, key): tensor for key, tensor in weights.items()}

    @property
    def bias(self) -> float | None:
        """Added to the scores of its head; None = as of its base."""
        held = self._beside(BIAS_FILE)
        return None if held is None else check_score_bias(held.get("score_bias"), self.name, BIAS_FILE)

    @property
    def step_separator(self) -> str | None:
        """What stands behind the steps that its head scores; None where that is not known."""
        separator = (self._beside(BIAS_FILE) or {}).get("step_separator")
        return separator if isinstance(separator, str) else None

    def require_base(self) -> None:
        """Refuse a base whose weights are not those that the adapter has learnt on, as far as that is known.

        Raises:
            UserError: says how it is taken all the same.
        """
        held = self._beside(BASE_FILE)
        now = None if held is None else fingerprint(self.base)
        if held is not None and now not in (None, held.get("base_fingerprint")):
            raise UserError(
                f"{self.name}: its base, {self.base}, holds other weights than the adapter has learnt on: {SINCE}. Put "
                "the old weights back, or write where they are in adapter_config.json (base_model_name_or_path); to "
                f"take these all the same, remove {BASE_FILE}"
            )

    def _beside(self, name: str) -> dict[str, Any] | None:
        """What a file of ours in its folder says; None where there is none."""
        file = Path(self.name).expanduser() / name
        if not file.exists():
            return None
        require_json(str(file.parent), self.name, name)
        held: dict[str, Any] = json.loads(file.read_text())
        return held


@dataclass(frozen=True)
class Origin:
    """What an adapter that learns here stands on: with its weights, all that an export needs.

    Args:
        base: folder or hub name of the frozen model.
        start: folder of the adapter that the run started from and another one learns on top of; None = none.
        merged: whether that one was merged into the base, which then is on no disk.
        settings: of the adapter that learns, see `plain_config`.
        name: of the adapter that learns.
        fresh: whether it was new when the run started, and changed nothing yet.
        held: the dtype that the base was held in, if one was asked for.
        base_weights: fingerprint of the base as it was read; None = not known.
        start_weights: likewise of the adapter that the run started from.
    """

    base: str
    start: str | None
    merged: bool
    settings: dict[str, Any]
    name: str
    fresh: bool
    held: FrozenDtype | None = None
    base_weights: str | None = None
    start_weights: str | None = None

    @property
    def stands_on(self) -> Fingerprints:
        """The folders whose weights it needs and does not hold, as far as these are known."""
        held = {self.base: self.base_weights, self.start: self.start_weights}
        return {folder: mark for folder, mark in held.items() if folder is not None and mark is not None}

    def require_unchanged(self) -> None:
        """Refuse to export what has learnt on weights that are no longer where they were.

        Raises:
            UserError: says where that was.
        """
        now = fingerprints(self.stands_on)
        for folder, before in self.stands_on.items():
            if now.get(folder, before) != before:
                raise UserError(
                    f"nothing is exported, since {folder} holds other weights than the adapter has learnt on: {SINCE}. "
                    "Put the old weights back, or name a folder that holds them by lit-rlhf export --policy"
                )


def pop_head(weights: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Take a scalar head's weight (1, d) and bias (1,), None for what is not there, out of an adapter's weights."""
    return weights.pop(SCORE, None), weights.pop(SHIFT, None)


def shapes_in(file: str) -> dict[str, Tensor]:
    """Tensors of the shapes in a file, by name, where none get numbers."""
    with safe_open(file, "pt") as held:
        return {name: torch.empty(held.get_slice(name).get_shape()) for name in held.keys()}  # noqa: SIM118 (no mapping)


def saved_adapter(name: str | Path) -> SavedAdapter | None:
    """The adapter in a folder or on the hub; None where there is none.

    Raises:
        UserError: there is one beside a whole model, or its base is not to be found.
    """
    source = resolve(name)
    try:
        with hub_or_cache(source):
            file = find_adapter_config_file(source)
    except OSError:
        return None  # nothing there at all: who loads a model says so
    if file is None:
        return None
    if (Path(source) / "config.json").exists():
        raise UserError(
            f"{name} holds a whole model and an adapter of PEFT (adapter_config.json): move one of them into a folder "
            "of its own, and name the one that you mean"
        )
    require_json(source, name, "adapter_config.json")
    try:
        settings = json.loads(Path(file).read_text())
        base = settings["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}: its adapter_config.json names no base_model_name_or_path ({error!r})") from error
    return SavedAdapter(str(name), base_of(str(name), base), settings)


def base_of(name: str, base: Any) -> str:
    """Where the base of an adapter is: a folder, seen from the adapter's or from here; else a name on the hub."""
    for folder in (Path(name).expanduser() / str(base), Path(str(base)).expanduser()):
        if base and folder.is_dir():
            if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
                raise UserError(
                    f"{name}: its base, {base!r} in adapter_config.json (base_model_name_or_path), is an adapter "
                    "itself: export that one merged (lit-rlhf export --merge), and write its folder there"
                )
            return str(folder.resolve())
    if not base or not HUB_NAME.fullmatch(str(base)) or str(base).startswith("."):
        raise UserError(
            f"{name}: its base, {base!r} in adapter_config.json (base_model_name_or_path), is not there; write where "
            "it is now: an absolute path, or one as seen from the adapter's folder"
        )
    return str(base)


def named_base(source: str) -> str:
    """A base's name as it stands in an adapter's folder: a folder's whole path, so that it holds from everywhere."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def plain_config(config: Any) -> dict[str, Any]:
    """PEFT's config as plain values, which a checkpoint may hold."""
    values = config.to_dict()
    values.pop("runtime_config", None)
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.value if isinstance(value, Enum) else value
