"""The embedded default: customer-support text of our own making, a tokenizer, a model configuration, a gold reward."""

from pathlib import Path

from lit_rlhf.demo.gold import gold_reward
from lit_rlhf.demo.text import bayes_accuracy, rows

MODEL_DIR = Path(__file__).parent / "model"  # tokenizer and Llama configuration, no weights

__all__ = ["MODEL_DIR", "bayes_accuracy", "gold_reward", "rows"]
