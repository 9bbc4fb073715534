"""Weights that are cut over ranks as they are read, on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_rlhf.models.holding import reading_in
from lit_rlhf.models.loading import load_policy
from tests.models.test_adapter_folders import pytestmark, save_adapter
from tests.tiny import SHAPE, save_tiny

__all__ = ["pytestmark"]
ROOT = Path(__file__).parents[2]
LARGE = LlamaConfig(
    **{**SHAPE, "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 2000, "num_hidden_layers": 8},
    num_key_value_heads=4,
)


def write(folder, dtype):
    """A model in several files, and an adapter on it."""
    save_tiny(folder / "model")
    model = load_policy(folder / "model").model.to(dtype)
    (folder / "model" / "model.safetensors").unlink()
    model.save_pretrained(folder / "model", max_shard_size="15KB")
    assert len(list((folder / "model").glob("model-*.safetensors"))) > 1
    save_adapter(folder / "adapter", folder / "model")


def read_on_two_ranks(folder):
    """What the script finds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'envs'}"}
    command = [sys.executable, str(ROOT / "tests" / "reading_script.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what memory is no file's")
def test_weights_in_pieces_are_those_of_whole_networks_to_the_bit_and_no_rank_holds_a_whole_one(tmp_path):
    write(tmp_path, torch.bfloat16)
    model = LlamaForCausalLM(LARGE)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "large")
    whole = 4 * sum(p.numel() for p in model.parameters()) / 2**20
    results = read_on_two_ranks(tmp_path)
    megabytes = results.pop("megabytes")
    assert len(results) > 5 and not any(results.values()), results
    # Policy, reference and critic in float32, half of each; whole they would take 3.
    assert megabytes < 2.25 * whole, megabytes / whole


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_files_of_other_dtypes_are_read_as_they_are_and_settle_in_float32(dtype, tmp_path):
    write(tmp_path, dtype)
    with reading_in(torch.float32, uncut=True):
        policy = load_policy(tmp_path / "model")
    assert {p.dtype for p in policy.parameters()} == {dtype}
    policy.settle()
    whole = load_policy(tmp_path / "model")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(policy.parameters(), whole.parameters(), strict=True))


def test_files_of_several_dtypes_are_cast_as_they_are_read(tmp_path):
    from safetensors.torch import load_file, save_file

    file = save_tiny(tmp_path / "model") / "model.safetensors"
    weights = load_file(file)
    mixed = {name: w.bfloat16() if "mlp" in name else w for name, w in weights.items()}
    save_file(mixed, file, metadata={"format": "pt"})
    with reading_in(torch.float32, uncut=True):
        policy = load_policy(tmp_path / "model")
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
