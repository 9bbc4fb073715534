"""Reward against KL on the demo, β swept for PPO and DPO: how far the proxy can be trusted.

    make demo                                   # once: the SFT model and the reward model that every point starts from
    python benchmarks/frontier.py --output docs/data/frontier.jsonl [--ppo_betas '[0.1, 0.5]'] [--dpo_betas '[]']

Each point is one `lit-rlhf fit` with the demo's config and another β, about a minute on two cores, then one
`lit-rlhf compare` over all of them. Points that are there already are not trained again, so a sweep that was stopped
goes on. One JSON line per policy: `algorithm`, `beta`, `kl`, `proxy_reward`, `gold_reward`, `win_rate`.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_rlhf.cli.parser import command
from lit_rlhf.errors import UserError
from lit_rlhf.files import make_room, write_lines

CONFIGS = Path(__file__).parents[1] / "configs"


def main(
    root: str = "runs/demo",
    ppo_betas: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 1.0),
    dpo_betas: tuple[float, ...] = (0.05, 0.15, 0.5, 1.5),
    output: str | None = None,
    max_prompts: int = 256,
    ppo: tuple[str, ...] = (),
    dpo: tuple[str, ...] = (),
) -> None:
    """Sweep and print.

    Args:
        root: folder of the demo's runs, with `sft` and `reward_model` trained.
        ppo_betas: coefficients of the KL penalty; 0 shows what the reward model overrates.
        dpo_betas: β of DPO, more than 0.
        output: file for the JSON lines as well.
        max_prompts: held-out prompts to play.
        ppo: further options of PPO's runs, such as --trainer.max_epochs=28.
        dpo: further options of DPO's runs.
    """
    folder = Path(root)
    for stage in ("sft", "reward_model"):
        if not (folder / stage / "model").exists():
            raise UserError(f"{folder / stage / 'model'} is missing: run make demo first, or give its --root")
    if output is not None:
        make_room(Path(output), "output", ".jsonl")
    runs: dict[str, tuple[str, float]] = {}
    for beta in ppo_betas:
        name = f"frontier_ppo_{beta:g}"
        reward_model = f"{root}/reward_model/model"
        train(
            folder / name,
            "ppo",
            [
                f"--model.policy={root}/sft/model",
                f"--model.critic={reward_model}",
                f"--model.kl.init_args.kl_coef={beta}",
                f"--data.reward.init_args.model={reward_model}",
                *ppo,
            ],
        )
        runs[name] = ("ppo", beta)
    for beta in dpo_betas:
        name = f"frontier_dpo_{beta:g}"
        train(folder / name, "dpo", [f"--model.policy={root}/sft/model", f"--model.beta={beta}", *dpo])
        runs[name] = ("dpo", beta)

    results = folder / "frontier.json"
    policies = json.dumps(["sft", *runs])
    lit_rlhf(
        "compare", f"--root={root}", f"--policies={policies}", f"--max_prompts={max_prompts}", f"--output={results}"
    )
    measured = json.loads(results.read_text())
    lines = []
    for name, (algorithm, beta) in {"sft": ("sft", None), **runs}.items():
        figures = {key: measured[name][key] for key in ("kl", "proxy_reward", "gold_reward", "win_rate")}
        lines.append(json.dumps({"algorithm": algorithm, "beta": beta} | figures))
        print(lines[-1])
    if output is not None:
        write_lines(lines, Path(output))


def train(folder: Path, stage: str, options: Sequence[str]) -> None:
    """One point, unless it is there."""
    if not (folder / "summary.json").exists():
        lit_rlhf("fit", f"--config={CONFIGS / stage}.yaml", f"--trainer.default_root_dir={folder}", *options)


def lit_rlhf(*arguments: str) -> None:
    """The command line, in a process of its own."""
    subprocess.run([sys.executable, "-m", "lit_rlhf", *arguments], check=True)


if __name__ == "__main__":
    command(main)
