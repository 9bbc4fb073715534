import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from lit_rlhf import DPO, SFT, PreferenceDataModule, SFTDataModule
from lit_rlhf.algorithms.load_balance import coefficient, find_load_balance
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.probe import choose_attention
from tests.stages import make_trainer
from tests.tiny import EOS, SHAPE, spread_model, tiny_tokenizer

ASKED = {"output_router_logits": True, "router_aux_loss_coef": 0.3, "num_experts_per_tok": 2, "num_key_value_heads": 2}
SPARSE = {"num_experts": 4, "moe_intermediate_size": 16}
CONFIGS = {
    "mixtral": MixtralConfig(**SHAPE, **ASKED, num_local_experts=4),
    "qwen2": Qwen2MoeConfig(**SHAPE, **ASKED, **SPARSE, shared_expert_intermediate_size=16),
    "qwen3": Qwen3MoeConfig(**SHAPE, **ASKED, **SPARSE, head_dim=8),
    "olmoe": OlmoeConfig(**SHAPE, **ASKED, num_experts=4),
    "in padded batches": GptOssConfig(
        **SHAPE,
        **ASKED,
        num_local_experts=4,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
}
TEXTS = ["w3 w4 w5 w6", "w7 w8", "w9 w10 w11 w12 w13 w14 w15"]


def save(folder, config):
    spread_model(copy.deepcopy(config), "eager").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(folder)


def make_data(folder, module, **options):
    options = {"loss_on": "all", "validation": None, "shuffle": False, "tokenizer": module.tokenizer} | options
    return SFTDataModule(f"{folder}/rows.jsonl", **options)


@pytest.mark.parametrize("kind", CONFIGS)
def test_sft_trains_the_loss_and_the_gradient_of_transformers_own_loss(kind, tmp_path, caplog):
    folder = save(tmp_path, CONFIGS[kind])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXTS[2]}) + "\n")
    with caplog.at_level("INFO"):
        module = SFT(folder, learning_rate=0.0)
    assert "the loss has a load-balancing term, 0.3 times train/load_balancing_loss" in caplog.text
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, make_data(folder, module))

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[*module.tokenizer(TEXTS[2])["input_ids"], EOS]])
    own = model(ids, labels=ids)
    own.loss.backward()
    metrics = trainer.callback_metrics
    assert float(metrics["train/loss"]) == pytest.approx(own.loss.item(), rel=1e-5)
    assert float(metrics["train/load_balancing_loss"]) == pytest.approx(own.aux_loss.item(), rel=1e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(module.policy.model.get_parameter(name).grad, p.grad, rtol=1e-3, atol=1e-4)


def test_micro_batches_weigh_by_their_tokens(tmp_path):
    folder = save(tmp_path, CONFIGS["mixtral"])
    module = SFT(folder, learning_rate=0.0)
    trainer = make_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=3)
    trainer.fit(module, make_data(folder, module, batch_size=1))
    model, total, count = AutoModelForCausalLM.from_pretrained(folder), 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([[*module.tokenizer(text)["input_ids"], EOS]])
        learnt = ids.shape[1] - 1
        total, count = total + learnt * model(ids, labels=ids).loss.item(), count + learnt
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(total / count, rel=1e-4)


def policy_of(config):
    policy = Policy(spread_model(copy.deepcopy(config), "eager"))
    choose_attention(policy, "moe")
    return policy


@pytest.mark.parametrize(("attribute", "value"), [("num_experts_per_tok", 4), ("num_experts", 5)])
def test_a_term_of_another_kind_is_not_trained_and_named(attribute, value):
    policy = policy_of(CONFIGS["mixtral"])
    own = policy.model.forward
    policy.model.forward = lambda *args, **kwargs: _with_further_term(own(*args, **kwargs))
    setattr(policy.model, attribute, value)  # the second one breaks the model's own loss
    with pytest.warns(match=r"moe: its config asks for a load-balancing .* \(coefficient 0.3\).* it is not trained"):
        assert find_load_balance(policy, "moe") is None


def _with_further_term(output):
    if output.loss is not None:
        output.loss = output.loss + 0.1
    return output


def test_the_experts_of_a_token_are_counted_and_the_model_is_left_as_it_was():
    policy = policy_of(CONFIGS["mixtral"]).train()
    before = policy.model.config._attn_implementation
    assert find_load_balance(policy, "moe") == (0.3, 2)
    assert policy.training and policy.model.config._attn_implementation == before


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE),
        MixtralConfig(**SHAPE, **{**ASKED, "output_router_logits": False}),
        MixtralConfig(**SHAPE, **{**ASKED, "router_aux_loss_coef": 0.0}),
    ],
)
def test_nothing_is_added_or_said_where_no_config_asks_for_it(config, caplog):
    policy = policy_of(config)
    with caplog.at_level("INFO"):
        assert coefficient(policy.model) == 0.0 and find_load_balance(policy, "moe") is None
    assert "balanc" not in caplog.text


def test_a_method_without_the_term_says_so_once(tmp_path, caplog):
    folder = save(tmp_path, CONFIGS["mixtral"])
    row = {"prompt": "w3", "chosen": " w4", "rejected": " w5"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    module = DPO(folder)
    with caplog.at_level("INFO"):
        data = PreferenceDataModule(f"{folder}/pairs.jsonl", validation=None, tokenizer=module.tokenizer)
        make_trainer(tmp_path, max_steps=1).fit(module, data)
    said = [record.message for record in caplog.records if "load-balancing" in record.message]
    assert said == [
        "MixtralForCausalLM: its config asks for a load-balancing loss of its experts (output_router_logits, "
        "coefficient 0.3), which SFT trains and DPO does not"
    ]
