"""`make demo`: all four stages on the embedded default, then the comparison; `python -m lit_rlhf.demo --help`."""

import json
import subprocess
import sys
import time
from pathlib import Path

from jsonargparse import auto_cli

from lit_rlhf.demo import CONFIGS

ACHIEVED = {  # stage -> metrics of its summary that say what it achieved
    "sft": ("val/loss",),
    "reward_model": ("val/accuracy", "val/loss"),
    "ppo": ("val/score", "val/gold", "val/kl"),
    "dpo": ("val/reward_accuracy", "val/reward_margin"),
}
# At the rate of the others DPO leaves what the pairs can judge (KL 8.5 nats, half of them lost).
BAR = 0.75  # of held-out prompts, the share on which an aligned policy is to win over the SFT model
OVERLAYS = {"reward_model": "lora.yaml", "ppo": "lora.yaml", "dpo": "lora_dpo.yaml"}


def demo(root: str = "runs/demo", seed: int = 0, lora: bool = False) -> None:
    """SFT from scratch, reward model, PPO, and DPO from the same SFT model and pairs; then compare the policies.

    Args:
        root: folder of the runs and of results.json.
        seed: of weights, data order and sampling.
        lora: train adapters on the SFT model's frozen weights; PPO's four roles then stand on these.
    """
    model = {stage: f"{root}/{stage}/model" for stage in ACHIEVED}
    options = {
        "sft": [],
        "reward_model": [f"--model.policy={model['sft']}"],
        "ppo": [
            f"--model.policy={model['sft']}",
            f"--model.critic={model['reward_model']}",
            f"--model.seed={seed}",
            f"--data.reward.init_args.model={model['reward_model']}",
        ],
        "dpo": [f"--model.policy={model['sft']}"],
    }
    for stage, extra in options.items():
        overlay = OVERLAYS.get(stage) if lora else None
        adapter = [] if overlay is None else [f"--config={CONFIGS / 'overlays' / overlay}"]
        run_stage(stage, root, seed, [*adapter, *extra, f"--data.seed={seed}"])
    subprocess.run([sys.executable, "-m", "lit_rlhf", "compare", f"--root={root}"], check=True)
    judge(Path(root))


def judge(root: Path) -> None:
    """Say whether the policies won as they should; status 1 where one did not."""
    results = json.loads((root / "results.json").read_text())
    rates = {stage: results[stage]["win_rate"] for stage in ("ppo", "dpo")}
    told = ", ".join(f"{stage} {rate:.2f}" for stage, rate in rates.items())
    print(f"win rate over sft: {told}; at least {BAR} was to be reached", flush=True)
    if min(rates.values()) < BAR:
        raise SystemExit(1)


def run_stage(stage: str, root: str, seed: int, extra: list[str]) -> None:
    """One stage in a process of its own, so that its peak memory is its own; one line of what it achieved."""
    start = time.perf_counter()
    print(f"── {stage} ──", flush=True)
    command = [sys.executable, "-m", "lit_rlhf", "fit", f"--config={CONFIGS / stage}.yaml", f"--seed_everything={seed}"]
    finished = subprocess.run([*command, f"--trainer.default_root_dir={root}/{stage}", *extra])
    if finished.returncode:
        raise SystemExit(finished.returncode)  # the stage has said why
    metrics = json.loads(Path(root, stage, "summary.json").read_text())["metrics"]
    achieved = ", ".join(f"{name} {metrics[name]:.3f}" for name in ACHIEVED[stage] if name in metrics)
    print(f"{stage}: {achieved} in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        auto_cli(demo, as_positional=False)
    except KeyboardInterrupt:
        print("interrupted; finished stages stay where they are, the demo starts again from its first", file=sys.stderr)
        raise SystemExit(130) from None
