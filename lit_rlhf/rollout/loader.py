"""The training batches of on-policy learning: a rollout is played as the first of them is asked for."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.batches import NoBatch, RolloutBatch
from lit_rlhf.errors import UserError, require_alike
from lit_rlhf.models.policy import Policy
from lit_rlhf.rollout.dealing import equal_groups, topped_up
from lit_rlhf.rollout.experience import Experience
from lit_rlhf.rollout.minibatches import require_room
from lit_rlhf.rollout.play import GenerationSettings, Play, make_env
from lit_rlhf.signals import SIGNALS
from token_mdp import Episode

if TYPE_CHECKING:
    from lit_rlhf.rollout.data_module import RolloutDataModule


class RolloutLoader:
    """Iterating plays a rollout, hands it to the agent to score, and yields its minibatches.

    Its state is the environment's prompt queue and random state, and the rollout that is being learnt from; one entry
    per rank.
    """

    def __init__(self, data: "RolloutDataModule") -> None:
        assert data.trainer is not None
        self.data = data
        self.trainer = data.trainer
        self.agent: Any = data.trainer.lightning_module
        sizes, self.minibatches = data.settings, data.minibatches()
        require_room(sizes.rollout_size, self.trainer.num_nodes, sizes.max_new_tokens, self.minibatches.ppo_epochs)
        self.prompts = data.training_share()
        policy, tokenizer = cast(Policy, self.agent.policy), cast(PreTrainedTokenizerBase, data.tokenizer)
        num_slots = min(sizes.num_slots, self.minibatches.num_episodes)
        limits = (sizes.max_new_tokens, sizes.stop_strings)
        self.env = make_env(
            policy, tokenizer, self.prompts, num_slots, *limits, data.rewards, group_size=sizes.group_size
        )
        self.env_seed: int | None = sizes.seed + data.trainer.global_rank  # until the first rollout
        self.env_before: dict[str, Any] | None = None  # the rollout that is being played
        self.experience: Experience | None = None  # of the iteration under way
        self.done = 0  # its micro-batches handed out so far

    def __len__(self) -> int:
        return len(self.minibatches)

    def __iter__(self) -> Iterator[RolloutBatch | NoBatch]:
        if self.experience is None or self.done == len(self):
            self.experience, self.done = self.agent.experience(self.play(), self.minibatches), 0
        for number in range(self.done, len(self)):
            self.done += 1
            # After a stop, steps are taken for form's sake (`OnPolicyModule.on_before_optimizer_step`): one episode.
            yield self.experience.micro_batch(number, self.trainer.world_size, limit=1 if self.agent.stopped else None)

    def play(self) -> Play:
        """The episodes of an iteration; a run that a signal ends meanwhile plays them anew when it goes on."""
        self.env_before = None if self.env_seed is not None else self.env.state_dict()
        played = self.play_episodes(self.data.settings.rollout_size // self.trainer.world_size, self.env_seed)
        if self.agent.sampling.dynamic_sampling:
            played = self.deal_again(played)
        if self.agent.plays_greedy:
            played = played._replace(greedy=self.play_greedy(sorted({e.prompt_index for e in played.episodes})))
        self.env_seed = self.env_before = None
        return played

    def play_episodes(self, num_episodes: int, env_seed: int | None = None) -> Play:
        """So many more episodes, whole groups, with their rewards."""
        rewards, in_precision = self.data.rewards, self.trainer.precision_plugin.forward_context()
        with SIGNALS.interruptible(self.trainer), rewards.naming(self.prompts), in_precision:
            played = self.data.backend.play(
                self.agent.policy,
                self.env,
                self.agent.sampling.generation,
                num_episodes,
                stream=self.trainer.global_rank,
                env_seed=env_seed,
            )
        return played._replace(episodes=rewards.settled(played.episodes, self.prompts))

    def deal_again(self, played: Play) -> Play:
        """Other groups in place of those with equal rewards, as long as there are any, and within the bound.

        Ranks play together, since sharded weights are gathered by all: one that lacks nothing plays a group as well.
        """
        size, played = self.data.settings.group_size, played._replace(dropped=0)
        for _ in range(self.agent.sampling.dynamic_sampling):
            lacking = int(equal_groups(played, size).sum())
            if not self.agent.most_of_ranks(torch.tensor(lacking)).item():
                break
            played = topped_up(played, self.play_episodes(max(lacking, 1) * size), size)
        return played

    def play_greedy(self, indices: list[int]) -> list[Episode]:
        """The most likely response to each of these prompts; the episodes name them as those of the rollout do."""
        prompts, rewards, sizes = self.prompts.take(indices), self.data.rewards, self.data.settings
        policy, tokenizer = cast(Policy, self.agent.policy), cast(PreTrainedTokenizerBase, self.data.tokenizer)
        slots, limits = min(sizes.num_slots, len(indices)), (sizes.max_new_tokens, sizes.stop_strings)
        env = make_env(policy, tokenizer, prompts, slots, *limits, rewards, shuffle=False)
        greedy = GenerationSettings(temperature=0.0)
        in_precision = self.trainer.precision_plugin.forward_context()
        with SIGNALS.interruptible(self.trainer), rewards.naming(prompts), in_precision:
            played = self.data.backend.play(policy, env, greedy, len(indices), env_seed=sizes.seed)
        episodes = rewards.settled(played.episodes, prompts)
        return [episode._replace(prompt_index=indices[episode.prompt_index]) for episode in episodes]

    def state_dict(self) -> dict[str, Any]:
        """The states of all ranks."""
        under_way = self.done < len(self)
        mine = {
            "env": None if self.env_seed is not None else self.env_before or self.env.state_dict(),
            "experience": self.experience.state_dict() if under_way and self.experience is not None else None,
            "done": self.done if under_way else 0,
            "plan": asdict(self.minibatches),
        }
        states: list[Any] = [mine] * self.trainer.world_size
        if dist.is_available() and dist.is_initialized():
            dist.all_gather_object(states, mine)
        return {"ranks": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        name = "it is damaged: its combined_loader"
        require_alike(state, {}, name, ("ranks",))
        count = len(state["ranks"]) if isinstance(state["ranks"], list) else self.trainer.world_size
        require_alike(state["ranks"], [{}] * count, f"{name}['ranks']")
        if len(state["ranks"]) != self.trainer.world_size:
            raise UserError(
                f"it was written by {len(state['ranks'])} ranks, this run has {self.trainer.world_size}: "
                "prompts and rollouts cannot be divided anew; resume with as many ranks"
            )
        mine = state["ranks"][self.trainer.global_rank]
        plan = asdict(self.minibatches)
        require_alike(mine, {"done": 0, "plan": {}}, name, ("done", "plan", "env", "experience"))
        if mine["done"] and plan | mine["plan"] != plan:  # one of before groups tells nothing of them
            raise UserError(
                f"it stopped in the middle of an iteration of {mine['plan']}, this run has {plan}; "
                "resume with the same, or from a checkpoint of an iteration's end"
            )
        if mine["env"] is not None:
            try:
                self.env.load_state_dict(mine["env"])
            except ValueError as error:
                raise UserError(f"{error}; resume with the data settings of the run") from error
            self.env_seed = None
        self.experience = None if mine["experience"] is None else Experience.from_state_dict(mine["experience"])
        self.done = mine["done"]
