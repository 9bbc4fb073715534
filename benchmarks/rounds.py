"""Rounds of a benchmark: each contestant is a process that waits, so that contestants can take turns.

Turns spread whatever disturbs the machine over all of them, and each process has its own peak memory.
"""

import contextlib
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def serve(run_round: Callable[[], dict[str, Any]]) -> None:
    """Run a round for each line of stdin and answer with a JSON line; what the round prints goes nowhere."""
    answers = sys.stdout
    for line in sys.stdin:
        sys.stdout = sys.stderr if line.strip() == "verbose" else io.StringIO()
        result = run_round()
        sys.stdout = answers
        print(json.dumps({"peak_memory_mb": peak_memory_mb(), **result}), flush=True)


class Contestant:
    """A process that waits between its rounds, until it is closed; one that is closed starts anew for its next round.

    Args:
        name: in the results.
        command: Python, script and options.
        threads: that it may compute with; with one, rounds are timed in CPU seconds.
    """

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        self.name = name
        self.results: list[dict[str, Any]] = []
        self.command, self.threads = command, threads
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Let it come to where it waits for its first round; a round does that too."""
        if self.process is not None:
            return
        threads = str(self.threads)
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **offline, "OMP_NUM_THREADS": threads, "BENCHMARK_THREADS": threads}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "envs")])
        # A file, not a pipe: nobody reads along, and a full pipe would stop the process.
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, env=environment, text=True
        )

    def play(self, limit: float | None = None) -> dict[str, Any]:
        """One round.

        Args:
            limit: seconds after which the process is killed; None = as long as it takes.

        Raises:
            RuntimeError: the process died or was killed; the message has the end of what it said.
        """
        self.start()
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("\n")
            process.stdin.flush()
        late = threading.Event()
        timer = threading.Timer(limit or 0.0, lambda: (late.set(), process.kill()))
        if limit is not None:
            timer.start()
        answer = process.stdout.readline()
        timer.cancel()
        if not answer:
            said = self.close()
            died = "was killed at its time limit" if late.is_set() else f"died ({process.returncode})"
            raise RuntimeError(f"{self.name} {died}:\n{said[-3000:]}")
        self.results.append(json.loads(answer))
        return self.results[-1]

    def close(self) -> str:
        """Let the process end; returns what it said beside its answers, once."""
        if self.process is None:
            return ""
        self.process.communicate()
        self.process = None
        with self.said:
            self.said.seek(0)
            return self.said.read()


def conditions(**more: Any) -> None:
    """Print what a reader must know to judge the figures, as a JSON line."""
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    versions = {name: version(name) for name in ("torch", "transformers", "lightning")}
    print(json.dumps({"conditions": machine | more | {"python": platform.python_version()} | versions}), flush=True)


def cpu_name() -> str:
    """As Linux names it; elsewhere what Python knows."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table in Markdown; floats with three digits or, from 100 on, without decimals."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(_cell(value) for value in row)} |")
    print(flush=True)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def clock() -> float:
    """Seconds: with one thread of this process's CPU, so that other work does not count; else of wall time."""
    return time.process_time() if os.environ.get("BENCHMARK_THREADS", "1") == "1" else time.perf_counter()


def peak_memory_mb() -> float:
    """Most resident memory of this process so far."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
