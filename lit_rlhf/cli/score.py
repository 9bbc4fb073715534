"""`lit-rlhf score`: what a reward model or a function gives for the responses in a file."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lit_rlhf.algorithms.preference import agreement
from lit_rlhf.data.batches import Origins, PromptBatch
from lit_rlhf.data.chat import set_template
from lit_rlhf.data.examples import PreferenceDataset, load_examples, ragged
from lit_rlhf.data.formats import Kind
from lit_rlhf.data.locating import input_files
from lit_rlhf.data.mapping import Format
from lit_rlhf.data.messages import Row
from lit_rlhf.data.modules import PREDICT_BATCH
from lit_rlhf.data.naming import Role, Source, parse_sources
from lit_rlhf.data.prompts import load_prompts
from lit_rlhf.data.settings import TokenizationSettings
from lit_rlhf.data.sources import place_of, placed_rows
from lit_rlhf.errors import UserError, require
from lit_rlhf.files import make_room, strict_json, write_lines
from lit_rlhf.models.adapter_folders import saved_adapter
from lit_rlhf.models.tokens import load_tokenizer
from lit_rlhf.models.weights import load_config
from lit_rlhf.rollout.judges import judge_of
from lit_rlhf.rollout.rewards import Reward
from lit_rlhf.rollout.scoring import scored

ROLE: Role = "predict"
SIDES = ("chosen", "rejected")


class Responses(NamedTuple):
    """What is to be scored: the rows of a file, and the responses in them."""

    rows: list[Row]
    batches: dict[str, PromptBatch]  # by the column that its scores go into; one response of each row


NO_TOKENIZER = (
    "a function scores text, and this is a message list; name by --tokenizer the folder of the model whose chat "
    "template makes text of it"
)
NO_TEMPLATE = (
    "this is a message list, and the tokenizer has no chat template to make text of it; give texts, or name by "
    "--tokenizer the folder of a model that has one"
)


def score(
    reward: Reward | Callable[..., Any] | str,
    data: str,
    output: str,
    tokenizer: str | None = None,
    name: str = "score",
    format: Format | None = None,
    columns: dict[str, str] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> None:
    """Score the completions in a file, such as `predict` writes, or both responses of preference pairs.

    Args:
        reward: what scores: the folder of a reward model, or a function (prompts, responses, **columns) of text by its
            import path.
        data: rows with prompt and completion, or with chosen and rejected: a file, a folder, or the name of a dataset.
        output: JSON Lines for the rows, with their scores beside what is in them.
        tokenizer: folder of the model whose chat template makes text of rows that are messages, for a function; null =
            that of the reward model, and for a function none: texts are handed to it as they stand.
        name: of the column for the scores; those of pairs begin with chosen_ and rejected_.
        format: as of `fit`: what rows of another shape are (alpaca, sharegpt).
        columns: as of `fit`: our names of columns that the data call otherwise.
        chat_template_kwargs: variables of the chat template for all rows.

    Raises:
        UserError: no reward, no rows, or rows that it cannot score; nothing is written then.
    """
    judge = judge_of(reward, "reward")
    require(bool(name), "name", name, "the name of a column")
    (source,) = parse_sources(data, format, columns, "data")
    make_room(Path(output), "output", ".jsonl", input_files([source], ROLE))
    kind = kind_of(source)
    known: Any = getattr(judge, "tokenizer", None) if tokenizer is None else tokenizer_of(tokenizer)
    if known is None:
        responses, known = as_text(source, kind, name), Characters()
    else:
        set_template(known, None, chat_template_kwargs or {})
        if known.chat_template is None:
            text_rows(source, kind, NO_TEMPLATE)
        responses = as_tokens(source, kind, name, known, chat_template_kwargs or {})
    columns_there = {column for row in responses.rows for column in row}
    if taken := sorted(columns_there & responses.batches.keys()):
        raise UserError(f"name: the data have a column {taken[0]!r} already; choose another name than {name!r}")
    judge.check_columns(next(iter(responses.batches.values())).columns)
    judge.bind(known, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    scores = {column: all_scores(judge, batch) for column, batch in responses.batches.items()}
    found = [
        dict(zip(scores, values, strict=True)) for values in zip(*(s.tolist() for s in scores.values()), strict=True)
    ]
    lines = ({**row, **own} for row, own in zip(responses.rows, found, strict=True))
    write_lines((strict_json(row, ensure_ascii=False, default=str) for row in lines), Path(output))
    print(f"{summary(scores)}; wrote {output}")


def summary(scores: Mapping[str, np.ndarray]) -> str:
    """What the scores come to, in a line."""
    if len(scores) == 1:
        (values,) = scores.values()
        error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
        return (
            f"{len(values)} rows: mean score {values.mean():.4f}{error}, from {values.min():.4f} to {values.max():.4f}"
        )
    chosen, rejected = (torch.from_numpy(values).float() for values in scores.values())
    found = agreement(chosen, rejected)
    return f"{len(chosen)} pairs: accuracy {found['accuracy']:.4f}, mean margin {found['margin']:.4f}"


def all_scores(judge: Reward, batch: PromptBatch) -> np.ndarray:
    """(n,) scores of a response of each row, some at a time."""
    assert batch.response_ids is not None
    starts = range(0, len(batch.prompt_ids), PREDICT_BATCH)
    parts = [slice(start, start + PREDICT_BATCH) for start in starts]
    return np.concatenate([scored(judge, "reward", batch.take(part), batch.response_ids[part]) for part in parts])


def kind_of(source: Source) -> Kind:
    """Whether the rows are completions or pairs, by the first of them."""
    try:
        next(placed_rows(source, "scored", ROLE), None)
    except UserError as error:
        try:
            next(placed_rows(source, "preference", ROLE), None)
        except UserError:
            raise error from None
        return "preference"
    return "scored"


def tokenizer_of(name: str) -> Any:
    """The tokenizer beside a model or an adapter."""
    saved = saved_adapter(name)
    return load_tokenizer(name, load_config(name if saved is None else saved.base))


def as_tokens(source: Source, kind: Kind, name: str, tokenizer: Any, template_kwargs: dict[str, Any]) -> Responses:
    """Rows as in training, within the model's context; what is dropped is told."""
    options = TokenizationSettings(chat_template_kwargs=template_kwargs).of_examples(tokenizer)
    if kind == "scored":
        prompts = load_prompts([source], ROLE, tokenizer, options, kind="scored")
        batch = prompts.take(np.arange(len(prompts)))
        values = zip(*batch.columns.values(), strict=True)
        return Responses([dict(zip(batch.columns, row, strict=True)) for row in values], {name: batch})
    pairs = load_examples([source], kind, ROLE, tokenizer, options, dataset=PreferenceDataset)
    read = [row for _, row in placed_rows(source, kind, ROLE)]
    table = pairs.table.data
    ids = {column: ragged(table.column(column)) for column in ("prompt_ids", *(f"{side}_ids" for side in SIDES))}
    taken = {column: [values[row] for row in pairs.rows] for column, values in ids.items()}
    return pairs_of(source, [read[row] for row in pairs.rows], pairs.rows.tolist(), taken, name)


def text_rows(source: Source, kind: Kind, otherwise: str) -> list[Row]:
    """The rows, all of text.

    Args:
        source: of the rows.
        kind: of them.
        otherwise: what to say of one that holds messages.

    Raises:
        UserError: one does.
    """
    rows: list[Row] = []
    for place, row in placed_rows(source, kind, ROLE):
        if messages := [column for column in ("prompt", "completion", *SIDES) if isinstance(row.get(column), list)]:
            raise UserError(f"{place}, column '{messages[0]}': {otherwise}")
        rows.append(row)
    return rows


def as_text(source: Source, kind: Kind, name: str) -> Responses:
    """Rows of text as they stand.

    Raises:
        UserError: a row is of messages.
    """
    rows = text_rows(source, kind, NO_TOKENIZER)
    if not rows:
        raise UserError(f"{source.name}: there are no rows")

    def ids(column: str) -> list[np.ndarray]:
        return [Characters.encode(row.get(column, "")) for row in rows]

    if kind == "preference":
        taken = {"prompt_ids": ids("prompt"), **{f"{side}_ids": ids(side) for side in SIDES}}
        return pairs_of(source, rows, list(range(len(rows))), taken, name)
    columns = {column: [row.get(column) for row in rows] for column in dict.fromkeys(c for row in rows for c in row)}
    origins = Origins([functools.partial(place_of, source, kind, ROLE)], [(0, number) for number in range(len(rows))])
    batch = PromptBatch(ids("prompt"), columns, response_ids=ids("completion"), origins=origins)
    return Responses(rows, {name: batch})


def pairs_of(
    source: Source, rows: list[Row], numbers: list[int], ids: dict[str, list[np.ndarray]], name: str
) -> Responses:
    """Both responses of each pair, to be scored by themselves."""
    origins = Origins([functools.partial(place_of, source, "preference", ROLE)], [(0, number) for number in numbers])
    prompt = {"prompt": [row.get("prompt", "") for row in rows]}
    batches = {
        f"{side}_{name}": PromptBatch(ids["prompt_ids"], prompt, response_ids=ids[f"{side}_ids"], origins=origins)
        for side in SIDES
    }
    kept = [{column: value for column, value in row.items() if column != "margin" or value} for row in rows]
    return Responses(kept, batches)


class Characters:
    """Characters in the place of tokens, for a function of text as it stands."""

    @staticmethod
    def encode(text: str) -> np.ndarray:
        """(n,) code points."""
        return np.array([ord(character) for character in text], dtype=np.int64)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text again; no character is special."""
        return "".join(map(chr, ids))
