"""Tables, pictures and histograms, by the kind of the logger."""

import json

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rlhf.callbacks.showing import show_histogram, show_image, show_table

ROWS = [{"prompt": "a", "score": 0.5}, {"prompt": "b", "score": 1.0, "kl": 2.0}]
PICTURE = np.full((4, 6, 3), 200, dtype=np.uint8)


def show_all(logger):
    show_table(logger, "samples", "| prompt |", ROWS, 3)
    show_image(logger, "samples/tokens", PICTURE, 3)
    show_histogram(logger, "rollout/score", np.arange(5.0), 3)


def test_tensorboard_gets_text_picture_and_histogram_at_their_step(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    show_all(logger)
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tensors("samples/text_summary")[0].tensor_proto.string_val == [b"| prompt |"]
    image, histogram = events.Images("samples/tokens")[0], events.Histograms("rollout/score")[0]
    assert (image.width, image.height, image.step) == (6, 4, 3)
    assert (histogram.histogram_value.num, histogram.histogram_value.max, histogram.step) == (5, 4.0, 3)


def test_a_logger_without_a_place_for_them_gets_none(tmp_path):
    show_all(CSVLogger(tmp_path))
    assert not list(tmp_path.rglob("*.csv"))


class Experiment:
    """Stands for what W&B and MLflow hand out; keeps what is called."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *given, **named: self.calls.append((name, *given))


def test_mlflow_gets_text_and_picture_as_artefacts_of_the_run(monkeypatch):
    experiment, logger = Experiment(), MLFlowLogger.__new__(MLFlowLogger)
    monkeypatch.setattr(MLFlowLogger, "experiment", experiment)
    monkeypatch.setattr(MLFlowLogger, "run_id", "r")
    show_all(logger)
    assert experiment.calls[0] == ("log_text", "r", "| prompt |", "samples/step_000003.md")
    assert experiment.calls[1][0::3] == ("log_image", "samples/tokens_000003.png")


def test_wandb_gets_a_table_with_a_column_for_each_name_of_any_row(monkeypatch):
    kept, logger = [], WandbLogger.__new__(WandbLogger)
    monkeypatch.setattr(WandbLogger, "log_table", lambda self, name, columns, data: kept.append((name, columns, data)))
    show_table(logger, "samples", "", ROWS, 3)
    assert kept == [("samples", ["step", "prompt", "score", "kl"], [[3, "a", 0.5, None], [3, "b", 1.0, 2.0]])]


def test_wandb_offline_keeps_them_in_the_folder_of_the_run(tmp_path):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    logger = WandbLogger(save_dir=str(tmp_path), offline=True, project="test")
    show_all(logger)
    wandb.finish()
    (table,) = tmp_path.rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [[3, "a", 0.5, None], [3, "b", 1.0, 2.0]]
    assert list(tmp_path.rglob("*.png"))
