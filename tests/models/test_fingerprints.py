import os
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_rlhf import UserError
from lit_rlhf.engine.memory import shapes
from lit_rlhf.models.fingerprints import fingerprint, fingerprints, require_same
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("fingerprints") / "model")


def test_the_same_weights_have_one_fingerprint_wherever_and_whenever_they_were_written(model, tmp_path):
    copied = shutil.copytree(model, tmp_path / "copied")
    os.utime(copied / "model.safetensors", (1, 1))
    (copied / "consolidated.safetensors").write_bytes(b"of another library: no model is read from it")
    dealt = tmp_path / "dealt"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(dealt, max_shard_size="10KB")
    assert len(list(dealt.glob("*.safetensors"))) > 1
    assert fingerprint(str(model)) == fingerprint(str(copied)) == fingerprint(str(dealt))


@pytest.mark.parametrize(
    "change",
    [
        lambda name, weight: (name, weight * 1.0001 if name == "model.norm.weight" else weight),
        lambda name, weight: (f"{name}s", weight),
        lambda name, weight: (name, weight.reshape(-1)),
        lambda name, weight: (name, weight.view(torch.int32)),
    ],
)
def test_another_number_name_shape_or_dtype_gives_another(model, tmp_path, change):
    before = fingerprint(str(model))
    other = shutil.copytree(model, tmp_path / "other")
    weights = dict(change(name, weight) for name, weight in load_file(other / "model.safetensors").items())
    assert fingerprint(str(other)) == before
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(str(other)) != before


def test_an_adapters_own_weights_are_those_of_its_folder(tmp_path):
    for scale in (1.0, 2.0):
        (tmp_path / f"{scale}").mkdir()
        save_file({"lora_A": torch.full((2,), scale)}, tmp_path / f"{scale}" / "adapter_model.safetensors")
    marks = fingerprints([str(tmp_path / "1.0"), str(tmp_path / "2.0")])
    assert len(set(marks.values())) == 2


def test_what_holds_no_weights_has_none(tmp_path):
    assert fingerprints([str(tmp_path), str(tmp_path / "gone"), "nobody/nothing-at-all"]) == {}


def test_what_is_planned_on_shapes_reads_no_weights(model):
    with shapes():
        assert fingerprint(str(model)) is None


def test_of_a_name_on_the_hub_the_weights_in_the_cache_count(model, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--owner--name"
    shutil.copytree(model, place / "snapshots" / "c0ffee")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("c0ffee")
    assert fingerprint("owner/name") == fingerprint(str(model))


def test_a_checkpoint_goes_on_from_the_same_weights_under_whatever_name():
    require_same({"policy": {"a": "1"}}, {"policy": {"b": "1"}})
    require_same({"reference": {"a": "1"}}, {"policy": {"a": "2"}})  # which this run has not
    require_same({}, {"policy": {"a": "2"}})  # of before there were fingerprints


@pytest.mark.parametrize("given", ["x", [1], {"policy": "x"}, {"policy": [1]}, {"policy": {"a": 3}}, {3: 3}])
def test_what_names_no_weights_by_role_is_refused_by_file_and_place(given):
    with pytest.raises(UserError, match=r"^ckpt_path: a\.ckpt is damaged, .* its stands_on\S*: expected (a map|text)"):
        require_same(given, {"policy": {"a": "1"}}, file="a.ckpt")


@pytest.mark.parametrize(
    ("given", "mine", "words"),
    [
        (
            {"a": "1"},
            {"a": "2"},
            r"ckpt_path: a, which the critic of its run stood on, holds other weights now: it was",
        ),
        ({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, "ckpt_path: b, which the critic"),
        ({"a": "1"}, {"b": "2"}, "the critic of its run stood on a, and b holds other weights. Put the old weights ba"),
        ({"a": "1", "b": "2"}, {"a": "1"}, "ckpt_path: b, which the critic"),
    ],
)
def test_other_weights_are_refused_by_their_folder(given, mine, words):
    with pytest.raises(UserError, match=words) as caught:
        require_same({"critic": given}, {"critic": mine})
    assert "or start a new run from what lit-rlhf export makes" in str(caught.value)
    with pytest.raises(UserError, match="of no use without them"):
        require_same({"critic": given}, {"critic": mine}, adapter="critic")


@pytest.mark.parametrize(
    ("given", "mine"),
    [
        ({"policy": {"a": "1"}}, {"policy": {"a": "1", "b": "2"}}),  # an adapter under the one that learns
        ({"policy": {"a": "1"}, "reference": {}}, {"policy": {"a": "1"}, "reference": {"b": "2"}}),
        ({"policy": {"a": "1"}, "reference": {"a": "1"}}, {"policy": {"a": "1"}, "reference": {"a": "1", "b": "2"}}),
    ],
)
def test_weights_that_its_run_did_not_stand_on_are_refused_by_their_folder(given, mine):
    with pytest.raises(
        UserError, match=r"^ckpt_path: the \w+ of its run did not stand on b, and this run's does: give"
    ):
        require_same(given, mine, adapter="policy")


def test_a_reference_may_move_off_the_base_and_one_of_a_whole_policy_be_held_again():
    require_same({"policy": {"a": "1"}, "reference": {}}, {"policy": {"a": "1"}, "reference": {"c": "1"}}, "policy")
    require_same({"policy": {}, "reference": {}}, {"policy": {}, "reference": {"a": "1"}}, "policy")
