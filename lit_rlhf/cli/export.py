"""Export a checkpoint by itself, or an export anew: no run goes on, no data are read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.algorithms.checkpoint import read_facts, read_weights
from lit_rlhf.algorithms.process_reward_model import ProcessRewardModel
from lit_rlhf.algorithms.resumed_state import require_same_shapes
from lit_rlhf.algorithms.reward_model import RewardModel, stored_score_head
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.callbacks.export import (
    Dtype,
    as_dtype,
    as_shard_size,
    replace_export,
    require_apart,
    require_replaceable,
    starts_of,
)
from lit_rlhf.callbacks.model_card import NO_FACTS, base_model_of, carried_card, model_card, stored_facts
from lit_rlhf.cli.checkpoints import require_checkpoint
from lit_rlhf.cli.commands import WRITTEN
from lit_rlhf.data.chat import stop_token_ids
from lit_rlhf.errors import UserError, damaged, named_by, require, require_alike
from lit_rlhf.models import hub
from lit_rlhf.models.adapter_folders import Origin, named_base, saved_adapter
from lit_rlhf.models.heads import OF_RESPONSES, OF_STEPS, ScalarHeadKind
from lit_rlhf.models.hub import resolve
from lit_rlhf.models.loading import load_shape
from lit_rlhf.models.saving import Artefact, artefact
from lit_rlhf.models.tokens import load_tokenizer
from lit_rlhf.rollout.judges import stored_head_kind

HEADS = {RewardModel.exported: OF_RESPONSES, ProcessRewardModel.exported: OF_STEPS}  # by the network that is exported
OF_KIND: dict[ScalarHeadKind | None, Any] = {None: SFT, OF_RESPONSES: RewardModel, OF_STEPS: ProcessRewardModel}

EXAMPLE = WRITTEN["export"]


def export(
    ckpt_path: str | None = None,
    folder: str | None = None,
    model: str | None = None,
    policy: str | None = None,
    dtype: Dtype | None = None,
    merge: bool | None = None,
    max_shard_size: str | None = None,
    push: str | None = None,
    private: bool | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the model that a checkpoint holds as a Hugging Face folder, as its run would have done at its end.

    Or write one that is exported already anew: an adapter merged, in another dtype, in smaller files.

    Args:
        ckpt_path: a checkpoint that `fit` has kept: a file, or a folder of sharded weights.
        folder: where to; an older export there is replaced.
        model: in place of a checkpoint, the folder or hub name of a model, a reward model, or an adapter.
        policy: folder or hub name of the model that the checkpoint's run started from, which gives config and
            tokenizer; null = as the run named it.
        dtype: of the weights on disk; null = that of the model that the run started from, or that is exported anew.
        merge: of an adapter, write whole weights with the adapter folded in; false = the adapter alone; null = the
            adapter, unless its base is on no disk.
        max_shard_size: of a file of weights, such as 5GB: larger ones are several files; null = transformers' default.
        push: repository on the hub (owner/name) that the folder is uploaded to, too; it is made where there is none.
        private: whether only its owner sees a repository that is made; null = as the owner's account has it.
        trust_remote_code: run code that comes with that model.

    Raises:
        UserError: no checkpoint, or not of this model; the model is not there; ruined weights; a full disk; a hub that
            is not reached or refuses.
    """
    if ckpt_path is not None and model is not None:
        raise UserError(
            f"ckpt_path ({ckpt_path}) and model ({model}) are both given: name what to export by one of them"
        )
    if folder is None or (ckpt_path is None and model is None):
        lacking = [name for name, given in (("ckpt_path", ckpt_path or model), ("folder", folder)) if given is None]
        raise UserError(f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing; write {EXAMPLE}")
    require(policy is None or model is None, "policy", policy, "null with model: it is of checkpoints")
    require(private is None or push is not None, "private", private, "null without push: it is of repositories")
    require_repository(push)
    target, shard_size = Path(folder), as_shard_size(max_shard_size, "max_shard_size")
    require_replaceable(target, "folder")
    if ckpt_path is not None:
        what, made, weights, card = of_checkpoint(ckpt_path, target, policy, dtype, merge, trust_remote_code)
    else:
        assert model is not None
        what, made, weights, card = of_model(model, target, dtype, merge, trust_remote_code)
    replace_export(made._replace(max_shard_size=shard_size), weights, target, card)
    rank_zero_info(f"exported {what} to {folder}")
    if push is not None:
        rank_zero_info(f"uploaded {folder} to {hub.push(target, push, private)}")


def require_repository(name: str | None) -> None:
    """Refuse what cannot be the name of a repository, before an hour of work."""
    try:
        validate_repo_id(name or "owner/name")
    except ValueError as error:
        raise UserError(f"push: {error}") from error
    require(name is None or "/" in name, "push", name, "owner/name")


def of_model(
    name: str, target: Path, dtype: Dtype | None, merge: bool | None, trust_remote_code: bool
) -> tuple[str, Artefact, dict[str, Any], ModelCard]:
    """A model that is exported already: what it is, what stands beside its weights, these, and its card."""
    if merge and saved_adapter(name) is None:
        raise UserError(f"merge is true, and {name} holds no adapter: drop it")
    with named_by("model"):
        kind = stored_head_kind(name)
        options: dict[str, Any] = {"normalize": None} if kind is OF_RESPONSES else {}
        module = OF_KIND[kind](name, trust_remote_code=trust_remote_code, **options)
    made = module.artefact(as_dtype(dtype, "dtype"), merge=merge)
    require_apart(target, starts_of({"policy": name}, made.adapter, []), "folder")
    facts = NO_FACTS | {"start": name, "base_model": base_model_of(name)}
    return name, made, module.exported_weights(), carried_card(made, Path(name).expanduser(), facts)


def of_checkpoint(
    ckpt_path: str, target: Path, policy: str | None, dtype: Dtype | None, merge: bool | None, trust_remote_code: bool
) -> tuple[str, Artefact, dict[str, Any], ModelCard]:
    """Likewise of the model in a checkpoint; no weights of another are read."""
    require_checkpoint(Path(ckpt_path))
    facts = read_facts(ckpt_path)
    parameters = facts.get("hyper_parameters")
    source = policy or (parameters.get("policy") if isinstance(parameters, Mapping) else None)
    if any(name not in facts for name in ("exported", "algorithm", "tokens", "chat_template")):
        raise UserError(
            f"ckpt_path: {ckpt_path} does not say what to export; its run does so, resumed by fit --ckpt_path"
        )
    if source is None:
        raise UserError(
            f"ckpt_path: {ckpt_path} does not say what its run started from, which gives config and tokenizer; name "
            "that model by --policy"
        )
    origin: dict[str, Any] | None = None if facts.get("adapter") is None else {}
    require_alike(facts, {"exported": "", "algorithm": "", "tokens": 0, "adapter": origin}, damaged(ckpt_path, "facts"))
    network = facts["exported"]
    scores = HEADS.get(network)
    head = None if scores is None else stored_score_head(facts)._replace(step_separator=facts.get("step_separator"))
    try:
        adapter = stored_origin(facts, policy)
        model = load_shape(source if adapter is None else adapter.base, scores, trust_remote_code)
        tokenizer = load_tokenizer(source, model.config, trust_remote_code)
    except UserError as error:
        hint = "" if policy else f"; {source} is what the run started from: where is it now? Name it by --policy"
        raise UserError(f"{error}{hint}") from error
    if len(tokenizer) != facts["tokens"]:
        raise UserError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens and that of the run had {facts['tokens']}: save "
            "the run's own beside a copy of that model, and name the copy by --policy"
        )
    tokenizer.chat_template = facts["chat_template"]
    weights = read_weights(ckpt_path, network)
    if not weights:
        raise UserError(f"ckpt_path: {ckpt_path} holds no weights of a {network}")
    require_same_shapes(weights, model.state_dict() if adapter is None else weights, str(ckpt_path))
    stops = stop_token_ids(tokenizer, model.generation_config)
    made = artefact(model, tokenizer, stops, as_dtype(dtype, "dtype"), head, adapter, merge)
    named = parameters if isinstance(parameters, Mapping) else {}
    parts = (facts, *facts.values())  # the module, and among others the data
    held = [part["stands_on"] for part in parts if isinstance(part, Mapping) and "stands_on" in part]
    require_apart(target, starts_of({**named, "policy": source}, adapter, held), "folder")
    card = model_card(made, stored_facts(facts, damaged(ckpt_path, "card")))
    return f"{facts['algorithm']} of step {facts['global_step']}", made, weights, card


def stored_origin(facts: Mapping[str, Any], policy: str | None) -> Origin | None:
    """What the adapter in a checkpoint stands on; None where all weights have learnt.

    Args:
        facts: of the checkpoint.
        policy: where what the run started from is now; None = where it was.
    """
    if facts.get("adapter") is None:
        return None
    origin = Origin(**facts["adapter"])
    if policy is None:
        return origin
    saved = saved_adapter(policy)
    base = named_base(resolve(policy)) if saved is None else saved.base
    settings = {**origin.settings, "base_model_name_or_path": base}
    start = None if origin.start is None else named_base(resolve(policy))
    return replace(origin, base=base, settings=settings, start=start)
