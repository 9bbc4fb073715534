"""The LightningDataModules of what is learnt from rows: demonstrations, pairs, labels of completions and of steps."""

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.batching import ResumableLoader, TokenBudgetSampler, as_it_is
from lit_rlhf.data.checks import (
    check_labels,
    check_tools,
    check_trainer_options,
    named_sources,
    require_held_out_rows,
    require_kind,
    require_rows,
    require_rows_for_ranks,
    warn_of_margins,
)
from lit_rlhf.data.control_tokens import ControlTokens
from lit_rlhf.data.examples import PackedDataset, PreferenceDataset, SFTDataset, StepwiseDataset, load_examples
from lit_rlhf.data.formats import Kind, Sources
from lit_rlhf.data.mapping import Format
from lit_rlhf.data.naming import DEMO, STAGES, Role
from lit_rlhf.data.prompts import PromptDataset, load_prompts
from lit_rlhf.data.reader import LossOn, Options, Truncation
from lit_rlhf.data.settings import BatchSettings, TokenizationSettings
from lit_rlhf.data.unpaired import UnpairedDataset
from lit_rlhf.errors import UserError, require_types
from lit_rlhf.signals import SIGNALS

__all__ = ["PreferenceDataModule", "SFTDataModule", "StepwiseDataModule", "UnpairedDataModule", "load_prompts"]

PREDICT_BATCH = 256  # prompts handed to `predict_step` at once; how many are played together is the model's affair
ROLES: dict[str, Role] = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


class ExamplesDataModule(LightningDataModule):
    """Base of the data modules that learn from rows.

    Args:
        train: rows to learn from: a file (JSON Lines, JSON, CSV, Parquet), a folder of them, the name of a dataset,
            "demo" for the embedded text, or a list of {source, weight, split, config, format, columns}.
        validation: held-out rows, or the share of the training rows that is held out (0.05); null = no validation.
        test: rows of `test`; null = the validation rows.
        predict: prompts of `predict` and of the sample tables; null = the prompts of the validation rows, which for
            `predict` may not be the demo's.
        format: shape of the rows: alpaca, sharegpt, or null for ours; of the sources that name none.
        columns: names of their columns, {ours: theirs}, such as {prompt: question}; likewise.
        max_length: tokens of a prompt with a response; null = the model's context.
        truncation: what to do with longer rows: truncate responses on the right, without an end token, or drop them;
            a warning says so where it is more than a tenth of them.
        max_prompt_length: longer prompts of `predict` lose tokens on the left; null = half of max_length.
        max_tokens: of a micro-batch, counting a shared prompt once; null = no limit.
        batch_size: examples of a micro-batch at most; null = as many as max_tokens takes.
        shuffle: deal the training rows in another order in each epoch; else about in the order of the data.
        num_workers: processes that pack batches beside the training.
        num_proc: processes that tokenise, once; null = one.
        seed: of the order of examples, and of the share that a weight below 1 takes.
        chat_template: a Jinja template, a file that holds one, or the name of one of several that the tokenizer has;
            null = the tokenizer's own. Exported with the model.
        chat_template_kwargs: variables of the template for all rows, as {enable_thinking: false}; a row's own column of
            that name comes before them.
        control_tokens: what special tokens that a row spells out in its own texts are read as: keep = these tokens,
            escape = plain text, refuse = an error that names the row. They are counted in any case.
        deduplicate: leave out training rows of the same tokens as an earlier one.
        tokenizer: the model's; linked by the CLI.
    """

    kind: ClassVar[Kind]
    dataset: ClassVar[type[PackedDataset]]  # what packs rows of that kind

    def __init__(
        self,
        train: Sources | None = DEMO,
        validation: float | Sources | None = DEMO,
        test: Sources | None = None,
        predict: Sources | None = None,
        format: Format | None = None,
        columns: dict[str, str] | None = None,
        max_length: int | None = None,
        truncation: Truncation = "truncate",
        max_prompt_length: int | None = None,
        max_tokens: int | None = 4096,
        batch_size: int | None = None,
        shuffle: bool = True,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        control_tokens: ControlTokens = "keep",
        deduplicate: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        require_types(ExamplesDataModule.__init__, locals())
        require_held_out_rows(train, validation)
        given = {"train": train, "validation": validation, "test": test or validation, "predict": predict}
        self.sources = named_sources(given, format, columns, self.kind)
        self.tokenization = TokenizationSettings(
            max_length,
            truncation,
            max_prompt_length,
            num_proc,
            chat_template,
            {} if chat_template_kwargs is None else chat_template_kwargs,
            control_tokens,
            deduplicate=deduplicate,
        )
        self.batches = BatchSettings(max_tokens, batch_size, shuffle, num_workers, seed)
        self.tokenizer = tokenizer
        self.datasets: dict[str, PackedDataset] = {}
        self.prompts: PromptDataset | None = None
        self.read_by: tuple[Options, Kind] | None = None  # what datasets and prompts follow from beside the rows

    def prepare_data(self) -> None:
        """Tokenise on one process per machine, and the others find the cache; without a Trainer `setup` does it all."""
        if self.trainer is not None and self.trainer.state.fn is not None:
            self.setup(self.trainer.state.fn.value)

    def setup(self, stage: str) -> None:
        """Read and tokenise what this stage needs; without a Trainer its loaders are those of one rank.

        Raises:
            UserError: no tokenizer, one of other tokens than the model has, or bad data.
        """
        if self.tokenizer is None:
            raise UserError(f"{type(self).__name__} needs the model's tokenizer: pass tokenizer=model.tokenizer")
        if self.trainer is not None:
            check_tools(self.trainer, stage)
        if stage != "predict":
            require_kind(self.trainer, self.kind)
        require_rows(stage, self.sources)
        self.tokenization.settle(self.tokenizer, self)
        options = self.tokenization.of_examples(self.tokenizer)
        if self.read_by != (options, self._predicts_from()):  # a model's context, too, may be another by now
            self.datasets, self.prompts, self.read_by = {}, None, (options, self._predicts_from())
        for name in STAGES[stage]:
            if name == "predict":
                self.prompts = self.prompts or self._load_prompts()
            elif (sources := self.sources[name]) is not None and name not in self.datasets:
                how = (self.tokenizer, options, self.tokenization.num_proc, self.batches.seed, self.dataset)
                once = self.tokenization.deduplicate and name == "train"
                self.datasets[name] = load_examples(sources, self.kind, ROLES[name], *how, once)
        if self.trainer is not None:
            held: dict[str, Any] = {**self.datasets, "predict": self.prompts}
            counts = {name: len(held[name]) for name in STAGES[stage] if held.get(name) is not None}
            require_rows_for_ranks(self.trainer, counts, self._ranks()["num_replicas"])

    def train_dataloader(self) -> ResumableLoader:
        """This rank's micro-batches; goes on in mid-epoch after a resume.

        Raises:
            UserError: a Trainer option that would change the batches behind the plan's back.
        """
        trainer: Any = self.trainer
        if trainer is None:
            return self._loader("train", self.batches.shuffle, None, 1)
        check_trainer_options(trainer)
        limits = (trainer.limit_train_batches, trainer.accumulate_grad_batches)
        loader = self._loader("train", self.batches.shuffle, *limits)
        loader.before_epoch = lambda: SIGNALS.obey(trainer)  # between epochs nothing is half done
        return loader

    def val_dataloader(self) -> DataLoader | list:
        """This rank's share of the held-out rows, each exactly once."""
        limit = None if self.trainer is None else self.trainer.limit_val_batches
        return self._loader("validation", False, limit) if "validation" in self.datasets else []

    def test_dataloader(self) -> DataLoader | list:
        """This rank's share of the test rows, each exactly once."""
        limit = None if self.trainer is None else self.trainer.limit_test_batches
        return self._loader("test", False, limit) if "test" in self.datasets else []

    def predict_dataloader(self) -> DataLoader | list:
        """Prompts, in the order of the data: the k-th batch of rank r is batch k W + r of all."""
        if self.prompts is None:
            return []
        lengths = np.array([len(ids) for ids in self.prompts.prompt_ids])
        ranks: dict[str, Any] = self._ranks()
        sampler = TokenBudgetSampler(lengths, batch_size=PREDICT_BATCH, shuffle=False, **ranks)
        return DataLoader(self.prompts, sampler=sampler, batch_size=None, collate_fn=as_it_is)

    def rows_dataloader(self, split: str) -> DataLoader | None:
        """This rank's share of all rows of "train", "val" or "test", unshuffled; None where there are none."""
        name = ROLES[split]
        return self._loader(name, False, None) if name in self.datasets else None

    def num_rows(self, split: str) -> int:
        """How many `row_ids` of "train", "val" or "test" an epoch takes: they are below it."""
        return self.datasets[ROLES[split]].num_rows

    def rows_fingerprint(self, split: str) -> str:
        """Hash of the tokens of these rows, in their order."""
        return self.datasets[ROLES[split]].fingerprint()

    def sample_prompts(self, count: int) -> PromptBatch | None:
        """The first held-out prompts, for sample tables; None where the data has none."""
        assert self.tokenizer is not None
        if self.prompts is None and (self.sources["predict"] or self.sources["validation"]) is not None:
            self.prompts = self._load_prompts(optional=True)
        if self.prompts is None:
            return None
        return self.prompts.take(np.arange(min(count, len(self.prompts))))

    def _ranks(self) -> dict[str, int]:
        # Not world_size: ranks of one tensor-parallel group see the same data.
        ranks = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return ranks or {"num_replicas": 1, "rank": 0}

    def _predicts_from(self) -> Kind:
        return getattr(getattr(self.trainer, "lightning_module", None), "predicts_from", "prompts")

    def _loader(self, name: str, shuffle: bool, limit: float | None, accumulate: int | None = None) -> ResumableLoader:
        if name not in self.datasets:
            raise UserError(f"{type(self).__name__} has read no rows of {name} yet: call prepare_data() and setup()")
        dataset = self.datasets[name]
        sampler = TokenBudgetSampler(
            dataset.lengths(),
            dataset.items(),
            max_tokens=self.batches.max_tokens,
            batch_size=self.batches.batch_size,
            shuffle=shuffle,
            seed=self.batches.seed,
            accumulate_grad_batches=accumulate,
            place=dataset.place,
            **self._ranks(),
        )
        if limit is not None:  # an int counts micro-batches, a float is a share of them
            sampler.limit_batches = limit if isinstance(limit, int) else int(limit * len(sampler))
        workers = self.batches.num_workers
        return ResumableLoader(dataset, sampler, num_workers=workers, persistent_workers=workers > 0)

    def _load_prompts(self, optional: bool = False) -> PromptDataset | None:
        assert self.tokenizer is not None
        how, kind = self.tokenization, self._predicts_from()
        given = (self.tokenizer, how.of_examples(self.tokenizer), self.batches.seed, kind, how.num_proc)
        if (sources := self.sources["predict"]) is not None:
            return load_prompts(sources, "predict", *given)
        held_out = self.sources["validation"]
        assert held_out is not None  # `require_rows`, and `sample_prompts` itself, see to it
        prompts = load_prompts(held_out, "validation", *given, of=self.kind)
        if not len(prompts) and not optional:
            raise UserError("predict needs prompts, and the validation rows have none: set predict")
        return prompts if len(prompts) else None


class SFTDataModule(ExamplesDataModule):
    """Demonstrations: rows with `messages`, or `prompt` and `completion`, or `text`.

    Args:
        train: rows to learn from, as in `ExamplesDataModule`.
        validation: held-out rows, or the share of the training rows that is held out; null = no validation.
        loss_on: learn the assistant's turns or the completion only ("response"), or every token ("all").
        kwargs: as in `ExamplesDataModule`.
    """

    kind, dataset = "sft", SFTDataset

    def __init__(
        self,
        train: Sources | None = DEMO,
        validation: float | Sources | None = DEMO,
        loss_on: LossOn = "response",
        **kwargs: Any,
    ) -> None:
        super().__init__(train, validation, **kwargs)
        self.tokenization = replace(self.tokenization, loss_on=loss_on)


class PreferenceDataModule(ExamplesDataModule):
    """Pairs: rows with `chosen` and `rejected`, a `prompt` unless both repeat it, and perhaps a `margin`."""

    kind, dataset = "preference", PreferenceDataset
    warned = False  # once, not for each part of the data

    def setup(self, stage: str) -> None:
        """As of `ExamplesDataModule`; says so of margins that the loss does not use, or lacks."""
        super().setup(stage)
        for dataset in list(self.datasets.values())[: int(self.trainer is not None and not self.warned)]:
            warn_of_margins(self.trainer, dataset)
            self.warned = True


class UnpairedDataModule(ExamplesDataModule):
    """Completions by themselves: rows with `prompt`, `completion` and `label`, true where it is desirable; or pairs.

    Of a pair, `chosen` is a desirable completion and `rejected` an undesirable one, and both share its prompt.
    """

    kind, dataset = "unpaired", UnpairedDataset
    warned = False

    def setup(self, stage: str) -> None:
        """As of `ExamplesDataModule`; looks at how many completions are desirable."""
        super().setup(stage)
        if "train" in self.datasets and not self.warned:
            check_labels(self.trainer, self.datasets["train"])
            self.warned = True


class StepwiseDataModule(ExamplesDataModule):
    """Solutions in steps: rows with `prompt`, `completions` (the steps) and `labels` (whether each is right).

    A label is true or false, or how probably the step is right, from 0 to 1; null = it was not judged.

    Args:
        train: rows to learn from, as in `ExamplesDataModule`.
        validation: held-out rows, or the share of the training rows that is held out; null = no validation.
        step_separator: text behind each step, by which a policy's steps are told apart; it belongs to the step.
        kwargs: as in `ExamplesDataModule`; what is too long loses whole steps.
    """

    kind, dataset = "stepwise", StepwiseDataset

    def __init__(
        self,
        train: Sources | None = DEMO,
        validation: float | Sources | None = DEMO,
        step_separator: str = "\n",
        **kwargs: Any,
    ) -> None:
        super().__init__(train, validation, **kwargs)
        self.tokenization = replace(self.tokenization, step_separator=step_separator)
