"""Runs of a stage from its start to its export, for the tests of what they leave behind."""

from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf.callbacks import HuggingFaceExport, RunSummary
from tests.stages import make_stage, make_trainer


def fit(inputs, folder, stage="sft", export="model", which=None, ckpt_path=None, saver=None, **options):
    module, data = make_stage(stage, inputs)
    saver = saver or ModelCheckpoint(dirpath=folder, filename="end")
    callbacks = [HuggingFaceExport(export, which), RunSummary(), saver]
    options = {"max_epochs": 1, "limit_val_batches": None, "enable_checkpointing": True} | options
    make_trainer(folder, callbacks=callbacks, **options).fit(module, data, ckpt_path=ckpt_path)
    return module
