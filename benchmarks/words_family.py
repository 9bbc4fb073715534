"""Methods on policy without a critic as a user has them, on the MDP "words" of benchmarks/words.py."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.words import EPISODES, ITERATIONS, PPO_RATE, PROMPTS, TreeReward, fit
from lit_rlhf import FixedKL, KLPenalty, RolloutDataModule
from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.oracle import Problem


def learn_family_module(
    kind: Any,
    problem: Problem,
    folder: Path,
    beta: float,
    iterations: int = ITERATIONS,
    rollout_size: int = EPISODES,
    group_size: int = 8,
    seed: int = 0,
    **options: Any,
) -> OnPolicyModule:
    """A module of `kind` from the reference in `folder`, the KL in the reward, β from the first step to the last."""
    torch.manual_seed(seed)
    module: OnPolicyModule = kind(
        str(folder),
        kl=FixedKL(beta),
        kl_penalty=KLPenalty(),
        learning_rate=PPO_RATE,
        lr_scheduler="linear",
        seed=seed,
        **options,
    )
    data = RolloutDataModule(
        TreeReward(problem),
        train=str(folder / PROMPTS),
        validation=None,
        tokenizer=module.tokenizer,
        rollout_size=rollout_size,
        group_size=group_size,
        num_slots=rollout_size,
        max_new_tokens=problem.tree.max_new_tokens,
    )
    fit(module, data, iterations)
    return module
