"""What a run starts from: a whole model, or an adapter on its base; and what learns then: all of it, or an adapter."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig

from lit_rlhf.errors import UserError, named_by
from lit_rlhf.models.adapter_folders import Origin, SavedAdapter, named_base, plain_config, pop_head
from lit_rlhf.models.adapters import Adapters, LoRA
from lit_rlhf.models.fingerprints import fingerprint
from lit_rlhf.models.heads import kind_of, set_head
from lit_rlhf.models.holding import FrozenDtype, dtype_of
from lit_rlhf.models.hub import resolve
from lit_rlhf.models.policy import Policy, Scorer
from lit_rlhf.models.weight_checks import check_special_tokens

START = "start"  # the adapter that a run started from, where another learns on top of it


def adapt(
    network: Policy | Scorer,
    name: str | Path,
    start: SavedAdapter | None,
    lora: LoRA | None,
    merge_start: bool,
    role: str,
    held: FrozenDtype | None = None,
) -> None:
    """Put the adapters on a network that was loaded whole, from the folder or from the base of the one there.

    Args:
        network: its attention is chosen already.
        name: folder or hub name that the run starts from.
        start: the adapter there, if it holds one.
        lora: what shall learn in place of the whole; None = the adapter there, or all weights.
        merge_start: fold the adapter there into its base first.
        role: names the adapter that learns.
        held: the dtype of weights that never learn, if one is asked for.

    Raises:
        UserError: nothing to merge, an adapter that does not fit, or two that cannot be told from one sum.
    """
    if start is None and merge_start:
        raise UserError(f"merge_start: {name} holds no adapter of PEFT (adapter_config.json) to merge; drop it")
    if start is None and lora is None:
        return
    base = named_base(resolve(name) if start is None else start.base)
    adapters = Adapters(network.model, base)
    below: tuple[str, ...] = ()
    if start is not None:
        place = role if lora is None and not merge_start else START
        load_start(network, adapters, start, place, trained=place == role)
        if merge_start:
            adapters.merge([START])
            if lora is not None:
                nn.Module.to(network.model, dtype_of(held))
            adapters = Adapters(network.model, base)
        elif lora is not None:
            below = (START,)
            refuse_sum_of_dora(start, lora)
    if lora is not None:
        task_type = kind_of(network.model).task_type if isinstance(network, Scorer) else "CAUSAL_LM"
        adapters.add(role, lora.config(base, task_type))
    elif merge_start:
        network.model.requires_grad_(True)
        return
    model: Any = network.model
    if isinstance(network, Scorer):
        model.score.float().requires_grad_(True)  # it learns, and so is held as adapters are
    network.adapters, network.active = adapters, (*below, role)
    settings = plain_config(model.peft_config[role])
    under = None
    if start is not None and (lora is not None or merge_start):  # found again at the end, from wherever
        under = named_base(resolve(name))
    network.origin = Origin(
        base,
        under,
        merge_start,
        settings,
        role,
        fresh=lora is not None,
        held=held,
        base_weights=fingerprint(base),
        start_weights=None if under is None else fingerprint(under),
    )


def load_start(network: Policy | Scorer, adapters: Adapters, start: SavedAdapter, place: str, trained: bool) -> None:
    """Put an adapter from a folder on its base, with its scalar head and its generation config."""
    weights, config = start.weights(), start.config()
    head, shift = pop_head(weights)
    if isinstance(network, Scorer):
        kind = kind_of(network.model)
        config.task_type = kind.task_type
        if head is not None and not network.fresh_head:
            require_fits(network, head)
            if start.bias is not None:
                network.model.config.score_bias = start.bias
            set_head(network.model, head, shift)
            network.model.config.step_separator = start.step_separator
        elif not network.fresh_head and not kind.made(list(network.model.config.architectures or [])):
            raise UserError(f"{start.name}: its adapter_model.safetensors holds no scalar head; copy it anew")
    with named_by(start.name):
        adapters.load(place, config, weights, trained)
    with suppress(OSError):  # there need not be one
        generation = GenerationConfig.from_pretrained(resolve(start.name))
        check_special_tokens(network.model.config, generation, start.name)
        network.model.generation_config = generation


def require_fits(scorer: Scorer, head: Tensor) -> None:
    """Refuse the scalar head of another base."""
    model: Any = scorer.model
    there = model.score.weight
    if there.shape != head.shape:
        raise UserError(
            f"the adapter's scalar head is {tuple(head.shape)}, that of its base {tuple(there.shape)}: it is of "
            "another base"
        )


def refuse_sum_of_dora(start: SavedAdapter, lora: LoRA) -> None:
    """Refuse an adapter on top of another where one scales the whole weight, which the other is no part of."""
    if lora.use_dora or start.settings.get("use_dora"):
        which = "lora.use_dora" if lora.use_dora else f"that of {start.name}"
        raise UserError(
            f"an adapter on top of {start.name} would not add up with it: DoRA ({which}) scales the whole weight; "
            "set merge_start: true, or lora: null to train on the adapter that is there"
        )
