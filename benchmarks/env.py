"""Microseconds per vector step of the token environment, by itself and inside of agents' wrappers.

    python benchmarks/env.py

Every implementation plays the same random tokens (one in `length / 2` is the end token). They take turns in short
rounds, so that a disturbance of the machine meets all of them, and the median round counts. Prints one JSON line per
measurement and a table at the end. `cpu` is the process's CPU time, `wall` the clock's. Implementations whose library
is not installed are left out. Prompts are a quarter of the length; observations are (slots, length).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import token_mdp

VOCAB_SIZE, END = 50_257, 0
SIZES = ((64, 256), (64, 4096), (256, 512))
Step = Callable[[np.ndarray], Any]


def task(length: int) -> dict[str, Any]:
    """Arguments of a task whose observations are `length` wide: prompts of up to a quarter, responses of the rest."""
    rng = np.random.default_rng(0)
    longest = length // 4
    lengths = [longest, *rng.integers(1, longest + 1, size=127)]
    return {
        "prompts": [rng.integers(1, VOCAB_SIZE, size=n) for n in lengths],
        "vocab_size": VOCAB_SIZE,
        "stop_token_ids": END,
        "max_new_tokens": length - longest,
        "reward_fn": lambda prompts, responses: np.ones(len(responses)),
    }


def native(slots: int, length: int, **arguments: Any) -> Step:
    """`TokenVectorEnv`."""
    env = gymnasium.make_vec("LitRLHF/Token-v0", num_envs=slots, **task(length) | arguments)
    env.reset(seed=0)
    return env.step


def native_without_copies(slots: int, length: int) -> Step:
    """`TokenVectorEnv` whose observations are its own arrays, overwritten by the next step."""
    return native(slots, length, copy=False)


def native_with_masks(slots: int, length: int) -> Step:
    """`TokenVectorEnv` whose infos hold an `action_mask` of ones."""
    return native(slots, length, action_mask=True)


def all_tokens(slots: int) -> Callable[[Any, Any], np.ndarray]:
    """A mask function that costs nothing itself."""
    ready = np.ones((slots, VOCAB_SIZE), dtype=np.bool_)
    return lambda prompts, responses: ready[: len(responses)]


def native_asking_for_masks(slots: int, length: int) -> Step:
    """`TokenVectorEnv` that asks a function which tokens may come next."""
    return native(slots, length, action_mask=all_tokens(slots))


def native_asking_without_copies(slots: int, length: int) -> Step:
    """The same, whose observations and masks are its own arrays."""
    return native(slots, length, action_mask=all_tokens(slots), copy=False)


def sync_vector_env(slots: int, length: int) -> Step:
    """Gymnasium's loop over single envs."""
    arguments = task(length)
    env = SyncVectorEnv(
        [lambda: token_mdp.TokenEnv(**arguments)] * slots, autoreset_mode=AutoresetMode.SAME_STEP, copy=True
    )
    env.reset(seed=0)
    return env.step


def sb3_adapter(slots: int, length: int) -> Step:
    """`SB3VecEnv` around `TokenVectorEnv`."""
    from token_mdp.sb3 import SB3VecEnv

    env = SB3VecEnv(gymnasium.make_vec("LitRLHF/Token-v0", num_envs=slots, **task(length)))
    env.seed(0)
    env.reset()
    return env.step


def torchrl_wrapper(slots: int, length: int) -> Step:
    """TorchRL's `GymWrapper` around `TokenVectorEnv`, which resets finished slots as TorchRL does."""
    import torch
    from torchrl.envs import GymWrapper

    base = gymnasium.make_vec("LitRLHF/Token-v0", num_envs=slots, autoreset_mode="Disabled", **task(length))
    env = GymWrapper(base, categorical_action_encoding=True)
    state = {"td": env.reset()}

    def step(actions: np.ndarray) -> None:
        _, state["td"] = env.step_and_maybe_reset(state["td"].set("action", torch.from_numpy(actions)))

    return step


# implementation → what makes it, the package it needs
IMPLEMENTATIONS: dict[str, tuple[Callable[[int, int], Step], str]] = {
    "native": (native, "gymnasium"),
    "native, copy=False": (native_without_copies, "gymnasium"),
    "native, action_mask=True": (native_with_masks, "gymnasium"),
    "native, action_mask=function": (native_asking_for_masks, "gymnasium"),
    "native, action_mask=function, copy=False": (native_asking_without_copies, "gymnasium"),
    "SyncVectorEnv": (sync_vector_env, "gymnasium"),
    "SB3 adapter": (sb3_adapter, "stable_baselines3"),
    "TorchRL": (torchrl_wrapper, "torchrl"),
}


def measure(
    slots: int, length: int, names: list[str], rounds: int, steps: int, end_rate: float | None = None
) -> dict[str, tuple[float, float]]:
    """Median microseconds per step by implementation: (CPU, wall); a share `end_rate` of tokens ends, or 2 / length."""
    players = {name: IMPLEMENTATIONS[name][0](slots, length) for name in names}
    rngs = {name: np.random.default_rng(1) for name in names}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name, step in players.items():
            rng = rngs[name]
            actions = rng.integers(1, VOCAB_SIZE, size=(steps, slots))
            actions[rng.random(actions.shape) < (2 / length if end_rate is None else end_rate)] = END
            cpu, wall = time.process_time(), time.perf_counter()
            for row in actions:
                step(row)
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: tuple(1e6 * statistics.median(column[1:]) / steps for column in zip(*taken, strict=True))  # type: ignore[misc]
        for name, taken in seconds.items()  # the first round warms up
    }


def main() -> None:
    """Measure, print JSON lines, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=100, help="vector steps per round")
    options = parser.parse_args()
    names = [name for name, (_, package) in IMPLEMENTATIONS.items() if importlib.util.find_spec(package)]
    table: dict[str, list[str]] = {name: [] for name in names}
    for slots, length in SIZES:
        for name, (cpu, wall) in measure(slots, length, names, options.rounds, options.steps).items():
            table[name].append(f"{cpu:,.0f}")
            line = {"benchmark": "env", "implementation": name, "slots": slots, "length": length}
            line |= {"cpu_us_per_step": round(cpu, 1), "wall_us_per_step": round(wall, 1)}
            line |= {package: version(package) for package in ("gymnasium", IMPLEMENTATIONS[name][1])}
            print(json.dumps(line), flush=True)
    print("\n| CPU µs per vector step |", *(f"{slots} × {length} |" for slots, length in SIZES))
    print("|---|" + "--:|" * len(SIZES))
    for name, cells in table.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
