"""The folder of a run's logs: its own, whatever starts beside it."""

from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger


def claim_versions(loggers: Iterable[Logger]) -> None:
    """Make the folders `version_N` that loggers are about to write into, each N of one run alone.

    Lightning picks an N that is free and makes the folder later, so that runs which start together would share it and
    replace each other's config and checkpoints. Loggers of one folder share N; a version that was given stays.

    Raises:
        OSError: a folder may not be made; names it.
    """
    claimed: dict[Path, int | str] = {}
    for logger in loggers:
        if isinstance(logger, CSVLogger | TensorBoardLogger) and logger._version is None:  # none was given
            folder = Path(logger.root_dir)
            if folder not in claimed:
                claimed[folder] = _claim(logger, folder)
            logger._version = claimed[folder]


def _claim(logger: CSVLogger | TensorBoardLogger, folder: Path) -> int | str:
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        version = logger.version
        try:
            (folder / f"version_{version}").mkdir()
        except FileExistsError:  # since it was looked for
            logger._version = None
        else:
            return version
