"""The artefact of a run: a Hugging Face folder, whole or not there."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import ModelCard
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError

from lit_rlhf.algorithms.checkpoint import read_facts, read_weights
from lit_rlhf.algorithms.lightning_tools import require_steps
from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.callbacks.model_card import CARD, card_facts, model_card, stored_facts
from lit_rlhf.data.checks import written_folders
from lit_rlhf.data.locating import input_files
from lit_rlhf.data.naming import Role, Source
from lit_rlhf.errors import UserError, damaged, one_line, require, require_types
from lit_rlhf.files import NEW, aside_of, heal, remove, replacing, said_of, writing_into
from lit_rlhf.models.adapter_folders import BASE_FILE, BIAS_FILE, Origin
from lit_rlhf.models.fingerprints import Fingerprints
from lit_rlhf.models.saving import Artefact, write, write_settings
from lit_rlhf.rollout.scoring import Rewards

# Names of what an export writes, by tokenizers of every kind.
WRITTEN = re.compile(
    r".*\.(safetensors|jinja|model|tiktoken|spm|vocab|codes)|.*(config|token\w*|maps?|vocab[\w-]*|index|template)\.json"
    r"|(normalizer|emoji|tekken|word_\w+)\.json|(vocab|merges|dict)\.txt|additional_chat_templates|"
    + "|".join(map(re.escape, (CARD, BASE_FILE, BIAS_FILE)))
)
SHARD_SIZE = re.compile(r"[1-9]\d*(KB|MB|GB)")
Dtype = Literal["float32", "bfloat16", "float16"]


class HuggingFaceExport(Callback):
    """Write the trained model and its tokenizer as a Hugging Face folder when `fit` ends; not after `fast_dev_run`.

    Args:
        folder: where, relative to the Trainer's `default_root_dir`, in place of an older export; null = no export.
        which: "best" = the weights of the checkpoint that is best by the monitor of a ModelCheckpoint, "last" = those
            at the end; null = the best where there is a monitor.
        dtype: of the weights on disk; null = that of the folder which the model came from.
        merge: where an adapter has learnt (`lora`), write whole weights with the adapter folded in; false = the adapter
            alone, for PEFT; null = the adapter, unless its base is on no disk.
        max_shard_size: of a file of weights, such as 5GB: larger ones are several files; null = transformers' default.
    """

    def __init__(
        self,
        folder: str | None = "model",
        which: Literal["best", "last"] | None = None,
        dtype: Dtype | None = None,
        merge: bool | None = None,
        max_shard_size: str | None = None,
    ) -> None:
        require_types(HuggingFaceExport.__init__, locals())
        self.folder = folder
        self.which = which
        self.dtype = as_dtype(dtype, "export.dtype")
        self.merge = merge
        self.max_shard_size = as_shard_size(max_shard_size, "export.max_shard_size")
        self.metrics: dict[str, float] = {}  # as a run stood that this one goes on from

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the folder, and try all but the weights, before an hour of training."""
        if stage != "fit" or self.folder is None or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, AlignmentModule)
        target = Path(trainer.default_root_dir) / self.folder
        with said_of("export.folder", target):
            heal(target)
            require_export(target)
        if self.which == "best" and not monitors(trainer):
            raise UserError(
                "export.which is best, but no ModelCheckpoint has a monitor, such as val/loss, to tell by: give "
                "trainer.callbacks one that has, or set export.which: last"
            )
        made = pl_module.artefact(self.dtype, merge=self.merge)
        rewards = getattr(getattr(trainer, "datamodule", None), "rewards", None)
        stands_on = [pl_module.stands_on()] + ([rewards.stands_on()] if isinstance(rewards, Rewards) else [])
        require_apart(target, starts_of(pl_module.hparams, made.adapter, stands_on) + inputs_of(trainer))
        require_replaceable(target)
        with said_of("export.folder", target):
            rehearse(made, target)
        if trainer.ckpt_path is None and target.exists() and any(target.iterdir()):
            rank_zero_info(f"export.folder: {target} holds an export, which this run's will replace")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what the card of an export of these weights says."""
        assert isinstance(pl_module, AlignmentModule)
        checkpoint["card"] = card_facts(pl_module, trainer, self.metrics)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Know what the run had measured, where there is nothing left to do that would measure it again."""
        self.metrics = stored_facts(checkpoint, damaged(str(trainer.ckpt_path), "card"))["metrics"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at where everything else goes that the run writes; all of that is known by now."""
        if self.folder is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        root = Path(trainer.default_root_dir)
        written = [("trainer.default_root_dir", root), *written_folders(trainer, "fit")]
        require_apart(root / self.folder, [(f"what the run writes ({option})", str(at)) for option, at in written])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export on rank 0, also where a checkpoint left nothing to train; all ranks join to collect the weights."""
        require_steps(trainer)
        if self.folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, AlignmentModule)
        best: str | None = trainer.strategy.broadcast(best_checkpoint(trainer) if self.which != "last" else None)
        if best is None:
            pl_module.before_export()
            weights = pl_module.exported_weights()
        if not trainer.is_global_zero:
            return
        target, which = Path(trainer.default_root_dir) / self.folder, ""
        if best is None:
            made = pl_module.artefact(self.dtype, merge=self.merge)
            facts = card_facts(pl_module, trainer, self.metrics)
        else:
            stored = read_facts(best)
            made = pl_module.artefact(self.dtype, stored, self.merge)
            facts = stored_facts(stored, damaged(best, "card"))
            weights = read_weights(best, pl_module.exported)
            which = f" as it was best: {best}"
        card = model_card(made, facts)
        replace_export(made._replace(max_shard_size=self.max_shard_size), weights, target, card)
        rank_zero_info(f"exported {type(pl_module).__name__} to {target}{which}")


def as_dtype(name: str | None, option: str) -> torch.dtype | None:
    """A dtype by its name."""
    require(name in (None, *get_args(Dtype)), option, name, f"one of {', '.join(get_args(Dtype))}, or null")
    return None if name is None else getattr(torch, name)


def as_shard_size(size: str | None, option: str) -> str | None:
    """A size of files as transformers takes it."""
    require(
        size is None or SHARD_SIZE.fullmatch(size) is not None, option, size, "a size such as 5GB or 500MB, or null"
    )
    return size


def monitors(trainer: Trainer) -> list[Any]:
    """The callbacks that know which checkpoint is best."""
    return [saver for saver in trainer.checkpoint_callbacks if getattr(saver, "monitor", None) is not None]


def best_checkpoint(trainer: Trainer) -> str | None:
    """The checkpoint that is best by the first monitor; None where there is none, which is said if there should be."""
    for saver in monitors(trainer)[:1]:
        assert isinstance(saver, ModelCheckpoint)
        if saver.best_model_path and Path(saver.best_model_path).exists():
            return saver.best_model_path
        what = f"{saver.best_model_path} is gone" if saver.best_model_path else "none was saved"
        rank_zero_warn(f"of the checkpoints that {saver.monitor} tells apart, {what}: the last weights are exported")
    return None


def require_export(target: Path, option: str = "export.folder") -> None:
    """Refuse a place that is taken, and not by an export.

    Raises:
        UserError: a file, or a folder that holds something and neither config.json nor adapter_config.json.
    """
    exports = [target / "config.json", target / "adapter_config.json"]
    if target.is_dir() and (any(file.exists() for file in exports) or not any(target.iterdir())):
        return
    if target.exists():
        raise UserError(f"{option}: {target} is there and no export of a model; name a folder of its own")


def require_replaceable(target: Path, option: str = "export.folder") -> None:
    """Refuse to replace what is no export, or holds more: once it is written, the folder is deleted with all in it.

    Raises:
        UserError: see `require_export`; or something is in it that no export writes.
    """
    require_export(target, option)
    found = sorted(target.iterdir()) if target.exists() else []
    configs = [path for path in found if path.name.endswith("config.json") and path.is_file()]
    has_code = any("auto_map" in path.read_text("utf-8", "replace") for path in configs)
    written = [bool(WRITTEN.fullmatch(path.name)) or (has_code and path.suffix == ".py") for path in found]
    if others := [path.name for path, known in zip(found, written, strict=True) if not known]:
        raise UserError(
            f"{option}: {target} holds {one_line(', '.join(others))} beside an export, and would be replaced with all "
            "that is in it; move that elsewhere, or name another folder"
        )


def starts_of(
    arguments: Mapping[str, Any], adapter: Origin | None, stands_on: Iterable[Mapping[str, Fingerprints]]
) -> list[tuple[str, str]]:
    """What a run starts from, in words, each with the folder or hub name of its weights.

    Args:
        arguments: of the module's constructor, by name.
        adapter: what the adapter that learns stands on; None where all weights learn.
        stands_on: of the module and of its rewards, see `AlignmentModule.stands_on`.
    """
    named = [(role, arguments.get(role)) for role in ("policy", "reference", "critic", "teacher")]
    if adapter is not None:
        named += [("the weights that the adapter has learnt on", folder) for folder in (adapter.base, adapter.start)]
    named += [(role, folder) for roles in stands_on for role, held in roles.items() for folder in held]
    folders = [
        (role, folder) for role, folder in named if isinstance(folder, str) and folder != "demo"
    ]  # has no weights
    there = [(role, folder) for role, folder in folders if Path(folder).expanduser().exists()]
    return [(f"what the run starts from ({role})", folder) for role, folder in there]


def inputs_of(trainer: Trainer) -> list[tuple[str, str]]:
    """What else a run reads, in words, each with its file: rows, and the checkpoint that it goes on from."""
    roles: tuple[Role, ...] = ("train", "validation")
    sources: Mapping[Role, list[Source] | None] = getattr(getattr(trainer, "datamodule", None), "sources", {})
    files = [(f"data.{role}", file) for role in roles for file in input_files(sources.get(role) or (), role)]
    files += [] if trainer.ckpt_path is None else [("ckpt_path", Path(trainer.ckpt_path))]
    return [(f"what the run reads ({option})", str(file)) for option, file in files]


def require_apart(target: Path, held: Iterable[tuple[str, str]], option: str = "export.folder") -> None:
    """Refuse to replace what a run needs: neither it nor its checkpoints would stand on those weights any more.

    Args:
        target: the folder of the export, which may not be there yet.
        held: what stands where, in words and by file or folder.
        option: that names the target.

    Raises:
        UserError: the target is one of these folders, or one of them lies in it.
    """
    for what, name in held:
        place = Path(name).expanduser().resolve()
        if any(part == target.resolve() or is_same(part, target) for part in (place, *place.parents)):
            raise UserError(f"{option}: {target} holds {what}, and would be replaced; name another folder")


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file or folder that is there."""
    return one.exists() and other.exists() and one.samefile(other)


def rehearse(made: Artefact, target: Path) -> None:
    """Write all but the weights aside and throw it away: what transformers would refuse at the end, it refuses now.

    Raises:
        UserError: transformers does not write this config or tokenizer.
    """
    aside = aside_of(target, NEW)
    with writing_into(target.parent):
        try:
            aside.mkdir(exist_ok=True)
            write_settings(made, aside)
        except UnicodeEncodeError:
            raise  # of the folder's name
        except (ValueError, TypeError) as error:
            raise UserError(f"this config and tokenizer could not be exported at the end: {error}") from error
        finally:
            remove(aside)


def export(module: AlignmentModule, weights: dict[str, torch.Tensor], target: Path) -> None:
    """Write a module's artefact with these weights of `module.exportable()`; see `replace_export`."""
    made = module.artefact()
    replace_export(made, weights, target, model_card(made, card_facts(module)))


def replace_export(made: Artefact, weights: dict[str, torch.Tensor], target: Path, card: ModelCard) -> None:
    """Write a Hugging Face folder aside and rename it into place: a reader never meets half of one.

    Args:
        made: what stands beside the weights.
        weights: the whole state dict of its model.
        target: the folder; one that is there is replaced.
        card: of the model, see `model_card`.

    Raises:
        UserError: the weights are ruined, the disk is full or may not be written to, or something else than an export
            is there; nothing is left behind, an older export stays.
    """
    require_replaceable(target)
    try:
        with replacing(target) as aside:
            aside.mkdir()
            write(made, weights, aside)
            (aside / CARD).write_text(str(card), encoding="utf-8")
    except (OSError, SafetensorError) as error:  # as a full disk is reported
        raise UserError(f"the export to {target} failed and left nothing new there: {error}") from error
