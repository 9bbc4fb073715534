"""`python -m tests.torture [what ...]`: count, and write the counts into docs/reliability.md."""

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"  # no threads, so that forking is safe
os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # jemalloc has one

import random
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import transformers.models.llama.modeling_llama  # noqa: F401  # what every run would import

from tests.stages import write_inputs
from tests.torture import disks, endurance, kills, workers
from tests.torture.kills import Plan, undisturbed
from tests.torture.page import cells, fill
from tests.torture.process import apart
from tests.torture.stages import PREDICT, STAGES

WHAT = ("kills", "disks", "workers", "endurance")


def main() -> int:
    """Returns the number of trials that went wrong, at most 100."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", choices=[*WHAT, []], help="of all, which")
    parser.add_argument("--stages", nargs="+", default=[*STAGES, PREDICT], choices=[*STAGES, PREDICT])
    parser.add_argument("--kills", type=int, default=60, help="of each stage")
    parser.add_argument("--iterations", type=int, default=2000, help="of PPO")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--dry", action="store_true", help="count, and leave the page as it is")
    given = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        return min(100, torture(given, base / "runs", random.Random(given.seed)))
    finally:
        shutil.rmtree(base, ignore_errors=True)


def torture(given: argparse.Namespace, base: Path, rng: random.Random) -> int:
    """Do what is asked for; returns the number of trials that went wrong."""
    inputs, what, wrong = base / "inputs", given.what or WHAT, 0
    inputs.mkdir(parents=True)
    apart(write_inputs, inputs)
    for stage in given.stages if set(what) - {"endurance"} else ():
        if stage == PREDICT:
            exported(undisturbed("SFT", inputs, base / "whole" / "exported"), inputs, base / "whole" / "exported")
        plan = undisturbed(stage, inputs, base / "whole" / stage)
        if stage != PREDICT:
            exported(plan, inputs, base / "whole" / stage)
        rows = [row for kind in what if kind in PARTS for row in PARTS[kind](plan, given.kills, base / kind, rng)]
        wrong += report("counts", rows, given.dry)
    if "endurance" in what:
        wrong += report("counts", endured(given.iterations, inputs, base / "endurance", given.dry), given.dry)
    return wrong


def exported(plan: Plan, inputs: Path, folder: Path) -> None:
    """Keep what a stage has exported, for runs to replace."""
    target = inputs / f"exported-{plan.stage}"
    if not target.exists():
        shutil.copytree(folder / "a" / "run" / "model", target)


Row = tuple[str, int, list[list[str]]]  # what was done, how often, and what was wrong with each trial


def killed(plan: Plan, number: int, base: Path, rng: random.Random) -> Iterable[Row]:
    """SIGKILLs and the signals that ask."""
    groups = (
        (f"{plan.stage}: SIGKILL", list(kills.deaths(plan, number, rng))),
        (f"{plan.stage}: SIGTERM, SIGINT", list(kills.stopped(plan, number // 5, rng))),
    )
    for name, deaths in groups:
        trials = []
        for i, death in enumerate(deaths):
            again = rng.uniform(0, plan.seconds) if i % 4 == 0 and plan.stage != PREDICT else None
            folder = base / f"{plan.stage}{i}"
            trials.append(kills.trial(plan, death, folder, two_steps=i % 2 == 0, again=again))
            say(f"{name} {death.how}", trials[-1])
            shutil.rmtree(folder)
        yield name, sum(wrong.count("met: ") for wrong in trials), trials


def filled(plan: Plan, number: int, base: Path, rng: random.Random) -> Iterable[Row]:
    """Disks that fill up."""
    if not disks.can_mount(base):
        print("no disk can be made to fill up: mounting one takes root")
        return
    trials = []
    for wrong in disks.trials(plan, number // 4, base, rng):
        trials.append(wrong)
        say(f"{plan.stage}: full disk", wrong)
    yield f"{plan.stage}: full disk", sum("filled: " in wrong or bool(wrong) for wrong in trials), trials


def worked(plan: Plan, number: int, base: Path, rng: random.Random) -> Iterable[Row]:
    """Workers and ranks that die; of the stages that have them alike, those that differ."""
    kinds = {"SFT": ("DataLoader", "tokenising", "ranks"), "PPO": ("tokenising", "ranks"), "DPO": ("ranks",)}
    for kind in kinds.get(plan.stage, ()):
        trials, name = [], f"{plan.stage}: {kind} killed"
        for wrong in workers.trials(plan, kind, number // 6, base / f"{plan.stage}-{kind}", rng):
            trials.append(wrong)
            say(name, wrong)
        yield name, len(trials), trials


PARTS = {"kills": killed, "disks": filled, "workers": worked}


def endured(iterations: int, inputs: Path, base: Path, dry: bool) -> Iterable[Row]:
    """Long runs."""
    wrong, growth = endurance.long_run(iterations, inputs, base / "long")
    say(f"{iterations} iterations {growth}", wrong)
    if not dry and growth:
        fill("growth", [[name, f"{ratio:.3f}"] for name, ratio in growth.items()])
    yield "PPO: a long run", 1, [wrong]
    wrong, failures = endurance.failing_rewards(iterations // 2, inputs, base / "failing")
    say(f"rewards that fail: {failures}", wrong)
    yield "PPO: rewards that fail", failures, [wrong]


def say(name: str, wrong: list[str]) -> None:
    """A line for each trial, as it ends."""
    print(f"{name}: {'; '.join(fault for fault in wrong if not fault.endswith(': ')) or 'right'}", flush=True)


def report(table: str, rows: Iterable[Row], dry: bool) -> int:
    """Write rows into the page; returns the number of trials that went wrong."""
    made = list(rows)
    if not dry:
        fill(table, [cells(name, number, trials) for name, number, trials in made])
    return sum(any(not fault.endswith(": ") for fault in wrong) for _, _, trials in made for wrong in trials)


if __name__ == "__main__":
    sys.exit(main())
