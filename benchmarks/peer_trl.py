"""Contestant: Hugging Face TRL on the same workload, run by a Python in which `trl` is installed.

Its defaults are bf16 and gradient checkpointing; tuned for a CPU, it does without checkpointing, in float32 or bf16,
and with rows packed or grouped by length where that is asked for (of SFT alone: it finds no lengths of pairs). TRL 1.12
was the last with a PPO trainer. What its online trainers generate with, `generate` of transformers, is the peer of our
rollouts.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
import warnings
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers import logging as transformers_logging

from benchmarks import workload
from benchmarks.rounds import clock, serve

PACKED_ROW = 1024


class Clock(TrainerCallback):
    """Times the loop alone."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self.start = clock()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds = clock() - self.start


def saved_model(shape: workload.Shape) -> Any:
    """A model from a folder: DPOTrainer loads its reference from where the policy came from."""
    folder = tempfile.mkdtemp()
    workload.make_model(shape).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def forced(lengths: Any, prompt_length: int) -> Any:
    """A logits processor that ends row i with its lengths[i]-th token and not before."""
    due = torch.as_tensor(lengths)

    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, : workload.FIRST_WORD] = float("-inf")
        ended = due.to(scores.device) <= input_ids.shape[1] - prompt_length + 1
        scores[ended] = float("-inf")
        scores[ended, workload.EOS] = 0.0
        return scores

    return process


def make_trainer(task: str, options: argparse.Namespace, pairs: list[workload.Pair], shape: workload.Shape) -> Any:
    """TRL's trainer of a task."""
    import datasets
    import trl

    datasets.disable_progress_bars()
    tokenizer = workload.make_tokenizer(shape)
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": options.batch,
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": options.seed,
    }
    if options.grouped:
        settings |= {"train_sampling_strategy": "group_by_length"}
    if options.tuned and not torch.cuda.is_available():
        settings |= {"bf16": options.bf16, "gradient_checkpointing": False}
    elif options.tuned:
        settings |= {"gradient_checkpointing": False}

    if task == "sft":
        rows = [
            {
                "input_ids": pair["prompt"] + pair["chosen"],
                "labels": [-100] * len(pair["prompt"]) + pair["chosen"],
            }
            for pair in pairs
        ]
        if options.packing:  # a packed row holds about as many tokens as four sequences and a half
            settings |= {"packing": True, "per_device_train_batch_size": max(1, options.batch // 4)}
        arguments = trl.SFTConfig(max_length=PACKED_ROW, **settings)
        kind, model = trl.SFTTrainer, workload.make_model(shape)
    elif task == "reward":
        rows = [
            {"chosen_ids": pair["prompt"] + pair["chosen"], "rejected_ids": pair["prompt"] + pair["rejected"]}
            for pair in pairs
        ]
        arguments = trl.RewardConfig(max_length=PACKED_ROW, **settings)
        kind, model = trl.RewardTrainer, workload.make_model(shape, classifier=True)
    elif task in ("dpo", "dpo_cached"):
        rows = [
            {
                "prompt": workload.as_text(pair["prompt"]),
                "chosen": workload.as_text(pair["chosen"][:-1]),
                "rejected": workload.as_text(pair["rejected"][:-1]),
            }
            for pair in pairs
        ]
        arguments = trl.DPOConfig(max_length=PACKED_ROW, precompute_ref_log_probs=task == "dpo_cached", **settings)
        kind, model = trl.DPOTrainer, saved_model(shape)
    else:
        return make_ppo_trainer(options, pairs, shape, settings)
    data = datasets.Dataset.from_list(rows)
    adapter = {} if options.lora is None else {"peft_config": adapter_config(options.lora)}
    return kind(model, args=arguments, train_dataset=data, processing_class=tokenizer, **adapter)


def adapter_config(rank: int) -> Any:
    """Ours: on every linear layer but the head, its factor 32 / r."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def tensor_mb(options: argparse.Namespace, pairs: list[workload.Pair], shape: workload.Shape) -> float:
    """Peak of the tensors of a training: what its models hold, and each allocation, by torch's profiler."""
    trainer = make_trainer(options.task, options, pairs, shape)
    named = ("model", "policy_model", "value_model", "ref_model", "reward_model")
    models = [getattr(trainer, name, None) for name in named]
    held = {p.data_ptr(): p.nbytes for model in models if model is not None for p in model.parameters()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    now = peak = sum(held.values())
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 1e6


def make_ppo_trainer(
    options: argparse.Namespace, pairs: list[workload.Pair], shape: workload.Shape, settings: dict[str, Any]
) -> Any:
    """TRL's PPO trainer with four models, its responses made as long as ours."""
    import datasets
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    arguments = PPOConfig(
        response_length=options.response or workload.MAX_NEW_TOKENS,
        stop_token="eos",
        gradient_accumulation_steps=max(1, len(pairs) // options.batch),
        num_ppo_epochs=1 if options.memory else 4,
        local_rollout_forward_batch_size=options.batch if options.memory else len(pairs),
        num_sample_generations=0,
        total_episodes=len(pairs),
        missing_eos_penalty=1.0,
        **settings,
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=workload.make_tokenizer(shape),
        model=workload.make_model(shape),
        ref_model=workload.make_model(shape),
        reward_model=workload.make_model(shape, classifier=True),
        value_model=workload.make_model(shape, classifier=True),
        train_dataset=datasets.Dataset.from_list([{"input_ids": pair["prompt"]} for pair in pairs]),
    )
    lengths = iter(workload.response_lengths(len(pairs), options.seed).tolist())
    generate = trainer.policy_model.generate

    def generate_forced(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        due = [next(lengths) for _ in range(len(ids))]
        return generate(*args, logits_processor=[forced(due, ids.shape[1])], **kwargs)

    trainer.policy_model.generate = generate_forced
    return trainer


def generate(options: argparse.Namespace, pairs: list[workload.Pair], model: Any) -> float:
    """Complete all prompts in batches of as many as we have slots; returns seconds."""
    lengths = workload.response_lengths(len(pairs), options.seed)
    if options.fixed is not None:
        lengths[:] = options.fixed
    order = np.argsort(lengths, kind="stable") if options.sorted else np.arange(len(pairs))
    lengths, pairs = lengths[order], [pairs[index] for index in order]
    start = clock()
    for first in range(0, len(pairs), options.slots):
        prompts = [pair["prompt"] for pair in pairs[first : first + options.slots]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[workload.PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
        due = lengths[first : first + options.slots]
        with torch.no_grad():
            model.generate(
                input_ids=ids.to(model.device),
                attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]).to(
                    model.device
                ),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=int(due.max()),
                logits_processor=[forced(due, longest)],
            )
    return clock() - start


def main() -> None:
    """Prepare, then serve rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", required=True, choices=["sft", "reward", "dpo", "dpo_cached", "ppo", "generate"])
    parser.add_argument("--shape", default="small", choices=sorted(workload.SHAPES))
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--fixed", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="tuned, and in bfloat16")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--grouped", action="store_true", help="batches of rows of like length")
    parser.add_argument("--sorted", action="store_true", help="responses of like length together, as if it were known")
    parser.add_argument("--lora", type=int, help="rank of an adapter that learns in place of all weights")
    parser.add_argument("--response", type=int, help="tokens of PPO's responses at most")
    parser.add_argument("--memory", action="store_true", help="print the peak of tensors, in place of rounds")
    options = parser.parse_args()

    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    os.environ["HF_HOME"] = tempfile.mkdtemp()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(int(os.environ.get("BENCHMARK_THREADS", "1")))
    shape = workload.SHAPES[options.shape]
    pairs = workload.make_pairs(options.pairs, shape, options.seed)
    model = workload.make_model(shape).eval() if options.task == "generate" else None
    if model is not None and options.bf16:
        model.bfloat16()
    if options.memory:
        with contextlib.redirect_stdout(io.StringIO()):
            megabytes = tensor_mb(options, pairs, shape)
        print(json.dumps({"tensor_mb": megabytes}), flush=True)
        return

    def train(pairs: list[workload.Pair]) -> dict[str, Any]:
        trainer, timer = make_trainer(options.task, options, pairs, shape), Clock()
        trainer.add_callback(timer)
        trainer.train()
        return {"seconds": timer.seconds}

    if model is not None:
        generate(argparse.Namespace(**{**vars(options), "fixed": 4}), pairs[: options.slots], model)  # as ours
        serve(lambda: {"seconds": generate(options, pairs, model)})
    elif options.task == "ppo":
        serve(lambda: train(pairs))
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            train(pairs[: options.batch])  # one batch first, as ours
        serve(lambda: train(pairs))


if __name__ == "__main__":
    main()
