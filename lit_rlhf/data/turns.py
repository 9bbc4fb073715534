"""Which characters of a rendered conversation are turns of the assistant that are to be learnt.

By the template's own `{% generation %}` marks; without them, a turn is what rendering one message more adds to what the
model has read when it begins to write.
"""

import itertools
import re

from lit_rlhf.data.chat import Renderer, Span, Text
from lit_rlhf.data.messages import REASONING, Row, learns, weight_of
from lit_rlhf.errors import UserError

PROBE = "HERE-THE-TURN-BEGINS"
# What to do about a turn that is rendered in another way once others follow.
LEARN_LESS = "give this turn weight: 0, train on one assistant turn per row, or set loss_on: all"
COMPARE_LESS = "or compare single answers"


def joined(prompt: list[Row], response: list[Row]) -> list[Row]:
    """A whole conversation; a response goes on with the turn that its prompt has begun for the assistant."""
    if not (prompt and prompt[-1]["role"] == response[0]["role"] == "assistant"):
        return prompt + response
    begun, rest = prompt[-1], response[0]
    content = begun.get("content", "") + rest.get("content", "")
    return [*prompt[:-1], {**begun, **rest, "content": content}, *response[1:]]


def completed(render: Renderer, prompt: list[Row], response: list[Row]) -> Text:
    """A prompt and what follows it, of which the assistant's turns are the response.

    Raises:
        UserError: the template does not render the prompt as the beginning of the whole, or a turn has weight 0.
    """
    if unlearnt := [message for message in response if not learns(message)]:
        raise UserError(
            f"a turn of {_said(unlearnt[0])} stands in a response that is compared or scored whole; leave that out"
        )
    messages, before = joined(prompt, response), render.prompt(prompt)
    first = len(messages) - len(response)
    if len(response) > 1:
        turns = [turn for turn in _assistants(messages) if turn >= first]
        text, spans = _turns(render, messages, turns, prompt, first, COMPARE_LESS)
    else:  # all that is written after the prompt, as it will be when the model writes it
        text = render(messages)
        spans = [(len(before), len(text))]
    _require_beginning(before, text, first)
    if len(response) == 1:
        _require_words(response[0], text[len(before) :], first)
    return Text(text, len(before), spans, rendered=True)


def demonstration(render: Renderer, prompt: list[Row], response: list[Row], learn_all: bool = False) -> Text:
    """A conversation of which the assistant's turns are learnt that stand in the response and have not weight 0.

    Args:
        render: by which template.
        prompt: messages that are not learnt; may be empty.
        response: what follows.
        learn_all: learn every character but those of turns of weight 0.

    Raises:
        UserError: a weight that asks for what is not learnt; or a turn cannot be told from the rest.
    """
    messages = joined(prompt, response)
    first = len(messages) - len(response)
    if learn_all:
        left_out = [turn for turn in _assistants(messages) if not learns(messages[turn])]
        text, spans = _turns(render, messages, left_out, prompt, first)
        return Text(text, 0, _rest(spans, len(text)), rendered=True)
    _check_weights(messages, first)
    turns = [turn for turn in _assistants(messages) if turn >= first and learns(messages[turn])]
    text, spans = _turns(render, messages, turns, prompt, first)
    return Text(text, spans[0][0] if spans else len(text), spans, rendered=True)


def _turns(
    render: Renderer, messages: list[Row], turns: list[int], prompt: list[Row], first: int, remedy: str = LEARN_LESS
) -> tuple[str, list[Span]]:
    """The whole text, and what the assistant writes in some of its turns; `first` follows the prompt."""
    if render.is_marked:
        text, marked = render.with_marks(messages, return_assistant_tokens_mask=True)
        if marked:
            spans = _marked_turns(render, messages, turns, marked)
            if first in turns and prompt and prompt[-1]["role"] == "assistant":  # who has begun this turn already
                begun = render.prompt(prompt)
                _require_beginning(begun, text, first)
                spans = [(max(start, len(begun)), end) for start, end in spans]
            return text, spans
    text = render(messages)
    spans = []
    for turn in turns:
        through = text if turn == len(messages) - 1 else render(messages[: turn + 1])
        if not text.startswith(through):
            raise UserError(
                f"the chat template renders message {turn} differently when other messages follow (templates that "
                "strip reasoning or move tools do), so its tokens cannot be told from the rest. Add {% generation %} "
                f"marks to the template, {remedy}"
            )
        if turn == 0 and not prompt:
            start = _beginning(render, messages, text)
        else:
            # A turn of the assistant that another one follows is over; only a prompt's last turn is gone on with.
            goes_on = prompt if turn == first else None
            read = render.prompt(goes_on) if goes_on else render(messages[:turn], add_generation_prompt=True)
            _require_beginning(read, through, turn)
            start = len(read)
        _require_words(messages[turn], through[start:], turn)
        spans.append((start, len(through)))
    return text, spans


def _marked_turns(render: Renderer, messages: list[Row], turns: list[int], marked: list[Span]) -> list[Span]:
    """The marks of some turns: those that the message of each adds to the marks of the messages before it."""
    assistants = _assistants(messages)
    if turns == assistants:
        return marked
    if len(marked) == len(assistants):
        return [marked[assistants.index(turn)] for turn in turns]
    counts = [
        len(render.with_marks(messages[: turn + 1], return_assistant_tokens_mask=True)[1]) for turn in assistants[:-1]
    ]
    bounds = dict(zip(assistants, itertools.pairwise([0, *counts, len(marked)]), strict=True))
    for turn, (begin, end) in bounds.items():
        if begin >= end:
            raise UserError(
                f"the {{% generation %}} marks of the chat template cannot be told apart by turns: message {turn} adds "
                f"{end - begin} to those before it; mark every turn of the assistant, whatever follows"
            )
    return [span for turn in turns for span in marked[slice(*bounds[turn])]]


def _beginning(render: Renderer, messages: list[Row], text: str) -> int:
    """Where the words of a turn begin that opens the conversation: no prompt says what its header is."""
    opening = messages[0]
    fields = [name for name in (*REASONING, "content") if isinstance(opening.get(name), str)] or ["content"]
    probed = {**opening, **{name: PROBE + opening.get(name, "") for name in fields}}
    shown = render([probed, *messages[1:]])
    start = shown.find(PROBE)
    if start < 0 or shown[:start] != text[:start]:
        raise UserError(
            "the chat template leaves out the beginning of message 0, a turn of the assistant, so that its words "
            "cannot be told from its header; give this turn weight: 0, or set loss_on: all"
        )
    return start


def _require_words(message: Row, written: str, turn: int) -> None:
    """Refuse a template that writes nothing of what a message says, though perhaps a header or an end of turn."""
    words, written = re.findall(r"\w+", message.get("content", "").casefold()), written.casefold()
    # Whole words, since a letter or two stand in any header; a long one may stand close to what the template adds.
    there = set(re.findall(r"\w+", written))
    if not (
        any(word in there or (len(word) > 3 and word in written) for word in words)
        if words
        else written or not message.get("content", "").strip()
    ):
        raise UserError(f"the chat template leaves out message {turn}, which is to be learnt; use one that writes it")


def _require_beginning(read: str, text: str, turn: int) -> None:
    if text.startswith(read):
        return
    same = next((i for i, (a, b) in enumerate(zip(read, text, strict=False)) if a != b), min(len(read), len(text)))
    raise UserError(
        f"the chat template renders the beginning of message {turn} differently than add_generation_prompt does "
        f"({text[same : same + 30]!r} instead of {read[same : same + 30]!r}), so that the model would not be asked as "
        "it is trained; use a template in which both agree"
    )


def _check_weights(messages: list[Row], first: int) -> None:
    for number, message in enumerate(messages):
        if (message["role"] != "assistant" or number < first) and learns(message, by_default=False):
            why = "only the assistant's turns are learnt" if number >= first else "a prompt is not learnt"
            raise UserError(
                f"message {number} of role {message['role']!r} has {_said(message)}, but {why}; leave that out"
            )


def _said(message: Row) -> str:
    """The weight of a message that has one, by its own name."""
    return " ".join(map(str, weight_of(message) or ()))


def _assistants(messages: list[Row]) -> list[int]:
    return [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]


def _rest(spans: list[Span], length: int) -> list[Span]:
    """What the spans, which are in order, leave out."""
    edges = [0, *(edge for span in spans for edge in span), length]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
