"""What process rewards are worth to PPO: outcome against process reward at equal samples, on sums with checkable steps.

    python -m benchmarks.process_rewards [--output docs/data/process_rewards.jsonl] [--seeds 3]

A tiny Llama learns to write sums (`lit_rlhf.demo.sums`) from solutions with mistakes in a fifth of their steps; a
process reward model of its size learns from 2,500 labelled ones. Then PPO from that policy, with each of `REWARDS`. A
response is right where each of its steps is the one that is due and the last sum is there.

One JSON line per reward and seed: `right` is the share of right responses to held-out sums before and after, `curve`
that of each rollout on the way.
"""

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_rlhf import (
    PPO,
    SFT,
    FixedKL,
    ProcessRewardModel,
    ProcessRewardModelReward,
    RolloutDataModule,
    SFTDataModule,
    StepwiseDataModule,
)
from lit_rlhf.callbacks import HuggingFaceExport
from lit_rlhf.cli.parser import command
from lit_rlhf.demo import right_steps, sum_reward
from lit_rlhf.demo.sums import problems, solution
from lit_rlhf.errors import require
from lit_rlhf.files import make_room, write_lines

SEPARATOR = " ;"
MISTAKES = 0.2  # of the steps that a policy learns from
ROWS, HELD_OUT = 2500, 256


def as_lines(response: str) -> str:
    """A response as `lit_rlhf.demo.sums` reads it, a line for each step."""
    return response.replace(SEPARATOR, "\n").strip()


def outcome(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """1 for the right last sum, however it came about."""
    return sum_reward(prompts, [as_lines(response) for response in responses])


def right(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """1 for a response of all the steps that are due."""
    judged = [right_steps(prompt, as_lines(response)) for prompt, response in zip(prompts, responses, strict=True)]
    wanted = [len(prompt.split()) - 2 for prompt in prompts]
    return [float(all(steps) and len(steps) == count) for steps, count in zip(judged, wanted, strict=True)]


REWARDS: dict[str, Callable[[str], dict[str, Any]]] = {  # by the folder of the process reward model
    "outcome": lambda folder: {"outcome": outcome},
    "outcome, shaped by steps": lambda folder: {
        "outcome": outcome,
        "steps": ProcessRewardModelReward(folder, aggregate="last", pay="shaping"),
    },
    "outcome and min of steps": lambda folder: {
        "outcome": outcome,
        "steps": ProcessRewardModelReward(folder, aggregate="min", pay="steps"),
    },
    "product of steps alone": lambda folder: {
        "steps": ProcessRewardModelReward(folder, aggregate="product", pay="steps")
    },
}


def save_model(folder: Path) -> None:
    """A random Llama, and a tokenizer of a token per word."""
    words = ["<pad>", "<s>", "</s>", ":", ";", "+", "=", *map(str, range(30))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.model_max_length = 64
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_rows(folder: Path) -> None:
    """Demonstrations, labelled solutions and held-out sums."""
    rng, train, held_out = random.Random(0), problems("train"), problems("validation")
    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "stepwise": [], "prompts": [], "held_out": []}
    for name, numbers in [*(("train", n) for n in islice(train, ROWS)), *(("", n) for n in islice(held_out, HELD_OUT))]:
        prompt = f"{' '.join(map(str, numbers))} :"
        if not name:
            rows["held_out"].append({"prompt": prompt})
            continue
        steps, _ = solution(numbers, rng, MISTAKES)
        rows["sft"].append({"prompt": prompt, "completion": "".join(f" {step}{SEPARATOR}" for step in steps)})
        steps, labels = solution(numbers, rng, MISTAKES)
        rows["stepwise"].append({"prompt": prompt, "completions": [f" {s}" for s in steps], "labels": labels})
        rows["prompts"].append({"prompt": prompt})
    for file, content in rows.items():
        write_lines([json.dumps(row) for row in content], folder / f"{file}.jsonl")


def make_trainer(folder: Path, epochs: int, *callbacks: Callback) -> Trainer:
    """A quiet Trainer on the CPU."""
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        gradient_clip_val=1.0,
        limit_val_batches=0 if epochs > 0 else None,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def prepare(folder: Path, epochs: int) -> dict[str, float]:
    """Leave policy and process reward model in `folder`, trained for some epochs; how well steps are judged."""
    seed_everything(0, verbose=False)
    save_model(folder / "start")
    write_rows(folder)
    how: dict[str, Any] = {"learning_rate": 3e-3, "warmup_steps": 0.05}
    sft = SFT(str(folder / "start"), **how)
    data = SFTDataModule(str(folder / "sft.jsonl"), None, max_tokens=512, tokenizer=sft.tokenizer)
    make_trainer(folder / "sft", epochs, HuggingFaceExport()).fit(sft, data)
    judge = ProcessRewardModel(str(folder / "sft" / "model"), **how)
    stepwise = str(folder / "stepwise.jsonl")
    options: dict[str, Any] = {"step_separator": SEPARATOR, "max_tokens": 512, "tokenizer": judge.tokenizer}
    steps = StepwiseDataModule(stepwise, stepwise, **options)
    make_trainer(folder / "judge", epochs, HuggingFaceExport()).fit(judge, steps)
    (metrics,) = make_trainer(folder, -1).validate(judge, steps, verbose=False)
    return {name: round(metrics[f"val/{name}"], 3) for name in ("accuracy", "error_f1")}


class Curve(Callback):
    """Keeps the share of right responses of each rollout."""

    def __init__(self) -> None:
        self.right: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Note it."""
        self.right.append(round(pl_module.rollout_metrics["rollout/right"], 4))


def learn(folder: Path, name: str, seed: int, iterations: int, episodes: int) -> dict[str, Any]:
    """PPO with one of the rewards, and what came of it."""
    seed_everything(seed, verbose=False)
    start, curve = time.process_time(), Curve()
    policy = PPO(
        str(folder / "sft" / "model"),
        learning_rate=1e-3,
        lr_scheduler="constant",
        ppo_epochs=2,
        num_minibatches=4,
        kl=FixedKL(0.02),
        seed=seed,
    )
    data = RolloutDataModule(
        rewards=REWARDS[name](str(folder / "judge" / "model")),
        monitors={"right": right},
        train=str(folder / "prompts.jsonl"),
        validation=str(folder / "held_out.jsonl"),
        rollout_size=episodes,
        num_slots=min(64, episodes),
        max_new_tokens=32,
        seed=seed,
        tokenizer=policy.tokenizer,
    )
    judge = make_trainer(folder, -1)
    (before,) = judge.validate(policy, data, verbose=False)
    make_trainer(folder / "ppo", iterations, curve).fit(policy, data)
    (after,) = make_trainer(folder, -1).validate(policy, data, verbose=False)
    shares = {"before": round(before["val/right"], 3), "right": round(after["val/right"], 3)}
    return {**shares, "curve": curve.right, "seconds": round(time.process_time() - start, 1)}


def main(
    output: str | None = None,
    rewards: tuple[str, ...] = tuple(REWARDS),
    seeds: int = 3,
    iterations: int = 15,
    episodes: int = 128,
    epochs: int = 6,
) -> None:
    """Measure and print.

    Args:
        output: file for the JSON lines as well.
        rewards: which of them.
        seeds: runs of each.
        iterations: of PPO.
        episodes: of each iteration.
        epochs: of SFT and of the process reward model.
    """
    require(set(rewards) <= REWARDS.keys(), "rewards", rewards, f"among {list(REWARDS)}")
    require(seeds >= 1, "seeds", seeds, "1 or more")
    if output is not None:
        make_room(Path(output), "output", ".jsonl")
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        judged = prepare(Path(folder), epochs)
        for name in rewards:
            for seed in range(seeds):
                found = learn(Path(folder), name, seed, iterations, episodes)
                row = {"reward": name, "seed": seed, "samples": iterations * episodes, **found, "judge": judged}
                lines.append(json.dumps(row))
                print(lines[-1], flush=True)
    if output is not None:
        write_lines(lines, Path(output))


if __name__ == "__main__":
    command(main)
