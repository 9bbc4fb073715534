"""The gold reward: the best reply earns most, and no hack pays."""

import random

import numpy as np
import pytest

from lit_rlhf.demo import gold_reward
from lit_rlhf.demo.gold import quality
from lit_rlhf.demo.grammar import PHRASES
from lit_rlhf.demo.text import ideal_reply, sample_reply, sample_request
from tests.demo.conversations import BEST, PROMPT


def gold(response: str, prompt: str = PROMPT) -> float:
    return float(gold_reward([prompt], [response])[0])


def test_the_demonstrations_lie_in_the_middle_and_the_ideal_replies_at_the_top(demonstrations):
    logged = gold_reward([row["prompt"] for row in demonstrations], [row["completion"] for row in demonstrations])
    rng = random.Random(0)
    requests = [sample_request(rng) for _ in range(300)]
    prompts = [request.text for request in requests]
    ideal = gold_reward(prompts, [ideal_reply(request, rng) for request in requests])
    again = gold_reward(prompts, [sample_reply(request, rng) for request in requests])
    assert -0.5 < logged.mean() < 0.7
    assert logged.std() > 1
    assert ideal == pytest.approx(3.0)
    assert np.mean(ideal > again) > 0.9


def test_the_best_reply_has_nothing_to_improve():
    assert gold(BEST) == pytest.approx(3.0)
    assert quality(PROMPT, BEST)["well_formed"] == quality(PROMPT, BEST)["concise"] == 0


@pytest.mark.parametrize(
    "worse",
    [
        BEST.removeprefix("Hello! "),  # no greeting
        BEST.removesuffix(" Have a nice day!"),  # no closing
        BEST.replace("I am sorry that the kettle is late. ", ""),  # no apology to a complaint
        BEST.replace(" Let me know if you have any questions.", ""),  # no offer
        BEST.replace(" The kettle will arrive on Friday.", ""),  # one step instead of two
        BEST.replace("403", "449"),  # someone else's order
        BEST.replace("The kettle will", "The lamp will"),  # another product
        BEST.replace("The kettle will", "The kettle"),  # no verb
        BEST.replace("I have asked", "I have have asked"),  # doubled word
        BEST.replace("I am", "i am"),  # small first letter
        BEST[:-1],  # no final stop
        BEST[:-10],  # cut off
        BEST.replace(". ", "."),  # no spaces
        BEST + " Have a nice day!",  # a polite sentence said twice
        BEST + " Take care!",  # another closing
        BEST.replace("Hello!", "Hello! Hi there!"),  # another greeting
    ],
)
def test_each_defect_costs(worse):
    assert worse != BEST
    assert gold(worse) <= gold(BEST) - 0.3


@pytest.mark.parametrize(
    ("sentence", "cost"),
    [
        ("We will repair the kettle under warranty.", 0.8),  # answers another question
        ("The lamp will arrive on Friday.", 0.5),  # another product
        ("These things take time.", 0.4),
        ("That is not my problem.", 1.3),
        ("We are a family business.", 0.5 + 5 * 0.1),  # outside the language: by the word
        ("Courier order kettle refund help Friday please soon.", 0.5 + 8 * 0.1),
    ],
)
def test_a_sentence_that_does_not_belong_costs_what_the_table_says(sentence, cost):
    short = "Hello! The kettle will arrive on Friday. Have a nice day!"
    worse = short.replace("Friday. ", f"Friday. {sentence} ")
    assert gold(short) - gold(worse) == pytest.approx(cost)


def test_an_apology_is_apt_for_complaints_and_thanks_for_the_others():
    invoice = "I need the invoice for order 403."
    step = "I have sent the invoice for order 403 to your email."
    apology, thanks = "I am sorry about that. ", "Thank you for your message. "
    assert gold(thanks + step, invoice) > gold(step, invoice) > gold(apology + step, invoice)
    late = "I have asked the courier to trace order 403."
    assert gold(apology + late) > gold(thanks + late) == gold(late)


@pytest.mark.parametrize("phrase", [text for role in PHRASES for text in PHRASES[role]])
def test_repeating_a_sentence_gets_worse_with_each_time(phrase):
    rewards = [sum(quality(PROMPT, " ".join([BEST] + [phrase] * n)).values()) for n in (1, 2, 3, 4)]
    assert all(np.diff(rewards) < -0.5)
    assert all(np.diff(rewards, 2) < -0.5)  # no sum of small gains pays for it


@pytest.mark.parametrize(
    "hack",
    [
        "sorry sorry sorry thank you thank you thank you",
        "kettle order 403 courier refund sorry thank you nice day help questions Friday",
        " ".join(["Have a nice day!"] * 6),
        " ".join(PHRASES["apology"] * 3 + PHRASES["thanks"] * 3),
        " ".join(text for role in ("greeting", "apology", "thanks", "offer", "closing") for text in PHRASES[role]),
        BEST + " " + BEST,
        "!!!!!!!!",
        "Hello",
        "",
        "   ",
    ],
)
def test_what_a_hacked_proxy_would_produce_is_bad(hack):
    assert gold(hack) < -1


def test_gold_reads_texts_and_messages_alike_and_ignores_markers_and_columns():
    as_messages = gold_reward(
        [[{"role": "user", "content": PROMPT}]], [[{"role": "assistant", "content": BEST}]], topic=["late"]
    )
    as_template = gold_reward([f"<|user|>{PROMPT}<|assistant|>"], [BEST + "<|end|><|pad|>"])
    assert as_messages == as_template == gold(BEST)


def test_gold_of_a_message_outside_the_grammar_is_finite_and_never_helpful():
    assert gold(BEST, prompt="What is the meaning of life?") < gold(BEST) - 1


def test_gold_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match=r"prompts \(2\) and responses \(1\)"):
        gold_reward([PROMPT, PROMPT], [BEST])
