"""What is read of a checkpoint without its run: of one file, and of the shards that FSDP2 writes."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as sharded
from safetensors.torch import save_file

from lit_rlhf import SFT, UserError
from lit_rlhf.algorithms.checkpoint import DEEPSPEED, META, VERSION, read_facts, read_weights, require_location
from tests.tiny import save_tiny

FACTS = {"global_step": 7, "epoch": 2, "reward_model": {"shift": 0.25}}
WEIGHTS = {
    "policy.model.layers.0.weight": torch.arange(6.0).view(2, 3),
    "policy.model.norm.weight": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    "critic.model.layers.0.weight": torch.zeros(2),
}


def in_one_file(folder):
    torch.save({**FACTS, "state_dict": WEIGHTS}, folder / "step=7.ckpt")
    return folder / "step=7.ckpt"


def in_shards(folder):
    """As Lightning's ModelParallelStrategy lays it out: shards, and all but tensors in a file beside them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process writes them
        sharded.save({"state_dict": dict(WEIGHTS)}, checkpoint_id=folder / "step=7.ckpt", no_dist=True)
    torch.save(FACTS, folder / "step=7.ckpt" / META)
    return folder / "step=7.ckpt"


def in_parts(folder):
    """As DeepSpeed lays it out."""
    for name in (DEEPSPEED, "latest"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


KINDS = pytest.mark.parametrize("write", [in_one_file, in_shards])


@KINDS
def test_the_facts_are_those_that_were_written(write, tmp_path):
    facts = read_facts(write(tmp_path))
    assert {name: facts[name] for name in FACTS} == FACTS
    assert all(tensor.is_meta for tensor in facts.get("state_dict", {}).values())  # names and shapes alone


@KINDS
def test_the_weights_of_one_network_have_the_names_values_and_precision_of_its_model(write, tmp_path):
    weights = read_weights(str(write(tmp_path)), "policy")
    assert weights.keys() == {"layers.0.weight", "norm.weight"}
    for name, tensor in weights.items():
        expected = WEIGHTS[f"policy.model.{name}"]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)


@KINDS
def test_a_network_that_is_not_there_has_no_weights(write, tmp_path):
    assert read_weights(write(tmp_path), "reference") == {}


FILES = {  # what else may be at a path -> how it gets there, and what is said of it
    "text": (lambda file: file.write_text("hello"), "a.ckpt is no checkpoint of the Trainer's"),
    "nothing": (lambda file: file.touch(), "a.ckpt is no checkpoint of the Trainer's"),
    "no file": (lambda file: None, "there is no checkpoint .*a.ckpt"),
    "exported weights": (lambda file: save_file(WEIGHTS, file), "a.ckpt is no checkpoint of the Trainer's"),
    "a list": (lambda file: torch.save([1], file), "a.ckpt is no checkpoint of the Trainer's"),
    "a model's folder": (lambda file: save_tiny(file), "a.ckpt is no checkpoint of the Trainer's"),
    "an empty folder": (lambda file: file.mkdir(), "a.ckpt is no checkpoint of the Trainer's"),
    "shards": (lambda file: in_shards(file.parent).rename(file), "a.ckpt is a sharded checkpoint: make one file of it"),
    "DeepSpeed's": (lambda file: in_parts(file), "a.ckpt is of DeepSpeed: have its model written by lit-rlhf export"),
    "objects": (lambda file: torch.save({"a": Path("b")}, file), "a.ckpt is damaged, or holds more than tensors"),
    "odd arguments": (
        lambda file: torch.save({VERSION: "2.6", "hyper_parameters": 3}, file),
        "a.ckpt is damaged: its hyper_parameters is no mapping",
    ),
    "odd weights": (lambda file: torch.save({VERSION: "2.6", "state_dict": [1]}, file), "its state_dict is no mapping"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_module_is_loaded_from_checkpoints_alone_and_any_other_file_is_one_line(kind, tmp_path):
    write, words = FILES[kind]
    write(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=f"^checkpoint_path: .*{words}[^\n]*$"):
        SFT.load_from_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("place", ["meta", torch.device("meta"), {"cpu": "meta"}])
def test_weights_are_not_loaded_to_where_they_have_no_numbers(place):
    with pytest.raises(UserError, match=r"^map_location \(.*\) must be a device that holds numbers, such as cpu$"):
        require_location(place)


def test_a_place_for_weights_is_one_that_torch_knows():
    for place in (None, "cpu", torch.device("cpu"), {"cuda:0": "cpu"}, lambda storage, _: storage):
        require_location(place)
    for place in ("bogus", 3, [1]):
        with pytest.raises(UserError, match=r"^map_location \(.*\) cannot be loaded to: [^\n]*$"):
            require_location(place)
    with pytest.raises(UserError, match=r"^map_location"):  # before the file is read
        SFT.load_from_checkpoint("a.ckpt", map_location="meta")
