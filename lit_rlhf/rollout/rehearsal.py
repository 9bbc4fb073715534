"""A rollout as long as it can be, to count memory: the policy acts where that takes most, and nothing is sampled."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lit_rlhf.engine.sharding import gathered
from lit_rlhf.models.decoding import make_decoder, sample
from lit_rlhf.models.packed_linear import packed_linears
from lit_rlhf.models.policy import Policy
from lit_rlhf.rollout.play import GenerationSettings, Play, RolloutBackend
from lit_rlhf.rollout.rewards import Reward
from lit_rlhf.rollout.scoring import Rewards
from token_mdp import Episode, TokenVectorEnv


class RehearsedPlay(RolloutBackend):
    """Real prompts, and responses of as many tokens as they may have.

    The policy acts twice: where all slots begin, and where all of them stand before their last token. What the cache
    takes does not change between.

    Args:
        phase: called with what is done from here on.

    Attributes:
        learnt: tokens that are learnt from of episodes that share a prompt, so that some of these together are all that
            a micro-batch may have; None = all.
        sharing: how many episodes share one.
    """

    def __init__(self, phase: Callable[[str], None]) -> None:
        super().__init__(cuda_graphs=False)
        self.phase = phase
        self.learnt: int | None = None
        self.sharing = 1

    @torch.no_grad()
    def play(
        self,
        policy: Policy,
        env: TokenVectorEnv,
        settings: GenerationSettings,
        num_episodes: int,
        stream: int = 0,
        env_seed: int | None = None,
    ) -> Play:
        """Episodes of one token over and over."""
        self.phase("rollout")
        longest = env.task.max_new_tokens
        decoder = make_decoder(policy, env.num_envs, env.task.prompts.max_length + longest, cuda_graphs=False)
        token = int(np.flatnonzero(~env.task.is_stop)[-1])
        with gathered(policy), packed_linears(policy):
            observation: Any
            observation, info = env.reset(seed=env_seed, options={"max_episodes": num_episodes})
            for step in range(longest * num_episodes):
                active, lengths = info["active"], observation["length"][:, 0]
                if not active.any():
                    break
                if step in (0, longest - 1):
                    decoder.cached_lengths[:] = lengths - 1 if step else 0
                    decoder.cached_episodes[:] = info["episode_id"]
                    ids = info["episode_id"].copy()
                    groups = None if env.group_size == 1 else ids // env.group_size
                    logits = decoder.logits(observation["input_ids"], lengths, active, ids, groups)
                    how = (settings.temperature, settings.top_k, settings.top_p, settings.min_p)
                    sample(logits, torch.zeros(len(logits)), *how)
                    del logits
                observation, _, _, _, info = env.step(np.full(env.num_envs, token))
        del decoder
        self.phase("reward")
        episodes = [self.cut(episode) for episode in env.pop_episodes()]
        return Play(episodes, [np.zeros(len(episode.response_ids), np.float32) for episode in episodes])

    def cut(self, episode: Episode) -> Episode:
        """An episode of as many tokens as are learnt from; a short prompt makes for a longer response."""
        if self.learnt is None:
            return episode
        room = max(1, (self.learnt - len(episode.prompt_ids)) // self.sharing)
        return episode._replace(response_ids=np.resize(episode.response_ids, room))


class Silent(Reward):
    """Stands for a function, which is not called: it may ask a server, and holds no tensors that are known here."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name

    def __call__(self, prompts: Any, responses: Any, **columns: Any) -> np.ndarray:
        """(n,) zeros."""
        return np.zeros(len(responses))


def silence(rewards: Rewards) -> None:
    """Let functions say nothing; reward models score."""
    rewards.terms = [
        term._replace(reward=Silent(str(term.reward)))
        if any(isinstance(view, str) for view in term.reward.views(term.name).values())
        else term
        for term in rewards.terms
    ]
