"""Checkpoints are whole or not there; what is none is refused before a model is read."""

import errno
import json
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lit_rlhf import UserError
from lit_rlhf.cli.checkpoints import WholeCheckpointIO, require_checkpoint
from tests.cli.command_line import QUICK, run

CHECKPOINT = {"state_dict": {"weight": torch.ones(1000)}, "loops": {}}


def test_a_disk_that_fills_up_leaves_the_older_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "last.ckpt"
    io = WholeCheckpointIO()
    io.save_checkpoint(CHECKPOINT, file)
    before = file.read_bytes()

    def half(self, checkpoint, path, storage_options=None):
        path.write_bytes(before[: len(before) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", half)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint(CHECKPOINT, file)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert file.read_bytes() == before


def test_a_whole_checkpoint_and_a_folder_of_shards_are_taken(tmp_path):
    WholeCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    require_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="holds weights alone"):
        require_checkpoint(tmp_path / "a.ckpt", training=True)
    (tmp_path / "sharded").mkdir()
    require_checkpoint(tmp_path / "sharded")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[: len(content) // 2], "is no checkpoint of the Trainer's.*cut short"),
        (lambda content: content[:100] + bytes(400) + content[500:], "is damaged, or holds more"),
        (lambda content: b"{}", "is no checkpoint of the Trainer's"),
    ],
    ids=["cut short", "overwritten", "another file"],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage, words):
    torch.save(CHECKPOINT, tmp_path / "whole.ckpt")
    (tmp_path / "bad.ckpt").write_bytes(damage((tmp_path / "whole.ckpt").read_bytes()))
    with pytest.raises(UserError, match=f"bad.ckpt {words}"):
        require_checkpoint(tmp_path / "bad.ckpt")


def test_weights_alone_and_an_exported_model_are_no_checkpoint(tmp_path):
    torch.save(CHECKPOINT["state_dict"], tmp_path / "weights.pt")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("weights.pt", "model"):
        with pytest.raises(UserError, match=f"{name} is no checkpoint of the Trainer's"):
            require_checkpoint(tmp_path / name)


@pytest.mark.filterwarnings("ignore")
def test_the_last_checkpoint_is_the_newest_of_the_run(workdir, monkeypatch):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    options = ["--trainer.limit_val_batches=0", "--trainer.default_root_dir=out/last"]
    assert run("fit", "--config", config, *QUICK, *options, "--trainer.max_steps=2") == 0
    assert run("fit", "--config", config, *QUICK, *options, "--trainer.max_steps=3", "--ckpt_path=last") == 0
    assert json.loads(Path("out/last/summary.json").read_text())["steps"] == 3
    assert sorted(path.name for path in Path("out/last").rglob("*.ckpt"))[-1].endswith("step=3.ckpt")
