"""What a row of messages may say: messages, the tools that the model may call, variables of its template.

A null field is one that is not there: Parquet and Arrow give every message all fields that any message has.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lit_rlhf.errors import UserError, one_line

Row = dict[str, Any]
REASONING = ("reasoning_content", "thinking", "reasoning")  # where templates look for what was thought before an answer
# Whether a turn is learnt: OpenAI's word, and those of Axolotl and ms-swift.
WEIGHTS = ("weight", "train", "loss", "loss_weight", "loss_scale")
OF_PARTS = ("train_detail", "training_detail")  # Axolotl's, of which words of a turn are
# What other programs keep beside texts that speak of them by marks such as <image>.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# What rendering is asked for by us, or said by another column.
OURS = (
    "messages",
    "conversations",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
)


def checked_messages(value: Any, place: str, item: str = "message", content: str = "content") -> list[Row]:
    """A message list as templates read it: without null fields, content as text.

    Args:
        value: as read.
        place: file, line and column, for the message.
        item: what the file calls a message, likewise.
        content: what it calls the content of one.

    Raises:
        UserError: it is no message list, or holds what is not text.
    """
    if not isinstance(value, list):
        raise UserError(f"{place}: expected text or a message list, found {describe(value)}{_how_to_list(value)}")
    if not value:
        raise UserError(f"{place}: the list of {item}s is empty")
    return [_checked_message(message, f"{place}, {item} {number}", content) for number, message in enumerate(value)]


def _how_to_list(value: Any) -> str:
    if not isinstance(value, dict):
        return ""
    if isinstance(value.get("role"), str):
        return "; put the message into a list"
    return "; make a list of objects of it, one of each message" if isinstance(value.get("role"), list) else ""


def require_no_json(value: Any, place: str) -> None:
    """Refuse messages that are written as JSON text, and would be learnt with brackets and quotes.

    Args:
        value: what a row begins with.
        place: of it, for the message.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{") or '"role"' not in value:
        return
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return
    messages = read if isinstance(read, list) else [read]
    if messages and all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in messages):
        raise UserError(
            f"{place}: found messages written as JSON text ({value[:40]!r}…), which would be read as text; write the "
            "list itself (JSON Lines and Parquet hold lists), or where the text is meant give it as a message's content"
        )


def without_null_fields(value: Any) -> Any:
    """The same value without the null fields of its objects, however deep they lie."""
    if isinstance(value, dict):
        return {name: without_null_fields(item) for name, item in value.items() if item is not None}
    return [without_null_fields(item) for item in value] if isinstance(value, list) else value


def answer(response: str | list[Row]) -> list[Row]:
    """A response beside a prompt of messages: text is what the assistant says."""
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def template_columns(row: Row, place: str) -> Row:
    """The columns `tools` and `chat_template_kwargs` of a row of messages, where it has them, read from JSON if text.

    Raises:
        UserError: they hold something else than a list of objects and an object.
    """
    found: Row = {}
    if tools := _from_json(row.get("tools"), f"{place}, column 'tools'"):
        tools = [_from_json(tool, f"{place}, column 'tools'") for tool in tools] if isinstance(tools, list) else tools
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise UserError(f"{place}, column 'tools': expected a list of objects, found {describe(tools)}")
        found["tools"] = tools
    where = f"{place}, column 'chat_template_kwargs'"
    if given := _from_json(row.get("chat_template_kwargs"), where):
        if not isinstance(given, dict):
            raise UserError(f"{where}: expected an object, found {describe(given)}")
        check_template_kwargs(given, where)
        found["chat_template_kwargs"] = {name: value for name, value in given.items() if value is not None}
    return {name: value for name, value in found.items() if value}


def check_template_kwargs(given: Row, where: str) -> None:
    """Refuse arguments of the template that something else decides."""
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: expected a mapping of the template's variables, found {describe(given)}")
    if numbers := [name for name in given if not isinstance(name, str)]:
        raise UserError(f"{where}: the name of a variable is text, found {numbers[0]!r}")
    if clash := sorted(set(given) & set(OURS)):
        raise UserError(f"{where}: {', '.join(clash)} cannot be set there; it holds variables of the template alone")


def weight_of(message: Row) -> tuple[str, int] | None:
    """What a checked message says of whether it is to be learnt: in which of its fields, and 0 or 1."""
    return next(((name, int(message[name])) for name in WEIGHTS if name in message), None)


def learns(message: Row, by_default: bool = True) -> bool:
    """Whether a turn is to be learnt, by its weight where it has one."""
    given = weight_of(message)
    return by_default if given is None else bool(given[1])


def require_no_media(holder: Row, place: str, kind: str) -> None:
    """Refuse pictures and sounds beside text, whose marks would be learnt as words.

    Args:
        holder: a row or a message.
        place: of it.
        kind: of its names, for the message: column or field.
    """
    for name in MEDIA:
        if not _is_empty(holder.get(name)):
            aside = f", put it aside by `columns: {{aside: {name}}}`" if kind == "column" else ", leave it out"
            raise UserError(
                f"{place}, {kind} '{name}': found {describe(holder[name])}, where nothing is expected: only texts are "
                f"read, and a mark such as <image> in them would be learnt as words. Take rows without; where no text "
                f"speaks of it{aside}"
            )


def listed(names: Iterable[Any]) -> str:
    """Names of columns in their order, the first dozen."""
    found = sorted(map(str, names))
    return f"{found[:12]}{f' and {len(found) - 12} more' if len(found) > 12 else ''}"


def describe(value: Any) -> str:
    """What was found, in a word or two."""
    if value is None:
        return "nothing"
    name = {"str": "text", "dict": "an object", "list": "a list"}.get(type(value).__name__, type(value).__name__)
    return name if isinstance(value, str) else f"{name} ({one_line(repr(value), 60)})"


def _checked_message(message: Any, place: str, field: str) -> Row:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f'{place}: expected {{"role": "user", "content": "..."}}, found {describe(message)}')
    checked = {name: value for name, value in message.items() if value is not None}
    calls = checked.get("tool_calls")
    if isinstance(calls, str):
        calls = checked["tool_calls"] = _from_json(calls, f"{place}, tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise UserError(f"{place}: expected a list of objects as `tool_calls`, found {describe(calls)}")
    content = checked.get("content")
    if isinstance(content, list):
        checked["content"] = _text_of_parts(content, place, field)
    elif not isinstance(content, str) and not (
        content is None and (calls or any(name in checked for name in REASONING))
    ):
        raise UserError(f"{place}: expected text as `{field}`, found {describe(content)}")
    require_no_media(checked, place, "field")
    if details := [name for name in OF_PARTS if checked.get(name)]:
        raise UserError(f"{place}: `{details[0]}` is not read: a turn is learnt whole, or not at all by `weight`: 0")
    weights = [name for name in WEIGHTS if name in checked]
    for name in weights:
        if not isinstance(weight := checked[name], int | float) or weight not in (0, 1):
            raise UserError(f"{place}: expected 0 or 1 as `{name}`, learnt or not, found {describe(weight)}")
        checked[name] = int(weight)
        if checked[name] != checked[weights[0]]:
            raise UserError(f"{place}: `{weights[0]}` and `{name}` say different things of one turn; leave one")
    return checked


def _is_empty(value: Any) -> bool:
    if isinstance(value, list | dict):
        return all(_is_empty(part) for part in (value.values() if isinstance(value, dict) else value))
    return not value or value in ("[]", "{}", "null")


def _text_of_parts(parts: list[Any], place: str, field: str) -> str:
    """Content in the parts of OpenAI's format: texts, a line each; we read no images or sounds."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = f"a part of type {part['type']!r}" if isinstance(part, dict) and "type" in part else describe(part)
            raise UserError(
                f'{place}: expected text or parts {{"type": "text", "text": "..."}} as `{field}`, found {kind}'
            )
        if isinstance(part, dict) and (given := [name for name in WEIGHTS if part.get(name) is not None]):
            raise UserError(f"{place}: `{given[0]}` stands in a part of `{field}`; give it to the whole message")
        texts.append(text)
    return "\n".join(texts)


def _from_json(value: Any, place: str) -> Any:
    """A value that may be written as JSON text, since the columns of a Parquet file have one type."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error})") from error
    except (ValueError, RecursionError) as error:
        what = "nested too deep" if isinstance(error, RecursionError) else "an integer of thousands of digits"
        raise UserError(f"{place}: {what}; leave it out") from error
