import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from lit_rlhf import LoRA, RewardModel, UserError
from lit_rlhf.algorithms.checkpoint import read_facts, read_weights
from lit_rlhf.algorithms.strategies import check_named_strategy, check_strategy, tell_read_whole
from lit_rlhf.cli.export import export
from lit_rlhf.losses.advantages import Moments
from lit_rlhf.models.holding import reading_in
from lit_rlhf.models.loading import load_policy, scorer_from_policy
from lit_rlhf.models.policy import frozen_copy
from tests.forked_ranks import free_port
from tests.stages import STAGES, make_stage, make_trainer, write_inputs
from tests.strategy_script import WHOLE_RUNS, WHOLE_TRAINER, outcome
from tests.tiny import save_tiny


class Made:
    """A strategy of Lightning's that was made where it can run."""

    def __init__(self, kind, **config):
        self.strategy = object.__new__(kind)
        self.strategy.__dict__["config"] = config
        self.accumulate_grad_batches, self.precision = 1, "32-true"


@pytest.mark.parametrize(
    ("made", "more", "message"),
    [
        (Made(FSDPStrategy), {}, r"strategy \(fsdp\) is FSDP1, which is not supported: use .*ModelParallelStrategy"),
        (Made(DeepSpeedStrategy, zero_optimization={"stage": 3}), {}, "cuts or offloads more than ZeRO-2 does"),
        (Made(DeepSpeedStrategy, zero_optimization={"offload_optimizer": {"device": "cpu"}}), {}, "or offloads more"),
        (Made(DeepSpeedStrategy), {"accumulate_grad_batches": 4}, r"accumulate_grad_batches \(4\): .*data.max_tokens"),
        (Made(DeepSpeedStrategy), {"precision": "16-mixed"}, r"precision \(16-mixed\) .* use bf16-mixed"),
    ],
)
def test_strategies_under_which_a_run_would_go_wrong_are_refused_with_what_to_use(made, more, message):
    for name, value in more.items():
        setattr(made, name, value)
    with pytest.raises(UserError, match=message):
        check_strategy(made)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("fsdp", "is FSDP1, which is not supported"),
        ("fsdp_cpu_offload", "is FSDP1"),
        ({"class_path": "lightning.pytorch.strategies.FSDPStrategy"}, "is FSDP1"),
        ("deepspeed_stage_3", "or deepspeed_stage_2"),
        ("deepspeed_stage_2_offload", "offloads more than ZeRO-2"),
        (Namespace(class_path="a.DeepSpeedStrategy", init_args=Namespace(stage=3)), "cuts or offloads"),
        ({"class_path": "a.DeepSpeedStrategy", "init_args": {"offload_optimizer": True}}, "cuts or offloads"),
        ("single_device", r"trainer.devices \(2\) asks for 2: use ddp"),
    ],
)
def test_strategies_are_refused_by_their_names_before_they_ask_for_a_gpu_or_a_package(strategy, message):
    with pytest.raises(UserError, match=message):
        check_named_strategy(strategy, 2)


@pytest.mark.parametrize(
    ("strategy", "devices"),
    [
        ("auto", 2),
        ("ddp", "2"),
        ("deepspeed_stage_2", 2),
        ({"class_path": "a.DeepSpeedStrategy", "init_args": {"stage": 2, "offload_optimizer": False}}, 2),
        (Namespace(class_path="a.ModelParallelStrategy", init_args=Namespace(tensor_parallel_size=1)), [0, 1]),
        ("single_device", "auto"),
        ("single_device", [0]),
    ],
)
def test_strategies_that_a_run_goes_well_under_are_taken_by_their_names(strategy, devices):
    check_named_strategy(strategy, devices)


def test_deepspeed_asks_no_loader_for_a_batch_size():
    made = Made(DeepSpeedStrategy, zero_optimization={"stage": 2})
    check_strategy(made)
    assert made.strategy.config["train_micro_batch_size_per_gpu"] == 1


def agents(options, nodes, per_node):
    """The ranks of a command line, started by torchrun as it is on each of several machines, here one and the same."""
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={per_node}"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    line = ["-m", "lit_rlhf", "fit", *options, f"--trainer.num_nodes={nodes}", f"--trainer.devices={per_node}"]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root}/envs"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # One of them is the meeting place: by their names all would be.
    started = [
        subprocess.Popen([*command, f"--rdzv-conf=is_host={int(node == 0)}", *line], env=environment, **pipes)
        for node in range(nodes)
    ]
    for agent in started:
        told, _ = agent.communicate(timeout=300)
        assert agent.returncode == 0, told[-4000:]


def told_whole(networks, caplog):
    """Which of them each rank is told to have held whole before it cuts them."""
    caplog.clear()
    tell_read_whole(networks)
    return [record.message.partition("all weights of ")[2].partition(" before")[0] for record in caplog.records]


def test_networks_that_each_rank_holds_whole_before_they_are_cut_are_told(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = save_tiny(tmp_path / "model")
    with reading_in(torch.float32, uncut=True):
        policy = load_policy(folder)
        narrowed = load_policy(folder, lora=LoRA(r=2), frozen_dtype="bfloat16")
        normed = load_policy(folder, lora=LoRA(r=2, use_dora=True))
        copies = {"reference": frozen_copy(policy), "critic": scorer_from_policy(policy)}
    assert told_whole({"policy": policy, **copies, "loss": torch.nn.Identity()}, caplog) == []
    networks = {"policy": policy, "narrowed": narrowed, "normed": normed, "cast": frozen_copy(policy, torch.bfloat16)}
    assert told_whole(networks, caplog) == ["narrowed, normed, cast"]
    assert told_whole({"policy": load_policy(folder)}, caplog) == ["policy"]


def test_weights_of_half_the_width_are_widened_in_pieces_and_so_never_whole(tmp_path, caplog):
    caplog.set_level("INFO")
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model"))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    with reading_in(torch.float32, uncut=True):
        policy = load_policy(tmp_path / "model")
        critic = scorer_from_policy(policy)
    assert told_whole({"policy": policy, "critic": critic}, caplog) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_two_machines_learn_what_two_devices_of_one_do(stage, tmp_path):
    write_inputs(tmp_path)
    config = Path(__file__).parents[2] / "configs" / f"{stage}.yaml"
    options = ["--config", str(config), "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
    options += [f"--model.policy={tmp_path / 'model'}", "--data.validation=null", "--model.warmup_steps=0"]
    if stage == "ppo":
        options += [f"--data.train={tmp_path / 'prompts.jsonl'}", "--model.critic=null", "--data.monitors=null"]
        options += ["--data.reward=tests.stages.share_of_w9", "--data.rollout_size=16", "--data.num_slots=4"]
        options.append("--data.max_new_tokens=8")
    else:
        options += [f"--data.train={tmp_path / 'preference.jsonl'}"]
    weights = []
    for nodes in (1, 2):
        root = tmp_path / str(nodes)
        agents([*options, f"--trainer.default_root_dir={root}"], nodes, 2 // nodes)
        weights.append(load_file(root / "model" / "model.safetensors"))
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights[0].items())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def fit(folder, strategy, *runs, dtype=None):
    """What these runs of the script, or all, come to on two ranks, from a model in float32 or in another dtype."""
    write_inputs(folder)
    if dtype is not None:
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        model.to(dtype).save_pretrained(folder / "model")
    script = str(Path(__file__).parents[1] / "strategy_script.py")
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root}/envs"}
    done = subprocess.run(
        [sys.executable, script, str(folder), strategy, *runs],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / f"{strategy}.json").read_text())


def check_whole_steps(results, folder, precision="32-true", rel=1e-4):
    """Same loss, same gradient, same weights, whether the head sees all of its tokens at once or a few at a time."""
    for run, (stage, options) in WHOLE_RUNS.items():
        seed_everything(0, verbose=False)
        module, data = make_stage(stage, folder, **options)
        trainer = make_trainer(folder, precision=precision, **WHOLE_TRAINER)
        trainer.fit(module, data)
        alone, together = outcome(trainer, module), results[run]
        assert alone["steps"] == together["steps"] == 1
        for name, value in alone["metrics"].items():
            assert together["metrics"][name] == pytest.approx(value, rel=rel, abs=rel / 2), (run, name)
        assert together["checksum"] == pytest.approx(alone["checksum"], rel=rel / 1000)


def test_a_step_of_the_whole_data_set_under_ddp_is_the_step_that_one_device_takes(tmp_path):
    check_whole_steps(fit(tmp_path, "ddp", *WHOLE_RUNS), tmp_path)


@pytest.mark.slow
def test_a_step_of_mixed_precision_in_pieces_is_near_the_step_that_one_device_takes(tmp_path):
    results = fit(tmp_path, "fsdp2_bf16", *WHOLE_RUNS, "lora_ppo")
    assert {held for run in results.values() for held in run["held_in"]} == {"torch.float32", "torch.bfloat16"}
    assert all(run["held_in"] == ["torch.float32"] for name, run in results.items() if name != "lora_ppo")
    assert math.isfinite(results.pop("lora_ppo")["metrics"]["train/loss"])
    check_whole_steps(results, tmp_path, "bf16-mixed", rel=0.02)


@pytest.mark.slow
def test_weights_that_are_cast_once_they_are_cut_learn_as_those_that_were_cast_before(tmp_path):
    runs = "reward_model", "dpo", "dpo_moving", "head_ppo", "lora_ppo"
    results = []
    for strategy in ("fsdp2", "fsdp2_uncut"):
        (tmp_path / strategy).mkdir()
        results.append(fit(tmp_path / strategy, strategy, *runs, dtype=torch.bfloat16))
    assert results[0] == results[1]


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_all_stages_run_on_two_processes_and_export(strategy, tmp_path):
    results = fit(tmp_path, strategy)
    assert set(results) == {
        *STAGES,
        "stopped_ppo",
        "dpo_cached",
        "dpo_moving",
        "best_reward_model",
        "process_reward_model",
        "lora_ppo",
        "head_ppo",
        "grpo",
        "remax",
        "dapo",
        "raft",
        "online_dpo",
        "on_policy_distillation",
        *WHOLE_RUNS,
    }
    for run, result in results.items():
        assert result["steps"] > 0
        assert all(math.isfinite(value) for value in result["metrics"].values()), (run, result)
        kind = AutoModelForSequenceClassification if run.endswith("reward_model") else AutoModelForCausalLM
        kind = AutoModelForTokenClassification if run.endswith("process_reward_model") else kind
        labels = (
            {"num_labels": 1} if run.endswith("reward_model") else {}
        )  # which the config of an adapter's base lacks
        model = kind.from_pretrained(tmp_path / strategy / run / "model", **labels)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    # The reference's log-probs are the same, whether a frozen copy gives them or a cache that one rank had begun.
    assert results["dpo_cached"]["checksum"] == pytest.approx(results["dpo"]["checksum"], rel=1e-5)
    assert "val/score" in results["ppo"]["metrics"]
    assert "val/loss" in results["sft"]["metrics"]

    # The best checkpoint is exported, sharded or not, normalised by what its validation saw; `export` does the same.
    root = tmp_path / strategy / "best_reward_model"
    best, last = (next(root.rglob(f"epoch={epoch}.ckpt")) for epoch in (0, 1))
    assert best.is_dir() == (strategy == "fsdp2")
    stored = load_file(root / "model" / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in read_weights(best, "reward_model").items())
    assert any(not torch.equal(tensor, stored[name]) for name, tensor in read_weights(last, "reward_model").items())
    export(str(best), str(root / "again"))
    for file in ("config.json", "model.safetensors"):
        assert (root / "again" / file).read_bytes() == (root / "model" / file).read_bytes()
    moments = Moments(*torch.tensor(read_facts(best)["scores"]["moments"]))
    assert json.loads((root / "model" / "config.json").read_text())["score_bias"] == pytest.approx(-moments.mean.item())
    assert moments.size == 2 * 24 and abs(moments.mean) > 1e-4

    check_whole_steps(results, tmp_path)

    # A minibatch of PPO is divided by its tokens on all ranks, of which each has a share.
    mine, other = results["ppo"]["shares"]
    assert len(mine) == len(other) == results["ppo"]["steps"]
    for (tokens, denominator), (other_tokens, other_denominator) in zip(mine, other, strict=True):
        assert denominator == other_denominator == (tokens + other_tokens) / 2

    # Advantages are whitened over all ranks, not on each.
    ranks = [torch.tensor(rank) for rank in results["ppo"]["advantages"]]
    assert torch.cat(ranks).mean().item() == pytest.approx(0, abs=1e-5)
    assert torch.cat(ranks).var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert abs(ranks[0].mean().item()) > 0.01

    # All ranks stopped together, by the mean of their KLs, and went on together.
    stopped = results["stopped_ppo"]
    assert stopped["metrics"]["ppo/stopped"] == 1
    assert stopped["steps"] == results["ppo"]["steps"] == 2 * 2 * 2
    for rank in stopped["of_all"]:
        assert rank["stopped"] == [False] * 6 + [True] * 2

    # What is said of a rollout is said of the episodes of all ranks, to the KL controller too; prompts are shared out.
    for run in ("ppo", "stopped_ppo"):
        one, another = results[run]["of_all"]
        assert one == another
        assert one["seen"][2] == 2 * 16
        assert one["heard"][-1] == [one["rollout"]["rollout/kl"], 16]
        mine, other = ({tuple(prompt) for prompt in prompts} for prompts in results[run]["prompts"])
        assert mine and other and not mine & other
    assert results["ppo"]["of_all"][0]["rollout"]["rollout/kl"] != 0

    # A group is played by one rank: both have all completions of their own prompts.
    for run in ("grpo", "remax", "dapo"):
        mine, other = ([tuple(prompt) for prompt in prompts] for prompts in results[run]["prompts"])
        assert {mine.count(prompt) % 4 for prompt in mine} == {other.count(prompt) % 4 for prompt in other} == {0}
        assert not set(mine) & set(other)
        one, another = results[run]["of_all"]
        assert one == another and one["heard"][-1] == [one["rollout"]["rollout/kl"], 16]
        assert one["returns"] != 0.0
        if strategy == "ddp":
            assert results[run]["own_weights"][0] == results[run]["own_weights"][1]

    # Of each group one or two are learnt from, of other prompts on each rank.
    for run, kept in (("raft", 1), ("online_dpo", 2)):
        mine, other = ([tuple(prompt) for prompt in prompts] for prompts in results[run]["prompts"])
        assert len(mine) == len(other) == 2 * kept and not set(mine) & set(other)
        assert results[run]["of_all"][0] == results[run]["of_all"][1]
        if strategy == "ddp":
            assert results[run]["own_weights"][0] == results[run]["own_weights"][1]

    # Token rewards (with gamma 0 the returns) have variance 1 over all ranks, not on each.
    ranks = [torch.tensor(rank) for rank in stopped["returns"]]
    assert torch.cat(ranks).var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert ranks[0].var(correction=0).item() != pytest.approx(1, abs=1e-2)

    # BCO's shift is that of the pairs of all ranks; TR-DPO's reference is the policy after a hard update.
    moving = results["dpo_moving"]
    assert moving["shift"][0] == moving["shift"][1] and moving["shift"][0][0] != 0
    assert moving["shift"][0][1] == 2 * 24 and moving["steps"] % 2 == 0
    assert max(moving["apart"]) == 0
    if strategy == "ddp":
        assert stopped["own_weights"][0] == stopped["own_weights"][1]

    # The export of the reward model is normalised over the held-out responses of all ranks.
    module = RewardModel(str(tmp_path / strategy / "reward_model" / "model"), fresh_head=False)
    _, data = make_stage("reward_model", tmp_path)
    make_trainer(tmp_path, limit_val_batches=1).validate(module, data, verbose=False)
    with torch.no_grad():
        packed = [batch.packed for batch in data.rows_dataloader("val")]
        scores = torch.cat([module.reward_model(batch, batch.last_nodes) for batch in packed])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-3)
