"""What a model is found to do at load: numbers decide whether it runs packed, in padded batches or not at all.

A few tokens go through the model's own eager attention in eval mode, one sequence at a time, and in training mode
through what training and generation will do with them. Windows of attention are cut short meanwhile, so that few tokens
meet their ends, and weights in half precision are cast, so that numbers are exact enough to be compared.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.engine.layout import Layout, Sequences, make_layout
from lit_rlhf.engine.memory import only_shapes
from lit_rlhf.errors import UserError
from lit_rlhf.models.causes import TOLERANCE, difference, first_difference, said, silent_transformers, watched
from lit_rlhf.models.decoding import make_decoder
from lit_rlhf.models.holding import in_float32, is_half
from lit_rlhf.models.policy import Caching, Policy, Scorer, context_length
from lit_rlhf.models.trunk import backbone, packed_hidden_states, runs_packed

LENGTHS = 8, 7  # tokens of the two sequences
WINDOW = 5  # what longer windows are cut to
NOISE = 1e-6  # likewise, of what should be the same twice


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

    Sinks, a window that only a mask knows of, layers that look back by other means than attention: each shows up as
    other numbers or as an error.

    Args:
        network: as loaded, its dropout off.
        name: of it, for messages.

    Raises:
        UserError: neither gives its numbers.
    """
    model, was_training = network.model, network.training
    if only_shapes():
        model.set_attn_implementation(IMPLEMENTATION)
        return
    caching = ""
    for whole in [False, True] if is_half(model) else [False]:
        with torch.no_grad(), short_windows(model), silent_transformers(), in_float32(model, whole):
            fault = find_fault(network, packed=True)
            padded_fault = None if fault is None else find_fault(network, packed=False)
            if fault is not None and padded_fault is None and isinstance(network, Policy):
                caching = choose_caching(network)
        if fault is None:
            break
    network.train(was_training)
    kind = type(model).__name__
    if padded_fault is not None and padded_fault == fault:
        raise UserError(f"{name}: {kind} is not supported: {fault}")
    if padded_fault is not None:
        raise UserError(f"{name}: {kind} is not supported. Packed rows: {fault}. Padded batches: {padded_fault}")
    if fault is not None:
        rank_zero_info(
            f"{name}: {kind} does not run in packed rows ({fault}), so it runs in padded batches{caching}: right, but "
            "slower"
        )
    if network.quiet:
        rank_zero_info(f"{name}: {kind} draws random numbers while it trains, so it stays in evaluation mode")
    limit, positions = context_length(model.config), getattr(model.config, "max_position_embeddings", None)
    if limit != positions:
        rank_zero_info(
            f"{name}: sequences may take {limit} of its {positions} positions; past them, its rotary embeddings follow "
            "the longest sequence of a batch, and log-probs would depend on neighbours"
        )


class Sample:
    """The tokens of the probe, and what a model makes of them by itself.

    Args:
        network: its attention is its own until this is made.
    """

    def __init__(self, network: Policy | Scorer) -> None:
        model = network.model
        model.set_attn_implementation("eager")
        network.eval()
        self.ids = torch.arange(sum(LENGTHS)).remainder(model.config.get_text_config().vocab_size)
        # The second sequence of a packed row ends where the context does: some embeddings follow the last position of
        # all.
        starts = 0, (context_length(model.config) or LENGTHS[1]) - LENGTHS[1]
        each = [start + torch.arange(length) for start, length in zip(starts, LENGTHS, strict=True)]
        self.positions = torch.cat(each)
        self.layout: Layout = make_layout(Sequences(np.arange(len(self.ids)), np.array(LENGTHS)), len(self.ids))
        self.parts = [
            {"input_ids": part[None], "use_cache": False, "position_ids": where[None]}
            for part, where in zip(self.ids.split(LENGTHS), each, strict=True)
        ]

    def own(self, model: PreTrainedModel, packed: bool) -> Tensor:
        """(N, d) last hidden states, a sequence at a time; in padded batches, positions are the model's affair."""
        parts = self.parts if packed else [part | {"position_ids": None} for part in self.parts]
        return torch.cat(
            [backbone(model)(**{k: v for k, v in part.items() if v is not None}).last_hidden_state[0] for part in parts]
        )

    def ours(self, model: PreTrainedModel) -> Tensor:
        """(N, d) last hidden states as they are made in training."""
        return packed_hidden_states(model, self.ids, self.positions, self.layout)


def find_fault(network: Policy | Scorer, packed: bool) -> str | None:
    """What is wrong with this model in packed rows, or in padded batches; it keeps the attention for them."""
    model = network.model
    try:
        sample = Sample(network)
        with watched(model) as own_outputs:
            hidden = sample.own(model, packed)
        if not torch.isfinite(hidden).all():
            return "its hidden states are not finite; a number in config.json is wrong, or its weights are"
        logits: Any = None
        if isinstance(network, Policy):
            logits = model(**{k: v for k, v in sample.parts[0].items() if packed or k != "position_ids"}).logits[0]
            if not logits.any():
                return "its logits are all 0; the weights of its output embeddings, or before them, are"
            network.scale = find_scale(network, hidden[: LENGTHS[0]], logits)
            if not difference(network.logits(hidden[: LENGTHS[0]]), logits) <= TOLERANCE:
                return "its head does more than multiply hidden states by the output embeddings, scale and cap them"

        model.set_attn_implementation(IMPLEMENTATION if packed else "eager")
        if packed and not runs_packed(model):
            return "its attention cannot be replaced"
        with watched(model) as our_outputs:
            gap = difference(sample.ours(model), hidden)
        if not gap <= TOLERANCE:
            where = first_difference(own_outputs, our_outputs, model)
            return f"hidden states differ by {gap:.2g} from its own{where}"
        network.quiet = False
        network.train()
        first, second = sample.ours(model), sample.ours(model)
        if not difference(first, second) <= NOISE or not difference(first, hidden) <= TOLERANCE:
            network.quiet = True  # of what remains of training mode without dropout, noise is all that we know of
            network.train()

        if packed and isinstance(network, Policy):
            gap = cache_gap(network, sample, logits)
            if not gap <= TOLERANCE:
                return f"logits from the slot cache differ by {gap:.2g} from its own"
    except Exception as error:  # whatever the code of a model raises
        return said(error)
    return None


def find_scale(policy: Policy, hidden: Tensor, logits: Tensor) -> float:
    """What a policy's logits are multiplied by, beyond the product with its output embeddings; 1.0 for most models.

    Where a number in the config, or one over it, is as good as equal, it is that number.
    """
    linear, own = policy.model.get_output_embeddings()(hidden).double(), logits.double()
    if policy.cap is not None:
        inside = own.abs() < 0.9 * policy.cap  # further out, rounding hides what was there
        linear, own = linear[inside], policy.cap * torch.atanh(own[inside] / policy.cap)
    scale = float((own * linear).sum() / linear.square().sum())
    settings = [v for v in vars(policy.model.config.get_text_config()).values() if type(v) in (int, float) and v > 0]
    exact = [1.0, *(number for v in settings for number in (float(v), 1 / v))]
    nearest = min(exact, key=lambda number: abs(number - scale))
    return nearest if math.isclose(nearest, scale, rel_tol=1e-4) else scale


def choose_caching(policy: Policy) -> str:
    """Let a policy that runs in padded batches decode by a cache of its own if that gives its own numbers.

    Returns:
        What to say about it.
    """
    sample, faults = Sample(policy), []
    logits = policy.model(input_ids=sample.ids[None, : LENGTHS[0]], use_cache=False).logits[0]
    ways: tuple[Caching, ...] = "together", "by state", "alone"
    for policy.caching in ways:
        try:
            gap = cache_gap(policy, sample, logits)
            if gap <= TOLERANCE:
                return ""
            faults.append(f"its logits differ by {gap:.2g}")
        except Exception as error:  # whatever the code of a model raises
            faults.append(said(error))
    policy.caching = None
    return f", and generates without a cache ({faults[-1]})"


def cache_gap(policy: Policy, sample: Sample, logits: Tensor) -> float:
    """How far next-token logits by a cache are from those of the first sequence: three slots, and one that joins."""
    last = np.array([LENGTHS[0], WINDOW, WINDOW, 3])
    decoder = make_decoder(policy, len(last), LENGTHS[0], cuda_graphs=False)
    rows, gaps = np.stack([sample.ids[: LENGTHS[0]]] * len(last)), []
    decoder.logits(rows, last - 2, np.array([True, True, True, False]))
    for lengths in (last - 1, last):
        gaps.append(difference(decoder.logits(rows, lengths, np.ones(len(last), bool)), logits[lengths - 1]))
    return max(gaps) if not any(map(math.isnan, gaps)) else math.nan


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
