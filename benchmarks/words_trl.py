"""Contestant: TRL on the problem of `benchmarks/words.py`, run by a Python in which `trl` is installed.

`--folder` holds the reference with its tokenizer, the file `--words` the rewards of all completions and the pairs.
The policy that comes out is left in `--output`, for the oracle to judge. TRL 1.12 was the last with a PPO trainer.
"""

import argparse
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import logging as transformers_logging
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.rounds import clock, serve
from benchmarks.workload import PAD


class TableReward(torch.nn.Module):
    """A reward model for `PPOTrainer` that knows all rewards: at each token, that of the completion ending there."""

    base_model_prefix = "backbone"

    def __init__(self, prompt_length: int, rewards: dict[str, float]) -> None:
        super().__init__()
        self.prompt_length, self.rewards = prompt_length, rewards
        self.backbone, self.score = self.look_up, torch.nn.Identity()

    def look_up(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """(B, S, 1) rewards as if they were hidden states; 0 for what is no completion."""
        found = torch.zeros(*input_ids.shape, 1)
        for row, tokens in enumerate(torch.where(attention_mask, input_ids, PAD)[:, self.prompt_length :].tolist()):
            for end in range(len(tokens)):
                found[row, self.prompt_length + end] = self.rewards.get(" ".join(map(str, tokens[: end + 1])), 0.0)
        return BaseModelOutput(hidden_states=(found,))


def main() -> None:
    """Prepare, then train when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=["ppo", "dpo"])
    parser.add_argument("--folder", required=True)
    parser.add_argument("--words", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--passes", type=int, required=True, help="iterations of PPO, epochs of DPO")
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()

    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    os.environ["HF_HOME"] = tempfile.mkdtemp()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(1)
    problem = json.loads(Path(options.words).read_text())

    def train() -> dict[str, Any]:
        start = clock()
        trainer = {"ppo": ppo, "dpo": dpo}[options.task](options, problem)
        trainer.train()
        trainer.save_model(options.output)
        return {"seconds": clock() - start}

    serve(train)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What both trainers are told: as ours are."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 256,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "linear",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": options.seed,
    }


def ppo(options: argparse.Namespace, problem: dict[str, Any]) -> Any:
    """TRL's PPO: two passes of two minibatches over 256 episodes, as ours; k1 in the reward, λ = 1."""
    import datasets
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    arguments = PPOConfig(
        **settings(options),
        response_length=problem["max_new_tokens"],
        stop_token="eos",
        temperature=1.0,
        kl_coef=options.beta,
        lam=1.0,
        vf_coef=1.0,
        num_ppo_epochs=2,
        num_mini_batches=2,
        total_episodes=256 * options.passes,
        local_rollout_forward_batch_size=256,
        num_sample_generations=0,
    )
    policy, reference = (AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32) for _ in range(2))
    critic = AutoModelForSequenceClassification.from_pretrained(options.folder, num_labels=1, dtype=torch.float32)
    return PPOTrainer(
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(options.folder),
        model=policy,
        ref_model=reference,
        reward_model=TableReward(len(problem["prompt"]), problem["rewards"]),
        value_model=critic,
        train_dataset=datasets.Dataset.from_list([{"input_ids": problem["prompt"]}] * 256),
    )


def dpo(options: argparse.Namespace, problem: dict[str, Any]) -> Any:
    """TRL's DPO on the same pairs of token ids."""
    import datasets
    import trl

    class OnIds(trl.DPOTrainer):
        """Text cannot say that a response was cut before its end token."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    rows = [{f"{key}_ids": pair[key] for key in ("prompt", "chosen", "rejected")} for pair in problem["pairs"]]
    return OnIds(
        AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32),
        args=trl.DPOConfig(
            **settings(options), beta=options.beta, num_train_epochs=options.passes, precompute_ref_log_probs=True
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.folder),
    )


if __name__ == "__main__":
    main()
