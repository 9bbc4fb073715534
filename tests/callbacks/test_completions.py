"""What `predict` made is a line per prompt, in the order of the prompts, whatever rank made it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from lit_rlhf import SFT, RewardModel, UserError
from lit_rlhf.callbacks import CompletionWriter
from lit_rlhf.data.naming import parse_sources

# Five prompts in batches of one or two, dealt in turn: batch 2 k + r goes to rank r.
BATCHES_OF_RANK = [[[{"id": 0}, {"id": 1}], [{"id": 4}]], [[{"id": 2}, {"id": 3}]]]


def write(folder, predictions, rank=0, ranks=1, **options):
    trainer = SimpleNamespace(world_size=ranks, is_global_zero=rank == 0, default_root_dir=folder)
    writer = CompletionWriter(**options)
    writer.write_on_epoch_end(trainer, None, predictions, [])
    return folder / writer.file


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def gathered(monkeypatch):
    """Stands for two processes that hand each other their rows."""

    def gather(ranks, mine):
        assert mine in BATCHES_OF_RANK
        ranks[:] = BATCHES_OF_RANK

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_gather_object", gather)


def test_rows_of_all_ranks_are_written_in_the_order_of_the_prompts(gathered, tmp_path):
    file = write(tmp_path, BATCHES_OF_RANK[0], ranks=2)
    assert [row["id"] for row in rows(file)] == [0, 1, 2, 3, 4]


def test_the_other_ranks_hand_over_their_rows_and_write_nothing(gathered, tmp_path):
    assert not write(tmp_path, BATCHES_OF_RANK[1], rank=1, ranks=2).exists()


def test_text_stays_as_it_is_and_what_json_lacks_becomes_text(tmp_path):
    file = write(tmp_path, [[{"completion": "Grüße 🙂\nline", "source": Path("a.jsonl")}]])
    assert "Grüße 🙂" in file.read_text(encoding="utf-8")
    assert rows(file) == [{"completion": "Grüße 🙂\nline", "source": "a.jsonl"}]


def test_a_file_of_an_earlier_run_is_replaced_whole(tmp_path):
    write(tmp_path, [[{"id": 0}, {"id": 1}]], file="answers/a.jsonl")
    assert rows(write(tmp_path, [[{"id": 2}]], file="answers/a.jsonl")) == [{"id": 2}]
    assert [path.name for path in (tmp_path / "answers").iterdir()] == ["a.jsonl"]


def test_numbers_that_json_cannot_say_are_null_so_that_any_reader_takes_the_file(tmp_path):
    file = write(tmp_path, [[{"id": 1, "x": [float("nan"), {"y": -float("inf")}, 0.5]}]])
    assert file.read_text() == '{"id": 1, "x": [null, {"y": null}, 0.5]}\n'


def test_where_rows_cannot_go_is_told_before_any_is_made(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    for name in ("train.jsonl", "held/out.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"prompt": "a"}\n')
    named = {
        "predict": prompts,
        "train": tmp_path / "train.jsonl",
        "test": tmp_path / "held",
        "validation": "gone.jsonl",
    }
    data = SimpleNamespace(sources={role: parse_sources(str(path)) for role, path in named.items()})
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path, datamodule=data)
    refused = {".": "is a folder", "/dev/null": "a device", "null": "must end in .jsonl", "a.csv": "must end in .jsonl"}
    refused |= {"a.jsonl.gz": "must end in .jsonl", "a/config.json": "must end in .jsonl"}
    refused |= dict.fromkeys(("prompts.jsonl", "train.jsonl", "held/out.jsonl"), "is what the run reads")
    for file, words in refused.items():
        with pytest.raises(UserError, match=rf"predictions\.file: .*{words}"):
            CompletionWriter(file).setup(trainer, None, "predict")
    CompletionWriter("new/answers.jsonl").setup(trainer, None, "predict")
    assert (tmp_path / "new").is_dir()
    CompletionWriter(".").setup(trainer, None, "fit")


def test_several_completions_are_of_a_policy_alone_and_the_best_needs_a_reward(tmp_path, folder):
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path, datamodule=None)
    for options in ({"group_size": 2}, {"reward": "builtins.len"}):
        with pytest.raises(UserError, match="are of completions, and RewardModel writes none"):
            CompletionWriter(**options).setup(trainer, RewardModel(str(folder)), "predict")
    with pytest.raises(UserError, match="keep is best, and no reward"):
        CompletionWriter(keep="best")
    with pytest.raises(UserError, match=r"predictions\.reward: nothing\.there is neither a folder nor"):
        CompletionWriter(reward="nothing.there").setup(trainer, SFT(str(folder)), "predict")
    CompletionWriter(reward="nothing.there").setup(trainer, SFT(str(folder)), "fit")


def test_rows_of_an_earlier_run_are_told_to_be_replaced_before_anything_is_generated(tmp_path, caplog):
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path, datamodule=None)
    said = []
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO"):
            CompletionWriter().setup(trainer, None, "predict")
        said.append(caplog.text)
        (tmp_path / "predictions.jsonl").write_text("{}\n")
    assert "holds rows" not in said[0]
    assert f"{tmp_path / 'predictions.jsonl'} holds rows, which those of this run will replace" in said[1]
