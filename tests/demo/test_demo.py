"""The embedded data, gold reward and tokenizer of `lit_rlhf.demo`."""

import hashlib
import json
import random

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from lit_rlhf.demo import MODEL_DIR, bayes_accuracy, gold_reward, rows
from lit_rlhf.demo.build import build
from lit_rlhf.demo.gold import quality
from lit_rlhf.demo.grammar import PHRASES, REPLY_LANGUAGE, TOPICS, abstract, pattern_of, read_question, slots_of
from lit_rlhf.demo.text import SIZES, ideal_reply, sample_reply, sample_request

PROMPT = "Hello. Order 403 is four days late. Where is the kettle? Thanks."
BEST = (
    "Hello! I am sorry that the kettle is late. I have asked the courier to trace order 403. "
    "The kettle will arrive on Friday. Let me know if you have any questions. Have a nice day!"
)


def gold(response: str, prompt: str = PROMPT) -> float:
    return float(gold_reward([prompt], [response])[0])


def content(messages: list[dict[str, str]]) -> str:
    (message,) = messages
    return message["content"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def demonstrations() -> list[dict]:
    return rows("sft")


# ---------------------------------------------------------------- rows


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


def test_every_prompt_is_read_back_to_its_topic():
    for row in rows("prompts"):
        assert read_question(content(row["prompt"]))[0] == row["topic"]


# ---------------------------------------------------------------- preferences


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


# ---------------------------------------------------------------- the gold reward


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


def test_slots_are_emptied_to_the_template_they_were_filled_into():
    rng = random.Random(1)
    for _ in range(300):
        request = sample_request(rng)
        for question in TOPICS[request.topic].questions:
            pattern, values = abstract(question.format(**request.slots))
            assert pattern == pattern_of(question)
            assert values == [request.slots[slot] for slot in slots_of(question)]


def test_every_question_of_a_topic_binds_every_slot_that_another_binds_and_a_step_uses():
    for name, topic in TOPICS.items():
        bound = [set(slots_of(question)) for question in topic.questions]
        used = {slot for step in topic.steps for slot in slots_of(step)}
        assert len({frozenset(slots & used) for slots in bound}) == 1, name


def test_no_sentence_of_the_grammar_means_two_things():
    sentences = sum(len(texts) for texts in PHRASES.values())
    sentences += sum(len(topic.steps) + bool(topic.apology) for topic in TOPICS.values())
    assert len(REPLY_LANGUAGE) == sentences


# ---------------------------------------------------------------- tokenizer and configuration


def test_any_text_comes_back_from_the_tokenizer(tokenizer, demonstrations):
    texts = [content(row["completion"]) for row in demonstrations[:200]]
    for text in [*texts, PROMPT, "Zażółć gęślą jaźń, 漢字 🙂\n\ttabs  and spaces "]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_generation_prompt_is_a_prefix_of_the_whole_conversation(tokenizer, demonstrations):
    for row in demonstrations:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        assert whole[: len(prompt)] == prompt
        assert whole[-1] == tokenizer.eos_token_id
        assert len(prompt) <= 32 and len(whole) - len(prompt) <= 48


def test_template_marks_the_assistant_s_tokens_with_the_end_token(tokenizer):
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": BEST}]
    encoded = tokenizer.apply_chat_template(messages * 2, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, keep in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if keep]
    assert tokenizer.decode(marked) == (BEST + "<|end|>") * 2


def test_template_refuses_a_role_it_does_not_know(tokenizer):
    with pytest.raises(Exception, match="the roles are user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be kind."}])


def test_tokens_of_plain_text_do_not_merge_over_the_boundary(tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in (PROMPT, BEST, PROMPT + BEST)]
    assert ids[0] + ids[1] == ids[2]


def test_configuration_fits_the_tokenizer(tokenizer):
    config = AutoConfig.from_pretrained(MODEL_DIR)
    assert config.vocab_size == len(tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_shipped_folder_is_what_build_makes(tmp_path):
    build(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in MODEL_DIR.iterdir()}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (MODEL_DIR / name).read_bytes(), name
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        made, shipped = (json.loads((folder / name).read_text()) for folder in (tmp_path, MODEL_DIR))
        made.pop("transformers_version", None), shipped.pop("transformers_version", None)  # of whoever ran it
        assert made == shipped, name
