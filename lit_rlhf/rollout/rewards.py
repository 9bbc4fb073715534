"""Reward functions: a reward model, or a Python callable on text.

Each is called by the environment with token ids, `reward(prompts, responses, **columns) -> (n,)`, and bound once to the
policy's tokenizer and device before the first call.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.tokenize import as_text
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.errors import UserError, place_of
from lit_rlhf.models.loading import check_same_tokens, load_scorer, load_tokenizer
from lit_rlhf.models.policy import Scorer, freeze
from token_mdp.columns import columns_for


class Reward:
    """What a reward function offers; subclass it, or wrap a plain function in `TextReward`."""

    def bind(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Called once before the first score, with the policy's tokenizer and device."""

    def networks(self) -> Iterator[nn.Module]:
        """Models that this reward holds in memory."""
        yield from ()

    def __call__(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], **columns: Any) -> np.ndarray:
        """Score n responses.

        Args:
            prompts: n of (P,) token ids.
            responses: n of (T,) token ids, end token included where there is one.
            columns: the other columns of the prompts' rows, n values each.

        Returns:
            (n,) finite numbers.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it scores")  # pragma: no cover


class RewardModelReward(Reward):
    """Scores of a trained reward model, read at the last response token.

    Args:
        model: folder or hub name of a sequence classifier with one label, such as `RewardModel` exports.
        max_tokens: tokens per forward pass; responses are scored in order of length.
        trust_remote_code: run model code that comes with the weights.
    """

    def __init__(self, model: str, max_tokens: int = 16_384, trust_remote_code: bool = False) -> None:
        self.name = model
        self.max_tokens = max_tokens
        self.scorer = freeze(load_scorer(model, trust_remote_code=trust_remote_code))
        self.tokenizer = load_tokenizer(model, self.scorer.model.config, trust_remote_code)

    def bind(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Move to the policy's device; refuse a policy whose tokens mean something else.

        Raises:
            UserError: the two tokenizers differ.
        """
        check_same_tokens(tokenizer, self.tokenizer, f"reward model {self.name}")
        self.scorer.to(device)

    def networks(self) -> Iterator[nn.Module]:
        """The reward model."""
        yield self.scorer

    def __call__(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], **columns: Any) -> np.ndarray:
        """(n,) scores."""
        return scores(self.scorer, prompts, responses, self.max_tokens)


@torch.no_grad()
def scores(
    scorer: Scorer, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], max_tokens: int = 8192
) -> np.ndarray:
    """(n,) float64 scores of whole responses, in packed batches of like lengths and about `max_tokens` tokens."""
    lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
    values = np.zeros(len(lengths))
    order = np.argsort(lengths, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(lengths[order].cumsum() // max_tokens)) + 1):
        batch = move_data_to_device(pack([Example(prompts[i], (responses[i],)) for i in rows]), scorer.model.device)
        values[rows] = scorer(batch, batch.last_nodes).double().cpu().numpy()
    return values


class TextReward(Reward):
    """A Python function of text as the reward.

    Args:
        function: called as function(prompts, responses, **columns) with lists of n strings, without special tokens;
            returns n numbers. One that names no **columns gets those that it names. In YAML, its import path.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def bind(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Keep the tokenizer that turns ids into text."""
        self.tokenizer = tokenizer

    def __call__(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], **columns: Any) -> np.ndarray:
        """(n,) float64, what the function returns.

        Raises:
            UserError: it raised, or returned something else than one finite number per response.
        """
        prompt_texts = [as_text(self.tokenizer, ids) for ids in prompts]
        response_texts = [as_text(self.tokenizer, ids) for ids in responses]
        try:
            returned = self.function(prompt_texts, response_texts, **columns_for(self.function, columns))
        except UserError:
            raise
        except Exception as error:
            place = place_of(error)
            hint = (
                "" if place else f"; it is called as function(prompts, responses, **columns), columns {sorted(columns)}"
            )
            raise UserError(f"{self.name} raised {type(error).__name__}: {error}{place}{hint}") from error
        try:
            values = torch.as_tensor(returned, dtype=torch.float64, device="cpu").detach().numpy()
        except (TypeError, ValueError, RuntimeError):
            values = None
        if values is None or values.shape != (len(responses),):
            got = f"{returned!r:.80}" if values is None else f"shape {values.shape}"
            raise UserError(f"{self.name} must return one finite number per response, ({len(responses)},); got {got}")
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            examples = ", ".join(f"{values[i]} for the prompt {prompt_texts[i]!r:.60}" for i in wrong[:5])
            raise UserError(
                f"{self.name} must return one finite number per response; {len(wrong)} of {len(values)} are not: "
                f"{examples}"
            )
        return values

    @property
    def name(self) -> str:
        """The function by its import path, and the options that may have named it."""
        named = self.function if hasattr(self.function, "__qualname__") else type(self.function)
        return f"reward function {named.__module__}.{named.__qualname__} (of data.reward, data.monitors or gold)"
