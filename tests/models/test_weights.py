import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_rlhf import SFT, UserError
from lit_rlhf.callbacks.export import export
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.models.loading import load_policy


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
