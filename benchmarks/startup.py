"""How long a user waits: for a version, for help, for the package, and for the first step of a run.

    python -m benchmarks.startup

Prints a JSON line per case: `case`, `seconds` (the median of `--runs` processes, one after the other, the first of all
left out, since it reads files from the disk), `least` and `most`. The run is SFT of the demo with its defaults.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

FIRST_STEP = """
import sys, time
from lightning.pytorch.callbacks import Callback
from lit_rlhf.cli import main

class Stop(Callback):
    def on_train_batch_end(self, *args):
        print("first step at", time.time())

main.run(["fit", "--config", "configs/sft.yaml", "--trainer.max_steps=1", "--trainer.limit_val_batches=0",
          "--export.folder=null", f"--trainer.default_root_dir={sys.argv[1]}", "--trainer.callbacks+=__main__.Stop"])
"""
CASES = {
    "version": ["-m", "lit_rlhf", "--version"],
    "help": ["-m", "lit_rlhf", "--help"],
    "options of fit": ["-m", "lit_rlhf", "fit", "--trainer.help"],
    "import lit_rlhf": ["-c", "import lit_rlhf"],
    "from lit_rlhf import PPO": ["-c", "from lit_rlhf import PPO"],
    "fit to the first step": ["-c", FIRST_STEP],
}


def seconds(case: str, folder: str) -> float:
    """Of one process, from its start to its end, or to what it prints of a step."""
    start = time.time()
    command = [sys.executable, *CASES[case], *([folder] if case == "fit to the first step" else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr[-2000:]}")
    ended = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("first step at")]
    return (ended or [time.time()])[0] - start


def main(argv: list[str] | None = None) -> None:
    """Measure each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for case in given.cases:
            taken = [seconds(case, folder) for _ in range(given.runs + 1)][1:]
            line = {"case": case, "seconds": statistics.median(taken), "least": min(taken), "most": max(taken)}
            print(
                json.dumps(
                    {name: round(value, 3) if isinstance(value, float) else value for name, value in line.items()}
                )
            )


if __name__ == "__main__":
    main()
