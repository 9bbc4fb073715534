"""SIGKILL at random and at the dangerous moments, SIGTERM and SIGINT at random: the run goes on to the same bits."""

import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lit_rlhf.cli.checkpoints import newest_checkpoint
from tests.torture import moments
from tests.torture.process import Ended, Run, apart
from tests.torture.remains import bits, faults, leftovers, steps
from tests.torture.stages import arguments, sizes

ROLLOUT_STEPS = 60  # of the environment, that a run of PPO takes at least
Before = Callable[[Path], None]  # called in the process, with its folder


class Death(NamedTuple):
    """How a run is ended."""

    how: str  # for the table
    before: Before | None = None  # what ends it from within
    after: float = 0.0  # seconds, from without
    signal: int = signal.SIGKILL


class Plan(NamedTuple):
    """A stage undisturbed: what its disturbed runs are held to and how their deaths are chosen."""

    stage: str
    inputs: Path
    whole: dict[str, str]
    seconds: float
    changes: Counter[str]  # by kind
    sizes: list[int]  # of the files that it leaves, in bytes


def undisturbed(stage: str, inputs: Path, folder: Path) -> Plan:
    """Run a stage twice undisturbed: to learn what it does, and that it does it again."""
    results = []
    for name in ("a", "b"):
        whole = fresh(folder / name, inputs, stage)
        notes = folder / "notes"
        notes.unlink(missing_ok=True)
        ended = Run(whole, arguments(stage, inputs), partial(moments.note_changes, whole, notes)).wait()
        assert ended.status == 0, ended.told
        results.append(apart(bits, whole))
    assert results[0] == results[1], "two undisturbed runs differ"
    changes = Counter(notes.read_text().splitlines())
    return Plan(stage, inputs, results[0], ended.seconds, changes, sizes(folder / "a"))


def fresh(folder: Path, inputs: Path, stage: str) -> Path:
    """A folder to run in, where an older export is to be replaced."""
    folder.mkdir(parents=True)
    if (inputs / f"exported-{stage}").exists():
        shutil.copytree(inputs / f"exported-{stage}", folder / "run" / "model")
    return folder


def deaths(plan: Plan, number: int, rng: random.Random) -> Iterator[Death]:
    """A third at random, a third before changes of files, each kind as often as others, a third in a write.

    Half of those at random are in a rollout, where there are any.
    """
    kinds = sorted(plan.changes)
    for i in range(number):
        if i % 3 == 0:
            random_step = rng.randrange(ROLLOUT_STEPS)
            in_rollout = Death("in a rollout", before=lambda folder, step=random_step: moments.die_in_rollout(step))
            at_random = Death("at random", after=rng.uniform(0, plan.seconds))
            yield in_rollout if plan.stage == "PPO" and i % 2 else at_random
        elif i % 3 == 1:
            kind = kinds[i // 3 % len(kinds)]
            number = rng.randrange(plan.changes[kind])
            yield Death(kind, before=partial(moments.die_before_change, kind=kind, number=number))
        else:
            size = rng.randrange(rng.choice(plan.sizes) + 1)
            yield Death("in a write", before=lambda folder, size=size: moments.cut_short(size))


def stopped(plan: Plan, number: int, rng: random.Random) -> Iterator[Death]:
    """Signals that ask, at random."""
    for i in range(number):
        asked = (signal.SIGTERM, signal.SIGINT)[i % 2]
        yield Death(asked.name, after=rng.uniform(0, plan.seconds), signal=asked)


def trial(plan: Plan, death: Death, folder: Path, two_steps: bool, again: float | None = None) -> list[str]:
    """End a run, and the one that goes on from it after `again` seconds, and hold what comes at last to the bits.

    Returns:
        What is wrong, each with the column of the table that it belongs in before a colon; and "met: " for each time
        that a run was still alive to be ended, which is not wrong.
    """
    fresh(folder, plan.inputs, plan.stage)
    wrong: list[str] = []
    done, told = 0, ""
    parts = [death, *([] if again is None else [Death("again", after=again)]), None]
    for part in parts:
        how = resumption(folder, told)
        ended = end(plan, part, folder, how, two_steps)
        told = ended.told
        if part is not None and ended.status in (-part.signal, 128 + part.signal, -signal.SIGXFSZ):
            wrong.append("met: ")
        if ended.hung:
            return [*wrong, f"hung: {told[-500:]}"]
        wrong += [f"corrupt: {fault}" for fault in apart(faults, folder)]
        if apart(steps, folder) < done or not export_is_there(plan, folder):
            wrong.append(f"lost: {done} steps, {apart(steps, folder)} now")
        done = apart(steps, folder)
        if part is None and ended.status != 0:
            return [*wrong, f"lost: {how} ended with {ended.status}: {told[-1500:]}"]
        wrong += untold(part, ended)
    wrong += [f"other bits: {name}" for name, value in apart(bits, folder).items() if plan.whole.get(name) != value]
    return wrong + [f"left: {path}" for path in leftovers(folder)]


def end(plan: Plan, death: Death | None, folder: Path, how: list[str], two_steps: bool) -> Ended:
    """Run until it dies, or to its end."""

    def before() -> None:
        if two_steps:
            moments.rename_in_two_steps()
        if death is not None and death.before is not None:
            death.before(folder)

    run = Run(folder, [*arguments(plan.stage, plan.inputs), *how], before)
    if death is not None and death.before is None:
        run.kill_after(death.after, death.signal)
    return run.wait()


def resumption(folder: Path, told: str) -> list[str]:
    """How to go on: as the run says that was asked to stop, else from its newest checkpoint where there is one."""
    printed = re.search(r"--ckpt_path=\S+", told)
    if printed:
        return [printed[0]]
    return [] if newest_checkpoint(folder / "run") is None else ["--ckpt_path=last"]


def export_is_there(plan: Plan, folder: Path) -> bool:
    """The older export stays until a newer one takes its place; between two renames, a sibling waits for its name."""
    expected = (plan.inputs / f"exported-{plan.stage}").exists()
    return not expected or any((folder / "run").glob("*model*/config.json"))


def untold(death: Death | None, ended: Ended) -> list[str]:
    """What a run that was asked to stop did not say or do."""
    if death is None or death.signal == signal.SIGKILL or ended.status in (0, -death.signal):
        return []
    right = ended.status == 128 + death.signal and "Traceback" not in ended.told
    return [] if right else [f"untold: status {ended.status}: {ended.told[-1500:]}"]
