"""A conversation: each answer is that to all that was said before, in the words of the chat template."""

import numpy as np
import pytest
import torch

from lit_rlhf import UserError
from lit_rlhf.rollout.conversation import Conversation
from lit_rlhf.rollout.play import GenerationSettings
from lit_rlhf.rollout.rewards import TextReward
from tests.tiny import plain_logits, tiny_policy, tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ {'system': 'w3 ', 'user': 'w4 ', 'assistant': 'w5 '}[m.role] + m.content + ' ' }}"
TEMPLATE += "{% endfor %}{% if add_generation_prompt %}w5{% endif %}"
GREEDY = GenerationSettings(max_new_tokens=4, temperature=0.0)


def make(settings=GREEDY, template=TEMPLATE, system=None):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Conversation(tiny_policy(), tokenizer, settings, system)


def most_likely(text, count=4):
    """What the model continues a text with, a token at a time, by transformers' own attention."""
    policy, tokenizer = tiny_policy(), tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = len(ids)
    while len(ids) < first + count and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(plain_logits(policy.model, np.array(ids))[-1].argmax()))
    return tokenizer.decode(ids[first:], skip_special_tokens=True)


def test_an_answer_follows_from_the_system_prompt_and_all_turns_before_it():
    talk = make(system="w30")
    first = talk.ask("w10 w11").text.strip()
    assert first == most_likely("w3 w30 w4 w10 w11 w5")
    assert talk.ask("w12").text.strip() == most_likely(f"w3 w30 w4 w10 w11 w5 {first} w4 w12 w5")
    talk.begin("w31")
    assert talk.ask("w12").text.strip() == most_likely("w3 w31 w4 w12 w5")


def test_without_a_chat_template_each_text_is_continued_by_itself():
    talk = make(template=None)
    for _ in range(2):
        assert talk.ask("w10 w11").text.strip() == most_likely("w10 w11")
    assert talk.take_back() is None


def test_what_is_heard_meanwhile_is_the_answer():
    pieces = []
    answer = make().ask("w10 w11", pieces.append)
    assert len(pieces) >= 3
    assert "".join(pieces).strip() == answer.text.strip()


def test_answers_differ_from_each_other_and_are_the_same_in_another_conversation_of_the_seed():
    talks = [make(GenerationSettings(max_new_tokens=8, seed=seed), template=None) for seed in (1, 1, 2)]
    first, same, other = ([talk.ask("w10").text for _ in range(3)] for talk in talks)
    assert len(set(first)) == 3
    assert first == same != other


def test_a_question_that_is_taken_back_was_never_asked():
    talk, other = make(), make()
    for question in ("w10", "w11"):
        talk.ask(question)
    assert talk.take_back() == "w11"
    other.ask("w10")
    assert talk.ask("w12").text == other.ask("w12").text


def test_the_earliest_turns_are_forgotten_where_the_context_has_no_room_for_them(monkeypatch):
    talk = make(system="w30")
    prompts = [talk.ask("w10 " * 9 + f"w{20 + turn}").prompt for turn in range(6)]
    lengths = [len(prompt.prompt_ids[0]) for prompt in prompts]
    assert max(lengths) <= 64 - 4 and lengths[-1] > 64 - 4 - 17  # of 17 tokens a turn, as many as have room
    (kept,) = prompts[-1].columns["prompt"]
    assert [message["role"] for message in kept[:2]] == ["system", "user"]
    assert "w10" in kept[1]["content"] and kept[-1]["content"].endswith("w25")


def test_an_answer_ends_where_the_context_does():
    talk = make(GenerationSettings(max_new_tokens=1000, temperature=0.0), template=None)
    assert len(talk.ask("w10 " * 30).response_ids) <= 34


@pytest.mark.parametrize("text", ["w10 " * 70, " "])
def test_a_question_without_room_or_without_a_token_is_refused_and_nothing_was_said(text):
    talk = make(template=None)
    with pytest.raises(UserError, match=r"the question has (70|0) tokens"):
        talk.ask(text)
    assert talk.asked == 0


def test_a_system_prompt_that_the_model_would_not_read_is_refused():
    with pytest.raises(UserError, match="no chat template, so it continues text"):
        make(template=None, system="w30")
    with pytest.raises(UserError, match="leaves system prompts out"):
        make(template="{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", system="w30")
    with pytest.raises(UserError, match="no system here"):
        make(
            template="{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}?",
            system="w30",
        )


def test_a_reward_reads_the_prompt_as_in_training():
    heard = []

    def reward(prompts, responses, **columns):
        heard.append((prompts, responses, columns))
        return [0.25]

    talk, judge = make(system="w30"), TextReward(reward)
    judge.bind(talk.tokenizer, torch.device("cpu"))
    answer = talk.ask("w10")
    assert answer.score(judge, "reward") == 0.25
    messages = [{"role": "system", "content": "w30"}, {"role": "user", "content": "w10"}]
    assert heard == [(["w3 w30 w4 w10 w5"], [answer.text], {"prompt": [messages]})]
