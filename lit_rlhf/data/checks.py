"""What both kinds of data module refuse: they plan an epoch's batches themselves, and choose no validation data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.data.formats import Kind, Sources
from lit_rlhf.data.held_out import share_of
from lit_rlhf.data.mapping import Format, require_read
from lit_rlhf.data.naming import DEMO, Role, Source, parse_sources
from lit_rlhf.errors import UserError, named_by, one_line, require
from lit_rlhf.files import make_folder


def named_sources(
    given: Mapping[str, Sources | float | None], format: Format | None, columns: Mapping[str, str] | None, kind: Kind
) -> dict[str, list[Source] | None]:
    """The sources of each role as they are used, None where none are given; `format` and `columns` are the default.

    Raises:
        UserError: a form that is none of `parse_sources`, or a column that nothing reads, by the option that names it.
    """
    named: dict[str, list[Source] | None] = {}
    share = share_of(given["validation"], "data.validation")
    if share is not None and given["train"] is None:
        raise UserError(f"data.validation ({share:g}) is a share of data.train, which is null: name both, or files")
    for role in given:
        held_out = isinstance(given[role], int | float)
        origin = "train" if held_out else role
        rows: Any = given[origin]
        found = None if rows is None else parse_sources(rows, format, columns, f"data.{origin}")
        if found is not None and share is not None and origin == "train":
            found = [source.cut(share, held_out) for source in found]
        named[role] = found
        for source in named[role] or []:
            with named_by(f"data.{role}"):
                require_read(source.columns, "prompts" if role == "predict" else kind, source.format)
    return named


def require_rows(stage: str, sources: Mapping[str, Any]) -> None:
    """Refuse a stage without the rows that it is about."""
    role = {"fit": "train", "validate": "validation"}.get(stage, stage)
    if sources[role] is None and not (role == "predict" and sources["validation"] is not None):
        raise UserError(f"data.{role} is null, and {stage} needs rows: name a file, a folder, a dataset, or 'demo'")
    if role == "predict" and sources[role] is None and all(source.name == DEMO for source in sources["validation"]):
        raise UserError(
            f"data.predict is null, and data.validation, whose prompts would stand in for it, is {DEMO!r}: name your "
            f"prompts by data.predict, or say data.predict: {DEMO}"
        )


def require_held_out_rows(train: Sources | None, validation: float | Sources | None) -> None:
    """Refuse to judge what was learnt from the user's rows by the demo's, which nobody asked for."""
    if train is None:
        return
    if (
        isinstance(validation, str)
        and validation == DEMO
        and not any(source.name == DEMO for source in parse_sources(train))
    ):
        raise UserError(
            f"data.validation is still {DEMO!r} while data.train is {one_line(repr(train))}; name held-out rows of "
            "your own, or null"
        )


DATA_MODULES = {
    "sft": "SFTDataModule",
    "preference": "PreferenceDataModule",
    "unpaired": "UnpairedDataModule",
    "stepwise": "StepwiseDataModule",
    "prompts": "RolloutDataModule",
}


def require_rows_for_ranks(trainer: Any, counts: Mapping[Role, int], ranks: int) -> None:
    """Refuse rows of which some ranks would have none, before the first step rather than when they are asked for.

    Args:
        trainer: whose `limit_..._batches` of 0 says that a split is not run.
        counts: by split, rows or prompts that are used.
        ranks: among which they are dealt.

    Raises:
        UserError: names the split.
    """
    for split, count in counts.items():
        limit = f"limit_{'val' if split == 'validation' else split}_batches"
        if count < ranks and getattr(trainer, limit) != 0:
            raise UserError(
                f"data.{split}: {count} of its rows can be used, too few for {ranks} ranks, each of which needs one: "
                "use fewer devices, or give more rows"
            )


def require_kind(trainer: Any, kind: Kind) -> None:
    """Refuse data of another kind than the module learns from: rows of pairs would pass as demonstrations."""
    require_learns_from(type(getattr(trainer, "lightning_module", None)), kind)


def require_learns_from(module: type, kind: Kind) -> None:
    """Likewise, by the class of the module."""
    wanted = getattr(module, "learns_from", kind)  # a user's own module knows what it does
    if wanted != kind:
        raise UserError(
            f"{module.__name__} learns from a {DATA_MODULES[wanted]}, not from a {DATA_MODULES[kind]}; "
            f"set data.class_path: lit_rlhf.{DATA_MODULES[wanted]}"
        )


def require_batch(module: LightningModule, batch: Any) -> None:
    """Refuse batches of loaders that know nothing of packed rows, given in place of a data module."""
    if not hasattr(batch, "_fields"):  # a NamedTuple, as those of `batches`
        data = DATA_MODULES.get(getattr(module, "learns_from", ""), "data module")
        raise UserError(
            f"{type(module).__name__} takes its batches from a {data}, and was given a loader of "
            f"{type(batch).__name__}s: pass datamodule={data}(...) to the Trainer"
        )


def warn_of_margins(trainer: Any, dataset: Any) -> None:
    """Say so where pairs have margins and the loss does not read them, or the other way round."""
    module = getattr(trainer, "lightning_module", None)
    reads: bool | None = getattr(module, "reads_margins", None)  # None: margins are taken where there are some
    pairs, lacking = dataset.count_margins()
    if getattr(module, "reads_ties", False):
        if lacking == pairs:
            raise UserError(
                f"model.loss, rao_kupper_loss, takes a pair of margin 0 for a tie, and so all {pairs}: give those that "
                "were won a `margin`, such as 1, or leave the option out"
            )
        return
    if reads is False and lacking < pairs:
        rank_zero_warn(
            f"the margins of the pairs are not used by the loss of {type(module).__name__}; "
            "model.loss: lit_rlhf.losses.offset_dpo_loss uses them, or leave the column `margin` out"
        )
    if reads and lacking:
        rank_zero_warn(
            f"the loss of {type(module).__name__} reads the margin of each pair, and {lacking} of {pairs} pairs have "
            "none, or 0, so that they are learnt from as without it: give the column `margin`, or the loss that option"
        )


FAIR_RATIO = (1.0, 4 / 3)  # λ_D n_D / λ_U n_U: Ethayarajh et al. 2024, Eq. 8


def check_labels(trainer: Any, dataset: Any) -> None:
    """Refuse completions of one class alone; advise weights where one class outweighs the other.

    Raises:
        UserError: names the class that is lacking.
    """
    desirable, undesirable = dataset.count_labels()
    if not desirable or not undesirable:
        found, lacking = ("desirable", "undesirable") if desirable else ("undesirable", "desirable")
        raise UserError(
            f"all {desirable + undesirable} completions of the training data are {found}, and both classes are needed: "
            f"add {lacking} ones (label: {'false' if desirable else 'true'}), or train SFT on desirable ones"
        )
    module: Any = getattr(trainer, "lightning_module", None)
    if not hasattr(module, "desirable_weight"):
        return
    weight, other = module.desirable_weight, module.undesirable_weight
    ratio = (weight * desirable) / (other * undesirable)
    least, most = FAIR_RATIO
    if not least * 0.95 <= ratio <= most * 1.05:  # a few rows more or less are not worth a word
        low, high = (bound * other * undesirable / desirable for bound in FAIR_RATIO)
        rank_zero_warn(
            f"{desirable} completions are desirable and {undesirable} are not: with desirable_weight {weight:g} and "
            f"undesirable_weight {other:g} the first count {ratio:.2g} times as much as the others, where 1 to 4/3 "
            f"times is advised; set model.desirable_weight between {low:.3g} and {high:.3g}"
        )


def check_trainer_options(trainer: Any) -> None:
    """Refuse options of the Trainer that change the training batches behind their plan's back."""
    accumulate = trainer.accumulate_grad_batches
    require(accumulate >= 1, "accumulate_grad_batches", accumulate, "1 or more")
    clip = trainer.gradient_clip_val
    require(clip is None or clip >= 0, "gradient_clip_val", clip, "0 or more (0 = no clipping), or null")
    for name in ("min_steps", "min_epochs", "log_every_n_steps"):
        value = getattr(trainer, name)
        require(value is None or value >= 0, name, value, "0 or more")
    sanity = trainer.num_sanity_val_steps
    require(sanity >= -1, "num_sanity_val_steps", sanity, "-1 (all) or more")
    if trainer.overfit_batches:
        raise UserError(
            f"overfit_batches ({trainer.overfit_batches}) would replace the plan of the micro-batches; to learn from "
            "few rows again and again, name a file that holds no others as train"
        )
    if isinstance(trainer.strategy, SingleDeviceStrategy) and trainer.num_devices * trainer.num_nodes > 1:
        raise UserError(
            f"trainer.strategy is of a single device, and would leave all but one of {trainer.num_devices} devices on "
            f"{trainer.num_nodes} nodes unused: set trainer.strategy: ddp, or both numbers to 1"
        )
    interval, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    never = "to leave validation out set trainer.limit_val_batches: 0"
    require(interval != 0, "val_check_interval", interval, f"micro-batches, or a share of an epoch above 0; {never}")
    require(epochs is None or epochs >= 1, "check_val_every_n_epoch", epochs, f"1 or more, or null; {never}")


TOOLS = {  # of Lightning's, that change what is learnt in a way that these modules do not follow
    GradientAccumulationScheduler: "changes the accumulation behind the loss's denominator; use "
    "accumulate_grad_batches",
    BatchSizeFinder: "finds a number of rows, and micro-batches are filled by tokens; choose data.max_tokens (halve "
    "it where memory runs out), or data.num_slots on policy",
    StochasticWeightAveraging: "averages what stands at the start of epochs, so that the last is not in the export; "
    "use lightning.pytorch.callbacks.EMAWeightAveraging, which averages over steps",
    BackboneFinetuning: "unfreezes a part named `backbone`, and these modules have none; freeze by a callback of "
    "your own (lightning.pytorch.callbacks.BaseFinetuning)",
}


LIMITS = {"validate": "limit_val_batches", "test": "limit_test_batches", "predict": "limit_predict_batches"}


def check_tools(trainer: Any, stage: str) -> None:
    """Refuse callbacks of Lightning's that would not do what they are for, and a run that would do nothing.

    Raises:
        UserError: with what to use in their place.
    """
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        nothing = stage == "fit" and getattr(trainer, name, None) == 0
        require(not nothing, name, 0, "more than 0, or nothing is learnt; validate, test and predict train nothing")
    if limit := LIMITS.get(stage):
        require(getattr(trainer, limit, None) != 0, limit, 0, f"more than 0, or {stage} does nothing")
    make_folders(trainer, stage)
    for callback in trainer.callbacks:
        for tool, reason in TOOLS.items():
            if isinstance(callback, tool):
                raise UserError(f"trainer.callbacks: {tool.__name__} {reason}")
        if isinstance(callback, ModelCheckpoint) and callback.filename is not None:
            try:
                callback.format_checkpoint_name({})
            except (ValueError, LookupError, AttributeError) as error:
                raise UserError(
                    f"trainer.callbacks: filename ({one_line(callback.filename)}) of {type(callback).__name__} is no "
                    f"name with metrics in braces, such as {{step}} or {{val/loss:.2f}}: {error}"
                ) from error
        if isinstance(callback, ModelPruning) and not callback._make_pruning_permanent:
            raise UserError(
                "trainer.callbacks: ModelPruning with make_pruning_permanent: false leaves masks beside the weights, "
                "which no export can hold; leave it at true"
            )
        if isinstance(callback, LearningRateFinder):
            if getattr(trainer.lightning_module, "learns_from", None) == "prompts":
                raise UserError(
                    "trainer.callbacks: LearningRateFinder follows the fall of the loss, and a policy's loss does not "
                    "fall as it learns; try a few values of model.learning_rate, and watch rollout/score and the KL"
                )
            if getattr(trainer.lightning_module, "cache_reference", False) or getattr(
                trainer.lightning_module, "reference_update", None
            ):
                raise UserError(
                    "trainer.callbacks: LearningRateFinder would take its trial steps before the reference is known; "
                    "find the rate in a run without cache_reference and reference_update"
                )
            if trainer.ckpt_path is not None:
                raise UserError(
                    "trainer.callbacks: LearningRateFinder has nothing to find for a run that goes on at its own rate; "
                    "leave it out, or leave ckpt_path out"
                )


def make_folders(trainer: Any, stage: str) -> None:
    """Make the folders that a run writes into: Lightning does so once there is something to write.

    Raises:
        UserError: one of them is a file, lies below one, or may not be written to.
    """
    for option, folder in [] if trainer.fast_dev_run else written_folders(trainer, stage):
        make_folder(folder, option)


def written_folders(trainer: Any, stage: str) -> list[tuple[str, Path]]:
    """Where a run's checkpoints, logs and profile go, as far as they are known, and by which option."""
    named = []
    if stage == "fit":
        named += [("callbacks: dirpath", part, getattr(part, "dirpath", None)) for part in trainer.callbacks]
    for logger in trainer.loggers:
        named.append(("logger: save_dir", logger, getattr(logger, "root_dir", None) or logger.save_dir))
    named.append(("profiler: dirpath", trainer.profiler, getattr(trainer.profiler, "dirpath", None)))
    return [
        (f"trainer.{option} of {type(part).__name__}", Path(folder).expanduser())
        for option, part, folder in named
        if folder and "://" not in str(folder)
    ]


def require_whole_epochs(trainer: Any) -> None:
    """Refuse what ends an epoch early or starts the prompts anew: on policy an epoch is an iteration of one stream."""
    if trainer.reload_dataloaders_every_n_epochs:
        raise UserError(
            f"reload_dataloaders_every_n_epochs ({trainer.reload_dataloaders_every_n_epochs}) would play the same "
            "prompts with the same dice again; leave it out, since each epoch plays a new rollout as it is"
        )
    limit = trainer.limit_train_batches
    whole = limit is None or (isinstance(limit, float) and limit == 1.0)  # the int 1 is one micro-batch
    if not whole and not trainer.fast_dev_run:
        raise UserError(
            f"limit_train_batches ({limit}) would end an iteration in the middle of its rollout; for a shorter run "
            "lower rollout_size, max_epochs or max_steps"
        )
