"""What the agent is asked to do, without any state: prompts, ends, rewards and allowed tokens, for both envs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from token_mdp.answers import told, without_torch
from token_mdp.checks import as_array, check_choice, check_count, check_flag, check_function, check_room, check_share
from token_mdp.columns import checked_columns, columns_for, fresh
from token_mdp.episodes import FinishReason, FloatArray, IntArray
from token_mdp.prompts import PromptStore
from token_mdp.rewards import (
    RewardFn,
    RewardSpec,
    as_components,
    call_batched,
    check_finite,
    failed,
    finite_sum,
    name_prompts,
)
from token_mdp.spaces import observation_space
from token_mdp.stop_strings import StopStrings

BoolArray = npt.NDArray[np.bool_]
ActionMask = bool | Callable[..., Any] | None  # callable: (prompts, responses, **columns) -> (n, V) of True or False
ResponsesOf = Callable[[IntArray], list[IntArray]]  # rows of a batch -> their responses
STOP, LENGTH = int(FinishReason.STOP), int(FinishReason.LENGTH)  # looking up an Enum's member costs 1 µs, per step


class TokenTask:
    """The arguments that both envs share, checked once.

    The state is a prompt and the response so far; every function here takes a batch of states as prompt indices
    and responses, so that one episode and many slots run through the same lines. Arguments as in `TokenVectorEnv`.

    Raises:
        ValueError: an argument out of its range, or two that contradict each other; the message has the values.
    """

    def __init__(
        self,
        prompts: Sequence[Any],
        vocab_size: int,
        stop_token_ids: Iterable[int] | int,
        max_new_tokens: int,
        max_prompt_length: int | None = None,
        reward_fn: RewardSpec | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        process_reward_fn: RewardFn | None = None,
        step_boundary_ids: Iterable[int] | int | None = None,
        potential_fn: RewardFn | None = None,
        gamma: float = 1.0,
        limit: Literal["terminate", "truncate"] = "terminate",
        action_mask: ActionMask = None,
        tokenizer: Any = None,
        reward_on: Literal["tokens", "text"] = "tokens",
        observation: Literal["dict", "flat"] = "dict",
        abstain: bool = False,
        stop_strings: Iterable[str] | str = (),
    ) -> None:
        vocab_size = check_count("vocab_size", vocab_size)
        max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        check_choice("limit", limit, ("terminate", "truncate"))
        check_choice("reward_on", reward_on, ("tokens", "text"))
        check_choice("observation", observation, ("dict", "flat"))
        check_flag("abstain", abstain)
        check_function("process_reward_fn", process_reward_fn)
        check_function("potential_fn", potential_fn)
        if reward_fn is None:
            raise ValueError("reward_fn is missing; hand in a function (prompts, responses, **columns) -> (n,)")
        if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
            raise ValueError(f"tokenizer ({tokenizer!r:.80}) must be None or have a method decode(ids) -> str")
        if reward_on == "text" and tokenizer is None:
            raise ValueError("reward_on='text' needs a tokenizer to decode the responses with")
        if step_boundary_ids is not None and process_reward_fn is None:
            raise ValueError("step_boundary_ids says where process rewards are due; it needs process_reward_fn")
        check_share("gamma", gamma)
        if gamma != 1.0 and potential_fn is None:
            raise ValueError(f"gamma ({gamma}) only enters the shaping γΦ(s') - Φ(s); it needs potential_fn")
        if not (action_mask is None or isinstance(action_mask, bool) or callable(action_mask)):
            raise ValueError(f"action_mask must be None, a bool or a function -> (n, V) bool, got {action_mask!r}")

        self.prompts = PromptStore(prompts, vocab_size, max_prompt_length)
        check_room(
            1,
            width=self.prompts.max_length + max_new_tokens,
            vocab_size=vocab_size,
            masks=bool(action_mask),
            named=f"max_new_tokens ({max_new_tokens}), max_prompt_length ({self.prompts.max_length}) and vocab_size "
            f"({vocab_size})",
        )
        self.vocab_size = vocab_size
        self.max_new_tokens = max_new_tokens
        self.is_stop = _token_table("stop_token_ids", stop_token_ids, vocab_size)  # (V,) bool
        self.stop_strings = StopStrings(stop_strings, tokenizer)
        self.flat = observation == "flat"
        self.observation_space = observation_space(vocab_size, self.prompts.max_length, max_new_tokens, self.flat)
        self.action_space = spaces.Discrete(vocab_size)
        self.tokenizer = tokenizer
        self.action_mask = action_mask
        self.pays_steps = process_reward_fn is not None or potential_fn is not None
        self.shapes = potential_fn is not None

        self._abstain = bool(abstain)
        self._components = as_components(reward_fn)
        functions: dict[str, Any] = {component.role: component.fn for component in self._components}
        functions |= {"process_reward_fn": process_reward_fn, "potential_fn": potential_fn, "action_mask": action_mask}
        rows = checked_columns({} if columns is None else columns, len(self.prompts))
        self._columns = {role: columns_for(function, rows) for role, function in functions.items()}
        self._process_reward_fn = process_reward_fn
        # (V,) bool, True where a step ends; None: every token is a step
        self._is_boundary = (
            None if step_boundary_ids is None else _token_table("step_boundary_ids", step_boundary_ids, vocab_size)
        )
        self._potential_fn = potential_fn
        self._gamma = gamma
        self._limit_terminates = limit == "terminate"
        self._reward_on_text = reward_on == "text"
        if self._reward_on_text:
            self._check_decoding()

    def identity(self) -> dict[str, Any]:
        """What a saved state must share with the env that goes on from it, as plain values."""
        return {
            "prompts": self.prompts.digest(),
            "max_prompt_length": self.prompts.max_length,
            "vocab_size": self.vocab_size,
            "stop_token_ids": np.flatnonzero(self.is_stop).tolist(),
            "stop_strings": list(self.stop_strings.texts),
            "max_new_tokens": self.max_new_tokens,
            "gamma": float(self._gamma),
            "limit": "terminate" if self._limit_terminates else "truncate",
            "reward components": len(self._components),
            "pays steps": self.pays_steps,
            "flat": self.flat,
        }

    def finish_reasons(self, tokens: IntArray, lengths: IntArray, responses: ResponsesOf) -> npt.NDArray[np.int8]:
        """(n,) FinishReason of each state after `tokens` (n,) made its response `lengths` (n,) long; 0 goes on.

        `responses` gives those at some of the n rows; it is asked where texts end a response.
        """
        reasons = np.zeros(len(tokens), dtype=np.int8)
        reasons[lengths >= self.max_new_tokens] = LENGTH
        reasons[self.is_stop[tokens]] = STOP  # also at the limit: the agent did end
        if self.stop_strings.texts:
            rows = np.flatnonzero(reasons != STOP)
            ended = np.array([self.stop_strings.end(response) for response in responses(rows)], dtype=np.bool_)
            reasons[rows[ended]] = STOP
        return reasons

    def is_terminal(self, reasons: npt.NDArray[np.int8]) -> BoolArray:
        """(n,) whether an end for this reason is `terminated`; an end that is not, is `truncated`."""
        terminal = reasons == STOP
        return terminal | (reasons == LENGTH) if self._limit_terminates else terminal

    def outcome_rewards(
        self, prompt_indices: Sequence[int] | IntArray, responses: list[IntArray]
    ) -> tuple[FloatArray, dict[str, FloatArray]]:
        """r(x, y) of whole responses, (n,), and the unweighted components by name (none for a single function).

        A component is NaN where its function abstained, and adds nothing there.
        """
        total = np.zeros(len(responses))
        values: dict[str, FloatArray] = {}
        for component in self._components:
            scores = self._call(component.role, component.fn, prompt_indices, responses, self._abstain)
            values[component.name] = scores
            with np.errstate(over="ignore", invalid="ignore"):  # refused below, with the prompts
                total += component.weight * np.where(np.isnan(scores), 0.0, scores)
        if "" in values:  # a single function, which nothing is added to
            return total, {}
        check_finite("the weighted sum of reward_fn has", total, prompt_indices)
        return total, values

    def process_rewards(
        self, prompt_indices: IntArray, tokens: IntArray, responses: ResponsesOf, ended: BoolArray
    ) -> FloatArray:
        """(n,) rewards of the newest steps, 0 where the newest token closes none; the end closes one in any case."""
        assert self._process_reward_fn is not None, "process rewards are asked for only where there is a function"
        rewards = np.zeros(len(tokens))
        due = np.arange(len(tokens))
        if self._is_boundary is not None:
            due = np.flatnonzero(self._is_boundary[tokens] | ended)
        if len(due):
            rewards[due] = self._call("process_reward_fn", self._process_reward_fn, prompt_indices[due], responses(due))
        return rewards

    def potentials(self, prompt_indices: Sequence[int] | IntArray, responses: list[IntArray]) -> FloatArray:
        """Φ(s) of the states, (n,)."""
        assert self._potential_fn is not None, "potentials are asked for only where there is a potential_fn"
        return self._call("potential_fn", self._potential_fn, prompt_indices, responses)

    def step_rewards(
        self,
        prompt_indices: IntArray,
        tokens: IntArray,
        responses: ResponsesOf,
        reasons: npt.NDArray[np.int8],
        potentials: FloatArray,
    ) -> tuple[FloatArray, dict[str, FloatArray], FloatArray]:
        """Rewards of single steps: process rewards and the shaping γΦ(s') - Φ(s), with Φ = 0 in terminal states.

        The shaping terms of an episode add up (discounted) to -Φ(s_0), whatever the agent did, so the optimal
        policy stays what it was. Ng, Harada and Russell 1999, Theorem 1,
        https://people.eecs.berkeley.edu/~pabbeel/cs287-fa09/readings/NgHaradaRussell-shaping-ICML1999.pdf

        Args:
            prompt_indices: (n,) prompts of the states.
            tokens: (n,) the newest tokens.
            responses: gives the responses at some of the n rows, newest token included; asked only for those that a
                function of the caller is to see, since they are long.
            reasons: (n,) FinishReason of each, 0 where the episode goes on.
            potentials: (n,) Φ of the states before the step.

        Returns:
            (n,) rewards; their parts by name, (n,) each; (n,) Φ of the states after the step.
        """
        parts: dict[str, FloatArray] = {}
        paid = np.zeros(len(tokens))
        if self._process_reward_fn is not None:
            parts["process"] = paid = self.process_rewards(prompt_indices, tokens, responses, reasons != 0)
        if self.shapes:
            after = np.zeros(len(tokens))
            alive = np.flatnonzero(~self.is_terminal(reasons))
            if len(alive):
                after[alive] = self.potentials(prompt_indices[alive], responses(alive))
            parts["shaping"] = finite_sum(
                "the shaping by potential_fn has", self._gamma * after, -potentials, prompt_indices
            )
            potentials = after
            paid = finite_sum("the sum of process_reward_fn and shaping has", paid, parts["shaping"], prompt_indices)
        return paid, parts, potentials

    def allowed_tokens(self, prompt_indices: Sequence[int] | IntArray, responses: list[IntArray]) -> BoolArray:
        """(n, V) which tokens may come next, all unless `action_mask` is a function; perhaps its own array."""
        shape = (len(responses), self.vocab_size)
        if not callable(self.action_mask) or not responses:
            return np.ones(shape, dtype=np.bool_)
        indices = [int(index) for index in prompt_indices]
        arguments = self._arguments(indices, responses)
        try:
            allowed = as_array(without_torch(self.action_mask(*arguments, **self._rows("action_mask", indices))))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise ValueError(f"action_mask raised {told(error)} ({name_prompts(indices)})") from error
        if allowed.dtype != np.bool_:  # logits to add, 0 for yes and -inf for no, would mean the contrary
            strange = allowed[~((allowed == 0) | (allowed == 1))] if allowed.dtype.kind in "iuf" else allowed.ravel()
            if strange.size:
                raise ValueError(
                    f"action_mask must return True (or 1) for each token that may come next and False (or 0) for the "
                    f"others, got {strange[0]!r} of {allowed.dtype} ({name_prompts(indices)})"
                )
        if allowed.shape != shape:
            raise ValueError(f"action_mask must return shape {shape}, got {allowed.shape} ({name_prompts(indices)})")
        if len(empty := np.flatnonzero(~allowed.any(axis=1))):
            states = name_prompts([indices[row] for row in empty])
            raise ValueError(
                f"action_mask must allow at least one token per row, rows {empty[:10]} have none ({states})"
            )
        return allowed.astype(np.bool_, copy=False)

    def _call(
        self,
        role: str,
        fn: RewardFn,
        prompt_indices: Sequence[int] | IntArray,
        responses: list[IntArray],
        abstain: bool = False,
    ) -> FloatArray:
        indices = [int(index) for index in prompt_indices]
        return call_batched(role, fn, indices, self._arguments(indices, responses), self._rows(role, indices), abstain)

    def _arguments(self, indices: list[int], responses: list[IntArray]) -> tuple[list[Any], list[Any]]:
        # Copies: a reward function may write into what it gets, and must not reach the env's own tokens.
        prompts = [self.prompts[index].copy() for index in indices]
        if not self._reward_on_text:
            return prompts, [response.copy() for response in responses]
        try:
            return [self._text(prompt) for prompt in prompts], [self._text(response) for response in responses]
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise failed("tokenizer.decode", f"raised {told(error)}", indices) from error

    def _check_decoding(self) -> None:
        wanted = f"tokenizer ({self.tokenizer!r:.80}) must have a method decode(ids, skip_special_tokens=True) -> str"
        try:
            text = self._text(self.prompts[0])
        except Exception as error:
            raise ValueError(f"{wanted} for reward_on='text'; on prompts[0] it raised {error!r:.200}") from error
        if not isinstance(text, str):
            raise ValueError(f"{wanted} for reward_on='text'; of prompts[0] it made {text!r:.80}")

    def _text(self, ids: IntArray) -> Any:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def _rows(self, role: str, indices: list[int]) -> dict[str, list[Any]]:
        return {name: [fresh(values[index]) for index in indices] for name, values in self._columns[role].items()}


def _token_table(name: str, token_ids: Iterable[int] | int, vocab_size: int) -> BoolArray:
    """(V,) True at the given tokens."""
    given = list(token_ids) if isinstance(token_ids, Set | Iterator) else token_ids
    ids = np.atleast_1d(as_array(given))
    if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size):
        raise ValueError(f"{name} ({given!r:.80}) must be token ids inside the vocabulary 0..{vocab_size - 1}")
    table = np.zeros(vocab_size, dtype=np.bool_)
    table[ids.astype(np.int64)] = True
    return table
