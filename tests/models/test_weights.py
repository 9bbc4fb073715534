import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from lit_rlhf import SFT, RewardModel, UserError
from lit_rlhf.callbacks.export import export
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.models.loading import load_policy
from tests.tiny import SHAPE


@pytest.mark.parametrize("left", [0, 5000])
def test_weights_that_were_cut_short_are_named_with_their_folder(left, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:left])
    with pytest.raises(UserError, match=r"broken: damaged or cut short, copy it anew: model\.safetensors \("):
        load_policy(broken)


def test_a_head_apart_from_the_embeddings_is_kept_whatever_the_config_says_and_exported(folder, tmp_path):
    apart = shutil.copytree(folder, tmp_path / "apart")
    weights = load_file(apart / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(40, 32)
    save_file(weights, apart / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((apart / "config.json").read_text())["tie_word_embeddings"]
    module = SFT(str(apart))
    export(module, full_state_dict(module.exportable()), tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(exported.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(exported.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    assert not exported.config.tie_word_embeddings


@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, LlamaForCausalLM])
def test_a_reward_model_starts_from_folders_without_a_generation_config_and_is_exported(kind, folder, tmp_path):
    start = shutil.copytree(folder, tmp_path / "start")
    (start / "generation_config.json").unlink()
    model = kind.from_pretrained(start, num_labels=1)
    if kind is LlamaForSequenceClassification:
        model.save_pretrained(start)
    module = RewardModel(str(start))
    export(module, full_state_dict(module.exportable()), tmp_path / "out")
    exported = LlamaForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(exported.score.weight, module.reward_model.model.score.weight)
    if kind is LlamaForSequenceClassification:
        assert torch.equal(exported.score.weight, model.score.weight)


def anonymous_mb():
    """Memory of this process that is no file's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says so")
def test_weights_are_in_memory_once_and_those_of_the_files_own_dtype_are_its_pages(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 8000}
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **sizes}, num_key_value_heads=4))
    megabytes = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
    load_policy(tmp_path / "torch.bfloat16")  # imports what there is to import
    grown = {}
    for dtype in (torch.float32, torch.bfloat16):
        before = anonymous_mb()
        policy = load_policy(tmp_path / str(dtype))
        grown[dtype] = (anonymous_mb() - before) / megabytes
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert grown[torch.float32] < 0.5 and grown[torch.bfloat16] < 1.5, grown
