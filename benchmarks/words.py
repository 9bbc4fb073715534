"""A token MDP of words whose reference is a tiny Llama: the modules through the Trainer against the closed form.

Here the policy is a neural network, played in slots, trained in packed batches by `Trainer.fit`, and read back by the
oracle with plain forward passes. A sentence has up to three words of three and ends there or by the end token before:
words earn, one of them most of all after another, and what is no such sentence earns nothing. TRL may play, too.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import workload
from benchmarks.rounds import Contestant
from benchmarks.workload import BOS, EOS, FIRST_WORD, PAD
from lit_rlhf import DPO, PPO, FixedKL, PreferenceDataModule, RewardModel, RolloutDataModule
from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.data.examples import PreferenceDataset
from lit_rlhf.data.token_cache import FEATURES
from lit_rlhf.oracle import Evaluation, Problem, TokenTree, causal_lm
from lit_rlhf.rollout.rewards import Reward

SHAPE = workload.Shape(hidden=32, layers=2, heads=4, kv_heads=4, intermediate=64, vocabulary=6, tied=False, context=16)
# Two tokens: with rotary positions, a Llama that has seen one token again and again cannot tell how often.
PROMPT = [BOS, FIRST_WORD]
PROMPTS = "prompts.jsonl"
ITERATIONS, EPISODES, EPOCHS = 160, 256, 10  # of PPO, of each of its iterations, and of DPO over all pairs
PPO_RATE, DPO_RATE = 2e-3, 3e-3  # the same for both libraries, as all that follows
SEEDS = (0, 1, 2)  # of what is played, and of the order of pairs


def word_tree() -> TokenTree:
    """Sentences of up to three tokens."""
    return TokenTree(SHAPE.vocabulary, [EOS], max_new_tokens=3)


def make_reference(folder: Path, seed: int = 0, steps: int = 200) -> None:
    """Leave the reference with its tokenizer and the prompt in `folder`, for policies to start from.

    It is fitted to random probabilities of the next word by exact cross-entropy, as SFT would on endless data, so that
    it hardly ever writes a special token where it should not.
    """
    tree, prompt = word_tree(), torch.tensor(PROMPT)
    draw = torch.Generator().manual_seed(seed)
    table = []
    for level in range(tree.max_new_tokens):
        logits = 0.5 * torch.randn(tree.num_prefixes(level), SHAPE.vocabulary, generator=draw, dtype=torch.float64)
        logits[:, [PAD, BOS]] = -torch.inf
        table.append(logits.log_softmax(-1))
    target = tree.completion_logprobs(table).exp()

    model = workload.make_model(SHAPE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        logprobs = tree.completion_logprobs(tree.tabulate(causal_lm(model, requires_grad=True), prompt))
        optimizer.zero_grad()
        (-(target * logprobs).sum()).backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    workload.make_tokenizer(SHAPE).save_pretrained(folder)
    (folder / PROMPTS).write_text(json.dumps({"prompt": workload.as_text(PROMPT)}) + "\n")


def word_problem(folder: Path) -> Problem:
    """The problem whose reference is in `folder`."""
    tree, model = word_tree(), AutoModelForCausalLM.from_pretrained(folder)
    values = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.3, 0.0], dtype=torch.float64)[tree.completions].sum(1)
    follows = (tree.completions[:, :-1] == FIRST_WORD) & (tree.completions[:, 1:] == FIRST_WORD + 1)
    rewards = torch.where(is_sentence(tree), values + 0.4 * follows.sum(1), 0.0)
    return Problem("words", tree, [torch.tensor(PROMPT)], causal_lm(model), lambda *_: rewards)


def is_sentence(tree: TokenTree) -> Tensor:
    """(C,) bool, True = words and perhaps the end token, no other special one."""
    return (tree.completions >= EOS).sum(1) == tree.lengths


class TreeReward(Reward):
    """The rewards of a problem for token ids."""

    def __init__(self, problem: Problem) -> None:
        self.tree = problem.tree
        self.rewards = problem.reward_fn(problem.prompts[0], problem.tree.completions, problem.tree.lengths).tolist()

    def __call__(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], **columns: Any) -> np.ndarray:
        """(n,) rewards."""
        return np.array([self.rewards[self.tree.index(response)] for response in responses])


def learn_ppo_module(
    problem: Problem,
    folder: Path,
    beta: float,
    iterations: int = ITERATIONS,
    learning_rate: float = PPO_RATE,
    rollout_size: int = EPISODES,
    seed: int = 0,
) -> PPO:
    """`lit_rlhf.PPO` from the reference in `folder`, plain: β from the first step to the last."""
    torch.manual_seed(seed)
    module = PPO(
        str(folder),
        kl=FixedKL(beta),
        learning_rate=learning_rate,
        lr_scheduler="linear",
        value_coef=1.0,
        gae_lambda=1.0,
        ppo_epochs=2,
        num_minibatches=2,
        seed=seed,
    )
    data = RolloutDataModule(
        TreeReward(problem),
        train=str(folder / PROMPTS),
        validation=None,
        tokenizer=module.tokenizer,
        rollout_size=rollout_size,
        num_slots=rollout_size,
        max_new_tokens=problem.tree.max_new_tokens,
    )
    fit(module, data, iterations)
    return module


class IdPairs(PreferenceDataModule):
    """Pairs that are token ids already: text cannot say that a response was cut before its end token."""

    def __init__(self, pairs: list[workload.Pair], **options: Any) -> None:
        super().__init__(validation=None, max_tokens=None, **options)
        self.pairs = pairs

    def setup(self, stage: str) -> None:
        """Make the table that tokenisation would make."""
        columns: dict[str, Any] = {f"{key}_ids": [pair[key] for pair in self.pairs] for key in self.pairs[0]}
        for side in ("chosen", "rejected"):
            columns[f"{side}_mask"] = [[True] * len(pair[side]) for pair in self.pairs]
        columns |= {"margin": [0.0] * len(self.pairs), "status": [0] * len(self.pairs)}
        columns |= {"control_tokens": [[]] * len(self.pairs), "repeats_prompt": [False] * len(self.pairs)}
        table = datasets.Dataset.from_dict(columns, FEATURES["preference"])
        self.datasets["train"] = PreferenceDataset(table, np.arange(len(table)), [])


def learn_dpo_module(
    folder: Path,
    pairs: list[workload.Pair],
    beta: float,
    epochs: int = EPOCHS,
    learning_rate: float = DPO_RATE,
    batch_size: int = 256,
    seed: int = 0,
) -> DPO:
    """`lit_rlhf.DPO` from the reference in `folder`; `seed` is that of the order of the pairs."""
    module = DPO(str(folder), beta=beta, learning_rate=learning_rate, lr_scheduler="linear", cache_reference=True)
    fit(module, IdPairs(pairs, batch_size=batch_size, tokenizer=module.tokenizer, seed=seed), epochs)
    return module


def learn_reward_module(
    folder: Path, pairs: list[workload.Pair], epochs: int = 3, learning_rate: float = 1e-2, batch_size: int = 256
) -> RewardModel:
    """`lit_rlhf.RewardModel` from the reference in `folder`."""
    torch.manual_seed(0)  # of the head
    options: Any = {"lr_scheduler": "linear", "adam_betas": (0.9, 0.999)}  # steadier at so high a rate
    module = RewardModel(str(folder), learning_rate=learning_rate, **options)
    fit(module, IdPairs(pairs, batch_size=batch_size, tokenizer=module.tokenizer), epochs)
    return module


def all_pairs(problem: Problem, compared: Tensor, copies: int = 20) -> list[workload.Pair]:
    """Each two of the compared completions `copies` times, and each of them once with each of the others.

    They win as often as Bradley-Terry says; what is left in rounding a pair is handed to the completion's next one, so
    that the labels of each hardly err. Without the others, nothing would say what becomes of their mass.

    Args:
        problem: what they are completions of.
        compared: (C,) bool, such as `is_sentence`.
        copies: of each pair; the more, the less the rounding counts.
    """
    tree, rng = problem.tree, np.random.default_rng(0)
    rewards = problem.reward_fn(problem.prompts[0], tree.completions, tree.lengths)
    tokens = [row[:length].tolist() for row, length in zip(tree.completions, tree.lengths, strict=True)]
    rows, others = compared.nonzero().flatten().tolist(), (~compared).nonzero().flatten().tolist()
    pairs = []
    for number, first in enumerate(rows):
        left = rng.random()
        for second, count in [(row, copies) for row in rows[number + 1 :]] + [(row, 1) for row in others]:
            left += count * (rewards[first] - rewards[second]).sigmoid().item()
            wins = int(left)
            left -= wins
            for chosen, rejected in [(first, second)] * wins + [(second, first)] * (count - wins):
                pairs.append({"prompt": PROMPT, "chosen": tokens[chosen], "rejected": tokens[rejected]})
    return pairs


def fit(module: AlignmentModule, data: LightningDataModule, epochs: int) -> None:
    """Train with nothing but the loop, and gradients clipped as in our configurations and by TRL."""
    Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)


def learn_trl(
    task: str, problem: Problem, folder: Path, pairs: list[workload.Pair], beta: float, seed: int, python: str
) -> tuple[Any, float]:
    """The model that TRL's trainer makes of the reference in `folder`, and its CPU seconds, import included."""
    tree = problem.tree
    rewards = problem.reward_fn(problem.prompts[0], tree.completions, tree.lengths).tolist()
    texts = [" ".join(map(str, row[:n])) for row, n in zip(tree.completions.tolist(), tree.lengths, strict=True)]
    known = {"prompt": PROMPT, "max_new_tokens": tree.max_new_tokens, "pairs": pairs}
    known |= {"rewards": dict(zip(texts, rewards, strict=True))}
    with tempfile.TemporaryDirectory() as output:
        words = Path(output) / "words.json"
        words.write_text(json.dumps(known))
        command = [python, "-m", "benchmarks.words_trl", f"--task={task}", f"--folder={folder}", f"--words={words}"]
        rate, passes = (PPO_RATE, ITERATIONS) if task == "ppo" else (DPO_RATE, EPOCHS)
        command += [f"--output={output}", f"--beta={beta}", f"--learning_rate={rate}", f"--passes={passes}"]
        command += [f"--seed={seed}"]
        peer = Contestant(f"trl_{task}", command, threads=1)
        seconds = peer.play()["seconds"]
        peer.close()
        return AutoModelForCausalLM.from_pretrained(output), seconds


def measure_words(folder: Path, algorithm: str, beta: float, python: str | None) -> dict[str, Any]:
    """The line of an algorithm: the seed in the middle by KL, and the range of all.

    Args:
        folder: with the reference.
        algorithm: ppo_module, dpo_module, trl_ppo or trl_dpo.
        beta: weight of the KL.
        python: one that has TRL, if it is TRL's.
    """
    problem = word_problem(folder)
    pairs = all_pairs(problem, is_sentence(problem.tree)) if "dpo" in algorithm else []
    oracle, runs, seconds = problem.oracle(beta), [], 0.0
    for seed in SEEDS:
        model: Any
        start = time.process_time()
        if python is not None:
            task = algorithm.removeprefix("trl_")
            model, theirs = learn_trl(task, problem, folder, pairs, beta, seed, python)
            seconds += theirs
        else:
            if algorithm == "ppo_module":
                model = learn_ppo_module(problem, folder, beta, seed=seed).policy.model
            else:
                model = learn_dpo_module(folder, pairs, beta, seed=seed).policy.model
            seconds += time.process_time() - start
        runs.append(oracle.evaluate(causal_lm(model)))
    line = {"algorithm": algorithm, "mdp": problem.name, "beta": beta} | middle_of(runs) | {"seconds": seconds}
    return line | ({"pairs": len(pairs), "epochs": EPOCHS} if pairs else {"episodes": ITERATIONS * EPISODES})


def middle_of(runs: list[Evaluation]) -> dict[str, Any]:
    """Gap and KL of the run in the middle by KL, and from where to where those of all go."""
    gaps, kls = sorted(run.gap for run in runs), sorted(run.kl_to_optimum for run in runs)
    middle = next(run for run in runs if run.kl_to_optimum == kls[len(kls) // 2])
    figures = {"gap": middle.gap, "kl_to_optimum": middle.kl_to_optimum, "seeds": len(runs)}
    return figures | {"gap_range": [gaps[0], gaps[-1]], "kl_range": [kls[0], kls[-1]]}
