"""Options of the Trainer that are classes are answered, where they name none, with what is expected and an example."""

import pytest
import yaml

from lit_rlhf import UserError
from lit_rlhf.cli.yaml_classes import TRAINER, check_of_trainer
from lit_rlhf.cli.yaml_files import check_configs
from tests.cli.command_line import run

NO_CLASSES = {  # option and value -> what is found
    "callbacks: {early_stopping: {monitor: x}}": "a mapping of early_stopping",
    "callbacks: {monitor: x, patience: 3}": "a mapping of monitor, patience",
    "callbacks: [{EarlyStopping: {monitor: x}}]": "a mapping of EarlyStopping in the list",
    "callbacks: [RichProgressBar, 3]": "3 in the list",
    "callbacks: [[RichProgressBar]]": "a list in the list",
    "callbacks: [null]": "null in the list",
    "callbacks: {}": "an empty mapping",
    "callbacks: true": "true",
    "logger: {csv: {save_dir: x}}": "a mapping of csv",
    "logger: [true]": "true in the list",
    "logger: 3": "3",
    "plugins: {mixed: 3}": "a mapping of mixed",
    "profiler: [simple]": "a list",
    "strategy: {ddp: {static_graph: true}}": "a mapping of ddp",
    "strategy: [ddp]": "a list",
}
CLASSES = [  # taken
    "callbacks: EarlyStopping",
    "callbacks: {class_path: RichProgressBar}",
    "callbacks: [RichProgressBar, {class_path: EarlyStopping, init_args: {monitor: x}}]",
    "callbacks: []",
    "callbacks: {init_args: {monitor: x}}",  # goes on an earlier config
    "logger: false",
    "logger: [{class_path: CSVLogger, init_args: {save_dir: x}}]",
    "strategy: ddp",
    "profiler:",
    "max_epochs: [1]",  # is no class
]


@pytest.mark.parametrize("given", NO_CLASSES)
def test_what_names_no_class_is_answered_with_file_line_option_and_an_example(given, tmp_path):
    file, option = tmp_path / "c.yaml", given.partition(":")[0]
    file.write_text(f"trainer:\n  max_steps: 1\n  {given}\n")
    with pytest.raises(UserError) as error:
        check_configs(["fit", f"--config={file}"], ["fit"])
    said = f"trainer.{option}: expected {TRAINER[option]}, found {NO_CLASSES[given]}"
    assert str(error.value) == f"{file}, line 3, {said}"
    value = given.partition(": ")[2]
    if value[0] in "{[":
        with pytest.raises(UserError) as error:
            check_configs(["fit", f"--trainer.{option}={value}"], ["fit"])
        assert str(error.value) == f"--{said}"


@pytest.mark.parametrize("given", CLASSES)
def test_what_names_classes_is_taken(given, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"trainer:\n  {given}\n")
    check_configs(["fit", "-c", str(file)], ["fit"])


@pytest.mark.filterwarnings("ignore")
def test_the_examples_are_right(capsys):
    examples = {option: expected.partition("such as ")[2] for option, expected in TRAINER.items()}
    for option, example in examples.items():
        check_of_trainer(option, yaml.compose(example))
    typed = [f"--trainer.{option}={example}" for option, example in examples.items()]
    assert run("fit", "--config=configs/sft.yaml", *typed, "--print_config") == 0
    written = capsys.readouterr().out
    assert all(name in written for name in ("EarlyStopping", "CSVLogger", "LightningEnvironment", "DDPStrategy"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("callbacks=[RichProgressBar,EarlyStoping]", "EarlyStopping"),
        ("callbacks=early_stopping", "EarlyStopping"),
        ("callbacks=SampleTabl", "lit_rlhf.callbacks.SampleTable"),
        ("logger=csv", "CSVLogger"),
    ],
)
def test_a_name_near_to_one_of_lightnings_or_ours_is_answered_with_it(typed, meant, capsys):
    assert run("fit", "--config=configs/sft.yaml", f"--trainer.{typed}") == 2
    assert f"; did you mean {meant}" in capsys.readouterr().err
