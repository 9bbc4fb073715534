from dataclasses import replace

import pytest
import torch

from lit_rlhf.callbacks.memory import Held
from lit_rlhf.callbacks.rehearsal import Unit, largest_unit, rehearse, sharded, sharing_of
from lit_rlhf.engine.memory import LiveMemory, shapes
from lit_rlhf.errors import UserError
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.rollout.rewards import RewardModelReward
from lit_rlhf.rollout.scoring import Rewards
from lit_rlhf.rollout.shaping import RewardShaping
from tests.models.test_adapter_folders import pytestmark, save_adapter
from tests.stages import STAGES, make_stage, make_trainer

__all__ = ["pytestmark"]


def planned(stage, inputs, ranks=1, strategy="auto", **options):
    """The rehearsal of a stage of two epochs."""
    memory = LiveMemory()
    memory.phase = "load"
    with shapes(), memory:
        module, data = make_stage(stage, inputs, **options)
    return rehearse(module, data, {"gradient_clip_val": 1.0, "strategy": strategy}, memory, ranks)


def taken(stage, inputs, folder, **options):
    """Bytes at the peak of a run of four steps, with numbers."""
    module, data = make_stage(stage, inputs, **options)
    memory = LiveMemory()
    for parameter in (p for network in module.networks() for p in network.parameters()):
        memory.count(parameter)
    with memory:
        make_trainer(folder, max_steps=4, gradient_clip_val=1.0).fit(module, data)
    return max(memory.peaks.values())


@pytest.mark.parametrize("lora", [None, LoRA(r=4)], ids=["full", "lora"])
@pytest.mark.parametrize("stage", ["sft", "ppo", *(pytest.param(s, marks=pytest.mark.slow) for s in STAGES[1:-1])])
def test_a_run_takes_what_was_planned(stage, lora, inputs, tmp_path):
    plan = planned(stage, inputs, lora=lora)
    assert max(plan.peaks.values()) == pytest.approx(taken(stage, inputs, tmp_path, lora=lora), rel=0.05)
    assert plan.flops > 0 < plan.micro_batches


@pytest.mark.parametrize("max_tokens", [pytest.param(40, marks=pytest.mark.slow), None])
@pytest.mark.parametrize(
    "stage", ["grpo", "online_dpo", *(pytest.param(s, marks=pytest.mark.slow) for s in ("reinforce", "remax", "raft"))]
)
def test_groups_take_what_was_planned_and_no_critic_is_among_it(stage, max_tokens, inputs, tmp_path, monkeypatch):
    made = make_stage

    def make_limited(*args, **options):
        module, data = made(*args, **options)
        data.settings = replace(data.settings, max_tokens=max_tokens)
        return module, data

    monkeypatch.setitem(globals(), "make_stage", make_limited)
    plan = planned(stage, inputs)
    assert max(plan.peaks.values()) == pytest.approx(taken(stage, inputs, tmp_path), rel=0.05)
    assert {row.role for row in plan.held} == {"policy", "reference", "reward", "logits", "slot cache"}


@pytest.mark.parametrize("stage", ["distillation", "on_policy_distillation"])
def test_a_teacher_and_what_it_is_learnt_by_are_planned(stage, inputs, tmp_path):
    plan = planned(stage, inputs)
    assert max(plan.peaks.values()) == pytest.approx(taken(stage, inputs, tmp_path), rel=0.05)
    assert {"policy", "teacher"} <= {row.role for row in plan.held}


def test_a_teacher_as_large_as_the_student_takes_a_third_of_what_learning_takes(inputs):
    assert planned("distillation", inputs).flops == pytest.approx(planned("sft", inputs).flops * 4 / 3)


def test_rewards_that_are_normalised_by_what_was_seen_are_planned(inputs):
    memory = LiveMemory()
    memory.phase = "load"
    with shapes(), memory:
        shaping = RewardShaping(normalize="standardize", whiten=True)
        module, data = make_stage("grpo", inputs, shaping=shaping)
    assert rehearse(module, data, {}, memory).peaks


def test_a_reference_that_reads_every_step_takes_a_third_of_what_learning_takes(inputs):
    with_reference, without = (planned("dpo", inputs, reference_free=free).flops for free in (False, True))
    assert with_reference == pytest.approx(without * 4 / 3)


def test_phases_come_in_their_order(inputs):
    phases = ["load", "start", "rollout", "scoring", "training step", "optimiser step", "between steps"]
    assert [phase for phase in planned("ppo", inputs).peaks if phase != "reward"] == phases


def test_a_parked_reference_counts_while_it_is_used_alone(inputs):
    copy, parked = (planned("ppo", inputs, hold_reference=hold) for hold in ("copy", "parked"))
    weights = {row.role: row.weights for row in copy.held}["reference"]
    for phase in ("rollout", "training step", "optimiser step"):
        assert parked.peaks[phase] == pytest.approx(copy.peaks[phase] - weights, rel=0.02)
    assert parked.peaks["scoring"] == pytest.approx(copy.peaks["scoring"], rel=0.02)


def test_cached_log_probs_of_a_reference_are_not_computed_for_a_plan(inputs, monkeypatch):
    monkeypatch.setattr("lit_rlhf.algorithms.reference_cache.ReferenceCache._find", None)
    cached, copy = (planned("dpo", inputs, cache_reference=cache).peaks for cache in (True, False))
    assert cached["training step"] < copy["training step"]


@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["own base", "the policy's"])
def test_a_reward_models_adapter_is_planned_on_its_base(lora, inputs, tmp_path):
    save_adapter(tmp_path / "model", inputs / "model", task="SEQ_CLS")
    memory = LiveMemory()
    with shapes(), memory:
        module, data = make_stage("ppo", inputs, lora=lora)
        data.rewards = Rewards.given(RewardModelReward(str(tmp_path / "model")), None, None, None)
    held = {row.role: row for row in rehearse(module, data, {}, memory).held}
    assert held["reward"].place == ("adapter, own base" if lora is None else "adapter, policy's base")
    assert (held["reward"].weights > 0.5 * held["policy"].weights) == (lora is None)


def test_no_weight_is_read(inputs, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights are opened")

    for name in ("safetensors.safe_open", "safetensors.torch.load_file", "torch.load"):
        monkeypatch.setattr(name, refuse)
    monkeypatch.setattr("lit_rlhf.models.weights.safe_open", refuse)
    assert planned("dpo", inputs).peaks["training step"] > 0


def test_shards_divide_what_is_held_but_for_what_is_gathered():
    # 100 of weights, 100 of gradients, 200 of moments; parts of 10: two weights and a gradient are there, 30.
    held = [Held("policy", "own model", 25, 0, 100, 100, 200), Held("logits", "", 0, 0, 50, 0, 0)]
    peaks = {"load": 100, "start": 100, "rollout": 150, "training step": 1000, "optimiser step": 450}
    peaks["between steps"] = 420
    assert sharded(peaks, held, Unit(10, 10), ranks=4) == {
        "load": 100,
        "start": 100 - 75,
        "rollout": 150,
        "training step": 1000 - int(0.75 * (400 - 30)),
        "optimiser step": 450 - 300,
        "between steps": 420 - 300,
    }
    assert sharded(peaks, held, Unit(10, 10), ranks=1) == peaks
    half = sharded(peaks, held, Unit(5, 10), 4, torch.bfloat16)  # a rollout gathers all in two bytes, not in four
    assert half["rollout"] == 150 - int(0.75 * 50)
    assert half["training step"] == 1000 - int(0.75 * (400 - 20))


def test_the_largest_unit_of_shards_is_gathered_in_the_dtype_of_autocast(inputs):
    module = make_stage("sft", inputs)[0]
    count = sum(weight.numel() for weight in module.policy.model.model.layers[0].parameters())
    assert largest_unit(module, torch.float32) == (4 * count, 4 * count)
    assert largest_unit(module, torch.bfloat16) == (2 * count, 4 * count)


@pytest.mark.parametrize(
    ("strategy", "sharing"),
    [
        ("auto", "replicas"),
        ("ddp", "replicas"),
        ({"class_path": "a.ModelParallelStrategy", "init_args": {"tensor_parallel_size": 1}}, "shards"),
    ],
)
def test_ranks_share_as_the_strategy_has_it(strategy, sharing):
    assert sharing_of(strategy, 2) == sharing


def test_a_strategy_that_is_not_known_is_refused():
    with pytest.raises(UserError, match=r"trainer.strategy \(deepspeed_stage_2\) is not planned for"):
        sharing_of("deepspeed_stage_2", 2)


@pytest.mark.parametrize(("options", "group"), [({}, 8), ({"tensor_parallel_size": 2}, 2)])
def test_groups_of_ranks_that_would_do_the_same_work_are_refused_as_in_a_run(options, group):
    with pytest.raises(UserError, match=rf"tensor_parallel_size is {group}, .* data_parallel_size: 8"):
        sharing_of({"class_path": "a.ModelParallelStrategy", "init_args": options}, 8)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"hold_reference": "parked"}, "hold_reference: parked moves a whole network"),
        ({"lora": LoRA(r=4), "frozen_dtype": "nf4"}, "frozen_dtype: nf4 cannot be held in pieces"),
    ],
)
def test_what_a_run_in_pieces_would_refuse_is_refused(options, told, inputs):
    sharded = {"class_path": "a.ModelParallelStrategy", "init_args": {"tensor_parallel_size": 1}}
    with pytest.raises(UserError, match=told):
        planned("dpo", inputs, ranks=2, strategy=sharded, **options)


def test_nothing_is_left_behind_of_a_rehearsal(inputs):
    planned("sft", inputs)
    assert type(torch.zeros(1)) is torch.Tensor
    assert torch.zeros(1).item() == 0.0
