"""The embedded rows: customers' messages, replies of mixed quality as in a real support log, and preferences.

Everything is drawn from `grammar.py` by `random.Random`, whose streams are the same on every machine.
"""

import hashlib
import math
import random
import re
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

from lit_rlhf.demo.gold import MAX_WORDS, gold_reward
from lit_rlhf.demo.grammar import KIND_OF, OPENERS, PHRASES, TAILS, TOPICS, VALUES, slots_of
from lit_rlhf.demo.sums import SIZES as SUMS
from lit_rlhf.demo.sums import sum_rows

Kind = Literal["sft", "preference", "stepwise", "prompts"]
Split = Literal["train", "validation"]

SIZES: dict[tuple[str, str], int] = {
    ("sft", "train"): 3000,
    ("sft", "validation"): 256,
    ("preference", "train"): 5000,
    ("preference", "validation"): 512,
    ("prompts", "train"): 2500,
    ("prompts", "validation"): 256,
}
TEMPERATURE = 0.4  # of the preferences: the annotators' noise, in units of gold reward
MAX_REPLY = 47  # words, numbers and stops; with the end token 48 tokens

_VERBS = ("am", "is", "are", "have", "has", "will", "can", "should")


class Request(NamedTuple):
    """A customer's message with what it is about."""

    topic: str
    text: str
    slots: dict[str, str]


def rows(kind: Kind, split: Split = "train") -> list[dict[str, Any]]:
    """The embedded data set: conversational rows, the same on every machine, in the same order.

    Args:
        kind: `sft` gives prompt and completion, `preference` prompt, chosen and rejected, `prompts` prompt and topic;
            `stepwise` is of sums, not of customers: prompt, completions and labels.
        split: `train` or `validation`; no prompt of one split, of any kind, occurs in the other.
    """
    there_are = {*SIZES, *(("stepwise", name) for name in SUMS)}
    if (kind, split) not in there_are:
        raise ValueError(f"no embedded rows of kind {kind!r}, split {split!r}; there are {sorted(there_are)}")
    if kind == "stepwise":
        return sum_rows(split)
    drawn = _draw(kind, split)
    if kind == "prompts":
        return [{"prompt": _turn("user", request.text), "topic": request.topic} for request, _ in drawn]
    names = ("completion",) if kind == "sft" else ("chosen", "rejected")
    return [
        {"prompt": _turn("user", request.text)}
        | {name: _turn("assistant", reply) for name, reply in zip(names, replies, strict=True)}
        for request, replies in drawn
    ]


@cache
def _draw(kind: str, split: str) -> list[tuple[Request, tuple[str, ...]]]:
    """Requests and their replies: none for prompts, one for demonstrations, for pairs the chosen one first."""
    rng = random.Random(f"lit-rlhf demo {kind} {split}")
    requests = _distinct_requests(rng, split, SIZES[kind, split])
    if kind == "prompts":
        return [(request, ()) for request in requests]
    if kind == "sft":
        return [(request, (sample_reply(request, rng),)) for request in requests]
    return list(zip(requests, _preferences(requests, rng), strict=True))


def preference_probability(gold_difference: float) -> float:
    """P(first preferred) = σ((r₁ - r₂) / T), the Bradley–Terry model by which the pairs are labelled."""
    return 1 / (1 + math.exp(-gold_difference / TEMPERATURE))


def bayes_accuracy(pairs: list[dict[str, Any]]) -> float:
    """Mean of max(p, 1 - p) over preference rows: the accuracy that no reward model can expect to pass."""
    prompts = [pair["prompt"] for pair in pairs]
    chosen = gold_reward(prompts, [pair["chosen"] for pair in pairs])
    rejected = gold_reward(prompts, [pair["rejected"] for pair in pairs])
    return sum(preference_probability(abs(difference)) for difference in chosen - rejected) / len(pairs)


def sample_request(rng: random.Random) -> Request:
    """A customer's message: an opener, the question, a tail."""
    topic = rng.choice(list(TOPICS))
    question = rng.choice(TOPICS[topic].questions)
    slots = _draw_slots(slots_of(question), rng)
    tails = [tail for tail in TAILS if not (question.endswith("?") and tail.endswith("?"))]
    parts = (rng.choice(OPENERS), question.format(**slots), rng.choice(tails))
    return Request(topic, " ".join(part for part in parts if part), slots)


def ideal_reply(request: Request, rng: random.Random) -> str:
    """A reply with nothing to improve: the head-room above the log."""
    topic = TOPICS[request.topic]
    while True:
        courtesy = _apology(request, rng) if topic.is_complaint else _one("thanks", rng)
        steps = [_fill(step, request.slots, rng) for step in rng.sample(topic.steps, 2)]
        reply = " ".join([_one("greeting", rng), courtesy, *steps, _one("offer", rng), _one("closing", rng)])
        if len(reply.split()) <= MAX_WORDS and _length(reply) <= MAX_REPLY:
            return reply


def sample_reply(request: Request, rng: random.Random) -> str:
    """A reply as it stands in a support log: from careful agents and from careless ones."""
    while True:
        care = rng.choice((0.0, 0.0, 1.0))  # two careless agents for a careful one
        sentences = _careless_or_not(request, care, rng)
        if rng.random() < 0.06 + 0.25 * (1 - care):
            sentences = _spoil(sentences, rng)
        reply = " ".join(sentences)
        if _length(reply) <= MAX_REPLY:
            return reply


def _length(reply: str) -> int:
    return len(re.findall(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]", reply))


def _careless_or_not(request: Request, care: float, rng: random.Random) -> list[str]:
    """Sentences of one reply, each part with a probability that grows or falls with the agent's care."""

    def happens(when_careless: float, when_careful: float) -> bool:
        return rng.random() < when_careless + care * (when_careful - when_careless)

    sentences = [_one("greeting", rng)] if happens(0.3, 0.8) else []
    if TOPICS[request.topic].is_complaint:
        if happens(0.15, 0.8):
            sentences.append(_apology(request, rng))
        elif happens(0.1, 0.2):
            sentences.append(_one("thanks", rng))
    elif happens(0.15, 0.7):
        sentences.append(_one("thanks", rng))
    elif happens(0.15, 0.1):
        sentences.append(_one("apology", rng))

    sentences += _body(request, happens, rng)
    if happens(0.25, 0.1):
        sentences.append(_one(rng.choice(("vague", "filler")), rng))
    if happens(0.2, 0.6):
        sentences.append(_one("offer", rng))
    if happens(0.2, 0.75):
        sentences.append(_one("closing", rng))
    return sentences


def _body(request: Request, happens: Callable[[float, float], bool], rng: random.Random) -> list[str]:
    """The answer itself: one or two steps that fit, someone else's answer, vague words, or rude ones."""
    steps = TOPICS[request.topic].steps
    if happens(0.4, 0.85):
        slots = request.slots
        if happens(0.2, 0.0):  # mixes the case up with another one
            slots = _draw_slots(tuple(request.slots), rng)
        return [_fill(step, slots, rng) for step in rng.sample(steps, 2 if happens(0.2, 0.5) else 1)]
    if happens(0.3, 0.3):
        other = rng.choice([topic for topic in TOPICS if topic != request.topic])
        return [_fill(rng.choice(TOPICS[other].steps), request.slots, rng)]
    return [_one("rude" if happens(0.4, 0.1) else "vague", rng)]


def _spoil(sentences: list[str], rng: random.Random) -> list[str]:
    """One slip of the pen: the last stop forgotten, a small first letter, a word or sentence doubled, no verb."""
    at = rng.randrange(len(sentences))
    words = sentences[at].split()
    match rng.choice(("stop", "case", "word", "sentence", "verb")):
        case "stop":
            return [*sentences[:-1], sentences[-1][:-1]]
        case "case":
            words[0] = words[0][0].lower() + words[0][1:]
        case "word":
            doubled = rng.randrange(max(1, len(words) - 1))  # not the last: it carries the stop
            words.insert(doubled, words[doubled])
        case "sentence":
            return [*sentences[: at + 1], *sentences[at:]]
        case "verb":
            words = [word for word in words if word not in _VERBS] or words
    return [*sentences[:at], " ".join(words), *sentences[at + 1 :]]


def _preferences(requests: list[Request], rng: random.Random) -> list[tuple[str, ...]]:
    """Two independent replies from the log for each request, in the order that Bradley–Terry on gold draws."""
    pairs = []
    for request in requests:
        first = second = sample_reply(request, rng)
        while second == first:
            second = sample_reply(request, rng)
        pairs.append((first, second))

    texts = [request.text for request in requests]
    gold = [gold_reward(texts, side) for side in zip(*pairs, strict=True)]
    return [
        pair if rng.random() < preference_probability(float(difference)) else pair[::-1]
        for pair, difference in zip(pairs, gold[0] - gold[1], strict=True)
    ]


def _distinct_requests(rng: random.Random, split: str, size: int) -> list[Request]:
    requests: dict[str, Request] = {}
    while len(requests) < size:
        request = sample_request(rng)
        if _split_of(request.text) == split:
            requests.setdefault(request.text, request)
    return list(requests.values())


def _split_of(prompt: str) -> str:
    # The text itself decides, so that no prompt can be in two splits whatever is drawn.
    return "validation" if hashlib.sha256(prompt.encode()).digest()[0] < 32 else "train"


def _draw_slots(names: tuple[str, ...], rng: random.Random) -> dict[str, str]:
    slots: dict[str, str] = {}
    for name in names:
        slots[name] = rng.choice([value for value in VALUES[KIND_OF[name]] if value not in slots.values()])
    return slots


def _fill(template: str, slots: dict[str, str], rng: random.Random) -> str:
    missing = tuple(name for name in slots_of(template) if name not in slots)
    return template.format(**slots, **_draw_slots(missing, rng))


def _apology(request: Request, rng: random.Random) -> str:
    choices = (TOPICS[request.topic].apology, *PHRASES["apology"])
    return rng.choice(choices).format(**request.slots)


def _one(role: str, rng: random.Random) -> str:
    return rng.choice(PHRASES[role])


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]
