"""Adapters as PEFT's folders: the weights of one alone, two on one base as their sum, and the files of it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.models.adapter_folders import (
    BASE_FILE,
    BIAS_FILE,
    PREFIX,
    SCORE,
    SHIFT,
    Origin,
    plain_config,
    pop_head,
    saved_adapter,
)


def own_weights(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those of one adapter among the weights of a model, as PEFT names them less its prefix; and a scalar head."""
    ends = re.compile(rf"\.{re.escape(name)}(?=\.|$)")
    own = {key: w for key, w in weights.items() if ".lora_" in key and ends.search(key.rpartition(".lora_")[2])}
    # DoRA's magnitudes by PEFT's older name, with `.weight`, which transformers finds as well.
    named = {ends.sub("", key): tensor for key, tensor in own.items()}
    return named | {key: weights[key] for key in (SCORE, SHIFT) if key in weights}


def whole_adapter(origin: Origin, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of one adapter that is all there is on top of the base.

    Args:
        origin: of the adapter that learnt.
        weights: of the model that it learnt in, those of the adapter at least.
    """
    own = origin.settings, own_weights(weights, origin.name)
    if origin.start is None or origin.merged:
        return own
    below = saved_adapter(origin.start)
    if below is None:
        raise UserError(f"{origin.start}, the adapter that the run started from, is no longer there")
    held = below.weights()
    pop_head(held)
    return stacked((plain_config(below.config()), held), own)


def write_adapter(
    folder: Path,
    settings: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    scores: Mapping[str, Any],
    base_weights: str | None = None,
) -> None:
    """Write what PEFT and transformers load on the base that the settings name.

    Args:
        folder: is there.
        settings: as `plain_config` gives them.
        weights: by the names of the base's layers; with `score.weight`, it is a reward model's.
        scores: what stands in the config.json of a whole reward model; nothing is written of 0 and no others.
        base_weights: fingerprint of the base; None = not known.
    """
    from peft import LoraConfig

    saved = {"modules_to_save": ["score"]} if SCORE in weights else {}
    LoraConfig(**{**settings, **saved, "inference_mode": True}).save_pretrained(str(folder))
    whole = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in weights.items()}
    save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if any(scores.values()):
        (folder / BIAS_FILE).write_text(json.dumps(dict(scores)))
    if base_weights is not None:
        (folder / BASE_FILE).write_text(json.dumps({"base_fingerprint": base_weights}))


def stacked(
    below: tuple[Mapping[str, Any], Mapping[str, Tensor]], above: tuple[Mapping[str, Any], Mapping[str, Tensor]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Two adapters on one base as one: s₁ B₁ A₁ + s₂ B₂ A₂ = [s₁ B₁, s₂ B₂] [A₁; A₂].

    Args:
        below: settings and weights of one; both of plain LoRA.
        above: of the other; other weights that it holds, such as a head, are kept.

    Returns:
        Settings, with alpha = r in each layer, and weights of their sum.
    """
    parts = [scaled(*below), scaled(*above)]
    layers = list(dict.fromkeys(layer for part in parts for layer in part))
    weights = {key: tensor for key, tensor in above[1].items() if not layer_of(key)}
    ranks = {}
    for layer in layers:
        held = [part[layer] for part in parts if layer in part]
        a, b = torch.cat([a for a, _ in held], 0), torch.cat([b for _, b in held], 1)
        embeds = any(f"{layer}.lora_embedding_A" in part[1] for part in (below, above))
        names = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A.weight", "lora_B.weight")
        weights |= {f"{layer}.{names[0]}": a, f"{layer}.{names[1]}": b}
        ranks[layer] = len(a)
    r = max(ranks.values())
    others = {re.escape(layer): rank for layer, rank in ranks.items() if rank != r}
    settings = {"r": r, "lora_alpha": r, "rank_pattern": others, "alpha_pattern": dict(others), "use_rslora": False}
    return {**above[0], **settings, "target_modules": layers, "exclude_modules": None, "lora_dropout": 0.0}, weights


def layer_of(key: str) -> str | None:
    """The layer whose A or B a weight is; None for other weights."""
    found = re.fullmatch(r"(.*)\.lora_(embedding_)?[AB](\.weight)?", key)
    return found[1] if found else None


def scaled(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A, and B with the factor of its layer, by layer."""
    made = {}
    for layer in dict.fromkeys(filter(None, map(layer_of, weights))):
        a, b = (
            next(weights[key] for key in (f"{layer}.lora_{x}.weight", f"{layer}.lora_embedding_{x}") if key in weights)
            for x in "AB"
        )
        patterns = settings.get("alpha_pattern") or {}
        own = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        alpha, rank = next(own, settings["lora_alpha"]), len(a)
        made[layer] = a, b * (alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank)
    return made
