"""What `compare` measures."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf import RewardModelReward, UserError
from lit_rlhf.callbacks import HuggingFaceExport, RunSummary
from lit_rlhf.cli.compare import FIGURES, compare, finished_runs, is_reward_model, print_table, read_summary
from lit_rlhf.data.prompts import load_prompts
from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.rollout.play import GenerationSettings
from lit_rlhf.rollout.scoring import Rewards
from tests.stages import make_stage, make_trainer, share_of_w9, write_inputs
from tests.tiny import plain_response_logprobs, tiny_model, tiny_tokenizer

RUNS = {
    "sft": ("sft", {}),
    "ppo": ("ppo", {}),
    "ppo_monitored": ("ppo", {}),
    "dpo": ("dpo", {}),
    "dpo_cached": ("dpo", {"cache_reference": True}),
}


def save_always_w9(folder):
    """A policy that writes w9 and nothing else: its last norm gives the same features whatever it has read."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(1000 * model.transformer.wte.weight[9])
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Finished runs of one epoch each and a policy that is better by construction, compared on 24 prompts."""
    root = tmp_path_factory.mktemp("compare")
    write_inputs(root)
    for name, (stage, options) in {"reward_model": ("reward_model", {}), **RUNS}.items():
        module, data = make_stage(stage, root, **options)
        if stage == "ppo":
            scorer = RewardModelReward(str(root / "reward_model" / "model"))
            data.rewards = (
                Rewards(share_of_w9, monitors={"scorer": scorer}) if name == "ppo_monitored" else Rewards(scorer)
            )
        callbacks = [HuggingFaceExport(), RunSummary()]
        trainer = make_trainer(root / name, max_epochs=1, limit_val_batches=1, callbacks=callbacks)
        trainer.fit(module, data)
    save_always_w9(root / "better" / "model")
    (root / "better" / "summary.json").write_text((root / "sft" / "summary.json").read_text())
    compare(
        root=str(root),
        policies=(*RUNS, "better"),
        prompts=str(root / "prompts.jsonl"),
        gold=share_of_w9,
        generation=GenerationSettings(max_new_tokens=8),
    )
    return root


@pytest.fixture(scope="module")
def results(root):
    return json.loads((root / "results.json").read_text())


def test_every_policy_has_every_figure_and_the_reward_model_its_accuracy(results):
    assert set(results) == {*RUNS, "better", "reward_model"}
    assert all(set(results[name]) == set(FIGURES) for name in (*RUNS, "better"))
    assert set(results["reward_model"]) == {"val_accuracy"}
    assert 0 <= results["reward_model"]["val_accuracy"] <= 1


def test_the_baseline_wins_half_against_itself_and_is_at_no_distance(results):
    assert results["sft"]["win_rate"] == 0.5
    assert results["sft"]["kl"] == 0


def test_a_better_policy_wins_every_prompt_at_the_kl_of_what_it_writes(root, results):
    better = results["better"]
    assert better["gold_reward"] == 1.0 > results["sft"]["gold_reward"]
    assert better["win_rate"] == 1.0
    assert better["response_length"] == 8
    # It is certain of its response, so that the log-ratio is minus the baseline's log-prob alone.
    baseline = AutoModelForCausalLM.from_pretrained(root / "sft" / "model", attn_implementation=IMPLEMENTATION).eval()
    prompts = load_prompts(str(root / "prompts.jsonl"), "validation", tiny_tokenizer()).prompt_ids
    with torch.no_grad():
        surprise = [-plain_response_logprobs(baseline, ids, np.full(8, 9)).sum().item() for ids in prompts]
    assert better["kl"] == pytest.approx(np.mean(surprise), rel=1e-4)


def test_a_long_prompt_is_cut_to_what_the_response_leaves_and_a_cut_distribution_has_no_kl(root, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "w3 " * 200}) + "\n")
    with pytest.warns(UserWarning, match="A prompt may have 56 tokens"):
        found = compare(
            root=str(root),
            policies=("sft",),
            prompts=str(tmp_path / "long.jsonl"),
            gold=share_of_w9,
            generation=GenerationSettings(max_new_tokens=8, temperature=0.0),
            output=str(tmp_path / "new" / "results.json"),
        )
    assert found["sft"]["kl"] is None and found["sft"]["response_length"] <= 8
    assert json.loads((tmp_path / "new" / "results.json").read_text())["sft"]["kl"] is None
    [kl] = [line for line in capsys.readouterr().out.splitlines() if "KL to" in line]
    assert "-" in kl.split("│")[2]


def test_prompts_of_chats_are_read_as_in_training_and_templates_that_differ_are_refused(root, tmp_path):
    template = "{% if loud %}{{ 'w9 ' }}{% endif %}{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    for name, own in {"one": template, "same": template, "other": template + " "}.items():
        shutil.copytree(root / "sft", tmp_path / name)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = own
        tokenizer.save_pretrained(tmp_path / name / "model")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "w3 </s>"}]}) + "\n")
    heard = []

    def hear(prompts, responses):
        heard.extend(prompts)
        return [0.0] * len(prompts)

    options = {"root": str(tmp_path), "prompts": str(tmp_path / "chats.jsonl"), "gold": hear, "reward_model": None}
    options["generation"] = GenerationSettings(max_new_tokens=2)
    compare(policies=("one", "same"), **options)
    assert set(heard) == {"w3"}  # as text, without the end token
    heard.clear()
    compare(policies=("one", "same"), chat_template_kwargs={"loud": True}, **options)
    assert set(heard) == {"w9 w3"}
    with pytest.raises(UserError, match="message lists, and other has another chat template than one"):
        compare(policies=("one", "same", "other"), **options)
    with pytest.raises(UserError, match=r"chats\.jsonl, line 1: .*control tokens \['</s>'\]"):
        compare(policies=("one",), control_tokens="refuse", **options)
    compare(policies=("one", "other"), **options | {"prompts": str(root / "prompts.jsonl")})


def write_config(folder, kind, **arguments):
    file = folder / "lightning_logs" / "version_0" / "config.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"data": {"class_path": f"lit_rlhf.{kind}", "init_args": arguments}}))


def test_runs_of_ones_own_data_play_its_held_out_prompts_and_are_judged_by_no_gold_reward(root, tmp_path, monkeypatch):
    for name in ("sft", "dpo", "reward_model"):
        shutil.copytree(root / name, tmp_path / name)
    shutil.copytree(root / "reward_model", tmp_path / "other_reward_model")  # which can be no policy
    lines = []
    monkeypatch.setattr("lit_rlhf.cli.compare.rank_zero_info", lines.append)
    brief = {"root": str(tmp_path), "policies": ("sft",), "generation": GenerationSettings(max_new_tokens=2)}
    with pytest.raises(UserError, match=r"^prompts: no config\.yaml in the folders of sft says .*--prompts=demo$"):
        compare(**brief)
    write_config(tmp_path / "sft", "SFTDataModule", validation=str(root / "sft.jsonl"))
    found = compare(**brief)
    assert "gold_reward" not in found["sft"] and "bayes_accuracy" not in found["reward_model"]
    assert lines == [
        f"24 prompts that sft was validated on: {root / 'sft.jsonl'}",
        f"left out of {tmp_path}: dpo; choose by --policies=[sft,...]",
        "sft plays (1 of 1)",
    ]
    prompts = [{"source": str(root / "prompts.jsonl"), "columns": {"prompt": "prompt"}}]
    write_config(tmp_path / "dpo", "RolloutDataModule", validation=prompts, control_tokens="refuse")
    compare(**brief | {"policies": ("sft", "dpo")})
    assert f"24 prompts that dpo was validated on: {root / 'prompts.jsonl'}" in lines


def test_runs_that_can_be_no_policy_are_not_offered_as_one(root, tmp_path):
    shutil.copytree(root / "reward_model", tmp_path / "scores")
    shutil.copytree(root / "sft", tmp_path / "writes")
    for name, task in (("adapter_scores", "SEQ_CLS"), ("adapter_writes", "CAUSAL_LM")):
        (tmp_path / name / "model").mkdir(parents=True)
        settings = {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": str(root / "sft" / "model")}
        (tmp_path / name / "model" / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "damaged" / "model").mkdir(parents=True)
    (tmp_path / "damaged" / "model" / "config.json").write_text("{")
    offered = [name for name in finished_runs(tmp_path) if not is_reward_model(tmp_path / name / "model")]
    assert offered == ["adapter_writes", "damaged", "writes"]


def test_runs_of_the_demo_play_its_prompts_for_its_gold_reward(root, tmp_path):
    for name in ("sft", "reward_model"):
        shutil.copytree(root / name, tmp_path / name)
    tokenizer = tiny_tokenizer()  # the demo's prompts are message lists
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "sft" / "model")
    write_config(tmp_path / "sft", "SFTDataModule", validation="demo")
    brief = {"policies": ("sft",), "generation": GenerationSettings(max_new_tokens=2), "max_prompts": 4}
    found = compare(root=str(tmp_path), **brief)
    assert "gold_reward" in found["sft"] and "bayes_accuracy" in found["reward_model"]


def test_models_in_memory_are_those_that_the_stage_needs(results):
    models = {name: results[name]["models_in_memory"] for name in RUNS}
    # PPO: policy, critic, reference and reward model, learnt from or watched; DPO: policy and reference, if not cached.
    assert models == {"sft": 1, "ppo": 4, "ppo_monitored": 4, "dpo": 2, "dpo_cached": 1}


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"metrics": [], "models_in_memory": 1, "peak_memory_mb": 1, "seconds": 1}', "\xff"]
)
def test_a_damaged_summary_is_named(content, tmp_path):
    (tmp_path / "summary.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"/summary\.json is damaged: expected an object with metrics, "):
        read_summary(tmp_path)


def test_results_replace_neither_a_folder_nor_the_prompts(root):
    generation = GenerationSettings(max_new_tokens=4)
    options = {"root": str(root), "policies": ("sft",), "reward_model": None, "gold": share_of_w9}
    refused = {
        ".": "is a folder",
        "prompts.jsonl": "must end in .json",
        "sft/model/config.json": "is what the run reads",
    }
    for output, words in refused.items():
        with pytest.raises(UserError, match=f"output: .* {words}"):
            compare(**options, prompts=str(root / "prompts.jsonl"), generation=generation, output=str(root / output))


def test_a_run_that_is_no_policy_is_told_before_any_policy_plays(root, monkeypatch):
    def play(*args):
        raise AssertionError("a policy plays")

    monkeypatch.setattr("lit_rlhf.cli.compare.complete", play)
    options = {"root": str(root), "reward_model": None, "gold": share_of_w9, "prompts": str(root / "prompts.jsonl")}
    generation = GenerationSettings(max_new_tokens=4)
    with pytest.raises(UserError, match=r"reward_model/model holds a reward model .*, not a policy"):
        compare(**options, policies=("sft", "reward_model"), generation=generation)


@pytest.mark.parametrize("terminal", [False, True])
def test_no_number_and_no_name_is_cut_where_many_policies_do_not_fit_side_by_side(terminal, monkeypatch, capsys):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    results = {f"policy_{number}": dict.fromkeys(FIGURES, 1000 + number) for number in range(12)}
    print_table(results, "policy_0")
    told = re.sub("\x1b[^m]*m", "", capsys.readouterr().out)
    assert told.count("Held-out prompts") == (3 if terminal else 1)
    assert all(told.count(f" {1000 + number} ") >= 3 and f" policy_{number} " in told for number in range(12))
    assert "…" not in told and (not terminal or max(map(len, told.splitlines())) <= 80)
