"""Disks that fill up: the file is named, nothing half remains, and the run goes on once there is room."""

import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.torture.kills import Plan
from tests.torture.process import Run, apart
from tests.torture.remains import bits, faults, leftovers
from tests.torture.stages import arguments

ROOM = 1 << 26  # bytes that are enough for any run in here
NAMED = re.compile(r"^error: .*\b(run|cache)\b.*$", re.MULTILINE)


def can_mount(folder: Path) -> bool:
    """Whether this process may make disks, as root may."""
    try:
        with disk(folder / "tried", ROOM):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """A disk of some bytes, in memory."""
    folder.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "none", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def mount(*arguments: str) -> None:
    """Call `mount`."""
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def trial(plan: Plan, share: float, folder: Path) -> list[str]:
    """Run a stage on a disk that holds a share of what it writes, then on the same one with room.

    Returns:
        What is wrong, as `kills.trial` does; "filled: " where nothing is, but the disk did fill up.
    """
    with disk(folder, max(4096, int(share * sum(plan.sizes)))):
        ended = Run(folder, arguments(plan.stage, plan.inputs)).wait()
        if ended.hung:
            return [f"hung: {ended.told[-1500:]}"]
        wrong = [f"corrupt: {fault}" for fault in apart(faults, folder)]
        full = ended.status != 0
        if full:
            wrong += [f"left: {path}" for path in leftovers(folder)]
            if ended.status != 2 or not NAMED.search(ended.told) or "Traceback" in ended.told:
                wrong.append(f"untold: status {ended.status}: {ended.told[-2500:]}")
            mount("-o", f"remount,size={ROOM}", str(folder))
            more = ["--ckpt_path=last"] if any(folder.glob("run/**/*.ckpt")) else []
            ended = Run(folder, [*arguments(plan.stage, plan.inputs), *more]).wait()
            if ended.hung or ended.status != 0:
                return [*wrong, f"lost: with room, status {ended.status}: {ended.told[-1500:]}"]
        wrong += [f"other bits: {name}" for name, value in apart(bits, folder).items() if plan.whole.get(name) != value]
        wrong += [f"left: {path}" for path in leftovers(folder)]
    return wrong or (["filled: "] if full else [])


def trials(plan: Plan, number: int, folder: Path, rng: random.Random) -> Iterator[list[str]]:
    """One trial after another, each at a size of its own."""
    for i in range(number):
        yield trial(plan, (i + rng.random()) / number, folder / f"{plan.stage}{i}")
        shutil.rmtree(folder / f"{plan.stage}{i}", ignore_errors=True)
