"""How fast training is against what the device could do, and the precision that suits the device."""

import time
import warnings
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lit_rlhf.batches import RolloutBatch
from lit_rlhf.module import AlignmentModule
from lit_rlhf.packing import PackedBatch
from lit_rlhf.policy import Policy, Scorer, backbone


class Performance(Callback):
    """Log speed against the clock on the wall, rollouts and waiting included.

    - `perf/tokens_per_second`: real tokens trained on, a shared prompt counted once, over all ranks.
    - `perf/mfu`: useful operations of forward and backward passes (no padding, the head on response tokens only; a
      backward pass is two forward passes) over what the device can do. Rollouts do no useful operation in this count.
    - `perf/padding_fraction`: cells of the attention buckets without a token; linear layers never see padding, nor does
      variable-length attention on CUDA.
    - `perf/rollout_fraction`: share of the time that on-policy training waits for rollouts and their scores.

    Logged every `log_every_n_steps` micro-batches and at the end of an epoch; on-policy, once an iteration.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.peak: float | None = None
        self.weights = {id(network): matrix_weights(network) for network in roles(pl_module)}
        self.restart()

    def restart(self) -> None:
        """Count from here."""
        self.since = self.idle_since = time.perf_counter()
        self.batches = self.tokens = 0
        self.idle = 0.0
        self.padding: float = 0.0
        self.flops: Tensor | float = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next batch is awaited from here; validation is none of the waiting."""
        self.idle_since = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there."""
        self.idle += time.perf_counter() - self.idle_since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; log with the other metrics."""
        on_policy = isinstance(batch, RolloutBatch)
        self.batches += 1
        self.tokens += batch.packed.input_ids.numel()
        self.padding += batch.packed.layout.padding_fraction()
        for network in roles(pl_module):
            trained = any(p.requires_grad for p in network.parameters())
            if trained or not on_policy:  # frozen networks of on-policy training run in rollouts only
                passes = 3 if trained else 1
                self.flops = self.flops + passes * forward_flops(network, batch.packed, self.weights[id(network)])
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.is_last_batch or (not on_policy and self.batches % every == 0):
            if self.peak is None:
                self.peak = peak_flops(pl_module.device, compute_dtype(trainer))
            seconds = time.perf_counter() - self.since
            metrics = {
                "perf/tokens_per_second": self.tokens * trainer.world_size / seconds,
                "perf/padding_fraction": self.padding / self.batches,
            }
            if self.peak:
                metrics["perf/mfu"] = float(self.flops) / seconds / self.peak
            if on_policy:
                metrics["perf/rollout_fraction"] = self.idle / seconds
            pl_module.log_dict(metrics, batch_size=1)
            self.restart()
        self.idle_since = time.perf_counter()


def roles(module: LightningModule) -> list[Policy | Scorer]:
    """The networks of a module, trained and frozen."""
    assert isinstance(module, AlignmentModule)
    return [network for network in module.networks() if isinstance(network, Policy | Scorer)]


def matrix_weights(network: Policy | Scorer) -> int:
    """Weights of the trunk that a token is multiplied with: matrices, no embeddings, and of experts those it meets."""
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    met = getattr(network.model.config.get_text_config(), "num_experts_per_tok", None)
    matrices = [p for p in backbone(network.model).parameters() if p.ndim >= 2 and id(p) not in embeddings]
    # Experts lie in one (experts, in, out).
    return sum(p.numel() // len(p) * met if p.ndim == 3 and met else p.numel() for p in matrices)


def forward_flops(network: Policy | Scorer, batch: PackedBatch, weights: int) -> Tensor:
    """() useful operations of a forward pass over a packed batch; stays on the device.

    2 per weight and token; 4 d per layer and pair of a query with a key that it sees; 2 d V per response token.

    Args:
        network: a `Policy` uses its head at the predictors, a `Scorer` nearly nowhere.
        batch: packed tokens.
        weights: as `matrix_weights` counts them.
    """
    config = network.model.config.get_text_config()
    lengths = batch.layout.end_to_end.bounds.diff().double()
    pairs = (lengths * (lengths + 1) / 2).sum()
    heads = getattr(config, "num_attention_heads", 0)  # none in a state space model
    width = heads * config.head_dim if getattr(config, "head_dim", None) else config.hidden_size if heads else 0
    attention = 4.0 * width * config.num_hidden_layers * pairs
    head = (
        2.0 * config.hidden_size * network.vocabulary_size * len(batch.target_ids) if isinstance(network, Policy) else 0
    )
    return 2.0 * weights * len(batch.input_ids) + attention + head


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second that the device can do: a GPU's by its data sheet, else as measured; None if unknown."""
    if device.type not in ("cpu", "cuda"):
        return None
    listed = None
    if device.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the GPU is not in Lightning's list: it is measured instead
            listed = get_available_flops(device, dtype)
    return measured_flops(device, dtype) if listed is None else float(listed)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of large matrices, on random numbers; zeros would be faster."""
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 768
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def compute_dtype(trainer: Trainer) -> torch.dtype:
    """What matrices are multiplied in."""
    precision = str(trainer.precision)
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
