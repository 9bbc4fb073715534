"""Formats of rows: what each kind of data looks like, checked row by row.

SFT rows have `messages`, or `prompt` and `completion`, or `text`; preference rows `chosen` and `rejected`, and mostly
`prompt`; prompt rows have `prompt` and any other columns. A message list is `[{"role": ..., "content": ...}, ...]`.
A row that does not fit is an error that names file, line and column.
"""

from typing import Any, Literal

from lit_rlhf.errors import UserError

Kind = Literal["sft", "preference", "prompts", "scored"]  # scored: completions to be scored
Row = dict[str, Any]
# How a user names where rows come from: see `sources.parse_sources`.
Sources = str | list[str] | list[dict[str, Any]] | dict[str, float]

EXPECTED = {
    "sft": "`messages`, or `prompt` and `completion`, or `text`",
    "preference": "`chosen` and `rejected`, and `prompt` unless both repeat it",
    "prompts": "`prompt`",
    "scored": "`prompt` and `completion`",
}


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
        raise UserError(f"{place}: expected an object with {EXPECTED[kind]}, found {_describe(row)}")
    present = {name for name, value in row.items() if value is not None}

    def keep(*columns: str) -> Row:
        if not present.issuperset(columns):
            null = f", and null in {sorted(set(row) - present)}" if len(present) < len(row) else ""
            raise UserError(f"{place}: expected the columns {EXPECTED[kind]}; found {sorted(present)}{null}")
        for column in columns:
            _check_content(row[column], f"{place}, column '{column}'")
        if len({isinstance(row[column], str) for column in columns}) > 1:
            found = ", ".join(f"'{column}' is {_describe(row[column])}" for column in columns)
            raise UserError(f"{place}: the columns must be all text or all message lists; {found}")
        return {column: row[column] for column in columns}

    if kind == "prompts":
        return {**row, **keep("prompt")}
    if kind == "scored":
        return {**row, **keep("prompt", "completion")}
    if kind == "sft":
        if "messages" in present:
            if isinstance(row["messages"], str):
                raise UserError(f"{place}, column 'messages': expected a message list, found {_describe('')}")
            return keep("messages")
        if "text" in present and not present & {"prompt", "completion"}:
            if not isinstance(row["text"], str):
                raise UserError(f"{place}, column 'text': expected text, found {_describe(row['text'])}")
            return keep("text")
        return keep("prompt", "completion")
    return _check_preference(row, present, keep, place)


def as_prompt(row: Row) -> Row | None:
    """The prompt of a checked SFT or preference row, beside the completion it is known to have; None for bare text."""
    if "messages" in row:
        turns = [turn for turn, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        if not turns or turns[-1] == 0:
            return None
        return {"prompt": row["messages"][: turns[-1]], "completion": row["messages"][turns[-1] : turns[-1] + 1]}
    if "prompt" not in row:
        return None
    return {"prompt": row["prompt"], "completion": row["chosen"] if "chosen" in row else row["completion"]}


def _check_preference(row: Row, present: set[str], keep: Any, place: str) -> Row:
    chosen = row.get("chosen")
    # Some data sets give the prompt as text and repeat it as the first turn of both conversations.
    repeated = isinstance(chosen, list) and isinstance(row.get("prompt"), str) and chosen[:1] != []
    repeated = repeated and chosen[0] == {"role": "user", "content": row["prompt"]}  # type: ignore[index]
    kept: Row = (
        keep("chosen", "rejected") if repeated or "prompt" not in present else keep("prompt", "chosen", "rejected")
    )
    if isinstance(kept["chosen"], list):
        if "prompt" not in kept:
            kept = _split_conversations(kept["chosen"], kept["rejected"], place)
        for column in ("chosen", "rejected"):
            roles = [message["role"] for message in kept[column]]
            if roles != ["assistant"]:
                raise UserError(
                    f"{place}, column '{column}': expected one assistant message after the prompt, found {roles}"
                )
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise UserError(f"{place}, column 'margin': expected a number, found {_describe(margin)}")
    return {**kept, "margin": 0.0 if margin is None else float(margin)}


def _split_conversations(chosen: list[Row], rejected: list[Row], place: str) -> Row:
    """The prompt that two whole conversations share: all turns up to the last one they have in common."""
    shared = 0
    # The last message of each is its response, even where both end alike: such ties are counted later on.
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise UserError(f"{place}: without a `prompt`, chosen and rejected must begin with the same messages")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _check_content(value: Any, place: str) -> None:
    if isinstance(value, str):
        return
    if not isinstance(value, list):
        raise UserError(f"{place}: expected text or a message list, found {_describe(value)}")
    if not value:
        raise UserError(f"{place}: the message list is empty")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(
                f'{place}, message {number}: expected {{"role": "user", "content": "..."}}, found {_describe(message)}'
            )
        if not isinstance(message.get("content"), str):
            found = _describe(message.get("content"))
            raise UserError(f"{place}, message {number}: expected text as `content`, found {found}")


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    shown = repr(value)
    name = {"str": "text", "dict": "an object", "list": "a list"}.get(type(value).__name__, type(value).__name__)
    return name if isinstance(value, str) else f"{name} ({shown if len(shown) <= 60 else shown[:57] + '...'})"
