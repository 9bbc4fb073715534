"""Play several policies on the same held-out prompts and put what they achieved side by side."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lit_rlhf.cli.run_data import held_out_of
from lit_rlhf.data.chat import set_template
from lit_rlhf.data.control_tokens import ControlTokens
from lit_rlhf.data.locating import input_files
from lit_rlhf.data.naming import DEMO, parse_sources
from lit_rlhf.data.prompts import load_prompts
from lit_rlhf.data.reader import Options
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.errors import UserError, one_line, require
from lit_rlhf.files import make_room, write_json
from lit_rlhf.models.adapter_folders import saved_adapter
from lit_rlhf.models.loading import load_policy_with_tokenizer
from lit_rlhf.models.policy import Policy, freeze
from lit_rlhf.models.tokens import check_same_tokens, load_tokenizer
from lit_rlhf.models.weights import load_config
from lit_rlhf.rollout.judges import stored_head_kind
from lit_rlhf.rollout.play import GenerationSettings, complete
from lit_rlhf.rollout.rewards import Reward, RewardModelReward, TextReward
from lit_rlhf.rollout.scoring import scored
from token_mdp import Episode

EPISODES_PER_FORWARD = 64
FIGURES = {  # key in the JSON -> heading and format in the table
    "gold_reward": ("gold reward", ".3f"),
    "proxy_reward": ("proxy reward", ".3f"),
    "kl": ("KL to {baseline} [nats]", "z.2f"),
    "win_rate": ("win rate over {baseline}", ".2f"),
    "response_length": ("response [tokens]", ".1f"),
    "models_in_memory": ("models in memory", "d"),
    "peak_memory_mb": ("peak memory [MB]", ".0f"),
    "seconds": ("training [s]", ".0f"),
}
COSTS = ("models_in_memory", "peak_memory_mb", "seconds")  # as a run's summary has them


def compare(
    root: str = "runs",
    policies: tuple[str, ...] = ("sft", "ppo", "dpo"),
    reward_model: str | None = "reward_model",
    prompts: str | None = None,
    gold: Callable[..., Any] | None = None,
    max_prompts: int = 256,
    generation: GenerationSettings = GenerationSettings(),
    chat_template_kwargs: dict[str, Any] | None = None,
    control_tokens: ControlTokens | None = None,
    output: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Compare finished runs: reward, KL, win rate, length, and what each cost.

    Args:
        root: folder of the runs.
        policies: runs in it to compare; the first is the baseline of KL and win rate.
        reward_model: run in it whose reward model gives the proxy reward; null = none.
        prompts: held-out prompts: a file, a folder, the name of a dataset, or "demo"; null = those that the runs were
            validated on, of the first run whose data are prompts, or else of the first whose rows have some.
        gold: function (prompts, responses, **columns) -> scores of text, by import path, that decides who wins;
            null = the demo's gold reward for the demo's prompts, and else the proxy reward.
        max_prompts: play at most this many.
        generation: how responses are written.
        chat_template_kwargs: variables of the chat template for all prompts; null = as in the data of the runs where
            the prompts are theirs, and else none.
        control_tokens: what special tokens that a prompt spells out are read as: keep, escape or refuse; null =
            likewise, and else keep.
        output: JSON file for the results; null = results.json in `root`.

    Returns:
        The measured figures by run; the KL is None where `generation` cuts the distribution (top_k, top_p, min_p, or
        temperature 0).
    """
    if not policies:
        raise UserError("policies is empty: name at least the baseline")
    require(max_prompts >= 1, "max_prompts", max_prompts, "1 or more")
    results_file = Path(output) if output else Path(root) / "results.json"
    folders = {name: run_folder(root, name) for name in policies}
    baseline, *_ = policies
    tokenizers = {name: load_tokenizer(*model_and_config(folder)) for name, folder in folders.items()}
    tokenizer = tokenizers[baseline]
    for name, other in tokenizers.items():  # one's ids are what all play, judge and decode
        check_same_tokens(tokenizer, other, f"policy {name}")
    costs = {name: read_summary(folder) for name, folder in folders.items()}
    room = tokenizer.model_max_length - generation.max_new_tokens
    require(room >= 1, "generation.max_new_tokens", generation.max_new_tokens, "less than the models' context")
    own = held_out_of(folders) if prompts is None else None
    sources = parse_sources(prompts or DEMO) if own is None else own.sources
    demo = all(source.name == DEMO for source in sources)
    if own is not None:
        chat_template_kwargs = own.chat_template_kwargs if chat_template_kwargs is None else chat_template_kwargs
        control_tokens = control_tokens or own.control_tokens
    set_template(tokenizer, None, chat_template_kwargs or {})
    how = Options(None, "truncate", "response", room, control_tokens or "keep", chat_template_kwargs or {})
    of = None if demo or own is None or own.kind == "prompts" else own.kind  # whose rows hold the prompts
    loaded = load_prompts(sources, "validation", tokenizer, how, of=of)
    if not len(loaded):
        raise UserError("prompts: the rows that the runs were validated on have none; name some by --prompts")
    require_same_template(tokenizers, loaded.columns["prompt"])
    of_models = [file for folder in folders.values() for file in (folder / "model").glob("*.json")]
    make_room(results_file, "output", ".json", [*input_files(sources, "validation"), *of_models])
    held_out = loaded.take(np.arange(min(max_prompts, len(loaded))))
    whose = f" that {own.run} was validated on" if own else ""
    names = ", ".join(source.name for source in sources)
    rank_zero_info(f"{len(held_out.prompt_ids)} prompts{whose}: {names}")
    others = [name for name in finished_runs(root) if name not in (*policies, reward_model)]
    left_out = [name for name in others if not is_reward_model(Path(root) / name / "model")]
    if left_out:
        rank_zero_info(
            f"left out of {root}: {one_line(', '.join(left_out))}; choose by --policies=[{','.join(policies)},...]"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if gold is None and demo:
        from lit_rlhf.demo import gold_reward as gold
    judges: dict[str, Reward] = {}
    if gold is not None:
        judges["gold_reward"] = TextReward(gold)
    if reward_model is not None:
        judges["proxy_reward"] = RewardModelReward(str(run_folder(root, reward_model) / "model"))
    if not judges:
        raise UserError("nothing to compare by: give reward_model, gold, or both")
    for judge in judges.values():
        judge.check_columns(held_out.columns)
        judge.bind(tokenizer, device)

    reference = freeze(load_policy_with_tokenizer(folders[baseline] / "model")[0]).to(device)
    for name in policies[1:]:  # what cannot be loaded is told before an hour of playing
        load_policy_with_tokenizer(folders[name] / "model")
    results: dict[str, dict[str, Any]] = {}
    scores: dict[str, np.ndarray] = {}
    for number, (name, folder) in enumerate(folders.items(), 1):
        rank_zero_info(f"{name} plays ({number} of {len(folders)})")
        policy = freeze(load_policy_with_tokenizer(folder / "model")[0]).to(device)
        episodes = complete(policy, tokenizer, held_out, generation)
        responses = [episode.response_ids for episode in episodes]
        judged = {
            what: scored(judge, "gold" if what == "gold_reward" else "reward_model", held_out, responses)
            for what, judge in judges.items()
        }
        scores[name] = judged[next(iter(judges))]
        margin = scores[name] - scores[baseline]
        results[name] = {
            **{what: float(values.mean()) for what, values in judged.items()},
            # What a cut distribution wrote is no sample of π, nor its log-ratio an estimate of the KL.
            "kl": sequence_kl(policy, reference, episodes, generation.temperature) if generation.is_whole else None,
            "win_rate": float(((margin > 0) + 0.5 * (margin == 0)).mean()),
            "response_length": float(np.mean([len(response) for response in responses])),
            **{key: costs[name][key] for key in COSTS},
        }
    print_table(results, baseline)
    if reward_model is not None:
        results["reward_model"] = reward_model_results(run_folder(root, reward_model), demo)
    write_json(results, results_file)
    return results


def require_same_template(tokenizers: Mapping[str, Any], prompts: Sequence[Any]) -> None:
    """Refuse to ask policies in the words of the first what the others were trained to be asked otherwise."""
    (baseline, first), *others = tokenizers.items()
    differing = [name for name, tokenizer in others if tokenizer.chat_template != first.chat_template]
    if differing and any(isinstance(prompt, list) for prompt in prompts):
        raise UserError(
            f"the prompts are message lists, and {', '.join(differing)} has another chat template than {baseline}; "
            "compare runs of one template, or give prompts of text"
        )


@torch.no_grad()
def sequence_kl(policy: Policy, reference: Policy, episodes: list[Episode], temperature: float) -> float:
    """KL(π‖π_ref) over whole responses, in nats: the mean log-ratio of responses that π sampled."""
    total = 0.0
    for start in range(0, len(episodes), EPISODES_PER_FORWARD):
        examples = [Example(e.prompt_ids, (e.response_ids,)) for e in episodes[start : start + EPISODES_PER_FORWARD]]
        batch = move_data_to_device(pack(examples), policy.model.device)
        logratio = policy(batch, temperature)[0] - reference(batch, temperature)[0]
        total += logratio.double().sum().item()
    return total / len(episodes)


def reward_model_results(folder: Path, demo: bool) -> dict[str, Any]:
    """Accuracy on held-out pairs as its run measured it; for the demo, the best that any model could reach."""
    results: dict[str, Any] = {"val_accuracy": read_summary(folder)["metrics"].get("val/accuracy")}
    if demo:
        from lit_rlhf.demo import bayes_accuracy, rows

        results["bayes_accuracy"] = bayes_accuracy(rows("preference", "validation"))
    return results


def run_folder(root: str | Path, name: str) -> Path:
    """The folder of a finished run."""
    folder = Path(root) / name
    if not is_export(folder / "model"):
        finished = finished_runs(root)
        there = f"finished runs in {root} are {', '.join(finished)}" if finished else f"{root} holds no finished run"
        raise UserError(
            f"no exported model in {(folder / 'model').absolute()}: has the run {name!r} finished its fit? {there}; "
            "choose by --policies=[...], --reward_model and --root"
        )
    return folder


def finished_runs(root: str | Path) -> list[str]:
    """Names of the runs in a folder that have exported."""
    return sorted(found.parent.name for found in Path(root).glob("*/model") if is_export(found))


def is_export(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter."""
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json"))


def is_reward_model(folder: Path) -> bool:
    """Whether a folder holds a model that scores, or its adapter; of one that is damaged nothing is known."""
    with suppress(UserError):
        return stored_head_kind(folder) is not None
    return False


def model_and_config(folder: Path) -> tuple[Path, Any]:
    """The exported model's folder and its config, or that of the base of an adapter there."""
    saved = saved_adapter(folder / "model")
    return folder / "model", load_config(folder / "model" if saved is None else saved.base)


def print_table(results: dict[str, dict[str, Any]], baseline: str) -> None:
    """The comparison as tables, a column per policy: as many side by side as a terminal is wide, in a file all."""
    console, left = Console(), list(results)

    def width(count: int) -> int:
        room = console.options.update_width(sys.maxsize)
        return console.measure(table_of(results, left[:count], baseline), options=room).maximum

    if not console.is_terminal:
        console.width = max(console.width, width(len(left)))
    while left:
        count = next((count for count in range(len(left), 1, -1) if width(count) <= console.width), 1)
        console.print(table_of(results, left[:count], baseline))
        left = left[count:]


def table_of(results: dict[str, dict[str, Any]], names: Sequence[str], baseline: str) -> Table:
    """The table of some of the policies; no number is cut, and no name."""
    table = Table(title="Held-out prompts", title_justify="left")
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(escape(name), justify="right", overflow="fold")
    for key, (heading, form) in FIGURES.items():
        if key in results[baseline]:
            shown = (results[name][key] for name in names)
            cells = ("-" if value is None else format(value, form) for value in shown)
            table.add_row(escape(heading.format(baseline=baseline)), *cells)
    return table


def read_summary(folder: Path) -> dict[str, Any]:
    """What a run says of itself in its folder."""
    file = folder.absolute() / "summary.json"
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        metrics, costs = summary["metrics"], [summary[name] for name in COSTS]
    except FileNotFoundError:
        raise UserError(f"{file} is missing: it is written when `fit` ends") from None
    except (ValueError, LookupError, TypeError):  # no JSON; no object with all of these
        metrics, costs = None, []
    if not isinstance(metrics, dict) or not all(isinstance(cost, int | float) for cost in costs):
        raise UserError(f"{file} is damaged: expected an object with metrics, {', '.join(COSTS)}; run fit again")
    return summary
