"""How fast training is against what the device could do, and the precision that suits the device."""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.data.batches import NoBatch, RolloutBatch
from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.models.holding import num_weights
from lit_rlhf.models.policy import Policy, Scorer
from lit_rlhf.models.trunk import backbone


class Performance(Callback):
    """Log speed against the clock on the wall, rollouts and waiting included; validation, its samples, checkpoints not.

    - `perf/tokens_per_second`: real tokens trained on, a shared prompt counted once, over all ranks.
    - `perf/mfu`: useful operations of forward and backward passes (`step_flops`) over what the device can do by its
      data sheet or, where Lightning has none (a CPU, some GPUs), by a product of matrices; the run says which. Rollouts
      do no useful operation in this count. The mean over ranks, as all below.
    - `perf/padding_fraction`: cells of the attention buckets without a token; linear layers never see padding, nor does
      variable-length attention on CUDA.
    - `perf/rollout_fraction`: share of the time that on-policy training waits for rollouts and their scores.

    Logged every `log_every_n_steps` optimiser steps and at the end of an epoch; on-policy, once an iteration.
    """

    since: float | None = None  # the clock runs from here; None = it stands

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is counted yet."""
        self.peak: tuple[float, str] | None = None
        self.weights = {id(n): (matrix_weights(n), matrix_weights(n, frozen=True)) for n in roles(pl_module)}
        self.step, self.since = trainer.global_step, None
        self.restart()

    def restart(self) -> None:
        """Count anew."""
        self.batches = self.tokens = 0
        self.seconds = self.idle = 0.0
        self.padding: float = 0.0
        self.flops: Tensor | float = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; the first batch is awaited from here."""
        self.since = self.idle_since = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there; after an interruption nobody knows since when it was awaited."""
        now = time.perf_counter()
        if self.since is None:
            self.since = now
        else:
            self.idle += now - self.idle_since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; log at the steps at which Lightning writes what is logged."""
        self.on_policy = isinstance(batch, RolloutBatch | NoBatch)
        if not isinstance(batch, NoBatch):
            self.count(batch.packed, pl_module)
        stepped, self.step = trainer.global_step > self.step, trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not self.on_policy and stepped and every and self.step % every == 0:
            self.stop()
            self.report(trainer, pl_module)
            self.since = time.perf_counter()
        self.idle_since = time.perf_counter()

    def count(self, packed: PackedBatch, pl_module: LightningModule) -> None:
        """Add a micro-batch."""
        self.batches += 1
        self.tokens += packed.input_ids.numel()
        self.padding += packed.layout.padding_fraction()
        assert isinstance(pl_module, AlignmentModule)
        along = pl_module.read_along()
        for network in roles(pl_module):
            # Frozen networks of on-policy training run in rollouts only, but for a teacher.
            if not self.on_policy or network in along or any(p.requires_grad for p in network.parameters()):
                self.flops = self.flops + step_flops(network, packed, *self.weights[id(network)])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, wherever in the epoch training ended."""
        self.stop()
        if self.batches:
            self.report(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Neither validation nor what follows it counts, up to the next batch."""
        self.stop()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Nor does a checkpoint; Lightning does not tell of one with `save_weights_only`."""
        self.stop()

    def stop(self) -> None:
        """Stop the clock, once the device has done what it was given."""
        if self.since is not None:
            self.flops = float(self.flops)
            self.seconds += time.perf_counter() - self.since
            self.since = None

    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was counted, and count anew."""
        if self.peak is None:
            self.peak = peak_flops(pl_module.device, compute_dtype(trainer))
            if self.peak:
                rank_zero_info("perf/mfu is over %.3g operations per second: %s", *self.peak)
        metrics = {
            "perf/tokens_per_second": self.tokens * trainer.world_size / self.seconds,  # the mean over ranks follows
            "perf/padding_fraction": self.padding / self.batches,
        }
        if self.peak:
            metrics["perf/mfu"] = float(self.flops) / self.seconds / self.peak[0]
        if self.on_policy:
            metrics["perf/rollout_fraction"] = self.idle / self.seconds
        pl_module.log_dict(metrics, batch_size=1, sync_dist=True)
        self.restart()


def roles(module: LightningModule) -> list[Policy | Scorer]:
    """The networks of a module, trained and frozen."""
    assert isinstance(module, AlignmentModule)
    return [network for network in module.networks() if isinstance(network, Policy | Scorer)]


def matrix_weights(network: Policy | Scorer, frozen: bool = False) -> int:
    """Weights of the trunk that a token is multiplied with: matrices, no embeddings, and of experts those it meets.

    Args:
        network: whose trunk.
        frozen: count only those that do not learn.
    """
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    met = getattr(network.model.config.get_text_config(), "num_experts_per_tok", None)
    matrices = [p for p in backbone(network.model).parameters() if p.ndim >= 2 and id(p) not in embeddings]
    counted = [p for p in matrices if not (frozen and p.requires_grad)]
    # Experts lie in one (experts, in, out).
    return sum(p.numel() // len(p) * met if p.ndim == 3 and met else num_weights(p) for p in counted)


def step_flops(network: Policy | Scorer, batch: PackedBatch, weights: int, frozen: int) -> Tensor:
    """() useful operations of a forward pass and, where anything learns, of the backward pass.

    That takes as many for the gradients of what each layer was given (in all layers, wherever the learning ones are),
    and as many again for those of the weights, of which the frozen ones need none.

    Args:
        network: as in `forward_flops`.
        batch: packed tokens.
        weights: as `matrix_weights` counts them.
        frozen: those of them that do not learn.
    """
    forward = forward_flops(network, batch, weights)
    if not any(p.requires_grad for p in network.parameters()):
        return forward
    skipped = 2.0 * frozen * len(batch.input_ids)
    if isinstance(network, Policy) and not network.model.get_output_embeddings().weight.requires_grad:
        skipped += head_flops(network, batch)
    return 3 * forward - skipped


def forward_flops(network: Policy | Scorer, batch: PackedBatch, weights: int) -> Tensor:
    """() useful operations of a forward pass over a packed batch; stays on the device.

    2 per weight and token; 4 d per layer and pair of a query with a key that it sees (of a sliding window w at most w
    keys); 2 d V per response token.

    Args:
        network: a `Policy` uses its head at the predictors, a `Scorer` nearly nowhere.
        batch: packed tokens.
        weights: as `matrix_weights` counts them.
    """
    config = network.model.config.get_text_config()
    seen = batch.position_ids.double() + 1  # keys of each token's query; a shared prompt's tokens count once
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    sliding = kinds.count("sliding_attention") if window else 0
    pairs = (layers - sliding) * seen.sum() + sliding * seen.clamp(max=window or math.inf).sum()
    heads = getattr(config, "num_attention_heads", 0)  # none in a state space model
    width = heads * config.head_dim if getattr(config, "head_dim", None) else config.hidden_size if heads else 0
    return 2.0 * weights * len(batch.input_ids) + 4.0 * width * pairs + head_flops(network, batch)


def head_flops(network: Policy | Scorer, batch: PackedBatch) -> float:
    """Operations of the head: 2 d V per response token of a policy."""
    width = network.model.config.get_text_config().hidden_size
    return 2.0 * width * network.vocabulary_size * len(batch.target_ids) if isinstance(network, Policy) else 0.0


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str] | None:
    """Operations per second that the device can do, and by what: a GPU's data sheet, else a measured product."""
    if device.type not in ("cpu", "cuda"):
        return None
    listed = None
    if device.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the GPU is not in Lightning's list: it is measured instead
            listed = get_available_flops(device, dtype)
    if listed is not None:
        return float(listed), "the device's data sheet"
    return measured_flops(device, dtype), "a product of matrices, measured"


def measured_flops(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations per second of a product of large matrices, on random numbers; zeros would be faster.

    Args:
        device: that multiplies.
        dtype: of the matrices.
        clock: in seconds; on a busy machine, of a process of one thread, `time.process_time`.
    """
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 768
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        if on_gpu:
            torch.cuda.synchronize(device)
        start = clock()
        a @ b
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(clock() - start)
    return 2 * n**3 / min(seconds)


def compute_dtype(trainer: Trainer) -> torch.dtype:
    """What matrices are multiplied in."""
    return dtype_of_precision(str(trainer.precision))


def dtype_of_precision(precision: str) -> torch.dtype:
    """The same by the Trainer's `precision`."""
    return (
        torch.bfloat16
        if precision.startswith("bf16")
        else torch.float16
        if precision.startswith("16")
        else torch.float32
    )


def default_precision(accelerator: Any) -> str:
    """The Trainer's `precision` where the user names none.

    bfloat16 with float32 weights where the device has units for it; float32 elsewhere: on a CPU without matrix units,
    bfloat16 takes 1.6 times as long.

    Args:
        accelerator: as the Trainer takes it.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available()):
        return "bf16-mixed" if torch.cpu._is_amx_tile_supported() else "32-true"
    return "32-true"
