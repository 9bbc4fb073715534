"""The language of the embedded data: what customers ask and what a support desk answers, as sentence templates.

A template has slots, `{product}` or `{order}`; a slot has a kind, and a kind has a list of values. The grammar is read
in both directions: `text.py` fills slots to write text, `gold.py` empties them with `abstract` to judge it.

    "We will replace the kettle for free."  ⇄  "We will replace the {product} for free." + ["kettle"]
"""

import re
from typing import NamedTuple

VALUES: dict[str, tuple[str, ...]] = {
    "product": ("kettle", "lamp", "toaster", "camera", "printer", "phone", "jacket", "tent", "bicycle", "guitar"),
    "order": tuple(str(number) for number in range(127, 1000, 46)),
    "plan": ("music", "film", "news", "fitness", "language", "cooking"),
    "city": ("Leeds", "York", "Oslo", "Paris", "Berlin", "Madrid", "Dublin", "Vienna"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "count": ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
}
# A second slot of a kind: the wrong product in the parcel; the days that the desk promises.
KIND_OF = {kind: kind for kind in VALUES} | {"other": "product", "wait": "count"}

_SLOT = re.compile(r"\{(\w+)\}")
_VALUE = re.compile("|".join(rf"(?P<{kind}>\b(?:{'|'.join(values)})\b)" for kind, values in VALUES.items()))


class Topic(NamedTuple):
    """What customers ask about one thing, and what helps them."""

    is_complaint: bool  # an apology is apt
    questions: tuple[str, ...]  # each binds the same slots, and every slot that must agree in `steps`
    steps: tuple[str, ...]  # concrete next steps that answer the question; slots not bound by it are free
    apology: str = ""  # the apology that names the matter, for complaints


TOPICS: dict[str, Topic] = {
    "late": Topic(
        True,
        (
            "Order {order} is {count} days late. Where is the {product}?",
            "I am still waiting for the {product} from order {order} after {count} days.",
            "Order {order} should have come {count} days ago, but the {product} is not here.",
        ),
        (
            "I have asked the courier to trace order {order}.",
            "The {product} will arrive on {day}.",
            "I have moved order {order} to express delivery.",
        ),
        "I am sorry that the {product} is late.",
    ),
    "refund": Topic(
        True,
        (
            "I returned the {product} from order {order}. Where is my refund?",
            "When will I get the money back for the {product} from order {order}?",
            "You have the {product} back, but I see no refund for order {order}.",
        ),
        (
            "I have sent the refund for order {order} to your card.",
            "You will get the money for the {product} within {wait} days.",
        ),
        "I am sorry that your refund took so long.",
    ),
    "damaged": Topic(
        True,
        (
            "The {product} from order {order} arrived broken.",
            "The {product} in order {order} came with a big crack.",
            "I opened order {order} and the {product} was smashed.",
        ),
        (
            "We will replace the {product} for free.",
            "Please send us a photo of the {product}.",
            "We will collect the parcel of order {order} on {day}.",
        ),
        "I am sorry that the {product} arrived damaged.",
    ),
    "wrong item": Topic(
        True,
        (
            "I ordered the {product} but got the {other}.",
            "You sent me the {other} and not the {product}.",
            "My parcel had the {other} in it. I paid for the {product}.",
        ),
        (
            "We will send the {product} to you today.",
            "Please return the {other} with the label in the box.",
        ),
        "I am sorry that we sent the wrong parcel.",
    ),
    "password": Topic(
        False,
        (
            "I forgot the password of the {plan} app.",
            "I can not log in to the {plan} app any more.",
            "My password for the {plan} app does not work.",
        ),
        (
            "I have sent you a link to log in to the {plan} app.",
            "Please choose a new password in the {plan} app.",
        ),
    ),
    "billing": Topic(
        True,
        (
            "I was charged twice for order {order}.",
            "My card shows the charge for order {order} twice.",
            "You took the money for order {order} a second time.",
        ),
        (
            "I have cancelled the second charge for order {order}.",
            "The extra money will be back on your card on {day}.",
        ),
        "I am sorry about the double charge.",
    ),
    "cancel": Topic(
        False,
        (
            "I want to cancel the {plan} subscription.",
            "Please stop the {plan} subscription this month.",
            "How do I end the {plan} subscription?",
        ),
        (
            "I have cancelled the {plan} subscription.",
            "You can use the {plan} app until the month ends.",
        ),
    ),
    "address": Topic(
        False,
        (
            "I live in {city} now. Please send order {order} there.",
            "Please send order {order} to my parents in {city}.",
            "Can you deliver order {order} to my new home in {city}?",
        ),
        (
            "I have changed the address of order {order}.",
            "We will deliver it in {city} on {day}.",
        ),
    ),
    "opening hours": Topic(
        False,
        (
            "When is your shop in {city} open?",
            "I want to visit your shop in {city}. When does it open?",
            "Is the shop in {city} open at the weekend?",
        ),
        (
            "Our shop in {city} is open every day.",
            "You can book a visit in {city} on our website.",
        ),
    ),
    "stock": Topic(
        False,
        (
            "Can I buy the {product} in {city}?",
            "Is the {product} in stock in {city}?",
            "Do you have the {product} in {city}?",
        ),
        (
            "We have the {product} in our shop in {city}.",
            "I can keep the {product} for you until {day}.",
        ),
    ),
    "invoice": Topic(
        False,
        (
            "I need the invoice for order {order}.",
            "Can you send me a receipt for order {order}?",
            "I can not find the invoice for order {order}.",
        ),
        (
            "I have sent the invoice for order {order} to your email.",
            "You can print the invoice for order {order} in your account.",
        ),
    ),
    "warranty": Topic(
        True,
        (
            "The {product} stopped working after {count} months.",
            "The {product} I bought {count} months ago does not turn on.",
            "After only {count} months the {product} is dead.",
        ),
        (
            "We will repair the {product} under warranty.",
            "Please send the {product} to our repair team.",
            "You will get the {product} back within {wait} days.",
        ),
        "I am sorry that the {product} does not work.",
    ),
}

OPENERS = ("", "Hi.", "Hello.", "Good evening.", "Dear team.")
TAILS = ("", "Please help.", "Can you help me?", "Thanks.", "What can you do?")

# Sentences of a reply that fit any topic, by their role.
PHRASES: dict[str, tuple[str, ...]] = {
    "greeting": ("Hello!", "Hi there!", "Good morning!"),
    "apology": ("I am sorry about that.", "I am very sorry for the trouble."),
    "thanks": ("Thank you for your message.", "Thank you for getting in touch."),
    "offer": (
        "Is there anything else I can do for you?",
        "Please write again if you need more help.",
        "Let me know if you have any questions.",
    ),
    "closing": ("Have a nice day!", "Best wishes from the support team.", "Take care!"),
    "vague": ("We are looking into it.", "It should be fine soon.", "These things take time.", "Check the website."),
    "rude": ("That is not my problem.", "You should have read the rules.", "Stop asking.", "Just calm down."),
    "filler": (
        "We are a family business with many years of experience.",
        "Our customers all over the world love what we do.",
    ),
}


class Sentence(NamedTuple):
    """What the grammar knows of one sentence of a reply."""

    role: str  # a key of PHRASES, or "step"
    topic: str  # of steps and of apologies that name the matter, else ""
    slots: tuple[str, ...]  # slot names, in the order of their values in the sentence


def slots_of(template: str) -> tuple[str, ...]:
    """Slot names of a template, in order."""
    return tuple(_SLOT.findall(template))


def abstract(text: str) -> tuple[str, list[str]]:
    """Empty the slots: the text with each slot value replaced by its kind, and those values in order."""
    values: list[str] = []

    def empty(match: re.Match[str]) -> str:
        values.append(match.group())
        return f"{{{match.lastgroup}}}"

    return _VALUE.sub(empty, text), values


def pattern_of(template: str) -> str:
    """What `abstract` makes of any text written from the template: slot names become kinds."""
    return _SLOT.sub(lambda match: f"{{{KIND_OF[match.group(1)]}}}", template)


def _reply_language() -> dict[str, Sentence]:
    language = {text: Sentence(role, "", ()) for role, texts in PHRASES.items() for text in texts}
    for name, topic in TOPICS.items():
        for step in topic.steps:
            language[pattern_of(step)] = Sentence("step", name, slots_of(step))
        if topic.apology:
            language[pattern_of(topic.apology)] = Sentence("apology", name, slots_of(topic.apology))
    return language


REPLY_LANGUAGE = _reply_language()  # pattern of a sentence -> what it does
_QUESTIONS = {
    pattern_of(question): (name, slots_of(question)) for name, topic in TOPICS.items() for question in topic.questions
}


def read_question(text: str) -> tuple[str, dict[str, str]]:
    """Topic and slot values of a customer's message; `("", {})` for a message outside the grammar."""
    pattern, values = abstract(text)
    for question, (topic, slots) in _QUESTIONS.items():
        if question in pattern:
            return topic, dict(zip(slots, values, strict=False))
    return "", {}
