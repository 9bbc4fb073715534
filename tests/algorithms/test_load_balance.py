import copy
import json

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from lit_rlhf import SFT, SFTDataModule
from lit_rlhf.algorithms.load_balance import coefficient, find_load_balance
from lit_rlhf.engine.packing import pack
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.probe import choose_attention
from lit_rlhf.models.trunk import packed_outputs
from tests.stages import make_stage, make_trainer, write_inputs
from tests.tiny import EOS, SHAPE, random_examples, spread_model, tiny_tokenizer

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
    folder.mkdir(exist_ok=True)
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
    module, trainer = SFT(folder, learning_rate=0.0), make_trainer(tmp_path, max_steps=1)
    with caplog.at_level("INFO"):
        trainer.fit(module, make_data(folder, module))
    said = f"{folder}: as its config asks, the loss has a load-balancing term, 0.3 times train/load_balancing_loss"
    assert [record.message for record in caplog.records if "load-balancing" in record.message] == [said]

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
    with pytest.warns(match=r"MixtralForCausalLM: its config asks .* \(coefficient 0.3\).* it is not trained"):
        assert find_load_balance(policy) is None


def _with_further_term(output):
    if output.loss is not None:
        output.loss = output.loss + 0.1
    return output


def test_the_experts_of_a_token_are_counted_and_the_model_is_left_as_it_was():
    policy = policy_of(CONFIGS["mixtral"]).train()
    before = policy.model.config._attn_implementation
    assert find_load_balance(policy) == (0.3, 2) and policy.balanced
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
        assert coefficient(policy.model) == 0.0 and find_load_balance(policy) is None
    assert "balanc" not in caplog.text


STEP = {"learning_rate": 0.0}
OPTIONS = {"reward_model": {}, "dpo": {}, "ppo": {"ppo_epochs": 1, "num_minibatches": 1, "value_coef": 0.5}}


def gradients(stage, inputs, folder, coef):
    """Of one step that moves nothing, by network and parameter; its micro-batches, and the trainer."""
    config = copy.deepcopy(CONFIGS["qwen2"])
    config.router_aux_loss_coef = coef
    save(inputs / "model", config)
    torch.manual_seed(0)  # of fresh heads
    module, data = make_stage(stage, inputs, **STEP, **OPTIONS[stage])
    batches = []
    watch = LambdaCallback(on_train_batch_start=lambda trainer, module, batch, number: batches.append(batch))
    trainer = make_trainer(folder, max_steps=1, callbacks=[watch])
    trainer.fit(module, data)
    packed = [batch.packed for batch in batches if hasattr(batch, "packed")]
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, packed, trainer


@pytest.mark.parametrize("stage", OPTIONS)
def test_every_stage_trains_the_gradient_of_transformers_own_term(stage, tmp_path):
    write_inputs(tmp_path, rows=4)
    without, _, silent = gradients(stage, tmp_path, tmp_path, 0.0)
    balanced, packed, trainer = gradients(stage, tmp_path, tmp_path, 0.3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    asked = {"output_router_logits": True}
    weights = [len(one.target_ids) if stage == "ppo" else one.num_sequences for one in packed]
    routers = [  # by the model's own attention, in padded rows
        packed_outputs(model, one.input_ids, one.position_ids, one.layout, **asked)[1] for one in packed
    ]
    terms = [w * load_balancing_loss_func(layers, 4, 2) for w, layers in zip(weights, routers, strict=True)]
    term = torch.stack(terms).sum() / sum(weights)
    term.backward()
    own = {name.removeprefix("model."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    networks = {"reward_model": {"reward_model": 1.0}, "dpo": {"policy": 1.0}, "ppo": {"policy": 1.0, "critic": 0.5}}
    for network, weight in networks[stage].items():
        parts = {name: f"{network}.model.model.{name}" for name in own}
        assert sum("mlp.gate.weight" in name for name in parts) >= 2
        for name, part in parts.items():
            added = balanced[part] - without[part] if part in without else balanced[part]
            torch.testing.assert_close(added, weight * 0.3 * own[name], rtol=2e-3, atol=1e-5)
        told = "train/critic_load_balancing_loss" if network == "critic" else "train/load_balancing_loss"
        assert float(trainer.callback_metrics[told]) == pytest.approx(term.item(), rel=1e-4)
        assert told not in silent.callback_metrics


def test_no_term_is_kept_of_evaluation_or_of_the_reference(tmp_path):
    policy = policy_of(CONFIGS["mixtral"])
    assert find_load_balance(policy) is not None
    batch = pack(random_examples(2))
    with torch.no_grad():
        policy(batch)
    assert policy.routers == ()
    policy(batch, adapters=("reference",))
    assert policy.routers == ()
    policy(batch)
    assert [layer.shape for layer in policy.routers] == [(len(batch.input_ids), 4)] * SHAPE["num_hidden_layers"]
