"""Rows of other shapes, by a small declared mapping: columns of other names, the shapes of Alpaca and ShareGPT."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any, Literal

from lit_rlhf.data.formats import EXPECTED, READ, SHAPES, Kind
from lit_rlhf.data.messages import MEDIA, Row, checked_messages, describe, listed
from lit_rlhf.errors import UserError

Format = Literal["alpaca", "sharegpt"]

OF_SHAPE: dict[Format | None, tuple[str, ...]] = {  # the columns that it is read for, beside ours
    None: (),
    "alpaca": ("instruction", "input", "system", "history", "output"),
    "sharegpt": ("conversations", "system"),
}
FORMS = ({"messages"}, {"prompt", "completion"}, {"text"})  # of rows of ours that are demonstrations: one is read
# Who speaks in ShareGPT's conversations, in our words.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def require_read(columns: Mapping[str, str], kind: Kind, shape: Format | None) -> None:
    """Refuse a name that no column of this kind is read by, unless the mapping puts aside one that would be.

    Args:
        columns: our name -> the row's.
        kind: what is made of the rows.
        shape: the rows'.

    Raises:
        UserError: names it, and those that there are.
    """
    if kind not in READ:
        return
    known = dict.fromkeys((*OF_SHAPE[shape], *READ[kind]))
    for ours, theirs in columns.items():
        if ours not in known and theirs not in (*known, *MEDIA):
            near = difflib.get_close_matches(ours, known, n=1)
            said = f"; did you mean {near[0]}?" if near else "."
            raise UserError(
                f"columns names {theirs!r} as {ours!r}, which nothing reads{said} Rows of this kind are read for "
                f"{', '.join(known)}"
            )


def renamed(row: Any, columns: Mapping[str, str], kind: Kind, place: str) -> Any:
    """A row with the names that we know its columns by, and of demonstrations without those of forms not declared.

    Args:
        row: as read.
        columns: our name -> the row's.
        kind: what is made of it.
        place: of the row, for the message.

    Raises:
        UserError: a column that is named there is not in the row.
    """
    if not columns or not isinstance(row, dict):
        return row
    if missing := [(ours, theirs) for ours, theirs in columns.items() if theirs not in row]:
        ours, theirs = missing[0]
        raise UserError(
            f"{place}: there is no column {theirs!r}, which `columns` takes {ours!r} from; found {listed(row)}"
        )
    taken = set(columns.values())
    named = {name: value for name, value in row.items() if name not in taken} | {
        ours: row[theirs] for ours, theirs in columns.items()
    }
    return _in_form(named, columns) if kind == "sft" else named


def _in_form(row: Row, declared: Collection[str]) -> Row:
    """A row without columns of ours by which it would be read in another form than the one that is declared."""
    forms = [form for form in FORMS if form & set(declared)]
    aside = set().union(*FORMS) - forms[0] if len(forms) == 1 else set()
    return {name: value for name, value in row.items() if name not in aside}


def reshaped(row: Any, kind: Kind, shape: Format | None, place: str) -> Any:
    """A row of another shape in ours.

    `alpaca` has `instruction`, perhaps `input`, `system` and `history` (pairs of question and answer), and `output`, or
    `chosen` and `rejected`. `sharegpt` has `conversations`, lists of `{"from": "human", "value": ...}`, perhaps
    `system`, and for pairs `chosen` and `rejected`. All of it becomes messages.

    Args:
        row: as read.
        kind: what is made of it.
        shape: the row's; None = ours, nothing changes.
        place: of the row, for the message.

    Raises:
        UserError: the row is not of this shape.
    """
    if shape is None or not isinstance(row, dict):
        return row
    if kind in ("stepwise", "scored_steps"):
        raise UserError(f"{place}: format {shape} has no steps; expected the columns {EXPECTED[kind]}")
    read: Row = {name: value for name, value in row.items() if value is not None}
    if kind == "unpaired":  # a completion beside its label, or both of a pair
        kind = "preference" if "chosen" in read or "rejected" in read else "scored"
    answers = (
        ("chosen", "rejected") if kind == "preference" else ("output",) * (shape == "alpaca" and kind != "prompts")
    )
    needed = (SHAPES[shape], *answers)
    if missing := [name for name in needed if name not in read]:
        null = f", and null in {listed(set(row) - set(read))}" if len(read) < len(row) else ""
        raise UserError(f"{place}: expected the column {missing[0]!r} of format {shape}; found {listed(read)}{null}")
    ours = _alpaca(read, kind, place) if shape == "alpaca" else _sharegpt(read, kind, place)
    return _in_form(row, ours) | ours if kind == "sft" else {**row, **ours}


def _alpaca(row: Row, kind: Kind, place: str) -> Row:
    texts = {name: _text(row.get(name, ""), name, place) for name in ("instruction", "input", "system")}
    prompt = [_message("system", texts["system"])] if texts["system"] else []
    history = row.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError(f"{place}, column 'history': expected pairs [question, answer], found {describe(history)}")
    for question, answer in history:
        prompt += [
            _message("user", _text(question, "history", place)),
            _message("assistant", _text(answer, "history", place)),
        ]
    prompt.append(_message("user", "\n\n".join(filter(None, (texts["instruction"], texts["input"])))))
    names = ("chosen", "rejected") if kind == "preference" else ("output",)
    answers = {name: [_message("assistant", _text(row[name], name, place))] for name in names if name in row}
    return {"prompt": prompt, **{("completion" if name == "output" else name): turn for name, turn in answers.items()}}


def _sharegpt(row: Row, kind: Kind, place: str) -> Row:
    messages = _turns(row["conversations"], "conversations", place)
    if "system" in row and _text(row["system"], "system", place):
        messages = [_message("system", row["system"]), *messages]
    if kind == "sft":
        return {"messages": messages}
    if kind == "preference":
        answers = {name: row[name] for name in ("chosen", "rejected") if name in row}
        return {"prompt": messages} | {
            name: [_message("assistant", value)] if isinstance(value, str) else _turns(value, name, place)
            for name, value in answers.items()
        }
    answered = messages[-1]["role"] == "assistant"
    if (kind == "scored" and not answered) or (answered and len(messages) == 1):
        expected = "a turn before the answer" if answered else "an answer at the end"
        raise UserError(f"{place}, column 'conversations': expected {expected}, found nothing")
    if answered:
        return {"prompt": messages[:-1], "completion": messages[-1:]}
    return {"prompt": messages}


def _turns(value: Any, column: str, place: str) -> list[Row]:
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list):
        raise UserError(f"{place}, column {column!r}: expected a list of turns, found {describe(value)}")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or str(turn.get("from")) not in SPEAKERS or "value" not in turn:
            raise UserError(
                f'{place}, column {column!r}, turn {number}: expected {{"from": "human", "value": "..."}}, from being '
                f"one of {', '.join(SPEAKERS)}; found {describe(turn)}"
            )
        others = {name: value for name, value in turn.items() if name not in ("from", "value")}
        messages.append({**_message(SPEAKERS[turn["from"]], turn["value"]), **others})
    return checked_messages(messages, f"{place}, column {column!r}", "turn", "value")


def _message(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def _text(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}, column {column!r}: expected text, found {describe(value)}")
    return value
