import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MambaConfig

from lit_rlhf import DPO, PPO, RewardModel, RewardModelReward, UserError
from lit_rlhf.callbacks.export import export
from lit_rlhf.cli.compare import compare
from lit_rlhf.engine.packing import pack
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.models.decoding import SlotDecoder, sample
from lit_rlhf.models.loading import (
    keep_to_tokens,
    load_policy,
    load_policy_with_tokenizer,
    load_scorer,
    load_tokenizer,
    scorer_from_policy,
)
from lit_rlhf.models.policy import Policy, frozen_copy
from tests.tiny import (
    ARCHITECTURES,
    VOCABULARY,
    random_examples,
    save_padded,
    save_tiny,
    tiny_policy,
    tiny_tokenizer,
)

UNUSED = [20, *range(VOCABULARY, 56)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_policy_with_more_embeddings_than_tokens_is_that_without_them(architecture, tmp_path):
    padded, tokenizer = load_policy_with_tokenizer(save_padded(tmp_path / "padded", architecture))
    plain, _ = load_policy_with_tokenizer(save_padded(tmp_path / "plain", architecture, rows=VOCABULARY))
    assert padded.unused_ids.tolist() == UNUSED and plain.unused_ids.tolist() == [20]
    assert padded.vocabulary_size == 56 and len(tokenizer) < VOCABULARY
    batch = pack(random_examples(5))
    for network in (padded, plain):
        network.eval()
    results = [network(batch, 0.7, with_entropy=True) for network in (padded, plain)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(padded.nll(batch), plain.nll(batch))
    assert not torch.allclose(
        load_policy(tmp_path / "padded").eval()(batch)[0], padded(batch)[0]
    )  # the rows are likely


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 50}, {"top_p": 0.999}, {"min_p": 1e-9}])
def test_no_id_without_a_token_is_sampled_whatever_the_filters(settings, tmp_path):
    policy, _ = load_policy_with_tokenizer(save_padded(tmp_path / "padded"))
    decoder = SlotDecoder(policy.eval(), 1, 8)
    logits = decoder.logits(np.array([[5, 6, 7, 0, 0, 0, 0, 0]]), np.array([3]))
    uniforms = torch.linspace(0, 1, 2001)[:-1]
    tokens, logprobs = sample(logits.expand(2000, -1), uniforms, **settings)
    assert not np.isin(tokens.numpy(), UNUSED).any()
    assert logprobs.isfinite().all()


def test_a_policy_without_padding_has_nothing_to_leave_out(tmp_path):
    policy, _ = load_policy_with_tokenizer(save_tiny(tmp_path / "model"))
    assert policy.unused_ids is None


def test_tokens_that_a_user_adds_to_the_tokenizer_come_into_use_and_no_more_than_are_embedded(tmp_path):
    policy, tokenizer = load_policy_with_tokenizer(save_padded(tmp_path / "padded"))
    tokenizer.add_tokens(["new"])
    keep_to_tokens(policy, tokenizer, "model")
    assert policy.unused_ids.tolist() == [i for i in UNUSED if i != tokenizer.convert_tokens_to_ids("new")]
    tokenizer.add_tokens([f"new{i}" for i in range(20)])
    with pytest.raises(UserError, match=r"model: the tokenizer has ids up to .*, the model embeds 56"):
        keep_to_tokens(policy, tokenizer, "model")


def test_ids_without_a_token_are_told_once_and_kept_out_of_checkpoints(tmp_path, caplog):
    with caplog.at_level("INFO"):
        policy, tokenizer = load_policy_with_tokenizer(save_padded(tmp_path / "padded"))
        keep_to_tokens(policy, tokenizer, "again")
    said = [record.message for record in caplog.records if "stand for no token" in record.message]
    assert said == [
        f"{tmp_path / 'padded'}: 17 of 56 ids stand for no token of its tokenizer; none of them is sampled, and "
        "log-probs leave them out"
    ]
    assert "unused_ids" not in policy.state_dict()
    assert torch.equal(frozen_copy(policy).unused_ids, policy.unused_ids)
    keep_to_tokens(policy, tiny_tokenizer(), "model")
    assert 20 not in policy.unused_ids


def test_from_scratch_ignores_the_stored_weights(folder):
    stored, fresh = load_policy(folder), load_policy(folder, from_scratch=True)
    assert stored.model.config.hidden_size == fresh.model.config.hidden_size
    assert not torch.equal(stored.head.weight, fresh.head.weight)


def test_a_missing_model_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no model could be loaded there.*there is no folder .*nowhere"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no weights: SFT trains it with from_scratch: true"):
        load_policy("demo")


@pytest.mark.parametrize("load", [load_policy, load_scorer])
@pytest.mark.parametrize("beside_a_model", [False, True])
def test_an_adapter_of_peft_is_refused_alone_and_beside_a_model_and_the_message_says_what_to_do(
    load, beside_a_model, folder, tmp_path
):
    if beside_a_model:
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an adapter of PEFT.*merge it into its model.*or remove"):
        load(tmp_path)


@pytest.mark.parametrize("left", [0, 5000])
def test_weights_that_were_cut_short_are_named_with_their_folder(left, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:left])
    with pytest.raises(UserError, match=r"broken: damaged or cut short, copy it anew: model\.safetensors \("):
        load_policy(broken)


def test_a_critic_is_refused_where_transformers_has_no_class_for_it():
    config = MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UserError, match="no sequence classification model for MambaConfig"):
        scorer_from_policy(Policy(AutoModelForCausalLM.from_config(config)))


def test_weights_that_lack_a_tensor_are_refused_by_its_name(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors of LlamaForCausalLM, like \['model.layers.1.mlp.up_proj"):
        load_policy(broken)


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


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="the tokenizer has ids up to 40, the model embeds 40"):
        load_tokenizer(folder, load_policy(folder).model.config)


def test_a_folder_without_a_tokenizer_says_what_lies_there_and_what_to_do(folder, tmp_path):
    without = shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    said = r"no tokenizer .*instantiate the backend tokenizer\); the folder holds \['config.json', .*save_pretrained"
    with pytest.raises(UserError, match=said):
        load_tokenizer(without, load_policy(without).model.config)


def test_the_tokenizer_knows_the_context_of_the_model(folder):
    assert load_tokenizer(folder, load_policy(folder).model.config).model_max_length == 64


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
