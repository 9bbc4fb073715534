"""Rows of solutions in steps: checked, and as tokens of which the last of each step is known.

The text of a solution is its steps, each with the separator behind it; the prompt and each step are tokenised by
themselves, so that a boundary between them is one between tokens, and a step's tokens do not depend on what follows.
"""

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.chat import Text
from lit_rlhf.data.messages import Row, describe
from lit_rlhf.data.reader import Options, Reader
from lit_rlhf.data.tokenize import (
    KEPT,
    LONG_PROMPT,
    LONG_STEP,
    NO_PROMPT,
    NO_RESPONSE,
    TOO_LONG,
    TRUNCATED,
    cut_prompt,
    of_each_row,
)
from lit_rlhf.errors import UserError


def checked_steps(row: Row, place: str) -> list[str]:
    """The steps of a row.

    Args:
        row: with `completions`.
        place: file and line, for the message.

    Raises:
        UserError: they are no list of texts, or one of them says nothing.
    """
    steps, at = row["completions"], f"{place}, column 'completions'"
    if not isinstance(steps, list) or not steps:
        found = "an empty list" if steps == [] else describe(steps)
        raise UserError(f"{at}: expected a list of steps, each a text, found {found}")
    for number, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            found = "empty text" if isinstance(step, str) else describe(step)
            raise UserError(f"{at}, step {number}: expected a text, found {found}; leave the step and its label out")
    return steps


def checked_labels(row: Row, place: str) -> list[float | None]:
    """The labels of a row's steps: from 0, wrong, to 1, right; None = not judged.

    Raises:
        UserError: they are no such numbers, or not as many as there are steps.
    """
    labels, steps, at = row["labels"], row["completions"], f"{place}, column 'labels'"
    if not isinstance(labels, list):
        raise UserError(f"{at}: expected a list of labels, one of each step, found {describe(labels)}")
    if len(labels) != len(steps):
        raise UserError(
            f"{at}: {len(labels)} labels for {len(steps)} steps in 'completions': give each step one, null where it "
            "was not judged"
        )
    return [_label(label, f"{at}, step {number}") for number, label in enumerate(labels)]


def _label(label: Any, at: str) -> float | None:
    if label is None:
        return None
    known = isinstance(label, int | float | Decimal)  # true and false, too
    try:
        value = float(label) if known else math.nan
    except OverflowError:  # an integer of hundreds of digits
        value = math.inf
    if not 0 <= value <= 1:
        found = f"{label!r:.40}" if known else f"{describe(label)}{f' {label!r:.40}' * isinstance(label, str)}"
        raise UserError(
            f"{at}: expected true or false, or how probably it is right (0 to 1), or null = not judged; found {found}"
        )
    return value


def tokenize_solutions(reader: Reader, rows: Sequence[Row]) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Of each row the tokens of its prompt, (P,), and of each of its steps, (T,).

    Raises:
        UserError: a step of which the tokenizer makes no token.
    """
    prompts, steps, plain = [], [], []
    for row in rows:
        read = reader.read(row)
        chat = isinstance(read["prompt"], list)
        text = reader.renderer(read).prompt(read["prompt"]) if chat else read["prompt"]
        prompts.append(Text(text, len(text), [], rendered=chat))
        steps += [step + reader.options.step_separator for step in row["completions"]]
        escaped = bool(reader.control[-1]) and reader.options.control_tokens == "escape"
        plain += [escaped] * len(row["completions"])
    encoded = iter(encode_steps(reader.tokenizer, steps, plain))
    solutions = []
    for row, (_, encoding) in zip(rows, reader.encode(prompts), strict=True):
        ids = [next(encoded) for _ in row["completions"]]
        if empty := [number for number, step in enumerate(ids) if not len(step)]:
            raise UserError(f"column 'completions', step {empty[0]}: the tokenizer makes no token of it")
        solutions.append((encoding.ids, ids))
    return solutions


def _require_single(steps: Sequence[str], separator: str) -> None:
    """Refuse steps that hold the separator: in a response, which is cut at each, they would be other steps."""
    for number, step in enumerate(steps):
        text = step.lstrip()  # a separator that nothing stands before ends no step
        if separator and f"{text}{separator}".index(separator) < len(text):
            raise UserError(
                f"column 'completions', step {number}: it holds step_separator ({separator!r}), at which a response "
                "is cut into steps, so that it would be scored as more than one; set data.step_separator to a text "
                "that no step holds, or take it out of the step"
            )


def encode_steps(
    tokenizer: PreTrainedTokenizerBase, steps: Sequence[str], plain: Sequence[bool] | None = None
) -> list[np.ndarray]:
    """Texts that go on a text before them as token ids, (T,) each.

    Args:
        tokenizer: the model's.
        steps: n of them.
        plain: (n,) whether special tokens that it spells out stay text; None = none does.
    """
    encoded: dict[int, np.ndarray] = {}
    for escaped in (False, True):
        numbers = [number for number in range(len(steps)) if bool(plain is not None and plain[number]) is escaped]
        options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": escaped, "verbose": False}
        # Behind a line break, so that SentencePiece writes no space where a text begins.
        newline = tokenizer("\n", **options)["input_ids"]
        behind = tokenizer([f"\n{steps[number]}" for number in numbers], **options)["input_ids"] if numbers else []
        for number, ids in zip(numbers, behind, strict=True):
            if ids[: len(newline)] == newline:
                own = ids[len(newline) :]
            else:  # which the step's own line break has joined
                own = tokenizer(steps[number], **options)["input_ids"]
            encoded[number] = np.array(own, dtype=np.int64)
    return [encoded[number] for number in range(len(steps))]


def fit_steps(steps: Sequence[np.ndarray], room: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The whole steps that fit into a room, as one response (T,), and in it the places of their last tokens (K,)."""
    ends = np.cumsum([len(step) for step in steps])
    kept = len(steps) if room is None else int(np.searchsorted(ends, room, side="right"))
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *steps[:kept]])
    return ids, ends[:kept] - 1


def tokenize_stepwise(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: Options
) -> dict[str, list[Any]]:
    """Rows with labels to `prompt_ids`, `response_ids`, `step_ends`, `labels` and what every row that is learnt has.

    Ends and labels are those of the steps that were judged. What is too long loses whole steps at its end.

    Raises:
        UserError: a step that would be more than one where a policy writes it; or of which there is no token.
    """
    for row in rows:
        _require_single(row["completions"], options.step_separator)
    reader = Reader(tokenizer, options)
    columns: dict[str, list[Any]] = {"prompt_ids": [], "response_ids": [], "step_ends": [], "labels": [], "status": []}
    for row, (prompt, steps) in zip(rows, tokenize_solutions(reader, rows), strict=True):
        room = None if options.max_length is None else max(options.max_length - len(prompt), 0)
        response, ends = fit_steps(steps, room)
        labels = np.array(row["labels"], dtype=np.float32)  # null is NaN
        judged = ~np.isnan(labels[: len(ends)])
        status = TRUNCATED if len(ends) < len(steps) else KEPT
        if status == TRUNCATED and options.truncation == "drop":
            status = TOO_LONG
        elif not judged.any():
            status = NO_RESPONSE if room is None or len(ends) else LONG_STEP if room else LONG_PROMPT
        if not len(prompt):
            status = NO_PROMPT
        kept = slice(None) if status <= TRUNCATED else slice(0)
        values = (prompt[kept], response[kept], ends[judged][kept], labels[: len(ends)][judged][kept], status)
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    return {**columns, **of_each_row(reader, rows, columns["status"])}


def tokenize_scored_steps(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: Options
) -> dict[str, list[Any]]:
    """Rows to be scored to `prompt_ids`, `response_ids`, `step_ends` and what is counted of rows.

    What is too long loses tokens of the prompt on its left, then whole steps at its end.
    """
    reader = Reader(tokenizer, options)
    columns: dict[str, list[Any]] = {"prompt_ids": [], "response_ids": [], "step_ends": [], "status": []}
    for whole, steps in tokenize_solutions(reader, rows):
        prompt = cut_prompt(whole, tokenizer, options)
        room = None if options.max_length is None else max(options.max_length - len(prompt), 0)
        response, ends = fit_steps(steps, room)
        status = TRUNCATED if len(prompt) < len(whole) or len(ends) < len(steps) else KEPT
        if not len(prompt):
            status = NO_PROMPT
        elif not len(ends):
            status = LONG_STEP if room else LONG_PROMPT
        for name, value in zip(columns, (prompt, response, ends, status), strict=True):
            columns[name].append(value)
    return {**columns, **of_each_row(reader, rows, columns["status"])}
