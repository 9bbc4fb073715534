"""Models and tokenizers from folders or hub names, checked before they are used.

Weights are loaded in float32; the Trainer's `precision` decides what is computed in, and an export goes back to the
dtype that they came in.
"""

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from lit_rlhf.errors import UserError, looks_like_a_path
from lit_rlhf.files import heal
from lit_rlhf.models.hub import HUB_NAME, hub_or_cache
from lit_rlhf.models.policy import Policy, Scorer, backbone, context_length
from lit_rlhf.models.probe import choose_attention, disable_dropout

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"


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


def load_tokenizer(name: str | Path, model_config: PretrainedConfig, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model, its `model_max_length` cut to the model's context.

    Raises:
        UserError: no tokenizer there, no end-of-sequence token, or more tokens than the model has embeddings.
    """
    source = _resolve(name)
    try:
        with hub_or_cache(source):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: no tokenizer could be loaded there ({_first_line(error)}){_hint(source, error)}; "
            "save the model's own beside it (tokenizer.save_pretrained)"
        ) from error
    check_vocabulary(tokenizer, model_config.get_text_config().vocab_size, str(name))
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has no eos_token, so no response could ever end; set one and save it")
    context = context_length(model_config)
    if context is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    return tokenizer


def keep_to_tokens(policy: Policy, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Leave ids that stand for no token of the tokenizer out of a policy's distribution.

    Many models have more embeddings than tokens, mostly so that the number divides well. Sampled, such an id would be
    text to nobody, and perhaps have no embedding in a reward model.

    Args:
        policy: samples and gives log-probs over the tokens alone from now on.
        tokenizer: says which ids are tokens.
        name: of the policy, for messages.

    Raises:
        UserError: the tokenizer has ids that the policy does not embed.
    """
    check_vocabulary(tokenizer, policy.vocabulary_size, name)
    unused = torch.ones(policy.vocabulary_size, dtype=torch.bool)
    unused[list(tokenizer.get_vocab().values())] = False
    ids = unused.nonzero()[:, 0]
    if len(ids) and policy.unused_ids is None:
        rank_zero_info(
            f"{name}: {len(ids)} of {len(unused)} ids stand for no token of its tokenizer; none of them is sampled, "
            "and log-probs leave them out"
        )
    policy.unused_ids = ids.to(policy.model.device) if len(ids) else None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int, name: str) -> None:
    """Refuse a tokenizer that can make ids which the model has no embedding for."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocabulary_size:
        raise UserError(
            f"{name}: the tokenizer has ids up to {highest}, the model embeds {vocabulary_size} (0 to "
            f"{vocabulary_size - 1}); use the tokenizer the model was trained with, or resize its embeddings first"
        )


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a network that would read other words in the policy's ids than the policy wrote.

    A pad token of the network's own, as an exported reward model may have, is no word.

    Args:
        tokenizer: the policy's.
        other: that of the network which reads the policy's ids.
        name: of the network, with its role.

    Raises:
        UserError: the two differ in an id or a word.
    """
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if other.pad_token not in ours:
        theirs.pop(other.pad_token, None)
    if ours != theirs:
        differing = sorted(set(ours.items()) ^ set(theirs.items()))[:3]
        raise UserError(
            f"{name} was trained with another tokenizer than the policy ({len(theirs)} against {len(ours)} tokens; for "
            f"example {differing}): it would read other words than the policy wrote. Start both from the same SFT model"
        )


def _load(auto_class: Any, name: str | Path, from_scratch: bool, trust_remote_code: bool, **kwargs: Any) -> Any:
    source = _resolve(name)
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
            f"{name}: no model could be loaded there ({_first_line(error)}). Expected a folder with config.json and "
            f"model.safetensors, or a name on the Hugging Face hub{_hint(source, error)}"
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
    source = _resolve(name)
    with hub_or_cache(source):
        return list(AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).architectures or [])


def has_score_head(architectures: list[str]) -> bool:
    """Whether weights of these classes are a reward model's: with a scalar head that was trained."""
    return any("ForSequenceClassification" in architecture for architecture in architectures)


def _resolve(name: str | Path) -> str:
    if str(name) == "demo":
        return str(DEMO_MODEL)
    try:
        path = Path(name).expanduser()
        heal(path)  # an export that was killed between two names
        is_there, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, with a zero byte, or of ~nobody
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{str(name)[:80]!r} cannot be the name of a model ({why})") from error
    if not str(name) or (is_there and not is_folder):
        raise UserError(
            f"{str(name)!r}: no model could be loaded there: expected a folder with config.json and model.safetensors, "
            f"or a name on the Hugging Face hub; this is {'a file' if str(name) else 'no name'}"
        )
    if not is_there and (looks_like_a_path(str(name)) or not HUB_NAME.fullmatch(str(name))):
        raise UserError(f"{name}: no model could be loaded there: there is no folder {path.absolute()}")
    return str(path) if is_there else str(name)


def _hint(source: str, error: Exception) -> str:
    if "trust_remote_code=True" in str(error):
        return "; if you trust that code, set trust_remote_code: true"
    if source == str(DEMO_MODEL):
        return "; the embedded demo model has no weights: SFT trains it with from_scratch: true, and exports a policy"
    if Path(source).is_dir():
        return f"; the folder holds {sorted(p.name for p in Path(source).iterdir())[:8]}"
    return f"; there is no folder {Path(source).absolute()}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].removesuffix(" from one of: ")  # what could be is in further lines
