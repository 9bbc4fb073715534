"""What a run will hold, told at its start: a row for each role, each weight counted once."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Adam, Optimizer

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.callbacks.performance import compute_dtype
from lit_rlhf.engine.logprobs import chunk_size
from lit_rlhf.engine.memory import bytes_of, storage_of
from lit_rlhf.errors import require_types
from lit_rlhf.models.decoding import cache_bytes
from lit_rlhf.models.holding import num_weights
from lit_rlhf.models.places import parameters_of, place_of
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.trunk import runs_packed
from lit_rlhf.rollout.minibatches import Minibatches

HEADER = ("role", "where it lives", "trained", "frozen", "weights", "grads", "moments")


class Held(NamedTuple):
    """What one role, or a buffer, holds on this rank."""

    role: str
    place: str
    trained: int  # parameters, over all ranks
    frozen: int
    weights: int  # bytes, as all below
    gradients: int
    optimizer: int | None  # None = of an optimiser whose state is not known beforehand


class MemoryTable(Callback):
    """Say at the start of `fit` what each role holds on this rank, each weight counted once, and what buffers take.

    Activations are not among it: `lit-rlhf plan` says what they come to.

    Args:
        show: whether to say it.
    """

    def __init__(self, show: bool = True) -> None:
        require_types(MemoryTable.__init__, locals())
        self.show = show

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it, once weights and optimisers are where they will be."""
        if self.show:
            assert isinstance(pl_module, AlignmentModule)
            rows = [*held_roles(pl_module, trainer.optimizers), *buffers(trainer, pl_module)]
            rank_zero_info("\n".join(["from here on each rank holds:", *table(rows)]))


def views(module: AlignmentModule, data: Any) -> dict[str, Any]:
    """The roles of a run and where they live, rewards included."""
    rewards = getattr(data, "rewards", None)
    return module.views() | ({} if rewards is None else rewards.views())


def held_roles(module: AlignmentModule, optimizers: Sequence[Optimizer]) -> Iterator[Held]:
    """What each role holds that none before it does."""
    told: set[int] = set()
    pieces = any(map(is_piece, module.parameters()))
    for role, view in views(module, getattr(module.trainer, "datamodule", None)).items():
        own = [p for p in parameters_of(view) if storage_of(p)._cdata not in told]
        told |= {storage_of(p)._cdata for p in own}
        trained, frozen = [p for p in own if p.requires_grad], [p for p in own if not p.requires_grad]
        states = [state_bytes(trained, optimizer) for optimizer in optimizers]
        known = None if None in states else sum(cast(list[int], states))
        counts = sum(map(num_weights, trained)), sum(map(num_weights, frozen))
        place = "whole on each rank" if pieces and own and not any(map(is_piece, own)) else place_of(view)
        yield Held(role, place, *counts, bytes_of(own), bytes_of(trained), known)


def is_piece(parameter: nn.Parameter) -> bool:
    """Whether this rank holds a piece of it alone."""
    return isinstance(parameter, DTensor)


def state_bytes(trained: Sequence[nn.Parameter], optimizer: Optimizer) -> int | None:
    """What an optimiser will keep of these: Adam two moments in their dtype; None of others, which is not known."""
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    steered = [p for p in trained if id(p) in mine]
    if steered and not isinstance(optimizer, Adam):
        return None
    return 2 * bytes_of(steered)


def buffers(trainer: Trainer, module: AlignmentModule) -> Iterator[Held]:
    """The slot cache of rollouts, and the logits that are there at a time."""
    policy, data = getattr(module, "policy", None), cast(Any, getattr(trainer, "datamodule", None))
    if not isinstance(policy, Policy):
        return
    tokens = most_response_tokens(data)
    limit = chunk_size(policy.head, module.device)
    tokens = limit if tokens is None else min(limit, tokens)
    size = tokens * policy.vocabulary_size * compute_dtype(trainer).itemsize
    yield Held("logits", f"{tokens} tokens at a time", 0, 0, size, 0, 0)
    if hasattr(data, "rewards") and runs_packed(policy.model):
        slots = min(data.settings.num_slots, data.settings.rollout_size // trainer.world_size)
        length = max(map(len, data.prompts["train"].prompt_ids)) + data.settings.max_new_tokens
        size = cache_bytes(policy, slots, length, compute_dtype(trainer))
        yield Held("slot cache", f"{slots} slots of {length}", 0, 0, size, 0, 0)
    if hasattr(data, "rewards") and any(map(is_piece, policy.parameters())):
        size = sum(p.numel() * min(p.itemsize, compute_dtype(trainer).itemsize) for p in policy.parameters())
        yield Held("policy", "whole, in a rollout", 0, 0, size, 0, 0)


def most_response_tokens(data: Any) -> int | None:
    """Of a micro-batch, by the settings; None where these set no limit."""
    if hasattr(data, "rewards"):
        cut: Minibatches = data.minibatches()
        return min(cut.most_tokens, cut.episodes_of_part * data.settings.max_new_tokens)
    return cast(int | None, data.batches.max_tokens) if hasattr(data, "batches") else None


def table(rows: Sequence[Held]) -> list[str]:
    """Lines of at most 80 columns."""
    lines = [line(HEADER)]
    for row in rows:
        optimizer = "?" if row.optimizer is None else size_of(row.optimizer)
        cells = (count_of(row.trained), count_of(row.frozen), size_of(row.weights), size_of(row.gradients), optimizer)
        lines.append(line((row.role, row.place, *cells)))
    sums = [sum(getattr(row, name) or 0 for row in rows) for name in Held._fields[2:]]
    lines.append(line(("all", "", count_of(sums[0]), count_of(sums[1]), *map(size_of, sums[2:]))))
    return lines


def line(cells: Sequence[str]) -> str:
    """Two columns of words and five of figures."""
    return f"{cells[0]:<12.12} {cells[1]:<22.22}" + "".join(f"{cell:>9.9}" for cell in cells[2:])


def count_of(number: int) -> str:
    """A number of parameters; nothing of none."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:.0f} {unit}"
    return str(number) if number else "-"


def size_of(size: float) -> str:
    """Bytes in MB or GB (of 10^6 and 10^9); nothing of none."""
    if not size:
        return "-"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
