"""Rows as the model sees them: their tokens, out of the batch that training gets.

What was cut off a row, why it was dropped and who says a token, no batch knows. For that the row is read again, by the
same functions and without a limit of tokens; tokens of the batch that are not among these are an error.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.control_tokens import ControlTokenFinder
from lit_rlhf.data.examples import PackedDataset
from lit_rlhf.data.formats import Kind, to_tokenize
from lit_rlhf.data.messages import Row
from lit_rlhf.data.microbatches import MicroBatch
from lit_rlhf.data.naming import Role, Source
from lit_rlhf.data.plain import as_json
from lit_rlhf.data.reader import Options, Reader
from lit_rlhf.data.sources import placed_rows
from lit_rlhf.data.speakers import speakers
from lit_rlhf.data.steps import tokenize_solutions
from lit_rlhf.data.texts import pieces
from lit_rlhf.data.token_cache import FUNCTIONS
from lit_rlhf.data.tokenize import EMPTY, STATUS
from lit_rlhf.errors import UserError

PARTS: dict[Kind, dict[str, str]] = {  # how the columns of tokens are called, where not by their own names
    "sft": {"input": "row"},
    "unpaired": {"chosen": "desirable", "rejected": "undesirable"},
    "stepwise": {"response": "solution"},
}
Seen = dict[str, tuple[np.ndarray, np.ndarray]]  # by column: its tokens, and which of them the loss counts


class Token(NamedTuple):
    """One token, as it is shown."""

    id: int
    text: str  # a character of several tokens stands at the last of them
    role: str  # who says it; of text, which part of the row it is; of a solution, which step
    learnt: bool  # whether the loss counts it
    control: bool  # a special token, as the end of a turn


class Part(NamedTuple):
    """A run of tokens of a row: all of it, or its prompt, or a response to that."""

    name: str
    tokens: list[Token]
    left_out: list[Token]  # what the limit of tokens has cut off; all of a row that is dropped
    cut_at: int  # how many of the tokens stand before that


class ShownRow(NamedTuple):
    """A row, token by token."""

    place: str  # file and line
    status: str  # what became of it, see `tokenize.STATUS`
    parts: list[Part]  # none where nothing of a row became tokens
    text: str  # the row as it was read, as JSON


class Viewer:
    """Shows rows of one role of a data module.

    Args:
        kind: of the rows.
        role: that they are for.
        sources: of the rows.
        tokenizer: the data module's.
        options: by which it reads them.
        data: that packs them; of prompts, which are in no batch until they are played, the tokens by source and row.
        at_ends: whether the loss is of a score at the last token of each response, rather than of its tokens.
    """

    def __init__(
        self,
        kind: Kind,
        role: Role,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        options: Options,
        data: PackedDataset | Mapping[tuple[int, int], np.ndarray],
        at_ends: bool = False,
    ) -> None:
        self.kind, self.role, self.sources = kind, role, sources
        self.tokenizer, self.data, self.at_ends = tokenizer, data, at_ends
        self.options = options._replace(max_length=None, max_prompt_length=None)
        self.finder = ControlTokenFinder(tokenizer)

    def rows(self, source: int, numbers: Sequence[int], statuses: np.ndarray) -> Iterator[ShownRow]:
        """Rows of a source, in its order.

        Args:
            source: its number.
            numbers: of the rows in it, those that are not dropped being among what an epoch takes.
            statuses: (n,) of all its rows.
        """
        wanted = set(numbers)
        placed = placed_rows(self.sources[source], self.kind, self.role) if wanted else ()
        for number, (place, read) in enumerate(placed):
            if number in wanted:
                text = as_json(to_tokenize(read, self.kind, place) if self.kind == "prompts" else read, place)
                used = statuses[number] <= EMPTY
                seen = self.seen(source, number) if used else {}
                yield ShownRow(place, STATUS[statuses[number]], list(self.parts(json.loads(text), seen, place)), text)
            if number >= max(wanted):
                return

    def parts(self, row: Row, seen: Seen, place: str) -> Iterator[Part]:
        """The parts of a row that have tokens, those of the batch beside those that it has without a limit.

        Raises:
            UserError: the row is read as other tokens than the batch has.
        """
        columns = FUNCTIONS[self.kind]([row], self.tokenizer, self.options)
        whole = {name.removesuffix("_ids"): ids[0] for name, ids in columns.items() if name.endswith("_ids")}
        prompt = whole.get("prompt", np.zeros(0, dtype=np.int64))
        for side, ids in whole.items():
            if not len(ids):
                continue
            ids_seen, learnt = seen.get(side, (ids[:0], np.zeros(0, dtype=bool)))
            first = int(self.kind == "prompts" and len(ids_seen) > 0 and ids_seen[0] != ids[-len(ids_seen)])
            kept = np.arange(len(ids_seen))
            if self.kind == "prompts":  # which keep their ends, and the first token if it begins all of them
                kept[first:] += len(ids) - len(ids_seen)
            if len(ids_seen) > len(ids) or not np.array_equal(ids[kept], ids_seen):
                raise UserError(
                    f"{place}: its tokens are others than a moment ago; does something write to the file, or does the "
                    "chat template print the time?"
                )
            is_learnt = np.zeros(len(ids), dtype=bool)
            is_learnt[kept] = learnt
            tokens = self.tokens(ids, self.roles(row, side, prompt, ids), is_learnt, prompt[-1:] * (side != "prompt"))
            left_out = [tokens[at] for at in np.setdiff1d(np.arange(len(ids)), kept)]
            cut_at = first if self.kind == "prompts" else len(kept)
            yield Part(PARTS.get(self.kind, {}).get(side, side), [tokens[at] for at in kept], left_out, cut_at)

    def tokens(self, ids: np.ndarray, roles: Sequence[str], learnt: np.ndarray, before: np.ndarray) -> list[Token]:
        """Tokens for a person."""
        names = self.tokenizer.convert_ids_to_tokens(ids.tolist())
        control = [self.finder.pattern.fullmatch(str(name)) is not None for name in names]
        texts = pieces(self.tokenizer, ids, before)
        return [Token(*of) for of in zip(ids.tolist(), texts, roles, learnt.tolist(), control, strict=True)]

    def roles(self, row: Row, side: str, prompt: np.ndarray, ids: np.ndarray) -> Sequence[str]:
        """(S,) the role of each token of a part; of a response by the conversation that it ends."""
        name = PARTS.get(self.kind, {}).get(side, side)
        if (self.kind, side) == ("stepwise", "response"):
            return self.steps(row)
        if self.kind == "sft" and not isinstance(row.get("messages", row.get("prompt")), list):
            return self.roles_of_text(row, len(ids))
        before = prompt if side not in ("prompt", "input") else ids[:0]
        column = next((one for one in (side, "chosen", "rejected") if one in row and one != "prompt"), side)
        said = speakers(row, self.kind, column, np.concatenate([before, ids]), self.tokenizer, self.options)
        return [name] * len(ids) if said is None else said[len(before) :]

    def roles_of_text(self, row: Row, length: int) -> list[str]:
        """Those of a demonstration that is text."""
        if "prompt" not in row:
            return ["text"] * length
        (mask,) = FUNCTIONS["sft"]([row], self.tokenizer, self.options._replace(loss_on="response"))["loss_mask"]
        return ["prompt"] * int(mask.argmax()) + ["completion"] * (length - int(mask.argmax()))

    def steps(self, row: Row) -> list[str]:
        """Those of a solution: its steps, and what is known of them."""
        ((_, steps),) = tokenize_solutions(Reader(self.tokenizer, self.options), [row])
        judged = {None: "not judged", 0.0: "wrong", 1.0: "right"}
        named = [f"step {number}, {judged.get(one, f'right: {one}')}" for number, one in enumerate(row["labels"], 1)]
        return [name for name, ids in zip(named, steps, strict=True) for _ in ids]

    def seen(self, source: int, number: int) -> Seen:
        """What a batch of this row alone holds, the loss's tokens by the batch's own account of them."""
        if not isinstance(self.data, PackedDataset):
            ids = self.data[source, number]
            return {"prompt": (ids, np.zeros(len(ids), dtype=bool))}
        row = sum(report.rows for report in self.data.reports[:source]) + number
        (at, *_) = np.flatnonzero(self.data.rows == row)
        batch: Any = self.data[MicroBatch(np.array([at]), 1.0)]
        packed = batch.packed
        ids, lasts = packed.input_ids.numpy(), packed.last_nodes.numpy()
        prompt = 1 if self.kind == "sft" else len(self.data.table[[row]]["prompt_ids"][0])
        starts = np.concatenate([[prompt], lasts[:-1] + 1])  # of the responses
        learnt = np.zeros(len(ids), dtype=bool)
        learnt[self.learnt_nodes(batch, prompt, starts)] = True
        if self.kind == "sft":
            return {"input": (ids, learnt)}
        sides = ["response"] if self.kind == "stepwise" else ["chosen", "rejected"]
        if self.kind == "unpaired" and len(lasts) == 1:
            sides = sides[:1] if batch.desirable[0] else sides[1:]
        bounds = list(pairwise([0, *starts.tolist(), len(ids)]))
        return {
            side: (ids[start:end], learnt[start:end])
            for side, (start, end) in zip(["prompt", *sides], bounds, strict=True)
        }

    def learnt_nodes(self, batch: Any, prompt: int, starts: np.ndarray) -> np.ndarray:
        """(M,) nodes that the loss is of: those whose predictors the batch names, or those that are scored."""
        packed = batch.packed
        if self.kind == "stepwise":
            return batch.step_nodes.numpy()
        if self.at_ends:
            return packed.last_nodes.numpy()
        predictors = packed.predictors.numpy()  # that of a response's first token is the prompt's last
        return np.where(predictors < prompt, starts[packed.sequence_ids.numpy()], predictors + 1)
