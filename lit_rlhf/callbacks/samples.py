"""What the model does on a few held-out prompts, as a table for a person."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.errors import require, require_types


class SampleTable(Callback):
    """Show prompts, completions and scores as a table in TensorBoard at each validation.

    Args:
        num_prompts: rows of the table; 0 = none.
    """

    def __init__(self, num_prompts: int = 8) -> None:
        require_types(SampleTable.__init__, locals())
        require(num_prompts >= 0, "num_prompts", num_prompts, "0 or more")
        self.num_prompts = num_prompts

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table; all ranks complete the prompts, since sharded weights need them all."""
        assert isinstance(pl_module, AlignmentModule)
        data: Any = getattr(trainer, "datamodule", None)
        if self.num_prompts == 0 or trainer.sanity_checking or not hasattr(data, "sample_prompts"):
            return
        prompts = data.sample_prompts(self.num_prompts)
        rows = [] if prompts is None else pl_module.sample_table(prompts)
        for logger in trainer.loggers:
            if rows and isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", markdown_table(rows), trainer.global_step)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal keys as Markdown, a column for each of prompt and completion and one for all that is short.

    TensorBoard breaks a narrow column within its words and numbers.
    """

    def cell(value: Any) -> str:
        text = f"{value:.2f}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", "<br>")

    def cells(row: dict[str, Any]) -> list[str]:
        short = [f"{name}: {cell(value)}" for name, value in row.items() if name not in ("prompt", "completion")]
        return [cell(row["prompt"]), cell(row["completion"]), "<br>".join(short)]

    lines = ["| prompt | completion | outcome |", "| --- | --- | --- |"]
    return "\n".join(lines + ["| " + " | ".join(cells(row)) + " |" for row in rows])
