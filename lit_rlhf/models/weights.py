"""The weights of a folder or hub name, read whole or refused by the names of their tensors."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from lit_rlhf.engine.memory import only_shapes
from lit_rlhf.errors import UserError
from lit_rlhf.models.causes import silent_transformers
from lit_rlhf.models.fingerprints import weight_files
from lit_rlhf.models.heads import KINDS, OF_STEPS, head_kind
from lit_rlhf.models.holding import FrozenDtype, dtype_of, quantization, stays_uncut
from lit_rlhf.models.hub import first_line, hint, hub_or_cache, in_transformers, require_json, resolve
from lit_rlhf.models.probe import disable_dropout
from lit_rlhf.models.rehearsal import shape_of
from lit_rlhf.models.weight_checks import (
    architectures_of,
    check_finite,
    check_labels,
    check_left_out,
    check_missing,
    check_shapes,
    check_sizes,
    check_special_tokens,
)

WANTED = {False: "config.json and model.safetensors", True: "config.json and a tokenizer, which are enough for a plan"}


def load_model(
    auto_class: Any,
    name: str | Path,
    from_scratch: bool,
    trust_remote_code: bool,
    num_labels: int | None = None,
    fresh_head: bool = False,
    held: FrozenDtype | None = None,
) -> Any:
    """A model in training mode, without dropout.

    Args:
        auto_class: of transformers, which says what kind of model.
        name: folder or hub name.
        from_scratch: random weights in the shape of its config.
        trust_remote_code: run model code that comes with the weights.
        num_labels: of a classifier.
        fresh_head: its head will be drawn anew, so that the stored one is not asked for.
        held: the dtype of its weights; None = torch's default.

    Raises:
        UserError: no model there, or one whose weights are not those of its config.
    """
    source = resolve(name)
    with hub_or_cache(source), _reading(source, name, trust_remote_code):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if num_labels is not None:
            if not fresh_head:
                check_labels(config, num_labels, name)
            config.num_labels = num_labels
        dtype = _dtype_of(config, source)
        generation: GenerationConfig | None = None
        with suppress(OSError):  # there need not be one
            generation = GenerationConfig.from_pretrained(source)
        check_sizes(config, name)
        check_special_tokens(config, generation, name)
        options = {"attn_implementation": "eager", "trust_remote_code": trust_remote_code}
        if only_shapes():
            model = shape_of(auto_class, config, held, **options)
        elif from_scratch:
            model = auto_class.from_config(config, dtype=dtype_of(held), **options)
        else:
            model = _read(auto_class, source, config, trust_remote_code, name, fresh_head, held)
    if type(model.config) is not type(config):
        rank_zero_warn(
            f"{name} is a model of text and more; what is loaded, trained and exported is its {type(model).__name__} "
            "alone: images or sound are nothing to it"
        )
    if not model.can_generate():  # a reward model asks it for stop tokens, and transformers gives it none
        model.generation_config = generation or GenerationConfig.from_model_config(model.config)
    elif generation is not None and from_scratch:
        model.generation_config = generation
    model.__dict__["stored_dtype"] = dtype
    disable_dropout(model)
    return model.train()  # from_pretrained leaves it in eval mode


@contextmanager
def _reading(source: str, name: str | Path, trust_remote_code: bool) -> Iterator[None]:
    """Whatever transformers stumbles over in the files of a model, as an error that names it."""
    require_json(source, name, "config.json", "generation_config.json", "model.safetensors.index.json")
    try:
        yield
    except UserError:
        raise
    except SafetensorError as error:
        files = sorted(path.name for path in Path(source).glob("*.safetensors"))
        raise UserError(
            f"{name}: damaged or cut short, copy it anew: {', '.join(files) or 'weights'} ({error})"
        ) from error
    except Exception as error:  # of a damaged file it may be any
        if not isinstance(error, OSError | ValueError) and (trust_remote_code or not in_transformers(error)):
            raise
        raise UserError(
            f"{name}: no model could be loaded there ({first_line(error)}{_in_config(source, error)}). Expected a "
            f"folder with {WANTED[only_shapes()]}, or a name on the Hugging Face hub{hint(source, error)}"
        ) from error


def _in_config(source: str, error: Exception) -> str:
    """Which option of config.json has the value that transformers does not know; empty of any other error."""
    if not isinstance(error, KeyError) or not (file := Path(source) / "config.json").is_file():
        return ""
    parts = [json.loads(file.read_bytes())]
    for part in parts:  # grows by those within
        parts += [value for value in part.values() if isinstance(value, dict)]
    names = [key for part in parts for key, value in part.items() if error.args and value == error.args[0]]
    return f": what {names[0]} in config.json names is not known" if names else ""


def _read(
    auto_class: Any,
    source: str,
    config: PretrainedConfig,
    trust_remote_code: bool,
    name: str | Path,
    fresh_head: bool,
    held: FrozenDtype | None,
) -> PreTrainedModel:
    try:
        with silent_transformers():  # its report of weights that do not fit is our error, below
            model, report = auto_class.from_pretrained(
                source,
                config=config,
                attn_implementation="eager",  # `choose_attention` sees to ours
                dtype=read_as(source, held),
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **quantization(held),
            )
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise UserError(f"{name}: memory does not hold a model of the sizes in config.json ({error})") from error
        raise UserError(
            f"{name}: its weights do not fit together ({first_line(error)}): tensors that belong together, such as "
            "those of the experts of a layer, are missing or differ in shape; copy the folder anew"
        ) from error
    model.__dict__["uncut"] = dtype_of(held) if stays_uncut(held) else None
    head = ("score.",) if fresh_head else ()
    check_shapes(report["mismatched_keys"], name, head)
    stored = head_kind(architectures_of(config, name))
    others = [kind.auto_class for kind in KINDS if kind is not stored]
    stored_head = stored is not None and auto_class not in others and not fresh_head
    drawn = () if stored_head else ("score.",)
    # Older transformers give a head of steps a bias whatever its config says.
    check_missing(report["missing_keys"], model, name, drawn or (("score.bias",) if stored is OF_STEPS else ()))
    check_left_out(report["unexpected_keys"], model, name, type(model.config) is type(config), drawn)
    check_finite(model, source, name, head)
    untie(model)
    return cast(PreTrainedModel, model)


def read_as(source: str, held: FrozenDtype | None) -> torch.dtype:
    """The dtype to read weights in that shall be held so; that of the files where pieces can be widened from it."""
    wanted = dtype_of(held)
    if wanted != torch.float32 or not stays_uncut(held):
        return wanted
    stored = dtypes_in(weight_files(source, local=False))
    if stored == {"BF16"}:
        return torch.bfloat16
    return torch.float16 if stored == {"F16"} else wanted


def dtypes_in(files: Iterable[Path]) -> set[str]:
    """Of the numbers in files, as safetensors names them."""
    found = set()
    for file in files:
        with safe_open(file, "pt") as weights:
            found |= {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118 (it is no mapping)
    return {dtype for dtype in found if dtype.startswith(("F", "BF"))}


def untie(model: PreTrainedModel) -> None:
    """Let a config say so where the weights hold two embeddings against its word: transformers loads both."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        for holder in (model.config, model.config.get_text_config()):
            holder.tie_word_embeddings = False


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of a model's weights where they came from, which need not be that in memory."""
    return cast(torch.dtype, model.__dict__.get("stored_dtype", torch.float32))


def _dtype_of(config: PretrainedConfig, source: str) -> torch.dtype:
    named = config.dtype or config.get_text_config().dtype
    files = sorted(Path(source).glob("*.safetensors")) if named is None else []
    if files:  # written without transformers
        with safe_open(files[0], "pt") as weights:
            named = weights.get_tensor(next(iter(weights.keys()))).dtype
    return named if named in (torch.bfloat16, torch.float16) else torch.float32


def load_config(name: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a whole model."""
    source = resolve(name)
    with hub_or_cache(source), _reading(source, name, trust_remote_code):
        return cast(PretrainedConfig, AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code))


def stored_architectures(name: str | Path, trust_remote_code: bool = False) -> list[str]:
    """The classes that a folder's weights were saved from, by its config."""
    return architectures_of(load_config(name, trust_remote_code), name)
