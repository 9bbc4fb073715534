"""Texts to token ids with the characters that each token stands for.

A text is tokenised once, whole, so that no boundary changes what the tokens are; all but texts with marked control
tokens, which split the text as the tokens themselves would.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.chat import Span, Text
from lit_rlhf.errors import UserError


class Encoding(NamedTuple):
    """A tokenised text; tokens added to it have start = end = 0."""

    text: str
    ids: np.ndarray  # (S,) int64
    starts: np.ndarray  # (S,) first character of each token, leading white space perhaps left out
    ends: np.ndarray  # (S,) one past its last character


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], stops: Sequence[int]) -> list[Encoding]:
    """Tokenise texts with offsets, special tokens at the end left out, and the beginning token written once.

    Raises:
        UserError: the tokenizer cannot give offsets, or makes a control token of a text that is to stay text.
    """
    require_offsets(tokenizer)
    encodings: dict[int, Encoding] = {}
    groups: dict[tuple[bool, bool], list[int]] = {}
    for number, text in enumerate(texts):
        if text.rendered and text.plain:
            encodings[number] = _encode_pieces(tokenizer, text)
        else:
            groups.setdefault((text.rendered, bool(text.plain)), []).append(number)
    for (rendered, plain), members in groups.items():
        output = tokenizer(
            [texts[number].text for number in members],
            add_special_tokens=not rendered,
            split_special_tokens=plain,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        outputs = zip(output["input_ids"], output["offset_mapping"], output["special_tokens_mask"], strict=True)
        for number, (ids, offsets, added) in zip(members, outputs, strict=True):
            length = len(ids)
            if plain:
                _require_plain(tokenizer, [token for token, is_added in zip(ids, added, strict=True) if not is_added])
            # An end token that the tokenizer adds by itself would count as part of a prompt.
            while length > 1 and added[length - 1] and ids[length - 1] in stops:
                length -= 1
            bounds = np.array(offsets[:length], dtype=np.int64).reshape(-1, 2)
            # A space that begins the text loses its offsets to byte-level trimming; only added tokens have none.
            ends = np.maximum(bounds[:, 1], 1 - np.array(added[:length], dtype=np.int64))
            encodings[number] = Encoding(texts[number].text, np.array(ids[:length], dtype=np.int64), bounds[:, 0], ends)
    return [_with_one_beginning(encodings[number], tokenizer.bos_token_id) for number in range(len(texts))]


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


def _with_one_beginning(encoding: Encoding, bos: int | None) -> Encoding:
    """Without the beginning token that a text, rendered before, writes after the one that the tokenizer adds."""
    others = np.flatnonzero(encoding.ids != bos)
    run = int(others[0]) if len(others) else len(encoding.ids)
    if bos is None or run < 2:
        return encoding
    keep = np.array([0, *range(run, len(encoding.ids))])
    return Encoding(encoding.text, encoding.ids[keep], encoding.starts[keep], encoding.ends[keep])


def _encode_pieces(tokenizer: PreTrainedTokenizerBase, text: Text) -> Encoding:
    """As transformers does with `apply_chat_template(sanitize_control_tokens=True)`, with offsets."""
    ids: list[int] = []
    offsets: list[Span] = []
    at = 0
    for start, end in [*text.plain, (len(text.text), len(text.text))]:
        for first, last, plain in ((at, start, False), (start, end, True)):
            if first < last:
                piece_ids, piece_offsets = _encode_piece(tokenizer, text.text[first:last], plain, opens=first == 0)
                ids += piece_ids
                offsets += [(first + a, first + max(b, 1)) for a, b in piece_offsets]
        at = end
    bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    return Encoding(text.text, np.array(ids, dtype=np.int64), bounds[:, 0], bounds[:, 1])


def _encode_piece(
    tokenizer: PreTrainedTokenizerBase, piece: str, plain: bool, opens: bool
) -> tuple[list[int], list[Span]]:
    options = {"add_special_tokens": False, "split_special_tokens": plain, "return_offsets_mapping": True}
    if plain:
        _require_plain(tokenizer, tokenizer(piece, **options)["input_ids"])
    if not opens:  # behind a line break, so that SentencePiece writes no space where a text begins
        newline = tokenizer("\n", **options)["input_ids"]
        output = tokenizer("\n" + piece, **options)
        if output["input_ids"][: len(newline)] == newline:
            rest = output["offset_mapping"][len(newline) :]
            return output["input_ids"][len(newline) :], [(max(a - 1, 0), b - 1) for a, b in rest]
    output = tokenizer(piece, **options)
    return output["input_ids"], output["offset_mapping"]


def _require_plain(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """Refuse to call text what the model reads as a control token."""
    special = {token_id: token for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    if made := special.keys() & set(ids) - {tokenizer.unk_token_id}:
        raise UserError(
            f"the tokenizer makes the control tokens {sorted(str(special[token]) for token in made)} of plain text "
            "too, so they cannot be escaped; set control_tokens: refuse, or keep"
        )
