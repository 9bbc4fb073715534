"""A conversation with a policy: what was said, and what it answers to that, heard as it writes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import TextStreamer

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.chat import Renderer
from lit_rlhf.data.messages import Row
from lit_rlhf.data.prompts import AS_THEY_ARE
from lit_rlhf.data.texts import as_texts
from lit_rlhf.data.tokenize import tokenize_prompts
from lit_rlhf.errors import UserError, named_by
from lit_rlhf.models.policy import Policy
from lit_rlhf.rollout.play import GenerationSettings, complete
from lit_rlhf.rollout.rewards import Reward
from lit_rlhf.rollout.scoring import scored


class Answer(NamedTuple):
    """What a policy answered, and to what."""

    text: str
    prompt: PromptBatch  # one, of all that was said before
    response_ids: np.ndarray  # (T,)

    def score(self, judge: Reward, option: str) -> float:
        """What a reward gives for it; errors as of `Rewards`."""
        return float(scored(judge, option, self.prompt, [self.response_ids])[0])


class Conversation:
    """Questions to a policy and its answers, each read after all that was said before.

    A tokenizer with a chat template writes the turns; the model of one without continues each text by itself. Where
    less than the answer needs, or half of the context, would be left, the earliest turns are forgotten.

    Args:
        policy: answers.
        tokenizer: its own.
        settings: how it writes; an answer ends where the context does.
        system: stands before all turns; None = nothing does.

    Raises:
        UserError: there is no chat template that reads a system prompt.
    """

    def __init__(self, policy: Policy, tokenizer: Any, settings: GenerationSettings, system: str | None = None) -> None:
        self.policy, self.tokenizer, self.settings = policy, tokenizer, settings
        self.turns: list[Row] = []
        self.asked = 0  # by it sampling differs from answer to answer
        self.begin(system)

    @property
    def has_turns(self) -> bool:
        """Whether the model has learnt to take turns, and not only to continue a text."""
        return self.tokenizer.chat_template is not None

    def begin(self, system: str | None) -> None:
        """Forget all turns, and set what stands before those to come."""
        if system:
            if not self.has_turns:
                raise UserError(
                    "system: the model has no chat template, so it continues text and reads no system prompt"
                )
            question = {"role": "user", "content": "?"}
            with named_by("system"):
                write = Renderer(self.tokenizer).prompt
                if write([{"role": "system", "content": system}, question]) == write([question]):
                    raise UserError("the chat template leaves system prompts out; say it in the first question")
        self.system = system
        self.turns = []

    def ask(self, text: str, write: Callable[[str], None] | None = None) -> Answer:
        """The answer to a question, which is said from now on; of a model without turns, how it continues a text.

        Args:
            text: of the question.
            write: called with each piece of the answer's text as soon as it is known.

        Raises:
            UserError: the question alone has no room in the context.
        """
        turns = [*self.turns, {"role": "user", "content": text}] if self.has_turns else []
        prompt, ids = self._within_context(turns, text)
        self.asked += 1
        batch = PromptBatch([ids], {"prompt": [prompt]}, np.array([self.asked - 1]))
        limit = min(self.settings.max_new_tokens, self.tokenizer.model_max_length - len(ids))
        streamer = None if write is None else Streamer(self.tokenizer, write)
        heard = None if streamer is None else streamer.hear
        settings = replace(self.settings, max_new_tokens=limit)
        (episode,) = complete(self.policy, self.tokenizer, batch, settings, heard=heard)
        if streamer is not None:
            streamer.end()
        answer = as_texts(self.tokenizer, ids, episode.response_ids)[1]
        if self.has_turns:
            self.turns = [*turns, {"role": "assistant", "content": answer}]
        return Answer(answer, batch, episode.response_ids)

    def take_back(self) -> str | None:
        """Forget the last question and its answer; returns the question, None where there is none."""
        if not self.turns:
            return None
        question: str = self.turns[-2]["content"]
        self.turns = self.turns[:-2]
        return question

    def _within_context(self, turns: list[Row], text: str) -> tuple[list[Row] | str, np.ndarray]:
        """The prompt, and its ids (P,), without the earliest turns where there is no room for them."""
        context = self.tokenizer.model_max_length
        room = context - min(self.settings.max_new_tokens, context // 2)
        first: list[Row] = [{"role": "system", "content": self.system}] if self.system else []
        while True:
            prompt = [*first, *turns] if self.has_turns else text
            (ids,) = tokenize_prompts([{"prompt": prompt}], self.tokenizer, AS_THEY_ARE)["prompt_ids"]
            if len(ids) <= room or len(turns) <= 1:
                break
            turns = turns[2:]
        if not 0 < len(ids) <= room:
            raise UserError(f"the question has {len(ids)} tokens; there must be some, and room for them is {room}")
        return prompt, ids


class Streamer(TextStreamer):
    """Hands on the text of tokens as they come, where no later token can change it."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.write = write

    def hear(self, number: int, token: int) -> None:
        """Take a token of the answer."""
        self.put(torch.tensor([token]))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand it on."""
        if text:
            self.write(text)
