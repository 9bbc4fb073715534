"""Models from folders or hub names, checked before they are used.

Weights are loaded in float32; the Trainer's `precision` decides what is computed in, and an export goes back to the
dtype that they came in.
"""

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from lit_rlhf.errors import UserError
from lit_rlhf.models.hub import first_line, hint, hub_or_cache, resolve
from lit_rlhf.models.policy import Policy, Scorer, backbone
from lit_rlhf.models.probe import choose_attention, disable_dropout
from lit_rlhf.models.tokens import keep_to_tokens, load_tokenizer


def load_policy(name: str | Path, from_scratch: bool = False, trust_remote_code: bool = False) -> Policy:
    """Load a causal LM for packed batches.

    Args:
        name: folder or hub name of a Hugging Face causal LM, or "demo" for the embedded model.
        from_scratch: random weights in the shape of its config instead of the stored weights.
        trust_remote_code: run model code that comes with the weights.

    Raises:
        UserError: no such model, or one that gives other numbers by itself than in this library.
    """
    model = _load(AutoModelForCausalLM, name, from_scratch, trust_remote_code)
    stored = stored_architectures(name, trust_remote_code)
    if not from_scratch and has_score_head(stored):
        raise UserError(f"{name} holds a reward model ({stored}), not a policy; name the folder of a causal LM")
    policy = Policy(model)
    choose_attention(policy, str(name))
    return policy


def load_policy_with_tokenizer(
    name: str | Path, from_scratch: bool = False, trust_remote_code: bool = False
) -> tuple[Policy, Any]:
    """A policy and the tokenizer beside it, whose tokens the policy keeps to; see the two functions for each."""
    policy = load_policy(name, from_scratch, trust_remote_code)
    tokenizer = load_tokenizer(name, policy.model.config, trust_remote_code)
    keep_to_tokens(policy, tokenizer, str(name))
    return policy, tokenizer


def load_scorer(name: str | Path, fresh_head: bool | None = False, trust_remote_code: bool = False) -> Scorer:
    """Load a one-label sequence classifier, from a reward model's folder or on top of a causal LM.

    Args:
        name: folder or hub name of a Hugging Face model, or "demo".
        fresh_head: draw the scalar head anew, N(0, 1/(d+1)) in variance (Stiennon et al. 2020,
            https://arxiv.org/abs/2009.01325; "N+ details", https://arxiv.org/abs/2403.17031), rather than load it;
            None = only where the folder holds none.
        trust_remote_code: run model code that comes with the weights.

    Raises:
        UserError: no such model, or no trained scalar head in it and `fresh_head` is off.
    """
    model = _load(AutoModelForSequenceClassification, name, False, trust_remote_code, num_labels=1)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{name}: {type(model).__name__} has no linear `score` head; its architecture is not supported")
    architectures = stored_architectures(name, trust_remote_code)
    trained = has_score_head(architectures)
    fresh_head = not trained if fresh_head is None else fresh_head
    if fresh_head:
        initialize_score_head(model)
    elif not trained:
        raise UserError(f"{name} holds no trained reward head: its config names {architectures}")
    scorer = Scorer(model, fresh_head)
    choose_attention(scorer, str(name))
    return scorer


def load_shape(name: str | Path, classifies: bool, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without values for its weights, which lie on the meta device.

    Args:
        name: folder or hub name of a Hugging Face causal LM, or "demo".
        classifies: a one-label sequence classifier of its shape instead.
        trust_remote_code: run model code that comes with the weights.
    """
    kind, options = (
        (AutoModelForSequenceClassification, {"num_labels": 1}) if classifies else (AutoModelForCausalLM, {})
    )
    with torch.device("meta"):
        return cast(PreTrainedModel, _load(kind, name, True, trust_remote_code, **options))


def initialize_score_head(model: PreTrainedModel) -> None:
    """Draw the scalar head from N(0, 1/√(d+1)) and set its bias, if any, to 0."""
    head = cast(nn.Linear, model.score)
    model.config.score_bias = 0.0
    nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def scorer_from_policy(policy: Policy, trust_remote_code: bool = False) -> Scorer:
    """A scorer on a copy of the policy's trunk, with a fresh head."""
    config = copy.deepcopy(policy.model.config)
    config.num_labels = 1
    try:
        model = AutoModelForSequenceClassification.from_config(
            config, attn_implementation=policy.model.config._attn_implementation, trust_remote_code=trust_remote_code
        )
    except ValueError as error:
        raise UserError(
            f"transformers has no sequence classification model for {type(config).__name__}, which a critic "
            "or a reward model is; SFT and DPO need none"
        ) from error
    backbone(model).load_state_dict(backbone(policy.model).state_dict())
    disable_dropout(model)
    initialize_score_head(model)
    return Scorer(model, fresh_head=True)


def _load(auto_class: Any, name: str | Path, from_scratch: bool, trust_remote_code: bool, **kwargs: Any) -> Any:
    source = resolve(name)
    with hub_or_cache(source):
        return _load_from(source, auto_class, name, from_scratch, trust_remote_code, **kwargs)


def _load_from(
    source: str, auto_class: Any, name: str | Path, from_scratch: bool, trust_remote_code: bool, **kwargs: Any
) -> Any:
    try:
        if not from_scratch and find_adapter_config_file(source) is not None:  # transformers would apply it, unasked
            raise UserError(
                f"{name} holds an adapter of PEFT (adapter_config.json), which is no part of a model here: merge it "
                "into its model (merge_and_unload) and save that; or remove the adapter's files, to start without it"
            )
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        for key, value in kwargs.items():
            setattr(config, key, value)
        dtype = _dtype_of(config, source)
        if from_scratch:
            model = auto_class.from_config(
                config, attn_implementation="eager", dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        else:
            verbosity = transformers_logging.get_verbosity()
            transformers_logging.set_verbosity_error()  # its report of missing weights is our error, below
            try:
                model, report = auto_class.from_pretrained(
                    source,
                    config=config,
                    attn_implementation="eager",  # `choose_attention` sees to ours
                    dtype=torch.float32,
                    trust_remote_code=trust_remote_code,
                    use_safetensors=True,
                    output_loading_info=True,
                )
            finally:
                transformers_logging.set_verbosity(verbosity)
            missing = sorted(key for key in report["missing_keys"] if not key.startswith("score."))
            if missing:
                raise UserError(
                    f"{name}: its weights lack {len(missing)} tensors of {type(model).__name__}, like {missing[:3]}; "
                    "they would be left random: is it the folder of another kind of model?"
                )
    except UserError:
        raise
    except SafetensorError as error:
        files = sorted(path.name for path in Path(source).glob("*.safetensors"))
        raise UserError(
            f"{name}: damaged or cut short, copy it anew: {', '.join(files) or 'weights'} ({error})"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: no model could be loaded there ({first_line(error)}). Expected a folder with config.json and "
            f"model.safetensors, or a name on the Hugging Face hub{hint(source, error)}"
        ) from error
    if type(model.config) is not type(config):
        rank_zero_warn(
            f"{name} is a model of text and more; what is loaded, trained and exported is its {type(model).__name__} "
            "alone: images or sound are nothing to it"
        )
    if from_scratch or not model.can_generate():  # else it is there; a reward model asks it for stop tokens
        with suppress(OSError):  # there need not be one
            model.generation_config = GenerationConfig.from_pretrained(source)
    model.__dict__["stored_dtype"] = dtype
    disable_dropout(model)
    return model.train()  # from_pretrained leaves it in eval mode


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of a model's weights where they came from; in memory they are float32."""
    return cast(torch.dtype, model.__dict__.get("stored_dtype", torch.float32))


def _dtype_of(config: PretrainedConfig, source: str) -> torch.dtype:
    named = config.dtype or config.get_text_config().dtype
    files = sorted(Path(source).glob("*.safetensors")) if named is None else []
    if files:  # written without transformers
        with safe_open(files[0], "pt") as weights:
            named = weights.get_tensor(next(iter(weights.keys()))).dtype
    return named if named in (torch.bfloat16, torch.float16) else torch.float32


def stored_architectures(name: str | Path, trust_remote_code: bool = False) -> list[str]:
    """The classes that a folder's weights were saved from, by its config."""
    source = resolve(name)
    with hub_or_cache(source):
        return list(AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).architectures or [])


def has_score_head(architectures: list[str]) -> bool:
    """Whether weights of these classes are a reward model's: with a scalar head that was trained."""
    return any("ForSequenceClassification" in architecture for architecture in architectures)
