"""What a model is found to do at load: numbers decide whether it runs packed, in padded batches or not at all.

A few tokens go through the model's own eager attention in eval mode, one sequence at a time, and in training mode
through what training and generation will do with them. Windows of attention are cut short meanwhile, so that few tokens
meet their ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.engine.packing import make_layout
from lit_rlhf.errors import UserError
from lit_rlhf.models.decoding import SlotDecoder
from lit_rlhf.models.policy import Policy, Scorer, backbone, context_length, packed_hidden_states

LENGTHS = 8, 7  # tokens of the two sequences
WINDOW = 5  # what longer windows are cut to
TOLERANCE = 1e-3  # of the largest number


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: the ratio of new to old policy needs the same network twice."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def choose_attention(network: Policy | Scorer, name: str) -> None:
    """Let a model run in packed rows if these give its own numbers, else in padded batches if those do.

    Sinks, a window that only a mask knows of, a layout that does not reach the attention: each shows up as other
    numbers or as an error.

    Args:
        network: as loaded, its dropout off.
        name: of it, for messages.

    Raises:
        UserError: neither gives its numbers.
    """
    model, was_training = network.model, network.training
    with torch.no_grad(), short_windows(model):
        fault = find_fault(network, packed=True)
        padded_fault = None if fault is None else find_fault(network, packed=False)
    network.train(was_training)
    kind = type(model).__name__
    if padded_fault is not None:
        raise UserError(f"{name}: {kind} is not supported. Packed rows: {fault}. Padded batches: {padded_fault}")
    if fault is not None:
        rank_zero_info(
            f"{name}: {kind} does not run in packed rows ({fault}), so it runs in padded batches, without a cache when "
            "it generates: right, but slower"
        )
    limit, positions = context_length(model.config), getattr(model.config, "max_position_embeddings", None)
    if limit != positions:
        rank_zero_info(
            f"{name}: sequences may take {limit} of its {positions} positions; past them, its rotary embeddings follow "
            "the longest sequence of a batch, and log-probs would depend on neighbours"
        )


def find_fault(network: Policy | Scorer, packed: bool) -> str | None:
    """What is wrong with this model in packed rows, or in padded batches; it keeps the attention for them."""
    model = network.model
    ids = torch.arange(sum(LENGTHS)).remainder(model.config.get_text_config().vocab_size)
    # The second sequence of a packed row ends where the context does: some embeddings follow the last position of all.
    starts = 0, (context_length(model.config) or LENGTHS[1]) - LENGTHS[1]
    positions = torch.cat([start + torch.arange(length) for start, length in zip(starts, LENGTHS, strict=True)])
    layout = make_layout(np.split(np.arange(len(ids)), LENGTHS[:1]), len(ids))
    try:
        model.set_attn_implementation("eager")
        network.eval()
        parts = [
            {"input_ids": part[None], "use_cache": False} | ({"position_ids": where[None]} if packed else {})
            for part, where in zip(ids.split(LENGTHS), positions.split(LENGTHS), strict=True)
        ]
        hidden = torch.cat([backbone(model)(**part).last_hidden_state[0] for part in parts])
        logits: Any = model(**parts[0]).logits[0] if isinstance(network, Policy) else None
        if isinstance(network, Policy) and not difference(network.head(hidden[: LENGTHS[0]]), logits) <= TOLERANCE:
            return "its head does more than multiply hidden states by the output embeddings"

        model.set_attn_implementation(IMPLEMENTATION if packed else "eager")
        gaps = {}
        for training in (True, False):
            network.train(training)
            gaps[training] = difference(packed_hidden_states(model, ids, positions, layout), hidden)
            if gaps[training] <= TOLERANCE:
                break
        if gaps.get(False, 1.0) <= TOLERANCE:
            return "it draws random numbers while it trains; set dropout and noise to 0 in its config.json"
        if not gaps[True] <= TOLERANCE:
            return f"hidden states differ by {gaps[True]:.2g} from its own"

        if packed and isinstance(network, Policy):
            decoder = SlotDecoder(network, 2, LENGTHS[0], cuda_graphs=False)
            rows, lengths = np.stack([ids[: LENGTHS[0]]] * 2), np.array([LENGTHS[0], WINDOW])
            decoder.logits(rows, lengths - 1)
            gap = difference(decoder.logits(rows, lengths), logits[lengths - 1])
            if not gap <= TOLERANCE:
                return f"logits from the slot cache differ by {gap:.2g} from its own"
    except Exception as error:  # whatever the code of a model raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return None


def difference(ours: Tensor, own: Tensor) -> float:
    """Largest difference, as a share of the largest number."""
    return float((ours - own).abs().max() / own.abs().max())


@contextmanager
def short_windows(model: PreTrainedModel) -> Iterator[None]:
    """While inside, every window and chunk of attention that configs and layers name has at most `WINDOW` tokens."""
    holders = [holder for module in model.modules() for holder in (module, getattr(module, "config", None)) if holder]
    cut = {
        (id(holder), name): (holder, name, value)
        for holder in holders
        for name, value in vars(holder).items()
        if ("window" in name or "chunk" in name) and type(value) is int and value > WINDOW
    }
    for holder, name, _ in cut.values():
        setattr(holder, name, WINDOW)
    try:
        yield
    finally:
        for holder, name, value in cut.values():
            setattr(holder, name, value)
