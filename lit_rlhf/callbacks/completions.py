"""What `predict` made, as JSON Lines."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.data.locating import files_there
from lit_rlhf.data.naming import Role
from lit_rlhf.errors import UserError, require_types
from lit_rlhf.files import make_room, strict_json, write_lines
from lit_rlhf.rollout.best_of import BestOf, Keep
from lit_rlhf.rollout.judges import judge_of
from lit_rlhf.rollout.rewards import Reward


class CompletionWriter(BasePredictionWriter):
    """Write what `predict` made as JSON Lines, in the order of the prompts.

    Args:
        file: where, relative to the Trainer's `default_root_dir`; ends in .jsonl.
        group_size: completions of each prompt, each sampled by itself; the first of them are those of a smaller group.
        reward: gives each completion a score: the folder of a reward model, or a function (prompts, responses,
            **columns) of text by its import path; null = none.
        keep: "best" = of each prompt the completion of the highest score, and the scores of all beside it; "all" = all
            of them, a row each; null = the best where there is a reward.
    """

    def __init__(
        self,
        file: str = "predictions.jsonl",
        group_size: int = 1,
        reward: Reward | Callable[..., Any] | str | None = None,
        keep: Keep | None = None,
    ) -> None:
        super().__init__(write_interval="epoch")
        given = {"file": file, "group_size": group_size, "keep": keep}
        require_types(CompletionWriter.__init__, given)
        self.file = file
        self.reward, self.keep = reward, keep
        self.best_of = BestOf(group_size, keep=keep if reward is None else None)  # without what `predict` alone needs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the place of the file before anything is generated.

        Raises:
            UserError: a folder or a device is there, or rows of any role; or it does not end in .jsonl; or completions
                are asked for of a model that writes none.
        """
        if stage == "predict" and (self.best_of != BestOf() or self.reward is not None):
            assert isinstance(pl_module, AlignmentModule)
            if pl_module.predicts_from != "prompts":
                raise UserError(
                    f"predictions.group_size and predictions.reward are of completions, and {type(pl_module).__name__} "
                    "writes none; name a policy"
                )
            option = "predictions.reward"
            judge = None if self.reward is None else judge_of(self.reward, option)
            self.best_of = pl_module.best_of = BestOf(self.best_of.group_size, judge, self.keep, option)
        if stage == "predict" and trainer.is_global_zero:
            sources: Mapping[Role, Any] = getattr(trainer.datamodule, "sources", {})  # type: ignore[attr-defined]
            rows = [file for role, named in sources.items() for file in files_there(named or (), role)]
            target = self.target(trainer)
            make_room(target, "predictions.file", ".jsonl", rows)
            if target.exists():
                rank_zero_info(f"predictions.file: {target} holds rows, which those of this run will replace")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Get the reward ready, on the device that the policy is on by now."""
        if self.best_of.reward is not None:
            assert isinstance(pl_module, AlignmentModule)
            self.best_of.reward.bind(pl_module.tokenizer, pl_module.device)

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
            rank_zero_info(f"wrote {len(rows)} rows to {target}{self.best_of.told(rows)}")
