import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MambaConfig

from lit_rlhf import cli
from lit_rlhf.loading import scorer_from_policy
from lit_rlhf.packing import Example, pack
from lit_rlhf.performance import Performance, default_precision, forward_flops, matrix_weights, peak_flops
from lit_rlhf.policy import Policy
from tests.stages import STAGES, make_stage, make_trainer
from tests.tiny import SINKS, random_examples, tiny_policy


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_logs_its_speed(stage, inputs, tmp_path):
    module, data = make_stage(stage, inputs)
    trainer = make_trainer(tmp_path, max_epochs=1, callbacks=[Performance()])
    trainer.fit(module, data)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("perf/")}
    assert metrics["perf/tokens_per_second"] > 0
    assert 0 < metrics["perf/mfu"] < 1
    assert 0 <= metrics["perf/padding_fraction"] < 1
    assert ("perf/rollout_fraction" in metrics) == (stage == "ppo")
    if stage == "ppo":
        assert 0 < metrics["perf/rollout_fraction"] < 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_useful_operations_are_those_that_torch_counts_without_padding_and_mask(architecture):
    policy = tiny_policy(architecture)
    batch = pack(random_examples(1, longest=30))  # one sequence: no cell of attention is padding
    assert batch.layout.padding_fraction() == 0
    for network, call in ((policy, lambda: policy(batch)), (scorer := scorer_from_policy(policy), None)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(batch) if call else scorer(batch, batch.last_nodes)
        length = len(batch.input_ids)
        # Torch counts products of matrices, but not this attention: 2 layers, width 32, two products for each pair.
        attention = 2 * 2 * 2 * 32 * length * (length + 1) // 2
        score = 0 if call else 2 * 32  # the scalar head, which we leave out
        ours = forward_flops(network, batch, matrix_weights(network)).item()
        assert ours == counter.get_total_flops() + attention - score


def test_of_experts_those_count_that_a_token_meets():
    model = AutoModelForCausalLM.from_config(SINKS)  # one of two experts for each token
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3)
    others = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert experts > 0
    assert matrix_weights(Policy(model)) == others + experts // 2


def test_a_model_without_attention_has_none_to_count():
    config = MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    policy, batch = Policy(AutoModelForCausalLM.from_config(config)), pack(random_examples(1))
    weights = matrix_weights(policy)
    head = 2 * 16 * 40 * len(batch.target_ids)
    assert forward_flops(policy, batch, weights).item() == 2 * weights * len(batch.input_ids) + head


def test_a_prompt_shared_by_two_responses_counts_once_in_the_linear_layers():
    policy = tiny_policy()
    prompt, response = np.arange(3, 13), np.array([5])
    shared = forward_flops(policy, pack([Example(prompt, (response, response))]), matrix_weights(policy))
    twice = forward_flops(policy, pack([Example(prompt, (response,))] * 2), matrix_weights(policy))
    assert (twice - shared).item() == 2 * matrix_weights(policy) * len(prompt)


def test_the_peak_of_a_cpu_is_measured():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14


@pytest.mark.filterwarnings("ignore")  # of LightningCLI, which warns that it was handed arguments
def test_precision_follows_the_device_and_the_users_flag_wins(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert default_precision("cpu") == "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert default_precision("auto") == default_precision("gpu") == "bf16-mixed"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert default_precision("cuda") == "32-true"
    monkeypatch.undo()

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    common = ["validate", "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.limit_val_batches=1"]
    common += ["--model=lit_rlhf.SFT", f"--model.policy={inputs / 'model'}", "--data=lit_rlhf.SFTDataModule"]
    common += [f"--data.train={inputs / 'sft.jsonl'}", f"--data.validation={inputs / 'sft.jsonl'}"]
    common += [f"--trainer.default_root_dir={tmp_path}", "--samples.num_prompts=0"]
    for flags, expected in (([], "bf16-mixed"), (["--trainer.precision=32-true"], "32-true")):
        assert cli.run(common + flags).trainer.precision == expected
