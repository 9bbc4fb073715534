from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_rlhf.cli.run_folder import claim_versions


def test_runs_that_start_together_take_folders_of_their_own(tmp_path, monkeypatch):
    ours, theirs = TensorBoardLogger(tmp_path), TensorBoardLogger(tmp_path)
    real = TensorBoardLogger._get_next_version

    def beaten(self):
        version = real(self)
        if self is ours and version == 0:
            claim_versions([theirs])  # between the look and the folder
        return version

    monkeypatch.setattr(TensorBoardLogger, "_get_next_version", beaten)
    claim_versions([ours])
    assert (theirs.version, ours.version) == (0, 1)
    assert Path(ours.log_dir).is_dir() and Path(theirs.log_dir).is_dir()


def test_loggers_of_one_run_share_its_folder_and_others_are_left_alone(tmp_path):
    loggers = [
        TensorBoardLogger(tmp_path),
        CSVLogger(tmp_path),
        CSVLogger(tmp_path, version="mine"),
        CSVLogger(tmp_path, "b"),
    ]
    (tmp_path / "lightning_logs" / "version_4").mkdir(parents=True)
    claim_versions(loggers)
    assert [logger.version for logger in loggers] == [5, 5, "mine", 0]
    assert sorted(path.name for path in tmp_path.glob("*/version_*")) == ["version_0", "version_4", "version_5"]


def test_a_version_that_was_given_is_taken_again(tmp_path):
    for _ in range(2):
        logger = TensorBoardLogger(tmp_path, version=3)
        claim_versions([logger])
        assert logger.version == 3
