"""Copy the rollout curves of a finished run from TensorBoard's files into JSON Lines, the data behind a figure.

python benchmarks/curves.py --run runs/ppo_without_kl --output docs/data/ppo_without_kl.jsonl
"""

import json
from pathlib import Path

from jsonargparse import auto_cli
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CURVES = {"rollout/score": "proxy_reward", "rollout/gold": "gold_reward", "rollout/kl": "kl"}


def curves(run: str, output: str) -> None:
    """Write one line per iteration.

    Args:
        run: folder of a PPO run.
        output: file to write.
    """
    newest = max(Path(run).rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
    events = EventAccumulator(str(newest), size_guidance={"scalars": 0}).Reload()
    columns = [[point.value for point in events.Scalars(tag)] for tag in CURVES]
    rows = [dict(zip(CURVES.values(), values, strict=True)) for values in zip(*columns, strict=True)]
    lines = [json.dumps({"iteration": number} | row) for number, row in enumerate(rows)]
    Path(output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    auto_cli(curves, as_positional=False)
