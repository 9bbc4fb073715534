"""Workers and ranks that die: the others end, with a line, and the run goes on from its newest checkpoint."""

import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.torture.kills import Plan
from tests.torture.process import Ended, Run, apart
from tests.torture.remains import bits, faults, steps
from tests.torture.stages import arguments

TO_MEET = "0:00:30"  # that a rank waits for another, which may have died before they met
WORKERS = {"DataLoader": {"data.num_workers": 2}, "tokenising": {"data.num_proc": 2}}


def kill_a_child(run: Run, after: float, rng: random.Random) -> bool:
    """SIGKILL one of the processes that a run has started, some time after the first of them; False if it had none."""
    me = psutil.Process(run.process)
    with suppress(psutil.NoSuchProcess):
        while me.status() != psutil.STATUS_ZOMBIE:
            children = me.children()
            if children:
                time.sleep(after)
                children = me.children() or children
                rng.choice(children).kill()
                return True
            time.sleep(0.002)
    return False


def told_in_lines(ended: Ended) -> list[str]:
    """Whether a failed run ended with a line, not with the insides of a library."""
    said = "error: " in ended.told and "Traceback" not in ended.told
    return [] if said else [f"untold: status {ended.status}: {ended.told[-2500:]}"]


def worker_trial(plan: Plan, kind: str, folder: Path, rng: random.Random) -> list[str]:
    """Kill a worker; what is wrong, or "died: " where the run noticed."""
    folder.mkdir(parents=True)
    more = WORKERS[kind]
    run = Run(folder, arguments(plan.stage, plan.inputs, **more))
    kill_a_child(run, rng.uniform(0, 0.5 if kind == "DataLoader" else 0.05), rng)
    ended = run.wait()
    if ended.hung:
        return [f"hung: {ended.told[-1500:]}"]
    wrong = [f"corrupt: {fault}" for fault in apart(faults, folder)]
    if ended.status != 0:
        wrong += told_in_lines(ended)
    return wrong + goes_on(plan, folder, ended, more)


def goes_on(plan: Plan, folder: Path, ended: Ended, more: dict[str, Any]) -> list[str]:
    """What is wrong with the run that goes on from one that has ended."""
    died = ended.status != 0
    if died:
        how = ["--ckpt_path=last"] if apart(steps, folder) else []
        ended = Run(folder, [*arguments(plan.stage, plan.inputs, **more), *how]).wait()
        if ended.hung or ended.status != 0:
            return [f"lost: status {ended.status}: {ended.told[-1500:]}"]
    wrong = [f"other bits: {name}" for name, value in apart(bits, folder).items() if plan.whole.get(name) != value]
    return wrong or (["died: "] if died else [])


def ranks(plan: Plan, folder: Path, how: list[str]) -> list[Run]:
    """Two ranks, each started from here, as a scheduler would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    options = {"trainer.devices": 2, "trainer.strategy": "DDPStrategy", "trainer.strategy.timeout": TO_MEET}
    command = [*arguments(plan.stage, plan.inputs, **options), *how]
    return [Run(folder, command, environment=shared | {"LOCAL_RANK": str(rank)}) for rank in (0, 1)]


def ranks_undisturbed(plan: Plan, folder: Path) -> Plan:
    """The plan of the same run on two ranks."""
    folder.mkdir(parents=True)
    both = [run.wait() for run in ranks(plan, folder, [])]
    assert [ended.status for ended in both] == [0, 0], both
    return plan._replace(whole=apart(bits, folder), seconds=max(ended.seconds for ended in both))


def rank_trial(plan: Plan, folder: Path, rng: random.Random) -> list[str]:
    """Kill one of two ranks at random; what is wrong, or "died: "."""
    folder.mkdir(parents=True)
    both = ranks(plan, folder, [])
    dies = rng.randrange(2)
    both[dies].kill_after(rng.uniform(0, plan.seconds))
    ended = [run.wait() for run in both]
    if any(end.hung for end in ended):
        return [f"hung: {[end.told[-1500:] for end in ended]}"]
    wrong = [f"corrupt: {fault}" for fault in apart(faults, folder)]
    other = ended[1 - dies]
    if ended[dies].status == -signal.SIGKILL and other.status != 0:
        wrong += told_in_lines(other)
    if all(end.status == 0 for end in ended):
        return wrong
    again = [run.wait() for run in ranks(plan, folder, ["--ckpt_path=last"] if apart(steps, folder) else [])]
    if any(end.status != 0 for end in again):
        return [*wrong, f"lost: {[end.told[-1500:] for end in again]}"]
    wrong += [f"other bits: {name}" for name, value in apart(bits, folder).items() if plan.whole.get(name) != value]
    return wrong or ["died: "]


def trials(plan: Plan, kind: str, number: int, folder: Path, rng: random.Random) -> Iterator[list[str]]:
    """One trial after another."""
    if kind == "ranks":
        plan = ranks_undisturbed(plan, folder / "whole")
    for i in range(number):
        here = folder / str(i)
        yield rank_trial(plan, here, rng) if kind == "ranks" else worker_trial(plan, kind, here, rng)
        shutil.rmtree(here)
