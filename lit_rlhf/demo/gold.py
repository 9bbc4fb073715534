"""The gold reward: what the demo's customers really want. It labels the pairs and judges the policies at the end.

The reward model never sees it, only preferences drawn from it (`text.py`). It reads the texts alone: no hidden label.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_rlhf.demo.grammar import REPLY_LANGUAGE, TOPICS, abstract, read_question

LIMIT = 3.0  # rewards lie in [-LIMIT, LIMIT]
MAX_WORDS = 40  # a longer reply costs, word by word
MIN_WORDS = 6

_SENTENCE = re.compile(r"[^.!?]*[.!?]|[^.!?]+$")
_DOUBLED = re.compile(r"\b(\w+)( \1\b)+", re.IGNORECASE)
_MARKER = re.compile(r"<\|\w+\|>")

Messages = Sequence[dict[str, str]]


def gold_reward(prompts: Sequence[str | Messages], responses: Sequence[str | Messages], **columns: Any) -> np.ndarray:
    """How helpful, polite, well-formed and concise a reply is: the sum of the four, clipped to [-3, 3].

    Args:
        prompts: (n,) customers' messages, as text or as message lists, of which the last user turn counts.
        responses: (n,) replies, as text or as message lists.
        columns: other columns of the prompts' rows; not used.

    Returns:
        (n,) float64: 3 for a reply with nothing to improve, about 0 for an ordinary one, -3 for an empty one.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"prompts ({len(prompts)}) and responses ({len(responses)}) must be of one length")
    texts = (
        (_text(prompt, "user"), _text(reply, "assistant")) for prompt, reply in zip(prompts, responses, strict=True)
    )
    total = np.array([sum(quality(*pair).values()) for pair in texts], dtype=np.float64)
    return np.clip(total, -LIMIT, LIMIT)


def is_question(prompt: str | Messages) -> bool:
    """Whether a prompt is one of the demo's customers, of whom alone the reward knows what they want."""
    return bool(read_question(_text(prompt, "user"))[0])


def quality(prompt: str, response: str) -> dict[str, float]:
    """The four parts of the quality of one reply, before the clip: helpful, polite, well_formed, concise."""
    topic, bound = read_question(prompt)
    text = response.strip()
    parts = {"helpful": 0.0, "polite": 0.0, "well_formed": 0.0, "concise": 0.0}
    if not text:
        return parts | {"helpful": -2.0, "concise": -2.0}

    sentences = [sentence.strip() for sentence in _SENTENCE.findall(text)]
    parts["well_formed"] -= 0.6 * (text[-1] not in ".!?")  # cut off, or never ended
    parts["well_formed"] -= 0.3 * (" ".join(sentences) != text)  # spaces missing, or too many
    # A sentence said again costs more each time, so that no sum of small gains pays for it.
    parts["well_formed"] -= sum(0.6 * n * (n - 1) for n in Counter(map(str.lower, sentences)).values())

    roles: list[str] = []
    right_steps: set[str] = set()
    for sentence in sentences:
        role, step = _judge(sentence, topic, bound, parts)
        roles.append(role)
        if role == "step":
            right_steps.add(step)

    parts["helpful"] += (0.7 + 0.4 * (len(right_steps) > 1)) if right_steps else -0.8
    parts["polite"] += _politeness(roles, apology_is_apt=bool(topic) and TOPICS[topic].is_complaint)

    words = len(text.split())
    parts["concise"] -= 0.08 * max(0, words - MAX_WORDS) + 0.4 * (words < MIN_WORDS)
    return parts


def _judge(sentence: str, topic: str, bound: dict[str, str], parts: dict[str, float]) -> tuple[str, str]:
    """Role and pattern of a sentence; takes its faults off `parts`. A step that does not fit has the role ""."""
    doubled = _DOUBLED.findall(sentence)
    parts["well_formed"] -= 0.7 * len(doubled)
    clean = _DOUBLED.sub(r"\1", sentence)
    if clean[:1].islower():
        parts["well_formed"] -= 0.4
        clean = clean[0].upper() + clean[1:]

    pattern, values = abstract(clean)
    # The last sentence may lack its stop, which is paid for once, by the caller: it is still understood.
    known = next((p for p in (pattern, pattern + ".", pattern + "!", pattern + "?") if p in REPLY_LANGUAGE), None)
    if known is None:  # broken grammar, word salad, keywords: by the word, so that one long sentence is no way out
        parts["well_formed"] -= 0.5 + 0.1 * len(sentence.split())
        return "", ""

    role, its_topic, slots = REPLY_LANGUAGE[known]
    if role in ("rude", "vague", "filler"):
        parts["polite" if role == "rude" else "helpful"] -= {"rude": 1.3, "vague": 0.4, "filler": 0.4}[role]
    if its_topic and its_topic != topic:
        parts["helpful"] -= 0.8
        return "", ""
    if any(bound.get(slot, value) != value for slot, value in zip(slots, values, strict=True)):
        parts["helpful"] -= 0.5  # someone else's order, another product
        return "", ""
    return role, known


def _politeness(roles: list[str], apology_is_apt: bool) -> float:
    """Each courtesy counts once and in its place; more of the same is flattery, and costs."""
    count = Counter(roles)
    total = 0.4 * (roles[0] == "greeting") + 0.4 * ("offer" in count) + 0.5 * (roles[-1] == "closing")
    if apology_is_apt:
        total += 0.6 * ("apology" in count)
    else:
        total += 0.6 * ("thanks" in count) - 0.4 * ("apology" in count)
    return total - 0.6 * sum(max(0, count[role] - 1) for role in ("greeting", "apology", "thanks", "offer", "closing"))


def _text(messages: str | Messages, role: str) -> str:
    if not isinstance(messages, str):
        messages = next((message["content"] for message in reversed(messages) if message["role"] == role), "")
    return _MARKER.sub(" ", messages).strip()
