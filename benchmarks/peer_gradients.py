"""GRPO's loss as another library computes it, differentiated by the log-probs: run by a Python that has the library.

    python -m benchmarks.peer_gradients --peer trl --jobs jobs.pt --output slopes.pt

A job is (options, β, columns): of B responses the tensors that the loss takes, (B, T) and (B,). Its answer is B times
the gradient of the library's loss, a mean over responses of sums over tokens, or of means where its options say so.
"""

import argparse
import inspect
import os
import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import logging as transformers_logging

Job = tuple[dict[str, Any], float, dict[str, Tensor]]


def trl_loss(options: dict[str, Any], beta: float, columns: dict[str, Tensor], logprobs: Tensor) -> Tensor:
    """`GRPOTrainer._compute_loss`, whose model gives these log-probs."""
    import datasets
    import trl

    from benchmarks import workload
    from benchmarks.peer_trl import saved_model

    class OnLogprobs(trl.GRPOTrainer):
        """What the model would compute is known."""

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            return logprobs, torch.zeros_like(logprobs.detach()), None

    shape, B = workload.SHAPES["tiny"], len(logprobs)
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "max_completion_length": 1, "num_generations": 2}
    trainer = OnLogprobs(
        model=saved_model(shape),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=2, beta=beta, **settings, **options
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "w1"}] * 2),
        processing_class=workload.make_tokenizer(shape),
    )
    trainer.model.eval()  # no share of gradient accumulation
    ids = torch.zeros(logprobs.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": columns["response_mask"].int(),
        "advantages": columns["advantages"],
        "old_per_token_logps": columns["old_logprobs"],
        "ref_per_token_logps": columns["ref_logprobs"],
        "num_items_in_batch": torch.tensor(B),
    }
    return trainer._compute_loss(trainer.model, inputs)


def agilerl_loss(options: dict[str, Any], beta: float, columns: dict[str, Tensor], logprobs: Tensor) -> Tensor:
    """`GRPO._grpo_loss_standard` of an agent with its defaults, but for what these options say."""
    from agilerl.algorithms.grpo import GRPO

    class OnLogprobs(GRPO):
        """An agent without a network, which its loss does not ask for."""

        def _resolve_loss_window(self) -> tuple[int, float]:
            return 1, len(logprobs)

    defaults = {p.name: p.default for p in inspect.signature(GRPO.__init__).parameters.values()}
    clip = defaults["clip_coef"]
    low, high = (1 - clip, 1 + clip) if isinstance(clip, float) else (1 - clip[0], 1 + clip[1])
    wanted = (
        "kl_clamp",
        "off_policy_token_mask_bounds",
        "off_policy_sequence_mask_threshold",
        "use_bias_correction_kl",
    )
    settings = {name: defaults[name] for name in wanted} | {"use_kl_advantage_shaping": False, "beta": beta} | options
    agent = object.__new__(OnLogprobs)
    for name, value in (settings | {"clip_coef_min": low, "clip_coef_max": high}).items():
        object.__setattr__(agent, name, value)
    mask, old, ref = (columns[name] for name in ("response_mask", "old_logprobs", "ref_logprobs"))
    return agent._grpo_loss_standard(mask, logprobs, old, ref, columns["advantages"][:, None])[0]


LOSSES = {"trl": trl_loss, "agilerl": agilerl_loss}


def slopes(library: str, job: Job) -> Tensor:
    """(B, T) B times the gradient of the library's loss."""
    options, beta, columns = job
    logprobs = columns["logprobs"].clone().requires_grad_()
    loss = LOSSES[library](options, beta, columns, logprobs)
    return len(logprobs) * torch.autograd.grad(loss, logprobs)[0]


def main() -> None:
    """Answer the jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=sorted(LOSSES))
    parser.add_argument("--jobs", required=True)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    os.environ["HF_HOME"] = tempfile.mkdtemp()
    torch.set_num_threads(1)
    jobs: list[Job] = torch.load(options.jobs)
    torch.save([slopes(options.peer, job) for job in jobs], options.output)


if __name__ == "__main__":
    main()
