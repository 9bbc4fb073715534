"""A policy acts in the token environment: episodes for learning, completions for reading."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.data.chat import stop_strings_of, stop_token_ids
from lit_rlhf.data.texts import as_texts
from lit_rlhf.engine.sharding import gathered
from lit_rlhf.errors import UserError, require, require_types
from lit_rlhf.models.decoding import make_decoder, sample
from lit_rlhf.models.packed_linear import packed_linears
from lit_rlhf.models.policy import Policy, context_length
from lit_rlhf.rollout.scoring import Rewards
from token_mdp import Episode, TokenVectorEnv


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are written.

    Args:
        max_new_tokens: length limit of a completion.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample from the k most likely tokens; None = all.
        top_p: sample from the smallest set of tokens of at least this mass.
        min_p: sample from tokens at least this times as likely as the most likely one.
        stop_strings: texts that end a completion as soon as they stand in it, and stay in it, beside the stop tokens
            and those of the model's generation config.
        num_slots: completions written at the same time.
        seed: of the sampling; draws follow a prompt's number in the data, not its batch, slot or rank: the same data,
            seed and settings give the same completions.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    stop_strings: tuple[str, ...] = ()
    num_slots: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        require_types(type(self), vars(self))
        if self.max_new_tokens < 1 or self.num_slots < 1:
            raise UserError(f"max_new_tokens ({self.max_new_tokens}) and num_slots ({self.num_slots}) must be positive")
        sampled = self.temperature == 0 or 1e-6 <= self.temperature < math.inf  # below, logits overflow float32
        require(sampled, "temperature", self.temperature, "0 (the most likely token), or at least 1e-6 and finite")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise UserError(f"top_p ({self.top_p}) must be in (0, 1], min_p ({self.min_p}) in [0, 1]")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(all(self.stop_strings), "stop_strings", self.stop_strings, "texts, none of them empty")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k ({self.top_k}) must be 1 or more, or null for all tokens")

    @property
    def is_whole(self) -> bool:
        """Whether completions are samples of the whole distribution at this temperature."""
        return self.temperature > 0 and self.top_k is None and self.top_p == 1 and self.min_p == 0


LEAST_APART = 2**40  # numbers by which responses to one prompt are drawn: no data have as many prompts


class Play(NamedTuple):
    """Episodes as the policy played them, in order of their ids."""

    episodes: list[Episode]
    sampled_logprobs: list[np.ndarray]  # (T,) each: log-probs under the distribution sampled from
    greedy: list[Episode] | None = None  # the most likely response to each of their prompts, where it was asked for
    dropped: int | None = None  # groups that others were dealt in place of, where that was asked for (`dealing.py`)


class Dice:
    """Uniform draws that depend on (seed, stream, episode) alone: not on slots, batches or the order of finishing.

    Where `numbers` are given, episode k draws as episode `numbers[k]`.
    """

    def __init__(
        self, num_slots: int, max_new_tokens: int, seed: int, stream: int = 0, numbers: np.ndarray | None = None
    ) -> None:
        self.seed, self.stream, self.numbers = seed, stream, numbers
        self.draws = np.zeros((num_slots, max_new_tokens), dtype=np.float32)
        self.episode_ids = np.full(num_slots, -1, dtype=np.int64)

    def uniforms(self, slots: np.ndarray, episode_ids: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """(n,) one draw per slot, for step t of its episode."""
        for slot in slots[self.episode_ids[slots] != episode_ids[slots]]:
            number = int(episode_ids[slot] if self.numbers is None else self.numbers[episode_ids[slot]])
            key = np.random.SeedSequence([self.seed, self.stream, number])
            self.draws[slot] = np.random.Generator(np.random.Philox(key)).random(self.draws.shape[1], np.float32)
            self.episode_ids[slot] = episode_ids[slot]
        return self.draws[slots, steps[slots]]


class RolloutBackend:
    """What plays the episodes of on-policy training; this one is the default, in this process.

    A subclass may generate elsewhere, as long as the environment sees every token and `play` returns the same.

    Args:
        cuda_graphs: capture the decode step on CUDA; on other devices, and for sharded policies, nothing is captured.
    """

    def __init__(self, cuda_graphs: bool = True) -> None:
        require_types(RolloutBackend.__init__, locals())
        self.cuda_graphs = cuda_graphs

    def play(
        self,
        policy: Policy,
        env: TokenVectorEnv,
        settings: GenerationSettings,
        num_episodes: int,
        stream: int = 0,
        env_seed: int | None = None,
    ) -> Play:
        """Play `num_episodes` episodes to their ends; see the function `play`."""
        return play(policy, env, settings, num_episodes, stream, env_seed, self.cuda_graphs)


@torch.no_grad()
def play(
    policy: Policy,
    env: TokenVectorEnv,
    settings: GenerationSettings,
    num_episodes: int,
    stream: int = 0,
    env_seed: int | None = None,
    cuda_graphs: bool = True,
    numbers: np.ndarray | None = None,
    heard: Callable[[int, int], None] | None = None,
) -> Play:
    """Play episodes to their ends, refilling slots at once: continuous batching, in Gymnasium's words.

    Args:
        policy: acts; its weights stay as they are meanwhile.
        env: with deferred rewards; its prompt queue goes on where the last call stopped.
        settings: sampling; its length limit and slots are the environment's affair here.
        num_episodes: how many to play.
        stream: makes the draws of several ranks differ.
        env_seed: starts the prompt queue anew; needed once, before the first stream.
        cuda_graphs: capture the decode step on CUDA.
        numbers: (num_episodes,) see `Dice`.
        heard: called with the id of an episode and each token of its response, as it is written.
    """
    max_new_tokens = env.task.max_new_tokens
    decoder = make_decoder(policy, env.num_envs, env.task.prompts.max_length + max_new_tokens, cuda_graphs)
    dice = Dice(env.num_envs, max_new_tokens, settings.seed, stream, numbers)
    logprobs = np.zeros((env.num_envs, max_new_tokens), dtype=np.float32)
    logprobs_of: dict[int, np.ndarray] = {}
    device = policy.model.device

    with gathered(policy), packed_linears(policy):
        observation: Any
        observation, info = env.reset(seed=env_seed, options={"max_episodes": num_episodes})
        while (active := info["active"]).any():
            slots = np.flatnonzero(active)
            episode_ids = info["episode_id"].copy()
            steps = observation["length"][:, 0] - observation["prompt_length"][:, 0]
            groups = None if env.group_size == 1 else episode_ids // env.group_size
            logits = decoder.logits(observation["input_ids"], observation["length"][:, 0], active, episode_ids, groups)
            uniforms = torch.from_numpy(dice.uniforms(slots, episode_ids, steps)).to(device)
            tokens, token_logprobs = sample(
                logits, uniforms, settings.temperature, settings.top_k, settings.top_p, settings.min_p
            )
            actions = np.zeros(env.num_envs, dtype=np.int64)
            actions[slots] = tokens.cpu().numpy()
            if heard is not None:
                for pair in zip(episode_ids[slots].tolist(), actions[slots].tolist(), strict=True):
                    heard(*pair)
            logprobs[slots, steps[slots]] = token_logprobs.cpu().numpy()
            observation, _, terminated, truncated, info = env.step(actions)
            for slot in np.flatnonzero((terminated | truncated) & active):
                logprobs_of[int(episode_ids[slot])] = logprobs[slot, : steps[slot] + 1].copy()
    episodes = env.pop_episodes()
    return Play(episodes, [logprobs_of[episode.episode_id] for episode in episodes])


def complete(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptBatch,
    settings: GenerationSettings,
    rewards: Rewards | None = None,
    heard: Callable[[int, int], None] | None = None,
    group_size: int = 1,
) -> list[Episode]:
    """One episode per prompt, or a group of each, in the order of the prompts.

    Args:
        policy: acts.
        tokenizer: says which tokens stop a response.
        prompts: B prompts, with the columns that the reward wants; their numbers say what is drawn for them.
        settings: sampling, length limit and slots.
        rewards: bound to the tokenizer; None scores 0.
        heard: called with the number of an episode among these and each token of its response, as it is written.
        group_size: episodes of each prompt; the first of them are those of a smaller group.

    Raises:
        UserError: the prompts leave no room in the context, or a reward failed.
    """
    check_context(policy, prompts.prompt_ids, settings.max_new_tokens)
    num_episodes = group_size * len(prompts.prompt_ids)
    num_slots = min(settings.num_slots, num_episodes)
    limits = (settings.max_new_tokens, settings.stop_strings)
    env = make_env(policy, tokenizer, prompts, num_slots, *limits, rewards, shuffle=False, group_size=group_size)
    numbers = np.arange(len(prompts.prompt_ids)) if prompts.numbers is None else prompts.numbers
    numbers = (numbers[:, None] + LEAST_APART * np.arange(group_size)).ravel()
    with nullcontext() if rewards is None else rewards.naming(prompts):
        how: dict[str, Any] = {"env_seed": settings.seed, "numbers": numbers, "heard": heard}
        episodes = play(policy, env, settings, num_episodes, **how).episodes
    return episodes if rewards is None else rewards.settled(episodes, prompts)


def make_env(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptBatch,
    num_slots: int,
    max_new_tokens: int,
    stop_strings: Sequence[str],
    rewards: Rewards | None,
    shuffle: bool = True,
    group_size: int = 1,
) -> TokenVectorEnv:
    """The environment in which a policy answers these prompts, so often each; without rewards it scores 0.

    Raises:
        UserError: sizes that this machine cannot hold, or columns that no reward could be handed.
    """
    generation_config = policy.model.generation_config
    strings = tuple(dict.fromkeys([*stop_strings, *stop_strings_of(generation_config)]))
    try:
        return TokenVectorEnv(
            prompts=prompts.prompt_ids,
            columns=None if rewards is None else prompts.columns,
            num_envs=num_slots,
            vocab_size=policy.vocabulary_size,
            stop_token_ids=stop_token_ids(tokenizer, generation_config),
            stop_strings=strings,
            tokenizer=tokenizer if strings else None,
            max_new_tokens=max_new_tokens,
            reward_fn=_no_reward if rewards is None else rewards.reward_fn,
            abstain=rewards is not None and rewards.abstain,
            reward_mode="deferred",
            shuffle=shuffle,
            group_size=group_size,
            copy=False,
        )
    except ValueError as error:
        raise UserError(str(error).replace("num_envs", "num_slots")) from error


def predicted_rows(prompts: PromptBatch, made: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was made of each prompt, beside the columns of its row.

    The prompt is given as it stood in the data, before any tokens were cut. A completion that the data have stands as
    `reference_completion` beside one that was generated.

    Raises:
        UserError: the data have another column of a name that is written.
    """
    columns, written = dict(prompts.columns), set().union(*made)
    if "completion" in written & columns.keys():
        columns["reference_completion"] = columns.pop("completion")
    if clash := sorted((written & columns.keys()) - {"prompt"}):
        raise UserError(f"predict writes {clash}, and the data have columns of that name; rename them in the data")
    rows = []
    for number, row in enumerate(made):
        given = {name: values[number] for name, values in columns.items()}
        rows.append({**row, **given, "prompt": given.get("prompt", row.get("prompt"))})
    return rows


def episode_rows(tokenizer: PreTrainedTokenizerBase, episodes: list[Episode]) -> list[dict[str, Any]]:
    """Episodes as text."""
    rows = []
    for episode in episodes:
        prompt, completion = as_texts(tokenizer, episode.prompt_ids, episode.response_ids)
        rows.append({"prompt": prompt, "completion": completion, "finish_reason": episode.finish_reason.label})
    return rows


def check_context(policy: Policy, prompt_ids: Sequence[np.ndarray], max_new_tokens: int) -> None:
    """Refuse prompts that leave no room for the response in the model's context."""
    room = room_for_response(policy, prompt_ids)
    if room is not None and max_new_tokens > room:
        longest = max(len(ids) for ids in prompt_ids)
        context = longest + room
        remedies = [f"max_new_tokens to {room}"] if room > 0 else []
        remedies += [f"max_prompt_length to {context - max_new_tokens}"] if max_new_tokens < context else []
        raise UserError(
            f"the longest prompt ({longest} tokens) and max_new_tokens ({max_new_tokens}) do not fit into the model's "
            f"context of {context}; lower {' or '.join(remedies) or 'both'}"
        )


def room_for_response(policy: Policy, prompt_ids: Sequence[np.ndarray]) -> int | None:
    """Tokens of the model's context that the longest prompt leaves to a response; None where no limit is known."""
    context = context_length(policy.model.config)
    return None if context is None else context - max(len(ids) for ids in prompt_ids)


def _no_reward(prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], **columns: Any) -> np.ndarray:
    return np.zeros(len(responses))
