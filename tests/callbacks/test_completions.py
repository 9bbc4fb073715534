"""What `predict` made is a line per prompt, in the order of the prompts, whatever rank made it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from lit_rlhf.callbacks import CompletionWriter

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
