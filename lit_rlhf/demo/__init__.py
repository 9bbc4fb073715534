"""The embedded default: customer-support text of our own making, a tokenizer, a model configuration, a gold reward."""

from pathlib import Path

from lit_rlhf.demo.gold import gold_reward
from lit_rlhf.demo.sums import right_steps, sum_reward
from lit_rlhf.demo.text import bayes_accuracy, rows

# The configs of all stages: in the package that is installed, or in a checkout.
CONFIGS = next(
    folder
    for folder in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
    if folder.is_dir()
)
MODEL_DIR = Path(__file__).parent / "model"  # tokenizer and Llama configuration, no weights

__all__ = ["MODEL_DIR", "bayes_accuracy", "gold_reward", "right_steps", "rows", "sum_reward"]
