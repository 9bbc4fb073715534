"""What the model does on a few held-out prompts, for a person: tables over time, and tokens under the microscope."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.callbacks.baseline import is_baseline
from lit_rlhf.callbacks.showing import show_image, show_table
from lit_rlhf.callbacks.token_image import token_image
from lit_rlhf.callbacks.token_page import token_page
from lit_rlhf.errors import require, require_types
from lit_rlhf.files import strict_json, write_lines

LINES, PAGE = "samples.jsonl", "samples.html"
TEXTS = ("prompt", "completion", "reference_completion")
MARKS = str.maketrans({mark: f"&#{ord(mark)};" for mark in "\\`*_{}[]()+-.!|~"})  # that Markdown would read
Validation = dict[str, Any]  # {"step", "samples": [{"row", "pieces", "readings"}]}


class SampleTable(Callback):
    """Show what the model answers to the same held-out prompts at each validation, the one before training included.

    TensorBoard's Text tab has a table for each prompt (before training, last time, now, and the completion that the
    data have), its Images tab the tokens coloured by what the stage knows. The run's folder has `samples.html`, all
    validations with a slider, and `samples.jsonl`, their numbers. W&B and MLflow get table and picture.

    Args:
        num_prompts: rows of the table; 0 = none.
        page: write `samples.html` and `samples.jsonl` into the run's folder.
    """

    def __init__(self, num_prompts: int = 8, page: bool = True) -> None:
        require_types(SampleTable.__init__, locals())
        require(num_prompts >= 0, "num_prompts", num_prompts, "0 or more")
        self.num_prompts, self.page = num_prompts, page
        self.seen: list[Validation] | None = None  # of this run; None = not asked for yet

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Another run begins."""
        self.seen = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write table and page; all ranks complete the prompts, since sharded weights need them all."""
        assert isinstance(pl_module, AlignmentModule)
        data: Any = getattr(trainer, "datamodule", None)
        only_a_check = trainer.sanity_checking and not is_baseline(trainer)
        if self.num_prompts == 0 or only_a_check or not hasattr(data, "sample_prompts"):
            return
        prompts = data.sample_prompts(self.num_prompts)
        with trainer.precision_plugin.forward_context():
            samples = [] if prompts is None else pl_module.samples(prompts)
        if samples and trainer.is_global_zero:
            self.show(trainer, {"step": trainer.global_step, "samples": [sample._asdict() for sample in samples]})

    def show(self, trainer: Trainer, now: Validation) -> None:
        """Hand a validation to the loggers, and write all of them beside the run."""
        fits, folder = trainer.state.fn == TrainerFn.FITTING, Path(trainer.default_root_dir)
        if self.seen is None:
            self.seen = earlier(folder / LINES, now["step"]) if fits and trainer.ckpt_path else []
        self.seen = [one for one in self.seen if one["step"] != now["step"]] + [now]
        picture = token_image(now["samples"])
        for logger in trainer.loggers:
            show_table(logger, "samples", markdown(self.seen), [s["row"] for s in now["samples"]], now["step"])
            show_image(logger, "samples/tokens", picture, now["step"])
        if self.page and fits and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_lines((strict_json(one, ensure_ascii=False) for one in self.seen), folder / LINES)
            write_lines([token_page(self.seen)], folder / PAGE)


def earlier(file: Path, step: int) -> list[Validation]:
    """The validations before a step that a resumed run has already written."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [one for one in map(json.loads, lines) if one["step"] < step]


def markdown(validations: Sequence[Validation]) -> str:
    """A section for each prompt: what was answered before training, last time and now, and by the data, in rows.

    The table has one column: of several, TensorBoard makes narrow ones and breaks them within their words.
    """
    chosen = list({one["step"]: one for one in (validations[0], *validations[-2:])}.values())
    sections = []
    for number, sample in enumerate(validations[-1]["samples"]):
        rows = [(when(one["step"]), one["samples"][number]["row"]) for one in chosen if number < len(one["samples"])]
        lines = [f"| **{said}**{numbers(row)}<br>{cell(row['completion'])} |" for said, row in rows]
        if known := sample["row"].get("reference_completion"):
            lines.append(f"| **data**<br>{cell(known)} |")
        head = f"**{number + 1}.** {cell(sample['row']['prompt'])}"
        sections.append("\n".join([head, "", "| |", "| --- |", *lines]))
    return "\n\n".join(sections)


def when(step: int) -> str:
    """A step in words."""
    return f"step {step:,}" if step else "before"


def numbers(row: dict[str, Any]) -> str:
    """All of a row that is no text; a line may end between two of them."""
    values = {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in row.items()}
    told = (cell(f"{name} {value}").replace(" ", "&nbsp;") for name, value in values.items() if name not in TEXTS)
    return "".join(f" · {one}" for one in told)


def cell(text: Any) -> str:
    """Text as it is, in one line: neither HTML nor Markdown."""
    return "<br>".join(html.escape(str(text), quote=False).translate(MARKS).splitlines())
