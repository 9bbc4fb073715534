"""Conversations as text, by the tokenizer's chat template, and the tokens that end a turn."""

from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lit_rlhf.data.formats import Row
from lit_rlhf.errors import UserError


class Text(NamedTuple):
    """A text before tokenisation."""

    text: str
    spans: list[tuple[int, int]]  # characters that are responses
    rendered: bool  # by a chat template, which writes its special tokens itself


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> tuple[int, ...]:
    """The ids that end a response: one set for data, rollouts, rewards and generation.

    The tokenizer's end token first, then the token with which its chat template ends an assistant turn, then those of
    the generation config.

    Raises:
        UserError: there is none.
    """
    listed = generation_config.eos_token_id if generation_config is not None else None
    candidates = [tokenizer.eos_token_id, _end_of_turn_id(tokenizer)]
    candidates += listed if isinstance(listed, list) else [listed]
    stops = tuple(dict.fromkeys(int(token) for token in candidates if token is not None))
    if not stops:
        raise UserError("the tokenizer has no eos_token and its chat template ends turns with none: no response ends")
    return stops


def _end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    if tokenizer.chat_template is None:
        return None
    content = "end-of-turn probe"
    text = render(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}])
    after = text.rfind(content) + len(content)
    tail = tokenizer.encode(text[after:], add_special_tokens=False) if after >= len(content) else []
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tail[0] if tail and tail[0] in special else None


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Row], add_generation_prompt: bool = False) -> str:
    """Messages as text, by the tokenizer's chat template.

    Raises:
        UserError: the tokenizer has no template, or its template refuses these messages.
    """
    return _render(tokenizer, messages, add_generation_prompt=add_generation_prompt)[0]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Row], **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    if tokenizer.chat_template is None:
        raise UserError(
            "the data are message lists, but the tokenizer has no chat template: set chat_template to one, or give "
            "text columns. The embedded demo's rows, which stand where none are named (data.train, data.validation, "
            "data.predict), are message lists"
        )
    try:
        variables: dict[str, Any] = {**tokenizer.special_tokens_map, **options}
        rendered: Any = render_jinja_template([messages], chat_template=tokenizer.get_chat_template(), **variables)
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise UserError(f"the chat template refuses a conversation of the roles {roles}: {error}") from error
    texts, spans = rendered
    return texts[0], [(start, end) for start, end in spans[0]] if spans else []


def conversation(tokenizer: PreTrainedTokenizerBase, messages: list[Row], first: int = 0) -> Text:
    """Render messages and find the assistant turns from message `first` on.

    By the template's own `{% generation %}` marks; without them, a turn is what rendering one message more adds.

    Raises:
        UserError: without marks, the template renders a turn in another way once others follow.
    """
    template = tokenizer.get_chat_template() if tokenizer.chat_template is not None else ""
    if "generation" in template.replace("add_generation_prompt", ""):
        text, spans = _render(tokenizer, messages, return_assistant_tokens_mask=True)
        if spans:
            begin = len(render(tokenizer, messages[:first], add_generation_prompt=True)) if first else 0
            return Text(text, [span for span in spans if span[0] >= begin], rendered=True)
    text, spans = render(tokenizer, messages), []
    for turn, message in enumerate(messages[first:], first):
        if message["role"] == "assistant":
            before = render(tokenizer, messages[:turn], add_generation_prompt=True) if turn else ""
            through = render(tokenizer, messages[: turn + 1])
            if not (through.startswith(before) and text.startswith(through)):
                raise UserError(
                    f"the chat template renders message {turn} differently when other messages follow (templates "
                    "that strip reasoning do), so its tokens cannot be told from the rest. Add {% generation %} marks "
                    "to the template, train on one assistant turn per row, or set loss_on: all"
                )
            spans.append((len(before), len(through)))
    return Text(text, spans, rendered=True)
