import hashlib
import json
import random

import pytest

from lit_rlhf.demo import right_steps, rows, sum_reward
from lit_rlhf.demo.sums import SIZES, question, solution
from tests.demo.conversations import content


def joined(row):
    return content(row["prompt"]), "\n".join(row["completions"])


def test_rows_are_the_same_on_every_machine():
    everything = json.dumps([rows("stepwise", split) for split in SIZES], sort_keys=True)
    assert hashlib.sha256(everything.encode()).hexdigest()[:16] == "74659d5360c1718e"


@pytest.mark.parametrize("split", SIZES)
def test_the_labels_are_what_the_checker_says(split):
    assert len(rows("stepwise", split)) == SIZES[split]
    for row in rows("stepwise", split):
        assert right_steps(*joined(row)) == row["labels"]


def test_no_prompt_of_validation_is_learnt_from():
    train, validation = ({content(row["prompt"]) for row in rows("stepwise", split)} for split in SIZES)
    assert not train & validation


def test_about_a_fifth_of_the_steps_that_build_on_right_ones_are_wrong():
    firsts = [row["labels"].index(False) if False in row["labels"] else None for row in rows("stepwise")]
    built = sum(len(row["labels"]) if at is None else at + 1 for at, row in zip(firsts, rows("stepwise"), strict=True))
    assert 0.17 < sum(at is not None for at in firsts) / built < 0.23


@pytest.mark.parametrize(
    ("response", "right", "reward"),
    [
        ("3 + 4 = 7\n7 + 5 = 12\n", [True, True], 1.0),
        ("3 + 4 = 8\n8 + 5 = 13", [False, False], 0.0),
        ("3 + 4 = 8\n8 + 4 = 12", [False, False], 1.0),  # the right sum by two mistakes
        ("3 + 4 = 7", [True], 0.0),
        ("7 + 5 = 12", [False], 1.0),
        ("3 + 4 = 7\n7 + 5 = 12\n12 + 0 = 12", [True, True, False], 1.0),
        ("", [], 0.0),
    ],
)
def test_the_checker_asks_for_the_step_that_is_due_and_the_reward_for_the_last_sum(response, right, reward):
    prompt = question((3, 4, 5))
    assert prompt == "Add 3, 4 and 5, one by one."
    assert right_steps(prompt, response) == right
    assert sum_reward([prompt], [response]) == [reward]


def test_without_mistakes_every_step_is_right():
    assert solution((4, 4, 4, 4), random.Random(0), mistakes=0.0) == (
        ["4 + 4 = 8", "8 + 4 = 12", "12 + 4 = 16"],
        [True, True, True],
    )
