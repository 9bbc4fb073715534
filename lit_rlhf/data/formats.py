"""Formats of rows: what each kind of data looks like, checked row by row.

SFT rows have `messages`, or `prompt` and `completion`, or `text`; preference rows `chosen` and `rejected`, and mostly
`prompt`; unpaired rows `prompt`, `completion` and `label`, or a pair; prompt rows have `prompt` and any other columns.
A message list is `[{"role": ..., "content": ...}, ...]`; beside one, `tools` and `chat_template_kwargs` go to the chat
template, and a response that is text is the assistant's. Stepwise rows have `prompt`, `completions` (the steps of one
solution) and `labels` (one of each step), see `steps.py`.
A row that does not fit is an error that names file, line and column.
"""

import itertools
import math
from collections.abc import Collection
from decimal import Decimal
from typing import Any, Literal

from lit_rlhf.data.messages import (
    Row,
    answer,
    checked_messages,
    describe,
    listed,
    require_no_json,
    require_no_media,
    template_columns,
)
from lit_rlhf.data.steps import checked_labels, checked_steps
from lit_rlhf.errors import UserError

Kind = Literal["sft", "preference", "unpaired", "stepwise", "prompts", "scored", "scored_steps"]  # scored: to be scored
# How a user names where rows come from: see `naming.parse_sources`.
Sources = str | list[Any] | dict[str, Any]

LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
OF_STEPS = ("completions", "labels")  # lists beside a prompt of either form
LARGEST = 3.4e38  # of a margin: batches hold float32

# What rows that are learnt from are read for; of prompts every column may be, by a reward.
READ: dict[Kind, tuple[str, ...]] = {
    "sft": ("messages", "prompt", "completion", "text", "tools", "chat_template_kwargs"),
    "preference": ("prompt", "chosen", "rejected", "margin", "tools", "chat_template_kwargs"),
    "unpaired": ("prompt", "completion", "label", "chosen", "rejected", "tools", "chat_template_kwargs"),
    "stepwise": ("prompt", "completions", "labels", "tools", "chat_template_kwargs"),
}
EXPECTED = {
    "sft": "`messages`, or `prompt` and `completion`, or `text`",
    "preference": "`chosen` and `rejected`, and `prompt` unless both repeat it",
    "unpaired": "`prompt`, `completion` and `label`, or a pair: `chosen` and `rejected`, and mostly `prompt`",
    "stepwise": "`prompt`, `completions` (a list of steps) and `labels` (one of each step)",
    "prompts": "`prompt`",
    "scored": "`prompt` and `completion`",
    "scored_steps": "`prompt` and `completions` (a list of steps)",
}

SHAPES = {"alpaca": "instruction", "sharegpt": "conversations"}  # that `data.format` names, by the column that tells


def check_row(row: Any, kind: Kind, place: str) -> Row:
    """Check one row and keep the columns of its format.

    Args:
        row: as read.
        kind: the format it must have.
        place: file and line, for the message.

    Raises:
        UserError: a column is missing or holds something else than the format says.
    """
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object with {EXPECTED[kind]}, found {describe(row)}")
    if row and all(map(_is_column, row.values())):
        raise UserError(
            f"{place}: columns of many rows, where one row is expected: write a row a line (of a pandas table, "
            'to_json(FILE, orient="records", lines=True))'
        )
    columns = to_tokenize(row, kind, place)
    has_messages = any(isinstance(value, list) for name, value in columns.items() if name not in OF_STEPS)
    if kind in READ or has_messages:  # a picture beside a prompt of text may be for the reward
        require_no_media(row, place, "column")
    # Of prompts every column stays as it is: rewards read them, and `predict` writes them.
    if kind in ("prompts", "scored", "scored_steps"):
        return row
    if not has_messages:
        _require_no_template_columns(row, place)
    return columns


def _is_column(value: Any) -> bool:
    """Whether a value of a row is a whole column: texts in a list, or by their numbers, as pandas writes it."""
    if isinstance(value, dict):
        return len(value) > 1 and all(str(key).isdecimal() for key in value)
    return isinstance(value, list) and len(value) > 1 and all(isinstance(part, str) for part in value)


def to_tokenize(row: Row, kind: Kind, place: str = "") -> Row:
    """What of a row its tokens follow from, checked; args as of `check_row`."""
    present = {name for name, value in row.items() if value is not None}

    def need(*columns: str) -> None:
        if not present.issuperset(columns):
            null = f", and null in {listed(set(row) - present)}" if len(present) < len(row) else ""
            hint = "" if set(columns) <= set(row) else f"; {_how_to_map(row, columns, kind)}"
            raise UserError(f"{place}: expected the columns {EXPECTED[kind]}; found {listed(present)}{null}{hint}")

    def keep(*columns: str) -> Row:
        need(*columns)
        if columns[0] != "text":
            require_no_json(row[columns[0]], f"{place}, column '{columns[0]}'")
        return {name: _checked_content(row[name], f"{place}, column '{name}'") for name in columns}

    if kind == "prompts":
        columns = keep("prompt")
        return columns | (template_columns(row, place) if isinstance(columns["prompt"], list) else {})
    if kind in ("stepwise", "scored_steps"):
        need("prompt", "completions", *(["labels"] if kind == "stepwise" else []))
        columns = keep("prompt")
        columns |= template_columns(row, place) if isinstance(columns["prompt"], list) else {}
        columns["completions"] = checked_steps(row, place)
        return columns | ({"labels": checked_labels(row, place)} if kind == "stepwise" else {})
    if kind == "preference":
        pair = keep("prompt", "chosen", "rejected") if "prompt" in present else keep("chosen", "rejected")
        return {**_checked_pair(pair, row, place), "margin": _margin(row.get("margin"), f"{place}, column 'margin'")}
    if kind == "unpaired" and not present & {"completion", "label"}:
        return _checked_pair(keep(*present & {"prompt"}, "chosen", "rejected"), row, place)
    if kind == "unpaired":
        need("prompt", "completion", "label")
        return _checked_unpaired(keep("prompt", "completion"), row, place)
    if kind == "sft" and "messages" in present:
        if isinstance(row["messages"], str):
            require_no_json(row["messages"], f"{place}, column 'messages'")
            raise UserError(f"{place}, column 'messages': expected a message list, found {describe('')}")
        return keep("messages") | template_columns(row, place)
    if kind == "sft" and "text" in present and not present & {"prompt", "completion"}:
        if not isinstance(row["text"], str):
            raise UserError(f"{place}, column 'text': expected text, found {describe(row['text'])}")
        return keep("text")
    columns = _with_answers(keep("prompt", "completion"), row, place)
    return _without_repeated_prompt(columns, place) if isinstance(columns["prompt"], list) else columns


def _how_to_map(row: Row, needed: Collection[str], kind: Kind) -> str:
    """What the user may declare of a row that has other columns."""
    for shape, column in SHAPES.items():
        if row.get(column) is not None and kind not in ("stepwise", "scored_steps"):
            return f"rows with {column!r} are read by `format: {shape}` of the data"
    names = ", ".join(f"{name}: ITS_NAME" for name in needed if name not in row)
    return f"columns of other names are declared by `columns: {{{names}}}` of the data"


def as_prompt(row: Row) -> Row | None:
    """The prompt of a checked row, beside the completion it is known to have, or its steps; None for bare text."""
    template: Row = {name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}
    if "completions" in row:
        return row
    if "messages" in row:
        turns = [turn for turn, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        if not turns or turns[-1] == 0:
            return None
        last = turns[-1]
        return {"prompt": row["messages"][:last], "completion": row["messages"][last : last + 1], **template}
    if "prompt" not in row:
        return None
    known = next(row[name] for name in ("chosen", "completion", "rejected") if name in row)
    return {"prompt": row["prompt"], "completion": known, **template}


def _require_no_template_columns(row: Row, place: str) -> None:
    for name in ("tools", "chat_template_kwargs"):
        if row.get(name) not in (None, [], {}, "", "[]", "{}", "null"):
            raise UserError(
                f"{place}, column '{name}': it goes to the chat template, which renders messages, and this row is "
                f"text; give messages, or put the column aside by `columns: {{other_name: {name}}}`"
            )


def _with_answers(columns: Row, row: Row, place: str) -> Row:
    """Text responses as the assistant's, where the prompt is messages; the same for the columns of the template."""
    if isinstance(columns["prompt"], list):
        columns = {name: value if name == "prompt" else answer(value) for name, value in columns.items()}
        return columns | template_columns(row, place)
    if any(isinstance(value, list) for value in columns.values()):
        found = ", ".join(f"'{name}' is {describe(value)}" for name, value in columns.items())
        raise UserError(f"{place}: beside a prompt that is text, a response must be text too; {found}")
    return columns


def _without_repeated_prompt(columns: Row, place: str) -> Row:
    """Messages of which the completion is a whole conversation, as in some data sets, cut to what follows the prompt.

    Raises:
        UserError: a part of the prompt stands in the completion, where the model would read it twice.
    """
    prompt, completion = columns["prompt"], columns["completion"]
    if len(completion) > len(prompt) and completion[: len(prompt)] == prompt:
        return {**columns, "completion": completion[len(prompt) :]}
    opening = list(itertools.takewhile(lambda message: message["role"] != "assistant", completion))
    if prompt[-1]["role"] != "tool" and prompt[-1] in opening:  # tools may answer alike
        raise UserError(
            f"{place}, column 'completion': message {opening.index(prompt[-1])} is the last one of 'prompt' again; "
            "begin with what follows the prompt, or with all of the prompt"
        )
    return columns


def _checked_pair(columns: Row, row: Row, place: str) -> Row:
    prompt, chosen, rejected = (columns.get(name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        if not isinstance(prompt, list):
            columns = _split_conversations(chosen, rejected, prompt, place)
        elif chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:  # some data sets give the prompt in each
            columns |= {"chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
    if isinstance(columns.get("prompt"), list):
        columns = _with_answers(columns, row, place)
        for name in ("chosen", "rejected"):
            _require_assistant(columns[name], f"{place}, column '{name}'")
    else:
        _with_answers({"prompt": "", **columns}, row, place)
    return columns


def _require_assistant(response: list[Row], place: str) -> None:
    roles = [message["role"] for message in response]
    if not roles or {roles[0], roles[-1]} != {"assistant"}:
        raise UserError(f"{place}: expected what follows the prompt to begin and end with the assistant, found {roles}")


def _checked_unpaired(columns: Row, row: Row, place: str) -> Row:
    """A completion with its label, as the half of a pair that it is: `chosen` or `rejected`."""
    columns = _with_answers(columns, row, place)
    if isinstance(columns["prompt"], list):
        columns = _without_repeated_prompt(columns, place)
        _require_assistant(columns["completion"], f"{place}, column 'completion'")
    label = LABELS.get(str(row["label"]).lower())  # 1 and 1.0 are True, and of CSV all are texts
    if label is None:
        found = f"the text {row['label']!r:.40}" if isinstance(row["label"], str) else describe(row["label"])
        raise UserError(f"{place}, column 'label': expected true or false, or 1 or 0, found {found}")
    return {("chosen" if label else "rejected") if name == "completion" else name: v for name, v in columns.items()}


def _margin(value: Any, place: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise UserError(
            f"{place}: expected a number, found {describe(value)}{f' {value!r:.40}' * isinstance(value, str)}"
        )
    try:
        margin = float(value)
    except (OverflowError, ValueError):  # an integer beyond all floats; a decimal that is no number
        margin = math.inf
    if not abs(margin) <= LARGEST:
        raise UserError(f"{place}: expected a finite number, found {describe(value)}; null where there is none")
    return margin


def _split_conversations(chosen: list[Row], rejected: list[Row], prompt: str | None, place: str) -> Row:
    """The prompt that two whole conversations share: all turns up to where the assistant's part in them parts."""
    shared = 0
    # The last message of each is its response, even where both end alike: such ties are counted later on.
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    # Where a tool or a user answered differently, both responses begin with what the assistant had said before.
    while shared > 0 and {chosen[shared]["role"], rejected[shared]["role"]} != {"assistant"}:
        shared -= 1
    if shared == 0:
        raise UserError(
            f"{place}: chosen and rejected must begin with the same messages, up to a turn of the assistant"
        )
    # Some data sets give the question as text and repeat it as a user's message of both conversations.
    asked = [message.get("content", "").strip() for message in chosen[:shared] if message["role"] == "user"]
    if prompt is not None and prompt.strip() not in asked:
        raise UserError(
            f"{place}: 'prompt' is text, and 'chosen' and 'rejected' are message lists that do not begin with it as a "
            "user's message; make prompt a message list, or leave it out"
        )
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _checked_content(value: Any, place: str) -> str | list[Row]:
    return value if isinstance(value, str) else checked_messages(value, place)
