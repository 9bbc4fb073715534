"""The model card of an export: what it was made of and how, in the format of the Hugging Face hub.

Its facts are plain values, so that a checkpoint keeps them and its export says what that of the run would have said.
"""

from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from lightning.pytorch import Trainer

from lit_rlhf.algorithms.hyperparameters import settings_of
from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.algorithms.self_comparison import CARD, CONFIG
from lit_rlhf.errors import require_alike
from lit_rlhf.models.heads import OF_RESPONSES, kind_of
from lit_rlhf.models.hub import HUB_NAME
from lit_rlhf.models.saving import Artefact

LIBRARIES = ("lit-rlhf", "torch", "lightning", "transformers", "peft", "datasets")
# What facts are, and stand in for those that a checkpoint does not have.
NO_FACTS: dict[str, Any] = {
    "method": "",
    "about": "",
    "start": "",
    "base_model": "",
    "steps": 0,
    "metrics": {},
    "settings": {},
    "versions": {},
}


def card_facts(
    module: AlignmentModule, trainer: Trainer | None = None, metrics: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """What is to be told of a run, as it stands.

    Args:
        module: what is trained.
        trainer: by which; None tells of the module alone.
        metrics: as the run had them at the checkpoint that it goes on from.
    """
    start = str(module.hparams.get("policy") or "")
    facts: dict[str, Any] = {
        "method": type(module).__name__,
        "about": (type(module).__doc__ or "").strip().split("\n")[0],
        "start": start,
        "base_model": base_model_of(start),
        "settings": {"model": dict(module.hparams)},
        "versions": {name: version(name) for name in LIBRARIES},
    }
    if trainer is not None:
        now = {name: float(value) for name, value in trainer.callback_metrics.items()}
        known = {**(metrics or {}), **now}
        held_out = {name: value for name, value in known.items() if name.startswith("val/")}
        facts |= {"steps": trainer.global_step, "metrics": held_out or known}
        own = {"precision": str(trainer.precision), "ranks": trainer.world_size}
        facts["settings"] |= {"data": settings_of(getattr(trainer, "datamodule", None)), "trainer": own}
    return NO_FACTS | facts


def stored_facts(checkpoint: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Those that a checkpoint keeps; of one without, what its other parts tell.

    Args:
        checkpoint: all but the weights.
        name: of the part, for messages.

    Raises:
        UserError: they are something else.
    """
    parameters = checkpoint.get("hyper_parameters")
    parameters = parameters if isinstance(parameters, Mapping) else {}
    told = {"method": checkpoint.get("algorithm", ""), "steps": checkpoint.get("global_step", 0)}
    held = checkpoint.get(
        "card", told | {"start": str(parameters.get("policy") or ""), "settings": {"model": parameters}}
    )
    require_alike(held, NO_FACTS, name)
    return NO_FACTS | dict(held)


def base_model_of(start: str) -> str:
    """The name on the hub of the model that a folder, by its card, goes back to; empty where that is not known."""
    folder = Path(start).expanduser()
    if folder.exists() or start == "demo" or not HUB_NAME.fullmatch(start):
        with suppress(OSError, ValueError, yaml.YAMLError):  # no card, or one that is damaged
            return str(ModelCard.load(folder / CARD).data.base_model or "")
        return ""
    return start


def model_card(made: Artefact, facts: Mapping[str, Any]) -> ModelCard:
    """The card of an artefact, by the facts of its run."""
    return ModelCard(f"---\n{metadata(made, facts).to_yaml()}\n---\n\n{text_of(made, facts)}")


def carried_card(made: Artefact, source: Path, facts: Mapping[str, Any]) -> ModelCard:
    """The card of an older export for what is made of that, or a new one where it has none."""
    try:
        card = ModelCard.load(source / CARD)
    except (OSError, ValueError, yaml.YAMLError):
        return model_card(made, facts)
    card.data["library_name"] = metadata(made, facts)["library_name"]
    return card


def metadata(made: Artefact, facts: Mapping[str, Any]) -> ModelCardData:
    """What the hub reads of a card."""
    adapter = made.adapter is not None and not made.merge
    sources = facts["settings"].get("data", {}).get("train", ())
    names = [name for name in sources if "/" in name and HUB_NAME.fullmatch(name) and not Path(name).exists()]
    return ModelCardData(
        base_model=facts["base_model"] or None,
        datasets=names or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation" if made.generation is not None else "text-classification",
        tags=["lit-rlhf", *filter(None, [facts["method"].lower()])],
    )


def text_of(made: Artefact, facts: Mapping[str, Any]) -> str:
    """What a person reads of a card."""
    what = "policy" if made.generation is not None else kind_of(made.model).named
    method, start = facts["method"], short(facts["start"])
    by = f" by {method}" if method else ""
    parts = [f"# A {what}{by}", f"Trained with lit-rlhf{f' from `{start}`' if start else ''}, {facts['steps']} steps."]
    parts += [facts["about"]] if facts["about"] else []
    if what == OF_RESPONSES.named:
        parts.append(
            "Its score is what `AutoModelForSequenceClassification` gives, and `score_bias` of the config added."
        )
    data = facts["settings"].get("data", {})
    rows = [f"| {role} | {', '.join(map(short, data[role]))} |" for role in ("train", "validation") if data.get(role)]
    rows += [f"| reward | {name}: `{given.get('class_path')}` |" for name, given in data.get("rewards", {}).items()]
    if rows:
        parts += ["## Data", "\n".join(["| | |", "| --- | --- |", *rows])]
    if facts["metrics"]:
        values = [f"| {name} | {value:.4g} |" for name, value in sorted(facts["metrics"].items())]
        parts += ["## Metrics", "\n".join(["| metric | value |", "| --- | --- |", *values])]
    settings = yaml.safe_dump(short(facts["settings"]), sort_keys=False, allow_unicode=True, width=120)
    parts += [f"{CONFIG}{settings}```"]
    if facts["versions"]:
        parts += ["## Versions", ", ".join(f"{name} {number}" for name, number in facts["versions"].items())]
    return "\n\n".join(parts) + "\n"


def short(value: Any) -> Any:
    """A value without what is nothing, and with absolute paths cut to their ends: a card may go far."""
    if isinstance(value, Mapping):
        kept = {name: short(part) for name, part in value.items()}
        return {name: part for name, part in kept.items() if part not in (None, [], {})}
    if isinstance(value, list | tuple):
        return [short(part) for part in value]
    if isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value:
        return "/".join(("...", *Path(value).parts[-2:]))
    return value
