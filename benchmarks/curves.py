"""Copy the rollout curves of a finished run from TensorBoard's files into JSON Lines, the data behind a figure.

python benchmarks/curves.py --run runs/ppo_without_kl --output docs/data/ppo_without_kl.jsonl
"""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rlhf.cli.parser import command
from lit_rlhf.errors import UserError
from lit_rlhf.files import make_room, write_lines

CURVES = {"rollout/score": "proxy_reward", "rollout/gold": "gold_reward", "rollout/kl": "kl"}


def curves(run: str, output: str) -> None:
    """Write one line per iteration.

    Args:
        run: folder of a PPO run.
        output: file to write.
    """
    files = sorted(Path(run).rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError(f"run: no TensorBoard files under {Path(run).absolute()}; name the folder of a PPO run")
    events = EventAccumulator(str(files[-1]), size_guidance={"scalars": 0}).Reload()
    if missing := [tag for tag in CURVES if tag not in events.Tags()["scalars"]]:
        raise UserError(
            f"run: {files[-1]} holds no {', '.join(missing)}; name the folder of a PPO run with a gold reward"
        )
    columns = [[point.value for point in events.Scalars(tag)] for tag in CURVES]
    rows = [dict(zip(CURVES.values(), values, strict=True)) for values in zip(*columns, strict=True)]
    make_room(Path(output), "output", ".jsonl")
    write_lines((json.dumps({"iteration": number} | row) for number, row in enumerate(rows)), Path(output))


if __name__ == "__main__":
    command(curves)
