"""What makes the native env fast, counted rather than timed; `python benchmarks/env.py` has the figures."""

import importlib.util
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "env.py"


@pytest.fixture(scope="module")
def benchmark():
    return load_script(SCRIPT)


def calls_of_a_step(step, slots):
    """Python functions that a step enters."""
    actions, calls = np.ones(slots, dtype=np.int64), 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    step(actions)
    sys.setprofile(count)
    step(actions)
    sys.setprofile(None)
    return calls


def test_a_step_of_the_native_vector_env_makes_as_many_calls_whatever_the_number_of_slots(benchmark):
    native, loop = (
        [calls_of_a_step(make(slots, 256), slots) for slots in (4, 64)]
        for make in (benchmark.native, benchmark.sync_vector_env)
    )
    assert native[0] == native[1]
    assert loop[1] > 5 * loop[0]  # a loop over single envs


def memory_of_a_step(step, slots):
    """Most bytes that a step allocates."""
    actions = np.ones(slots, dtype=np.int64)
    step(actions)
    tracemalloc.start()
    step(actions)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_without_copies_a_step_allocates_the_same_whatever_the_length(benchmark):
    without, native = (
        [memory_of_a_step(make(64, length), 64) for length in (256, 8192)]
        for make in (benchmark.native_without_copies, benchmark.native)
    )
    assert without[1] < 1.1 * without[0]
    assert native[1] > 20 * native[0]  # the copies do show


def test_every_implementation_runs_and_is_named_in_the_output(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SIZES", ((2, 8),))
    monkeypatch.setattr("sys.argv", ["env.py", "--rounds", "1", "--steps", "2"])
    benchmark.main()
    shown = capsys.readouterr().out
    installed = [name for name, (_, package) in benchmark.IMPLEMENTATIONS.items() if importlib.util.find_spec(package)]
    assert len(installed) >= 3
    for name in installed:
        assert f'"implementation": "{name}"' in shown and f"| {name} | " in shown
