import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from lit_rlhf import DPO, PPO, RewardModel, RewardModelReward, UserError
from lit_rlhf.callbacks.export import export
from lit_rlhf.cli.compare import compare
from lit_rlhf.engine.packing import pack
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.models.decoding import SlotDecoder, sample
from lit_rlhf.models.loading import load_policy, load_policy_with_tokenizer
from lit_rlhf.models.policy import frozen_copy
from lit_rlhf.models.tokens import keep_to_tokens, load_tokenizer
from tests.stages import make_stage, make_trainer, write_inputs
from tests.tiny import (
    ARCHITECTURES,
    VOCABULARY,
    random_examples,
    save_padded,
    save_tiny,
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


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_data_in_other_tokens_than_the_models_are_refused_before_a_step(stage, root, tmp_path):
    write_inputs(tmp_path)
    module, data = make_stage(stage, tmp_path)
    kind = type(data).__name__
    data.tokenizer = load_tokenizer(root / "theirs" / "model", load_policy(root / "theirs" / "model").model.config)
    said = rf"^{kind}\.tokenizer is another than that of {type(module).__name__} \(40 against 40 .*'w3', 3\)"
    for run in ("fit", "validate", "predict"):
        with pytest.raises(UserError, match=said):
            getattr(make_trainer(tmp_path, max_steps=1, limit_val_batches=1), run)(module, data)
    data.tokenizer = tiny_tokenizer()
    data.tokenizer.eos_token = "w5"
    with pytest.raises(UserError, match=r"\(responses end with w5 against </s>\): .* Pass tokenizer=model\.tokenizer$"):
        make_trainer(tmp_path, max_steps=1).fit(module, data)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_an_equal_tokenizer_has_the_models_context_and_its_template_is_the_models(stage, tmp_path):
    write_inputs(tmp_path)
    module, data = make_stage(stage, tmp_path)
    data.tokenizer = tiny_tokenizer()
    data.tokenizer.model_max_length, module.tokenizer.model_max_length = 10**30, 40
    data.tokenization = replace(data.tokenization, chat_template="{{ messages[0].content }}")
    make_trainer(tmp_path, max_steps=1).fit(module, data)
    assert data.tokenizer.model_max_length == 40
    assert module.tokenizer.chat_template == "{{ messages[0].content }}"
