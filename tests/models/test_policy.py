import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MambaConfig

from lit_rlhf import DPO, PPO, RewardModel, RewardModelReward
from lit_rlhf.callbacks.export import export
from lit_rlhf.engine import logprobs
from lit_rlhf.engine.packing import pack
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.errors import UserError
from lit_rlhf.models.decoding import SlotDecoder
from lit_rlhf.models.loading import load_policy, load_scorer, load_tokenizer, pad_token_id_for, scorer_from_policy
from lit_rlhf.models.policy import Policy, frozen_copy, runs_packed
from tests.tiny import (
    EOS,
    SINKS,
    plain_logits,
    plain_response_logprobs,
    random_examples,
    save_tiny,
    tiny_policy,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def test_a_loaded_policy_gives_the_logprobs_of_transformers(folder):
    policy = load_policy(folder)
    examples = random_examples(3)
    packed, _ = policy(pack(examples))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = torch.cat([plain_response_logprobs(model, e.prompt_ids, e.responses[0]) for e in examples])
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)


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


@pytest.fixture(scope="module")
def folder_with_sinks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sinks") / "model"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SINKS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(1.0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_attention_that_packed_rows_lack_runs_in_padded_batches_and_says_so_once(folder_with_sinks, caplog):
    with caplog.at_level("INFO"):
        policy = load_policy(folder_with_sinks)
    assert caplog.text.count("runs in padded batches") == 1
    assert not runs_packed(policy.model)
    examples = random_examples(5, responses=2)
    batch = pack(examples)
    ours = batch.sum_by_sequence(policy(batch)[0])
    ours.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    separate = torch.stack(
        [
            plain_response_logprobs(policy.model, example.prompt_ids, example.responses[k], "eager").sum()
            for k in range(2)
            for example in examples
        ]
    )
    separate.square().sum().backward()
    torch.testing.assert_close(ours, separate, rtol=1e-5, atol=1e-4)
    for name, gradient in gradients.items():
        expected = policy.get_parameter(name).grad
        assert (gradient - expected).norm() / expected.norm().clamp(min=1e-8) < 1e-5, name


def test_a_model_in_padded_batches_acts_and_scores_too(folder_with_sinks):
    policy = load_policy(folder_with_sinks).eval()
    assert not runs_packed(scorer_from_policy(policy).model)
    assert not runs_packed(frozen_copy(policy).model)
    decoder = SlotDecoder(policy, 2, 4)
    ids, lengths = np.array([[5, 6, 7, 0], [8, 9, 0, 0]]), np.array([3, 2])
    decoder.logits(ids, lengths)
    ids[[0, 1], lengths] = 10, 11
    with torch.no_grad():
        expected = [policy.model(torch.as_tensor(ids[i, : n + 1])[None]).logits[0, -1] for i, n in enumerate(lengths)]
    torch.testing.assert_close(decoder.logits(ids, lengths + 1), torch.stack(expected), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_scores_are_those_of_the_sequence_classifier_that_transformers_loads(tmp_path, architecture):
    scorer = load_scorer(save_tiny(tmp_path / "lm", architecture), fresh_head=True)
    scorer.model.config.pad_token_id = 0
    scorer.model.save_pretrained(tmp_path / "rm")
    examples = random_examples(4)
    batch = pack(examples)
    scores = load_scorer(tmp_path / "rm")(batch, batch.last_nodes)

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1).eval()
    with torch.no_grad():
        expected = [
            model(torch.as_tensor(np.concatenate([e.prompt_ids, e.responses[0]]))[None]).logits[0, 0] for e in examples
        ]
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_critic_from_the_policy_shares_its_trunk_but_no_memory():
    policy = tiny_policy()
    critic = scorer_from_policy(policy)
    ours, theirs = policy.model.base_model.state_dict(), critic.model.base_model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in critic.parameters()}


def test_the_frozen_copy_stays_while_a_policy_with_tied_embeddings_learns():
    policy = tiny_policy("llama")
    assert policy.model.config.tie_word_embeddings
    reference, batch = frozen_copy(policy), pack(random_examples(3))
    before, _ = reference(batch)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    policy(batch)[0].sum().backward()
    optimizer.step()
    assert not torch.equal(policy(batch)[0], before)
    assert torch.equal(reference(batch)[0], before)
    assert not any(p.requires_grad for p in reference.parameters())


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


def test_no_pad_token_that_ends_responses_is_stored_with_a_reward_model():
    assert pad_token_id_for(tiny_tokenizer()) == 0
    assert pad_token_id_for(tiny_tokenizer(pad_is_eos=True)) not in (None, EOS)


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


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by transformers; PEFT asks for it
@pytest.mark.parametrize("way", ["get_peft_model", "inject_adapter_in_model"])
def test_adapters_of_peft_act_and_learn_on_trunk_and_head(way, monkeypatch):
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the library does not need it")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    plain, model = tiny_policy("qwen3").model, tiny_policy("qwen3").model
    model = (
        peft.get_peft_model(model, config) if way == "get_peft_model" else peft.inject_adapter_in_model(config, model)
    )
    policy, examples = Policy(model), random_examples(5)
    batch = pack(examples)
    expected = torch.cat([plain_response_logprobs(model, e.prompt_ids, e.responses[0]) for e in examples])
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if "lora" in name}
    assert any("lm_head" in name for name in gradients) and any("q_proj" in name for name in gradients)
    for chunk_most in (2**30, 5 * 4 * 40):  # the head at once, and a few tokens at a time
        monkeypatch.setattr(logprobs, "CHUNK_LEAST", 0)
        monkeypatch.setattr(logprobs, "CHUNK_MOST", chunk_most)
        policy.zero_grad()
        (-policy.nll(batch)).backward()
        torch.testing.assert_close(policy(batch)[0], expected, rtol=1e-4, atol=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(policy.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(Policy(plain)(batch)[0], expected, atol=1e-2)

    decoder, ids, lengths = SlotDecoder(policy, 2, 6), np.array([[5, 6, 7, 8, 9, 10]] * 2), np.array([5, 3])
    decoder.logits(ids, lengths)
    with torch.no_grad():
        logits = torch.stack([plain_logits(model, ids[i, : n + 1])[-1] for i, n in enumerate(lengths)])
    torch.testing.assert_close(decoder.logits(ids, lengths + 1), logits, rtol=1e-4, atol=1e-4)
