"""Whether weights, config and role fit together: refused by the name of what does not, before anything is trained."""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors import safe_open
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from lit_rlhf.errors import UserError, one_line
from lit_rlhf.models.heads import head_kind

MOST_LAYERS = 10_000
LISTS = dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), "a list of ids")  # of tokens that are never written


def check_labels(config: PretrainedConfig, num_labels: int, name: str | Path) -> None:
    """Refuse a classifier that was trained with another number of labels, or whose scores are shifted by no number."""
    check_score_bias(getattr(config, "score_bias", 0.0), name)
    if head_kind(architectures_of(config, name)) is not None and config.num_labels != num_labels:
        labels = ", ".join(map(str, list((config.id2label or {}).values())[:3]))
        raise UserError(
            f"{name} is a classifier of {config.num_labels} labels ({labels}); a reward model or critic has a head of "
            f"{num_labels} label: its score"
        )


def check_score_bias(bias: object, name: str | Path, file: str = "config.json") -> float:
    """What is added to a reward model's scores, refused where it is no finite number."""
    if isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias):
        raise UserError(f"{name}: score_bias ({one_line(repr(bias))}) in {file} must be a finite number")
    return float(bias)


def check_sizes(config: PretrainedConfig, name: str | Path) -> None:
    """Refuse a config without a layer, with more than any model has, which would be made for hours, or no context."""
    text = config.get_text_config()
    layers, positions = (getattr(text, key, None) for key in ("num_hidden_layers", "max_position_embeddings"))
    if isinstance(layers, int) and not 1 <= layers <= MOST_LAYERS:
        raise UserError(f"{name}: num_hidden_layers ({layers}) in config.json must be 1 to {MOST_LAYERS}")
    if isinstance(positions, int) and positions < 2:
        raise UserError(f"{name}: max_position_embeddings ({positions}) in config.json must be 2 or more")


def check_special_tokens(config: PretrainedConfig, generation: GenerationConfig | None, name: str | Path) -> None:
    """Refuse special tokens that are no ids of what the model embeds: nothing could read, write or stop at them."""
    text = config.get_text_config()
    for file, holder in (("config.json", text), ("generation_config.json", generation)):
        for key in ("eos_token_id", "pad_token_id", "bos_token_id", *LISTS):
            given = getattr(holder, key, None)
            ids = given if isinstance(given, list | tuple) else [] if given is None else [given]
            if not all(type(token) is int for token in ids):
                raise UserError(
                    f"{name}: {key} ({one_line(repr(given))}) in {file} must be {LISTS.get(key, 'an id, or a list')}"
                )
            least = 0 if key == "eos_token_id" else -1  # some write -1 for a pad token that is none
            beyond = [token for token in ids if key not in LISTS and not least <= token < text.vocab_size]
            if beyond:
                raise UserError(
                    f"{name}: {key} {beyond[0]} in {file} is no id of the model, which embeds {text.vocab_size} (0 to "
                    f"{text.vocab_size - 1}); correct it there"
                )


def check_shapes(mismatched: Iterable[tuple[str, Any, Any]], name: str | Path, drawn: tuple[str, ...]) -> None:
    """Refuse weights of other shapes than the config asks for, but for a head that is drawn anew."""
    differing = sorted((key, *shapes) for key, *shapes in mismatched if not key.startswith(drawn))
    if differing:
        key, stored, asked = differing[0]
        raise UserError(
            f"{name}: {len(differing)} tensors have other shapes than config.json asks for, like {key}: "
            f"{tuple(stored)} in the weights, {tuple(asked)} by the config; bring the two of one model together"
        )


def check_missing(
    missing: Iterable[str], model: PreTrainedModel, name: str | Path, drawn: tuple[str, ...] = ()
) -> None:
    """Refuse a folder without some of the model's weights, which would be left random, but for what is drawn anew."""
    keys = sorted(key for key in missing if not key.startswith(drawn))
    if keys:
        raise UserError(
            f"{name}: its weights lack {len(keys)} tensors of {type(model).__name__}, like {keys[:3]}; they would be "
            "left random: is it the folder of another kind of model?"
        )


def check_left_out(
    unexpected: Iterable[str], model: PreTrainedModel, name: str | Path, whole: bool, drawn: tuple[str, ...] = ()
) -> None:
    """Refuse a config that leaves out weights of the folder, without which it is another model.

    Those of the model's own modules and of blocks like its own are refused: further layers, biases or norms that the
    config denies. Others, such as heads for other ends, are named.

    Args:
        unexpected: tensors of the folder that the model has no place for.
        model: as loaded.
        name: for messages.
        whole: it is all that its config describes, not the text model of a larger one.
        drawn: modules that are drawn anew.
    """
    lists = {path.rpartition(".")[0] for path, _ in model.named_modules() if path.rpartition(".")[2].isdigit()}
    blocks = tuple({"." + re.sub(r"\d+", "*", path) for path in lists})
    ahead = (
        getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    )  # which predict further tokens
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    prefix = f"{model.base_model_prefix}."  # which a file may have or not
    modules = {path.removeprefix(prefix) for path, _ in model.named_modules() if path} if whole else set()
    own: list[str] = []
    others: list[str] = []
    for key in sorted(unexpected):
        numbered = re.match(r"(.*?)\.(\d+)\.", key)
        inside = numbered is not None and any(block.endswith(f".{numbered[1]}") for block in blocks)  # prefixes differ
        further = numbered is not None and layers <= int(numbered[2]) < layers + ahead
        inside = inside or key.rpartition(".")[0].removeprefix(prefix) in modules
        if not key.startswith(drawn):
            (own if inside and not further else others).append(key)
    if own:
        shift = "; what is added to scores is score_bias in config.json" if "score.bias" in own else ""
        raise UserError(
            f"{name}: config.json leaves out {len(own)} tensors of the weights, like {own[:3]}, without which they are "
            f"another model (num_hidden_layers is {layers} there): correct config.json, or remove these tensors from "
            f"the weights{shift}"
        )
    heads = ("score.", "lm_head.", "embed_out.")
    if whole and (left := [key for key in others if not key.startswith(heads)]):
        rank_zero_info(
            f"{name}: {len(left)} tensors of its weights are no part of {type(model).__name__} and left out: {left[:3]}"
        )


def check_finite(model: PreTrainedModel, source: str, name: str | Path, drawn: tuple[str, ...]) -> None:
    """Refuse weights that hold NaN or infinity, by tensor and file."""
    ruined = [
        key
        for key, weight in model.named_parameters()
        if not torch.isfinite(weight).all() and not key.startswith(drawn)
    ]
    if ruined:
        where = next(_ruined_in_files(source), ruined[0])
        raise UserError(
            f"{name}: {len(ruined)} tensors of its weights hold NaN or infinity, like {where}; take an earlier "
            "checkpoint of it, or copy it anew"
        )


def _ruined_in_files(source: str) -> Iterator[str]:
    """Tensors and files, as they are on disk: some are put together when a model is loaded."""
    for file in sorted(Path(source).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (it is no mapping)
                if not torch.isfinite(weights.get_tensor(key)).all():
                    yield f"{key} in {file.name}"


def architectures_of(config: PretrainedConfig, name: str | Path) -> list[str]:
    """The classes that weights were saved from, by their config."""
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(kind, str) for kind in named):
        raise UserError(f"{name}: architectures ({one_line(repr(named))}) in config.json must be a list of names")
    return named
