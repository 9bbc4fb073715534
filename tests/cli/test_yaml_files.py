"""Configs that are no YAML, or mean something else than they seem to, are told by file and line."""

import os
from pathlib import Path

import pytest

from lit_rlhf import UserError
from lit_rlhf.cli.yaml_files import check_configs, config_files, configs_first, place_of_option, read_tree, typed_places
from tests.cli.command_line import run

SFT = "model:\n  class_path: lit_rlhf.SFT\n  init_args:\n    policy: model\n"
DEEP = "a: " + "[" * 60 + "]" * 60
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
ACCIDENTS = {  # what a file holds -> what is said of it
    "trainer: [1\nmodel: :\n": r"c.yaml, line 1: while parsing a flow sequence.* up to line 2",
    "trainer:\n\tmax_steps: 1\n": r"c.yaml, line 2: .*; indent by spaces, not by tabs",
    f"{SFT}data: a: b\n": r"c.yaml, line 5: mapping values are not allowed.*; quote text",
    "policy: @model\n": r"c.yaml, line 1: .*; quote text",
    f"{SFT}trainer: *nope\n": r"c.yaml, line 5: found undefined alias",
    "a: 1\n---\nb: 2\n": r"c.yaml, line 1: expected a single document.* up to line 2",
    "- a\n- b\n": r"c.yaml: expected a mapping of options, such as .*, found a list",
    "hello\n": r"c.yaml: expected a mapping of options, such as .*, found text",
    "": r"c.yaml: expected a mapping of options, such as .*, found nothing",
    "# nothing\n": r"c.yaml: expected a mapping of options, such as .*, found nothing",
    "null\n": r"c.yaml: expected a mapping of options, such as .*, found nothing",
    "a: b\x07c\n": r"c.yaml, line 1: a config is text, and this is the control character",
    b"model: latin\xe9\n": r"c.yaml, line 1: byte 0xe9 is not UTF-8; save the file as UTF-8",
    b"a: 1\nb: \xff\n": r"c.yaml, line 2: byte 0xff is not UTF-8",
    "a: 1".encode("utf-16"): r"c.yaml is not text in UTF-8 \(it may be UTF-16",
    "a: 1".encode("utf-16-le"): r"c.yaml is not text in UTF-8 \(it may be UTF-16",
    "model:\n  class_path: lit_rlhf.SFT\ninit_args: {policy: model}\n": r"c.yaml, line 3: init_args stands at the top",
    b"\x00\x01": r"c.yaml is not text in UTF-8",
    f"{SFT}model: 3\n": r"c.yaml, line 5: model stands in line 1 too; keep one of them",
    f"{SFT}    policy: other\n": r"c.yaml, line 5: policy stands in line 4 too",
    "1: 2\n": r"c.yaml, line 1: the name of an option is text, found 1",
    "null: 2\n": r"c.yaml, line 1: the name of an option is text, found null",
    "a:\n  ? [b]\n  : c\n": r"c.yaml, line 2: the name of an option is text, found a list",
    "a: !!python/object/apply:os.system [x]\n": r"c.yaml, line 1: the tag !!python/object/apply:os.system makes",
    "a: !foo bar\n": r"c.yaml, line 1: the tag !foo makes objects; leave it out",
    "a: &a [*a]\n": r"c.yaml, line 1: an alias stands for what it is part of",
    DEEP: r"c.yaml, line 1: values stand more than 50 levels deep in each other",
    f"a: {'[' * 9999}{']' * 9999}": r"c.yaml.*: values stand more than 50 levels deep in each other",
    BOMB: r"c.yaml, line \d: more than 10000 values, aliases counted as what they stand for",
    "model:\n  policy: x\n": r"c.yaml, line 2, model: policy must stand below init_args, and class_path: lit_rlhf.SFT",
    "model:\n  class_path: a.B\n  beta: 2\n": r"c.yaml, line 3, model: beta must stand below init_args$",
    "data:\n  class_path: null\n": r"c.yaml, line 2, data.class_path: expected the import .*SFTDataModule, found null",
    "model:\n  class_path: [a]\n": r"c.yaml, line 2, model.class_path: .* found a list",
    "model:\n  class_path: a.B\n  init_args: [1]\n": r"c.yaml, line 3, model.init_args: expected a mapping",
    "trainer:\n  logger:\n  - class_path: L\n    init_args: 3\n": r"line 4, trainer.logger.init_args: .* found 3",
    "trainer: [1]\n": r"c.yaml, line 1, trainer: expected a mapping or a value, found a list",
    f"{SFT}seed_everything: [1]\n": r"c.yaml, line 5, seed_everything: expected a mapping or a value, found a list",
    "trainer: 3\n": r"c.yaml, line 1, trainer: expected a mapping of options, found 3",
    f"{SFT}data: null\n": r"c.yaml, line 5, data: expected a class, such as .*SFTDataModule}, found null",
    "callbacks: [EarlyStopping]\n": r"c.yaml, line 1, callbacks: write it below trainer",
    "model:\n": r"c.yaml, line 1, model: expected a class, such as {class_path: lit_rlhf.SFT}, found nothing",
    "trainer:\nmodel:\n": r"c.yaml, line 1, trainer: expected a mapping of options, found nothing",
    "model: [a.B]\n": r"c.yaml, line 1, model: expected a class, such as {class_path: lit_rlhf.SFT}, found a list",
    "fit:\n  trainer: {}\n": r"c.yaml, line 1: options stand at the top of the file, without 'fit:' above them",
    "x" * (2**20 + 1): r"c.yaml holds 1 MB, which is no config: is it data\?",
}


@pytest.mark.parametrize("content", ACCIDENTS, ids=lambda content: ACCIDENTS[content][:50])
def test_an_accident_in_a_yaml_is_told_by_file_and_line(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=ACCIDENTS[content]) as error:
        check_configs(["fit", "--config=c.yaml"], ["fit"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "content",
    [
        SFT.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + SFT.encode(),
        b"base: &base {policy: model}\nmodel:\n  class_path: lit_rlhf.SFT\n  init_args: {<<: *base}\n",
        b"model: lit_rlhf.SFT\n",
        b"model:\n  init_args: {policy: x}\n",  # goes on an earlier config
        b'{"model": {"class_path": "lit_rlhf.SFT"}}',
        b"trainer: {callbacks: {class_path: C, init_args: {scheduling: {0: 4}}}}\n",
        b"trainer: {logger: {class_path: CSVLogger, init_args: {save_dir: .}}}\n",
    ],
)
def test_what_yaml_allows_and_means_what_it_seems_to_is_taken(content, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    check_configs(["fit", "--config", str(file)], ["fit"])


def test_what_is_no_file_is_told_at_once_with_the_nearest_that_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").touch()
    os.mkfifo("pipe.yaml")
    for argument, words in {
        "stf.yaml": r"--config: there is no file stf.yaml; did you mean sft.yaml\?",
        "nowhere/x.yaml": "--config: there is no file nowhere/x.yaml$",
        "nowhere/dpo.yaml": r"no file nowhere/dpo.yaml; did you mean /.*/configs/dpo.yaml\?$",
        "configs/overlays/lora.yaml": r"did you mean /.*/configs/overlays/lora.yaml\?$",
        ".": r"--config: \. is a folder, not a file",
        "pipe.yaml": "--config: pipe.yaml is a pipe or a device, not a file",
        "/dev/null": "/dev/null is a pipe or a device",
        "https://x.org/sft.yaml": "^--config: https://x.org/sft.yaml is an address, and a config is a local file; down",
        "hf://a/b/c.yaml": "^--config: hf://a/b/c.yaml is an address",
    }.items():
        with pytest.raises(UserError, match=words):
            check_configs(["fit", "-c", argument], ["fit"])


def test_a_config_before_the_command_has_its_options_below_the_commands_name(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("fit: {seed_everything: 1}\n")
    check_configs([f"--config={file}", "fit"], ["fit", "test"])
    file.write_text("seed_everything: 1\n")
    check_configs(["fit", f"--config={file}"], ["fit", "test"])
    with pytest.raises(UserError, match=f"name it after the command, as in lit-rlhf fit --config {file}"):
        check_configs([f"--config={file}", "fit"], ["fit", "test"])
    for content, option in (("fit: 3", "fit"), ("fit: text", "fit"), ("fit: {trainer: 3}", "trainer")):
        file.write_text(content)
        with pytest.raises(UserError, match=f"line 1, {option}: expected a mapping of options, found"):
            check_configs([f"--config={file}", "fit"], ["fit", "test"])


def test_the_files_of_a_command_line_are_its_configs_and_parts_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").touch()
    argv = ["fit", "-c", "a.yaml", "--config=b.yaml", "--trainer=t.yaml", "--data.train=t.yaml", "--config={a: 1}"]
    assert config_files([*argv, "--model", "gone.yaml", "--config="]) == [
        Path("a.yaml"),
        Path("b.yaml"),
        Path("t.yaml"),
    ]


def test_an_option_is_found_by_the_end_of_its_name_and_by_its_value(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "model:\n  init_args:\n    seed: 1\ndata:\n  init_args:\n    seed: x\ntrainer:\n  callbacks:\n"
        "  - class_path: C\n    init_args:\n      monitor: 3\n"
    )
    argv = ["fit", "--config", str(file)]
    assert str(place_of_option(argv, "seed", "1")) == f"{file}, line 3, model.seed"
    assert str(place_of_option(argv, "seed")) == f"{file}, line 6, data.seed"
    assert str(place_of_option(argv, "model")) == f"{file}, line 1, model"
    assert str(place_of_option(argv, "monitor")) == f"{file}, line 11, trainer.callbacks.monitor"
    assert place_of_option(argv, "eed") is None
    assert read_tree(file).value[0][0].value == "model"
    file.write_text("data:\n  init_args:\n    train:\n    - a.jsonl\n    - b.jsonl\n")
    assert str(place_of_option(argv, "train", "b.jsonl")) == f"{file}, line 5, data.train"
    assert str(place_of_option(argv, "train")) == f"{file}, line 3, data.train"


@pytest.mark.filterwarnings("ignore")
def test_a_value_in_a_config_is_told_with_its_file_line_and_option(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(f"{SFT}data:\n  class_path: lit_rlhf.SFTDataModule\n  init_args:\n    max_tokens: many\n")
    assert run("fit", "--config", file) == 2
    said = capsys.readouterr().err.split("error: ")[-1]
    assert said.startswith(f"{file}, line 8, data.max_tokens: expected a whole number, or null, got many\n")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["Model", "models", "optimizer"])
def test_a_part_that_there_is_not_is_told_with_its_file_and_line(part, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(f"{SFT}{part}:\n  class_path: lit_rlhf.SFT\n  init_args:\n    lr: 1\n")
    assert run("fit", "--config", file) == 2
    said = capsys.readouterr().err.split("error: ")[-1]
    assert said.startswith(f"{file}, line 8: there is no option {part}.lr")


def test_arguments_in_a_list_without_their_class_are_refused_by_file_and_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("trainer:\n  callbacks:\n    - init_args: {monitor: val/loss}\n")
    with pytest.raises(UserError, match=r"c\.yaml, line 3, trainer\.callbacks: init_args stand without a class_path"):
        check_configs(["fit", f"--config={file}"], ["fit"])


@pytest.mark.parametrize("typed", [["--config="], ["--config", ""], ["-c", " "]])
def test_a_config_without_a_name_is_refused(typed):
    with pytest.raises(UserError, match=r"^--config: expected the name of a YAML file, got empty text$"):
        check_configs(["fit", *typed], ["fit"])


def test_options_that_are_written_out_in_a_mapping_are_found_with_their_values():
    argv = ["fit", "--model.lora={r: 4, init_args: {init: x}}", "--a", "[{b: 1}, c]", "--d={", "--e"]
    assert list(typed_places(argv)) == [
        ("--model.lora", "{r: 4, init_args: {init: x}}"),
        ("--model.lora.r", "4"),
        ("--model.lora.init", "x"),
        ("--a", "[{b: 1}, c]"),
        ("--a.b", "1"),
        ("--d", "{"),
        ("--e", ""),
    ]


def test_a_template_that_is_typed_names_no_options_though_yaml_reads_its_braces_as_mappings():
    argv = ["fit", "--data.chat_template={{ messages + 1 }}", "--a={? [b] : 1}"]
    assert list(typed_places(argv)) == [("--data.chat_template", "{{ messages + 1 }}"), ("--a", "{? [b] : 1}")]


@pytest.mark.parametrize(("encoding", "right"), [("utf-8", True), ("ascii", False), ("latin-1", False)])
def test_a_config_with_letters_that_the_locale_would_misread_is_told_by_line(encoding, right, tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda setlocale: encoding)
    (tmp_path / "a.yaml").write_text("trainer: {}\nckpt_path: ü\n", encoding="utf-8")
    if right:
        read_tree(tmp_path / "a.yaml")
        return
    with pytest.raises(UserError, match=r"a\.yaml, line 2: has letters .*set LC_ALL=C\.UTF-8"):
        read_tree(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("fit --a=1 --config x.yaml --b 2 -c=y.yaml", "fit --config x.yaml -c=y.yaml --a=1 --b 2"),
        ("fit --config=x.yaml --a=1", "fit --config=x.yaml --a=1"),
        ("--config x.yaml fit --a=1", "--config x.yaml fit --a=1"),
        ("fit --a --config", "fit --config --a"),
    ],
)
def test_configs_go_before_what_is_typed_wherever_they_stand(typed, read):
    assert configs_first(typed.split()) == read.split()
    assert configs_first([]) == []


@pytest.mark.filterwarnings("ignore:LightningCLI's args")
def test_what_is_typed_before_a_config_holds_and_an_overlay_before_its_config_is_told_where_it_belongs(
    tmp_path, capsys
):
    config, overlay = tmp_path / "config.yaml", tmp_path / "overlay.yaml"
    config.write_text("model:\n  class_path: lit_rlhf.DPO\n  init_args: {policy: demo, beta: 0.5}\n")
    overlay.write_text("model:\n  init_args:\n    beta: 0.3\n")
    assert run("fit", "--model.beta=0.2", "--config", config, "--print_config") == 0
    assert "beta: 0.2" in capsys.readouterr().out
    assert run("fit", "--config", overlay, "--config", config) == 2
    told = capsys.readouterr().err
    assert "overlay.yaml, line 3: model.beta stands before the config that names a class for model" in told
    assert f"give --config={overlay} after that one" in told
    assert run("fit", "--config", config, "--config", overlay, "--print_config") == 0
    assert "beta: 0.3" in capsys.readouterr().out
