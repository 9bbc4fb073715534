"""A word where a policy is measured against itself: numbers that look like a verdict on training and are none."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.models.fingerprints import fingerprint
from lit_rlhf.models.hub import resolve

CARD = "README.md"  # of an exported model
CONFIG = "## Config\n\n```yaml\n"  # what the settings in a card come after


def warn_of_itself(method: str, settings: Mapping[str, Any]) -> None:
    """Say so where π_ref is the policy: log-ratios, implicit rewards and the KL are then 0 whatever was learnt.

    Args:
        method: class of the module, such as DPO.
        settings: arguments of a module that has a reference, and neither learnt nor read a checkpoint.
    """
    policy, reference = str(settings.get("policy") or "demo"), settings.get("reference")
    if reference is not None and not same_weights(policy, str(reference)):
        return
    which = "model.reference is null" if reference is None else f"model.reference ({reference}) holds the same weights"
    start = start_of(policy, method)
    named = f"--model.reference={start} (by its model card)" if start else "--model.reference=FOLDER"
    rank_zero_warn(
        f"{which}, so that {policy} is measured against itself: rewards, margins and the KL are 0, and accuracy 0.5, "
        f"whatever it has learnt. Of a trained model, name what its run started from: {named}"
    )


def same_weights(one: str, other: str) -> bool:
    """Whether two folders or hub names hold the same numbers."""
    if one == other:
        return True
    mark = fingerprint(resolve(one))
    return mark is not None and mark == fingerprint(resolve(other))


def start_of(folder: str, method: str) -> str:
    """What the reference was in the run of a method that exported a model, by its card; empty where it does not say.

    Of absolute paths a card keeps the ends alone.
    """
    with suppress(OSError, ValueError, yaml.YAMLError):  # no card, or another's
        card = ModelCard.load(Path(folder).expanduser() / CARD)
        if method.lower() not in (card.data.tags or ()):
            return ""
        model = yaml.safe_load(card.text.partition(CONFIG)[2].partition("```")[0])["model"]
        start = model.get("reference") or model.get("policy")
        return str(start) if start and not str(start).startswith("...") else ""
    return ""
