"""PPO for long: without growth of memory, files or time; with a reward that fails once in a thousand answers."""

import json
import random
import time
from pathlib import Path
from typing import Any

import psutil
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from tests.stages import share_of_w9
from tests.torture.process import Run, apart
from tests.torture.remains import bits, faults, leftovers, steps
from tests.torture.stages import SAVER, arguments

EVERY = 50  # iterations between two entries of the diary
FAILS = 1 / 1000  # of the answers of a reward
SMALL = {"data.validation": "null", "data.rollout_size": 4, "data.max_new_tokens": 4, "model.num_minibatches": 1}
GROWTH = {"memory": 1.05, "handles": 1.0, "threads": 1.0, "files": 1.0, "seconds": 1.5}  # that is none, last to first


class Diary(Callback):
    """Writes down, once in a while, what the process holds."""

    def __init__(self) -> None:
        self.since = time.process_time()  # of the processor: others may be at work

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A line of JSON."""
        if (trainer.current_epoch + 1) % EVERY == 0:
            process, now = psutil.Process(), time.process_time()
            memory = process.memory_info()
            entry = {
                "memory": memory.rss - memory.shared,  # pages of files come and go as the kernel sees fit
                "handles": process.num_fds(),
                "threads": process.num_threads(),
                "files": sum(1 for _ in Path.cwd().rglob("*")),
                "seconds": (now - self.since) / EVERY,
            }
            with open("diary.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
            self.since = time.process_time()  # of the processor: others may be at work


def fails_at_times(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """A reward on a network that fails once in a thousand answers; of the system's randomness, not the run's."""
    if any(random.SystemRandom().random() < FAILS for _ in responses):
        raise ConnectionError("the scorer did not answer")
    return share_of_w9(prompts, responses, **columns)


def long_run(iterations: int, inputs: Path, folder: Path) -> tuple[list[str], dict[str, float]]:
    """What is wrong with a run of many iterations, and the growth from its first quarter to its last."""
    folder.mkdir(parents=True)
    callbacks = [
        {"class_path": SAVER, "init_args": {"every_n_epochs": EVERY, "save_on_train_epoch_end": True}},
        {"class_path": "tests.torture.endurance.Diary"},
    ]
    options = {"trainer.max_epochs": iterations, "trainer.callbacks": json.dumps(callbacks), **SMALL}
    ended = Run(folder, arguments("PPO", inputs, **options)).wait(seconds=3600)
    if ended.status != 0:
        return [f"hung: {ended.told[-1500:]}" if ended.hung else f"lost: {ended.told[-1500:]}"], {}
    entries = [json.loads(line) for line in (folder / "diary.jsonl").read_text().splitlines()][1:]
    quarter = max(1, len(entries) // 4)
    first, last = entries[:quarter], entries[-quarter:]
    growth = {name: sum(e[name] for e in last) / sum(e[name] for e in first) for name in GROWTH}
    return [f"growth: {name} {ratio:.3f}" for name, ratio in growth.items() if ratio > GROWTH[name]], growth


def failing_rewards(iterations: int, inputs: Path, folder: Path) -> tuple[list[str], int]:
    """What is wrong with runs whose reward fails at times and that go on, and how often it did."""
    every = [{"class_path": SAVER, "init_args": {"every_n_epochs": 5, "save_on_train_epoch_end": True}}]
    options = {"trainer.max_epochs": iterations, "trainer.callbacks": json.dumps(every), **SMALL}
    for name in ("whole", "failing"):
        (folder / name).mkdir(parents=True)
    ended = Run(folder / "whole", arguments("PPO", inputs, **options)).wait(seconds=3600)
    assert ended.status == 0, ended.told
    options["data.reward.function"] = f"{__name__}.{fails_at_times.__name__}"
    here, failures, wrong = folder / "failing", 0, []
    while True:
        how = ["--ckpt_path=last"] if apart(steps, here) else []
        ended = Run(here, [*arguments("PPO", inputs, **options), *how]).wait(seconds=3600)
        wrong += [f"corrupt: {fault}" for fault in apart(faults, here)]
        if ended.hung:
            return [*wrong, f"hung: {ended.told[-1500:]}"], failures
        if ended.status == 0:
            break
        failures += 1
        if ended.status != 2 or "Traceback" in ended.told or fails_at_times.__name__ not in ended.told:
            wrong.append(f"untold: status {ended.status}: {ended.told[-1500:]}")
            break
    undisturbed = apart(bits, folder / "whole")
    wrong += [f"other bits: {name}" for name, value in apart(bits, here).items() if undisturbed.get(name) != value]
    return wrong + [f"left: {path}" for path in leftovers(here)], failures
