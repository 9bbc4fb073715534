import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lit_rlhf import RolloutDataModule, TextReward, UserError
from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.modules import load_prompts
from lit_rlhf.rollout import data_module as rollouts
from tests.ppo_runs import make
from tests.stages import make_stage, make_trainer, share_of_w9, write_inputs
from token_mdp.verifiable import ExactAnswer, PythonParses


def test_the_prompts_of_rollouts_keep_their_numbers_on_whatever_rank_and_in_whatever_batch(tmp_path):
    write_inputs(tmp_path)
    _, data = make_stage("ppo", tmp_path)
    data.settings = replace(data.settings, num_slots=1)  # batches of at most four
    data.prompts["predict"] = PromptBatch([np.array([i]) for i in range(10)], {}, np.arange(10))
    batches = []
    for rank in (0, 1):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        batches += data.predict_dataloader()
    assert len(batches) == 4
    assert [batch.numbers.tolist() for batch in batches] == [np.concatenate(b.prompt_ids).tolist() for b in batches]


def test_the_prompts_of_rollouts_are_tokenised_by_as_many_processes_as_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(rollouts, "load_prompts", lambda *a, num_proc: asked.append(num_proc) or load_prompts(*a))
    write_inputs(tmp_path)
    module, data = make_stage("ppo", tmp_path)
    data.tokenization = replace(data.tokenization, num_proc=2)
    make_trainer(tmp_path, limit_val_batches=1).validate(module, data, verbose=False)
    assert asked == [2]  # once, by `prepare_data`
    with pytest.raises(UserError, match=r"num_proc \(0\)"):
        RolloutDataModule(share_of_w9, "prompts.jsonl", None, num_proc=0)


def test_the_prompts_of_rollouts_are_read_by_the_template_and_options_given(tmp_path):
    write_inputs(tmp_path)
    template = "{% if thinking %}{{ 'w9 ' }}{% endif %}{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": "w3 </s>"}]}] * 2
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def prompts(**options):
        module, data = make_stage("ppo", tmp_path)
        sources = {"train": str(source), "validation": str(source)}
        data = RolloutDataModule(share_of_w9, **sources, max_new_tokens=4, tokenizer=module.tokenizer, **options)
        make_trainer(tmp_path, limit_val_batches=1).validate(module, data, verbose=False)
        return [ids.tolist() for ids in data.prompts["validation"].prompt_ids], module.tokenizer.chat_template

    with pytest.raises(UserError, match="set chat_template"):
        prompts()
    assert prompts(chat_template=template) == ([[3, 2]] * 2, template)
    assert prompts(chat_template=template, chat_template_kwargs={"thinking": True})[0] == [[9, 3, 2]] * 2
    with pytest.raises(UserError, match=r"control tokens \['</s>'\]"):
        prompts(chat_template=template, control_tokens="refuse")
    with pytest.raises(UserError, match="chat_template_kwargs: messages cannot be set there"):
        prompts(chat_template_kwargs={"messages": []})


def test_prompts_are_named_by_declared_columns_and_a_rewards_own_arguments_are_not_among_them(tmp_path):
    write_inputs(tmp_path)
    module, _ = make_stage("ppo", tmp_path)
    (tmp_path / "prompts.csv").write_text("question,prompts\nw3 w4,w5\nw6,w7\n")
    given = {"train": None, "validation": str(tmp_path / "prompts.csv"), "tokenizer": module.tokenizer}

    def columns(**names):
        data = RolloutDataModule(share_of_w9, columns=names, max_new_tokens=4, **given)
        make_trainer(tmp_path, limit_val_batches=1).validate(module, data, verbose=False)
        return data.prompts["validation"].columns

    with pytest.raises(UserError, match=r"prompts\.csv, line 2, column 'prompts': a reward function has an argument"):
        columns(prompt="question")
    assert columns(prompt="question", hint="prompts") == {"prompt": ["w3 w4", "w6"], "hint": ["w5", "w7"]}


def test_fit_without_prompts_is_refused(tmp_path):
    write_inputs(tmp_path)
    module, data = make_stage("ppo", tmp_path)
    data.sources["train"] = None
    with pytest.raises(UserError, match=r"data\.train is null, and fit needs rows"):
        make_trainer(tmp_path, max_epochs=1).fit(module, data)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"rollout_size": 10**12},
            r"^rollout_size \(10{12}\) episodes of up to max_new_tokens \(8\).* 1,352,000 GB; this",
        ),
        ({"ppo_epochs": 10**12}, r"in ppo_epochs \(10{12}\) orders, would take about 256,000 GB"),
        ({"num_minibatches": 10**12}, r"a rollout of 16 episodes .* num_minibatches \(10{12}\)"),
        ({"rollout_size": 3}, r"a rollout of 3 episodes per rank cannot be cut into num_minibatches \(4\)"),
    ],
)
def test_sizes_beyond_all_measure_are_refused_before_anything_is_played(sizes, message, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_rlhf.rollout.play.play", lambda *a, **k: pytest.fail("it was played"))
    of_module = {name: value for name, value in sizes.items() if name != "rollout_size"}
    module, data = make_stage("ppo", inputs, **{"num_minibatches": 4, "ppo_epochs": 2} | of_module)
    data.settings = replace(data.settings, rollout_size=sizes.get("rollout_size", 16))
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, max_epochs=1).fit(module, data)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"group_size": 0}, r"^group_size \(0\) must be 1 or more completions of each prompt$"),
        ({"group_size": 5}, r"^rollout_size \(16\) must be a multiple of group_size \(5\); try 20$"),
        ({"group_size": 2.5}, r"^group_size \(2.5\) must be a whole number"),
    ],
)
def test_groups_that_cannot_be_dealt_are_refused(sizes, message, folder, tmp_path):
    with pytest.raises(UserError, match=message):
        make(folder, tmp_path, data=sizes)


@pytest.mark.parametrize(("group_size", "message"), [(4, "3 ranks in groups of 4; try 12"), (1, "3 ranks; try 15")])
def test_a_group_is_not_torn_between_ranks(group_size, message, folder, tmp_path, monkeypatch):
    module, data, trainer = make(folder, tmp_path, data={"group_size": group_size})
    monkeypatch.setattr(type(trainer), "world_size", property(lambda self: 3))
    with pytest.raises(UserError, match=rf"^rollout_size \(16\) must divide among {message}$"):
        trainer.fit(module, data)


def test_the_share_of_a_prompt_among_its_group_changes_no_gradient(folder, tmp_path):
    def weights(max_tokens):
        data = {"group_size": 4, "max_tokens": max_tokens}
        module, data, trainer = make(folder, tmp_path, data=data, num_minibatches=2, ppo_epochs=2)
        trainer.fit(module, data)
        return torch.cat([p.detach().flatten() for p in module.policy.parameters()]), data.minibatches().sharing

    (whole, shared), (halves, by_two), (ones, alone) = (weights(limit) for limit in (None, 30, 18))
    assert (shared, by_two, alone) == (4, 2, 1)
    torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ones, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "said"), [({}, "both missing"), ({"reward": share_of_w9, "rewards": {"a": share_of_w9}}, "both given")]
)
def test_one_reward_or_several_are_needed_and_not_both(given, said):
    with pytest.raises(UserError, match=rf"data\.reward and data\.rewards are {said}: give one"):
        RolloutDataModule(**given)


def test_stop_strings_end_the_responses_of_training_and_of_validation(tmp_path):
    write_inputs(tmp_path)
    heard = []

    def listen(prompts, responses, **columns):
        heard.extend(responses)
        return [0.0] * len(responses)

    def play(**options):
        heard.clear()
        module, _ = make_stage("ppo", tmp_path)
        prompts = str(tmp_path / "prompts.jsonl")
        sizes = {"rollout_size": 16, "num_slots": 4, "max_new_tokens": 8, "tokenizer": module.tokenizer}
        data = RolloutDataModule(TextReward(listen), train=prompts, validation=prompts, **sizes, **options)
        make_trainer(tmp_path, max_epochs=1, limit_val_batches=None, num_sanity_val_steps=0).fit(module, data)
        return list(heard)

    stops = (" w3", " w2")  # which begin many words
    free, ended = play(), play(stop_strings=stops)
    assert len(free) == len(ended) == 16 + 24
    before_the_last = [[text.strip().rpartition(" ")[0] for text in texts] for texts in (free, ended)]
    found = [sum(stop in text for text in texts for stop in stops) for texts in before_the_last]
    assert found[0] > 0 == found[1]
    with pytest.raises(UserError, match=r"stop_strings \(\(''"):
        RolloutDataModule(TextReward(listen), stop_strings=[""])


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"limit_train_batches": 1}, r"limit_train_batches \(1\) would end an iteration"),
        ({"limit_train_batches": 0.5}, r"limit_train_batches \(0.5\) would end an iteration"),
        ({"overfit_batches": 1}, r"overfit_batches \(1\)"),
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]}, "GradientAccumulationScheduler"),
    ],
    ids=["limit", "share", "overfit", "accumulation"],
)
def test_options_of_the_trainer_that_would_cut_or_mix_up_rollouts_are_refused(folder, tmp_path, option, words):
    module, data, trainer = make(folder, tmp_path, trainer={"max_epochs": 4} | option)
    with pytest.raises(UserError, match=words):
        trainer.fit(module, data)


def test_a_fast_dev_run_plays_one_rollout(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, trainer={"fast_dev_run": True})
    trainer.fit(module, data)
    assert trainer.global_step == 1


def test_the_demos_held_out_prompts_are_not_taken_for_those_of_other_training_prompts(folder, tmp_path):
    with pytest.raises(UserError, match=r"data.validation is still 'demo' while data.train is '.*prompts\.jsonl'"):
        make(folder, tmp_path, data={"validation": "demo"})


def test_a_rollout_that_cannot_be_cut_into_minibatches_is_refused_with_the_numbers(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, num_minibatches=20)
    with pytest.raises(UserError, match=r"rollout of 16 episodes .* num_minibatches \(20\)"):
        trainer.fit(module, data)


def test_prompts_are_looked_at_without_a_trainer_and_batches_need_one(tmp_path):
    write_inputs(tmp_path)
    _, data = make_stage("ppo", tmp_path)
    data.prepare_data()
    data.setup("fit")
    batches = [batch.prompt_ids for batch in data.val_dataloader()]
    assert sum(map(len, batches)) == len(data.prompts["train"].prompt_ids) > 1
    with pytest.raises(UserError, match=r"^RolloutDataModule\.train_dataloader needs a Trainer, [^\n]*$"):
        data.train_dataloader()
    data.settings = replace(data.settings, max_new_tokens=62)
    with pytest.warns(UserWarning, match="A prompt may have 2 tokens"):  # what the context leaves now
        data.setup("fit")
    assert max(map(len, data.prompts["train"].prompt_ids)) == 2


def test_columns_that_no_reward_reads_are_not_kept_while_a_policy_learns(tmp_path):
    write_inputs(tmp_path)
    rows = [{"prompt": "w3 w4", "answer": "w5", "hint": "w6", "essay": "w7"}] * 8
    source = tmp_path / "columns.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def hinted(prompts, responses, hint):
        return [float(len(one)) for one in hint]

    def kept(**rewards):
        module, _ = make_stage("ppo", tmp_path)
        data = RolloutDataModule(
            **rewards, train=str(source), validation=str(source), max_new_tokens=4, tokenizer=module.tokenizer
        )
        trainer = make_trainer(tmp_path, limit_val_batches=1)
        trainer.validate(module, data, verbose=False)
        data.setup("predict")
        assert set(data.prompts["predict"].columns) == set(rows[0])  # which `predict` writes beside completions
        return set(data.prompts["validation"].columns)

    assert kept(reward=hinted) == {"hint"}
    assert kept(reward=share_of_w9) == set(rows[0])  # it takes **columns
    assert kept(rewards={"a": hinted, "b": ExactAnswer()}, monitors={"c": PythonParses()}) == {"hint", "answer"}
