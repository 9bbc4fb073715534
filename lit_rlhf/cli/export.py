"""Export a checkpoint by itself: no run goes on, no data are read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.algorithms.checkpoint import read_facts, read_weights
from lit_rlhf.algorithms.process_reward_model import ProcessRewardModel
from lit_rlhf.algorithms.resumed_state import require_same_shapes
from lit_rlhf.algorithms.reward_model import RewardModel, stored_score_head
from lit_rlhf.callbacks.export import Dtype, as_dtype, replace_export, require_apart, require_replaceable, starts_of
from lit_rlhf.cli.checkpoints import require_checkpoint
from lit_rlhf.data.chat import stop_token_ids
from lit_rlhf.errors import UserError, damaged, require_alike
from lit_rlhf.models.adapter_folders import Origin, named_base, saved_adapter
from lit_rlhf.models.heads import OF_RESPONSES, OF_STEPS
from lit_rlhf.models.hub import resolve
from lit_rlhf.models.loading import load_shape
from lit_rlhf.models.saving import artefact
from lit_rlhf.models.tokens import load_tokenizer

HEADS = {RewardModel.exported: OF_RESPONSES, ProcessRewardModel.exported: OF_STEPS}  # by the network that is exported


def export(
    ckpt_path: str,
    folder: str,
    policy: str | None = None,
    dtype: Dtype | None = None,
    merge: bool | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the model that a checkpoint holds as a Hugging Face folder, as its run would have done at its end.

    Args:
        ckpt_path: a checkpoint that `fit` has kept: a file, or a folder of sharded weights.
        folder: where to; an older export there is replaced.
        policy: folder or hub name of the model that the run started from, which gives config and tokenizer; null = as
            the run named it.
        dtype: of the weights on disk; null = that of the model that the run started from.
        merge: where an adapter has learnt, write whole weights with the adapter folded in; false = the adapter alone;
            null = the adapter, unless its base is on no disk.
        trust_remote_code: run code that comes with that model.

    Raises:
        UserError: no checkpoint, or not of this model; the model is not there; ruined weights; a full disk.
    """
    require_checkpoint(Path(ckpt_path))
    require_replaceable(Path(folder), "folder")
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
    require_apart(Path(folder), starts_of({**named, "policy": source}, adapter, held), "folder")
    replace_export(made, weights, Path(folder))
    rank_zero_info(f"exported {facts['algorithm']} of step {facts['global_step']} to {folder}")


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
