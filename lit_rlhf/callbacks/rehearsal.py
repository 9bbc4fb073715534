"""A run without numbers: its own module, data, loss, backward pass and optimiser on tensors that only have shapes.

What is counted on the way cannot drift from the code. Loops are cut short: two optimiser steps of at most two of the
heaviest micro-batches each, so that the second meets gradients, and optimiser state, that are there already.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.algorithms.strategies import check_tensor_parallel, name_and_options
from lit_rlhf.callbacks.memory import Held, buffers, held_roles
from lit_rlhf.callbacks.performance import forward_flops, matrix_weights, roles, step_flops
from lit_rlhf.data.batches import NoBatch
from lit_rlhf.data.batching import as_it_is
from lit_rlhf.data.heaviest import heaviest
from lit_rlhf.engine.memory import LiveMemory, bytes_of, counting, shapes
from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.errors import UserError
from lit_rlhf.models.roles import OwnModel
from lit_rlhf.rollout.rehearsal import RehearsedPlay, silence

# Options of the Trainer on which memory depends.
KEPT = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
BUFFERS = ("logits", "slot cache")  # rows of what is held that are no weights
BATCHES = 2  # of an optimiser step
PHASES = ("load", "start", "rollout", "reward", "scoring", "training step", "optimiser step", "between steps")
Sharing = Literal["none", "replicas", "shards"]


class Rehearsal(NamedTuple):
    """What a run comes to."""

    held: list[Held]  # as it will say at its start
    peaks: dict[str, int]  # bytes, by phase, in their order
    flops: float  # of a micro-batch, as `Performance` counts useful ones
    tokens: int  # of that micro-batch
    micro_batches: int  # of an epoch, all ranks; on policy of an iteration


class InPlace(SingleDeviceStrategy):
    """Moves nothing: tensors without numbers are where they shall be, and cannot be moved within a module."""

    strategy_name = "in_place"
    stands_for_pieces = False  # whether the strategy that it stands for would hold networks in pieces

    def model_to_device(self) -> None:
        """They are there."""

    def teardown(self) -> None:
        """They stay there."""


class Phases(Callback):
    """Tells a count which phase a run is in, and what was held and met."""

    def __init__(self, memory: LiveMemory, buckets: bool = False) -> None:
        self.memory, self.buckets = memory, buckets
        self.held: list[Held] = []
        self.flops, self.tokens = 0.0, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights and optimisers are there."""
        assert isinstance(pl_module, AlignmentModule)
        self.held = [*held_roles(pl_module, trainer.optimizers), *buffers(trainer, pl_module)]
        self.memory.phase = "start"
        if self.buckets:  # DDP exchanges gradients in buckets, which hold them once more
            self.memory.add(sum(row.gradients for row in self.held))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Forward and backward passes follow."""
        self.memory.phase = "training step"
        if isinstance(batch, NoBatch) or batch.packed.input_ids.numel() < self.tokens:
            return
        self.tokens = batch.packed.input_ids.numel()
        learning = [n for n in roles(pl_module) if any(p.requires_grad for p in n.parameters())]
        flops = [step_flops(n, batch.packed, matrix_weights(n), matrix_weights(n, frozen=True)) for n in learning]
        assert isinstance(pl_module, AlignmentModule)
        flops += [forward_flops(n, batch.packed, matrix_weights(n)) for n in pl_module.read_along()]
        self.flops = float(sum(map(float, flops)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Clipping and the optimiser's step follow."""
        self.memory.phase = "optimiser step"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Callbacks and logs follow."""
        self.memory.phase = "between steps"


def rehearse(
    module: AlignmentModule, data: Any, options: Mapping[str, Any], memory: LiveMemory, ranks: int = 1
) -> Rehearsal:
    """Run two optimiser steps on shapes.

    Args:
        module: made while `SHAPES` was on.
        data: likewise.
        options: of the Trainer; those of `KEPT` matter.
        memory: has counted since before the module was made.
        ranks: that share the work, as the strategy among the options would have it; what is counted is one rank's.

    Raises:
        UserError: a strategy that is not known here.
    """
    sharing = sharing_of(options.get("strategy", "auto"), ranks) if ranks > 1 else "none"
    kept = {name: options[name] for name in KEPT if options.get(name) is not None}
    accumulate = int(kept.pop("accumulate_grad_batches", 1))
    phases = Phases(memory, buckets=sharing == "replicas")
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    in_place = InPlace(torch.device("cpu"))
    in_place.stands_for_pieces = sharing == "shards"
    trainer = Trainer(
        strategy=in_place,
        accelerator="cpu",
        devices=1,
        logger=False,
        limit_val_batches=0,
        max_steps=2,
        accumulate_grad_batches=min(accumulate, BATCHES),
        callbacks=[phases],
        **quiet,
        **kept,
    )
    plugin: Any = trainer.precision_plugin
    plugin.convert_module = lambda model: model  # it was made in its dtype
    shorten = shorten_rollout if hasattr(data, "rewards") else shorten_epoch
    if hasattr(data, "rewards"):
        group = data.settings.group_size
        size = max(1, data.settings.rollout_size // (ranks * group)) * group
        data.settings = replace(data.settings, rollout_size=size)
        with shapes(), memory:  # adapters as reward models wait for the policy, on whose base they may stand
            data.rewards.share(module.policy)
            list(data.rewards.networks())
    with counting(memory), parked_apart(module, memory):
        micro_batches = shorten(module, data, accumulate, memory)
        trainer.fit(module, datamodule=data)
    peaks = {phase: memory.peaks[phase] for phase in PHASES if phase in memory.peaks}
    if sharing == "shards":
        gathered_in = torch.bfloat16 if str(options.get("precision")) == "bf16-mixed" else torch.float32
        peaks = sharded(peaks, phases.held, largest_unit(module, gathered_in), ranks, gathered_in)
    return Rehearsal(phases.held, peaks, phases.flops, phases.tokens, micro_batches[0])


def sharing_of(strategy: Any, ranks: int) -> Sharing:
    """How ranks share a run by the strategy of its config: whole replicas, or shards as of FSDP2."""
    name, options = name_and_options(strategy)
    if name in ("auto", "singledevicestrategy") or name.startswith("ddp"):
        return "replicas"
    if name == "modelparallelstrategy":
        group = options.get("tensor_parallel_size", "auto")
        check_tensor_parallel(ranks if group == "auto" else int(group), ranks)
        return "shards"
    raise UserError(f"--gpus: trainer.strategy ({name}) is not planned for; DDP and ModelParallelStrategy (FSDP2) are")


class Unit(NamedTuple):
    """What FSDP2 gathers by itself: a block, or what is outside of blocks; in bytes."""

    gathered: int  # its whole weights
    gradient: int  # its whole gradient, in float32 while ranks sum it


def sharded(
    peaks: Mapping[str, int], held: Sequence[Held], unit: Unit, ranks: int, gathered_in: torch.dtype = torch.float32
) -> dict[str, int]:
    """Peaks of one rank where FSDP2 shards weights, gradients and moments over all; by arithmetic, from those of one.

    Casts of weights that autocast made on one rank are left in them, though weights gathered in bfloat16 need none.

    Args:
        peaks: of a rank that holds everything.
        held: what that is.
        unit: the largest.
        ranks: that share.
        gathered_in: the dtype that weights are gathered in, unless they are held in less.

    Returns:
        In the forward and backward passes two units are gathered, and one whole gradient is there; a rollout gathers
        all weights; loading is as it was, since each rank reads a whole model before it keeps its share.
    """
    away = 1 - 1 / ranks
    weights, gradients = (sum(getattr(row, name) for row in held) for name in ("weights", "gradients"))
    moments, caches = sum(row.optimizer or 0 for row in held), sum(row.weights for row in held if row.role in BUFFERS)
    weights -= caches
    whole = gathered_in.itemsize * sum(row.trained + row.frozen for row in held if row.role not in BUFFERS)
    saved = {
        "start": weights,
        "rollout": weights - whole,
        "reward": weights - whole,
        "scoring": weights - 2 * unit.gathered,
        "training step": weights + gradients + moments - 2 * unit.gathered - unit.gradient,
        "optimiser step": weights + gradients + moments,
        "between steps": weights + gradients + moments,  # Lightning drops gradients before the next backward pass
    }
    return {phase: size - int(away * max(0, saved.get(phase, 0))) for phase, size in peaks.items()}


def largest_unit(module: AlignmentModule, gathered_in: torch.dtype) -> Unit:
    """The unit of FSDP2 that takes most."""
    units = [Unit(0, 0)]
    for network in roles(module):
        names = set(network.model._no_split_modules or ())
        blocks = [list(part.parameters()) for part in network.modules() if type(part).__name__ in names]
        inside = {id(p) for block in blocks for p in block}
        for weights in (*blocks, [p for p in network.parameters() if id(p) not in inside]):
            gathered = sum(p.numel() * min(p.itemsize, gathered_in.itemsize) for p in weights)
            units.append(Unit(gathered, 4 * sum(p.numel() for p in weights if p.requires_grad)))
    return max(units, key=lambda unit: 2 * unit.gathered + unit.gradient)


def shorten_epoch(module: Any, data: Any, accumulate: int, memory: LiveMemory) -> list[int]:
    """Let the heaviest micro-batches be all that an epoch has; its real number of them is known once it is dealt."""
    data.batches = replace(data.batches, num_workers=0)
    dealt, count = data.train_dataloader, [0]

    def train_dataloader() -> DataLoader:
        loader = dealt()
        count[0] = len(loader)
        batches: Any = heaviest(loader)
        return DataLoader(batches * 2 * BATCHES, batch_size=None, collate_fn=as_it_is)

    def fill_cache(*splits: str) -> None:  # by passes without gradients over all rows, which take less than a step
        module.reference_cache.by_split["train"] = torch.zeros(data.num_rows("train"), 2)

    data.train_dataloader = train_dataloader
    if getattr(module, "cache_reference", False):
        module.fill_cache = fill_cache
    return count


def shorten_rollout(module: Any, data: Any, accumulate: int, memory: LiveMemory) -> list[int]:
    """Play no more episodes than two optimiser steps take, or than there are slots; micro-batches stay as large."""
    dealt, count = data.train_dataloader, [0]

    def train_dataloader() -> Any:
        settings, data.trainer.accumulate_grad_batches = data.settings, accumulate
        whole = data.minibatches()
        count[0] = len(whole)
        size, taken = whole.episodes_of_part, min(accumulate, BATCHES)
        if whole.micro_batches > accumulate:
            rows = -(-whole.max_tokens // whole.tokens_of(whole.sharing))  # that a micro-batch is filled by
            played.learnt, played.sharing = whole.max_tokens // rows, whole.sharing
            groups = -(-BATCHES * (whole.max_tokens // played.learnt) * whole.sharing // whole.group_size)
            size, taken = min(size * accumulate, groups * whole.group_size), 1
        played_for = size * taken // whole.group_size * settings.group_size  # a step, which may learn from some alone
        steps = max(2, -(-min(settings.num_slots, settings.rollout_size) // played_for))
        data.settings = replace(settings, rollout_size=steps * played_for)
        module.updates = replace(module.updates, num_minibatches=steps, ppo_epochs=1)
        module.sampling = replace(module.sampling, dynamic_sampling=0)  # further rounds take as much memory as one
        data.trainer.accumulate_grad_batches = taken
        return dealt()

    def phase(name: str) -> None:
        memory.phase = name

    data.backend = played = RehearsedPlay(phase)
    silence(data.rewards)
    experience, forward_packed, most = module.experience, module.forward_packed, [0]

    def scored(*played: Any) -> Any:
        phase("scoring")
        return experience(*played)

    def forward_heavier(packed: PackedBatch) -> list[Tensor]:  # of passes alone, the heaviest takes most
        if len(packed.input_ids) <= most[0]:
            return [torch.zeros(len(packed.target_ids)) for _ in range(2 if module.critic is None else 3)]
        most[0] = len(packed.input_ids)
        return list(forward_packed(packed))

    data.train_dataloader = train_dataloader
    module.experience, module.forward_packed = scored, forward_heavier
    return count


@contextmanager
def parked_apart(module: Any, memory: LiveMemory) -> Iterator[None]:
    """While inside, a parked reference counts only while it is used: elsewhere it lies in the memory of the host."""
    for name in ("reference", "still_reference"):
        view = getattr(module, name, None)
        if isinstance(view, OwnModel) and view.parked:
            size = bytes_of(view.network.parameters())
            memory.add(-size)
            setattr(module, name, Parked(view, size, memory))
    yield


class Parked(OwnModel):
    """A parked reference whose comings and goings are counted."""

    def __init__(self, view: OwnModel, size: int, memory: LiveMemory) -> None:
        super().__init__(view.network, view.policy, parked=True)
        self.size, self.memory, self.inside = size, memory, 0

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """While inside, it counts."""
        came = self.size if self.inside == 0 else 0
        self.inside += 1
        self.memory.add(came)
        try:
            yield
        finally:
            self.inside -= 1
            self.memory.add(-came)
