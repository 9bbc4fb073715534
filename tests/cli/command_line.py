"""The command line in this process, for its tests."""

import json
from pathlib import Path

from lit_rlhf.cli.main import main

QUICK = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0"]
SMALL_PPO = ["--data.rollout_size=16", "--data.num_slots=8", "--data.max_new_tokens=8"]


def run(*args):
    """The command line in this process; returns the exit status."""
    try:
        main([str(arg) for arg in args])
    except SystemExit as exit:
        return exit.code
    return 0


def predictions(root):
    """What `predict` wrote, row by row."""
    return [json.loads(line) for line in Path(root, "predictions.jsonl").read_text().splitlines()]
