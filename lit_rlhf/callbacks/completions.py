"""What `predict` made, as JSON Lines."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.data.locating import files_there
from lit_rlhf.data.naming import Role
from lit_rlhf.errors import require_types
from lit_rlhf.files import make_room, strict_json, write_lines


class CompletionWriter(BasePredictionWriter):
    """Write what `predict` made as JSON Lines, in the order of the prompts.

    Args:
        file: where, relative to the Trainer's `default_root_dir`; ends in .jsonl.
    """

    def __init__(self, file: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="epoch")
        require_types(CompletionWriter.__init__, locals())
        self.file = file

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the place of the file before anything is generated.

        Raises:
            UserError: a folder or a device is there, or rows of any role; or it does not end in .jsonl.
        """
        if stage == "predict" and trainer.is_global_zero:
            sources: Mapping[Role, Any] = getattr(trainer.datamodule, "sources", {})  # type: ignore[attr-defined]
            rows = [file for role, named in sources.items() for file in files_there(named or (), role)]
            make_room(self.target(trainer), "predictions.file", ".jsonl", rows)

    def target(self, trainer: Trainer) -> Path:
        """Where the rows go."""
        return Path(trainer.default_root_dir) / self.file

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Collect the rows of all ranks and write them aside, then rename."""
        mine = list(predictions)
        ranks: list[list[Any]] = [mine] * trainer.world_size
        if dist.is_available() and dist.is_initialized():
            dist.all_gather_object(ranks, mine)
        if trainer.is_global_zero:
            # The k-th batch of rank r among n is batch k n + r of the data.
            batches = [batch for kth in itertools.zip_longest(*ranks, fillvalue=()) for batch in kth]
            rows = [row for batch in batches for row in batch]
            target = self.target(trainer)
            write_lines((strict_json(row, ensure_ascii=False, default=str) for row in rows), target)
            rank_zero_info(f"wrote {len(rows)} rows to {target}")
