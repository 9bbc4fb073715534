"""Responses to held-out prompts for a person: their text, and a number for each token by what the stage knows."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.texts import as_texts, pieces
from lit_rlhf.engine.packing import Example, PackedBatch, pack
from token_mdp import Episode

ADDED_UP = ("KL", "implicit reward")  # readings whose sum over a response means something
MOST_TOKENS = 512  # of a response, that are shown one by one


class Sample(NamedTuple):
    """A response and what is known of it."""

    row: dict[str, Any]  # prompt, completion, and numbers of the whole response
    pieces: list[str]  # the text of each token; a character of several tokens stands at the last of them
    readings: dict[str, list[float]]  # by name, a number for each of these tokens


def read_samples(
    rows: Sequence[dict[str, Any]],
    examples: Sequence[Example],
    tokenizer: Any,
    readings: Callable[[PackedBatch], dict[str, Tensor]],
    device: torch.device,
) -> list[Sample]:
    """Read responses token by token.

    Args:
        rows: B rows of text and numbers.
        examples: B prompts, each with one response.
        tokenizer: decodes.
        readings: numbers of a packed batch's response tokens, (M,) by name; the sums of those in `ADDED_UP` join the
            row, as `kl` and `implicit_reward`.
        device: of the models.
    """
    prompts, responses = zip(*((example.prompt_ids, example.responses[0]) for example in examples), strict=True)
    with torch.no_grad():
        columns = readings(move_data_to_device(pack(examples), device))
    split = {name: column.float().cpu().split([len(ids) for ids in responses]) for name, column in columns.items()}
    samples = []
    for number, (row, ids) in enumerate(zip(rows, responses, strict=True)):
        mine = {name: parts[number] for name, parts in split.items()}
        sums = {name.lower().replace(" ", "_"): mine[name].sum().item() for name in ADDED_UP if name in mine}
        shown = {name: [round(value, 4) for value in part[:MOST_TOKENS].tolist()] for name, part in mine.items()}
        texts = pieces(tokenizer, ids[:MOST_TOKENS], prompts[number][-1:])
        samples.append(Sample({**row, **sums}, texts, shown))
    return samples


def examples_of(episodes: Sequence[Episode]) -> list[Example]:
    """Episodes, to be packed."""
    return [Example(episode.prompt_ids, (episode.response_ids,)) for episode in episodes]


def known_examples(prompts: PromptBatch) -> list[Example]:
    """Prompts with the completions that the data have, to be packed."""
    assert prompts.response_ids is not None, "the data have completions"
    return [Example(prompt, (ids,)) for prompt, ids in zip(prompts.prompt_ids, prompts.response_ids, strict=True)]


def known_texts(tokenizer: Any, prompts: PromptBatch) -> list[dict[str, Any]]:
    """Rows of prompts and the completions that the data have, as text, message lists too."""
    pairs = ((example.prompt_ids, example.responses[0]) for example in known_examples(prompts))
    return [dict(zip(("prompt", "completion"), as_texts(tokenizer, *pair), strict=True)) for pair in pairs]


def with_known_completions(rows: Sequence[dict[str, Any]], prompts: PromptBatch) -> list[dict[str, Any]]:
    """Rows with the completion that the data have beside each prompt, by the name that `predict` gives it."""
    known = prompts.columns.get("completion") or [None] * len(rows)
    return [row | reference(completion) for row, completion in zip(rows, known, strict=True)]


def reference(completion: Any) -> dict[str, str]:
    """A completion that the data have, of messages their contents."""
    if isinstance(completion, list):
        completion = "\n".join(str(message["content"]) for message in completion if message.get("content"))
    return {"reference_completion": completion} if isinstance(completion, str) else {}
