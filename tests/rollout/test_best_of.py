"""Several completions of a prompt, and the best of them."""

import numpy as np
import pytest
import torch

from lit_rlhf import UserError
from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.rollout.best_of import BestOf
from lit_rlhf.rollout.play import GenerationSettings
from lit_rlhf.rollout.rewards import TextReward
from tests.tiny import random_examples, tiny_policy, tiny_tokenizer

IDS = [example.prompt_ids for example in random_examples(5, seed=3)]
PROMPTS = PromptBatch(IDS, {"id": [10, 11, 12, 13, 14]}, np.array([4, 9, 2, 3, 0]))
SETTINGS = GenerationSettings(max_new_tokens=6, num_slots=4)


def brief(prompts, responses):
    return [-float(len(response.split())) for response in responses]


def reward(function=brief):
    judge = TextReward(function)
    judge.bind(tiny_tokenizer(), torch.device("cpu"))
    return judge


def rows(prompts=PROMPTS, settings=SETTINGS, **options):
    return BestOf(**options).rows(tiny_policy(), tiny_tokenizer(), prompts, settings)


def texts(found):
    return [row["completion"] for row in found]


def test_completions_of_a_prompt_stand_together_and_differ():
    found = rows(group_size=3)
    assert [row["id"] for row in found] == np.repeat([10, 11, 12, 13, 14], 3).tolist()
    assert all(len(set(texts(found[start : start + 3]))) == 3 for start in range(0, 15, 3))
    assert "score" not in found[0]


def test_the_first_completions_are_those_of_a_smaller_group_of_any_batch():
    three, one = rows(group_size=3), rows()
    assert texts(three)[::3] == texts(one)
    alone = rows(PROMPTS.take([3]), group_size=2)
    assert texts(alone) == texts(three)[9:11]


def test_a_prompt_that_stands_twice_in_the_data_is_never_answered_by_the_same_draws():
    twice = PromptBatch([IDS[0], IDS[0]], {}, np.array([0, 1]))
    assert len(set(texts(rows(twice, group_size=4)))) == 8


def test_the_best_of_a_group_is_kept_with_the_scores_of_all():
    every, best = rows(group_size=4, reward=reward(), keep="all"), rows(group_size=4, reward=reward())
    assert [row["score"] for row in every] == brief(None, texts(every))
    for prompt, row in enumerate(best):
        group = every[4 * prompt : 4 * prompt + 4]
        scores = [one["score"] for one in group]
        first = group[scores.index(max(scores))]
        assert row == {**first, "scores": scores}


def test_of_equals_the_first_is_kept():
    equal = reward(lambda prompts, responses: [1.0] * len(responses))
    assert texts(rows(group_size=3, reward=equal)) == texts(rows())


def test_one_completion_is_scored_and_what_scores_come_to_is_told():
    (row, *_) = found = rows(reward=reward())
    assert set(row) == {"prompt", "completion", "finish_reason", "id", "score"}
    mean = np.mean([row["score"] for row in found])
    assert BestOf(reward=reward()).told(found) == f", of a mean score of {mean:.4f}"
    assert BestOf().told(rows()) == ""
    told = BestOf(8, reward()).told([{"score": 1.0, "scores": [1.0, 0.0]}, {"score": 2.0, "scores": [2.0, -1.0]}])
    assert "best of 8, of a mean score of 1.5000 against 0.5000 of all" in told
    assert "at most 1.2044 nats" in told  # log 8 - 7/8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"group_size": 0}, r"group_size \(0\) must be 1 or more"),
        ({"keep": "best"}, "keep is best, and no reward says"),
        (
            {"group_size": 2, "settings": GenerationSettings(temperature=0)},
            "at generation.temperature 0 all completions",
        ),
        ({"reward": reward(lambda prompts, responses: [0.0])}, r"reward \(.*must return one number per response"),
        ({"reward": reward(lambda prompts, responses, answer: [0.0])}, "answer"),
    ],
)
def test_what_means_nothing_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        rows(**options)
