"""The embedded rows: fixed, disjoint, and as noisy as they say."""

import hashlib
import json

import numpy as np
import pytest

from lit_rlhf.demo import bayes_accuracy, gold_reward, rows
from lit_rlhf.demo.grammar import PHRASES
from lit_rlhf.demo.text import SIZES
from tests.demo.conversations import content


def test_rows_are_the_same_on_every_machine():
    everything = json.dumps([rows(kind, split) for kind, split in SIZES], sort_keys=True)
    assert hashlib.sha256(everything.encode()).hexdigest()[:16] == "fbb8ad79c73f616d"


@pytest.mark.parametrize(("kind", "split"), SIZES)
def test_rows_have_the_promised_number_and_distinct_prompts(kind, split):
    prompts = [content(row["prompt"]) for row in rows(kind, split)]
    assert len(prompts) == len(set(prompts)) == SIZES[kind, split]


def test_no_validation_prompt_occurs_in_training_data_of_any_kind():
    seen = {split: {content(row["prompt"]) for k, s in SIZES if s == split for row in rows(k, s)} for _, split in SIZES}
    assert not seen["train"] & seen["validation"]


def test_rows_can_be_changed_without_changing_the_next_caller_s():
    rows("prompts", "validation")[0]["prompt"][0]["content"] = "changed"
    assert content(rows("prompts", "validation")[0]["prompt"]) != "changed"


def test_rows_refuse_an_unknown_split():
    with pytest.raises(ValueError, match="no embedded rows of kind 'sft', split 'test'"):
        rows("sft", "test")  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_preferences_are_noisy_but_informative(split):
    assert 0.85 < bayes_accuracy(rows("preference", split)) < 0.92


def test_the_better_reply_is_chosen_as_often_as_bradley_terry_says():
    pairs = rows("preference")
    prompts = [pair["prompt"] for pair in pairs]
    difference = gold_reward(prompts, [p["chosen"] for p in pairs]) - gold_reward(
        prompts, [p["rejected"] for p in pairs]
    )
    right = np.mean(difference > 0) + np.mean(difference == 0) / 2
    # 5000 coin tosses of about 0.9: the standard error is 0.004
    assert right == pytest.approx(bayes_accuracy(pairs), abs=0.025)


def test_pairs_never_show_what_a_hacked_reward_model_would_be_fed():
    for pair in rows("preference"):
        for side in ("chosen", "rejected"):
            text = content(pair[side])
            courtesies = [phrase for role in ("apology", "thanks", "offer", "closing") for phrase in PHRASES[role]]
            assert sum(text.count(phrase) for phrase in courtesies) <= 5
            assert all(text.count(phrase) <= 2 for phrase in courtesies)
