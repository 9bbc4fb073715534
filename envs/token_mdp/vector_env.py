"""B episodes of token generation at once, native NumPy: finished slots are refilled from one shared prompt queue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from token_mdp.actions import checked_tokens
from token_mdp.checks import check_choice, check_count, check_flag, check_render_mode, check_room
from token_mdp.env import NO_EPISODE
from token_mdp.episodes import Episode, FloatArray, IntArray
from token_mdp.infos import SlotInfos, put
from token_mdp.pictures import picture
from token_mdp.prompts import PromptQueue
from token_mdp.rendering import NO_RENDER_MODE, slot_text
from token_mdp.reset_options import check_groups, queue_seed, vector_reset
from token_mdp.rewards import RewardFn, RewardSpec
from token_mdp.saved_state import check_identity, filled, refusing_damage
from token_mdp.slot_rewards import empty_slots
from token_mdp.slots import VectorObservation
from token_mdp.stream import WAITING
from token_mdp.task import ActionMask, BoolArray, TokenTask


class TokenVectorEnv(VectorEnv[VectorObservation, IntArray, npt.NDArray[Any]]):
    """`TokenEnv` in B slots; observations, rewards, flags and infos equal those of a `SyncVectorEnv` of it.

    ## Description, spaces, rewards, ends
    As in `TokenEnv`, batched: observations (B, …), rewards (B,) float64, flags (B,) bool. The prompts come from one
    queue, each exactly once per pass, whichever slot asks first. Within a step, slots are refilled in ascending order.
    With `group_size=G` each prompt is dealt to G episodes in a row, those of one `episode_id // G`.

    ## Autoreset
    "SameStep" (default): a finished slot starts its next prompt in the same step; its last observation and info are in
    `final_obs`, `final_info` (there also under the observation's own keys). "NextStep": the next step's action is
    ignored and its observation is the new prompt. "Disabled": the caller resets, all slots or those of
    `options={"reset_mask": (B,) bool}`, with `"prompt_index"` to place prompts.

    ## Streams
    `max_episodes=N` (or the option of `reset`) ends after N complete episodes: a slot that cannot be refilled parks.
    Its observation stays, its reward is 0, its flags are False, its action is ignored and `active` is False. When no
    slot is active, the stream has drained. `reset()` without a seed starts the next stream where the queue stands.

    ## Deferred rewards
    With `reward_mode="deferred"` the reward of the whole response is not part of the step. Finished episodes wait until
    `flush_rewards()` or `pop_episodes()` scores all of them in one call. Process rewards and shaping are still
    paid by the steps.

    ## Info
    As in `TokenEnv`, with Gymnasium's `_key` masks; besides `episode_id` (B,) (counted from 0) and `active` (B,) bool.
    In a slot that got no episode from the stream, `episode_id` and `prompt_index` are -1.

    ## Arguments
    Those of `TokenEnv` but `prompt_queue`, and:
    num_envs: B.
    reward_mode: "immediate" or "deferred".
    autoreset_mode: Gymnasium's mode, as a string or Enum.
    max_episodes: N of every stream; None never ends.
    group_size: episodes of each prompt; N is a multiple of it, and no `prompt_index` places prompts then.
    copy: False returns the live arrays of observations and masks: faster, and overwritten by the next step.
    max_episode_steps: what `gymnasium.make_vec` passes on; T becomes the smaller of it and `max_new_tokens`.
    render_mode: "ansi": `render()` returns one text per slot; "human": each episode is printed when it ends;
        "rgb_array": `render()` returns one picture per slot, (H, W, 3) uint8, drawn by Pillow.

    ## Version History
    v0: first release.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "human", "rgb_array"], "render_fps": 30}  # type: ignore[misc]

    def __init__(
        self,
        prompts: Sequence[Any],
        *,
        num_envs: int,
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
        reward_mode: Literal["immediate", "deferred"] = "immediate",
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        max_episodes: int | None = None,
        copy: bool = True,
        max_episode_steps: int | None = None,
        group_size: int = 1,
    ) -> None:
        num_envs = check_count("num_envs", num_envs)
        check_choice("reward_mode", reward_mode, ("immediate", "deferred"))
        check_flag("shuffle", shuffle)
        check_render_mode(render_mode, self.metadata["render_modes"])
        check_flag("copy", copy)
        mode = getattr(autoreset_mode, "value", autoreset_mode)
        check_choice("autoreset_mode", mode, tuple(choice.value for choice in AutoresetMode))
        self.group_size = check_count("group_size", group_size)
        if max_episodes is not None:
            max_episodes = check_groups(max_episodes, group_size)
        if max_episode_steps is not None:
            max_new_tokens = min(
                check_count("max_new_tokens", max_new_tokens), check_count("max_episode_steps", max_episode_steps)
            )
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
        width = self.task.prompts.max_length + self.task.max_new_tokens
        masks = bool(self.task.action_mask)
        check_room(
            num_envs,
            width,
            self.task.vocab_size,
            masks,
            named=f"num_envs ({num_envs}) slots of {width} tokens{f' and {vocab_size} flags' * masks}",
        )
        self.num_envs = num_envs
        self.single_observation_space = self.task.observation_space
        self.single_action_space = self.task.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "autoreset_mode": AutoresetMode(mode)}  # type: ignore[misc]
        self.copy = copy
        self.max_episodes = max_episodes
        self._every_slot = np.arange(num_envs)
        queue = PromptQueue(len(self.task.prompts), shuffle, group_size)
        self._slots, self._stream, self._rewards = empty_slots(self.task, num_envs, queue, reward_mode == "deferred")
        self._infos = SlotInfos(self.task, self._slots, self._stream)
        self._ready = False  # before the first reset and after a failed function of the caller, step() is refused
        self._finish_reason = np.zeros(num_envs, dtype=np.int8)  # (B,) 0 while the episode goes on

    @property
    def reward_mode(self) -> str:
        """When whole responses are paid for, "immediate" or "deferred"; fixed for the life of the env."""
        return "deferred" if self._rewards.deferred else "immediate"

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """Who resets a slot whose episode has ended, and when; fixed for the life of the env."""
        return self.metadata["autoreset_mode"]

    @property
    def active(self) -> BoolArray:
        """(B,) False for slots that are parked until the next reset."""
        return self._stream.active

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[VectorObservation, dict[str, Any]]:
        """Start a new stream in all slots, or new episodes in some.

        Without a seed the prompt queue goes on where it stands; prompts of episodes that were cut short by the reset
        do not come again in this pass. A seed starts everything over: queue, episode ids, episodes not yet flushed;
        with a `reset_mask`, which goes on with the stream, the queue alone.

        Args:
            seed: seeds `np_random`, which shuffles the prompts. Of a list with a seed for each slot, the first that is
                not None does: there is one queue for all slots, and nothing else is drawn at random.
            options: `max_episodes`: length N of this stream, None for endless; `reset_mask`: (B,) bool, reset only
                these slots, within the current stream, which counts the episodes that this cuts short;
                `prompt_index`: int or (B,), prompts to start from instead of drawing from the queue.
        """
        ask = vector_reset(options, self.task.prompts, self.num_envs, self.max_episodes, self._ready, self.group_size)
        seed = queue_seed(seed, self.num_envs)
        super().reset(seed=seed)
        if seed is not None or not self._stream.queue.started:
            self._stream.queue.restart(self.np_random)
            self._stream.next_group()
        if ask.new_stream or not self._stream.started:
            self._stream.start(ask.max_episodes)
            if seed is not None:
                self._stream.next_episode_id = 0
                self._rewards.forget()
        self._ready = False  # until all went well
        self._begin(ask.slots, ask.prompt_indices)
        return self._observe(ask.slots)

    def step(self, actions: IntArray) -> tuple[VectorObservation, FloatArray, BoolArray, BoolArray, dict[str, Any]]:
        """Append one token to each running slot.

        Args:
            actions: (B,) token ids; those of parked slots are ignored.

        Raises:
            ResetNeeded: before the first reset, after the stream has drained, or in "Disabled" mode with ended slots.
            InvalidAction: a token is outside the vocabulary or not allowed by `action_mask`; names slots and tokens.
            RewardError: a reward function failed; reset before the next step.
            ValueError: the function `action_mask` failed; likewise.
        """
        if not self._ready:
            raise ResetNeeded(NO_EPISODE.format("step"))
        running = self._stream.running(refills=self.autoreset_mode != AutoresetMode.DISABLED)
        tokens = checked_tokens(actions, running, self.num_envs, self.task.vocab_size, self._infos.allowed)
        waiting = np.flatnonzero(self._stream.status == WAITING)  # "NextStep": for them this step is the reset
        self._slots.append(running, tokens)
        lengths = self._slots.response_lengths(running)
        reasons = self.task.finish_reasons(tokens, lengths, lambda rows: self._slots.responses(running[rows]))
        self._finish_reason[running] = reasons
        ended = reasons != 0
        done = running[ended]

        terminated = np.zeros(self.num_envs, dtype=np.bool_)
        truncated = np.zeros(self.num_envs, dtype=np.bool_)
        if len(done):
            terminated[done] = self.task.is_terminal(reasons[ended])
            truncated[done] = ~terminated[done]
        self._ready = False  # until all rewards are paid
        rewards, step_infos, end_infos = self._rewards.pay(running, tokens, lengths, reasons)
        self._show(done)

        infos: dict[str, Any] = {}
        if self.autoreset_mode == AutoresetMode.SAME_STEP and len(done):
            self._infos.put_final(infos, done, {name: values[ended] for name, values in step_infos.items()} | end_infos)
            self._begin(done)
            put(infos, self.num_envs, running[~ended], {name: value[~ended] for name, value in step_infos.items()})
        else:
            put(infos, self.num_envs, running, step_infos)
            put(infos, self.num_envs, done, end_infos)
            self._begin(waiting)
            self._stream.wait(done)
        self._infos.put_state(infos, self._every_slot, self.copy)
        self._ready = True
        return self._slots.observation(self.copy), rewards, terminated, truncated, infos

    def flush_rewards(self) -> tuple[IntArray, FloatArray]:
        """Score the finished episodes in one call: (episode_ids, rewards), (n,) each, ascending in episode id.

        Raises:
            RewardError: the reward function failed; the episodes are still there.
            ValueError: `reward_mode` is not "deferred".
        """
        episodes = self.pop_episodes()
        ids = np.array([episode.episode_id for episode in episodes], dtype=np.int64)
        return ids, np.array([episode.reward for episode in episodes], dtype=np.float64)

    def pop_episodes(self, score: bool = True) -> list[Episode]:
        """Hand over the finished episodes, ascending in episode id, scored in one call of the reward function.

        Args:
            score: False leaves `reward` NaN, for a caller that scores the episodes itself.

        Raises:
            RewardError: the reward function failed; the episodes are still there.
            ValueError: `reward_mode` is not "deferred".
        """
        if self.reward_mode != "deferred":
            raise ValueError("episodes are kept with reward_mode='deferred' only; this env pays rewards in step()")
        return self._rewards.take(score)

    def action_masks(self) -> BoolArray:
        """(B, V) True for each token that may come next; the name is the one that sb3-contrib calls."""
        return self._infos.action_masks()

    def render(self) -> tuple[Any, ...] | None:
        """One text per slot under "ansi", one picture under "rgb_array"; under "human" what ended was printed.

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
        texts = [self._text(slot) for slot in range(self.num_envs)]
        return tuple(texts if self.render_mode == "ansi" else map(picture, texts))

    def observe(self) -> tuple[VectorObservation, dict[str, Any]]:
        """What the agent sees now, as `reset` returns it, without a step; to go on after `load_state_dict`."""
        if not self._ready:
            raise ResetNeeded(NO_EPISODE.format("observe"))
        return self._observe(self._every_slot)

    def state_dict(self) -> dict[str, Any]:
        """All that decides how the env goes on, running and unflushed episodes included, as plain Python values."""
        return {
            "np_random": self.np_random.bit_generator.state,
            "np_random_seed": self._np_random_seed,
            "ready": self._ready,
            "stream": self._stream.state_dict(),
            "finish_reason": self._finish_reason.tolist(),
            "rewards": self._rewards.state_dict(),
            "task": self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly as the env that gave `state`: `reset()` for the next stream, or `observe()` and `step()`.

        Raises:
            ValueError: the state is of an env with another number of slots, or with other prompts, groups, P, V, stop
                tokens or strings, T, limit, layout of observations, gamma, shuffling, autoreset mode, reward mode,
                number of reward components, or payment of steps; or it is damaged. The env is what it was.
        """
        check_identity(state, self._identity())
        rng, _ = seeding.np_random()
        old, deferred = self._stream.queue, self._rewards.deferred
        queue = PromptQueue(old.num_prompts, old.shuffle, old.group_size)
        slots, stream, rewards = empty_slots(self.task, self.num_envs, queue, deferred)
        with refusing_damage():
            rng.bit_generator.state = state["np_random"]
            stream.load_state_dict(state["stream"], rng)
            rewards.load_state_dict(state["rewards"])
            finish_reason = filled(self._finish_reason, state["finish_reason"])
            seed, ready = state["np_random_seed"], state["ready"]
        self._slots, self._stream, self._rewards, self._finish_reason = slots, stream, rewards, finish_reason
        self._infos = SlotInfos(self.task, slots, stream)
        self.np_random, self._np_random_seed = rng, seed
        self._ready = False  # until action_mask went well
        if ready:
            self._observe(self._every_slot)  # which asks it about the restored states

    def _identity(self) -> dict[str, Any]:
        modes = {"reward_mode": self.reward_mode, "autoreset_mode": self.autoreset_mode.value}
        queue = self._stream.queue
        dealing = {"shuffle": queue.shuffle, "group_size": queue.group_size}
        return self.task.identity() | modes | dealing | {"num_envs": self.num_envs}

    def _observe(self, slots: IntArray) -> tuple[VectorObservation, dict[str, Any]]:
        self._ready = False  # until action_mask went well
        infos: dict[str, Any] = {}
        self._infos.put_state(infos, slots, self.copy)
        self._ready = True
        return self._slots.observation(self.copy), infos

    def _begin(self, slots: IntArray, prompt_indices: list[int] | None = None) -> None:
        started = self._stream.begin(slots, prompt_indices)
        self._finish_reason[started] = 0
        self._rewards.begin(started)

    def _text(self, slot: int) -> str:
        reason = int(self._finish_reason[slot]) if self._stream.episode_id[slot] >= 0 else None
        reward = None if self._rewards.deferred else float(self._rewards.totals[slot])
        return slot_text(slot, self._slots, reason, reward, self.task.tokenizer)

    def _show(self, done: IntArray) -> None:
        if self.render_mode == "human":
            for slot in done.tolist():
                print(self._text(slot), flush=True)
