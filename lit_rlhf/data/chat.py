"""Conversations as text, by the tokenizer's chat template, and the tokens that end a turn."""

import re
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lit_rlhf.data.messages import REASONING, WEIGHTS, Row
from lit_rlhf.data.template_sandbox import render_jinja_template
from lit_rlhf.errors import UserError, named_by, require
from lit_rlhf.memory_limit import memory_limit
from lit_rlhf.time_limit import time_limit

LONGEST = 2**24  # characters that a template may make of one conversation, millions of tokens
SLOWEST = 10.0  # seconds that a template may take for one conversation, a hundred thousand times what one takes
LARGEST = 2**30  # bytes that it may take for one, several times what the longest conversation takes
# What a template asks that tells a message without content by null.
CONTENT_IS_NONE = re.compile(r"\bcontent\W{0,3}\s+is\s+(not\s+)?none\b", re.IGNORECASE)
SAID_BESIDE_CONTENT = (("tool_calls",), REASONING)  # fields of a message; of several names one is read
Span = tuple[int, int]  # first character, and one past the last


class Text(NamedTuple):
    """A text before tokenisation."""

    text: str
    prompt_end: int  # characters of the prompt
    spans: list[Span]  # characters that are learnt
    rendered: bool  # by a chat template, which writes its special tokens itself
    plain: Sequence[Span] = ()  # characters that are text whatever tokens they spell


class Renderer:
    """A tokenizer's chat template, with what a row and the run's options hand to it beside messages.

    Args:
        tokenizer: has the template.
        row: its `tools` and `chat_template_kwargs` are used.
        template_kwargs: variables of the template for all rows; the row's own come before them.

    Raises:
        UserError: there is no template, or it does not read what the row hands to it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, row: Row | None = None, template_kwargs: Mapping[str, Any] = {}
    ) -> None:
        row = row or {}
        self.tools = row.get("tools")
        self.template = template_of(tokenizer, self.tools)
        self.is_marked = re.search(r"\{%-?\+?\s*generation\b", self.template) is not None
        # Null is what transformers gives; templates that do not ask for it would fail to join it, or write "None".
        self.no_content = None if CONTENT_IS_NONE.search(self.template) else ""
        own = row.get("chat_template_kwargs", {})
        self.variables: dict[str, Any] = {**tokenizer.special_tokens_map, **template_kwargs, **own}
        if self.tools and not reads(self.template, "tools"):
            raise UserError(
                "column 'tools': the chat template has no place for tools, so the model would not see them; set "
                "chat_template to one that reads them, or leave the column out"
            )
        if ignored := [name for name in own if not reads(self.template, name)]:
            raise UserError(
                f"column 'chat_template_kwargs': the chat template does not read {', '.join(ignored)}; set "
                "chat_template to one that does, or leave it out"
            )

    def __call__(self, messages: list[Row], **options: Any) -> str:
        """Messages as text.

        Raises:
            UserError: the template refuses these messages.
        """
        return self.with_marks(messages, **options)[0]

    def prompt(self, messages: list[Row]) -> str:
        """What the model has read when it begins to write: its turn's header, or its turn as far as it is given."""
        if messages[-1]["role"] == "assistant":
            if "content" not in messages[-1]:
                raise UserError(
                    "the prompt ends with a turn of the assistant that has no text to go on with; let it end with the "
                    "turn before, or with the tool's answer"
                )
            return self(messages, continue_final_message=True)
        return self(messages, add_generation_prompt=True)

    def _whole(self, message: Row) -> Row:
        return message if "content" in message else {**message, "content": self.no_content}

    def with_marks(self, messages: list[Row], **options: Any) -> tuple[str, list[Span]]:
        """Messages as text, and with `return_assistant_tokens_mask` what the template's `{% generation %}` marks."""
        shown = [
            {name: value for name, value in self._whole(message).items() if name not in WEIGHTS} for message in messages
        ]
        text, spans = self._render(shown, options)
        for names in SAID_BESIDE_CONTENT:
            self._require_read(names, shown, text, options)
        return text, spans

    def _require_read(self, names: Sequence[str], shown: list[Row], text: str, options: Mapping[str, Any]) -> None:
        """Refuse fields of which the template writes nothing: a turn would be learnt without what it says."""
        given = next((name for message in shown for name in names if message.get(name)), None)
        if given is None or any(reads(self.template, name) for name in names):
            return
        bare = [{name: value for name, value in message.items() if name not in names} for message in shown]
        if self._render(bare, options)[0] == text:  # one may write whole messages, naming none of their fields
            raise UserError(
                f"the chat template does not read `{given}` of a message, so the model would not see it; set "
                "chat_template to one that does, or leave it out"
            )

    def _render(self, shown: list[Row], options: Mapping[str, Any]) -> tuple[str, list[Span]]:
        try:
            with memory_limit(LARGEST), time_limit(SLOWEST if current_thread() is main_thread() else None):
                rendered: Any = render_jinja_template(
                    [shown], tools=self.tools, chat_template=self.template, **options, **self.variables
                )
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja: {error.message} (its line {error.lineno})"
            ) from error
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            roles = [message["role"] for message in shown]
            raise UserError(f"the chat template refuses a conversation of the roles {roles}: {error}") from error
        except TimeoutError as error:
            raise UserError(
                f"the chat template had not written one conversation of {len(shown)} messages after {SLOWEST:g} "
                "seconds: look for a loop in it that takes too many turns"
            ) from error
        except MemoryError as error:
            raise UserError(
                f"the chat template asked for more than {LARGEST >> 20} MB for one conversation of {len(shown)} "
                "messages: look for what it repeats"
            ) from error
        except RecursionError as error:
            raise UserError(
                "nested too deep for the chat template, or the template calls itself without end"
            ) from error
        texts, spans = rendered
        if len(texts[0]) > LONGEST:
            raise UserError(
                f"the chat template writes {len(texts[0])} characters of one conversation, more than the {LONGEST} "
                "that one may have: look for a loop in it that repeats what it writes"
            )
        return texts[0], [(start, end) for start, end in spans[0]] if spans else []


def template_of(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> str:
    """The template that a tokenizer renders with.

    Raises:
        UserError: it has none, or several of which none is the default.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        name = "tool_use" if tools and "tool_use" in template else "default"
        if name not in template:
            raise UserError(
                f"the tokenizer has the chat templates {sorted(template)} and none is the default: set chat_template "
                "to one of these names"
            )
        return str(template[name])
    if template is None:
        raise UserError(
            "the data are message lists, but the tokenizer has no chat template: set chat_template of the run's data "
            "to one, which its export keeps, or give text columns. The embedded demo's rows, which stand where none "
            "are named (data.train, data.validation, data.predict), are message lists"
        )
    return str(template)


def set_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | PathLike[str] | None, template_kwargs: Mapping[str, Any]
) -> None:
    """Make a template the tokenizer's own, so that it is exported with it.

    Args:
        tokenizer: the model's.
        chat_template: Jinja, a file that holds it, or the name of one that the tokenizer has; None = its own.
        template_kwargs: variables of the template for all rows.

    Raises:
        UserError: there is no such template, it is not valid, or it does not read the variables.
    """
    if chat_template is not None:
        named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        tokenizer.chat_template = named.get(str(chat_template)) or _read_template(chat_template)
        with named_by("chat_template"):
            _end_of_turn_id(tokenizer)  # refuses one that is not valid
    if template_kwargs:
        template = template_of(tokenizer)
        if ignored := [name for name in template_kwargs if not reads(template, name)]:
            raise UserError(f"chat_template_kwargs: the chat template does not read {', '.join(ignored)}; leave it out")


def reads(template: str, variable: str) -> bool:
    """Whether a template names a variable."""
    return re.search(rf"\b{re.escape(variable)}\b", template) is not None


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> tuple[int, ...]:
    """The ids that end a response: one set for data, rollouts, rewards and generation.

    The tokenizer's end token first, then the token with which its chat template ends an assistant turn, then those of
    the generation config.

    Raises:
        UserError: there is none, or the template is not valid.
    """
    listed = generation_config.eos_token_id if generation_config is not None else None
    with named_by(tokenizer.name_or_path or "tokenizer"):
        candidates = [tokenizer.eos_token_id, _end_of_turn_id(tokenizer)]
    candidates += listed if isinstance(listed, list) else [listed]
    stops = tuple(dict.fromkeys(int(token) for token in candidates if token is not None))
    if not stops:
        raise UserError("the tokenizer has no eos_token and its chat template ends turns with none: no response ends")
    return stops


def stop_strings_of(generation_config: GenerationConfig | None) -> list[str]:
    """The texts that end a response by a model's own generation config."""
    given = getattr(generation_config, "stop_strings", None) or []
    listed = [given] if isinstance(given, str) else given
    if not (isinstance(listed, list | tuple) and all(isinstance(text, str) and text for text in listed)):
        raise UserError(f"stop_strings ({given!r}) of the model's generation_config.json must be a text or texts")
    return list(listed)


def _end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    template = tokenizer.chat_template
    if template is None or (isinstance(template, dict) and "default" not in template):
        return None
    content = "end-of-turn probe"
    try:
        text = Renderer(tokenizer)([{"role": "user", "content": "?"}, {"role": "assistant", "content": content}])
    except UserError as error:
        if isinstance(error.__cause__, TemplateSyntaxError | TimeoutError | MemoryError):
            raise
        return None  # a template that asks for more than a question and an answer
    after = text.rfind(content) + len(content)
    tail = tokenizer.encode(text[after:], add_special_tokens=False) if after >= len(content) else []
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tail[0] if tail and tail[0] in special else None


def _read_template(template: str | PathLike[str]) -> str:
    template = fspath(template)
    if "{" in template:
        return template
    path = Path(template).expanduser().absolute()
    if not path.is_file():
        inside = path / "chat_template.jinja"
        where = str(inside) if inside.is_file() else "such as the chat_template.jinja of a model's folder"
        raise UserError(
            f"chat_template: neither a Jinja template nor a file ({path} is none); name the file that holds it, {where}"
        )
    try:
        content = path.read_text(encoding="utf-8-sig")  # without the mark that some editors begin a file with
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template: {path} cannot be read as UTF-8 text ({error})") from error
    require(bool(content.strip()), "chat_template", path, "a file that holds a Jinja template; it is empty")
    return content
