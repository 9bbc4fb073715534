import copy

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MambaConfig

import lit_rlhf.callbacks.performance
import lit_rlhf.rollout.play
from lit_rlhf.callbacks.performance import (
    Performance,
    default_precision,
    forward_flops,
    matrix_weights,
    peak_flops,
    step_flops,
)
from lit_rlhf.cli import main as cli
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.models.loading import scorer_from_policy
from lit_rlhf.models.policy import Policy
from lit_rlhf.rollout.play import RolloutBackend
from tests.stages import STAGES, make_stage, make_trainer
from tests.tiny import CONFIGS, SINKS, random_examples, tiny_policy


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


def recorded(stage, inputs, tmp_path, callbacks=(), **options):
    """The steps at which a short run writes `perf/*`, and the last values."""
    module, data = make_stage(stage, inputs)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    make_trainer(tmp_path, logger=logger, callbacks=[Performance(), *callbacks], **options).fit(module, data)
    read = EventAccumulator(str(tmp_path)).Reload()
    scalars = {tag: read.Scalars(tag) for tag in read.Tags()["scalars"] if tag.startswith("perf/")}
    return {tag: [event.step for event in events] for tag, events in scalars.items()}, {
        tag: events[-1].value for tag, events in scalars.items()
    }


SPEEDS = {"perf/tokens_per_second", "perf/mfu", "perf/padding_fraction"}


def test_the_speed_of_a_run_shorter_than_the_logging_interval_is_written_at_the_end_of_each_epoch(inputs, tmp_path):
    sft, _ = recorded("sft", inputs, tmp_path / "sft", max_steps=7)  # three to an epoch
    assert sft == {tag: [2, 5, 6] for tag in SPEEDS}
    ppo, _ = recorded("ppo", inputs, tmp_path / "ppo", max_epochs=2)
    assert ppo == {tag: [3, 7] for tag in SPEEDS | {"perf/rollout_fraction"}}


def test_speed_is_written_with_the_loss_where_the_interval_divides_no_epoch(inputs, tmp_path):
    steps, _ = recorded("sft", inputs, tmp_path, max_epochs=2, log_every_n_steps=2)
    assert steps == {tag: [1, 2, 3, 5] for tag in SPEEDS}


class Watch(Callback):
    """Time that passes by decree: a second for each backward pass, hours for what is no training."""

    def __init__(self):
        self.now, self.batches = 0.0, []

    def perf_counter(self):
        return self.now

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)

    def on_before_backward(self, trainer, pl_module, loss):
        self.now += 1

    def on_validation_epoch_end(self, trainer, pl_module):
        self.now += 3600

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.now += 3600


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("interruption", ["validation", "checkpoint"])
def test_an_interruption_counts_neither_as_training_nor_as_waiting(stage, interruption, inputs, tmp_path, monkeypatch):
    watch = Watch()

    def play(*args, **kwargs):
        watch.now += 6
        return lit_rlhf.rollout.play.play(*args, **kwargs)

    monkeypatch.setattr(RolloutBackend, "play", lambda self, *args, stream, **kwargs: play(*args, **kwargs))
    monkeypatch.setattr(lit_rlhf.callbacks.performance, "time", watch)
    monkeypatch.setattr(lit_rlhf.callbacks.performance, "peak_flops", lambda device, dtype: (1e9, "decree"))
    callbacks, options = [watch], {"limit_val_batches": 1, "val_check_interval": 1}
    if interruption == "checkpoint":
        callbacks.append(ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1))
        options = {"enable_checkpointing": True}
    _, values = recorded(stage, inputs, tmp_path / "run", callbacks, max_epochs=1, **options)
    assert watch.now > 3 * 3600
    seconds = {"sft": 3, "ppo": 6 + 8}[stage]
    trained = sum(batch.packed.input_ids.numel() for batch in watch.batches)
    assert values["perf/tokens_per_second"] == pytest.approx(trained / seconds)
    if stage == "ppo":
        assert values["perf/rollout_fraction"] == pytest.approx(6 / 14)


def counted(counter):
    """Torch's operations, but for those of rotary angles, which some releases of transformers make by a product."""
    modules = counter.get_flop_counts()
    angles = [sum(counts.values()) for name, counts in modules.items() if name.endswith(".rotary_emb")]
    return counter.get_total_flops() - sum(angles)


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
        assert ours == counted(counter) + attention - score


@pytest.mark.parametrize("learning", ["input_layernorm.weight", "q_proj.weight", "embed_tokens.weight", ""])
def test_a_backward_pass_counts_the_products_for_weights_of_those_that_learn_alone(learning):
    policy = tiny_policy()  # its embeddings are the head's too
    for name, parameter in policy.named_parameters():
        # A vector at the bottom learns, so that gradients pass through every layer.
        parameter.requires_grad = "layers.0.input_layernorm" in name or learning in name
    batch = pack(random_examples(1, longest=30))
    with FlopCounterMode(display=False) as counter:
        policy(batch)[0].sum().backward()
    length = len(batch.input_ids)
    attention = 3 * 2 * 2 * 2 * 32 * length * (length + 1) // 2  # which torch does not count
    weights = matrix_weights(policy), matrix_weights(policy, frozen=True)
    assert step_flops(policy, batch, *weights).item() == counted(counter) + attention


def test_a_sliding_window_counts_the_keys_within_it_alone():
    config = copy.deepcopy(CONFIGS["mistral"])
    batch = pack([Example(np.arange(3, 13), (np.array([5, 6]),))])
    counts = []
    for config.sliding_window in (None, 100, 5):
        policy = Policy(AutoModelForCausalLM.from_config(config))
        counts.append(forward_flops(policy, batch, matrix_weights(policy)).item())
    unseen = 7 * 8 // 2  # of 12 tokens the sixth misses one key, the last one seven
    layers, width = config.num_hidden_layers, config.hidden_size
    assert counts[0] == counts[1] == counts[2] + 4 * width * layers * unseen


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


def test_a_prompt_shared_by_two_responses_counts_once():
    policy = tiny_policy()
    prompt, response = np.arange(3, 13), np.array([5])
    shared = forward_flops(policy, pack([Example(prompt, (response, response))]), matrix_weights(policy))
    twice = forward_flops(policy, pack([Example(prompt, (response,))] * 2), matrix_weights(policy))
    attention = 2 * 4 * 32 * len(prompt) * (len(prompt) + 1) // 2  # 2 layers of width 32
    assert (twice - shared).item() == 2 * matrix_weights(policy) * len(prompt) + attention


def test_the_peak_of_a_cpu_is_measured_and_that_of_a_listed_gpu_is_its_data_sheets(monkeypatch):
    rate, source = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14 and "measured" in source
    monkeypatch.setattr(lit_rlhf.callbacks.performance, "get_available_flops", lambda device, dtype: 989e12)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == (989e12, "the device's data sheet")


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
