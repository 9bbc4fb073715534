import random

from lit_rlhf.demo import rows
from lit_rlhf.demo.grammar import PHRASES, REPLY_LANGUAGE, TOPICS, abstract, pattern_of, read_question, slots_of
from lit_rlhf.demo.text import sample_request
from tests.demo.conversations import content


def test_every_prompt_is_read_back_to_its_topic():
    for row in rows("prompts"):
        assert read_question(content(row["prompt"]))[0] == row["topic"]


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
