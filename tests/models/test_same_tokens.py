"""Networks that read the policy's ids mean the same words by them, or are refused."""

import json

import pytest
import torch

from lit_rlhf import DPO, PPO, RewardModel, RewardModelReward, UserError
from lit_rlhf.callbacks.export import export
from lit_rlhf.cli.compare import compare
from lit_rlhf.engine.sharding import full_state_dict
from tests.tiny import save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two policies of equal shape, of which one has two words in each other's place, and its reward model."""
    root = tmp_path_factory.mktemp("tokens")
    save_tiny(root / "ours" / "model")
    file = save_tiny(root / "theirs" / "model") / "tokenizer.json"
    text = json.loads(file.read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["w3"], vocabulary["w4"] = vocabulary["w4"], vocabulary["w3"]
    file.write_text(json.dumps(text))
    module = RewardModel(str(root / "theirs" / "model"))
    export(module, full_state_dict(module.exportable()), root / "scorer" / "model")
    (root / "prompts.jsonl").write_text('{"prompt": "w3 w4"}\n')
    return root


USES = {
    "critic": lambda root: PPO(f"{root}/ours/model", critic=f"{root}/scorer/model"),
    "reference": lambda root: DPO(f"{root}/ours/model", reference=f"{root}/theirs/model"),
    "reward model": lambda root: RewardModelReward(f"{root}/scorer/model").bind(tiny_tokenizer(), torch.device("cpu")),
    "policy": lambda root: compare(
        root, ("ours", "theirs"), None, str(root / "prompts.jsonl"), gold=lambda prompts, responses, **_: [0.0]
    ),
}


@pytest.mark.parametrize("role", sorted(USES))
def test_a_network_with_another_tokenizer_is_refused_by_its_role(role, root):
    with pytest.raises(UserError, match=rf"^{role} .*theirs|^{role} .*scorer") as error:
        USES[role](root)
    assert "was trained with another tokenizer than the policy (40 against 40 tokens" in str(error.value)
    assert "('w3', 3)" in str(error.value)


def test_a_network_with_the_policys_tokenizer_is_taken(root):
    PPO(f"{root}/theirs/model", critic=f"{root}/scorer/model")
    DPO(f"{root}/theirs/model", reference=f"{root}/theirs/model")
