"""Rows to token ids, with the masks made where the tokens are made.

A text is tokenised once, whole, with character offsets. A token belongs to the response if any of its characters do, so
the boundary never changes what the tokens are. The end token is appended as an id, never as text, unless the text ends
with a stop token already, and never to a row that was cut. No mask looks at the pad token.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.chat import Text, conversation, render, stop_token_ids
from lit_rlhf.data.formats import Row
from lit_rlhf.errors import UserError

Truncation = Literal["drop", "truncate"]
LossOn = Literal["response", "all"]

# What became of a row. The first three are used, the others counted by these words and dropped.
STATUS = (
    "kept",
    "truncated",
    "with an empty response",
    "too long",
    "no response left to learn from",
    "ties: chosen equals rejected",
    "no whole token as prompt",
    "whose prompt alone reaches max_length: shorten prompts or raise max_length",
)
KEPT, TRUNCATED, EMPTY, TOO_LONG, NO_RESPONSE, TIE, NO_PROMPT, LONG_PROMPT = range(len(STATUS))


class Options(NamedTuple):
    """How rows become tokens."""

    max_length: int | None  # tokens of a prompt with one response; None = no limit
    truncation: Truncation = "drop"
    loss_on: LossOn = "response"


class Encoding(NamedTuple):
    """A tokenised text; tokens added to it have start = end = 0."""

    text: str
    ids: np.ndarray  # (S,) int64
    starts: np.ndarray  # (S,) first character of each token, leading white space perhaps left out
    ends: np.ndarray  # (S,) one past its last character


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], stops: Sequence[int]) -> list[Encoding]:
    """Tokenise texts with offsets, special tokens at the end left out.

    Raises:
        UserError: the tokenizer cannot give offsets.
    """
    require_offsets(tokenizer)
    encodings: dict[int, Encoding] = {}
    for rendered in (False, True):
        members = [number for number, text in enumerate(texts) if text.rendered is rendered]
        if not members:
            continue
        output = tokenizer(
            [texts[number].text for number in members],
            add_special_tokens=not rendered,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        outputs = zip(output["input_ids"], output["offset_mapping"], output["special_tokens_mask"], strict=True)
        for number, (ids, offsets, added) in zip(members, outputs, strict=True):
            length = len(ids)
            # An end token that the tokenizer adds by itself would count as part of a prompt.
            while length > 1 and added[length - 1] and ids[length - 1] in stops:
                length -= 1
            bounds = np.array(offsets[:length], dtype=np.int64).reshape(-1, 2)
            # A space that begins the text loses its offsets to byte-level trimming; only added tokens have none.
            ends = np.maximum(bounds[:, 1], 1 - np.array(added[:length], dtype=np.int64))
            encodings[number] = Encoding(texts[number].text, np.array(ids[:length], dtype=np.int64), bounds[:, 0], ends)
    return [encodings[number] for number in range(len(texts))]


def require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot say which characters a token stands for."""
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets; use the fast version of the tokenizer")


def within(encoding: Encoding, start: int, end: int) -> np.ndarray:
    """(S,) bool: the tokens with a character in [start, end)."""
    # Byte-level tokenizers leave white space out of offsets: a token of white space alone has start = end.
    return (encoding.ends > start) & ((encoding.ends <= end) | (encoding.starts < end))


def close(encoding: Encoding, end: int, stops: Sequence[int]) -> tuple[int, bool]:
    """Where a response that is the rest of the tokens before `end` closes.

    Returns:
        One past its last token, white space after a stop token left out; and whether a stop token is there.
    """
    at_stop = np.flatnonzero(np.isin(encoding.ids[:end], stops))
    if len(at_stop) and not encoding.text[encoding.ends[at_stop[-1]] : encoding.ends[end - 1]].strip():
        return int(at_stop[-1]) + 1, True
    return end, False


def tokenize_sft(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: Options
) -> dict[str, list[np.ndarray] | list[int]]:
    """SFT rows to `input_ids`, `loss_mask` (True = the loss counts this token) and `status`.

    The first token is in no loss: nothing predicts it.
    """
    stops = stop_token_ids(tokenizer)
    texts = [_sft_text(row, tokenizer, options.loss_on) for row in rows]
    columns: dict[str, Any] = {"input_ids": [], "loss_mask": [], "status": []}
    for text, encoding in zip(texts, encode(tokenizer, texts, stops), strict=True):
        ids, mask, status = _mask_sft(text, encoding, stops, options)
        for column, value in zip(columns.values(), (ids, mask, status), strict=True):
            column.append(value)
    return columns


def _sft_text(row: Row, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> Text:
    if "messages" in row or isinstance(row.get("prompt"), list):
        prompt = row.get("prompt", [])
        messages = row["messages"] if "messages" in row else prompt + row["completion"]
        if loss_on == "all":
            text = render(tokenizer, messages)
            return Text(text, [(0, len(text))], rendered=True)
        return conversation(tokenizer, messages, first=len(prompt))
    prompt, response = (row["prompt"], row["completion"]) if "prompt" in row else ("", row["text"])
    start = 0 if loss_on == "all" else len(prompt)
    return Text(prompt + response, [(start, len(prompt + response))], rendered=False)


def _mask_sft(
    text: Text, encoding: Encoding, stops: Sequence[int], options: Options
) -> tuple[np.ndarray, np.ndarray, int]:
    ids = encoding.ids
    mask = np.zeros(len(ids), dtype=bool)
    closed, stopped = 0, True
    for start, end in text.spans:
        tokens = np.flatnonzero(within(encoding, start, end))
        first = int(tokens[0]) if len(tokens) else int(np.append(encoding.ends > start, True).argmax())
        closed, stopped = close(encoding, int(tokens[-1]) + 1, stops) if len(tokens) else (first, False)
        if closed <= first:  # empty, or the stop token found is an earlier turn's
            closed, stopped = (int(tokens[-1]) + 1 if len(tokens) else first), False
        if not stopped and closed < len(ids) and ids[closed] in stops:  # marks that leave the end of turn outside
            closed, stopped = closed + 1, True
        mask[first:closed] = True
    ids, mask = ids[:closed], mask[:closed]  # what follows the last response is never used
    if not stopped and not text.text[text.spans[-1][1] :].strip():
        ids, mask = np.append(ids, stops[0]), np.append(mask, True)
    mask[:1] = False
    if options.max_length is not None and len(ids) > options.max_length:
        if options.truncation == "drop":
            return ids[:0], mask[:0], TOO_LONG
        learnt = mask.any()
        ids, mask = ids[: options.max_length], mask[: options.max_length]
        return (ids, mask, TRUNCATED) if mask.any() else (ids[:0], mask[:0], LONG_PROMPT if learnt else NO_RESPONSE)
    if not mask.any():
        return ids[:0], mask[:0], NO_RESPONSE
    return ids, mask, EMPTY if options.loss_on == "response" and is_empty(ids[mask], stops) else KEPT


def tokenize_preference(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: Options
) -> dict[str, list[Any]]:
    """Preference rows to `prompt_ids`, `chosen_ids`, `rejected_ids`, `margin` and `status`.

    The prompt is the tokens that both texts begin with and that lie wholly inside the prompt's text.
    """
    stops = stop_token_ids(tokenizer)
    sides: list[list[Text]] = [[], []]
    for row in rows:
        for side, column in zip(sides, ("chosen", "rejected"), strict=True):
            side.append(_preference_text(row, column, tokenizer))
    chosen, rejected = (encode(tokenizer, side, stops) for side in sides)
    columns: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "margin": [], "status": []}
    for number, row in enumerate(rows):
        pair: tuple[Encoding, Encoding] = chosen[number], rejected[number]
        boundary = sides[0][number].spans[0][0] if "prompt" in row else None
        responses, prompt_length = _split_pair(pair, boundary, stops)
        values = _fit_pair(pair[0].ids[:prompt_length], responses, stops, options)
        for values_of, value in zip(columns.values(), (*values[:3], row["margin"], values[3]), strict=True):
            values_of.append(value)
    return columns


def _preference_text(row: Row, column: str, tokenizer: PreTrainedTokenizerBase) -> Text:
    prompt, response = row.get("prompt", ""), row[column]
    if isinstance(response, str):
        return Text(prompt + response, [(len(prompt), len(prompt + response))], rendered=False)
    before = render(tokenizer, prompt, add_generation_prompt=True)
    text = render(tokenizer, prompt + response)
    if not text.startswith(before):
        raise UserError(
            "the chat template renders the prompt differently when a response follows: rendering the prompt with "
            "add_generation_prompt must give the beginning of the whole conversation"
        )
    return Text(text, [(len(before), len(text))], rendered=True)


def _split_pair(
    pair: tuple[Encoding, Encoding], boundary: int | None, stops: Sequence[int]
) -> tuple[list[np.ndarray], int]:
    shortest = min(len(encoding.ids) for encoding in pair)
    differ = np.flatnonzero(pair[0].ids[:shortest] != pair[1].ids[:shortest])
    shared = int(differ[0]) if len(differ) else shortest
    if boundary is None:
        shared = min(shared, shortest - 1)  # each response keeps a token
        while shared > 0 and not all(_begins_a_word(encoding, shared) for encoding in pair):
            shared -= 1
    else:
        for encoding in pair:
            beyond = np.flatnonzero(encoding.ends > boundary)
            shared = min(shared, int(beyond[0]) if len(beyond) else len(encoding.ids))
    responses = []
    for encoding in pair:
        end, stopped = close(encoding, len(encoding.ids), stops)
        if end <= shared:  # an empty response; a stop token before it is the prompt's
            end, stopped = shared, False
        responses.append(encoding.ids[shared:end] if stopped else np.append(encoding.ids[shared:end], stops[0]))
    return responses, shared


def is_empty(response: np.ndarray, stops: Sequence[int]) -> bool:
    """Whether a response says nothing before it stops."""
    return len(response) == 1 and int(response[0]) in stops


def _begins_a_word(encoding: Encoding, token: int) -> bool:
    start = encoding.ends[token - 1]  # not starts[token], from which white space may be missing
    return bool(start == 0 or encoding.text[start : start + 1].isspace() or encoding.text[start - 1].isspace())


def _fit_pair(
    prompt: np.ndarray, responses: list[np.ndarray], stops: Sequence[int], options: Options
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    nothing = prompt[:0]
    if np.array_equal(responses[0], responses[1]):
        return nothing, nothing, nothing, TIE
    if len(prompt) == 0:
        return nothing, nothing, nothing, NO_PROMPT
    status = EMPTY if any(is_empty(response, stops) for response in responses) else KEPT
    longest = len(prompt) + max(len(response) for response in responses)
    if options.max_length is not None and longest > options.max_length:
        room = options.max_length - len(prompt)
        if options.truncation == "drop":
            return nothing, nothing, nothing, TOO_LONG
        if room < 1:
            return nothing, nothing, nothing, LONG_PROMPT
        responses, status = [response[:room] for response in responses], TRUNCATED
        if np.array_equal(responses[0], responses[1]):
            return nothing, nothing, nothing, TIE
    return prompt, responses[0], responses[1], status


def tokenize_prompts(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: Options
) -> dict[str, list[np.ndarray] | list[int]]:
    """Prompts to `prompt_ids` and `status`; long ones keep their end, and the beginning-of-sequence token if any."""
    stops, limit = stop_token_ids(tokenizer), options.max_length
    texts = []
    for row in rows:
        prompt = row["prompt"]
        chat = isinstance(prompt, list)
        text = render(tokenizer, prompt, add_generation_prompt=True) if chat else prompt
        texts.append(Text(text, [], rendered=chat))
    columns: dict[str, Any] = {"prompt_ids": [], "status": []}
    for encoding in encode(tokenizer, texts, stops):
        ids, status = encoding.ids, KEPT if len(encoding.ids) else NO_PROMPT
        if limit is not None and len(ids) > limit:
            begins = int(limit > 1 and ids[0] == tokenizer.bos_token_id)
            ids = np.concatenate([ids[:begins], ids[len(ids) - limit + begins :]])
            status = TRUNCATED
        columns["prompt_ids"].append(ids)
        columns["status"].append(status)
    return columns


def response_text(tokenizer: Any, prompt_ids: np.ndarray, response_ids: np.ndarray) -> str:
    """A response as it goes on from its prompt, leading white space included: both together are the text again."""
    prompt, whole = (
        str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
        for ids in (prompt_ids, np.concatenate([prompt_ids, response_ids]))
    )
    return whole[len(prompt) :] if whole.startswith(prompt) else as_text(tokenizer, response_ids)


def as_text(tokenizer: Any, ids: np.ndarray) -> str:
    """Tokens as a person reads them, without special tokens."""
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()
