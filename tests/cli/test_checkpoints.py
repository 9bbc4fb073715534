"""Checkpoints are whole or not there; what is none is refused before a model is read."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

from lit_rlhf import UserError
from lit_rlhf.cli.checkpoints import WholeCheckpointIO, choose_checkpoint, newest_checkpoint, require_checkpoint
from lit_rlhf.files import NEW
from tests.cli.command_line import QUICK, run

CHECKPOINT = {"state_dict": {"weight": torch.ones(1000)}, "loops": {}, "pytorch-lightning_version": "2.6.6"}
CHECKPOINT |= {"epoch": 0, "global_step": 3}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device here is full for certain")
def test_a_disk_that_fills_up_is_named_and_leaves_the_older_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "last.ckpt"
    io = WholeCheckpointIO()
    io.save_checkpoint(CHECKPOINT, file)
    before = file.read_bytes()
    real = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: real(Path("/dev/full"), mode))
        with pytest.raises(OSError, match="No space left on device") as told:
            io.save_checkpoint(CHECKPOINT, file)
    assert (told.value.errno, told.value.filename) == (errno.ENOSPC, str(file))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert file.read_bytes() == before


def test_no_part_of_a_checkpoint_travels_through_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    WholeCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    require_checkpoint(tmp_path / "a.ckpt")


def test_what_a_killed_run_left_beside_its_checkpoints_goes_with_the_next_run_s(tmp_path):
    folders = [tmp_path / "lightning_logs" / f"version_{i}" / "checkpoints" for i in range(2)]
    folders[0].mkdir(parents=True)
    (folders[0] / f".step=1.ckpt{NEW}").write_text("half")
    WholeCheckpointIO().save_checkpoint(CHECKPOINT, folders[1] / "step=1.ckpt")
    assert [path.name for path in tmp_path.rglob("*.ckpt*")] == ["step=1.ckpt"]


def test_a_whole_checkpoint_and_a_folder_of_shards_are_taken(tmp_path):
    WholeCheckpointIO().save_checkpoint(CHECKPOINT, tmp_path / "a.ckpt")
    require_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="holds weights alone"):
        require_checkpoint(tmp_path / "a.ckpt", training=True)
    make_sharded(tmp_path / "sharded")
    require_checkpoint(tmp_path / "sharded")


def make_sharded(folder):
    folder.mkdir()
    for name in (".metadata", "meta.pt", "__0_0.distcp"):
        (folder / name).write_text("")


def test_the_newest_checkpoint_is_one_that_was_written_to_its_end(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    make_sharded(tmp_path / "whole.ckpt")
    make_sharded(tmp_path / "half.ckpt")
    (tmp_path / "half.ckpt" / "meta.pt").unlink()
    (tmp_path / f".aside.ckpt{NEW}").write_text("")
    (tmp_path / "dangling.ckpt").symlink_to(tmp_path / "gone.ckpt")
    assert newest_checkpoint(tmp_path) == tmp_path / "whole.ckpt"
    with pytest.raises(UserError, match=r"half.ckpt is no checkpoint of the Trainer's.*cut short"):
        require_checkpoint(tmp_path / "half.ckpt")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[: len(content) // 2], "is no checkpoint of the Trainer's.*cut short"),
        (lambda content: content[:100] + bytes(400) + content[500:], "is damaged, or holds more"),
        (lambda content: content.replace(b"\0\0\x80?" * 9, b"\0\0\x80?" * 8 + b"\0\0\x80\x3e", 1), "is damaged, or"),
        (lambda content: content.replace(b"weight", b"WEIGHT", 1), "is damaged, or"),
        (lambda content: b"{}", "is no checkpoint of the Trainer's"),
    ],
    ids=["cut short", "overwritten", "one bit of a weight", "a name", "another file"],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage, words):
    torch.save(CHECKPOINT, tmp_path / "whole.ckpt")
    (tmp_path / "bad.ckpt").write_bytes(damage((tmp_path / "whole.ckpt").read_bytes()))
    with pytest.raises(UserError, match=f"bad.ckpt {words}"):
        require_checkpoint(tmp_path / "bad.ckpt")


OTHERS = {  # what torch reads, and is no checkpoint
    "weights": CHECKPOINT["state_dict"],
    "without a version": {key: CHECKPOINT[key] for key in ("state_dict", "loops")},
    "a list": [CHECKPOINT],
}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, name):
    torch.save(OTHERS[name], tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other.pt is no checkpoint of the Trainer's"):
        require_checkpoint(tmp_path / "other.pt")


COUNTS = [
    (-1, r"int \(-1\)"),
    ("3", "text"),
    (1.5, r"float \(1.5\)"),
    (True, "bool"),
    (10**30, "int"),
    (None, "nothing"),
]
WRONG = [
    *[(key, *count) for key in ("epoch", "global_step") for count in COUNTS],
    ("loops", [1], "a list"),
    ("state_dict", {}, r"an object \({}\)"),
    ("pytorch-lightning_version", None, "nothing"),
    ("pytorch-lightning_version", "x", "text"),
]


@pytest.mark.parametrize(("key", "value", "found"), WRONG)
def test_a_checkpoint_with_an_odd_value_is_refused_by_file_and_key(tmp_path, key, value, found):
    torch.save(CHECKPOINT | {key: value}, tmp_path / "a.ckpt")
    with pytest.raises(
        UserError, match=rf"a\.ckpt is damaged: expected .* as its '{key}', found {found}.*take an older"
    ):
        require_checkpoint(tmp_path / "a.ckpt")
    if key != "pytorch-lightning_version":
        torch.save({name: part for name, part in CHECKPOINT.items() if name != key}, tmp_path / "a.ckpt")
        with pytest.raises(UserError, match=rf"a\.ckpt is damaged: expected .* as its '{key}', found nothing"):
            require_checkpoint(tmp_path / "a.ckpt")


def test_an_exported_model_and_an_empty_folder_are_no_checkpoint(tmp_path):
    for name in ("model", "empty"):
        (tmp_path / name).mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    for name in ("model", "empty", "model/model.safetensors"):
        with pytest.raises(UserError, match=f"{name} is no checkpoint of the Trainer's") as said:
            require_checkpoint(tmp_path / name)
        assert ("named by model.policy, and of lit-rlhf export by --model" in str(said.value)) is (name != "empty")


def test_a_runs_folder_is_answered_with_the_newest_of_its_checkpoints(tmp_path):
    kept = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    kept.mkdir(parents=True)
    for time, name in enumerate(("b", "c", "a")):
        (kept / f"{name}.ckpt").touch()
        os.utime(kept / f"{name}.ckpt", (time, time))
    with pytest.raises(UserError, match=rf"; the newest of those in this folder is {kept}/a\.ckpt$"):
        require_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_the_last_checkpoint_is_the_newest_of_the_run(workdir, monkeypatch):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    options = ["--trainer.limit_val_batches=0", "--trainer.default_root_dir=out/last"]
    assert run("fit", "--config", config, *QUICK, *options, "--trainer.max_steps=2") == 0
    assert run("fit", "--config", config, *QUICK, *options, "--trainer.max_steps=3", "--ckpt_path=last") == 0
    assert json.loads(Path("out/last/summary.json").read_text())["steps"] == 3
    assert sorted(path.name for path in Path("out/last").rglob("*.ckpt"))[-1].endswith("step=3.ckpt")


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_resumed_for_fewer_epochs_than_it_has_made_is_not_called_damaged(workdir, monkeypatch, capsys):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    limits = ["--trainer.limit_val_batches=0", "--trainer.limit_train_batches=1"]
    options = [*limits, "--trainer.default_root_dir=out/epochs"]
    assert run("fit", "--config", config, *QUICK, *options, "--trainer.max_epochs=3") == 0
    assert run("fit", "--config", config, *QUICK, *options, "--trainer.max_epochs=2", "--ckpt_path=last") == 2
    assert "has made 3 epochs already, and trainer.max_epochs is 2: raise it" in capsys.readouterr().err


RESUMED = {"optimizer_states": [{}], "lr_schedulers": [{}], "callbacks": {}, "loops": {"fit_loop": {"state_dict": {}}}}
DAMAGED = [
    ("optimizer_states", None),
    ("optimizer_states", []),
    ("optimizer_states", [3]),
    ("lr_schedulers", "x"),
    ("lr_schedulers", []),
    ("lr_schedulers", [None]),
    ("callbacks", 3),
    ("callbacks", None),
    ("loops", {}),
    ("loops", {"fit_loop": 3}),
    ("loops", {"fit_loop": {}}),
]


@pytest.mark.parametrize(("key", "value"), DAMAGED)
def test_a_checkpoint_that_lacks_what_training_goes_on_from_is_refused_before_a_model_is_read(key, value, tmp_path):
    torch.save(CHECKPOINT | RESUMED, tmp_path / "a.ckpt")
    require_checkpoint(tmp_path / "a.ckpt", training=True)
    torch.save(CHECKPOINT | RESUMED | {key: value}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=rf"a\.ckpt is damaged: expected .* as its '{key}', found "):
        require_checkpoint(tmp_path / "a.ckpt", training=True)
    if value is None:
        require_checkpoint(tmp_path / "a.ckpt")  # weights are there to be exported


def test_a_pipe_is_no_checkpoint_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="is no checkpoint of the Trainer's"):
        require_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_whose_optimiser_is_anothers_is_one_line(workdir, monkeypatch, capsys):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    options = ["--config", config, *QUICK, "--trainer.limit_val_batches=0", "--trainer.default_root_dir=out/other"]
    assert run("fit", *options, "--trainer.max_steps=1") == 0
    file = newest_checkpoint(Path("out/other"))
    checkpoint = torch.load(file)
    checkpoint["optimizer_states"][0]["param_groups"].pop()
    torch.save(checkpoint, file)
    assert run("fit", *options, "--trainer.max_steps=2", f"--ckpt_path={file}") == 2
    said = capsys.readouterr().err
    assert f"error: ckpt_path: {file} is damaged, or of another run" in said
    assert "its optimizer_states['param_groups']: expected a list of 2, found list" in said


def test_an_address_and_a_file_that_may_not_be_read_are_told_as_such(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"ckpt_path: s3://a/b\.ckpt is an address; download the file"):
        choose_checkpoint("s3://a/b.ckpt", tmp_path, training=True)
    torch.save(CHECKPOINT, tmp_path / "a.ckpt")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may be allowed everything
    with pytest.raises(UserError, match=r"a\.ckpt may not be read"):
        require_checkpoint(tmp_path / "a.ckpt")
