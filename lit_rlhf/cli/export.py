"""Export a checkpoint by itself: no run goes on, no data are read."""

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.algorithms.checkpoint import read_facts, read_weights, require_same_shapes
from lit_rlhf.algorithms.reward_model import RewardModel, stored_score_head
from lit_rlhf.callbacks.export import Dtype, as_dtype, replace_export, require_replaceable
from lit_rlhf.cli.checkpoints import require_checkpoint
from lit_rlhf.data.chat import stop_token_ids
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import load_shape
from lit_rlhf.models.saving import artefact
from lit_rlhf.models.tokens import load_tokenizer


def export(
    ckpt_path: str,
    folder: str,
    policy: str | None = None,
    dtype: Dtype | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the model that a checkpoint holds as a Hugging Face folder, as its run would have done at its end.

    Args:
        ckpt_path: a checkpoint that `fit` has kept: a file, or a folder of sharded weights.
        folder: where to; an older export there is replaced.
        policy: folder or hub name of the model that the run started from, which gives config and tokenizer; null = as
            the run named it.
        dtype: of the weights on disk; null = that of the model that the run started from.
        trust_remote_code: run code that comes with that model.

    Raises:
        UserError: no checkpoint, or not of this model; the model is not there; ruined weights; a full disk.
    """
    require_checkpoint(Path(ckpt_path))
    require_replaceable(Path(folder), "folder")
    facts = read_facts(ckpt_path)
    source = policy or facts.get("hyper_parameters", {}).get("policy")
    if source is None or "exported" not in facts:
        raise UserError(
            f"ckpt_path: {ckpt_path} does not say what to export; its run does so, resumed by fit --ckpt_path"
        )
    network = facts["exported"]
    head = stored_score_head(facts) if network == RewardModel.exported else None
    try:
        model = load_shape(source, head is not None, trust_remote_code)
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
    require_same_shapes(weights, model.state_dict())
    stops = stop_token_ids(tokenizer, model.generation_config)
    replace_export(artefact(model, tokenizer, stops, as_dtype(dtype, "dtype"), head), weights, Path(folder))
    rank_zero_info(f"exported {facts['algorithm']} of step {facts['global_step']} to {folder}")
