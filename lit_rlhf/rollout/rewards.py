"""Reward functions: a reward model, or a Python callable on text.

Each is called by the environment with token ids, `reward(prompts, responses, **columns) -> (n,)`, and bound once to the
policy's tokenizer and device before the first call.
"""

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, chdir, nullcontext
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.texts import as_texts
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.engine.sharding import gathered
from lit_rlhf.errors import UserError, named_by, one_line, require, require_types
from lit_rlhf.models.adapter_folders import named_base, saved_adapter
from lit_rlhf.models.fingerprints import fingerprints
from lit_rlhf.models.heads import OF_RESPONSES, ScalarHeadKind
from lit_rlhf.models.holding import FrozenDtype, reading_in, require_frozen_dtype
from lit_rlhf.models.hub import resolve
from lit_rlhf.models.loading import load_scorer
from lit_rlhf.models.policy import Policy, Scorer, freeze
from lit_rlhf.models.roles import OnTrunk, add_reward_model, shares_base
from lit_rlhf.models.tokens import check_same_tokens, load_tokenizer
from lit_rlhf.models.weights import load_config
from lit_rlhf.time_limit import time_limit
from token_mdp.columns import columns_for
from token_mdp.rewards import bare


class Reward:
    """What a reward function offers; a plain function of text becomes one by itself, see `TextReward`."""

    pays_steps: bool = False  # whether `step_rewards` says which tokens its score is paid with; else the last
    abstain: bool = False  # whether None for a response means that it has nothing to say of it
    stands_on: Mapping[str, str] = MappingProxyType({})  # folder of weights that it scores by -> their fingerprint

    def __str__(self) -> str:
        """What messages call it, beside the option that names it."""
        return path_of(self)

    def share(self, policy: Policy) -> None:
        """Called before `bind` in training, with the policy, on whose frozen base a reward model may stand."""

    def bind(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Called once before the first score, with the policy's tokenizer and device."""

    def check_columns(self, names: Iterable[str]) -> None:
        """Called once before the first score with the columns that it will be given; refuse what cannot work."""

    def reads(self, names: Iterable[str]) -> set[str]:
        """Which of these columns it reads; no others are kept in memory while a policy learns."""
        return set(names)

    def networks(self) -> Iterator[nn.Module]:
        """Models that this reward holds in memory."""
        yield from ()

    def views(self, name: str) -> dict[str, Any]:
        """Its roles, called `name` or more than that, and where they live, as in a module's `views`."""
        return {name: "Python"}

    def step_rewards(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(T,) what each token of n responses is paid: the parts of which a score is the sum, where it `pays_steps`."""
        raise NotImplementedError(f"{type(self).__name__} must say what its steps are paid")  # pragma: no cover

    def __call__(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], **columns: Any) -> Any:
        """Score n responses.

        Args:
            prompts: n of (P,) token ids.
            responses: n of (T,) token ids, end token included where there is one.
            columns: the other columns of the prompts' rows, n values each.

        Returns:
            (n,) finite numbers; with `abstain`, None among them.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it scores")  # pragma: no cover


class RewardModelReward(Reward):
    """Scores of a trained reward model, read at the last response token.

    An adapter on the base that a policy holds frozen is put there beside the policy's: no second base is loaded.

    Args:
        model: folder or hub name of a sequence classifier with one label, or of its adapter, such as `RewardModel`
            exports.
        max_tokens: tokens per forward pass; responses are scored in order of length.
        frozen_dtype: what its weights are held in: float32, bfloat16, or nf4 (4 bits, by bitsandbytes); null = float32,
            or the trainer's precision where that holds all weights in its own.
        trust_remote_code: run model code that comes with the weights.
    """

    kind: ClassVar[ScalarHeadKind] = OF_RESPONSES

    def __init__(
        self,
        model: str,
        max_tokens: int = 16_384,
        frozen_dtype: FrozenDtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        require_types(RewardModelReward.__init__, locals())
        require_frozen_dtype(frozen_dtype)
        require(max_tokens >= 1, "max_tokens", max_tokens, "1 or more")
        self.name = model
        self.max_tokens = max_tokens
        self.frozen_dtype = frozen_dtype
        self.trust_remote_code = trust_remote_code
        self.policy: Policy | None = None  # on whose base it stands
        self.held: Scorer | OnTrunk | None = None
        with named_by("reward model"):
            self.saved = saved_adapter(model)
            if self.saved is None:
                self.held = self.load()
            config = load_config(model if self.saved is None else self.saved.base, trust_remote_code)
            self.tokenizer = load_tokenizer(model, config, trust_remote_code)

    @property
    def scorer(self) -> "Scorer | OnTrunk":
        """The reward model, loaded when it is first asked for, unless it stands on a policy's base."""
        if self.held is None:
            with named_by("reward model"):
                self.held = self.load()
        return self.held

    def load(self) -> Scorer:
        """The reward model as a network of its own."""
        trusted, frozen_dtype = self.trust_remote_code, self.frozen_dtype
        with reading_in(torch.get_default_dtype()):  # whole, whatever is cut
            options: dict[str, Any] = {"frozen_dtype": frozen_dtype, "learns": False, "kind": self.kind}
            scorer = freeze(load_scorer(self.name, False, trusted, **options))
        self.stands_on = scorer.stands_on
        return scorer

    def share(self, policy: Policy) -> None:
        """Stand on the policy's base, where that is the adapter's own."""
        if (
            self.held is None
            and self.saved is not None
            and self.saved.head_kind is self.kind
            and shares_base(policy, self.saved)
        ):
            if self.frozen_dtype is not None:
                raise UserError(
                    f"reward model {self.name}: frozen_dtype ({self.frozen_dtype}) has nothing to say, since it stands "
                    "on the policy's base: drop it, and set model.frozen_dtype"
                )
            with named_by("reward model"):
                self.held, self.policy = add_reward_model(policy, self.saved), policy
                self.stands_on = fingerprints([named_base(resolve(self.name))])

    def __str__(self) -> str:
        return self.name

    def bind(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Move to the policy's device; refuse a policy whose tokens mean something else.

        Raises:
            UserError: the two tokenizers differ.
        """
        check_same_tokens(tokenizer, self.tokenizer, f"reward model {self.name}")
        if isinstance(self.scorer, nn.Module) and self.scorer.model.device != device:
            self.scorer.to(device)

    def reads(self, names: Iterable[str]) -> set[str]:
        """None: it scores by tokens."""
        return set()

    def views(self, name: str) -> dict[str, Any]:
        """The reward model."""
        return {name: self.scorer}

    def networks(self) -> Iterator[nn.Module]:
        """The reward model, where it is a network of its own."""
        if isinstance(self.scorer, nn.Module):
            yield self.scorer

    def __call__(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], **columns: Any) -> np.ndarray:
        """(n,) scores."""
        with self.at_hand():
            return scores(self.scorer, prompts, responses, self.max_tokens)

    def at_hand(self) -> AbstractContextManager[None]:
        """While inside, its weights are whole: ranks have different numbers of responses to score, and do not wait."""
        return nullcontext() if self.policy is None else gathered(self.policy)  # of a sharded policy's base


@torch.no_grad()
def scores(
    scorer: Scorer | OnTrunk, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], max_tokens: int = 8192
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

    It reads what `predict` writes: white space as the model wrote it, and special tokens left out unless asked for.

    Args:
        function: called as function(prompts, responses, **columns) with lists of n strings; returns n numbers. One that
            names no **columns gets those that it names; a method check_columns is called with the names of all before
            anything is played. In YAML, its import path, or a class of which an object is one.
        special_tokens: keep special tokens, such as <think> or the end token, in prompts and responses.
        abstain: None for a response means that the function has nothing to say of it, and adds nothing to its reward.
        timeout: seconds that a call may take; null = as long as it takes.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        special_tokens: bool = False,
        abstain: bool = False,
        timeout: float | None = None,
    ) -> None:
        if inspect.isclass(function) or not callable(function):
            hint = f": give an object of it, {function.__name__}(...)" if inspect.isclass(function) else ""
            raise UserError(f"{one_line(repr(function))} is no function (prompts, responses, **columns){hint}")
        if any(map(inspect.iscoroutinefunction, (bare(function), getattr(function, "__call__", None)))):  # noqa: B004
            raise UserError(f"{path_of(function)} is async; give a plain function that runs it, as by asyncio.run")
        require_types(TextReward.__init__, locals())
        require(timeout is None or 0 < timeout < math.inf, "timeout", timeout, "seconds above 0 and finite, or null")
        self.function = function
        self.special_tokens = special_tokens
        self.abstain = abstain
        self.timeout = timeout
        self.tokenizer: PreTrainedTokenizerBase | None = None

    def __str__(self) -> str:
        return path_of(self.function)

    def bind(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Keep the tokenizer that turns ids into text."""
        self.tokenizer = tokenizer

    def check_columns(self, names: Iterable[str]) -> None:
        """Refuse a function that cannot be called with these columns."""
        given: dict[str, list[Any]] = {name: [] for name in names}
        if check := getattr(self.function, "check_columns", None):  # one that reads a column of any name
            try:
                check(given.keys())
            except LookupError as error:
                raise UserError(f"{self}: {error.args[0]}") from error
        try:
            signature = inspect.signature(bare(self.function))
        except (TypeError, ValueError):  # one that does not tell what it takes
            return
        try:
            signature.bind([], [], **columns_for(self.function, given))
        except TypeError as error:
            raise UserError(
                f"{self} cannot be called as function(prompts, responses, **columns): {error}; the data have the "
                f"columns {sorted(given)}"
            ) from error

    def reads(self, names: Iterable[str]) -> set[str]:
        """Those that the function takes by name, or all."""
        return set(columns_for(self.function, {name: [] for name in names}))

    def __call__(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], **columns: Any) -> Any:
        """What the function returns.

        Raises:
            TimeoutError: it took longer than `timeout`.
        """
        pairs = zip(prompts, responses, strict=True)
        texts = [as_texts(self.tokenizer, *pair, special=self.special_tokens) for pair in pairs]
        wanted = columns_for(self.function, columns)
        with chdir(os.curdir), time_limit(self.timeout):  # where it goes, the run's files do not follow
            return self.function([prompt for prompt, _ in texts], [response for _, response in texts], **wanted)


def path_of(function: Any) -> str:
    """The import path of a function, or of what a `functools.partial` calls, or of the class of an object."""
    while isinstance(function, functools.partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
