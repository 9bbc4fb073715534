"""Models as Hugging Face folders that work elsewhere: what is trained here stops, pads and scores alike over there."""

import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from lit_rlhf.errors import UserError
from lit_rlhf.models.adapter_exports import whole_adapter, write_adapter
from lit_rlhf.models.adapter_folders import SCORE, SHIFT, Origin, pop_head, without_dropout
from lit_rlhf.models.adapters import Adapters
from lit_rlhf.models.causes import silent_transformers
from lit_rlhf.models.heads import kind_of, set_head
from lit_rlhf.models.holding import FrozenDtype, dtype_of
from lit_rlhf.models.loading import load_policy, load_scorer
from lit_rlhf.models.weights import stored_dtype

LARGEST = 65504.0  # of float16, in which models are run as a matter of course: no sound weight lies beyond it
PAD_TOKEN = "<|pad|>"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


class ScoreHead(NamedTuple):
    """What an export makes of a reward model's head: scores r become `gain` r, and `bias` is added to them."""

    gain: float
    bias: float
    step_separator: str | None = None  # behind the steps that it scores


class Artefact(NamedTuple):
    """What a folder holds beside the weights; none of it is shared with the run, which stays as it is."""

    model: PreTrainedModel  # gives names and shapes of the weights, not their values
    config: PretrainedConfig
    generation: GenerationConfig | None  # None for a reward model
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype | None  # on disk; None = that of the source
    gain: float
    adapter: Origin | None = None  # of the weights that learnt, where the rest is a frozen base
    merge: bool = False  # write them folded into the base, not as an adapter
    max_shard_size: str | None = None  # of a file of weights; None = transformers' default


def artefact(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    dtype: torch.dtype | None = None,
    head: ScoreHead | None = None,
    adapter: Origin | None = None,
    merge: bool | None = None,
) -> Artefact:
    """What stands beside a model's weights, so that transformers generates and scores as this library does.

    Args:
        model: a causal LM, or a sequence classifier with one label.
        tokenizer: its own, with the chat template of the run.
        stops: the ids that end a response in the run; `generate` will stop at each.
        dtype: of the weights on disk; None = that of the folder the model came from.
        head: of a reward model, which pads with a token that ends no response.
        adapter: of the model, where an adapter learnt on a frozen base.
        merge: fold the adapter into the base; None = only where the base is on no disk.

    Raises:
        UserError: there is no adapter to merge, or one that could not be loaded elsewhere.
    """
    tokenizer, config = copy.deepcopy(tokenizer), copy.deepcopy(model.config)
    whole = merges(adapter, merge)
    if adapter is not None and adapter.held == "nf4" and hasattr(config, "quantization_config"):
        del config.quantization_config  # of the run: what is merged is written in whole numbers
    if head is None:
        generation = _generation_config(model, tokenizer, stops)
        return Artefact(model, config, generation, tokenizer, dtype, 1.0, adapter, whole)
    config.score_bias = head.bias
    if head.step_separator is not None:
        config.step_separator = head.step_separator
    count = len(tokenizer)
    set_scorer_padding(config, tokenizer, stops)
    if adapter is not None and not whole and len(tokenizer) > count:
        raise UserError(
            f"every special token of {adapter.base} ends responses, so its reward model pads with a new one, for which "
            "an adapter has no embedding: set export.merge: true"
        )
    return Artefact(model, config, None, tokenizer, dtype, head.gain, adapter, whole)


def merges(adapter: Origin | None, merge: bool | None) -> bool:
    """Whether an export is of whole weights, where `merge` asks for it or not."""
    if adapter is None and merge:
        raise UserError("export.merge is true, and the run trains no adapter to merge: drop it, or set model.lora")
    if adapter is not None and adapter.merged and merge is False:
        raise UserError(
            f"export.merge is false, and merge_start makes a base of {adapter.start} that is on no disk: an adapter "
            "would stand on nothing. Set export.merge: true, or merge_start: false"
        )
    return bool(merge) or (adapter is not None and adapter.merged)


def write(made: Artefact, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write a folder that `from_pretrained` takes.

    Args:
        made: what stands beside the weights.
        weights: the model's whole state dict, on the CPU; of an adapter at least its own.
        folder: is there, and empty.

    Raises:
        UserError: the weights are ruined, or those that an adapter has learnt on are gone.
    """
    if made.adapter is not None:
        made.adapter.require_unchanged()
    if made.adapter is not None and not made.merge:
        write_own(made, made.adapter, refuse_ruined(weights), folder)
        return
    if made.adapter is not None:
        made, weights = merged(made, made.adapter, weights)
    model, sound = made.model, refuse_ruined(weights, made.model)
    tied: Mapping[str, str] = model.all_tied_weights_keys  # on a GPU, or sharded, they no longer share memory by now
    kept = {name: tensor for name, tensor in sound.items() if tied.get(name) not in sound}
    dtype = dtype_on_disk(made, kept)
    plan = model._get_dtype_plan(dtype)
    if made.generation is None:
        kept |= {name: tensor * made.gain for name, tensor in kept.items() if name.startswith("score.")}
        kept = with_embeddings(kept, model, made.config.get_text_config().vocab_size)
    cast = {name: _cast(tensor, plan_dtype(name, plan, dtype)) for name, tensor in kept.items()}
    held = model.config, getattr(model, "generation_config", None)
    model.config, model.generation_config = made.config, GenerationConfig()
    try:
        shards: dict[str, Any] = {} if made.max_shard_size is None else {"max_shard_size": made.max_shard_size}
        model.save_pretrained(folder, state_dict=cast, **shards)
    finally:
        model.config, model.generation_config = held  # type: ignore[assignment]
    made.config.dtype = dtype  # transformers wrote that of the weights in memory
    write_settings(made, folder)
    open_files(folder)


def open_files(folder: Path) -> None:
    """Let those read the weights who may read the rest: safetensors leaves its files to their owner alone."""
    mode = (folder / "tokenizer_config.json").stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def write_own(made: Artefact, adapter: Origin, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write an adapter's folder."""
    settings, own = whole_adapter(adapter, weights)
    own |= {key: own[key] * made.gain for key in (SCORE, SHIFT) if key in own}
    cast = {name: tensor if made.dtype is None else _cast(tensor, made.dtype) for name, tensor in own.items()}
    scores = {"score_bias": float(getattr(made.config, "score_bias", 0.0))}
    if (separator := getattr(made.config, "step_separator", None)) is not None:
        scores["step_separator"] = separator
    write_adapter(folder, settings, cast, scores, adapter.base_weights)
    write_settings(made, folder)
    open_files(folder)


def merged(made: Artefact, adapter: Origin, weights: Mapping[str, Tensor]) -> tuple[Artefact, dict[str, Tensor]]:
    """The same of the whole model, which is loaded anew as the run loaded it, the adapter folded in by PEFT.

    A base that was held in less than float32 is what the adapter has learnt on: it is rounded alike, and added to in
    float32.
    """
    settings, own = whole_adapter(adapter, weights)
    source = adapter.start if adapter.merged and adapter.start is not None else adapter.base
    trusted = type(made.model).__module__.startswith("transformers_modules")  # its code runs in this process already
    held: dict[str, Any] = {"merge_start": adapter.merged, "frozen_dtype": adapter.held, "learns": False}
    if made.generation is None:
        model: Any = load_scorer(source, None, trusted, kind=kind_of(made.model), **held).model
        widen(model, adapter.held)
        set_head(model, *pop_head(own))
    else:
        model = load_policy(source, False, trusted, **held).model
        widen(model, adapter.held)
    from peft import LoraConfig

    adapters = Adapters(model, adapter.base)
    adapters.load(adapter.name, without_dropout(LoraConfig(**settings)), own)
    adapters.merge([adapter.name])
    if model.config.tie_word_embeddings != made.config.tie_word_embeddings:  # PEFT changed the one and not the other
        for holder in (made.config, made.config.get_text_config()):
            holder.tie_word_embeddings = False
    return made._replace(model=model, adapter=None, merge=False), dict(model.state_dict())


def widen(model: PreTrainedModel, held: FrozenDtype | None) -> None:
    """Hold in float32 what a base was when it was held otherwise."""
    if held == "nf4":
        with silent_transformers():
            model.dequantize(torch.float32)
    elif held is not None:
        nn.Module.to(model, dtype_of(held))  # not yet, where an adapter was merged into it
    nn.Module.to(model, torch.float32)


def write_settings(made: Artefact, folder: Path) -> None:
    """All but the weights: what can be tried before an hour of training."""
    if made.adapter is None or made.merge:  # transformers would take an adapter with a config.json for a whole model
        made.config.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    if made.generation is not None:  # unchecked: transformers refuses to save sampling defaults that it has published
        made.generation.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    source = made.model.name_or_path
    if made.config.sub_configs and source:  # images and sound need more than a tokenizer
        for name in PROCESSOR_FILES:
            file = cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
            if file is not None:
                shutil.copyfile(file, folder / name)


def refuse_ruined(weights: Mapping[str, Tensor], model: PreTrainedModel | None = None) -> dict[str, Tensor]:
    """The weights, as they are.

    Args:
        weights: by name.
        model: whose parameters alone are looked at, since masks among its buffers hold infinity; None = all.

    Raises:
        UserError: some are no numbers, or larger than any network's.
    """
    learnt = set(weights) if model is None else {name for name, _ in model.named_parameters(remove_duplicate=False)}
    largest = {name: float(tensor.abs().max()) for name, tensor in weights.items() if name in learnt and tensor.numel()}
    ruined = {name: value for name, value in largest.items() if not value <= LARGEST}  # NaN is not
    if ruined:
        examples = ", ".join(f"{name} ({value:.3g})" for name, value in list(ruined.items())[:3])
        raise UserError(
            f"nothing is exported, since {len(ruined)} of {len(largest)} weights are ruined, like {examples}: a sound "
            f"one holds finite numbers up to {LARGEST:.0f}. Lower learning_rate or set trainer.gradient_clip_val; an "
            "older checkpoint is exported by lit-rlhf export --ckpt_path"
        )
    return dict(weights)


def dtype_on_disk(made: Artefact, weights: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype asked for; else the source's, unless the run holds less than that."""
    if made.dtype is not None:
        return made.dtype
    held = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    source = stored_dtype(made.model)
    return held if held.itemsize <= source.itemsize else source


def plan_dtype(name: str, plan: Mapping[str, torch.dtype], dtype: torch.dtype) -> torch.dtype:
    """The dtype of one weight: some models keep modules in float32, by a part of their names."""
    return next((kept for part, kept in plan.items() if part in name), dtype)


def with_embeddings(weights: dict[str, Tensor], model: PreTrainedModel, count: int) -> dict[str, Tensor]:
    """Weights with an embedding for each of `count` ids; those that are new are means, which nothing attends to."""
    embeddings = model.get_input_embeddings()
    name = next(f"{name}.weight" for name, module in model.named_modules() if module is embeddings)
    table = weights[name]
    if count <= len(table):
        return weights
    return weights | {name: torch.cat([table, table.mean(0, keepdim=True).expand(count - len(table), -1)])}


def set_scorer_padding(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> None:
    """Let config and tokenizer of a reward model name one pad token, and pad on the right.

    transformers reads the score of a padded row at its last token that is not the pad token, and would read a response
    one token early whose end pads, too. The tokenizer's own pad token serves, else its unknown or beginning token, else
    the last of its further special ones; where each of them ends responses, as GPT-2's one special token does, a new
    one. Models with absolute positions count the padding on the left.
    """
    special = sorted((number for number, t in tokenizer.added_tokens_decoder.items() if t.special), reverse=True)
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *special)
    chosen = next((token for token in candidates if token is not None and token not in stops), None)
    if chosen is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    else:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    tokenizer.padding_side = "right"
    pad = int(tokenizer.pad_token_id)
    text = config.get_text_config()
    for holder in (config, text):
        holder.pad_token_id = pad
    text.vocab_size = max(text.vocab_size, pad + 1)


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]
) -> GenerationConfig:
    generation = copy.deepcopy(model.generation_config)
    assert generation is not None
    generation.eos_token_id = list(stops) if len(stops) > 1 else stops[0]
    if tokenizer.pad_token_id is not None:
        generation.pad_token_id = tokenizer.pad_token_id
    elif generation.pad_token_id is None or generation.pad_token_id < 0:  # LLaMA's -1
        generation.pad_token_id = stops[0]  # as transformers would have it, and say at each call
    # No gradient has held back what the run never samples.
    tokens, embedded = set(tokenizer.get_vocab().values()), range(model.get_output_embeddings().weight.shape[0])
    suppressed = {*(generation.suppress_tokens or ()), *(token for token in embedded if token not in tokens)}
    generation.suppress_tokens = sorted(suppressed) or None
    return generation


def _cast(tensor: Tensor, dtype: torch.dtype) -> Any:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
