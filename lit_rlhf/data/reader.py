"""Rows to texts: by the chat template where they are messages, with their control tokens seen to."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.chat import Renderer, Text, stop_token_ids
from lit_rlhf.data.control_tokens import ControlTokenFinder, ControlTokens
from lit_rlhf.data.encoding import Encoding, encode
from lit_rlhf.data.messages import Row
from lit_rlhf.errors import UserError

Truncation = Literal["drop", "truncate"]
LossOn = Literal["response", "all"]


class Options(NamedTuple):
    """How rows become tokens."""

    max_length: int | None  # tokens of a prompt with one response; None = no limit
    truncation: Truncation = "truncate"
    loss_on: LossOn = "response"
    max_prompt_length: int | None = None  # longer prompts that are to be completed or scored lose tokens on the left
    control_tokens: ControlTokens = "keep"
    template_kwargs: Mapping[str, Any] = {}
    step_separator: str = "\n"  # behind each step of a solution


class Reader:
    """Turns the rows of one call into texts, and finds the control tokens that they spell out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Options) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.stops = stop_token_ids(tokenizer)
        self.finder = ControlTokenFinder(tokenizer)
        self.control: list[list[int]] = []  # of each row so far: the control tokens in its texts

    def read(self, row: Row) -> Row:
        """Note a row's control tokens, and mark them where they are to stay text.

        Raises:
            UserError: there are some, and they are to be refused.
        """
        found = sorted(set(self.finder.find(_spelt(row))))
        if found and self.options.control_tokens == "refuse":
            raise UserError(
                f"the row spells out the control tokens {found}; take them out, or set control_tokens: escape to read "
                "them as plain text, or keep to read them as the tokens they name"
            )
        ids: Any = self.tokenizer.convert_tokens_to_ids(found)
        self.control.append(list(ids))
        return self.finder.mark(row) if found and self.options.control_tokens == "escape" else row

    def renderer(self, row: Row) -> Renderer:
        """The chat template for a row of messages."""
        return Renderer(self.tokenizer, row, self.options.template_kwargs)

    def encode(self, texts: Sequence[Text]) -> list[tuple[Text, Encoding]]:
        """Tokenise texts, one of each row that was read, marks taken out."""
        bare = [self._unmarked(text) if found else text for text, found in zip(texts, self.control, strict=True)]
        return list(zip(bare, encode(self.tokenizer, bare, self.stops), strict=True))

    def _unmarked(self, text: Text) -> Text:
        if self.options.control_tokens != "escape":
            return text
        positions = [text.prompt_end, *(edge for span in text.spans for edge in span)]
        bare, plain, (prompt_end, *edges) = self.finder.unmark(text.text, positions)
        if not text.rendered:  # all of it is the row's own
            plain = [(0, len(bare))]
        return Text(bare, prompt_end, list(zip(edges[::2], edges[1::2], strict=True)), text.rendered, plain)


def _spelt(row: Row) -> Any:
    """The texts of a row, a text response behind its prompt: together they may spell what neither does."""
    if not isinstance(row.get("prompt"), str):
        return row
    return [row["prompt"] + "".join(row.get(name, "")) for name in ("completion", "completions", "chosen", "rejected")]
