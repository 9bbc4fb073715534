"""Tokenizers beside models: loaded, and held against what a model embeds and what other networks read."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError, one_line
from lit_rlhf.models.adapter_folders import saved_adapter
from lit_rlhf.models.hub import first_line, hint, hub_or_cache, in_transformers, require_json, require_no_mark, resolve
from lit_rlhf.models.policy import Policy, context_length
from lit_rlhf.models.weights import load_config


def load_tokenizer(name: str | Path, model_config: PretrainedConfig, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model or an adapter, or beside its base; `model_max_length` is cut to the model's context.

    Raises:
        UserError: no tokenizer there, no end-of-sequence token, or more tokens than the model has embeddings.
    """
    saved = saved_adapter(name)
    alone = saved is not None and not (Path(saved.name) / "tokenizer_config.json").exists()
    source = resolve(saved.base if saved is not None and alone else name)
    require_json(source, name, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    require_utf8(Path(source) / "chat_template.jinja", name)
    try:
        with hub_or_cache(source):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a damaged file it may be any
        if not isinstance(error, OSError | ValueError) and (trust_remote_code or not in_transformers(error)):
            raise
        require_json(source, name, "tokenizer.json")  # megabytes, which are read once more where they are at fault
        raise UserError(
            f"{name}: no tokenizer could be loaded there ({first_line(error)}){hint(source, error)}; "
            "save the model's own beside it (tokenizer.save_pretrained)"
        ) from error
    check_vocabulary(tokenizer, model_config.get_text_config().vocab_size, str(name))
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer has no eos_token, so no response could ever end; set one and save it")
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float) or not longest > 0:
        raise UserError(
            f"{name}: model_max_length ({one_line(repr(longest))}) in tokenizer_config.json must be a number above 0"
        )
    context = context_length(model_config)
    if context is not None:
        tokenizer.model_max_length = min(longest, context)
    return tokenizer


def tokenizer_beside(name: str | Path, trust_remote_code: bool = False) -> Any:
    """As of `load_tokenizer`, with the config that is there, or with that of an adapter's base; no weight is read."""
    saved = saved_adapter(name)
    return load_tokenizer(
        name, load_config(name if saved is None else saved.base, trust_remote_code), trust_remote_code
    )


def require_utf8(file: Path, name: str | Path) -> None:
    """Refuse a file of a model's that is there and no text in UTF-8 as transformers reads it, without a mark."""
    try:
        if file.is_file():
            require_no_mark(file, name)
            file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: {file.name} is no text in UTF-8 ({error}); save it as UTF-8") from error


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
    unused = np.ones(policy.vocabulary_size, dtype=bool)
    unused[list(tokenizer.get_vocab().values())] = False
    ids = torch.from_numpy(np.flatnonzero(unused))
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
    if differing := differing_tokens(tokenizer, other):
        raise UserError(
            f"{name} was trained with another tokenizer than the policy ({differing}): it would read other words than "
            "the policy wrote. Take two of one tokenizer, as two that were trained from the same SFT model"
        )


def share_tokenizer(module: Any, tokenizer: PreTrainedTokenizerBase, owner: str) -> None:
    """Hold a tokenizer that makes the ids a module learns from to the module's own, where that is another object.

    Args:
        module: learns; one of the user's own may have no `tokenizer`.
        tokenizer: its texts are cut to the context of the module's from now on; its chat template becomes the module's,
            so that it is exported.
        owner: of the tokenizer, for the message.

    Raises:
        UserError: the two differ in an id or a word, or in what ends a response.
    """
    own = getattr(module, "tokenizer", None)
    if own is None or own is tokenizer:
        return
    differing = differing_tokens(own, tokenizer)
    if not differing and own.eos_token != tokenizer.eos_token:
        differing = f"responses end with {tokenizer.eos_token} against {own.eos_token}"
    if differing:
        raise UserError(
            f"{owner}.tokenizer is another than that of {type(module).__name__} ({differing}): its ids would be learnt "
            "as other words. Pass tokenizer=model.tokenizer"
        )
    tokenizer.model_max_length = min(own.model_max_length, tokenizer.model_max_length)
    own.chat_template = tokenizer.chat_template


def differing_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """In what another tokenizer differs, a pad token of its own aside; empty if in no id and no word."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if other.pad_token not in ours:
        theirs.pop(other.pad_token, None)
    if ours == theirs:
        return ""
    differing = sorted(set(ours.items()) ^ set(theirs.items()))[:3]
    return f"{len(theirs)} against {len(ours)} tokens; for example {differing}"
