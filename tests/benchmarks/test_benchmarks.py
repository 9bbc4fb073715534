"""The benchmarks' workload and rounds; what they measure is in docs/performance.md."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from benchmarks import compare, peers, scaling, workload
from benchmarks.rounds import Contestant
from lit_rlhf.callbacks.performance import forward_flops, matrix_weights, step_flops
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.models.policy import Policy, Scorer

ROOT = Path(__file__).parents[2]
ORIGINAL = ROOT.parent / "shared" / "bench" / "workload.py"
TINY = workload.SHAPES["tiny"]


@pytest.mark.skipif(not ORIGINAL.exists(), reason="the peers' benchmark harness is not beside this checkout")
@pytest.mark.parametrize("seed", [0, 7])
def test_the_workload_is_the_one_that_the_peers_were_measured_on(seed):
    spec = importlib.util.spec_from_file_location("original_workload", ORIGINAL)
    original = importlib.util.module_from_spec(spec)
    sys.modules["original_workload"] = original  # dataclasses look their module up
    spec.loader.exec_module(original)
    shape, other = workload.SHAPES["small"], original.SIZES["small"]
    pairs = workload.make_pairs(40, shape, seed)
    assert pairs == original.make_pairs(40, other, seed)
    assert workload.response_lengths(40, seed).tolist() == original.gen_lengths(40, seed).tolist()
    assert workload.training_flops("sft", shape, pairs) == original.task_flops("sft", other, pairs)


@pytest.mark.parametrize("task", ["sft", "reward", "dpo", "dpo_cached"])
def test_useful_operations_are_those_of_perf_mfu_with_a_shared_prompt_once(task):
    pairs = workload.make_pairs(6, TINY)
    sides = ("chosen",) if task == "sft" else ("chosen", "rejected")
    batch = pack([Example(np.array(p["prompt"]), tuple(np.array(p[side]) for side in sides)) for p in pairs])
    network = (Scorer if task == "reward" else Policy)(workload.make_model(TINY, classifier=task == "reward"))
    weights = matrix_weights(network)
    counted = step_flops(network, batch, weights, frozen=0)
    if task == "dpo":
        counted += forward_flops(network, batch, weights)  # the reference
    assert workload.training_flops(task, TINY, pairs) == counted.item()


def test_prompts_and_responses_survive_the_way_through_text():
    tokenizer = workload.make_tokenizer(TINY)
    for pair in workload.make_pairs(5, TINY):
        for ids in pair.values():
            assert tokenizer(workload.as_text(ids), add_special_tokens=False)["input_ids"] == ids


def test_every_response_of_a_forced_rollout_has_its_prescribed_length():
    from benchmarks.ours import ForcedLengths

    lengths = np.array([3, 1, 5, 2])
    ForcedLengths.lengths = lengths
    env = ForcedLengths(
        prompts=[[4], [5, 6], [7], [8]],
        num_envs=2,
        vocab_size=20,
        stop_token_ids=workload.EOS,
        max_new_tokens=8,
        reward_fn=lambda prompts, responses: np.zeros(len(responses)),
        reward_mode="deferred",
        shuffle=False,
    )
    _, info = env.reset(seed=0, options={"max_episodes": 4})
    while info["active"].any():
        *_, info = env.step(np.array([workload.EOS, 9]))  # a policy that ends at once, and one that never does
    episodes = env.pop_episodes()
    assert [len(episode.response_ids) for episode in episodes] == lengths[[e.prompt_index for e in episodes]].tolist()
    assert all(episode.response_ids[-1] == workload.EOS for episode in episodes)


def json_lines(output):
    """What of a benchmark's output is JSON, between tables."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


class Timed:
    """Stands in for a contestant; the machine is slow in the second round, whoever plays."""

    seconds: ClassVar = {
        "ours": 1.0,
        "ours, bfloat16": 0.5,
        "trl, tuned": 3.0,
        "trl, grouped": 2.5,
        "trl, packing": 2.0,
        "trl, tuned, bfloat16": 2.2,
        "trl, grouped, bfloat16": 2.1,
        "trl, packing, bfloat16": 1.5,
        "trl, default, bfloat16": 4.0,
    }
    computing: ClassVar[list[str]] = []

    def __init__(self, name, command, threads):
        reduced = "--bf16" in command or "default" in name
        self.name, self.results, self.key = name, [], f"{name}, bfloat16" if reduced else name

    def play(self):
        assert not self.computing, "one at a time"
        self.computing.append(self.name)
        slow = 2.0 if len(self.results) == 1 else 1.0
        result = {"seconds": self.seconds[self.key] * slow, "peak_memory_mb": 10.0 * self.seconds[self.key]}
        self.results.append(result)
        return result

    def close(self):
        self.computing.remove(self.name)


def compared(monkeypatch, capsys, *words):
    """What a comparison of stand-ins prints."""
    monkeypatch.setattr(compare, "Contestant", Timed)
    monkeypatch.setattr(sys, "argv", ["compare", *words])
    monkeypatch.setattr(subprocess, "check_output", lambda command, text: "trl 1 torch 2\n")
    for peer in peers.PEERS.values():
        monkeypatch.delenv(peer.variable, raising=False)
    compare.main()
    return capsys.readouterr().out


def test_a_comparison_goes_on_with_the_fastest_of_each_precision_and_pairs_their_rounds(monkeypatch, capsys):
    output = compared(monkeypatch, capsys, "--task", "sft", "--peer", "best", "--peer-python", sys.executable)
    conditions, *lines = json_lines(output)
    assert conditions["conditions"]["peers"] == {"trl": "trl 1 torch 2"}
    rounds, (plain, reduced) = lines[:-2], lines[-2:]
    of_first = [line for line in rounds if line["round"] == 0]
    assert len(of_first) == len(Timed.seconds)
    fast = ["ours", "ours, bfloat16", "trl, packing", "trl, packing"]
    assert [line["contestant"] for line in rounds if line["round"] == 2] == fast
    tokens = rounds[0]["tokens_per_second"]
    expected = {
        "task": "sft",
        "precision": "float32",
        "tokens_per_second": tokens,
        "best_peer": "trl, packing, bfloat16",
        "best_peer_tokens_per_second": tokens / 1.5,
        "speedup": 1.5,
        "best_peer_peak_memory_mb": 15.0,
        "best_peer_same_precision": "trl, packing, float32",
        "best_peer_tokens_per_second_same_precision": tokens / 2,
        "speedup_same_precision": 2.0,
        "best_peer_peak_memory_mb_same_precision": 20.0,
        "peak_memory_mb": 10.0,
    }
    assert {key: plain[key] for key in expected} == {
        key: value if isinstance(value, str) else pytest.approx(value) for key, value in expected.items()
    }
    assert reduced["precision"] == "bfloat16" and reduced["speedup"] == reduced["speedup_same_precision"] == 3.0
    assert "| trl, packing | bfloat16 | 3 |" in output and "| trl, tuned | float32 | 1 |" in output


def test_a_comparison_in_one_precision_is_beside_all_peers_and_the_last_line_is_its(monkeypatch, capsys):
    words = ("--task", "sft", "--peer", "trl", "--peer-python", sys.executable, "--precision", "32-true")
    last = json_lines(compared(monkeypatch, capsys, *words, "--rounds", "1"))[-1]
    assert last["precision"] == "float32" and last["speedup"] == 1.5 and last["speedup_same_precision"] == 2.0


def test_a_task_none_of_whose_peers_has_a_python_is_played_alone_and_said(monkeypatch, capsys):
    words = ("--task", "ppo", "--peer", "best", "--peer-python", sys.executable)
    output = compared(monkeypatch, capsys, *words, "--rounds", "1")
    assert "ppo: no peer has a Python that is named; ours alone" in output
    last = json_lines(output)[-1]
    assert last["best_peer"] is None and last["speedup"] is None and last["tokens_per_second"] > 0


def test_a_contestant_that_dies_says_why():
    contestant = Contestant("broken", [sys.executable, "-c", "raise SystemExit('no such model')"], threads=1)
    with pytest.raises(RuntimeError, match=r"broken died \(1\):\nno such model"):
        contestant.play()


def test_a_contestant_that_takes_too_long_is_killed():
    contestant = Contestant("slow", [sys.executable, "-c", "import time; time.sleep(60)"], threads=1)
    with pytest.raises(RuntimeError, match="slow was killed at its time limit"):
        contestant.play(limit=0.1)


def test_a_contestant_may_say_more_than_a_pipe_holds():
    talk = "import sys; sys.stderr.write('x' * 2**20); input(); print('{}', flush=True)"
    contestant = Contestant("talker", [sys.executable, "-c", talk], threads=1)
    assert contestant.play(limit=60) == {}
    contestant.close()


def test_a_peer_without_a_python_is_refused_with_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare", "--peer", "trl", "--peer-python", "nowhere/python"])
    with pytest.raises(SystemExit):
        compare.main()
    assert "--peer-python or $PEER_PYTHON: there is no nowhere/python" in capsys.readouterr().err
    for peer in peers.PEERS.values():
        monkeypatch.delenv(peer.variable, raising=False)
    monkeypatch.setattr(sys, "argv", ["compare", "--peer", "litgpt"])
    with pytest.raises(SystemExit):
        compare.main()
    assert (
        "--peer litgpt needs $LITGPT_PYTHON: a Python that has it, see docs/performance.md" in capsys.readouterr().err
    )


def test_a_count_below_one_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare", "--pairs", "-4"])
    with pytest.raises(SystemExit):
        compare.main()
    assert "--pairs must be 1 or more, not -4" in capsys.readouterr().err


def test_the_fit_recovers_a_known_exponent():
    sizes = [2.0, 4.0, 8.0, 16.0]
    assert scaling.fitted_exponent(sizes, [3.0 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert scaling.fitted_exponent(sizes, [7.0] * 4) == pytest.approx(0.0, abs=1e-9)


def test_every_sweep_of_the_scaling_benchmark_runs(capsys, monkeypatch):
    monkeypatch.setattr(scaling, "BASE", replace(scaling.BASE, hidden=24, layers=1, intermediate=32, vocabulary=64))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    scaling.main(["--smallest", "--repeats", "1"])
    output = capsys.readouterr().out
    first, *lines = json_lines(output)
    assert first["conditions"]["repeats"] == 1
    assert "| head alone | vocabulary | 8,192 to 16,384 | " in output
    assert {(line["sweep"], line["of"]) for line in lines} == {
        ("training step", "response length"),
        ("training step", "sequences"),
        ("training step", "layers"),
        ("training step", "weights, by width"),
        ("head alone", "vocabulary"),
        ("its products alone", "vocabulary"),
        ("decode step", "active of 32 slots"),
        ("decode step", "finished slots beside 4 active"),
    }
    assert all(len(line["sizes"]) == 2 and min(line["cpu_seconds"]) >= 0 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("task", compare.TASKS)
def test_a_comparison_ends_with_a_line_of_medians(task):
    command = [sys.executable, "-m", "benchmarks.compare", "--task", task, "--shape", "tiny", "--pairs", "4"]
    output = subprocess.run([*command, "--rounds", "1"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    last = json.loads(output.strip().splitlines()[-1])
    assert last["task"] == task
    assert last["tokens_per_second"] > 0
    assert last["peak_memory_mb"] > 0
    assert last["speedup"] is None  # no peer was asked for
    assert ("lightning_overhead" in last) == (task not in ("ppo", "generate"))
