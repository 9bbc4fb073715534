"""The GPU benchmark in miniature on a CPU, so that a mistake in its plumbing costs no time on a GPU."""

import argparse
import subprocess
import sys
from typing import ClassVar

import pytest

from benchmarks import gpu, workload
from tests.benchmarks.test_benchmarks import ROOT, json_lines


def settings(**changes):
    defaults = {"shape": "tiny", "pairs": 8, "batch": None, "slots": 2, "new_tokens": 9, "minutes": 5.0}
    ceilings = {"bandwidth": 1e10, "matmul_flops": 1e11, "peak_flops": 2e11}
    return argparse.Namespace(**(defaults | ceilings | changes))


class Recorded:
    """Stands in for a contestant; runs out of memory with more than two in a batch."""

    commands: ClassVar[list] = []
    error = "torch.OutOfMemoryError: CUDA out of memory."

    def __init__(self, name, command, threads):
        self.batch = int(command[command.index("--batch") + 1])
        self.results = []
        self.commands.append(command)

    def play(self, limit):
        assert limit > 0
        if self.batch > 2:
            raise RuntimeError(self.error)
        seconds = [9.0, 1.0, 2.0, 3.0][len(self.results)]  # a round of warm-up, then those whose median counts
        self.results.append({"seconds": seconds, "peak_memory_mb": 1.0, "perf/mfu": 0.1, "perf/rollout_fraction": 0.5})

    def close(self):
        pass


@pytest.fixture
def contestant(monkeypatch):
    monkeypatch.setattr(gpu, "Contestant", Recorded)
    monkeypatch.setattr(Recorded, "commands", [])
    return Recorded


def test_every_engine_writes_with_both_laws_of_length():
    lines = gpu.medians(list(gpu.decoding(settings())))
    assert [(line["engine"], line["lengths"]) for line in lines] == [
        (engine, law) for law in ("fixed", "heavy tail") for engine in ("slot cache", "generate")
    ]
    assert all(line["tokens_per_second"] > 0 and line["share_of_bandwidth_limit"] > 0 for line in lines)


class Killed:
    """Stands in for the process of `decode`; the third round of `generate` takes too long."""

    def __init__(self, name, command, threads):
        self.results = []
        rates = [9.0, 8.0, 1.0, 2.0, 3.0]
        self.lines = [
            {"engine": engine, "lengths": "fixed", "tokens_per_second": rate, "share_of_bandwidth_limit": rate / 10}
            for rate, engine in zip(rates, ["slot cache", "generate"] * 2 + ["slot cache"], strict=True)
        ]

    def play(self, limit):
        if not self.lines:
            raise RuntimeError("decode was killed at its time limit")
        self.results.append(self.lines.pop(0))
        return self.results[-1]

    def close(self):
        pass


def test_decoding_that_runs_out_of_time_leaves_the_rounds_that_were_played(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "Contestant", Killed)
    gpu.measure(settings(phases=["decode"]))
    output = capsys.readouterr().out
    *rounds, last = json_lines(output)
    assert [line["tokens_per_second"] for line in rounds] == [9.0, 8.0, 1.0, 2.0, 3.0]
    assert "killed at its time limit" in last["error"]
    assert [line["tokens_per_second"] for line in last["engines"]] == [3.0, 2.0]  # the first is of warm-up
    assert "| slot cache, fixed | 3 | 0.3 |" in output


def test_an_engine_that_fails_leaves_its_error_to_the_others(monkeypatch):
    def out_of_memory(*args):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(gpu, "generate", out_of_memory)
    lines = gpu.medians(list(gpu.decoding(settings())))
    assert ["error" in line for line in lines] == [False, True, False, True]


def test_a_phase_that_runs_out_of_memory_starts_again_with_half_the_batch(contestant):
    line = gpu.training("sft", settings(batch=8), limit=60)
    assert [command[command.index("--batch") + 1] for command in contestant.commands] == ["8", "4", "2"]
    pairs = workload.make_pairs(8, workload.SHAPES["tiny"])
    rate = workload.training_flops("sft", workload.SHAPES["tiny"], pairs) / 2.0
    assert line["batch"] == 2
    assert line["mfu"] == rate / 2e11
    assert line["share_of_measured_matmul_rate"] == rate / 1e11


def test_mfu_of_ppo_is_that_of_its_learning_without_the_rollouts(contestant):
    line = gpu.training("ppo", settings(batch=2), limit=60)
    assert line["mfu"] == pytest.approx(0.2)  # 0.1 of all the time, half of which were rollouts


def test_phases_that_fail_or_find_no_time_say_so_and_the_others_go_on(contestant, monkeypatch, capsys):
    monkeypatch.setattr(Recorded, "error", "a bug")
    gpu.measure(settings(phases=["sft", "dpo"], batch=8))
    gpu.measure(settings(phases=["ppo"], minutes=0.1))
    gpu.measure(settings(phases=["reward"], batch=2))
    output = capsys.readouterr().out
    lines = json_lines(output)
    assert [line["phase"] for line in lines] == ["sft", "dpo", "ppo", "reward"]
    assert "| sft | failed |" in output and "| ppo | skipped |" in output
    assert f"| reward | {lines[3]['tokens_per_second']:.0f} | " in output
    assert lines[0]["error"] == lines[1]["error"] == "a bug"
    assert "6 s of --minutes 0.1 were left" in lines[2]["skipped"]


def test_the_bandwidth_limit_counts_weights_once_and_keys_and_values_of_each_row():
    shape = workload.Shape(hidden=4, layers=1, heads=2, kv_heads=1, intermediate=8, vocabulary=10)
    # Weights: queries and outputs 2 x 16, keys and values 2 x 8, MLP 3 x 32, head 40: 184. A cached token: 2 x 2.
    assert gpu.bandwidth_limit(shape, slots=3, context=5.0, itemsize=2, bandwidth=488.0) == 3 * 488 / ((184 + 60) * 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_script_runs_unattended():
    command = [sys.executable, "-m", "benchmarks.gpu", "--pairs", "4", "--slots", "2", "--new-tokens", "9"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    first, *lines = json_lines(output)
    assert first["conditions"]["matmul_flops"] > 0
    assert list(dict.fromkeys(line["phase"] for line in lines)) == list(gpu.PHASES)
    assert not any("error" in line or "skipped" in line for line in lines)
