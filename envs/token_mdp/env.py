"""One episode of token generation as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded

from token_mdp.actions import checked_token
from token_mdp.checks import check_flag, check_render_mode
from token_mdp.episodes import FinishReason, IntArray
from token_mdp.pictures import picture
from token_mdp.prompts import PromptQueue
from token_mdp.rendering import NO_RENDER_MODE, EpisodePrinter, episode_text, outcome_text
from token_mdp.reset_options import single_prompt
from token_mdp.rewards import STEPS_AND_END, RewardFn, RewardSpec, finite_sum
from token_mdp.slots import Slots
from token_mdp.task import ActionMask, TokenTask

Observation = dict[str, npt.NDArray[Any]] | IntArray
THE_SLOT = np.array([0])  # a single episode is a vector of one
NO_EPISODE = "{}() without an episode: call reset() first, also after a reward function or action_mask has failed"


class TokenEnv(gymnasium.Env[Observation, np.int64]):
    """A language model's completion, one token per step.

    ## Description
    The state is a prompt x and the response so far y_<t; the action is the next token; the transition appends it.
    An episode is one response. Axes: P longest prompt, T most new tokens, V vocabulary.

    ## Action Space
    `Discrete(V)`, V being the width of the model's logits (often more than `tokenizer.vocab_size`).

    ## Observation Space
    `Dict(input_ids: (P+T,) int64, attention_mask: (P+T,) int8, prompt_length: (1,) int64, length: (1,) int64)`:
    prompt and response side by side from column 0, zeros after them; the newest token is `input_ids[length - 1]`.
    With `observation="flat"` one int64 `Box (P+T,)`: the prompt ends at column P-1, the response starts at column P,
    unused cells hold -1.

    ## Rewards
    0 until the end, then `reward_fn` of the whole response; on top, where asked for, a process reward per step
    and potential-based shaping.

    ## Starting State
    A prompt and an empty response. Prompts come from a shuffled queue, each exactly once per pass;
    `reset(options={"prompt_index": i})` picks one and leaves the queue as it is.

    ## Episode End
    A stop token, or a stop string: `terminated`, finish reason STOP. After T tokens: `terminated` too, finish reason
    LENGTH, since the limit is part of the MDP and visible in `length`. Never wrap this env in `TimeLimit` (or register
    or pass `max_episode_steps`): an episode cut from outside is never rewarded.

    ## Info
    NumPy values. Always `prompt_index`, `prompt_length`, `prompt_tokens_cut` (tokens that a prompt longer than P lost
    on its left); at the end `response_length`, `finish_reason` (int8, see `FinishReason`) and `reward/<name>` per
    reward component; `reward/process` (0 where none is due) and `reward/shaping` on every step of an env that has
    them; `action_mask` (V,) int8 on request.

    ## Arguments
    prompts: token ids of each prompt.
    vocab_size: V.
    stop_token_ids: tokens that end the response; may be empty.
    max_new_tokens: T.
    max_prompt_length: P; longer prompts lose tokens on the left, for all functions here too. Default: the longest.
    reward_fn: `(prompts, responses, **columns) -> (n,)`, called with lists (of one episode here, of all that ended in
        a step in `TokenVectorEnv`) of int64 arrays; the response includes its stop token. Several components: a mapping
        from name to function or (function, weight), or a list of such.
    columns: per name one value per prompt (answers, say); each function receives those that it names (all with
        **columns), of its batch.
    process_reward_fn: same signature, called with the response so far after every token.
    step_boundary_ids: tokens (a newline, say) that close a step of the response: the process reward is due after them
        and at the end only.
    potential_fn: Φ(s), same signature; adds γΦ(s') - Φ(s) to each step, which leaves the optimal policy unchanged.
    gamma: γ of the shaping; must be the agent's discount.
    limit: "terminate", or "truncate" to mark the length limit as `truncated`. Mind that agents then add γV(final
        observation) to a reward that is already complete, at a state whose value nothing trains: returns can drift
        far beyond the true maximum.
    shuffle: shuffle the prompts anew for each pass, or take them in order; a `prompt_queue` knows for itself.
    action_mask: True puts an all-ones `action_mask` into info; a function (prompts, responses, **columns)
        -> (n, V) says True (or 1) for each token that may come next, False (or 0) for others, which raise
        `InvalidAction`. Costs O(V) per step.
    tokenizer: anything with `decode(ids)`; for `render`, `stop_strings` and `reward_on="text"` (then also
        `skip_special_tokens`).
    reward_on: "tokens", or "text" to hand decoded strings, without special tokens, to all reward functions.
    observation: "dict" or "flat".
    stop_strings: texts that end the response as soon as they stand in it, as a stop token does; with a tokenizer. They
        stay in the response. Costs a decode of the newest tokens per step.
    abstain: True lets `reward_fn` return None for a response of which it has nothing to say: nothing is added to the
        reward, and the component is NaN in info.
    render_mode: "ansi": `render()` returns the episode as text; "human": the text streams to stdout; "rgb_array":
        `render()` draws it, (H, W, 3) uint8, by Pillow.
    prompt_queue: a `PromptQueue` that several envs share; the first that is reset with a seed shuffles for all.

    ## Version History
    v0: first release.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "human", "rgb_array"], "render_fps": 30}  # type: ignore[misc]

    def __init__(
        self,
        prompts: Sequence[Any],
        *,
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
        shuffle: bool = True,
        action_mask: ActionMask = None,
        tokenizer: Any = None,
        reward_on: Literal["tokens", "text"] = "tokens",
        observation: Literal["dict", "flat"] = "dict",
        abstain: bool = False,
        stop_strings: Iterable[str] | str = (),
        render_mode: str | None = None,
        prompt_queue: PromptQueue | None = None,
    ) -> None:
        self.task = TokenTask(
            prompts=prompts,
            vocab_size=vocab_size,
            stop_token_ids=stop_token_ids,
            max_new_tokens=max_new_tokens,
            max_prompt_length=max_prompt_length,
            reward_fn=reward_fn,
            columns=columns,
            process_reward_fn=process_reward_fn,
            step_boundary_ids=step_boundary_ids,
            potential_fn=potential_fn,
            gamma=gamma,
            limit=limit,
            action_mask=action_mask,
            tokenizer=tokenizer,
            reward_on=reward_on,
            observation=observation,
            abstain=abstain,
            stop_strings=stop_strings,
        )
        check_flag("shuffle", shuffle)
        check_render_mode(render_mode, self.metadata["render_modes"])
        if prompt_queue is not None and not hasattr(prompt_queue, "num_prompts"):
            raise ValueError(f"prompt_queue ({prompt_queue!r}) must be None or a PromptQueue")
        if prompt_queue is not None and prompt_queue.num_prompts != len(self.task.prompts):
            raise ValueError(
                f"prompt_queue deals {prompt_queue.num_prompts} prompts, but there are {len(self.task.prompts)}"
            )
        if prompt_queue is not None and prompt_queue.shuffle and not shuffle:
            raise ValueError(
                "shuffle (False) contradicts prompt_queue, which shuffles; hand in PromptQueue(…, shuffle=False)"
            )
        self.observation_space = self.task.observation_space
        self.action_space = self.task.action_space  # Discrete samples np.int64
        self.render_mode = render_mode
        self._queue = PromptQueue(len(self.task.prompts), shuffle) if prompt_queue is None else prompt_queue
        self._seeds_queue = False  # one of the envs that share it does
        self._prompt_index = -1
        self._slots = Slots(1, self.task.prompts.max_length, self.task.max_new_tokens, self.task.flat)
        self._ready = False  # before the first reset and after a failed function of the caller, step() is refused
        self._finish_reason = 0  # 0 while the episode goes on
        self._potential = np.zeros(1)
        self._return = 0.0
        self._allowed: npt.NDArray[np.bool_] | None = None
        self._printer = EpisodePrinter(self.task.tokenizer) if render_mode == "human" else None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the next episode; a seed also starts the prompt queue over.

        Args:
            seed: seeds `np_random`, which shuffles the prompts.
            options: `{"prompt_index": i}` starts from prompt i without drawing from the queue.
        """
        chosen = single_prompt(options, self.task.prompts)
        super().reset(seed=seed)
        if seed is not None and not self._queue.seeded:
            self._queue.seeded = self._seeds_queue = True
        if not self._queue.started or (seed is not None and self._seeds_queue):
            self._queue.restart(self.np_random)
        self._prompt_index = self._queue.draw() if chosen is None else chosen
        self._ready = False  # until all went well
        self._slots.begin(0, self.task.prompts[self._prompt_index])
        self._finish_reason = 0
        self._return = 0.0
        if self.task.shapes:
            self._potential = self.task.potentials([self._prompt_index], self._slots.responses(THE_SLOT))
        info = self._info()
        self._ready = True
        if self._printer is not None:
            self._printer.begin(self.task.prompts[self._prompt_index])
        return self._slots.observation_of(0), info

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append a token.

        Raises:
            ResetNeeded: there is no running episode.
            InvalidAction: the token is outside the vocabulary or not allowed by `action_mask`.
            RewardError: a reward function failed; reset before the next step.
            ValueError: the function `action_mask` failed; likewise.
        """
        if not self._ready:
            raise ResetNeeded(NO_EPISODE.format("step"))
        if self._finish_reason:
            raise ResetNeeded(
                f"step() after the end: the episode of prompt {self._prompt_index} ended with finish reason "
                f"'{FinishReason(self._finish_reason).label}'; call reset()"
            )
        token = checked_token(action, self.task.vocab_size, self._allowed, self._prompt_index)
        tokens = np.array([token])
        self._slots.append(THE_SLOT, tokens)
        lengths = self._slots.response_lengths(THE_SLOT)
        reasons = self.task.finish_reasons(tokens, lengths, self._slots.responses)
        self._finish_reason = int(reasons[0])
        self._ready = False  # until all rewards are paid
        info = self._info()
        paid = np.zeros(1)
        if self.task.pays_steps:
            paid, parts, self._potential = self.task.step_rewards(
                np.array([self._prompt_index]), tokens, self._slots.responses, reasons, self._potential
            )
            info |= {f"reward/{name}": values[0] for name, values in parts.items()}
        if self._finish_reason:
            score, components = self.task.outcome_rewards([self._prompt_index], self._slots.responses(THE_SLOT))
            paid = finite_sum(STEPS_AND_END, paid, score, [self._prompt_index])
            info |= {"response_length": lengths[0], "finish_reason": reasons[0]}
            info |= {f"reward/{name}": values[0] for name, values in components.items()}
        self._ready = True
        reward = float(paid[0])
        self._return += reward
        if self._printer is not None:
            self._printer.show(self._slots.response(0), self._finish_reason, self._return)
        terminated = bool(self.task.is_terminal(reasons)[0])
        return self._slots.observation_of(0), reward, terminated, bool(self._finish_reason) and not terminated, info

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """(V,) True for each token that may come next; the name is the one that sb3-contrib calls."""
        if self._allowed is not None and not self._finish_reason:
            return self._allowed.copy()
        return np.ones(self.task.vocab_size, dtype=np.bool_)

    def render(self) -> str | npt.NDArray[np.uint8] | None:
        """The episode as text under "ansi", drawn under "rgb_array"; under "human" it has been printed as it went.

        Raises:
            ResetNeeded: before the first reset.
            DependencyNotInstalled: there is no Pillow to draw with.
        """
        if self.render_mode is None:
            gymnasium.logger.warn(NO_RENDER_MODE)
        if self.render_mode not in ("ansi", "rgb_array"):
            return None
        if not self._ready:
            raise ResetNeeded(NO_EPISODE.format("render"))
        outcome = outcome_text(self._finish_reason, self._return)
        text = episode_text(self._slots.prompt(0), self._slots.response(0), outcome, self.task.tokenizer)
        return text if self.render_mode == "ansi" else picture(text)

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = {
            "prompt_index": np.int64(self._prompt_index),
            "prompt_length": self.task.prompts.lengths[self._prompt_index],
            "prompt_tokens_cut": self.task.prompts.tokens_cut[self._prompt_index],
        }
        if self.task.action_mask:
            if callable(self.task.action_mask) and not self._finish_reason:
                self._allowed = self.task.allowed_tokens([self._prompt_index], self._slots.responses(THE_SLOT))[
                    0
                ].copy()
            info["action_mask"] = self.action_masks().astype(np.int8)
        return info
