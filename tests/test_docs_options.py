"""Options and metrics that pages name exist."""

import inspect
import re
from pathlib import Path

import pytest
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

import lit_rlhf
from lit_rlhf import GenerationSettings, KLPenalty, LoRA, ReferenceUpdate, RewardShaping
from lit_rlhf.callbacks import HuggingFaceExport

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PUBLIC = [getattr(lit_rlhf, name) for name in lit_rlhf.__all__]
CLASSES = {
    "model": [found for found in PUBLIC if isinstance(found, type) and issubclass(found, LightningModule)],
    "data": [found for found in PUBLIC if isinstance(found, type) and issubclass(found, LightningDataModule)],
    "trainer": [Trainer],
    "export": [HuggingFaceExport],
}
PARTS = {
    "lora": LoRA,
    "shaping": RewardShaping,
    "generation": GenerationSettings,
    "kl_penalty": KLPenalty,
    "reference_update": ReferenceUpdate,
}  # of which an option is named without `init_args`
NO_OPTIONS = {"model.config.score_bias", "trainer.init_module", "model.safetensors.index.json"}  # Python, and a file
OPTION = r"\b(?:model|data|trainer|export)\.[a-z_]\w*(?:\.\w+)*"


def arguments(found):
    """The names of a constructor's arguments, those of its bases included."""
    return {name for base in found.__mro__ if "__init__" in vars(base) for name in inspect.signature(base).parameters}


KNOWN = {start: set().union(*map(arguments, classes)) for start, classes in CLASSES.items()}


def unknown(option):
    """Whether an option, as `model.lora.r`, is of no module, data module or Trainer."""
    start, name, *rest = option.replace(".init_args", "").split(".")
    if name == "help":  # which every part has
        return False
    if name not in KNOWN[start]:
        return True
    return name in PARTS and bool(rest) and rest[0] not in arguments(PARTS[name])


def named(text):
    """Options in code font, and those of commands."""
    spans = [*re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)), *re.findall(r"--(\S+)", text)]
    found = {option.strip(" (-") for span in spans for option in re.findall(rf"(?:^|[ (-]){OPTION}", span)}
    return found - NO_OPTIONS


def ours(page):
    """The text of a page, without the first column of tables in which it is another library's, `data.…` or not."""
    text = page.read_text()
    return re.sub(r"^\| .*? \| ", "| ", text, flags=re.M) if page.name == "coming_from.md" else text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_options_that_a_page_names_exist(page):
    assert {option for option in named(ours(page)) if unknown(option)} == set()


def test_the_table_of_another_library_names_options_and_an_unknown_one_is_found():
    options = named(ours(ROOT / "docs" / "coming_from.md"))
    assert {"model.beta", "data.group_size", "model.lora.r", "trainer.precision", "export.which"} <= options
    assert all(map(unknown, ("model.betta", "data.beta", "model.lora.rank", "trainer.beta", "model.shaping.floor")))


@pytest.mark.parametrize(
    "page", ["coming_from.md", "troubleshooting.md", "sft.md", "reward_model.md", "which_method.md"]
)
def test_public_names_and_metrics_that_a_page_names_exist(page):
    text = (ROOT / "docs" / page).read_text()
    for path in set(re.findall(r"`[^`]*?(lit_rlhf(?:\.\w+)+)", text)):
        package, _, name = path.rpartition(".")
        assert hasattr(__import__(package, fromlist=[name]), name), path
    code = "".join(file.read_text() for file in (ROOT / "lit_rlhf").rglob("*.py"))
    for metric in set(re.findall(r"`(?:train|val|rollout|ppo|dpo|perf)/(\w+)`", text)):
        assert re.search(rf"\b{metric}\b", code), metric
