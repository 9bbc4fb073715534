"""Draw the figures of the docs from the data that the benchmarks left in docs/data: `make figures`.

Colours are told apart by people who see red and green alike; each series also has its own marker or place.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jsonargparse import auto_cli
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
INK, GRID = "#22272e", "#d8dee4"
BLUE, ORANGE, GREEN, PURPLE = "#0b6bcb", "#d9730d", "#2a8a5f", "#8250a8"  # told apart in grey, too
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
}


def optimality(rows: list[dict[str, Any]]) -> Figure:
    """Gap and KL of PPO, DPO and the learnt reward's optimum, by MDP and β; what is below 1e-12 is drawn there."""
    shown = {
        "ppo": ("PPO, sampled episodes", BLUE, "o"),
        "dpo": ("DPO, exact preferences", ORANGE, "s"),
        "reward_model": ("optimum of the learnt reward", GREEN, "^"),
    }
    rows = [row for row in rows if row["algorithm"] in shown]
    problems = list(dict.fromkeys(row["mdp"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.7), layout="constrained", sharex=True)
    for axis, key, bound, title in (
        (axes[0], "gap", 0.005, "Gap to the optimum (J* − J) / (J* − J$_{ref}$)"),
        (axes[1], "kl_to_optimum", 0.01, "KL(π‖π*) [nats]"),
    ):
        for algorithm, (label, colour, marker) in shown.items():
            for number, problem in enumerate(problems):
                ours = sorted(
                    (r for r in rows if r["algorithm"] == algorithm and r["mdp"] == problem), key=lambda r: r["beta"]
                )
                place = number + 0.7 * (np.arange(len(ours)) / max(len(ours) - 1, 1) - 0.5)
                values = np.clip([row[key] for row in ours], 1e-12, None)
                axis.plot(place, values, marker=marker, color=colour, lw=0.8, ms=5, label=label if not number else None)
        axis.axhline(bound, color=INK, lw=1, ls="--")
        axis.annotate(f"bound {bound:g}", (0.99, bound), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axis.set_yscale("log")
        axis.set_ylim(3e-13, 0.1)
        axis.set_title(title)
        axis.set_xticks(range(len(problems)), problems)
        axis.grid(axis="x", visible=False)
        axis.set_xlabel("MDP; within each, β = " + ", ".join(f"{beta:g}" for beta in sorted({r["beta"] for r in rows})))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def credit_assignment(rows: list[dict[str, Any]]) -> Figure:
    """Learning curves by horizon and samples to 90 % of the optimum."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = dict(zip(methods, (BLUE, GREEN, PURPLE, ORANGE), strict=False))
    lengths = sorted({row["length"] for row in rows})
    figure, axes = plt.subplots(1, len(lengths), figsize=(9.6, 3.9), layout="constrained", sharey=True, squeeze=False)
    for axis, length in zip(axes[0], lengths, strict=True):
        for method in methods:
            ours = [row for row in rows if row["method"] == method and row["length"] == length]
            for number, row in enumerate(ours):
                samples, returns = zip(*row["curve"], strict=True)
                samples = np.maximum(samples, 16)
                axis.plot(samples, returns, color=colours[method], lw=1.6, alpha=0.85, label=None if number else method)
                if row["samples"] is not None:
                    axis.plot(row["samples"], returns[-1], "o", color=colours[method], ms=5)
        axis.axhline(0.9, color=INK, lw=1, ls="--")
        axis.set_xscale("log")
        axis.set_title(f"T = {length} tokens")
        axis.set_xlabel("episodes seen")
    axes[0][0].annotate("90 % of the optimum", (0.01, 0.9), xycoords=("axes fraction", "data"), va="bottom")
    axes[0][0].set_ylabel("exact mean return")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def frontier(rows: list[dict[str, Any]]) -> Figure:
    """Reward against KL as β is swept: what the reward model says (proxy) and what is true (gold).

    The axis of KL is that of its square root, a distance from the reference (Gao et al. 2022,
    https://arxiv.org/abs/2210.10760).
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained", sharex=True)
    titles = {"proxy_reward": "Proxy: the reward model's score", "gold_reward": "Gold: the true reward"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        draw_frontier(axis, rows, key)
        axis.set_title(title)
        axis.set_xlabel("KL(π‖π_ref) [nats per response], square-root scale")
        axis.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
        axis.set_xlim(0, 1.15 * max(row["kl"] for row in rows))
        axis.set_xticks([kl for kl in (0, 1, 4, 10, 25, 50, 100) if kl <= axis.get_xlim()[1]])
    axes[0].set_ylabel("mean reward, held-out prompts")
    axes[0].legend(loc="lower right")
    return figure


def draw_frontier(axis: Axes, rows: list[dict[str, Any]], key: str) -> None:
    """One line per algorithm from SFT (β → ∞) down to the least β, each point with its β."""
    start = next(row for row in rows if row["algorithm"] == "sft")
    axis.plot(start["kl"], start[key], "D", color=INK, ms=7, zorder=3, clip_on=False)
    axis.annotate("SFT", (start["kl"], start[key]), xytext=(9, -5), textcoords="offset points")
    for algorithm, label, colour, marker in (("ppo", "PPO", BLUE, "o"), ("dpo", "DPO", ORANGE, "s")):
        ours = sorted((row for row in rows if row["algorithm"] == algorithm), key=lambda row: -row["beta"])
        if not ours:
            continue
        line = [start, *ours]
        axis.plot([r["kl"] for r in line], [r[key] for r in line], marker=marker, color=colour, lw=1.4, label=label)
        for row in ours:
            axis.annotate(
                f"{row['beta']:g}",
                (row["kl"], row[key]),
                xytext=(-7, 3) if algorithm == "ppo" else (7, -13),
                textcoords="offset points",
                ha="right" if algorithm == "ppo" else "left",
                fontsize=8,
                color=colour,
            )


def ppo_without_kl(rows: list[dict[str, Any]]) -> Figure:
    """Over-optimisation: the proxy goes up to the end, the gold reward falls once the policy has left the reference."""
    iterations = [row["iteration"] + 1 for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    for key, label, colour, marker in (
        ("proxy_reward", "Proxy: the reward model's score", BLUE, "o"),
        ("gold_reward", "Gold: the true reward", ORANGE, "s"),
    ):
        axes[0].plot(iterations, [row[key] for row in rows], marker=marker, color=colour, label=label)
    axes[0].set_title("Reward of what the policy plays")
    axes[0].legend(loc="upper left")
    axes[1].plot(iterations, [row["kl"] for row in rows], marker="^", color=PURPLE)
    axes[1].set_title("KL(π‖π_ref) [nats per response]")
    for axis in axes:
        axis.set_xlabel("iteration (256 episodes each)")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


FIGURES = {
    "optimality": optimality,
    "credit_assignment": credit_assignment,
    "frontier": frontier,
    "ppo_without_kl": ppo_without_kl,
}


def main(data: str = str(DOCS / "data"), output: str = str(DOCS / "figures")) -> None:
    """Draw every figure whose data is there.

    Args:
        data: folder of the JSON Lines.
        output: folder of the PNGs.
    """
    Path(output).mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            source = Path(data) / f"{name}.jsonl"
            if not source.exists():
                print(f"{name}: no {source}, run benchmarks/{name}.py --output {source}")
                continue
            rows = [json.loads(line) for line in source.read_text().splitlines()]
            figure = draw(rows)
            target = Path(output) / f"{name}.png"
            figure.savefig(target, metadata={"Software": None})  # the same bytes from the same data
            plt.close(figure)
            print(f"{name}: {target}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
