import json

import numpy as np
import pytest
import torch

from lit_rlhf import ProcessRewardModel, ProcessRewardModelReward, Reward, RewardShaping, StepwiseDataModule, UserError
from lit_rlhf.callbacks.export import export
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.models.policy import freeze
from lit_rlhf.rollout.process_rewards import StepFinder, step_scores
from lit_rlhf.rollout.scoring import Rewards
from tests.stages import make_stage, make_trainer
from tests.tiny import random_examples, tiny_tokenizer
from tests.tiny_tokenizers import byte_tokenizer

LOG_ODDS = np.log([0.8, 0.5, 0.6]) - np.log([0.2, 0.5, 0.4])
# Of the probabilities 0.8, 0.5, 0.6, what all steps up to each come to.
SO_FAR = {
    "min": [0.8, 0.5, 0.5],
    "mean": [0.8, 0.65, 19 / 30],
    "last": [0.8, 0.5, 0.6],
    "product": [0.8, 0.4, 0.24],
    "sum": [0.8, 1.3, 1.9],
}


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The folder of a process reward model whose steps end with w3."""
    torch.manual_seed(0)
    module = ProcessRewardModel(str(folder))
    module.step_separator = " w3"
    export(module, full_state_dict(module.exportable()), tmp_path_factory.mktemp("steps") / "model")
    return str(tmp_path_factory.getbasetemp() / "steps0" / "model")


def bound(folder, **options):
    reward = ProcessRewardModelReward(folder, **options)
    reward.bind(tiny_tokenizer(), torch.device("cpu"))
    return reward


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_step_scores_are_those_of_each_solution_by_itself(folder, max_tokens):
    torch.manual_seed(0)
    scorer = freeze(ProcessRewardModel(str(folder)).process_reward_model)
    examples = random_examples(7, longest=9)
    prompts, responses = [e.prompt_ids for e in examples], [e.responses[0] for e in examples]
    rng = np.random.default_rng(0)
    ends = [np.flatnonzero(rng.random(len(response)) < 0.5) for response in responses]
    assert min(map(len, ends)) == 0 < max(map(len, ends))
    found = step_scores(scorer, prompts, responses, ends, max_tokens)
    scorer.model.set_attn_implementation("eager")
    for prompt, response, places, scores in zip(prompts, responses, ends, found, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
        logits = scorer.model(ids).logits[0, len(prompt) :, 0]
        assert scores == pytest.approx(logits[places].double().numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("response", "read", "ends", "paid_at"),
    [
        ("ab\ncd\n<eos>", "ab\ncd\n", [2, 5], [2, 5]),
        ("ab\ncd<eos>", "ab\ncd\n", [2, 5], [2, 5]),  # the separator stands in for the end token
        ("ab\ncd", "ab\ncd\n", [2, 5], [2, 4]),
        ("\n\nab\n", "\n\nab\n", [4], [4]),  # lines that say nothing are no steps
        ("ab\n \n<eos>", "ab\n \n", [2], [2]),
        ("<eos>", "<eos>", [], []),
        ("\n<eos>", "\n", [], []),
    ],
)
def test_steps_are_found_by_their_separator_and_the_last_ends_with_the_response(response, read, ends, paid_at):
    tokenizer = byte_tokenizer()
    found = StepFinder(tokenizer, "\n").find(np.array(tokenizer(response)["input_ids"]))
    assert [tokenizer.decode(found[0]), found[1].tolist(), found[2].tolist()] == [read, ends, paid_at]


def test_a_separator_may_be_of_several_tokens():
    tokenizer = byte_tokenizer()
    finder = StepFinder(tokenizer, "\n\n")
    ids = np.array(tokenizer("a\nb\n\nc")["input_ids"])
    read, ends, paid_at = finder.find(ids)
    assert (tokenizer.decode(read), ends.tolist(), paid_at.tolist()) == ("a\nb\n\nc\n\n", [4, 7], [4, 5])


@pytest.mark.parametrize("aggregate", SO_FAR)
def test_what_is_paid_by_steps_adds_up_to_what_is_paid_at_the_end(aggregate, trained):
    paid = {}
    for pay in ("end", "steps", "shaping"):
        reward = ProcessRewardModelReward(trained, aggregate=aggregate, pay=pay)
        paid[pay] = reward.paid(LOG_ODDS, np.array([1, 3, 4]), 6)
    expected = SO_FAR[aggregate]
    assert paid["end"] == pytest.approx([0, 0, 0, 0, 0, expected[-1]])
    assert np.cumsum(paid["steps"]) == pytest.approx([0, expected[0], expected[0], *expected[1:], expected[-1]])
    assert paid["shaping"] == pytest.approx(paid["steps"] - paid["end"])  # potential-based: nothing in all
    assert paid["shaping"].sum() == pytest.approx(0)


def test_a_response_is_scored_as_predict_scores_its_steps(trained, tmp_path):
    module = ProcessRewardModel(trained)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "w4 w5", "completions": ["w6 w7", " w8"]}) + "\n")
    data = StepwiseDataModule(
        predict=str(tmp_path / "rows.jsonl"), step_separator=" w3", tokenizer=module.tokenizer, train=None
    )
    [[[row]]] = [make_trainer(tmp_path).predict(module, data)]
    for pay in ("end", "steps"):
        # w6 w7 w3 w8 and the end token, in whose place the separator is read
        score = bound(trained, pay=pay)([np.array([4, 5])], [np.array([6, 7, 3, 8, 2])])
        assert score == pytest.approx(min(row["step_scores"]), abs=1e-5)


def test_steps_are_scored_once_though_asked_for_twice(trained, monkeypatch):
    reward, calls = bound(trained, aggregate="sum", pay="steps"), []
    forward = reward.scorer.forward
    monkeypatch.setattr(reward.scorer, "forward", lambda *given: calls.append(1) or forward(*given))
    prompts, responses = [np.array([4, 5])] * 2, [np.array([6, 3, 7, 2]), np.array([8, 2])]
    total = reward(prompts, responses)
    parts = reward.step_rewards(prompts, [response.copy() for response in responses])
    assert len(calls) == 1 and total == pytest.approx([part.sum() for part in parts])
    assert [np.flatnonzero(part).tolist() for part in parts] == [[1, 3], [1]]
    assert not np.array_equal(reward(prompts, responses[::-1]), total) and len(calls) == 2


def test_a_response_without_a_step_earns_nothing(trained):
    assert bound(trained)([np.array([4, 5])], [np.array([2])]).tolist() == [0.0]


def test_another_separator_than_the_model_has_learnt_with_is_refused(trained):
    assert ProcessRewardModelReward(trained).step_separator == " w3"
    with pytest.raises(
        UserError, match=r"step_separator \('\\n'\) is not what stood behind .* \(' w3'\): leave it out"
    ):
        ProcessRewardModelReward(trained, step_separator="\n")
    with pytest.raises(UserError, match=r"step_separator \(empty text\)"):
        ProcessRewardModelReward(trained, step_separator="")


class EachW9(Reward):
    """Pays each w9 where it stands, and so their number in all."""

    pays_steps = True

    def __call__(self, prompts, responses, **columns):
        return [paid.sum() for paid in self.step_rewards(prompts, responses)]

    def step_rewards(self, prompts, responses):
        return [(response == 9).astype(float) for response in responses]


@pytest.mark.parametrize(
    ("given", "shaping", "early", "late"),
    [
        (EachW9(), RewardShaping(), 1.0, 0.0),
        (
            {"dense": (EachW9(), 0.5), "one": lambda prompts, responses: [3.0] * len(responses)},
            RewardShaping(),
            0.5,
            3.0,
        ),
        (EachW9(), RewardShaping(length_penalty=0.25), 1.0, None),
    ],
)
def test_rewards_of_steps_are_credited_to_their_tokens_and_the_rest_to_the_last(
    inputs, tmp_path, given, shaping, early, late
):
    # With γ = 0 the return of a token is its own reward; the first rollout has no KL.
    module, data = make_stage("ppo", inputs, gamma=0.0, shaping=shaping)
    data.rewards = Rewards(given)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, data)
    experience = trainer.train_dataloader.experience
    assert any((ids == 9).any() for ids in experience.response_ids)
    for ids, returns in zip(experience.response_ids, experience.tokens["returns"], strict=True):
        expected = early * (ids == 9)
        expected[-1] += -0.25 * len(ids) if late is None else late
        assert returns.numpy() == pytest.approx(expected, abs=1e-5)
