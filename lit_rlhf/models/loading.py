"""Models from folders or hub names in their roles, checked before they are used.

Weights that learn are read in torch's default dtype, float32 unless Lightning or the command line says otherwise, those
that never learn in one of their own if asked for (`holding.py`); an export goes back to the dtype that they came in.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.initialization import no_init_weights

from lit_rlhf.errors import UserError, named_by
from lit_rlhf.models.adapter_folders import SavedAdapter, named_base, saved_adapter
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.fingerprints import fingerprints
from lit_rlhf.models.heads import OF_RESPONSES, ScalarHeadKind, head_kind, require_policy
from lit_rlhf.models.holding import FrozenDtype, reading_in, require_frozen_dtype
from lit_rlhf.models.hub import resolve
from lit_rlhf.models.policy import Policy, Scorer
from lit_rlhf.models.probe import choose_attention, disable_dropout
from lit_rlhf.models.starts import adapt
from lit_rlhf.models.tokens import keep_to_tokens, load_tokenizer
from lit_rlhf.models.trunk import backbone
from lit_rlhf.models.weights import load_model, stored_architectures, stored_dtype


def load_policy(
    name: str | Path,
    from_scratch: bool = False,
    trust_remote_code: bool = False,
    lora: LoRA | None = None,
    merge_start: bool = False,
    frozen_dtype: FrozenDtype | None = None,
    learns: bool = True,
) -> Policy:
    """Load a causal LM for packed batches.

    Args:
        name: folder or hub name of a Hugging Face causal LM, or of an adapter of PEFT, which is put on its base; or
            "demo" for the embedded model.
        from_scratch: random weights in the shape of its config instead of the stored weights.
        trust_remote_code: run model code that comes with the weights.
        lora: a new adapter that shall learn; None = all weights, or the adapter in the folder.
        merge_start: fold the adapter in the folder into its base.
        frozen_dtype: of the weights that never learn: the base of an adapter, or all of them; None = torch's default.
        learns: whether anything here will.

    Raises:
        UserError: no such model, or one that gives other numbers by itself than in this library.
    """
    if from_scratch and lora is not None:
        raise UserError("lora trains an adapter beside frozen weights, and from_scratch draws these: drop one")
    start = None if from_scratch else saved_adapter(name)
    base = name if start is None else start.base
    held = frozen_base(start, lora, merge_start, frozen_dtype, learns)
    with reading_for(lora, merge_start), named_base_of(start):
        read_as = None if merge_start else held
        model = load_model(AutoModelForCausalLM, base, from_scratch, trust_remote_code, held=read_as)
    stored = stored_architectures(base, trust_remote_code)
    scores = head_kind(stored) or (None if start is None else start.head_kind)
    if not from_scratch:
        require_policy(name, scores, stored if start is None else f"an adapter for {start.settings.get('task_type')}")
    policy = Policy(model)
    policy.uncut = model.__dict__.get("uncut")
    choose_attention(policy, str(name))
    adapt(policy, name, start, lora, merge_start, "policy", held)
    note_sources(policy, () if from_scratch else (base, name), learns)
    return policy


def load_policy_with_tokenizer(
    name: str | Path,
    from_scratch: bool = False,
    trust_remote_code: bool = False,
    lora: LoRA | None = None,
    merge_start: bool = False,
    frozen_dtype: FrozenDtype | None = None,
    learns: bool = True,
) -> tuple[Policy, Any]:
    """A policy and the tokenizer beside it, whose tokens the policy keeps to; see the two functions for each."""
    policy = load_policy(name, from_scratch, trust_remote_code, lora, merge_start, frozen_dtype, learns)
    tokenizer = load_tokenizer(name, policy.model.config, trust_remote_code)
    keep_to_tokens(policy, tokenizer, str(name))
    return policy, tokenizer


def load_scorer(
    name: str | Path,
    fresh_head: bool | None = False,
    trust_remote_code: bool = False,
    lora: LoRA | None = None,
    merge_start: bool = False,
    role: str = "reward_model",
    frozen_dtype: FrozenDtype | None = None,
    learns: bool = True,
    kind: ScalarHeadKind = OF_RESPONSES,
) -> Scorer:
    """Load a classifier of one label, from a reward model's folder or on top of a causal LM.

    Args:
        name: folder or hub name of a Hugging Face model, or of an adapter of PEFT; or "demo".
        fresh_head: draw the scalar head anew, N(0, 1/(d+1)) in variance (Stiennon et al. 2020,
            https://arxiv.org/abs/2009.01325; "N+ details", https://arxiv.org/abs/2403.17031), rather than load it;
            None = only where the folder holds none.
        trust_remote_code: run model code that comes with the weights.
        lora: as in `load_policy`.
        merge_start: as in `load_policy`.
        role: names the adapter that learns, if one does.
        frozen_dtype: as in `load_policy`.
        learns: as in `load_policy`.
        kind: what its head scores: whole responses, or steps.

    Raises:
        UserError: no such model, or no trained scalar head in it and `fresh_head` is off.
    """
    start = saved_adapter(name)
    base = name if start is None else start.base
    held = frozen_base(start, lora, merge_start, frozen_dtype, learns)
    with reading_for(lora, merge_start), named_base_of(start):
        read_as = None if merge_start else held
        model = load_model(kind.auto_class, base, False, trust_remote_code, 1, bool(fresh_head), read_as)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(f"{name}: {type(model).__name__} has no linear `score` head; its architecture is not supported")
    architectures = stored_architectures(base, trust_remote_code)
    stored = head_kind(architectures)
    trained = kind in (stored, None if start is None else start.head_kind)
    if fresh_head is None and not trained and (other := stored or (None if start is None else start.head_kind)):
        rank_zero_warn(
            f"{name} holds a {other.named}: its {other.head} is left out, and a {kind.head} is drawn anew; "
            "model.fresh_head: true says that this is meant"
        )
    fresh_head = not trained if fresh_head is None else fresh_head
    if not fresh_head and not trained:
        remedy = "Where one is to be trained, set model.fresh_head: null"
        if not learns:
            remedy = f"Train a {kind.named} first ({kind.trained_by}), and name the folder that it exports"
        elif role == "critic":
            remedy = "Name a reward model, or set model.critic: null to start from the policy"
        raise UserError(f"{name} holds no trained reward head: its config names {architectures}. {remedy}")
    if model.__dict__.get("uncut") is not None:
        model.score.to(model.__dict__["uncut"])
    if fresh_head:
        initialize_score_head(model)
    scorer = Scorer(model, fresh_head)
    scorer.uncut = model.__dict__.get("uncut")
    choose_attention(scorer, str(name))
    adapt(scorer, name, start, lora, merge_start, role, held)
    note_sources(scorer, (base, name), learns)
    return scorer


def reading_for(lora: LoRA | None, merge_start: bool) -> AbstractContextManager[None]:
    """Read weights in what they are computed with: merged ones in float32, before casts, and DoRA's norms as held."""
    if merge_start:
        return reading_in(torch.float32)
    return reading_in(torch.get_default_dtype()) if lora is not None and lora.use_dora else nullcontext()


def named_base_of(start: SavedAdapter | None) -> AbstractContextManager[None]:
    """Say of which adapter the base is that cannot be loaded; None = of none."""
    return nullcontext() if start is None else named_by(f"{start.name}: its base")


def note_sources(network: Policy | Scorer, names: tuple[str | Path, ...], learns: bool) -> None:
    """Let a network know where its weights came from, and fingerprint those that no checkpoint will hold.

    Args:
        network: with its adapters on.
        names: folder or hub name of a base, and of what was put on it or, again, of the base.
        learns: whether anything of it will.
    """
    network.read_from = tuple(dict.fromkeys(named_base(resolve(name)) for name in names))
    if not learns:
        network.stands_on = fingerprints(network.read_from)
    elif network.origin is not None:
        network.stands_on = network.origin.stands_on


def frozen_base(
    start: SavedAdapter | None,
    lora: LoRA | None,
    merge_start: bool,
    frozen_dtype: FrozenDtype | None,
    learns: bool,
) -> FrozenDtype | None:
    """The dtype asked for where the weights of a folder stay as they are; None where they learn."""
    require_frozen_dtype(frozen_dtype)
    if merge_start and frozen_dtype == "nf4":
        raise UserError(
            "frozen_dtype: nf4 is made of weights as they are in a folder, and merge_start changes them first: export "
            "merged weights (export.merge: true), and start from those"
        )
    stays = not learns or lora is not None or (start is not None and not merge_start)
    return frozen_dtype if stays else None


def load_shape(
    name: str | Path, scores: ScalarHeadKind | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model without values for its weights, which lie on the meta device.

    Args:
        name: folder or hub name of a Hugging Face causal LM, or "demo".
        scores: what a scalar head in place of the language model's scores.
        trust_remote_code: run model code that comes with the weights.
    """
    kind, num_labels = (AutoModelForCausalLM, None) if scores is None else (scores.auto_class, 1)
    with torch.device("meta"):
        return cast(PreTrainedModel, load_model(kind, name, True, trust_remote_code, num_labels, fresh_head=True))


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
    shared = policy.uncut is not None
    options: dict[str, Any] = {"attn_implementation": policy.model.config._attn_implementation}
    if shared:
        options["dtype"] = next(backbone(policy.model).parameters()).dtype
    try:
        with no_init_weights() if shared else nullcontext():
            model = AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=trust_remote_code, **options
            )
    except ValueError as error:
        raise UserError(
            f"transformers has no sequence classification model for {type(config).__name__}, which a critic "
            "or a reward model is; SFT and DPO need none"
        ) from error
    backbone(model).load_state_dict(backbone(policy.model).state_dict(), assign=shared)  # until both are cut
    model.__dict__["stored_dtype"] = stored_dtype(policy.model)
    if shared:
        model.score.to(policy.uncut)
    disable_dropout(model)
    initialize_score_head(model)
    scorer = Scorer(model, fresh_head=True)
    scorer.quiet, scorer.uncut = policy.quiet, policy.uncut
    return scorer.train()
