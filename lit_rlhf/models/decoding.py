"""The slot KV cache and sampling: how a policy acts in a vector environment.

Each slot of the environment keeps one row of keys and values. A slot whose observation extends the cached row by
exactly one token decodes that token; any other slot is prefilled, all such prompts packed into one row. Of slots that
have the same prompt one computes it, the others copy its keys and values and decode its last token. The cache needs no
reset signal from the environment; told whose episode a slot plays, it need not compare the cached tokens. Slots that
are parked drop out: the rows in use stay contiguous at the front, so a step costs what its active slots cost.

Axes: S slots, n active slots, L cached length, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from lit_rlhf.engine.layout import Sequences, make_layout
from lit_rlhf.engine.memory import kind_of
from lit_rlhf.engine.rounding import add_rows, few_shapes
from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.models.decoder import NOBODY, Decoder
from lit_rlhf.models.graphs import GraphedStep, can_capture
from lit_rlhf.models.padded_decoding import OwnCacheDecoder, RecomputingDecoder
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.trunk import multiplied_in, runs_packed

GROWTH = 64  # lengths that a cache has room for are multiples of it


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (S, H_kv, L, D) each, written at a row and position per token.

    Args:
        num_slots: S.
        max_length: L, if it does not grow.
        grows: have room for what is used, and make more when that is; where L is used up to its end, a product of
            matrices in bfloat16 on a CPU takes keys and values as they lie, and copies no window of them first.
    """

    def __init__(self, num_slots: int, max_length: int, grows: bool = False) -> None:
        super().__init__()
        self.num_slots, self.max_length = num_slots, max_length
        self.room = 0 if grows else max_length
        self.rows = self.positions = torch.empty(0, dtype=torch.int64)  # where the coming tokens go
        self.window: tuple[int, int] | None = None  # (n, L) in use when decoding; None while prompts are prefilled

    def reserve(self, length: int) -> int:
        """Have room for that many positions; returns for how many there is."""
        if length > self.room:
            self.room = min(-(-length // GROWTH) * GROWTH, self.max_length)
            if self.is_initialized:
                assert self.keys is not None and self.values is not None
                self.keys, self.values = (F.pad(x, (0, 0, 0, self.room - x.shape[2])) for x in (self.keys, self.values))
        return self.room

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate on the first update, when dtype, device and head count are known."""
        shape = (self.num_slots, key_states.shape[1], self.room)
        # Keys in the values' dtype: under autocast, rotary embeddings promote keys to float32, which nobody reads.
        self.keys = value_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values; return what the queries attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        key_states = key_states.to(self.keys.dtype)
        if self.window is None:  # packed prompts attend among themselves, by their layout
            self.keys[self.rows, :, self.positions] = key_states[0].transpose(0, 1)[: len(self.rows)]
            self.values[self.rows, :, self.positions] = value_states[0].transpose(0, 1)[: len(self.rows)]
            return key_states, value_states
        self.keys[self.rows, :, self.positions] = key_states[:, :, 0]
        self.values[self.rows, :, self.positions] = value_states[:, :, 0]
        n, L = self.window
        return self.keys[:n, :, :L], self.values[:n, :, :L]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row's first `length` keys and values to another row."""
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys[target, :, :length] = self.keys[source, :, :length]
            self.values[target, :, :length] = self.values[source, :, :length]

    def get_seq_length(self) -> int:
        """No length is common to all rows; positions are always given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Never used to build a mask: a 4-D mask or a layout is always given."""
        return query_length, 0

    def get_max_length(self) -> int:
        """L_max."""
        return self.max_length


class SlotDecoder(Decoder):
    """Next-token logits by the slot cache, for models that run packed.

    Args:
        policy: its weights must not change between `clear()` calls.
        num_slots: S.
        max_length: the longest prompt plus response.
        cuda_graphs: capture the decode step on CUDA.
    """

    lends = True

    def __init__(self, policy: Policy, num_slots: int, max_length: int, cuda_graphs: bool = True) -> None:
        super().__init__(policy, num_slots, max_length)
        # Handed `_step` at each call: what kept it would keep this object, and its cache, until a garbage collection.
        graphed = cuda_graphs and can_capture(policy, policy.model.device)
        self.graphs = GraphedStep(policy, num_slots, max_length) if graphed else None
        device = policy.model.device
        self.grows = kind_of(device) == "cpu"  # graphs would need what stays in its place
        self.whole = self.grows and multiplied_in(policy.model) == torch.bfloat16
        count = policy.model.config.get_text_config().num_hidden_layers
        layers = [SlotLayer(num_slots, max_length, self.grows) for _ in range(count)]
        self.layers = layers
        self.cache = Cache(layers=list(layers))
        self.rows = np.arange(num_slots)  # the cache row of each slot

    def _prefill(self, slots: np.ndarray, input_ids: np.ndarray, lengths: np.ndarray) -> Tensor:
        device = self.policy.model.device
        lengths = lengths[slots]
        ends = lengths.cumsum()
        sequences = Sequences(np.arange(ends[-1]), lengths)
        ids = np.concatenate([input_ids[slot, :length] for slot, length in zip(slots, lengths, strict=True)])
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(device)
        rows = torch.from_numpy(np.repeat(self.rows[slots], lengths)).to(device)
        self._reserve(int(lengths.max()))
        self._place(rows, positions, window=None)
        layout = make_layout(sequences, num_nodes=len(ids))
        layout, more = few_shapes(layout, multiplied_in(self.policy.model), device)
        return self.policy.decode(
            add_rows(torch.from_numpy(ids), more).to(device)[None],
            add_rows(positions, more)[None],
            self.cache,
            layout=move_data_to_device(layout, device),
            nodes=torch.from_numpy(ends - 1).to(device),
        )

    def _decode(self, slots: np.ndarray, num_active: int, input_ids: np.ndarray, lengths: np.ndarray) -> Tensor:
        device = self.policy.model.device
        # Rows 0..n-1 are the active slots. Those prefilled just now go along: their newest token is written again with
        # the same key and value, and its logits are dropped.
        slot_of_row = np.argsort(self.rows)[:num_active]
        newest = lengths[slot_of_row] - 1
        positions = torch.from_numpy(newest).to(device)
        input_ids_of_rows = torch.from_numpy(input_ids[slot_of_row, newest]).to(device)[:, None]
        length = int(newest.max()) + 1
        room = self._reserve(length)
        length = room if self.whole else length
        if self.graphs is None:
            logits = self._step(input_ids_of_rows, positions, length)
        else:
            logits = self.graphs(self._step, input_ids_of_rows, positions, length)
        return logits[torch.from_numpy(self.rows[slots]).to(device)]

    def _step(self, input_ids: Tensor, positions: Tensor, length: int) -> Tensor:
        """(n, V) logits of rows 0..n-1: (n, 1) newest tokens at (n,) positions, all below `length`."""
        n = len(input_ids)
        self._place(torch.arange(n, device=positions.device), positions, window=(n, length))
        attend = torch.arange(length, device=positions.device) <= positions[:, None]
        return self.policy.decode(input_ids, positions[:, None], self.cache, attend[:, None, None])

    def _reserve(self, length: int) -> int:
        return max(layer.reserve(length) for layer in self.layers)

    def _place(self, rows: Tensor, positions: Tensor, window: tuple[int, int] | None) -> None:
        for layer in self.layers:
            layer.rows, layer.positions, layer.window = rows, positions, window

    def _lend(self, lender: int, slot: int, length: int) -> None:
        if lender != NOBODY:
            for layer in self.layers:
                layer.move(int(self.rows[lender]), int(self.rows[slot]), length)

    def _keep(self, slots: np.ndarray) -> None:
        """Move active rows into the places of dropped ones, so that rows 0..n-1 are the active ones."""
        n = len(slots)
        behind = [slot for slot in slots if self.rows[slot] >= n]
        if not behind:
            return
        taken = set(self.rows[slots].tolist())
        free = [row for row in range(n) if row not in taken]
        slot_of_row = np.argsort(self.rows)
        for slot, target in zip(behind, free, strict=True):
            source, dropped = int(self.rows[slot]), int(slot_of_row[target])
            for layer in self.layers:
                layer.move(source, target, int(self.cached_lengths[slot]))
            self.rows[slot], self.rows[dropped] = target, source


def cache_bytes(policy: Policy, num_slots: int, max_length: int, dtype: torch.dtype) -> int:
    """What the slot cache will take, by the model's config; arguments as of `SlotDecoder`, and the cache's dtype."""
    config = policy.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    shared = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return int(2 * config.num_hidden_layers * num_slots * shared * max_length * width * dtype.itemsize)


def make_decoder(policy: Policy, num_slots: int, max_length: int, cuda_graphs: bool = True) -> Decoder:
    """What a policy decodes with; arguments as of `SlotDecoder`."""
    if runs_packed(policy.model):
        return SlotDecoder(policy, num_slots, max_length, cuda_graphs)
    kind = RecomputingDecoder if policy.caching is None else OwnCacheDecoder
    return kind(policy, num_slots, max_length)


@check_shapes
def sample(
    logits: Float[Tensor, "n V"],
    uniforms: Float[Tensor, " n"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Draw a token from each row by inverting its cumulative distribution.

    Args:
        logits: (n, V).
        uniforms: (n,) draws from [0, 1).
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens.
        top_p: keep the smallest set of tokens of at least this mass (Holtzman et al. 2020,
            https://arxiv.org/abs/1904.09751).
        min_p: keep tokens at least this times as likely as the most likely one (https://arxiv.org/abs/2407.01082).

    Returns:
        (n,) tokens and (n,) float32 log-probs under the distribution sampled from: after temperature and filters.
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros_like(uniforms, dtype=torch.float32)
    logits = filter_logits(logits / temperature, top_k, top_p, min_p)
    probs = torch.softmax(logits, dim=-1)
    cumulative = running_sums(probs)
    total = cumulative[:, -1:].contiguous()
    tokens = torch.searchsorted(cumulative, uniforms.to(cumulative)[:, None] * total, right=True)
    # A draw that is rounded up to the total falls on the last token that adds to it.
    tokens = torch.minimum(tokens, torch.searchsorted(cumulative, total))[:, 0]
    return tokens, probs.gather(-1, tokens[:, None])[:, 0].log()


def filter_logits(logits: Float[Tensor, "n V"], top_k: int | None, top_p: float, min_p: float) -> Float[Tensor, "n V"]:
    """Set the logits of tokens that may not be sampled to -inf; the most likely token always stays."""
    if top_k is not None and top_k < logits.shape[-1]:
        kept, index = logits.topk(top_k, dim=-1)  # k of them, whatever ties with the last
        logits = torch.full_like(logits, float("-inf")).scatter(-1, index, kept)
    if top_p < 1.0:
        ordered, index = logits.sort(dim=-1, descending=True)
        probs = torch.softmax(ordered, dim=-1)
        drop = running_sums(probs) - probs >= top_p  # the mass before this token is enough already
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), float("-inf"))
    if min_p > 0.0:
        floor = logits.max(-1, keepdim=True).values + np.log(min_p)
        logits = logits.masked_fill(logits < floor, float("-inf"))
    return logits


def running_sums(probs: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    """Sums of probabilities along the last axis.

    Where determinism is asked for (`trainer.deterministic`) they are summed as whole multiples of 2^-53: torch refuses
    to sum floats on CUDA then, whose order it does not fix.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return probs.cumsum(-1)
    return (probs.double() * 2**53).long().cumsum(-1).double().mul(2**-53).to(probs.dtype)
