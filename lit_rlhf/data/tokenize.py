"""Rows to token ids, with the masks made where the tokens are made.

A token belongs to the response if any of its characters do. The end token is appended as an id, never as text, unless
the text ends with a stop token already, and never to a row that was cut. No mask looks at the pad token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.chat import Text
from lit_rlhf.data.encoding import Encoding, close, within
from lit_rlhf.data.messages import Row
from lit_rlhf.data.reader import Options, Reader
from lit_rlhf.data.turns import completed, demonstration

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
    "whose first step does not fit behind the prompt within max_length: shorten steps or raise max_length",
    "the same as an earlier row",  # where `deduplicate` asks for that
)
KEPT, TRUNCATED, EMPTY, TOO_LONG, NO_RESPONSE, TIE, NO_PROMPT, LONG_PROMPT, LONG_STEP, REPEATED = range(len(STATUS))


def tokenize_sft(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: Options) -> dict[str, list[Any]]:
    """SFT rows to `input_ids`, `loss_mask` (True = the loss counts this token) and what every row that is learnt has.

    The first token is in no loss: nothing predicts it.
    """
    reader = Reader(tokenizer, options)
    texts = [_sft_text(reader, reader.read(row)) for row in rows]
    masked = [_mask_sft(text, encoding, reader.stops, options) for text, encoding in reader.encode(texts)]
    ids, masks, statuses = map(list, zip(*masked, strict=True))
    return {"input_ids": ids, "loss_mask": masks, **of_each_row(reader, rows, statuses)}


def of_each_row(reader: Reader, rows: Sequence[Row], statuses: list[int]) -> dict[str, list[Any]]:
    """What is counted of rows with responses."""
    repeats = [_repeats_prompt(row) for row in rows]
    return {"status": statuses, "repeats_prompt": repeats, "control_tokens": reader.control}


def _repeats_prompt(row: Row) -> bool:
    """Whether a response that is text begins with the whole prompt, which it is appended to."""
    prompt = row.get("prompt", "")
    answers = [row.get(name) for name in ("completion", "chosen", "rejected")] + row.get("completions", [])[:1]
    return isinstance(prompt, str) and any(
        prompt.strip() and isinstance(answer, str) and answer.lstrip().startswith(prompt.strip()) for answer in answers
    )


def _sft_text(reader: Reader, row: Row) -> Text:
    learn_all = reader.options.loss_on == "all"
    if "messages" in row or isinstance(row.get("prompt"), list):
        prompt = row.get("prompt", [])
        return demonstration(reader.renderer(row), prompt, row.get("completion") or row["messages"], learn_all)
    prompt, response = (row["prompt"], row["completion"]) if "prompt" in row else ("", row["text"])
    start = 0 if learn_all else len(prompt)
    return Text(prompt + response, len(prompt), [(start, len(prompt + response))], rendered=False)


def _learnt(text: Text, encoding: Encoding, stops: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens up to the end of the last response, (S,), the end token appended where none is; and which are learnt."""
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
    return ids, mask


def _mask_sft(
    text: Text, encoding: Encoding, stops: Sequence[int], options: Options
) -> tuple[np.ndarray, np.ndarray, int]:
    ids, mask = _learnt(text, encoding, stops)
    says_nothing = options.loss_on == "response" and is_empty(ids[mask], stops)
    mask[:1] = False  # of what has no prompt, all else is learnt
    if options.max_length is not None and len(ids) > options.max_length:
        if options.truncation == "drop":
            return ids[:0], mask[:0], TOO_LONG
        learnt = mask.any()
        ids, mask = ids[: options.max_length], mask[: options.max_length]
        return (ids, mask, TRUNCATED) if mask.any() else (ids[:0], mask[:0], LONG_PROMPT if learnt else NO_RESPONSE)
    if not mask.any():
        return ids[:0], mask[:0], NO_RESPONSE
    return ids, mask, EMPTY if says_nothing else KEPT


class Response(NamedTuple):
    """A response in tokens."""

    ids: np.ndarray  # (T,) int64
    mask: np.ndarray  # (T,) bool: True = the policy's own, False = what a tool or a user said between its turns

    def cut(self, length: int) -> "Response":
        """Its first tokens."""
        return Response(self.ids[:length], self.mask[:length])


PAIR = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask", "status")


def tokenize_preference(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: Options
) -> dict[str, list[Any]]:
    """Preference rows to `prompt_ids`, ids and masks of `chosen` and `rejected`, `margin`, and what every row has.

    The prompt is the tokens that both texts begin with and that lie wholly inside the prompt's text.
    """
    reader = Reader(tokenizer, options)
    read = [reader.read(row) for row in rows]
    sides = [reader.encode([_response_text(reader, row, column) for row in read]) for column in ("chosen", "rejected")]
    fitted = []
    for row, chosen, rejected in zip(rows, *sides, strict=True):
        prompt, responses = _split_pair((chosen, rejected), "prompt" in row, reader.stops)
        fitted.append(_fit(prompt, responses, reader.stops, options))
    columns = _pair_columns([(prompt, *responses, status) for prompt, responses, status in fitted])
    return {**columns, "margin": [row["margin"] for row in rows], **of_each_row(reader, rows, columns["status"])}


def tokenize_unpaired(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: Options
) -> dict[str, list[Any]]:
    """Rows of desirable (`chosen`) and undesirable (`rejected`) responses to the columns of pairs.

    One of the two may be lacking, and then has no token.
    """
    reader = Reader(tokenizer, options)
    read = [reader.read(row) for row in rows]
    lone = [next((name for name in ("chosen", "rejected") if name not in row), None) for row in rows]
    texts = [
        [_response_text(reader, row, name if name in row else other) for row in read]  # one that is alone twice
        for name, other in (("chosen", "rejected"), ("rejected", "chosen"))
    ]
    fitted = []
    for row, lacking, chosen, rejected in zip(rows, lone, *map(reader.encode, texts), strict=True):
        prompt, responses = _split_pair((chosen, rejected), "prompt" in row, reader.stops)
        given = responses if lacking is None else responses[:1]
        prompt, kept, status = _fit(prompt, given, reader.stops, options)
        none = kept[0].cut(0)
        both = {None: kept, "chosen": [none, *kept], "rejected": [*kept, none]}[lacking]
        fitted.append((prompt, *both, status))
    columns = _pair_columns(fitted)
    return {**columns, **of_each_row(reader, rows, columns["status"])}


def _pair_columns(fitted: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    """The columns of `PAIR` of (prompt, chosen, rejected, status)."""
    rows = [(prompt, c.ids, r.ids, c.mask, r.mask, status) for prompt, c, r, status in fitted]
    return dict(zip(PAIR, map(list, zip(*rows, strict=True)), strict=True))


def _response_text(reader: Reader, row: Row, column: str) -> Text:
    prompt, response = row.get("prompt", ""), row[column]
    if isinstance(response, str):
        return Text(prompt + response, len(prompt), [(len(prompt), len(prompt + response))], rendered=False)
    return completed(reader.renderer(row), prompt, response)


def _split_pair(
    pair: tuple[tuple[Text, Encoding], tuple[Text, Encoding]], has_prompt: bool, stops: Sequence[int]
) -> tuple[np.ndarray, list[Response]]:
    encodings = [encoding for _, encoding in pair]
    shortest = min(len(encoding.ids) for encoding in encodings)
    differ = np.flatnonzero(encodings[0].ids[:shortest] != encodings[1].ids[:shortest])
    shared = int(differ[0]) if len(differ) else shortest
    if has_prompt:
        shared = min(shared, *(_prompt_length(text, encoding) for text, encoding in pair))
    else:
        shared = min(shared, shortest - 1)  # each response keeps a token
        while shared > 0 and not all(_begins_a_word(encoding, shared) for encoding in encodings):
            shared -= 1
    return encodings[0].ids[:shared], [_response(text, encoding, shared, stops) for text, encoding in pair]


def _prompt_length(text: Text, encoding: Encoding) -> int:
    """Tokens that lie wholly inside the prompt's text."""
    beyond = np.flatnonzero(encoding.ends > text.prompt_end)
    return int(beyond[0]) if len(beyond) else len(encoding.ids)


def _response(text: Text, encoding: Encoding, prompt_length: int, stops: Sequence[int]) -> Response:
    """The tokens after the prompt, up to the end token, which is appended where none is."""
    if len(text.spans) > 1:
        return Response(*(column[prompt_length:] for column in _learnt(text, encoding, stops)))
    end, stopped = close(encoding, len(encoding.ids), stops)
    if end <= prompt_length:  # an empty response; a stop token before it is the prompt's
        end, stopped = prompt_length, False
    ids = encoding.ids[prompt_length:end]
    ids = ids if stopped else np.append(ids, stops[0])
    return Response(ids, np.ones(len(ids), dtype=bool))


def is_empty(response: np.ndarray, stops: Sequence[int]) -> bool:
    """Whether a response says nothing before it stops."""
    return len(response) == 1 and int(response[0]) in stops


def _begins_a_word(encoding: Encoding, token: int) -> bool:
    start = encoding.ends[token - 1]  # not starts[token], from which white space may be missing
    return bool(start == 0 or encoding.text[start : start + 1].isspace() or encoding.text[start - 1].isspace())


def _fit(
    prompt: np.ndarray, responses: Sequence[Response], stops: Sequence[int], options: Options
) -> tuple[np.ndarray, Sequence[Response], int]:
    """A prompt with one response or both of a pair, within the limit of tokens, and what became of them."""

    def dropped(status: int) -> tuple[np.ndarray, Sequence[Response], int]:
        return prompt[:0], [response.cut(0) for response in responses], status

    if _ties(responses):
        return dropped(TIE)
    if len(prompt) == 0:
        return dropped(NO_PROMPT)
    longest = len(prompt) + max(len(response.ids) for response in responses)
    if options.max_length is None or longest <= options.max_length:
        return prompt, responses, EMPTY if any(is_empty(response.ids, stops) for response in responses) else KEPT
    room = options.max_length - len(prompt)
    if options.truncation == "drop":
        return dropped(TOO_LONG)
    if room < 1:
        return dropped(LONG_PROMPT)
    cut = [response.cut(room) for response in responses]
    return dropped(TIE) if _ties(cut) else (prompt, cut, TRUNCATED)


def _ties(responses: Sequence[Response]) -> bool:
    return len(responses) == 2 and np.array_equal(responses[0].ids, responses[1].ids)


def tokenize_prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: Options) -> dict[str, list[Any]]:
    """Prompts to `prompt_ids`, `status` and `control_tokens`.

    Long ones keep their end, and the beginning-of-sequence token if any.
    """
    reader = Reader(tokenizer, options)
    texts = []
    for row in map(reader.read, rows):
        chat = isinstance(row["prompt"], list)
        text = reader.renderer(row).prompt(row["prompt"]) if chat else row["prompt"]
        texts.append(Text(text, len(text), [], rendered=chat))
    columns: dict[str, list[Any]] = {"prompt_ids": [], "status": [], "control_tokens": reader.control}
    for _, encoding in reader.encode(texts):
        ids = cut_prompt(encoding.ids, tokenizer, options)
        columns["prompt_ids"].append(ids)
        cut = len(ids) < len(encoding.ids)
        columns["status"].append(TRUNCATED if cut else KEPT if len(ids) else NO_PROMPT)
    return columns


def tokenize_scored(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, options: Options) -> dict[str, list[Any]]:
    """Prompts and completions to `prompt_ids`, `response_ids` and what is counted of rows, read as in training.

    What is too long loses tokens of the prompt on its left, as in `tokenize_prompts`, then of the completion on its
    right.
    """
    reader = Reader(tokenizer, options)
    texts = [_response_text(reader, reader.read(row), "completion") for row in rows]
    columns: dict[str, list[Any]] = {"prompt_ids": [], "response_ids": [], "status": []}
    for text, encoding in reader.encode(texts):
        length = _prompt_length(text, encoding)
        whole, response = encoding.ids[:length], _response(text, encoding, length, reader.stops).ids
        prompt = cut_prompt(whole, tokenizer, options)
        room = len(response) if options.max_length is None else max(options.max_length - len(prompt), 0)
        status = EMPTY if is_empty(response, reader.stops) else KEPT
        if len(prompt) < len(whole) or len(response) > room:
            status = TRUNCATED if room else LONG_PROMPT
        columns["prompt_ids"].append(prompt)
        columns["response_ids"].append(response[:room])
        columns["status"].append(status if len(prompt) else NO_PROMPT)
    return {**columns, **of_each_row(reader, rows, columns["status"])}


def cut_prompt(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, options: Options) -> np.ndarray:
    """(P,) of a prompt's tokens those that `max_prompt_length` leaves: its end, and its beginning token if any."""
    limit = options.max_prompt_length
    if limit is None or len(ids) <= limit:
        return ids
    begins = int(limit > 1 and ids[0] == tokenizer.bos_token_id)
    return np.concatenate([ids[:begins], ids[len(ids) - limit + begins :]])
