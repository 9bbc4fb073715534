"""The rows that finished runs were validated on, as the config beside their logs has them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_rlhf.data.checks import named_sources
from lit_rlhf.data.formats import Kind
from lit_rlhf.data.naming import Source
from lit_rlhf.errors import UserError, named_by

# By name alone: nothing that a folder's config names is imported.
KINDS: dict[str, Kind] = {
    "RolloutDataModule": "prompts",
    "PreferenceDataModule": "preference",
    "UnpairedDataModule": "unpaired",
    "SFTDataModule": "sft",
}

ONLY_MEASURED = "verbose"  # an option of `validate` and `test` that `fit` has not: by it their configs are known


class HeldOut(NamedTuple):
    """Held-out rows of a run, and how it read them."""

    run: str
    kind: Kind
    sources: list[Source]
    chat_template_kwargs: dict[str, Any]
    control_tokens: Any


def held_out_of(folders: Mapping[str, Path]) -> HeldOut:
    """The held-out rows of the first run that has prompts, or else of the first that has any.

    Args:
        folders: of the runs, by name.

    Raises:
        UserError: none says which.
    """
    found = [rows for name, folder in folders.items() if (rows := _held_out_of_run(name, folder)) is not None]
    if not found:
        raise UserError(
            f"prompts: no config.yaml in the folders of {', '.join(folders)} says on which rows they were validated; "
            "name prompts by --prompts, such as --prompts=prompts.jsonl or --prompts=demo"
        )
    return min(found, key=lambda rows: rows.kind != "prompts")


def _held_out_of_run(name: str, folder: Path) -> HeldOut | None:
    for file in sorted(folder.rglob("config.yaml"), key=lambda file: file.stat().st_mtime_ns, reverse=True):
        try:
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
            data = config["data"]
            kind, given = KINDS[data["class_path"].rpartition(".")[2]], data["init_args"]
            sources = given["validation"]
        except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
            continue  # none of ours
        if ONLY_MEASURED in config:
            continue
        if sources is None:  # of a run without held-out rows
            return None
        held_out = {"train": given.get("train"), "validation": sources}
        with named_by(str(file)):
            named = named_sources(held_out, given.get("format"), given.get("columns"), kind)["validation"]
        assert named is not None
        how = given.get("chat_template_kwargs") or {}, given.get("control_tokens") or "keep"
        return HeldOut(name, kind, named, *how)
    return None
