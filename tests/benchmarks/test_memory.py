"""How the rows of benchmarks/memory.py stand beside a peer; what they measure is in docs/memory.md."""

import argparse
import json

import pytest

from benchmarks import compare, memory

OPTIONS = argparse.Namespace(shape="tiny", pairs=4, batch=2, max_tokens=256, seed=0, rounds=2, alike=False)
SECONDS = {
    "ours": [1.0, 2.0],
    "ours, bfloat16": [9.0, 9.0],
    "float32": [4.0, 4.0],
    "packing": [3.0, 3.0],
    "packing, bfloat16": [2.5, 6.0],
}


class Player:
    """A contestant whose times are known."""

    turns: list[str] = []  # noqa: RUF012

    def __init__(self, name, command, threads):
        self.name, self.command, self.results = name, command, []

    def play(self):
        Player.turns.append(self.name)
        self.results.append({"seconds": SECONDS[self.name][len(self.results)]})
        return self.results[-1]

    def close(self):
        pass


def test_the_peer_counts_at_its_fastest_and_contestants_take_turns(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(memory, "Contestant", Player)
    monkeypatch.setattr(memory, "answer", lambda command, *rest: asked.append(command) or '{"tensor_mb": 7.0}')
    found = memory.beside_peer("sft_lora", "python-of-the-peer", OPTIONS)
    assert Player.turns == [*SECONDS, *SECONDS]
    tokens = compare.useful_tokens("sft", OPTIONS)
    assert found["peer_setting"] == "packing" and found["peer_tensor_mb"] == 7.0
    assert found["tokens_per_second"] == tokens / 1.5 and found["peer_tokens_per_second"] == tokens / 3.0
    assert found["setting"] == "ours" and found["speedups"]["float32"] == 4.0 / 1.5
    assert found["speedup"] == (3.0 / 1.0 + 3.0 / 2.0) / 2
    assert asked[0][0] == "python-of-the-peer" and {"--packing", "--memory"} < set(asked[0])
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 10


def test_rows_beside_a_peer_take_batches_as_it_does(tmp_path):
    alike = argparse.Namespace(**{**vars(OPTIONS), "alike": True})
    assert "--data.batch_size=2" in memory.arguments(tmp_path, "dpo_lora", alike)
    assert "--data.max_tokens=256" in memory.arguments(tmp_path, "dpo_lora", OPTIONS)
    assert "--data.max_tokens=256" in memory.arguments(tmp_path, "dpo", alike)


def test_a_process_that_died_is_told_with_its_last_words():
    with pytest.raises(RuntimeError, match=r"died \(3\):\nall is lost"):
        memory.answer(["python", "-c", "import sys; print('all is lost', file=sys.stderr); sys.exit(3)"])
