"""Settings of the data modules that belong together, each a frozen dataclass that checks itself."""

import os
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.chat import set_template
from lit_rlhf.data.control_tokens import ControlTokens
from lit_rlhf.data.messages import check_template_kwargs
from lit_rlhf.data.reader import LossOn, Options, Truncation
from lit_rlhf.errors import UserError, require, require_types
from lit_rlhf.models.tokens import share_tokenizer


@dataclass(frozen=True)
class TokenizationSettings:
    """How rows become tokens; the arguments of `ExamplesDataModule` and its subclasses say what each means."""

    max_length: int | None = None
    truncation: Truncation = "truncate"
    max_prompt_length: int | None = None
    num_proc: int | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    control_tokens: ControlTokens = "keep"
    loss_on: LossOn = "response"
    step_separator: str = "\n"
    deduplicate: bool = False

    def __post_init__(self) -> None:
        """Refuse lengths that leave no token, and variables of the template that it has for itself."""
        require_types(type(self), vars(self))
        length = self.max_length
        require(length is None or length >= 2, "max_length", length, "2 or more: a prompt and a response")
        prompt = self.max_prompt_length
        require(prompt is None or prompt >= 1, "max_prompt_length", prompt, "1 or more, or null")
        require(self.num_proc is None or self.num_proc >= 1, "num_proc", self.num_proc, "1 or more, or null")
        require_processes(self.num_proc, "num_proc")
        check_template_kwargs(self.chat_template_kwargs, "chat_template_kwargs")
        require(self.step_separator != "", "step_separator", "empty text", "a text: by it the steps are known")

    def settle(self, tokenizer: PreTrainedTokenizerBase, data: LightningDataModule) -> None:
        """Give the tokenizer the template that was asked for, if one was, and hold it to that of the module."""
        set_template(tokenizer, self.chat_template, self.chat_template_kwargs)
        share_tokenizer(getattr(data.trainer, "lightning_module", None), tokenizer, type(data).__name__)

    def of_examples(self, tokenizer: PreTrainedTokenizerBase) -> Options:
        """How rows that are learnt from become tokens within the model's context.

        Raises:
            UserError: a length that the context has not.
        """
        context = tokenizer.model_max_length
        known = context < 10**9  # transformers writes 10^30 for "unknown"
        if self.max_length is not None and known and self.max_length > context:
            raise UserError(f"max_length ({self.max_length}) is more than the model's context of {context} tokens")
        fits = self.max_prompt_length is None or self.max_prompt_length < context
        require(fits, "max_prompt_length", self.max_prompt_length, f"less than the model's context of {context} tokens")
        limit = self.max_length if self.max_length is not None else context if known else None
        prompt_limit = self.max_prompt_length or (limit // 2 if limit is not None else None)
        return self._options(limit, prompt_limit)

    def of_prompts(self, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Options:
        """How prompts become tokens that leave room for a response.

        Raises:
            UserError: the context has no room for both.
        """
        context = tokenizer.model_max_length
        limit = self.max_prompt_length or context - max_new_tokens
        if limit < 1:
            raise UserError(
                f"max_new_tokens ({max_new_tokens}) leaves no room for a prompt in the context of {context}"
            )
        return self._options(None, limit)

    def _options(self, max_length: int | None, max_prompt_length: int | None) -> Options:
        how = (self.control_tokens, self.chat_template_kwargs, self.step_separator)
        return Options(max_length, self.truncation, self.loss_on, max_prompt_length, *how)


@dataclass(frozen=True)
class BatchSettings:
    """How examples are dealt out in micro-batches; the arguments of `ExamplesDataModule` say what each means."""

    max_tokens: int | None
    batch_size: int | None
    shuffle: bool
    num_workers: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse micro-batches without a limit, and counts that are none."""
        require_types(type(self), vars(self))
        if self.max_tokens is None and self.batch_size is None:
            raise UserError("max_tokens and batch_size are both null: one of them must limit a micro-batch")
        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more, or null")
        require(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "1 or more, or null")
        require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")
        require_processes(self.num_workers, "num_workers")
        require(self.seed >= 0, "seed", self.seed, "0 or more")


def require_processes(number: int | None, name: str) -> None:
    """Refuse a number of processes that no machine would start."""
    most = 8 * (os.cpu_count() or 1)
    require(number is None or number <= max(most, 64), name, number, f"at most {max(most, 64)} on this machine")
