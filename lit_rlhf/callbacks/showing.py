"""How each kind of logger is shown what is no scalar: tables, pictures, histograms."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger


def show_table(logger: Logger, name: str, markdown: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Rows for people.

    Args:
        logger: of any kind; one that has no place for tables gets none.
        name: of the table.
        markdown: for those that show text.
        rows: for those that show tables, the columns being those of any row.
        step: at which they were made.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(name, markdown, step)
    elif isinstance(logger, WandbLogger):
        data = [[step, *(row.get(column) for column in columns)] for row in rows]
        logger.log_table(name, columns=["step", *columns], data=data)  # it counts steps by itself, as of its metrics
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, markdown, f"{name}/step_{step:06}.md")


def show_image(logger: Logger, name: str, picture: np.ndarray, step: int) -> None:
    """A picture, (height, width, 3) uint8."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [picture])
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, picture, f"{name}_{step:06}.png")


def show_histogram(logger: Logger, name: str, values: np.ndarray, step: int) -> None:
    """Values of any number, (n,)."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_histogram(name, values, step)
    elif isinstance(logger, WandbLogger):
        import wandb  # the logger is there, so that this is

        logger.experiment.log({name: wandb.Histogram(values)})
