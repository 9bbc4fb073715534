"""Ratios that hold on any machine; `python benchmarks/env.py` has the figures."""

import importlib.util
from pathlib import Path

import pytest

from tests.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "env.py"


@pytest.fixture(scope="module")
def benchmark():
    return load_script(SCRIPT)


def test_the_native_vector_env_is_ten_times_as_fast_as_a_loop_over_single_envs(benchmark):
    cpu = {name: cpu for name, (cpu, _) in benchmark.measure(64, 256, ["native", "SyncVectorEnv"], 7, 20).items()}
    assert cpu["SyncVectorEnv"] > 10 * cpu["native"]


def test_without_copies_a_step_costs_the_same_whatever_the_length(benchmark):
    def cpu(name, length):  # no episode ends: what starts one writes a row, and so does cost by length
        return benchmark.measure(64, length, [name], 15, 12, end_rate=0.0)[name][0]

    name = "native, copy=False"
    short, long = (min(cpu(name, length) for _ in range(3)) for length in (256, 8192))
    assert long < 1.3 * short  # 32 times as long
    assert cpu("native", 8192) > 2 * long  # the copies do show


def test_every_implementation_runs_and_is_named_in_the_output(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SIZES", ((2, 8),))
    monkeypatch.setattr("sys.argv", ["env.py", "--rounds", "1", "--steps", "2"])
    benchmark.main()
    shown = capsys.readouterr().out
    installed = [name for name, (_, package) in benchmark.IMPLEMENTATIONS.items() if importlib.util.find_spec(package)]
    assert len(installed) >= 3
    for name in installed:
        assert f'"implementation": "{name}"' in shown and f"| {name} | " in shown
