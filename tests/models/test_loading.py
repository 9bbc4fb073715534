import json
import shutil
import sys

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, MambaConfig

from lit_rlhf import DPO, PPO, RewardModel, RewardModelReward, UserError
from lit_rlhf.callbacks.export import export
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.models.loading import load_policy, load_scorer, scorer_from_policy
from lit_rlhf.models.policy import Policy
from tests.tiny import (
    tiny_policy,
)


def test_from_scratch_ignores_the_stored_weights(folder):
    stored, fresh = load_policy(folder), load_policy(folder, from_scratch=True)
    assert stored.model.config.hidden_size == fresh.model.config.hidden_size
    assert not torch.equal(stored.head.weight, fresh.head.weight)


def test_a_missing_model_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no model could be loaded there.*there is no folder .*nowhere"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no weights: SFT trains it with from_scratch: true"):
        load_policy("demo")


def test_a_critic_is_refused_where_transformers_has_no_class_for_it():
    config = MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UserError, match="no sequence classification model for MambaConfig"):
        scorer_from_policy(Policy(AutoModelForCausalLM.from_config(config)))


def test_the_score_head_is_drawn_from_a_normal_of_one_over_root_d_plus_one(folder):
    weights = torch.cat([load_scorer(folder, fresh_head=True).model.score.weight.flatten() for _ in range(40)])
    d = 32
    assert weights.std().item() == pytest.approx((d + 1) ** -0.5, rel=0.1)


def test_a_reward_model_is_no_policy(folder, tmp_path):
    scorer = load_scorer(folder, fresh_head=True)
    scorer.model.save_pretrained(tmp_path / "scorer")
    with pytest.raises(UserError, match=r"holds a reward model .* not a policy"):
        load_policy(tmp_path / "scorer")


def test_a_causal_lm_is_no_reward_model(folder):
    with pytest.raises(UserError, match="holds no trained reward head"):
        load_scorer(folder)


def test_a_critic_from_the_policy_shares_its_trunk_but_no_memory():
    policy = tiny_policy()
    critic = scorer_from_policy(policy)
    ours, theirs = policy.model.base_model.state_dict(), critic.model.base_model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in critic.parameters()}


REMOTE_CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnForSequenceClassification(LlamaPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
"""


def bring_code(folder, architecture):
    """Turn a folder of Llama weights into one whose classes come with it."""
    (folder / "modeling_own.py").write_text(REMOTE_CODE)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        "AutoModelForSequenceClassification": "modeling_own.OwnForSequenceClassification",
    }
    config |= {"model_type": "own", "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_that_comes_with_weights_runs_in_every_role_if_trusted_and_in_none_if_not(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("builtins.input", lambda *_: "n")  # transformers would ask a person
    language_model = str(bring_code(shutil.copytree(folder, tmp_path / "lm"), "OwnForCausalLM"))
    trained = RewardModel(language_model, trust_remote_code=True)
    export(trained, full_state_dict(trained.exportable()), tmp_path / "rm")
    reward_model = str(bring_code(tmp_path / "rm", "OwnForSequenceClassification"))

    roles = {
        "policy": lambda trust: PPO(language_model, trust_remote_code=trust),
        "critic": lambda trust: PPO(language_model, critic=reward_model, trust_remote_code=trust),
        "reference": lambda trust: DPO(language_model, reference=language_model, trust_remote_code=trust),
        "reward": lambda trust: RewardModelReward(reward_model, trust_remote_code=trust),
    }
    for make in roles.values():
        make(True)
        with pytest.raises(UserError, match="if you trust that code, set trust_remote_code: true"):
            make(False)
    critic = roles["critic"](True).critic
    assert type(critic.model).__name__ == type(PPO(language_model, trust_remote_code=True).critic.model).__name__
    assert type(critic.model).__name__ == "OwnForSequenceClassification"
