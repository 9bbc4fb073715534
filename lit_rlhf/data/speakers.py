"""Who says each token of a conversation: what its template writes of one message more is that message's."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.chat import Renderer, Text
from lit_rlhf.data.formats import Kind
from lit_rlhf.data.messages import Row
from lit_rlhf.data.reader import Options, Reader
from lit_rlhf.data.turns import joined
from lit_rlhf.errors import UserError


def speakers(
    row: Row, kind: Kind, side: str, ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, options: Options
) -> list[str] | None:
    """The role of the message that each token of a row belongs to; None of text, and where that cannot be told.

    Args:
        row: as the functions of `tokenize` take it.
        kind: of the row.
        side: column of the response, where the row has several.
        ids: (S,) the row's tokens, from its first one on.
        tokenizer: has the template.
        options: of tokenisation.
    """
    reader = Reader(tokenizer, options)
    read = reader.read(row)
    messages = conversation(read, kind, side)
    if messages is None:
        return None
    render, asks = reader.renderer(read), kind in ("prompts", "stepwise")
    full = render.prompt(messages) if asks else render(messages)
    ends = [shared(render, messages[:count], full) for count in range(1, len(messages))]
    ends = list(accumulate([*ends, shared(render, messages, full)], max))
    roles = [str(message["role"]) for message in messages]
    if asks and ends[-1] < len(full):  # the header of the turn that the model is to write
        ends, roles = [*ends, len(full)], [*roles, "assistant"]
    ends[-1] = len(full)
    spans = list(pairwise([0, *ends]))
    ((text, encoding),) = reader.encode([Text(full, len(full), spans, rendered=True)])
    known = min(len(encoding.ids), len(ids))
    if not np.array_equal(encoding.ids[:known], ids[:known]):
        return None
    owners = np.searchsorted([end for _, end in text.spans], encoding.ends[:known])
    said = [roles[owner] for owner in owners.tolist()]
    return said + said[-1:] * (len(ids) - known)  # an end token that is appended belongs to the last


def conversation(row: Row, kind: Kind, side: str) -> list[Row] | None:
    """The messages that a row is rendered from; None of text."""
    prompt = row.get("prompt", [])
    if kind in ("prompts", "stepwise"):
        return prompt if isinstance(prompt, list) else None
    response: Any = (row.get("completion") or row.get("messages")) if kind == "sft" else row.get(side)
    return joined(prompt, response) if isinstance(response, list) and isinstance(prompt, list) else None


def shared(render: Renderer, messages: Sequence[Row], full: str) -> int:
    """Characters with which a conversation begins as its first messages alone do; 0 where the template refuses them."""
    try:
        alone = render(list(messages))
    except UserError:
        return 0
    return next((at for at, (a, b) in enumerate(zip(alone, full, strict=False)) if a != b), min(len(alone), len(full)))
